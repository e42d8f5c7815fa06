"""What is timed before any load: the engines, the most promising first, as long as the time allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from rushhour.progress import Progress
from rushhour.system.machine import cores
from rushhour.tune.decisions import Decisions
from rushhour.tune.prediction import Predictor
from rushhour.tune.settings import Allowance, Budget
from rushhour.tune.space import Candidate, other_layouts
from rushhour.tune.state import CandidateState, failure_reason

_MOST_TIMED: Final = 24
"""Engines that are timed in other layouts, at most."""
_NO_TIME: Final = "no time left to time its engine"


class Timing:
    """Times engines, and predicts from the times.

    Args:
        predictor: has the times.
        budget: of the search.
        size: of the model of a role, in bytes: small ones are fast.
        progress: receives each engine.
        decisions: receives what followed.
    """

    def __init__(
        self,
        predictor: Predictor,
        budget: Budget,
        size: Callable[[str], int],
        progress: Progress,
        decisions: Decisions,
    ) -> None:
        self._predictor = predictor
        self._budget = budget
        self._size = size
        self._progress = progress
        self._decisions = decisions

    def first(self, states: Sequence[CandidateState], plain: Candidate) -> None:
        """Time each engine alone, in the basic layouts of the cores.

        The most promising one and the plain reference are timed however little time there is.

        Args:
            states: of all candidates.
            plain: the reference compiled and otherwise unchanged.
        """
        ordered = sorted(states, key=lambda state: self._promise(state.candidate))
        needed = [*ordered[:1], *(state for state in ordered[1:] if state.candidate.artefact == plain.artefact)][:2]
        ordered = [*needed, *(state for state in ordered if all(state is not each for each in needed))]
        self._time(ordered, "Timing each engine alone", self._budget.allow(Budget.FOR_TIMING), at_least=2)

    def _promise(self, candidate: Candidate) -> tuple[int, int, bool, str]:
        """The least is the most promising: a batch for each core, a small model, OpenVINO."""
        cells, _, threads = candidate.layout
        layout = 2 * (threads > 1) + (cells > 1)
        return layout, self._size(candidate.bundle), candidate.engine != "openvino", str(candidate)

    def widen(self, states: Sequence[CandidateState], keep: float) -> list[CandidateState]:
        """Time the promising artefacts in all other layouts of the cores, as many as can be timed soon.

        Args:
            states: of all candidates.
            keep: an artefact predicted below this share of the best prediction is not promising.

        Returns:
            The new candidates.
        """
        if self._budget.left < Budget.FOR_PROOF:
            return []
        best: dict[str, CandidateState] = {}
        for state in sorted((s for s in states if s.fate is None), key=lambda s: -s.predicted_rps):
            best.setdefault(state.candidate.artefact, state)
        top = max((state.predicted_rps for state in best.values()), default=0.0)
        new: list[CandidateState] = []
        for state in best.values():
            layouts = other_layouts(state.candidate, cores())
            engines = {each.compiled for each in layouts} | {each.candidate.compiled for each in new}
            if state.predicted_rps >= keep * top and len(engines) <= _MOST_TIMED:
                new += [CandidateState(each, accuracy=state.accuracy) for each in layouts]
        if new:
            what = "Timing promising engines in other layouts"
            self._time(new, what, self._budget.allow(Budget.FOR_WIDENING), at_least=0)
        return [state for state in new if state.fate != "skipped"]

    def _time(self, states: Sequence[CandidateState], what: str, time: Allowance, *, at_least: int) -> None:
        """Service times of each engine alone, in this order, and the predictions from them."""
        self._progress.start(what, len(states))
        known: set[str] = set()
        for state in states:
            compiled = state.candidate.compiled
            if len(known) >= at_least and compiled not in known and time.is_spent:
                state.end("skipped", _NO_TIME)
                self._progress.advance()
                continue
            try:
                times = self._predictor.service_times(state.candidate)
            except Exception as error:  # an engine may fail in any way on a user's graph
                state.end("failed", failure_reason(error))
                self._progress.advance(note=f"{state.candidate.artefact}: {state.why}")
                continue
            known.add(compiled)
            self._progress.advance(note=f"{compiled}: {max(times.throughput):,.0f}/s")
        self._predictor.choose_batches([state for state in states if state.fate is None])
        best = max((state.predicted_rps for state in states), default=0.0)
        self._decisions.timed(states)
        skipped = sum(state.fate == "skipped" for state in states)
        left_out = f"; {skipped} not timed: the time is short" if skipped else ""
        said = f"best prediction {best:,.0f} requests/s of {self._predictor.policies:,} policies{left_out}"
        self._progress.done(said)
