"""A calibrated classifier's probabilities agree with shares of right answers, in every engine, and compressed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rushhour.api.inputs import load_data
from rushhour.bundle import Bundle, Preprocessing, Source
from rushhour.compress import Recipe, Store, apply
from rushhour.compress.judge import outputs_of
from rushhour.compress.teacher import _inverse
from rushhour.data.dataset import Dataset, Split
from rushhour.engines import EngineConfig
from rushhour.errors import DataError, GoalError, StorageError, TaskError
from rushhour.models import load_deployed
from rushhour.progress import Silent
from rushhour.records.classified import Classified
from rushhour.records.curves import read_record
from rushhour.report.training import write_training_report
from rushhour.task import Task
from rushhour.train import Tracking, TrainingJob, TrainSettings, train

MLP = Source("rushhour.models:mlp", {"inputs": 20, "outputs": 3, "hidden": 64, "depth": 3})
SETTINGS = TrainSettings(epochs=30, batch=32, lr=5e-3)
TASK = Task.classification(("a", "b", "c"))


def noisy(validation: int = 400) -> Dataset:
    """Labels that follow the features half of the time: a network that learns them by heart is too sure."""
    chance = np.random.default_rng(0)
    n = 300 + validation + 400
    inputs = chance.normal(size=(n, 20)).astype(np.float32)
    scores = inputs @ chance.normal(size=(20, 3)) / 3
    labels = (scores + chance.gumbel(size=scores.shape)).argmax(axis=1)
    ends = slice(0, 300), slice(300, 300 + validation), slice(300 + validation, n)
    return Dataset("noisy", TASK, *(Split(inputs[at], labels[at]) for at in ends), Preprocessing(), "sum")


def trained(folder: Path, dataset: Dataset, **options: object) -> Bundle:
    tracking = Tracking(folder / "curves", tensorboard=False)
    job = TrainingJob(MLP, SETTINGS, folder / "work", tracking=tracking, **options)  # type: ignore[arg-type]
    return train(dataset, job, out=folder / "bundle", progress=Silent())


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return trained(tmp_path_factory.mktemp("calibrated"), noisy(), calibrate=True)


def error_of(probabilities: np.ndarray, labels: np.ndarray) -> float:
    return Classified.of(probabilities, labels, TASK.classes).calibration_error


def test_the_served_graph_divides_by_the_temperature_and_can_be_believed(calibrated: Bundle) -> None:
    test, task = noisy().test, calibrated.manifest.task
    assert isinstance(task.temperature, float)
    assert task.temperature > 1.5
    module = load_deployed(calibrated)
    with torch.inference_mode():
        logits = module.logits(torch.from_numpy(test.inputs))
    before, after = (torch.softmax(logits / by, dim=1).numpy() for by in (1.0, task.temperature))
    for engine in ("openvino", "onnxruntime", "torch"):
        served = outputs_of(calibrated, EngineConfig(engine, "f32", max_batch=8), test)  # type: ignore[arg-type]
        assert np.abs(served - after).max() < 1e-3
    assert (before.argmax(axis=1) == after.argmax(axis=1)).all(), "no answer changes its class"
    assert error_of(after, test.targets) < 0.5 * error_of(before, test.targets)


def test_the_report_tells_the_error_before_and_after(calibrated: Bundle) -> None:
    folder = calibrated.path.parent / "curves"
    record = read_record(folder)
    assert record is not None
    assert record.calibration is not None
    assert record.calibration.after.calibration_error < record.calibration.before.calibration_error
    page = write_training_report(folder).read_text()
    assert "The bundle divides the logits by" in page
    assert page.count('id="after') > 0


def test_the_same_training_is_the_same_bundle_and_without_it_is_another(calibrated: Bundle) -> None:
    folder = calibrated.path.parent
    assert trained(folder, noisy(), calibrate=True).manifest.hash == calibrated.manifest.hash
    with pytest.raises(StorageError, match="calibrate True before, none now"):
        trained(folder, noisy())


@pytest.mark.slow
def test_compression_keeps_it(calibrated: Bundle, tmp_path: Path) -> None:
    dataset = load_data(noisy(), Silent(), calibrated)
    recipe = Recipe.parse("prune:0.3,distil:2,int8")
    for bundle in apply(recipe, calibrated, dataset, Store(tmp_path / "store"), progress=Silent()):
        assert bundle.manifest.task.temperature == calibrated.manifest.task.temperature
        precision = bundle.manifest.precision
        served = outputs_of(bundle, EngineConfig("openvino", precision, max_batch=8), dataset.test)
        assert served.max(axis=1).mean() < 0.85


def test_a_student_of_a_calibrated_graph_learns_the_logits_before_the_division() -> None:
    logits = torch.randn(20, 3) * 5
    task = Task("classification", ("a", "b", "c"), 3, temperature=2.5)
    answers = torch.softmax(logits / 2.5, dim=1)
    found = _inverse(task, answers.numpy())(answers)
    torch.testing.assert_close(found - found[:, :1], logits - logits[:, :1], atol=1e-3, rtol=1e-3)


def test_what_cannot_be_calibrated_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot calibrate on 20 validation samples"):
        trained(tmp_path, noisy(20), calibrate=True)
    values = noisy()
    parts = [Split(part.inputs, part.inputs[:, :1]) for part in (values.train, values.validation, values.test)]
    with pytest.raises(TaskError, match="cannot calibrate a model for regression"):
        trained(tmp_path, Dataset("values", Task("regression"), *parts, Preprocessing(), "sum"), calibrate=True)
    with pytest.raises(ValueError, match="of a classification"):
        Task("regression", temperature=2.0)
    from rushhour.api import train as train_model

    with pytest.raises(GoalError, match="cannot calibrate a search"):
        train_model("mlp", (values.train.inputs, values.train.targets), out=tmp_path / "b", search=2, calibrate=True)
