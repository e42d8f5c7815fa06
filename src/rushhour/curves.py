"""How a training went, epoch by epoch: what it leaves in a file, and what a report draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from rushhour.errors import DataError
from rushhour.storage import explained, write_whole

CURVES = "curves.jsonl"
"""The file's name in a training's folder: one line for each epoch."""


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

    epoch: int
    step: int
    loss: float
    validation_loss: float
    metric: str
    value: float
    lr: float
    samples_per_s: float


def write_curves(folder: Path, epochs: Sequence[Epoch]) -> None:
    """Keep all epochs so far, in place of what was kept before.

    Raises:
        StorageError: if the disk does not take it.
    """
    write_whole(folder / CURVES, msgspec.json.Encoder().encode_lines(epochs))


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
    except msgspec.DecodeError as error:
        raise DataError(f"cannot read {file}", str(error), "delete it; training again writes it anew") from error
    if not epochs:
        raise DataError(f"there are no curves in {folder}", f"{CURVES} is empty", "let it train for an epoch first")
    return epochs
