"""Data in objects of other libraries: torch's `Dataset` and `DataLoader`. Every sample is read once, into arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rushhour.data.splits import PARTS
from rushhour.errors import DataError

_KINDS: Final = ("Dataset", "DataLoader")


def is_torch_data(data: Any) -> bool:
    """Whether an object is a `Dataset` or `DataLoader` of torch; recognised without importing it."""
    return not isinstance(data, type) and any(
        each.__name__ in _KINDS and each.__module__.startswith("torch.utils.data") for each in type(data).__mro__
    )


def read_torch_data(data: Any) -> dict[str, NDArray[Any]] | None:
    """The arrays in one of torch's data objects, or in a dictionary of them by part; None of anything else.

    Args:
        data: gives pairs of a sample and its target, or batches of them; a dictionary has such objects for `train`,
            `validation` and `test`, or some of them.

    Returns:
        `x` and `y`, or `x_train`, `y_train` ..., as `rushhour.data.arrays` takes them.

    Raises:
        DataError: if it gives something else, has no end, or its samples differ in shape.
    """
    if is_torch_data(data):
        x, y = _read(data, f"the {type(data).__name__}")
        return {"x": x, "y": y}
    if not isinstance(data, Mapping) or not data or not all(is_torch_data(each) for each in data.values()):
        return None
    arrays: dict[str, NDArray[Any]] = {}
    for name, each in data.items():
        if name not in PARTS:
            raise DataError(f"cannot read the part {name!r}", f"parts are {', '.join(PARTS)}", "rename it")
        arrays[f"x_{name}"], arrays[f"y_{name}"] = _read(each, name)
    return arrays


def _read(data: Any, what: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Samples and targets, in the order in which they come."""
    xs: list[NDArray[Any]] = []
    ys: list[NDArray[Any]] = []
    for x, y in _pairs(data, what):
        xs.append(x)
        ys.append(y)
    if not xs:
        raise DataError(f"{what} is empty", "it gives no sample", "give data")
    shapes = sorted({x.shape[1:] for x in xs})
    if len(shapes) > 1:
        shown = " and ".join(str(shape) for shape in shapes[:2])
        raise DataError(f"samples of {what} differ in shape", f"there are {shown}", "bring them to one shape")
    return np.concatenate(xs), np.concatenate(ys)


def _pairs(data: Any, what: str) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Batches of samples and targets."""
    is_batched = type(data).__name__ == "DataLoader" or hasattr(data, "batch_sampler")
    try:
        given = iter(data) if is_batched else (data[index] for index in range(len(data)))
        for pair in given:
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise DataError(
                    f"{what} gives a {type(pair).__name__}",
                    "a sample comes with its target: two values",
                    "return (x, y) in its __getitem__",
                )
            x, y = map(_array, pair)
            yield (x, y) if is_batched else (x[None], y[None])
    except DataError:
        raise
    except Exception as error:  # the user's code may fail in any way
        raise DataError(
            f"cannot read {what}",
            f"{type(error).__name__}: {error}",
            "correct it, or give arrays (x, y); an iterable data set needs a DataLoader",
        ) from error


def _array(value: Any) -> NDArray[Any]:
    """A tensor, picture, number or text as an array."""
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
