"""Applies a parallel plan to a network from outside: the network does not know that it is divided.

Every plan computes the same: the loss is a sum over samples divided by the size of the global batch, gradients are
sums over workers, dropout masks depend on the sample and not on the worker, and batch normalisation sees the whole
batch, if it is not asked to see each worker's part alone. What differs is the order of additions, and so the last bits.

A step: each worker is given its own rows of the global batch (`Parallel.rows`), divides them into microbatches, and
runs forward and backward passes in the order of 1F1B (Narayanan et al., PipeDream, SOSP 2019; flushed each step, so
that weights are never stale). With one stage this is gradient accumulation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rushhour.errors import ModelError, PlanError
from rushhour.train.parallel.collectives import Group, shares
from rushhour.train.parallel.layers import Column, Dropout, Moment, Row, Sharded, SyncBatchNorm, ToFeatures, ToRows
from rushhour.train.parallel.plan import ELEMENTWISE, LayerPlan, ParallelPlan, chain
from rushhour.train.parallel.reducer import Compression, Reducer

BatchNorm = Literal["whole", "local"]
"""Whose rows batch normalisation sees: those of the whole batch, as one process does, or each worker's own, as torch's
DistributedDataParallel does it."""
LossSum = Callable[[Tensor, Tensor], Tensor]
"""Outputs and targets of some rows -> the sum of their losses, a scalar."""

_STEPS = "rushhour.steps"
_OUTER = "rushhour.outer."
_MOMENTUM = "rushhour.momentum."


class Relaxed(msgspec.Struct, frozen=True):
    """Workers that meet only every so many steps, each trained on its own rows meanwhile: not equal to one process.

    Local SGD (Stich 2018) averages the weights. DiLoCo (Douillard et al. 2023) takes the mean change for a gradient
    and gives it to an outer optimizer, Nesterov's: there `outer_lr=0.7, outer_momentum=0.9`.

    Attributes:
        every: steps between meetings.
        outer_lr: of the mean change; 1 is local SGD.
        outer_momentum: 0 is local SGD.
    """

    every: int
    outer_lr: float = 1.0
    outer_momentum: float = 0.0

    def __post_init__(self) -> None:
        if self.every < 1 or not self.outer_lr > 0 or not 0 <= self.outer_momentum < 1:
            raise PlanError(
                f"workers cannot meet every {self.every} steps with outer learning rate {self.outer_lr:g} and momentum "
                f"{self.outer_momentum:g}",
                "every >= 1, a rate above 0 and a momentum in 0..1 are possible",
                "change that setting",
            )


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One tensor of the network's state, and who holds it.

    Attributes:
        name: in the network's state dict.
        cut: along which dimension it is divided; `flat` as a vector over the whole stage; None: each has all.
        held: the name under which it is held: another one's, where parameters are tied.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    stage: int
    cut: Literal[0, 1, "flat"] | None
    held: str
    learned: bool


def parallelise(
    network: nn.Module,
    plan: ParallelPlan,
    group: Group | None = None,
    *,
    precision: torch.dtype | None = None,
    seed: int = 0,
    compression: Compression = "none",
    relaxed: Relaxed | None = None,
    batch_norm: BatchNorm = "whole",
    shared_memory: bool = True,
) -> Parallel:
    """Take this worker's part of a network.

    Args:
        network: with equal weights on all workers; it is taken over and must not be used any more. On the meta device,
            so that it never need fit anywhere whole, layers get fresh weights from `reset_parameters` and `seed`.
        plan: for this network.
        group: of `plan.workers` workers; the default one where not given, none where the plan has one worker.
        precision: to compute in by autocast: bfloat16; None for that of the weights.
        seed: of dropout.
        compression: of replicated gradients on their way; all but `none` train a little differently.
        relaxed: workers meet only now and then.
        shared_memory: add up gradients in memory that workers share, where they are on one machine, instead of sending.
        batch_norm: `local` spares two exchanges for each batch normalisation, and trains a little differently.

    Raises:
        PlanError: if the plan is for another network or number of workers, or cannot be relaxed.
        ModelError: if a layer on the meta device cannot make weights for itself.
    """
    return Parallel(network, plan, group, precision, seed, compression, relaxed, batch_norm, shared_memory)


class Parallel:
    """One worker's part of a training; see `parallelise`. All workers call the same methods in the same order."""

    def __init__(
        self,
        network: nn.Module,
        plan: ParallelPlan,
        group: Group | None,
        precision: torch.dtype | None,
        seed: int,
        compression: Compression,
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
        self._world = group if size > 1 else None
        self._rank = 0 if group is None else dist.get_rank(group)
        mesh = plan.mesh
        self._stage, self._inner = divmod(self._rank, mesh.inner)
        self._replica, self._tensor = divmod(self._inner, mesh.tensor)
        self._precision = precision
        self._relaxed = relaxed
        self._couples = batch_norm == "whole" and relaxed is None
        self._moment = Moment(seed=seed)
        self._groups()
        if relaxed is not None and (
            mesh.data != size or any(one.layout not in ("data", "local") for one in plan.layers)
        ):
            raise PlanError(
                f"a {plan.mode} plan cannot be relaxed",
                "workers that meet only now and then must each have the whole network",
                "use --parallel data",
            )
        dropouts = itertools.count()
        numbers = {id(module): next(dropouts) for module in network.modules() if type(module) is nn.Dropout}
        self._entries = _table(network, units, plan)
        self._tensors: dict[str, Tensor] = {}
        own = [(layer, name, unit) for layer, (name, unit) in zip(plan.layers, units, strict=True)]
        layers: list[nn.Module] = []
        features: int | None = None  # of the whole activations, where they are divided by features
        for index, (layer, name, unit) in enumerate(own):
            if layer.stage != self._stage:
                continue
            _materialise(unit, seed, index)
            elementwise = isinstance(unit, ELEMENTWISE)
            if layer.layout == "row" and features is None and mesh.tensor > 1:
                layers.append(ToFeatures(self._moment, self._require(self._tensor_group)))
            elif layer.layout != "row" and features is not None and not elementwise:
                layers.append(ToRows(features, self._moment, self._require(self._tensor_group)))
                features = None
            unit = self._without_plain_noise(unit, numbers, features)
            form = self._form(layer, unit)
            if layer.layout == "column":
                assert isinstance(unit, nn.Linear)
                features = unit.out_features
            elif layer.layout == "row":
                features = None
            layers.append(form)
            self._hold(name, layer, form)
        if features is not None:
            layers.append(ToRows(features, self._moment, self._require(self._tensor_group)))
        self._layers = nn.ModuleList(layers)
        self._resting = [one for layer in layers for one in _whole(layer).modules() if not one.training]
        self._holders_of = self._owners(own)
        self._seen = {name: _mark(self._tensors[name]) for name in self._holders_of}
        self._learned = self._learnable()
        self._reducers = [] if relaxed else self._make_reducers(compression, shared_memory=shared_memory)
        reduced = {id(one) for reducer in self._reducers for one in reducer.parameters}
        self._unreduced = [one for one in self._learned.values() if id(one) not in reduced]
        self._outer: dict[str, nn.Parameter] = {}
        if relaxed is not None:
            self._outer = {name: nn.Parameter(tensor.detach().clone()) for name, tensor in self._learned.items()}
            self._optimizer = torch.optim.SGD(
                list(self._outer.values()),
                relaxed.outer_lr,
                momentum=relaxed.outer_momentum,
                nesterov=relaxed.outer_momentum > 0,
            )
        self._boundaries: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}

    # What a worker is given, and does

    def rows(self, global_batch: int) -> slice:
        """Which rows of a global batch this worker must be given; the workers of all stages of a replica get the same.

        Raises:
            ModelError: if there are fewer rows than workers to share them.
        """
        parts = self._shares(global_batch)
        first = sum(parts[: self._inner])
        return slice(first, first + parts[self._inner])

    def step(
        self,
        inputs: Tensor,
        targets: Tensor,
        loss_sum: LossSum,
        global_batch: int,
        *,
        microbatches: int | None = None,
    ) -> float:
        """Forward and backward passes; afterwards `parameters()` have the gradients of the mean loss.

        Gradients of an earlier step are thrown away; the optimizer's `zero_grad` is not needed.

        Args:
            inputs: own rows (`rows`), as the network takes them; read by workers of the first stage only.
            targets: own rows; read by workers of the last stage only.
            loss_sum: gives the sum of the losses of some rows.
            global_batch: rows that all workers have together.
            microbatches: into which own rows are divided; by default as many as the plan says.

        Returns:
            The mean loss over the global batch, the same on all workers.

        Raises:
            ModelError: if there are too few rows for the workers, or others were given than asked for.
        """
        parts = self._shares(global_batch)
        own = parts[self._inner]
        wanted = inputs if self._stage == 0 else targets
        if len(wanted) != own and (self._stage == 0 or self._is_last):
            raise ModelError(
                f"worker {self._rank} was given {len(wanted)} rows of a batch of {global_batch}",
                f"its share is {own}",
                "give it the rows that Parallel.rows names",
            )
        count = max(1, min(microbatches or self.plan.microbatches, min(parts)))
        for reducer in self._reducers:
            reducer.clear()
        for parameter in self._unreduced:
            parameter.grad = None
        for form in self._layers:
            if isinstance(form, Sharded):
                form.took = [False] * len(form.took)
        self._train()
        scale = 1 / (own if self._relaxed else global_batch)
        total = self._one_forward_one_backward(inputs, targets, loss_sum, parts, count, scale)
        total *= (own if self._relaxed else global_batch) / global_batch
        said = torch.tensor([total, *self._took_part(), *self._collect()], dtype=torch.float64)
        for reducer in self._reducers:
            reducer.settle()
        if self._world is not None:
            dist.all_reduce(said, group=self._world)  # and so all have come this far
        took, changed = said[1:].view(2, -1).bool().tolist()
        with self._sharing(
            [entry for entry, is_so in zip(self._entries, changed, strict=True) if is_so], own / global_batch
        ):
            for reducer in self._reducers:
                reducer.finish(all_ready=True)
        for entry, is_so in zip(self._entries, took, strict=True):
            if not is_so and entry.held in self._learned and self._relaxed is None:
                self._learned[entry.held].grad = None  # as with one worker: no decay of what took no part
        self._moment.step += 1
        return float(said[0])

    def synchronise(self) -> None:
        """To be called after each step of the optimizer; where workers are relaxed, they meet here when it is time."""
        if self._relaxed is None or self._world is None or self._moment.step % self._relaxed.every:
            return
        self._collect()
        with torch.no_grad():
            for name, outer in self._outer.items():
                here = self._learned[name]
                change = outer.detach() - here
                dist.all_reduce(change, group=self._world)
                outer.grad = change / self.plan.workers
            self._optimizer.step()
            for name, outer in self._outer.items():
                self._learned[name].copy_(outer)
            for entry in self._entries:
                if not entry.learned and entry.dtype.is_floating_point:
                    buffer = self._tensors[entry.held]
                    dist.all_reduce(buffer, group=self._world)
                    buffer /= self.plan.workers

    def predict(self, inputs: Tensor, global_batch: int) -> Tensor | None:
        """Answers to own rows, in evaluation mode; None on workers that are not of the last stage."""
        parts = self._shares(global_batch)
        self._layers.eval()
        self._enter(parts, [(size,) for size in parts], 0)
        with torch.no_grad(), self._cast():
            x = inputs if self._stage == 0 else self._receive("activation", parts[self._inner], -1)
            for layer in self._layers:
                x = layer(x)
        if self._is_last:
            return x
        self._send("activation", x.to(self._wire_dtype(x)), +1).wait()
        return None

    def parameters(self) -> Iterator[nn.Parameter]:
        """What this worker's optimizer must change: its parts of what is divided, all of what is not."""
        yield from self._learned.values()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The same with their names in the network."""
        yield from self._learned.items()

    def clip(self, max_norm: float) -> float:
        """Scale the gradients down so that their norm over the whole network is at most `max_norm`; the norm before."""
        mesh = self.plan.mesh
        holders: dict[object, int] = {None: mesh.inner, 0: mesh.data, 1: mesh.data, "flat": 1}
        cuts = {entry.held: entry.cut for entry in self._entries}
        squares = torch.zeros(1, dtype=torch.float64)
        for name, parameter in self._learned.items():
            if parameter.grad is not None:
                share = 1 if self._relaxed else holders[cuts[name]]
                squares += parameter.grad.double().square().sum() / share
        if self._world is not None and self._relaxed is None:
            dist.all_reduce(squares, group=self._world)
        norm = math.sqrt(float(squares))
        if norm > max_norm:
            for parameter in self._learned.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(max_norm / (norm + 1e-6))
        return norm

    def buffers(self) -> dict[str, Tensor]:
        """What this worker has of the network's buffers, those that have fractions; not copied."""
        self._collect()
        return {name: self._tensors[name] for name in self._holders_of if self._tensors[name].is_floating_point()}

    # The state, whole and in parts

    def full_state_dict(self) -> dict[str, Tensor] | None:
        """The whole network's state under its own names, on worker 0; None on the others."""
        self._collect()
        return self.merged(self._tensors)

    def load_full_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take own parts out of the whole network's state, which every worker must be given."""
        with torch.no_grad():
            for name, part in self.parts(state).items():
                self._tensors[name].copy_(part)
            for name, outer in self._outer.items():
                outer.copy_(self._learned[name])

    def merged(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Put together what workers hold for the network's tensors, such as an optimizer's moments; on worker 0.

        Args:
            tensors: name in the network -> a tensor shaped like the one held here. Names that no worker has are left
                out, but all holders of one must give it.
        """
        known = self._known(tensors)
        whole: dict[str, Tensor] = {}
        for entry in self._entries:
            if entry.held not in known:
                continue
            if entry.held != entry.name and entry.held in whole:
                whole[entry.name] = whole[entry.held]
                continue
            pieces = []
            for rank, shape in self._holders(entry):
                if self._rank == 0:
                    if rank == 0:
                        pieces.append(tensors[entry.held].detach().clone())
                    else:
                        piece = torch.empty(shape, dtype=known[entry.held])
                        dist.recv(piece, group=self._world, group_src=rank)
                        pieces.append(piece)
                elif self._rank == rank:
                    dist.send(tensors[entry.held].detach().contiguous(), group=self._world, group_dst=0)
            if self._rank == 0:
                axis = 0 if entry.cut in (None, "flat") else entry.cut
                assert isinstance(axis, int)
                joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)
                whole[entry.name] = joined.view(entry.shape) if entry.cut == "flat" else joined
        return whole if self._rank == 0 else None

    def parts(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The way back: what this worker holds of each tensor in `whole`, which is shaped as the network's.

        Raises:
            ModelError: if a tensor has another shape than the network's.
        """
        mine: dict[str, Tensor] = {}
        for entry in self._entries:
            if entry.stage != self._stage or entry.name != entry.held or entry.name not in whole:
                continue
            tensor = whole[entry.name]
            if tuple(tensor.shape) != entry.shape:
                raise ModelError(
                    f"the tensor {entry.name} has shape {tuple(tensor.shape)}",
                    f"the network's has {entry.shape}",
                    "use the state of this very network",
                )
            if entry.cut == "flat":
                sizes = shares(tensor.numel(), self.plan.mesh.inner)
                mine[entry.name] = torch.split(tensor.reshape(-1), list(sizes))[self._inner]
            elif entry.cut is None:
                mine[entry.name] = tensor
            else:
                sizes = shares(tensor.shape[entry.cut], self.plan.mesh.tensor)
                mine[entry.name] = torch.split(tensor, list(sizes), entry.cut)[self._tensor]
        return mine

    def local_state(self) -> dict[str, Tensor]:
        """All that this worker must keep to go on exactly, besides its optimizer; not copied."""
        self._collect()
        state = {name: tensor.detach() for name, tensor in self._tensors.items()}
        state[_STEPS] = torch.tensor(self._moment.step)
        for name, outer in self._outer.items():
            state[_OUTER + name] = outer.detach()
            momentum = self._optimizer.state.get(outer, {}).get("momentum_buffer")
            if momentum is not None:
                state[_MOMENTUM + name] = momentum
        return state

    def load_local_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `local_state` of the same worker under the same plan."""
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.copy_(state[name])
            for name, outer in self._outer.items():
                outer.copy_(state[_OUTER + name])
                if _MOMENTUM + name in state:
                    self._optimizer.state[outer]["momentum_buffer"] = state[_MOMENTUM + name].clone()
        self._moment.step = int(state[_STEPS])

    @property
    def steps(self) -> int:
        """Steps done, which dropout depends on; may be set when a training goes on."""
        return self._moment.step

    @steps.setter
    def steps(self, steps: int) -> None:
        self._moment.step = steps

    # Making

    def _groups(self) -> None:
        mesh, world = self.plan.mesh, self._world
        self._inner_group: Group | None = None
        self._tensor_group: Group | None = None
        self._inner_sums: Group | None = None
        self._data_sums: Group | None = None
        if world is None:
            return
        ranks = dist.get_process_group_ranks(world)

        def group(members: list[int]) -> Group | None:
            # all workers must make all groups, also those that they are not in
            made = dist.new_group([ranks[member] for member in members]) if len(members) > 1 else None
            return made if self._rank in members else None

        for stage in range(mesh.pipeline):
            first = stage * mesh.inner
            inner = list(range(first, first + mesh.inner))
            self._inner_group = group(inner) or self._inner_group
            self._inner_sums = group(inner) or self._inner_sums
            for replica in range(mesh.data):
                members = inner[replica * mesh.tensor : (replica + 1) * mesh.tensor]
                self._tensor_group = group(members) or self._tensor_group
            for column in range(mesh.tensor):
                self._data_sums = group(inner[column :: mesh.tensor]) or self._data_sums

    @staticmethod
    def _require(group: Group | None) -> Group:
        assert group is not None
        return group

    @property
    def _is_last(self) -> bool:
        return self._stage == self.plan.mesh.pipeline - 1

    def _without_plain_noise(self, unit: nn.Module, numbers: dict[int, int], features: int | None) -> nn.Module:
        """The unit with dropout that does not depend on the number of workers, nor batch normalisation if so asked."""
        cut = None
        if features is not None:
            cut = features, sum(shares(features, self.plan.mesh.tensor)[: self._tensor])

        def replaced(module: nn.Module) -> nn.Module:
            if type(module) is nn.Dropout:
                return Dropout(module.p, numbers[id(module)], self._moment, cut).train(module.training)
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, SyncBatchNorm):
                if self._inner_group is not None and self._couples:
                    return SyncBatchNorm(module, self._inner_group)
                return module
            for name, child in module.named_children():
                setattr(module, name, replaced(child))
            return module

        return replaced(unit)

    def _form(self, layer: LayerPlan, unit: nn.Module) -> nn.Module:
        if layer.layout in ("column", "row") and self._tensor_group is not None:
            assert isinstance(unit, nn.Linear)
            form = Column if layer.layout == "column" else Row
            return form(unit, self._moment, self._tensor_group)
        if layer.layout == "sharded" and self._inner_group is not None:
            return Sharded(unit, self._inner_group)
        return unit

    def _hold(self, name: str, layer: LayerPlan, form: nn.Module) -> None:
        prefix = f"{name}." if name else ""
        if isinstance(form, Sharded):
            held = dict(zip(form.names, form.parts, strict=True))
            held |= {
                key: tensor
                for key, tensor in form.__dict__["module"].state_dict(keep_vars=True).items()
                if tensor.device.type != "meta"
            }
        else:
            held = form.state_dict(keep_vars=True)
        mine = {entry.held for entry in self._entries}
        self._tensors |= {prefix + key: tensor for key, tensor in held.items() if prefix + key in mine}

    def _owners(self, own: list[tuple[LayerPlan, str, nn.Module]]) -> dict[str, tuple[dict[str, Tensor | None], str]]:
        """Name of a buffer that is held here -> the buffers of its module, and its name among them."""
        forms = iter(self._layers)
        found: dict[str, tuple[dict[str, Tensor | None], str]] = {}
        for layer, name, _ in own:
            if layer.stage != self._stage:
                continue
            form = next(form for form in forms if not isinstance(form, ToFeatures | ToRows))
            for path, module in _whole(form).named_modules(prefix=name):
                for key in module._buffers:
                    full = f"{path}.{key}" if path else key
                    if full in self._tensors:
                        found[full] = module._buffers, key
        return found

    def _train(self) -> None:
        """Training mode, but for what the network's factory left in evaluation mode."""
        self._layers.train()
        for module in self._resting:
            module.training = False

    def _took_part(self) -> list[float]:
        """1 for each entry of the network's state whose gradient this worker has a part of."""
        taken = {id(one) for reducer in self._reducers for one in reducer.taken}
        for form in self._layers:
            if isinstance(form, Sharded):
                taken |= {id(part) for part, took in zip(form.parts, form.took, strict=True) if took}
        plain = {id(one) for one in self._unreduced} - {
            id(part) for form in self._layers if isinstance(form, Sharded) for part in form.parts
        }
        return [
            float(
                (one := self._learned.get(entry.held)) is not None
                and (id(one) in taken or (id(one) in plain and one.grad is not None))
            )
            for entry in self._entries
        ]

    def _collect(self) -> list[float]:
        """Take up buffers that the network put others in place of; 1 for each entry of the state that it changed."""
        changed = set()
        with torch.no_grad():
            for name, (buffers, key) in self._holders_of.items():
                held, here = self._tensors[name], buffers[key]
                if here is not None and here is not held:
                    if here.shape == held.shape and here.dtype == held.dtype:
                        held.copy_(here)
                        buffers[key] = held
                    else:
                        self._tensors[name] = held = here.detach()
                if _differs(held, self._seen[name]):
                    changed.add(name)
                    self._seen[name] = _mark(held)
        return [float(entry.held in changed) for entry in self._entries]

    def _learnable(self) -> dict[str, nn.Parameter]:
        return {
            name: tensor
            for name, tensor in self._tensors.items()
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad
        }

    def _make_reducers(self, compression: Compression, *, shared_memory: bool) -> list[Reducer]:
        cuts = {entry.held: entry.cut for entry in self._entries}
        made = []
        whole = [tensor for name, tensor in self._learned.items() if cuts[name] is None]
        cut = [tensor for name, tensor in self._learned.items() if cuts[name] in (0, 1)]
        if self._inner_sums is not None and whole:
            made.append(Reducer(whole, self._inner_sums, compression, shared_memory=shared_memory))
        if self._data_sums is not None and cut:
            made.append(Reducer(cut, self._data_sums, compression, shared_memory=shared_memory))
        return made

    # Running

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
        """Tell the layers which rows come next."""
        starts = list(itertools.accumulate(parts, initial=0))

        def numbers(worker: int) -> Any:
            first = starts[worker] + sum(pieces[worker][:index])
            return np.arange(first, first + pieces[worker][index], dtype=np.uint64)

        team = range(self._replica * self.plan.mesh.tensor, (self._replica + 1) * self.plan.mesh.tensor)
        self._moment.serial += 1
        self._moment.rows = tuple(pieces[worker][index] for worker in team)
        self._moment.own = numbers(self._inner)
        self._moment.all = np.concatenate([numbers(worker) for worker in team])

    def _one_forward_one_backward(
        self,
        inputs: Tensor,
        targets: Tensor,
        loss_sum: LossSum,
        parts: tuple[int, ...],
        count: int,
        scale: float,
    ) -> float:
        """All microbatches through this stage; the scaled loss of own rows, 0 but on the last stage."""
        pieces = [shares(part, count) for part in parts]
        own = list(pieces[self._inner])
        mine_in = torch.split(inputs, own) if self._stage == 0 else [inputs] * count
        mine_out = torch.split(targets, own) if self._is_last else [targets] * count
        under_way: dict[int, tuple[Tensor, Tensor]] = {}
        sent: list[dist.Work] = []
        total = 0.0

        def forward(index: int) -> None:
            nonlocal total
            self._enter(parts, pieces, index)
            first = self._stage == 0
            entry = mine_in[index] if first else self._receive("activation", own[index], -1).requires_grad_()
            with self._cast():
                x = entry
                for layer in self._layers:
                    x = layer(x)
                if self._is_last:
                    x = loss_sum(x, mine_out[index]) * scale
            if self._is_last:
                total += float(x.detach())
            else:
                x = x.to(self._wire_dtype(x))
                sent.append(self._send("activation", x.detach(), +1))
            under_way[index] = entry, x

        def backward(index: int) -> None:
            entry, out = under_way.pop(index)
            if index == count - 1:
                for reducer in self._reducers:
                    reducer.arm()
            if self._is_last:
                out.backward()  # type: ignore[no-untyped-call]
            else:
                grad = self._receive("gradient", own[index], +1)
                torch.autograd.backward(out, grad)
            if self._stage > 0:
                assert entry.grad is not None
                sent.append(self._send("gradient", entry.grad, -1))

        ahead = min(count, self.plan.mesh.pipeline - 1 - self._stage)
        for index in range(ahead):
            forward(index)
        for index in range(count):
            if index + ahead < count:
                forward(index + ahead)
            backward(index)
        for work in sent:
            work.wait()
        return total

    @contextlib.contextmanager
    def _sharing(self, changed: list[_Entry], share: float) -> Iterator[None]:
        """What buffers became on this worker's rows becomes, meanwhile, the mean over all rows.

        It is exact for what is a mean over rows, such as running statistics. Batch normalisation over all workers has
        the same everywhere; whole numbers stay as they are.
        """
        exact = {
            id(one)
            for layer in self._layers
            for module in _whole(layer).modules()
            if isinstance(module, SyncBatchNorm)
            for one in module._buffers.values()
        }
        mine = [
            tensor
            for entry in changed
            if entry.stage == self._stage and not entry.learned
            if (tensor := self._tensors[entry.held]).is_floating_point() and id(tensor) not in exact
        ]
        if not mine or self._inner_group is None or self._relaxed is not None:
            yield
            return
        flat = torch.cat([tensor.detach().reshape(-1).double() for tensor in mine]) * share
        work = dist.all_reduce(flat, group=self._inner_group, async_op=True)
        yield
        assert work is not None
        work.wait()
        with torch.no_grad():
            for tensor, part in zip(mine, flat.split([one.numel() for one in mine]), strict=True):  # type: ignore[no-untyped-call]
                tensor.copy_(part.view(tensor.shape))
        held = {id(tensor) for tensor in mine}
        self._seen |= {name: _mark(self._tensors[name]) for name in self._holders_of if id(self._tensors[name]) in held}

    def _wire_dtype(self, x: Tensor) -> torch.dtype:
        """Between stages numbers travel in the weights' precision: autocast's is for computing."""
        return torch.float32 if self._precision is not None and x.is_floating_point() else x.dtype

    @contextlib.contextmanager
    def _cast(self) -> Iterator[None]:
        with torch.autocast("cpu", self._precision or torch.bfloat16, enabled=self._precision is not None):
            yield

    def _send(self, what: str, tensor: Tensor, to: int) -> dist.Work:
        """To the worker of the same place in the next stage or the one before; its shape goes ahead, once."""
        tensor = tensor.contiguous()
        target = self._rank + to * self.plan.mesh.inner
        key = f"to {what}"
        if self._boundaries.get(key) != (tuple(tensor.shape[1:]), tensor.dtype):
            assert key not in self._boundaries, "the shape of activations must not change from step to step"
            self._boundaries[key] = tuple(tensor.shape[1:]), tensor.dtype
            header = torch.zeros(_HEADER, dtype=torch.int64)
            header[: tensor.dim() + 1] = torch.tensor(
                [_DTYPES.index(tensor.dtype), tensor.dim() - 1, *tensor.shape[1:]]
            )
            dist.send(header, group=self._world, group_dst=target)
        work = dist.isend(tensor, group=self._world, group_dst=target)
        assert work is not None
        return work

    def _receive(self, what: str, rows: int, source: int) -> Tensor:
        origin = self._rank + source * self.plan.mesh.inner
        key = f"from {what}"
        if key not in self._boundaries:
            header = torch.zeros(_HEADER, dtype=torch.int64)
            dist.recv(header, group=self._world, group_src=origin)
            dtype, dims, *shape = header.tolist()
            self._boundaries[key] = tuple(shape[:dims]), _DTYPES[dtype]
        shape_, dtype_ = self._boundaries[key]
        tensor = torch.empty((rows, *shape_), dtype=dtype_)
        dist.recv(tensor, group=self._world, group_src=origin)
        return tensor

    # Bookkeeping

    def _known(self, tensors: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
        """Names that any worker has, with their types."""
        mine = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
        if self._world is None:
            return {name: getattr(torch, dtype) for name, dtype in mine.items()}
        all_of: list[Any] = [None] * self.plan.workers
        dist.all_gather_object(all_of, mine, group=self._world)
        return {name: getattr(torch, dtype) for one in all_of for name, dtype in one.items()}

    def _holders(self, entry: _Entry) -> list[tuple[int, tuple[int, ...]]]:
        """Workers whose parts make the whole, in order, and the parts' shapes."""
        mesh = self.plan.mesh
        first = entry.stage * mesh.inner
        if entry.cut is None or (entry.cut == "flat" and mesh.inner == 1):
            return [(first, entry.shape)]
        if entry.cut == "flat":
            return [(first + index, (size,)) for index, size in enumerate(shares(math.prod(entry.shape), mesh.inner))]
        return [
            (first + index, (*entry.shape[: entry.cut], size, *entry.shape[entry.cut + 1 :]))
            for index, size in enumerate(shares(entry.shape[entry.cut], mesh.tensor))
        ]


def _mark(buffer: Tensor) -> Tensor | int:
    """By which it is seen whether a buffer has changed: torch counts no changes of running statistics."""
    return buffer.detach().clone() if buffer.numel() <= _COMPARED else buffer._version


def _differs(buffer: Tensor, mark: Tensor | int) -> bool:
    if isinstance(mark, int):
        return buffer._version != mark
    return buffer.shape != mark.shape or not torch.equal(buffer, mark)


def _whole(layer: nn.Module) -> nn.Module:
    """The layer itself, where its parameters are shared out."""
    module: nn.Module = layer.__dict__["module"] if isinstance(layer, Sharded) else layer
    return module


_COMPARED = 1_000_000
"""Numbers of a buffer that is compared with what it was; a larger one is a table."""
_HEADER = 16
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)


def _table(network: nn.Module, units: list[tuple[str, nn.Module]], plan: ParallelPlan) -> tuple[_Entry, ...]:
    """The network's state, in its own order."""
    of_unit = {
        (f"{name}.{key}" if name else key): layer
        for layer, (name, unit) in zip(plan.layers, units, strict=True)
        for key in unit.state_dict(keep_vars=True)
    }
    first: dict[int, str] = {}
    entries = []
    for name, tensor in network.state_dict(keep_vars=True).items():
        layer = of_unit[name]
        learned = isinstance(tensor, nn.Parameter) and tensor.requires_grad
        last = name.rpartition(".")[2]
        cut: Literal[0, 1, "flat"] | None = None
        if plan.mesh.tensor > 1 and layer.layout == "column":
            cut = 0
        elif plan.mesh.tensor > 1 and layer.layout == "row" and last == "weight":
            cut = 1
        elif layer.layout == "sharded" and learned and plan.mesh.inner > 1:
            cut = "flat"
        held = first.setdefault(id(tensor), name)
        entries.append(_Entry(name, tuple(tensor.shape), tensor.dtype, layer.stage, cut, held, learned))
    return tuple(entries)


def _materialise(unit: nn.Module, seed: int, index: int) -> None:
    """Give a layer on the meta device fresh weights, the same under every plan."""
    if not any(tensor.is_meta for tensor in (*unit.parameters(), *unit.buffers())):
        return
    unit.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed * 1_000_003 + index)
        for module in unit.modules():
            if not list(module.parameters(recurse=False)) and not list(module.buffers(recurse=False)):
                continue
            reset = getattr(module, "reset_parameters", None)
            if not callable(reset):
                raise ModelError(
                    f"cannot give {type(module).__name__} fresh weights",
                    "it has parameters but no reset_parameters",
                    "build the network outside the meta device",
                )
            reset()
