"""Our server under open-loop load: its capacity, and its goodput at ten times the capacity."""

from __future__ import annotations

import math
import threading
import time

import msgspec
import numpy as np
from numpy.typing import NDArray

from bench.contestants import Setup
from bench.servers import Server
from rushhour.goal import SLO
from rushhour.load import (
    Generator,
    OpenJob,
    Samples,
    Search,
    Status,
    Target,
    discover,
    payloads,
    poisson,
    search_capacity,
)

_CALM_SHARE = 0.5
_CALM_S, _AFTER_S = 5.0, 10.0
_SAMPLED_S = 0.5


class Overload(msgspec.Struct, frozen=True):
    """The result of load at `factor` times the capacity.

    Attributes:
        offered_rps: while it lasted.
        goodput_rps: answers within the limit, per second of it.
        admitted_p99_ms: of the answered requests.
        shed_p99_ms: latency of the answers to shed requests; None where none was shed.
        shed: number of shed requests; `errors` failed otherwise.
        memory: resident memory at its end against its beginning.
        recovery_s: after its end, until no more than 1 in 100 missed the limit at half the capacity.
        generator_lag_p99_ms: how late the generator itself was.
    """

    factor: float
    offered_rps: float
    goodput_rps: float
    admitted_p99_ms: float | None
    shed_p99_ms: float | None
    shed: int
    errors: int
    memory: float
    recovery_s: float
    generator_cpu: float
    generator_lag_p99_ms: float


def capacity_of(server: Server, setup: Setup, slo: SLO, cores: frozenset[int], *, budget_s: float, seed: int) -> Search:
    """Rushhour's own search, with the generator on `cores`."""
    with Generator(cores=cores) as generator:
        target, requests = _aim(server, setup)
        return search_capacity(generator, target, requests, slo, seed=seed, budget_s=budget_s)


def overload(
    server: Server,
    setup: Setup,
    slo: SLO,
    capacity_rps: float,
    factor: float,
    cores: frozenset[int],
    *,
    seconds: float,
    seed: int,
) -> Overload:
    """Half the capacity for a while, then `factor` times the capacity for `seconds`, then half of it again.

    Args:
        server: ours.
        setup: what it serves.
        slo: its limit.
        capacity_rps: as `capacity_of` found it.
        factor: how many times that is offered.
        cores: of the generator.
        seconds: how long.
        seed: of the arrivals.
    """
    calm, offered = _CALM_SHARE * capacity_rps, factor * capacity_rps
    schedule = _schedule(((calm, _CALM_S), (offered, seconds), (calm, _AFTER_S)), seed)
    begin, end = _CALM_S, _CALM_S + seconds
    memory: list[tuple[float, int]] = []
    over = threading.Event()

    def watch(start: float) -> None:
        while not over.wait(_SAMPLED_S):
            memory.append((time.monotonic() - start, server.rss_bytes()))

    with Generator(cores=cores) as generator:
        target, requests = _aim(server, setup)
        job = OpenJob(
            host=target.host,
            port=target.port,
            requests=tuple(requests),
            limit_s=slo.limit_s,
            timeout_s=5.0,
            outputs=target.outputs,
            schedule=schedule.tobytes(),
        )
        watcher = threading.Thread(target=watch, args=(time.monotonic(),))
        watcher.start()
        try:
            samples = generator.run(job)
        finally:
            over.set()
            watcher.join()
    return _summed_up(samples, slo, factor, begin, end, memory)


def _aim(server: Server, setup: Setup) -> tuple[Target, list[bytes]]:
    target = discover(f"http://127.0.0.1:{server.port}")
    return target, payloads(target, setup.bundle.samples())


def _schedule(phases: tuple[tuple[float, float], ...], seed: int) -> NDArray[np.float64]:
    """Poisson arrivals at one rate after the other; phases are `(requests per second, seconds)`."""
    parts, start = [], 0.0
    for number, (rate, seconds) in enumerate(phases):
        arrivals = poisson(rate, n=math.ceil(rate * seconds * 1.2) + 50, seed=1000 * seed + number)
        parts.append(start + arrivals[arrivals < seconds])
        start += seconds
    return np.concatenate(parts)


def _summed_up(
    samples: Samples, slo: SLO, factor: float, begin: float, end: float, memory: list[tuple[float, int]]
) -> Overload:
    latency = samples.latencies()
    during = (samples.scheduled >= begin) & (samples.scheduled < end)
    answered = during & (samples.status == Status.OK)
    shed = during & (samples.status == Status.SHED)
    good = answered & (latency <= slo.limit_s)
    heard = samples.done - samples.scheduled
    third = (end - begin) / 3
    early = [rss for at, rss in memory if begin + third / 2 <= at < begin + third] or [1]
    late = [rss for at, rss in memory if end - third / 2 <= at < end] or [1]
    return Overload(
        factor=factor,
        offered_rps=float(during.sum() / (end - begin)),
        goodput_rps=float(good.sum() / (end - begin)),
        admitted_p99_ms=_p99_ms(latency[answered]),
        shed_p99_ms=_p99_ms(heard[shed]),
        shed=int(shed.sum()),
        errors=int(during.sum() - answered.sum() - shed.sum()),
        memory=float(np.median(late) / np.median(early)),
        recovery_s=recovery_s(samples.scheduled - end, latency > slo.limit_s),
        generator_cpu=samples.generator_cpu,
        generator_lag_p99_ms=_p99_ms((samples.taken - samples.scheduled)[during]) or 0.0,
    )


def recovery_s(since_end: NDArray[np.float64], missed: NDArray[np.bool_]) -> float:
    """The earliest time after which no more than 1 in 100 requests missed; infinite if there is none.

    Args:
        since_end: when each request was due, in seconds after the overload.
        missed: whether it was shed, late or lost.
    """
    order = np.argsort(since_end)
    due, missed = since_end[order], missed[order]
    due, missed = due[due >= 0], missed[due >= 0]
    if not len(due):
        return math.inf
    left = np.arange(len(due), 0, -1)
    calm = missed[::-1].cumsum()[::-1] <= 0.01 * left
    # From the back: the last stretch may be calm by chance only if it is long enough to tell.
    calm &= left >= 100
    if not calm.any():
        return math.inf
    first = int(np.argmax(calm))
    return float(due[first]) if first else 0.0


def _p99_ms(seconds: NDArray[np.float64]) -> float | None:
    return float(1e3 * np.quantile(seconds, 0.99)) if len(seconds) else None
