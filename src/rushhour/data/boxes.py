"""Boxes in files: as COCO has them, and as YOLO has them."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Annotated as Bounded
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from rushhour.data.annotations import COCO, Annotated, Annotations, check_names, names_in, paired, part_folders
from rushhour.data.decoded import MAX_PIXELS, shown
from rushhour.errors import DataError
from rushhour.picture import inspect_picture
from rushhour.system.storage import explained

_LARGEST: Final = 2_000_000_000
"""Bytes of a file of annotations."""
_NUMBER = Bounded[int, msgspec.Meta(ge=0)]


class _Image(msgspec.Struct):
    id: int | str
    file_name: str = ""
    width: _NUMBER = 0
    height: _NUMBER = 0
    frame: _NUMBER | None = None
    split: str | None = None


class _Box(msgspec.Struct):
    image_id: int | str
    category_id: int
    bbox: Bounded[list[float], msgspec.Meta(min_length=4, max_length=4)]
    iscrowd: int = 0


class _Category(msgspec.Struct):
    id: int
    name: str


class Coco(msgspec.Struct):
    """What is read of a file of COCO's: https://cocodataset.org/#format-data."""

    images: list[_Image]
    annotations: list[_Box]
    categories: list[_Category]


class Boxes(msgspec.Struct):
    """The boxes of a file of COCO's, by picture.

    Attributes:
        images: as the file lists them.
        boxes: of each, `(k, 5)`: x1, y1, x2, y2 and class.
        classes: their names.
        notes: what was left out.
    """

    images: list[_Image]
    boxes: list[NDArray[np.float64]]
    classes: tuple[str, ...]
    notes: tuple[str, ...]


def read_boxes(file: Path) -> Boxes:
    """The boxes of one file of COCO's.

    Raises:
        DataError: if it is no such file, or contradicts itself.
    """
    with explained(f"read {shown(file)}"):
        if file.stat().st_size > _LARGEST:
            raise DataError(f"{shown(file)} is too large", f"it has more than {_LARGEST:,} bytes", "split it")
        content = file.read_bytes()
    try:
        coco = msgspec.json.decode(content, type=Coco)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"{shown(file)} holds no boxes as COCO has them",
            str(error),
            "give images, annotations and categories: see https://cocodataset.org/#format-data",
        ) from None
    known = {category.id: place for place, category in enumerate(sorted(coco.categories, key=lambda each: each.id))}
    names = [category.name for category in sorted(coco.categories, key=lambda each: each.id)]
    classes = check_names(names, shown(file))
    if len(known) < len(names) or not names:
        raise DataError(
            f"the categories of {shown(file)} are not clear", "two have one id, or there are none", "correct"
        )
    places = {image.id: place for place, image in enumerate(coco.images)}
    if len(places) < len(coco.images):
        raise DataError(f"two images of {shown(file)} have the same id", "boxes belong to one of them", "renumber them")
    by_image: list[list[list[float]]] = [[] for _ in coco.images]
    left_out: Counter[str] = Counter()
    for box in coco.annotations:
        x, y, width, height = box.bbox
        if box.image_id not in places or box.category_id not in known:
            what = f"image {box.image_id}" if box.image_id not in places else f"category {box.category_id}"
            raise DataError(f"a box in {shown(file)} is of {what}", "the file has no such", "correct it")
        if box.iscrowd:
            left_out["around crowds"] += 1
        elif not (width > 0 and height > 0):
            left_out["without area"] += 1
        else:
            by_image[places[box.image_id]].append([x, y, x + width, y + height, known[box.category_id]])
    boxes = [np.array(each, np.float64).reshape(-1, 5) for each in by_image]
    return Boxes(coco.images, boxes, classes, _left_out(left_out, file))


def read_coco(folder: Path) -> Annotations:
    """The pictures of a folder with the boxes of its file of COCO's, or of those of its parts.

    Raises:
        DataError: if a file is none of COCO's, a picture is missing, or the parts have other classes.
    """
    places: dict[str, Path] = {part: path for part, path in part_folders(folder).items() if _file_in(path)}
    if not places or _file_in(folder):
        places = {"all": folder}
    if len(places) == 1 and "train" in places:
        places = {"all": places["train"]}
    parts: dict[str, list[Annotated]] = {}
    classes: tuple[str, ...] = ()
    notes: list[str] = []
    for part, at in places.items():
        file = _file_in(at)
        assert file is not None
        found = read_boxes(file)
        if classes and found.classes != classes:
            raise DataError(
                f"{shown(file)} has the classes {', '.join(found.classes[:5])}",
                f"another part has {', '.join(classes[:5])}",
                "give every part the same classes",
            )
        classes = found.classes
        notes += found.notes
        parts[part] = [
            Annotated(_picture(at, image.file_name, file), boxes, (image.height, image.width))
            for image, boxes in zip(found.images, found.boxes, strict=True)
        ]
    notes += _empty(parts)
    return Annotations(parts, classes, tuple(notes))


def read_yolo(folder: Path) -> Annotations:
    """The pictures of a folder with the boxes in text files: class, middle and size as shares of the picture's.

    A picture without a file has no boxes.

    Raises:
        DataError: if a file cannot be read so, or there are no names.
    """
    classes = names_in(folder) or names_in(folder / "labels") or _names_of_yaml(folder)
    parts: dict[str, list[Annotated]] = {}
    left_out: Counter[str] = Counter()
    for part, pairs in paired(folder, "labels").items():
        parts[part] = [
            Annotated(picture, np.zeros((0, 5)) if file is None else _of_text(file, picture, classes, left_out))
            for picture, file in pairs
        ]
    return Annotations(parts, classes, (*_left_out(left_out, folder / "labels"), *_empty(parts)))


def _of_text(file: Path, picture: Path, classes: tuple[str, ...], left_out: Counter[str]) -> NDArray[np.float64]:
    with explained(f"read {shown(file)}"):
        lines = file.read_text("utf-8-sig", errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        fields = line.split()
        if not fields:
            continue
        try:
            label, *shares = (float(field) for field in fields)
            if len(shares) != 4 or label != int(label):
                raise ValueError
        except (ValueError, OverflowError):
            raise DataError(
                f"line {number} of {shown(file)} is no box",
                f"it is {line[:60]!r}",
                "write class, x, y, width and height, of which the last four are shares of the picture's sides",
            ) from None
        x, y, width, height = shares
        if not (0 <= label < len(classes)):
            raise DataError(
                f"line {number} of {shown(file)} has the class {label:g}",
                f"there are {len(classes)}: {', '.join(classes[:5])}",
                "correct it, or add its name",
            )
        if width <= 0 or height <= 0:
            left_out["without area"] += 1
            continue
        if not (x - width / 2 >= -0.01 and x + width / 2 <= 1.01 and -0.01 <= y - height / 2 <= y + height / 2 <= 1.01):
            raise DataError(
                f"the box in line {number} of {shown(file)} is not in its picture",
                f"it goes from {x - width / 2:g}, {y - height / 2:g} to {x + width / 2:g}, {y + height / 2:g}, and the "
                "picture from 0 to 1",
                "give shares of the picture's sides",
            )
        rows.append([*(np.clip([x - width / 2, y - height / 2, x + width / 2, y + height / 2], 0, 1)), label])
    shares_ = np.array(rows, np.float64).reshape(-1, 5)
    if not len(shares_):
        return shares_
    info = inspect_picture(picture, max_pixels=MAX_PIXELS)
    return shares_ * [info.width, info.height, info.width, info.height, 1]


def _names_of_yaml(folder: Path) -> tuple[str, ...]:
    """The names in `data.yaml`: a list in brackets, a list of dashes, or numbers with names."""
    file = next(
        (at for at in (folder / "data.yaml", folder / "data.yml", folder / "dataset.yaml") if at.is_file()), None
    )
    if file is None:
        raise DataError(
            f"{shown(folder)} does not say the names of its classes",
            "it has neither classes.txt nor data.yaml",
            "add classes.txt, one name a line",
        )
    with explained(f"read {shown(file)}"):
        text = file.read_text("utf-8-sig", errors="replace")
    block = re.search(r"^names\s*:[ \t]*(\[.*?\]|(?:\s*\n(?:[ \t]*(?:-|\d+\s*:).*(?:\n|$))+))", text, re.M | re.S)
    found: list[str] = []
    if block is not None and block[1].startswith("["):
        found = [name.strip().strip("'\"") for name in block[1][1:-1].split(",") if name.strip()]
    elif block is not None:
        lines = re.findall(r"^[ \t]*(?:-|\d+\s*:)[ \t]*(.*?)[ \t]*$", block[1], re.M)
        found = [line.split(" #")[0].strip().strip("'\"") for line in lines]
    if not found:
        raise DataError(
            f"{shown(file)} does not say the names of the classes",
            "it has no list `names`",
            "add it, or classes.txt with one name a line",
        )
    return check_names(found, shown(file))


def _file_in(folder: Path) -> Path | None:
    return next((folder / name for name in COCO if (folder / name).is_file()), None)


def _picture(folder: Path, name: str, file: Path) -> Path:
    """The picture of a name in a file of COCO's, beside it or below `images/`."""
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"{shown(file)} names the picture {name!r}", "it must lie below the same folder", "correct it")
    for at in (folder / name, folder / "images" / name):
        if at.is_file():
            return at
    raise DataError(
        f"{shown(file)} names the picture {name}", f"{shown(folder)} has no such file", "add it, or remove its entry"
    )


def _empty(parts: dict[str, list[Annotated]]) -> list[str]:
    every = [one for part in parts.values() for one in part]
    empty = sum(1 for one in every if not isinstance(one.target, Path) and not len(one.target))
    return [f"{empty:,} of {len(every):,} pictures have no boxes: nothing is to be found in them"] if empty else []


def _left_out(left_out: Counter[str], file: Path) -> tuple[str, ...]:
    if not left_out:
        return ()
    which = ", ".join(f"{reason} {count:,}" for reason, count in left_out.items())
    return (f"boxes of {shown(file.name)} left out: {which}",)
