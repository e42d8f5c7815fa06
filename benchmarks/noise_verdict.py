"""The verdict on a host of varying speed: line 3 of `make bench-noise`, all of it simulated.

Every queue of bench-load, and queues on a host of two speeds or of a recorded speed. At a rate whose true percentile is
the limit, and below it, in windows with the interim analyses of `measure`: how often does it pass, and how often does
it fail a rate that holds?

    python benchmarks/noise_verdict.py            about 12 minutes on two cores
    python benchmarks/noise_verdict.py --quick    a short run
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import msgspec
from bench.parts import say
from bench.record import Check, Table, verdict

from load import QUEUES, TURN_AWAY, proportion
from rushhour.goal import SLO
from rushhour.load import interim_sizes, window_n
from rushhour.measurement import Outcome
from rushhour.testing import queues
from rushhour.testing.host_speed import Recorded, TwoState

_BATCHES, _PAIR = queues.Batching(0.001, 0.0005, 32), queues.Batching(0.005, 0.001, 16, 2)
_SINGLE, _FOUR = queues.Deterministic(0.002), queues.Exponential(4, 0.008)
_TWO, _FIRST, _SECOND = TwoState(), Recorded(), Recorded("one stream of one thread")

VARYING: dict[str, tuple[queues.Queue, queues.Arrivals, float]] = {
    "M/D/1, two speeds": (queues.OnVaryingHost(_SINGLE, _TWO), queues.poisson_arrivals, 310.0),
    "M/M/4, two speeds": (queues.OnVaryingHost(_FOUR, _TWO), queues.poisson_arrivals, 280.0),
    "batches of 32, two speeds": (queues.OnVaryingHost(_BATCHES, _TWO), queues.poisson_arrivals, 1240.0),
    "two streams of 16, two speeds": (queues.OnVaryingHost(_PAIR, _TWO), queues.poisson_arrivals, 940.0),
    "M/D/1, recorded": (queues.OnVaryingHost(_SINGLE, _FIRST), queues.poisson_arrivals, 400.0),
    "batches of 32, recorded": (queues.OnVaryingHost(_BATCHES, _FIRST), queues.poisson_arrivals, 1590.0),
    "batches of 32, recorded on one thread": (queues.OnVaryingHost(_BATCHES, _SECOND), queues.poisson_arrivals, 1350.0),
    "two streams of 16, recorded on one thread": (
        queues.OnVaryingHost(_PAIR, _SECOND),
        queues.poisson_arrivals,
        1050.0,
    ),
}
"""Server, arrivals, and its true capacity: the limit is the true 99th percentile of the latency at this rate."""
_ALL = QUEUES | TURN_AWAY | VARYING

_MINUTE = 60.0
_SHORTER = (10.0, 36.0)
_SHARES = (1.02, 1.0, 0.95, 0.8, 0.7)
_FALSE, _FAILS = 0.05, 0.01
_PROVEN = {0.8: 0.80, 0.7: 0.95}


class Judged(msgspec.Struct, frozen=True):
    """The verdicts on one queue at one rate.

    Attributes:
        queue: its name.
        share: of its true capacity.
        seconds: the longest window.
        limit_ms: the true 99th percentile at share 1.
        runs: windows.
        passed: of these.
        failed: of these.
        unstable: of these.
        mean_s: how long a window was on average when it was decided.
    """

    queue: str
    share: float
    seconds: float
    limit_ms: float
    runs: int
    passed: int
    failed: int
    unstable: int
    mean_s: float


def limit_of(name: str, n: int) -> float:
    """The true 99th percentile of a queue at its capacity, in seconds, from `n` requests."""
    queue, arrivals, capacity = _ALL[name]
    return queues.true_percentile(queue, arrivals, capacity, n=n)


def judged(name: str, limit_s: float, share: float, seconds: float, runs: int) -> Judged:
    """Judge `runs` windows of a queue."""
    queue, arrivals, capacity = _ALL[name]
    slo, rate = SLO(percentile=99, limit_s=limit_s), share * capacity
    sizes = interim_sizes(slo, rate, window_n(slo, rate, seconds))
    found = queues.verdicts(queue, arrivals, slo, rate, sizes, runs=runs, seed=3)
    outcomes = [outcome for outcome, _ in found]
    return Judged(
        queue=name,
        share=share,
        seconds=seconds,
        limit_ms=1e3 * limit_s,
        runs=runs,
        passed=outcomes.count(Outcome.PASS),
        failed=outcomes.count(Outcome.FAIL),
        unstable=outcomes.count(Outcome.UNSTABLE),
        mean_s=sum(size for _, size in found) / runs / rate,
    )


def verdict_part(runs: int, requests: int, workers: int) -> tuple[list[Check], list[Table], list[Judged]]:
    """Line 3: its checks, its tables, and what they rest on.

    Args:
        runs: windows at each capacity; at other rates three eighths of them.
        requests: for a true percentile; four times as many where the speed of the host varies.
        workers: processes.
    """
    fewer = max(1, runs * 3 // 8)
    with ProcessPoolExecutor(workers) as pool:
        names = list(_ALL)
        asked = [4 * requests if name in VARYING else requests for name in names]
        limits = dict(zip(names, pool.map(limit_of, names, asked), strict=True))
        jobs = [
            (name, limits[name], share, _MINUTE, runs if share == 1.0 else fewer)
            for name in names
            for share in (_SHARES if name in VARYING else (1.0, 0.8))
        ]
        jobs += [(name, limits[name], share, s, fewer) for name in VARYING for s in _SHORTER for share in (1.0, 0.8)]
        found = []
        for each in pool.map(judged, *zip(*jobs, strict=True)):
            found.append(each)
            say(
                f"{each.queue} at {each.share:g} of its capacity, {each.seconds:g} s: {each.passed} of {each.runs} "
                f"pass, {each.failed} fail, {each.unstable} unstable, after {each.mean_s:.0f} s"
            )
    return _checks(found), _tables(found), found


def _checks(found: Sequence[Judged]) -> list[Check]:
    checks = []
    minute = [each for each in found if each.seconds == _MINUTE]
    for each in minute:
        rate = each.passed / each.runs
        interval = proportion(each.passed, each.runs)
        if each.share == 1.0:
            what = f"{each.queue}: share of windows of at most 60 s that pass exactly at the limit"
            checks.append(verdict(f"3.false.{each.queue}", what, f"<= {_FALSE}", rate, interval, each.runs, unit=""))
        elif each.share in _PROVEN:
            inside = f"{1 - each.share:.0%}"
            what = f"{each.queue}: share of windows of at most 60 s that prove a rate {inside} below the true capacity"
            target = f">= {_PROVEN[each.share]}"
            checks.append(verdict(f"3.true.{inside}.{each.queue}", what, target, rate, interval, each.runs, unit=""))
    holding = [each for each in found if each.share < 1]
    n = sum(each.runs for each in holding)
    for id, counts, said in (
        ("3.fail", sum(each.failed for each in holding), "said to fail"),
        ("3.refuted", sum(each.failed + each.unstable for each in holding), "said to fail or to be unstable"),
    ):
        what = f"all queues, 5% to 30% below the true capacity, all windows: share {said}"
        checks.append(verdict(id, what, f"<= {_FAILS}", counts / n, proportion(counts, n), n, unit=""))
    return checks


def _tables(found: Sequence[Judged]) -> list[Table]:
    rows: list[tuple[str | float | None, ...]] = [
        (
            *(each.queue, each.seconds, each.share, each.limit_ms, float(each.runs)),
            *(each.passed / each.runs, each.failed / each.runs, each.unstable / each.runs, each.mean_s),
        )
        for each in found
    ]
    columns = (
        *("server", "longest window, s", "of the true capacity", "limit, ms", "windows"),
        *("pass", "fail", "unstable", "mean window, s"),
    )
    note = (
        "Two speeds: 30% faster or slower, each for 4 s on average. Recorded: 40 s of a 2-core AMD EPYC VM without "
        "AVX-512, over and over. A window of 10 s lies in one speed often enough that no statistics could tell."
    )
    return [Table("the verdict where the speed of the host varies", columns, tuple(rows), note)]


def main(given: list[str] | None = None) -> int:
    """Print the checks; 0 where all hold."""
    parser = argparse.ArgumentParser(description="The verdict on a host of varying speed, simulated.")
    parser.add_argument("--quick", action="store_true", help="a twentieth of the windows")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes that simulate")
    arguments = parser.parse_args(given)
    runs, requests = (20, 600_000) if arguments.quick else (400, 6_000_000)
    checks, _, _ = verdict_part(runs, requests, arguments.workers)
    for check in checks:
        mark, (low, high) = "ok  " if check.holds else "MISS", check.interval or (0.0, 0.0)
        print(f"{mark} {check.value:.3f} ({low:.3f} to {high:.3f}) {check.target}  {check.what}")
    return 0 if all(check.holds for check in checks) else 1


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
