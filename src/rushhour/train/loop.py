"""The training loop: from a network and data to a sealed bundle, on one worker or many.

A training that is killed at any moment and started again ends with the same weights, bit for bit, as one left alone:
the order of the data follows from (seed, epoch), and the rest is in the checkpoint.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.lr_scheduler import LRScheduler

from rushhour.bundle import Bundle, Source, Step, TensorSpec, check_place, name_of
from rushhour.data.augment import check_pictures
from rushhour.data.dataset import Dataset, Split
from rushhour.errors import BundleError, DataError, ModelError, StorageError, TaskError
from rushhour.models import Deployed, build, export
from rushhour.models.deployed import Meaning
from rushhour.progress import Progress, Silent
from rushhour.records import identity
from rushhour.records.curves import Epoch, TrainingRecord, best_of
from rushhour.system import machine
from rushhour.system.storage import alone_at, claimed, explained, write_whole
from rushhour.task import Task
from rushhour.train.checkpoint import Begun, Checkpoint, shapes
from rushhour.train.feed import Batch, Feed
from rushhour.train.fingerprint import Made, made_of
from rushhour.train.loss import loss_for
from rushhour.train.memory_format import NOTE, MemoryFormat, choose
from rushhour.train.parallel.division import Divided, Division, decide, only_leader
from rushhour.train.parallel.launch import under_torchrun
from rushhour.train.parallel.plan import ParallelPlan
from rushhour.train.parallel.position import reached, watch
from rushhour.train.parallel.workers import together
from rushhour.train.preflight import Steps, inspect
from rushhour.train.settings import TrainSettings
from rushhour.train.stepper import Alone, Stepper
from rushhour.train.tracking import Tracker, Tracking

PLAN = "workers.json"
"""In the folder of the tracking, how the workers share the training."""

_SAMPLES = 16
"""Real inputs that a bundle carries."""

_CHECKPOINT_SHARE = 0.05
"""Of the time, at most, goes into taking checkpoints inside an epoch, however large the model."""

_AUGMENTING_THREADS = 2
"""That get batches ready where pictures are changed on the way."""

_PACE_WARM, _PACE_TIMED = 2, 7
"""Steps that tell how long one takes."""

_PLANNED, _RESUMED = "planned", "resumed"
"""In the notes of a checkpoint: numbers of epochs that were planned before, each with the step until which it was; the
steps after which it was gone on."""

_OURS = "rushhour.models:"
_EXPORTABLE: list[tuple[Source, TensorSpec, Task]] = []
"""Networks whose export was tried in this process: a search trains the same one many times."""

_NAMED = 8
"""Samples that a message names, at most."""


class Diverged(ModelError):
    """A training whose loss or weights are no longer numbers."""


def train(
    dataset: Dataset,
    source: Source,
    settings: TrainSettings,
    *,
    out: Path,
    work: Path,
    progress: Progress,
    trusted: tuple[str, ...] = (),
    checkpoint_every_s: float = 15.0,
    tracking: Tracking | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    workers: int = 1,
    division: Division | None = None,
    name: str | None = None,
    force: bool = False,
) -> Bundle:
    """Train the network that `source` names on `dataset` and seal it as a bundle.

    A bundle at `out` that came from the very same training is returned as it is. A checkpoint of the very same
    training in `work` is gone on from, also where only the epochs are others: the learning rate follows the schedule of
    the new number from there on, and the lineage says so. `rushhour.records.identity` says what that is:
    settings, data, and the network with its code (`rushhour.models.structure`). Equal arguments give equal bundles on
    equal machines, up to rounding where trial steps choose between memory formats that are about equally fast
    (`rushhour.train.memory_format`).

    Args:
        dataset: fitted on its training part; the metric in the progress is of its validation part.
        source: the network.
        settings: how.
        out: the bundle's folder; one process at a time makes it.
        work: folder of checkpoints of this bundle's training; they are deleted once it is sealed.
        progress: hears of every step.
        trusted: factories that may be imported besides those of `rushhour.models`.
        checkpoint_every_s: seconds between checkpoints inside an epoch, 0 for one after every step; more where writing
            one takes long. There is always one at an epoch's end.
        tracking: where curves are kept.
        on_epoch: hears of each epoch before its checkpoint, and after a kill first of all epochs before; what it
            raises ends the training. On one worker only.
        workers: processes that share every batch; under torchrun, it says how many. The order of the data and the
            checkpoint are the same for any number, so a training may go on with another one.
        division: how they share it; with compressed gradients, relaxed workers or local batch normalisation, it is
            another training, which goes on with the same number only.
        name: of the model, which it keeps whatever is made of it; that of the folder `out` by default.
        force: whether another bundle at `out`, or the checkpoint of another training for it, may be removed.

    Raises:
        DataError: if the samples are of a type that the wire does not carry, or cannot be augmented.
        TaskError: if the network or the targets do not fit the task; before any training.
        ModelError: if the network cannot be built or run.
        PlanError: if the workers cannot share it so, or have too little memory.
        Diverged: if the loss is no longer a number. The last good checkpoint stays.
        StorageError: if there is something else at `out`, or another training for it under way; before any work. Also
            if the disk does not take a checkpoint or the bundle.
    """
    task = _assigned(
        dataset,
        source,
        settings,
        work=work,
        trusted=trusted,
        checkpoint_every_s=checkpoint_every_s,
        tracking=tracking,
        workers=workers,
        division=division,
    )
    with contextlib.ExitStack() as stack:
        if os.environ.get("RANK", "0") == "0":
            stack.enter_context(alone_at(out))
            if tracking is not None:
                stack.enter_context(claimed(tracking.folder))
        return _train(task, dataset, out=out, progress=progress, on_epoch=on_epoch, name=name, force=force)


def train_here(
    dataset: Dataset,
    source: Source,
    settings: TrainSettings,
    *,
    out: Path,
    work: Path,
    progress: Progress,
    trusted: tuple[str, ...],
    name: str | None,
    force: bool,
    search: str,
) -> Bundle:
    """`train` on one worker, for the search that holds the place; its lineage names that."""
    task = _assigned(
        dataset,
        source,
        settings,
        work=work,
        trusted=trusted,
        checkpoint_every_s=math.inf,
        tracking=None,
        workers=1,
        division=None,
    )
    return _train(task, dataset, out=out, progress=progress, on_epoch=None, name=name, force=force, search=search)


def _train(
    task: _Assignment,
    dataset: Dataset,
    *,
    out: Path,
    progress: Progress,
    on_epoch: Callable[[Epoch], None] | None,
    name: str | None,
    force: bool,
    search: str = "",
) -> Bundle:
    older = opened(out)
    why = "its state: it is damaged" if older is None else task.made.differs_from(older)
    if older is not None and name not in (None, older.manifest.name):
        why = f"{why}, its name, which is {older.manifest.name}".removeprefix(", ")
    if older is not None and not why:
        return older
    check_place(out, force=force, why=why)
    task = task.inspected(dataset, progress)  # before anything is removed
    checkpoint = task.checkpoint()
    _make_way(task, checkpoint, dataset, out, force=force)
    weights = _learn(task, dataset, progress, on_epoch)
    short, planned = _short(task.source), checkpoint.notes().get(_PLANNED, [])
    with torch.random.fork_rng(devices=[]):
        network = build(task.source, task.trusted)
        network.load_state_dict(weights)
        progress.start(f"export {short} and check it against torch")
        bundle = export(
            network,
            name=name or name_of(out),
            task=dataset.task,
            sample_spec=_sample_spec(dataset),
            preprocessing=dataset.preprocessing,
            source=task.source,
            lineage=(task.made.told(planned, search),),
            samples=np.ascontiguousarray(dataset.train.sample(_SAMPLES).inputs),
            path=out,
        )
        progress.done(f"{bundle.model_bytes / 1e6:.2f} MB")
    checkpoint.remove()
    shutil.rmtree(_beside(checkpoint), ignore_errors=True)
    return bundle


def _make_way(task: _Assignment, checkpoint: Checkpoint, dataset: Dataset, out: Path, *, force: bool) -> None:
    """Raise if there is a checkpoint for this bundle that cannot be gone on from; with `force` remove it.

    Raises:
        StorageError: before anything is lost.
    """
    facts = task.made.facts
    begun = checkpoint.begun()
    if begun is None:
        refused = [(other, ", ".join(identity.changes(other.facts, facts))) for other in checkpoint.others()]
    elif not task.made.same_weights(begun.facts):
        refused = [(begun, identity.WORDS["weights"])]
    elif begun.step > _steps(dataset, task.settings):
        refused = [(begun, f"epochs {begun.facts['epochs']} before, {task.settings.epochs} now, which end sooner")]
    else:
        return
    for other, why in refused:
        if not force:
            raise _under_way(other, why, out)
        with explained(f"delete {other.path}"):
            other.path.unlink(missing_ok=True)  # under torchrun, others do so too
        shutil.rmtree(other.path.with_suffix(""), ignore_errors=True)


def _under_way(other: Begun, why: str, out: Path) -> StorageError:
    return StorageError(
        f"another training for {out} was broken off at step {other.step:,}",
        f"{why or 'it was made otherwise'}; begun anew, its checkpoint would be lost",
        "go on with what it was begun with, name another place with --out, or say --force to begin anew",
    )


def learn(
    dataset: Dataset,
    source: Source,
    settings: TrainSettings,
    *,
    work: Path,
    progress: Progress,
    trusted: tuple[str, ...] = (),
    checkpoint_every_s: float = 15.0,
    tracking: Tracking | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    workers: int = 1,
    division: Division | None = None,
) -> dict[str, Tensor]:
    """The weights that `train` seals, and no bundle. The checkpoint stays: called again, this returns them at once.

    Arguments and errors are those of `train`. Under torchrun, rank 0 returns; the others end their process well.
    """
    task = _assigned(
        dataset,
        source,
        settings,
        work=work,
        trusted=trusted,
        checkpoint_every_s=checkpoint_every_s,
        tracking=tracking,
        workers=workers,
        division=division,
    )
    return _learn(task, dataset, progress, on_epoch)


def _learn(
    task: _Assignment, dataset: Dataset, progress: Progress, on_epoch: Callable[[Epoch], None] | None
) -> dict[str, Tensor]:
    workers, backend = task.workers, task.division.backend
    with torch.random.fork_rng(devices=[]):
        torch.set_num_threads(machine.cores())
        if task.meaning is None:
            task = task.inspected(dataset, progress)
        if workers > 1:
            folder = _beside(task.checkpoint())
            if not together(task, dataset, workers=workers, backend=backend, folder=folder, progress=progress):
                raise SystemExit(0)
            progress, task = Silent(), msgspec.structs.replace(task, tracking=None)
        return task.alone(dataset, progress, on_epoch)


def step_seconds(
    dataset: Dataset, source: Source, settings: TrainSettings, *, work: Path, trusted: tuple[str, ...] = ()
) -> float:
    """How long one step of this training takes on this machine, on one worker: the median of a few, in seconds.

    Nothing is kept of them. Arguments and errors are those of `train`.
    """
    task = _Assignment(source, settings, work, trusted, 0.0, None, Division(), 1, Made(Step("train"), {}))
    with torch.random.fork_rng(devices=[]):
        torch.set_num_threads(machine.cores())
        return task.inspected(dataset, Silent(), export=False).step_seconds(dataset)


def _assigned(
    dataset: Dataset,
    source: Source,
    settings: TrainSettings,
    *,
    work: Path,
    trusted: tuple[str, ...],
    checkpoint_every_s: float,
    tracking: Tracking | None,
    workers: int,
    division: Division | None,
) -> _Assignment:
    division = division or Division()
    workers = int(os.environ["WORLD_SIZE"]) if under_torchrun() else workers
    _sample_spec(dataset)
    made = made_of(dataset, source, settings, division, workers, trusted)
    return _Assignment(source, settings, work, trusted, checkpoint_every_s, tracking, division, workers, made)


class _Assignment(msgspec.Struct, frozen=True):
    """One training, as it can be handed to another process; called there, it is a worker's part of it."""

    source: Source
    settings: TrainSettings
    work: Path
    trusted: tuple[str, ...]
    checkpoint_every_s: float
    tracking: Tracking | None
    division: Division
    workers: int
    made: Made
    meaning: Meaning | None = None

    def inspected(self, dataset: Dataset, progress: Progress, *, export: bool = True) -> _Assignment:
        """The same with what a look at the network has shown. Raises, before any work, what would fail in it."""
        settings, batch = self.settings, min(self.settings.batch, len(dataset.train))
        if self.workers > batch:
            raise ModelError(
                f"cannot train on {self.workers} workers",
                f"a step has {batch} samples, and each worker needs one",
                "use fewer workers, or a larger batch",
            )
        _check(dataset, settings)
        sample, division = _sample_spec(dataset), self.division
        own = not self.source.factory.startswith(_OURS)
        tried = (self.source, sample, dataset.task)
        if own:
            progress.start(f"check {_short(self.source)}")
        with torch.random.fork_rng(devices=[]):
            found = inspect(
                lambda: self._built(dataset),
                dataset,
                sample,
                settings.resolved,
                Steps(
                    batch,
                    settings.accumulate,
                    self.workers,
                    whole_batch_norm=division.batch_norm == "whole" and division.relaxed is None,
                ),
                name=_short(self.source),
                export=export and own and tried not in _EXPORTABLE,
            )
        if export and own:
            _EXPORTABLE.append(tried)
        if own or found.notes:
            progress.done("; ".join(found.notes) or "it can be trained, exported and served")
        return msgspec.structs.replace(self, meaning=found.meaning)

    def alone(
        self, dataset: Dataset, progress: Progress, on_epoch: Callable[[Epoch], None] | None
    ) -> dict[str, Tensor]:
        settings = self.settings.resolved
        form = self._format(dataset, self._prepared(dataset), progress)
        deployed = self._prepared(dataset)  # anew: what it remembers of samples that it has seen is no business of it
        form.lay(deployed)
        stepper = Alone(deployed, dataset.task, accumulate=settings.accumulate, bf16=bool(settings.bf16))
        expected = shapes(deployed.network.state_dict())
        with form.in_force():
            return self._run(dataset, stepper, deployed.head, expected, form, progress, on_epoch)

    def step_seconds(self, dataset: Dataset) -> float:
        settings = self.settings.resolved
        form = self._format(dataset, self._prepared(dataset), Silent())
        deployed = self._prepared(dataset)
        form.lay(deployed)
        stepper = Alone(deployed, dataset.task, accumulate=settings.accumulate, bf16=bool(settings.bf16))
        optimizer = settings.make_optimizer(stepper.parameters())
        feed = Feed(dataset.train, seed=settings.seed, batch=settings.batch, augment=settings.augment)
        taken = []
        with feed, form.in_force():
            for batch in itertools.islice(feed.epoch(0), _PACE_WARM + _PACE_TIMED):
                began = time.perf_counter()
                stepper.step(batch)
                optimizer.step()
                taken.append(time.perf_counter() - began)
        return statistics.median(taken[_PACE_WARM:] or taken)

    def __call__(self, dataset: Dataset, progress: Progress) -> None:
        reached(0)
        form: MemoryFormat = only_leader(lambda: self._format(dataset, self._prepared(dataset), progress))
        with form.in_force():
            self._share(dataset, form, progress)

    def _share(self, dataset: Dataset, form: MemoryFormat, progress: Progress) -> None:
        """Do this worker's part."""
        size = min(self.settings.batch, len(dataset.train))
        plan = decide(
            self.source,
            _sample_spec(dataset),
            dataset.task.outputs,
            division=self.division,
            batch=size,
            trusted=self.trusted,
            path=_beside(self.checkpoint()) / PLAN,
            progress=progress,
            prepare=lambda plan: self._rehearsal(dataset, plan, form),
            steps=self.settings.epochs * (len(dataset.train) // size),
        )
        deployed = self._prepared(dataset)
        form.lay(deployed)
        expected, head = shapes(deployed.network.state_dict()), deployed.head
        watch(deployed.network)
        stepper = Divided(deployed, dataset.task, plan, settings=self.settings.resolved, division=self.division)
        del deployed  # what other workers hold of it is forgotten here
        if stepper.leads and self.tracking is not None:
            write_whole(self.tracking.folder / PLAN, msgspec.json.format(msgspec.json.encode(plan)))
        self._run(dataset, stepper, head, expected, form, progress, None)

    def _rehearsal(self, dataset: Dataset, plan: ParallelPlan, form: MemoryFormat) -> Callable[[], object]:
        """The training's first step by a plan, again and again, with a network of its own."""
        deployed = self._prepared(dataset)
        form.lay(deployed)
        stepper = Divided(deployed, dataset.task, plan, settings=self.settings.resolved, division=self.division)
        optimizer = self.settings.make_optimizer(stepper.parameters())
        with Feed(
            dataset.train,
            seed=self.settings.seed,
            batch=self.settings.batch,
            augment=self.settings.augment,
            part=stepper.part,
        ) as feed:
            batch = next(feed.epoch(0))

        def step() -> None:
            stepper.step(batch)
            if self.settings.clip is not None:
                stepper.clip(self.settings.clip)
            optimizer.step()

        return step

    def checkpoint(self) -> Checkpoint:
        """Where it keeps how it stands."""
        return Checkpoint(self.work, self.made.fingerprint, self.made.facts)

    def _built(self, dataset: Dataset) -> Deployed:
        torch.manual_seed(self.settings.seed)
        return Deployed(build(self.source, self.trusted), dataset.task, dataset.preprocessing)

    def _prepared(self, dataset: Dataset) -> Deployed:
        """The network as training begins with it."""
        deployed = self._built(dataset)
        deployed.meaning = self.meaning or "logits"
        if any(map(is_lazy, (*deployed.network.parameters(), *deployed.network.buffers()))):
            deployed.answer_shape(np.array(dataset.train.inputs[:2]), _short(self.source))
        return deployed.train()

    def _format(self, dataset: Dataset, deployed: Deployed, progress: Progress) -> MemoryFormat:
        """How its pictures lie in memory: as the checkpoint says, or else chosen now; what there is to say, is said."""
        settings, size = self.settings, min(self.settings.batch, len(dataset.train))
        kept = self.checkpoint().notes().get(NOTE)
        form = choose(
            deployed,
            dataset.train.inputs[: max(2, size // (self.workers * settings.accumulate))],
            bf16=bool(settings.resolved.bf16),
            steps=settings.epochs * (len(dataset.train) // size),
            allowed=settings.channels_last,
            kept=kept,
        )
        if form.why:
            progress.start("choose a memory format")
            progress.done(str(form))
        return form

    def _run(
        self,
        dataset: Dataset,
        stepper: Stepper,
        head: nn.Module,
        expected: dict[str, tuple[int, ...]],
        form: MemoryFormat,
        progress: Progress,
        on_epoch: Callable[[Epoch], None] | None,
    ) -> dict[str, Tensor]:
        checkpoint = self.checkpoint()
        course = _Course(
            dataset,
            self.settings,
            stepper,
            checkpoint,
            progress,
            name=_short(self.source),
            head=head,
            expected=expected,
            form=form,
            checkpoint_every_s=self.checkpoint_every_s,
            on_epoch=on_epoch,
        )
        return course.run(self.tracking, checkpoint.fingerprint)


class _Course:
    """One training as this worker sees it, from the checkpoint if there is one to its last step."""

    def __init__(
        self,
        dataset: Dataset,
        settings: TrainSettings,
        stepper: Stepper,
        checkpoint: Checkpoint,
        progress: Progress,
        *,
        name: str,
        head: nn.Module,
        expected: dict[str, tuple[int, ...]],
        form: MemoryFormat,
        checkpoint_every_s: float,
        on_epoch: Callable[[Epoch], None] | None,
    ) -> None:
        self._dataset = dataset
        self._settings = settings
        self._stepper = stepper
        self._checkpoint = checkpoint
        self._progress = progress
        self._name = name
        self._head = head
        self._expected = expected
        self._form = form
        self._every_s = checkpoint_every_s
        self._on_epoch = on_epoch
        self._unit = "images" if dataset.preprocessing.layout == "NHWC->NCHW" else "samples"
        self._bf16 = bool(settings.resolved.bf16)
        self._done = 0
        self._history: list[Epoch] = []
        self._best: dict[str, Tensor] = {}
        self._epoch_loss = 0.0
        self._planned: list[tuple[int, int]] = []
        self._resumed: list[int] = []
        self._saved = time.monotonic()
        self._taking = 0.0

    def run(self, tracking: Tracking | None, fingerprint: str) -> dict[str, Tensor]:
        """Train to the end; return the weights to be sealed, where this worker leads, else nothing."""
        settings, stepper = self._settings, self._stepper
        try:
            self._optimizer = settings.make_optimizer(stepper.parameters())
        except ValueError as error:
            raise ModelError(f"cannot train {self._name}", str(error), "give the model parameters to learn") from error
        with Feed(
            self._dataset.train,
            seed=settings.seed,
            batch=settings.batch,
            augment=settings.augment,
            threads=1 if settings.augment is None else _AUGMENTING_THREADS,
            part=stepper.part,
        ) as feed:
            self._total = feed.steps * settings.epochs
            self._schedule = settings.make_schedule(self._optimizer, self._total)
            self._restore()
            if self._planned and self._planned[-1][1] == self._done:
                self._schedule = self._caught_up()
            self._progress.start(f"train {self._name} on {self._dataset.name}", self._total)
            if self._done:
                self._progress.advance(self._done, self._resumed_note())
            tracked = tracking if stepper.leads else None
            as_config = {**_chosen(settings), NOTE: str(self._form)}
            own = fingerprint[:16]
            with Tracker(tracked, self._name, identity=own, settings=as_config, first=self._done) as tracker:
                try:
                    while self._done < self._total and not self._stopped():
                        self._epoch(feed, tracker)
                finally:
                    self._checkpoint.wait()
        last = self._history[-1]
        self._progress.done(f"{last.metric} {self._kept().value:.4f}")
        if self._settings.patience is not None:  # on all workers alike, though only the leading one has them
            return self._best
        with stepper.averaged(self._optimizer):
            return stepper.weights()

    def _epoch(self, feed: Feed, tracker: Tracker) -> None:
        """What is left of the epoch at hand."""
        settings, stepper, size = self._settings, self._stepper, feed.batch
        epoch, first = divmod(self._done, feed.steps)
        began = time.monotonic()
        metric = f", {self._history[-1].metric} {self._history[-1].value:.4f}" if self._history else ""
        for at, batch in enumerate(feed.epoch(epoch, first), start=first):
            reached(self._done + 1)
            loss = stepper.step(batch)
            if not math.isfinite(loss):
                raise self._broken(f"the loss became {loss}", batch, epoch, at)
            if settings.clip is not None:
                stepper.clip(settings.clip)
            lr = float(self._schedule.get_last_lr()[0])
            self._optimizer.step()
            stepper.meet()
            self._average()
            self._schedule.step()
            self._done += 1
            self._epoch_loss += loss
            now = time.monotonic()
            speed = (at + 1 - first) * size / max(now - began, 1e-9)
            self._progress.advance(
                1, f"epoch {epoch + 1}/{settings.epochs}, loss {loss:.3f}{metric}, {speed:,.0f} {self._unit}/s"
            )
            tracker.step(self._done, loss, lr)
            ends = at + 1 == feed.steps
            due = not self._every_s or now - self._saved >= max(self._every_s, self._taking / _CHECKPOINT_SHARE)
            if not stepper.agree(float(ends or due)):
                continue
            if not stepper.finite():
                raise self._broken("the weights are no longer numbers", batch, epoch, at)
            if ends:
                self._judge(feed, Epoch(epoch + 1, self._done, self._epoch_loss / feed.steps, 0, "", 0, lr, speed))
                self._epoch_loss = 0.0
                if stepper.leads:
                    tracker.epoch(self._history, self._record())
            self._save()

    def _average(self) -> None:
        """Move the averages by one step; they begin at the weights after the first, and forget these soon."""
        if self._settings.ema is not None:
            self._stepper.average(self._optimizer, min(self._settings.ema, (1 + self._done) / (10 + self._done)))

    def _judge(self, feed: Feed, epoch: Epoch) -> None:
        """Add the epoch to the history, with its figures on the validation part; keep its weights if they are best."""
        with self._stepper.averaged(self._optimizer):
            loss, value = (self._stepper.agree(figure) for figure in self._validate(feed.batch))
            judged = msgspec.structs.replace(epoch, validation_loss=loss, metric=self._dataset.task.metric, value=value)
            self._history.append(judged)
            is_best = best_of(self._history) is judged
            if self._settings.patience is not None and is_best:
                self._best = self._stepper.weights()
        if self._on_epoch is not None:
            self._on_epoch(judged)

    def _validate(self, batch: int) -> tuple[float, float]:
        """Loss and metric on the validation part, without augmentation and dropout; nothing where not leading."""
        split, loss_of, total = self._dataset.validation, loss_for(self._dataset.task, "sum"), 0.0
        answers: list[NDArray[Any]] = []
        for at in range(0, len(split), batch):
            logits = self._stepper.predict(torch.from_numpy(np.array(split.inputs[at : at + batch])))
            if logits is None:
                continue
            with torch.no_grad():
                total += loss_of(logits, torch.from_numpy(np.array(split.targets[at : at + batch]))).item()
                answers.append(self._head(logits.float()).numpy())
        if not answers:
            return 0.0, 0.0
        value, _ = self._dataset.task.evaluate(np.concatenate(answers), split.targets)
        return total / len(split), value

    def _kept(self) -> Epoch:
        """The epoch whose weights are to be sealed: the best with `patience`, else the last."""
        return best_of(self._history) if self._settings.patience else self._history[-1]

    def _stopped(self) -> bool:
        patience = self._settings.patience
        return (
            patience is not None and bool(self._history) and (self._history[-1].epoch - self._kept().epoch >= patience)
        )

    def _save(self) -> None:
        began = time.monotonic()
        notes = {
            "history": msgspec.to_builtins(self._history),
            "epoch_loss": self._epoch_loss,
            _PLANNED: self._planned,
            _RESUMED: self._resumed,
            NOTE: msgspec.to_builtins(self._form),
        }
        more = {f"best.{name}": tensor for name, tensor in self._best.items()}
        taken = self._stepper.take(self._done, self._optimizer, self._schedule, notes, more)
        if taken is not None:
            self._checkpoint.write(taken)
            if not self._every_s:
                self._checkpoint.wait()
        self._saved = time.monotonic()
        self._taking = self._saved - began

    def _restore(self) -> None:
        found = self._checkpoint.read()
        if found is not None and shapes(found.part("network")) != self._expected:
            found = None
        step = 0 if found is None else found.step
        if self._stepper.agree(step) != step:
            raise StorageError(
                f"the workers do not find the same checkpoint at {self._checkpoint.path}",
                "it lies on a disk that they do not share",
                "name a place with --out that all machines share",
            )
        if found is None:
            return
        self._stepper.put(found, self._optimizer, self._schedule)
        self._done = found.step
        self._history = msgspec.convert(found.notes["history"], list[Epoch])
        self._epoch_loss = found.notes["epoch_loss"]
        self._best = found.part("best")
        self._planned = msgspec.convert(found.notes.get(_PLANNED, []), list[tuple[int, int]])
        self._resumed = [*found.notes.get(_RESUMED, []), found.step]
        if (epochs := found.facts.get("epochs", self._settings.epochs)) != self._settings.epochs:
            self._planned.append((epochs, found.step))
        if self._on_epoch is not None:
            for epoch in self._history:
                self._on_epoch(epoch)

    def _caught_up(self) -> LRScheduler:
        """The schedule of all epochs that are planned now, at the step that is reached."""
        schedule = self._settings.make_schedule(self._optimizer, self._total)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of steps of a schedule without steps of the optimizer
            for _ in range(self._done):
                schedule.step()
        return schedule

    def _resumed_note(self) -> str:
        said = f"resumed after step {self._done}"
        if self._planned and self._planned[-1][1] == self._done:
            said += f", planned for {self._planned[-1][0]} epochs until now"
        return said

    def _record(self) -> TrainingRecord:
        data, settings = self._dataset, self._settings.resolved
        return TrainingRecord(
            model=self._name,
            dataset=data.name,
            samples={part: len(getattr(data, part)) for part in ("train", "validation", "test")},
            settings={**_chosen(settings), NOTE: str(self._form)},
            sealed=self._kept().epoch,
            keeps_best=settings.patience is not None,
            resumed=tuple(self._resumed),
            planned=tuple(self._planned),
        )

    def _broken(self, why: str, batch: Batch, epoch: int, at: int) -> Diverged:
        self._checkpoint.wait()
        step, path = epoch * (self._total // self._settings.epochs) + at + 1, self._checkpoint.path
        kept = f"; the last good state is kept in {path}" if path.exists() else ""
        alone = self._stepper.culprits(batch)
        if 0 < len(alone) < len(batch.rows):
            where = f"of its {len(batch.rows)} samples only {_listed(alone)} of the training part do so"
        else:
            where = f"its samples are {_listed(batch.rows.tolist())} of the training part"
        return Diverged(
            f"the training of {self._name} broke at step {step} of {self._total}",
            f"{why} in step {at + 1} of epoch {epoch + 1}; {where}",
            f"lower the learning rate, now {self._settings.lr:g}, or check the data for extreme values{kept}",
        )


def _listed(rows: list[int]) -> str:
    named = ", ".join(map(str, rows[:_NAMED]))
    return named if len(rows) <= _NAMED else f"{named} and {len(rows) - _NAMED} more"


def _sample_spec(dataset: Dataset) -> TensorSpec:
    if several := dataset.train.inputs.dtype.names:
        raise DataError(
            f"cannot train on samples of {len(several)} inputs",
            f"training takes one array, and {dataset.name} has {', '.join(several)}",
            "join them into one array, and part them in the network's forward",
        )
    dtype = dataset.train.inputs.dtype.name
    name = "image" if dataset.preprocessing.layout == "NHWC->NCHW" else "input"
    try:
        return msgspec.convert({"name": name, "dtype": dtype, "shape": dataset.sample_shape}, type=TensorSpec)
    except msgspec.ValidationError as error:
        raise DataError(
            f"cannot serve samples of {dtype}{dataset.sample_shape}",
            str(error),
            "give numbers of a common type, in one dimension or more",
        ) from error


def _check(dataset: Dataset, settings: TrainSettings) -> None:
    """Raise, before any work, if targets, task and settings do not fit each other."""
    _sample_spec(dataset)
    if settings.augment is not None:
        check_pictures(dataset.train.inputs, dataset.name)
    task = dataset.task
    for part in ("train", "validation", "test"):
        split: Split = getattr(dataset, part)
        if part == "test" and not split.labelled:
            continue
        targets: NDArray[Any] = split.targets
        if task.kind == "regression":
            if targets.size != len(targets) * task.outputs or not np.isfinite(targets).all():
                raise TaskError(
                    f"the {part} targets of {dataset.name} do not fit the task",
                    f"a sample has {task.outputs} finite values, but the targets have shape {targets.shape}"
                    + ("" if np.isfinite(targets).all() else " and hold NaN or infinity"),
                    "mend the data",
                )
        elif targets.ndim != 1 or targets.min() < 0 or targets.max() >= task.outputs:
            raise TaskError(
                f"the {part} labels of {dataset.name} do not fit the task",
                f"there are {task.outputs} classes, so a label is one number in 0..{task.outputs - 1}, but the labels "
                f"have shape {targets.shape} and run from {targets.min()} to {targets.max()}",
                "mend the data",
            )


def _short(source: Source) -> str:
    return source.factory.rpartition(":")[2]


def _steps(dataset: Dataset, settings: TrainSettings) -> int:
    """Optimizer steps of the whole training."""
    return settings.epochs * (len(dataset.train) // min(settings.batch, len(dataset.train)))


def _beside(checkpoint: Checkpoint) -> Path:
    """The folder for all else that several workers need."""
    return checkpoint.path.with_suffix("")


def _chosen(settings: TrainSettings) -> dict[str, Any]:
    chosen: dict[str, Any] = msgspec.to_builtins(settings)
    return chosen | ({} if settings.augment is None else {"augment": str(settings.augment)})


def opened(out: Path) -> Bundle | None:
    """The bundle at `out`; a damaged one counts as none."""
    try:
        return Bundle.open(out)
    except BundleError:
        return None
