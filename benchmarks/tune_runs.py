"""Parts 1, 2, 5 and 8 of bench-tune: whole tuning runs, and what their plans are worth.

Every run is made anew where the code has changed since; one that was interrupted goes on, and its time adds up. The
capacities that are compared are measured in turn at the end, each plan on a server of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from bench.contest import Start, capacities_in_turn, eager, served_plan
from bench.environments import CannotInstall
from bench.parts import Part, say
from bench.record import Check, Table, commit, judged, mean_ratio, verdict
from tune_replays import counted_tests

from rushhour.api.values import read_seconds
from rushhour.bundle import Bundle
from rushhour.cli.terminal import TerminalProgress
from rushhour.data import Dataset
from rushhour.errors import RushhourError
from rushhour.goal import SLO, AccuracyBudget, Goal
from rushhour.load import Generator, measure
from rushhour.measurement import Measurement, Outcome
from rushhour.plan import PLAN, Evidence, Plan
from rushhour.train import TrainSettings
from rushhour.tune import TuneSettings, tune_run
from rushhour.tune.search import tune
from rushhour.tune.settings import Recipes

SEED = 0
_TRUSTED = ("rushhour.models:build",)
_AT = 0.95
"""Of a stated capacity: the rate at which a shipped plan is served again."""
_UNTOUCHED = 0.4
"""Of the budget of a run, for the search of the best plan of the untouched model: it has no training."""
_AS_GOOD = 0.95
"""Of the capacity of int8 alone: a plan of no less is as good; the noise of a capacity is as large."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A network that is tuned, and what its plan has to be worth.

    Attributes:
        part: of the record.
        what: in words.
        slo: the latency limit.
        budget: of the run, as on the command line.
        untouched: times the capacity of the best plan of the untouched model, at least.
        today: times the capacity of torch eager behind FastAPI, at least; None where that is not asked.
        minutes: of the run, at most; None where that is not asked.
    """

    part: str
    what: str
    slo: str
    budget: str
    untouched: float
    today: float | None
    minutes: float | None = None


@contextlib.contextmanager
def _run_folder(work: Path, name: str) -> Iterator[tuple[Path, Callable[[], float]]]:
    """A run's folder, and what gives the seconds spent on it until now.

    It is emptied where other code worked in it, and where its part is in the record.
    """
    run, stamp = work / name, work / f"{name}.json"
    before = json.loads(stamp.read_text()) if stamp.is_file() else {}
    if before.get("commit") != commit() or before["recorded"]:
        shutil.rmtree(run, ignore_errors=True)
        before = {"seconds": 0.0}
    began = time.monotonic()

    def seconds() -> float:
        return float(before["seconds"]) + time.monotonic() - began

    run.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield run, seconds
    finally:
        stamp.write_text(json.dumps({"commit": commit(), "seconds": seconds(), "recorded": False}))


def _recorded(work: Path, *names: str) -> None:
    """The parts of these runs are complete."""
    for name in names:
        stamp = work / f"{name}.json"
        stamp.write_text(json.dumps({**json.loads(stamp.read_text()), "recorded": True}))


def tuned(reference: Bundle, data: str, case: Case, work: Path, name: str) -> tuple[Path, float, int]:
    """`rushhour tune` from a trained bundle: its folder, the minutes that it took, and its exit code.

    Without what earlier runs measured, so that two runs are compared that know as much.
    """
    with _run_folder(work, name) as (run, seconds):
        command = [sys.executable, "-m", "rushhour", "tune", str(reference.path), "--data", data, "--out", str(run)]
        command += ["--slo", case.slo, "--max-accuracy-drop", "1%", "--budget", case.budget, "--cold"]
        ended = subprocess.run(command)
        if not (run / PLAN).is_file():
            raise SystemExit(f"rushhour tune ended with exit code {ended.returncode} and without a plan")
        return run, seconds() / 60, ended.returncode


def untouched(reference: Bundle, data: Dataset, case: Case, work: Path, name: str) -> Path:
    """The best plan of the untouched model, in f32 or bf16, on any engine and in any layout: a search of its own."""
    with _run_folder(work, f"{name}-untouched") as (run, _):
        bundles = {"reference": reference.copy_to(run / "bundles" / "reference")}
        goal = Goal(SLO.parse(case.slo), AccuracyBudget.parse("1%"))
        settings = TuneSettings(seed=SEED, recipes="none", budget_s=_UNTOUCHED * read_seconds(case.budget))
        plan = tune(
            *(bundles, data, goal),
            run=run,
            settings=settings,
            progress=TerminalProgress(),
            trusted=_TRUSTED,
        )
        plan.save(run / PLAN)
        return run


def run_part(case: Case, reference: Bundle, data: Dataset, data_name: str, work: Path, rounds: int) -> Part:
    """Parts 1 and 2: tune, find the best plan of the untouched model, and measure both beside what a user has today.

    Args:
        case: the goal and the targets.
        reference: trained.
        data: that it was trained on.
        data_name: the same on the command line.
        work: where runs are kept.
        rounds: capacities of each contestant.
    """
    name = f"run-{case.part}"
    run, minutes, code = tuned(reference, data_name, case, work, name)
    whole = untouched(reference, data, case, work, name)
    plan, before = Plan.load(run / PLAN), Plan.load(whole / PLAN)
    evidence, evidence_before = _evidence(plan), _evidence(before)
    contestants: dict[str, Start] = {"tuned": lambda: served_plan(run), "untouched": lambda: served_plan(whole)}
    why = ""
    if case.today is not None:
        try:
            with eager(reference, work.parent):
                contestants["today"] = lambda: eager(reference, work.parent)
        except CannotInstall as error:
            why = f"FastAPI cannot be installed: {error}"
    found = capacities_in_turn(contestants, SLO.parse(case.slo), rounds, seed=SEED)
    checks = [
        judged(f"{case.part}.untouched", f"{case.what}: capacity over that of the best plan of the untouched model",
               f">= {case.untouched:g}", _ratios(found, "untouched")),
    ]  # fmt: skip
    if case.today is not None:
        what = f"{case.what}: capacity over that of torch eager behind FastAPI, a blocking def"
        checks.append(judged(f"{case.part}.today", what, f">= {case.today:g}", _ratios(found, "today"), why=why))
    checks += _run_checks(case, run, minutes, code, evidence)
    named = {"tuned": _served(plan), "untouched": _served(before), "today": "torch eager behind FastAPI"}
    stated = {"tuned": evidence.capacity_rps, "untouched": evidence_before.capacity_rps}
    rows = tuple(
        (named[which], stated.get(which), statistics.median(values), min(values), max(values))
        for which, values in found.items()
    )
    columns = ("plan", "stated by its run, /s", "measured in turn, median, /s", "lowest", "highest")
    tables = (Table(f"{case.what}: capacities", columns, rows), _steps(case, evidence))
    measured = {
        "capacities": found,
        "minutes": minutes,
        "evidence": msgspec.to_builtins(msgspec.structs.replace(evidence, trials=())),
        "fates": _fates(evidence),
    }
    _recorded(work, name, f"{name}-untouched")
    return Part(tuple(checks), tables, measured)


def _ratios(found: Mapping[str, list[float]], other: str) -> list[float]:
    return [ours / theirs for ours, theirs in zip(found["tuned"], found.get(other, []), strict=False)]


def _run_checks(case: Case, run: Path, minutes: float, code: int, evidence: Evidence) -> list[Check]:
    tests = counted_tests(Plan.load(run / PLAN), run)
    certificate = evidence.certificate.statement if evidence.certificate is not None else ""
    drop = 100 * evidence.accuracy_drop_interval[1]
    checks = [
        verdict(f"{case.part}.exit", f"{case.what}: exit code", "<= 0", float(code), None, 1, unit=""),
        verdict(f"{case.part}.tests", f"{case.what}: load tests", "<= 40", float(tests), None, 1, unit="",
                why=certificate),
        verdict(f"{case.part}.drop", f"{case.what}: accuracy drop on the test part, upper end of its interval",
                "<= 1", drop, None, 1, unit="points"),
    ]  # fmt: skip
    if case.minutes is not None:
        what = f"{case.what}: minutes of the run"
        checks.append(verdict(f"{case.part}.minutes", what, f"<= {case.minutes:g}", minutes, None, 1, unit="min"))
    return checks


def _evidence(plan: Plan) -> Evidence:
    assert plan.evidence is not None
    return plan.evidence


def _served(plan: Plan) -> str:
    evidence = _evidence(plan)
    return next((trial.name for trial in evidence.trials if trial.fate == "won"), plan.variants[0].name)


def _steps(case: Case, evidence: Evidence) -> Table:
    rows = tuple((step.step, step.name, step.capacity_rps, step.accuracy) for step in evidence.ladder)
    return Table(f"{case.what}: what each step bought", ("step", "plan", "capacity, /s", "accuracy"), rows)


def _fates(evidence: Evidence) -> dict[str, int]:
    found: dict[str, int] = {}
    for trial in evidence.trials:
        found[trial.fate] = found.get(trial.fate, 0) + 1
    return found


# Part 5.


def repeats_part(run: Path, repeats: int, seconds: float) -> Part:
    """Part 5: a shipped plan, served again at 95% of its stated capacity, on seeds that no window of its run had.

    A window passes where no more requests were late than the SLO allows and the server did not fall behind. Windows in
    which the machine was disturbed are repeated, up to three times.

    Args:
        run: of the plan.
        repeats: windows.
        seconds: of each.
    """
    plan = Plan.load(run / PLAN)
    stated, slo = _evidence(plan).capacity_rps, plan.goal.slo
    what = f"windows of {seconds:g} s at 95% of the stated capacity in which the shipped plan keeps {slo}, share"
    if not stated:
        return Part(
            (Check("5.repeats", what, "", ">= 0.95", None, None, 0, False, "the run found no capacity"),), (), []
        )
    windows: list[Measurement] = []
    with Generator() as generator, served_plan(run) as aim:
        for repeat in range(repeats):
            window = measure(
                generator,
                *(aim.target, aim.requests, slo),
                rate_rps=_AT * stated,
                seed=700_000 + repeat,
                window_s=seconds,
                sequential=False,
                retries=3,
            )
            windows.append(window)
            say(f"5  {repeat + 1} of {repeats}: {window.late} of {window.n} late, {window.outcome}")
    kept = sum(window.keeps_slo and not window.outcome.refutes for window in windows)
    proven = sum(window.outcome is Outcome.PASS for window in windows)
    refuted = sum(window.outcome.refutes for window in windows)
    why = f"{kept} of {repeats}: {proven} proven each by itself, {refuted} refuted"
    check = verdict("5.repeats", what, ">= 0.95", kept / repeats, None, repeats, unit="", why=why)
    rows = tuple(
        (float(number), window.rate_rps, float(window.n), float(window.late), window.p99_ms, window.outcome.words,
         window.speed)
        for number, window in enumerate(windows, 1)
    )  # fmt: skip
    columns = ("window", "rate, /s", "requests", "late", "p99, ms", "verdict", "speed of the host")
    table = Table(f"The shipped plan, {_served(plan)}, served again", columns, rows, f"{why}.")
    return Part((check,), (table,), [_short(window) for window in windows])


def _short(window: Measurement) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(msgspec.structs.replace(window, latencies="", speeds=()))
    return found


# Part 8.


@dataclasses.dataclass(frozen=True)
class Other:
    """A network of another kind.

    Attributes:
        name: of the checks.
        what: in words.
        made: gives its bundle and its data.
    """

    name: str
    what: str
    made: Callable[[], tuple[Bundle, Dataset]]


def others_part(others: list[Other], work: Path, budget_s: float, rounds: int) -> Part:
    """Part 8: each network ends in a plan that is at least as good as int8 alone, and says what was left out."""
    checks: list[Check] = []
    rows: list[tuple[str | float | None, ...]] = []
    measured: dict[str, Any] = {}
    for other in others:
        try:
            bundle, data = other.made()
            plans = {recipes: _tuned_here(other, bundle, data, work, recipes, budget_s) for recipes in ("auto", "none")}
        except RushhourError as error:
            checks.append(
                Check(f"8.{other.name}", f"{other.what}: a plan", "", ">= 1", None, None, 0, False, str(error))
            )
            continue
        auto, alone = (Plan.load(run / PLAN) for run in plans.values())
        ratios = [1.0]
        if (auto.variants[0].bundle_hash, auto.policy) != (alone.variants[0].bundle_hash, alone.policy):
            starts: dict[str, Start] = {
                "tuned": lambda run=plans["auto"]: served_plan(run),  # type: ignore[misc]
                "int8": lambda run=plans["none"]: served_plan(run),  # type: ignore[misc]
            }
            found = capacities_in_turn(starts, auto.goal.slo, rounds, seed=SEED)
            ratios = [ours / theirs for ours, theirs in zip(found["tuned"], found["int8"], strict=True)]
        left_out = [trial for trial in _evidence(auto).trials if trial.fate in ("failed", "skipped", "over budget")]
        silent = sum(not trial.why for trial in _evidence(auto).trials)
        said = next((trial.why for trial in left_out if trial.fate == "skipped"), "")
        what = f"{other.what}: capacity over that of the best plan of the same network, in int8 or not"
        value = mean_ratio(ratios)[0]
        checks.append(verdict(f"8.{other.name}.int8", what, f">= {_AS_GOOD}", value, None, len(ratios)))
        smaller = any(trial.bundle.startswith(("prune", "lowrank")) for trial in _evidence(auto).trials)
        missing = float(silent + (not smaller and not said))
        what = f"{other.what}: candidates that end without a reason; smaller networks that are not tried without one"
        checks.append(verdict(f"8.{other.name}.said", what, "<= 0", missing, None, len(left_out), unit=""))
        evidence, before = _evidence(auto), _evidence(alone)
        rows.append(
            (other.what, _served(auto), evidence.capacity_rps, _served(alone), before.capacity_rps, value, said)
        )
        _recorded(work, *(f"run-8-{other.name}-{recipes}" for recipes in plans))
        measured[other.name] = {"ratios": ratios, "fates": _fates(evidence), "left out": [t.why for t in left_out]}
    columns = ("network", "plan", "capacity, /s", "plan of the network as it is", "capacity, /s ", "ratio", "left out")
    return Part(tuple(checks), (Table("Networks of other kinds", columns, tuple(rows)),), measured)


def _tuned_here(other: Other, bundle: Bundle, data: Dataset, work: Path, recipes: Recipes, budget_s: float) -> Path:
    with _run_folder(work, f"run-8-{other.name}-{recipes}") as (run, _):
        share = 1.0 if recipes == "auto" else 0.5
        plan = tune_run(
            bundle,
            data,
            Goal(SLO.parse("p99<50ms"), AccuracyBudget.parse("1%")),
            run=run,
            training=TrainSettings(),
            settings=TuneSettings(budget_s=share * budget_s, recipes=recipes),
            progress=TerminalProgress(),
            trusted=_TRUSTED,
            cold=True,
        )
        say(f"8  {other.name}, {recipes}: {_served(plan)}: {_evidence(plan).capacity_rps:,.0f}/s")
        return run
