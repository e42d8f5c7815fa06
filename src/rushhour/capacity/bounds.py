"""Bounds of sizes: samples of an open dimension are padded to the next bound, so that batches are of a few sizes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_FIRST = 8
_CANDIDATES = 512
"""Different sizes among which bounds are chosen; of more, they are chosen among as many quantiles."""


def usual_bounds(smallest: int, largest: int) -> tuple[int, ...]:
    """The powers of two and those half as large again, from 8 on, and `largest` itself.

    A sample is padded by half of its size at most, once it is longer than 8.
    """
    found = {largest}
    power = _FIRST
    while power < largest:
        found |= {size for size in (power, power * 3 // 2) if smallest <= size < largest}
        power *= 2
    return tuple(sorted(found))


def best_bounds(sizes: Sequence[int], largest: int, most: int) -> tuple[int, ...]:
    """The bounds with the least padding of these sizes, by dynamic programming.

    Args:
        sizes: of samples, each at least 1; larger ones count as `largest`.
        largest: size that a sample may have; always the last bound.
        most: bounds, at least 1.

    Returns:
        Ascending. Fewer than `most` where that many pad as little.
    """
    clipped = np.minimum(np.asarray(sizes, dtype=np.int64), largest)
    if not len(clipped) or most <= 1:
        return (largest,)
    ends = np.unique(np.append(clipped, largest))
    if len(ends) > _CANDIDATES:
        ends = np.unique(np.append(np.quantile(clipped, np.linspace(0, 1, _CANDIDATES), method="higher"), largest))
    at = np.searchsorted(ends, clipped)
    counts = np.bincount(at, minlength=len(ends))
    up_to = np.concatenate(([0], np.cumsum(counts)))
    # best[j]: positions, padding included, of all sizes up to ends[j - 1], with the bounds so far
    best: NDArray[np.float64] = np.full(len(ends) + 1, np.inf)
    best[0] = 0.0
    chosen: list[NDArray[np.int64]] = []
    totals: list[float] = []
    for _ in range(most):
        previous, best = best, np.full(len(ends) + 1, np.inf)
        best[0] = 0.0
        cut = np.zeros(len(ends) + 1, np.int64)
        for end in range(1, len(ends) + 1):
            cost = previous[:end] + ends[end - 1] * (up_to[end] - up_to[:end])
            cut[end] = int(cost.argmin())
            best[end] = cost[cut[end]]
        chosen.append(cut)
        totals.append(float(best[-1]))
    bounds: list[int] = []
    end = len(ends)
    for cut in reversed(chosen[: int(np.argmin(totals)) + 1]):
        if end:
            bounds.append(int(ends[end - 1]))
            end = int(cut[end])
    return tuple(sorted({*bounds, largest}))


def padding_share(sizes: Sequence[int], bounds: Sequence[int]) -> float:
    """The share of positions that is padding, where each of these sizes is padded to the next bound."""
    known = np.minimum(np.asarray(sizes, dtype=np.int64), bounds[-1])
    padded = np.asarray(bounds)[np.searchsorted(np.asarray(bounds), known)]
    return 1 - float(known.sum()) / float(padded.sum()) if len(known) else 0.0
