"""How a training went, epoch by epoch: what it leaves in a file, and what a report draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from rushhour.errors import DataError
from rushhour.measurement import Number
from rushhour.system.storage import explained, write_whole

CURVES = "curves.jsonl"
"""The file's name in a training's folder: one line for each epoch."""
RECORD = "training.json"
"""The other file there: what the training was."""

_Count = Annotated[int, msgspec.Meta(ge=0, le=10**15)]


class Epoch(msgspec.Struct, frozen=True):
    """One epoch of a training.

    Attributes:
        epoch: from 1.
        step: optimizer steps done at its end.
        loss: mean over its steps, of the training part as it was augmented, with dropout.
        validation_loss: of the validation part, without either.
        metric: the task's metric: its name.
        value: its value on the validation part; higher is better.
        lr: the learning rate of its last step.
        samples_per_s: trained, over the time that this process spent in the epoch's steps.
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
    """What a training was, beside its curves.

    Attributes:
        model: the network.
        dataset: the data.
        samples: part of the data -> how many.
        settings: how it is trained, by name.
        sealed: the epoch whose weights the bundle has, or would have if it ended here.
        keeps_best: whether that is the best one, and not the last.
        resumed: optimizer steps after which it was gone on, having been broken off.
        planned: numbers of epochs that were planned before, each with the step until which it was.
    """

    model: str
    dataset: str
    samples: dict[str, _Count]
    settings: dict[str, Any]
    sealed: _Count
    keeps_best: bool
    resumed: tuple[_Count, ...] = ()
    planned: tuple[tuple[_Count, _Count], ...] = ()


def best_of(epochs: Sequence[Epoch]) -> Epoch:
    """The best on the validation part: by the metric, among equals by the lower loss, then the first."""
    return max(epochs, key=lambda epoch: (epoch.value, -epoch.validation_loss))


def write_curves(folder: Path, epochs: Sequence[Epoch], record: TrainingRecord | None = None) -> None:
    """Keep all epochs so far, and the record of the training, in place of what was kept before.

    Raises:
        StorageError: if the disk does not take it.
    """
    write_whole(folder / CURVES, msgspec.json.Encoder().encode_lines(epochs))
    if record is not None:
        write_whole(folder / RECORD, msgspec.json.format(msgspec.json.encode(record)) + b"\n")


def read_record(folder: Path) -> TrainingRecord | None:
    """The record of the training that was tracked in `folder`; None where there is none.

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
        raise DataError(f"cannot read {file}", str(error), "delete it; training again writes it anew") from error


def read_curves(folder: Path) -> tuple[Epoch, ...]:
    """The epochs that a training left in `folder`, in order.

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
        raise DataError(f"cannot read {file}", str(error), "delete it; training again writes it anew") from error
    if not epochs:
        raise DataError(f"there are no curves in {folder}", f"{CURVES} is empty", "let it train for an epoch first")
    return epochs
