"""A whole run in one folder: train or take the reference, compress it, search, and leave the Plan.

    RUN/bundles/reference, RUN/bundles/int8     what can be served; int8-vnni too, where 7 bits of the weights cost much
    RUN/training                                how the reference was trained: curves, TensorBoard
    RUN/measurements.jsonl                      every measurement
    RUN/plan.json                               the answer, written last

Each part is there whole or not at all, so whatever a killed run has finished is not done again.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from rushhour.bundle import Bundle, Source
from rushhour.compress import quantize_for_all
from rushhour.data import Dataset
from rushhour.errors import PlanError, StorageError
from rushhour.goal import Goal
from rushhour.plan import Plan
from rushhour.progress import Progress
from rushhour.storage import explained
from rushhour.train import Tracking, TrainSettings, train
from rushhour.tune.tune import TuneSettings, tune


def tune_run(
    model: Source | Bundle,
    dataset: Dataset,
    goal: Goal,
    *,
    run: Path,
    training: TrainSettings,
    settings: TuneSettings,
    progress: Progress,
    trusted: tuple[str, ...] = (),
) -> Plan:
    """Do everything from a model to a Plan in the folder `run`, going on where an earlier, killed call stopped.

    Args:
        model: a network to be trained, or a trained bundle.
        dataset: to train, calibrate and judge with.
        goal: what to meet.
        run: the folder; one process at a time works in it.
        training: how a network is trained.
        settings: how the search goes.
        progress: hears of every step.
        trusted: factories that may be imported; the user's own.

    Raises:
        RushhourError: of the part that failed; what was finished before stays.
    """
    with _alone_in(run):
        if isinstance(model, Bundle):
            reference = _taken(model, run / "bundles" / "reference")
        else:
            reference = train(
                dataset,
                model,
                training,
                out=run / "bundles" / "reference",
                work=run / ".checkpoints",
                progress=progress,
                trusted=trusted,
                tracking=Tracking(run / "training"),
            )
        bundles = {"reference": reference}
        if reference.manifest.precision == "f32":
            made = quantize_for_all(reference, dataset, run / "bundles" / "int8", progress=progress)
            bundles |= {made_for.path.name: made_for for made_for in made.values()}
        file = run / "plan.json"
        if file.exists() and (finished := _still_true(file, bundles, goal)):
            progress.start("This run is complete: the plan is there")
            progress.done(f"remove {run} to begin anew")
            return finished
        plan = tune(bundles, dataset, goal, run=run, settings=settings, progress=progress, trusted=trusted)
        plan.save(file)
        return plan


def _still_true(file: Path, bundles: dict[str, Bundle], goal: Goal) -> Plan | None:
    """The plan on disk, if it answers this goal with these very bundles."""
    try:
        plan = Plan.load(file)
    except PlanError:
        return None
    hashes = {f"bundles/{role}": bundle.manifest.hash for role, bundle in bundles.items()}
    variant = plan.variants[0]
    return plan if plan.goal == goal and hashes.get(variant.bundle) == variant.bundle_hash else None


def _taken(bundle: Bundle, path: Path) -> Bundle:
    """`bundle`, copied into the run unless it is there already: a plan and its bundles live in one folder."""
    if path.is_dir() and bundle.path.resolve() == path.resolve():
        return bundle
    if (path / "bundle.json").is_file() and (there := Bundle.open(path)).manifest.hash == bundle.manifest.hash:
        return there
    return bundle.copy_to(path)


@contextlib.contextmanager
def _alone_in(run: Path) -> Iterator[None]:
    with explained(f"make the folder {run}"):
        run.mkdir(parents=True, exist_ok=True)
    with explained(f"lock {run}"), (run / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StorageError(
                f"another process works in {run}", "its lock is held", "wait for it, stop it, or choose another --out"
            ) from error
        yield
