"""`report.html`: the whole story of a run in one file that opens anywhere, offline, in light and dark."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Final, NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from rushhour.curves import CURVES, read_curves
from rushhour.measurement import Measurement
from rushhour.plan import Plan, Trial
from rushhour.report import wording
from rushhour.report.comparison import served_by, side_by_side
from rushhour.report.findings import Findings, baseline_of, winner_of
from rushhour.storage import write_whole

_MOST_ROWS: Final = (
    1000  # of one table; keeps the file under 2 MB whatever the run, the rest is counted and lies on disk
)
_MOST_OPEN: Final = 30  # rows of candidates shown at once; those dominated by prediction fold away beyond it
_MOST_SEEDS: Final = 24
_FATES: Final = ("won", "baseline", "beaten", "over budget", "dominated", "failed")
MARKS: Final = {
    "won": "★", "baseline": "■", "beaten": "●", "over budget": "▽", "dominated": "○", "failed": "✕",
    "pass": "✓", "fail": "✕", "inconclusive": "◌", "unstable": "△", "generator_limited": "⊘", "void": "⊘",
}  # fmt: skip


class RungLine(NamedTuple):
    """One step of the ladder in words; `gain` over the step before, `total` over the first."""

    step: str
    candidate: str
    capacity: str
    gain: str
    total: str
    p99: str
    accuracy: str


def write_report(run: Path) -> Path:
    """Render `report.html` of the folder `run` from its `plan.json` and `measurements.jsonl`.

    The same run gives the same bytes. The file loads nothing from anywhere.

    Returns:
        The path of the file.

    Raises:
        PlanError: if the plan or its measurements are missing, damaged or without evidence.
        StorageError: if the disk does not give or take the files.
    """
    found = Findings.read(run)
    path = run / "report.html"
    write_whole(path, _render(found, run).encode("utf-8", "replace"))
    return path


def _render(found: Findings, run: Path) -> str:
    # matplotlib takes a second to import, and the command line imports this room for its summary too.
    from rushhour.report import charts

    plan, evidence = found.plan, found.evidence
    epochs = read_curves(run / "training") if (run / "training" / CURVES).is_file() else ()
    winner, baseline = winner_of(plan), baseline_of(plan)
    plan_proof = _proof(found, winner, evidence.capacity_rps, evidence.p99_ms)
    baseline_proof = _proof(found, baseline, evidence.baseline_capacity_rps, evidence.baseline_p99_ms)
    role = "winner" if plan.feasible else "nearest miss"
    sides = [
        charts.Side(name, is_plan, found.of(trial.candidate), proof)
        for name, is_plan, trial, proof in (
            ("baseline", False, baseline, baseline_proof),
            (role, True, winner, plan_proof),
        )
        if trial is not None
    ]
    trials = _sorted(evidence.trials)[:_MOST_ROWS]
    folded = [trial for trial in trials if trial.fate == "dominated"] if len(trials) > _MOST_OPEN else []
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
        gain=wording.factor(evidence.capacity_rps, evidence.baseline_capacity_rps),
        rows=side_by_side(plan, baseline_proof, plan_proof),
        served_by=served_by(plan),
        plan_proof=plan_proof,
        pareto=charts.accuracy_against_capacity(plan),
        latency=charts.latency_against_rate(sides, plan.goal.slo),
        tail=charts.latency_distribution(sides, plan.goal.slo),
        ladder=charts.ladder(evidence.ladder),
        training=[charts.training_loss(epochs), charts.training_metric(epochs)] if epochs else None,
        rungs=_rungs(found),
        trials=[trial for trial in trials if trial not in folded],
        folded=folded,
        fates=[(fate, count) for fate, count in _count_fates(evidence.trials) if count],
        windows=found.windows[:_MOST_ROWS],
        most_rows=_MOST_ROWS,
        seeds=found.seeds,
        most_seeds=_MOST_SEEDS,
        marks=MARKS,
        verdicts=Counter(window.outcome.value for _, window in found.windows),
        run=shlex.quote(str(run)),
        reload=_load_at_90_percent(evidence.capacity_rps),
    )


def page_style() -> Markup:
    """The style sheet that all pages carry inside them."""
    return Markup(resources.files(__package__).joinpath("style.css").read_text("utf-8"))


def _headline(found: Findings) -> str:
    """The answer in one sentence."""
    plan, evidence = found.plan, found.evidence
    name = evidence.metric
    gain = wording.factor(evidence.capacity_rps, evidence.baseline_capacity_rps)
    accuracy = wording.metric_with_interval(evidence.accuracy, evidence.accuracy_interval, name)
    return (
        f"{found.name}: {wording.rate(evidence.capacity_rps).removesuffix('/s')} requests/s "
        f"{'' if evidence.proven else '(estimated, not proven) '}inside {plan.goal.slo}, "
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
        misses.append(f"no rate was confirmed inside {slo}")
    elif evidence.p99_ms is not None and slo.percentile == 99 and evidence.p99_ms >= slo.limit_ms:
        misses.append(f"p99 is {wording.percentile(evidence.p99_ms, evidence.p99_interval_ms, None)} against {slo}")
    return misses


def _proof(found: Findings, trial: Trial | None, rps: float, p99_ms: float | None) -> Measurement | None:
    return None if trial is None else found.proof(trial.candidate, rps, p99_ms)


def _rungs(found: Findings) -> list[RungLine]:
    rungs = found.evidence.ladder
    lines = []
    for index, rung in enumerate(rungs):
        proof = found.proof(rung.candidate, rung.capacity_rps, rung.p99_ms)
        lines.append(
            RungLine(
                step=rung.step,
                candidate=rung.candidate,
                capacity=wording.rate(rung.capacity_rps),
                gain=wording.factor(rung.capacity_rps, rungs[index - 1].capacity_rps) if index else "",
                total=wording.factor(rung.capacity_rps, rungs[0].capacity_rps) if index else "",
                p99=wording.p99_at(rung.p99_ms, None, proof),
                accuracy=wording.metric(rung.accuracy, found.evidence.metric),
            )
        )
    return lines


def _sorted(trials: tuple[Trial, ...]) -> list[Trial]:
    """As a reader looks for them: by fate, then the fastest first."""
    return sorted(
        trials,
        key=lambda trial: (
            _FATES.index(trial.fate),
            -(trial.capacity_rps or 0.0),
            -(trial.predicted_rps or 0.0),
            trial.candidate,
        ),
    )


def _count_fates(trials: tuple[Trial, ...]) -> list[tuple[str, int]]:
    counts = Counter(trial.fate for trial in trials)
    return [(fate, counts[fate]) for fate in _FATES]


def _load_at_90_percent(capacity_rps: float) -> str:
    """Options of `rushhour load` that send 90% of the capacity, for long enough to say something about a p99."""
    rps = 0.9 * capacity_rps
    if rps <= 0:
        return ""
    seconds = max(10, min(600, math.ceil(1000 / rps)))
    return f"--rate {rps:.0f} --duration {seconds}s" if rps >= 10 else f"--rate {rps:.2g} --duration {seconds}s"
