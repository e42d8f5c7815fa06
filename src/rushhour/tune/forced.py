"""Forced tests: candidates that race although their predictions do not ask for it, so that a wrong model is found out.

Where a model alone decides what is measured, its errors are never seen. So beside the best few by prediction three
others race: what a user gets without tuning, one step from the leader, and one at random of those that prediction ruled
out.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

from rushhour.tune.prediction import Predictor
from rushhour.tune.space import Candidate
from rushhour.tune.state import CandidateState

DEFAULT: Final = "forced test: the engine's default layout, which a user gets without tuning"
NEIGHBOUR: Final = "forced test: one step from the leader"
RANDOM: Final = "forced test: drawn at random of those that are dominated by prediction"
CORRECTED: Final = "the corrected predictions put it above the leader"
_SHORT_S: Final = 900.0
"""A search with less time has one forced test at most."""


def most_forced(budget_s: float) -> int:
    """How many forced tests a search of so many seconds may have; infinite seconds are allowed."""
    return 1 if budget_s < _SHORT_S else 3


def forced_tests(
    leader: CandidateState,
    raced: Sequence[CandidateState],
    rivals: Sequence[CandidateState],
    predictor: Predictor,
    *,
    cores: int,
    seed: int,
) -> list[tuple[str, CandidateState]]:
    """The forced tests of a search, the most important first.

    Args:
        leader: of the races so far.
        raced: those that raced, the leader among them.
        rivals: all candidates within the accuracy budget; those that are `dominated` may be drawn.
        predictor: to choose the neighbour with the best prediction.
        cores: of the machine.
        seed: of what is drawn.

    Returns:
        The rule of each, and the candidate: one of `rivals`, or where no rival is the neighbour a new one, with the
        leader's accuracy.
    """
    done = {str(state.candidate) for state in raced}
    found: list[tuple[str, CandidateState]] = []

    def add(state: CandidateState | None, rule: str) -> None:
        if state is not None:
            found.append((rule, state))
            done.add(str(state.candidate))

    open_ = [state for state in rivals if state.fate == "dominated" and str(state.candidate) not in done]
    default = next((state for state in open_ if _is_default(state.candidate, leader.candidate, cores)), None)
    if not any(_is_default(state.candidate, leader.candidate, cores) for state in raced):
        add(default, DEFAULT)
    add(_neighbour(leader, rivals, done, predictor), NEIGHBOUR)
    drawn = sorted((state for state in open_ if str(state.candidate) not in done), key=lambda each: str(each.candidate))
    add(random.Random(seed).choice(drawn) if drawn else None, RANDOM)
    return found


def _is_default(candidate: Candidate, leader: Candidate, cores: int) -> bool:
    """One batch on all cores is what engines do by themselves."""
    return candidate.artefact == leader.artefact and candidate.layout == (1, 1, cores)


def _neighbour(
    leader: CandidateState, rivals: Sequence[CandidateState], done: set[str], predictor: Predictor
) -> CandidateState | None:
    """The candidate one step from the leader that has the best prediction, of those that did not race.

    A step is the next batch bound that was timed, or another layout with the same engine: its streams in processes of
    their own, or in one.
    """
    near = [each for each in neighbours(leader.candidate, predictor) if str(each) not in done]
    if not near:
        return None
    best = max(near, key=lambda candidate: (predictor.capacity(candidate), str(candidate)))
    known = next((state for state in rivals if str(state.candidate) == str(best)), None)
    if known is not None:
        return known
    return CandidateState(best, accuracy=leader.accuracy, predicted=predictor.capacity(best), fate="dominated")


def neighbours(candidate: Candidate, predictor: Predictor) -> list[Candidate]:
    """Candidates one step from this one, whose service times are known."""
    sizes = predictor.service_times(candidate).batch_sizes
    bounds = sorted({*sizes, candidate.policy.max_batch})
    at = bounds.index(candidate.policy.max_batch)
    near = [candidate.with_batch(bound) for bound in bounds[max(0, at - 1) : at + 2]]
    streams = candidate.streams
    near += [
        candidate.with_layout(cells, streams // cells)
        for cells in (candidate.policy.cells // 2, 2 * candidate.policy.cells)
        if 0 < cells <= streams and streams % cells == 0
    ]
    return [each for each in near if each != candidate]
