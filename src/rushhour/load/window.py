"""One window of open-loop load: warmed up, sent on schedule, judged while it grows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import msgspec

from rushhour.errors import LoadError
from rushhour.goal import SLO
from rushhour.load.arrivals import Arrivals, Trace, check_rate, poisson
from rushhour.load.generator.job import OpenJob, Tick
from rushhour.load.generator.null import null_throughput
from rushhour.load.generator.process import Generator, Sender
from rushhour.load.generator.samples import Samples
from rushhour.load.payload import Payload
from rushhour.load.significance import ERROR
from rushhour.load.target import Endpoint, Target
from rushhour.load.verdict import InterimAnalysis, judge
from rushhour.load.window_size import interim_sizes, warmup_n, window_n
from rushhour.measurement import Measurement, Outcome
from rushhour.progress import Progress, Silent

_SEEDS, _PARTS = 100_003, 10_007
"""Differences between the seeds of retries, and of the parts of a window."""

Probe = Callable[[float, int], Measurement]
"""Measures one window at a rate in requests per second, with a seed."""


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

    The warm-up is the first part of the same schedule; nothing is drained between the two. A sequential window grows in
    parts, each with a schedule and a warm-up of its own, until the verdict is clear: far inside the limit it passes
    early, far outside it ends early.

    Args:
        generator: sends the load.
        target: from `discover`.
        requests: from `payloads`.
        slo: the SLO.
        rate_rps: requests per second.
        seed: of the arrivals.
        window_s: how long to measure, at most; longer where the SLO needs more requests, see `window_n`.
        n: exactly this number of requests instead, analysed once.
        warmup_s: length of the warm-up; longer where it would have less than 200 requests.
        is_warm: the server is warm: the warm-up lasts `warmup_s`, however few requests that is.
        sequential: end the window as soon as it is decided; false for one analysis of the whole. A recorded trace is
            replayed whole, in one part.
        retries: how often to repeat the window, on a fresh seed, where the machine was disturbed.
        null_rps: the generator's throughput against the null server; None measures it by `null_throughput`, once per
            process.
        error: how often a rate that does not hold may pass: less than 5% where several windows are tried for one claim.
        arrivals: the arrival process.
        expected: the right answer's body for each of `requests`; another answer is an error.
        check: compare answers also where none is expected beforehand: with the first to the same request.
        progress: receives each step.
        on_tick: receives the figures about five times a second.

    Raises:
        LoadError: if the server cannot be reached, rejects the requests or sends invalid answers, or the generator's
            process has ended.
    """
    check_rate(rate_rps)
    wanted = window_n(slo, rate_rps, window_s, error) if n is None else n
    if wanted < 1:
        raise LoadError(f"cannot judge {wanted} requests", "a verdict needs at least one", "use a larger number")
    warmup = warmup_n(rate_rps, warmup_s, is_warm=is_warm)
    is_whole = not sequential or n is not None or isinstance(arrivals, Trace)
    sizes = (wanted,) if is_whole else interim_sizes(slo, rate_rps, wanted)
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
        measurement, stopped = _grow(run, sizes, slo, rate_rps, first_seed, null_rps, error)
        if stopped or measurement.outcome is not Outcome.VOID:
            break
    measurement = msgspec.structs.replace(measurement, retries=attempt, speeds=tuple(speeds))
    report.progress.done(f"{measurement.outcome}: {measurement.reason}")
    return measurement


def _grow(
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
        interim = InterimAnalysis(error=error)
        if not stopped:
            interim = InterimAnalysis(size / sizes[-1], before / sizes[-1], error)
        measurement = judge(parts, slo, rate_rps=rate_rps, seed=seed, interim=interim, null_rps=null_rps)
        if stopped or measurement.decided or len(parts) == len(sizes):
            return measurement, stopped
        before = size


def _timeout_s(slo: SLO) -> float:
    return max(5.0, 10 * slo.limit_s)


class _Report:
    """Turns ticks into progress in seconds; the clock of the ticks restarts with each part."""

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
