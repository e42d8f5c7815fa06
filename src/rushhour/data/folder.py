"""A folder of pictures, one folder for each class; optionally with train/, validation/ and test/ above the classes."""

from __future__ import annotations

import dataclasses
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np

from rushhour.bundle import Decoding
from rushhour.data.arrays import from_splits, held_out, split
from rushhour.data.dataset import Dataset, Split
from rushhour.errors import DataError
from rushhour.machine import cores
from rushhour.picture import decode, look
from rushhour.storage import explained
from rushhour.task import Task

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif"}
_MAX_PIXELS = 64_000_000
_PARTS = ("train", "validation", "test")


def load_folder(folder: Path, *, size: tuple[int, int] | None, seed: int) -> Dataset:
    """The pictures below `folder` as a data set.

    Args:
        folder: `CLASS/picture.png`, split 80 / 10 / 10 by `seed`; or `train/CLASS/...`, `validation/`, `test/`.
        size: height and width that all are brought to; the first picture's by default.
        seed: of the split.

    Raises:
        DataError: if there are no classes, a class is empty, or a picture cannot be read.
        TaskError: if there is only one class.
    """
    if not folder.is_dir():
        raise DataError(f"there is no data at {folder}", "the folder does not exist", "check the path")
    if all((folder / part).is_dir() for part in ("train", "test")):
        present = [part for part in _PARTS if (folder / part).is_dir()]
        listed = {part: _classes(folder / part) for part in present}
        classes = tuple(listed["train"])
        for part in present:
            if tuple(listed[part]) != classes:
                raise DataError(
                    f"{folder / part} has the classes {', '.join(listed[part])}",
                    f"train has {', '.join(classes)}",
                    "give every part the same classes",
                )
    elif (folder / "train").is_dir():
        raise DataError(
            f"{folder} has a folder train but no folder test",
            "a data set that is split needs train and test, and may have validation",
            "name its folders so, or put all classes side by side to have them split",
        )
    else:
        listed = {"all": _classes(folder)}
        classes = tuple(listed["all"])
    Task.classification(classes)  # one class is refused before all its pictures are read
    files = [file for by_class in listed.values() for pictures in by_class.values() for file in pictures]
    with warnings.catch_warnings():
        # Here and not around each picture: filters are the process's, and threads that set them undo each other.
        warnings.simplefilter("ignore")
        mode, size = _form(files, size)
        loaded = {part: _load(by_class, mode, size) for part, by_class in listed.items()}
    if "all" in loaded:
        parts = split(loaded["all"].inputs, loaded["all"].targets, seed=seed, name=folder.name)
    elif "validation" in loaded:
        parts = (loaded["train"], loaded["validation"], loaded["test"])
    else:
        kept, validation = held_out(loaded["train"], (0.1,), seed=seed)
        parts = (kept, validation, loaded["test"])
    data = from_splits(folder.resolve().name, *parts, classes=classes)
    return dataclasses.replace(data, preprocessing=msgspec.structs.replace(data.preprocessing, decoding=Decoding()))


def _classes(folder: Path) -> dict[str, list[Path]]:
    """Class -> its pictures, both in order of their names."""
    found: dict[str, list[Path]] = {}
    with explained(f"read {folder}"):
        for entry in sorted(folder.iterdir()):
            if entry.is_dir() and not entry.name.startswith("."):
                found[entry.name] = sorted(
                    file for file in entry.iterdir() if file.suffix.lower() in SUFFIXES and file.name[0] != "."
                )
    if not found:
        raise DataError(
            f"{folder} has no classes", "it holds no folders", f"put the pictures of each class into {folder}/CLASS/"
        )
    for name, pictures in found.items():
        if not pictures:
            raise DataError(
                f"the class {name!r} in {folder} is empty",
                f"it has no file that ends in {', '.join(sorted(SUFFIXES))}",
                "add pictures, or remove the folder",
            )
    return found


def _form(files: list[Path], size: tuple[int, int] | None) -> tuple[str, tuple[int, int]]:
    """Grey where all of the first hundred are grey, else colour; and the size."""
    modes = set()
    for file in files[:: max(1, len(files) // 100)]:
        try:
            grey, upright = look(file, max_pixels=_MAX_PIXELS)
        except DataError as error:
            raise _named(error, file) from error
        modes.add(grey)
        size = size or upright
    assert size is not None
    return ("L" if modes == {True} else "RGB"), size


def _load(by_class: dict[str, list[Path]], mode: str, size: tuple[int, int]) -> Split:
    files = [file for pictures in by_class.values() for file in pictures]
    labels = np.repeat(np.arange(len(by_class)), [len(pictures) for pictures in by_class.values()])

    pictures = np.empty((len(files), *size, 1 if mode == "L" else 3), np.uint8)

    def read(index: int) -> None:
        try:
            decode(files[index], pictures[index], max_pixels=_MAX_PIXELS)
        except DataError as error:
            raise _named(error, files[index]) from error

    with ThreadPoolExecutor(cores()) as pool:
        for _ in pool.map(read, range(len(files))):
            pass
    return Split(pictures, labels.astype(np.int64))


def _named(error: DataError, file: Path) -> DataError:
    return DataError(f"cannot read the picture {file}", error.why, "mend it, or take it out of the folder")
