"""Large tensors inside JSON and protobuf messages, read in pieces, so that other threads run in between.

A parser in C keeps Python's interpreter lock until it has finished: a message of 60 MiB blocks the event loop for
seconds, on whatever thread it is parsed. Here a tensor is first cut out of its message without being parsed. The rest
is small, and is parsed in one go. The tensor is then read in pieces of 32 KiB, about a millisecond each, with a short
sleep between them.

`json_pieces.py` and `protobuf_pieces.py` read the two formats.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rushhour.errors import WireError

WHOLE_BYTES = 32 * 2**10
"""Of a message beside its tensors, at most. Up to this size a message is parsed in one go, tensors included."""
BYTES_AT_ONCE = 2**20
"""Copied in one go."""
PIECE_BYTES = 32 * 2**10
_PAUSE_S = 1e-4
"""Sleep between two pieces: long enough for another thread to take the interpreter lock."""


class Tensor(Protocol):
    """The values of a tensor that was cut out of its message.

    Attributes:
        most: values in it, at most.
    """

    most: int

    def batches(self) -> Iterator[Sequence[int | float] | NDArray[Any]]:
        """Its numbers, in order. Raises a `ValueError` where it is not made of numbers."""
        ...

    def texts(self) -> Sequence[Any]:
        """Its texts as bytes, as a list or a list of lists. Raises a `ValueError` where it is not made of texts."""
        ...


def pause() -> None:
    """Let other threads run."""
    time.sleep(_PAUSE_S)


def too_long(what: str) -> WireError:
    """The error for a message that is large beside its tensors."""
    why = f"it is too long: the limit is {WHOLE_BYTES} bytes beside its tensors"
    return WireError(f"{what} cannot be read", why, "send less")


def assembled(
    tensor: Tensor, count: int, dtype: str, convert: Callable[[Sequence[int | float] | NDArray[Any]], NDArray[Any]]
) -> NDArray[Any]:
    """A tensor's numbers in one array of `count` values.

    Args:
        tensor: that was cut out.
        count: of its numbers.
        dtype: of the array.
        convert: converts some of the numbers to this type; raises a `ValueError` if they do not fit.

    Raises:
        ValueError: if there are fewer or more, or they do not fit.
    """
    if count > tensor.most:
        raise ValueError(f"found at most {tensor.most} values, and {count} are needed")
    whole = np.empty(count, dtype)
    at = 0
    for values in tensor.batches():
        if at + len(values) > count:
            raise ValueError(f"found more than {count} values")
        whole[at : at + len(values)] = convert(values)
        at += len(values)
    if at < count:
        raise ValueError(f"found {at} values, and {count} are needed")
    return whole
