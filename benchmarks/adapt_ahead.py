"""Part 9 of bench-adapt: full batches wait in the engine (docs/decisions/0063-full-batches-wait-in-the-engine.md)."""

from __future__ import annotations

import contextlib
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from bench.closed_loop import Load, generator, run
from bench.contestants import OURS, Setup, request_for
from bench.models import bundle_of
from bench.parts import Part, say
from bench.record import Check, Table, commit, judged
from bench.servers import Server, free_port, running
from bench.wire import answers
from noise_costs import ROOT, tree_of

from rushhour.system.machine import cores

_USERS = {16: ">= 0.95", 64: ">= 1.05", 256: ">= 1.05"}
"""Users of a closed loop, and the target. With few, a full batch hardly ever waits."""
_WINDOW_S, _WARM_UP_S = 3.0, 2.0
_BATCH = 32


class Loaded(NamedTuple):
    """One window: answers per second, the 99th percentile in milliseconds, CPU of the server per answer in µs."""

    rps: float
    p99_ms: float
    cpu_us: float


def ahead_part(before: str, rounds: int, work: Path) -> Part:
    """Part 9: answers per second of one process with a stream for each core, against a commit before.

    Args:
        before: that commit.
        rounds: windows of each server with each number of users, in turns.
        work: where the model is kept.
    """
    bundle = bundle_of("cnn", work / "models")
    setup = Setup("cnn", bundle, "f32", frozenset(os.sched_getaffinity(0)), cores(), _BATCH)
    request = request_for(OURS, setup, bundle.samples()["image"][0])
    found: dict[tuple[str, int], list[Loaded]] = defaultdict(list)
    with TemporaryDirectory(prefix="bench-") as folder, tree_of(before, Path(folder) / "tree") as earlier:
        trees = {"before": earlier, "after": ROOT}
        with contextlib.ExitStack() as stack:
            servers = {
                name: stack.enter_context(_served(tree, setup, Path(folder) / f"{name}.log"))
                for name, tree in trees.items()
            }
            for number in range(-1, rounds):
                order = [(name, users) for users in _USERS for name in trees]
                for name, users in order if number % 2 else reversed(order):
                    server, load = servers[name], Load(users, setup.cores)
                    began = server.cpu_s()
                    seen = run(server.port, request, load, _WINDOW_S if number >= 0 else _WARM_UP_S, Path(folder))
                    if seen.errors:
                        raise OSError(f"{seen.errors} of the answers of {name} are none")
                    if number >= 0:
                        cpu_us = 1e6 * (server.cpu_s() - began) / seen.requests
                        found[name, users].append(Loaded(seen.rps, seen.p99_ms, cpu_us))
                say(f"9  {number + 1} of {rounds} rounds")
    checks: list[Check] = []
    rows = []
    for users, target in _USERS.items():
        now, then = found["after", users], found["before", users]
        what = f"{users} users: answers per second against {before}"
        checks.append(judged(f"9.{users}", what, target, [b.rps / a.rps for a, b in zip(then, now, strict=True)]))
        what = f"{users} users: CPU of the server per answer against {before}"
        costs = [b.cpu_us / a.cpu_us for a, b in zip(then, now, strict=True)]
        checks.append(judged(f"9.{users}.cpu", what, "<= 1.03", costs))
        for name, each in (("before", then), ("now", now)):
            rows.append((str(users), name, *(sorted(column)[len(column) // 2] for column in zip(*each, strict=True))))
    columns = ("users", "", "answers/s", "p99, ms", "CPU per answer, µs")
    note = f"Medians of {rounds} windows; {generator()}. Before is {before}, now {commit()}."
    data = {f"{name}.{users}": each for (name, users), each in found.items()}
    return Part(tuple(checks), (Table("Full batches wait in the engine", columns, tuple(rows), note),), data)


@contextlib.contextmanager
def _served(tree: Path, setup: Setup, log: Path) -> Iterator[Server]:
    """The bundle on a tree's server, with a stream for each core."""
    port = free_port()
    command = [sys.executable, "-m", "rushhour", "serve", str(setup.bundle.path), "--http-port", str(port), "--no-grpc"]
    layout = ["--streams", str(setup.instances)]
    ready = partial(answers, port, request_for(OURS, setup, setup.bundle.samples()["image"][0]))
    environment = {**os.environ, "PYTHONPATH": str(tree / "src")}
    with running([*command, *layout], environment, port, setup.cores, log, ready) as server:
        yield server
