"""A contest: races of two, one after another. The incumbent's server stays up until another candidate beats it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import TracebackType

from rushhour.load import Race
from rushhour.tune.bench import ServedCandidate
from rushhour.tune.load_tests import LoadTests
from rushhour.tune.prediction import Predictor
from rushhour.tune.state import CandidateState


class Contest:
    """Races, as a context: no server is left behind.

    Args:
        load_tests: run the races.
        predictor: learns from their ratios.
        incumbent: the one to beat, with its throughput measured.
        leads: receives each candidate that becomes the incumbent.

    Attributes:
        incumbent: the one that leads.
        raced: all that raced, in order, the first incumbent among them.
    """

    def __init__(
        self,
        load_tests: LoadTests,
        predictor: Predictor,
        incumbent: CandidateState,
        leads: Callable[[CandidateState], None],
    ) -> None:
        self._load_tests = load_tests
        self._predictor = predictor
        self._leads = leads
        self._stack = contextlib.ExitStack()
        self.incumbent = incumbent
        self.raced = [incumbent]
        self._served: ServedCandidate | None = None

    def __enter__(self) -> Contest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def race(self, rival: CandidateState, rivals: int) -> Race | None:
        """Race a candidate against the incumbent, and learn from the ratio. None where one of the two failed.

        Args:
            rival: the candidate. It becomes the incumbent where it leads, or where the incumbent fails.
            rivals: number of rivals that share the error of the races.
        """
        incumbent = self.incumbent
        if self._served is None:
            self._served = self._stack.enter_context(self._load_tests.serve(incumbent, "race"))
        with contextlib.ExitStack() as own:
            rival_served = own.enter_context(self._load_tests.serve(rival, "race"))
            result = self._load_tests.race(incumbent, self._served, rival, rival_served, rivals=rivals)
            if all(rival is not each for each in self.raced):
                self.raced.append(rival)
            if result is not None:
                self._predictor.learn_race(incumbent.candidate, rival.candidate, result)
            if incumbent.fate == "failed" if result is None else result.rival_leads:
                self._stack.close()
                self._stack.enter_context(own.pop_all())
                self.incumbent, self._served = rival, rival_served
                self._leads(rival)
        return result

    @property
    def ranked(self) -> list[CandidateState]:
        """The incumbent, then the others that raced and did not fail, best first."""
        others = [state for state in self.raced if state is not self.incumbent and state.fate != "failed"]
        return [self.incumbent, *sorted(others, key=lambda state: -(state.throughput or 0.0))]
