"""Distillation: a smaller network learns from the outputs of a larger one (Hinton et al. 2015), and from labels.

Both get the same augmented picture, and the schedule is long (Beyer et al. 2022). Without augmentation the teacher's
answers are computed once (`rushhour.compress.teacher`). The order of the data follows from (seed, epoch), and the rest
is in the checkpoint, so a killed distillation ends with the same weights, bit for bit, as an undisturbed one.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn

from rushhour.bundle import Bundle, Source
from rushhour.compress.teacher import kept_answers, sample_order, teaching
from rushhour.data.augment import Augmentation, check_pictures
from rushhour.data.dataset import Dataset
from rushhour.errors import ModelError
from rushhour.models import HIDES, Deployed
from rushhour.progress import Progress
from rushhour.system import machine
from rushhour.task import Task
from rushhour.train import Diverged, TrainSettings
from rushhour.train.checkpoint import Checkpoint
from rushhour.train.feed import Feed
from rushhour.train.loss import imitation_for, loss_for
from rushhour.train.memory_format import NOTE, choose
from rushhour.train.settings import ScheduleName

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def without_dropout(network: nn.Module) -> None:
    """Put the dropout layers of a network into evaluation mode, but for one that hides categories of a table: a student
    that never sees an unknown category forgets what to say of it."""
    for layer in network.modules():
        dropped = isinstance(layer, _DROPOUT) and not getattr(layer, HIDES, False)
        layer.train(layer.training and not dropped)


class Distil(msgspec.Struct, frozen=True, tag_field="step", tag="distil"):
    """Train a network on the outputs of the recipe's first bundle, and on labels where there are any.

    Attributes:
        epochs: passes over the training part.
        student: the network that learns; without one, the network as the steps before have left it.
        temperature: logits of classes of both are divided by it before they are compared.
        alpha: weight of the teacher's outputs in the loss; the labels have the rest.
        lr: the peak of the learning rate.
        batch: samples in a step, at most; see `Dataset.fitting_batch`.
        schedule: of the learning rate, as in `TrainSettings`.
        augment: what happens to pictures, for teacher and student alike.
        dropout: whether the student's dropout layers are on. They are off by default: a small network has little
            capacity, and the teacher's outputs regularise it too (`make bench-compress` shows the cost of dropout).
        share: of the training part that is used, always the same samples; epochs are passes over it. Where time is
            short, only these are answered by the teacher.
    """

    epochs: int = 3
    student: Source | None = None
    temperature: float = 2.0
    alpha: float = 0.9
    lr: float = 1e-3
    batch: int = 128
    schedule: ScheduleName = "one-cycle"
    augment: Augmentation | None = None
    dropout: bool = False
    share: float = 1.0

    def __post_init__(self) -> None:
        for name, holds, rule in (
            ("temperature", 0 < self.temperature < math.inf, "above 0; 2 to 4 is usual"),
            ("alpha", 0 <= self.alpha <= 1, "a share of the loss, from 0 to 1"),
            ("share", 0 < self.share <= 1, "a share of the training part, above 0 and at most 1"),
        ):
            if not holds:
                raise ModelError(f"cannot distil with {name}={getattr(self, name):g}", f"it is {rule}", "change it")
        self.settings(0)

    def settings(self, seed: int) -> TrainSettings:
        """The settings that every training has."""
        return TrainSettings(
            epochs=self.epochs,
            batch=self.batch,
            lr=self.lr,
            seed=seed,
            schedule=self.schedule,
            augment=self.augment,
        ).resolved

    def samples(self, whole: int) -> int:
        """How many samples of a training part of `whole` samples are used."""
        return max(1, round(self.share * whole))


def distil(
    teacher: Bundle,
    student: Deployed,
    dataset: Dataset,
    step: Distil,
    *,
    seed: int,
    checkpoint: Checkpoint,
    progress: Progress,
    trusted: tuple[str, ...] = (),
    checkpoint_every_s: float = 15.0,
    answers: Path | None = None,
) -> None:
    """Train `student`, in place; it ends in evaluation mode.

    Args:
        teacher: whose outputs the student learns.
        student: with the weights to begin with; a checkpoint replaces them.
        dataset: its training part; labels are used where there are any.
        step: how.
        seed: of order, augmentation and dropout.
        checkpoint: resumed from; it stays at the end, so that a second call has nothing to do.
        progress: receives every step.
        trusted: factories that may be imported for the teacher; its graph is used where its factory is not among them.
        checkpoint_every_s: seconds between checkpoints inside an epoch, 0 for one after every step.
        answers: folder of the teacher's answers, which other distillations may use too; None to keep none.

    Raises:
        DataError: if the samples cannot be augmented.
        Diverged: if the loss is no longer a number. The last good checkpoint stays.
        StorageError: if the disk does not take a checkpoint.
    """
    if step.augment is not None:
        check_pictures(dataset.train.inputs, dataset.name)
    torch.set_num_threads(machine.cores())
    settings, name = step.settings(seed), teacher.manifest.name
    whole = len(dataset.train)
    used = step.samples(whole)
    batch_size = dataset.fitting_batch(step.batch)
    size = min(batch_size, used)
    form = choose(
        student,
        dataset.train.inputs[:size],
        bf16=bool(settings.bf16),
        steps=step.epochs * (used // size),
        kept=checkpoint.notes().get(NOTE),
    )
    form.apply(student)
    if form.why:
        progress.start("choose a memory format")
        progress.done(str(form))
    optimizer = settings.make_optimizer(student.network.parameters())
    loss_of = _loss(dataset.task, step, dataset.train.labelled)
    rows = sample_order(whole)[:used] if used < whole else None
    with contextlib.ExitStack() as stack:
        stack.enter_context(form.active())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        feed = stack.enter_context(
            Feed(
                dataset.train,
                seed=seed,
                batch=batch_size,
                augment=step.augment,
                places=dataset.task.places,
                rows=rows,
            )
        )
        torch.manual_seed(seed)
        total = feed.steps * step.epochs
        schedule = settings.make_schedule(optimizer, total)
        done, saved = checkpoint.restore(student.network, optimizer, schedule), time.monotonic()
        kept = None
        if done < total and step.augment is None:
            kept = kept_answers(teacher, dataset, used, folder=answers, progress=progress)
        if done < total and kept is None:
            taught = stack.enter_context(teaching(teacher, dataset, feed.batch, trusted, bf16=bool(settings.bf16)))
        progress.start(f"distil from {name} on {dataset.name}", total)
        if done:
            progress.advance(done, f"resumed after step {done}")
        student.train()
        if not step.dropout:
            without_dropout(student)
        while done < total:
            epoch, first = divmod(done, feed.steps)
            for batch in feed.epoch(epoch, first):
                wanted = kept[batch.own] if kept is not None else taught(*batch.inputs)
                student.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=bool(settings.bf16)):
                    logits = student.logits(*batch.inputs)
                loss = loss_of(logits.float(), wanted, batch.targets)
                if not math.isfinite(value := loss.item()):
                    raise Diverged(
                        f"distilling from {name} diverged",
                        f"the loss became {value} in epoch {epoch + 1}",
                        f"lower the learning rate, now {step.lr:g}, or check the data for extreme values",
                    )
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                done += 1
                progress.advance(1, f"epoch {epoch + 1}/{step.epochs}, loss {value:.3f}")
                if done == total or time.monotonic() - saved >= checkpoint_every_s:
                    notes = {NOTE: msgspec.to_builtins(form)}
                    checkpoint.save(done, student.network, optimizer, schedule, notes=notes)
                    saved = time.monotonic()
        progress.done(f"{step.epochs} epochs")
    student.eval()


def _loss(task: Task, step: Distil, labelled: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Of the student's outputs, the teacher's, and the targets: a mean over samples."""
    of_targets, of_teacher = loss_for(task), imitation_for(task, step.temperature)

    def loss(outputs: Tensor, wanted: Tensor, targets: Tensor) -> Tensor:
        if not labelled:
            return of_teacher(outputs, wanted)
        return step.alpha * of_teacher(outputs, wanted) + (1 - step.alpha) * of_targets(outputs, targets)

    return loss
