"""Side by side: the untouched baseline, the plan, and how many times better. Told on the page and in the terminal."""

from __future__ import annotations

from typing import NamedTuple

from rushhour.measurement import Measurement
from rushhour.plan import Plan, Trial
from rushhour.report import wording
from rushhour.report.findings import baseline_of, evidence_of


class Row(NamedTuple):
    """One line of the comparison; `gain` is empty where a factor says nothing."""

    what: str
    baseline: str
    plan: str
    gain: str = ""


def side_by_side(
    plan: Plan, baseline_proof: Measurement | None = None, plan_proof: Measurement | None = None
) -> tuple[Row, ...]:
    """Capacity, latency, accuracy, size and way of serving of baseline and plan.

    Args:
        plan: with evidence.
        baseline_proof: the window of load behind the baseline's capacity, where it is at hand: it knows n.
        plan_proof: the same of the plan.

    Raises:
        PlanError: if the plan carries no evidence.
    """
    found = evidence_of(plan)
    name = found.metric
    return (
        Row(
            "capacity",
            wording.rate(found.baseline_capacity_rps),
            wording.capacity(found),
            wording.factor(found.capacity_rps, found.baseline_capacity_rps),
        ),
        Row(
            "p99 there",
            wording.p99_at(found.baseline_p99_ms, None, baseline_proof),
            wording.p99_at(found.p99_ms, found.p99_interval_ms, plan_proof),
        ),
        Row(
            name,
            wording.metric_with_interval(found.reference_accuracy, found.reference_accuracy_interval, name),
            wording.metric_with_interval(found.accuracy, found.accuracy_interval, name),
        ),
        Row("drop", "", wording.drop(found.accuracy_drop, name, found.accuracy_drop_interval)),
        Row(
            "parameters",
            wording.amount(found.reference_parameters),
            wording.amount(found.parameters),
            _smaller(found.parameters, found.reference_parameters),
        ),
        Row(
            "size on disk",
            wording.size(found.reference_model_bytes),
            wording.size(found.model_bytes),
            _smaller(found.model_bytes, found.reference_model_bytes),
        ),
        Row("served by", _served(baseline_of(plan)), served_by(plan)),
    )


def served_by(plan: Plan) -> str:
    """Engine, precision and policy of the plan: `openvino int8, 2 streams × 1 thread, batches up to 32`."""
    variant = plan.variants[0]
    return f"{variant.engine} {variant.precision}, {wording.policy(plan.policy)}"


def _served(trial: Trial | None) -> str:
    return "" if trial is None else f"{trial.engine} {trial.precision}, {wording.policy(trial.policy)}"


def _smaller(after: int, before: int) -> str:
    times = wording.factor(before, after)
    return f"{times} less" if times and after < before else ""
