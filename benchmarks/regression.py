"""`make bench-regression BEFORE=COMMIT`: did a change make a request dearer? 4 minutes on a quiet machine.

Servers of both trees run at the same time, pinned to one core; a closed loop on another core asks them in turn, so that
what disturbs the machine disturbs both. Models: one that computes nothing, and the article's network at 32x32. Cases:
equal requests, and requests that each have an id of their own in the head and in the JSON.

    python benchmarks/regression.py --before HEAD~20
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
from bench.blocks import samples_of
from bench.closed_loop import Load
from bench.contestants import OURS, Setup, request_for
from bench.ids import ask, requests_of
from bench.models import ModelName, bundle_of
from bench.parts import Part, run_parts, say, scale_of, scale_options
from bench.record import Check, Table, commit, judged
from bench.servers import DidNotStart
from noise_costs import served, tree_of

from rushhour.load import Generator

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "regression.json"
BEFORE = "6cebe48"
"""The last commit before the packages were divided into rooms."""
_MODELS: tuple[ModelName, ...] = ("noop", "cnn")
_CASES = {"equal": "equal requests", "both": "an id of its own in head and JSON"}
_BATCH = 32
_USERS = 32
_WARM_UP_S = 1.0
_WITHIN, _IDS = "<= 1.02", "<= 1.3"


class Scale(msgspec.Struct, frozen=True):
    """How much is measured.

    Attributes:
        rounds: windows of each server in each case.
        seconds: of one window.
    """

    rounds: int = 24
    seconds: float = 1.0


def compared(before: str, scale: Scale) -> Part:
    """CPU of the server per answer, of both trees."""
    cores = sorted(os.sched_getaffinity(0))
    checks: list[Check] = []
    rows: list[tuple[str | float | None, ...]] = []
    data = {}
    with TemporaryDirectory(prefix="bench-") as folder, tree_of(before, Path(folder) / "tree") as earlier:
        for model in _MODELS:
            bundle = bundle_of(model, ROOT / ".bench" / "models")
            setup = Setup(model, bundle, "f32", frozenset({cores[0]}), 1, _BATCH)
            costs = data[model] = _costs(earlier, setup, Path(folder), {cores[-1]}, scale)
            for case, words in _CASES.items():
                now, then = (costs[f"{tree}.{case}"] for tree in ("after", "before"))
                ratios = [one / other for one, other in zip(now, then, strict=True)]
                what = f"{model}, {words}: CPU of the server per answer against {before}"
                checks.append(judged(f"25.3.{model}.{case}", what, _WITHIN, ratios))
                rows.append((model, words, sorted(then)[len(then) // 2], sorted(now)[len(now) // 2]))
            pairs = zip(costs["after.both"], costs["after.equal"], strict=True)
            what = f"{model}, {_CASES['both']}: CPU of the server per answer against equal requests"
            checks.append(judged(f"23.4.{model}", what, _IDS, [one / other for one, other in pairs]))
    note = f"Medians, in microseconds. Before is {before}, now {commit()}."
    columns = ("model", "requests", "before", "now")
    return Part(tuple(checks), (Table("CPU of the server per answer", columns, tuple(rows), note),), data)


def _costs(earlier: Path, setup: Setup, folder: Path, sending: set[int], scale: Scale) -> dict[str, list[float]]:
    """`TREE.CASE` -> CPU microseconds per answer, one for each round."""
    costs: dict[str, list[float]] = defaultdict(list)
    base = request_for(OURS, setup, samples_of(setup)[0])
    load = Load(_USERS, frozenset(sending))
    trees = {"before": earlier, "after": ROOT}
    with contextlib.ExitStack() as stack:
        servers = {
            name: stack.enter_context(served(tree, setup, folder / f"{name}-{setup.model}"))
            for name, tree in trees.items()
        }
        generator = stack.enter_context(Generator(cores=load.cores))
        for number in range(-1, scale.rounds):
            order = [(name, case) for case in _CASES for name in trees]
            for name, case in order if number % 2 else reversed(order):
                server = servers[name]
                requests = [each.http(server.port) for each in requests_of(base, case)]
                began = server.cpu_s()
                seconds = scale.seconds if number >= 0 else _WARM_UP_S
                answered = ask(generator, server.port, requests, load, seconds)
                if number >= 0:
                    costs[f"{name}.{case}"].append(1e6 * (server.cpu_s() - began) / answered)
            say(f"{setup.model}: {number + 1} of {scale.rounds} rounds")
    return dict(costs)


def main() -> int:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description="CPU of the server per answer, of two commits.")
    parser.add_argument("--before", default=BEFORE, help="the commit to compare with")
    parser.add_argument("--out", type=Path, help="the record; by default results/regression.json")
    scale_options(parser, Scale())
    arguments = parser.parse_args()
    scale = scale_of(arguments, Scale)
    try:
        return run_parts(
            {"cpu": partial(compared, arguments.before, scale)},
            arguments.out or RESULTS,
            kept=scale == Scale(),
            only=set(),
            timed={"cpu"},
            seeds={},
        )
    except DidNotStart as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
