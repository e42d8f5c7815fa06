"""The server of a candidate: a process of its own, which serves a plan as a user's server would."""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from rushhour.bundle import Bundle
from rushhour.errors import EngineError
from rushhour.goal import Goal
from rushhour.plan import Plan, Variant
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


@contextlib.contextmanager
def served(
    candidate: Candidate, bundle: Bundle, goal: Goal, run: Path, trusted: tuple[str, ...]
) -> Iterator[tuple[str, int]]:
    """A server for `candidate` on a free loopback port, as a context; gives its URL and its process ID.

    The process is gone at the end in every case.

    Raises:
        EngineError: if the server does not start; the message is the server's own.
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
            started = _first_line(server)
            if not started.url:
                last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["it wrote no message"]
                raise EngineError(f"the server of {candidate} does not start", started.error or last[0])
            yield started.url, server.pid
        finally:
            _stop(server)
    finally:
        file.unlink(missing_ok=True)
        log.unlink(missing_ok=True)


class _Started(msgspec.Struct):
    url: str = ""
    error: str = ""


def _first_line(server: subprocess.Popen[bytes]) -> _Started:
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
        return msgspec.json.decode(line, type=_Started)
    except msgspec.DecodeError:
        return _Started()


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


def cpu_seconds(pid: int) -> float | None:
    """CPU time of a process and all its descendants, including those that have ended and were waited for.

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
