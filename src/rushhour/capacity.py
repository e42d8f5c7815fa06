"""What a server can carry, predicted from service times: one model for the offline tuner and the online controller.

The server is a queue before `streams` equal streams; a free stream takes all that waits, up to `max_batch`.

An engine alone never serves: reading and answering a request costs CPU too, and so does sending it, where the load
comes from the same machine. Where the engine has all cores, every second of that is taken from it (`Overhead`).
"""

from __future__ import annotations

import dataclasses
import heapq

import numpy as np
from numpy.typing import NDArray

from rushhour.goal import SLO
from rushhour.measurement import ServiceTimes

_LEAST = 0.02
"""Of its cores, an engine keeps at least so much: beyond that no prediction means anything."""


class ServiceProfile:
    """Seconds that one stream takes for a batch of n, from the sizes that were timed, linear in between.

    Args:
        times: what was timed; beyond the largest size, each sample costs as much as in a batch of that size.
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
        """The most samples per second of `streams` streams with batches of up to `max_batch`: an upper bound."""
        return streams * max(n / self.seconds(n) for n in range(1, max_batch + 1))


@dataclasses.dataclass(frozen=True)
class Overhead:
    """What serving takes from the cores that the engine computes on.

    Attributes:
        request_s: CPU seconds of a request beside the engine: the server's own, and the generator's if it is here.
        spare: cores that the engine leaves alone.
    """

    request_s: float = 0.0
    spare: int = 0

    def stretch(self, rate_rps: float, streams: int) -> float:
        """How many times longer batches take at this rate.

        The work runs on one core at a time, and whatever stream computes there waits for it, with all its threads:
        one stream of two threads loses all the time that is taken, two streams of one thread each lose half of it.
        """
        taken = max(0.0, rate_rps * self.request_s - self.spare)
        return 1 / max(_LEAST, 1 - taken / streams)

    @classmethod
    def seen(cls, profile: ServiceProfile, *, streams: int, max_batch: int, spare: int, most_rps: float) -> Overhead:
        """The overhead that explains the most that a server was seen to carry, its batches full."""
        taken = streams * (1 - most_rps / profile.throughput(streams, max_batch))
        return cls(request_s=(taken + spare) / most_rps if taken > 0 else 0.0, spare=spare)


_ALONE = Overhead()
"""An engine that no serving takes anything from."""


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
    """The bound on batches to serve with, of the sizes timed, and the requests per second it is predicted to carry.

    The smallest that comes within 2% of the best: what is timed is no more certain than that, and with smaller batches
    a late one makes fewer wait.
    """
    profile = ServiceProfile(times)
    predicted = {
        bound: predicted_capacity(profile, streams=streams, max_batch=bound, slo=slo, overhead=overhead)
        for bound in times.batch_sizes
    }
    bound = min(size for size, rate in predicted.items() if rate >= 0.98 * max(predicted.values()))
    return bound, predicted[bound]
