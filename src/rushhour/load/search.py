"""From one window to a capacity: measure at a rate, estimate the throughput, search the highest rate that passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from rushhour.errors import LoadError
from rushhour.goal import SLO
from rushhour.load.arrivals import Arrivals, check_rate, poisson
from rushhour.load.generator import Generator
from rushhour.load.job import ClosedJob, OpenJob, Tick
from rushhour.load.payload import Payload
from rushhour.load.samples import Samples, Status
from rushhour.load.target import Endpoint
from rushhour.load.verdict import judge, needed_n
from rushhour.measurement import Measurement, Outcome
from rushhour.progress import Progress, Silent

_WARMUP_REQUESTS = 200
_WARMUP_MOST_S = 10.0
_MISSES, _FEWEST_MISSES = 10, 1
_STRETCH = 3.0
_LIMITS = 20.0
_RETRIES = {Outcome.VOID: 3, Outcome.GENERATOR_LIMITED: 1}
"""Noise passes. A generator at its limit is there again the next time, unless noise had a part in it."""
_STEPS_UP = 40
_SHARE_DOWN = 1 / 16
_FIRST_DROP = 0.95
_DROPS = (0.95, 0.93, 0.90, 0.85, 0.75, 0.6)
_GAIN = 1.05
_MOST_CONCURRENCY = 512

Probe = Callable[[float, int], Measurement]
"""One window of load, asked for by its rate in requests per second and its seed."""


def window_n(slo: SLO, rate_rps: float, window_s: float = 3.0) -> int:
    """How many requests a window holds: `window_s` long, longer where the SLO needs it.

    It needs enough requests for a clear verdict (10 late ones allowed), or at least for a possible one (1 late one)
    where the former would take three times as long as asked. And it needs 20 times the limit: with a backlog that
    grows by 5% of the time, a server over its capacity is over the limit within that, not just on its way there.
    """
    seconds = max(window_s, _LIMITS * slo.limit_s)
    clear = min(needed_n(slo, _MISSES), max(needed_n(slo, _FEWEST_MISSES), math.ceil(rate_rps * seconds * _STRETCH)))
    return max(clear, math.ceil(rate_rps * seconds))


def measure(
    generator: Generator,
    target: Endpoint,
    requests: Sequence[Payload],
    slo: SLO,
    *,
    rate_rps: float,
    seed: int,
    window_s: float = 3.0,
    n: int | None = None,
    warmup_s: float = 1.0,
    arrivals: Arrivals = poisson,
    expected: Sequence[bytes] = (),
    check: bool = False,
    progress: Progress | None = None,
    on_tick: Callable[[Tick], None] | None = None,
) -> Measurement:
    """One window of open-loop load, and its verdict.

    The warm-up is the first part of the same schedule; nothing is drained between the two.

    Args:
        generator: sends the load.
        target: from `discover`.
        requests: from `payloads`.
        slo: what is asked.
        rate_rps: requests per second.
        seed: of the arrivals.
        window_s: how long to measure; longer where the SLO needs more requests, see `window_n`.
        n: exactly so many requests instead.
        warmup_s: how long to load the server before that; longer where that would be less than 200 requests.
        arrivals: the arrival process.
        expected: the right answer's body for each of `requests`; another answer is an error.
        check: compare answers also where none is expected beforehand: with the first to the same request.
        progress: is told how it goes.
        on_tick: is told too, in figures, about five times a second.

    Raises:
        LoadError: if the server cannot be reached, rejects the requests or answers nonsense, or the generator is gone.
    """
    check_rate(rate_rps)
    wanted = window_n(slo, rate_rps, window_s) if n is None else n
    warmup = max(math.ceil(rate_rps * warmup_s), min(_WARMUP_REQUESTS, math.ceil(rate_rps * _WARMUP_MOST_S)))
    if wanted < 1:
        raise LoadError(f"cannot judge {wanted} requests", "a verdict needs some", "ask for more")
    schedule = arrivals(rate_rps, n=warmup + wanted, seed=seed)
    job = OpenJob(
        host=target.host,
        port=target.port,
        requests=tuple(requests),
        limit_s=slo.limit_s,
        timeout_s=_timeout_s(slo),
        outputs=target.outputs,
        expected=tuple(expected),
        check=check or bool(expected),
        protocol=target.protocol,
        schedule=schedule.tobytes(),
        warmup=warmup,
    )
    report = _Report(progress or Silent(), on_tick)
    report.progress.start(f"{rate_rps:g} requests/s", float(schedule[-1]))
    measurement = judge(generator.run(job, report), slo, rate_rps=rate_rps, seed=seed)
    report.progress.done(f"{measurement.outcome}: {measurement.reason}")
    return measurement


def estimate_throughput(
    generator: Generator,
    target: Endpoint,
    requests: Sequence[Payload],
    *,
    rung_s: float = 1.0,
    progress: Progress | None = None,
) -> float:
    """What the server carries in a closed loop, in requests per second: where to start a search, never its result.

    Concurrency 1, 2, 4, ... until it gains less than 5% twice in a row. Once is not enough: a server that batches
    answers two users one after the other, and only from the third on two at a time.

    Args:
        generator: sends the load.
        target: from `discover`.
        requests: from `payloads`.
        rung_s: how long each concurrency is kept up.
        progress: is told how it goes.

    Raises:
        LoadError: as in `measure`, or if the server answers nothing at all.
    """
    progress = progress or Silent()
    progress.start("throughput in a closed loop")
    best, without_gain, concurrency = 0.0, 0, 1
    while without_gain < 2 and concurrency <= _MOST_CONCURRENCY:
        job = ClosedJob(
            host=target.host,
            port=target.port,
            requests=tuple(requests),
            limit_s=rung_s,
            timeout_s=max(5.0, 10 * rung_s),
            outputs=target.outputs,
            protocol=target.protocol,
            concurrency=concurrency,
            duration_s=rung_s,
        )
        samples = generator.run(job)
        throughput = _throughput(samples, rung_s)
        if throughput == 0.0 and concurrency == 1:
            raise LoadError(
                f"{target.url} answers no request",
                samples.first_error or "all were turned away",
                "check that the model is ready",
            )
        without_gain = without_gain + 1 if throughput < _GAIN * best else 0
        best = max(best, throughput)
        progress.advance(note=f"{concurrency} at a time: {throughput:,.0f} requests/s")
        concurrency *= 2
    progress.done(f"{best:,.0f} requests/s")
    return best


class Search(msgspec.Struct, frozen=True):
    """What a search for capacity found, and all it asked on the way.

    Attributes:
        capacity_rps: the highest rate that passed, once more, on a fresh seed; 0 where none did.
        lowest_failing_rps: the lowest rate above it that failed or was unstable; None where none was found.
        confirmed: the window that confirmed `capacity_rps`.
        runs: every window in the order asked, the confirming one last.
        retries: windows that were asked again because the machine was disturbed or the generator at its limit.
        reason: why the capacity is 0, or what else than the server bounds it; empty otherwise.
    """

    capacity_rps: float
    lowest_failing_rps: float | None
    confirmed: Measurement | None
    runs: tuple[Measurement, ...]
    retries: int
    reason: str = ""


def find_capacity(
    probe: Probe,
    *,
    start_rps: float,
    slo: SLO,
    resolution: float = 1.05,
    growth: float = 1.5,
    seed: int = 0,
    confirm: Probe | None = None,
) -> Search:
    """Search the highest rate at which the SLO holds.

    First the way is found with single windows: up by `growth` until one misses (or down by halves until one does
    not), then by bisection in the logarithm of the rate. On this way a window counts as good if it passes, or if no
    more requests miss than the SLO allows, proven or not. Then the proof: a fresh window has to pass, from the best
    rate downwards.

    All it knows comes from `probe` and `confirm`, and what it asks next depends on nothing else. So answers that
    are kept on file by rate and seed are enough to repeat a search, or to go on with one that was killed.

    Args:
        probe: measures one window. Errors it raises end the search.
        start_rps: the rate to begin with; half of `estimate_throughput` is a good one.
        slo: what the windows are judged by.
        resolution: bisect until the best and the lowest bad rate are no further apart than this factor.
        growth: factor between rates on the way up.
        seed: all windows' seeds are made from it.
        confirm: measures the windows of the proof; None for `probe`. Longer ones are worth their time: simulated
            queues 10% inside their limit are proven to be so by 80 to 97% of windows of 10 s, but by 20 to 75% of 3 s.
    """
    if not (math.isfinite(start_rps) and start_rps > 0):
        raise LoadError(
            f"cannot start a search at {start_rps:g} requests per second", "a rate is above zero", "start at 1 or more"
        )
    asked = _Asked(seed)
    low, high = _bracket(asked, probe, start_rps, slo, growth)
    if low is None:
        last = asked.runs[-1]
        return asked.search(0.0, None, f"not even {last.rate_rps:g} requests/s keep {slo}: {last.reason}")
    while high is not None and high.rate_rps / low.rate_rps > resolution:
        middle = _rounded(math.sqrt(low.rate_rps * high.rate_rps))
        if not low.rate_rps < middle < high.rate_rps:
            break
        window = asked.ask(probe, middle)
        if _looks_good(window, slo):
            low = window
        else:
            high = window
    rate = low.rate_rps if low.outcome is Outcome.PASS else _rounded(low.rate_rps * _FIRST_DROP)
    for drop in (*_DROPS, 0.0):
        window = asked.ask(confirm or probe, rate)
        if window.outcome is Outcome.PASS:
            limited = high is not None and high.outcome in _RETRIES
            reason = f"at {high.rate_rps:g} requests/s: {high.reason}" if high is not None and limited else ""
            return asked.search(rate, window, reason)
        rate = _rounded(rate * drop)
    last = asked.runs[-1]
    return asked.search(0.0, None, f"no rate down to {last.rate_rps:g} requests/s could be proven: {last.reason}")


class _Asked:
    """The windows asked so far. The seed of the next is made from how many there were."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.runs: list[Measurement] = []
        self._retries = 0

    def ask(self, probe: Probe, rate_rps: float) -> Measurement:
        retries = 0
        while True:
            window = probe(rate_rps, self._seed * 1000 + len(self.runs))
            self.runs.append(window)
            if retries >= _RETRIES.get(window.outcome, 0):
                return window
            retries += 1
            self._retries += 1

    def search(self, capacity_rps: float, confirmed: Measurement | None, reason: str) -> Search:
        failing = [
            run.rate_rps
            for run in self.runs
            if run.outcome in (Outcome.FAIL, Outcome.UNSTABLE) and run.rate_rps > capacity_rps
        ]
        return Search(
            capacity_rps=capacity_rps,
            lowest_failing_rps=min(failing, default=None),
            confirmed=confirmed,
            runs=tuple(self.runs),
            retries=self._retries,
            reason=reason,
        )


def _bracket(
    asked: _Asked, probe: Probe, start_rps: float, slo: SLO, growth: float
) -> tuple[Measurement | None, Measurement | None]:
    """A good window and a bad one at a higher rate; None for what was not found."""
    low = high = None
    rate = _rounded(start_rps)
    for _ in range(_STEPS_UP):
        window = asked.ask(probe, rate)
        if _looks_good(window, slo):
            low = window
            if high is not None:
                break
            rate = _rounded(rate * growth)
        else:
            high = window
            if low is not None:
                break
            rate = _rounded(rate / 2)
            if rate < start_rps * _SHARE_DOWN:
                break
    return low, high


def _looks_good(window: Measurement, slo: SLO) -> bool:
    if window.outcome is Outcome.FAIL:
        return window.late <= window.n * slo.allowed_miss_rate
    return window.outcome is Outcome.PASS


def _rounded(rate_rps: float) -> float:
    """To four digits: a rate is part of the name under which its measurement is kept."""
    return float(f"{rate_rps:.4g}")


def _timeout_s(slo: SLO) -> float:
    return max(5.0, 10 * slo.limit_s)


def _throughput(samples: Samples, rung_s: float) -> float:
    """Answers per second: in the last four fifths of the rung, or over all of it where they are few."""
    done = samples.done[samples.status == Status.OK]
    settled = int(np.count_nonzero((done >= 0.2 * rung_s) & (done <= rung_s)))
    if settled >= 20:
        return settled / (0.8 * rung_s)
    return len(done) / float(done.max()) if len(done) else 0.0


class _Report:
    """Turns ticks into progress in seconds."""

    def __init__(self, progress: Progress, on_tick: Callable[[Tick], None] | None) -> None:
        self.progress = progress
        self._on_tick = on_tick
        self._at_s = 0.0

    def __call__(self, tick: Tick) -> None:
        if self._on_tick is not None:
            self._on_tick(tick)
        note = f"{tick.sent - tick.ended} in flight, {tick.late} late, {tick.shed} shed, {tick.errors} errors"
        self.progress.advance(max(0.0, tick.at_s - self._at_s), note)
        self._at_s = tick.at_s
