"""Applies a parallel plan to a network from outside: the network has no code for it.

Every plan computes the same: the loss is a sum over samples divided by the size of the global batch, gradients are
sums over workers, dropout masks depend on the sample and not on the worker, and batch normalisation sees the whole
batch, unless each worker's part is asked for. What differs is the order of additions, and so the last bits.

A step: each worker is given its own rows of the global batch (`ParallelNetwork.rows`), divides them into microbatches,
and runs forward and backward passes in the order of `pipeline`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rushhour.errors import ModelError, PlanError
from rushhour.models import Inputs
from rushhour.train.parallel.assembly import assemble, whole_layer
from rushhour.train.parallel.buffers import Buffers
from rushhour.train.parallel.collectives import Group, shares
from rushhour.train.parallel.groups import WorkerGroups
from rushhour.train.parallel.layer_table import chain
from rushhour.train.parallel.layers import ForwardContext, Sharded, SyncBatchNorm
from rushhour.train.parallel.outer_optimizer import OuterOptimizer
from rushhour.train.parallel.pipeline import Neighbours, one_forward_one_backward
from rushhour.train.parallel.plan import ParallelPlan
from rushhour.train.parallel.reducer import Reducer
from rushhour.train.parallel.settings import BatchNorm, GradientCompression, Relaxed, not_relaxable
from rushhour.train.parallel.state import DividedState

LossSum = Callable[[Tensor, Tensor], Tensor]
"""Outputs and targets of some rows -> the sum of their losses, a scalar."""

_STEPS = "rushhour.steps"


def parallelise(
    network: nn.Module,
    plan: ParallelPlan,
    group: Group | None = None,
    *,
    precision: torch.dtype | None = None,
    seed: int = 0,
    compression: GradientCompression = "none",
    relaxed: Relaxed | None = None,
    batch_norm: BatchNorm = "whole",
    shared_memory: bool = True,
) -> ParallelNetwork:
    """Take this worker's part of a network.

    Args:
        network: with equal weights on all workers; it is taken over and must not be used any more. On the meta device,
            so that it need not fit in the memory of any worker, layers get fresh weights from `reset_parameters` and
            `seed`.
        plan: for this network.
        group: of `plan.workers` workers; the default one where not given, none where the plan has one worker.
        precision: to compute in by autocast: bfloat16; None for that of the weights.
        seed: of dropout.
        compression: of replicated gradients that are sent; all but `none` train a little differently.
        relaxed: workers synchronise only every few steps.
        batch_norm: `local` saves two exchanges for each batch normalisation, and trains a little differently.
        shared_memory: workers on one machine sum gradients in shared memory instead of sending them.

    Raises:
        PlanError: if the plan is for another network or number of workers, or cannot be relaxed.
        ModelError: if a layer on the meta device cannot initialise its weights.
    """
    return ParallelNetwork(network, plan, group, precision, seed, compression, relaxed, batch_norm, shared_memory)


class ParallelNetwork:
    """One worker's part of a network; see `parallelise`. All workers call the same methods in the same order."""

    def __init__(
        self,
        network: nn.Module,
        plan: ParallelPlan,
        group: Group | None,
        precision: torch.dtype | None,
        seed: int,
        compression: GradientCompression,
        relaxed: Relaxed | None,
        batch_norm: BatchNorm,
        shared_memory: bool,
    ) -> None:
        units = chain(network)
        if tuple(name for name, _ in units) != tuple(layer.name for layer in plan.layers):
            raise PlanError(
                "the plan does not fit the network",
                f"it is for {len(plan.layers)} layers, and the network has {len(units)}, or others",
                "make a plan for this network",
            )
        if group is None and dist.is_initialized():
            group = dist.group.WORLD
        size = 1 if group is None else group.size()
        if size != plan.workers:
            raise PlanError(
                f"the plan is for {plan.workers} workers", f"there are {size}", "make a plan for so many workers"
            )
        self.plan = plan
        self._groups = WorkerGroups(plan.mesh, group)
        if relaxed is not None and (
            plan.mesh.data != size or any(one.layout not in ("data", "local") for one in plan.layers)
        ):
            raise not_relaxable(plan.mode)
        self._precision = precision
        self._relaxed = relaxed
        self._context = ForwardContext(seed=seed)
        self._state = DividedState(network, units, plan, self._groups)
        self._layers, self._tensors, owners = assemble(
            network,
            units,
            plan,
            self._groups,
            self._context,
            held={entry.held for entry in self._state.entries},
            seed=seed,
            whole_batch_norm=batch_norm == "whole" and relaxed is None,
        )
        self._in_evaluation = [
            one for layer in self._layers for one in whole_layer(layer).modules() if not one.training
        ]
        self._buffers = Buffers(self._tensors, owners)
        self._learned = {
            name: tensor
            for name, tensor in self._tensors.items()
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad
        }
        self._reducers = [] if relaxed else self._make_reducers(compression, shared_memory=shared_memory)
        reduced = {id(one) for reducer in self._reducers for one in reducer.parameters}
        self._unreduced = [one for one in self._learned.values() if id(one) not in reduced]
        self._outer = None if relaxed is None else OuterOptimizer(relaxed, self._learned)
        self._neighbours = Neighbours(self._groups.world, self._groups.rank, plan.mesh.inner)

    # What a worker is given, and does

    def rows(self, global_batch: int) -> slice:
        """Which rows of a global batch this worker must be given; the workers of all stages of a replica get the same.

        Raises:
            ModelError: if there are fewer rows than workers to share them.
        """
        parts = self._shares(global_batch)
        first = sum(parts[: self._groups.inner])
        return slice(first, first + parts[self._groups.inner])

    def step(
        self,
        inputs: Inputs,
        targets: Tensor,
        loss_sum: LossSum,
        global_batch: int,
        *,
        microbatches: int | None = None,
    ) -> float:
        """Forward and backward passes; afterwards `parameters()` have the gradients of the mean loss.

        Gradients of an earlier step are removed; the optimizer's `zero_grad` is not needed.

        Args:
            inputs: own rows (`rows`), a tensor for each input, as the network takes them; read by workers of the first
                stage only.
            targets: own rows; read by workers of the last stage only.
            loss_sum: gives the sum of the losses of some rows.
            global_batch: rows that all workers have together.
            microbatches: into which own rows are divided; by default as many as the plan says.

        Returns:
            The mean loss over the global batch, the same on all workers.

        Raises:
            ModelError: if there are too few rows for the workers, or the worker was given other rows than `rows` says.
        """
        parts = self._shares(global_batch)
        own = parts[self._groups.inner]
        given = inputs[0] if self._groups.stage == 0 else targets
        if len(given) != own and (self._groups.stage == 0 or self._is_last):
            raise ModelError(
                f"worker {self._groups.rank} was given {len(given)} rows of a batch of {global_batch}",
                f"its share is {own}",
                "give it the rows that ParallelNetwork.rows returns",
            )
        count = max(1, min(microbatches or self.plan.microbatches, min(parts)))
        for reducer in self._reducers:
            reducer.clear()
        for parameter in self._unreduced:
            parameter.grad = None
        for layer in self._layers:
            if isinstance(layer, Sharded):
                layer.took_part = [False] * len(layer.took_part)
        self._train()
        scale = 1 / (own if self._relaxed else global_batch)
        total = self._passes(inputs, targets, loss_sum, parts, count, scale)
        total *= (own if self._relaxed else global_batch) / global_batch
        entries = self._state.entries
        changed_here = self._buffers.collect()
        summed = torch.tensor(
            [total, *self._took_part(), *(float(entry.held in changed_here) for entry in entries)], dtype=torch.float64
        )
        for reducer in self._reducers:
            reducer.settle()
        if self._groups.world is not None:
            dist.all_reduce(summed, group=self._groups.world)  # after it, all workers have called `settle`
        took_part, changed = summed[1:].view(2, -1).bool().tolist()
        averaged = self._to_average(changed)
        with self._averaged(averaged, own / global_batch):
            for reducer in self._reducers:
                reducer.finish(all_ready=True)
        for entry, took in zip(entries, took_part, strict=True):
            if not took and entry.held in self._learned and self._relaxed is None:
                self._learned[entry.held].grad = None  # as with one worker: the optimizer does not change it
        self._context.step += 1
        return float(summed[0])

    def synchronise(self) -> None:
        """To be called after each step of the optimizer: relaxed workers synchronise when it is time."""
        if self._outer is None or self._relaxed is None or self._groups.world is None:
            return
        if self._context.step % self._relaxed.every:
            return
        self._buffers.collect()
        entries = [entry for entry in self._state.entries if not entry.learned and entry.dtype.is_floating_point]
        self._outer.step([self._tensors[entry.held] for entry in entries], self._groups.world)

    def predict(self, inputs: Inputs, global_batch: int) -> Tensor | None:
        """Outputs for own rows, in evaluation mode; None on workers that are not of the last stage."""
        parts = self._shares(global_batch)
        self._layers.eval()
        self._enter(parts, [(size,) for size in parts], 0)
        with torch.no_grad(), self._cast():
            if self._groups.stage:
                inputs = (self._neighbours.receive("activation", parts[self._groups.inner], -1),)
            x = self._through(inputs)
        if self._is_last:
            return x
        self._neighbours.send("activation", x.to(self._sent_dtype(x)), +1).wait()
        return None

    def parameters(self) -> Iterator[nn.Parameter]:
        """What this worker's optimizer changes: its parts of divided parameters, and whole replicated ones."""
        yield from self._learned.values()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The same with their names in the network."""
        yield from self._learned.items()

    def clip(self, max_norm: float) -> float:
        """Scale the gradients down so that their norm over the whole network is at most `max_norm`; the norm before."""
        mesh = self.plan.mesh
        holders: dict[object, int] = {None: mesh.inner, 0: mesh.data, 1: mesh.data, "flat": 1, "table": 1}
        cuts = {entry.held: entry.cut for entry in self._state.entries}
        squares = torch.zeros(1, dtype=torch.float64)
        for name, parameter in self._learned.items():
            if parameter.grad is not None:
                share = 1 if self._relaxed else holders[cuts[name]]
                squares += parameter.grad.double().square().sum() / share
        if self._groups.world is not None and self._relaxed is None:
            dist.all_reduce(squares, group=self._groups.world)
        norm = math.sqrt(float(squares))
        if norm > max_norm:
            for parameter in self._learned.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(max_norm / (norm + 1e-6))
        return norm

    def buffers(self) -> dict[str, Tensor]:
        """What this worker holds of the network's floating-point buffers; not copied."""
        self._buffers.collect()
        return self._buffers.floating_point()

    # The state, whole and in parts

    def full_state_dict(self) -> dict[str, Tensor] | None:
        """The whole network's state under its own names, on worker 0; None on the others."""
        self._buffers.collect()
        return self.merged(self._tensors)

    def load_full_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take own parts out of the whole network's state, which every worker must be given."""
        with torch.no_grad():
            for name, part in self.parts(state).items():
                self._tensors[name].copy_(part)
        if self._outer is not None:
            self._outer.reset()

    def merged(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Whole tensors from the parts that the workers hold, on worker 0; see `DividedState.merged`."""
        return self._state.merged(tensors)

    def parts(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this worker holds of whole tensors; see `DividedState.parts`."""
        return self._state.parts(whole)

    def local_state(self) -> dict[str, Tensor]:
        """All that this worker must keep to resume exactly, besides its optimizer; not copied."""
        self._buffers.collect()
        state = {name: tensor.detach() for name, tensor in self._tensors.items()}
        state[_STEPS] = torch.tensor(self._context.step)
        return state if self._outer is None else state | self._outer.state()

    def load_local_state(self, state: Mapping[str, Tensor]) -> None:
        """Resume from a `local_state` of the same worker under the same plan."""
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.copy_(state[name])
        if self._outer is not None:
            self._outer.load(state)
        self._context.step = int(state[_STEPS])

    @property
    def steps(self) -> int:
        """Steps done, which dropout depends on; may be set when a training is resumed."""
        return self._context.step

    @steps.setter
    def steps(self, steps: int) -> None:
        self._context.step = steps

    @property
    def _is_last(self) -> bool:
        return self._groups.stage == self.plan.mesh.pipeline - 1

    def _train(self) -> None:
        """Training mode, except for modules that the network's factory left in evaluation mode."""
        self._layers.train()
        for module in self._in_evaluation:
            module.training = False

    def _took_part(self) -> list[float]:
        """1 for each entry of the network's state whose gradient this worker has a part of, else 0."""
        taken = {id(one) for reducer in self._reducers for one in reducer.taken}
        sharded = [layer for layer in self._layers if isinstance(layer, Sharded)]
        for layer in sharded:
            taken |= {id(part) for part, took in zip(layer.parts, layer.took_part, strict=True) if took}
        plain = {id(one) for one in self._unreduced} - {id(part) for layer in sharded for part in layer.parts}
        return [
            float(
                (one := self._learned.get(entry.held)) is not None
                and (id(one) in taken or (id(one) in plain and one.grad is not None))
            )
            for entry in self._state.entries
        ]

    def _make_reducers(self, compression: GradientCompression, *, shared_memory: bool) -> list[Reducer]:
        cuts = {entry.held: entry.cut for entry in self._state.entries}
        reducers = []
        whole = [tensor for name, tensor in self._learned.items() if cuts[name] is None]
        cut = [tensor for name, tensor in self._learned.items() if cuts[name] in (0, 1)]
        if self._groups.stage_sums is not None and whole:
            reducers.append(Reducer(whole, self._groups.stage_sums, compression, shared_memory=shared_memory))
        if self._groups.data_sums is not None and cut:
            reducers.append(Reducer(cut, self._groups.data_sums, compression, shared_memory=shared_memory))
        return reducers

    def _shares(self, global_batch: int) -> tuple[int, ...]:
        inner = self.plan.mesh.inner
        if global_batch < inner:
            raise ModelError(
                f"a batch of {global_batch} does not give each of {inner} workers a sample",
                "each worker of a stage needs one at least",
                "use larger batches or fewer workers",
            )
        return shares(global_batch, inner)

    def _enter(self, parts: tuple[int, ...], pieces: list[tuple[int, ...]], index: int) -> None:
        """Set the context of the layers: the rows of microbatch `index`."""
        starts = list(itertools.accumulate(parts, initial=0))

        def indices(worker: int) -> Any:
            first = starts[worker] + sum(pieces[worker][:index])
            return np.arange(first, first + pieces[worker][index], dtype=np.uint64)

        tensor, replica = self.plan.mesh.tensor, self._groups.replica
        team = range(replica * tensor, (replica + 1) * tensor)
        self._context.serial += 1
        self._context.rows = tuple(pieces[worker][index] for worker in team)
        self._context.own = indices(self._groups.inner)
        self._context.all = np.concatenate([indices(worker) for worker in team])

    def _passes(
        self,
        inputs: Inputs,
        targets: Tensor,
        loss_sum: LossSum,
        parts: tuple[int, ...],
        count: int,
        scale: float,
    ) -> float:
        """All microbatches through this stage; the scaled loss of own rows, 0 but on the last stage."""
        pieces = [shares(part, count) for part in parts]
        own = list(pieces[self._groups.inner])
        is_first = self._groups.stage == 0
        own_inputs = list(zip(*(torch.split(each, own) for each in inputs), strict=True)) if is_first else []
        own_targets = torch.split(targets, own) if self._is_last else [targets] * count
        in_flight: dict[int, tuple[Inputs, Tensor]] = {}
        sent: list[dist.Work] = []
        total = 0.0

        def forward(index: int) -> None:
            nonlocal total
            self._enter(parts, pieces, index)
            if is_first:
                entry = own_inputs[index]
            else:
                entry = (self._neighbours.receive("activation", own[index], -1).requires_grad_(),)
            with self._cast():
                x = self._through(entry)
                if self._is_last:
                    x = loss_sum(x, own_targets[index]) * scale
            if self._is_last:
                total += float(x.detach())
            else:
                x = x.to(self._sent_dtype(x))
                sent.append(self._neighbours.send("activation", x.detach(), +1))
            in_flight[index] = entry, x

        def backward(index: int) -> None:
            entry, out = in_flight.pop(index)
            if index == count - 1:
                for reducer in self._reducers:
                    reducer.arm()
            if self._is_last:
                out.backward()  # type: ignore[no-untyped-call]
            else:
                grad = self._neighbours.receive("gradient", own[index], +1)
                torch.autograd.backward(out, grad)
            if not is_first:
                assert entry[0].grad is not None
                sent.append(self._neighbours.send("gradient", entry[0].grad, -1))

        one_forward_one_backward(self._groups.stage, self.plan.mesh.pipeline, count, forward, backward)
        for work in sent:
            work.wait()
        return total

    def _through(self, inputs: Inputs) -> Tensor:
        """The outputs of this stage; a network of several inputs is one layer, which takes them all."""
        first, *others = self._layers
        x: Tensor = first(*inputs)
        for layer in others:
            x = layer(x)
        return x

    def _to_average(self, changed: list[bool]) -> list[str]:
        """Names of the buffers whose mean over the workers of this stage is taken after a step.

        The mean over workers is exact for what is a mean over rows, such as running statistics. Batch normalisation
        over all workers has the same statistics everywhere; whole numbers stay as they are.
        """
        if self._groups.stage_group is None or self._relaxed is not None:
            return []
        equal = {
            id(one)
            for layer in self._layers
            for module in whole_layer(layer).modules()
            if isinstance(module, SyncBatchNorm)
            for one in module._buffers.values()
        }
        return [
            entry.held
            for entry, is_changed in zip(self._state.entries, changed, strict=True)
            if is_changed and entry.stage == self._groups.stage and not entry.learned
            if (tensor := self._tensors[entry.held]).is_floating_point() and id(tensor) not in equal
        ]

    def _averaged(self, names: list[str], weight: float) -> contextlib.AbstractContextManager[None]:
        group = self._groups.stage_group
        if not names or group is None:
            return contextlib.nullcontext()
        return self._buffers.averaged(names, weight, group)

    def _sent_dtype(self, x: Tensor) -> torch.dtype:
        """Stages send floating-point tensors in the weights' precision: that of autocast is for computing."""
        return torch.float32 if self._precision is not None and x.is_floating_point() else x.dtype

    @contextlib.contextmanager
    def _cast(self) -> Iterator[None]:
        with torch.autocast("cpu", self._precision or torch.bfloat16, enabled=self._precision is not None):
            yield
