"""What a run leaves for later ones on the same machine, and how little it decides there."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import msgspec
import pytest
from test_prediction import REQUEST_S, SLO_, Timed, candidates, most, two_cores
from test_tune import Load, answering, loaded_by, own_answers, small_data, tuned

from rushhour.bundle import Source
from rushhour.data import load
from rushhour.goal import AccuracyBudget, Goal
from rushhour.measurement import Priors
from rushhour.progress import Silent
from rushhour.records.journal import Journal
from rushhour.system.machine import describe
from rushhour.testing.bundles import tiny_bundle
from rushhour.train import TrainingJob, TrainSettings
from rushhour.tune import TuneSettings, tune_run
from rushhour.tune.prediction import Predictor
from rushhour.tune.priors import Experience, experience_of, remember
from rushhour.tune.residuals import Residuals
from rushhour.tune.state import CandidateState
from rushhour.tune.training_time import epoch_seconds


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the files, which is not made yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "rushhour"


def known(run: Path, *, cold: bool = False) -> dict[str, float]:
    """What a run knows at its start."""
    return experience_of(Journal(run / "measurements.jsonl"), cold=cold).priors.values


def test_a_mean_over_the_last_runs_is_kept(tmp_path: Path, state: Path) -> None:
    assert known(tmp_path / "first") == {}
    remember({"slowdown": 1.2})
    assert known(tmp_path / "second") == {"slowdown": 1.2}
    for _ in range(40):
        remember({"slowdown": 1.6, "request/1x2x1": 1e-4})
    values = known(tmp_path / "third")
    assert values["slowdown"] == pytest.approx(1.6, abs=0.01)
    assert values["request/1x2x1"] == pytest.approx(1e-4)
    assert [path.name for path in state.iterdir() if path.name.startswith(".")] == []


def test_a_resumed_run_has_the_priors_of_its_start(tmp_path: Path, state: Path) -> None:
    remember({"slowdown": 1.2})
    assert known(tmp_path / "run") == {"slowdown": 1.2}
    remember({"slowdown": 2.0, "request/1x2x1": 1e-4})
    assert known(tmp_path / "run") == {"slowdown": 1.2}
    assert known(tmp_path / "run", cold=True) == {}
    assert known(tmp_path / "run") == {"slowdown": 1.2}


def test_each_machine_has_its_own(tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remember({"slowdown": 1.2})
    other = msgspec.structs.replace(describe(), versions={**describe().versions, "openvino": "another"})
    monkeypatch.setattr(sys.modules["rushhour.tune.priors"], "describe", lambda: other)
    assert known(tmp_path / "run") == {}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[1, 2]",
        b'{"values": {"slowdown": 1.2}}',
        b'{"values": {"slowdown": [1e400, 1]}}',
        b'{"values": {"slowdown": ["1.2", 1]}}',
        b'{"values": {"slowdown": [1.2, -1]}}',
        b"[" * 100_000,
        b'{"values": {' + b'"x": [1.0, 1], ' * 20_000 + b'"y": [1.0, 1]}}',
    ],
)
def test_a_damaged_file_is_as_none_and_is_replaced(tmp_path: Path, state: Path, content: bytes) -> None:
    remember({"slowdown": 1.2})
    (file,) = state.iterdir()
    file.write_bytes(content)
    assert known(tmp_path / "run") == {}
    remember({"slowdown": 1.4})
    assert known(tmp_path / "later") == {"slowdown": 1.4}


def test_where_nothing_can_be_written_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    remember({"slowdown": 1.2})
    assert known(tmp_path / "run") == {}
    assert (tmp_path / "file").read_text() == "no folder"


def test_a_relative_folder_is_ignored_as_the_standard_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "state")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    remember({"slowdown": 1.2})
    assert len(list((tmp_path / "home" / ".local" / "state" / "rushhour").iterdir())) == 1


def test_files_and_their_number_are_bounded(tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remember({f"step/{number}": 1.0 for number in range(400)})
    remember({"step/0": 1.0})
    remember({f"step/new {number}": 1.0 for number in range(400)})
    values = known(tmp_path / "run")
    assert len(values) == 500
    assert "step/0" in values, "it was measured again later than the others"
    assert "step/1" not in values
    for number in range(20):
        versions = {**describe().versions, "openvino": str(number)}
        other = msgspec.structs.replace(describe(), versions=versions)
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules["rushhour.tune.priors"], "describe", lambda other=other: other)
            remember({"slowdown": 1.0})
        for age, file in enumerate(sorted(state.iterdir(), key=lambda file: -file.stat().st_mtime)):
            os.utime(file, (1e9 - age, 1e9 - age))
    assert len(list(state.iterdir())) == 16


def test_before_any_load_predictions_have_the_overhead_of_earlier_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_cores(monkeypatch)
    wrong = 10 * REQUEST_S
    priors = Priors({"request/1x2x1": wrong, "request/1x1x2": wrong, "request/2x1x1": wrong, "another": 1.0})

    def predictor(priors: Priors | None) -> Predictor:
        return Timed(Journal(tmp_path / "journal.jsonl"), {}, SLO_, 0.05, (), priors=priors)

    warm, cold, states = predictor(priors), predictor(None), candidates()
    assert warm.capacity(states[0].candidate) < 0.5 * cold.capacity(states[0].candidate)

    def measure_throughput(state: CandidateState) -> bool:
        state.throughput = most(state.candidate)
        return True

    for which in (warm, cold):
        states = candidates()
        which.learn_overheads(states[:1], measure_throughput)
    for state in candidates():
        assert warm.capacity(state.candidate) == cold.capacity(state.candidate), "one measurement replaces them all"
    assert warm.learnt()["request/1x1x2"] == pytest.approx(REQUEST_S, rel=0.9)


def test_one_residual_of_this_run_weighs_more_than_those_of_earlier_ones() -> None:
    layout = (1, 2, 1, 2)
    residuals = Residuals({("openvino", layout): -0.6})
    assert 0.8 < residuals.factor("openvino", layout) < 0.9
    assert residuals.factor("onnxruntime", layout) == 1.0
    residuals.learn("own", "openvino", layout, 1000.0, 1200.0)
    assert residuals.factor("openvino", layout) > 1.1
    assert residuals.means() == {("openvino", layout): pytest.approx(0.182, abs=0.001)}


def test_the_time_of_a_step_is_nearer_to_what_was_measured_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["rushhour.tune.training_time"], "step_seconds", lambda *_: 1.0)
    small_data(tmp_path / "small.npz")
    data = load(tmp_path / "small.npz")
    source = Source("rushhour.models:mlp", {"inputs": 144, "outputs": 4, "hidden": 4, "depth": 1})

    def seconds(run: str, experience: Experience, **settings: int) -> float:
        job = TrainingJob(source, TrainSettings(batch=32, **settings), tmp_path / "work")
        return epoch_seconds(Journal(tmp_path / run), data, job, Silent(), experience=experience)

    first = Experience()
    epoch = seconds("first", first, epochs=3)
    assert epoch == len(data.train) // 32
    ((name, took),) = first.learnt.items()
    assert took == 1.0
    slower = Experience(Priors({name: 4.0}))
    assert 1.3 * epoch < seconds("second", slower, epochs=5, seed=1) < 2 * epoch
    assert slower.learnt == {name: 1.0}


@pytest.mark.slow
def test_a_run_leaves_what_it_measured_and_the_next_begins_with_it(
    tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["rushhour.tune.run"], "quantize_for_all", lambda *_, **__: {})
    model = tiny_bundle(tmp_path / "mine")

    def priors_in(run: Path) -> list[dict[str, float]]:
        entries = map(json.loads, (run / "measurements.jsonl").read_bytes().splitlines())
        return [entry["reading"].get("values", {}) for entry in entries if entry["phase"] == "priors"]

    tuned(model, tmp_path / "first", monkeypatch, answering({}))
    assert priors_in(tmp_path / "first") == [{}]
    tuned(model, tmp_path / "second", monkeypatch, answering({}))
    (values,) = priors_in(tmp_path / "second")
    assert any(name.startswith("request/") for name in values)
    assert any(name.startswith("residual/openvino/") for name in values)
    with loaded_by(Load(), monkeypatch):
        tune_run(
            model,
            own_answers(),
            Goal(SLO_, AccuracyBudget.parse("10%")),
            run=tmp_path / "cold",
            training=TrainSettings(),
            settings=TuneSettings(time_s=0.005),
            progress=Silent(),
            cold=True,
        )
    assert priors_in(tmp_path / "cold") == [{}]
