"""Cascades of two candidates: where a small one is sure it answers, and the rest goes on to the larger one.

After the search for a single variant, pairs of its candidates are tried:

    choose     a threshold from recorded outputs on the validation part     (`thresholds`)
    predict    the pair on simulated load, as one engine of both's times
    confirm    accuracy on the test part, paired with the reference
    race       under load, against the winner of the search
    measure    its capacity and its proof, as of any winner

The small one may be outside the accuracy budget alone: that is where a cascade gains most. The plan becomes a cascade
only where all of these say so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from rushhour.bundle import Bundle
from rushhour.capacity import Scenario, ServiceProfile, capacities, cascade_times, smallest_bound
from rushhour.cascade import CascadeRule, why_no_score
from rushhour.compress import judge, named_inputs, outputs_of, why_outside
from rushhour.data import Dataset, Split
from rushhour.goal import Goal
from rushhour.measurement import Accuracy, Measurement, ServiceTimes
from rushhour.plan import Certificate, FrontPoint, LadderStep, Plan, Trial
from rushhour.progress import Progress
from rushhour.task import are_probabilities
from rushhour.tune.accuracy import Part, judging_config
from rushhour.tune.answer import lowest_failing, operating_points, trial_of
from rushhour.tune.decisions import Decisions
from rushhour.tune.load_tests import LoadTests
from rushhour.tune.prediction import Predictor
from rushhour.tune.server import plan_of, variant_name
from rushhour.tune.settings import Budget
from rushhour.tune.space import Candidate, CascadeCandidate
from rushhour.tune.state import CandidateState, Sent, failure_reason
from rushhour.tune.thresholds import Threshold, choose_threshold

_SMALL, _LARGE = 4, 2
"""Candidates that are tried as the small and as the large one, at most."""
_FASTER = 1.5
"""The small one is predicted to carry so many times what the large one carries, at least: else nothing is gained."""
_GAIN = 1.05
"""A pair is tried under load where its predicted capacity is that of the winner times this, at least."""
_RACED = 2
"""Pairs that race the winner, at most."""
_SENT = 256
"""Samples that are sent to a pair under load."""
_STEP: Final = "cascade"


@dataclasses.dataclass
class Pair:
    """Two candidates as a cascade, and what is known of them.

    Attributes:
        small, large: the states of the two.
        threshold: chosen on the validation part; None where none keeps the budget.
        logits: whether their outputs are logits.
        cost: of a sample on the small one, over that on the large one.
        predicted: its capacity over that of the winner, both simulated alike.
        candidates: the two in the winner's layout, with the batch bound that is best for both together.
        state: of the pair as a candidate.
        test: its accuracy on the test part.
        why: it was not served.
    """

    small: CandidateState
    large: CandidateState
    threshold: Threshold | None = None
    logits: bool = False
    cost: float = 0.0
    predicted: float = 0.0
    candidates: tuple[Candidate, ...] = ()
    state: CandidateState | None = None
    test: Accuracy | None = None
    why: str = ""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.small.candidate.network}, then {self.large.candidate.network}"

    @property
    def why_faster(self) -> str:
        """In words: how much of the work the small one takes."""
        share = self.threshold.escalated if self.threshold is not None else 1.0
        return f"{1 - share:.0%} of the samples are answered by {self.small.candidate.network}"


class Cascades:
    """Tries cascades of two candidates of a search.

    Args:
        bundles: role -> bundle.
        dataset: validation chooses, test confirms.
        goal: the limits.
        reference: the candidate from which drops are measured.
        predictor: knows service times and the overhead of serving.
        load_tests: puts candidates under load.
        budget: of the search.
        decisions: receives what was decided.
        progress: receives each step.
        trusted: as in `open_engine`.

    Attributes:
        pairs: all that were looked at, in the order of their predictions.
    """

    def __init__(
        self,
        bundles: Mapping[str, Bundle],
        dataset: Dataset,
        goal: Goal,
        reference: Candidate,
        predictor: Predictor,
        load_tests: LoadTests | None,
        budget: Budget,
        decisions: Decisions,
        progress: Progress,
        trusted: tuple[str, ...] = (),
    ) -> None:
        self._bundles = bundles
        self._dataset = dataset
        self._goal = goal
        self._reference = reference
        self._predictor = predictor
        self._load_tests = load_tests
        self._budget = budget
        self._decisions = decisions
        self._progress = progress
        self._trusted = trusted
        self._outputs: dict[tuple[str, str], NDArray[Any]] = {}
        self.pairs: list[Pair] = []

    def better_than(
        self, winner: CandidateState, states: Sequence[CandidateState]
    ) -> tuple[Pair, Measurement | None] | None:
        """The cascade that carries more than the winner within the goal, with its proof; None where there is none.

        Args:
            winner: of the search, with its capacity.
            states: of all candidates.
        """
        self._progress.start("Cascades of two candidates: thresholds and predictions")
        why = self._why_none(winner)
        if not why:
            self.pairs = self.predicted(winner, states)
        worth = [pair for pair in self.pairs if pair.predicted >= _GAIN]
        self._decisions.note(
            _STEP,
            why or f"{len(self.pairs)} pairs of candidates: {_said(self.pairs)}",
            f"{len(worth)} are put under load" if worth else "the plan stays a single variant",
            f"a pair needs a threshold that keeps {self._goal.budget} and a prediction of {_GAIN:g} times the winner's",
        )
        self._progress.done(why or f"{len(worth)} of {len(self.pairs)} are worth a race")
        for number, pair in enumerate(worth[:_RACED]):
            if number and self._budget.left < Budget.FOR_STEPS:  # the first is what was asked for
                self._decisions.skipped(f"the cascade {pair.name}")
                break
            proof = self._measured(pair, winner) if self.propose(pair) else None
            if pair.why:
                self._decisions.note(
                    _STEP, f"{pair.name}: {pair.why}", "it is not served", "a cascade has to be faster"
                )
            if proof is not None:
                return pair, proof[0]
        return None

    def predicted(self, winner: CandidateState, states: Sequence[CandidateState]) -> list[Pair]:
        """All pairs with their thresholds and predictions, the best first."""
        pairs = []
        for small, large in self._combined(winner, states):
            pair = Pair(small, large)
            pairs.append(pair)
            try:
                self._predict(pair, winner)
            except Exception as error:  # of an engine; the other pairs go on
                pair.why = failure_reason(error)
            self._progress.advance(note=f"{pair.name}: {pair.why or f'{pair.predicted:.2f}x'}")
        return sorted(pairs, key=lambda pair: -pair.predicted)

    def _why_none(self, winner: CandidateState) -> str:
        (first, *_) = self._bundles[winner.candidate.bundle].manifest.signature.outputs
        why = why_no_score(self._dataset.task.kind, first.shape)
        return why or ("no capacity was measured to compare with" if not winner.capacity else "")

    def _combined(
        self, winner: CandidateState, states: Sequence[CandidateState]
    ) -> list[tuple[CandidateState, CandidateState]]:
        """The best candidate of each artefact as the small one; the winner, or what is more accurate, as the large."""
        best: dict[str, CandidateState] = {}
        for state in sorted(states, key=lambda state: -state.predicted_rps):
            usable = state.fate not in ("failed", "skipped") and state.candidate.engine != "torch"
            if usable and state.predicted_rps and state.accuracy is not None:
                best.setdefault(state.candidate.artefact, state)
        best[winner.candidate.artefact] = winner
        smalls = sorted(best.values(), key=lambda state: -state.predicted_rps)
        larges = sorted(best.values(), key=lambda state: -_accuracy(state))
        larges = [winner, *(state for state in larges if _accuracy(state) > _accuracy(winner))][:_LARGE]
        return [
            (small, large)
            for large in larges
            for small in [each for each in smalls if each.predicted_rps >= _FASTER * large.predicted_rps][:_SMALL]
        ]

    def _predict(self, pair: Pair, winner: CandidateState) -> None:
        """Choose its threshold, then its batch bounds and its capacity relative to the winner's by simulation."""
        small, large = (self.outputs(each.candidate, "validation") for each in (pair.small, pair.large))
        split = self._dataset.validation
        pair.logits = not are_probabilities(small[:100])
        pair.threshold = choose_threshold(
            variant_name(pair.small.candidate),
            *(small, large, self.outputs(self._reference, "validation")),
            split.targets if split.labelled else None,
            self._goal.budget.max_drop,
            logits=pair.logits,
        )
        if pair.threshold is None:
            pair.why = f"no threshold is shown to keep {self._goal.budget}"
            return
        candidates = [each.candidate.with_layout(*winner.candidate.layout) for each in (pair.small, pair.large)]
        small_times, large_times = (self._predictor.service_times(candidate) for candidate in candidates)
        of_pair = cascade_times(small_times, large_times, pair.threshold.escalated)
        together = self._simulated(candidates[1], of_pair)
        alone = self._simulated(winner.candidate, self._predictor.service_times(winner.candidate))
        bound = smallest_bound(together)
        pair.candidates = tuple(candidate.with_batch(bound) for candidate in candidates)
        pair.predicted = together[bound] / max(1e-9, max(alone.values()))
        fast, slow = (ServiceProfile(each).throughput(1, bound) for each in (small_times, large_times))
        pair.cost = slow / fast
        if pair.predicted < _GAIN:
            pair.why = f"a sample costs {pair.cost:.0%} on the small one of what it costs on the large one"

    def propose(self, pair: Pair) -> bool:
        """Confirm the accuracy of a pair with a threshold on the test part, and make it a candidate; false if not."""
        threshold, (small, large) = pair.threshold, pair.candidates
        assert threshold is not None
        bundle = self._bundles[small.bundle]
        output = bundle.manifest.signature.outputs[0].name
        rule = CascadeRule((threshold.step,), variant_name(large), output, pair.logits, (threshold.escalated,))
        pair.test = self._judged(rule, pair, "test")
        outside = why_outside(pair.test, self._goal.budget)
        if outside:
            pair.why = outside
            return False
        candidate = CascadeCandidate(
            **msgspec.structs.asdict(large), small=small, small_hash=bundle.manifest.hash, rule=rule
        )
        accuracy, sent = self._judged(rule, pair, "validation"), self._sent(rule, pair)
        pair.state = CandidateState(candidate, accuracy=accuracy, sent=sent)
        return True

    def _sent(self, rule: CascadeRule, pair: Pair) -> Sent:
        """Samples for its load tests, of which as large a share goes on as of the whole validation part.

        What a cascade carries depends on what it is sent. A bundle's own samples are few, and of the training part, of
        which a network is surer than of what its users will send.
        """
        on = rule.goes_on(0, self.outputs(pair.small.candidate, "validation"))
        order = np.argsort(on, kind="stable")
        chosen = order[np.linspace(0, len(order) - 1, min(_SENT, len(order))).round().astype(np.intp)]
        bundle = self._bundles[pair.large.candidate.bundle]
        return Sent(named_inputs(bundle, self._dataset.validation.inputs[chosen]))

    def _judged(self, rule: CascadeRule, pair: Pair, part: Part) -> Accuracy:
        split: Split = getattr(self._dataset, part)
        small, large = (self.outputs(each.candidate, part) for each in (pair.small, pair.large))
        answers, _ = rule.merged((small, large))
        return judge(self._dataset.task, part, split.targets, answers, self.outputs(self._reference, part))

    def _simulated(self, candidate: Candidate, times: ServiceTimes) -> dict[int, float]:
        """The capacity with each batch bound, with the overhead of serving that is known of its layout."""
        overhead, profile = self._predictor.overhead(candidate), ServiceProfile(times)
        scenarios = [Scenario(profile, candidate.streams, bound, overhead) for bound in times.batch_sizes]
        return dict(zip(times.batch_sizes, capacities(scenarios, self._goal.slo).tolist(), strict=True))

    def outputs(self, candidate: Candidate, part: Part) -> NDArray[Any]:
        """The answers of a candidate's artefact on a part of the data, computed once; shape `(n, classes)`."""
        key = candidate.artefact, part
        if key not in self._outputs:
            bundle, split = self._bundles[candidate.bundle], getattr(self._dataset, part)
            self._outputs[key] = outputs_of(bundle, judging_config(candidate), split, trusted=self._trusted)
        return self._outputs[key]

    def _measured(self, pair: Pair, winner: CandidateState) -> tuple[Measurement | None] | None:
        """Race it against the winner, and measure its capacity; its proof, or None where it does not carry more."""
        state, load_tests = pair.state, self._load_tests
        assert state is not None
        assert load_tests is not None
        state.predicted = pair.predicted * (winner.capacity or 0.0)
        fate, why = winner.fate, winner.why
        if winner.throughput is None and not load_tests.measure_throughput(winner):
            return None
        with load_tests.serve(winner, "race") as ours, load_tests.serve(state, "race") as theirs:
            result = load_tests.race(winner, ours, state, theirs)
        winner.fate, winner.why = fate, why
        # Where the time was up before a significant result, the interval has to be above 1; its capacity decides then.
        if result is None or not result.rival_leads or result.interval[0] <= 1:
            pair.why = state.why or f"not faster than the winner under load: {result}"
            return None
        load_tests.estimate_capacity(state)
        proof = load_tests.confirm(state) if state.capacity and state.fate is None else None
        gained = (state.capacity or 0.0) > (winner.capacity or 0.0) and state.fate is None
        if not gained:
            pair.why = f"{state.capacity or 0:,.0f}/s under load, no more than {winner.capacity or 0:,.0f}/s"
            return None
        self._decisions.note(
            _STEP,
            f"{pair.name}: {state.capacity or 0:,.0f}/s, the single variant {winner.capacity or 0:,.0f}/s",
            "the plan is this cascade",
            "the higher capacity under load within the same budget",
        )
        return (proof,)


def cascade_plan(
    single: Plan, pair: Pair, proof: Measurement | None, bundles: Mapping[str, Bundle], load_tests: LoadTests
) -> Plan:
    """The plan that serves a cascade, in place of the best single variant.

    Args:
        single: the plan of that variant, with its evidence.
        pair: the cascade, measured.
        proof: of its capacity; None where that is an estimate.
        bundles: role -> bundle.
        load_tests: that measured it.
    """
    state, accuracy, found = pair.state, pair.test, single.evidence
    assert state is not None
    assert accuracy is not None
    assert found is not None
    both = [bundles[candidate.bundle] for candidate in (pair.small.candidate, pair.large.candidate)]
    capacity = state.capacity or 0.0
    why = "the highest confirmed rate" if proof is not None else f"the highest estimate: {state.why}"
    state.end("won", f"{why}; {pair.why_faster}")
    estimate = load_tests.estimate(state)
    interval = estimate.interval_rps if estimate is not None else None
    model_bytes = sum(bundle.model_bytes for bundle in both)
    own = FrontPoint(
        candidate=str(state.candidate),
        name=state.candidate.name,
        kind="proven" if proof is not None else "estimated",
        capacity_rps=capacity,
        capacity_interval_rps=None if proof is not None else interval,
        accuracy=state.accuracy.value if state.accuracy is not None else accuracy.value,
        accuracy_drop=state.accuracy.drop if state.accuracy is not None else accuracy.drop,
        accuracy_drop_interval=state.accuracy.drop_interval if state.accuracy is not None else accuracy.drop_interval,
        model_bytes=model_bytes,
        chosen=True,
    )
    others = tuple(msgspec.structs.replace(point, chosen=False) for point in found.front)
    evidence = msgspec.structs.replace(
        found,
        capacity_rps=capacity,
        lowest_failing_rps=lowest_failing(state),
        p99_ms=proof.p99_ms if proof is not None else None,
        p99_interval_ms=proof.p99_interval_ms if proof is not None else None,
        accuracy=accuracy.value,
        accuracy_interval=accuracy.interval,
        accuracy_drop=accuracy.drop,
        accuracy_drop_interval=accuracy.drop_interval,
        parameters=sum(bundle.manifest.parameters for bundle in both),
        model_bytes=model_bytes,
        trials=(trial_of(state), *(_behind(trial, state) for trial in found.trials)),
        ladder=(*found.ladder, _last_step(state)),
        proven=proof is not None,
        capacity_interval_rps=interval,
        alone_rps=None,
        front=tuple(sorted((own, *others), key=lambda point: -point.capacity_rps)),
        choice=f"a cascade carries more than the best single variant: {pair.why_faster}",
        service_times=None,
        decisions=load_tests.decisions.made,
        certificate=_without_cascades(found.certificate),
    )
    plan = plan_of(state.candidate, bundles[state.candidate.bundle], single.goal, single.model)
    points = operating_points(state.windows, " then ".join(plan.cascade.variants) if plan.cascade is not None else "")
    return msgspec.structs.replace(plan, operating_points=points, evidence=evidence, feasible=True)


def _behind(trial: Trial, state: CandidateState) -> Trial:
    if trial.fate != "won":
        return trial
    return msgspec.structs.replace(trial, fate="beaten", why=f"a cascade is faster: {state.candidate.name}")


def _last_step(state: CandidateState) -> LadderStep:
    value = state.accuracy.value if state.accuracy is not None else None
    return LadderStep(
        "cascaded", str(state.candidate), state.capacity or 0.0, state.p99_ms, value, state.candidate.name
    )


def _without_cascades(certificate: Certificate | None) -> Certificate | None:
    """The certificate is that of the search for a single variant."""
    if certificate is None:
        return None
    words = "cascades: the plan is one, and the bound is that of the best single variant in it"
    return msgspec.structs.replace(certificate, not_covered=(*certificate.not_covered, words))


def _accuracy(state: CandidateState) -> float:
    return state.accuracy.value if state.accuracy is not None else 0.0


def _said(pairs: Sequence[Pair]) -> str:
    """The first few pairs in words."""
    said = []
    for pair in pairs[:3]:
        share = f"{pair.threshold.escalated:.0%} go on, " if pair.threshold is not None else ""
        said.append(f"{pair.name} ({share}predicted {pair.predicted:.2f}x{f': {pair.why}' if pair.why else ''})")
    return "; ".join(said) or "none is worth looking at"
