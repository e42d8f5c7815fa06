"""A candidate, really served: its own server process, told what to serve by a plan, as a user's would be."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from rushhour.bundle import Bundle
from rushhour.errors import EngineError
from rushhour.goal import Goal
from rushhour.journal import Journal
from rushhour.load import Generator, Payload, Probe, Target, discover, glance_n, measure, payloads
from rushhour.measurement import Measurement
from rushhour.plan import Plan, Variant
from rushhour.serve import ServeSettings
from rushhour.tune.space import Candidate

_START_SECONDS = 120.0


def plan_of(candidate: Candidate, bundle: Bundle, goal: Goal) -> Plan:
    """The plan, without evidence, that serves `candidate` from a run's folder."""
    variant = Variant(
        name=f"{candidate.bundle}-{candidate.engine}-{candidate.precision}",
        bundle=f"bundles/{candidate.bundle}",
        bundle_hash=bundle.manifest.hash,
        engine=candidate.engine,
        precision=candidate.precision,
    )
    policy = msgspec.structs.replace(candidate.policy, deadline_ms=goal.slo.limit_ms)
    return Plan(goal=goal, variants=(variant,), policy=policy)


class Bench:
    """Where candidates are put under load; what was asked before, in this run or one that was killed, is not repeated.

    Args:
        journal: where every window goes before the next one starts.
        generator: sends the load.
        goal: the SLO and the workload.
        run: the run's folder, with `bundles/` in it.
        trusted: as in `open_engine`.
    """

    def __init__(
        self,
        journal: Journal,
        generator: Generator,
        goal: Goal,
        run: Path,
        trusted: tuple[str, ...],
    ) -> None:
        self._journal = journal
        self._generator = generator
        self._goal = goal
        self._run = run
        self._trusted = trusted

    @contextlib.contextmanager
    def load(self, candidate: Candidate, bundle: Bundle, phase: str) -> Iterator[Loaded]:
        """`candidate` to be put under load.

        Its server starts with the first question that is not on file, and ends here.
        """
        with contextlib.ExitStack() as stack:

            def aim() -> tuple[Target, list[Payload]]:
                url = stack.enter_context(served(candidate, bundle, self._goal, self._run, self._trusted))
                target = discover(url)
                return target, payloads(target, bundle.samples(), rows=self._goal.workload.rows)

            yield Loaded(self._journal, self._generator, self._goal, candidate, phase, functools.cache(aim))


class Loaded:
    """A candidate under load, from `Bench.load`. Its windows raise EngineError if its server does not come up."""

    def __init__(
        self,
        journal: Journal,
        generator: Generator,
        goal: Goal,
        candidate: Candidate,
        phase: str,
        aim: Callable[[], tuple[Target, list[Payload]]],
    ) -> None:
        self._journal = journal
        self._generator = generator
        self._goal = goal
        self._candidate = candidate
        self._phase = phase
        self._aim = aim

    def windows(self, window_s: float) -> Probe:
        """Windows of so many seconds, longer where the SLO needs it, that end when they are decided."""
        return partial(
            self._take, f"window {window_s:g} s", window_s=window_s, warmup_s=min(2.0, max(1.0, window_s / 5))
        )

    def glances(self, window_s: float) -> Probe:
        """Windows that find the way and prove little. The server has warmed its engine up before it listened."""

        def probe(rate_rps: float, seed: int) -> Measurement:
            n = glance_n(self._goal.slo, rate_rps, window_s)
            return self._take(f"glance {window_s:g} s", rate_rps, seed, n=n, warmup_s=1.0, is_warm=True)

        return probe

    def pushes(self, window_s: float, warmup_s: float) -> Probe:
        """Windows of exactly so many seconds, of a server that is warm: how many answers meet the limit?"""

        def probe(rate_rps: float, seed: int) -> Measurement:
            n = max(1, math.ceil(rate_rps * window_s))
            return self._take(f"push {window_s:g} s", rate_rps, seed, n=n, warmup_s=warmup_s, is_warm=True)

        return probe

    def _take(self, what: str, rate_rps: float, seed: int, **asked: Any) -> Measurement:
        slo = self._goal.slo

        def take() -> Measurement:
            return measure(self._generator, *self._aim(), slo, rate_rps=rate_rps, seed=seed, **asked)

        detail = f"{slo} rows {self._goal.workload.rows} rate {rate_rps:g} {what} seed {seed}"
        return self._journal.measure(self._phase, str(self._candidate), detail, Measurement, take)


class _Said(msgspec.Struct):
    url: str = ""
    error: str = ""


@contextlib.contextmanager
def served(candidate: Candidate, bundle: Bundle, goal: Goal, run: Path, trusted: tuple[str, ...]) -> Iterator[str]:
    """A server for `candidate` on a free loopback port, as a context; gives its URL. Gone at the end, whatever happens.

    Raises:
        EngineError: if the server does not come up; the message is the server's own.
    """
    name = hashlib.sha256(str(candidate).encode()).hexdigest()[:12]
    file, log = run / f".candidate-{name}.json", run / f".candidate-{name}.log"
    plan_of(candidate, bundle, goal).save(file)
    settings = msgspec.json.encode(ServeSettings(http_port=0, trusted=trusted)).decode()
    command = [sys.executable, "-m", "rushhour.serve", str(file), settings]
    try:
        with log.open("wb") as errors:
            server = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
            )
        try:
            said = _first_line(server)
            if not said.url:
                last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
                raise EngineError(f"the candidate {candidate} does not start", said.error or last[0])
            yield said.url
        finally:
            _stop(server)
    finally:
        file.unlink(missing_ok=True)
        log.unlink(missing_ok=True)


def _first_line(server: subprocess.Popen[bytes]) -> _Said:
    assert server.stdout is not None
    deadline, line = time.monotonic() + _START_SECONDS, b""
    while not line.endswith(b"\n") and (left := deadline - time.monotonic()) > 0:
        readable, _, _ = select.select([server.stdout], [], [], left)
        if not readable:
            break
        chunk = os.read(server.stdout.fileno(), 65536)
        if not chunk:
            break
        line += chunk
    try:
        return msgspec.json.decode(line, type=_Said)
    except msgspec.DecodeError:
        return _Said()


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.send_signal(signal.SIGTERM)
    try:
        server.wait(5)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    for pipe in (server.stdin, server.stdout):
        if pipe is not None:
            pipe.close()
