"""Targets about places in a picture: class maps and boxes, in any of the usual forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rushhour.errors import DataError, TaskError
from rushhour.task import VOID, Task

PLACES: Final = ("segmentation", "detection")
"""The kinds of tasks that have such targets."""
_ON: Final = 255
"""In pictures of masks of two classes, what is not background is often white."""
_FEW: Final = 64
"""Labels of class maps, at most, where nobody says how many classes there are: photographs have more."""


def is_class_map(targets: NDArray[Any]) -> bool:
    """Whether these can only be class maps: whole numbers of shape `(n, height, width)`."""
    array = np.asarray(targets)
    shape = array.shape[:-1] if array.ndim == 4 and array.shape[-1] == 1 else array.shape
    return len(shape) == 3 and min(shape[1:]) > 1 and array.dtype.kind in "iub"


def read_places(
    name: str, parts: Sequence[NDArray[Any]], kind: str, classes: tuple[str, ...] | None, known: Task | None
) -> tuple[Task, list[NDArray[Any]], list[str]]:
    """As `rushhour.data.targets.read_targets`, of class maps or boxes.

    Raises:
        DataError: if they are neither.
        TaskError: if they do not fit the model's task.
    """
    if known is not None and known.kind != kind:
        raise TaskError(
            f"{name} has targets for {kind}", f"the model is for {known.kind}", "give the data that it was made for"
        )
    targets = [as_places(name, part, kind) for part in parts]
    notes: list[str] = []
    if kind == "segmentation":
        targets, notes = _without_white(targets)
    task = known or Task(kind, *_classes(name, targets, kind, classes))
    for target in targets:
        if why := task.why_wrong(target):
            raise DataError(f"the targets of {name} do not fit the task {kind}", why, "correct them")
    if known is None and kind == "segmentation":
        notes.append(f"targets are class maps of {task.outputs} classes")
    return task, targets, notes


def as_places(name: str, targets: NDArray[Any], kind: str) -> NDArray[Any]:
    """Class maps as uint8 `(n, height, width)`, or boxes as float32 `(n, boxes, 5)`.

    Raises:
        DataError: if they are neither.
    """
    target = np.asarray(targets)
    if kind == "detection":
        if target.ndim != 3 or target.shape[2] != 5 or target.dtype.kind not in "fiu":
            raise DataError(
                f"the boxes of {name} are {target.dtype} of shape {target.shape}",
                "each picture has rows of x1, y1, x2, y2 in pixels and class, -1 for no box: (n, boxes, 5)",
                "convert them",
            )
        if target.dtype.kind == "f" and not np.isfinite(target[..., 4]).all():
            raise DataError(
                f"a box of {name} has no class", "its class is NaN or infinite", "give the class, or -1 for no box"
            )
        return target.astype(np.float32)
    if target.ndim == 4 and target.shape[-1] == 1:
        target = target[..., 0]
    if target.ndim == 3 and target.dtype.kind == "f" and (target == np.rint(target)).all():
        target = target.astype(np.int64)
    if target.ndim != 3 or target.dtype.kind not in "iub":
        raise DataError(
            f"the class maps of {name} are {target.dtype} of shape {target.shape}",
            f"each pixel has one label, a whole number, {VOID} where it does not count: (n, height, width)",
            "convert them",
        )
    labels = target.astype(np.int64, copy=False) if target.dtype.kind == "i" else target
    if labels.size and (int(labels.min()) < -1 or int(labels.max()) > VOID):
        raise DataError(
            f"the class maps of {name} have labels from {labels.min()} to {labels.max()}",
            f"labels are 0 to {VOID - 1}, and {VOID} or -1 for pixels that do not count",
            "number the classes from 0",
        )
    maps: NDArray[np.uint8] = np.where(labels == -1, VOID, labels).astype(np.uint8)
    return maps


def check_places(name: str, task: Task, sample: tuple[int, ...], targets: NDArray[Any]) -> None:
    """Raise if samples are no pictures, a class map has another size than its picture, or a box lies outside of it.

    Args:
        name: of the data.
        task: whose answers are about places.
        sample: shape of one: height, width, channels.
        targets: of some samples; `(n, 0)` where there are none.

    Raises:
        DataError: if so.
    """
    if len(sample) != 3:
        raise DataError(
            f"the samples of {name} have shape {sample}",
            f"{task.kind} is of pictures: (height, width, channels)",
            "give them a dimension of channels, for example x[..., None]" if len(sample) == 2 else "give pictures",
        )
    if targets.shape[1:] == (0,):
        return
    if task.places == "map" and targets.shape[1:] != sample[:2]:
        raise DataError(
            f"the class maps of {name} have {targets.shape[1]}x{targets.shape[2]} pixels",
            f"its pictures have {sample[0]}x{sample[1]}",
            "give a label for each pixel",
        )
    if task.places == "boxes":
        _check_boxes(name, targets, sample)


def _check_boxes(name: str, targets: NDArray[Any], sample: tuple[int, ...]) -> None:
    height, width = sample[:2]
    x1, y1, x2, y2, label = np.moveaxis(targets, 2, 0)
    wrong = (label >= 0) & ((x1 < -1) | (y1 < -1) | (x2 > width + 1) | (y2 > height + 1))
    if wrong.any():
        row, box = np.argwhere(wrong)[0].tolist()
        found = ", ".join(f"{value:g}" for value in targets[row, box, :4].tolist())
        raise DataError(
            f"{int(wrong.sum())} boxes of {name} are not in their pictures",
            f"a picture has {width}x{height} pixels, and the box {found} of sample {row} leaves it",
            "give x1, y1, x2, y2 in pixels of the sample",
        )


def _without_white(targets: list[NDArray[Any]]) -> tuple[list[NDArray[Any]], list[str]]:
    """Masks of 0 and 255 alone are of two classes, and 255 is one of them."""
    values = np.unique(np.concatenate([np.unique(target) for target in targets]))
    if values.tolist() != [0, _ON]:
        return targets, []
    note = f"masks hold 0 and {_ON} alone: {_ON} is taken as the second class, not as pixels that do not count"
    return [(target == _ON).astype(np.uint8) for target in targets], [note]


def _classes(
    name: str, targets: list[NDArray[Any]], kind: str, classes: tuple[str, ...] | None
) -> tuple[tuple[str, ...], int]:
    """The names of the classes, and how many there are."""
    if classes is not None:
        return classes, len(classes)
    if kind == "detection":
        highest = max((int(target[..., 4].max()) for target in targets if target.size), default=0)
        count = max(1, highest + 1)
        return tuple(map(str, range(count))), count
    labels = np.unique(np.concatenate([np.unique(target) for target in targets]))
    labels = labels[labels != VOID]
    if len(labels) > _FEW:
        raise DataError(
            f"the class maps of {name} have {len(labels)} different labels",
            "so many are the grey values of a photograph, not classes",
            "give class maps, or name the classes",
        )
    count = max(2, int(labels.max()) + 1 if len(labels) else 0)
    return tuple(map(str, range(count))), count
