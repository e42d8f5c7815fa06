"""What computes the steps of a training, for the loop: a network on one worker, or its parts on several."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from rushhour.models import Deployed, Inputs
from rushhour.task import Task
from rushhour.train.checkpoint import Snapshot, restore_snapshot, snapshot
from rushhour.train.feed import Batch
from rushhour.train.loss import loss_for

AVERAGE = "ema"
"""The moment of the optimizer that holds the moving average of a parameter."""
AVERAGES = "average"
"""Below it, in a snapshot, the moving averages of buffers."""


class Stepper(Protocol):
    """Every worker makes the same calls in the same order.

    Attributes:
        is_leader: whether this worker validates and writes: worker 0.
        part: which of how many parts of a batch this worker is given.
    """

    is_leader: bool
    part: tuple[int, int]

    def parameters(self) -> Sequence[Tensor]:
        """Of the network, or of the part of it that this worker has."""
        ...

    def step(self, batch: Batch) -> float:
        """Forward and backward: leaves the gradient of the mean loss over the whole batch, and returns that loss.

        Args:
            batch: with the samples of this worker. All workers return the loss of all samples.
        """
        ...

    def clip(self, max_norm: float) -> None:
        """Scale the gradient of the whole network down to this Euclidean norm, if it is larger."""
        ...

    def synchronise(self) -> None:
        """To be called after each step of the optimizer: relaxed workers synchronise when it is time."""
        ...

    def finite(self) -> bool:
        """Whether all weights, on all workers, are numbers."""
        ...

    def from_leader(self, value: float) -> float:
        """The value that the leading worker has."""
        ...

    def nonfinite_rows(self, batch: Batch) -> list[int]:
        """The samples of the whole batch, as rows of the training part, whose own loss is NaN or infinite."""
        ...

    def average(self, optimizer: torch.optim.Optimizer, decay: float) -> None:
        """Move the averages of parameters and buffers towards their values, with which they begin."""
        ...

    def snapshot(
        self,
        step: int,
        optimizer: torch.optim.Optimizer,
        schedule: LRScheduler,
        notes: Mapping[str, Any],
        more: Mapping[str, Tensor],
    ) -> Snapshot | None:
        """A snapshot of the whole training, on the leading worker; None on the others."""
        ...

    def restore(self, found: Snapshot, optimizer: torch.optim.Optimizer, schedule: LRScheduler) -> None:
        """Restore a snapshot whose shapes fit."""
        ...

    def averaged(self, optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
        """Within the block, average weights replace the network's, where they are kept."""
        ...

    def predict(self, inputs: Inputs) -> Tensor | None:
        """The network's outputs in evaluation mode for samples that all workers are given; None but on the leader."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """Copies of the whole network's state, which share no memory; empty but on the leader."""
        ...


class SingleStepper:
    """A `Stepper` of a network on one worker.

    Args:
        deployed: with the network; its preprocessing is applied to the inputs.
        task: decides the loss.
        accumulate: parts in which a batch passes through the network.
        bf16: whether convolutions and products are computed in bfloat16.
    """

    is_leader = True
    part = (0, 1)

    def __init__(self, deployed: Deployed, task: Task, *, accumulate: int, bf16: bool) -> None:
        self._deployed = deployed
        self._task = task
        self._loss = loss_for(task, "sum")
        self._accumulate = accumulate
        self._bf16 = bf16
        self._averages: dict[str, Tensor] = {}

    def parameters(self) -> Sequence[Tensor]:
        """All of the network's."""
        return list(self._deployed.network.parameters())

    def step(self, batch: Batch) -> float:
        """Forward and backward, in parts; see `Stepper`."""
        self._deployed.train()
        self._deployed.zero_grad()
        total = 0.0
        for *inputs, targets in zip(
            *(each.tensor_split(self._accumulate) for each in (*batch.inputs, batch.targets)), strict=True
        ):
            with torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
                outputs = self._deployed.logits(*inputs)
            loss = self._loss(outputs, targets) / len(batch.rows)
            total += loss.item()
            if not math.isfinite(total):
                break
            loss.backward()  # type: ignore[no-untyped-call]
        return total

    def clip(self, max_norm: float) -> None:
        """Scale the gradient down."""
        nn.utils.clip_grad_norm_(self.parameters(), max_norm)

    def synchronise(self) -> None:
        """There is no other worker."""

    def finite(self) -> bool:
        """Whether all weights are numbers."""
        return all(bool(parameter.isfinite().all()) for parameter in self.parameters())

    def from_leader(self, value: float) -> float:
        """The value itself."""
        return value

    def nonfinite_rows(self, batch: Batch) -> list[int]:
        """Found from the loss of each sample."""
        self._deployed.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
            losses = loss_for(self._task, "none")(self._deployed.logits(*batch.inputs), batch.targets)
        return [int(row) for row in batch.own[(~losses.isfinite()).numpy()]]

    def average(self, optimizer: torch.optim.Optimizer, decay: float) -> None:
        """Those of parameters are kept among the optimizer's moments."""
        average_moments(self.parameters(), optimizer, decay)
        move_averages(self._averages, self._buffers(), decay)

    def snapshot(
        self,
        step: int,
        optimizer: torch.optim.Optimizer,
        schedule: LRScheduler,
        notes: Mapping[str, Any],
        more: Mapping[str, Tensor],
    ) -> Snapshot | None:
        """Copies of all that changes."""
        averages = {f"{AVERAGES}.{name}": one.clone() for name, one in self._averages.items()}
        return snapshot(step, self._deployed.network, optimizer, schedule, notes=notes, more={**more, **averages})

    def restore(self, found: Snapshot, optimizer: torch.optim.Optimizer, schedule: LRScheduler) -> None:
        """Restore a snapshot."""
        restore_snapshot(found, self._deployed.network, optimizer, schedule)
        self._averages = found.part(AVERAGES)

    @contextmanager
    def averaged(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Averages replace the weights, where they are kept."""
        buffers = self._buffers()
        kept = ((one, optimizer.state.get(one, {}).get(AVERAGE)) for one in self.parameters())
        averages = {one: average for one, average in kept if average is not None}
        averages |= {buffers[name]: one for name, one in self._averages.items() if name in buffers}
        own = {tensor: tensor.data for tensor in averages}
        for tensor, average in averages.items():
            tensor.data = average
        try:
            yield
        finally:
            for tensor, data in own.items():
                tensor.data = data

    def _buffers(self) -> dict[str, Tensor]:
        """Floating-point buffers that are part of the state."""
        network = self._deployed.network
        kept = network.state_dict(keep_vars=True)
        return {name: one for name, one in network.named_buffers() if name in kept and one.is_floating_point()}

    def predict(self, inputs: Inputs) -> Tensor | None:
        """All outputs."""
        self._deployed.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
            return self._deployed.logits(*inputs)

    def weights(self) -> dict[str, Tensor]:
        """Copies of all."""
        state = self._deployed.network.state_dict()
        return {name: one.detach().clone(memory_format=torch.contiguous_format) for name, one in state.items()}


def average_moments(parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Move the averages of parameters that took part in the step; see `Stepper.average`."""
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is None:
                continue
            state = optimizer.state[parameter]
            if AVERAGE in state:
                state[AVERAGE].lerp_(parameter, 1 - decay)
            else:
                state[AVERAGE] = parameter.detach().clone()


def move_averages(averages: dict[str, Tensor], buffers: Mapping[str, Tensor], decay: float) -> None:
    """Move the averages of buffers; see `Stepper.average`."""
    with torch.no_grad():
        for name, buffer in buffers.items():
            average = averages.get(name)
            if average is None or average.shape != buffer.shape:
                averages[name] = buffer.detach().clone()
            else:
                average.lerp_(buffer, 1 - decay)
