"""Whether a bundle was trained on samples of the data that judges it."""

from __future__ import annotations

from rushhour.bundle import Bundle
from rushhour.data.dataset import Dataset
from rushhour.data.marks import share_known


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
