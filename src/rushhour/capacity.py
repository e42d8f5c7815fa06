"""The capacity of a server, predicted from service times: one model for the offline tuner and the online controller.

The server is a queue in front of `streams` equal streams; a free stream takes all waiting requests, up to `max_batch`.

Serving costs CPU beside the engine: to read and answer requests, and to send them where the load comes from the same
machine. Where the engine uses all cores, this time is taken from it (`Overhead`).
"""

from __future__ import annotations

import dataclasses
import heapq

import numpy as np
from numpy.typing import NDArray

from rushhour.goal import SLO
from rushhour.measurement import ServiceTimes

_LEAST = 0.02
"""The least share of its cores that an engine keeps: below it no prediction is meaningful."""


class ServiceProfile:
    """Seconds that one stream takes for a batch of n: the sizes that were timed, linear in between.

    Args:
        times: the sizes that were timed; beyond the largest, each sample costs as much as in a batch of that size.
    """

    def __init__(self, times: ServiceTimes) -> None:
        sizes = np.asarray(times.batch_sizes, dtype=np.float64)
        seconds = np.maximum.accumulate(np.asarray(times.seconds, dtype=np.float64))
        self.largest = int(sizes[-1])
        self._table: list[float] = [0.0, *np.interp(np.arange(1, self.largest + 1), sizes, seconds).tolist()]

    def seconds(self, n: int) -> float:
        """Seconds for a batch of `n` samples (1 or more)."""
        if n <= self.largest:
            return self._table[n]
        return self._table[-1] * n / self.largest

    def throughput(self, streams: int, max_batch: int) -> float:
        """An upper bound of samples per second, of `streams` streams with batches of up to `max_batch`."""
        return streams * max(n / self.seconds(n) for n in range(1, max_batch + 1))


@dataclasses.dataclass(frozen=True)
class Overhead:
    """What serving takes from the cores that the engine computes on.

    Attributes:
        request_s: CPU seconds of a request beside the engine: the server's, and those of a generator on this machine.
        spare: cores that the engine does not use.
    """

    request_s: float = 0.0
    spare: int = 0

    def stretch(self, rate_rps: float, streams: int) -> float:
        """The factor by which batches take longer at this rate.

        The work runs on one core at a time, and the stream that computes there waits for it, with all its threads: one
        stream of two threads loses all that time, two streams of one thread each lose half of it.
        """
        taken = max(0.0, rate_rps * self.request_s - self.spare)
        return 1 / max(_LEAST, 1 - taken / streams)

    @classmethod
    def from_throughput(
        cls, profile: ServiceProfile, *, streams: int, max_batch: int, spare: int, most_rps: float
    ) -> Overhead:
        """The overhead that explains a measured throughput `most_rps`, with full batches."""
        taken = streams * (1 - most_rps / profile.throughput(streams, max_batch))
        return cls(request_s=(taken + spare) / most_rps if taken > 0 else 0.0, spare=spare)


_ALONE = Overhead()
"""No overhead: the engine has all of its cores."""


def simulate(
    profile: ServiceProfile,
    *,
    streams: int,
    max_batch: int,
    rate_rps: float,
    n: int,
    seed: int,
    overhead: Overhead = _ALONE,
) -> NDArray[np.float64]:
    """Latencies of `n` Poisson arrivals at `rate_rps` through the batching server, in seconds, shape `(n,)`."""
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
        finish = start + stretch * profile.seconds(end - position)
        for index in range(position, end):
            latencies[index] = finish - arrivals[index]
        heapq.heappush(free, finish)
        position = end
    return latencies


def predicted_capacity(
    profile: ServiceProfile,
    *,
    streams: int,
    max_batch: int,
    slo: SLO,
    overhead: Overhead = _ALONE,
    n: int = 3000,
    seed: int = 0,
) -> float:
    """The highest rate whose simulated percentile meets the SLO, to 2%, in requests per second; 0 if none does."""

    def holds(rate: float) -> bool:
        latencies = simulate(
            profile, streams=streams, max_batch=max_batch, rate_rps=rate, n=n, seed=seed, overhead=overhead
        )
        return bool(np.quantile(latencies, slo.percentile / 100) <= slo.limit_s)

    high = profile.throughput(streams, max_batch)
    low = high / 64
    if not holds(low):
        return 0.0
    if holds(high):
        return high
    while high / low > 1.02:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def best_batch(times: ServiceTimes, *, streams: int, slo: SLO, overhead: Overhead = _ALONE) -> tuple[int, float]:
    """The batch bound to serve with, of the sizes timed, and the capacity predicted for it in requests per second.

    The smallest within 2% of the best: service times are no more precise, and a late batch delays fewer requests if it
    is small.
    """
    profile = ServiceProfile(times)
    predicted = {
        bound: predicted_capacity(profile, streams=streams, max_batch=bound, slo=slo, overhead=overhead)
        for bound in times.batch_sizes
    }
    bound = min(size for size, rate in predicted.items() if rate >= 0.98 * max(predicted.values()))
    return bound, predicted[bound]
