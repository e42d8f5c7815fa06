"""The answers of the tiles of a picture or recording become one. Pure functions on arrays; the tiles are in order."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rushhour.bundle import Signature, Tiling
from rushhour.bundle.tiling import box_columns, map_axes, sides_of, tiled_axes

_MAX_BOXES = 4096
"""Of all tiles of a picture, those with the highest scores, that are compared with each other."""
_AT_ONCE = 256
"""Boxes compared with all others in one go: bounds memory."""

Array = NDArray[Any]


class Grid:
    """Where the tiles of one picture or recording begin; those of a picture in rows, from left to right.

    Args:
        tiling: how it is cut.
        signature: of the model.
        size: height and width of the picture, or the steps of the recording.
    """

    def __init__(self, tiling: Tiling, signature: Signature, size: tuple[int, ...]) -> None:
        self._size = size
        self._tile = sides_of(signature)
        self._tiling = tiling
        self._signature = signature
        spec = signature.inputs[0]
        self._axes, self._dimensions = tiled_axes(spec), len(spec.shape)
        strides = {1}
        if not tiling.is_fixed and tiling.merge != "boxes":
            for output in signature.outputs:
                found = map_axes(output.shape, self._tile)
                assert found is not None  # `Tiling.check`
                strides.add(found[1])
        stride = math.lcm(*strides)
        self._starts = [
            tiling.offsets(length, tile, stride) for length, tile in zip(size, self._tile, strict=True)
        ]  # along each side

    @property
    def count(self) -> int:
        """The number of tiles."""
        return math.prod(map(len, self._starts))

    def place(self, number: int) -> tuple[int, ...]:
        """Where a tile begins: in pixels from the top and from the left, or in steps."""
        return tuple(starts[at] for starts, at in zip(self._starts, self._position(number), strict=True))

    def window(self, number: int) -> tuple[slice, ...]:
        """The part of the picture or recording that a tile shows, in all dimensions; it may reach beyond the end."""
        found = [slice(None)] * self._dimensions
        for axis, begin, side in zip(self._axes, self.place(number), self._tile, strict=True):
            found[axis] = slice(begin, begin + side)
        return tuple(found)

    def _position(self, number: int) -> list[int]:
        """Which one of the tiles along each side it is."""
        found = []
        for starts in reversed(self._starts):
            number, at = divmod(number, len(starts))
            found.append(at)
        return found[::-1]

    def merge(self, outputs: Sequence[Array]) -> list[Array]:
        """The answer to the picture.

        Args:
            outputs: of the signature, in its order, each of shape `(tiles, *shape)`.

        Returns:
            For each output an array without the dimension of tiles.
        """
        merge = self._tiling.merge
        if merge == "boxes":
            return self._boxes(outputs)
        if merge == "mean":
            return [array.mean(axis=0, dtype=np.float64).astype(array.dtype) for array in outputs]
        if merge == "max":
            return [array.max(axis=0) for array in outputs]
        return [self._map(array, blend=merge == "blend") for array in outputs]

    def _map(self, tiles: Array, *, blend: bool) -> Array:
        """The map of the picture or recording, of the maps of its tiles."""
        found, sides = map_axes(tiles.shape[1:], self._tile), len(self._tile)
        assert found is not None
        axis, stride = found
        moved = np.moveaxis(tiles, range(1 + axis, 1 + axis + sides), range(1, 1 + sides))
        along = [
            _Side([begin // stride for begin in starts], places, -(-length // stride))
            for starts, places, length in zip(self._starts, moved.shape[1:], self._size, strict=False)
        ]
        lengths = tuple(side.length for side in along)
        whole = np.zeros((*lengths, *moved.shape[1 + sides :]), np.float64 if blend else tiles.dtype)
        for number in range(self.count):
            position, tile = self._position(number), moved[number]
            if not blend:
                into, of = zip(*(side.own(at) for side, at in zip(along, position, strict=True)), strict=True)
                whole[into] = tile[of]
                continue
            into, of = zip(*(side.all(at) for side, at in zip(along, position, strict=True)), strict=True)
            share = functools.reduce(
                np.multiply.outer, (side.share(at) for side, at in zip(along, position, strict=True))
            )
            whole[into] += tile[of] * share.reshape(*share.shape, *[1] * (tile.ndim - sides))
        merged = np.moveaxis(whole.astype(tiles.dtype, copy=False), range(sides), range(axis, axis + sides))
        return np.ascontiguousarray(merged)

    def _boxes(self, outputs: Sequence[Array]) -> list[Array]:
        """The boxes of the picture, highest scores first, each object once."""
        at, scored, classed = box_columns(self._signature)
        table = at == scored
        boxes = (outputs[at][..., :4] if table else outputs[at]).astype(np.float64)
        scores = (outputs[at][..., 4] if table else outputs[scored]).reshape(-1)
        classes = (outputs[at][..., 5] if table else outputs[classed]).reshape(-1)
        places = np.array([self.place(number)[::-1] * 2 for number in range(self.count)], np.float64)
        boxes = (boxes + places[:, None, :]).reshape(-1, 4)
        tile = np.repeat(np.arange(self.count), len(boxes) // self.count)
        real = np.flatnonzero((scores > 0) & np.isfinite(boxes).all(axis=1))
        order = real[np.argsort(-scores[real], kind="stable")[:_MAX_BOXES]]
        height, width = self._size
        limits = np.array([width, height, width, height], np.float64)
        kept = order[_first_of_each(boxes[order].clip(0, limits), classes[order], tile[order], self._tiling.same)]
        placed = boxes[kept].clip(0, limits)
        if table:
            whole = outputs[at].reshape(-1, 6)[kept]
            whole[:, :4] = placed
            return [whole]
        found: list[Array] = [np.empty(0)] * 3
        found[at], found[scored], found[classed] = placed.astype(outputs[at].dtype), scores[kept], classes[kept]
        return found


class _Side:
    """The tiles along one side of a map, in its places.

    Args:
        starts: where they begin.
        places: of each.
        length: of the side.
    """

    def __init__(self, starts: list[int], places: int, length: int) -> None:
        self.length = length
        self._starts, self._places = starts, places
        middles = [(after + before + places) // 2 for before, after in pairwise(starts)]
        self._spans = list(zip([0, *middles], [*middles, length], strict=True))
        at = np.arange(places)
        self._weights = np.minimum(at + 0.5, places - at - 0.5)
        """The distance of each place of a tile from its nearer border."""
        self._totals = np.zeros(length)
        for begin in starts:
            self._totals[begin : begin + places] += self._weights[: length - begin]

    def own(self, number: int) -> tuple[slice, slice]:
        """The places that a tile gives, of the side and of the tile: up to the middle of what it shares with the next
        one."""
        (first, last), begin = self._spans[number], self._starts[number]
        return slice(first, last), slice(first - begin, last - begin)

    def all(self, number: int) -> tuple[slice, slice]:
        """All places of a tile that are on the side, likewise."""
        begin = self._starts[number]
        return slice(begin, min(begin + self._places, self.length)), slice(0, min(self._places, self.length - begin))

    def share(self, number: int) -> NDArray[np.float64]:
        """Its part in the average at each of these places."""
        into, of = self.all(number)
        share: NDArray[np.float64] = self._weights[of] / self._totals[into]
        return share


def _first_of_each(boxes: Array, classes: Array, tile: Array, same: float) -> NDArray[np.intp]:
    """The positions of the boxes that are no second view of an object.

    Args:
        boxes: x1, y1, x2, y2 in the picture, highest scores first.
        classes: of each.
        tile: that each was found in: a model has dealt with those of one tile by itself.
        same: the share of the smaller of two boxes that they have in common, above which they are one object.
    """
    areas = np.maximum(boxes[:, 2] - boxes[:, 0], 0) * np.maximum(boxes[:, 3] - boxes[:, 1], 0)
    alive = np.ones(len(boxes), bool)
    for first in range(0, len(boxes), _AT_ONCE):
        some = slice(first, first + _AT_ONCE)
        shared = np.ones((len(boxes[some]), len(boxes)))
        for axis in (0, 1):
            ends = np.minimum(boxes[some, None, axis + 2], boxes[None, :, axis + 2])
            shared *= np.maximum(ends - np.maximum(boxes[some, None, axis], boxes[None, :, axis]), 0)
        covered = shared > same * np.minimum(areas[some, None], areas[None, :])
        covered &= (classes[some, None] == classes[None, :]) & (tile[some, None] != tile[None, :])
        for number in range(len(covered)):
            if alive[first + number]:
                alive[first + number + 1 :] &= ~covered[number, first + number + 1 :]
    return np.flatnonzero(alive)
