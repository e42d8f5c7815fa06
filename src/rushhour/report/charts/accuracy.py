"""Accuracy against capacity: every candidate of a tuning run as a point of a plane, with its Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal, NamedTuple

from markupsafe import Markup

from rushhour.measurement import Interval
from rushhour.plan import EngineName, Plan, Precision, Trial
from rushhour.report import wording
from rushhour.report.charts.axes import (
    NARROW,
    WIDE,
    budget_line,
    canvas,
    key,
    legend,
    metric_ticks,
    rate_axis,
    short,
)
from rushhour.report.charts.labels import Label, write_labels
from rushhour.report.charts.palette import BASELINE, PAPER, PLAN, SOFT, style
from rushhour.report.charts.svg import chart_id, svg
from rushhour.report.findings import Findings, baseline_of, evidence_of, winner_of

Kind = Literal["proven", "estimated", "predicted"]
_EDGES: Final[dict[Kind, float]] = {"proven": 0.8, "estimated": 1.4, "predicted": 0.7}
_SIZES: Final[dict[Kind, float]] = {"proven": 6.5, "estimated": 6.5, "predicted": 3.5}
_NAME: Final = 60  # characters of a name in the chart; the tables have all of it
_MOST_PREDICTED: Final = 300  # points, the fastest; more would only hide each other and make the file heavy


class Point(NamedTuple):
    """A candidate in the plane of capacity and accuracy; `rps` of a proven one is the rate of its window."""

    trial: Trial
    rps: float
    accuracy: float
    kind: Kind
    interval_rps: Interval | None


def accuracy_against_capacity(run: Findings, narrow: bool = False) -> Markup | None:
    """Every candidate that has both: proven ones filled, estimated ones hollow, those only predicted as small rings;
    with the Pareto front (`Evidence.front`; of those measured under load in plans of older versions).

    The accuracy is that of the validation part, which candidates were chosen on.

    Returns:
        None where no candidate has both.
    """
    plan = run.plan
    points, reference = points_of(run)
    if not points:
        return None
    metric = evidence_of(plan).metric
    measured = [point for point in points if point.kind != "predicted"]
    all_predicted = sorted((point for point in points if point.kind == "predicted"), key=lambda point: -point.rps)
    predicted = all_predicted[:_MOST_PREDICTED]
    points = [*predicted, *measured]
    left_out = f", {len(predicted)} fastest of {len(all_predicted):,}" if len(predicted) < len(all_predicted) else ""
    least = None if reference is None else reference - plan.goal.budget.max_drop
    floor, ceiling = _accuracy_range([point.accuracy for point in points], reference, least)
    margin = 0.12 * (ceiling - floor)
    with style("pareto"):
        figure, axes = canvas(NARROW if narrow else WIDE, 4.6)
        bounds = [bound for point in points for bound in point.interval_rps or ()]
        rate_axis(axes, [*(point.rps for point in points), *bounds], "capacity, requests per second")
        axes.set_ylim(floor - margin, ceiling + (2 if narrow else 3) * margin)  # names stand above their points
        metric_ticks(axes, metric)
        axes.set_ylabel(f"{metric}, validation")
        if least is not None:
            budget_line(axes, least, f"budget: {plan.goal.budget} below the reference")
        on_front = {point.candidate for point in evidence_of(plan).front}
        front = _pareto_front([point for point in points if point.trial.candidate in on_front] or measured)
        title = "Pareto front" if on_front else "Pareto front, measured under load"
        if len(front) > 1:
            rates, accuracies = [point.rps for point in front], [point.accuracy for point in front]
            axes.step(rates, accuracies, where="pre", color=SOFT, linewidth=1.1)
        kinds = {point.kind for point in measured}
        legend(
            axes,
            [
                *([key("proven under load", marker="o")] if "proven" in kinds else []),
                *([key(wording.ESTIMATED, marker="o", hollow=True)] if "estimated" in kinds else []),
                *([key(f"predicted only{left_out}", marker="o", hollow=True, size=3.5)] if predicted else []),
                *([key(title, line="-")] if len(front) > 1 else []),
            ],
            columns=1 if narrow else 4,
        )
        tips, labels, marks = {}, [], []
        for index, point in enumerate(points):
            gid = f"point-{index}"
            kind = wording.ESTIMATED if point.kind == "estimated" else point.kind
            accuracy = wording.metric(point.accuracy, metric)
            name = run.name_of(point.trial.candidate)
            tips[gid] = f"{name}: {wording.rate(point.rps)} {kind}, {metric} {accuracy}"
            at_edge = point.accuracy < floor
            height = max(point.accuracy, floor - margin / 2)
            _draw_point(axes, point, plan, height, "v" if at_edge else None, gid)
            interval, colour = point.trial.accuracy_drop_interval, _colour(point.trial, plan)
            if point.kind != "predicted" and interval is not None and reference is not None and not at_edge:
                low, high = reference - interval[1], reference - interval[0]
                axes.vlines(point.rps, low, high, color=colour, linewidth=1, alpha=0.6)
            if point.interval_rps is not None:
                axes.hlines(height, *point.interval_rps, color=colour, linewidth=1, alpha=0.6)
            if role := _role(point, plan):
                text = role if narrow else f"{role}: {short(name, _NAME)}"
                labels.append(Label(text, _notes(point), colour, (point.rps, height)))
            else:
                marks.append((point.rps, height, _SIZES[point.kind] / 2))
        write_labels(axes, labels, marks)
        description = (
            f"{metric.capitalize()} against capacity: {len(measured)} candidates measured under load, "
            f"{len(all_predicted)} predicted only. The numbers are in the table of candidates."
        )
        return svg(figure, chart_id("pareto", narrow), description, tips)


def points_of(run: Findings) -> tuple[list[Point], float | None]:
    """The candidates to draw, and the reference's accuracy on the part of the data that they were chosen on.

    A compiled artefact has one accuracy whatever its policy, so a candidate without its own takes its artefact's.
    """
    trials = run.evidence.trials
    known = {_artefact(trial): trial.accuracy for trial in trials if trial.accuracy is not None}
    references = (
        trial.accuracy + trial.accuracy_drop
        for trial in trials
        if trial.accuracy is not None and trial.accuracy_drop is not None
    )
    reference = next(references, None)
    baseline = baseline_of(run.plan)
    if reference is not None and baseline is not None:
        known.setdefault(_artefact(baseline), reference)
    points = []
    for trial in trials:
        accuracy = known.get(_artefact(trial))
        if accuracy is None:
            continue
        if trial.capacity_rps:
            found = run.capacity(trial.candidate, trial.capacity_rps, trial.p99_ms)
            rps = found.proof.rate_rps if found.proof is not None else found.rps
            points.append(Point(trial, rps, accuracy, "proven" if found.proven else "estimated", found.interval_rps))
        elif trial.predicted_rps:
            points.append(Point(trial, trial.predicted_rps, accuracy, "predicted", None))
    return points, reference


def _artefact(trial: Trial) -> tuple[str, EngineName, Precision]:
    return trial.bundle, trial.engine, trial.precision


def _accuracy_range(values: Sequence[float], reference: float | None, least: float | None) -> tuple[float, float]:
    """The range of the accuracy axis. It ends some way below the budget, so that one candidate of very low accuracy
    does not press all others into one line; lower candidates are drawn at the edge."""
    low, high = min(values), max(values)
    if reference is not None and least is not None:
        low, high = min(low, least), max(high, reference)
        low = max(low, least - 2 * max(reference - least, 0.005))
    return (low, high) if high - low > 1e-4 else (low - 1e-3, high + 1e-3)


def _draw_point(axes: Any, point: Point, plan: Plan, height: float, marker: str | None, gid: str) -> None:
    """Draw one candidate; the plan's and the baseline's are larger and have a shape of their own, where they were
    measured under load."""
    colour, is_filled = _colour(point.trial, plan), point.kind == "proven"
    shapes = {PLAN: ("*", 15.0), BASELINE: ("s", 8.5)}
    plain = ("o", _SIZES[point.kind])
    shape, size = plain if point.kind == "predicted" else shapes.get(colour, plain)
    axes.plot(
        point.rps,
        height,
        marker=marker or shape,
        markersize=size,
        color=colour,
        markerfacecolor=colour if is_filled else PAPER,
        markeredgecolor=PAPER if is_filled else colour,
        markeredgewidth=_EDGES[point.kind],
        gid=gid,
        zorder=5 if colour in shapes else 4 if is_filled else 3,
    )


def _role(point: Point, plan: Plan) -> str:
    """What the plan's and the baseline's points are; empty for all others."""
    roles = {PLAN: "winner" if plan.feasible else "nearest miss", BASELINE: "baseline"}
    return roles.get(_colour(point.trial, plan), "")


def _notes(point: Point) -> tuple[str, ...]:
    """The lines below a point's name."""
    notes: dict[Kind, tuple[str, ...]] = {"estimated": (wording.ESTIMATED,), "predicted": ("predicted only",)}
    return notes.get(point.kind, ())


def _colour(trial: Trial, plan: Plan) -> str:
    return PLAN if trial is winner_of(plan) else BASELINE if trial is baseline_of(plan) else SOFT


def _pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other exceeds in both capacity and accuracy, slowest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (-point.rps, -point.accuracy)):
        if not front or point.accuracy > front[-1].accuracy:
            front.append(point)
    return front[::-1]
