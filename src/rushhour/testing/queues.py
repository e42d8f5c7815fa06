"""Simulated servers: queues whose true latencies are known, to validate the verdict.

`verdicts` measures how often a verdict is right, over thousands of runs; `VirtualGenerator` replaces a generator and
its server, so that a whole search runs in virtual time.

Numpy advances all runs at once, by one request (or one batch) of each: thousands of runs take seconds. Arrays have the
shape `(requests, runs)`, times are in seconds.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rushhour.goal import SLO
from rushhour.load import ClosedJob, InterimAnalysis, OpenJob, Samples, Status, Tick, decide
from rushhour.measurement import Outcome
from rushhour.testing.host_speed import STEP_S, SpeedCurve

Times = NDArray[np.float64]
Arrivals = Callable[[float, int, int, np.random.Generator], Times]
"""Rate in requests per second, requests, runs, random numbers -> arrival times, ascending along the first axis."""


class Queue(Protocol):
    """A server: arrival times -> latencies, both of the shape `(requests, runs)`."""

    def latencies(self, arrivals: Times, random: np.random.Generator) -> Times:
        """Seconds from each arrival to its answer; infinite where the request is shed."""


def poisson_arrivals(rate_rps: float, n: int, runs: int, random: np.random.Generator) -> Times:
    """Arrivals of independent users."""
    return random.exponential(1 / rate_rps, (n, runs)).cumsum(axis=0)


@dataclasses.dataclass(frozen=True)
class BurstyArrivals:
    """A Markov-modulated Poisson process of two states, each of exponentially distributed length.

    Attributes:
        factor: the rate in a burst over the rate between bursts.
        share: of the time in bursts.
        mean_s: mean length of a burst.
    """

    factor: float = 1.6
    share: float = 0.25
    mean_s: float = 0.1

    def __call__(self, rate_rps: float, n: int, runs: int, random: np.random.Generator) -> Times:
        """As `Arrivals`."""
        calm = rate_rps / (1 - self.share + self.share * self.factor)
        calm_s = self.mean_s * (1 - self.share) / self.share
        cycles = int(n / rate_rps / (self.mean_s + calm_s) * 1.3) + 60
        lasting = np.stack(
            [random.exponential(calm_s, (cycles, runs)), random.exponential(self.mean_s, (cycles, runs))], axis=1
        ).reshape(2 * cycles, runs)
        ends = np.concatenate([np.zeros((1, runs)), lasting.cumsum(axis=0)])
        expected = lasting * np.tile([calm, calm * self.factor], cycles)[:, None]
        work = np.concatenate([np.zeros((1, runs)), expected.cumsum(axis=0)])
        unit = random.exponential(1.0, (n, runs)).cumsum(axis=0)
        return np.stack([np.interp(unit[:, i], work[:, i], ends[:, i]) for i in range(runs)], axis=1)


@dataclasses.dataclass(frozen=True)
class Deterministic:
    """One request after the other, each taking `service_s`: M/D/1 under Poisson arrivals.

    Attributes:
        within_s: a request that would take longer is shed.
    """

    service_s: float
    within_s: float = math.inf

    def latencies(self, arrivals: Times, random: np.random.Generator) -> Times:
        """As in `Queue`, by Lindley's recursion: the backlog at an arrival is the last one less the time since."""
        found = np.empty_like(arrivals)
        gaps = np.diff(arrivals, axis=0, prepend=0.0)
        backlog = np.zeros(arrivals.shape[1])
        for gap, out in zip(gaps, found, strict=True):
            np.subtract(backlog, gap, out=backlog)
            np.maximum(backlog, 0.0, out=backlog)
            backlog += self.service_s
            out[:] = backlog
            if self.within_s < math.inf:
                away = backlog > self.within_s
                out[away] = math.inf
                backlog[away] -= self.service_s
        return found


@dataclasses.dataclass(frozen=True)
class Exponential:
    """`servers` behind one queue, service times exponential: M/M/c under Poisson arrivals.

    Attributes:
        within_s: a request that is expected to take longer is shed. Only the mean service time is known beforehand, so
            some of the admitted requests are late.
    """

    servers: int
    service_s: float
    within_s: float = math.inf

    def latencies(self, arrivals: Times, random: np.random.Generator) -> Times:
        """As in `Queue`: each request takes the server that is free first (Kiefer and Wolfowitz)."""
        found = np.empty_like(arrivals)
        columns = np.arange(arrivals.shape[1])
        free = np.zeros((self.servers, arrivals.shape[1]))
        for now, out in zip(arrivals, found, strict=True):
            first = free.argmin(axis=0)
            begin = np.maximum(free[first, columns], now)
            done = begin + random.exponential(self.service_s, len(now))
            away = begin - now + self.service_s > self.within_s
            free[first, columns] = np.where(away, free[first, columns], done)
            np.subtract(done, now, out=out)
            out[away] = math.inf
        return found


@dataclasses.dataclass(frozen=True)
class Batching:
    """Rushhour's own server: a free stream takes all waiting requests, up to `max_batch`, for `fixed_s + n each_s`."""

    fixed_s: float
    each_s: float
    max_batch: int
    streams: int = 1

    def latencies(self, arrivals: Times, random: np.random.Generator) -> Times:
        """As in `Queue`."""
        n, runs = arrivals.shape
        waiting = np.concatenate([arrivals, np.full((self.max_batch, runs), np.inf)])
        finish = np.empty((n + self.max_batch, runs))
        columns = np.arange(runs)
        window = np.arange(self.max_batch)[:, None]
        free = np.zeros((self.streams, runs))
        position = np.zeros(runs, dtype=np.intp)
        while (going := position < n).any():
            first = free.argmin(axis=0)
            start = np.maximum(free[first, columns], waiting[np.minimum(position, n), columns])
            rows = position + window
            np.minimum(rows, n + self.max_batch - 1, out=rows)
            taken = (waiting[rows, columns] <= start).sum(axis=0)
            taken[~going] = 0
            done = start + self.fixed_s + self.each_s * taken
            mine = window < taken
            at = np.nonzero(mine)
            finish[rows[at], at[1]] = done[at[1]]
            free[first, columns] = np.where(going, done, np.inf)
            position += taken
        return finish[:n] - arrivals


@dataclasses.dataclass(frozen=True)
class OnVaryingHost:
    """A queue on a host of varying speed: all its work takes longer while the host is slow.

    Measured in work done by the host, the queue is the one at speed 1: arrivals are converted to that time, and answers
    back. A bound `within_s` holds in that time too, as in a server that does not learn its speed.

    Attributes:
        queue: at speed 1.
        curve: the speed of the host.
    """

    queue: Queue
    curve: SpeedCurve

    def latencies(self, arrivals: Times, random: np.random.Generator) -> Times:
        """As in `Queue`."""
        runs = arrivals.shape[1]
        steps = math.ceil(float(arrivals.max()) / STEP_S) + 1
        speeds = self.curve.speeds(steps, runs, random)
        clock = np.append(np.arange(steps + 1) * STEP_S, 1e6)  # after the last arrival it stays as fast
        done = np.concatenate([np.zeros((1, runs)), speeds, speeds[-1:]]) * np.diff(clock, prepend=0.0)[:, None]
        work = done.cumsum(axis=0)
        at = np.stack([np.interp(arrivals[:, run], clock, work[:, run]) for run in range(runs)], axis=1)
        ends = at + self.queue.latencies(at, random)
        answered = np.stack([np.interp(ends[:, run], work[:, run], clock) for run in range(runs)], axis=1) - arrivals
        return np.where(np.isfinite(ends), answered, math.inf)


_CHUNK = 250
"""Runs that are simulated at once, at most; fewer if they have many requests, to bound the memory."""
_CELLS = 8_000_000


def true_percentile(
    queue: Queue, arrivals: Arrivals, rate_rps: float, percentile: float = 99.0, *, seed: int = 0, n: int = 6_000_000
) -> float:
    """The percentile of the latency, in seconds, from `n` requests in 200 runs that have warmed up for 5 s."""
    random = np.random.default_rng(seed)
    runs, warmup = 200, math.ceil(5 * rate_rps)
    each = math.ceil(n / runs)
    parts = [
        queue.latencies(arrivals(rate_rps, warmup + each, runs // 4, random), random)[warmup:].ravel() for _ in range(4)
    ]
    return float(np.quantile(np.concatenate(parts), percentile / 100))


def verdicts(
    queue: Queue,
    arrivals: Arrivals,
    slo: SLO,
    rate_rps: float,
    sizes: Sequence[int],
    *,
    runs: int,
    seed: int,
    warmup_s: float = 2.0,
) -> list[tuple[Outcome, int]]:
    """The verdict on each of `runs` windows, analysed at `sizes` requests.

    Each part between two analyses has its own warm-up, as in `measure`; the parts follow each other on one host.

    Returns:
        The outcome, and at how many requests it was decided.
    """
    warmup = math.ceil(rate_rps * warmup_s)
    chunk_size = max(1, min(_CHUNK, _CELLS // (sizes[-1] + len(sizes) * warmup)))
    found: list[tuple[Outcome, int]] = []
    for chunk in range(0, runs, chunk_size):
        random = np.random.default_rng([seed, chunk])
        at_once = min(chunk_size, runs - chunk)
        due = arrivals(rate_rps, sizes[-1] + len(sizes) * warmup, at_once, random)
        latencies = queue.latencies(due, random)
        for run in range(at_once):
            found.append(verdict_on(due[:, run], latencies[:, run], slo, rate_rps, sizes, warmup))
    return found


def verdict_on(
    due: Times, latencies: Times, slo: SLO, rate_rps: float, sizes: Sequence[int], warmup: int
) -> tuple[Outcome, int]:
    """The verdict on one run, analysed at `sizes` requests, warm-ups not counted.

    Args:
        due: arrival times, shape `(n,)`: with a warm-up before each part.
        latencies: of these requests.

    Returns:
        The outcome, and at how many requests it was decided.
    """
    parts: list[Samples] = []
    before = 0
    for size in sizes:
        start = before + len(parts) * warmup
        part = slice(start, start + warmup + size - before)
        parts.append(samples_of(due[part] - due[start], latencies[part], warmup))
        outcome, _ = decide(
            parts, slo, rate_rps=rate_rps, interim=InterimAnalysis(size / sizes[-1], before / sizes[-1])
        )
        if outcome is not None:
            return outcome, size
        before = size
    return Outcome.INCONCLUSIVE, sizes[-1]


def samples_of(scheduled: Times, latencies: Times, warmup: int = 0) -> Samples:
    """The samples of a perfect generator on a quiet machine; shed requests are answered at once."""
    answered = np.isfinite(latencies)
    return Samples(
        scheduled=np.ascontiguousarray(scheduled),
        taken=scheduled,
        sent=scheduled,
        done=np.where(answered, scheduled + latencies, scheduled),
        status=np.where(answered, Status.OK, Status.SHED).astype(np.uint8),
        warmup=warmup,
    )


class VirtualGenerator:
    """A generator and its server in one, in virtual time: it gives `measure` what a quiet machine would give.

    Args:
        server: what answers.
    """

    def __init__(self, server: Batching) -> None:
        self._server = server
        self.seconds = 0.0
        """Virtual seconds of load so far."""

    def run(self, job: OpenJob | ClosedJob, on_progress: Callable[[Tick], None] | None = None) -> Samples:
        """As `Sender.run`, in virtual time."""
        if isinstance(job, OpenJob):
            due = np.frombuffer(job.schedule, np.float64)
            latencies = self._server.latencies(due[:, None].copy(), np.random.default_rng(0))[:, 0]
            self.seconds += float((due + latencies).max())
            return samples_of(due, latencies, job.warmup)
        self.seconds += job.duration_s
        return self._closed(job)

    def _closed(self, job: ClosedJob) -> Samples:
        server = self._server
        free = [0.0] * server.streams
        waiting = [0.0] * job.concurrency  # when each user sent its request; a heap
        scheduled, done = [], []
        while waiting[0] < job.duration_s:
            start = max(heapq.heappop(free), waiting[0])
            batch: list[float] = []
            while waiting and waiting[0] <= start and len(batch) < server.max_batch:
                batch.append(heapq.heappop(waiting))
            finish = start + server.fixed_s + server.each_s * len(batch)
            heapq.heappush(free, finish)
            for sent in batch:
                scheduled.append(sent)
                done.append(finish)
                heapq.heappush(waiting, finish)
        due = np.array(scheduled)
        return samples_of(due, np.array(done) - due)
