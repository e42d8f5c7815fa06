"""From one window to a capacity: measure at a rate, estimate the throughput, search the highest rate that passes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import msgspec
import numpy as np

from rushhour.errors import LoadError
from rushhour.goal import SLO
from rushhour.load.arrivals import Arrivals, Trace, check_rate, poisson
from rushhour.load.estimate import Estimate, estimate, tells
from rushhour.load.generator.job import ClosedJob, OpenJob, Tick
from rushhour.load.generator.null import null_throughput
from rushhour.load.generator.process import Generator
from rushhour.load.generator.samples import Samples, Status
from rushhour.load.payload import Payload
from rushhour.load.target import Endpoint, Target
from rushhour.load.verdict import ERROR, Look, judge, needed_n
from rushhour.measurement import Measurement, Outcome, Rung
from rushhour.progress import Progress, Silent

_WARMUP_REQUESTS = 200
_WARMUP_MOST_S = 10.0
_MISSES, _FEWEST_MISSES = 10, 1
_STRETCH = 3.0
_GLANCE_MOST_S = 10.0
_LIMITS = 20.0
_FIRST_LOOK_S = 5.0
_RETRIES = {Outcome.VOID: 3, Outcome.GENERATOR_LIMITED: 1}
"""Noise passes. A generator at its limit is there again the next time, unless noise had a part in it."""
_STEPS_UP = 40
_BY_FAR = 0.3
"""Of a window's requests: where more are late, it was the server."""
_SHARE_DOWN = 1 / 16
_FIRST_DROP, _DROP = 0.95, 0.97
_PATIENCE = 2.0
"""So many windows must still fit into the budget for another try. So much of a budget may go until something held."""
_LAST_DROPS = (0.95, 0.93, 0.90, 0.85, 0.75, 0.6)
_GAIN = 1.05
_MOST_CONCURRENCY = 512
_WARMUP_S = 2.0
_RUNG_S, _WAY_S = 0.5, 2.5
_SEEDS, _PARTS = 100_003, 10_007
"""How far apart the seeds of another try, and of another part of a window, are."""

Probe = Callable[[float, int], Measurement]
"""One window of load, asked for by its rate in requests per second and its seed."""


class Sender(Protocol):
    """What sends load: a `Generator`, or one that exists only as numbers (`rushhour.testing.queues`)."""

    def run(self, job: OpenJob | ClosedJob, on_progress: Callable[[Tick], None] | None = None) -> Samples:
        """Do a job and return what happened."""


def window_n(slo: SLO, rate_rps: float, window_s: float = 3.0, error: float = ERROR) -> int:
    """How many requests a window holds: `window_s` long, longer where the SLO needs it.

    It needs enough requests for a clear verdict (10 late ones allowed), or at least for a possible one (1 late one)
    where the former would take three times as long as asked. And it needs 20 times the limit: with a backlog that
    grows by 5% of the time, a server over its capacity is over the limit within that, not just on its way there.

    Args:
        error: how often what does not hold may pass.
    """
    seconds = max(window_s, _LIMITS * slo.limit_s)
    clear, least = needed_n(slo, _MISSES, error), needed_n(slo, _FEWEST_MISSES, error)
    clear = min(clear, max(least, math.ceil(rate_rps * seconds * _STRETCH)))
    return max(clear, math.ceil(rate_rps * seconds))


def why_longer(slo: SLO, rate_rps: float, window_s: float) -> str:
    """How long `measure` may take at this rate, and why, where that is more than was asked for; else empty.

    Args:
        window_s: that was asked for.
    """
    n, warmup = window_n(slo, rate_rps, window_s), _warmup_n(rate_rps)
    parts = len(look_sizes(slo, rate_rps, n))
    takes_s = (n + parts * warmup) / rate_rps
    if takes_s <= 1.5 * window_s + _WARMUP_S + 1:
        return ""
    reasons = []
    if n > math.ceil(rate_rps * window_s):
        because = f"a verdict on {slo} takes {n:,} requests"
        if n == math.ceil(rate_rps * _LIMITS * slo.limit_s):
            because = f"a queue that grows shows after {_LIMITS:g} times the limit"
        reasons.append(f"{because} ({n / rate_rps:.0f} s)")
    each = f"each of its {parts} parts begins" if parts > 1 else "it begins"
    reasons.append(f"{each} with {warmup:,} requests of warm-up ({warmup / rate_rps:.0f} s)")
    return f"{rate_rps:g} requests/s take up to {takes_s:.0f} s, not {window_s:g} s: {'; '.join(reasons)}"


def _warmup_n(rate_rps: float, warmup_s: float = _WARMUP_S, *, is_warm: bool = False) -> int:
    least = 1 if is_warm else min(_WARMUP_REQUESTS, math.ceil(rate_rps * _WARMUP_MOST_S))
    return max(math.ceil(rate_rps * warmup_s), least)


def glance_n(slo: SLO, rate_rps: float, window_s: float) -> int:
    """How many requests a window holds that finds the way and proves little: as few as allow for one late request.

    Where so few would take long, as many as come in 10 s: then it only tells whether many are late.
    """
    fewest = min(needed_n(slo, _FEWEST_MISSES), math.ceil(rate_rps * _GLANCE_MOST_S))
    return max(math.ceil(rate_rps * max(window_s, _LIMITS * slo.limit_s)), fewest)


def look_sizes(slo: SLO, rate_rps: float, n: int) -> tuple[int, ...]:
    """At how many requests a window that grows up to `n` is looked at: each time twice as many, at the end all.

    Not before 5 s, 20 times the limit, and as many requests as a clear verdict needs: earlier there is little to see.
    """
    first = max(math.ceil(rate_rps * max(_FIRST_LOOK_S, _LIMITS * slo.limit_s)), needed_n(slo, _MISSES))
    sizes = [n]
    while sizes[0] / 2 >= first:
        sizes.insert(0, sizes[0] // 2)
    return tuple(sizes)


def measure(
    generator: Sender,
    target: Endpoint,
    requests: Sequence[Payload],
    slo: SLO,
    *,
    rate_rps: float,
    seed: int,
    window_s: float = 3.0,
    n: int | None = None,
    warmup_s: float = 2.0,
    is_warm: bool = False,
    sequential: bool = True,
    retries: int = 0,
    null_rps: float | None = None,
    error: float = ERROR,
    arrivals: Arrivals = poisson,
    expected: Sequence[bytes] = (),
    check: bool = False,
    progress: Progress | None = None,
    on_tick: Callable[[Tick], None] | None = None,
) -> Measurement:
    """One window of open-loop load, and its verdict.

    The warm-up is the first part of the same schedule; nothing is drained between the two. A sequential window is
    grown in parts, each of them a schedule of its own with its own warm-up, until the verdict is clear: far inside
    the limit it passes early, far outside it is given up early.

    Args:
        generator: sends the load.
        target: from `discover`.
        requests: from `payloads`.
        slo: what is asked.
        rate_rps: requests per second.
        seed: of the arrivals.
        window_s: how long to measure, at most; longer where the SLO needs more requests, see `window_n`.
        n: exactly so many requests instead, looked at once.
        warmup_s: how long to load the server before that; longer where that would be less than 200 requests.
        is_warm: the server was loaded just now: a warm-up of `warmup_s` does, however few requests that is.
        sequential: end the window as soon as it is decided; false for one look at all of it. A recording is replayed
            whole, in one.
        retries: how often to begin anew, on a fresh seed, where the machine was disturbed.
        null_rps: the generator's own bound; None has it measured by `null_throughput`, once in a process.
        error: how often what does not hold may pass: less than 5% where several windows are tried for one claim.
        arrivals: the arrival process.
        expected: the right answer's body for each of `requests`; another answer is an error.
        check: compare answers also where none is expected beforehand: with the first to the same request.
        progress: is told how it goes.
        on_tick: is told too, in figures, about five times a second.

    Raises:
        LoadError: if the server cannot be reached, rejects the requests or answers nonsense, or the generator is gone.
    """
    check_rate(rate_rps)
    wanted = window_n(slo, rate_rps, window_s, error) if n is None else n
    if wanted < 1:
        raise LoadError(f"cannot judge {wanted} requests", "a verdict needs some", "ask for more")
    warmup = _warmup_n(rate_rps, warmup_s, is_warm=is_warm)
    sizes = (
        look_sizes(slo, rate_rps, wanted) if sequential and n is None and not isinstance(arrivals, Trace) else (wanted,)
    )
    if null_rps is None and isinstance(generator, Generator):
        null_rps = null_throughput(generator, requests, target.protocol)
    report = _Report(progress or Silent(), on_tick)
    report.progress.start(f"{rate_rps:g} requests/s", (wanted + len(sizes) * warmup) / rate_rps)

    def run(size: int, with_seed: int) -> Samples:
        schedule = arrivals(rate_rps, n=warmup + size, seed=with_seed)
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
        report.begin()
        began = time.monotonic()
        samples = generator.run(job, report)
        if isinstance(target, Target) and len(samples) > samples.warmup:
            since, until = (began + float(samples.scheduled[at]) for at in (samples.warmup, -1))
            speeds.extend(target.speeds(since, until))
        return samples

    for attempt in range(retries + 1):
        speeds: list[float] = []
        first_seed = seed + attempt * _SEEDS
        measurement, stopped = _grown(run, sizes, slo, rate_rps, first_seed, null_rps, error)
        if stopped or measurement.outcome is not Outcome.VOID:
            break
    measurement = msgspec.structs.replace(measurement, retries=attempt, speeds=tuple(speeds))
    report.progress.done(f"{measurement.outcome}: {measurement.reason}")
    return measurement


def _grown(
    run: Callable[[int, int], Samples],
    sizes: Sequence[int],
    slo: SLO,
    rate_rps: float,
    seed: int,
    null_rps: float | None,
    error: float,
) -> tuple[Measurement, bool]:
    """The window, grown to the first of `sizes` at which it is decided; and whether it was stopped before that."""
    parts: list[Samples] = []
    before = 0
    while True:
        size = sizes[len(parts)]
        parts.append(run(size - before, seed + len(parts) * _PARTS))
        stopped = len(parts[-1]) < parts[-1].warmup + size - before
        look = Look(error=error) if stopped else Look(size / sizes[-1], before / sizes[-1], error)
        measurement = judge(parts, slo, rate_rps=rate_rps, seed=seed, look=look, null_rps=null_rps)
        if stopped or measurement.decided or len(parts) == len(sizes):
            return measurement, stopped
        before = size


def closed_window(
    generator: Sender,
    target: Endpoint,
    requests: Sequence[Payload],
    *,
    concurrency: int,
    seconds: float,
    within_s: float = math.inf,
) -> Rung:
    """So many users, each of whom asks again as soon as it is answered, for so many seconds.

    Args:
        generator: sends the load.
        target: from `discover`.
        requests: from `payloads`.
        concurrency: how many users.
        seconds: how long; the first fifth is not counted.
        within_s: answers that take longer are not counted.

    Raises:
        LoadError: as in `measure`, or if the server answers nothing at all.
    """
    job = ClosedJob(
        host=target.host,
        port=target.port,
        requests=tuple(requests),
        limit_s=seconds,
        timeout_s=max(5.0, 10 * seconds),
        outputs=target.outputs,
        protocol=target.protocol,
        concurrency=concurrency,
        duration_s=seconds,
    )
    samples = generator.run(job)
    rung = _rung(samples, concurrency, seconds, within_s)
    if rung.throughput_rps == 0.0 and not (samples.status == Status.OK).any():
        raise LoadError(
            f"{target.url} answers no request",
            samples.first_error or "all were turned away",
            "check that the model is ready",
        )
    return rung


def climb(
    generator: Sender,
    target: Endpoint,
    requests: Sequence[Payload],
    *,
    rung_s: float = 1.0,
    progress: Progress | None = None,
) -> tuple[Rung, ...]:
    """A ladder of closed loops: concurrency 1, 2, 4, ... until it gains less than 5% twice in a row.

    Once is not enough: a server that batches answers two users one after the other, and only from the third on two
    at a time.

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
    rungs: list[Rung] = []
    best, without_gain, concurrency = 0.0, 0, 1
    while without_gain < 2 and concurrency <= _MOST_CONCURRENCY:
        rung = closed_window(generator, target, requests, concurrency=concurrency, seconds=rung_s)
        rungs.append(rung)
        without_gain = without_gain + 1 if rung.throughput_rps < _GAIN * best else 0
        best = max(best, rung.throughput_rps)
        doubt = "" if rung.consistent else f" (Little's law is off by {rung.little - 1:+.0%})"
        progress.advance(note=f"{concurrency} at a time: {rung.throughput_rps:,.0f} requests/s{doubt}")
        concurrency *= 2
    progress.done(f"{best:,.0f} requests/s")
    return tuple(rungs)


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
    """The capacity of a server, from nothing: the ladder, the bracket, the bisection, the proof.

    Short windows find the way, long ones prove: a queue near its capacity is slow in long waves.

    Args:
        generator: sends the load.
        target: from `discover`.
        requests: from `payloads`.
        slo: what is asked.
        seed: of everything random.
        budget_s: how long it may take, about: it decides how long the proof's windows are, and is not enforced.
        null_rps: as in `measure`.
        progress: is told how it goes.
        take: takes a window, with the arguments of `measure`, which it is by default.

    Raises:
        LoadError: as in `measure` and `climb`.
    """
    progress, take = progress or Silent(), take or measure
    began = time.monotonic()
    rungs = climb(generator, target, requests, rung_s=_RUNG_S, progress=progress)
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

    def look(rate_rps: float, with_seed: int) -> Measurement:
        return probe(_WAY_S, glance_n(slo, rate_rps, _WAY_S), 1.0, rate_rps, with_seed)

    search = find_capacity(
        look,
        start_rps=0.5 * max(rung.throughput_rps for rung in rungs),
        slo=slo,
        seed=seed,
        confirm=partial(probe, budget_s / 5, None, 2.0),
        budget_s=budget_s,
    )
    progress.done(f"{search.capacity_rps:,.0f} requests/s")
    return msgspec.structs.replace(search, rungs=rungs, seconds=time.monotonic() - began)


class Search(msgspec.Struct, frozen=True):
    """What a search for capacity found, and all it asked on the way.

    Attributes:
        capacity_rps: the highest rate that passed, once more, on a fresh seed. Where none did, the estimate from all
            windows; 0 only where the SLO held at no rate.
        lowest_failing_rps: the lowest rate above it that failed or was unstable; None where none was found.
        confirmed: the window that confirmed `capacity_rps`; None where it is an estimate.
        runs: every window in the order asked; the confirming one is the last of them that passed.
        retries: windows that were asked again because the machine was disturbed or the generator at its limit.
        reason: why the capacity is 0, or what else than the server bounds it; empty otherwise.
        rungs: the closed loops that it started from; empty where `find_capacity` was told where to start.
        seconds: it took, by the clock; 0 where that is not known.
        estimate: of the capacity, from all windows; None where the SLO held at no rate.
    """

    capacity_rps: float
    lowest_failing_rps: float | None
    confirmed: Measurement | None
    runs: tuple[Measurement, ...]
    retries: int
    reason: str = ""
    rungs: tuple[Rung, ...] = ()
    seconds: float = 0.0
    estimate: Estimate | None = None

    @property
    def proven(self) -> bool:
        """Whether the capacity passed a proof on fresh seeds."""
        return self.confirmed is not None

    @property
    def requests(self) -> int:
        """How many were judged on the way."""
        return sum(run.n for run in self.runs)


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

    First the way is found with short windows: up by `growth` until one misses (or down by halves until one does
    not), then by bisection in the logarithm of the rate. On this way a window counts as good if it passes, or if no
    more requests miss than the SLO allows, proven or not; one that misses is asked a second time. Then the proof: a
    fresh window has to pass, from the best rate downwards by 3% at a time, and faster when time runs out. Where
    there is a budget and some of it is left, it goes up again, by bisection between what was proven and what was not.

    All it knows comes from `probe` and `confirm`, and what it asks next depends on nothing else. So answers that
    are kept on file by rate and seed are enough to repeat a search, or to go on with one that was killed.

    Args:
        probe: measures one window. Errors it raises end the search.
        start_rps: the rate to begin with; half of what the best rung of `climb` carries is a good one.
        slo: what the windows are judged by.
        resolution: bisect until the best and the lowest bad rate are no further apart than this factor.
        growth: factor between rates on the way up.
        seed: all windows' seeds are made from it.
        confirm: measures the windows of the proof; None for `probe`. Longer ones are worth their time: see
            `docs/benchmarks.md` for how long it takes to prove a queue 10% inside its limit.
        prove: false to end where the proof would begin: the capacity is an estimate then.
        budget_s: seconds of load after which it is content with a rate that is surer to be proven; without a proof,
            after which it is content with what it knows.
    """
    if not (math.isfinite(start_rps) and start_rps > 0):
        raise LoadError(
            f"cannot start a search at {start_rps:g} requests per second", "a rate is above zero", "start at 1 or more"
        )
    asked = _Asked(seed, slo)
    way_s = math.inf if prove else budget_s
    low, high = _bracket(asked, probe, start_rps, slo, growth, way_s)
    if low is None:
        last = asked.runs[-1]
        return asked.search(None, f"not even {last.rate_rps:g} requests/s keep {slo}: {last.reason}")
    while high is not None and high.rate_rps / low.rate_rps > resolution and asked.cost_s < way_s:
        middle = rounded(math.sqrt(low.rate_rps * high.rate_rps))
        if not low.rate_rps < middle < high.rate_rps:
            break
        window = asked.look(probe, middle)
        if _looks_good(window):
            low = window
        else:
            high = window
    if not prove:
        return asked.search(None, "no proof was asked for")
    rate = low.rate_rps if low.outcome is Outcome.PASS else rounded(low.rate_rps * _FIRST_DROP)
    last_drops = iter((*_LAST_DROPS, 0.0))
    longest, unproven = 0.0, None if high is None else high.rate_rps
    while rate > 0:
        window = asked.ask(confirm or probe, rate)
        longest = max(longest, _cost_s(window))
        if window.outcome is Outcome.PASS:
            if confirm is not None and math.isfinite(budget_s):
                window = _up_again(asked, confirm, window, unproven, max(resolution, 1 / _DROP), budget_s)
            limited = high is not None and high.outcome in _RETRIES
            reason = f"at {high.rate_rps:g} requests/s: {high.reason}" if high is not None and limited else ""
            return asked.search(window, reason)
        unproven = rate
        hurry = asked.cost_s + _PATIENCE * longest > budget_s or rate < 0.8 * low.rate_rps
        rate = rounded(rate * (next(last_drops) if hurry else _DROP))
    last = asked.runs[-1]
    return asked.search(None, f"no rate down to {last.rate_rps:g} requests/s could be proven: {last.reason}")


def _up_again(
    asked: _Asked, confirm: Probe, proven: Measurement, unproven: float | None, apart: float, budget_s: float
) -> Measurement:
    """The window of the highest rate that can be proven in the time that is left.

    What was proven at once lies a drop below the best rate of the way, and may lie that much too low.

    Args:
        unproven: the lowest rate that was bad on the way or could not be proven.
        apart: the factor between the two that is near enough.
    """
    top, longest = unproven or proven.rate_rps, _cost_s(proven)
    while top / proven.rate_rps > 1.001 * apart and asked.cost_s + _PATIENCE * longest <= budget_s:
        middle = rounded(math.sqrt(proven.rate_rps * top))
        window = asked.ask(confirm, middle)
        longest = max(longest, _cost_s(window))
        if window.outcome is Outcome.PASS:
            proven = window
        else:
            top = middle
    return proven


def _cost_s(window: Measurement) -> float:
    """Seconds of load, a warm-up for each part included."""
    return window.duration_s + _WARMUP_S * window.looks


class _Asked:
    """The windows asked so far. The seed of the next is made from how many there were."""

    def __init__(self, seed: int, slo: SLO) -> None:
        self._seed = seed
        self._slo = slo
        self.runs: list[Measurement] = []
        self._retries = 0

    @property
    def cost_s(self) -> float:
        """Seconds of load so far."""
        return sum(map(_cost_s, self.runs))

    def ask(self, probe: Probe, rate_rps: float, *, proof: bool = True) -> Measurement:
        """A window; again where it says nothing. `proof`: also where it does, but cannot be one.

        Whatever else kept a window from being judged, where more than `_BY_FAR` were late a lower rate tells more: on
        the way it is asked again only if the machine was disturbed, and once.
        """
        retries = 0
        while True:
            window = probe(rate_rps, self._seed * 1000 + len(self.runs))
            self.runs.append(window)
            most = _RETRIES.get(window.outcome, 0)
            if not proof and window.late > _BY_FAR * window.n:
                most = min(most, 1 if window.outcome is Outcome.VOID else 0)
            if retries >= most or (tells(window) and not proof):
                return window
            retries += 1
            self._retries += 1

    def look(self, probe: Probe, rate_rps: float) -> Measurement:
        """A window on the way; one that misses is asked once more, unless it misses by far.

        A short window misses over one pause of the machine, and would bound the search for good.
        """
        window = self.ask(probe, rate_rps, proof=False)
        undecided = window.outcome in (Outcome.FAIL, Outcome.INCONCLUSIVE) and not _looks_good(window)
        if undecided and window.late <= _BY_FAR * window.n:
            window = self.ask(probe, rate_rps, proof=False)
        return window

    def search(self, confirmed: Measurement | None, reason: str) -> Search:
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
    asked: _Asked, probe: Probe, start_rps: float, slo: SLO, growth: float, budget_s: float
) -> tuple[Measurement | None, Measurement | None]:
    """A good window and a bad one at a higher rate; None for what was not found."""
    low = high = None
    rate = rounded(start_rps)
    for _ in range(_STEPS_UP):
        window = asked.look(probe, rate)
        if _looks_good(window):
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
        if asked.cost_s > (budget_s if low is not None else _PATIENCE * budget_s):
            break
    return low, high


def _looks_good(window: Measurement) -> bool:
    return tells(window) and window.keeps_slo and not window.outcome.refutes


def rounded(rate_rps: float) -> float:
    """To four digits: a rate is part of the name under which its measurement is kept."""
    return float(f"{rate_rps:.4g}")


def _timeout_s(slo: SLO) -> float:
    return max(5.0, 10 * slo.limit_s)


def _rung(samples: Samples, concurrency: int, rung_s: float, within_s: float) -> Rung:
    """Answers per second and their mean time: in the last four fifths of the rung, or of all of it where few came."""
    answered = samples.status == Status.OK
    answered &= samples.done - samples.scheduled <= within_s
    settled = answered & (samples.done >= 0.2 * rung_s) & (samples.done <= rung_s)
    count = int(np.count_nonzero(settled))
    if count >= 20:
        throughput = count / (0.8 * rung_s)
    elif answered.any():
        settled, throughput = answered, float(np.count_nonzero(answered) / samples.done[answered].max())
    else:
        return Rung(concurrency, 0.0, 0.0)
    return Rung(concurrency, throughput, float((samples.done - samples.scheduled)[settled].mean()))


class _Report:
    """Turns ticks into progress in seconds; the clock of the ticks starts anew with each part."""

    def __init__(self, progress: Progress, on_tick: Callable[[Tick], None] | None) -> None:
        self.progress = progress
        self._on_tick = on_tick
        self._at_s = 0.0

    def begin(self) -> None:
        """Another part begins."""
        self._at_s = 0.0

    def __call__(self, tick: Tick) -> None:
        if self._on_tick is not None:
            self._on_tick(tick)
        note = f"{tick.sent - tick.ended} in flight, {tick.late} late, {tick.shed} shed, {tick.errors} errors"
        self.progress.advance(max(0.0, tick.at_s - self._at_s), note)
        self._at_s = tick.at_s
