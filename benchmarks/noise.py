"""`make bench-noise`: tuning on a host that is disturbed on purpose (`rushhour.testing.disturbers`).

1  `rushhour demo` on a processor without AVX-512, disturbed: does it find a plan, in time, with the right layout?
2  the same candidate searched repeatedly: are estimates consistent, do proofs hold on fresh seeds?
3  the verdict in simulation (noise_verdict.py)
4  races between two plans: is the order right?
5  predicted against measured capacity (noise_predictions.py)
6  CPU per request of generator and server (noise_costs.py)

Disturbed parts run in a child process, so that everything it starts is disturbed too. The networks are those of
bench-machines (.bench/machines; trained there if they are missing).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from bench.networks import quantised, trained
from bench.parts import Part, run_parts, say, scale_of, scale_options
from bench.record import Table, verdict
from machines import BENCH, NETWORKS
from machines import Scale as Training
from noise_costs import BEFORE, generator_and_server
from noise_predictions import prediction_part
from noise_verdict import verdict_part

from rushhour.bundle import Bundle
from rushhour.clock import WallClock
from rushhour.data import load
from rushhour.goal import SLO, AccuracyBudget, Goal
from rushhour.load import Generator
from rushhour.plan import Plan
from rushhour.progress import Silent
from rushhour.records.journal import Journal
from rushhour.system.machine import cores
from rushhour.testing.disturbers import VARIABLE, slowed_environment
from rushhour.tune import TuneSettings
from rushhour.tune.bench import Bench, ServedCandidate
from rushhour.tune.engine_times import EngineTimes
from rushhour.tune.load_tests import LoadTests
from rushhour.tune.prediction import Predictor
from rushhour.tune.settings import Budget
from rushhour.tune.space import Candidate, candidates
from rushhour.tune.state import CandidateState

RESULTS = Path(__file__).parent / "results" / "noise.json"
SEED = 0
GOAL = Goal(SLO.parse("p99<50ms"), AccuracyBudget.parse("1%"))
DISTURBED: dict[str, tuple[str, ...]] = {
    "quiet": (),
    "bursts 3%": ("--bursts", "0.03"),
    "bursts 8%": ("--bursts", "0.08"),
    "bursts 15%": ("--bursts", "0.15"),
    "two states": ("--waves", "two-state"),
    "recorded": ("--waves", "recorded"),
}
_NOT_ASKED = "bursts 15%"
"""Not for the demo: the check asks for disturbances up to 8%, and for varying speed."""
_TRUSTED = ("rushhour.models:build",)
_APART = 1.1
_HERE = str(Path(__file__).resolve())


class Scale(msgspec.Struct, frozen=True):
    """The size of each part.

    Attributes:
        searches: of one candidate, for each disturbance; proofs are tried on 20 windows in all.
        races: of two plans 10% apart, for each disturbance, and twice as many of equal ones.
        rounds: of windows of every layout after a demo.
        plans: of each network, whose capacity is predicted and measured.
        windows: simulated, of each kind at its capacity; `requests` in all tell where that is.
        blocks: of windows of so many `seconds` with the generator of before and of now.
    """

    searches: int = 5
    races: int = 20
    rounds: int = 25
    plans: int = 7
    windows: int = 400
    requests: int = 6_000_000
    blocks: int = 8
    seconds: float = 4.0


def disturbed(name: str, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command under one of the disturbances."""
    before = [sys.executable, "-m", "rushhour.testing.disturbers", *DISTURBED[name], "--seed", str(SEED), "--"]
    return subprocess.run([*(before if DISTURBED[name] else ()), *command], text=True, **options)


def child(name: str, what: str, **given: Any) -> Any:
    """Do a part of the work in a disturbed process."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, _HERE, "--child", what, "--given", json.dumps(given), "--out", str(out)]
        disturbed(name, command, check=True)
        return json.loads(out.read_text())


# In a disturbed process.


class Tuning(NamedTuple):
    """The parts of the tuner, for some bundles, with an empty journal."""

    bench: Bench
    load_tests: LoadTests
    predictor: Predictor


@contextlib.contextmanager
def tuning(bundles: dict[str, Bundle], seed: int, generator: Generator) -> Iterator[Tuning]:
    """The parts of the tuner in a folder of their own, as a context."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        (run / "bundles").mkdir()
        for role, bundle in bundles.items():
            shutil.copytree(bundle.path, run / "bundles" / role)
        bench = Bench(Journal(run / "measurements.jsonl"), generator, GOAL, run, _TRUSTED)
        settings = TuneSettings(seed=seed)
        budget, times = Budget(None, WallClock()), times_of(bundles, run / "measurements.jsonl")
        with contextlib.closing(times):
            load_tests = LoadTests(bench, bundles, GOAL, settings, Silent(), budget, host_speed=times.speed_beside)
            yield Tuning(bench, load_tests, Predictor(times))


def times_of(bundles: dict[str, Bundle], journal: Path) -> EngineTimes:
    """The tuner's service times."""
    return EngineTimes(Journal(journal), bundles, GOAL.slo, TuneSettings().time_s, _TRUSTED)


def make_networks() -> None:
    """The networks of parts 2, 4 and 5, where they are missing."""
    data = load("fashion-mnist")
    for each in NETWORKS:
        quantised(trained(each, data, Training().epochs, BENCH), data, BENCH)


def of(network: str, folder: Path = BENCH) -> dict[str, Bundle]:
    """A trained network, and its int8 bundle."""
    return {"reference": Bundle.open(folder / network), "int8": Bundle.open(folder / f"{network}-7")}


def timed(bundles: dict[str, Bundle], candidate: Candidate) -> CandidateState:
    """A candidate with the best batch bound, and the capacity predicted from its service times alone."""
    state = CandidateState(candidate)
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.closing(times_of(bundles, Path(folder) / "measurements.jsonl")) as times,
    ):
        Predictor(times).choose_batch(state)
    return state


def first_of(bundles: dict[str, Bundle], role: str = "int8") -> Candidate:
    """The candidate of parts 2 and 4: int8 on OpenVINO, a stream for each core."""
    return next(
        each
        for each in candidates(bundles, cores())
        if (each.bundle, each.engine, each.policy.cells, each.policy.threads) == (role, "openvino", 1, 1)
    )


def searches(n: int, windows: int) -> dict[str, Any]:
    """One candidate searched `n` times, and each of its proofs repeated on `windows` fresh seeds."""
    bundles, found = of("article"), []
    first = timed(bundles, first_of(bundles))
    with Generator() as generator:
        for seed in range(1, n + 1):
            with tuning(bundles, seed, generator) as (bench, load_tests, _):
                began = time.monotonic()
                state = CandidateState(first.candidate, predicted=first.predicted)
                load_tests.measure_throughput(state)
                load_tests.estimate_capacity(state)
                estimated = state.capacity
                proof = load_tests.confirm(state)
                seconds = time.monotonic() - began
                held: list[bool] = []
                if proof is not None:
                    with bench.serve(first.candidate, bundles["int8"], "again") as served:
                        for again in range(windows):
                            window = served.proof_windows(5.0, 0.05)(proof.rate_rps, 50_000 + again)
                            held.append(not window.outcome.refutes and window.keeps_slo)
                found.append(
                    {
                        "estimated": estimated,
                        "proven": proof.rate_rps if proof else None,
                        "capacity": state.capacity,
                        "seconds": round(seconds, 1),
                        "held": held,
                    }
                )
    return {"candidate": first.candidate.name, "searches": found}


def races(n: int, slower: float, network: str = "article", folder: str = str(BENCH)) -> list[dict[str, Any]]:
    """A candidate raced against itself, or against itself on an engine that takes `slower` times as long."""
    bundles, found = of(network, Path(folder)), []
    one = timed(bundles, first_of(bundles))
    candidate, two = one.candidate, CandidateState(one.candidate, predicted=one.predicted)
    with Generator() as generator, tuning(bundles, SEED, generator) as (bench, load_tests, _):
        load_tests.measure_throughput(one)
        two.throughput = one.throughput
        with contextlib.ExitStack() as stack:
            with slowed(1.0) if slower != 1 else contextlib.nullcontext():
                ours = stack.enter_context(bench.serve(candidate, bundles["int8"], "race"))
                ours.closed_window(8, 0.5, 0)  # it starts
            with slowed(slower) if slower != 1 else contextlib.nullcontext():
                theirs = stack.enter_context(bench.serve(candidate, bundles["int8"], "race of the other"))
                theirs.closed_window(8, 0.5, 0)
            for again in range(n):
                began = time.monotonic()
                is_first = again % 2 == 0
                pair = ((one, ours), (two, theirs)) if is_first else ((two, theirs), (one, ours))
                result = load_tests.race(*pair[0], *pair[1], again=again)
                assert result is not None
                found.append(
                    {
                        "order": result.order,
                        "expected": "tie" if slower == 1 else "slower" if is_first else "faster",
                        "ratio": result.ratio,
                        "pairs": result.pairs,
                        "seconds": round(time.monotonic() - began, 1),
                    }
                )
    return found


@contextlib.contextmanager
def slowed(times: float) -> Iterator[None]:
    """Engines in processes started here take this factor longer, with the same variation of the host's speed."""
    before = dict(os.environ)
    settings = json.loads(before.get(VARIABLE, "{}"))
    os.environ.update(slowed_environment(settings.get("curve"), settings.get("seed", SEED), slower=times))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def predictions(network: str, plans: int) -> list[dict[str, Any]]:
    """Capacities of one network's plans, predicted as the tuner does, and measured. The overhead of serving comes from
    the best plan of each layout and a slow one; these plans are not among the measured ones. `corrected` is predicted
    with the residuals of the plans that were measured before. All are for the host's speed beside the measurement."""
    bundles, found = of(network), []
    states = [CandidateState(each) for each in candidates(bundles, cores()) if each.precision != "bf16"]
    with Generator() as generator, tuning(bundles, SEED, generator) as (_, load_tests, predictor):
        for state in states:
            predictor.choose_batch(state)
        states = sorted(states, key=lambda state: -(state.predicted or 0.0))
        alone = {id(state): state.predicted for state in states}
        learnt = predictor.learn_overheads(states, functools.partial(load_tests.measure_throughput, in_open_loop=True))
        speed, rates = predictor.speed, {id(each): predictor.capacity(each.candidate) for each in states}
        rest = [state for state in states if state not in learnt and state.fate is None]
        for state in (rest[round(at)] for at in np.linspace(0, len(rest) - 1, min(plans, len(rest)))):
            candidate = state.candidate
            corrected = predictor.capacity(candidate) / predictor.speed
            if load_tests.measure_throughput(state):
                load_tests.estimate_capacity(state)
            estimated = load_tests.estimate(state)
            if state.capacity and estimated is not None:
                low, high = estimated.interval_rps
                found.append(
                    {
                        "network": network,
                        "plan": f"{candidate.name}, batches up to {candidate.policy.max_batch}",
                        "engine_alone": (alone[id(state)] or 0.0) * state.speed,
                        "predicted": rates[id(state)] * state.speed / speed,
                        "corrected": corrected * state.speed,
                        "speed": state.speed,
                        "measured": state.capacity,
                        "interval": f"{low:,.0f} to {high:,.0f}",
                    }
                )
                predictor.learn_residual(state)
    return found


def layouts(run: str, rounds: int) -> dict[str, float]:
    """Answers in time per second of every layout of a plan's variant, in alternating closed loops."""
    plan = Plan.load(Path(run) / "plan.json")
    variant, role = plan.variants[0], Path(plan.variants[0].bundle).name
    bundles = {role: Bundle.open(Path(run) / variant.bundle)}
    wanted = [
        each
        for each in candidates(bundles, cores())
        if (each.engine, each.precision) == (variant.engine, variant.precision)
    ]
    bound = plan.policy.max_batch
    shipped = (plan.policy.cells, plan.policy.streams, plan.policy.threads)
    assert plan.evidence is not None
    users = max(1, min(512, round(0.5 * plan.evidence.capacity_rps * GOAL.slo.limit_s)))
    answered: dict[str, list[float]] = {}
    with Generator() as generator, tuning(bundles, SEED, generator) as (bench, *_), contextlib.ExitStack() as stack:
        ready: list[tuple[str, ServedCandidate]] = []
        for each in wanted:
            policy = each.policy
            is_shipped = (policy.cells, policy.streams, policy.threads) == shipped
            candidate = each.with_batch(bound) if is_shipped else timed(bundles, each).candidate
            served = stack.enter_context(bench.serve(candidate, bundles[role], "layout"))
            served.closed_window(users, 1.0, 0)
            ready.append(("shipped" if is_shipped else candidate.name, served))
        for turn in range(rounds):
            for name, served in ready if turn % 2 == 0 else ready[::-1]:
                answered.setdefault(name, []).append(served.closed_window(users, 1.0, 1 + turn).throughput_rps)
    return {name: statistics.mean(seen) for name, seen in answered.items()}


CHILDREN: dict[str, Callable[..., Any]] = {
    "searches": searches,
    "races": races,
    "predictions": predictions,
    "layouts": layouts,
}


# The parts.


def demo(name: str, scale: Scale) -> Part:
    """Part 1, with one disturbance."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        began = time.monotonic()
        command = [sys.executable, "-m", "rushhour.testing.processor", sys.executable, "-m", "rushhour", "demo"]
        ended = disturbed(name, [*command, "--cold", "--out", str(run)], capture_output=True)
        minutes = (time.monotonic() - began) / 60
        file = run / "plan.json"
        evidence = Plan.load(file).evidence if file.exists() else None
        said = ended.stderr.replace(folder, "").splitlines()
        what = f"`rushhour demo`, {name}"
        if evidence is None:
            nothing = verdict(f"1.{name}", f"{what}: a plan", ">= 1", 0.0, None, 1, unit="")
            return Part((nothing,), (), {"exit": ended.returncode, "minutes": minutes, "said": said})
        all_layouts = child(name, "layouts", run=str(run), rounds=scale.rounds)
    gain = evidence.capacity_rps / max(evidence.baseline_capacity_rps, 1e-9)
    share = all_layouts["shipped"] / max(all_layouts.values())
    seen = {
        "exit": ended.returncode,
        "minutes": minutes,
        "evidence": msgspec.to_builtins(msgspec.structs.replace(evidence, trials=())),
        "layouts": all_layouts,
        "said": said,
    }
    checks = (
        verdict(f"1.{name}.exit", f"{what}: exit code", "<= 0", float(ended.returncode), None, 1, unit=""),
        verdict(f"1.{name}.capacity", f"{what}: capacity", ">= 1", evidence.capacity_rps, None, 1, unit="/s"),
        verdict(f"1.{name}.minutes", f"{what}: minutes, installs apart", "<= 9", minutes, None, 1, unit="min"),
        verdict(f"1.{name}.gain", f"{what}: gain over the baseline", ">= 4", gain, None, 1),
        verdict(f"1.{name}.accuracy", f"{what}: accuracy", ">= 0.9", evidence.accuracy, None, 1, unit=""),
        verdict(f"1.{name}.layout", f"{what}: its layout, of the best", ">= 0.95", share, None, scale.rounds),
    )
    proven = "proven" if evidence.proven else "estimated"
    row = (name, minutes, evidence.capacity_rps, proven, gain, evidence.accuracy, share)
    columns = ("disturbed by", "minutes", "capacity, /s", "", "gain", "accuracy", "layout, of the best")
    return Part(checks, (Table("`rushhour demo`, disturbed", columns, (row,)),), seen)


def searched(name: str, scale: Scale) -> Part:
    """Part 2, with one disturbance."""
    found = child(name, "searches", n=scale.searches, windows=math.ceil(20 / scale.searches))
    estimates = [each["estimated"] for each in found["searches"] if each["estimated"]]
    proven = [each["proven"] for each in found["searches"] if each["proven"]]
    held = [each for search in found["searches"] for each in search["held"]]
    middle = statistics.median(estimates) if estimates else 0.0
    off = max((abs(each / middle - 1) for each in estimates), default=1.0)
    seconds = statistics.median(each["seconds"] for each in found["searches"])
    what, n = f"{found['candidate']}, {name}", len(estimates)
    spread = f"{what}: estimates, farthest from their median"
    checks = [verdict(f"2.{name}.spread", spread, "<= 0.1", off, None, n, unit="")]
    if held:
        holds, share = f"{what}: windows that a proof held in", sum(held) / len(held)
        checks.append(verdict(f"2.{name}.holds", holds, ">= 0.95", share, None, len(held), unit=""))
    typical = statistics.median(proven) if proven else None
    row = (name, middle, off, len(proven), typical, sum(held), len(held), seconds)
    columns = ("disturbed by", "estimate, /s", "farthest", "proven", "proven, /s", "held", "of windows", "seconds")
    return Part(tuple(checks), (Table("One candidate, searched again and again", columns, (row,)),), found)


def raced(name: str, scale: Scale) -> Part:
    """Part 4, with one disturbance."""
    checks, rows, seen = [], [], {}
    for slower, n, key, kind in (
        (_APART, scale.races, "order", "plans 10% apart: ordered rightly"),
        (1.0, 2 * scale.races, "tie", "equal plans: ties"),
    ):
        found = seen[key] = child(name, "races", n=n, slower=slower)
        right = sum(each["order"] == each["expected"] for each in found) / len(found)
        opposite = sum(each["order"] not in (each["expected"], "tie") for each in found)
        longest = max(each["seconds"] for each in found)
        n, what = len(found), f"{kind}, {name}"
        checks += [
            verdict(f"4.{name}.{key}", what, ">= 0.95", right, None, n, unit=""),
            verdict(f"4.{name}.{key}.s", f"{what}: the longest race", "<= 60", longest, None, n, unit="s"),
        ]
        middle = statistics.median(each["seconds"] for each in found)
        ratio = statistics.median(each["ratio"] ** (-1 if each["expected"] == "faster" else 1) for each in found)
        rows.append((name, kind, right, opposite, ratio, middle, longest, n))
    columns = ("disturbed by", "", "right", "the opposite", "ratio seen", "seconds, median", "longest", "races")
    return Part(tuple(checks), (Table("Races of two", columns, tuple(rows)),), seen)


def predicted(scale: Scale) -> Part:
    """Part 5."""
    children = (child("quiet", "predictions", network=each, plans=scale.plans) for each in NETWORKS)
    return prediction_part(list(itertools.chain(*children)))


def simulated(runs: int, requests: int) -> Part:
    """Part 3."""
    checks, tables, data = verdict_part(runs, requests, cores())
    return Part(tuple(checks), tuple(tables), data)


def costs(blocks: int, seconds: float) -> Part:
    """Part 6."""
    checks, windows, tables = generator_and_server(BEFORE, blocks, seconds)
    return Part(tuple(checks), tuple(tables), msgspec.to_builtins(windows))


def main() -> int:
    """Measure what is missing, and write the record after each part."""
    parser = argparse.ArgumentParser(description="The main job on a host that is not quiet.")
    parser.add_argument("--only", default="", help="of 1,2,3,4,5,6, measured anew")
    parser.add_argument(
        "--disturbed", default=",".join(DISTURBED), help="parts 1, 2 and 4 with these disturbances only"
    )
    parser.add_argument("--out", type=Path, help="the record; by default results/noise.json")
    parser.add_argument("--child", choices=sorted(CHILDREN), help=argparse.SUPPRESS)
    parser.add_argument("--given", default="{}", help=argparse.SUPPRESS)
    scale_options(parser, Scale())
    arguments = parser.parse_args()
    if arguments.child:
        arguments.out.write_text(json.dumps(CHILDREN[arguments.child](**json.loads(arguments.given))))
        return 0
    names = [name for name in DISTURBED if name in arguments.disturbed.split(",")]
    scale = scale_of(arguments, Scale)
    parts: dict[str, Callable[[], Part]] = {
        **{f"1 {name}": functools.partial(demo, name, scale) for name in DISTURBED if name != _NOT_ASKED},
        **{f"2 {name}": functools.partial(searched, name, scale) for name in DISTURBED},
        "3": lambda: simulated(scale.windows, scale.requests),
        **{f"4 {name}": functools.partial(raced, name, scale) for name in DISTURBED},
        "5": lambda: predicted(scale),
        "6": lambda: costs(scale.blocks, scale.seconds),
    }
    numbers = arguments.only.split(",") if arguments.only else [part[0] for part in parts]
    chosen = {part for part in parts if part[0] in numbers and (len(part) == 1 or part[2:] in names)}
    say(f"disturbed by: {', '.join(names)}")
    if chosen & {part for part in parts if part[0] in "245"}:
        make_networks()
    return run_parts(
        parts,
        arguments.out or RESULTS,
        kept=True,
        only=chosen if chosen != set(parts) else set(),
        timed=set(parts) - {"3"},
        seeds={"models": SEED, "disturbers": SEED},
    )


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
