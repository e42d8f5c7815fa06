"""Whether a network can be trained on a data set: its samples and targets, before any work."""

from __future__ import annotations

from typing import Any

import msgspec
import torch
from numpy.typing import NDArray

from rushhour.bundle import Bundle, TensorSpec
from rushhour.data.augment import check_pictures
from rushhour.data.dataset import Dataset, Split
from rushhour.errors import DataError, TaskError
from rushhour.models import build, forward_names
from rushhour.train.job import TrainingJob
from rushhour.train.settings import TrainSettings


def sample_spec(dataset: Dataset) -> tuple[TensorSpec, ...]:
    """One sample, as the bundle's signature has it: each input.

    Raises:
        DataError: if they are of a type that the protocols do not carry.
    """
    kind = dataset.train.inputs.dtype
    if kind.names is None:
        name = "image" if dataset.preprocessing.layout == "NHWC->NCHW" else "input"
        return (_spec(name, kind.name, dataset.sample_shape),)
    return tuple(_spec(name, kind[name].base.name, kind[name].shape) for name in kind.names)


def _spec(name: str, dtype: str, shape: tuple[int, ...]) -> TensorSpec:
    try:
        return msgspec.convert({"name": name, "dtype": dtype, "shape": shape}, type=TensorSpec)
    except msgspec.ValidationError as error:
        raise DataError(
            f"cannot serve samples of {dtype}{shape}",
            str(error),
            "give numbers of a common type, in one dimension or more",
        ) from error


def in_order(dataset: Dataset, job: TrainingJob) -> Dataset:
    """The same data, with the inputs of samples in the order in which the network takes them.

    That is the order of the bundle that the training begins with; else of the arguments of `forward`, where these have
    the names of the inputs; else that of the data.

    Raises:
        DataError: if the data does not fit that bundle.
        ModelError: if the network cannot be built.
    """
    if job.initial is not None:
        bundle = Bundle.open(job.initial)
        return dataset.fitted_to(bundle.manifest.signature, bundle.manifest.name)
    names = dataset.train.inputs.dtype.names
    if names is None:
        return dataset
    with torch.random.fork_rng(devices=[]):
        taken = forward_names(build(job.source, job.trusted))[: len(names)]
    return dataset.with_inputs(taken) if set(taken) == set(names) else dataset


def check_data(dataset: Dataset, settings: TrainSettings) -> None:
    """Raise if samples, targets, task and settings do not fit each other.

    Raises:
        DataError: if the samples cannot be served, or not be augmented.
        TaskError: if the targets do not fit the task.
    """
    sample_spec(dataset)
    if settings.augment is not None:
        check_pictures(dataset.train.inputs, dataset.name)
    task = dataset.task
    for part in ("train", "validation", "test"):
        split: Split = getattr(dataset, part)
        if part == "test" and not split.labelled:
            continue
        targets: NDArray[Any] = split.targets
        if why := task.why_wrong(targets):
            what = "labels" if task.classes else "targets"
            raise TaskError(f"the {part} {what} of {dataset.name} do not fit the task", why, "correct the data")
