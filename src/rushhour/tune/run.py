"""A whole run in one folder: train or take the reference, compress it, search, and leave the Plan.

    RUN/bundles/reference, RUN/bundles/int8     what can be served; int8-vnni too, where 7 bits of the weights cost much
    RUN/training                                how the reference was trained: curves, TensorBoard
    RUN/measurements.jsonl                      every measurement
    RUN/plan-so-far.json                        the best answer until then, while the search goes on
    RUN/plan.json                               the answer, written last

Each part is there whole or not at all, so whatever a killed run has finished is not done again.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

import msgspec

from rushhour.bundle import Bundle, Source
from rushhour.clock import Clock, WallClock
from rushhour.compress import quantize_for_all
from rushhour.data import Dataset
from rushhour.errors import PlanError, StorageError
from rushhour.goal import Goal
from rushhour.journal import Journal
from rushhour.measurement import ServiceTimes
from rushhour.plan import SO_FAR, Plan
from rushhour.progress import Progress
from rushhour.storage import explained
from rushhour.train import Tracking, TrainSettings, step_seconds, train
from rushhour.tune.settings import Budget, TuneSettings
from rushhour.tune.tune import tune

_TRAINING_SHARE, _FEWEST_EPOCHS = 0.4, 2
"""Of the budget, for the training; more where fewer epochs would be left: one pass over the data teaches too little."""
_LEAST_SHARE = 0.6
"""Of the budget, that the search has even where training took more than its share."""


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
    fit_epochs: bool = False,
    clock: Clock | None = None,
) -> Plan:
    """Do everything from a model to a Plan in the folder `run`, going on where an earlier, killed call stopped.

    Args:
        model: a network to be trained, or a trained bundle.
        dataset: to train, calibrate and judge with.
        goal: what to meet.
        run: the folder; one process at a time works in it.
        training: how a network is trained.
        settings: how the search goes. Its budget is one for all: training and compression are part of it.
        progress: hears of every step.
        trusted: factories that may be imported; the user's own.
        fit_epochs: with a budget, train for fewer epochs where this machine would take too much of it.
        clock: what the budget is read on.

    Raises:
        RushhourError: of the part that failed; what was finished before stays.
    """
    clock = clock or WallClock()
    budget = Budget(settings.budget_s, clock)
    with _alone_in(run):
        if settings.budget_s is not None:
            progress.limit(settings.budget_s)
        if isinstance(model, Bundle):
            reference = _taken(model, run / "bundles" / "reference")
        else:
            if fit_epochs and settings.budget_s is not None:
                training = _fitted(training, model, dataset, run, settings.budget_s, progress, trusted)
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
        if settings.budget_s is not None:
            share = max(_LEAST_SHARE, budget.left)
            settings = msgspec.structs.replace(settings, budget_s=share * settings.budget_s)
        so_far = run / SO_FAR
        plan = tune(
            bundles,
            dataset,
            goal,
            run=run,
            settings=settings,
            progress=progress,
            trusted=trusted,
            clock=clock,
            so_far=lambda plan: plan.save(so_far),
        )
        plan.save(file)
        so_far.unlink(missing_ok=True)
        return plan


def _fitted(
    training: TrainSettings,
    source: Source,
    dataset: Dataset,
    run: Path,
    budget_s: float,
    progress: Progress,
    trusted: tuple[str, ...],
) -> TrainSettings:
    """With as many epochs as take their share of the budget on this machine, but a few, and no more than asked for.

    How long a step takes is on file, so that a run that goes on trains for as long as it began to.
    """
    steps = max(1, len(dataset.train) // training.batch)

    def take() -> ServiceTimes:
        progress.start("Timing a few steps of training")
        seconds = step_seconds(dataset, source, training, work=run / ".checkpoints", trusted=trusted)
        progress.done(f"{steps * seconds:,.0f} s for one pass over the data")
        return ServiceTimes((training.batch,), (seconds,), (training.batch / seconds,))

    detail = f"{training}"
    taken = Journal(run / "measurements.jsonl").measure("training step", str(source), detail, ServiceTimes, take)
    fits = int(_TRAINING_SHARE * budget_s / (steps * taken.seconds[0]))
    return msgspec.structs.replace(training, epochs=min(training.epochs, max(_FEWEST_EPOCHS, fits)))


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
