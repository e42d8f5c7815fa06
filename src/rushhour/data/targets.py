"""The meaning of targets: which arrays are labels of classes and which are values, in any of the usual forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from rushhour.data.spatial_targets import PLACES, as_places, is_class_map, read_places
from rushhour.data.token_targets import as_tags, read_tags
from rushhour.errors import DataError, TaskError
from rushhour.task import Scaling, Task, outputs_of

Kind = str
"""What a user says that targets are: one of `KINDS`, or a kind of their own, `module:Class`, that is registered."""
KINDS: Final = ("classification", "multilabel", "ranking", "regression", "segmentation", "detection", "tagging")

_FEW = 20
"""Up to so many different whole numbers are labels in any case; more are if they count from 0 or 1."""
_NAMED = 5
_LETTERS = 40
"""Of a label that is shown."""
LOST = 0.01
"""Rounding to float32 of more than this share of the standard deviation is an error."""
CONSTANT = 1e-12
"""A standard deviation of this share of the largest value, or less, is rounding of float64."""
_LARGEST = 2**53
"""From here on float64 has no fractions: whole numbers above it need not be labels."""


def read_targets(
    name: str,
    parts: Sequence[NDArray[Any]],
    *,
    classes: tuple[str, ...] | None = None,
    kind: Kind | None = None,
    known: Task | None = None,
) -> tuple[Task, list[NDArray[Any]], list[str]]:
    """The task, the targets as a `Split` has them, and notes for the user on how they were read.

    Labels are whole numbers of any type, floats among them, booleans, text, or rows with a single 1 (one-hot); each of
    shape `(n,)` or `(n, 1)`. Other rows of 0 and 1 are several labels for one sample. Whole numbers of shape `(n,
    height, width)` are class maps. All else are values.

    Args:
        name: of the data, for messages.
        parts: targets of training first, then of what is held out.
        classes: names of the labels 0, 1, ...; found in the targets by default.
        kind: what the user says they are; None: it is decided by the values.
        known: the task of the model that the data is for: labels become the numbers of its classes.

    Raises:
        DataError: if they are neither labels nor values, or not what `kind` says.
        TaskError: if there is only one class, or the model does not know a label.
    """
    if known is not None and ":" in known.kind:
        kind = known.kind
    if kind is not None and ":" in kind:
        return _own(name, [np.asarray(part) for part in parts], kind, classes, known)
    wanted = kind or (None if known is None else known.kind)
    if wanted == "tagging":
        return read_tags(name, parts, classes, known)
    if wanted in PLACES or (wanted is None and all(map(is_class_map, parts))):
        return read_places(name, parts, wanted or "segmentation", classes, known)
    targets = [_squeezed(name, part) for part in parts]
    if known is not None and known.kind == "embedding":
        known = None
    kind = kind or (None if known is None else known.kind)
    widths = [target.shape[1:] for target in targets]
    if len(set(widths)) > 1:
        raise DataError(
            f"targets of {name} have {', '.join(_width(width) for width in widths)} values in its parts",
            "the model gives the same number for every sample",
            "correct the targets",
        )
    if any(width and len(width) > 1 for width in widths):
        raise _neither(name, parts[0])
    is_text = {target.dtype.kind == "U" for target in targets}
    if len(is_text) > 1 or (is_text == {True} and (kind == "regression" or widths[0])):
        raise _neither(name, parts[0])
    if is_text != {True} and not all(np.isfinite(target).all() for target in targets):
        raise DataError(f"targets of {name} hold NaN or infinity", "nothing can be learned from them", "remove them")
    if kind is None and len(widths[0]) == 1 and all(map(_are_several, targets)):
        kind = "multilabel"
    if kind in ("multilabel", "ranking"):
        return _even(name, targets, "ranking" if kind == "ranking" else "multilabel", classes, known)
    found, notes = _labels(name, targets, kind)
    if found is None:
        _check_rounding(name, targets[0])
        values = [_float32(name, target.reshape(len(target), -1)) for target in targets]
        outputs = values[0].shape[1]
        if known is not None and known.outputs != outputs:
            raise TaskError(
                f"a target of {name} has {outputs} values",
                f"the model gives {known.outputs}",
                "correct the targets",
            )
        return known or Task("regression", outputs=outputs, scaling=Scaling.of(values[0])), values, notes
    if known is not None:
        return known, [_numbered(name, labels, known, one_hot=bool(widths[0])) for labels in found], []
    task, numbered, more = _classes(name, found, classes, len_=widths[0][0] if widths[0] else None, kind=kind)
    return task, numbered, notes + more


def _own(
    name: str, targets: list[NDArray[Any]], kind: Kind, classes: tuple[str, ...] | None, known: Task | None
) -> tuple[Task, list[NDArray[Any]], list[str]]:
    """The task of a user's own kind, which says how many outputs its targets ask for."""
    task = known or Task(kind, classes or (), outputs_of(kind, targets[0]))
    for target in targets:
        if why := task.why_wrong(target):
            raise TaskError(f"targets of {name} do not fit the task {kind}", why, "correct the targets")
    return task, targets, []


def _are_several(target: NDArray[Any]) -> bool:
    """Whether rows of 0 and 1 are several labels for one sample, and not one of several."""
    return bool(target.shape[1] > 1 and np.isin(target, (0, 1)).all()) and not _is_one_hot(target)


def _even(
    name: str,
    targets: list[NDArray[Any]],
    kind: Literal["multilabel", "ranking"],
    classes: tuple[str, ...] | None,
    known: Task | None,
) -> tuple[Task, list[NDArray[Any]], list[str]]:
    """The task of targets that are 0 or 1."""
    if not all(target.dtype.kind in "fiub" for target in targets):
        raise _neither(name, targets[0])
    values: list[NDArray[Any]] = [target.reshape(len(target), -1).astype(np.float32) for target in targets]
    width = values[0].shape[1]
    task = known or (
        Task("ranking") if kind == "ranking" else Task.multilabel(classes or tuple(map(str, range(width))))
    )
    for value in values:
        if why := task.why_wrong(value):
            raise TaskError(f"targets of {name} do not fit the task", why, "correct the targets, or --task")
    note = f"targets are rows of 0 and 1: taken as {width} labels of which any number holds; --task regression if not"
    return task, values, [note] if known is None and kind == "multilabel" else []


def strata(targets: NDArray[Any], kind: Kind | None = None) -> NDArray[Any] | None:
    """The labels of targets of any form, so that a split keeps each class in training; None for values."""
    target = np.asarray(targets)
    if kind in PLACES or kind == "tagging":
        return None
    while target.ndim > 1 and target.shape[-1] == 1:
        target = target[..., 0]
    if target.ndim == 2 and target.size and target.dtype.kind in "fiub" and _is_one_hot(target):
        columns: NDArray[np.intp] = target.argmax(axis=1)
        return columns
    is_label = target.ndim == 1 and (target.dtype.kind in "iubUS" or (target.dtype.kind == "f" and _is_whole(target)))
    if not is_label or kind == "regression":
        return None
    count = len(np.unique(target))
    return target if kind is not None or count <= _FEW or 2 * count <= len(target) else None


def of_task(name: str, task: Task, targets: NDArray[Any]) -> NDArray[Any]:
    """Targets of a data set whose task is given, in the type and shape that a `Split` has.

    Labels are positions in `task.classes`, or their names. Targets that do not fit the task in number stay: an error
    follows before training.

    Raises:
        DataError: if they cannot be labels, or values.
    """
    target = np.asarray(targets)
    if target.shape[1:] == (0,) or target.ndim == 0:
        return target
    if ":" in task.kind:  # a user's own: targets of any shape
        return target.astype(np.float32) if target.dtype.kind == "f" else target
    if task.kind == "tagging":
        return as_tags(name, target, task.classes)
    if task.kind in PLACES:
        return as_places(name, target, task.kind)
    target = _squeezed(name, target)
    if task.kind != "classification":
        if target.dtype.kind not in "fiub":
            raise _neither(name, target)
        values: NDArray[Any] = target.astype(np.float32).reshape(len(target), -1)
        return values
    if target.dtype.kind == "U":
        return _numbered(name, target, task, one_hot=False)
    if target.ndim == 2 and target.shape[1] == task.outputs and _is_one_hot(target):
        columns: NDArray[np.int64] = target.argmax(axis=1).astype(np.int64)
        return columns
    if target.dtype.kind not in "iub" and not _is_whole(target):
        raise DataError(
            f"labels of {name} are {target.dtype}",
            f"its task has {task.outputs} classes, so a label is a whole number, or the name of one",
            "convert them",
        )
    return target.astype(np.int64)


def _check_rounding(name: str, values: NDArray[Any]) -> None:
    exact = values.astype(np.float64)
    error, spread = np.abs(exact - _float32(name, values)).max(axis=0), exact.std(axis=0)
    varies = spread > CONSTANT * np.abs(exact).max(axis=0)
    if (varies & (error > LOST * spread)).any():
        raise DataError(
            f"targets of {name} cannot be kept in float32",
            f"they run from {exact.min():.6g} to {exact.max():.6g}, and rounding changes them by {error.max():.2g}",
            "subtract a constant from them",
        )


def _float32(name: str, values: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        rounded: NDArray[np.float32] = values.astype(np.float32)
    if not np.isfinite(rounded).all():
        raise DataError(
            f"targets of {name} cannot be kept in float32",
            f"they go up to {np.abs(values).max():.3g}",
            "scale them",
        )
    return rounded


def _labels(name: str, targets: list[NDArray[Any]], kind: Kind | None) -> tuple[list[NDArray[Any]] | None, list[str]]:
    """Labels as the user numbers or names them, None where the targets are values; and notes."""
    first = targets[0]
    if kind == "regression":
        return None, []
    if first.ndim == 2:
        if all(_is_one_hot(target) for target in targets):
            note = f"targets are rows with a single 1: taken as {first.shape[1]} classes; --task regression if not"
            return [target.argmax(axis=1) for target in targets], [note]
        if kind == "classification":
            raise DataError(
                f"targets of {name} have the shape {first.shape}",
                "a label is one number, or a row with a single 1",
                "give one label for each sample, or --task regression or multilabel",
            )
        if all((target >= 0).all() and np.allclose(target.sum(axis=1), 1, atol=1e-3) for target in targets):
            return None, [
                f"targets are rows that sum to 1, as probabilities do: taken as {first.shape[1]} values; to classify, "
                "give the likeliest class of each: y.argmax(1)"
            ]
        return None, []
    if first.dtype.kind in "iubU":
        return targets, []
    if not all(_is_whole(target) for target in targets):
        if kind == "classification":
            raise DataError(
                f"targets of {name} are no labels",
                "they are not all whole numbers",
                "give labels, or --task regression",
            )
        return None, []
    values = np.unique(first)
    counts_up = len(values) > 1 and np.array_equal(values, np.arange(len(values)) + (values[0] == 1))
    likely = len(values) > 1 and (
        (len(values) <= _FEW and 2 * len(values) <= len(first)) or (counts_up and 5 * len(values) <= len(first))
    )
    if kind == "classification" or likely:
        note = f"targets are whole numbers: taken as {len(values)} classes; --task regression if they are values"
        return [np.rint(target).astype(np.int64) for target in targets], [] if kind else [note]
    note = (
        f"targets are {len(values):,} different whole numbers: taken as values; --task classification if they are "
        "labels"
    )
    return None, [note] if len(values) > 1 else []


def _classes(
    name: str,
    labels: list[NDArray[Any]],
    classes: tuple[str, ...] | None,
    *,
    len_: int | None,
    kind: Kind | None,
) -> tuple[Task, list[NDArray[Any]], list[str]]:
    """The classes that training knows, and all labels as their numbers."""
    known = np.unique(labels[0])
    if classes is not None or len_ is not None:  # positions already
        task = Task.classification(classes or tuple(map(str, range(len_ or 0))))
        _check_held_out(name, labels, np.arange(task.outputs))
        return task, [label.astype(np.int64) for label in labels], []
    is_number = known.dtype.kind in "iu"
    counts_up = is_number and np.array_equal(known, np.arange(len(known)))
    if is_number and not counts_up and kind is None and len(known) > _FEW and 2 * len(known) > len(labels[0]):
        raise DataError(
            f"targets of {name} are {len(known):,} different whole numbers in {len(labels[0]):,} samples",
            "they could be labels or values",
            "use --task regression or --task classification",
        )
    names = tuple(str(label).lower() if known.dtype.kind == "b" else str(label) for label in known.tolist())
    task = Task.classification(names)
    _check_held_out(name, labels, known)
    notes = [] if counts_up else [f"labels are {_some(names)}: taken as {len(names)} classes in that order"]
    return task, [np.searchsorted(known, label).astype(np.int64) for label in labels], notes


def _check_held_out(name: str, labels: list[NDArray[Any]], known: NDArray[Any]) -> None:
    for label in labels:
        strange = np.setdiff1d(label, known)
        if not len(strange):
            continue
        if label.dtype.kind in "iu":
            raise DataError(
                f"held-out labels of {name} run from {label.min()} to {label.max()}",
                f"training knows {_some(tuple(map(str, known.tolist())))}",
                "hold out only classes that are trained",
            )
        raise DataError(
            f"held-out labels of {name} hold {strange[0]!s}",
            "no training sample has it",
            "hold out only classes that are trained",
        )


def _numbered(name: str, labels: NDArray[Any], task: Task, *, one_hot: bool) -> NDArray[np.int64]:
    """Labels as numbers of a model's classes: by their names, or else as positions."""
    if not one_hot:
        places = {each: place for place, each in enumerate(task.classes)}
        values, which = np.unique(labels, return_inverse=True)
        names = [str(value).lower() if values.dtype.kind == "b" else str(value) for value in values.tolist()]
        if all(each in places for each in names):
            numbers = np.array([places[each] for each in names], np.int64)
            return numbers[which.reshape(labels.shape)]
    if labels.dtype.kind in "iub" and len(labels) and labels.min() >= 0 and labels.max() < task.outputs:
        return labels.astype(np.int64)
    have = tuple(map(str, np.unique(labels).tolist()))
    raise TaskError(
        f"the labels of {name} are not those of the model",
        f"they are {_some(have)}, and the model knows {_some(task.classes)}",
        "give the data that it was made for",
    )


def _squeezed(name: str, targets: NDArray[Any]) -> NDArray[Any]:
    """Without trailing dimensions of 1; text as unicode."""
    target = np.asarray(targets)
    while target.ndim > 1 and target.shape[-1] == 1:
        target = target[..., 0]
    if target.dtype.kind == "O" and all(isinstance(value, str | bool | int | float) for value in target.flat):
        target = np.array(target.tolist())
    if target.dtype.kind == "S":
        target = np.char.decode(target, "utf-8", "replace")
    if target.dtype.kind not in "fiubU" or target.ndim == 0:
        raise _neither(name, targets)
    return target.astype(target.dtype.newbyteorder("="), copy=False)


def _is_whole(target: NDArray[Any]) -> bool:
    return bool((np.abs(target) < _LARGEST).all() and (target == np.rint(target)).all())


def _is_one_hot(target: NDArray[Any]) -> bool:
    numbers = target.astype(np.float64)
    return bool(((numbers == 0) | (numbers == 1)).all() and (numbers.sum(axis=1) == 1).all())


def _neither(name: str, targets: NDArray[Any]) -> DataError:
    if targets.dtype.kind == "U" and targets.ndim == 1:
        return DataError(
            f"targets of {name} are text, such as {_some(tuple(targets[:1].tolist()))!r}",
            "the task needs numbers",
            "convert them, or use --task classification",
        )
    return DataError(
        f"targets of {name} are {targets.dtype} of shape {targets.shape}",
        "labels are whole numbers, booleans or text of shape (n,), or one-hot rows; values are numbers of shape (n,) "
        "or (n, outputs)",
        "convert them; labels of tokens, (n, length), need --task tagging",
    )


def _width(width: tuple[int, ...]) -> str:
    return str(width[0]) if width else "1"


def _some(names: tuple[str, ...]) -> str:
    short = [name if len(name) <= _LETTERS else f"{name[:_LETTERS]}..." for name in (*names[:_NAMED], *names[-1:])]
    listed = ", ".join(short[: min(_NAMED, len(names))])
    return listed if len(names) <= _NAMED else f"{listed}, ... {short[-1]}"
