"""Arrays in a `.npz` file, and how arrays of any origin become a data set."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rushhour.bundle import Preprocessing
from rushhour.data.dataset import Dataset, Split
from rushhour.errors import DataError
from rushhour.storage import explained
from rushhour.task import Task

_ENOUGH = 8_000_000
"""Numbers to find means and deviations from; all of a large data set, as float64, would not fit into memory."""
_DAMAGED = (ValueError, TypeError, EOFError, MemoryError, RuntimeError, SyntaxError, zipfile.BadZipFile, zlib.error)
_KEYS = "x_train, y_train, x_test, y_test (x_validation, y_validation), or x and y to be split"
_PARTS = ("train", "validation", "test")


def load_npz(file: Path, *, seed: int, task: Task | None = None) -> Dataset:
    """The data set in a `.npz` file.

    Keys: `x_train`, `y_train`, `x_test`, `y_test` and, if they are there, `x_validation`, `y_validation` (else a tenth
    of train); or `x` and `y`, split 80 / 10 / 10. Integer targets are labels from 0, others are values to regress.
    Pictures are uint8 of shape `(n, height, width, channels)`; samples of a model with several inputs are a structured
    array with a field for each. Without any y the data has no labels, and only a model can say its task.

    Args:
        file: the file. It is never unpickled.
        seed: of the split.
        task: of data without labels.

    Raises:
        DataError: if it is missing, not such a file, or its arrays do not fit together.
    """
    arrays = _arrays(file)
    if not any(key.startswith("y") for key in arrays):
        arrays |= {f"y{key[1:]}": _none(x) for key, x in arrays.items() if key in ("x", *(f"x_{p}" for p in _PARTS))}
    if "x" in arrays and "y" in arrays:
        parts = split(arrays["x"], arrays["y"], seed=seed, name=file.name)
    elif {"x_train", "y_train", "x_test", "y_test"} <= arrays.keys():
        train, test = _pair(arrays, "train", file), _pair(arrays, "test", file)
        if {"x_validation", "y_validation"} <= arrays.keys():
            parts = (train, _pair(arrays, "validation", file), test)
        else:
            kept, validation = held_out(train, (0.1,), seed=seed)
            parts = (kept, validation, test)
    else:
        raise DataError(f"{file} holds {', '.join(arrays) or 'nothing'}", f"it needs {_KEYS}", "rename its arrays")
    return from_splits(file.stem, *parts, task=task)


def split(x: NDArray[Any], y: NDArray[Any], *, seed: int, name: str) -> tuple[Split, Split, Split]:
    """80 / 10 / 10 in an order given by `seed`, with as much of every class in each.

    Raises:
        DataError: if samples and targets do not match, or there are too few.
    """
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y) or len(x) < 10:
        raise DataError(
            f"{name} has samples of shape {x.shape} and targets of shape {y.shape}",
            "each sample needs one target, and a split needs at least 10",
            "mend or add data",
        )
    train, validation, test = held_out(Split(x, y), (0.1, 0.1), seed=seed)
    return train, validation, test


def held_out(whole: Split, shares: tuple[float, ...], *, seed: int) -> tuple[Split, ...]:
    """What is left of `whole`, and parts held out of it: at random, and with whole-number labels stratified.

    Args:
        whole: two samples or more for each part.
        shares: of the parts, each above 0; a part has one sample at least.
        seed: of the choice.
    """
    random = np.random.default_rng(seed)
    order = random.permutation(len(whole.inputs))
    if np.issubdtype(whole.targets.dtype, np.integer) and whole.targets.ndim == 1:
        # Samples of a class, spread evenly over 0..1: whichever stretch is cut off has its share of every class, and
        # the end that is kept has at least one of each.
        _, label, count = np.unique(whole.targets[order], return_inverse=True, return_counts=True)
        by_class = np.argsort(label, kind="stable")
        rank = np.empty(len(order))
        rank[by_class] = np.concatenate([[*(np.arange(1, n) - random.random()) / n, 1.0] for n in count])
        order = order[np.argsort(rank, kind="stable")]
    parts, at = [], 0
    for share in shares:
        end = at + max(1, round(share * len(order)))
        parts.append(order[at:end])
        at = end
    return tuple(Split(whole.inputs[rows], whole.targets[rows]) for rows in (random.permutation(order[at:]), *parts))


def from_splits(
    name: str,
    train: Split,
    validation: Split,
    test: Split,
    classes: tuple[str, ...] | None = None,
    task: Task | None = None,
) -> Dataset:
    """A data set of three parts; task and preprocessing are read off the arrays.

    Args:
        name: of the data set; turned into letters, digits and dashes.
        train: integer targets mean classification, others regression, and targets of shape `(n, 0)` nothing.
        validation: as train.
        test: as train.
        classes: the labels' names; `0`, `1`, ... by default.
        task: of data without targets; with targets they say it themselves.

    Raises:
        DataError: if the arrays do not fit each other or any task.
        TaskError: if there is only one class.
    """
    targets = [np.asarray(part.targets) for part in (train, validation, test)]
    if not all(len(target) for target in targets):
        raise DataError(f"a part of {name} is empty", "train, validation and test each need samples", "give more data")
    if not any(part.labelled for part in (train, validation, test)):
        if task is None:
            raise DataError(
                f"{name} has no labels",
                "what its samples are for cannot be seen from them, and nothing can be trained on them",
                "add y, or name a trained bundle, whose own answers are then what others are judged by",
            )
        parts = [train, validation, test]
    elif all(np.issubdtype(target.dtype, np.integer) and target.ndim == 1 for target in targets):
        task = Task.classification(classes or _label_names(name, targets))
        parts = [Split(p.inputs, t.astype(np.int64)) for p, t in zip((train, validation, test), targets, strict=True)]
    elif all(np.issubdtype(target.dtype, np.floating) and target.ndim in (1, 2) for target in targets):
        values = [target.reshape(len(target), -1).astype(np.float32) for target in targets]
        if not all(np.isfinite(value).all() for value in values):
            raise DataError(
                f"targets of {name} hold NaN or infinity", "nothing can be learned from them", "remove them"
            )
        if len({value.shape[1] for value in values}) > 1:
            raise DataError(
                f"targets of {name} have {', '.join(str(value.shape[1]) for value in values)} values in its parts",
                "the model gives the same number for every sample",
                "mend the targets",
            )
        task = Task(kind="regression", outputs=values[0].shape[1])
        parts = [Split(p.inputs, v) for p, v in zip((train, validation, test), values, strict=True)]
    else:
        raise DataError(
            f"targets of {name} are {targets[0].dtype} of shape {targets[0].shape}",
            "labels are whole numbers of shape (n,), values to regress are floats of shape (n,) or (n, outputs)",
            "convert them",
        )
    parts = [Split(_wire_ready(name, part.inputs), part.targets) for part in parts]
    return Dataset(
        name="".join(c if c.isalnum() else "-" for c in name).strip("-").lower()[:64] or "data",
        task=task,
        train=parts[0],
        validation=parts[1],
        test=parts[2],
        preprocessing=_preprocessing(parts[0].inputs),
        fingerprint=_fingerprint(parts, task),
    )


def _pair(arrays: dict[str, NDArray[Any]], part: str, file: Path) -> Split:
    x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
        raise DataError(
            f"x_{part} of {file} has the shape {x.shape}, and y_{part} {y.shape}",
            "each sample needs exactly one target",
            "mend the arrays",
        )
    return Split(x, y)


def _arrays(file: Path) -> dict[str, NDArray[Any]]:
    if not file.is_file():
        raise DataError(f"there is no data at {file}", "the file does not exist", "check the path")
    if not zipfile.is_zipfile(file):
        raise DataError(f"cannot read {file}", "it is no .npz archive, or a part of it is missing", "save it anew")
    try:
        with explained(f"read {file}"), np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except _DAMAGED as error:
        why = "it holds Python objects, which would have to be unpickled" if "pickle" in str(error) else repr(error)
        raise DataError(f"cannot read {file}", why, "save plain arrays with numpy.savez") from error


def _none(x: NDArray[Any]) -> NDArray[Any]:
    """The targets of samples that have none."""
    return np.zeros((len(x) if x.ndim else 0, 0), np.float32)


def _label_names(name: str, targets: list[NDArray[Any]]) -> tuple[str, ...]:
    known = np.unique(targets[0])
    highest = int(known[-1]) if len(known) else -1
    if len(known) and (known[0] < 0 or len(known) != highest + 1):
        missing = sorted(set(range(min(highest, 10_000))) - set(known.tolist()))[:5]
        raise DataError(
            f"labels of {name} have gaps",
            f"they run from {known[0]} to {highest}"
            + (f", but training has none of {', '.join(map(str, missing))}" if missing else ""),
            "number the classes from 0 without gaps",
        )
    for target in targets[1:]:
        if len(target) and (target.min() < 0 or target.max() > highest):
            raise DataError(
                f"held-out labels of {name} run from {target.min()} to {target.max()}",
                f"training knows 0 to {highest}",
                "hold out only classes that are trained",
            )
    return tuple(str(label) for label in known.tolist())


def _wire_ready(name: str, inputs: NDArray[Any]) -> NDArray[Any]:
    """Inputs in a type the protocol carries and torch reads: float64 becomes float32, others stay."""
    if inputs.dtype.names:
        return np.ascontiguousarray(inputs)
    if inputs.dtype == np.float64:
        inputs = inputs.astype(np.float32)
    if inputs.dtype not in (np.uint8, np.float32) or inputs.ndim < 2 or 0 in inputs.shape[1:]:
        raise DataError(
            f"samples of {name} are {inputs.dtype} of shape {inputs.shape}",
            "samples are uint8 (pictures: (n, height, width, channels)) or floats of shape (n, ...)",
            "convert them",
        )
    return np.ascontiguousarray(inputs)


def _preprocessing(inputs: NDArray[Any]) -> Preprocessing:
    """Pictures are scaled to 0..1 and normalised by channel; plain features by feature; others stay."""
    if inputs.dtype.names:
        return Preprocessing()
    some = inputs[:: max(1, min(len(inputs), inputs.size // _ENOUGH))]
    if inputs.dtype == np.uint8 and inputs.ndim == 4:
        pixels = some.reshape(-1, inputs.shape[-1]).astype(np.float64) / 255
        return Preprocessing(1 / 255, *_normal(pixels), layout="NHWC->NCHW")
    if inputs.ndim == 2:
        return Preprocessing(1.0, *_normal(some.astype(np.float64)))
    return Preprocessing(scale=1 / 255 if inputs.dtype == np.uint8 else 1.0)


def _normal(values: NDArray[np.float64]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Means and standard deviations by column, in the digits that float32 has; 1 for what never changes.

    What changes less than float32 can tell counts as never: divided by so little, its rounding would fill the scale.
    """
    with np.errstate(invalid="ignore", over="ignore"):  # a `Dataset` refuses what is no number, in words
        means, spreads = values.mean(axis=0), values.std(axis=0)
    spreads = np.where(spreads > 1e-7 * np.maximum(np.abs(means), 1e-7), spreads, 1.0)
    mean, std = (tuple(float(f"{value:.8g}") for value in column) for column in (means, spreads))
    return mean, std


def _fingerprint(parts: list[Split], task: Task) -> str:
    digest = hashlib.sha256(repr(task).encode())
    for part in parts:
        for array in (part.inputs, part.targets):
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
