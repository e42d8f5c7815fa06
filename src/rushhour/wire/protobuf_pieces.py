"""Tensors that protobuf holds as typed contents, read in pieces.

Source: https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rushhour.wire import pieces
from rushhour.wire.pieces import pause


class Packed:
    """Numbers as protobuf packs them.

    Args:
        dtype: of the numbers.
        spans: their bytes, in order.
    """

    def __init__(self, dtype: str, spans: Sequence[memoryview]) -> None:
        self._dtype = np.dtype(dtype)
        self._spans = spans
        self._fixed = self._dtype.kind == "f"
        self.most = sum(map(len, spans)) // (self._dtype.itemsize if self._fixed else 1)

    def batches(self) -> Iterator[NDArray[Any]]:
        """Its numbers; those too large for their type lose bits, as in protobuf's own parsers."""
        for span in self._spans:
            if self._fixed and len(span) % self._dtype.itemsize:
                raise ValueError("it ends in the middle of a number")
            at = 0
            while at < len(span):
                piece = np.frombuffer(span[at : at + pieces.PIECE_BYTES], np.uint8)
                last = at + len(piece) == len(span)
                if self._fixed:
                    values, read = piece.view(self._dtype), len(piece)
                else:
                    raw, read = _varints(piece)
                    if not read or (last and read < len(piece)):
                        raise ValueError("it ends in the middle of a number")
                    values = self._narrowed(raw)
                at += read
                yield values
                if not last:
                    pause()

    def texts(self) -> Sequence[Any]:
        """Raises a `ValueError`: these are numbers."""
        raise ValueError("it is not a list of text")

    def _narrowed(self, raw: NDArray[np.uint64]) -> NDArray[Any]:
        narrowed: NDArray[Any] = raw != 0
        if self._dtype.kind != "b":
            narrowed = (raw.view(np.int64) if self._dtype.kind == "i" else raw).astype(self._dtype)
        return narrowed


class Texts:
    """The elements of a tensor that protobuf holds as bytes; views, not copies."""

    def __init__(self, elements: Sequence[memoryview]) -> None:
        self._elements = elements
        self.most = 0

    def batches(self) -> Iterator[NDArray[Any]]:
        """Raises a `ValueError`: these are texts."""
        raise ValueError("found something other than numbers")

    def texts(self) -> Sequence[memoryview]:
        """The elements."""
        return self._elements


def _varints(piece: NDArray[np.uint8]) -> tuple[NDArray[np.uint64], int]:
    """The complete varints at the beginning of a piece, and their length in bytes."""
    ends = np.flatnonzero(piece < 0x80)
    if not len(ends):
        return np.empty(0, np.uint64), 0
    read = int(ends[-1]) + 1
    if len(ends) == read:
        return piece[:read].astype(np.uint64), read
    starts = np.concatenate(([0], ends[:-1] + 1))
    sizes = ends - starts + 1
    longest = int(sizes.max())
    if longest > 10:
        raise ValueError("a number is too long")
    values = np.zeros(len(ends), np.uint64)
    for byte in range(longest):
        longer = sizes > byte
        bits = piece[starts[longer] + byte].astype(np.uint64) & np.uint64(0x7F)
        values[longer] |= bits << np.uint64(7 * byte)
    return values, read
