"""A folder of pictures with what is known of their places: class maps, or boxes.

- `images/` and `masks/`: a class map for each picture, in a file of the same stem.
- `images/` and `labels/`: boxes as YOLO has them, in a text file of the same stem; names in `data.yaml` or
  `classes.txt`.
- `annotations.json` beside the pictures, or the folders that its file names say: boxes as COCO has them.

Each may be in folders for the parts: `train/images/`, or `images/train/`. A picture belongs to a group, such as the
drive that it is of, where `groups.csv` says so: the picture's file name or stem, and the group, in each line.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from rushhour.bundle import Bundle
from rushhour.data.annotations import COCO, Annotated, inside, part_folders
from rushhour.data.arrays import from_arrays
from rushhour.data.boxes import read_coco, read_yolo
from rushhour.data.dataset import Dataset, Files
from rushhour.data.decoded import MAX_PIXELS, OnCorrupt, OnDecoded, shown
from rushhour.data.masks import read_masks
from rushhour.data.probing import decoding_of, probed, shape_of
from rushhour.errors import DataError
from rushhour.picture import PictureInfo, decode, decode_labels
from rushhour.system.machine import cores
from rushhour.system.storage import explained
from rushhour.task import Task

Form = Literal["masks", "labels", "coco"]
_BESIDE: Final = {"masks": "segmentation", "labels": "detection", "coco": "detection"}
LARGEST_SIDE: Final = 384
"""Of samples, where no size is given: places need more pixels than a class of the whole picture."""
_GROUPS: Final = "groups.csv"
_NEVER: Final = 4_000_000_000
"""Bytes of decoded samples that are not tried."""

BeforeReading = Callable[[Task, tuple[int, ...]], None]


def form_of(folder: Path) -> Form | None:
    """Which annotations a folder has; None where it has none of these."""
    for at in (folder, *part_folders(folder).values()):
        if (at / "images").is_dir():
            for form in ("masks", "labels"):
                if (at / form).is_dir():
                    return "masks" if form == "masks" else "labels"
        if any((at / name).is_file() for name in COCO):
            return "coco"
    return None


def load_annotated(
    folder: Path,
    form: Form,
    *,
    size: tuple[int, int] | None,
    seed: int,
    on_corrupt: OnCorrupt | None = None,
    bundle: Bundle | None = None,
    before_reading: BeforeReading | None = None,
    on_decoded: OnDecoded | None = None,
) -> Dataset:
    """The pictures below `folder` with their class maps or boxes as a data set, split as `rushhour.data.arrays` does.

    Args:
        folder: see the module.
        form: of its annotations, as `form_of` found.
        size: height and width of the samples. By default that of the pictures if all are equal, else the median, at
            most 384. Class maps and boxes are brought to it too.
        seed: of the split.
        on_corrupt: see `OnCorrupt`. None: a picture that cannot be read is an error.
        bundle: a model that the data is for.
        before_reading: called with the task and the sample shape before all pictures are decoded.
        on_decoded: see `OnDecoded`.

    Raises:
        DataError: if a picture has no annotation, or one that does not fit it.
        TaskError: if the model has other classes.
    """
    found = {"masks": read_masks, "labels": read_yolo, "coco": read_coco}[form](folder)
    every = [one for part in found.parts.values() for one in part]
    if not every:
        raise DataError(f"{shown(folder)} has no pictures with annotations", "nothing can be learnt", "add some")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        headers = probed([one.picture for one in every])
        shape = shape_of(headers, size, square=False, bundle=bundle, folder=folder, largest=LARGEST_SIDE)
        if math.prod(shape) * len(every) > _NEVER:
            raise DataError(
                f"{shown(folder)} has {len(every):,} pictures",
                f"decoded to {shape[0]}x{shape[1]} they take {math.prod(shape) * len(every) / 1e9:.0f} GB of memory",
                "make them smaller with --size",
            )
        if before_reading is not None and found.classes is not None:
            before_reading(Task(_BESIDE[form], found.classes, len(found.classes)), shape)
        decoding, _ = decoding_of(headers, bundle)
        pixels = np.empty((len(every), *shape), np.uint8)
        targets, seen, corrupt = _read(every, pixels, decoding, on_corrupt, on_decoded)
    names = iter(range(len(every)))
    groups = _groups(folder, every)
    given: dict[str, NDArray[Any]] = {}
    for part, pictures in found.parts.items():
        rows = [row for row, _ in zip(names, pictures, strict=False) if row not in corrupt]
        end = "" if part == "all" else f"_{part}"
        given[f"x{end}"] = pixels[rows]
        given[f"y{end}"] = stacked([targets[row] for row in rows])
        if groups is not None:
            given[f"groups{end}"] = groups[rows]
    data = from_arrays(
        given,
        name=folder.resolve().name,
        source=shown(folder),
        seed=seed,
        task=None if bundle is None else bundle.manifest.task,
        kind=_BESIDE[form],
        classes=classes_for(folder, found.classes, bundle),
    )
    left_out = {"unreadable": len(corrupt)} if corrupt else {}
    return dataclasses.replace(
        data,
        preprocessing=msgspec.structs.replace(data.preprocessing, decoding=decoding),
        notes=(*found.notes, *_changes(seen, shape, size), *data.notes),
        files=Files(len(every), len(every) - len(corrupt), left_out),
    )


def classes_for(source: Path, names: tuple[str, ...] | None, bundle: Bundle | None) -> tuple[str, ...] | None:
    """The names, if the model has the same."""
    known = None if bundle is None else bundle.manifest.task.classes
    if known and names is not None and names != known:
        raise DataError(
            f"{shown(source)} has the classes {', '.join(names[:5])}",
            f"the model has {', '.join(known[:5])}",
            "give the data that it was made for, with its classes in the same order",
        )
    return names


def _read(
    every: list[Annotated],
    pixels: NDArray[np.uint8],
    decoding: Any,
    on_corrupt: OnCorrupt | None,
    on_decoded: OnDecoded | None,
) -> tuple[list[NDArray[Any]], list[PictureInfo | None], set[int]]:
    """Decode all pictures, and bring their annotations to the size of the samples."""

    def one(row: int) -> tuple[NDArray[Any], PictureInfo | None, DataError | None]:
        picture = every[row].picture
        try:
            if not picture.stat().st_size:
                raise DataError("the picture cannot be read", "it is empty", "remove it, or save it again")
            with picture.open("rb") as stream:
                seen = decode(stream, pixels[row], max_pixels=MAX_PIXELS, decoding=decoding)
        except OSError as error:
            why = error.strerror or str(error)
            return np.empty(0), None, DataError(f"cannot read {shown(picture)}", why, "check it")
        except DataError as error:
            return np.empty(0), None, DataError(f"cannot read {shown(picture)}", error.why, "repair or remove it")
        return target_of(every[row], seen, pixels.shape[1:3]), seen, None

    targets: list[NDArray[Any]] = []
    seen: list[PictureInfo | None] = []
    corrupt: set[int] = set()
    with ThreadPoolExecutor(cores()) as pool:
        for row, (target, info, error) in enumerate(pool.map(one, range(len(every)))):
            if error is not None:
                if on_corrupt is None:
                    raise error
                on_corrupt(error)
                corrupt.add(row)
            targets.append(target)
            seen.append(info)
            if on_decoded is not None and ((row + 1) % 16 == 0 or row + 1 == len(every)):
                on_decoded(row + 1, len(every))
    return targets, seen, corrupt


def target_of(one: Annotated, seen: PictureInfo, sample: tuple[int, ...]) -> NDArray[Any]:
    """The class map or the boxes of a picture, in pixels of its sample."""
    sides = (seen.height, seen.width)
    if one.sides not in ((0, 0), sides):
        raise DataError(
            f"the boxes of {shown(one.picture)} are of another picture",
            f"they are for {one.sides[1]}x{one.sides[0]} pixels, and it has {sides[1]}x{sides[0]}",
            "annotate the picture as it is",
        )
    if isinstance(one.target, Path):
        return _mask(one.target, one.picture, sides, sample)
    boxes = inside(one.target, sides, shown(one.picture))
    scale = np.array([sample[1] / sides[1], sample[0] / sides[0]] * 2 + [1.0])
    scaled: NDArray[np.float32] = (boxes * scale).astype(np.float32)
    return scaled


def _mask(file: Path, picture: Path, sides: tuple[int, int], sample: tuple[int, ...]) -> NDArray[np.uint8]:
    try:
        labels = decode_labels(file, max_pixels=MAX_PIXELS)
    except DataError as error:
        raise DataError(
            f"{shown(file)} is no class map", error.why, "save it as PNG with a label for each pixel"
        ) from None
    if labels.shape != sides:
        raise DataError(
            f"the class map {shown(file)} does not fit its picture",
            f"it has {labels.shape[1]}x{labels.shape[0]} pixels, and {shown(picture.name)} has {sides[1]}x{sides[0]}",
            "give a label for each pixel of the picture",
        )
    rows, columns = (
        ((np.arange(wanted) + 0.5) * (given / wanted)).astype(np.intp)
        for wanted, given in zip(sample, sides, strict=False)
    )
    return labels[rows][:, columns]


def stacked(targets: list[NDArray[Any]]) -> NDArray[Any]:
    """Class maps `(n, height, width)`; or boxes `(n, most, 5)`, with class -1 behind the last."""
    if targets and targets[0].ndim == 2 and targets[0].dtype == np.uint8:
        return np.stack(targets)
    stacked = np.zeros((len(targets), max([1, *map(len, targets)]), 5), np.float32)
    stacked[..., 4] = -1
    for row, boxes in enumerate(targets):
        stacked[row, : len(boxes)] = boxes
    return stacked


def _groups(folder: Path, every: list[Annotated]) -> NDArray[Any] | None:
    """The group of each picture, as `groups.csv` says; None where there is no such file."""
    file = folder / _GROUPS
    if not file.is_file():
        return None
    named: dict[str, str] = {}
    with explained(f"read {shown(file)}"), file.open(encoding="utf-8-sig", newline="") as stream:
        for row in csv.reader(stream):
            if len(row) < 2:
                continue
            picture, group = row[0].strip(), row[1].strip()
            if named.setdefault(picture, group) != group:
                raise DataError(
                    f"{shown(file)} has two groups for {shown(picture)}",
                    f"they are {shown(named[picture])} and {shown(group)}, and a picture is in one part only",
                    "keep one line for each picture",
                )
    found = [named.get(one.picture.name, named.get(one.picture.stem, "")) for one in every]
    if "" in found:
        missing = every[found.index("")].picture.name
        raise DataError(
            f"{shown(file)} has no group for {shown(missing)}",
            f"{found.count('')} of {len(every)} pictures are not in it",
            "add a line `picture,group` for each",
        )
    return np.array(found)


def _changes(seen: list[PictureInfo | None], shape: tuple[int, ...], size: tuple[int, int] | None) -> list[str]:
    height, width = shape[:2]
    resized = sum(1 for one in seen if one is not None and (one.height, one.width) != (height, width))
    if not resized or size is not None:
        return []
    return [
        f"{resized:,} of {len(seen):,} pictures have another size than {height}x{width} (height x width): they are "
        "resized to it, with their annotations; --size HxW sets another"
    ]
