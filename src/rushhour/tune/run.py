"""A whole run in one folder: train or copy the reference, make it smaller, search, and write the Plan.

    RUN/bundles/reference, RUN/bundles/int8     what can be served; int8-vnni too, where 7 bits of the weights cost much
    RUN/bundles/prune-0.5-lowrank-0.1, ...-int8 smaller networks that joined the search
    RUN/.recipes                                shapes and trained networks on the way there
    RUN/training                                how the reference was trained: curves, TensorBoard
    RUN/measurements.jsonl                      every measurement
    RUN/run.json                                the settings of the run
    RUN/plan-so-far.json                        the best plan so far, while the search runs
    RUN/plan.json                               the answer, written last

Each part is written whole or not at all, so a run that was killed resumes after the last finished part.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import msgspec

from rushhour.bundle import Bundle, Source, name_of
from rushhour.clock import Clock, WallClock
from rushhour.compress import Builder, is_plain, quantize_for_all
from rushhour.data import Dataset
from rushhour.errors import StorageError
from rushhour.goal import Goal
from rushhour.models import trusted_factories
from rushhour.plan import PLAN, SO_FAR, Plan, Trial
from rushhour.progress import Progress
from rushhour.records import identity
from rushhour.records.journal import JOURNAL, Journal
from rushhour.system.machine import describe, open_files
from rushhour.system.storage import claimed, write_whole
from rushhour.train import Tracking, TrainingJob, TrainSettings, bundle_at, train
from rushhour.tune.answer import unmeasured
from rushhour.tune.decisions import Decisions
from rushhour.tune.networks import FOR_SEARCH, smaller_networks
from rushhour.tune.priors import Experience, experience_of, remember
from rushhour.tune.search import tune
from rushhour.tune.settings import Budget, Recipes, TuneSettings
from rushhour.tune.state import failure_reason
from rushhour.tune.training_time import epoch_seconds

_TRAINING_SHARE: Final[dict[Recipes, float]] = {"none": 0.4, "auto": 0.3}
_FEWEST_EPOCHS = 2
"""Share of the budget for training; more where that is less than two epochs, as one epoch teaches too little."""
_RECORD = "run.json"
_DIGITS = 16
_FILES: Final = 640
"""That a process of a load test may have to open: 512 connections, and its own."""
_OF_TIME: Final = ("budget_s", "stretch_s")
_LEAST_SHARE: Final[dict[Recipes, float]] = {"none": 0.6, "auto": FOR_SEARCH}
"""Share of the budget for the search, at least, even where training took more than its share."""


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
    name: str | None = None,
    force: bool = False,
    cold: bool = False,
    builder: Builder | None = None,
) -> Plan:
    """Do everything from a model to a Plan in the folder `run`, and resume an earlier call that was killed.

    Args:
        model: a network to be trained, or a trained bundle.
        dataset: for training, calibration and accuracy.
        goal: the limits.
        run: the folder; one process at a time works in it.
        training: settings of the training.
        settings: of the search. The budget includes training and compression.
        progress: receives each step.
        trusted: factories that may be imported; the user's own.
        fit_epochs: with a budget, train for fewer epochs where this machine would need too much of it.
        clock: the budget is read on it.
        name: of the model, under which it is served; by default the bundle's own name, or that of the folder `run`.
        force: whether the result of other settings in `run` may be replaced; valid measurements are used.
        cold: whether what earlier runs on this machine measured is ignored. What this one measures is kept either way.
        builder: makes smaller networks elsewhere; None to make all of them here.

    Raises:
        RushhourError: of the part that failed; finished parts stay.
    """
    clock = clock or WallClock()
    budget, decisions = Budget(settings.budget_s, clock), Decisions(clock)
    _check_files()
    if isinstance(model, Bundle):
        trusted = trusted_factories(model, trusted)
    with claimed(run):
        record = _Record.of(model, dataset, goal, training, settings, name, fit_epochs=fit_epochs)
        _check_same(run, record, force=force)
        if settings.budget_s is not None:
            progress.limit(settings.budget_s)
        journal = Journal(run / JOURNAL)
        experience = experience_of(journal, cold=cold)
        if isinstance(model, Bundle):
            reference = _copied(model, run / "bundles" / "reference")
        else:
            out, began = run / "bundles" / "reference", clock.now()
            if fit_epochs and settings.budget_s is not None:
                share_s = _TRAINING_SHARE[settings.recipes] * settings.budget_s
                training = _fitted(training, model, dataset, run, journal, share_s, progress, trusted, experience)
            job = TrainingJob(model, training, run / ".checkpoints", trusted, tracking=Tracking(run / "training"))
            reference = train(dataset, job, out=out, progress=progress, name=name or name_of(run), force=force)
            _grow(budget, settings, clock.now() - began, progress)
        bundles: dict[str, Bundle] = {"reference": reference}
        left_out: dict[str, str] = {}
        making = _Int8(dataset, goal, progress, left_out, budget)
        if reference.manifest.precision == "f32" and is_plain(reference):
            bundles |= making.of(reference, run / "bundles" / "int8")
        finished = _finished_plan(run, record, bundles, settings, force=force)
        if finished is not None:
            progress.start("This run is complete: its plan exists")
            progress.done("use --force to search again")
            return finished
        ended: tuple[Trial, ...] = ()
        if settings.recipes == "auto":
            networks, ended = smaller_networks(
                reference,
                dataset,
                goal,
                run=run,
                settings=settings,
                budget=budget,
                progress=progress,
                trusted=trusted,
                decisions=decisions,
                experience=experience,
                builder=builder,
            )
            if builder is not None:
                builder.close()
            for role, network in networks.items():
                bundles[role] = _copied(network, run / "bundles" / role)
                bundles |= making.of(bundles[role], run / "bundles" / f"{role}-int8")
        searching = settings
        if settings.budget_s is not None:
            least_s = _LEAST_SHARE[settings.recipes] * settings.budget_s
            searching = msgspec.structs.replace(settings, budget_s=max(least_s, budget.seconds_left))
        so_far = run / SO_FAR

        def named(plan: Plan) -> Plan:
            return plan if name is None else msgspec.structs.replace(plan, model=name)

        plan = named(
            tune(
                bundles,
                dataset,
                goal,
                run=run,
                settings=searching,
                progress=progress,
                trusted=trusted,
                left_out=left_out,
                ended=(*ended, *making.skipped),
                clock=clock,
                so_far=lambda plan: named(plan).save(so_far),
                decisions=decisions,
                experience=experience,
            )
        )
        msgspec.structs.replace(record, finished=_end(bundles, settings)).save(run)
        plan.save(run / PLAN)
        so_far.unlink(missing_ok=True)
        remember(experience.learnt)
        return plan


def _check_files() -> None:
    """Raise unless load tests may open enough files, before any work.

    Raises:
        StorageError: if they may not.
    """
    files, _ = open_files(_FILES)
    if files < _FILES:
        raise StorageError(
            f"this process may open only {files} files",
            f"load tests need {_FILES}: one for each connection, in the server and in the load generator",
            "raise the limit: ulimit -n 4096",
        )


def _grow(budget: Budget, settings: TuneSettings, trained_s: float, progress: Progress) -> None:
    """Let the budget grow by what training took beyond its share: else a slow machine has no time left to search."""
    more_s = min(settings.stretch_s, trained_s - _TRAINING_SHARE[settings.recipes] * budget.seconds)
    if settings.budget_s is not None and more_s > 0:
        budget.grow(more_s)
        progress.limit(budget.seconds_left)
        progress.note(
            f"Training took longer than its share of the time: all will take {budget.seconds / 60:.1f} minutes"
        )


class _Int8:
    """Makes int8 children of bundles; why one could not be made is put into `left_out`.

    Attributes:
        skipped: trials of those that were not made, as the budget was spent.
    """

    def __init__(
        self, dataset: Dataset, goal: Goal, progress: Progress, left_out: dict[str, str], budget: Budget
    ) -> None:
        self._dataset = dataset
        self._max_drop = goal.budget.max_drop
        self._progress = progress
        self._left_out = left_out
        self._budget = budget
        self.skipped: list[Trial] = []

    def of(self, bundle: Bundle, out: Path) -> dict[str, Bundle]:
        """The children by role, which is the name of their folder: at `out`, and beside it.

        None where the budget is spent, unless they were made before.
        """
        if self._budget.left <= 0 and bundle_at(out) is None:
            why = "no time left to quantise it"
            self.skipped.append(unmeasured(out.name, "skipped", why, precision="int8"))
            self._progress.start(out.name)
            self._progress.done(why, good=False)
            return {}
        try:
            made = quantize_for_all(bundle, self._dataset, out, max_drop=self._max_drop, progress=self._progress)
        except Exception as error:  # only this candidate fails; its error is in the plan
            self._left_out[out.name] = failure_reason(error)
            self._progress.done(self._left_out[out.name], good=False)
            return {}
        return {child.path.name: child for child in made.values()}


class _Record(msgspec.Struct, frozen=True):
    """The settings of a run, and once it is finished what else its plan depends on: RUN/run.json.

    Attributes:
        asked: settings by name, without the budget: a run may resume with another one.
        finished: by name; empty before.
    """

    asked: dict[str, Any]
    finished: dict[str, Any] = {}

    @classmethod
    def of(
        cls,
        model: Source | Bundle,
        dataset: Dataset,
        goal: Goal,
        training: TrainSettings,
        settings: TuneSettings,
        name: str | None,
        *,
        fit_epochs: bool,
    ) -> _Record:
        network: dict[str, Any] = (
            {"bundle": model.content_key[:_DIGITS]}
            if isinstance(model, Bundle)
            else {
                "factory": model.factory,
                "arguments": model.arguments,
                **msgspec.to_builtins(training),
                "fewer epochs where time is short": fit_epochs,
            }
        )
        return cls(
            {
                **network,
                "name": name,
                "dataset": dataset.name,
                "fingerprint": dataset.content_key,
                "slo": str(goal.slo),
                "accuracy budget": str(goal.budget),
                "workload": msgspec.to_builtins(goal.workload),
                **{f"search {what}": value for what, value in _but_budget(settings).items()},
            }
        )

    def save(self, run: Path) -> None:
        write_whole(run / _RECORD, msgspec.json.format(msgspec.json.encode(self)) + b"\n")


def _but_budget(settings: TuneSettings) -> dict[str, Any]:
    """All settings but the budget. One that is off by default, and is off, is left out: earlier runs do not name it."""
    named = msgspec.structs.asdict(settings)
    return {name: value for name, value in named.items() if name not in _OF_TIME and value is not False}


def _check_same(run: Path, record: _Record, *, force: bool) -> None:
    """Raise unless `run` is new or has the same settings; write the settings.

    Raises:
        StorageError: if it has other settings, and `force` is not set.
    """
    before = _recorded(run)
    why = [] if before is None else identity.changes(before.asked, record.asked)
    if before is not None and not why:
        return
    if before is not None and not force:
        raise StorageError(
            f"{run} holds a run with other settings",
            ", ".join(why),
            "choose another --out, or use --force to replace its plan; measurements that are still valid are used",
        )
    record.save(run)


def _recorded(run: Path) -> _Record | None:
    """The record in the file; None where there is none or it is damaged."""
    try:
        return msgspec.json.decode((run / _RECORD).read_bytes(), type=_Record)
    except (OSError, msgspec.DecodeError):
        return None


def _end(bundles: dict[str, Bundle], settings: TuneSettings) -> dict[str, Any]:
    """What a finished plan depends on, beside the settings."""
    here = describe()
    return {
        "bundles": {role: bundle.content_key[:_DIGITS] for role, bundle in bundles.items()},
        "machine": str(here),
        "features": " ".join(here.features),
        "budget in s": settings.budget_s,
        **{f"version of {package}": version for package, version in here.versions.items()},
    }


def _finished_plan(
    run: Path, record: _Record, bundles: dict[str, Bundle], settings: TuneSettings, *, force: bool
) -> Plan | None:
    """The plan in the folder, if it was found for the same settings on this machine; None where there is none yet.

    Raises:
        PlanError: if it cannot be read.
        StorageError: if it was found for others, and `force` is not set.
    """
    if force or not (run / PLAN).exists():
        return None
    plan, before = Plan.load(run / PLAN), _recorded(run)
    finished = before.finished if before is not None else {}
    joined = {role: bundle_at(run / "bundles" / role) for role in finished.get("bundles", {}) if role not in bundles}
    now = {**bundles, **{role: bundle for role, bundle in joined.items() if bundle is not None}}
    why = identity.changes(finished, _end(now, settings))
    if not why:
        return plan
    raise StorageError(
        f"{run / PLAN} was found under other conditions",
        ", ".join(why),
        "choose another --out, or use --force to search again; measurements that are still valid are used",
    )


def _fitted(
    training: TrainSettings,
    source: Source,
    dataset: Dataset,
    run: Path,
    journal: Journal,
    seconds: float,
    progress: Progress,
    trusted: tuple[str, ...],
    experience: Experience,
) -> TrainSettings:
    """With as many epochs as fit into the `seconds` on this machine: at least two, at most those asked for.

    A reference that is trained already keeps its number of epochs. The time of a step is in the journal, so a resumed
    run trains for the same number of epochs.
    """
    if (trained := bundle_at(run / "bundles" / "reference")) is not None:
        epochs = trained.manifest.lineage[0].settings.get("epochs", training.epochs)
        return msgspec.structs.replace(training, epochs=epochs)
    job = TrainingJob(source, training, run / ".checkpoints", trusted)
    fits = int(seconds / epoch_seconds(journal, dataset, job, progress, experience=experience))
    return msgspec.structs.replace(training, epochs=min(training.epochs, max(_FEWEST_EPOCHS, fits)))


def _copied(bundle: Bundle, path: Path) -> Bundle:
    """`bundle`, copied into the run unless it is in there already: a plan and its bundles are in one folder."""
    if path.is_dir() and bundle.path.resolve() == path.resolve():
        return bundle
    if (path / "bundle.json").is_file() and (copied := Bundle.open(path)).manifest.hash == bundle.manifest.hash:
        return copied
    return bundle.copy_to(path)
