"""The untouched baseline and the plan side by side, with their ratio: for the page and the terminal."""

from __future__ import annotations

from typing import NamedTuple

from rushhour.plan import Plan, Trial
from rushhour.report import wording
from rushhour.report.findings import Capacity, baseline_of, evidence_of, stated_capacities, winner_of


class Row(NamedTuple):
    """One line of the comparison; `gain` is empty where a ratio has no meaning."""

    what: str
    baseline: str
    plan: str
    gain: str = ""


def side_by_side(plan: Plan, capacities: tuple[Capacity, Capacity] | None = None) -> tuple[Row, ...]:
    """Capacity, latency, accuracy, size and way of serving of baseline and plan.

    Args:
        plan: with evidence.
        capacities: of baseline and plan, where their windows are available; else as the plan states them.

    Raises:
        PlanError: if the plan has no evidence.
    """
    found = evidence_of(plan)
    name = found.metric
    before, after = capacities or stated_capacities(plan)
    alone = (
        []
        if found.alone_rps is None
        else [Row("without load generator", "", f"{wording.rate(found.alone_rps)}, predicted")]
    )
    return (
        Row("capacity", wording.capacity(before), wording.capacity(after), wording.gain(after, before)),
        *alone,
        Row("p99 at capacity", wording.p99_of(before), wording.p99_of(after)),
        Row(
            name,
            wording.metric_with_interval(found.reference_accuracy, found.reference_accuracy_interval, name),
            wording.metric_with_interval(found.accuracy, found.accuracy_interval, name),
        ),
        Row(f"{name} drop", "", wording.drop(found.accuracy_drop, name, found.accuracy_drop_interval)),
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
    """The plan's way to serve: `int8 on OpenVINO, 2 streams, batches up to 32`."""
    winner, variant = winner_of(plan), plan.variants[0]
    if winner is not None and winner.name:
        return _served(winner)
    return f"{variant.engine} {variant.precision}, {wording.policy(plan.policy)}"


def _served(trial: Trial | None) -> str:
    if trial is None:
        return ""
    if not trial.name:
        return f"{trial.engine} {trial.precision}, {wording.policy(trial.policy)}"
    return f"{trial.name}, {wording.batches(trial.policy)}" if trial.policy.max_batch > 1 else trial.name


def _smaller(after: int, before: int) -> str:
    times = wording.factor(before, after)
    return f"{times} less" if times and after < before else ""
