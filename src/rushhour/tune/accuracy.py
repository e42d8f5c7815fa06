"""Accuracy: each compiled artefact on held-out data, compared with the reference on the same samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from numpy.typing import NDArray

from rushhour.bundle import Bundle
from rushhour.compress import judge, outputs_of, too_few, why_outside
from rushhour.data import Dataset, Split
from rushhour.engines import EngineConfig
from rushhour.goal import AccuracyBudget
from rushhour.measurement import Accuracy
from rushhour.plan import Fate
from rushhour.progress import Progress
from rushhour.records.journal import Journal
from rushhour.system.machine import cores
from rushhour.tune.measuring import MeasurementSource
from rushhour.tune.settings import Allowance
from rushhour.tune.space import Candidate, torch_code
from rushhour.tune.state import CandidateState, failure_reason

Part = Literal["validation", "test"]


class AccuracyJudge:
    """Measures the accuracy of candidates, and ends those outside the budget.

    Args:
        journal: of the measurements.
        bundles: role -> bundle.
        dataset: validation decides, test confirms.
        budget: of the accuracy drop.
        reference: the candidate from which drops are measured.
        progress: receives each step.
        trusted: as in `open_engine`.
        source: knows the accuracies; None to run the engines of this machine.
    """

    def __init__(
        self,
        journal: Journal,
        bundles: Mapping[str, Bundle],
        dataset: Dataset,
        budget: AccuracyBudget,
        reference: Candidate,
        progress: Progress,
        trusted: tuple[str, ...],
        source: MeasurementSource | None = None,
    ) -> None:
        self._journal = journal
        self._bundles = bundles
        self._dataset = dataset
        self._budget = budget
        self._reference = reference
        self._progress = progress
        self._trusted = trusted
        self._source = source
        self._reference_outputs: dict[str, NDArray[Any]] = {}

    def validate(self, states: Sequence[CandidateState], time: Allowance) -> None:
        """Measure each artefact on the validation part, and end those not shown inside the budget.

        Args:
            states: of all candidates.
            time: that it may take, about. The artefact with the best prediction and the reference are measured anyway.
        """
        alive = sorted(
            (state for state in states if state.fate is None), key=lambda state: state.predicted_rps, reverse=True
        )
        known = {self._reference.artefact, *(state.candidate.artefact for state in alive[:1])}
        self._progress.start("Measuring accuracy on the validation part", len(alive))
        for state in alive:
            if state.candidate.artefact not in known and time.is_spent:
                self._leave(state)
                continue
            known.add(state.candidate.artefact)
            try:
                state.accuracy = self.accuracy(state.candidate, "validation")
            except Exception as error:  # an engine may fail, or answer with values that are not finite
                state.end("failed", failure_reason(error))
                self._progress.advance()
                continue
            if why := why_outside(state.accuracy, self._budget):
                state.end("over budget", why)
            self._progress.advance(note=f"{state.candidate.artefact}: {state.accuracy.value:.4f}")
        inside = sum(state.fate is None for state in alive)
        short = too_few(self._dataset.task, "validation", self._dataset.validation, self._budget)
        note = f"{inside} of {len(alive)} candidates inside {self._budget}"
        self._progress.done(f"{note}; {short}" if short else note, good=not short)

    def _leave(self, *states: CandidateState) -> None:
        """The time is up before their accuracy is known."""
        for state in states:
            state.is_judged = False
            state.end("skipped", "no time left to measure its accuracy")
            self._progress.advance()

    def confirm(self, states: Sequence[CandidateState], keep: float, time: Allowance) -> None:
        """Measure each artefact on the test part, once: the smallest drop first, up to the first outside the budget.

        In such a fixed sequence each is tested at the level of one test, and the error of all together is that of one
        (Maurer, Hothorn and Lehmacher 1995). So the winner under load is inside the budget already, and an artefact
        that misses here has one with a smaller drop to replace it.

        Args:
            states: of all candidates.
            keep: an artefact whose prediction is below this share of that of one with a smaller drop is not measured.
            time: that it may take, about. The artefact with the best prediction and the reference are measured anyway.
        """
        by_artefact: dict[str, list[CandidateState]] = {}
        for state in states:
            if state.fate is None:
                by_artefact.setdefault(state.candidate.artefact, []).append(state)

        def upper_drop(group: list[CandidateState]) -> float:
            accuracy = group[0].accuracy
            return accuracy.drop_interval[1] if accuracy is not None else 0.0

        self._progress.start("Confirming accuracy on the test part", len(by_artefact))
        fastest, missed = 0.0, ""
        best = max(
            (state for state in states if state.fate is None), key=lambda state: state.predicted_rps, default=None
        )
        needed = {self._reference.artefact, *([] if best is None else [best.candidate.artefact])}
        fate: Fate
        for group in sorted(by_artefact.values(), key=upper_drop):
            candidate, rate = group[0].candidate, max(state.predicted_rps for state in group)
            if candidate.artefact not in needed and time.is_spent:
                self._leave(*group)
                continue
            self._progress.advance()
            if rate < keep * fastest:
                fate = "dominated"
                why = f"predicted {rate:,.0f}/s; an artefact with a smaller accuracy drop is predicted {fastest:,.0f}/s"
            elif missed:
                fate = "over budget"
                why = f"not measured on the test part: {missed} has a smaller accuracy drop and misses the budget there"
            else:
                try:
                    fate, why = "over budget", why_outside(self.accuracy(candidate, "test"), self._budget)
                    missed = candidate.artefact if why else ""
                except Exception as error:  # as in `validate`; it says nothing of the other artefacts
                    fate, why = "failed", failure_reason(error)
            if not why:
                fastest = max(fastest, rate)
                continue
            for state in group:
                state.end(fate, why)
        note = f"{missed} misses {self._budget} there" if missed else "all are inside the budget"
        self._progress.done(note, good=not missed)

    def accuracy(self, candidate: Candidate, part: Part) -> Accuracy:
        """The accuracy of a candidate's artefact on a part of the data.

        Raises:
            RushhourError: if the engine cannot run it. Engines raise other errors, too.
        """
        source = self._source
        return self._journal.measure(
            "accuracy",
            candidate.artefact,
            part,
            Accuracy,
            self._judge if source is None else lambda **_: source.accuracy(candidate, part),
            bundle=self._bundles[candidate.bundle],
            config=judging_config(candidate),
            code=torch_code(candidate, self._bundles[candidate.bundle], self._trusted),
            reference=self._bundles[self._reference.bundle],
            beside=judging_config(self._reference),
            data=self._dataset,
            part=part,
        )

    def _judge(
        self,
        bundle: Bundle,
        config: EngineConfig,
        code: dict[str, str],
        reference: Bundle,
        beside: EngineConfig,  # of the reference; its name is part of the key in the journal
        data: Dataset,
        part: Part,
    ) -> Accuracy:
        split: Split = getattr(data, part)
        if part not in self._reference_outputs:
            self._reference_outputs[part] = outputs_of(reference, beside, split, trusted=self._trusted)
        expected = self._reference_outputs[part]
        if (bundle, config) == (reference, beside):
            return judge(data.task, part, split.targets, expected, None, split.groups)
        outputs = outputs_of(bundle, config, split, trusted=self._trusted)
        return judge(data.task, part, split.targets, outputs, expected, split.groups)


def judging_config(candidate: Candidate) -> EngineConfig:
    """How an artefact is opened to measure its accuracy."""
    return EngineConfig(candidate.engine, candidate.precision, streams=cores(), threads=1, max_batch=64)
