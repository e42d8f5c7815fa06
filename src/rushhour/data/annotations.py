"""Pictures and their annotations: where they are in a folder, and what is asked of names and boxes."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rushhour.data.decoded import shown
from rushhour.data.probing import SUFFIXES
from rushhour.data.splits import PART_OF, Part
from rushhour.errors import DataError
from rushhour.system.storage import explained

COCO: Final = ("annotations.json", "_annotations.coco.json", "instances.json")
"""Usual names of the file of COCO's boxes."""
_OUTSIDE: Final = 2.0
"""Pixels by which a box may leave its picture: then it is cut, for annotators round."""


class Annotated(NamedTuple):
    """A picture and its annotation.

    Attributes:
        picture: its file.
        target: the file of its class map, or its boxes `(k, 5)`: x1, y1, x2, y2 in pixels of the picture, and class.
        sides: height and width that the annotation says the picture has; (0, 0) where it does not.
    """

    picture: Path
    target: Path | NDArray[np.float64]
    sides: tuple[int, int] = (0, 0)


class Annotations(NamedTuple):
    """All of a folder.

    Attributes:
        parts: part, or `all` -> its pictures.
        classes: their names; None where nobody says them.
        notes: how they were read, for the user.
    """

    parts: dict[str, list[Annotated]]
    classes: tuple[str, ...] | None
    notes: tuple[str, ...] = ()


def part_folders(folder: Path) -> dict[Part, Path]:
    """The folders of parts in a folder, by any of their usual names."""
    if not folder.is_dir():
        return {}
    with explained(f"read {shown(folder)}"):
        named = [(PART_OF.get(path.name.lower()), path) for path in sorted(folder.iterdir()) if path.is_dir()]
    return {part: path for part, path in named if part is not None}


def paired(folder: Path, beside: str) -> dict[str, list[tuple[Path, Path | None]]]:
    """Part, or `all` -> each picture below `images/`, and the file of the same stem below `beside/`, if there is one.

    Raises:
        DataError: if two pictures have the same stem, or no picture is there.
    """
    places: dict[str, tuple[Path, Path]] = {}
    for name, at in part_folders(folder).items():
        if (at / "images").is_dir():
            places[name] = at / "images", at / beside
    if not places:
        for name, at in part_folders(folder / "images").items():
            places[name] = at, folder / beside / at.name
    if not places:
        places = {"all": (folder / "images", folder / beside)}
    if len(places) == 1 and "train" in places:
        places = {"all": places["train"]}
    found: dict[str, list[tuple[Path, Path | None]]] = {}
    for part, (images, others) in places.items():
        by_stem: dict[str, Path] = {}
        for file in sorted(others.rglob("*")) if others.is_dir() else ():
            if file.is_file() and not file.name.startswith("."):
                by_stem[_stem(file, others)] = file
        pictures: dict[str, Path] = {}
        for file in sorted(images.rglob("*")):
            if file.suffix.lower() not in SUFFIXES or file.name.startswith(".") or not file.is_file():
                continue
            stem = _stem(file, images)
            if stem in pictures:
                raise DataError(
                    f"two pictures in {shown(images)} are named {stem}",
                    f"they are {shown(pictures[stem].name)} and {shown(file.name)}, and {beside}/ goes by that name",
                    "rename or remove one",
                )
            pictures[stem] = file
        if not pictures:
            raise DataError(f"{shown(images)} has no pictures", "it holds no file of a known suffix", "add pictures")
        found[part] = [(file, by_stem.get(stem)) for stem, file in pictures.items()]
    return found


def check_names(names: list[str], where: str) -> tuple[str, ...]:
    """Names of classes, if each is there once and none is empty.

    Raises:
        DataError: if not.
    """
    names = [name.strip() for name in names]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated or not all(names):
        why = f"{repeated[0]!r} is there {names.count(repeated[0])} times" if repeated else "one of them is empty"
        raise DataError(f"the classes of {where} are not clear", why, "give each class a name of its own")
    return tuple(names)


def names_in(folder: Path) -> tuple[str, ...] | None:
    """The names in `classes.txt`, one a line; None where there is no such file."""
    file = folder / "classes.txt"
    if not file.is_file():
        return None
    with explained(f"read {shown(file)}"):
        lines = file.read_text("utf-8-sig", errors="replace").splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    return check_names(lines, shown(file))


def inside(boxes: NDArray[np.float64], sides: tuple[int, int], where: str) -> NDArray[np.float64]:
    """Boxes cut at the border of their picture.

    Args:
        boxes: `(k, 5)` in pixels.
        sides: height and width of the picture.
        where: the boxes are from, for messages.

    Raises:
        DataError: if one leaves it by more than rounding.
    """
    height, width = sides
    low, high = boxes[:, :2], boxes[:, 2:4]
    limits = np.array([width, height], np.float64)
    outside = (low < -_OUTSIDE).any(axis=1) | (high > limits + _OUTSIDE).any(axis=1) | ~np.isfinite(boxes).all(axis=1)
    if outside.any():
        box = ", ".join(f"{value:g}" for value in boxes[outside][0, :4].tolist())
        raise DataError(
            f"a box of {where} is not in its picture",
            f"the picture has {width}x{height} pixels, and the box is {box}",
            "correct it, or leave it out",
        )
    cut: NDArray[np.float64] = np.concatenate([low.clip(0), np.minimum(high, limits), boxes[:, 4:]], axis=1)
    kept: NDArray[np.float64] = cut[((cut[:, 2:4] - cut[:, :2]) > 0).all(axis=1)]
    return kept


def _stem(file: Path, folder: Path) -> str:
    return file.relative_to(folder).with_suffix("").as_posix()
