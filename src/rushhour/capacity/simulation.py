"""One scenario, one batch after another: the model in its readable form. `lockstep.py` is the same for many at once."""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

from rushhour.capacity.overhead import ALONE, Overhead
from rushhour.capacity.profile import ServiceProfile


def simulate(
    profile: ServiceProfile,
    *,
    streams: int,
    max_batch: int,
    rate_rps: float,
    n: int,
    seed: int,
    overhead: Overhead = ALONE,
) -> NDArray[np.float64]:
    """Latencies of `n` Poisson arrivals at `rate_rps` through the batching server, in seconds, shape `(n,)`.

    The server is a queue in front of `streams` equal streams; a free stream takes all waiting requests, up to
    `max_batch`. Every batch of a size takes the same time.
    """
    stretch = overhead.stretch(rate_rps, streams)
    arrivals = np.cumsum(np.random.default_rng(seed).exponential(1 / rate_rps, n)).tolist()
    latencies = np.empty(n)
    free = [0.0] * streams
    position = 0
    while position < n:
        start = max(heapq.heappop(free), arrivals[position])
        end = position + 1
        while end < n and end - position < max_batch and arrivals[end] <= start:
            end += 1
        finish = start + stretch * (profile.seconds(end - position) + overhead.batch_s)
        for index in range(position, end):
            latencies[index] = finish - arrivals[index]
        heapq.heappush(free, finish)
        position = end
    return latencies
