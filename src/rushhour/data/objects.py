"""Data in objects of torch, TensorFlow and Keras. Every sample is read once, into arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rushhour.bundle import described, joined
from rushhour.data.splits import PARTS
from rushhour.errors import DataError

_BASES: Final = {
    "torch.utils.data": ("Dataset", "DataLoader"),
    "tensorflow.": ("DatasetV2",),
    "keras.": ("PyDataset", "Sequence"),
}
"""Package -> classes whose objects give data. Recognised by these names, without importing any of them."""
_ENDLESS: Final = -1
"""What `cardinality()` of a `tf.data.Dataset` says after `repeat()`."""


def is_data_object(data: Any) -> bool:
    """Whether an object is a `Dataset` or `DataLoader` of torch, a `tf.data.Dataset`, or a `PyDataset` of Keras."""
    return not isinstance(data, type) and bool(_package(data))


def read_data_object(data: Any) -> dict[str, NDArray[Any]] | None:
    """The arrays in an object that gives data, or in a dictionary of them by part; None of anything else.

    Args:
        data: gives pairs of a sample and its target, or batches of them; a sample of several inputs is a dictionary. Or
            a dictionary that has such objects for `train`, `validation` and `test`, or some of them.

    Returns:
        `x` and `y`, or `x_train`, `y_train` ..., as `rushhour.data.arrays` takes them.

    Raises:
        DataError: if it gives something else, has no end, or its samples differ in shape.
    """
    if is_data_object(data):
        x, y = _read(data, f"the {type(data).__name__}")
        return {"x": x, "y": y}
    if not isinstance(data, Mapping) or not data or not all(is_data_object(each) for each in data.values()):
        return None
    arrays: dict[str, NDArray[Any]] = {}
    for name, each in data.items():
        if name not in PARTS:
            raise DataError(f"cannot read the part {name!r}", f"parts are {', '.join(PARTS)}", "rename it")
        arrays[f"x_{name}"], arrays[f"y_{name}"] = _read(each, name)
    return arrays


def _package(data: Any) -> str:
    """Whose object it is: a key of `_BASES`; empty of anything else."""
    for each in type(data).__mro__:
        for package, names in _BASES.items():
            if each.__name__ in names and f"{each.__module__}.".startswith(package):
                return package
    return ""


def _read(data: Any, what: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Samples and targets, in the order in which they come."""
    xs: list[NDArray[Any]] = []
    ys: list[NDArray[Any]] = []
    for x, y in _pairs(data, what):
        xs.append(x)
        ys.append(y)
    if not xs:
        raise DataError(f"{what} is empty", "it gives no sample", "give data")
    shapes = sorted({described(x) if x.dtype.names else str(x.shape[1:]) for x in xs})
    if len(shapes) > 1:
        shown = " and ".join(shapes[:2])
        raise DataError(f"samples of {what} differ in shape", f"there are {shown}", "bring them to one shape")
    return np.concatenate(xs), np.concatenate(ys)


def _pairs(data: Any, what: str) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Batches of samples and targets."""
    package = _package(data)
    try:
        if package == "tensorflow.":
            given: Iterator[Any] = _of_tensorflow(data, what)
            is_batched = _is_batched(data.element_spec)
        elif type(data).__name__ == "DataLoader" or hasattr(data, "batch_sampler"):
            given, is_batched = iter(data), True
        else:
            given, is_batched = (data[index] for index in range(len(data))), package == "keras."
        for pair in given:
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise DataError(
                    f"{what} gives a {type(pair).__name__}",
                    "a sample comes with its target: two values",
                    "give (x, y)" if package == "tensorflow." else "return (x, y) in its __getitem__",
                )
            inputs, y = pair[0] if isinstance(pair[0], Mapping) else {"x": pair[0]}, _array(pair[1])
            columns = {name: _array(value) for name, value in inputs.items()}
            if is_batched is None:
                is_batched = bool(y.ndim) and all(x.ndim and len(x) == len(y) for x in columns.values())
            if not is_batched:
                columns, y = {name: x[None] for name, x in columns.items()}, y[None]
            yield joined(columns), y
    except DataError:
        raise
    except Exception as error:  # the user's code may fail in any way
        raise DataError(
            f"cannot read {what}",
            f"{type(error).__name__}: {error}",
            "correct it, or give arrays (x, y); an iterable data set needs a DataLoader",
        ) from error


def _of_tensorflow(data: Any, what: str) -> Iterator[Any]:
    if int(data.cardinality()) == _ENDLESS:
        raise DataError(f"{what} has no end", "it repeats for ever", "leave out repeat(), or end it with take(n)")
    return iter(data.as_numpy_iterator())


def _is_batched(spec: Any) -> bool | None:
    """Whether elements of a `tf.data.Dataset` are batches: their first sizes are open, or that of x and y is one; None
    where it does not say.

    A target of one number is that of one sample. Else the sizes decide: one-hot targets are as long as there are
    classes, and a sample is hardly as long as that by chance.
    """
    if not isinstance(spec, tuple | list) or len(spec) != 2:
        return False
    x, y = (getattr(each, "shape", None) for each in spec)
    if x is None or y is None or x.rank is None or y.rank is None:
        return None  # `from_generator` with types alone
    return bool(x.rank and y.rank and x[0] == y[0])


def _array(value: Any) -> NDArray[Any]:
    """A tensor, picture, number or text as an array."""
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
