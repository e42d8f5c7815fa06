"""Line 6 of `make bench-noise`: CPU per request of generator and server, of this tree and of an earlier commit.

Both trees' servers run all the time, each on the same core; windows of load alternate between them, each by its own
tree's generator on another core, with the same arrivals. CPU time is a fair measure on a busy machine, where the clock
on the wall is not; a ratio of two windows in a row is fairer still.

    python benchmarks/noise_costs.py                        prints the table; 5 minutes
    python benchmarks/noise_costs.py --blocks 3 --seconds 1
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np
from bench.blocks import raw_costs
from bench.contestants import OURS, Setup, request_for
from bench.models import ModelName, bundle_of
from bench.parts import say
from bench.record import Check, Table, commit, judged
from bench.servers import Server, free_port, running
from bench.wire import answers

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / ".bench"
BEFORE = "cf077a8"
"""The last commit before generator and server were made cheaper."""

_RATES = (1_000, 3_000, 20_000)
_TARGET, _SERVER_TARGET = "<= 0.5", "<= 1.1"
_HEADROOM = 1.5
_BEHIND_MS = 25.0
_IN_WORDS: dict[str, str] = {
    "cnn": "the article's network at 32x32",
    "noop": "a model that computes nothing (one core does not carry so many of the article's network here)",
}
_BATCH = 32
_START = """
import json, sys
from pathlib import Path
from bench.contestants import Setup, start_ours
from rushhour.bundle import Bundle
model, bundle, core, batch, port, work = sys.argv[1:]
setup = Setup(model, Bundle.open(Path(bundle)), "f32", frozenset({int(core)}), 1, int(batch))
start = start_ours(setup, int(port), Path(work))
print(json.dumps([start.command, start.env]))
"""
"""Run with a tree's own modules, because the form of plans may differ."""


class Window(msgspec.Struct, frozen=True):
    """The cost of one window of load.

    Attributes:
        tree: `before` or `after`.
        rate: asked for, requests per second.
        block: which, from 0; the two trees have one each with the same arrivals.
        model: that was served: `cnn` or `noop`.
        generator_us: CPU of the generator for a request, its noise guard included.
        server_us: CPU of the server for a request.
        requests: that were sent, the warm-up's included; `answered` of them well.
        p50_ms: latency.
        lag_p50_ms: how long after its schedule a request was sent; `lag_p99_ms` at the 99th percentile.
    """

    tree: str
    rate: int
    block: int
    model: str
    generator_us: float
    server_us: float
    requests: int
    answered: int
    p50_ms: float | None
    lag_p50_ms: float | None
    lag_p99_ms: float | None

    @property
    def kept_up(self) -> bool:
        """Whether the server kept up with the rate: else late answers were not counted."""
        return self.p50_ms is not None and self.p50_ms < _BEHIND_MS


def generator_and_server(
    before: str = BEFORE, blocks: int = 8, seconds: float = 4.0
) -> tuple[list[Check], list[Window], list[Table]]:
    """Measure both trees.

    Args:
        before: the commit to compare with.
        blocks: pairs of windows at each rate.
        seconds: of one window, beside its warm-up.

    Returns:
        A check for each rate and side, all windows, and a table of medians.

    Raises:
        subprocess.CalledProcessError: if git does not have that commit.
        DidNotStart: if a server does not.
    """
    cores = sorted(os.sched_getaffinity(0))
    serving, sending = cores[0], cores[-1]
    windows = []
    with TemporaryDirectory(prefix="bench-") as folder, tree_of(before, Path(folder) / "tree") as earlier:
        trees = {"before": earlier, "after": ROOT}
        for rate in _RATES:
            setup = _setup(rate, serving)
            with contextlib.ExitStack() as stack:
                servers = {
                    name: stack.enter_context(served(tree, setup, Path(folder) / f"{name}-{rate}"))
                    for name, tree in trees.items()
                }
                for block in range(blocks):
                    for name in sorted(trees, reverse=block % 2 == 1):
                        window = _window(name, trees[name], servers[name], setup.model, rate, block, seconds, sending)
                        windows.append(window)
                        say(
                            f"{rate}/s  {name:6}  generator {window.generator_us:.1f} us, "
                            f"server {window.server_us:.1f} us a request"
                        )
    return _checks(windows), windows, [_table(windows, before)]


def _checks(windows: list[Window]) -> list[Check]:
    checks = []
    for side, target in (("generator", _TARGET), ("server", _SERVER_TARGET)):
        for rate in _RATES:
            of = [each for each in windows if each.rate == rate]
            before, after = (
                {each.block: each for each in of if each.tree == tree and each.kept_up} for tree in ("before", "after")
            )
            pairs = [(after[block], before[block]) for block in sorted(after.keys() & before.keys())]
            ratios = [getattr(now, f"{side}_us") / getattr(then, f"{side}_us") for now, then in pairs]
            what = f"CPU of the {side} for a request at {rate:,}/s of {_IN_WORDS[of[0].model]}: share of before"
            left = f"{len(of) // 2 - len(pairs)} pairs of windows left out: this machine did not carry the rate"
            why = left if len(pairs) < len(of) // 2 else ""
            checks.append(judged(f"6.{side}.{rate}", what, target, ratios, why=why))
    return checks


def _table(windows: list[Window], before: str) -> Table:
    rows: list[tuple[str | float | None, ...]] = []
    for rate in _RATES:
        for tree in ("before", "after"):
            of = [each for each in windows if (each.rate, each.tree) == (rate, tree)]
            lags = [each.lag_p50_ms for each in of if each.lag_p50_ms is not None]
            rows.append(
                (
                    *(float(rate), of[0].model, tree),
                    float(np.median([each.generator_us for each in of])),
                    float(np.median([each.server_us for each in of])),
                    float(np.median(lags)) if lags else None,
                    sum(each.answered for each in of) / sum(each.requests for each in of),
                )
            )
    columns = ("requests/s", "model", "tree", "generator, us", "server, us", "send delay p50, ms", "answered")
    note = f"CPU per request, medians of windows. Before is {before}, after {commit()}."
    return Table("CPU per request of generator and server", columns, tuple(rows), note)


def _setup(rate: int, core: int) -> Setup:
    """The small article network where a core of this machine has enough capacity for it, else the no-op."""

    def of(model: ModelName) -> Setup:
        return Setup(model, bundle_of(model, BENCH / "models"), "f32", frozenset({core}), 1, _BATCH)

    network = of("cnn")
    cpu_s, _ = raw_costs(network, (_BATCH,), 1.0)[_BATCH]
    return network if _BATCH / cpu_s >= _HEADROOM * rate else of("noop")


@contextlib.contextmanager
def tree_of(hash: str, folder: Path) -> Iterator[Path]:
    """The work tree of a commit, as a context."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), hash], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


@contextlib.contextmanager
def served(tree: Path, setup: Setup, work: Path) -> Iterator[Server]:
    """A tree's own server, as a context."""
    work.mkdir()
    port = free_port()
    (core,) = setup.cores
    made = _python(tree, "-c", _START, setup.model, setup.bundle.path, core, setup.max_batch, port, work)
    command, env = json.loads(made)
    probe = request_for(OURS, setup, setup.bundle.samples()["image"][0])
    env["PYTHONPATH"] = str(tree / "src")
    with running(command, env, port, setup.cores, work / "log", partial(answers, port, probe)) as server:
        yield server


def _window(
    name: str, tree: Path, server: Server, model: str, rate: int, block: int, seconds: float, core: int
) -> Window:
    began = server.cpu_s()
    script = ROOT / "benchmarks" / "bench" / "one_load.py"
    url = f"http://127.0.0.1:{server.port}"
    said = json.loads(_python(tree, script, url, rate, seconds, block, core))
    server_us = 1e6 * (server.cpu_s() - began) / said["requests"]
    return msgspec.convert(
        {**said, "tree": name, "rate": rate, "block": block, "model": model, "server_us": server_us}, Window
    )


def _python(tree: Path, *arguments: object) -> str:
    """What a program prints that runs with a tree's modules."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tree / "src"), str(tree / "benchmarks")))}
    done = subprocess.run([sys.executable, "-P", *map(str, arguments)], env=env, stdout=subprocess.PIPE, text=True)
    done.check_returncode()
    return done.stdout


def main(given: list[str] | None = None) -> int:
    """Print checks and table."""
    parser = argparse.ArgumentParser(description="CPU per request of generator and server, before and after.")
    parser.add_argument("--before", default=BEFORE, help="the commit to compare with")
    parser.add_argument("--blocks", type=int, default=8, help="pairs of windows at each rate")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a window")
    arguments = parser.parse_args(given)
    checks, _, (table,) = generator_and_server(arguments.before, arguments.blocks, arguments.seconds)
    print("  ".join(table.columns))
    for row in table.rows:
        print("  ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row))
    print(table.note)
    for check in checks:
        shown = "" if check.interval is None else "  [{:.2f}, {:.2f}]".format(*check.interval)
        value = "not measured" if check.value is None else f"{check.value:.2f}"
        print(f"{'ok  ' if check.holds else 'MISS'} {check.id:18} {value}{shown} {check.target}  {check.what}")
    return 0 if all(check.holds for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
