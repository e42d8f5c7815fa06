"""Predictions of capacities: what a few measurements under load tell about candidates that were not measured."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rushhour.goal import SLO
from rushhour.load import Race
from rushhour.measurement import Measurement, Outcome, Priors, ServiceTimes
from rushhour.plan import EngineName, Policy
from rushhour.records.journal import Journal
from rushhour.tune.engine_times import EngineTimes
from rushhour.tune.overheads import batch_seconds
from rushhour.tune.prediction import Predictor
from rushhour.tune.residuals import Residuals
from rushhour.tune.space import Candidate
from rushhour.tune.state import CandidateState

SLO_ = SLO.parse("p99<50ms")
ENGINE_S = {
    "int8/openvino": 100e-6,
    "int8/onnxruntime": 180e-6,
    "reference/openvino": 350e-6,
    "reference/onnxruntime": 500e-6,
}
"""CPU seconds of a sample in a full batch, the engine alone."""
REQUEST_S, SLOWDOWN = 90e-6, 1.35
"""What the host does: seconds of a request beside the engine, and how much slower batches are in a server."""


def kind(candidate: Candidate) -> str:
    return f"{candidate.bundle}/{candidate.engine}"


def most(candidate: Candidate) -> float:
    """The rate at which it takes both cores, in batches of 16."""
    beside_s = 2 * batch_seconds(candidate) / candidate.streams / 16
    return 2 / (SLOWDOWN * (ENGINE_S[kind(candidate)] + beside_s) + REQUEST_S)


class NumberTimes(EngineTimes):
    """Service times are numbers: a batch costs a little, and each sample."""

    host = 1.0
    """The speed of the host now."""

    def timed(self, candidate: Candidate) -> ServiceTimes:
        sizes = (1, 2, 4, 8, 16)
        self._speeds.setdefault((candidate.compiled, candidate.policy.max_batch), self.host)
        speed = self._speeds[candidate.compiled, candidate.policy.max_batch]
        per_stream = ENGINE_S[kind(candidate)] * candidate.streams / 2 / speed
        seconds = tuple(per_stream * (size + 1) * 16 / 17 for size in sizes)
        return ServiceTimes(
            sizes, seconds, tuple(candidate.streams * n / s for n, s in zip(sizes, seconds, strict=True))
        )


class Timed(Predictor):
    """Predicts from numbers."""

    def __init__(self, *given: Any, priors: Priors | None = None) -> None:
        self.numbers = NumberTimes(*given)
        super().__init__(self.numbers, priors)


def window(rate: float, highest: float, speeds: tuple[float, ...]) -> Measurement:
    """One of a server that answers `highest` at most."""
    late = round(1000 * max(0.0, 1 - highest / rate))
    busy = 2 * min(1.0, rate / highest)
    outcome = Outcome.FAIL if late > 10 else Outcome.PASS
    return Measurement(
        SLO_, rate, 1, 1.0, 1000, late, 0, late, 5.0, 9.0, None, rate, 0.2, 0.1, outcome, "so it is", "",
        server_cpu=busy - 0.2, speeds=speeds,
    )  # fmt: skip


def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("prediction", "overheads"):
        monkeypatch.setattr(sys.modules[f"rushhour.tune.{module}"], "cores", lambda: 2)


def candidates() -> list[CandidateState]:
    layouts = ((1, 1, 2), (1, 2, 1), (2, 1, 1))
    names: tuple[tuple[str, EngineName], ...] = (
        ("int8", "openvino"), ("int8", "onnxruntime"), ("reference", "openvino"), ("reference", "onnxruntime"),
    )  # fmt: skip
    return [
        CandidateState(
            Candidate(bundle, "0", engine, "int8" if bundle == "int8" else "f32", Policy(*layout, max_batch=16))
        )
        for bundle, engine in names
        for layout in layouts
    ]


@pytest.mark.parametrize(("closed", "is_seen"), [(1.25, True), (1.05, True), (1.25, False)])
def test_candidates_that_were_not_measured_are_predicted_from_those_that_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed: float, is_seen: bool
) -> None:
    two_cores(monkeypatch)
    predictor, states = Timed(Journal(tmp_path / "journal.jsonl"), {}, SLO_, 0.05, ()), candidates()

    def measure_throughput(state: CandidateState) -> bool:
        """A closed loop is faster than an open one by the factor `closed`."""
        state.throughput = closed * most(state.candidate)
        if is_seen:
            state.windows.append(window(0.9 * state.throughput, most(state.candidate), (1.0, 0.99, 1.01) * 5))
        return True

    for state in states:
        predictor.choose_batch(state)
    states.sort(key=lambda state: -(state.predicted or 0.0))
    learnt = predictor.learn_overheads(states, measure_throughput, keep=0.6)
    assert len(learnt) == 4, "one of each layout, and a slow one"
    errors = [
        predictor.capacity(state.candidate) / most(state.candidate) - 1 for state in states if state not in learnt
    ]
    if is_seen:
        assert max(map(abs, errors)) < 0.1
    else:
        assert min(errors) > 0.1, "a closed loop alone promises too much"


def test_times_and_capacities_are_compared_at_equal_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the engines were timed on a slow host, and load came when it was faster: the order was wrong."""
    two_cores(monkeypatch)
    predictor, states = Timed(Journal(tmp_path / "journal.jsonl"), {}, SLO_, 0.05, ()), candidates()
    for number, state in enumerate(states):
        predictor.numbers.host = 0.5 if number < 6 else 1.0
        predictor.service_times(state.candidate)
    predictor.choose_batches(states)

    def measure_throughput(state: CandidateState) -> bool:
        state.speed = 1.6
        state.throughput = 1.05 * 1.6 * most(state.candidate)
        state.windows.append(window(0.9 * state.throughput, 1.6 * most(state.candidate), (1.0,) * 20))
        return True

    states.sort(key=lambda state: -(state.predicted or 0.0))
    assert states[0].candidate.bundle == "int8", "what is timed on a slow host is not slow"
    learnt = predictor.learn_overheads(states, measure_throughput)
    rest = [state.candidate for state in states if state not in learnt]
    assert predictor.speed == 1.6
    assert max(abs(predictor.capacity(each) / (1.6 * most(each)) - 1) for each in rest) < 0.1
    # a capacity that is measured when the host is slower says nothing else of the candidate
    before = predictor.capacity(rest[0])
    slow = CandidateState(rest[0], capacity=0.8 * most(rest[0]), speed=0.8)
    predictor.learn_residual(slow)
    assert predictor.capacity(rest[0]) == pytest.approx(before, rel=0.08)


def test_a_disturbed_window_does_not_halve_what_is_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One second in which half of the requests were late, as on a host that others use, is no property of a server."""
    two_cores(monkeypatch)
    predictor, states = Timed(Journal(tmp_path / "journal.jsonl"), {}, SLO_, 0.05, ()), candidates()[1:12:3]

    def measure_throughput(state: CandidateState) -> bool:
        highest = most(state.candidate)
        state.throughput = 1.1 * highest
        state.windows.append(window(highest, 0.4 * highest, ()))
        return True

    for state in states:
        predictor.choose_batch(state)
    (first, _) = predictor.learn_overheads(states, measure_throughput)
    assert predictor.capacity(first.candidate) > 0.7 * most(first.candidate)


def test_what_was_measured_corrects_what_is_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_cores(monkeypatch)
    predictor, states = Timed(Journal(tmp_path / "journal.jsonl"), {}, SLO_, 0.05, ()), candidates()
    for state in states:
        predictor.choose_batch(state)
    before = [predictor.capacity(state.candidate) for state in states]
    for _ in range(2):  # the same candidate counts once
        states[0].capacity = 0.7 * before[0]
        predictor.learn_residual(states[0])
    after = [predictor.capacity(state.candidate) / was for state, was in zip(states, before, strict=True)]
    layout, engine = states[0].candidate.layout, states[0].candidate.engine
    for state, factor in zip(states, after, strict=True):
        if state.candidate.layout != layout:
            assert 0.8 < factor < 0.9
        elif state.candidate.engine != engine:
            assert 0.75 < factor < 0.8
        else:
            assert 0.7 < factor < 0.75


def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Timed, list[CandidateState]]:
    two_cores(monkeypatch)
    predictor, states = Timed(Journal(tmp_path / "journal.jsonl"), {}, SLO_, 0.05, ()), candidates()
    predictor.choose_batches(states)
    return predictor, states


def raced(ratio: float, spread: float = 1.05) -> Race:
    return Race("tie", ratio, (ratio / spread, ratio * spread), 20, (1.0, ratio))


def test_a_race_corrects_the_prediction_of_what_lost_more_than_was_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor, states = known(tmp_path, monkeypatch)
    leader, rival = states[0], states[4]
    before = [state.predicted or 0.0 for state in states]
    predicted = before[4] / before[0]
    predictor.learn_race(leader.candidate, rival.candidate, raced(0.6 * predicted, spread=1.3))
    assert predictor.capacity(rival.candidate) == pytest.approx(before[4]), "the ratio is not known well enough"
    predictor.learn_race(leader.candidate, rival.candidate, raced(0.6 * predicted))
    assert predictor.capacity(rival.candidate) < 0.85 * before[4]
    assert predictor.capacity(rival.candidate) / before[4] < predictor.capacity(leader.candidate) / before[0]
    # where the leader is measured, the rival follows from it
    leader.capacity = 0.5 * before[0]
    predictor.learn_residual(leader)
    assert predictor.capacity(leader.candidate) < 0.75 * before[0]
    assert predictor.capacity(rival.candidate) < 0.6 * before[4]
    decided, open_ = states[1], states[2]
    decided.fate, was = "beaten", (states[1].predicted, states[2].predicted)
    predictor.correct(states)
    assert decided.predicted == was[0]
    assert (open_.predicted or 0.0) < 0.9 * (was[1] or 0.0)


def test_what_does_not_batch_says_little_of_what_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor, states = known(tmp_path, monkeypatch)
    one, eager = (CandidateState(states[0].candidate.with_batch(1)) for _ in range(2))
    eager.candidate = msgspec.structs.replace(eager.candidate, engine="torch")
    before = predictor.capacity(states[0].candidate)
    for state in (one, eager):
        state.capacity = 0.5 * predictor.capacity(one.candidate)
    predictor.learn_residual(eager)
    assert predictor.capacity(states[0].candidate) == before
    predictor.learn_residual(one)
    assert predictor.capacity(one.candidate) < 0.6 * (one.capacity or 0.0) / 0.5
    assert predictor.capacity(states[0].candidate) == pytest.approx(2**-0.5 * before), "as any other candidate"


def test_a_residual_is_that_of_the_overhead_known_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The baseline is measured before the overhead of serving is known: most of its residual is that overhead."""
    predictor, states = known(tmp_path, monkeypatch)
    states[0].capacity = most(states[0].candidate)
    predictor.learn_residual(states[0])
    assert predictor.capacity(states[0].candidate) < 0.6 * (states[0].predicted or 0.0)

    def measure_throughput(state: CandidateState) -> bool:
        state.throughput = 1.1 * most(state.candidate)
        state.windows.append(window(0.95 * most(state.candidate), most(state.candidate), (1.0,) * 20))
        return True

    predictor.learn_overheads(states, measure_throughput)
    assert predictor.capacity(states[3].candidate) == pytest.approx(most(states[3].candidate), rel=0.1)


def test_layouts_that_are_far_behind_are_not_loaded_for_their_overhead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor, states = known(tmp_path, monkeypatch)
    half = CandidateState(states[0].candidate.with_layout(1, 1, 1))
    predictor.choose_batches([half])
    half.predicted = 0.3 * (states[0].predicted or 0.0)
    monkeypatch.setattr(Timed, "choose_batches", lambda *_: None)

    def measure_throughput(state: CandidateState) -> bool:
        state.throughput = most(state.candidate)
        return True

    learnt = predictor.learn_overheads([*states, half], measure_throughput, keep=0.7)
    assert half not in learnt
    assert len({state.candidate.layout for state in learnt}) == 3


def test_the_interval_of_a_prediction_is_that_of_the_errors_that_were_seen() -> None:
    same, other, here = Residuals(), Residuals(), (1, 2, 1)
    assert same.spread == pytest.approx(0.15)
    for number in range(20):
        same.learn(f"{number}", "openvino", here, 1000.0, 800.0)
        other.learn(f"{number}", "openvino", here, 1000.0, 700.0 if number % 2 else 1400.0)
    assert same.spread < 0.07
    assert other.spread > 0.3


def test_another_limit_and_more_cores_are_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor, states = known(tmp_path, monkeypatch)
    (now,) = predictor.capacities_under(states[:1], SLO_)
    assert now == states[0].predicted
    (tight,) = predictor.capacities_under(states[:1], SLO.parse("p99<1ms"))
    assert 0 < tight < 0.9 * now
    (twice,) = predictor.capacities_under(states[:1], SLO_, 2)
    assert twice == pytest.approx(2 * now, rel=0.05)
    assert predictor.beside_serving(1000.0, states[0].candidate) == pytest.approx(1000), "no overhead is known"


def test_residuals_are_shrunk_to_what_is_known_more_generally() -> None:
    residuals, here, there = Residuals(), (1, 2, 1), (2, 1, 1)
    assert residuals.factor("openvino", here) == 1.0
    for number in range(40):
        residuals.learn(f"a{number}", "openvino", here, 1000.0, 800.0)
        residuals.learn(f"b{number}", "onnxruntime", there, 1000.0, 1100.0)
    assert residuals.factor("openvino", here) == pytest.approx(0.8, abs=0.01)
    assert residuals.factor("onnxruntime", there) == pytest.approx(1.1, abs=0.01)
    assert 0.8 < residuals.factor("openvino", (1, 1, 2)) < 1.1
    residuals.learn("broken", "torch", here, 1000.0, 1.0)
    assert residuals.factor("torch", here) > 0.5, "one that is far off is bounded"
    residuals.learn("none", "torch", here, 0.0, 0.0)
    assert math.isfinite(residuals.factor("torch", here))
