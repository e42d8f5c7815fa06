"""Autocorrelation: by how much the requests of a window are worth less than independent ones.

Late requests come in bursts, and a queue near its capacity is slow for seconds. A variance inflation v turns n requests
into an effective sample size of n / v.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCKS = 20
"""Blocks of neighbouring requests in a window."""


def variance_inflation(late: NDArray[np.bool_]) -> float:
    """The variance of the count of late requests, over that of independent ones; at least 1.

    From 20 blocks of neighbours: block size times the variance of the blocks' miss rates, over q(1-q).

    Args:
        late: of each request, in the order of the schedule, shape `(n,)`.
    """
    size = len(late) // BLOCKS
    if size == 0:
        return 1.0
    rates = late[len(late) - size * BLOCKS :].reshape(BLOCKS, size).mean(axis=1)
    q = float(rates.mean())
    if not 0 < q < 1:
        return 1.0
    return max(1.0, size * float(rates.var(ddof=1)) / (q * (1 - q)))


def long_variance_inflation(slow: NDArray[np.bool_]) -> float:
    """`variance_inflation` where the correlation may last longer than a block: then neighbouring blocks are correlated
    too, and their correlation r gives the factor (1 + r) / (1 - r) of a first-order autoregressive process."""
    size = len(slow) // BLOCKS
    if size == 0:
        return 1.0
    around = slow[len(slow) - size * BLOCKS :].reshape(BLOCKS, size).mean(axis=1)
    around = around - around.mean()
    spread = float((around * around).sum())
    if spread < 1e-12:  # all blocks are equal, except for rounding
        return 1.0
    # 1/20 is the bias of a correlation estimated from 20 blocks; above 0.8 the window is too short to estimate it.
    r = min(max(float((around[1:] * around[:-1]).sum()) / spread + 1 / BLOCKS, 0.0), 0.8)
    return max(1.0, variance_inflation(slow) * (1 + r) / (1 - r))


def late_by_block(late: NDArray[np.bool_]) -> tuple[int, ...]:
    """Late requests in each of 20 blocks; empty where there are fewer requests than blocks."""
    size = len(late) // BLOCKS
    return tuple(late[len(late) - size * BLOCKS :].reshape(BLOCKS, size).sum(axis=1).tolist()) if size else ()
