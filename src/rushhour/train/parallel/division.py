"""One training divided over several workers by a parallel plan: how it is decided on, and how its steps are taken."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from rushhour.bundle import Source, TensorSpec
from rushhour.errors import ModelError, PlanError, RushhourError
from rushhour.models import Deployed, build
from rushhour.models.deployed import as_logits
from rushhour.progress import Progress
from rushhour.system.storage import write_whole
from rushhour.task import Task
from rushhour.train.checkpoint import (
    COUNTS,
    Snapshot,
    counts_of,
    moments_of,
    progress_of,
    put_progress_back,
    set_moments,
)
from rushhour.train.feed import Batch
from rushhour.train.loss import loss_for
from rushhour.train.parallel.autotune import Step, fastest
from rushhour.train.parallel.cost import Constants, Mesh, measure_together
from rushhour.train.parallel.launch import Backend
from rushhour.train.parallel.network import BatchNorm, Parallel, Relaxed, parallelise
from rushhour.train.parallel.plan import (
    LayerPlan,
    Mode,
    ParallelPlan,
    Prediction,
    chain,
    layer_table,
    ranked_plans,
    worker_memory,
)
from rushhour.train.parallel.reducer import Compression
from rushhour.train.settings import TrainSettings
from rushhour.train.stepper import AVERAGE, AVERAGES, average_moments, move_averages

TRIAL_S = 20.0
TRIAL_SHARE = 0.05
"""Plans are tried for no longer than this, and than this share of the training as predicted."""
_OWN = "worker"
"""Below it, in a snapshot, each relaxed worker's own state."""


class Division(msgspec.Struct, frozen=True):
    """How several workers share a training.

    Raises `PlanError` where workers that meet now and then would not each have the whole network.

    Attributes:
        mode: the family of the plan; `auto`: the fastest of all.
        memory_bytes: that each worker may use; by default its share of this machine's.
        compression: of gradients on their way.
        relaxed: workers meet only now and then.
        batch_norm: sees the whole batch, or `local`: each worker's own rows.
        shared_memory: add up gradients in memory that workers share, where they are on one machine, instead of sending.
        backend: of torch.distributed.
        constants: of the machine; measured where not given, which takes some seconds.
    """

    mode: Mode = "auto"
    memory_bytes: int | None = None
    compression: Compression = "none"
    relaxed: Relaxed | None = None
    batch_norm: BatchNorm = "whole"
    shared_memory: bool = True
    backend: Backend = "gloo"
    constants: Constants | None = None

    def __post_init__(self) -> None:
        if self.relaxed is not None and self.mode not in ("auto", "data"):
            raise PlanError(
                f"a {self.mode} plan cannot be relaxed",
                "workers that meet only now and then must each have the whole network",
                "use --parallel data",
            )

    @property
    def exact(self) -> bool:
        """Whether the training is that of one worker, up to rounding."""
        return self.compression == "none" and self.relaxed is None and self.batch_norm == "whole"


class _Kept(msgspec.Struct, frozen=True):
    """A plan on disk, and what it was asked for: a training that goes on must go on as it began."""

    division: Division
    workers: int
    batch: int
    plan: ParallelPlan


def decide(
    source: Source,
    sample: TensorSpec,
    outputs: int,
    *,
    division: Division,
    batch: int,
    trusted: tuple[str, ...],
    path: Path,
    progress: Progress,
    prepare: Callable[[ParallelPlan], Step] | None = None,
    steps: int = 0,
) -> ParallelPlan:
    """The plan of a training, the same on all workers of the default group, which all call this.

    Args:
        source: the network.
        sample: one sample.
        outputs: length of one answer.
        division: what is wanted.
        batch: samples in a step.
        trusted: factories that may be imported besides those of `rushhour.models`.
        path: where the plan is kept; one that was kept for the same question is taken again.
        progress: hears why it is this one.
        prepare: what one step of this training is by some plan; where it is given, and machine and mode are not, the
            plans that could be fastest are tried before one is taken.
        steps: that the training will have: trying takes a small share of their time.

    Raises:
        PlanError: if no plan of this mode exists, or none fits in memory.
        StorageError: if the plan cannot be written.
    """
    world, leads = dist.get_world_size(), dist.get_rank() == 0
    if division.relaxed is not None:
        division = msgspec.structs.replace(division, mode="data")
    kept = _kept(path) if leads else None
    asked = (division, world, batch)
    found = kept.plan if kept is not None and (kept.division, kept.workers, kept.batch) == asked else None
    plan: ParallelPlan | None = _from_leader(found)
    if plan is not None:
        return plan
    progress.start(f"plan for {world} workers")
    constants = division.constants or measure_together(shared_memory=division.shared_memory)

    def planned() -> list[ParallelPlan]:
        try:
            layers = layer_table(source, sample, outputs, trusted)
        except ModelError as error:
            if division.mode not in ("auto", "data"):
                raise
            return [_replicas(source, trusted, world, batch, str(error))]
        if division.batch_norm == "local":
            layers = tuple(msgspec.structs.replace(layer, norms=0) for layer in layers)  # nothing is exchanged for them
        return ranked_plans(
            layers,
            workers=world,
            batch=batch,
            mode=division.mode,
            memory_bytes=division.memory_bytes,
            constants=constants,
            backend=division.backend,
        )

    plans: list[ParallelPlan] = only_leader(planned)
    if prepare is not None and division.constants is None:
        predicted_s = steps * plans[0].predicted.step_s
        budget_s, memory = min(TRIAL_S, TRIAL_SHARE * predicted_s), division.memory_bytes or worker_memory(world)
        made = fastest(plans, prepare, budget_s=budget_s, memory_bytes=memory)
    else:
        made = plans[0]
    only_leader(lambda: write_whole(path, msgspec.json.encode(_Kept(division, world, batch, made))))
    progress.done(made.explain())
    return made


def _kept(path: Path) -> _Kept | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Kept)
    except (OSError, msgspec.MsgspecError):
        return None


def _from_leader(thing: Any) -> Any:
    box = [thing]
    dist.broadcast_object_list(box, 0)
    return box[0]


def only_leader(work: Callable[[], Any]) -> Any:
    """What worker 0 makes, on all workers; so are its errors."""
    outcome: Any = None
    if dist.get_rank() == 0:
        try:
            outcome = work()
        except RushhourError as error:
            outcome = error
    outcome = _from_leader(outcome)
    if isinstance(outcome, RushhourError):
        raise outcome
    return outcome


def _replicas(source: Source, trusted: tuple[str, ...], workers: int, batch: int, why: str) -> ParallelPlan:
    """Replicas, which need nothing but a network that runs."""
    layers = tuple(
        LayerPlan(name, "data" if any(True for _ in unit.parameters()) else "local")
        for name, unit in chain(build(source, trusted))
    )
    return ParallelPlan(
        workers=workers,
        mode="data",
        mesh=Mesh(workers, 1, 1),
        batch=batch,
        microbatches=1,
        layers=layers,
        predicted=Prediction(0, 0, 0, 0),
        notes=(f"only replicas are possible: {why}",),
    )


class Divided:
    """A network as a plan divides it; a `Stepper`.

    Dropout follows from (seed, step, sample), and batch normalisation sees the whole batch where it is not asked to see
    each worker's part: every exact plan computes the same up to rounding. A snapshot holds the whole network, under its
    own names; of relaxed workers each one's own state as well.

    Args:
        deployed: with the network, equal on all workers; it is taken over.
        task: decides the loss.
        plan: for this network and as many workers as there are.
        settings: of the training; resolved.
        division: what was asked for.

    Raises:
        PlanError: if the plan does not fit the network, or cannot be relaxed.
        ModelError: if there is nothing to learn.
    """

    def __init__(
        self, deployed: Deployed, task: Task, plan: ParallelPlan, *, settings: TrainSettings, division: Division
    ) -> None:
        if not any(parameter.requires_grad for parameter in deployed.network.parameters()):
            raise ModelError("cannot train this network", "it has no parameters", "give it parameters to learn")
        self._preprocess = deployed.preprocess
        self._task = task
        self._as_logits = partial(as_logits, outputs=deployed.outputs, meaning=deployed.meaning)
        self._averages: dict[str, Tensor] = {}
        self._has_averages = settings.ema is not None
        self._seed = settings.seed
        self._microbatches = max(plan.microbatches, settings.accumulate)
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._relaxed = division.relaxed is not None
        self._parallel: Parallel = parallelise(
            deployed.network,
            plan,
            precision=torch.bfloat16 if settings.bf16 else None,
            seed=settings.seed,
            compression=division.compression,
            relaxed=division.relaxed,
            batch_norm=division.batch_norm,
            shared_memory=division.shared_memory,
        )
        self._named = dict(self._parallel.named_parameters())
        self.leads = self._rank == 0
        self.part = self._rank % plan.mesh.inner, plan.mesh.inner

    def parameters(self) -> Sequence[Tensor]:
        """What this worker has; a stage without any learns a number that nobody reads, as optimizers want one."""
        return list(self._named.values()) or [nn.Parameter(torch.zeros(()))]

    def step(self, batch: Batch) -> float:
        """Forward and backward by the plan; see `Stepper`."""
        # for modules that draw random numbers themselves; a step that is done again draws the same
        torch.manual_seed(int(np.random.SeedSequence((self._seed, batch.step, self._rank)).generate_state(1)[0]))
        return self._parallel.step(
            self._preprocess(batch.inputs),
            batch.targets,
            self._loss,
            len(batch.rows),
            microbatches=self._microbatches,
        )

    def _loss(self, given: Any, targets: Tensor) -> Tensor:
        return loss_for(self._task, "sum")(self._as_logits(given), targets)

    def clip(self, max_norm: float) -> None:
        """Shorten the gradient of the whole network, wherever its parts are."""
        self._parallel.clip(max_norm)

    def meet(self) -> None:
        """Relaxed workers meet, when it is time."""
        self._parallel.synchronise()

    def finite(self) -> bool:
        """Whether all weights, on all workers, are numbers."""
        mine = all(bool(parameter.isfinite().all()) for parameter in self._named.values())
        all_of_us = torch.tensor(float(mine))
        dist.all_reduce(all_of_us, dist.ReduceOp.MIN)
        return bool(all_of_us)

    def agree(self, value: float) -> float:
        """The value that worker 0 has."""
        said = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(said, 0)
        return said.item()

    def culprits(self, batch: Batch) -> list[int]:
        """Each worker that has answers looks among its own samples."""
        answers = self._parallel.predict(self._preprocess(batch.inputs), len(batch.rows))
        found: list[int] = []
        if answers is not None:
            losses = loss_for(self._task, "none")(self._as_logits(answers), batch.targets)
            found = batch.own[(~losses.isfinite()).numpy()].tolist()
        every: list[list[int]] = [[] for _ in range(self._world)]
        dist.all_gather_object(every, found)
        return [row for rows in every for row in rows]

    def predict(self, inputs: Tensor) -> Tensor | None:
        """Outputs `(n, outputs)` for n samples that all workers are given, shared out, on the leading worker."""
        rows = len(inputs)
        # too few rows for the workers are given more, which are cut off again
        full = inputs if rows >= self.part[1] else inputs[torch.arange(self.part[1]) % rows]
        mine = self._parallel.rows(len(full))
        answers = self._parallel.predict(self._preprocess(full[mine]), len(full))
        every: list[Any] | None = [None] * self._world if self.leads else None
        own = None if answers is None else self._as_logits(answers).float().numpy()
        dist.gather_object(None if own is None else (mine.start, own), every)
        if every is None:
            return None
        # in the order of the rows, from whichever workers have answers
        found = dict(sorted(one for one in every if one is not None))
        return torch.from_numpy(np.concatenate(list(found.values()))[:rows])

    def averaged(self, optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
        """Averages of the weights stand in: over time where they are kept, and over workers where these are relaxed."""
        return self._standing_in(optimizer)

    def weights(self) -> dict[str, Tensor]:
        """The whole network's state, as copies, on the leading worker; nothing on the others."""
        return _apart(self._parallel.full_state_dict() or {})

    def average(self, optimizer: torch.optim.Optimizer, decay: float) -> None:
        """Of what this worker holds."""
        average_moments(list(self._named.values()), optimizer, decay)
        move_averages(self._averages, self._parallel.buffers(), decay)

    def take(
        self,
        step: int,
        optimizer: torch.optim.Optimizer,
        schedule: LRScheduler,
        notes: Mapping[str, Any],
        more: Mapping[str, Tensor],
    ) -> Snapshot | None:
        """The whole network and the whole of each moment, put together on worker 0."""
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
        with self._standing_in(None):
            tensors = {f"network.{name}": tensor for name, tensor in self.weights().items()}
        for moment in sorted({name for names, _ in known for name in names}):
            whole = self._parallel.merged({name: one[moment] for name, one in held.items() if moment in one})
            tensors |= {f"moment.{moment}.{name}": tensor for name, tensor in _apart(whole or {}).items()}
        if self._has_averages and not self._relaxed:
            whole = self._parallel.merged(self._averages)
            tensors |= {f"{AVERAGES}.{name}": tensor for name, tensor in _apart(whole or {}).items()}
        if self._relaxed:
            every: list[Any] | None = [None] * self._world if self.leads else None
            dist.gather_object(own, every)
            tensors |= {
                f"{_OWN}.{rank}.{name}": one for rank, given in enumerate(every or []) for name, one in given.items()
            }
        if not self.leads:
            return None
        return Snapshot(step, {**progress_of(optimizer, schedule), **notes, COUNTS: counts}, {**tensors, **more})

    def put(self, found: Snapshot, optimizer: torch.optim.Optimizer, schedule: LRScheduler) -> None:
        """Take own parts of a snapshot; of relaxed workers, what this very one had."""
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
            # the fused optimizer walks parameter and moments side by side, so they must lie alike in memory
            values = {
                moment: torch.empty_like(parameter).copy_(named[name])
                for moment, named in moments.items()
                if name in named
            }
            set_moments(optimizer, parameter, values, found.notes[COUNTS].get(name))
        put_progress_back(found, optimizer, schedule)

    @contextlib.contextmanager
    def _standing_in(self, optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
        """Averages over time, where an optimizer is given that keeps them, and over relaxed workers."""
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


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As safetensors writes them: in one piece, and no two in the same memory."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        found[name] = tensor.clone() if tensor.data_ptr() in seen else tensor.contiguous()
        seen.add(tensor.data_ptr())
    return found
