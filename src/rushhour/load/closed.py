"""Closed loops: a fixed number of users, each of whom waits for an answer before sending the next request."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from rushhour.errors import LoadError
from rushhour.load.generator.job import MAX_CONNECTIONS, ClosedJob, Tick
from rushhour.load.generator.process import Generator, Sender
from rushhour.load.generator.samples import Samples, Status
from rushhour.load.payload import Payload
from rushhour.load.significance import percentile_ranks
from rushhour.load.target import Endpoint
from rushhour.measurement import ClosedLoop, Interval
from rushhour.progress import Progress, Silent

_FEWEST_FOR_P99 = 299
_GAIN = 1.05
_MOST_CONCURRENCY = 512


class ClosedResult(msgspec.Struct, frozen=True):
    """What a fixed number of users measured. While a server stands still it gets no requests, so the p99 is not the one
    of independent users (coordinated omission), and there is no verdict.

    Attributes:
        concurrency: users.
        duration_s: length.
        n: requests sent.
        errors: of these, answered wrongly or not at all; `error_kinds` has the kinds.
        shed: of these, shed.
        throughput_rps: answers per second.
        p50_ms: median time from sending to the last byte, of those answered.
        p99_ms: its 99th percentile; None where there are under 299 of them.
        p99_interval_ms: its 95% interval.
        generator_cpu: CPU seconds of the generator per second, 1.0 = one core.
    """

    concurrency: int
    duration_s: float
    n: int
    errors: int
    shed: int
    throughput_rps: float
    p50_ms: float | None
    p99_ms: float | None
    p99_interval_ms: Interval | None
    generator_cpu: float
    error_kinds: dict[str, int]
    first_error: str


def closed_loop(
    generator: Generator,
    target: Endpoint,
    requests: Sequence[Payload],
    *,
    concurrency: int,
    duration_s: float,
    check: bool = False,
    on_tick: Callable[[Tick], None] | None = None,
) -> ClosedResult:
    """Keep `concurrency` requests in flight for `duration_s`.

    Raises:
        LoadError: as in `measure`, or if the users are none or too many.
    """
    if not 1 <= concurrency <= MAX_CONNECTIONS:
        raise LoadError(
            f"cannot run a closed loop of {concurrency} users",
            f"allowed are 1 to {MAX_CONNECTIONS}",
            "use --closed-loop 8",
        )
    if not (math.isfinite(duration_s) and duration_s > 0):
        raise LoadError(f"cannot send requests for {duration_s:g} s", "a time is above zero", "use --duration 10s")
    job = ClosedJob(
        host=target.host,
        port=target.port,
        requests=tuple(requests),
        limit_s=duration_s,
        timeout_s=max(5.0, duration_s),
        outputs=target.outputs,
        protocol=target.protocol,
        check=check,
        concurrency=concurrency,
        duration_s=duration_s,
    )
    samples = generator.run(job, on_tick)
    is_answered = samples.status == Status.OK
    latencies = np.sort((samples.done - samples.sent)[is_answered]) * 1e3
    n = len(latencies)
    low, high = percentile_ranks(n, 99) if n else (1, 1)
    enough = n >= _FEWEST_FOR_P99
    lasted = min(duration_s, float(np.nanmax(samples.done))) if n else duration_s
    in_time = int(np.count_nonzero(samples.done[is_answered] <= lasted))
    return ClosedResult(
        concurrency=concurrency,
        duration_s=duration_s,
        n=len(samples),
        errors=samples.count(Status.ERROR) + samples.count(Status.LOST),
        shed=samples.count(Status.SHED),
        throughput_rps=in_time / max(lasted, 1e-9),
        p50_ms=float(np.median(latencies)) if n else None,
        p99_ms=float(latencies[math.ceil(0.99 * n) - 1]) if enough else None,
        p99_interval_ms=(float(latencies[low - 1]), float(latencies[high - 1])) if enough else None,
        generator_cpu=samples.generator_cpu,
        error_kinds=dict(samples.error_kinds),
        first_error=samples.first_error,
    )


def closed_window(
    generator: Sender,
    target: Endpoint,
    requests: Sequence[Payload],
    *,
    concurrency: int,
    seconds: float,
    within_s: float = math.inf,
) -> ClosedLoop:
    """A short closed loop, as throughput and mean latency.

    Args:
        generator: sends the load.
        target: from `discover`.
        requests: from `payloads`.
        concurrency: users.
        seconds: length; the first fifth is not counted.
        within_s: answers that take longer are not counted.

    Raises:
        LoadError: as in `measure`, or if the server answers no request.
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
    point = _throughput(samples, concurrency, seconds, within_s)
    if point.throughput_rps == 0.0 and not (samples.status == Status.OK).any():
        raise LoadError(
            f"{target.url} answers no request",
            samples.first_error or "all requests were shed",
            "check that the model is ready",
        )
    return point


def ramp_concurrency(
    generator: Sender,
    target: Endpoint,
    requests: Sequence[Payload],
    *,
    step_s: float = 1.0,
    progress: Progress | None = None,
) -> tuple[ClosedLoop, ...]:
    """Closed loops at concurrency 1, 2, 4, ... until throughput grows by less than 5% twice in a row.

    Once is not enough: a server that batches answers two users one after the other, and two at a time only from the
    third on.

    Args:
        generator: sends the load.
        target: from `discover`.
        requests: from `payloads`.
        step_s: length of each closed loop.
        progress: receives each step.

    Raises:
        LoadError: as in `measure`, or if the server answers no request.
    """
    progress = progress or Silent()
    progress.start("throughput in a closed loop")
    points: list[ClosedLoop] = []
    best, without_gain, concurrency = 0.0, 0, 1
    while without_gain < 2 and concurrency <= _MOST_CONCURRENCY:
        point = closed_window(generator, target, requests, concurrency=concurrency, seconds=step_s)
        points.append(point)
        without_gain = without_gain + 1 if point.throughput_rps < _GAIN * best else 0
        best = max(best, point.throughput_rps)
        doubt = "" if point.consistent else f" (Little's law is off by {point.little - 1:+.0%})"
        progress.advance(note=f"concurrency {concurrency}: {point.throughput_rps:,.0f} requests/s{doubt}")
        concurrency *= 2
    progress.done(f"{best:,.0f} requests/s")
    return tuple(points)


def _throughput(samples: Samples, concurrency: int, seconds: float, within_s: float) -> ClosedLoop:
    """Answers per second and their mean latency: over the last four fifths, or over all where few requests ended."""
    answered = samples.status == Status.OK
    answered &= samples.done - samples.scheduled <= within_s
    settled = answered & (samples.done >= 0.2 * seconds) & (samples.done <= seconds)
    count = int(np.count_nonzero(settled))
    if count >= 20:
        throughput = count / (0.8 * seconds)
    elif answered.any():
        settled, throughput = answered, float(np.count_nonzero(answered) / samples.done[answered].max())
    else:
        return ClosedLoop(concurrency, 0.0, 0.0)
    return ClosedLoop(concurrency, throughput, float((samples.done - samples.scheduled)[settled].mean()))
