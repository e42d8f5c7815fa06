"""The curves of a training, epoch by epoch, on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from rushhour.errors import DataError
from rushhour.measurement import Number
from rushhour.records.classified import Calibration, Classified
from rushhour.records.judged import Found, Residuals
from rushhour.system.storage import explained, write_whole

CURVES = "curves.jsonl"
"""The file in a training's folder with one line for each epoch."""
RECORD = "training.json"
"""The file there that describes the training."""

_Count = Annotated[int, msgspec.Meta(ge=0, le=10**15)]


class Epoch(msgspec.Struct, frozen=True):
    """One epoch of a training.

    Attributes:
        epoch: from 1.
        step: optimizer steps done at its end.
        loss: mean over its steps on the training part, with augmentation and dropout.
        validation_loss: on the validation part, without augmentation and dropout.
        metric: the task's metric: its name.
        value: its value on the validation part; higher is better.
        lr: the learning rate of its last step.
        samples_per_s: trained per second of this process's steps.
    """

    epoch: Annotated[int, msgspec.Meta(ge=1, le=10**9)]
    step: _Count
    loss: Number
    validation_loss: Number
    metric: str
    value: Number
    lr: Number
    samples_per_s: Number


class TrainingRecord(msgspec.Struct, frozen=True):
    """The description of a training, beside its curves.

    Attributes:
        model: the network.
        dataset: the data.
        samples: part of the data -> how many.
        settings: how it is trained, by name.
        sealed: the epoch whose weights are in the bundle, or would be if the training ended now.
        keeps_best: whether that is the best epoch, not the last.
        resumed: optimizer steps at which the training was resumed.
        planned: earlier planned numbers of epochs, each with the step until which it held.
        classified: what the sealed epoch's network answers on the validation part; None where it is no classifier of
            one label, or was resumed after that epoch.
        found: precision and recall of a ranking or a detection; see `Judged`.
        residuals: of a regression.
        calibration: of the bundle, where it was asked for.
    """

    model: str
    dataset: str
    samples: dict[str, _Count]
    settings: dict[str, Any]
    sealed: _Count
    keeps_best: bool
    resumed: tuple[_Count, ...] = ()
    planned: tuple[tuple[_Count, _Count], ...] = ()
    classified: Classified | None = None
    found: tuple[Found, ...] = ()
    residuals: tuple[Residuals, ...] = ()
    calibration: Calibration | None = None


def best_of(epochs: Sequence[Epoch]) -> Epoch:
    """The best on the validation part: by the metric, among equals by the lower loss, then the first."""
    return max(epochs, key=lambda epoch: (epoch.value, -epoch.validation_loss))


def write_curves(folder: Path, epochs: Sequence[Epoch], record: TrainingRecord | None = None) -> None:
    """Write all epochs so far and the description of the training, replacing older ones.

    Raises:
        StorageError: if they cannot be written.
    """
    write_whole(folder / CURVES, msgspec.json.Encoder().encode_lines(epochs))
    if record is not None:
        write_whole(folder / RECORD, msgspec.json.format(msgspec.json.encode(record)) + b"\n")


def read_record(folder: Path) -> TrainingRecord | None:
    """The description of the training in `folder`; None where there is none.

    Raises:
        DataError: if it is damaged.
        StorageError: if it cannot be read.
    """
    file = folder / RECORD
    if not file.is_file():
        return None
    with explained(f"read {file}"):
        content = file.read_bytes()
    try:
        return msgspec.json.decode(content, type=TrainingRecord)
    except msgspec.DecodeError as error:
        raise DataError(f"cannot read {file}", str(error), "delete it; the next training writes it again") from error


def read_curves(folder: Path) -> tuple[Epoch, ...]:
    """The epochs of the training in `folder`, in order.

    Raises:
        DataError: if there are none, or the file is damaged.
        StorageError: if it cannot be read.
    """
    file = folder / CURVES
    if not file.is_file():
        raise DataError(f"there are no curves in {folder}", f"it has no {CURVES}", "name the folder of a training")
    with explained(f"read {file}"):
        content = file.read_bytes()
    try:
        epochs = tuple(msgspec.json.Decoder(Epoch).decode_lines(content))
    except (msgspec.DecodeError, RecursionError) as error:
        raise DataError(f"cannot read {file}", str(error), "delete it; the next training writes it again") from error
    if not epochs:
        raise DataError(f"there are no curves in {folder}", f"{CURVES} is empty", "wait for the end of the first epoch")
    return epochs
