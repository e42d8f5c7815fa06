"""Which parallel plan a training takes: the one it began with, else the fastest in trial steps or by prediction."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import torch.distributed as dist

from rushhour.bundle import Source, TensorSpec
from rushhour.errors import ModelError
from rushhour.models import build
from rushhour.progress import Progress
from rushhour.system.storage import write_whole
from rushhour.train.parallel.autotune import Step, fastest
from rushhour.train.parallel.broadcast import from_leader, run_on_leader
from rushhour.train.parallel.calibration import calibrate_group
from rushhour.train.parallel.cost import Layer, Mesh
from rushhour.train.parallel.layer_table import chain, layer_table
from rushhour.train.parallel.plan import LayerPlan, ParallelPlan, Prediction
from rushhour.train.parallel.planner import ranked_plans, worker_memory
from rushhour.train.parallel.settings import ParallelSettings

TRIAL_S = 20.0
TRIAL_SHARE = 0.05
"""Trial steps take no longer than this, and no more than this share of the training by prediction."""


class _Kept(msgspec.Struct, frozen=True):
    """A plan on disk, and what it was chosen for: a training must be resumed with the plan that it began with."""

    division: ParallelSettings
    workers: int
    batch: int
    plan: ParallelPlan


def choose_plan(
    source: Source,
    sample: tuple[TensorSpec, ...],
    outputs: int | tuple[int, ...],
    *,
    settings: ParallelSettings,
    batch: int,
    trusted: tuple[str, ...],
    path: Path,
    progress: Progress,
    looked_up: Callable[[tuple[Layer, ...]], tuple[Layer, ...]] | None = None,
    prepare: Callable[[ParallelPlan], Step] | None = None,
    steps: int = 0,
) -> ParallelPlan:
    """The plan of a training, the same on all workers of the default group, which all call this.

    Args:
        source: the network.
        sample: one sample: each input.
        outputs: length of one answer; its shape, where it is about places.
        settings: what is asked for.
        batch: samples in a step.
        trusted: factories that may be imported besides those of `rushhour.models`.
        path: where the plan is kept; a plan that was kept for the same settings, workers and batch is taken again.
        progress: receives the reason for the plan.
        looked_up: adds to a layer table which rows of embedding tables the data looks up; see `with_lookups`. Called
            on worker 0, where the network has tables.
        prepare: gives a function that runs one training step by a plan. With it, and without given constants, the plans
            that could be fastest run trial steps.
        steps: of the whole training: the trial steps take a small share of its time.

    Raises:
        PlanError: if no plan of this mode exists, or none fits in memory.
        StorageError: if the plan cannot be written.
    """
    workers, is_leader = dist.get_world_size(), dist.get_rank() == 0
    if settings.relaxed is not None:
        settings = msgspec.structs.replace(settings, mode="data")
    kept = _kept(path) if is_leader else None
    wanted = (settings, workers, batch)
    found = kept.plan if kept is not None and (kept.division, kept.workers, kept.batch) == wanted else None
    plan = from_leader(found)
    if plan is not None:
        return plan
    progress.start(f"plan for {workers} workers")
    constants = settings.constants or calibrate_group(shared_memory=settings.shared_memory)

    def ranked() -> list[ParallelPlan]:
        try:
            layers = layer_table(source, sample, outputs, trusted)
        except ModelError as error:
            if settings.mode not in ("auto", "data"):
                raise
            return [_replicas(source, trusted, workers, batch, str(error))]
        if looked_up is not None and any(layer.tables for layer in layers):
            layers = looked_up(layers)
        if settings.batch_norm == "local":
            layers = tuple(msgspec.structs.replace(layer, norms=0) for layer in layers)  # nothing is exchanged for them
        return ranked_plans(
            layers,
            workers=workers,
            batch=batch,
            mode=settings.mode,
            memory_bytes=settings.memory_bytes,
            constants=constants,
            backend=settings.backend,
        )

    plans = run_on_leader(ranked)
    if prepare is not None and settings.constants is None:
        predicted_s = steps * plans[0].predicted.step_s
        budget_s, memory = min(TRIAL_S, TRIAL_SHARE * predicted_s), settings.memory_bytes or worker_memory(workers)
        plan = fastest(plans, prepare, budget_s=budget_s, memory_bytes=memory)
    else:
        plan = plans[0]
    content = msgspec.json.encode(_Kept(settings, workers, batch, plan))
    run_on_leader(lambda: write_whole(path, content))
    progress.done(plan.explain())
    return plan


def _kept(path: Path) -> _Kept | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Kept)
    except (OSError, msgspec.MsgspecError):
        return None


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
