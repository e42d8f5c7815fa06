"""The training loop as one worker runs it: steps, epochs and checkpoints, from the last checkpoint to the last step.

A training that is killed at any moment and started again ends with the same weights, bit for bit, as an undisturbed
one: the order of the data follows from (seed, epoch), and the rest is in the checkpoint.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from rushhour.data.dataset import Dataset
from rushhour.errors import ModelError, StorageError
from rushhour.models import tensors_of
from rushhour.progress import Progress
from rushhour.records.curves import Epoch, TrainingRecord, best_of
from rushhour.records.judged import Judged
from rushhour.train.checkpoint import Checkpoint, shapes
from rushhour.train.feed import Batch, Feed
from rushhour.train.loss import loss_for
from rushhour.train.memory_format import NOTE, MemoryFormat
from rushhour.train.parallel import record_step
from rushhour.train.settings import TrainSettings
from rushhour.train.stepper import Stepper
from rushhour.train.tracking import Tracker, Tracking

PLANNED = "planned"
"""In the notes of a checkpoint: numbers of epochs that were planned before, each with the step until which it was."""
_RESUMED = "resumed"
"""In the notes of a checkpoint: the steps after which the training was resumed."""

_CHECKPOINT_SHARE = 0.05
"""Of the time, at most, goes into writing checkpoints inside an epoch, however large the model."""

_AUGMENTING_THREADS = 2
"""Threads that prepare batches where pictures are augmented."""

_NAMED = 8
"""Samples that a message names, at most."""


class Diverged(ModelError):
    """A training whose loss or weights are no longer numbers."""


class TrainingLoop:
    """One training as this worker runs it.

    Args:
        dataset: trained on, and validated on.
        settings: of the training.
        stepper: computes the steps.
        checkpoint: of the training; resumed from if there is one.
        progress: receives every step.
        model: name of the network.
        head: turns the network's outputs into answers.
        expected: shapes of the network's state; a checkpoint with others is ignored.
        form: memory format of the network.
        checkpoint_every_s: see `TrainingJob`.
        on_epoch: called after each epoch, before its checkpoint, and first for all epochs of a checkpoint.
    """

    def __init__(
        self,
        dataset: Dataset,
        settings: TrainSettings,
        stepper: Stepper,
        checkpoint: Checkpoint,
        progress: Progress,
        *,
        model: str,
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
        self._model = model
        self._head = head
        self._expected = expected
        self._form = form
        self._every_s = checkpoint_every_s
        self._on_epoch = on_epoch
        self._unit = "images" if dataset.preprocessing.layout == "NHWC->NCHW" else "samples"
        self._done = 0
        self._history: list[Epoch] = []
        self._best: dict[str, Tensor] = {}
        self._epoch_loss = 0.0
        self._planned: list[tuple[int, int]] = []
        self._resumed: list[int] = []
        self._newest = Judged()
        self._judged = Judged()
        self._saved = time.monotonic()
        self._saving_s = 0.0

    def run(self, tracking: Tracking | None) -> dict[str, Tensor]:
        """Train to the end; return the weights to be sealed on the leading worker, and nothing on the others.

        Raises:
            ModelError: if the network has no parameters to learn.
            Diverged: if the loss or the weights are no longer numbers. The last good checkpoint stays.
            StorageError: if the disk does not take a checkpoint, or the workers see different ones.
        """
        settings, stepper = self._settings, self._stepper
        try:
            self._optimizer = settings.make_optimizer(stepper.parameters())
        except ValueError as error:
            raise ModelError(f"cannot train {self._model}", str(error), "give the model parameters to learn") from error
        with Feed(
            self._dataset.train,
            seed=settings.seed,
            batch=settings.batch,
            augment=settings.augment,
            places=self._dataset.task.places,
            threads=1 if settings.augment is None else _AUGMENTING_THREADS,
            part=stepper.part,
        ) as feed:
            self._total = feed.steps * settings.epochs
            self._schedule = settings.make_schedule(self._optimizer, self._total)
            self._restore()
            if self._planned and self._planned[-1][1] == self._done:
                self._schedule = self._advanced_schedule()
            self._progress.start(f"train {self._model} on {self._dataset.name}", self._total)
            if self._done:
                self._progress.advance(self._done, self._resumed_note())
            tracked = tracking if stepper.is_leader else None
            as_config = {**_shown(settings), NOTE: str(self._form)}
            own = self._checkpoint.fingerprint[:16]
            with Tracker(tracked, self._model, identity=own, settings=as_config, first=self._done) as tracker:
                try:
                    while self._done < self._total and not self._out_of_patience():
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
        """The rest of the current epoch."""
        settings, stepper, size = self._settings, self._stepper, feed.batch
        epoch, first = divmod(self._done, feed.steps)
        began = time.monotonic()
        metric = f", {self._history[-1].metric} {self._history[-1].value:.4f}" if self._history else ""
        for at, batch in enumerate(feed.epoch(epoch, first), start=first):
            record_step(self._done + 1)
            loss = stepper.step(batch)
            if not math.isfinite(loss):
                raise self._diverged(f"the loss became {loss}", batch, epoch, at)
            if settings.clip is not None:
                stepper.clip(settings.clip)
            lr = float(self._schedule.get_last_lr()[0])
            self._optimizer.step()
            stepper.synchronise()
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
            due = not self._every_s or now - self._saved >= max(self._every_s, self._saving_s / _CHECKPOINT_SHARE)
            if not stepper.from_leader(float(ends or due)):
                continue
            if not stepper.finite():
                raise self._diverged("the weights are no longer numbers", batch, epoch, at)
            if ends:
                self._judge(feed, Epoch(epoch + 1, self._done, self._epoch_loss / feed.steps, 0, "", 0, lr, speed))
                self._epoch_loss = 0.0
                if stepper.is_leader:
                    tracker.epoch(self._history, self._record())
            self._save()

    def _average(self) -> None:
        """Move the averages of the weights by one step; they begin at the weights after the first step."""
        if self._settings.ema is not None:
            self._stepper.average(self._optimizer, min(self._settings.ema, (1 + self._done) / (10 + self._done)))

    def _judge(self, feed: Feed, epoch: Epoch) -> None:
        """Add the epoch to the history, with its figures on the validation part; keep its weights if they are best."""
        with self._stepper.averaged(self._optimizer):
            loss, value = (self._stepper.from_leader(figure) for figure in self._validate(feed.batch))
            judged = msgspec.structs.replace(epoch, validation_loss=loss, metric=self._dataset.task.metric, value=value)
            self._history.append(judged)
            is_best = best_of(self._history) is judged
            if self._kept() is judged:
                self._judged = self._newest
            if self._settings.patience is not None and is_best:
                self._best = self._stepper.weights()
        if self._on_epoch is not None:
            self._on_epoch(judged)

    def _validate(self, batch: int) -> tuple[float, float]:
        """Loss and metric on the validation part, without augmentation and dropout; zeros but on the leader."""
        split, loss_of, total = self._dataset.validation, loss_for(self._dataset.task, "sum"), 0.0
        answers: list[NDArray[Any]] = []
        for at in range(0, len(split), batch):
            logits = self._stepper.predict(tensors_of(split.inputs[at : at + batch]))
            if logits is None:
                continue
            with torch.no_grad():
                total += loss_of(logits, torch.from_numpy(np.array(split.targets[at : at + batch]))).item()
                answers.append(self._head(logits.float()).numpy())
        if not answers:
            return 0.0, 0.0
        outputs, task = np.concatenate(answers), self._dataset.task
        value, _ = task.evaluate(outputs, split.targets)
        if split.labelled and np.isfinite(outputs).all():
            table = self._dataset.preprocessing.table
            self._newest = Judged.of(task, outputs, split.targets, table.targets if table else ())
        return total / len(split), value

    def _kept(self) -> Epoch:
        """The epoch whose weights are to be sealed: the best with `patience`, else the last."""
        return best_of(self._history) if self._settings.patience else self._history[-1]

    def _out_of_patience(self) -> bool:
        patience = self._settings.patience
        return (
            patience is not None and bool(self._history) and (self._history[-1].epoch - self._kept().epoch >= patience)
        )

    def _save(self) -> None:
        began = time.monotonic()
        notes = {
            "history": msgspec.to_builtins(self._history),
            "epoch_loss": self._epoch_loss,
            PLANNED: self._planned,
            _RESUMED: self._resumed,
            NOTE: msgspec.to_builtins(self._form),
        }
        more = {f"best.{name}": tensor for name, tensor in self._best.items()}
        snapshot = self._stepper.snapshot(self._done, self._optimizer, self._schedule, notes, more)
        if snapshot is not None:
            self._checkpoint.write(snapshot)
            if not self._every_s:
                self._checkpoint.wait()
        self._saved = time.monotonic()
        self._saving_s = self._saved - began

    def _restore(self) -> None:
        found = self._checkpoint.read()
        if found is not None and shapes(found.part("network")) != self._expected:
            found = None
        step = 0 if found is None else found.step
        if self._stepper.from_leader(step) != step:
            raise StorageError(
                f"the workers see different checkpoints at {self._checkpoint.path}",
                "the folder is not on a disk that they share",
                "choose a folder with --out that all machines share",
            )
        if found is None:
            return
        self._stepper.restore(found, self._optimizer, self._schedule)
        self._done = found.step
        self._history = msgspec.convert(found.notes["history"], list[Epoch])
        self._epoch_loss = found.notes["epoch_loss"]
        self._best = found.part("best")
        self._planned = msgspec.convert(found.notes.get(PLANNED, []), list[tuple[int, int]])
        self._resumed = [*found.notes.get(_RESUMED, []), found.step]
        if (epochs := found.facts.get("epochs", self._settings.epochs)) != self._settings.epochs:
            self._planned.append((epochs, found.step))
        if self._on_epoch is not None:
            for epoch in self._history:
                self._on_epoch(epoch)

    def _advanced_schedule(self) -> LRScheduler:
        """The schedule for the number of epochs that is planned now, at the step that is reached."""
        schedule = self._settings.make_schedule(self._optimizer, self._total)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of steps of a schedule without steps of the optimizer
            for _ in range(self._done):
                schedule.step()
        return schedule

    def _resumed_note(self) -> str:
        note = f"resumed after step {self._done}"
        if self._planned and self._planned[-1][1] == self._done:
            note += f", planned for {self._planned[-1][0]} epochs until now"
        return note

    def _record(self) -> TrainingRecord:
        data, settings = self._dataset, self._settings.resolved
        return TrainingRecord(
            model=self._model,
            dataset=data.name,
            samples={part: len(getattr(data, part)) for part in ("train", "validation", "test")},
            settings={**_shown(settings), NOTE: str(self._form)},
            sealed=self._kept().epoch,
            keeps_best=settings.patience is not None,
            resumed=tuple(self._resumed),
            planned=tuple(self._planned),
            classified=self._judged.classified,
            found=self._judged.found,
            residuals=self._judged.residuals,
        )

    def _diverged(self, why: str, batch: Batch, epoch: int, at: int) -> Diverged:
        self._checkpoint.wait()
        step, path = epoch * (self._total // self._settings.epochs) + at + 1, self._checkpoint.path
        kept = f"; the last good checkpoint is {path}" if path.exists() else ""
        rows = self._stepper.nonfinite_rows(batch)
        if 0 < len(rows) < len(batch.rows):
            where = f"{len(rows)} of its {len(batch.rows)} samples cause it: {_listed(rows)} of the training part"
        else:
            where = f"its samples are {_listed(batch.rows.tolist())} of the training part"
        return Diverged(
            f"the training of {self._model} diverged at step {step} of {self._total}",
            f"{why} in step {at + 1} of epoch {epoch + 1}; {where}",
            f"lower the learning rate, now {self._settings.lr:g}, or check the data for extreme values{kept}",
        )


def _listed(rows: list[int]) -> str:
    named = ", ".join(map(str, rows[:_NAMED]))
    return named if len(rows) <= _NAMED else f"{named} and {len(rows) - _NAMED} more"


def _shown(settings: TrainSettings) -> dict[str, Any]:
    """Settings as curves and trackers show them."""
    shown: dict[str, Any] = msgspec.to_builtins(settings)
    return shown | ({} if settings.augment is None else {"augment": str(settings.augment)})
