"""The store of a compression: bundles and checkpoints under the key of all that decides their content."""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any, Final

import msgspec

from rushhour.bundle import Bundle, Source
from rushhour.compress.distil import Distil
from rushhour.compress.quantize import Quantize
from rushhour.compress.recipe import TRAINS, AnyStep
from rushhour.data.dataset import Dataset
from rushhour.errors import BundleError, ModelError
from rushhour.models import code_of
from rushhour.records import identity
from rushhour.system import machine
from rushhour.train.checkpoint import Checkpoint

ANSWERS: Final = ".answers"
"""The folder in a store for answers of teachers."""
_VERSIONS: Final = ("numpy", "torch", "torch-pruning", "nncf", "onnx", "onnxscript", "openvino", "onnxruntime")
"""Packages whose versions decide what a step makes."""


class Store:
    """A folder of bundles by what they were made from.

    Args:
        folder: created with the first bundle; several recipes and several runs may share it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """The folder of the bundle of this key, whether it exists or not."""
        return self.folder / key[:24]

    def find(self, key: str) -> Bundle | None:
        """The bundle of this key; None where there is none, or it is damaged."""
        try:
            return Bundle.open(self.path(key))
        except BundleError:
            return None

    def checkpoint(self, key: str, part: int) -> Checkpoint:
        """The checkpoint of a training in the step of this key: a step may train several times."""
        return Checkpoint(self.folder / ".checkpoints", hashlib.sha256(f"{key}/{part}".encode()).hexdigest())


class Maker(msgspec.Struct, frozen=True):
    """What of a machine and its software decides what it makes.

    Attributes:
        versions: package -> version.
        features: vector extensions of the processor: they decide how channels are rounded, and whether training
            computes in bf16.
    """

    versions: dict[str, str]
    features: tuple[str, ...]


def maker() -> Maker:
    """This machine, as one that makes bundles."""
    return Maker({name: importlib.metadata.version(name) for name in _VERSIONS}, machine.describe().features)


def key_of(
    step: AnyStep,
    before: Bundle,
    first: Bundle,
    dataset: Dataset,
    seed: int,
    max_drop: float | None = None,
    trusted: tuple[str, ...] = (),
) -> str:
    """All that decides what `step` makes, as a SHA-256.

    Args:
        step: what is done.
        before: to this bundle.
        first: the recipe's first bundle.
        dataset: with this data.
        seed: of all that is random.
        max_drop: the accuracy budget, which matters for int8 only.
        trusted: factories whose code may be hashed.
    """
    trains, takes_data = isinstance(step, TRAINS), isinstance(step, (*TRAINS, Quantize))
    made_by = maker()
    sources = [each.manifest.source for each in (before, first)] + ([step.student] if isinstance(step, Distil) else [])
    return identity.key(
        before=_content(before),
        first=_content(first) if isinstance(step, Distil) else None,
        step=step,
        data=dataset if takes_data else None,
        seed=seed if takes_data else None,
        max_drop=max_drop if isinstance(step, Quantize) else None,
        versions=made_by.versions,
        code=[_code(source, trusted) for source in sources if source is not None] if trains else None,
        features=made_by.features if takes_data else None,
    )


def _content(bundle: Bundle) -> list[Any]:
    """What of a bundle decides what is made from it: not its metrics."""
    return [bundle.manifest.name, bundle.manifest.lineage, bundle.content_key]


def _code(source: Source, trusted: tuple[str, ...]) -> dict[str, str]:
    """Hashes of a network's code; nothing where it may not be imported, which a step that needs it reports."""
    try:
        return code_of(source, trusted)
    except ModelError:
        return {}
