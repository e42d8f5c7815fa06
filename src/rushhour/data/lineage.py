"""How the data that judges a bundle relates to that which it was trained on."""

from __future__ import annotations

import numpy as np

from rushhour.bundle import Bundle
from rushhour.data.dataset import Dataset
from rushhour.data.marks import share_known
from rushhour.errors import DataError

_OTHER_SCALE = 16
"""Largest allowed ratio of the largest values of a bundle's own pictures and of others."""
_COMPARED = 64


def training_overlap(bundle: Bundle, dataset: Dataset) -> str:
    """A note on data that differs from the bundle's training data; empty where it is the same, or not known.

    Data that has grown is split as before, so no sample of its test part was trained on. If a user's own parts have
    changed, some may have been.
    """
    trained = [step.settings for step in bundle.manifest.lineage if "marks" in step.settings]
    others = [settings for settings in trained if settings.get("fingerprint") != dataset.fingerprint]
    if not others:
        return ""
    name = bundle.manifest.name
    known = {
        part: max(share_known(str(settings["marks"]), split.inputs) for settings in others)
        for part, split in (("validation", dataset.validation), ("test", dataset.test))
    }
    if any(known.values()):
        shares = " and ".join(f"about {share:.0%} of the {part} part" for part, share in known.items() if share)
        return (
            f"{name} was trained on {shares} of {dataset.name}: accuracies there are too high; hold out "
            "samples that it has not seen"
        )
    return (
        f"{name} was trained on other data than {dataset.name} is now; as far as is known, on nothing of its "
        "validation and test parts"
    )


def check_scale(bundle: Bundle, dataset: Dataset) -> None:
    """Raise if pictures in floats are on another scale than the bundle's own samples, as 0..255 and 0..1.

    Raises:
        DataError: if they are.
    """
    name, (first, *more) = bundle.manifest.name, bundle.manifest.signature.inputs
    inputs = dataset.train.sample(_COMPARED).inputs
    if more or bundle.manifest.preprocessing.layout != "NHWC->NCHW" or inputs.dtype != np.float32:
        return
    own = bundle.samples()[first.name]
    peak, theirs = float(np.abs(own).max(initial=0)), float(np.abs(inputs).max(initial=0))
    if own.dtype == inputs.dtype and 0 < min(peak, theirs) < max(peak, theirs) / _OTHER_SCALE:
        raise DataError(
            f"pictures of {dataset.name} have values up to {theirs:g}",
            f"{name} was trained on pictures with values up to {peak:g}",
            "scale them as for training",
        )
