"""Cascades of two candidates: which pair is worth a race, and when the plan becomes one."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from test_thresholds import world

from rushhour.bundle import Bundle
from rushhour.capacity import Overhead
from rushhour.clock import VirtualClock
from rushhour.data import Dataset, Split
from rushhour.data.arrays import from_splits
from rushhour.goal import SLO, AccuracyBudget, Goal
from rushhour.load import Race
from rushhour.measurement import Accuracy, ServiceTimes
from rushhour.plan import Certificate, Evidence, FrontPoint, Plan, Policy, Trial
from rushhour.progress import Silent
from rushhour.system.machine import describe
from rushhour.task import Task
from rushhour.testing.bundles import tiny_bundle
from rushhour.tune.cascades import Cascades, cascade_plan
from rushhour.tune.decisions import Decisions
from rushhour.tune.server import plan_of
from rushhour.tune.settings import Budget
from rushhour.tune.space import Candidate, CascadeCandidate
from rushhour.tune.state import CandidateState, Sent

GOAL = Goal(SLO.parse("p99<50ms"), AccuracyBudget.parse("1%"))


class Times:
    """A predictor that knows service times: of the small one, `cost` times those of the large one."""

    def __init__(self, cost: float) -> None:
        self.cost = cost

    def service_times(self, candidate: Candidate) -> ServiceTimes:
        share = self.cost if candidate.bundle == "small" else 1.0
        sizes = (1, 2, 4, 8)
        seconds = tuple(share * (0.0005 + 0.001 * size) for size in sizes)
        return ServiceTimes(sizes, seconds, tuple(2 * n / s for n, s in zip(sizes, seconds, strict=True)))

    def overhead(self, candidate: Candidate) -> Overhead:
        return Overhead()


class Loads:
    """Load tests whose results are known."""

    def __init__(self, order: str, capacity: float) -> None:
        self.order, self.capacity = order, capacity
        self.raced: list[Candidate] = []

    def serve(self, state: CandidateState, phase: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def race(self, incumbent: CandidateState, ours: None, rival: CandidateState, theirs: None) -> Race:
        self.raced.append(rival.candidate)
        (incumbent if self.order == "faster" else rival).end("beaten", "by a race")
        low = 1.4 if self.order == "faster" else 0.9
        return Race(self.order, 1.5, (low, 1.6), 10, (1000.0, 1500.0))  # type: ignore[arg-type]

    def estimate_capacity(self, state: CandidateState) -> None:
        state.capacity = self.capacity

    def confirm(self, state: CandidateState) -> None:
        return None

    def estimate(self, state: CandidateState) -> None:
        return None

    @property
    def decisions(self) -> Decisions:
        return Decisions()


class Run:
    def __init__(self, folder: Path, *, cost: float = 0.1, loads: Loads | None = None, skill: float = 1.6) -> None:
        part = world(12_000, 3, small=skill)
        names = tuple(f"class {at}" for at in range(part.small.shape[1]))
        inputs = np.zeros((len(part.labels), 4, 4, 1), np.uint8)
        inputs[:, 0, :2, 0] = np.arange(len(inputs)).astype("<u2").view(np.uint8).reshape(-1, 2)  # they differ
        halves = [slice(0, 6000), slice(6000, None)]
        splits = [Split(inputs[half], part.labels[half]) for half in halves]
        self.data: Dataset = from_splits("simulated", splits[0], splits[0], splits[1], names)
        self.bundles: dict[str, Bundle] = {
            name: tiny_bundle(folder / "bundles" / name, name=name, classes=len(names), seed=at)
            for at, name in enumerate(("reference", "small"))
        }
        accuracies = [(outputs.argmax(axis=1) == part.labels).mean() for outputs in (part.large, part.small)]
        self.states = [
            self._state(*each) for each in zip(self.bundles, accuracies, (1000.0, 1000.0 / cost), strict=True)
        ]
        self.winner = self.states[0]
        self.winner.capacity = self.winner.throughput = 1000.0
        self.decisions = Decisions()
        self.loads = loads or Loads("faster", 1500.0)
        self.cascades = Cascades(
            *(self.bundles, self.data, GOAL, self.winner.candidate, Times(cost), self.loads),  # type: ignore[arg-type]
            *(Budget(None, VirtualClock()), self.decisions, Silent()),
        )
        for state, outputs in zip(self.states, (part.large, part.small), strict=True):
            for name, half in zip(("validation", "test"), halves, strict=True):
                self.cascades._outputs[state.candidate.artefact, name] = outputs[half]

    def _state(self, bundle: str, accuracy: float, rate: float) -> CandidateState:
        candidate = Candidate(bundle, "0", "openvino", "f32", Policy(1, 2, 1, max_batch=8))
        found = Accuracy("accuracy", float(accuracy), (0.0, 1.0), 6000, "validation")
        fate: Any = "over budget" if bundle == "small" else None
        return CandidateState(candidate, accuracy=found, predicted=rate, fate=fate)

    def found(self) -> Any:
        return self.cascades.better_than(self.winner, self.states)


def test_a_small_network_outside_the_budget_makes_a_faster_plan_inside_it(tmp_path: Path) -> None:
    run = Run(tmp_path)
    pair, proof = run.found()
    assert proof is None
    candidate = pair.state.candidate
    assert isinstance(candidate, CascadeCandidate)
    assert run.loads.raced == [candidate]
    assert pair.test.drop_interval[1] <= 0.01, "confirmed on the part that chose nothing"
    share = pair.threshold.escalated
    assert 0.02 < share < 0.5
    assert pair.predicted == pytest.approx(1 / (0.1 + share), rel=0.15)
    assert run.winner.fate is None, "the search goes on to report it"
    assert [step.decided for step in run.decisions.made] == ["1 are put under load", "the plan is this cascade"]


def test_under_load_as_many_samples_go_on_as_of_the_data(tmp_path: Path) -> None:
    """It was sent 32 requests of the bundle's own samples, of the training part: what it carried was chance."""
    run = Run(tmp_path)
    pair, _ = run.found()
    (images,) = pair.state.sent.samples.values()
    rows = images[:, 0, :2, 0].copy().view("<u2").ravel()
    assert len(rows) == len(set(rows.tolist())) == 256
    assert (run.data.validation.inputs[rows] == images).all()
    on = pair.state.candidate.rule.goes_on(0, run.cascades._outputs[run.states[1].candidate.artefact, "validation"])
    assert on[rows].mean() == pytest.approx(pair.threshold.escalated, abs=1 / 256)
    assert run.winner.sent is None


def test_other_samples_are_another_measurement() -> None:
    ones, twos = (Sent({"image": np.full((2, 3), value)}) for value in (1, 2))
    assert ones.content_key == Sent({"image": np.full((2, 3), 1)}).content_key
    assert len({ones.content_key, twos.content_key, Sent({"picture": np.full((2, 3), 1)}).content_key}) == 3


def test_its_plan_can_be_saved_and_names_both_bundles(tmp_path: Path) -> None:
    run = Run(tmp_path)
    pair, _ = run.found()
    plan = plan_of(pair.state.candidate, run.bundles["reference"], GOAL, "simulated")
    plan.save(tmp_path / "plan.json")
    read = Plan.load(tmp_path / "plan.json")
    assert read == plan
    assert read.cascade is not None
    assert read.cascade.variants == ("small-openvino-f32", "reference-openvino-f32")
    assert [variant.bundle for variant in read.variants] == ["bundles/reference", "bundles/small"], "the safe one first"
    assert read.policy.deadline_ms == 50
    names = {str(pair.state.candidate), str(run.winner.candidate), str(run.states[1].candidate)}
    assert len(names) == 3, "its measurements are its own"
    assert "cascade of" in pair.state.candidate.name


def test_no_pair_is_served_where_the_small_one_costs_too_much_and_the_arithmetic_is_said(tmp_path: Path) -> None:
    run = Run(tmp_path, cost=0.6, skill=1.0)
    assert run.found() is None
    assert run.loads.raced == []
    (pair,) = run.cascades.pairs
    assert pair.predicted < 1.05
    assert "60%" in pair.why
    assert run.decisions.made[-1].decided == "the plan stays a single variant"


@pytest.mark.parametrize("loads", [Loads("tie", 0.0), Loads("faster", 900.0)], ids=["tie", "no more"])
def test_the_plan_stays_where_load_does_not_confirm_it(tmp_path: Path, loads: Loads) -> None:
    run = Run(tmp_path, loads=loads)
    assert run.found() is None
    assert len(loads.raced) == 1
    assert run.winner.fate is None
    assert run.decisions.made[-1].decided == "it is not served"


def test_a_task_without_a_score_is_left_with_the_reason(tmp_path: Path) -> None:
    run = Run(tmp_path)
    object.__setattr__(run.data, "task", Task(kind="regression", outputs=6))
    assert run.found() is None
    assert "does not say how sure it is" in run.decisions.made[-1].seen


def test_the_plan_of_a_cascade_takes_the_place_of_the_best_single_one(tmp_path: Path) -> None:
    run = Run(tmp_path)
    pair, proof = run.found()
    candidate = run.winner.candidate
    policy = candidate.policy
    trial = Trial(
        *(str(candidate), "reference", "openvino", "f32", policy, 0.9, 0.0, (0.0, 0.0), 1000.0, 1000.0, None),
        *("won", "the highest estimate"),
    )
    point = FrontPoint(
        *(str(candidate), candidate.name, "estimated", 1000.0, None, 0.9, 0.0, (0.0, 0.0), 10, True),
    )
    certificate = Certificate("a statement", 1, 1, 1, 1, 1, (), 1, None, None, 0.95, None, 0)
    evidence = Evidence(
        *(1000.0, None, None, None, "accuracy", 0.9, (0.8, 0.95), 0.0, (0.0, 0.0), 0.9, (0.8, 0.95), 10.0, None),
        *(5, 10, 5, 10, describe(), "2026-11-30T00:00:00+00:00", (trial,)),
        front=(point,),
        certificate=certificate,
    )
    single = plan_of(candidate, run.bundles["reference"], GOAL, "simulated")
    single = msgspec.structs.replace(single, evidence=evidence)
    plan = cascade_plan(single, pair, proof, run.bundles, run.loads)  # type: ignore[arg-type]
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.cascade == pair.state.candidate.rule
    assert plan.model == "simulated"
    found = plan.evidence
    assert found is not None
    assert (found.capacity_rps, found.proven, found.service_times) == (1500.0, False, None)
    assert found.accuracy_drop_interval == pair.test.drop_interval
    assert [each.fate for each in found.trials] == ["won", "beaten"]
    assert [each.chosen for each in found.front] == [True, False]
    assert found.ladder[-1].step == "cascaded"
    assert found.model_bytes == sum(bundle.model_bytes for bundle in run.bundles.values())
    assert found.certificate is not None
    assert "cascades" in found.certificate.not_covered[-1]
    assert "of the samples are answered by small in f32 on OpenVINO" in found.choice
