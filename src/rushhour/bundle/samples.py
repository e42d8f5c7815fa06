"""Samples of a model with several inputs: a structured array of shape `(n,)`, with a field for each input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def columns_of(samples: NDArray[Any]) -> list[NDArray[Any]]:
    """An array `(n, *shape)` for each input: the samples themselves, or the fields of a structured array, copied."""
    return [np.ascontiguousarray(samples[name]) for name in samples.dtype.names or ()] or [samples]


def joined(columns: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """The samples of an array `(n, *shape)` for each input, by name, in this order; a single one as it is."""
    if len(columns) == 1:
        return next(iter(columns.values()))
    kind = np.dtype([(name, array.dtype, array.shape[1:]) for name, array in columns.items()])
    samples: NDArray[Any] = np.zeros(min(map(len, columns.values())), kind)
    for name, array in columns.items():
        samples[name] = array[: len(samples)]
    return samples


def described(samples: NDArray[Any]) -> str:
    """What one sample is, for people: `shape (4,)`, or `user float32(4,) and item float32(6,)`."""
    kind = samples.dtype
    if kind.names is None:
        return f"shape {tuple(samples.shape[1:])}"
    return " and ".join(f"{name} {kind[name].base}{kind[name].shape}" for name in kind.names)
