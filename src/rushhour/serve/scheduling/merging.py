"""The answers of a picture's tiles become one. Pure functions on arrays; the tiles are in rows, from left to right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rushhour.bundle import Signature, Tiling
from rushhour.bundle.tiling import box_columns, map_axes

_MAX_BOXES = 4096
"""Of all tiles of a picture, those with the highest scores, that are compared with each other."""
_AT_ONCE = 256
"""Boxes compared with all others in one go: bounds memory."""

Array = NDArray[Any]


class Grid:
    """Where the tiles of one picture begin.

    Args:
        tiling: how it is cut.
        signature: of the model.
        size: height and width of the picture.

    Attributes:
        rows: where tiles begin, in pixels from the top.
        columns: the same from the left.
    """

    def __init__(self, tiling: Tiling, signature: Signature, size: tuple[int, int]) -> None:
        self.size = size
        self.tile = signature.inputs[0].shape[:2]
        self._tiling = tiling
        self._signature = signature
        strides = {1}
        if not tiling.is_fixed and tiling.merge != "boxes":
            for output in signature.outputs:
                found = map_axes(output.shape, self.tile)
                assert found is not None  # `Tiling.check`
                strides.add(found[1])
        stride = math.lcm(*strides)
        self.rows, self.columns = (
            tiling.offsets(length, tile, stride) for length, tile in zip(size, self.tile, strict=True)
        )

    @property
    def count(self) -> int:
        """The number of tiles."""
        return len(self.rows) * len(self.columns)

    def place(self, number: int) -> tuple[int, int]:
        """Where a tile begins, in pixels from the top and from the left."""
        row, column = divmod(number, len(self.columns))
        return self.rows[row], self.columns[column]

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
        """The map of the picture, of the maps of its tiles."""
        found = map_axes(tiles.shape[1:], self.tile)
        assert found is not None
        axis, stride = found
        moved = np.moveaxis(tiles, (1 + axis, 2 + axis), (1, 2))
        sides = moved.shape[1:3]
        starts = [[at // stride for at in offsets] for offsets in (self.rows, self.columns)]
        lengths = [-(-length // stride) for length in self.size]
        whole = np.zeros((*lengths, *moved.shape[3:]), np.float64 if blend else tiles.dtype)
        spans = [_spans(begins, side, length) for begins, side, length in zip(starts, sides, lengths, strict=True)]
        if blend:
            weights = [_weights(side) for side in sides]
            totals = [np.zeros(length) for length in lengths]
            for begins, side, length, weight, total in zip(starts, sides, lengths, weights, totals, strict=True):
                for at in begins:
                    total[at : at + side] += weight[: min(side, length - at)]
        for number in range(self.count):
            (row, column), tile = divmod(number, len(self.columns)), moved[number]
            if not blend:
                (top, bottom), (left, right) = spans[0][row], spans[1][column]
                y, x = starts[0][row], starts[1][column]
                whole[top:bottom, left:right] = tile[top - y : bottom - y, left - x : right - x]
                continue
            y, x = starts[0][row], starts[1][column]
            high, wide = min(sides[0], lengths[0] - y), min(sides[1], lengths[1] - x)
            share = np.outer(weights[0][:high] / totals[0][y : y + high], weights[1][:wide] / totals[1][x : x + wide])
            whole[y : y + high, x : x + wide] += tile[:high, :wide] * share.reshape(high, wide, *[1] * (tile.ndim - 2))
        return np.ascontiguousarray(np.moveaxis(whole.astype(tiles.dtype, copy=False), (0, 1), (axis, axis + 1)))

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
        height, width = self.size
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


def _spans(starts: list[int], side: int, length: int) -> list[tuple[int, int]]:
    """The places of a map that each tile of one side gives: up to the middle of what it shares with the next one."""
    middles = [(after + before + side) // 2 for before, after in pairwise(starts)]
    return list(zip([0, *middles], [*middles, length], strict=True))


def _weights(side: int) -> NDArray[np.float64]:
    """The distance of each place from the nearer border of a tile."""
    at = np.arange(side)
    distances: NDArray[np.float64] = np.minimum(at + 0.5, side - at - 0.5)
    return distances


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
