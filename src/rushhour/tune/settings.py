"""Settings of a search, and its budget of time."""

from __future__ import annotations

import math
from typing import Literal, get_args

import msgspec

from rushhour.clock import Clock
from rushhour.errors import GoalError
from rushhour.plan import Preference

Recipes = Literal["auto", "none"]
"""Whether the network itself is made smaller: `auto` searches shapes and trains the best of them."""


class TuneSettings(msgspec.Struct, frozen=True):
    """Settings of a search.

    Attributes:
        seed: of all arrival schedules.
        keep: a candidate predicted below this share of the best prediction is not raced.
        race: candidates that are raced, at most.
        resolution: highest passing over lowest failing rate at the end of a search, at most 1 + this.
        time_s: how long each size of a batch is timed, the engine alone.
        window_s: length of one load window in a search; longer where the SLO needs more requests.
        proof_s: length of a window of a proof. Near its capacity the latency of a queue is correlated over seconds, so
            a short window proves little.
        budget_s: seconds that all of it may take, about; the steps with the least effect on the answer are skipped, and
            reported as skipped. None: no limit. A resumed search has the whole budget again.
        stretch_s: seconds that the budget grows by, at most, where training takes more than its share of it.
        recipes: whether smaller networks are searched too (`auto`), or the network stays as it is (`none`).
        prefer: what decides among candidates within the goal: the most requests per second (`capacity`); the same among
            those that are not measurably less accurate than the most accurate one (`accuracy`); or the smallest served
            model with at least half of the best capacity (`memory`).
        ladder: whether the plan gets a ladder of the candidates that were measured.
        cascade: whether pairs of candidates are tried as a cascade after the search (`rushhour.tune.cascades`).
    """

    seed: int = 0
    keep: float = 0.7
    race: int = 4
    resolution: float = 0.05
    time_s: float = 0.05
    window_s: float = 3.0
    proof_s: float = 20.0
    budget_s: float | None = None
    stretch_s: float = 0.0
    recipes: Recipes = "auto"
    prefer: Preference = "capacity"
    ladder: bool = False
    cascade: bool = False

    def __post_init__(self) -> None:
        if self.ladder and self.cascade:
            raise GoalError(
                "a plan cannot be a ladder and a cascade",
                "each of them decides which variant answers",
                "ask for one of the two",
            )
        if self.recipes not in get_args(Recipes):
            raise GoalError(
                f"recipes={self.recipes!r} is not known",
                "it says whether smaller networks are searched too",
                f"choose {' or '.join(get_args(Recipes))}",
            )
        if self.prefer not in get_args(Preference):
            raise GoalError(
                f"prefer={self.prefer!r} is not known",
                "it says what decides among candidates within the goal",
                f"choose {', '.join(get_args(Preference)[:-1])} or {get_args(Preference)[-1]}",
            )


class Budget:
    """The time of a search, from now on.

    Args:
        seconds: all of it; None for no limit.
        clock: it is read on.
    """

    FOR_PROOF, FOR_ONE, FOR_STEPS, FOR_SEARCH = 0.4, 0.25, 0.15, 0.15
    """Shares of it. The first is kept for the winner's capacity and its proof; the second is kept for them even where
    what is predicted best by far was not under load yet; the third for the baseline and what each step bought. The last
    is for the estimate of one capacity, at most."""
    FOR_TIMING, FOR_WIDENING, FOR_ACCURACY = 0.15, 0.05, 0.15
    """Shares of it that the steps before any load take, at most: service times, those in other layouts of the cores,
    and accuracies (a part of the data each). What is most promising comes first, and is not left out."""

    def __init__(self, seconds: float | None, clock: Clock) -> None:
        self._clock = clock
        self._began = clock.now()
        self.seconds = math.inf if seconds is None else seconds

    @property
    def left(self) -> float:
        """The share of it that is left; below 0 once it is spent."""
        return 1.0 if self.seconds == math.inf else 1 - (self._clock.now() - self._began) / self.seconds

    @property
    def seconds_left(self) -> float:
        """The same in seconds; infinite where there is no limit."""
        return self.left * self.seconds

    def grow(self, seconds: float) -> None:
        """It is so much longer from now on."""
        self.seconds += seconds

    def allow(self, share: float) -> Allowance:
        """This share of the whole budget for one step, from now on."""
        return Allowance(self, share)


class Allowance:
    """What one step may take of a budget.

    Args:
        budget: of all steps.
        share: of the whole budget.
    """

    def __init__(self, budget: Budget, share: float) -> None:
        self._budget = budget
        self._least = budget.left - share

    @property
    def is_spent(self) -> bool:
        """Whether the step has taken its share, or the whole budget is spent."""
        return self._budget.left <= max(0.0, self._least)
