"""A folder of pictures, one folder for each class; optionally with train/, validation/ and test/ above the classes."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import msgspec

from rushhour.bundle import Decoding
from rushhour.data.arrays import from_splits
from rushhour.data.dataset import Dataset
from rushhour.data.decoded import MAX_PIXELS, PARTS, Listing, OnCorrupt, of_file, read
from rushhour.errors import DataError
from rushhour.picture import look
from rushhour.storage import explained
from rushhour.task import Task

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif"}


def load_folder(
    folder: Path,
    *,
    size: tuple[int, int] | None,
    seed: int,
    cached: Path | None = None,
    on_corrupt: OnCorrupt | None = None,
) -> Dataset:
    """The pictures below `folder` as a data set.

    Args:
        folder: `CLASS/picture.png`, split 80 / 10 / 10 by `seed`; or `train/CLASS/...`, `validation/`, `test/`.
        size: height and width that all are brought to; the first picture's by default.
        seed: of the split.
        cached: a folder for decoded pictures, where they are many: the arrays are then mapped from its files, take no
            memory of their own, and are there at once the next time. None: all in memory, decoded each time.
        on_corrupt: hears of each picture that cannot be read, which is then left out. None: that is an error.

    Raises:
        DataError: if there are no classes, a class is empty, or a picture cannot be read.
        TaskError: if there is only one class.
    """
    if not folder.is_dir():
        raise DataError(f"there is no data at {folder}", "the folder does not exist", "check the path")
    if all((folder / part).is_dir() for part in ("train", "test")):
        present = [part for part in PARTS if (folder / part).is_dir()]
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
        shape = _shape(files, size, skip=on_corrupt is not None)
        parts = read(Listing(folder, listed, shape, seed), cached, on_corrupt)
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


def _shape(files: list[Path], size: tuple[int, int] | None, *, skip: bool) -> tuple[int, int, int]:
    """The size, and one channel where all of about a hundred are grey, else three."""
    modes = set()
    for file in files[:: max(1, len(files) // 100)]:
        try:
            grey, upright = look(file, max_pixels=MAX_PIXELS)
        except DataError as error:
            if skip:
                continue
            raise of_file(error, file) from error
        modes.add(grey)
        size = size or upright
    if size is None:
        raise DataError(f"none of {len(files)} pictures can be read", f"{files[0]} is the first of them", "mend them")
    return (*size, 1 if modes == {True} else 3)
