"""Targets for each token of a sequence: labels as numbers or names, in any of the usual forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rushhour.errors import DataError, TaskError
from rushhour.task import PADDING, Task

_MOST: Final = 255
"""Classes: an answer is uint8."""
_FOREIGN: Final = -100
"""The label of tokens that do not count where torch and Hugging Face made the targets."""


def read_tags(
    name: str, parts: Sequence[NDArray[Any]], classes: tuple[str, ...] | None, known: Task | None
) -> tuple[Task, list[NDArray[Any]], list[str]]:
    """As `rushhour.data.targets.read_targets`, of labels of tokens.

    Raises:
        DataError: if they are none.
        TaskError: if they do not fit the model's task.
    """
    if known is not None and known.kind != "tagging":
        raise TaskError(
            f"{name} has a label for each token", f"the model is for {known.kind}", "give the data that it was made for"
        )
    names = classes if known is None else known.classes
    arrays = [np.asarray(part) for part in parts]
    if names is None:
        names = _names(arrays[0])
    targets = [as_tags(name, array, names) for array in arrays]
    if not 2 <= len(names) <= _MOST:
        raise DataError(
            f"the labels of {name} have {len(names)} classes", f"2 to {_MOST} can be told apart", "merge or add some"
        )
    task = known or Task("tagging", names, len(names))
    for target in targets:
        if why := task.why_wrong(target):
            raise DataError(f"the targets of {name} do not fit the task tagging", why, "correct them")
    return task, targets, [] if known is not None else [f"each token has one of {len(names)} classes"]


def as_tags(name: str, targets: NDArray[Any], classes: tuple[str, ...]) -> NDArray[np.int64]:
    """Labels as int64 `(n, length)`, `PADDING` where a token does not count.

    Args:
        name: of the data.
        targets: numbers, -1 or -100 for tokens that do not count; or names of classes, empty for these.
        classes: the names, in the order of the numbers.

    Raises:
        DataError: if they are no labels.
    """
    target = _plain(targets)
    if target.ndim == 2 and target.dtype.kind == "U":
        places = {"": PADDING, **{each: place for place, each in enumerate(classes)}}
        values, which = np.unique(target, return_inverse=True)
        if strange := [str(each) for each in values.tolist() if each not in places]:
            raise DataError(
                f"tokens of {name} have the label {strange[0]!r}",
                "no token of the training part has it",
                "hold out only classes that are trained, or name the classes",
            )
        return np.array([places[each] for each in values.tolist()], np.int64)[which.reshape(target.shape)]
    if target.ndim == 2 and target.dtype.kind == "f" and (target == np.rint(target)).all():
        target = target.astype(np.int64)
    if target.ndim != 2 or target.dtype.kind not in "iub":
        raise DataError(
            f"the labels of the tokens of {name} are {target.dtype} of shape {target.shape}",
            f"each token has one, a whole number or a name; {PADDING} or '' where it does not count: (n, length)",
            "convert them, and pad shorter sequences",
        )
    labels: NDArray[np.int64] = target.astype(np.int64)
    return np.where(labels == _FOREIGN, PADDING, labels)


def check_tags(name: str, sample: tuple[int, ...], targets: NDArray[Any]) -> None:
    """Raise unless samples are sequences with a label for each token.

    Args:
        name: of the data.
        sample: shape of one: length, and features where there are some.
        targets: of some samples; `(n, 0)` where there are none.

    Raises:
        DataError: if they are not.
    """
    if len(sample) not in (1, 2):
        raise DataError(
            f"the samples of {name} have shape {sample}",
            "tagging is of sequences: (length,) of ids, or (length, features)",
            "give sequences, or --task segmentation for pictures",
        )
    if targets.shape[1:] not in ((0,), sample[:1]):
        raise DataError(
            f"the sequences of {name} have {sample[0]} tokens", f"and {targets.shape[1]} labels each",
            "give a label for each token, and pad both alike",
        )  # fmt: skip


def _plain(targets: NDArray[Any]) -> NDArray[Any]:
    target = np.asarray(targets)
    if target.ndim == 3 and target.shape[-1] == 1:
        target = target[..., 0]
    if target.dtype.kind == "O" and all(isinstance(value, str) for value in target.flat):
        target = target.astype(str)
    return np.char.decode(target, "utf-8", "replace") if target.dtype.kind == "S" else target


def _names(targets: NDArray[Any]) -> tuple[str, ...]:
    """Of the training part: as they are called, or else the numbers."""
    target = _plain(targets)
    if target.dtype.kind == "U":
        return tuple(str(each) for each in np.unique(target).tolist() if each)
    highest = int(target.max()) if target.size and target.dtype.kind in "iubf" else 0
    return tuple(map(str, range(max(2, min(highest, _MOST) + 1))))
