"""What goes between the head of a search and the nodes that build for it: files and arrays, and never a pickled object
of a user's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from rushhour.bundle import Bundle, Preprocessing, is_bundle
from rushhour.bundle.manifest import FILES
from rushhour.compress import Maker, Recipe
from rushhour.data import Dataset, Split
from rushhour.errors import BundleError, DataError
from rushhour.system.storage import building, explained
from rushhour.task import Task, ensure_kind

_PARTS: Final = ("train", "validation", "test")

Loader: TypeAlias = Callable[[Bundle | None], Dataset]
"""Reads a data set on the node that it runs on, for the model that is given. Ray sends it by its name, with values of
our own."""


class PackedBundle(msgspec.Struct, frozen=True):
    """The files of a bundle.

    Attributes:
        name: of its folder in the store.
        files: name -> content.
        sha256: over names and contents.
    """

    name: str
    files: dict[str, bytes]
    sha256: str


def pack(bundle: Bundle) -> PackedBundle:
    """The files of a bundle as they are on the disk.

    Raises:
        StorageError: if one cannot be read.
    """
    with explained(f"read {bundle.path}"):
        files = {name: (bundle.path / name).read_bytes() for name in FILES if (bundle.path / name).is_file()}
    return PackedBundle(bundle.path.name, files, _digest(files))


def unpack(packed: PackedBundle, path: Path) -> Bundle:
    """Write the files into the folder `path`, which is a bundle then, or stays as it was.

    Raises:
        BundleError: if they are damaged, or are no bundle.
        StorageError: if there is anything else at `path`, or it cannot be written.
    """
    if unknown := sorted(packed.files.keys() - set(FILES)):
        raise BundleError(f"will not write {unknown[0]!r}", "a bundle has no such file", "build it again")
    if _digest(packed.files) != packed.sha256:
        raise BundleError(f"the files of {packed.name} are damaged", "their SHA-256 is another", "build it again")
    with building(path, FILES, is_bundle) as folder:
        for name, content in packed.files.items():
            (folder / name).write_bytes(content)
        Bundle.open(folder)
    return Bundle.open(path)


def _digest(files: dict[str, bytes]) -> str:
    whole = hashlib.sha256()
    for name, content in sorted(files.items()):
        whole.update(f"{name} {len(content)}\n".encode())
        whole.update(content)
    return whole.hexdigest()


class Arrays(msgspec.Struct, frozen=True):
    """A data set as it is sent where no name leads to it on a node.

    Attributes:
        name: of the data set.
        task: what a model of it is for.
        preprocessing: how samples are scaled.
        fingerprint: of the content.
        arrays: `PART-inputs` and `PART-targets` -> array, of each part.
    """

    name: str
    task: Task
    preprocessing: Preprocessing
    fingerprint: str
    arrays: dict[str, NDArray[Any]]

    @classmethod
    def of(cls, dataset: Dataset) -> Arrays:
        """The arrays of a data set; its groups stay, because only what judges uses them.

        Raises:
            DataError: if an array holds objects: they would have to be pickled.
        """
        arrays: dict[str, NDArray[Any]] = {}
        for part in _PARTS:
            split: Split = getattr(dataset, part)
            arrays |= {f"{part}-inputs": split.inputs, f"{part}-targets": split.targets}
        if any(array.dtype.hasobject for array in arrays.values()):
            raise DataError(
                f"cannot send {dataset.name} to other machines",
                "its arrays hold Python objects",
                "give arrays of numbers, or name data that is on each node",
            )
        return cls(dataset.name, dataset.task, dataset.preprocessing, dataset.fingerprint, arrays)

    def written(self, folder: Path) -> Dataset:
        """The data set again, its arrays in files of this folder.

        Raises:
            StorageError: if they cannot be written.
        """
        ensure_kind(self.task.kind, (self.task.kind,))  # whoever searches has run that code
        with explained(f"write {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            for name, array in self.arrays.items():
                np.save(folder / f"{name}.npy", array, allow_pickle=False)
        train, validation, test = (
            Split(self._mapped(folder, f"{part}-inputs"), self._mapped(folder, f"{part}-targets")) for part in _PARTS
        )
        return Dataset(self.name, self.task, train, validation, test, self.preprocessing, self.fingerprint)

    @staticmethod
    def _mapped(folder: Path, name: str) -> NDArray[Any]:
        # copy-on-write: what torch shares must be writable, and the file stays as it is
        array: NDArray[Any] = np.load(folder / f"{name}.npy", mmap_mode="c", allow_pickle=False)
        return array


class Facts(msgspec.Struct, frozen=True):
    """What a worker says of itself.

    Attributes:
        process: its id.
        maker: what decides the bundles that it makes.
    """

    process: int
    maker: Maker


class Order(msgspec.Struct, frozen=True):
    """One recipe to be built.

    Attributes:
        recipe: the steps.
        seed: of all that is random.
        max_drop: the accuracy budget of int8.
        trusted: factories that may be imported.
    """

    recipe: Recipe
    seed: int
    max_drop: float | None
    trusted: tuple[str, ...]


class Made(msgspec.Struct, frozen=True):
    """What a worker made of an order.

    Attributes:
        bundles: of the recipe's steps, in order, as far as it came; without those that it was given.
        seconds: that it took.
        error: why it ended early; empty where it did not.
    """

    bundles: tuple[PackedBundle, ...]
    seconds: float
    error: str = ""
