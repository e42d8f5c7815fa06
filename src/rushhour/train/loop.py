"""The training loop: one process, one model, one data set, from nothing to a sealed bundle.

A training that is killed at any moment and started again ends with the same weights, bit for bit, as one left alone:
the order of the data follows from (seed, epoch), and the rest is in the checkpoint.
"""

from __future__ import annotations

import hashlib
import math
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim.lr_scheduler import OneCycleLR

from rushhour import machine
from rushhour.bundle import Bundle, Source, Step, TensorSpec
from rushhour.data.dataset import Dataset, Split
from rushhour.errors import BundleError, DataError, ModelError, TaskError
from rushhour.models import Deployed, build, export
from rushhour.progress import Progress
from rushhour.train.checkpoint import Checkpoint
from rushhour.train.loss import loss_for

_SAMPLES = 16
"""Real inputs that a bundle carries."""

_CHECKPOINT_SHARE = 0.05
"""Of the time, at most, goes into writing checkpoints inside an epoch, however large the model."""


class TrainSettings(msgspec.Struct, frozen=True):
    """How to train. Adam with a one-cycle learning rate (Smith and Topin 2017).

    Attributes:
        epochs: passes over the training data.
        batch: samples in a step; the last samples of an epoch that do not fill one wait for the next epoch's order.
        lr: the peak of the learning rate.
        seed: of weights, dropout and order.
        bf16: compute convolutions and products in bfloat16; None: where the CPU has instructions for it.
    """

    epochs: int = 3
    batch: int = 128
    lr: float = 2e-3
    seed: int = 0
    bf16: bool | None = None

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1 or not (math.isfinite(self.lr) and self.lr > 0):
            raise ModelError(
                f"cannot train for {self.epochs} epochs in batches of {self.batch} at learning rate {self.lr:g}",
                "epochs and batch are at least 1, and the learning rate is above 0",
                "change that setting",
            )


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
) -> Bundle:
    """Train the network that `source` names on `dataset` and seal it as a bundle.

    A bundle at `out` that came from the very same training is returned as it is. A checkpoint of the very same
    training in `work` is gone on from. Equal arguments give equal bundles on equal machines.

    Args:
        dataset: fitted on its training part; the metric in the progress is of its validation part.
        source: the network.
        out: the bundle's folder; any other bundle there is replaced.
        work: folder of checkpoints; they are deleted once the bundle is sealed.
        trusted: factories that may be imported besides those of `rushhour.models`.
        checkpoint_every_s: seconds between checkpoints inside an epoch, 0 for one after every step; more where writing
            one takes long. There is always one at an epoch's end.

    Raises:
        DataError: if the samples are of a type that the wire does not carry.
        TaskError: if the network or the targets do not fit the task; before any training.
        ModelError: if the network cannot be built or run, or the loss is no longer a number. The last good
            checkpoint stays.
        StorageError: if the disk does not take a checkpoint or the bundle.
    """
    step = _lineage(dataset, settings)
    there = _sealed(out, dataset, source, step)
    if there is not None:
        return there
    torch.set_num_threads(machine.cores())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        deployed = Deployed(build(source, trusted), dataset.task, dataset.preprocessing)
        short = source.factory.rpartition(":")[2]
        spec = _sample_spec(dataset)
        _check(dataset, deployed, short)
        checkpoint = Checkpoint(work, _fingerprint(dataset, source, step))
        _fit(dataset, deployed, settings, checkpoint, progress, short, checkpoint_every_s)
        samples = np.ascontiguousarray(dataset.validation.inputs[:_SAMPLES])
        bundle = export(
            deployed.network,
            name=f"{short}-{dataset.name}",
            task=dataset.task,
            sample_spec=spec,
            preprocessing=dataset.preprocessing,
            source=source,
            lineage=(step,),
            samples=samples,
            path=out,
        )
    checkpoint.remove()
    return bundle


def _fit(
    dataset: Dataset,
    deployed: Deployed,
    settings: TrainSettings,
    checkpoint: Checkpoint,
    progress: Progress,
    name: str,
    checkpoint_every_s: float,
) -> None:
    """Train in place, from the checkpoint if there is one."""
    network, loss_of, bf16 = deployed.network, loss_for(dataset.task), _bf16(settings)
    if dataset.preprocessing.layout == "NHWC->NCHW":
        # as the samples come, and twice as fast in oneDNN's convolutions
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    batch = min(settings.batch, len(dataset.train))
    steps = len(dataset.train) // batch
    total = steps * settings.epochs
    try:
        optimizer = torch.optim.Adam(network.parameters(), lr=settings.lr, fused=True)
    except ValueError as error:
        raise ModelError(f"cannot train {name}", str(error), "give the model parameters to learn") from error
    schedule = OneCycleLR(optimizer, max_lr=settings.lr, total_steps=total)
    first = done = checkpoint.restore(network, optimizer, schedule)
    inputs, targets = dataset.train.inputs, dataset.train.targets
    progress.start(f"train {name} on {dataset.name}", total)
    if first:
        progress.advance(first, f"resumed after step {first}")
    metric = ""
    started = saved = time.monotonic()
    writing = 0.0
    while done < total:
        epoch = done // steps
        order = np.random.default_rng((settings.seed, epoch)).permutation(len(inputs))
        deployed.train()
        for at in range(done % steps, steps):
            rows = order[at * batch : (at + 1) * batch]
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                outputs = deployed.logits(torch.from_numpy(inputs[rows]))
            loss = loss_of(outputs, torch.from_numpy(targets[rows]))
            value = loss.item()
            if not math.isfinite(value):
                raise _diverged(name, f"the loss became {value}", done + 1, total, settings, checkpoint)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            done += 1
            now = time.monotonic()
            speed = (done - first) * batch / (now - started)
            progress.advance(
                1, f"epoch {epoch + 1}/{settings.epochs}, loss {value:.3f}{metric}, {speed:,.0f} samples/s"
            )
            due = not checkpoint_every_s or now - saved >= max(checkpoint_every_s, writing / _CHECKPOINT_SHARE)
            if due or at + 1 == steps:
                if not all(bool(tensor.isfinite().all()) for tensor in network.parameters()):
                    raise _diverged(name, "the weights are no longer numbers", done, total, settings, checkpoint)
                checkpoint.save(done, network, optimizer, schedule)
                saved = time.monotonic()
                writing = saved - now
        metric = f", {_validation(dataset, deployed, batch, bf16)}"
    progress.done((metric or f", {_validation(dataset, deployed, batch, bf16)}").removeprefix(", "))


def _validation(dataset: Dataset, deployed: Deployed, batch: int, bf16: bool) -> str:
    """The metric on the validation part, in words. Steers nothing, so that it may be skipped on resuming."""
    split = dataset.validation
    deployed.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        parts = [
            deployed(torch.from_numpy(np.array(split.inputs[at : at + batch]))).float().numpy()
            for at in range(0, len(split), batch)
        ]
    value, _ = dataset.task.evaluate(np.concatenate(parts), split.targets)
    return f"{dataset.task.metric} {value:.4f}"


def _sample_spec(dataset: Dataset) -> TensorSpec:
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


def _check(dataset: Dataset, deployed: Deployed, name: str) -> None:
    """Raise, before any work, if network, targets and task do not fit each other."""
    task = dataset.task
    task.check_output(deployed.answer_shape(dataset.train.inputs[:2], name), name)
    parts: tuple[tuple[str, Split], ...] = (("train", dataset.train), ("validation", dataset.validation))
    for part, split in parts:
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


def _diverged(
    name: str, why: str, step: int, total: int, settings: TrainSettings, checkpoint: Checkpoint
) -> ModelError:
    kept = f"; the last good state is kept in {checkpoint.path}" if checkpoint.path.exists() else ""
    return ModelError(
        f"the training of {name} broke at step {step} of {total}",
        why,
        f"lower the learning rate, now {settings.lr:g}, or check the data for extreme values{kept}",
    )


def _bf16(settings: TrainSettings) -> bool:
    if settings.bf16 is not None:
        return settings.bf16
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(machine.describe().features)


def _lineage(dataset: Dataset, settings: TrainSettings) -> Step:
    resolved = msgspec.structs.replace(settings, bf16=_bf16(settings))
    return Step(
        "train",
        {
            **msgspec.structs.asdict(resolved),
            "dataset": dataset.name,
            "fingerprint": dataset.fingerprint,
            "torch": str(torch.__version__),
        },
    )


def _fingerprint(dataset: Dataset, source: Source, step: Step) -> str:
    made_of = (step, source, dataset.task, dataset.preprocessing, len(dataset.train))
    return hashlib.sha256(msgspec.json.encode(made_of, order="deterministic")).hexdigest()


def _sealed(out: Path, dataset: Dataset, source: Source, step: Step) -> Bundle | None:
    """The bundle at `out`, if it came from this very training; a damaged one counts as none."""
    try:
        bundle = Bundle.open(out)
    except BundleError:
        return None
    manifest = bundle.manifest
    made_of = (manifest.lineage, manifest.source, manifest.task, manifest.preprocessing)
    return bundle if made_of == ((step,), source, dataset.task, dataset.preprocessing) else None
