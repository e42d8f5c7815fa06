"""The ladder of a plan: candidates of the search between which its server moves as the load changes.

The accuracy budget may be spent on average (docs/decisions/0048), so a candidate over it may answer in a rush, as long
as accurate answers make up for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from rushhour.bundle import Bundle
from rushhour.ladder import WINDOW, LadderPoint, in_words
from rushhour.measurement import Accuracy
from rushhour.plan import Plan
from rushhour.tune.front import Rated
from rushhour.tune.server import plan_of
from rushhour.tune.state import CandidateState, failure_reason

_POINTS: Final = 4
_FASTER: Final = 1.25
"""A point carries at least so many times what the one before it carries: less is not worth the memory of an engine."""
_MOST: Final = 10.0
"""The largest drop of a point over the budget: it could give a tenth of the answers."""
_RUSH_S: Final = 60.0
"""The window of the account holds the answers of so many seconds of a rush, at least: in a shorter one, a fast server
soon forgets the accurate answers of quiet times, and a variant over the budget would never last."""


class Rung(NamedTuple):
    """A candidate with its capacity, and its accuracy on the part of the data that it is judged by."""

    state: CandidateState
    rps: float
    accuracy: Accuracy


def in_layout(states: Iterable[CandidateState], winner: CandidateState) -> list[CandidateState]:
    """One state for each artefact whose accuracy is known, in the winner's layout of the cores.

    An engine in another layout cannot stand in for the winner's, batch by batch. Those that are not in the search are
    new, without a prediction.
    """
    by_artefact: dict[str, CandidateState] = {}
    for state in states:
        if state.accuracy is None or state.fate == "failed" or state.candidate.engine == "torch":
            continue
        known = by_artefact.get(state.candidate.artefact)
        if state.candidate.layout == winner.candidate.layout:
            if state.candidate.policy.max_batch > 1 and (
                known is None
                or known.candidate.layout != winner.candidate.layout
                or state is winner
                or (known is not winner and state.predicted_rps > known.predicted_rps)
            ):
                by_artefact[state.candidate.artefact] = state
        elif known is None:
            by_artefact[state.candidate.artefact] = state
    return [
        state
        if state.candidate.layout == winner.candidate.layout
        else CandidateState(state.candidate.with_layout(*winner.candidate.layout), accuracy=state.accuracy)
        for state in by_artefact.values()
    ]


def chosen_rungs(rungs: Sequence[Rung], max_drop: float) -> list[Rung]:
    """From the most accurate within the budget to the fastest that is worth its drop; fewer than two are no ladder."""
    alive = [rung for rung in rungs if rung.rps > 0 and rung.accuracy.drop_interval[1] <= _MOST * max_drop]
    alive.sort(key=lambda rung: (-rung.accuracy.value, -rung.rps))
    kept: list[Rung] = []
    for rung in alive:
        upper = rung.accuracy.drop_interval[1]
        if not kept:
            if upper <= max_drop:
                kept.append(rung)
            continue
        last = kept[-1]
        if (
            rung.rps >= _FASTER * last.rps
            and rung.accuracy.value < last.accuracy.value
            and upper >= last.accuracy.drop_interval[1]
        ):
            kept.append(rung)
    while len(kept) > _POINTS:  # the one that is nearest to its neighbours
        gaps = [after.rps / before.rps for before, after in zip(kept, kept[2:], strict=False)]
        del kept[1 + gaps.index(min(gaps))]
    return kept


def with_ladder(
    plan: Plan,
    winner: CandidateState,
    states: Iterable[CandidateState],
    bundles: Mapping[str, Bundle],
    rate: Callable[[CandidateState], Rated],
    predict: Callable[[CandidateState], object],
    judge: Callable[[CandidateState], Accuracy],
) -> tuple[Plan, str]:
    """The plan with a ladder, and what was decided, in words; without one where two points cannot be found.

    Args:
        plan: that serves the winner.
        winner: of the search.
        states: of all candidates.
        bundles: role -> bundle.
        rate: the capacity of a candidate, as best known.
        predict: sets the prediction of a candidate that has none.
        judge: the accuracy on the test part.
    """
    max_drop, rungs = plan.goal.budget.max_drop, []
    for state in in_layout(states, winner):
        try:
            if state.predicted is None:
                predict(state)
            assert state.accuracy is not None
            rungs.append(Rung(state, rate(state).rps, state.accuracy))
        except Exception as error:  # an engine may fail in any way; the others go on
            state.end("failed", failure_reason(error))
    tested = []
    for rung in chosen_rungs(rungs, max_drop):
        try:
            tested.append(rung._replace(accuracy=judge(rung.state)))
        except Exception as error:
            rung.state.end("failed", failure_reason(error))
    final = chosen_rungs(tested, max_drop)
    if len(final) < 2:
        return plan, "no ladder: no candidate is both measurably faster and affordable on average"
    variants = {variant.name: variant for variant in plan.variants}
    points = []
    for rung in final:
        candidate = rung.state.candidate
        (variant,) = plan_of(candidate, bundles[candidate.bundle], plan.goal, plan.model).variants
        variants.setdefault(variant.name, variant)
        accuracy = rung.accuracy
        points.append(
            LadderPoint(
                variant.name,
                candidate.policy.max_batch,
                rung.rps,
                accuracy.value,
                accuracy.drop,
                accuracy.drop_interval,
                accuracy.class_drops,
                f"{accuracy.split} part, {accuracy.n:,} samples",
            )
        )
    plan = msgspec.structs.replace(plan, variants=tuple(variants.values()))
    return plan.with_ladder(points, window=window_of(points, plan.goal.workload.rows)), in_words(points)


def window_of(points: Sequence[LadderPoint], rows: int) -> int:
    """Answers over which the accuracy budget is kept: a minute of a rush on the fastest point, and 100,000 at least.

    Args:
        points: of the ladder.
        rows: samples in a request.
    """
    return max(WINDOW, math.ceil(_RUSH_S * rows * points[-1].rate_rps / 1000) * 1000)
