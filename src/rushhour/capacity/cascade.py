"""The service times of a cascade: a batch on the small engine, and what it sends on, on the large one."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from rushhour.capacity.profile import ServiceProfile
from rushhour.measurement import ServiceTimes


def cascade_times(small: ServiceTimes, large: ServiceTimes, escalated: float) -> ServiceTimes:
    """The mean seconds that a batch takes on one stream with what it sends on, as of one engine.

    The samples of a batch that go on are taken to be a batch of their own: the larger batches that they form with those
    of other streams under load are not counted. Each sample goes on with the same probability.

    Args:
        small: of the engine that gets all samples, on as many streams as both share.
        large: of the engine that gets what goes on, likewise.
        escalated: share of the samples that go on.
    """
    after = ServiceProfile(large)
    seconds = []
    for size, alone in zip(small.batch_sizes, small.seconds, strict=True):
        on = np.array([0.0, *(after.seconds(count) for count in range(1, size + 1))])
        seconds.append(alone + float(_binomial(size, escalated) @ on))
    streams = small.throughput[0] * small.seconds[0] / small.batch_sizes[0]
    throughput = [streams * size / each for size, each in zip(small.batch_sizes, seconds, strict=True)]
    return ServiceTimes(small.batch_sizes, tuple(seconds), tuple(throughput))


def _binomial(n: int, share: float) -> NDArray[np.float64]:
    """The probabilities of 0 to n successes, shape `(n + 1,)`."""
    if share in (0.0, 1.0):
        sure: NDArray[np.float64] = np.eye(n + 1)[round(n * share)]
        return sure
    counts = np.arange(n + 1)
    ways = np.array([math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in counts.tolist()])
    found: NDArray[np.float64] = np.exp(ways + counts * math.log(share) + (n - counts) * math.log1p(-share))
    return found
