"""The Pareto front of a search: accuracy, capacity and size of what could be served, and which point the plan is.

Policies of one artefact differ in capacity alone, so each artefact has one point: its best policy as far as known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from rushhour.measurement import Accuracy, Interval
from rushhour.plan import FrontPoint, Kind, Preference
from rushhour.tune.state import CandidateState

_OUTSIDE: Final = ("failed", "over budget")
HALF: Final = 0.5
"""Of the best capacity: the least that `--prefer memory` accepts."""
_REASONS: Final[dict[Preference, str]] = {
    "capacity": "it has the most requests per second",
    "accuracy": "it has the most requests per second of those not measurably less accurate than the most accurate one",
    "memory": "it is the smallest model with at least half of the best capacity",
}


class Rated(NamedTuple):
    """A candidate's capacity, and how it is known."""

    rps: float
    kind: Kind
    interval_rps: Interval | None


def rated(
    state: CandidateState,
    winner: CandidateState,
    is_proven: bool,
    estimate: Callable[[CandidateState], Interval | None],
    predicted: Callable[[CandidateState], tuple[float, Interval]],
) -> Rated:
    """The capacity of a candidate as it is best known.

    Args:
        state: of the candidate.
        winner: of the search: where only the throughput of the candidate was measured, its capacity is the winner's
            times the ratio of the two throughputs.
        is_proven: whether the winner's capacity is a confirmed pass.
        estimate: the interval of a capacity from its windows of load.
        predicted: the capacity of a candidate without load, with its interval. It is scaled by what load showed of the
            winner against its own prediction: the host may compute slower under load than when engines were timed.
    """
    if state is winner and is_proven:
        return Rated(state.capacity or 0.0, "proven", None)
    if state.capacity is not None:
        return Rated(state.capacity, "estimated", estimate(state))
    if state.throughput and winner.throughput and winner.capacity:
        return Rated(winner.capacity * state.throughput / winner.throughput, "estimated", None)
    if not state.predicted:
        return Rated(0.0, "predicted", None)
    rate, (low, high) = predicted(state)
    expected = predicted(winner)[0] if winner.predicted else 0.0
    scale = winner.capacity / expected if winner.capacity and expected else 1.0
    return Rated(rate * scale, "predicted", (low * scale, high * scale))


def front(
    states: Sequence[CandidateState],
    winner: CandidateState,
    rate: Callable[[CandidateState], Rated],
    model_bytes: Callable[[str], int],
) -> tuple[FrontPoint, ...]:
    """The Pareto front of all candidates within the accuracy budget, the fastest first.

    The winner is among them even where a prediction exceeds it.

    Args:
        states: of all candidates; those that failed or are over the budget are left out.
        winner: of the search.
        rate: gives their capacities.
        model_bytes: of the bundle of a role.
    """
    best: dict[str, FrontPoint] = {}
    for state in states:
        accuracy = state.accuracy
        if accuracy is None or ((state.fate in _OUTSIDE or not state.is_judged) and state is not winner):
            continue
        rating = rate(state)
        if not rating.rps and state is not winner:
            continue
        point = _point(state, accuracy, rating, model_bytes(state.candidate.bundle), state is winner)
        known = best.get(state.candidate.artefact)
        if known is None or _rank(point) > _rank(known):
            best[state.candidate.artefact] = point
    points = sorted(best.values(), key=_rank, reverse=True)
    kept: list[FrontPoint] = []
    for one in points:
        is_new = all(_values(one) != _values(other) for other in kept)
        if one.chosen or (is_new and not any(_exceeds(other, one) for other in points)):
            kept.append(one)
    return tuple(sorted(kept, key=lambda point: -point.capacity_rps))


def _point(state: CandidateState, accuracy: Accuracy, rating: Rated, size: int, chosen: bool) -> FrontPoint:
    return FrontPoint(
        candidate=str(state.candidate),
        name=state.candidate.name,
        kind=rating.kind,
        capacity_rps=rating.rps,
        capacity_interval_rps=rating.interval_rps,
        accuracy=accuracy.value,
        accuracy_drop=accuracy.drop,
        accuracy_drop_interval=accuracy.drop_interval,
        model_bytes=size,
        chosen=chosen,
    )


def _rank(point: FrontPoint) -> tuple[bool, bool, float]:
    """The chosen one first, then what was under load, then the fastest."""
    return point.chosen, point.kind != "predicted", point.capacity_rps


def _values(point: FrontPoint) -> tuple[float, float, float]:
    return point.accuracy, point.capacity_rps, -point.model_bytes


def _exceeds(one: FrontPoint, other: FrontPoint) -> bool:
    """Whether `one` is at least as good in everything, and better in something."""
    pairs = list(zip(_values(one), _values(other), strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def choice(points: Sequence[FrontPoint], prefer: Preference, metric: str) -> str:
    """Which point of the front the plan is, and why not the next one in each direction; in words.

    Args:
        points: of the front, one of them chosen.
        prefer: what decided.
        metric: the task's.
    """
    chosen = next((point for point in points if point.chosen), None)
    if chosen is None:
        return ""
    if len(points) == 1:
        return "the only point of the Pareto front: no candidate within the budget is more accurate, faster or smaller"
    sentence = f"of {len(points)} points of the Pareto front, this one by {prefer}: {_REASONS[prefer]}"
    others = [_against(chosen, what, other, metric) for what, other in _neighbours(chosen, points)]
    return "; ".join([sentence, *others])


def _neighbours(chosen: FrontPoint, points: Sequence[FrontPoint]) -> list[tuple[str, FrontPoint]]:
    """The next point that is faster, more accurate or smaller; each point once."""
    faster = [point for point in points if point.capacity_rps > chosen.capacity_rps]
    better = [point for point in points if point.accuracy > chosen.accuracy]
    smaller = [point for point in points if point.model_bytes < chosen.model_bytes]
    found = [
        ("faster", min(faster, key=lambda point: point.capacity_rps, default=None)),
        ("more accurate", max(better, key=lambda point: point.capacity_rps, default=None)),
        ("smaller", max(smaller, key=lambda point: point.capacity_rps, default=None)),
    ]
    seen: list[str] = []
    named = []
    for what, point in found:
        if point is not None and point.candidate not in seen:
            seen.append(point.candidate)
            named.append((what, point))
    return named


def _against(chosen: FrontPoint, what: str, other: FrontPoint, metric: str) -> str:
    share = other.capacity_rps / chosen.capacity_rps if chosen.capacity_rps else 0.0
    times = f", {share:.0%} of its capacity" if share else ""
    by = (other.accuracy - chosen.accuracy) * (100 if metric == "accuracy" else 1)
    unit = " points" if metric == "accuracy" else f" {metric}"
    size = f"{other.model_bytes / 1e6:,.2f} MB against {chosen.model_bytes / 1e6:,.2f} MB"
    facts = f"{other.capacity_rps:,.0f}/s {other.kind}{times}, {by:+.2f}{unit}, {size}"
    return f"{what} is {other.name} ({facts})"


def smallest_first(
    states: Sequence[CandidateState], best: CandidateState, model_bytes: Callable[[str], int]
) -> list[CandidateState]:
    """The candidates to try for `--prefer memory`: the best of each smaller bundle, the smallest first.

    Args:
        states: of candidates within the accuracy budget.
        best: the one with the highest capacity.
        model_bytes: of the bundle of a role.
    """
    least = HALF * best.predicted_rps
    of_bundle: dict[str, CandidateState] = {}
    for state in sorted(states, key=lambda state: -state.predicted_rps):
        role = state.candidate.bundle
        is_smaller = model_bytes(role) < model_bytes(best.candidate.bundle)
        if is_smaller and state.fate not in _OUTSIDE and state.predicted_rps >= least:
            of_bundle.setdefault(role, state)
    return sorted(of_bundle.values(), key=lambda state: model_bytes(state.candidate.bundle))


def measurably_worse(
    states: Sequence[CandidateState], top: CandidateState, accuracy: Callable[[CandidateState], Accuracy]
) -> list[tuple[CandidateState, str]]:
    """Candidates that are measurably less accurate than the most accurate one, each with the reason.

    Args:
        states: of candidates within the accuracy budget.
        top: the most accurate of them.
        accuracy: of a candidate, with its drop below `top` on the same samples.
    """
    found: list[tuple[CandidateState, str]] = []
    drops: dict[str, Accuracy] = {}
    for state in states:
        artefact = state.candidate.artefact
        if artefact == top.candidate.artefact:
            continue
        if artefact not in drops:
            drops[artefact] = accuracy(state)
        drop, (low, high) = drops[artefact].drop, drops[artefact].drop_interval
        if low > 0:
            by = f"{drop * 100:.2f} points ({low * 100:.2f} to {high * 100:.2f})"
            why = f"accuracy is preferred, and it is measurably less accurate than {top.candidate.name}, by {by}"
            found.append((state, why))
    return found
