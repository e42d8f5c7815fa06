"""The steps of a training that several workers share by a parallel plan."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from rushhour.errors import ModelError
from rushhour.models import Deployed, Inputs
from rushhour.models.deployed import as_logits
from rushhour.task import Task
from rushhour.train.checkpoint import (
    COUNTS,
    Snapshot,
    counts_of,
    moments_of,
    progress_notes,
    restore_progress,
    set_moments,
)
from rushhour.train.feed import Batch
from rushhour.train.loss import loss_for
from rushhour.train.parallel import ParallelNetwork, ParallelPlan, ParallelSettings, parallelise
from rushhour.train.settings import TrainSettings
from rushhour.train.stepper import AVERAGE, AVERAGES, average_moments, move_averages

_OWN = "worker"
"""Below it, in a snapshot, each relaxed worker's own state."""


class ParallelStepper:
    """A `Stepper` of a network that a plan divides.

    Dropout follows from (seed, step, sample), and batch normalisation sees the whole batch unless each worker's part is
    asked for: every exact plan computes the same up to rounding. A snapshot holds the whole network under its own
    names; of relaxed workers also the state of each.

    Args:
        deployed: with the network, equal on all workers; it is taken over.
        task: decides the loss.
        plan: for this network and as many workers as there are.
        settings: of the training; resolved.
        parallel: how the workers share it.

    Raises:
        PlanError: if the plan does not fit the network, or cannot be relaxed.
        ModelError: if there is nothing to learn.
    """

    def __init__(
        self, deployed: Deployed, task: Task, plan: ParallelPlan, *, settings: TrainSettings, parallel: ParallelSettings
    ) -> None:
        if not any(parameter.requires_grad for parameter in deployed.network.parameters()):
            raise ModelError("cannot train this network", "it has no parameters", "give it parameters to learn")
        self._prepared = deployed.prepared
        self._task = task
        self._as_logits = partial(
            as_logits, outputs=deployed.outputs, meaning=deployed.meaning, scaling=deployed.scaling
        )
        self._averages: dict[str, Tensor] = {}
        self._has_averages = settings.ema is not None
        self._seed = settings.seed
        self._microbatches = max(plan.microbatches, settings.accumulate)
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._relaxed = parallel.relaxed is not None
        self._parallel: ParallelNetwork = parallelise(
            deployed.network,
            plan,
            precision=torch.bfloat16 if settings.bf16 else None,
            seed=settings.seed,
            compression=parallel.compression,
            relaxed=parallel.relaxed,
            batch_norm=parallel.batch_norm,
            shared_memory=parallel.shared_memory,
        )
        self._named = dict(self._parallel.named_parameters())
        self.is_leader = self._rank == 0
        self.part = self._rank % plan.mesh.inner, plan.mesh.inner

    def parameters(self) -> Sequence[Tensor]:
        """What this worker has; a stage without any gets an unused number, because an optimizer needs a parameter."""
        return list(self._named.values()) or [nn.Parameter(torch.zeros(()))]

    def step(self, batch: Batch) -> float:
        """Forward and backward by the plan; see `Stepper`."""
        # for modules that draw random numbers themselves; a step that is repeated draws the same
        torch.manual_seed(int(np.random.SeedSequence((self._seed, batch.step, self._rank)).generate_state(1)[0]))
        return self._parallel.step(
            self._prepared(*batch.inputs),
            batch.targets,
            self._loss,
            len(batch.rows),
            microbatches=self._microbatches,
        )

    def _loss(self, raw: Any, targets: Tensor) -> Tensor:
        return loss_for(self._task, "sum")(self._as_logits(raw), targets)

    def clip(self, max_norm: float) -> None:
        """Scale down the gradient of the whole network."""
        self._parallel.clip(max_norm)

    def synchronise(self) -> None:
        """Relaxed workers synchronise when it is time."""
        self._parallel.synchronise()

    def finite(self) -> bool:
        """Whether all weights, on all workers, are numbers."""
        own = all(bool(parameter.isfinite().all()) for parameter in self._named.values())
        of_all = torch.tensor(float(own))
        dist.all_reduce(of_all, dist.ReduceOp.MIN)
        return bool(of_all)

    def from_leader(self, value: float) -> float:
        """The value that worker 0 has."""
        box = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(box, 0)
        return box.item()

    def nonfinite_rows(self, batch: Batch) -> list[int]:
        """Each worker of the last stage computes the losses of its own samples."""
        outputs = self._parallel.predict(self._prepared(*batch.inputs), len(batch.rows))
        found: list[int] = []
        if outputs is not None:
            losses = loss_for(self._task, "none")(self._as_logits(outputs), batch.targets)
            found = batch.own[(~losses.isfinite()).numpy()].tolist()
        every: list[list[int]] = [[] for _ in range(self._world)]
        dist.all_gather_object(every, found)
        return [row for rows in every for row in rows]

    def predict(self, inputs: Inputs) -> Tensor | None:
        """Outputs `(n, outputs)` for n samples, which the workers share, on worker 0; None on the others."""
        rows, fewest = len(inputs[0]), self.part[1]
        # each worker needs a row: too few are repeated, and the copies cut off again
        full = inputs if rows >= fewest else tuple(each[torch.arange(fewest) % rows] for each in inputs)
        given = max(rows, fewest)
        rows_here = self._parallel.rows(given)
        outputs = self._parallel.predict(self._prepared(*(each[rows_here] for each in full)), given)
        every: list[Any] | None = [None] * self._world if self.is_leader else None
        own = None if outputs is None else self._as_logits(outputs).float().numpy()
        dist.gather_object(None if own is None else (rows_here.start, own), every)
        if every is None:
            return None
        # in the order of the rows, from the workers that have outputs
        found = dict(sorted(one for one in every if one is not None))
        return torch.from_numpy(np.concatenate(list(found.values()))[:rows])

    def averaged(self, optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
        """Use the averages of the weights: over time where they are kept, and over relaxed workers."""
        return self._with_averages(optimizer)

    def weights(self) -> dict[str, Tensor]:
        """Copies of the whole network's state on worker 0; nothing on the others."""
        return _separate(self._parallel.full_state_dict() or {})

    def average(self, optimizer: torch.optim.Optimizer, decay: float) -> None:
        """Move the averages of what this worker holds."""
        average_moments(list(self._named.values()), optimizer, decay)
        move_averages(self._averages, self._parallel.buffers(), decay)

    def snapshot(
        self,
        step: int,
        optimizer: torch.optim.Optimizer,
        schedule: LRScheduler,
        notes: Mapping[str, Any],
        more: Mapping[str, Tensor],
    ) -> Snapshot | None:
        """The whole network and the whole of each moment of the optimizer, on worker 0; None on the others."""
        held = {name: moments_of(optimizer, parameter) for name, parameter in self._named.items()}
        own: dict[str, Tensor] = {}
        if self._relaxed:
            own |= {f"state.{name}": tensor for name, tensor in self._parallel.local_state().items()}
            own |= {f"moment.{moment}.{name}": one for name in held for moment, one in held[name].items()}
            own |= {f"{AVERAGES}.{name}": one for name, one in self._averages.items()}
            own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in own.items()}
            held = {name: {moment: self._mean_(one.clone()) for moment, one in held[name].items()} for name in held}
        known: list[Any] = [None] * self._world
        counts = counts_of(optimizer, self._named)
        dist.all_gather_object(known, (sorted({moment for one in held.values() for moment in one}), counts))
        counts = {name: count for _, own_counts in known for name, count in own_counts.items()}
        with self._with_averages(None):
            tensors = {f"network.{name}": tensor for name, tensor in self.weights().items()}
        for moment in sorted({name for names, _ in known for name in names}):
            whole = self._parallel.merged({name: one[moment] for name, one in held.items() if moment in one})
            tensors |= {f"moment.{moment}.{name}": tensor for name, tensor in _separate(whole or {}).items()}
        if self._has_averages and not self._relaxed:
            whole = self._parallel.merged(self._averages)
            tensors |= {f"{AVERAGES}.{name}": tensor for name, tensor in _separate(whole or {}).items()}
        if self._relaxed:
            every: list[Any] | None = [None] * self._world if self.is_leader else None
            dist.gather_object(own, every)
            tensors |= {
                f"{_OWN}.{rank}.{name}": one for rank, state in enumerate(every or []) for name, one in state.items()
            }
        if not self.is_leader:
            return None
        return Snapshot(step, {**progress_notes(optimizer, schedule), **notes, COUNTS: counts}, {**tensors, **more})

    def restore(self, found: Snapshot, optimizer: torch.optim.Optimizer, schedule: LRScheduler) -> None:
        """Take own parts of a snapshot; a relaxed worker takes its own state."""
        if self._relaxed:
            own = f"{_OWN}.{self._rank}"
            self._parallel.load_local_state(found.part(f"{own}.state"))
            averages = found.part(f"{own}.{AVERAGES}")
            moments = Snapshot(
                0, {}, {f"moment.{name}": one for name, one in found.part(f"{own}.moment").items()}
            ).moments
        else:
            self._parallel.load_full_state_dict(found.part("network"))
            self._parallel.steps = found.step
            averages = self._parallel.parts(found.part(AVERAGES))
            moments = {moment: self._parallel.parts(whole) for moment, whole in found.moments.items()}
        self._averages = {name: average.clone() for name, average in averages.items()}
        for name, parameter in self._named.items():
            # the fused optimizer walks parameter and moments in the order of memory: they need the same strides
            values = {
                moment: torch.empty_like(parameter).copy_(named[name])
                for moment, named in moments.items()
                if name in named
            }
            set_moments(optimizer, parameter, values, found.notes[COUNTS].get(name))
        restore_progress(found, optimizer, schedule)

    @contextlib.contextmanager
    def _with_averages(self, optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
        """Averages over time, if an optimizer is given that keeps them, and over relaxed workers."""
        kept: dict[str, Tensor] = {}
        state = {name: one for name, one in self._parallel.local_state().items() if not name.startswith("rushhour.")}
        with torch.no_grad():
            for name, tensor in state.items():
                average = None
                if optimizer is not None and name in self._named:
                    average = moments_of(optimizer, self._named[name]).get(AVERAGE)
                elif optimizer is not None:
                    average = self._averages.get(name)
                if average is None and not (self._relaxed and tensor.is_floating_point()):
                    continue
                kept[name] = tensor.clone()
                if average is not None:
                    tensor.copy_(average)
                if self._relaxed:
                    self._mean_(tensor)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in kept.items():
                    state[name].copy_(tensor)

    def _mean_(self, tensor: Tensor) -> Tensor:
        """Over the workers, in place."""
        dist.all_reduce(tensor)
        return tensor.div_(self._world)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, as safetensors needs them."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        is_shared = tensor.data_ptr() in seen
        found[name] = tensor.clone(memory_format=torch.contiguous_format) if is_shared else tensor.contiguous()
        seen.add(tensor.data_ptr())
    return found
