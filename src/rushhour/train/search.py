"""Hyper-parameter search: many trainings, of which the worst are pruned early; the bundle of the best is kept.

Optuna chooses the values (tree-structured Parzen estimator, Bergstra et al. 2011) and what to prune. Its study is
stored in SQLite; a killed search is resumed, with the training that it was killed in.
"""

from __future__ import annotations

import importlib
import inspect
import statistics
import time
from pathlib import Path
from typing import Any, Literal

import msgspec

from rushhour.bundle import Bundle, Source, check_place
from rushhour.data.dataset import Dataset
from rushhour.errors import ModelError
from rushhour.models import build
from rushhour.progress import Progress
from rushhour.records import identity
from rushhour.records.curves import Epoch, read_curves, read_record, write_curves
from rushhour.system.storage import alone_at, claimed, explained
from rushhour.train.fingerprint import SEARCH, fingerprint_of
from rushhour.train.job import TrainingJob
from rushhour.train.loop import Diverged
from rushhour.train.settings import TrainSettings
from rushhour.train.tracking import Tracking
from rushhour.train.training import bundle_at, train_for_search, trained_weights

PrunerName = Literal["median", "hyperband"]

_DECAYS = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


class SearchTrial(msgspec.Struct, frozen=True):
    """One trial of a search.

    Attributes:
        number: from 0.
        fate: `complete`; `pruned`: ended early, as others were better at that epoch; `diverged`: its loss was NaN.
        chosen: hyper-parameter -> value.
        value: the metric on the validation part, of the weights to be sealed; None if it diverged in the first epoch.
        epochs: that it was trained for.
    """

    number: int
    fate: Literal["complete", "pruned", "diverged"]
    chosen: dict[str, float]
    value: float | None
    epochs: int


class SearchResult(msgspec.Struct, frozen=True):
    """What a search found: its trials in order, and which of them was best."""

    metric: str
    best: SearchTrial
    trials: tuple[SearchTrial, ...]


def search(
    dataset: Dataset,
    source: Source,
    settings: TrainSettings,
    *,
    trials: int,
    pruner: PrunerName,
    out: Path,
    work: Path,
    progress: Progress,
    trusted: tuple[str, ...] = (),
    tracking: Tracking | None = None,
    checkpoint_every_s: float = 15.0,
    name: str | None = None,
    force: bool = False,
) -> tuple[Bundle, SearchResult]:
    """Train with different hyper-parameters, and seal the best bundle.

    Searched are the learning rate (a tenth to ten times of that in `settings`), the batch (half, the same, double),
    weight decay, `dropout` if the network's factory has such an argument, and the strength of the augmentation (none
    to twice) if `settings` have one. The first trial is `settings` as they are.

    Args:
        dataset: trials are judged on its validation part.
        source: the network.
        settings: what is not searched, and where the search begins.
        trials: how many in all; those of an earlier, killed call count.
        pruner: `median` prunes trials below the median of the others at the same epoch (after five whole trials);
            `hyperband` (Li et al. 2018) by successive halving.
        out: the best bundle's folder. An older bundle there is replaced where one of these trials left it.
        work: of the study and its trainings; one process at a time works in it. It stays: a later call with more trials
            continues the study.
        progress: receives every step.
        trusted: factories that may be imported; the user's own.
        tracking: which of TensorBoard and Weights & Biases each trial is tracked with, below `work`.
        checkpoint_every_s: see `TrainingJob`.
        name: see `train`.
        force: see `train`.

    Raises:
        ModelError: if the network cannot be built or run, or every trial diverged.
        RushhourError: as `train`.
    """
    import optuna

    if trials < 1:
        raise ModelError(f"cannot search in {trials} trials", "it takes at least one", "use for example --search 20")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    takes_dropout = _takes_dropout(source, trusted)
    facts = fingerprint_of(dataset, TrainingJob(source, settings, work, trusted)).facts
    with alone_at(out), claimed(work):
        study = optuna.create_study(
            storage=f"sqlite:///{(work / 'search.db').resolve()}",
            study_name=identity.key(**facts, pruner=pruner)[:16],
            direction="maximize",
            pruner=(
                optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1)
                if pruner == "median"
                else optuna.pruners.HyperbandPruner(min_resource=1, max_resource=settings.epochs)
            ),
            load_if_exists=True,
        )

        def is_own(bundle: Bundle) -> bool:
            return bundle.manifest.lineage[0].settings.get(SEARCH) == study.study_name

        older = bundle_at(out)
        check_place(out, force=force or (older is not None and is_own(older)), why="the search that made it")
        _enqueue(study, settings, takes_dropout=takes_dropout)
        taken: list[float] = []
        while (number := _ended(study)) < trials:
            if taken:
                progress.limit(statistics.fmean(taken) * (trials - number))
            began = time.monotonic()
            # a new sampler for each trial: its draws then do not depend on whether the search was killed before
            study.sampler = optuna.samplers.TPESampler(seed=settings.seed + number)
            _try(study, dataset, source, settings, work, progress, trusted, tracking, checkpoint_every_s, takes_dropout)
            taken.append(time.monotonic() - began)
        found = _found(study, dataset)
        best = study.best_trial
        place = work / "trials" / best.user_attrs["place"]
        write_curves(work, read_curves(place), read_record(place))
        own, own_settings = _choose(optuna.trial.FixedTrial(best.params), source, settings, takes_dropout=takes_dropout)
        # resumes from the last checkpoint of the trial, which is at its end
        job = TrainingJob(own, own_settings, place, trusted)
        bundle = train_for_search(dataset, job, out=out, progress=progress, name=name, search=study.study_name)
        return bundle, found


def _enqueue(study: Any, settings: TrainSettings, *, takes_dropout: bool) -> None:
    """Enqueue the settings as they are as the first trial, and again the trials that a killed process left."""
    import optuna

    if not study.trials and settings.weight_decay in _DECAYS:
        first: dict[str, Any] = {"lr": settings.lr, "batch": settings.batch, "weight_decay": settings.weight_decay}
        if settings.augment is not None:
            first["augment"] = 1.0
        study.enqueue_trial(first)
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        study.enqueue_trial(trial.params)
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)


def _ended(study: Any) -> int:
    import optuna

    ended = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    return len(study.get_trials(deepcopy=False, states=ended))


def _try(
    study: Any,
    dataset: Dataset,
    source: Source,
    settings: TrainSettings,
    work: Path,
    progress: Progress,
    trusted: tuple[str, ...],
    tracking: Tracking | None,
    checkpoint_every_s: float,
    takes_dropout: bool,
) -> None:
    import optuna

    trial = study.ask()
    own, own_settings = _choose(trial, source, settings, takes_dropout=takes_dropout)
    name = identity.key(study=study.study_name, source=own, settings=own_settings)[:16]
    place = work / "trials" / name
    trial.set_user_attr("place", name)

    def on_epoch(epoch: Epoch) -> None:
        trial.report(epoch.value, epoch.epoch)
        if trial.should_prune():
            raise optuna.TrialPruned

    tracked = (
        Tracking(place, tensorboard=False) if tracking is None else msgspec.structs.replace(tracking, folder=place)
    )
    try:
        trained_weights(
            dataset,
            TrainingJob(own, own_settings, place, trusted, checkpoint_every_s, tracked),
            progress=progress,
            on_epoch=on_epoch,
        )
    except (optuna.TrialPruned, Diverged) as ended:
        if isinstance(ended, Diverged):
            trial.set_user_attr("diverged", ended.why)
        progress.done("ended early" if isinstance(ended, optuna.TrialPruned) else "diverged")
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        _delete_checkpoints(place)
        return
    values = [epoch.value for epoch in read_curves(place)]
    study.tell(trial, max(values) if settings.patience is not None else values[-1])
    for other in (work / "trials").iterdir():
        if other.name != study.best_trial.user_attrs["place"]:
            _delete_checkpoints(other)


def _delete_checkpoints(place: Path) -> None:
    """Delete the weights of a trial that is not the best; its curves stay."""
    with explained(f"delete the checkpoint in {place}"):
        for checkpoint in place.glob("train-*.safetensors"):
            checkpoint.unlink()


def _choose(
    trial: Any, source: Source, settings: TrainSettings, *, takes_dropout: bool
) -> tuple[Source, TrainSettings]:
    batches = sorted({max(settings.accumulate, settings.batch // 2), settings.batch, settings.batch * 2})
    chosen = msgspec.structs.replace(
        settings,
        lr=trial.suggest_float("lr", settings.lr / 10, settings.lr * 10, log=True),
        batch=trial.suggest_categorical("batch", batches),
        weight_decay=trial.suggest_categorical("weight_decay", _DECAYS),
    )
    if settings.augment is not None:
        strength = trial.suggest_float("augment", 0.0, 2.0, step=0.25)
        chosen = msgspec.structs.replace(chosen, augment=settings.augment.times(strength) if strength else None)
    if takes_dropout:
        dropout = trial.suggest_float("dropout", 0.0, 0.7, step=0.05)
        source = Source(source.factory, {**source.arguments, "dropout": dropout})
    return source, chosen


def _found(study: Any, dataset: Dataset) -> SearchResult:
    import optuna

    tried = []
    ended = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    for trial in study.get_trials(deepcopy=False, states=ended):
        values = trial.intermediate_values
        fate: Any = trial.state.name.lower() if "diverged" not in trial.user_attrs else "diverged"
        value = trial.value if fate == "complete" else values.get(max(values, default=0))
        tried.append(SearchTrial(trial.number, fate, dict(trial.params), value, len(values)))
    try:
        number = study.best_trial.number
    except ValueError as error:
        raise ModelError(
            f"none of {len(tried)} trials was completed",
            "their losses were no numbers, or all were pruned",
            "lower --lr, or continue the search with more trials",
        ) from error
    return SearchResult(dataset.task.metric, next(one for one in tried if one.number == number), tuple(tried))


def _takes_dropout(source: Source, trusted: tuple[str, ...]) -> bool:
    build(source, trusted)  # raises if it cannot be built, before the search
    module, _, name = source.factory.partition(":")
    return "dropout" in inspect.signature(getattr(importlib.import_module(module), name)).parameters
