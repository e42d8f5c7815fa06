"""What serving costs beside the engine, by layout of the cores, from candidates that were put under load.

A closed loop alone would promise too much: its requests come together, just when others were answered, and it waits
where the host is slow. So each candidate gets a short window of open-loop load beside it (docs/decisions/0037).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rushhour.capacity import Overhead, Saturation, ServiceProfile, steady_share
from rushhour.goal import SLO
from rushhour.measurement import Measurement, Outcome
from rushhour.system.machine import cores
from rushhour.tune.priors import Earlier
from rushhour.tune.space import Candidate
from rushhour.tune.state import CandidateState

_KEPT_UP = 0.03
"""Share of late requests up to which a server kept up with a window."""
_LEAST_OPEN = 0.7
"""Of the throughput in the closed loop, which is 1.07 to 1.33 times the capacity. Where a short window shows less, the
host was disturbed meanwhile."""
_TOGETHER = 3
"""Intervals of 100 ms that are averaged: a shorter variation of the host's speed fits into the limit."""
_INTERVAL_S = 0.1
"""Of `Measurement.speeds`."""
_BATCH_S, _THREADS_S, _SHARED_S = 110e-6, 160e-6, 310e-6
"""What a batch costs beside the engine, in one thread, in several, and in several streams of one process: fitted on the
120 plans of benchmarks/results/tune_space.json (docs/decisions/0047)."""
_INFORMATIVE = (Outcome.PASS, Outcome.FAIL, Outcome.UNSTABLE, Outcome.INCONCLUSIVE)


class Overheads:
    """The overheads of serving that are known.

    Args:
        earlier: of earlier runs: it stands in for overheads that this run has not measured.

    Attributes:
        known: by layout, from the first candidate of each layout under load.
        slowdown: of batches beside serving, where two candidates of a layout showed it.
    """

    def __init__(self, earlier: Earlier) -> None:
        self._earlier = earlier
        self.known: dict[tuple[int, int, int], Overhead] = {}
        self.slowdown: float | None = None
        self._speeds: list[float] = []
        """Of the host, in each 100 ms of the windows that the overheads were learnt from, relative to their median."""

    def of(self, candidate: Candidate) -> Overhead:
        """The overhead of its layout; where that is not known, that of the first layout measured; before any is, what
        earlier runs measured in its layout."""
        first = next(iter(self.known.values()), self._earlier.overhead(candidate.layout))
        known = self.known.get(candidate.layout, first)
        return dataclasses.replace(known, spare=candidate.spare(cores()), batch_s=batch_seconds(candidate))

    def learn(self, candidate: Candidate, seen: Sequence[Saturation]) -> None:
        """Those of a layout: of one candidate, or of two of which one is much slower."""
        slowdown = self.slowdown or self._earlier.slowdown
        overhead = Overhead.explaining(seen, spare=candidate.spare(cores()), slowdown=slowdown)
        if len(seen) > 1:
            self.slowdown = overhead.slowdown
        self.known[candidate.layout] = overhead

    def learn_speeds(self, windows: Sequence[Measurement]) -> None:
        """How the host's speed varies within windows."""
        for window in windows:
            if window.speed:
                self._speeds += [speed / window.speed for speed in window.speeds]

    def steady(self, slo: SLO) -> float:
        """The share of a capacity that holds at all speeds of the host that were seen."""
        together = max(_TOGETHER, round(2 * slo.limit_s / _INTERVAL_S))
        return steady_share(self._speeds, slo.allowed_miss_rate, together=together)

    def forget(self) -> None:
        """Forget what was learnt, where it was learnt from servers that failed later."""
        self.known.clear()
        self._speeds.clear()
        self.slowdown = None


def saturation(state: CandidateState, profile: ServiceProfile) -> Saturation:
    """The highest rate that a candidate answers in an open loop, at speed 1 of the host.

    Where it did not keep up with the window, what it answered in time. Where it did, the rate at which all cores would
    be busy at the CPU time that a request took: at least that of the window, and at most that of the closed loop, in
    which requests cost least.

    Args:
        state: with its throughput, and the window of open-loop load as the last one.
        profile: of its engine, at speed 1.
    """
    candidate, highest = state.candidate, state.throughput or 1.0
    for window in state.windows[-1:]:
        seen = highest
        if window.late > _KEPT_UP * window.n:
            if window.outcome in _INFORMATIVE:
                seen = window.rate_rps * (1 - window.late / window.n)
        elif window.server_cpu is not None:
            busy = (window.server_cpu + window.generator_cpu) / cores()
            seen = window.rate_rps / min(1.0, busy) if busy > 0 else highest
        highest = min(highest, max(seen, _LEAST_OPEN * highest))
    return Saturation.at(
        profile,
        highest / state.speed,
        streams=candidate.streams,
        max_batch=candidate.policy.max_batch,
        spare=candidate.spare(cores()),
        batch_s=batch_seconds(candidate),
    )


def batch_seconds(candidate: Candidate) -> float:
    """What a batch of any size costs beside the engine, in seconds: with one sample in a batch, most of its time.

    Several streams of one process share its event loop, and where they use all cores, it waits for one. Where one batch
    uses several cores, its threads wait for the last that wakes up.
    """
    if candidate.policy.streams > 1 and not candidate.spare(cores()):
        return _SHARED_S
    return _THREADS_S if candidate.policy.threads > 1 else _BATCH_S
