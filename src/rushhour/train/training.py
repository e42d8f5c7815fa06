"""One training from its job to its result: a sealed bundle, weights, or the time of a step."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from rushhour.bundle import Bundle, Step, check_place, name_of
from rushhour.data.dataset import Dataset
from rushhour.errors import BundleError, StorageError
from rushhour.models import Deployed, build, export
from rushhour.progress import Progress, Silent
from rushhour.records import identity
from rushhour.records.curves import Epoch, read_curves, read_record, write_curves
from rushhour.system import machine
from rushhour.system.storage import alone_at, claimed, explained
from rushhour.task import Task
from rushhour.train.checkpoint import Checkpoint, Unfinished
from rushhour.train.fingerprint import Fingerprint, fingerprint_of
from rushhour.train.job import TrainingJob
from rushhour.train.loop import PLANNED
from rushhour.train.parallel import run_on_workers, under_torchrun
from rushhour.train.run import TrainingRun
from rushhour.train.samples import in_order, sample_spec
from rushhour.train.settings import TrainSettings
from rushhour.train.temperature import calibration_of, check_calibration

_SAMPLES = 16
"""Real inputs that a bundle carries."""


def train(
    dataset: Dataset,
    job: TrainingJob,
    *,
    out: Path,
    progress: Progress,
    on_epoch: Callable[[Epoch], None] | None = None,
    name: str | None = None,
    force: bool = False,
) -> Bundle:
    """Train a network on `dataset` and seal it as a bundle.

    A bundle at `out` that came from the same training is returned as it is. A checkpoint of the same training in
    `job.work` is resumed, also where only the number of epochs differs: the learning rate then follows the schedule of
    the new number, and the lineage says so. `fingerprint_of` says what the same training is: settings, data, and the
    network with its code (`rushhour.models.structure`). Equal arguments give equal bundles on equal machines, up to
    rounding where trial steps choose between memory formats that are about equally fast
    (`rushhour.train.memory_format`).

    Args:
        dataset: fitted on its training part; the metric in the progress is of its validation part.
        job: what is trained, and how.
        out: the bundle's folder; one process at a time makes it. The checkpoints are deleted once it is sealed.
        progress: receives every step.
        on_epoch: called with each epoch before its checkpoint, and after a restart first with all epochs before; an
            error that it raises ends the training. On one worker only.
        name: of the model, which all bundles made from it keep; that of the folder `out` by default.
        force: whether another bundle at `out`, or the checkpoint of another training for it, may be removed.

    Raises:
        DataError: if the samples are of a type that the protocols do not carry, or cannot be augmented.
        TaskError: if the network or the targets do not fit the task; before any training.
        ModelError: if the network cannot be built or run.
        PlanError: if the workers cannot share it so, or have too little memory.
        Diverged: if the loss is no longer a number. The last good checkpoint stays.
        StorageError: if there is something else at `out`, or the checkpoint of another training for it; before any
            work. Also if the disk does not take a checkpoint or the bundle.
    """
    run, dataset = _run_of(dataset, job)
    with contextlib.ExitStack() as stack:
        if os.environ.get("RANK", "0") == "0":
            stack.enter_context(alone_at(out))
            if job.tracking is not None:
                stack.enter_context(claimed(job.tracking.folder))
        return _sealed(run, dataset, out=out, progress=progress, on_epoch=on_epoch, name=name, force=force)


def train_for_search(
    dataset: Dataset, job: TrainingJob, *, out: Path, progress: Progress, name: str | None, search: str
) -> Bundle:
    """`train` for a search that holds the lock of `out` already; the lineage names the search."""
    job = msgspec.structs.replace(job, checkpoint_every_s=math.inf, tracking=None)
    run, dataset = _run_of(dataset, job)
    return _sealed(run, dataset, out=out, progress=progress, on_epoch=None, name=name, force=True, search=search)


def trained_weights(
    dataset: Dataset, job: TrainingJob, *, progress: Progress, on_epoch: Callable[[Epoch], None] | None = None
) -> dict[str, Tensor]:
    """The weights that `train` seals, and no bundle. The checkpoint stays: called again, this returns them at once.

    Arguments and errors are those of `train`. Under torchrun, rank 0 returns; the other processes exit with status 0.
    """
    run, dataset = _run_of(dataset, job)
    return _weights(run, dataset, progress, on_epoch)


def step_seconds(dataset: Dataset, job: TrainingJob) -> float:
    """The seconds of one step of this training on this machine, on one worker: the median of a few.

    Their result is thrown away. Errors are those of `train`.
    """
    dataset = in_order(dataset, job)
    run = TrainingRun(msgspec.structs.replace(job, workers=1), Fingerprint(Step("train"), {}))
    with torch.random.fork_rng(devices=[]):
        torch.set_num_threads(machine.cores())
        return run.inspected(dataset, Silent(), export=False).step_seconds(dataset)


def bundle_at(folder: Path) -> Bundle | None:
    """The bundle in a folder; None where there is none, or it is damaged."""
    try:
        return Bundle.open(folder)
    except BundleError:
        return None


def _run_of(dataset: Dataset, job: TrainingJob) -> tuple[TrainingRun, Dataset]:
    """The training, and the data in the order of the network's inputs."""
    workers = int(os.environ["WORLD_SIZE"]) if under_torchrun() else job.workers
    job = msgspec.structs.replace(job, workers=workers)
    dataset = in_order(dataset, job)
    if dataset.task.uncalibrated != dataset.task:  # of another model, whose temperature is not this one's
        dataset = dataclasses.replace(dataset, task=dataset.task.uncalibrated)
    sample_spec(dataset)
    return TrainingRun(job, fingerprint_of(dataset, job)), dataset


def _weights(
    run: TrainingRun, dataset: Dataset, progress: Progress, on_epoch: Callable[[Epoch], None] | None
) -> dict[str, Tensor]:
    workers, backend = run.job.workers, run.job.parallel.backend
    with torch.random.fork_rng(devices=[]):
        torch.set_num_threads(machine.cores())
        if run.meaning is None:
            run = run.inspected(dataset, progress)
        if workers == 1:
            return run.in_this_process(dataset, progress, on_epoch=on_epoch)
        if not run_on_workers(run, dataset, workers=workers, backend=backend, folder=run.folder(), progress=progress):
            raise SystemExit(0)
        # the workers have taken all steps: this reads the weights from their last checkpoint
        return run.in_this_process(dataset, Silent(), tracking=False, on_epoch=on_epoch)


def _sealed(
    run: TrainingRun,
    dataset: Dataset,
    *,
    out: Path,
    progress: Progress,
    on_epoch: Callable[[Epoch], None] | None,
    name: str | None,
    force: bool,
    search: str = "",
) -> Bundle:
    job, fingerprint = run.job, run.fingerprint
    older = bundle_at(out)
    why = "its state: it is damaged" if older is None else fingerprint.differs_from(older)
    if older is not None and name not in (None, older.manifest.name):
        why = f"{why}, its name, which is {older.manifest.name}".removeprefix(", ")
    if older is not None and not why:
        return older
    check_place(out, force=force, why=why)
    if job.calibrate:
        check_calibration(dataset)
    run = run.inspected(dataset, progress)  # before anything is removed
    checkpoint = run.checkpoint()
    _check_others(run, checkpoint, dataset, out, force=force)
    weights = _weights(run, dataset, progress, on_epoch)
    planned = checkpoint.notes().get(PLANNED, [])
    with torch.random.fork_rng(devices=[]):
        network = build(job.source, job.trusted)
        network.load_state_dict(weights)
        task = _calibrated(network, dataset, job, progress) if job.calibrate else dataset.task
        progress.start(f"export {job.model} and check it against torch")
        bundle = export(
            network,
            name=name or name_of(out),
            task=task,
            sample_spec=run.sample(dataset),
            preprocessing=dataset.preprocessing,
            source=job.source,
            lineage=(*fingerprint.before, fingerprint.lineage_step(planned, search)),
            samples=np.ascontiguousarray(dataset.train.sample(_SAMPLES).inputs),
            path=out,
        )
        progress.done(f"{bundle.model_bytes / 1e6:.2f} MB")
    checkpoint.remove()
    shutil.rmtree(run.folder(), ignore_errors=True)
    return bundle


def _calibrated(network: nn.Module, dataset: Dataset, job: TrainingJob, progress: Progress) -> Task:
    """The task with the temperature of this network; its report is told."""
    progress.start("calibrate the probabilities")
    deployed = Deployed(network, dataset.task, dataset.preprocessing)
    deployed.settle(np.array(dataset.validation.inputs[:2]), job.model)
    found = calibration_of(deployed, dataset, job.settings.batch)
    before, after = found.before.calibration_error, found.after.calibration_error
    progress.done(f"temperature {found.temperature:g}: calibration error {before:.3f} before, {after:.3f} after")
    if job.tracking is not None and (record := read_record(job.tracking.folder)) is not None:
        kept = msgspec.structs.replace(record, calibration=found)
        write_curves(job.tracking.folder, read_curves(job.tracking.folder), kept)
    return msgspec.structs.replace(dataset.task, temperature=found.temperature)


def _check_others(run: TrainingRun, checkpoint: Checkpoint, dataset: Dataset, out: Path, *, force: bool) -> None:
    """Raise if there is a checkpoint for this bundle that cannot be resumed; with `force` remove it.

    Raises:
        StorageError: before anything is lost.
    """
    facts, settings = run.fingerprint.facts, run.job.settings
    own = checkpoint.unfinished()
    if own is None:
        refused = [(other, ", ".join(identity.changes(other.facts, facts))) for other in checkpoint.others()]
    elif not run.fingerprint.same_weights(own.facts):
        refused = [(own, identity.WORDS["weights"])]
    elif own.step > _steps(dataset, settings):
        refused = [(own, f"epochs {own.facts['epochs']} before, {settings.epochs} now, which end sooner")]
    else:
        return
    for other, why in refused:
        if not force:
            raise _interrupted(other, why, out)
        with explained(f"delete {other.path}"):
            other.path.unlink(missing_ok=True)  # under torchrun, other processes do so too
        shutil.rmtree(other.path.with_suffix(""), ignore_errors=True)


def _interrupted(other: Unfinished, why: str, out: Path) -> StorageError:
    return StorageError(
        f"another training for {out} was interrupted at step {other.step:,}",
        f"{why or 'its fingerprint differs'}; starting anew would delete its checkpoint",
        "resume it with what it was started with, choose another folder with --out, or use --force to start anew",
    )


def _steps(dataset: Dataset, settings: TrainSettings) -> int:
    """Optimizer steps of the whole training."""
    return settings.epochs * (len(dataset.train) // min(settings.batch, len(dataset.train)))
