"""Two models behind one port: one gets ten times what it carries, and the other is measured."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np

import rushhour
from bench.models import bundle_of
from bench.parts import Part, say
from bench.record import Check, Table, verdict
from rushhour.api.loading import ClosedLoopResult
from rushhour.bundle import Bundle
from rushhour.goal import SLO, Goal
from rushhour.load import Generator, OpenJob, Samples, Status, discover, payloads, poisson
from rushhour.plan import PLAN, Plan, Policy, Variant
from rushhour.system.machine import cores

_GREEDY, _OTHER = "greedy", "other"
_LIMIT = SLO.parse("p99<50ms")
_BATCH, _USERS = 8, 16
_FLOOD, _MODERATE = 10.0, 0.4
_WARMUP_S, _PAUSE_S = 2.0, 1.0


class Round(msgspec.Struct, frozen=True):
    """One round.

    Attributes:
        capacity_rps: answers per second to users that wait for them, of each model alone.
        offered_rps: to each, while both were loaded.
        calm_p99_ms: of the other at the same rate, alone.
        p99_ms: of its answers, beside the flood.
        goodput: share of its requests that were answered within the limit, beside the flood.
        shed: of its requests.
        greedy_rps: answers within the limit per second, of the flooded one.
        generator_cpu: of both generators together, cores.
    """

    capacity_rps: dict[str, float]
    offered_rps: dict[str, float]
    calm_p99_ms: float
    p99_ms: float
    goodput: float
    shed: int
    greedy_rps: float
    generator_cpu: float


def neighbours(rounds: int, seconds: float, work: Path, models: Path) -> Part:
    """Part 4. In each round the capacity of each model alone, then the flood.

    Args:
        rounds: on fresh servers.
        seconds: of the flood in each.
        work: where the runs are written.
        models: where networks are kept.
    """
    runs = [_run(work / name, name, models) for name in (_GREEDY, _OTHER)]
    measured = []
    for number in range(rounds):
        with rushhour.serve(runs, http_port=0, grpc_port=None) as server:
            found = _round(server.url, seconds, seed=number)
        measured.append(found)
        say(
            f"4  round {number + 1}: p99 {found.p99_ms:.1f} ms ({found.calm_p99_ms:.1f} alone), goodput "
            f"{found.goodput:.1%} of {found.offered_rps[_OTHER]:.0f}/s, beside {found.offered_rps[_GREEDY]:.0f}/s for "
            f"a model that carries {found.capacity_rps[_GREEDY]:.0f}"
        )
    worst, least = max(each.p99_ms for each in measured), min(each.goodput for each in measured)
    beside = "beside a model that gets ten times its capacity"
    checks: list[Check] = [
        verdict(
            "4.p99",
            f"p99 at 40% of its share of the cores, {beside}; the worst round",
            f"<= {1e3 * _LIMIT.limit_s:g}",
            worst,
            None,
            rounds,
            unit="ms",
        ),
        verdict(
            "4.goodput",
            f"share of its requests answered within the limit, {beside}; the worst round",
            ">= 0.9",
            least,
            None,
            rounds,
            unit="",
        ),
    ]
    columns = ("round", "alone, 1/s", "offered, 1/s", "p99 alone, ms", "p99, ms", "goodput", "flooded one, 1/s")
    rows = tuple(
        (
            str(number),
            each.capacity_rps[_OTHER],
            each.offered_rps[_OTHER],
            each.calm_p99_ms,
            each.p99_ms,
            each.goodput,
            each.greedy_rps,
        )
        for number, each in enumerate(measured, 1)
    )
    return Part(tuple(checks), (Table("Two models behind one port", columns, rows),), {"rounds": measured})


def _round(url: str, seconds: float, seed: int) -> Round:
    capacity = {}
    for name in (_GREEDY, _OTHER):
        alone = rushhour.load(url, model=name, closed_loop=_USERS, duration=5)
        assert isinstance(alone, ClosedLoopResult)
        capacity[name] = alone.result.throughput_rps
    offered = {_GREEDY: _FLOOD * capacity[_GREEDY], _OTHER: _MODERATE * capacity[_OTHER] / 2}
    calm = _open(url, _OTHER, offered[_OTHER], 8.0, seed)
    with ThreadPoolExecutor(2) as pool:
        # The flood lasts from before the first measured request until after the last.
        flood = pool.submit(_open, url, _GREEDY, offered[_GREEDY], seconds + 2 * _PAUSE_S, seed + 100)
        met = pool.submit(_open, url, _OTHER, offered[_OTHER], seconds, seed + 200).result()
        flooded = flood.result()
    answered = met.status == Status.OK
    latency = met.latencies()
    of_flood = (flooded.status == Status.OK) & (flooded.latencies() <= _LIMIT.limit_s)
    return Round(
        capacity_rps=capacity,
        offered_rps=offered,
        calm_p99_ms=_p99_ms(calm),
        p99_ms=_p99_ms(met),
        goodput=float((answered & (latency <= _LIMIT.limit_s)).mean()),
        shed=int((met.status == Status.SHED).sum()),
        greedy_rps=float(of_flood.sum() / (flooded.scheduled[-1] - flooded.scheduled[0])),
        generator_cpu=met.generator_cpu + flooded.generator_cpu,
    )


def _open(url: str, model: str, rate: float, seconds: float, seed: int) -> Samples:
    """Open-loop load of one model; what is measured follows a warm-up of two seconds."""
    target = discover(url, model)
    warmup = math.ceil(rate * _WARMUP_S)
    job = OpenJob(
        host=target.host,
        port=target.port,
        requests=tuple(payloads(target)),
        limit_s=_LIMIT.limit_s,
        timeout_s=5.0,
        outputs=target.outputs,
        schedule=poisson(rate, n=warmup + math.ceil(rate * seconds), seed=seed).tobytes(),
        warmup=warmup,
    )
    with Generator() as generator:
        return generator.run(job).measured()


def _p99_ms(samples: Samples) -> float:
    return 1e3 * float(np.quantile(samples.latencies()[samples.status == Status.OK], 0.99))


def _run(path: Path, name: str, models: Path) -> Path:
    """A run whose Plan leaves a core to the event loop and the generators, where there is one."""
    bundle_of("cnn64", models).copy_to(path / "bundles" / "served")
    bundle = Bundle.open(path / "bundles" / "served")
    policy = Policy(streams=max(1, cores() - 1), max_batch=_BATCH, queue_bound=256, deadline_ms=1e3 * _LIMIT.limit_s)
    variant = Variant("served", "bundles/served", bundle.manifest.hash, "openvino", "f32")
    Plan(Goal(_LIMIT), (variant,), policy, model=name).save(path / PLAN)
    return path
