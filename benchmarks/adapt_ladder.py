"""Parts 1, 5, 6 and 7 of bench-adapt: a ladder of variants between which the server moves as the load changes."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from bench.networks import quantised, trained
from bench.parts import Part, say
from bench.record import Check, Table, judged, verdict
from numpy.typing import NDArray
from regression import Scale as CostScale
from regression import compared

from rushhour.bundle import Bundle
from rushhour.compress import judge, outputs_of
from rushhour.data import Dataset, load
from rushhour.engines import EngineConfig, open_engine, time_service
from rushhour.errors import PlanError
from rushhour.goal import SLO, AccuracyBudget, Goal, Workload
from rushhour.ladder import LadderPoint
from rushhour.load import Generator, OpenJob, Samples, Status, discover, payloads
from rushhour.measurement import Accuracy
from rushhour.plan import Plan, Policy, Variant
from rushhour.serve import ServeSettings
from rushhour.serve.child import ChildServer
from rushhour.system.machine import cores
from rushhour.testing.bundles import tiny_bundle
from rushhour.testing.rushes import Step, arrivals, random_rates, rush

SEED = 0
SLO_ = SLO.parse("p99<50ms")
_MAX_BATCH = 32
_ROWS = 8
"""Samples in a request of the day: with one, the fastest variant would be bounded by what requests cost, and not by
what it computes."""
_INT8 = "-int8"
_WATCHED_S = 0.25
_SWITCHES = "rushhour_variant_switches_total"
_SPEND = 0.9
"""The budget of the day, as a share of what the fastest variant costs, which does not keep it alone."""
_DAY = ((12.0, 0.0), (8.0, 0.8), (6.0, 0.8), (2.0, 3.2), (12.0, 3.2), (5.0, 0.0), (15.0, 0.0))
"""Seconds, and the rate at their end over what the best single variant carries: quiet, ramp, plateau, a spike of 4
times in two seconds, a plateau, fall, quiet. It is never quieter than `_CALM`."""
_CALM, _CALM_TOP = 0.25, 0.45
"""In quiet times: of what the best single variant carries, and at most of what the most accurate one does."""
_OVERLOAD, _OVERLOAD_S = 2.0, 4.0
"""A variant is sent this many times what it carried before, until it answers no more of them."""
_SURE = 0.9
"""Operating points of the ladder, as a share of what variants answer within the limit under overload."""
_WINDOW = 0.75
"""The account's window, of all samples of a day: fewer than are answered, so that the budget holds for the day too.
The rush lies in one window, and before and after it all answers are accurate."""
_SENT = 256
"""Test samples that are sent: the account goes by the classes that it sees, and a few would not be as all are."""
_QUIET = ((0.0, 12.0), (48.0, 60.0))
"""Quiet times of it: the last begins three seconds after the fall."""
_CONSTANT = (_QUIET[0], (22.0, 26.0), (30.0, 40.0), _QUIET[1])
"""Times of constant load, from two seconds after the rate has changed."""
_COST_S = 0.5
"""Of a window of part 7: two that are compared follow each other closely, as the host's speed comes in waves."""
_STEPS = (Step(0.010, 0.004, 150.0, 0.0), Step(0.006, 0.002, 300.0, 0.008), Step(0.003, 0.001, 600.0, 0.03))
"""The ladder of random traces: one stream, batches of 8."""
_TRACE_BUDGET, _TRACE_WINDOW = 0.01, 2000
"""The account of random traces."""


class Judged(NamedTuple):
    """A variant with what was measured of it.

    Attributes:
        capacity: answers a second within the limit under overload, the best of the rounds: a search for a rate that
            holds gives less on a host whose speed comes in waves, and the day would then be no rush at all.
        carried: the same in each round, and between the days.
    """

    name: str
    bundle: Bundle
    accuracy: Accuracy
    capacity: float
    carried: tuple[float, ...] = ()

    def overloaded(self, run: Path) -> Judged:
        """With what it carries now, too."""
        return self._replace(carried=(*self.carried, _overloaded(self, run)))


class Day(NamedTuple):
    """What came of one day.

    Attributes:
        good: answers within the limit; `lost` were neither answered nor shed.
        samples: by variant, as counted at times since the beginning.
        moves: switches, as counted at the same times.
    """

    sent: int
    good: int
    shed: int
    lost: int
    drop: float
    switches: int
    samples: list[tuple[float, dict[str, float]]]
    moves: list[tuple[float, float]]

    def counted(self) -> dict[str, float]:
        """What is kept of it."""
        return {name: value for name, value in self._asdict().items() if not isinstance(value, list)}

    @property
    def constant_switches(self) -> float:
        """Switches a minute in the times of constant load."""
        seen = [[count for at, count in self.moves if begin <= at <= end] for begin, end in _CONSTANT]
        minutes = sum(end - begin for begin, end in _CONSTANT) / 60
        return sum(counts[-1] - counts[0] for counts in seen if counts) / minutes

    def share(self, variant: str, spans: Sequence[tuple[float, float]]) -> float:
        """Its share of the samples in these times."""
        inside = {name: 0.0 for _, counts in self.samples for name in counts}
        for begin, end in spans:
            seen = [counts for at, counts in self.samples if begin <= at <= end]
            for name in inside:
                inside[name] += seen[-1].get(name, 0.0) - seen[0].get(name, 0.0) if len(seen) > 1 else 0.0
        total = sum(inside.values())
        return inside.get(variant, 0.0) / total if total else 0.0


def day_part(networks: str, epochs: int, overloads: int, rounds: int, work: Path) -> Part:
    """Part 1: a day in a minute, on a ladder of networks of Fashion-MNIST, against the best single one.

    Args:
        networks: that are trained, separated by commas; with `-int8`, quantised too.
        epochs: of each training.
        overloads: of each variant.
        rounds: days of each contestant.
        work: where networks and plans are kept.
    """
    data, run = load("fashion-mnist"), work / "adapt" / "ladder"
    shutil.rmtree(run, ignore_errors=True)
    known = _judged([name for name in networks.split(",") if name], data, epochs, overloads, run, work)
    ladder = _ascending(known)
    if len(ladder) < 2:
        raise PlanError("there is no ladder", "no network is both faster and less accurate than another", "take others")
    budget = round(_SPEND * ladder[-1].accuracy.drop_interval[1], 4)
    inside = [each for each in ladder if each.accuracy.drop_interval[1] <= budget]
    best = max(inside, key=lambda each: each.capacity)
    calm = min(_CALM * best.capacity, _CALM_TOP * ladder[0].capacity)
    schedule = arrivals([(length, max(calm, rate * best.capacity)) for length, rate in _DAY], SEED)
    window = round(_WINDOW * len(schedule) * _ROWS)
    _plan(run, ladder, budget, window).save(run / "ladder.json")
    _plan(run, [best], budget, window).save(run / "single.json")
    sent = {ladder[0].bundle.manifest.signature.inputs[0].name: data.test.inputs[:_SENT]}
    found: dict[str, list[Day]] = {"ladder": [], "single": []}
    between = ladder
    for number in range(rounds):
        for name in found if number % 2 else reversed(found):
            found[name].append(_lived(run, name, schedule, sent))
            say(f"{name}: {found[name][-1][:6]}")
        between = [one.overloaded(run) for one in between]
    days = found["ladder"]
    good = [ours.good / max(1, theirs.good) for ours, theirs in zip(days, found["single"], strict=True)]
    top = ladder[0].name
    checks = [
        judged("1.goodput", f"goodput of a day over that of {best.name}, the best alone", ">= 1.5", good),
        _worst("1.accuracy", "mean expected accuracy drop of the day over the budget", "<= 1",
               [day.drop / budget for day in days]),
        _worst("1.quiet", f"share of {top}, the most accurate, in quiet times", ">= 0.95",
               [-day.share(top, _QUIET) for day in days]),
        _worst("1.switches", "switches in a day with one rush, a minute", "<= 4", [float(d.switches) for d in days]),
        _worst("1.constant", "switches a minute in the times of constant load", "<= 2",
               [d.constant_switches for d in days]),
        _worst("1.lost", "requests that were neither answered nor shed", "<= 0", [float(d.lost) for d in days]),
        _against_simulation(days, between, budget, window, schedule),
    ]  # fmt: skip
    rows = tuple(
        (one.name, one.capacity, one.accuracy.value, one.accuracy.drop, one.accuracy.drop_interval[1]) for one in ladder
    )
    columns = ("variant", f"requests of {_ROWS} samples/s", "accuracy", "drop", "at most")
    note = (
        f"Budget {budget:.2%} over {window:,} answers; {len(data.test):,} test samples; "
        f"answers within {SLO_} under overload."
    )
    return Part(tuple(checks), (Table("The ladder of the day", columns, rows, note),), [d.counted() for d in days])


def _worst(id: str, what: str, target: str, values: Sequence[float]) -> Check:
    """A check of the worst of several days; shares are given negative."""
    value = abs(max(values))
    return verdict(id, what, target, value, None, len(values), unit="")


def _judged(names: Sequence[str], data: Dataset, epochs: int, overloads: int, run: Path, work: Path) -> list[Judged]:
    bundles, folder = {}, work / "adapt" / "networks"
    for name in names:
        bundles[name] = trained(name.removesuffix(_INT8), data, epochs, folder)
        if name.endswith(_INT8):
            bundles[name] = quantised(bundles[name], data, folder)
    validation = {name: outputs_of(bundle, _config(bundle, 64), data.validation) for name, bundle in bundles.items()}
    scores = {name: data.task.evaluate(outputs, data.validation.targets)[0] for name, outputs in validation.items()}
    reference = max(scores, key=lambda name: scores[name])
    outputs = {name: outputs_of(bundle, _config(bundle, 64), data.test) for name, bundle in bundles.items()}
    known = []
    for name, bundle in bundles.items():
        base = None if name == reference else outputs[reference]
        accuracy = judge(data.task, "test", data.test.targets, outputs[name], base)
        known.append(Judged(name, bundle.copy_to(run / "bundles" / name), accuracy, 0.0))
    for _ in range(overloads):  # in turn, so that a slow moment of the host meets all of them
        known = [one.overloaded(run) for one in known]
        known = [one._replace(capacity=max(one.carried)) for one in known]
    for one in known:
        say(f"{one.name}: {one.capacity:,.0f} requests/s, accuracy {one.accuracy.value:.4f}, "
            f"drop {one.accuracy.drop:.4f}")  # fmt: skip
    return known


def _overloaded(one: Judged, run: Path) -> float:
    """Answers a second within the limit, of more requests than the variant can answer."""
    _plan(run, [one], 1.0, 1000).save(run / "one.json")
    carried = one.capacity or 100.0
    with _served(run / "one.json") as server, Generator() as generator:
        for _ in range(10):
            sent = arrivals([(_OVERLOAD_S, _OVERLOAD * carried)], SEED)
            good = _good(generator.run(_job(server.url, one.bundle.samples(), sent, _ROWS))) / _OVERLOAD_S
            if good < 0.8 * _OVERLOAD * carried:
                return good
            carried = good
    raise PlanError(f"{one.name} answered all that was sent", f"the last were {carried:,.0f} requests/s", "add cores")


def _config(bundle: Bundle, max_batch: int) -> EngineConfig:
    """All cores, a stream on each."""
    return EngineConfig("openvino", bundle.manifest.precision, streams=cores(), threads=1, max_batch=max_batch)


def _ascending(known: Sequence[Judged]) -> list[Judged]:
    """From the most accurate to the fastest, without those for which a faster one costs no more."""

    def costs(one: Judged) -> float:
        return max(0.0, one.accuracy.drop_interval[1])

    kept: list[Judged] = []
    for one in sorted(known, key=lambda each: each.capacity):
        if any(costs(other) <= costs(one) and other.capacity > one.capacity for other in known):
            continue
        if not kept or one.accuracy.value < kept[-1].accuracy.value:
            kept.append(one)
    return kept


def _plan(run: Path, ladder: Sequence[Judged], budget: float, window: int) -> Plan:
    variants = tuple(
        Variant(one.name, f"bundles/{one.name}", one.bundle.manifest.hash, "openvino", one.bundle.manifest.precision)
        for one in ladder
    )
    policy = Policy(streams=cores(), threads=1, max_batch=_MAX_BATCH, queue_bound=4096, deadline_ms=SLO_.limit_ms)
    plan = Plan(Goal(SLO_, AccuracyBudget(budget), Workload(rows=_ROWS)), variants, policy, model="day")
    if len(ladder) < 2:
        return plan
    points = [
        LadderPoint(one.name, _MAX_BATCH, _SURE * one.capacity, one.accuracy.value, one.accuracy.drop,
                    one.accuracy.drop_interval, one.accuracy.class_drops, f"test part, {one.accuracy.n:,} samples")
        for one in ladder
    ]  # fmt: skip
    return plan.with_ladder(points, window=window)


@contextlib.contextmanager
def _served(plan: Path, cells: int | None = None) -> Iterator[ChildServer]:
    server = ChildServer(plan, ServeSettings(http_port=0, exact=False, cells=cells, trusted=("rushhour.models:build",)))
    try:
        yield server
    finally:
        server.close()


def _metrics(url: str) -> list[tuple[str, float]]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    try:
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
    finally:
        connection.close()
    return [(name, float(value)) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")]


def _metric(url: str, name: str) -> float:
    return sum(value for key, value in _metrics(url) if key == name or key.startswith(f"{name}{{"))


def _job(url: str, sent: Mapping[str, NDArray[Any]], schedule: NDArray[np.float64], rows: int = 1) -> OpenJob:
    target = discover(url)
    return OpenJob(
        host=target.host,
        port=target.port,
        requests=tuple(payloads(target, sent, rows=rows)),
        limit_s=SLO_.limit_s,
        timeout_s=5.0,
        outputs=target.outputs,
        schedule=schedule.tobytes(),
    )


def _lived(run: Path, name: str, schedule: NDArray[np.float64], sent: Mapping[str, NDArray[Any]]) -> Day:
    """A day of one contestant, on a server of its own."""
    seen: list[tuple[float, dict[str, float]]] = []
    moves: list[tuple[float, float]] = []
    over = threading.Event()
    with _served(run / f"{name}.json") as server, Generator() as generator:

        def watch() -> None:
            began = time.monotonic()
            while not over.wait(_WATCHED_S):
                with contextlib.suppress(OSError, http.client.HTTPException):
                    found, at = _metrics(server.url), time.monotonic() - began
                    counts = {
                        key.partition('variant="')[2].partition('"')[0]: value
                        for key, value in found
                        if key.startswith("rushhour_variant_samples_total")
                    }
                    seen.append((at, counts))
                    moves.append((at, sum(value for key, value in found if key.startswith(_SWITCHES))))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            samples = generator.run(_job(server.url, sent, schedule, _ROWS))
        finally:
            over.set()
            watcher.join()
        spent, answers = (
            _metric(server.url, f"rushhour_{name}_total") for name in ("accuracy_spent", "variant_samples")
        )
        switches = int(_metric(server.url, _SWITCHES))
    shed, drop = samples.count(Status.SHED), spent / max(1.0, answers)
    return Day(len(samples), _good(samples), shed, _lost(samples), drop, switches, seen, moves)


def _lost(samples: Samples) -> int:
    """Requests that were neither answered nor shed."""
    return samples.count(Status.LOST) + samples.count(Status.ERROR)


def _good(samples: Samples) -> int:
    return int((samples.latencies() <= SLO_.limit_s).sum())


def _against_simulation(
    days: Sequence[Day], ladder: Sequence[Judged], budget: float, window: int, schedule: NDArray[np.float64]
) -> Check:
    """The same day in virtual time, on the engines' times, longer by what each carries less beside load, in the median
    of all that was seen of it: the host's speed comes in waves. There a sample stands for a request."""
    steps, most = [], _MAX_BATCH // _ROWS
    for one in ladder:
        engine = open_engine(one.bundle, _config(one.bundle, _MAX_BATCH))
        try:
            times = time_service(engine, one.bundle, 1.0)
        finally:
            engine.close()
        slope, base = np.polyfit(times.batch_sizes, times.seconds, 1)
        alone = cores() * most / (base + slope * _MAX_BATCH)
        factor = max(1.0, 0.95 * alone / statistics.median(one.carried))
        took = max(1e-6, float(base)) * factor, max(1e-9, float(_ROWS * slope)) * factor
        steps.append(Step(*took, _SURE * one.capacity, max(0.0, one.accuracy.drop_interval[1]), most))
    found = rush(schedule, steps, limit_s=SLO_.limit_s, budget=budget, window=window // _ROWS, streams=cores())
    ratios = [day.good / max(1, found.good) for day in days]
    return judged("5.goodput", "goodput of the day over that of its simulation", ">= 0.9", ratios)


class Traced(NamedTuple):
    """What came of one random load in virtual time.

    Attributes:
        spent: the highest mean drop of any `_TRACE_WINDOW` answers, over the budget.
        excess: switches over two for each change of the load and each minute.
    """

    spent: float
    excess: float
    switches: int


def traces_part(count: int) -> Part:
    """Part 5: random loads in virtual time, on the server's own queue, admission, controller and account."""
    found: list[Traced] = []
    with ProcessPoolExecutor(cores()) as pool:
        for each in pool.map(_traced, range(count)):
            found.append(each)
            if len(found) % 50 == 0:
                worst, moved = max(one.spent for one in found), sum(one.switches for one in found)
                say(f"{len(found)} traces: {worst:.3f} of the budget, {moved} switches")
    spent = f"highest mean drop of any {_TRACE_WINDOW:,} answers over the budget"
    switched = "switches over two for each change of load and each minute"
    checks = (
        verdict("5.account", spent, "<= 1", max(each.spent for each in found), None, count),
        verdict("5.oscillation", switched, "<= 1", max(each.excess for each in found), None, count),
    )
    return Part(checks, (), {"traces": count, "switches": sum(each.switches for each in found)})


def _traced(seed: int) -> Traced:
    rates, drops = random_rates(seed, _STEPS[0].rate), [step.drop for step in _STEPS]
    found = rush(arrivals(rates, seed), _STEPS, limit_s=0.1, budget=_TRACE_BUDGET, window=_TRACE_WINDOW)
    changes = sum(abs(one[1] - other[1]) > 0.2 * other[1] for one, other in pairwise(rates))
    minutes, switches = sum(seconds for seconds, _ in rates) / 60, len(found.switches)
    spent = found.highest_mean(drops, _TRACE_WINDOW) / _TRACE_BUDGET
    return Traced(spent, switches / (2 * changes + 2 * minutes + 2), switches)


def trouble_part(rounds: int, work: Path) -> Part:
    """Part 6: a worker is killed at a switch, the model is reloaded in a spike, a variant cannot be opened."""
    run = work / "adapt" / "trouble"
    shutil.rmtree(run, ignore_errors=True)
    plan, bundle = _tiny(run)
    schedule = arrivals([(3.0, 100.0), (0.5, 1500.0), (4.0, 1500.0), (0.5, 100.0), (3.0, 100.0)], SEED)
    elsewhere, reloads = [], []
    for _ in range(rounds):
        with _served(run / "plan.json", cells=2) as server, Generator() as generator:
            samples, connections = _troubled(generator, server, bundle, schedule, _kill_at_switch)
            elsewhere.append(float(max(0, _lost(samples) - connections)))
        with _served(run / "plan.json") as server, Generator() as generator:
            samples, _ = _troubled(generator, server, bundle, schedule, _reload_in_spike)
            reloads.append(float(_lost(samples)))
    broken = run / "bundles" / plan.variants[1].name / "model.onnx"
    broken.write_bytes(broken.read_bytes()[:-16])
    with _served(run / "plan.json") as server, Generator() as generator:
        samples = generator.run(_job(server.url, bundle.samples(), schedule))
        missing = _metric(server.url, "rushhour_variants_missing")
        left = float(_lost(samples))
    killed = "requests lost beyond one for each connection, when a worker is killed at a switch"
    checks = (
        _worst("6.kill", killed, "<= 0", elsewhere),
        _worst("6.reload", "requests lost when the model is reloaded in a spike", "<= 0", reloads),
        _worst("6.variant", "variants that the server says it is without, of one broken", ">= 1", [missing]),
        _worst("6.rest", "requests lost on the ladder that is left", "<= 0", [left]),
    )
    return Part(checks, (), {"rounds": rounds})


def _tiny(run: Path) -> tuple[Plan, Bundle]:
    """A plan of three tiny variants, of which the first carries little by its plan."""
    variants, points = [], []
    for seed, (name, rate) in enumerate((("whole", 400.0), ("half", 1000.0), ("small", 1e5))):
        bundle = tiny_bundle(run / "bundles" / name, seed=seed)
        variants.append(Variant(name, f"bundles/{name}", bundle.manifest.hash, "openvino", "f32"))
        drop = 0.01 * seed
        points.append(LadderPoint(name, 8, rate, 0.9 - drop, drop, (drop, drop)))
    policy = Policy(max_batch=8, queue_bound=4096)
    plan = Plan(Goal(SLO_, AccuracyBudget(0.5)), tuple(variants), policy, model="tiny").with_ladder(points)
    plan.save(run / "plan.json")
    return plan, Bundle.open(run / "bundles" / "whole")


def _troubled(
    generator: Generator, server: ChildServer, bundle: Bundle, schedule: NDArray[np.float64], trouble: Any
) -> tuple[Samples, int]:
    """A run of load with trouble beside it, and the connections that were open."""
    thread = threading.Thread(target=trouble, args=(server,))
    job = _job(server.url, bundle.samples(), schedule)
    job = msgspec.structs.replace(job, outputs=None)  # two variants answer differently
    thread.start()
    samples = generator.run(job)
    thread.join()
    return samples, samples.connections


def _kill_at_switch(server: ChildServer) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if _metric(server.url, _SWITCHES) > 0:
                break
        time.sleep(0.02)
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)


def _reload_in_spike(server: ChildServer) -> None:
    time.sleep(4.5)
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)
    try:
        connection.request("POST", "/v2/repository/models/tiny/load", b"{}", {"content-type": "application/json"})
        connection.getresponse().read()
    finally:
        connection.close()


def cost_part(before: str, rounds: int) -> Part:
    """Part 7: CPU per request with one variant, against a commit before there were ladders."""
    part = compared(before, CostScale(rounds=rounds, seconds=_COST_S))
    checks = tuple(
        verdict(check.id.replace("25.3", "7"), check.what, "<= 1.03", check.value, check.interval, check.n)
        for check in part.checks
        if check.id.startswith("25.3") and check.value is not None
    )
    return msgspec.structs.replace(part, checks=checks)
