"""`report.html`: the whole story of a run in one file that opens anywhere, offline, in light and dark."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Final, NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from rushhour.plan import Fate, Plan, Trial
from rushhour.records.curves import CURVES, read_curves
from rushhour.report import wording
from rushhour.report.comparison import served_by, side_by_side
from rushhour.report.findings import Capacity, Findings, baseline_of, winner_of
from rushhour.system.storage import write_own

_MOST_ROWS: Final = (
    1000  # of one table; keeps the file under 2 MB whatever the run, the rest is counted and lies on disk
)
_MOST_OPEN: Final = 30  # rows of candidates shown at once; those dominated by prediction fold away beyond it
_MOST_SEEDS: Final = 24
_MOST_NAMES: Final = 6  # of the candidates that one line covers; the rest is counted
_FATES: Final[dict[Fate, str]] = {
    "won": "won",
    "baseline": "baseline",
    "tied": "tied with the winner under load",
    "beaten": "beaten under load",
    "over budget": "over the accuracy budget",
    "dominated": "dominated by prediction, never loaded",
    "skipped": "skipped, because the time was up",
    "failed": "failed, because their engine cannot run them",
}
"""In the order that a reader looks for them, with what each means of several candidates."""
MARKS: Final = {
    "won": "★", "baseline": "■", "tied": "=", "beaten": "●", "over budget": "▽", "dominated": "○", "skipped": "…",
    "failed": "✕",
    "pass": "✓", "fail": "✕", "inconclusive": "◌", "unstable": "△", "generator_limited": "⊘", "void": "⊘",
}  # fmt: skip


class TrialLine(NamedTuple):
    """One line of the candidates: a candidate, or all that were refused or skipped for one and the same reason.

    Attributes:
        trial: the first of them.
        names: of all it covers, as people call them; the first few.
        covers: how many it covers.
        capacity: None where it was never searched.
    """

    trial: Trial
    names: tuple[str, ...]
    covers: int
    capacity: Capacity | None


class RungLine(NamedTuple):
    """One step of the ladder in words; `gain` over the step before, `total` over the first."""

    step: str
    candidate: str
    name: str
    capacity: Capacity
    gain: str
    total: str
    p99: str
    accuracy: str


def write_report(run: Path, file: Path | None = None) -> Path:
    """Render `report.html` of the folder `run` from its plan, the best so far if it was broken off, and its journal.

    The same run gives the same bytes. The file loads nothing from anywhere.

    Args:
        run: the folder.
        file: where it is written; in that folder by default.

    Returns:
        The path of the file.

    Raises:
        PlanError: if the plan or its measurements are missing, damaged or without evidence.
        StorageError: if the disk does not give or take the files.
    """
    found = Findings.read(run)
    path = file or run / "report.html"
    write_own(path, _render(found, run).encode("utf-8", "replace"), is_page)
    return path


def is_page(content: bytes) -> bool:
    """Whether a file of this content is a page of Rushhour's."""
    return b'<meta name="generator" content="Rushhour">' in content[:1000]


def _render(found: Findings, run: Path) -> str:
    # matplotlib takes a second to import, and the command line imports this room for its summary too.
    from rushhour.report import charts

    plan, evidence = found.plan, found.evidence
    epochs = read_curves(run / "training") if (run / "training" / CURVES).is_file() else ()
    before, after = found.baseline_capacity, found.plan_capacity
    role = "winner" if plan.feasible else "nearest miss"
    sides = [
        charts.Side(name, is_plan, found.of(trial.candidate), capacity)
        for name, is_plan, trial, capacity in (
            ("baseline", False, baseline_of(plan), before),
            (role, True, winner_of(plan), after),
        )
        if trial is not None
    ]
    lines = _lines(found)[:_MOST_ROWS]
    folded = [line for line in lines if line.trial.fate == "dominated"] if len(lines) > _MOST_OPEN else []
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals["say"] = wording
    template = environment.from_string(resources.files(__package__).joinpath("report.html").read_text("utf-8"))
    return template.render(
        style=page_style(),
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
        pareto=charts.in_both_widths(lambda narrow: charts.accuracy_against_capacity(found, narrow)),
        latency=charts.in_both_widths(lambda narrow: charts.latency_against_rate(sides, plan.goal.slo, narrow)),
        tail=charts.in_both_widths(lambda narrow: charts.latency_distribution(sides, plan.goal.slo, narrow)),
        ladder=charts.in_both_widths(lambda narrow: charts.ladder(found, narrow)),
        above=_above_the_plan(found),
        training=[
            charts.in_both_widths(lambda narrow: charts.training_loss(epochs, narrow)),
            charts.in_both_widths(lambda narrow: charts.training_metric(epochs, narrow)),
        ]
        if epochs
        else None,
        rungs=_rungs(found),
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
        reload=_load_at_90_percent(after.rps),
    )


def page_style() -> Markup:
    """The style sheet that all pages carry inside them."""
    return Markup(resources.files(__package__).joinpath("style.css").read_text("utf-8"))


def _headline(found: Findings) -> str:
    """The answer in one sentence."""
    plan, evidence = found.plan, found.evidence
    name = evidence.metric
    after = found.plan_capacity
    gain = wording.gain(after, found.baseline_capacity)
    accuracy = wording.metric_with_interval(evidence.accuracy, evidence.accuracy_interval, name)
    return (
        f"{found.name}: {wording.rate(after.rps).removesuffix('/s')} requests/s "
        f"{'' if after.proven or not after.rps else f'({wording.ESTIMATED}) '}inside {plan.goal.slo}, "
        + (f"{gain} the baseline, " if gain else "")
        + f"{name} {accuracy}, drop {wording.drop(evidence.accuracy_drop, name)}"
    )


def _misses(plan: Plan) -> list[str]:
    """What of the goal a nearest miss does not meet, as far as the evidence says; empty for a plan that meets it."""
    evidence = plan.evidence
    if plan.feasible or evidence is None:
        return []
    name, budget, slo = evidence.metric, plan.goal.budget, plan.goal.slo
    misses = []
    if evidence.accuracy_drop_interval[1] > budget.max_drop:
        drop = wording.drop(evidence.accuracy_drop, name, evidence.accuracy_drop_interval)
        misses.append(f"the drop is {drop}, and its interval must stay inside {budget}")
    if evidence.capacity_rps <= 0:
        misses.append(f"no rate was proven or estimated inside {slo}")
    elif evidence.p99_ms is not None and slo.percentile == 99 and evidence.p99_ms >= slo.limit_ms:
        misses.append(f"p99 is {wording.percentile(evidence.p99_ms, evidence.p99_interval_ms, None)} against {slo}")
    return misses


def _rungs(found: Findings) -> list[RungLine]:
    rungs = found.evidence.ladder
    capacities = [found.capacity(rung.candidate, rung.capacity_rps, rung.p99_ms) for rung in rungs]
    return [
        RungLine(
            step=rung.step,
            candidate=rung.candidate,
            name=found.name_of(rung.candidate),
            capacity=capacity,
            gain=wording.gain(capacity, capacities[index - 1]) if index else "",
            total=wording.gain(capacity, capacities[0]) if index else "",
            p99=wording.p99_of(capacity),
            accuracy=wording.metric(rung.accuracy, found.evidence.metric),
        )
        for index, (rung, capacity) in enumerate(zip(rungs, capacities, strict=True))
    ]


def _above_the_plan(found: Findings) -> list[str]:
    """Each step of the ladder that shows more than the plan, and why that is no better answer."""
    after, said = found.plan_capacity, []
    for rung in found.evidence.ladder:
        capacity = found.capacity(rung.candidate, rung.capacity_rps, rung.p99_ms)
        if capacity.rps <= after.rps or not after.rps:
            continue
        if after.proven and not capacity.proven:
            why = "a proof asks for a lower rate than an estimate"
        else:
            why = "the two were not measured side by side, so the difference may be the host's"
        said.append(
            f"The step “{rung.step}” shows more than the plan ({wording.capacity(capacity)}, against "
            f"{wording.capacity(after)}): {why}"
        )
    return said


def _lines(found: Findings) -> list[TrialLine]:
    """The candidates, those that one and the same reason ended before any load in one line."""
    alike: dict[tuple[Fate, str], list[Trial]] = {}
    for trial in _sorted(found.evidence.trials):
        is_shared = trial.fate in ("failed", "skipped") and trial.capacity_rps is None
        alike.setdefault((trial.fate, trial.why if is_shared else trial.candidate), []).append(trial)
    return [_line(found, trials) for trials in alike.values()]


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
    """As a reader looks for them: by fate, then the fastest first."""
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
    """Options of `rushhour load` that send 90% of the capacity, for long enough to say something about a p99."""
    rps = 0.9 * capacity_rps
    if rps <= 0:
        return ""
    seconds = max(10, min(600, math.ceil(1000 / rps)))
    return f"--rate {rps:.0f} --duration {seconds}s" if rps >= 10 else f"--rate {rps:.2g} --duration {seconds}s"
