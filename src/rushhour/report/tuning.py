"""The report of a tuning run: `report.html`, one file that opens anywhere, offline, in light and dark."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from rushhour.plan import Fate, Plan, Trial
from rushhour.records.curves import CURVES, read_curves
from rushhour.report import wording
from rushhour.report.comparison import served_by, side_by_side
from rushhour.report.examples import examples_of
from rushhour.report.findings import Capacity, Findings, baseline_of, winner_of
from rushhour.report.page import MARKS, is_page, render
from rushhour.system.storage import write_own

_MOST_ROWS: Final = 1000  # of one table; keeps the file under 2 MB, further rows are counted and are in the run's files
_MOST_OPEN: Final = 30  # rows of candidates shown at once; with more, those dominated by prediction are folded
_MOST_DECISIONS: Final = 12  # shown at once; more are folded
_MOST_SEEDS: Final = 24
_MOST_NAMES: Final = 6  # of the candidates that one line covers; further ones are counted
_FATES: Final[dict[Fate, str]] = {
    "won": "won",
    "baseline": "baseline",
    "tied": "tied with the winner under load",
    "beaten": "beaten under load",
    "not preferred": "within the goal, but not preferred",
    "over budget": "over the accuracy budget",
    "dominated": "dominated by prediction, not loaded",
    "skipped": "skipped, not measured",
    "failed": "failed, the reason is given",
}
"""In the order of the table, with the words for several candidates."""


class TrialLine(NamedTuple):
    """One line of the candidates: a candidate, or all that failed or were skipped for the same reason.

    Attributes:
        trial: the first of them.
        names: the names for people of the first few that it covers.
        covers: how many it covers.
        capacity: None where it was not measured.
    """

    trial: Trial
    names: tuple[str, ...]
    covers: int
    capacity: Capacity | None


class StepLine(NamedTuple):
    """One step from the baseline to the plan in words; `gain` over the step before, `total` over the first."""

    step: str
    candidate: str
    name: str
    capacity: Capacity
    gain: str
    total: str
    p99: str
    accuracy: str


def write_report(run: Path, file: Path | None = None) -> Path:
    """Render `report.html` of the folder `run` from its plan (of an interrupted run the best so far) and its journal.

    The same run gives the same bytes. The file loads nothing from anywhere.

    Args:
        run: the folder.
        file: where it is written; in that folder by default.

    Returns:
        The path of the file.

    Raises:
        PlanError: if the plan or its measurements are missing, damaged or without evidence.
        StorageError: if the files cannot be read or written.
    """
    found = Findings.read(run)
    path = file or run / "report.html"
    write_own(path, _render(found, run), is_page)
    return path


def _render(found: Findings, run: Path) -> bytes:
    from rushhour.report import charts  # matplotlib takes a second to import

    plan, evidence, certificate = found.plan, found.evidence, found.evidence.certificate
    epochs = read_curves(run / "training") if (run / "training" / CURVES).is_file() else ()
    before, after = found.baseline_capacity, found.plan_capacity
    role = "winner" if plan.feasible else "nearest miss"
    series = [
        charts.Series(name, is_plan, found.of(trial.candidate), capacity)
        for name, is_plan, trial, capacity in (
            ("baseline", False, baseline_of(plan), before),
            (role, True, winner_of(plan), after),
        )
        if trial is not None
    ]
    lines = _lines(found)[:_MOST_ROWS]
    folded = [line for line in lines if line.trial.fate == "dominated"] if len(lines) > _MOST_OPEN else []
    return render(
        "tuning.html",
        found=found,
        plan=plan,
        evidence=evidence,
        role=role,
        headline=_headline(found),
        misses=_misses(plan),
        before=before,
        after=after,
        gain=wording.gain(after, before),
        rows=side_by_side(plan, (before, after)),
        served_by=served_by(plan),
        speeds=wording.speeds(after.proof) if after.proof is not None else "",
        pareto=charts.wide_and_narrow(lambda narrow: charts.accuracy_against_capacity(found, narrow)),
        latency=charts.wide_and_narrow(lambda narrow: charts.latency_against_rate(series, plan.goal.slo, narrow)),
        tail=charts.wide_and_narrow(lambda narrow: charts.latency_distribution(series, plan.goal.slo, narrow)),
        capacity_by_step=charts.wide_and_narrow(lambda narrow: charts.capacity_by_step(found, narrow)),
        above=_above_the_plan(found),
        relaxations=[wording.relaxation(each) for each in evidence.relaxations],
        certificate=certificate,
        funnel=charts.wide_and_narrow(lambda narrow: charts.plans_left(certificate, narrow)) if certificate else None,
        decisions=evidence.decisions[:_MOST_ROWS],
        folds_decisions=len(evidence.decisions) > _MOST_DECISIONS,
        cost=sum(decision.cost_s for decision in evidence.decisions),
        training=[
            charts.wide_and_narrow(lambda narrow: charts.training_loss(epochs, narrow)),
            charts.wide_and_narrow(lambda narrow: charts.training_metric(epochs, narrow)),
        ]
        if epochs
        else None,
        examples=examples_of(run / plan.variants[0].bundle),
        steps=_steps(found),
        lines=[line for line in lines if line not in folded],
        folded=folded,
        fates=_count_fates(evidence.trials),
        windows=found.windows[:_MOST_ROWS],
        most_rows=_MOST_ROWS,
        seeds=found.seeds,
        most_seeds=_MOST_SEEDS,
        marks=MARKS,
        verdicts=Counter(window.outcome.value for _, window in found.windows),
        run=shlex.quote(str(run)),
        load_options=_load_at_90_percent(after.rps),
    )


def _headline(found: Findings) -> str:
    """The answer in one sentence."""
    plan, evidence = found.plan, found.evidence
    name = evidence.metric
    after = found.plan_capacity
    gain = wording.gain(after, found.baseline_capacity)
    accuracy = wording.metric_with_interval(evidence.accuracy, evidence.accuracy_interval, name)
    rate = wording.rate(after.rps).removesuffix("/s")
    estimate = "" if after.proven or not after.rps else f" ({wording.estimated(after)})"
    return (
        f"{found.name}: {rate} requests/s{estimate} within {plan.goal.slo}, "
        + (f"{gain} the baseline, " if gain else "")
        + f"{name} {accuracy}, drop {wording.drop(evidence.accuracy_drop, name)}"
    )


def _misses(plan: Plan) -> list[str]:
    """The parts of the goal that a nearest miss does not meet; empty for a plan that meets it."""
    evidence = plan.evidence
    if plan.feasible or evidence is None:
        return []
    name, budget, slo = evidence.metric, plan.goal.budget, plan.goal.slo
    misses = []
    if evidence.accuracy_drop_interval[1] > budget.max_drop:
        drop = wording.drop(evidence.accuracy_drop, name, evidence.accuracy_drop_interval)
        misses.append(f"the drop is {drop}, and the upper end of its interval must be at most {budget}")
    if evidence.capacity_rps <= 0:
        misses.append(f"no rate was proven or estimated within {slo}")
    elif evidence.p99_ms is not None and slo.percentile == 99 and evidence.p99_ms >= slo.limit_ms:
        misses.append(f"p99 is {wording.percentile(evidence.p99_ms, evidence.p99_interval_ms, None)} against {slo}")
    return misses


def _steps(found: Findings) -> list[StepLine]:
    steps = found.evidence.ladder
    capacities = [found.capacity(step.candidate, step.capacity_rps, step.p99_ms) for step in steps]
    return [
        StepLine(
            step=step.step,
            candidate=step.candidate,
            name=found.name_of(step.candidate),
            capacity=capacity,
            gain=wording.gain(capacity, capacities[index - 1]) if index else "",
            total=wording.gain(capacity, capacities[0]) if index else "",
            p99=wording.p99_of(capacity),
            accuracy=wording.metric(step.accuracy, found.evidence.metric),
        )
        for index, (step, capacity) in enumerate(zip(steps, capacities, strict=True))
    ]


def _above_the_plan(found: Findings) -> list[str]:
    """Each step with a higher capacity than the plan's, and why that does not make it the better plan."""
    after, notes = found.plan_capacity, []
    for step in found.evidence.ladder:
        capacity = found.capacity(step.candidate, step.capacity_rps, step.p99_ms)
        if capacity.rps <= after.rps or not after.rps:
            continue
        if after.proven and not capacity.proven:
            why = "a proof needs a lower rate than an estimate"
        else:
            why = "the two were measured at different times, so the host's speed may explain the difference"
        notes.append(
            f"The step “{step.step}” has a higher capacity than the plan ({wording.capacity(capacity)}, against "
            f"{wording.capacity(after)}): {why}"
        )
    return notes


def _lines(found: Findings) -> list[TrialLine]:
    """The candidates; those that ended before any load for the same reason share a line."""
    groups: dict[tuple[Fate, str], list[Trial]] = {}
    for trial in _sorted(found.evidence.trials):
        is_shared = trial.fate in ("failed", "skipped") and trial.capacity_rps is None
        groups.setdefault((trial.fate, trial.why if is_shared else trial.candidate), []).append(trial)
    return [_line(found, trials) for trials in groups.values()]


def _line(found: Findings, trials: Sequence[Trial]) -> TrialLine:
    first = trials[0]
    rps = first.capacity_rps
    return TrialLine(
        trial=first,
        names=tuple(found.name_of(trial.candidate) for trial in trials[:_MOST_NAMES]),
        covers=len(trials),
        capacity=None if rps is None else found.capacity(first.candidate, rps, first.p99_ms),
    )


def _sorted(trials: tuple[Trial, ...]) -> list[Trial]:
    """By fate, then the fastest first."""
    return sorted(
        trials,
        key=lambda trial: (
            list(_FATES).index(trial.fate),
            -(trial.capacity_rps or 0.0),
            -(trial.predicted_rps or 0.0),
            trial.candidate,
        ),
    )


def _count_fates(trials: tuple[Trial, ...]) -> list[tuple[str, int]]:
    counts = Counter(trial.fate for trial in trials)
    return [(words, counts[fate]) for fate, words in _FATES.items() if counts[fate]]


def _load_at_90_percent(capacity_rps: float) -> str:
    """Options of `rushhour load` for 90% of the capacity, and about 1,000 requests, enough for a p99."""
    rps = 0.9 * capacity_rps
    if rps <= 0:
        return ""
    seconds = max(10, min(600, math.ceil(1000 / rps)))
    return f"--rate {rps:.0f} --duration {seconds}s" if rps >= 10 else f"--rate {rps:.2g} --duration {seconds}s"
