"""`make bench-load`: the validation of the verdict, the search and the generator.

1 MLPerf LoadGen, as the reference, loads the same server    2 a server that stalls
3 simulated queues of known latency (a: that shed requests which would be late)
4 five searches on one server (v: in virtual time)    5 the throughput of one core of generator
6 a starved generator, a noisy neighbour

Each part stays in the record with the commit that it was measured at; a run resumes where the last was interrupted.

    python benchmarks/load.py                                            everything, about 25 minutes, quiet machine
    python benchmarks/load.py --only 3 --runs 20 --lengths 5             a short run; its results go to .bench/
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import numpy as np
from bench.blocks import raw_costs
from bench.contestants import OURS, PEERS, Setup, request_for, start_ours
from bench.environments import CannotInstall, python_of, versions_of
from bench.models import SEED, bundle_of
from bench.parts import Part, run_parts, say
from bench.record import Check, Table, verdict
from bench.servers import free_port, running
from bench.wire import answers

from rushhour.goal import SLO
from rushhour.load import (
    ClosedJob,
    Generator,
    Interface,
    OpenJob,
    Payload,
    Search,
    Status,
    Target,
    discover,
    judge,
    measure,
    null_server,
    payloads,
    poisson,
    search_capacity,
)
from rushhour.measurement import Measurement, Outcome
from rushhour.testing import queues
from rushhour.testing.fakes import SIGNATURE

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / ".bench"
RESULTS = ROOT / "benchmarks" / "results" / "load.json"

_SLO = SLO(percentile=99, limit_s=0.05)
_FIXED_S, _EACH_S, _BATCH = 0.004, 0.0005, 16
_MOST_RPS = _BATCH / (_FIXED_S + _BATCH * _EACH_S)
_SHARES = (0.3, 0.5, 0.65, 0.75, 0.85)
_FALSE, _TRUE, _INSIDE = 0.05, 0.90, 0.9
_REFUTED = 0.01
"""How often a rate that holds may be called failing or unstable. It is tested at the limit, where it just holds."""
_LENGTHS = "10,20,40,60"
_FEWER = 4
"""The curve over the length of the window uses a quarter of the runs."""
_MORE = {"M/D/1 in bursts": 4}
"""Multiple of the runs: its rate is so close to the bound that 2,000 runs do not separate them."""
_FLOOD_RPS = 20_500.0
_NEIGHBOUR = 0.4
"""Share of the engine's throughput on its core: with a neighbour that uses half of it, nearly all that is left."""
_BODY = 3072

QUEUES: dict[str, tuple[queues.Queue, queues.Arrivals, float]] = {
    "M/D/1": (queues.Deterministic(0.002), queues.poisson_arrivals, 454.0),
    "M/M/4": (queues.Exponential(4, 0.008), queues.poisson_arrivals, 430.0),
    "M/M/16": (queues.Exponential(16, 0.008), queues.poisson_arrivals, 1800.0),
    "batches of 32": (queues.Batching(0.001, 0.0005, 32), queues.poisson_arrivals, 1810.0),
    "two streams of 16": (queues.Batching(0.005, 0.001, 16, 2), queues.poisson_arrivals, 1432.0),
    "M/D/1 in bursts": (queues.Deterministic(0.002), queues.BurstyArrivals(), 400.0),
}
"""Server, arrivals, and the rate whose true 99th percentile is the limit."""

TURN_AWAY: dict[str, tuple[queues.Queue, queues.Arrivals, float]] = {
    "M/D/1 that turns away": (queues.Deterministic(0.002, 0.05), queues.poisson_arrivals, 486.5),
    "M/D/1 in bursts that turns away": (queues.Deterministic(0.002, 0.05), queues.BurstyArrivals(), 412.0),
    "M/M/4 that turns away": (queues.Exponential(4, 0.008, 0.045), queues.poisson_arrivals, 424.0),
}
"""Queues that shed load: about 1% of the requests miss, most of them because they are shed."""
_SIMULATED = QUEUES | TURN_AWAY


class Simulated(msgspec.Struct, frozen=True):
    """The verdicts on a simulated queue.

    Attributes:
        queue: its name in `QUEUES` or `TURN_AWAY`.
        share: of the rate at the limit.
        seconds: the longest window.
        looks: interim analyses; 1 for a fixed n.
        limit_ms: the true 99th percentile at share 1.
        passed: of `runs`.
        refuted: of `runs`; all others were inconclusive.
        mean_s: mean length of a window when it was decided.
        n: requests in the longest window.
        busy_periods: mean number of busy periods of the server in such a window.
    """

    queue: str
    share: float
    seconds: float
    looks: int
    runs: int
    limit_ms: float
    passed: int
    refuted: int
    mean_s: float
    n: int
    busy_periods: float


def limit_of(name: str, n: int) -> float:
    """The true 99th percentile of a queue at its rate, in seconds, from `n` requests."""
    queue, arrivals, at_limit = _SIMULATED[name]
    return queues.true_percentile(queue, arrivals, at_limit, n=n)


def simulated(name: str, limit: float, share: float, seconds: float, looks: int, runs: int) -> Simulated:
    """Judge `runs` windows of a queue."""
    queue, arrivals, at_limit = _SIMULATED[name]
    rate = share * at_limit
    n = round(rate * seconds)
    sizes = [max(1, n >> shift) for shift in reversed(range(looks))]
    found = queues.verdicts(queue, arrivals, SLO(percentile=99, limit_s=limit), rate, sizes, runs=runs, seed=1)
    random = np.random.default_rng(2)
    due = arrivals(rate, n, 8, random)
    over = np.maximum.accumulate(due + queue.latencies(due, random), axis=0)
    return Simulated(
        queue=name,
        share=share,
        seconds=seconds,
        looks=looks,
        runs=runs,
        limit_ms=1e3 * limit,
        passed=sum(outcome is Outcome.PASS for outcome, _ in found),
        refuted=sum(outcome.refutes for outcome, _ in found),
        mean_s=sum(size for _, size in found) / len(found) / rate,
        n=n,
        busy_periods=float((due[1:] > over[:-1]).sum(axis=0).mean()),
    )


def proportion(k: int, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of k of n."""
    z, p = 1.959964, k / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def _times(name: str) -> int:
    return _MORE.get(name, 1)


def simulations(
    id: str, names: Sequence[str], lengths: Sequence[float], runs: int, workers: int
) -> tuple[list[Check], dict[str, Any], list[Table]]:
    """Checks 3 and a."""
    longest = max(lengths)
    with ProcessPoolExecutor(workers) as pool:
        limits = list(pool.map(partial(limit_of, n=6_000_000 if runs >= 200 else 500_000), names))
        jobs = [
            (name, limit, share, seconds, looks, _times(name) * runs if seconds == longest else max(1, runs // _FEWER))
            for name, limit in zip(names, limits, strict=True)
            for share in (1.0, _INSIDE)
            for seconds in lengths
            for looks in (1, 4)
        ]
        found = list(pool.map(simulated, *zip(*jobs, strict=True)))
    checks = []
    for each in found:
        if each.seconds != longest:
            continue
        how = "sequential" if each.looks > 1 else "fixed n"
        if each.share == 1.0:
            kinds = [
                ("false", "pass exactly at the limit", f"<= {_FALSE:g}", each.passed),
                ("refuted", "are refuted exactly at the limit", f"<= {_REFUTED:g}", each.refuted),
            ]
        else:
            kinds = [("true", "pass 10% inside it", f">= {_TRUE:g}", each.passed)]
        for kind, what, target, count in kinds:
            checks.append(
                verdict(
                    f"{id}.{kind}.{'sequential' if each.looks > 1 else 'fixed'}.{each.queue}",
                    f"{each.queue}, {how}, at most {each.seconds:g} s: share of windows that {what}",
                    *(target, count / each.runs, proportion(count, each.runs), each.runs),
                    unit="",
                )
            )
    by = {(each.queue, each.share, each.seconds, each.looks): each for each in found}
    rows: list[tuple[str | float | None, ...]] = []
    for name in names:
        for seconds in lengths:
            for looks in (1, 4):
                at, inside = by[name, 1.0, seconds, looks], by[name, _INSIDE, seconds, looks]
                rows.append(
                    (
                        name,
                        "sequential" if looks > 1 else "fixed n",
                        seconds,
                        float(inside.n),
                        inside.busy_periods,
                        at.passed / at.runs,
                        at.refuted / at.runs,
                        inside.passed / inside.runs,
                        inside.refuted / inside.runs,
                        inside.mean_s,
                    )
                )
    columns = (
        *("server", "test", "longest window, s", "requests", "busy periods", "passes at the limit"),
        *("refuted at the limit", "passes 10% inside", "refuted 10% inside", "mean window inside, s"),
    )
    title = "how long a window has to be" + (" where the server turns away" if id == "a" else "")
    most = max(map(_times, names))
    more = f" ({most * runs} for bursts)" if most > 1 else ""
    note = (
        "Requests and busy periods are those of the longest window 10% inside. The limit is each server's own 99th "
        "percentile at its rate. What neither passes nor is refuted (fail, unstable) is inconclusive. "
        f"{runs} runs for the longest window{more}, {max(1, runs // _FEWER)} for the others."
    )
    return checks, {"simulated": found}, [Table(title, columns, tuple(rows), note)]


@contextlib.contextmanager
def timed_server(*extra: float, max_batch: int = _BATCH) -> Iterator[tuple[int, Setup, Path]]:
    """Our server before an engine that sleeps; gives its port, what it serves, and a folder.

    Raises:
        DidNotStart: if it does not start.
    """
    setup = Setup(
        model="noop",
        bundle=bundle_of("noop", BENCH / "models"),
        precision="f32",
        cores=frozenset({min(_cores())}),
        instances=1,
        max_batch=max_batch,
    )
    with _serving(setup, _FIXED_S, _EACH_S, *extra) as (port, work):
        yield port, setup, work


@contextlib.contextmanager
def _serving(setup: Setup, *arguments: float) -> Iterator[tuple[int, Path]]:
    with TemporaryDirectory(prefix="bench-") as folder:
        port, work = free_port(), Path(folder)
        start = start_ours(setup, port, work)
        probe = request_for(OURS, setup, setup.bundle.samples()["image"][0])

        command = [*start.command, *map(str, arguments)]
        with running(command, start.env, port, setup.cores, work / "server.log", partial(answers, port, probe)):
            yield port, work


def referee(seconds: float) -> list[Check]:
    """Check 1."""
    what = "rates of 5 at which LoadGen's p99 and ours agree: within 10%, or within our interval"
    try:
        python = python_of(PEERS / "loadgen", BENCH, engine=False)
    except CannotInstall as error:
        return [Check("1", what, "rates", ">= 5", None, None, 0, False, f"LoadGen cannot be installed: {error}")]
    agreed, said = 0, []
    with timed_server() as (port, setup, work), Generator(cores={max(_cores())}) as generator:
        target, requests = _aim(port, setup)
        (work / "request").write_bytes(requests[0])
        for number, share in enumerate(_SHARES):
            rate = share * _MOST_RPS
            n = max(1000, round(rate * seconds))
            ours = measure(generator, target, requests, _SLO, rate_rps=rate, seed=number, n=n)
            folder = work / f"loadgen-{number}"
            folder.mkdir()
            command = [str(python), str(PEERS / "loadgen" / "referee.py"), str(port), str(work / "request")]
            done = subprocess.run(
                [*command, f"{rate:.1f}", str(n), str(folder)],
                capture_output=True,
                text=True,
                preexec_fn=lambda: os.sched_setaffinity(0, {max(_cores())}),
            )
            if done.returncode:
                said.append(f"{rate:.0f}/s: LoadGen failed: {done.stderr.strip()[-200:]}")
                continue
            theirs = json.loads(done.stdout.splitlines()[-1])["p99_ms"]
            agrees = False
            if ours.p99_ms is not None and ours.p99_interval_ms is not None:
                low, high = ours.p99_interval_ms
                agrees = abs(ours.p99_ms / theirs - 1) <= 0.1 or low <= theirs <= high
            agreed += agrees
            mine = "none" if ours.p99_ms is None else f"{ours.p99_ms:.1f} ms"
            said.append(f"{rate:.0f}/s: LoadGen {theirs:.1f} ms, ours {mine}")
            say(said[-1])
    return [verdict("1", what, ">= 5", agreed, None, len(_SHARES), unit="rates", why="; ".join(said))]


def stall() -> list[Check]:
    """Check 2."""
    rate, n = 300.0, 1200
    # By a batch each: the stall comes when so many have been answered.
    with timed_server(0.4, 600) as (port, setup, _), Generator(cores={max(_cores())}) as generator:
        target, requests = _aim(port, setup)
        crowd = generator.run(_job(target, requests, poisson(rate, n=n, seed=0)))
    with timed_server(0.4, 100) as (port, setup, _), Generator(cores={max(_cores())}) as generator:
        target, requests = _aim(port, setup)
        alone = generator.run(
            ClosedJob(
                host=target.host,
                port=port,
                requests=tuple(requests),
                limit_s=1.0,
                timeout_s=10.0,
                concurrency=1,
                duration_s=4.0,
            )
        )
    open_ms, closed_ms = (1e3 * float(np.quantile(run.latencies(), 0.99)) for run in (crowd, alone))
    why = f"longest answers: open loop {_longest_ms(crowd):.0f} ms, closed loop {_longest_ms(alone):.0f} ms"
    return [
        verdict("2.open", "p99 of an open loop at 300/s, 400 ms stall", ">= 300", open_ms, None, n, unit="ms", why=why),
        verdict("2.closed", "p99 of a closed loop, same stall", "<= 50", closed_ms, None, len(alone), unit="ms"),
    ]


def searches(count: int, budget_s: float) -> tuple[list[Check], list[Search]]:
    """Check 4."""
    found = []
    with timed_server() as (port, setup, _), Generator(cores={max(_cores())}) as generator:
        target, requests = _aim(port, setup)
        for seed in range(count):
            found.append(search_capacity(generator, target, requests, _SLO, seed=seed, budget_s=budget_s))
            last = found[-1]
            say(
                f"search {seed}: {last.capacity_rps:g}/s, {last.lowest_failing_rps} fails, {last.seconds:.0f} s, "
                f"{last.requests} requests, {len(last.runs)} windows, {last.retries} retries, "
                f"{_end_of(last)} {last.reason}"
            )
    return spread_checks("4", found, [s.seconds for s in found]), found


def spread_checks(id: str, found: Sequence[Search], seconds: Sequence[float]) -> list[Check]:
    """How far results of searches are from their median, and how long searches take."""
    capacities, ends = [each.capacity_rps for each in found], Counter(map(_end_of, found))
    median = float(np.median(capacities))
    apart = max(abs(each / median - 1) for each in capacities) if median else math.inf
    n = len(capacities)
    why = ", ".join(f"{count} {end}" for end, count in ends.items())
    return [
        verdict(
            f"{id}.spread",
            f"{n} searches on one server: farthest from their median",
            "<= 0.05",
            apart if math.isfinite(apart) else None,
            None,
            n,
            why=why,
        ),
        verdict(f"{id}.seconds", "the longest of them", "<= 90", max(seconds), None, n, unit="s"),
    ]


def _end_of(search: Search) -> str:
    return "proven" if search.proven else "estimated" if search.capacity_rps else "without a capacity"


def virtual_searches(count: int) -> list[Check]:
    """Check 4 as it would be on a perfectly quiet machine: the same search in virtual time."""
    server = queues.Batching(_FIXED_S, _EACH_S, _BATCH)
    target = Target("http://virtual", "virtual", 1, "", "noop", Interface.of(SIGNATURE))
    found, seconds = [], []
    for seed in range(count):
        generator = queues.VirtualGenerator(server)
        found.append(search_capacity(generator, target, [b"x"], _SLO, seed=seed))
        seconds.append(generator.seconds)
    checks = spread_checks("4.virtual", found, seconds)
    return [msgspec.structs.replace(check, what=f"in virtual time, {check.what}") for check in checks]


def flood(seconds: float) -> list[Check]:
    """Check 5."""
    body = bytes(_BODY)
    request = b"POST / HTTP/1.1\r\nHost: null\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with null_server(cores={min(_cores())}) as port, Generator(cores={max(_cores())}) as generator:
        job = OpenJob(
            host="127.0.0.1",
            port=port,
            requests=(request,),
            limit_s=_SLO.limit_s,
            timeout_s=5.0,
            schedule=poisson(_FLOOD_RPS, duration_s=seconds + 1, seed=0).tobytes(),
            warmup=round(_FLOOD_RPS),
        )
        run = generator.run(job).measured()
    answered = run.status == Status.OK
    lasted = float(np.nanmax(run.done) - run.scheduled[0]) if answered.any() else math.inf
    rate = float(answered.sum()) / lasted
    delay = 1e3 * float(np.nanquantile(run.sent - run.scheduled, 0.99))
    why = f"generator CPU {run.generator_cpu:.0%}, canary {1e3 * run.canary_p99_s:.1f} ms"
    what = f"one core of generator, {_BODY} bytes, {_FLOOD_RPS:,.0f}/s asked of a null server"
    return [
        verdict("5.rate", f"{what}: answers per second", ">= 20000", rate, None, len(run), unit="1/s", why=why),
        verdict("5.delay", f"{what}: p99 of the send delay", "< 2", delay, None, len(run), unit="ms", why=why),
    ]


def disturbed(windows: int, window_s: float) -> tuple[list[Check], list[Measurement]]:
    """Check 6."""
    limited, wide, false, said = 0, 0, 0, []
    seen = []
    over = 1.02 * _MOST_RPS  # more than the server can do at all: every pass is a false one
    calm_rate = 0.6 * _MOST_RPS
    with timed_server() as (port, setup, _):
        with Generator(cores={max(_cores())}) as generator:
            target, requests = _aim(port, setup)
            for seed in range(windows):
                schedule = poisson(calm_rate, n=max(2000, round(calm_rate * window_s)), seed=seed)
                run = generator.run(_job(target, requests, schedule, max_connections=2))
                limited += judge(run, _SLO, rate_rps=calm_rate, seed=seed).outcome is Outcome.GENERATOR_LIMITED
        with Generator() as generator:
            for seed in range(windows):
                with burning(_cores()):
                    seen.append(_window(generator, target, requests, over, seed, window_s))
                false += seen[-1].outcome is Outcome.PASS
    # what sleeps has nothing to fear from a neighbour; what computes loses half its core
    computing = Setup("cnn", bundle_of("cnn", BENCH / "models"), "f32", frozenset({min(_cores())}), 1, _BATCH)
    _, batches_per_s = raw_costs(computing, (_BATCH,), 2.0)[_BATCH]
    with _serving(computing) as (port, _), Generator() as generator:
        target, requests = _aim(port, computing)
        for seed in range(windows):
            pair = {}
            for noisy in (False, True):
                with burning(_cores()) if noisy else contextlib.nullcontext():
                    rate = _NEIGHBOUR * batches_per_s * _BATCH
                    pair[noisy] = _window(generator, target, requests, rate, seed, window_s)
            seen += pair.values()
            felt = pair[True].outcome is not Outcome.PASS or _width(pair[True]) > _width(pair[False])
            wide += pair[False].outcome is Outcome.PASS and felt
            said.append(f"{pair[False].outcome.value} alone, then {pair[True].outcome.value}")
    why = ", ".join(f"{v} times {k}" for k, v in Counter(said).items())
    n = windows
    return [
        verdict(
            *("6.starved", "a generator of 2 connections: share of windows said to be generator_limited", ">= 1"),
            *(limited / n, None, n),
            unit="",
        ),
        verdict(
            *(
                "6.noise",
                "a network that computes: share that passes alone, but with burners does not, or with a wider interval",
                ">= 1",
            ),
            *(wide / n, None, n),
            unit="",
            why=why,
        ),
        verdict(
            *("6.false", "burners on every core, rate over what the server can do: passes", "<= 0"),
            *(float(false), None, n),
            unit="",
        ),
    ], seen


@contextlib.contextmanager
def burning(cores: frozenset[int]) -> Iterator[None]:
    """A busy process on each core."""
    program = (
        "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nwhile os.getppid() == int(sys.argv[2]): pass"
    )
    burners = [
        subprocess.Popen([sys.executable, "-I", "-S", "-c", program, str(core), str(os.getpid())]) for core in cores
    ]
    try:
        time.sleep(0.3)
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


def _window(
    generator: Generator, target: Target, requests: list[Payload], rate: float, seed: int, window_s: float
) -> Measurement:
    n = max(1000, round(rate * window_s))
    return measure(generator, target, requests, _SLO, rate_rps=rate, seed=seed, n=n, null_rps=math.inf)


def _width(window: Measurement) -> float:
    low, high = window.p99_interval_ms or (0.0, math.inf)
    return high - low


def _longest_ms(run: Any) -> float:
    return 1e3 * float(run.latencies().max())


def _aim(port: int, setup: Setup) -> tuple[Target, list[Payload]]:
    target = discover(f"http://127.0.0.1:{port}")
    return target, payloads(target, setup.bundle.samples())


def _job(target: Target, requests: list[Payload], schedule: Any, max_connections: int = 2048) -> OpenJob:
    return OpenJob(
        host=target.host,
        port=target.port,
        requests=tuple(requests),
        limit_s=_SLO.limit_s,
        timeout_s=10.0,
        max_connections=max_connections,
        outputs=target.outputs,
        schedule=schedule.tobytes(),
    )


def _cores() -> frozenset[int]:
    return frozenset(os.sched_getaffinity(0))


def main(given: list[str] | None = None) -> int:
    """Measure what is missing, and write the record after each part."""
    arguments = _arguments(given)
    whole = arguments == _arguments(["--only", arguments.only])
    lengths = [float(each) for each in arguments.lengths.split(",")]

    def refereed() -> Part:
        return Part(tuple(referee(arguments.seconds)), (), None, versions=_referee_versions())

    def simulated_windows(id: str, names: Sequence[str]) -> Part:
        checks, found, tables = simulations(id, names, lengths, arguments.runs, arguments.workers)
        return Part(tuple(checks), tuple(tables), found)

    def searched() -> Part:
        checks, found = searches(arguments.searches, arguments.budget)
        return Part(tuple(checks), (), found)

    def noisy() -> Part:
        checks, seen = disturbed(arguments.windows, arguments.window)
        return Part(tuple(checks), (), seen)

    parts: dict[str, Callable[[], Part]] = {
        "1": refereed,
        "2": lambda: Part(tuple(stall()), (), None),
        "3": partial(simulated_windows, "3", tuple(QUEUES)),
        "a": partial(simulated_windows, "a", tuple(TURN_AWAY)),
        "4": searched,
        "v": lambda: Part(tuple(virtual_searches(arguments.searches)), (), None),
        "5": lambda: Part(tuple(flood(arguments.flood)), (), None),
        "6": noisy,
    }
    return run_parts(
        parts,
        Path(arguments.out or (RESULTS if whole else BENCH / "load-smoke.json")),
        kept=whole,
        only={name for name in arguments.only.split(",") if name},
        timed={"1", "2", "4", "5", "6"},
        seeds={"models": SEED, "simulation": 1, "load": 0},
    )


def _referee_versions() -> dict[str, str]:
    python = BENCH / "loadgen" / "bin" / "python"
    return versions_of(python, ("mlcommons-loadgen",)) if python.exists() else {}


def _arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The verdict, the search and the generator, put to the test.")
    parser.add_argument("--only", default="", help="of 1,2,3,a,4,v,5,6, measured anew; see the top of this file")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each of the referee's and our windows")
    parser.add_argument("--runs", type=int, default=2000, help="simulated windows of each kind")
    parser.add_argument("--lengths", default=_LENGTHS, help="of the simulated windows, in seconds; the checks' is last")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that simulate")
    parser.add_argument("--searches", type=int, default=5)
    parser.add_argument("--budget", type=float, default=80.0, help="seconds of one search, about")
    parser.add_argument("--flood", type=float, default=5.0, help="seconds at the highest rate")
    parser.add_argument("--windows", type=int, default=3, help="windows of each kind with noise")
    parser.add_argument("--window", type=float, default=6.0, help="seconds of these")
    parser.add_argument("--out", help="the record; by default results/load.json of a whole run, .bench/ of any other")
    return parser.parse_args(given)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
