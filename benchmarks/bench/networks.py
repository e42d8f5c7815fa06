"""The trained networks that benchmarks share: made once, and kept in a folder."""

from __future__ import annotations

from pathlib import Path

from rushhour.bundle import Bundle
from rushhour.cli.terminal import TerminalProgress
from rushhour.compress import Target, quantize
from rushhour.data import Dataset
from rushhour.models import source_for
from rushhour.train import TrainingJob, TrainSettings, train

SEED = 0


def trained(network: str, data: Dataset, epochs: int, folder: Path) -> Bundle:
    """A reference network, trained, or as it was trained before, in the subfolder of its name.

    Args:
        network: `article`, `residual` or `mlp`.
        data: that it is trained on.
        epochs: of the training; one that was trained for another number is trained anew.
        folder: of all networks.
    """
    path = folder / network
    if (path / "bundle.json").is_file():
        there = Bundle.open(path)
        if there.manifest.lineage[-1].settings.get("epochs") == epochs:
            return there
    settings = TrainSettings(epochs=epochs, seed=SEED)
    job = TrainingJob(source_for(network, data.sample_shape, data.task), settings, folder / "work")
    return train(data, job, out=path, progress=TerminalProgress())


def quantised(reference: Bundle, data: Dataset, folder: Path, target: Target = "any") -> Bundle:
    """Its int8 bundle, in the subfolder `NETWORK-7`, or `NETWORK-8` for processors with VNNI; made if it is missing."""
    path = folder / f"{reference.path.name}-{7 if target == 'any' else 8}"
    return quantize(reference, data, path, target=target, progress=TerminalProgress())
