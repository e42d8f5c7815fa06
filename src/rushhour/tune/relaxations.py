"""Relaxations: what one change of the goal, or more cores, would buy, all else unchanged.

Where nothing meets the goal they say what it would take; where a plan does, they are listed if they buy more than 10%.
Predicted ones are scaled by the measured over the predicted capacity for the goal as it is. Where a capacity is
predicted for it and none was measured, the predictions are wrong, and only what was measured is said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from rushhour.goal import SLO, Goal
from rushhour.measurement import Interval
from rushhour.plan import Change, EngineName, Precision, Relaxation, Trial
from rushhour.system.machine import cores
from rushhour.tune.prediction import Predictor
from rushhour.tune.state import CandidateState

_WORTH: Final = 1.1
"""A relaxation is named if it buys at least this factor."""
_LIMITS: Final = (1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0)
"""Factors of the limit, from the smallest; of a plan that meets the goal, only the first few."""
_MODEST: Final = 3.0
_TIMES_CORES: Final = 2
_MOST: Final = 8
"""Candidates that are predicted with another limit: the best with the one that was asked for."""


def relaxations(
    winner: CandidateState,
    states: Sequence[CandidateState],
    ended: Sequence[Trial],
    goal: Goal,
    predictor: Predictor,
    *,
    feasible: bool,
) -> tuple[Relaxation, ...]:
    """What each single change buys: of the limit, of the accuracy budget, of the cores.

    Args:
        winner: the plan's candidate, or the nearest miss.
        states: of all candidates of the search.
        ended: of those that ended before: networks over the accuracy budget are among them.
        goal: that was asked for.
        predictor: with what was learnt in the search.
        feasible: whether the plan meets the goal.
    """
    search = _Search(winner, states, ended, goal, predictor, feasible)
    found = (*search.limits(), *search.accuracies(), *search.cores())
    return tuple(each for each in found if each.kind == "measured" or not search.is_wrong)


class _Search:
    def __init__(
        self,
        winner: CandidateState,
        states: Sequence[CandidateState],
        ended: Sequence[Trial],
        goal: Goal,
        predictor: Predictor,
        feasible: bool,
    ) -> None:
        self._winner = winner
        self._ended = ended
        self._goal = goal
        self._predictor = predictor
        self._feasible = feasible
        runs = [state for state in states if state.fate != "failed" and state.predicted is not None]
        self._within = [state for state in runs if state.fate != "over budget"] or [winner]
        self._best = sorted(self._within, key=lambda state: -state.predicted_rps)[:_MOST]
        self._over = [state for state in runs if state.fate == "over budget" and state.accuracy is not None]
        self._now = winner.capacity or 0.0
        self._predicted = max(predictor.capacities_under(self._best, goal.slo))
        self.is_wrong = not self._now and self._predicted > 0

    def _scaled(self, predicted: float) -> float:
        """A prediction, scaled by what was measured over what is predicted for the goal as it is."""
        return predicted * self._now / self._predicted if self._now and self._predicted else predicted

    def _is_worth(self, rate: float) -> bool:
        return rate > 0 and rate >= _WORTH * self._now

    # The limit.

    def limits(self) -> list[Relaxation]:
        """The smallest limit that is worth it: as measured, else as predicted."""
        measured, predicted = self._measured_limit(), self._predicted_limit()
        if measured is not None and predicted is not None and not self._feasible:
            return [measured, predicted]
        return [each for each in (predicted or measured,) if each is not None]

    def _predicted_limit(self) -> Relaxation | None:
        limits = [factor for factor in _LIMITS if factor <= _MODEST or not self._feasible]
        if self._feasible and self._under(limits[-1]) is None:  # then a smaller one buys no more
            return None
        return next((found for factor in limits if (found := self._under(factor)) is not None), None)

    def _under(self, factor: float) -> Relaxation | None:
        """With so many times the limit; None where it is not worth it."""
        slo = self._goal.slo
        relaxed = SLO(slo.percentile, round(factor * slo.limit_s, 9))
        rates = self._predictor.capacities_under(self._best, relaxed)
        at = max(range(len(rates)), key=rates.__getitem__)
        rate = self._scaled(rates[at])
        return self._of(self._best[at], "limit", str(relaxed), rate) if self._is_worth(rate) else None

    def _measured_limit(self) -> Relaxation | None:
        """By the p99 of a window: the smallest where no rate held, else that of the highest rate."""
        slo = self._goal.slo
        if slo.percentile != 99:
            return None
        windows = [
            (window.p99_ms, window.rate_rps)
            for window in self._winner.windows
            if window.p99_ms is not None and slo.limit_ms < window.p99_ms <= _LIMITS[-1] * slo.limit_ms
            if self._is_worth(window.rate_rps) and (not self._feasible or window.p99_ms <= _MODEST * slo.limit_ms)
        ]
        if not windows:
            return None
        p99_ms, rate = max(windows, key=lambda each: each[1]) if self._feasible else min(windows)
        relaxed = SLO(slo.percentile, _rounded_up(p99_ms) / 1e3)
        return self._of(self._winner, "limit", str(relaxed), rate, is_measured=True)

    # The accuracy budget.

    def accuracies(self) -> list[Relaxation]:
        """The smallest budget that is worth it, and the one that buys most."""
        rates = self._predictor.capacities_under(self._over, self._goal.slo)
        options = [
            (budget, self._of(state, "accuracy", f"{budget:g}%", self._scaled(rate)))
            for state, rate in zip(self._over, rates, strict=True)
            if state.accuracy is not None and (budget := _budget(state.accuracy.drop_interval))
        ]
        options += [option for trial in self._ended if (option := self._of_network(trial)) is not None]
        options = [(budget, each) for budget, each in options if self._is_worth(each.capacity_rps) and budget <= 100]
        if not options:
            return []
        least = min(options, key=lambda each: (each[0], -each[1].capacity_rps))[1]
        most = max(options, key=lambda each: (each[1].capacity_rps, -each[0]))[1]
        return [least, most] if most.capacity_rps >= _WORTH * least.capacity_rps else [least]

    def _of_network(self, trial: Trial) -> tuple[float, Relaxation] | None:
        """A network that was over the budget before the search: its prediction did not know what serving costs."""
        if trial.fate != "over budget" or trial.accuracy_drop_interval is None or not trial.predicted_rps:
            return None
        like = next((state for state in self._within if _kind(state) == (trial.engine, trial.precision)), self._winner)
        rate = self._scaled(self._predictor.beside_serving(trial.predicted_rps, like.candidate))
        budget = _budget(trial.accuracy_drop_interval)
        name = trial.name or trial.candidate
        return budget, Relaxation("accuracy", f"{budget:g}%", rate, "predicted", trial.candidate, name)

    # Cores.

    def cores(self) -> list[Relaxation]:
        """Twice the cores, with twice the processes of the same candidate."""
        (rate,) = self._predictor.capacities_under([self._winner], self._goal.slo, _TIMES_CORES)
        (alone,) = self._predictor.capacities_under([self._winner], self._goal.slo)
        rate = rate * self._now / alone if self._now and alone else rate
        more = self._of(self._winner, "cores", f"{_TIMES_CORES * cores()} cores", rate)
        return [more] if self._is_worth(rate) else []

    def _of(
        self, state: CandidateState, what: Change, to: str, rate: float, *, is_measured: bool = False
    ) -> Relaxation:
        candidate = state.candidate
        return Relaxation(what, to, rate, "measured" if is_measured else "predicted", str(candidate), candidate.name)


def _kind(state: CandidateState) -> tuple[EngineName, Precision]:
    return state.candidate.engine, state.candidate.precision


def _budget(drop_interval: Interval) -> float:
    """The least budget that a drop is within, in percentage points with one decimal."""
    return math.ceil(round(drop_interval[1] * 1000, 6)) / 10


def _rounded_up(milliseconds: float) -> float:
    """To two digits: a limit as a user would write it."""
    unit = 10.0 ** (math.floor(math.log10(milliseconds)) - 1)
    return round(math.ceil(milliseconds / unit - 1e-9) * unit, 9)
