"""Training settings: those that the user gave, and those that the amount of data decides."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any, Final

import msgspec

from rushhour.errors import ModelError
from rushhour.progress import Progress

if TYPE_CHECKING:
    from rushhour.train import TrainSettings

_SMALLEST_BATCH: Final = 8
_BATCHES: Final = 12
"""In an epoch at least, where there is too little data for batches of the default size."""
_STEPS: Final = 600
"""Optimizer steps of a training at least, unless that takes more than `_MOST_EPOCHS`."""
_MOST_EPOCHS: Final = 100


def settings_of(training: dict[str, Any]) -> TrainSettings:
    """The settings that were given by name; `augment` may be text, and None stands for the default.

    Raises:
        ModelError: if a value is of another type, or out of its bounds.
        DataError: if `augment` cannot be read.
    """
    from rushhour.data.augment import Augmentation
    from rushhour.train import TrainSettings

    named = {name: value for name, value in training.items() if value is not None or name == "bf16"}
    if isinstance(named.get("augment"), str):
        named["augment"] = Augmentation.parse(named["augment"])
    kinds = {field.name: field.type for field in msgspec.structs.fields(TrainSettings)}
    for name, value in named.items():
        plain = value.item() if getattr(value, "shape", None) == () else value  # of numpy or torch
        try:
            named[name] = plain if isinstance(plain, Augmentation) else msgspec.convert(plain, kinds[name])
        except msgspec.ValidationError as error:
            raise ModelError(f"cannot train with {name}={value!r}", str(error), "change it") from error
    return TrainSettings(**named)


def fitted(
    training: dict[str, Any], samples: int, progress: Progress, *, workers: int = 1, largest: int = sys.maxsize
) -> dict[str, Any]:
    """The settings with batch, learning rate and epochs chosen by the amount of data where they are None.

    The number of optimizer steps decides how much is learned, not that of epochs: three passes over little data are
    only a few steps.

    Args:
        training: settings by name.
        samples: in the training part.
        progress: gets a note where a value is not the default.
        workers: that share a batch.
        largest: batch that fits the data; see `Dataset.fitting_batch`.
    """
    default = settings_of({})
    chosen = dict(training)
    if chosen.get("batch") is None:
        least = max(_SMALLEST_BATCH, workers, chosen.get("accumulate") or 1)
        fits = 2 ** int(math.log2(max(1, samples / _BATCHES)))
        chosen["batch"] = max(least, min(default.batch, largest, fits))
    if chosen.get("lr") is None:
        smaller = min(1.0, chosen["batch"] / default.batch)
        chosen["lr"] = float(f"{default.lr * math.sqrt(smaller):.2g}")
    in_epoch = max(1, samples // min(chosen["batch"], samples))
    if chosen.get("epochs") is None:
        chosen["epochs"] = max(default.epochs, min(_MOST_EPOCHS, math.ceil(_STEPS / in_epoch)))
    own = [name for name in ("batch", "epochs", "lr") if training.get(name) is None]
    if any(chosen[name] != getattr(default, name) for name in own):
        values = {
            "batch": f"batch size {chosen['batch']}",
            "epochs": f"{chosen['epochs']} epochs",
            "lr": f"learning rate {chosen['lr']:g}",
        }
        progress.note(
            f"chosen for {samples:,} training samples: {', '.join(values[name] for name in own)}, "
            f"{chosen['epochs'] * in_epoch:,} steps in all; set {', '.join(f'--{name}' for name in own)} to change it"
        )
    return chosen
