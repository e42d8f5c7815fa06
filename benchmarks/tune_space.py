"""Part 3 of bench-tune: a small space of plans, each measured once. Searches are replayed on it (tune_replays.py).

Networks x engines x precisions x layouts of the cores x batch bounds, about 15 s a plan: a few closed loops and a few
windows of open-loop load around the capacity. The order is random, so that a slow hour of the host does not look like a
slow engine, and one plan, the canary, is measured again and again in between: what it varies by is the noise of the
machine. The host's speed is read beside each engine that is timed and each plan; predictions are scored at equal speed.
The fastest plans are measured a second time. All windows are in a journal: a run that was interrupted goes on.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from bench.networks import quantised, trained
from bench.parts import Part, say
from bench.record import Table, commit, verdict

from rushhour.bundle import Bundle
from rushhour.capacity import predicted_capacity
from rushhour.data import Dataset
from rushhour.errors import RushhourError
from rushhour.goal import SLO, AccuracyBudget, Goal
from rushhour.load import Generator, Probe, estimate, rounded
from rushhour.load.estimate import is_informative
from rushhour.measurement import Accuracy, Measurement, ServiceTimes
from rushhour.progress import Silent
from rushhour.records.journal import JOURNAL, Journal
from rushhour.system.machine import cores, describe
from rushhour.testing.measured import MeasuredPlan, MeasuredSpace, OpenWindow, artefact_of, compiled_of, name_of
from rushhour.tune import TuneSettings
from rushhour.tune.accuracy import AccuracyJudge
from rushhour.tune.bench import Bench
from rushhour.tune.engine_times import EngineTimes
from rushhour.tune.space import Candidate, candidates, other_layouts, plain

SEED = 0
GOAL = Goal(SLO.parse("p99<50ms"), AccuracyBudget.parse("1%"))
_TRUSTED = ("rushhour.models:build",)
_FEW, _MANY = (1, 8, 64), (1, 4, 16, 64)
"""Batch bounds: more where there are few artefacts, for about as many plans. One sample at a time is among them: a
search compares its plan with it, and predictions are interpolated from there."""
_ENOUGH = 10
_USERS, _MOST_USERS = 0.4, 512
"""Users of a closed loop, in multiples of throughput times limit, as in `rushhour.tune.load_tests`."""
_CLOSED_S, _CLOSED = 0.4, 5
_OPEN_S = 1.2
_START = 0.82
"""Of the throughput of a closed loop: the first rate of an open loop."""
_STEP, _APART = 1.1, 1.04
_FASTEST = 0.1
"""Share of the plans that are measured a second time."""
_AGAIN = 10_000
"""Added to the seeds of windows of a second measurement."""


def bundles_of(networks: Sequence[str], data: Dataset, epochs: int, folder: Path) -> dict[str, Bundle]:
    """Role -> bundle: the first network is the reference; all of them in f32 and in int8."""
    found: dict[str, Bundle] = {}
    for network in networks:
        bundle = trained(network, data, epochs, folder)
        role = "reference" if not found else network
        found |= {role: bundle, "int8" if role == "reference" else f"{role}-int8": quantised(bundle, data, folder)}
    return found


class Exhaustive:
    """Measures every plan of a space.

    Args:
        bundles: role -> bundle.
        data: for the accuracies.
        run: a folder for the journal and for what is served.
        generator: sends the load.
        windows: of open-loop load for each plan.
    """

    def __init__(
        self, bundles: Mapping[str, Bundle], data: Dataset, run: Path, generator: Generator, windows: int
    ) -> None:
        for role, bundle in bundles.items():
            if not (run / "bundles" / role / "bundle.json").is_file():
                bundle.copy_to(run / "bundles" / role)
        self._bundles = dict(bundles)
        journal = Journal(run / JOURNAL)
        self._bench = Bench(journal, generator, GOAL, run, _TRUSTED)
        self._times = EngineTimes(journal, self._bundles, GOAL.slo, TuneSettings().time_s, _TRUSTED)
        self._judge = AccuracyJudge(
            journal, self._bundles, data, GOAL.budget, plain(bundles["reference"], cores())[0], Silent(), _TRUSTED
        )
        self._windows = windows

    def close(self) -> None:
        """Close the engine that the host's speed is read from."""
        self._times.close()

    def alone(self) -> tuple[dict[str, ServiceTimes], dict[str, float], dict[str, tuple[Accuracy, Accuracy]]]:
        """Service times, the host's speeds meanwhile, and accuracies, by their names in a `MeasuredSpace`.

        What an engine cannot run is not in the space.
        """
        service: dict[str, ServiceTimes] = {}
        speeds: dict[str, float] = {}
        accuracy: dict[str, tuple[Accuracy, Accuracy]] = {}
        self._compiled: list[Candidate] = []
        for candidate in _layouts(candidates(self._bundles, cores())):
            if candidate.precision == "bf16" and not describe().has_bf16:
                continue
            try:
                service[compiled_of(candidate)] = self._times.of(candidate)
                speeds[compiled_of(candidate)] = round(self._times.speed_of(candidate), 4)
                if artefact_of(candidate) not in accuracy:
                    validation = self._judge.accuracy(candidate, "validation")
                    accuracy[artefact_of(candidate)] = validation, self._judge.accuracy(candidate, "test")
            except RushhourError as error:
                say(f"3  {compiled_of(candidate)} is left out: {error}")
                service.pop(compiled_of(candidate), None)
                continue
            self._compiled.append(candidate)
        return service, speeds, accuracy

    def plans(self, artefacts: int) -> list[Candidate]:
        """The plans of the space, once it is known what the engines run.

        Args:
            artefacts: of the space: the fewer they are, the more batch bounds.
        """
        bounds = _FEW if artefacts >= _ENOUGH else _MANY
        timed = [(each, self._times.of(each).batch_sizes) for each in self._compiled]
        return [each.with_batch(bound) for each, sizes in timed for bound in bounds if bound in sizes]

    def loaded(self, candidate: Candidate, phase: str, *, near: float | None = None) -> Loaded:
        """A few closed loops, then windows of open-loop load, and the host's speed before and after.

        Args:
            candidate: with its batch bound.
            phase: in the journal: what was measured in another phase is measured again.
            near: its capacity, where it was measured before.
        """
        limit_s = GOAL.slo.limit_s
        seconds = max(_CLOSED_S, 8 * limit_s)
        expected = near or predicted_capacity(
            self._times.profile(candidate),
            streams=candidate.streams,
            max_batch=candidate.policy.max_batch,
            slo=GOAL.slo,
        )
        closed: list[tuple[int, float]] = []
        before = self._times.speed_beside(candidate, phase)
        with self._bench.serve(candidate, self._bundles[candidate.bundle], phase) as served:
            for turn in range(_CLOSED):
                if turn != 1 and turn < 3:  # the server is cold in the first one, which is not kept
                    users = max(1, min(_MOST_USERS, round(_USERS * expected * limit_s)))
                rate = served.closed_window(users, seconds, turn).throughput_rps
                if turn:
                    closed.append((users, rate))
                    expected = max(1.0, rate)
            start = near or _START * statistics.median(rate for _, rate in closed)
            first_seed = SEED + (_AGAIN if near else 0)
            windows = around(served.search_windows(_OPEN_S), start, self._windows, first_seed)
        after = self._times.speed_beside(candidate, f"{phase}, after")
        return Loaded(tuple(closed), tuple(windows), math.sqrt(before * after))


class Loaded(NamedTuple):
    """What was measured of a plan under load.

    Attributes:
        closed: users of a closed loop, and answers in time per second.
        windows: of open-loop load.
        speed: of the host, before and after.
    """

    closed: tuple[tuple[int, float], ...]
    windows: tuple[Measurement, ...]
    speed: float


def _layouts(basic: Sequence[Candidate]) -> list[Candidate]:
    """These, and each artefact in the first of the layouts that leave cores to the rest of the server."""
    artefacts = {artefact_of(each): each for each in basic}
    return [*basic, *(other for each in artefacts.values() for other in other_layouts(each, cores())[:1])]


def around(probe: Probe, start_rps: float, count: int, seed: int) -> list[Measurement]:
    """Windows around the highest rate that keeps the SLO: up or down to a bracket, then in the middle of it."""
    found: list[Measurement] = []
    rate = max(1.0, start_rps)
    for number in range(count):
        found.append(probe(rounded(rate), seed + number))
        held = [each.rate_rps for each in found if is_informative(each) and _is_good(each)]
        missed = [each.rate_rps for each in found if not (is_informative(each) and _is_good(each))]
        if not missed:
            rate = max(held) * _STEP
        elif not held:
            rate = min(missed) / _STEP**2
        elif max(held) >= min(missed):  # one of them was disturbed
            rate = min(missed) / _APART
        elif min(missed) / max(held) > _APART:
            rate = (max(held) * min(missed)) ** 0.5
        else:
            rate = max(held) / _APART if number % 2 else min(missed) * _APART
    return found


def _is_good(window: Measurement) -> bool:
    return window.keeps_slo and not window.outcome.refutes


def exhaustive(
    bundles: Mapping[str, Bundle], data: Dataset, work: Path, out: Path, *, plans: int, windows: int, every: int
) -> Part:
    """Part 3: measure the space, and write it to `out`.

    Args:
        bundles: role -> bundle.
        data: for the accuracies.
        work: a folder that holds the journal until all is measured.
        out: the file of the space.
        plans: measured, at most; 0 for all.
        windows: of open-loop load for each plan.
        every: so many plans the canary is measured again.
    """
    began = time.monotonic()
    run = work / "space"
    with Generator() as generator, contextlib.closing(Exhaustive(bundles, data, run, generator, windows)) as bench:
        service, speeds, accuracy = bench.alone()
        space = bench.plans(len(accuracy))
        order = np.random.default_rng(SEED).permutation(len(space))[: plans or None]
        canary = _canary(space)
        measured: dict[str, MeasuredPlan] = {}
        canaries: list[dict[str, float]] = []
        for position, at in enumerate(order.tolist()):
            if position % every == 0:
                canaries.append(_measured_canary(bench, canary, len(canaries)))
            try:
                plan = _measured(bench, space[at], position)
            except RushhourError as error:
                say(f"3  {name_of(space[at])} is left out: {error}")
                continue
            measured[plan.name] = plan
            say(f"3  {position + 1} of {len(order)}: {plan.name}: {plan.capacity_rps:,.0f}/s, {plan.seconds:.0f} s")
        by_name = {name_of(each): each for each in space}
        for name in _fastest(measured, _FASTEST):
            measured[name] = _again(bench, by_name[name], measured[name])
            say(f"3  again: {name}: {measured[name].capacity_rps:,.0f}/s")
        canaries.append(_measured_canary(bench, canary, len(canaries)))
    minutes = (time.monotonic() - began) / 60
    here = describe()
    about = {
        "machine": str(here),
        "versions": here.versions,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "seed": SEED,
        "minutes": round(minutes, 1),
        "canary": {"plan": name_of(canary), "measured": canaries},
    }
    precisions = {role: bundle.manifest.precision for role, bundle in bundles.items()}
    found = MeasuredSpace(GOAL, cores(), precisions, service, accuracy, tuple(measured.values()), speeds, about)
    found.save(out)
    shutil.rmtree(run)
    return _part(found, minutes)


def _canary(space: Sequence[Candidate]) -> Candidate:
    """The plan that shows the noise: int8, a stream for each core, batches of 16."""
    chosen = [each for each in space if each.precision == "int8" and each.layout == (1, cores(), 1)]
    return min(chosen or space, key=lambda each: abs(each.policy.max_batch - 16))


def _measured_canary(bench: Exhaustive, canary: Candidate, number: int) -> dict[str, float]:
    began = time.monotonic()
    closed, windows, speed = bench.loaded(canary, f"canary {number}")
    found = estimate(windows, GOAL.slo)
    return {
        "at_s": round(began, 1),
        "throughput_rps": round(statistics.median(rate for _, rate in closed), 1),
        "capacity_rps": round(found.rate_rps, 1) if found else 0.0,
        "speed of its batches": round(statistics.median(each.speed or 1.0 for each in windows), 3),
        "speed of the host": round(speed, 3),
    }


def _measured(bench: Exhaustive, candidate: Candidate, order: int) -> MeasuredPlan:
    began = time.monotonic()
    loaded = bench.loaded(candidate, "space")
    plan = MeasuredPlan(
        bundle=candidate.bundle,
        engine=candidate.engine,
        precision=candidate.precision,
        layout=candidate.layout,
        max_batch=candidate.policy.max_batch,
        closed=(),
        windows=(),
        capacity_rps=0.0,
        interval_rps=(0.0, 0.0),
        order=order,
    )
    return _with(plan, loaded, loaded.speed, time.monotonic() - began)


def _again(bench: Exhaustive, candidate: Candidate, plan: MeasuredPlan) -> MeasuredPlan:
    began = time.monotonic()
    loaded = bench.loaded(candidate, "again", near=max(1.0, plan.capacity_rps))
    return _with(plan, loaded, math.sqrt(plan.speed * loaded.speed), time.monotonic() - began)


def _with(plan: MeasuredPlan, loaded: Loaded, speed: float, seconds: float) -> MeasuredPlan:
    """A plan with further measurements, its capacity by all of them, and the host's speed beside all of them."""
    kept = (*plan.windows, *map(OpenWindow.of, loaded.windows))
    found = estimate([window.as_measurement(GOAL.slo) for window in kept], GOAL.slo)
    return msgspec.structs.replace(
        plan,
        closed=(*plan.closed, *((users, round(rate, 1)) for users, rate in loaded.closed)),
        windows=kept,
        capacity_rps=round(found.rate_rps, 1) if found else 0.0,
        interval_rps=(round(found.interval_rps[0], 1), round(found.interval_rps[1], 1)) if found else (0.0, 0.0),
        seconds=round(plan.seconds + seconds, 1),
        speed=round(speed, 4),
    )


def _fastest(measured: Mapping[str, MeasuredPlan], share: float) -> list[str]:
    """The names of the fastest, in random order."""
    ordered = sorted(measured, key=lambda name: -measured[name].capacity_rps)
    chosen = ordered[: max(1, round(share * len(ordered)))]
    return [chosen[at] for at in np.random.default_rng(SEED + 1).permutation(len(chosen)).tolist()]


def _part(space: MeasuredSpace, minutes: float) -> Part:
    n = len(space.plans)
    seconds = [plan.seconds for plan in space.plans]
    checks = (
        verdict("3.plans", "plans of the small space, each measured", ">= 120", float(n), None, n, unit=""),
        verdict("3.minutes", "minutes to measure the small space", "<= 35", minutes, None, 1, unit="min"),
    )
    canaries = space.about["canary"]["measured"]
    widths = [
        (plan.interval_rps[1] - plan.interval_rps[0]) / 2 / plan.capacity_rps
        for plan in space.plans
        if plan.capacity_rps
    ]

    def spread(of: Callable[[dict[str, float]], float]) -> float:
        values = [of(each) for each in canaries if of(each)]
        return statistics.stdev(values) / statistics.mean(values) if len(values) > 1 else 0.0

    row = (
        space.about["canary"]["plan"],
        float(len(canaries)),
        spread(lambda each: each["throughput_rps"]),
        spread(lambda each: each["capacity_rps"]),
        statistics.median(widths) if widths else None,
        statistics.median(seconds),
    )
    columns = (
        *("canary", "measured", "its throughput varies by", "its capacity varies by"),
        *("half an interval, median of all plans", "s a plan, median"),
    )
    best = sorted(space.plans, key=lambda plan: -plan.capacity_rps)[:10]
    rows = tuple((plan.name, plan.capacity_rps, *plan.interval_rps) for plan in best)
    tables = (
        Table("The noise of the machine while the small space was measured", columns, (row,)),
        Table("The fastest plans of the small space", ("plan", "capacity, /s", "low", "high"), rows),
    )
    return Part(checks, tables, space.about)
