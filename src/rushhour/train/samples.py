"""Whether a network can be trained on a data set: its samples and targets, before any work."""

from __future__ import annotations

from typing import Any

import msgspec
from numpy.typing import NDArray

from rushhour.bundle import TensorSpec
from rushhour.data.augment import check_pictures
from rushhour.data.dataset import Dataset, Split
from rushhour.errors import DataError, TaskError
from rushhour.train.settings import TrainSettings


def sample_spec(dataset: Dataset) -> TensorSpec:
    """One sample, as the bundle's signature has it.

    Raises:
        DataError: if samples have several inputs, or are of a type that the protocols do not carry.
    """
    if several := dataset.train.inputs.dtype.names:
        raise DataError(
            f"cannot train on samples of {len(several)} inputs",
            f"training takes one array, and {dataset.name} has {', '.join(several)}",
            "join them into one array, and split it in the network's forward",
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
