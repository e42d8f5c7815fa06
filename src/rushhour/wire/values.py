"""Numbers in JSON: read into a tensor's type, and written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from rushhour.bundle import TensorSpec
from rushhour.wire.datatypes import datatype_of
from rushhour.wire.pieces import pause

AT_ONCE = 8192
"""Numbers of an answer written in one go, in about a millisecond. A class as text takes as long as 16 numbers, and to
find the highest of some numbers as long as to write a sixteenth of them."""
LIST = b"\0"
"""A placeholder for a list that is written separately: nothing else in JSON has this byte."""


def json_numbers(values: NDArray[Any]) -> list[Any] | msgspec.Raw:
    """A tensor's values for JSON; with the literals `NaN` and `Infinity` where some are not finite."""
    listed: list[Any] = values.tolist()
    if values.dtype.kind != "f" or bool(np.isfinite(values).all()):
        return listed
    return msgspec.Raw(json.dumps(listed, separators=(",", ":")).encode())


def json_batches(values: NDArray[Any]) -> Iterator[list[Any] | msgspec.Raw]:
    """Numbers for JSON, some at a time."""
    for first in range(0, len(values), AT_ONCE):
        if first:
            pause()
        yield json_numbers(values[first : first + AT_ONCE])


def json_list(batches: Iterator[list[Any] | msgspec.Raw], lists: list[list[bytes]]) -> Any:
    """Values for JSON. For several batches a placeholder; their parts are then added to `lists`."""
    first = next(batches)
    second = next(batches, None)
    if second is None:
        return first
    parts = [msgspec.json.encode(first)[:-1]]
    for batch in chain((second,), batches):
        parts.append(b"," + msgspec.json.encode(batch)[1:-1])
    parts.append(b"]")
    lists.append(parts)
    return msgspec.Raw(LIST)


def flat(data: object, spec: TensorSpec) -> list[int | float]:
    """The values of a tensor in JSON, flat or nested, as one list.

    Not by numpy, which allocates the size of the largest element for each: one text of a megabyte among a million
    empty ones would need a terabyte.
    """
    if not isinstance(data, list):
        raise ValueError("it is not a list")
    while (kinds := set(map(type, data))) == {list}:
        if len(set(map(len, data))) > 1:
            raise ValueError("its lists differ in length")
        data = list(chain.from_iterable(data))
    _check_types(kinds, spec)
    return data


def converted(spec: TensorSpec, values: Sequence[int | float] | NDArray[Any]) -> NDArray[Any]:
    """Numbers in the type of a tensor. Raises a `ValueError` or the like if they do not fit."""
    kind = np.dtype(spec.dtype).kind
    # For a list, numpy would choose floats if some integers are beyond 63 bits and others are not.
    found = np.asarray(values, np.uint64 if spec.dtype == "uint64" else None)
    if kind != "f" and found.size:
        least, most = (0, 1) if kind == "b" else (np.iinfo(spec.dtype).min, np.iinfo(spec.dtype).max)
        if found.dtype.kind == "f" or int(found.min()) < least or int(found.max()) > most:
            raise ValueError(f"a value lies outside {least}..{most}")
    with np.errstate(over="raise"):
        array: NDArray[Any] = found.astype(spec.dtype)
    return array


def converted_batch(spec: TensorSpec, values: Sequence[int | float] | NDArray[Any]) -> NDArray[Any]:
    """The same for a piece of a tensor that is read in pieces."""
    if not isinstance(values, np.ndarray):
        _check_types(set(map(type, values)), spec)
    return converted(spec, values)


def _check_types(found: set[type], spec: TensorSpec) -> None:
    others = found - {"b": {bool, int}, "f": {int, float}}.get(np.dtype(spec.dtype).kind, {int})
    if others - {int, float, bool}:
        raise ValueError("found something other than numbers")
    if bool in others:
        raise ValueError("found true or false among the numbers")
    if others:
        raise ValueError(f"found values that are not {datatype_of(spec)}")
