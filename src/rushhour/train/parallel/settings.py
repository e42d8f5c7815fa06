"""How several workers share a training: the values that a person chooses, checked."""

from __future__ import annotations

from typing import Literal

import msgspec

from rushhour.errors import PlanError
from rushhour.train.parallel.cost import Constants

Mode = Literal["auto", "data", "model", "pipeline", "hybrid", "sharded", "tables"]
"""The family of a parallel plan; see `plan_for`."""

Backend = Literal["gloo", "nccl", "mpi"]
"""Of torch.distributed."""

GradientCompression = Literal["none", "fp16", "bf16", "powersgd"]
"""How gradients are sent: as they are, in 16 bits, or as matrices of rank 2 with error feedback (PowerSGD, Vogels et
al. 2019)."""

BatchNorm = Literal["whole", "local"]
"""Whose rows batch normalisation sees: those of the whole batch, as one process does, or each worker's own, as torch's
DistributedDataParallel does it."""


class Relaxed(msgspec.Struct, frozen=True):
    """Workers synchronise only every few steps, and train on their own rows in between: not equal to one process.

    Local SGD (Stich 2018) averages the weights. DiLoCo (Douillard et al. 2023) takes the mean change as a gradient and
    gives it to an outer optimizer, SGD with Nesterov's momentum: there `outer_lr=0.7, outer_momentum=0.9`.

    Attributes:
        every: steps between two synchronisations.
        outer_lr: learning rate of the outer optimizer; 1 is local SGD.
        outer_momentum: momentum of the outer optimizer; 0 is local SGD.
    """

    every: int
    outer_lr: float = 1.0
    outer_momentum: float = 0.0

    def __post_init__(self) -> None:
        if self.every < 1 or not self.outer_lr > 0 or not 0 <= self.outer_momentum < 1:
            raise PlanError(
                f"cannot synchronise workers every {self.every} steps with outer learning rate {self.outer_lr:g} and "
                f"momentum {self.outer_momentum:g}",
                "the steps are 1 or more, the rate is above 0, and the momentum is from 0 to below 1",
                "change that setting",
            )


class ParallelSettings(msgspec.Struct, frozen=True):
    """How several workers share a training.

    Raises `PlanError` where relaxed workers would not each have the whole network.

    Attributes:
        mode: the family of the plan; `auto`: the fastest of all.
        memory_bytes: that each worker may use; by default its share of this machine's.
        compression: of the gradients that are sent.
        relaxed: workers synchronise only every few steps.
        batch_norm: sees the whole batch, or `local`: each worker's own rows.
        shared_memory: workers on one machine sum gradients in shared memory instead of sending them.
        backend: of torch.distributed.
        constants: of the machine; measured where not given, which takes some seconds.
    """

    mode: Mode = "auto"
    memory_bytes: int | None = None
    compression: GradientCompression = "none"
    relaxed: Relaxed | None = None
    batch_norm: BatchNorm = "whole"
    shared_memory: bool = True
    backend: Backend = "gloo"
    constants: Constants | None = None

    def __post_init__(self) -> None:
        if self.relaxed is not None and self.mode not in ("auto", "data"):
            raise not_relaxable(self.mode)

    @property
    def exact(self) -> bool:
        """Whether the training is that of one worker, up to rounding."""
        return self.compression == "none" and self.relaxed is None and self.batch_norm == "whole"


def not_relaxable(mode: Mode) -> PlanError:
    """The error for a plan of this mode whose workers would synchronise only every few steps."""
    return PlanError(
        f"a {mode} plan cannot be relaxed",
        "each worker must have the whole network if workers synchronise only every few steps",
        "use --parallel data",
    )
