"""Capacities of several servers, measured in turn: a plan, and torch eager behind FastAPI."""

from __future__ import annotations

import contextlib
import os
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from numpy.typing import NDArray

from bench.environments import python_of
from bench.parts import say
from bench.servers import free_port, running
from bench.wire import answers, bare_request
from rushhour.bundle import Bundle
from rushhour.goal import SLO
from rushhour.load import (
    Endpoint,
    Generator,
    Payload,
    Probe,
    discover,
    endpoint,
    find_capacity,
    measure,
    null_throughput,
    payloads,
    ramp_concurrency,
    search_window_n,
)
from rushhour.measurement import Measurement
from rushhour.plan import PLAN, Plan
from rushhour.serve import ServeSettings
from rushhour.serve.child import ChildServer

ROOT = Path(__file__).resolve().parents[2]
_PEER = ROOT / "benchmarks" / "peers" / "eager"
_SEARCH_S, _RESOLUTION, _START, _CLOSED_S = 3.0, 1.05, 0.6, 0.5


class Aim(NamedTuple):
    """A running server, and the requests for it."""

    target: Endpoint
    requests: list[Payload]


Start = Callable[[], contextlib.AbstractContextManager[Aim]]
"""Starts a server, as a context."""


@contextlib.contextmanager
def served_plan(run: Path, name: str = PLAN, sent: Mapping[str, NDArray[Any]] | None = None) -> Iterator[Aim]:
    """The server of a run's plan, as a context, on all cores, as a user would start it.

    Args:
        run: the run's folder.
        name: of the plan's file in it.
        sent: samples, each in a request of its own; the bundle's own, in 32 requests, by default.

    Raises:
        ServeError: if it does not start.
    """
    plan = Plan.load(run / name)
    bundle = Bundle.open(run / plan.variants[0].bundle)
    server = ChildServer(run / name, ServeSettings(http_port=0, trusted=("rushhour.models:build",)))
    try:
        target, signature = discover(server.url), bundle.manifest.signature
        samples = bundle.samples() if sent is None else sent
        distinct = 32 if sent is None else len(next(iter(sent.values())))
        yield Aim(target, payloads(target, samples, signature=signature, distinct=distinct))
    finally:
        server.close()


@contextlib.contextmanager
def eager(bundle: Bundle, bench: Path) -> Iterator[Aim]:
    """torch eager behind FastAPI in a blocking `def`, as a context.

    Args:
        bundle: with its torch module, of one input.
        bench: where the server's environment is made.

    Raises:
        CannotInstall: if it cannot be made.
        DidNotStart: if the server does not start.
    """
    python = python_of(_PEER, bench, engine=False)
    site = next(python.parent.parent.glob("lib/python*/site-packages"))
    (site / "ours.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")  # torch, behind the server's own packages
    port = free_port()
    (samples,) = bundle.samples().values()
    requests = [bare_request("/infer", sample) for sample in samples]
    env = {
        "PATH": os.environ["PATH"],
        "LANG": "C.UTF-8",
        "PYTHONPATH": str(ROOT / "src"),
        "BENCH_BUNDLE": str(bundle.path.resolve()),
        "BENCH_PORT": str(port),
    }
    command = [str(python), str(_PEER / "server.py")]
    cores = frozenset(os.sched_getaffinity(0))
    with (
        TemporaryDirectory() as folder,
        running(
            command, {**env, "HOME": folder}, port, cores, Path(folder) / "log", partial(answers, port, requests[0])
        ),
    ):
        yield Aim(endpoint(f"http://127.0.0.1:{port}"), [request.http(port) for request in requests])


def short_windows(generator: Generator, aim: Aim, slo: SLO, seconds: float = _SEARCH_S) -> Probe:
    """Windows of a search, on a server that has warmed up."""

    def probe(rate_rps: float, seed: int) -> Measurement:
        return measure(
            generator,
            aim.target,
            aim.requests,
            slo,
            rate_rps=rate_rps,
            seed=seed,
            n=search_window_n(slo, rate_rps, seconds),
            warmup_s=1.0,
            is_warm=True,
            null_rps=null_throughput(generator, aim.requests),
        )

    return probe


def capacities_in_turn(
    contestants: Mapping[str, Start], slo: SLO, rounds: int, *, seconds: float = _SEARCH_S, seed: int = 0
) -> dict[str, list[float]]:
    """Name -> the capacity in each round. Only one server runs at a time; every other round is in the opposite order.

    A capacity is the estimate by all windows of a short search. Where the SLO held at no rate, it is the lowest rate
    that was tried.

    Args:
        contestants: name -> what starts it.
        slo: the SLO.
        rounds: so many capacities of each.
        seconds: of a window.
        seed: of the first round's arrivals, the same for all servers of a round.
    """
    found: dict[str, list[float]] = {name: [] for name in contestants}
    with Generator() as generator:
        for number in range(rounds):
            for name in list(contestants)[:: 1 if number % 2 == 0 else -1]:
                with contestants[name]() as aim:
                    rungs = ramp_concurrency(generator, aim.target, aim.requests, step_s=_CLOSED_S)
                    search = find_capacity(
                        short_windows(generator, aim, slo, seconds),
                        start_rps=max(1.0, _START * max(rung.throughput_rps for rung in rungs)),
                        slo=slo,
                        resolution=_RESOLUTION,
                        seed=seed + 1000 * number,
                        prove=False,
                    )
                capacity = search.capacity_rps or min(run.rate_rps for run in search.runs)
                found[name].append(capacity)
                say(f"round {number}  {name}: {capacity:,.0f}/s")
    return found
