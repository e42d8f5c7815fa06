"""How large batches are, by the times that they take: pure functions."""

from __future__ import annotations

import math
from typing import Protocol

from rushhour.measurement import BatchCost

_NEAR_BEST = 1.25
"""A batch is efficient if a sample costs at most so many times what it costs in the largest batch."""
_REQUEST_S, _BATCH_S = 1e-4, 5e-5
"""CPU seconds that a request and a batch cost beside the engine: sockets, parsing, the event loop's wake-ups. If a
batch of one costs no more than its request, no batch waits."""
_HARDLY = 1.05
"""A batch of large requests is large enough if a sample takes at most so many times what it takes in the largest."""


class Times(Protocol):
    """The service times of the engine."""

    cheapest: int
    """The batch in which a sample takes clearly less than `seconds` says; 0 where there is none."""

    def seconds(self, rows: float) -> float:
        """Seconds that a batch of `rows` samples takes; of samples of different sizes, of so much work."""
        ...

    def upper_seconds(self, rows: float) -> float:
        """Upper bound of the seconds that a batch of `rows` samples takes."""
        ...

    def rows_within(self, seconds: float) -> int:
        """The largest batch that takes no longer than `seconds`; 0 if none does."""
        ...


def efficient_batch(max_batch: int, cost: BatchCost) -> int:
    """The smallest batch in which a sample costs at most 1.25 times its CPU time in the largest batch.

    A sample of n costs `a / n + b`, including what request and batch cost beside the engine; 1 where that is little.
    """
    if cost.batch_s + cost.sample_s <= _REQUEST_S:
        return 1
    a, b = cost.batch_s + _BATCH_S, cost.sample_s + _REQUEST_S
    return math.ceil(a / (_NEAR_BEST * (a / max_batch + b) - b))


def hardly_slower(max_batch: int, times: Times) -> int:
    """The smallest batch in which a sample takes at most 1.05 times what it takes in the largest."""
    one, most = times.seconds(1), times.seconds(max_batch)
    slope = (most - one) / max(1, max_batch - 1)
    base, allowed = one - slope, _HARDLY * most / max_batch - slope
    return min(max_batch, max(1, math.ceil(base / allowed))) if base > 0 < allowed else 1
