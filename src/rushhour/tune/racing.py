"""The races of a search: who races, in which order, and who is served in the end.

The best few by prediction race, then forced tests, and where memory is preferred smaller models against the fastest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from rushhour.errors import EngineError
from rushhour.load import Race
from rushhour.system.machine import cores
from rushhour.tune.contest import Contest
from rushhour.tune.forced import CORRECTED, forced_tests, most_forced
from rushhour.tune.front import HALF, smallest_first
from rushhour.tune.load_tests import LoadTests
from rushhour.tune.prediction import Predictor
from rushhour.tune.settings import Budget, TuneSettings
from rushhour.tune.state import CandidateState

USUAL, SHORTEST = 22, 10
"""Pairs of windows of a race: usually, and at least."""
_FAR = 1.1
"""A candidate that is predicted so many times the one that leads may win by far."""


class Racing:
    """Races of candidates within the accuracy budget.

    Args:
        load_tests: run them.
        predictor: says who races, and learns from it.
        settings: of the search.
        budget: of the search; a share of it is kept for the proof.
        states: of all candidates of the search; new ones are added.
        size: of the model of a role, in bytes.
        race_s: seconds of a usual race.
        announce: receives the number of races to come.
        leads: receives each candidate that leads.
    """

    def __init__(
        self,
        load_tests: LoadTests,
        predictor: Predictor,
        settings: TuneSettings,
        budget: Budget,
        states: list[CandidateState],
        size: Callable[[str], int],
        *,
        race_s: float,
        announce: Callable[[int], None],
        leads: Callable[[CandidateState], None],
    ) -> None:
        self._load_tests = load_tests
        self._predictor = predictor
        self._settings = settings
        self._budget = budget
        self._states = states
        self._size = size
        self._race_s = race_s
        self._announce = announce
        self._leads = leads

    def ranked(self, alive: list[CandidateState]) -> list[CandidateState]:
        """The one to serve, then the others that raced, best first.

        Args:
            alive: candidates within the accuracy budget, best prediction first.

        Raises:
            EngineError: if none runs.
        """
        incumbent = self._best_of_layouts(alive)
        self._leads(incumbent)
        rivals = self._rank(incumbent, [state for state in alive if state.fate is None and state is not incumbent])
        count = len(rivals)
        self._announce(count)
        with Contest(self._load_tests, self._predictor, incumbent, self._leads) as contest:
            while rivals:
                rival = rivals.pop(0)
                if self._is_over(rival.ahead_of(contest.incumbent), self._shortest_s):
                    rival.end("skipped", "the time was up before its race")
                    self._load_tests.decisions.ended("race", rival)
                    continue
                contest.race(rival, count)
                self._predictor.correct(rivals)
                rivals.sort(key=lambda state: state.predicted_rps, reverse=True)
            self._force(contest, alive)
            return self._preferred(contest, alive)

    def _is_over(self, ahead: float = 0.0, takes_s: float = 0.0) -> bool:
        """Whether the time is up for a candidate.

        One that is predicted far better than what was measured still gets its race: a proof of the wrong one is worth
        less.

        Args:
            ahead: of the best that was measured (`CandidateState.ahead_of`).
            takes_s: seconds that the test takes, at least: they must leave the time of an estimate.
        """
        left = self._budget.left
        if left - takes_s / self._budget.seconds < Budget.FOR_SEARCH:
            return True
        return left < (Budget.FOR_ONE if ahead > _FAR else Budget.FOR_PROOF)

    @property
    def _shortest_s(self) -> float:
        """Seconds of the shortest race."""
        return self._race_s * SHORTEST / USUAL

    def _best_of_layouts(self, alive: list[CandidateState]) -> CandidateState:
        """The best candidate of each layout under load, for the overhead of serving; of these, the fastest.

        Raises:
            EngineError: if none runs.
        """
        measured = self._predictor.learn_overheads(
            alive,
            functools.partial(self._load_tests.measure_throughput, in_open_loop=True),
            self._is_over,
            keep=self._settings.keep,
        )
        if not measured:
            raise EngineError("no candidate can be served", alive[0].why, "correct the model, or use another")
        best = max(measured, key=lambda state: state.throughput or 0.0)
        self._load_tests.decisions.overheads(measured, best)
        return best

    def _rank(self, incumbent: CandidateState, rivals: list[CandidateState]) -> list[CandidateState]:
        """The rivals worth a race, best prediction first; the others are dominated."""
        self._predictor.choose_batches([state for state in rivals if state.throughput is None])
        for state in sorted(rivals, key=lambda state: state.predicted_rps, reverse=True)[: self._settings.race]:
            self._predictor.predict(state)
        rivals = sorted(rivals, key=lambda state: state.predicted_rps, reverse=True)
        best = max(state.predicted_rps for state in (incumbent, *rivals))
        for position, state in enumerate(rivals, 1):
            if state.predicted_rps < self._settings.keep * best or position >= self._settings.race:
                why = f"predicted {state.predicted_rps:,.0f}/s, the best prediction is {best:,.0f}/s"
                state.end("dominated", why)
        self._load_tests.decisions.ranked(incumbent, rivals, self._settings.keep, self._settings.race)
        return [state for state in rivals if state.fate is None]

    def _force(self, contest: Contest, alive: list[CandidateState]) -> None:
        """Races that no prediction asked for (`forced`), while there is time beyond that of the proof.

        Where one of them wins, the model was wrong: what it then predicts to be better races too.
        """
        tests = forced_tests(
            *(contest.incumbent, contest.raced, alive, self._predictor), cores=cores(), seed=self._settings.seed
        )
        for rule, test in tests[: most_forced(self._budget.seconds)]:
            if self._budget.left - Budget.FOR_PROOF < self._race_s / self._budget.seconds:
                break
            self._race_anyway(contest, test, rule, len(tests))
            if contest.incumbent is not test:
                continue
            left = [state for state in alive if state.fate == "dominated"]
            best = max(left, key=lambda state: self._predictor.capacity(state.candidate), default=test)
            if self._predictor.capacity(best.candidate) > self._predictor.capacity(test.candidate):
                self._race_anyway(contest, best, CORRECTED, len(tests))

    def _race_anyway(self, contest: Contest, state: CandidateState, rule: str, rivals: int) -> Race | None:
        """Race a candidate that had ended before, or that is new."""
        if all(state is not each for each in self._states):
            self._states.append(state)
        state.fate, state.why, state.rule = None, "", rule
        return contest.race(state, rivals)

    def _preferred(self, contest: Contest, alive: list[CandidateState]) -> list[CandidateState]:
        """The candidates that raced, best first; where memory is preferred, the smallest that is fast enough first."""
        best = contest.incumbent
        smaller = smallest_first(alive, best, self._size) if self._settings.prefer == "memory" else []
        for state in smaller:
            if self._is_over(0.0, self._shortest_s):
                break
            result = self._race_anyway(contest, state, state.rule, len(smaller))
            if result is None or result.ratio < HALF or contest.incumbent is not best:
                continue
            sizes = f"{self._size(best.candidate.bundle):,} bytes against {self._size(state.candidate.bundle):,}"
            best.end("not preferred", f"memory is preferred: {1 / result.ratio:.2f}x the throughput, but {sizes}")
            same = [each for each in contest.ranked if each.candidate.bundle == state.candidate.bundle]
            return [state, *(each for each in same if each is not state)]
        return contest.ranked
