"""The search for a capacity: the highest rate that passes, bracketed, bisected and confirmed on fresh seeds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from rushhour.errors import LoadError
from rushhour.goal import SLO
from rushhour.load.closed import ramp_concurrency
from rushhour.load.estimate import Estimate, estimate, is_informative
from rushhour.load.generator.process import Sender
from rushhour.load.payload import Payload
from rushhour.load.target import Endpoint
from rushhour.load.window import Probe, measure
from rushhour.load.window_size import WARMUP_S, search_window_n
from rushhour.measurement import ClosedLoop, Measurement, Outcome
from rushhour.progress import Progress, Silent

_RETRIES = {Outcome.VOID: 3, Outcome.GENERATOR_LIMITED: 1}
"""A disturbance passes. A generator at its limit stays there, unless the disturbance was part of it."""
_STEPS_UP = 40
_BY_FAR = 0.3
"""Of a window's requests: where more are late, the server is the cause."""
_SHARE_DOWN = 1 / 16
_FIRST_DROP, _DROP = 0.95, 0.97
_PATIENCE = 2.0
"""Windows that must still fit into the budget for another attempt. Also the share of a budget, in multiples of it, that
may be spent until some window holds."""
_LEAST_RATES = 4
"""Rates that are tried until one holds, however short the budget: of a server that carries 400/s it is wrong to say
that it holds at no rate because two windows at 900/s took all of the time."""
_LAST_DROPS = (0.95, 0.93, 0.90, 0.85, 0.75, 0.6)
_STEP_S, _SEARCH_S = 0.5, 2.5


class Search(msgspec.Struct, frozen=True):
    """The result of a search for capacity, with all its windows.

    Attributes:
        capacity_rps: the highest rate that passed on a fresh seed. Where none did, the estimate from all windows; 0
            only where the SLO held at no rate.
        lowest_failing_rps: the lowest rate above it that failed or was unstable; None where none was found.
        confirmed: the window that confirmed `capacity_rps`; None where it is an estimate.
        runs: every window in the order measured; the confirming one is the last of them that passed.
        retries: windows that were repeated because the machine was disturbed or the generator at its limit.
        reason: why the capacity is 0, or what else than the server bounds it; empty otherwise.
        rungs: the closed loops that it started from; empty where `find_capacity` got its start.
        seconds: wall time; 0 where that is not known.
        estimate: of the capacity, from all windows; None where the SLO held at no rate.
    """

    capacity_rps: float
    lowest_failing_rps: float | None
    confirmed: Measurement | None
    runs: tuple[Measurement, ...]
    retries: int
    reason: str = ""
    rungs: tuple[ClosedLoop, ...] = ()
    seconds: float = 0.0
    estimate: Estimate | None = None

    @property
    def proven(self) -> bool:
        """Whether the capacity passed a proof on fresh seeds."""
        return self.confirmed is not None

    @property
    def requests(self) -> int:
        """Number of requests judged in all windows."""
        return sum(run.n for run in self.runs)


def search_capacity(
    generator: Sender,
    target: Endpoint,
    requests: Sequence[Payload],
    slo: SLO,
    *,
    seed: int = 0,
    budget_s: float = 80.0,
    null_rps: float | None = None,
    progress: Progress | None = None,
    take: Callable[..., Measurement] | None = None,
) -> Search:
    """The capacity of a server, from nothing: closed loops for a start, bracket, bisection, proof.

    Short windows bracket the capacity, long ones prove it: near its capacity the latency of a queue is correlated over
    seconds.

    Args:
        generator: sends the load.
        target: from `discover`.
        requests: from `payloads`.
        slo: the SLO.
        seed: of everything random.
        budget_s: approximate length; it sets the length of the proof's windows, and is not enforced.
        null_rps: as in `measure`.
        progress: receives each step.
        take: measures a window, with the arguments of `measure`, which is the default.

    Raises:
        LoadError: as in `measure` and `ramp_concurrency`.
    """
    progress, take = progress or Silent(), take or measure
    began = time.monotonic()
    rungs = ramp_concurrency(generator, target, requests, step_s=_STEP_S, progress=progress)
    progress.start(f"Searching the highest rate that keeps {slo}")

    def probe(window_s: float, n: int | None, warmup_s: float, rate_rps: float, with_seed: int) -> Measurement:
        window = take(
            generator,
            target,
            requests,
            slo,
            rate_rps=rate_rps,
            seed=with_seed,
            window_s=window_s,
            n=n,
            warmup_s=warmup_s,
            null_rps=null_rps,
        )
        progress.advance(note=f"{rate_rps:,.0f}/s: {window.outcome}")
        return window

    def search_probe(rate_rps: float, with_seed: int) -> Measurement:
        return probe(_SEARCH_S, search_window_n(slo, rate_rps, _SEARCH_S), 1.0, rate_rps, with_seed)

    search = find_capacity(
        search_probe,
        start_rps=0.5 * max(rung.throughput_rps for rung in rungs),
        slo=slo,
        seed=seed,
        confirm=partial(probe, budget_s / 5, None, 2.0),
        budget_s=budget_s,
    )
    progress.done(f"{search.capacity_rps:,.0f} requests/s")
    return msgspec.structs.replace(search, rungs=rungs, seconds=time.monotonic() - began)


def find_capacity(
    probe: Probe,
    *,
    start_rps: float,
    slo: SLO,
    resolution: float = 1.03,
    growth: float = 1.25,
    seed: int = 0,
    confirm: Probe | None = None,
    prove: bool = True,
    budget_s: float = math.inf,
) -> Search:
    """Search the highest rate at which the SLO holds.

    First short windows bracket it: the rate grows by `growth` until a window misses (or is halved until one does not),
    then follows bisection in the logarithm of the rate. In this phase a window counts as good if it passes, or if no
    more requests are late than the SLO allows, proven or not; one that misses is repeated once. Then the proof: a
    fresh window has to pass, from the best rate downwards by 3% at a time, and faster when the budget is nearly spent.
    With budget left, the rate grows again, by bisection between what was proven and what was not.

    All it knows comes from `probe` and `confirm`, and the next window depends on nothing else. So measurements kept on
    file by rate and seed are enough to repeat a search, or to resume one that was killed.

    Args:
        probe: measures one window. Errors it raises end the search.
        start_rps: the first rate; half of the best throughput of `ramp_concurrency` is a good one.
        slo: the SLO.
        resolution: bisect until the best and the lowest bad rate are no further apart than this factor.
        growth: factor between rates on the way up.
        seed: all windows' seeds are made from it.
        confirm: measures the windows of the proof; None for `probe`. Longer windows prove more: `docs/benchmarks.md`
            shows how long it takes to prove a queue 10% inside its limit.
        prove: false to end before the proof: the capacity is an estimate then.
        budget_s: seconds of load after which it chooses a rate that is easier to prove; without a proof, after which it
            stops.
    """
    if not (math.isfinite(start_rps) and start_rps > 0):
        raise LoadError(
            f"cannot start a search at {start_rps:g} requests per second", "a rate is above zero", "start at 1 or more"
        )
    windows = _Windows(seed, slo)
    bracket_s = math.inf if prove else budget_s
    low, high = _bracket(windows, probe, start_rps, growth, bracket_s)
    if low is None:
        last = windows.runs[-1]
        return windows.search(None, f"not even {last.rate_rps:g} requests/s keep {slo}: {last.reason}")
    while high is not None and high.rate_rps / low.rate_rps > resolution and windows.cost_s < bracket_s:
        middle = rounded(math.sqrt(low.rate_rps * high.rate_rps))
        if not low.rate_rps < middle < high.rate_rps:
            break
        window = windows.short(probe, middle)
        if _is_good(window):
            low = window
        else:
            high = window
    if not prove:
        return windows.search(None, "no proof was asked for")
    rate = low.rate_rps if low.outcome is Outcome.PASS else rounded(low.rate_rps * _FIRST_DROP)
    last_drops = iter((*_LAST_DROPS, 0.0))
    longest, unproven = 0.0, None if high is None else high.rate_rps
    while rate > 0:
        window = windows.measure(confirm or probe, rate)
        longest = max(longest, _cost_s(window))
        if window.outcome is Outcome.PASS:
            if confirm is not None and math.isfinite(budget_s):
                window = _raise_proven(windows, confirm, window, unproven, max(resolution, 1 / _DROP), budget_s)
            limited = high is not None and high.outcome in _RETRIES
            reason = f"at {high.rate_rps:g} requests/s: {high.reason}" if high is not None and limited else ""
            return windows.search(window, reason)
        unproven = rate
        hurry = windows.cost_s + _PATIENCE * longest > budget_s or rate < 0.8 * low.rate_rps
        rate = rounded(rate * (next(last_drops) if hurry else _DROP))
    last = windows.runs[-1]
    return windows.search(None, f"no rate down to {last.rate_rps:g} requests/s could be proven: {last.reason}")


def _raise_proven(
    windows: _Windows, confirm: Probe, proven: Measurement, unproven: float | None, apart: float, budget_s: float
) -> Measurement:
    """The window of the highest rate that can be proven in the remaining budget.

    The first rate that is proven lies a drop below the best rate of the bisection, and may be too low by that much.

    Args:
        windows: all so far.
        confirm: measures a window of the proof.
        proven: the window that passed.
        unproven: the lowest rate that was bad in the bisection or could not be proven.
        apart: the factor between the two at which it ends.
        budget_s: of the search.
    """
    top, longest = unproven or proven.rate_rps, _cost_s(proven)
    while top / proven.rate_rps > 1.001 * apart and windows.cost_s + _PATIENCE * longest <= budget_s:
        middle = rounded(math.sqrt(proven.rate_rps * top))
        window = windows.measure(confirm, middle)
        longest = max(longest, _cost_s(window))
        if window.outcome is Outcome.PASS:
            proven = window
        else:
            top = middle
    return proven


def _cost_s(window: Measurement) -> float:
    """Seconds of load, a warm-up for each part included."""
    return window.duration_s + WARMUP_S * window.looks


class _Windows:
    """The windows measured so far. The seed of the next is made from their number."""

    def __init__(self, seed: int, slo: SLO) -> None:
        self._seed = seed
        self._slo = slo
        self.runs: list[Measurement] = []
        self._retries = 0

    @property
    def cost_s(self) -> float:
        """Seconds of load so far."""
        return sum(map(_cost_s, self.runs))

    def measure(self, probe: Probe, rate_rps: float, *, proof: bool = True) -> Measurement:
        """A window; repeated where it is not informative. With `proof`, also where it is, but cannot be a proof.

        Where more than `_BY_FAR` of the requests were late, a lower rate tells more, whatever made the window invalid:
        without `proof` it is repeated only if the machine was disturbed, and once.
        """
        retries = 0
        while True:
            window = probe(rate_rps, self._seed * 1000 + len(self.runs))
            self.runs.append(window)
            most = _RETRIES.get(window.outcome, 0)
            if not proof and window.late > _BY_FAR * window.n:
                most = min(most, 1 if window.outcome is Outcome.VOID else 0)
            if retries >= most or (is_informative(window) and not proof):
                return window
            retries += 1
            self._retries += 1

    def short(self, probe: Probe, rate_rps: float, budget_s: float = math.inf) -> Measurement:
        """A window of the bracket or the bisection; one that misses is repeated once, unless it misses by far.

        A short window misses after a single pause of the machine, and would bound the search for good. With the budget
        spent it is not repeated: a lower rate tells more.
        """
        window = self.measure(probe, rate_rps, proof=False)
        undecided = window.outcome in (Outcome.FAIL, Outcome.INCONCLUSIVE) and not _is_good(window)
        if undecided and self.cost_s <= budget_s and window.late <= _BY_FAR * window.n:
            window = self.measure(probe, rate_rps, proof=False)
        return window

    def search(self, confirmed: Measurement | None, reason: str) -> Search:
        """The result of the search."""
        found = estimate(self.runs, self._slo)
        capacity_rps = 0.0 if found is None else rounded(found.rate_rps)
        if confirmed is not None:
            capacity_rps = confirmed.rate_rps
        failing = [run.rate_rps for run in self.runs if run.outcome.refutes and run.rate_rps > capacity_rps]
        return Search(
            capacity_rps=capacity_rps,
            lowest_failing_rps=min(failing, default=None),
            confirmed=confirmed,
            runs=tuple(self.runs),
            retries=self._retries,
            reason=reason,
            estimate=found,
        )


def _bracket(
    windows: _Windows, probe: Probe, start_rps: float, growth: float, budget_s: float
) -> tuple[Measurement | None, Measurement | None]:
    """A good window and a bad one at a higher rate; None for what was not found."""
    low = high = None
    rate = rounded(start_rps)
    for tried in range(1, _STEPS_UP + 1):
        window = windows.short(probe, rate, budget_s)
        if _is_good(window):
            low = window
            if high is not None:
                break
            rate = rounded(rate * growth)
        else:
            high = window
            if low is not None:
                break
            rate = rounded(rate / 2)
            if rate < start_rps * _SHARE_DOWN:
                break
        if low is not None and windows.cost_s > budget_s:
            break
        if low is None and windows.cost_s > _PATIENCE * budget_s and tried >= _LEAST_RATES:
            break
    return low, high


def _is_good(window: Measurement) -> bool:
    return is_informative(window) and window.keeps_slo and not window.outcome.refutes


def rounded(rate_rps: float) -> float:
    """To four digits: a rate is part of the name under which its measurement is kept."""
    return float(f"{rate_rps:.4g}")
