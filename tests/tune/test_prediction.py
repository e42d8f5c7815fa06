"""Predictions of capacities: what a few measurements under load tell about candidates that were not measured."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from rushhour.goal import SLO
from rushhour.measurement import Measurement, Outcome, ServiceTimes
from rushhour.plan import EngineName, Policy
from rushhour.records.journal import Journal
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
    """The rate at which it takes both cores."""
    return 2 / (SLOWDOWN * ENGINE_S[kind(candidate)] + REQUEST_S)


class Timed(Predictor):
    """Service times are numbers: a batch costs a little, and each sample."""

    def _timed(self, candidate: Candidate) -> ServiceTimes:
        sizes = (1, 2, 4, 8, 16)
        per_stream = ENGINE_S[kind(candidate)] * candidate.streams / 2
        seconds = tuple(per_stream * (size + 1) * 16 / 17 for size in sizes)
        return ServiceTimes(
            sizes, seconds, tuple(candidate.streams * n / s for n, s in zip(sizes, seconds, strict=True))
        )


def window(rate: float, highest: float, speeds: tuple[float, ...]) -> Measurement:
    """One of a server that answers `highest` at most."""
    late = round(1000 * max(0.0, 1 - highest / rate))
    busy = 2 * min(1.0, rate / highest)
    outcome = Outcome.FAIL if late > 10 else Outcome.PASS
    return Measurement(
        SLO_, rate, 1, 1.0, 1000, late, 0, late, 5.0, 9.0, None, rate, 0.2, 0.1, outcome, "so it is", "",
        server_cpu=busy - 0.2, speeds=speeds,
    )  # fmt: skip


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
    monkeypatch.setattr(sys.modules["rushhour.tune.prediction"], "cores", lambda: 2)
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
    learnt = predictor.learn_overheads(states, measure_throughput)
    assert len(learnt) == 4, "one of each layout, and a slow one"
    errors = [
        predictor.capacity(state.candidate) / most(state.candidate) - 1 for state in states if state not in learnt
    ]
    if is_seen:
        assert max(map(abs, errors)) < 0.1
    else:
        assert min(errors) > 0.1, "a closed loop alone promises too much"


def test_a_disturbed_window_does_not_halve_what_is_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One second in which half of the requests were late, as on a host that others use, is no property of a server."""
    monkeypatch.setattr(sys.modules["rushhour.tune.prediction"], "cores", lambda: 2)
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
    monkeypatch.setattr(sys.modules["rushhour.tune.prediction"], "cores", lambda: 2)
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
