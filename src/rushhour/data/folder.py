"""A folder of pictures, one folder for each class; optionally with train/, validation/ and test/ above the classes."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from rushhour.data.arrays import from_splits, split
from rushhour.data.dataset import Dataset, Split
from rushhour.errors import DataError
from rushhour.machine import cores

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
    else:
        listed = {"all": _classes(folder)}
        classes = tuple(listed["all"])
    files = [file for by_class in listed.values() for pictures in by_class.values() for file in pictures]
    mode, size = _form(files, size)
    loaded = {part: _load(by_class, mode, size) for part, by_class in listed.items()}
    if "all" in loaded:
        parts = split(loaded["all"].inputs, loaded["all"].targets, seed=seed, name=folder.name)
    elif "validation" in loaded:
        parts = (loaded["train"], loaded["validation"], loaded["test"])
    else:
        order = np.random.default_rng(seed).permutation(len(loaded["train"]))
        held = max(1, len(order) // 10)
        whole = loaded["train"]
        kept, validation = order[:-held], order[-held:]
        parts = (
            Split(whole.inputs[kept], whole.targets[kept]),
            Split(whole.inputs[validation], whole.targets[validation]),
            loaded["test"],
        )
    return from_splits(folder.resolve().name, *parts, classes=classes)


def _classes(folder: Path) -> dict[str, list[Path]]:
    """Class -> its pictures, both in order of their names."""
    found: dict[str, list[Path]] = {}
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            found[entry.name] = sorted(file for file in entry.iterdir() if file.suffix.lower() in SUFFIXES)
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
        with _opened(file) as picture:
            modes.add(picture.mode in ("L", "1", "I;16"))
            size = size or (picture.height, picture.width)
    assert size is not None
    return ("L" if modes == {True} else "RGB"), size


def _load(by_class: dict[str, list[Path]], mode: str, size: tuple[int, int]) -> Split:
    files = [file for pictures in by_class.values() for file in pictures]
    labels = np.repeat(np.arange(len(by_class)), [len(pictures) for pictures in by_class.values()])

    def read(file: Path) -> NDArray[Any]:
        with _opened(file) as picture:
            converted = picture.convert(mode)
            if (converted.height, converted.width) != size:
                converted = converted.resize((size[1], size[0]), Image.Resampling.BILINEAR)
            return np.asarray(converted, dtype=np.uint8).reshape(*size, -1)

    with ThreadPoolExecutor(cores()) as pool:
        return Split(np.stack(list(pool.map(read, files))), labels.astype(np.int64))


class _opened:
    """An opened picture whose pixels are loaded; what goes wrong becomes a `DataError` that names the file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __enter__(self) -> Image.Image:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                self._image = Image.open(self._file)
                if self._image.width * self._image.height > _MAX_PIXELS:
                    raise ValueError(f"it has {self._image.width}x{self._image.height} pixels")
                self._image.load()
        except (
            OSError,
            ValueError,
            SyntaxError,
            UnidentifiedImageError,
            Image.DecompressionBombError,
            Warning,
        ) as error:
            raise DataError(
                f"cannot read the picture {self._file}", str(error), "mend it, or take it out of the folder"
            ) from error
        return self._image

    def __exit__(self, *failure: object) -> None:
        self._image.close()
