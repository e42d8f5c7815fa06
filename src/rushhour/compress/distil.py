"""Distillation: a smaller network learns from the outputs of a larger one (Hinton et al. 2015), and from labels.

Both get the same augmented picture, and the schedule is long (Beyer et al. 2022). The teacher is a torch module, or the
compiled graph where there is none. The order of the data follows from (seed, epoch), and the rest is in the checkpoint,
so a killed distillation ends with the same weights, bit for bit, as an undisturbed one.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from rushhour.bundle import Bundle, Source
from rushhour.data.augment import Augmentation, check_pictures
from rushhour.data.dataset import Dataset
from rushhour.engines import EngineConfig, Runner, open_engine
from rushhour.errors import ModelError
from rushhour.models import Deployed, load_deployed
from rushhour.progress import Progress
from rushhour.system import machine
from rushhour.task import Task, are_probabilities
from rushhour.train import Diverged, TrainSettings
from rushhour.train.checkpoint import Checkpoint
from rushhour.train.feed import Feed
from rushhour.train.loss import loss_for
from rushhour.train.memory_format import NOTE, MemoryFormat, choose
from rushhour.train.settings import ScheduleName

_CACHED_BYTES = 256_000_000
"""Largest size of the teacher's outputs that are cached, where nothing is augmented."""
_PROBED = 32
"""Samples whose outputs show whether a graph gives probabilities or logits."""
_COARSE = 0.05
"""By which the sum of an int8 graph's probabilities may differ from 1."""
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)

Teacher = Callable[[Tensor], Tensor]
"""Samples `(n, *shape)` as on the wire (float32 once augmented) -> logits or values `(n, outputs)`, in float32."""


class Distil(msgspec.Struct, frozen=True, tag_field="step", tag="distil"):
    """Train a network on the outputs of the recipe's first bundle, and on labels where there are any.

    Attributes:
        epochs: passes over the training part.
        student: the network that learns; without one, the network as the steps before have left it.
        temperature: logits of both are divided by it before they are compared; for classification only.
        alpha: weight of the teacher's outputs in the loss; the labels have the rest.
        lr: the peak of the learning rate.
        batch: samples in a step.
        schedule: of the learning rate, as in `TrainSettings`.
        augment: what happens to pictures, for teacher and student alike.
        dropout: whether the student's dropout layers are on. They are off by default: a small network has little
            capacity, and the teacher's outputs regularise it too (`make bench-compress` shows the cost of dropout).
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

    def __post_init__(self) -> None:
        for name, holds, rule in (
            ("temperature", 0 < self.temperature < math.inf, "above 0; 2 to 4 is usual"),
            ("alpha", 0 <= self.alpha <= 1, "a share of the loss, from 0 to 1"),
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

    Raises:
        DataError: if the samples cannot be augmented.
        Diverged: if the loss is no longer a number. The last good checkpoint stays.
        StorageError: if the disk does not take a checkpoint.
    """
    if step.augment is not None:
        check_pictures(dataset.train.inputs, dataset.name)
    torch.set_num_threads(machine.cores())
    settings, name = step.settings(seed), teacher.manifest.name
    size = min(step.batch, len(dataset.train))
    form = choose(
        student,
        dataset.train.inputs[:size],
        bf16=bool(settings.bf16),
        steps=step.epochs * (len(dataset.train) // size),
        kept=checkpoint.notes().get(NOTE),
    )
    form.apply(student)
    if form.why:
        progress.start("choose a memory format")
        progress.done(str(form))
    optimizer = settings.make_optimizer(student.network.parameters())
    loss_of = _loss(dataset.task, step, dataset.train.labelled)
    with (
        form.active(),
        torch.random.fork_rng(devices=[]),
        Feed(dataset.train, seed=seed, batch=step.batch, augment=step.augment) as feed,
        _teaching(teacher, dataset, feed.batch, trusted, bf16=bool(settings.bf16)) as taught,
    ):
        torch.manual_seed(seed)
        total = feed.steps * step.epochs
        schedule = settings.make_schedule(optimizer, total)
        done, saved = checkpoint.restore(student.network, optimizer, schedule), time.monotonic()
        cached = _cached(taught, dataset, feed.batch, step, progress) if done < total else None
        progress.start(f"distil from {name} on {dataset.name}", total)
        if done:
            progress.advance(done, f"resumed after step {done}")
        student.train()
        if not step.dropout:
            for layer in student.modules():
                layer.train(layer.training and not isinstance(layer, _DROPOUT))
        while done < total:
            epoch, first = divmod(done, feed.steps)
            for batch in feed.epoch(epoch, first):
                wanted = cached[batch.own] if cached is not None else taught(batch.inputs)
                student.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=bool(settings.bf16)):
                    logits = student.logits(batch.inputs)
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
    of_targets, heat = loss_for(task), step.temperature

    def of_teacher(outputs: Tensor, wanted: Tensor) -> Tensor:
        if task.kind != "classification":
            return functional.mse_loss(outputs, wanted)
        student, teacher = (functional.log_softmax(each / heat, dim=1) for each in (outputs, wanted))
        # its gradient shrinks with the square of the temperature
        return functional.kl_div(student, teacher, reduction="batchmean", log_target=True) * heat**2

    def loss(outputs: Tensor, wanted: Tensor, targets: Tensor) -> Tensor:
        if not labelled:
            return of_teacher(outputs, wanted)
        return step.alpha * of_teacher(outputs, wanted) + (1 - step.alpha) * of_targets(outputs, targets)

    return loss


@contextlib.contextmanager
def _teaching(
    bundle: Bundle, dataset: Dataset, batch: int, trusted: tuple[str, ...], *, bf16: bool
) -> Iterator[Teacher]:
    """The teacher's outputs for samples, while the block runs."""
    module = _module(bundle, trusted)
    if module is not None:
        # oneDNN's fault is in gradients only, and `load_deployed` has tried channels-last pictures
        MemoryFormat(channels_last=not module.preprocess.contiguous).apply(module)

        def of_module(inputs: Tensor) -> Tensor:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                return module.logits(inputs).float()

        yield of_module
        return
    (spec,), output = bundle.manifest.signature.inputs, bundle.manifest.signature.outputs[0].name
    precision = bundle.manifest.precision
    config = EngineConfig("onnxruntime", "int8" if precision == "int8" else "f32", 1, machine.cores(), batch)
    engine = open_engine(bundle, config)
    try:
        runner = Runner(engine)
        first = np.ascontiguousarray(dataset.train.inputs[:_PROBED])
        gives = runner.infer({spec.name: first[:batch]})[output]
        # log-probabilities are logits up to a constant, which softmax at any temperature ignores
        are_logs = dataset.task.kind == "classification" and are_probabilities(np.asarray(gives), _COARSE)

        def of_graph(inputs: Tensor) -> Tensor:
            samples = inputs.numpy()
            if samples.dtype != spec.dtype:  # augmented pictures; the graph takes whole pixels
                samples = np.rint(samples).astype(spec.dtype)
            answers = torch.from_numpy(np.asarray(runner.infer({spec.name: samples})[output], dtype=np.float32))
            return answers.clamp_min(1e-12).log() if are_logs else answers

        yield of_graph
    finally:
        engine.close()


def _module(bundle: Bundle, trusted: tuple[str, ...]) -> Deployed | None:
    """The teacher in torch; None where it has no module, or its factory is not trusted: its graph gives the same."""
    if bundle.manifest.source is None or bundle.weights is None:
        return None
    try:
        return load_deployed(bundle, trusted)
    except ModelError:
        return None


def _cached(taught: Teacher, dataset: Dataset, batch: int, step: Distil, progress: Progress) -> Tensor | None:
    """The teacher's outputs for the whole training part, where every epoch needs the same; else None."""
    inputs, outputs = dataset.train.inputs, dataset.task.outputs
    if step.augment is not None or step.epochs < 2 or len(inputs) * outputs * 4 > _CACHED_BYTES:
        return None
    progress.start(f"outputs of the teacher on {dataset.name}", len(inputs))
    answers = torch.empty(len(inputs), outputs)
    for at in range(0, len(inputs), batch):
        part = np.ascontiguousarray(inputs[at : at + batch])
        answers[at : at + len(part)] = taught(torch.from_numpy(part))
        progress.advance(len(part))
    progress.done()
    return answers
