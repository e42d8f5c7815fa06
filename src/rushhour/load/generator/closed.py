"""The closed loop: a fixed number of users, each of whom waits for the answer before asking again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from rushhour.errors import LoadError
from rushhour.load.generator.job import MAX_CONNECTIONS, ClosedJob, Tick
from rushhour.load.generator.process import Generator
from rushhour.load.generator.samples import Status
from rushhour.load.payload import Payload
from rushhour.load.target import Endpoint
from rushhour.load.verdict import percentile_ranks
from rushhour.measurement import Interval

_FEWEST_FOR_P99 = 299


class ClosedResult(msgspec.Struct, frozen=True):
    """What so many users got. A server that stands still is asked nothing meanwhile, so its p99 says little about a
    crowd's, and there is no verdict.

    Attributes:
        concurrency: users.
        duration_s: for how long.
        n: requests sent.
        errors: of these, answered wrongly or not at all; `error_kinds` says how.
        shed: of these, turned away.
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
    """Keep `concurrency` requests under way for `duration_s`.

    Raises:
        LoadError: as in `measure`, or if the users are none or too many.
    """
    if not 1 <= concurrency <= MAX_CONNECTIONS:
        raise LoadError(
            f"cannot load with {concurrency} users at a time", f"they are 1 to {MAX_CONNECTIONS}", "use --closed-loop 8"
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
