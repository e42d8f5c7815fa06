"""A candidate, really served: its own server process, told what to serve by a plan, as a user's would be."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from rushhour.bundle import Bundle
from rushhour.errors import EngineError
from rushhour.goal import Goal
from rushhour.load import (
    ClosedJob,
    Generator,
    OpenJob,
    Payload,
    Probe,
    Samples,
    Target,
    Tick,
    closed_window,
    discover,
    measure,
    null_throughput,
    payloads,
    search_window_n,
)
from rushhour.measurement import Measurement, Rung
from rushhour.models import code_of
from rushhour.plan import Plan, Variant
from rushhour.records.journal import Journal
from rushhour.serve import ServeSettings
from rushhour.tune.space import Candidate

_START_SECONDS = 120.0


def plan_of(candidate: Candidate, bundle: Bundle, goal: Goal, model: str = "") -> Plan:
    """The plan, without evidence, that serves `candidate` from a run's folder, under the name `model`."""
    variant = Variant(
        name=f"{candidate.bundle}-{candidate.engine}-{candidate.precision}",
        bundle=f"bundles/{candidate.bundle}",
        bundle_hash=bundle.manifest.hash,
        engine=candidate.engine,
        precision=candidate.precision,
    )
    policy = msgspec.structs.replace(candidate.policy, deadline_ms=goal.slo.limit_ms)
    return Plan(goal=goal, variants=(variant,), policy=policy, model=model)


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

            def aim() -> tuple[_Metered, Target, list[Payload]]:
                url, pid = stack.enter_context(served(candidate, bundle, self._goal, self._run, self._trusted))
                target = discover(url)
                requests = payloads(target, bundle.samples(), rows=self._goal.workload.rows)
                return _Metered(self._generator, pid), target, requests

            yield Loaded(self._journal, self._goal, candidate, bundle, phase, functools.cache(aim), self._trusted)


class Loaded:
    """A candidate under load, from `Bench.load`. Its windows raise EngineError if its server does not come up."""

    def __init__(
        self,
        journal: Journal,
        goal: Goal,
        candidate: Candidate,
        bundle: Bundle,
        phase: str,
        aim: Callable[[], tuple[_Metered, Target, list[Payload]]],
        trusted: tuple[str, ...],
    ) -> None:
        self._journal = journal
        self._goal = goal
        self._candidate = candidate
        self._phase = phase
        self._aim = aim
        source = bundle.manifest.source
        code = code_of(source, trusted) if source is not None and candidate.engine == "torch" else {}
        self._served: dict[str, Any] = {
            "bundle": bundle,
            "candidate": candidate,
            "code": code,
            "slo": goal.slo,
            "workload": goal.workload,
        }

    def windows(self, window_s: float, error: float) -> Probe:
        """Windows of so many seconds, longer where the SLO needs it, that end when they are decided.

        Args:
            window_s: how long.
            error: how often one may pass at a rate that does not hold.
        """
        return partial(
            self._take,
            f"window {window_s:g} s at {error:.3g}",
            window_s=window_s,
            warmup_s=min(2.0, max(1.0, window_s / 5)),
            error=error,
        )

    def glances(self, window_s: float) -> Probe:
        """Windows that find the way and prove little. The server has warmed its engine up before it listened."""

        def probe(rate_rps: float, seed: int) -> Measurement:
            n = search_window_n(self._goal.slo, rate_rps, window_s)
            return self._take(f"glance {window_s:g} s", rate_rps, seed, n=n, warmup_s=1.0, is_warm=True)

        return probe

    def crowd(self, concurrency: int, seconds: float, turn: int, against: str = "") -> Rung:
        """So many users that ask again as soon as they are answered: answers within the limit, for so many seconds.

        Args:
            concurrency: how many users.
            seconds: how long.
            turn: which of several such windows.
            against: with what it is paired: for another pair it is taken again.
        """

        def take(*, concurrency: int, seconds: float, within_s: float, **_: Any) -> Rung:
            metered, target, requests = self._aim()
            return closed_window(
                metered.generator, target, requests, concurrency=concurrency, seconds=seconds, within_s=within_s
            )

        detail = f"{self._goal.slo} rows {self._goal.workload.rows} users {concurrency} for {seconds:g} s, turn {turn}"
        detail += f" against {against}" if against else ""
        return self._journal.measure(
            self._phase,
            str(self._candidate),
            detail,
            Rung,
            take,
            **self._served,
            concurrency=concurrency,
            seconds=seconds,
            within_s=self._goal.slo.limit_s,
        )

    def _take(self, what: str, rate_rps: float, seed: int, **asked: Any) -> Measurement:
        slo = self._goal.slo

        def take(*, rate_rps: float, seed: int, asked: Mapping[str, Any], **_: Any) -> Measurement:
            metered, target, requests = self._aim()
            metered.clear()
            window = measure(
                metered,
                target,
                requests,
                slo,
                rate_rps=rate_rps,
                seed=seed,
                null_rps=null_throughput(metered.generator, requests),
                **asked,
            )
            per_request_s = metered.server_s_per_request
            server_cpu = None if per_request_s is None else per_request_s * rate_rps
            return msgspec.structs.replace(window, server_cpu=server_cpu)

        detail = f"{slo} rows {self._goal.workload.rows} rate {rate_rps:g} {what} seed {seed}"
        return self._journal.measure(
            self._phase,
            str(self._candidate),
            detail,
            Measurement,
            take,
            **self._served,
            rate_rps=rate_rps,
            seed=seed,
            asked=asked,
        )


class _Metered:
    """A generator that takes the server's CPU time along.

    It counts whole runs, warm-up included, because the same requests are counted: CPU time per request is what can be
    compared, and times the rate it is the cores that the server keeps busy.

    Args:
        generator: sends the load.
        pid: of the server.

    Attributes:
        generator: the same, without.
    """

    def __init__(self, generator: Generator, pid: int) -> None:
        self.generator = generator
        self._pid = pid
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self._spent_s: float | None = 0.0
        self._requests = 0

    def run(self, job: OpenJob | ClosedJob, on_progress: Callable[[Tick], None] | None = None) -> Samples:
        """As `Sender.run`."""
        before = cpu_seconds(self._pid)
        samples = self.generator.run(job, on_progress)
        after = cpu_seconds(self._pid)
        if self._spent_s is None or before is None or after is None:
            self._spent_s = None
        else:
            self._spent_s += after - before
        self._requests += len(samples)
        return samples

    @property
    def server_s_per_request(self) -> float | None:
        """CPU seconds of the server for each request sent; None where they are not known."""
        return self._spent_s / self._requests if self._spent_s is not None and self._requests else None


def cpu_seconds(pid: int) -> float | None:
    """CPU time of a process and all its descendants, those that have ended and were waited for included.

    None where there is no /proc, or no such process.
    """
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            fields = entry.read_text().rpartition(")")[2].split()
            parents[int(entry.parent.name)] = int(fields[1])
            ticks[int(entry.parent.name)] = sum(map(int, fields[11:15]))
    if pid not in ticks:
        return None
    tree = {pid}
    while grown := {child for child, parent in parents.items() if parent in tree} - tree:
        tree |= grown
    return sum(ticks[each] for each in tree) / os.sysconf("SC_CLK_TCK")


class _Said(msgspec.Struct):
    url: str = ""
    error: str = ""


@contextlib.contextmanager
def served(
    candidate: Candidate, bundle: Bundle, goal: Goal, run: Path, trusted: tuple[str, ...]
) -> Iterator[tuple[str, int]]:
    """A server for `candidate` on a free loopback port, as a context; gives its URL and its process.

    Gone at the end, whatever happens.

    Raises:
        EngineError: if the server does not come up; the message is the server's own.
    """
    name = hashlib.sha256(str(candidate).encode()).hexdigest()[:12]
    file, log = run / f".candidate-{name}.json", run / f".candidate-{name}.log"
    plan_of(candidate, bundle, goal, bundle.manifest.name).save(file)
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
            yield said.url, server.pid
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
