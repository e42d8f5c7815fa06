"""The Pareto front of a search, and what is chosen from it: --prefer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from test_tune import BOTH, Load, answering, fates, searched

from rushhour.bundle import Bundle
from rushhour.engines import EngineConfig
from rushhour.errors import GoalError
from rushhour.measurement import Accuracy
from rushhour.plan import EngineName, Fate, Plan, Policy, Precision
from rushhour.tune import TuneSettings
from rushhour.tune.front import Rated, choice, front, measurably_worse, rated, smallest_first
from rushhour.tune.space import Candidate
from rushhour.tune.state import CandidateState

SIZES = {"reference": 11_000_000, "int8": 2_900_000, "prune-0.5": 3_000_000, "prune-0.5-int8": 800_000}


def state(
    bundle: str,
    accuracy: float | None,
    *,
    precision: Precision = "f32",
    engine: EngineName = "openvino",
    batch: int = 16,
    **known: Any,
) -> CandidateState:
    judged = (
        accuracy if accuracy is None else Accuracy("accuracy", accuracy, (0.0, 1.0), 100, "validation", 0.9 - accuracy)
    )
    candidate = Candidate(bundle, "0", engine, precision, Policy(1, 2, 1, max_batch=batch))
    return CandidateState(candidate, accuracy=judged, **known)


def found(states: list[CandidateState], winner: CandidateState, *, is_proven: bool = True) -> Any:
    def rate(each: CandidateState) -> Rated:
        return rated(each, winner, is_proven, lambda _: (90.0, 110.0), lambda of: (of.predicted or 0.0, (1.0, 9e9)))

    return front(states, winner, rate, SIZES.__getitem__)


def states() -> dict[str, CandidateState]:
    return {
        "winner": state("prune-0.5-int8", 0.893, precision="int8", capacity=6000.0, throughput=7000.0, fate="won"),
        "rival": state("int8", 0.898, precision="int8", throughput=3500.0, predicted=9000.0, fate="beaten"),
        "slow": state("int8", 0.898, precision="int8", engine="onnxruntime", predicted=1900.0, fate="dominated"),
        "whole": state("reference", 0.9, capacity=1500.0, fate="beaten"),
        "pruned": state("prune-0.5", 0.897, predicted=3300.0, fate="dominated"),
        "over": state("prune-0.5", 0.7, engine="onnxruntime", predicted=99_000.0, fate="over budget"),
        "failed": state("reference", None, engine="onnxruntime", fate="failed"),
    }


def test_the_front_has_what_nothing_within_the_budget_exceeds() -> None:
    each = states()
    points = found(list(each.values()), each["winner"])
    assert [(point.name.split(" on ")[0], point.kind, point.capacity_rps) for point in points] == [
        ("prune-0.5 in int8", "proven", 6000.0),
        ("prune-0.5 in f32", "predicted", 3300.0),
        ("int8", "estimated", 3000.0),
        ("f32", "estimated", 1500.0),
    ]
    assert [point.chosen for point in points] == [True, False, False, False]
    assert points[2].capacity_interval_rps is None, "half of the winner's throughput: no windows of its own"
    assert points[0].capacity_interval_rps is None, "proven"
    assert points[1].capacity_interval_rps == (1.0, 9e9)
    assert [point.model_bytes for point in points] == [800_000, 3_000_000, 2_900_000, 11_000_000]


def test_the_winner_is_on_the_front_even_where_a_prediction_exceeds_it() -> None:
    each = states()
    better = state("prune-0.5-int8", 0.899, precision="int8", engine="onnxruntime", predicted=8000.0, fate="dominated")
    points = found([*each.values(), better], each["winner"])
    assert [point.chosen for point in points] == [False, True, False]
    alike = state("prune-0.5-int8", 0.893, precision="int8", engine="onnxruntime", predicted=6000.0, fate="dominated")
    assert sum(point.capacity_rps == 6000.0 for point in found([*each.values(), alike], each["winner"])) == 1


def test_a_prediction_is_scaled_by_what_load_showed_of_the_winner() -> None:
    """The demo said that a plan "has the most requests per second" and that another, predicted, is faster."""
    each = states()
    each["winner"].predicted = 12_000.0  # load showed half of that
    better = state("prune-0.5-int8", 0.899, precision="int8", engine="onnxruntime", predicted=8000.0, fate="dominated")
    points = found([*each.values(), better], each["winner"])
    assert points[0].chosen
    assert {point.kind: point.capacity_rps for point in points}["predicted"] == 4000.0
    assert next(point for point in points if point.kind == "predicted").capacity_interval_rps == (0.5, 4.5e9)


def test_the_choice_says_why_not_its_neighbours() -> None:
    each = states()
    points = found(list(each.values()), each["winner"])
    said = choice(points, "capacity", "accuracy")
    assert said.startswith("of 4 points of the Pareto front, this one by capacity: it has the most requests per second")
    assert (
        "more accurate is prune-0.5 in f32 on OpenVINO, 2 streams (3,300/s predicted, 55% of its capacity, +0.40"
        in said
    )
    assert "3.00 MB against 0.80 MB" in said
    assert "smaller is" not in said, "nothing is"
    assert "faster is" not in said
    whole = tuple(msgspec.structs.replace(point, chosen=point.name.startswith("f32")) for point in points)
    said = choice(whole, "accuracy", "accuracy")
    assert "faster is int8 on OpenVINO, 2 streams (3,000/s estimated, 200% of its capacity, -0.20 points" in said
    assert "smaller is prune-0.5 in int8" in said
    assert choice(points[:1], "capacity", "accuracy").startswith("the only point of the Pareto front")
    assert choice((), "capacity", "accuracy") == ""


def test_the_smallest_models_that_are_predicted_fast_enough_are_tried_first() -> None:
    each = states()
    for name, rate in (("winner", 3000.0), ("rival", 6000.0), ("whole", 9000.0)):
        each[name].predicted = rate
    tried = smallest_first(list(each.values()), each["whole"], SIZES.__getitem__)
    assert [one.candidate.bundle for one in tried] == ["int8"], (
        "3,000 and 3,300 are below half, the rest is over budget"
    )
    each["winner"].predicted = 4600.0
    tried = smallest_first(list(each.values()), each["whole"], SIZES.__getitem__)
    assert [one.candidate.bundle for one in tried] == ["prune-0.5-int8", "int8"]
    assert smallest_first(list(each.values()), each["winner"], SIZES.__getitem__) == []


def test_what_is_measurably_less_accurate_is_found_by_paired_intervals() -> None:
    each, asked = states(), []

    def paired(one: CandidateState) -> Accuracy:
        asked.append(one.candidate.artefact)
        low = 0.001 if one.candidate.bundle == "prune-0.5" else -0.001
        return Accuracy("accuracy", 0.9, (0.8, 1.0), 100, "validation", 0.004, (low, 0.008))

    judged = [one for one in each.values() if one.accuracy is not None]
    again = state("prune-0.5", 0.897, batch=32)
    worse = measurably_worse([*judged, again], each["whole"], paired)
    assert [one for one, _ in worse] == [each["pruned"], each["over"], again]
    assert "0.40 points (0.10 to 0.80)" in worse[0][1]
    assert len(asked) == len(set(asked)) == 5, "each artefact once, the most accurate one not at all"


# In a search.


def by_size(size: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bundle, "model_bytes", property(lambda bundle: size[bundle.manifest.name]))


def chosen(plan: Plan) -> tuple[str, Fate]:
    assert plan.evidence is not None
    (point,) = [point for point in plan.evidence.front if point.chosen]
    (won,) = [trial for trial in plan.evidence.trials if trial.candidate == point.candidate and trial.fate == "won"]
    return plan.variants[0].bundle, won.fate


def test_the_plan_has_the_front_and_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_size({"tiny": 4000, "tiny-int8": 1000}, monkeypatch)
    plan = searched(tmp_path, Load(), monkeypatch, outputs=answering({"tiny-int8": {"validation": 1}}), budget="9%")
    assert chosen(plan) == ("bundles/int8", "won")
    assert plan.evidence is not None
    first, second = plan.evidence.front
    assert (first.kind, first.capacity_rps, first.model_bytes) == ("proven", plan.evidence.capacity_rps, 1000)
    assert (second.accuracy, first.accuracy) == (1.0, 0.99)
    assert second.capacity_rps == pytest.approx(1000, rel=0.1)
    assert plan.evidence.prefer == "capacity"
    assert f"more accurate is {second.name}" in plan.evidence.choice


def test_where_memory_is_preferred_the_smallest_model_with_half_of_the_capacity_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roles: dict[str, Precision] = {**BOTH, "small": "int8", "smaller": "int8"}
    by_size({"tiny": 4000, "tiny-int8": 1000, "tiny-small": 700, "tiny-smaller": 300}, monkeypatch)

    class Loaded(Load):
        """Load on small models that answer 0.6 and 0.4 of what is predicted."""

        def share(self, candidate: str) -> float:
            return 0.6 if candidate.startswith("small@") else 0.4 if candidate.startswith("smaller@") else 1.0

        def closed_window(self, _: object, candidate: str, __: object, **asked: Any) -> Any:
            window = super().closed_window(_, self.known(candidate), __, **asked)
            return msgspec.structs.replace(window, throughput_rps=self.share(candidate) * window.throughput_rps)

        def measure(self, _: object, candidate: str, __: object, slo: Any, **asked: Any) -> Any:
            rate = asked.pop("rate_rps")
            scaled = super().measure(_, self.known(candidate), __, slo, rate_rps=rate / self.share(candidate), **asked)
            return msgspec.structs.replace(scaled, rate_rps=rate)

        def known(self, candidate: str) -> str:
            return candidate.replace("smaller@", "int8@").replace("small@", "int8@")

    settings = TuneSettings(prefer="memory")
    plan = searched(tmp_path, Loaded(), monkeypatch, roles=roles, settings=settings, outputs=answering({}))
    assert plan.variants[0].bundle == "bundles/small"
    assert plan.evidence is not None
    assert 1500 < plan.evidence.capacity_rps <= 1800
    assert plan.evidence.proven
    said = [trial.why for trial in plan.evidence.trials if trial.fate == "not preferred"]
    assert said == ["memory is preferred: 1.67x the throughput, but 1,000 bytes against 700"]
    again = Loaded()
    assert searched(tmp_path, again, monkeypatch, roles=roles, settings=settings, outputs=answering({})).variants == (
        plan.variants
    )
    assert again.windows == 0


def test_where_accuracy_is_preferred_what_is_measurably_less_accurate_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {"tiny-int8": {"validation": 9, "test": 9}}
    settings = TuneSettings(prefer="accuracy")
    plan = searched(tmp_path / "a", Load(), monkeypatch, settings=settings, outputs=answering(wrong), budget="20%")
    assert plan.variants[0].bundle == "bundles/reference"
    fate, why = fates(plan)["int8/openvino/int8"]
    assert fate == "not preferred"
    assert "measurably less accurate than f32 on OpenVINO" in why
    assert plan.evidence is not None
    assert any(point.name.startswith("int8") for point in plan.evidence.front)
    few = {"tiny-int8": {"validation": 2, "test": 2}}
    plan = searched(tmp_path / "b", Load(), monkeypatch, settings=settings, outputs=answering(few), budget="20%")
    assert plan.variants[0].bundle == "bundles/int8", "two of a hundred are no measurable difference"


def test_where_the_most_accurate_is_not_the_reference_drops_are_measured_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A distilled network may be better than its teacher."""
    outputs: Callable[..., Any] = answering({"tiny": {"validation": 9, "test": 9}})

    def noted(bundle: Bundle, config: EngineConfig, *rest: Any, **more: Any) -> Any:
        answers = outputs(bundle, config, *rest, **more)
        return np.ascontiguousarray(answers)

    settings = TuneSettings(prefer="accuracy", keep=0.1)
    plan = searched(tmp_path, Load(), monkeypatch, settings=settings, outputs=noted, budget="20%")
    assert plan.variants[0].bundle == "bundles/int8"
    fate, why = fates(plan)["reference/openvino/f32"]
    assert fate == "not preferred"
    assert "9.00 points" in why


def test_an_unknown_preference_is_refused() -> None:
    with pytest.raises(GoalError, match=r"prefer='speed' is not known: .*; choose capacity, accuracy or memory"):
        TuneSettings(prefer="speed")  # type: ignore[arg-type]
