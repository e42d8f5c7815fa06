"""How a network is trained: the values that a person chooses, checked, and the optimizer and schedule of these."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal

import msgspec
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from rushhour.data.augment import Augmentation
from rushhour.errors import ModelError
from rushhour.system import machine

OptimizerName = Literal["adam", "adamw", "sgd"]
ScheduleName = Literal["one-cycle", "cosine", "constant", "step"]


class TrainSettings(msgspec.Struct, frozen=True):
    """How to train. By default Adam with a one-cycle learning rate (Smith and Topin 2017).

    The number of workers is not among them: the same settings are the same training on any number.

    Attributes:
        epochs: passes over the training data.
        batch: samples in an optimizer step, over all workers; the last samples of an epoch that do not fill one are
            left out of that epoch.
        lr: the peak of the learning rate.
        seed: of weights, dropout, order and augmentation.
        bf16: compute convolutions and products in bfloat16; None: where the CPU has instructions for it.
        optimizer: `adam`, `adamw` (decoupled weight decay, Loshchilov and Hutter 2019) or `sgd` (with Nesterov's
            momentum where `momentum` is above 0).
        schedule: `one-cycle`; `cosine`: linear warm-up over `warmup`, then a cosine to 0; `constant`; `step`: a tenth
            after each third of the steps.
        warmup: share of the steps of the warm-up of `cosine`.
        weight_decay: of all weights; an L2 penalty for `adam` and `sgd`.
        momentum: of `sgd`.
        clip: the largest Euclidean norm that the gradient of a step may have; None: any.
        accumulate: parts in which a step's samples pass through the network, to need less memory. Batch normalisation
            sees each part alone.
        ema: decay per step of an exponential moving average of weights and buffers, which is then validated and sealed.
            In step t it is at most (1 + t) / (10 + t), so that the first weights lose their influence soon.
        patience: epochs without a better metric on the validation part after which training ends; the best epoch is
            then sealed. None: all epochs are trained, and the last one is sealed.
        augment: of pictures in training; never in validation.
        channels_last: pictures may be channels-last in memory, where that is safe and no slower; else they are
            contiguous. Results differ by rounding only.
    """

    epochs: int = 3
    batch: int = 128
    lr: float = 2e-3
    seed: int = 0
    bf16: bool | None = None
    optimizer: OptimizerName = "adam"
    schedule: ScheduleName = "one-cycle"
    warmup: float = 0.05
    weight_decay: float = 0.0
    momentum: float = 0.9
    clip: float | None = None
    accumulate: int = 1
    ema: float | None = None
    patience: int | None = None
    augment: Augmentation | None = None
    channels_last: bool = True

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1 or not (math.isfinite(self.lr) and self.lr > 0):
            raise ModelError(
                f"cannot train for {self.epochs} epochs in batches of {self.batch} at learning rate {self.lr:g}",
                "epochs and batch are at least 1, and the learning rate is above 0",
                "change that setting",
            )
        rules: tuple[tuple[str, bool, str], ...] = (
            ("seed", self.seed >= 0, "at least 0"),
            ("optimizer", self.optimizer in ("adam", "adamw", "sgd"), "adam, adamw or sgd"),
            (
                "schedule",
                self.schedule in ("one-cycle", "cosine", "constant", "step"),
                "one-cycle, cosine, constant or step",
            ),
            ("warmup", 0 <= self.warmup < 1, "a share of the steps, from 0 to below 1"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0"),
            ("momentum", 0 <= self.momentum < 1, "from 0 to below 1"),
            ("clip", self.clip is None or 0 < self.clip < math.inf, "above 0"),
            ("accumulate", 1 <= self.accumulate <= self.batch, f"from 1 to the batch, {self.batch}"),
            ("ema", self.ema is None or 0 < self.ema < 1, "between 0 and 1, for example 0.999"),
            ("patience", self.patience is None or self.patience >= 1, "at least 1 epoch"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise ModelError(f"cannot train with {name}={getattr(self, name)}", f"it is {rule}", "change it")

    @property
    def resolved(self) -> TrainSettings:
        """The same, with `bf16` decided for this machine."""
        if self.bf16 is not None:
            return self
        return msgspec.structs.replace(self, bf16=machine.describe().has_bf16)

    def make_optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """The optimizer of these parameters, all in one group.

        Raises:
            ValueError: if there are none.
        """
        if self.optimizer == "sgd":
            return torch.optim.SGD(
                parameters,
                lr=self.lr,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
                nesterov=self.momentum > 0,
                fused=True,
            )
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return kind(parameters, lr=self.lr, weight_decay=self.weight_decay, fused=True)

    def make_schedule(self, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
        """The learning rate over `steps` optimizer steps; one-cycle moves the momentum too, against it."""
        if self.schedule == "one-cycle":
            moves = self.optimizer != "sgd" or self.momentum > 0
            return OneCycleLR(optimizer, max_lr=self.lr, total_steps=steps, cycle_momentum=moves)
        factor: Callable[[int], float]
        if self.schedule == "cosine":
            factor = partial(_cosine, steps=steps, warmup=round(steps * self.warmup))
        elif self.schedule == "step":
            factor = partial(_thirds, steps=steps)
        else:
            factor = _constant
        return LambdaLR(optimizer, factor)


def _constant(step: int) -> float:
    return 1.0


def _thirds(step: int, *, steps: int) -> float:
    return float(0.1 ** min(2, 3 * step // steps))


def _cosine(step: int, *, steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
