"""What a classifier confuses, and how far its probabilities can be believed."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from rushhour.records.classified import Classified
from rushhour.records.curves import Epoch, TrainingRecord, read_record, write_curves
from rushhour.report.training import write_training_report


def sure(n: int, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Answers that say how likely they are right, and then are made `temperature` times too sure."""
    chance = np.random.default_rng(0)
    logits = chance.normal(0, 1.5, (n, 3))
    true = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (true.cumsum(axis=1) < chance.random((n, 1))).sum(axis=1)
    given = np.exp(logits * temperature)
    return given / given.sum(axis=1, keepdims=True), labels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_is_found_and_the_error_grows_with_it(temperature: float) -> None:
    found = Classified.of(*sure(4000, temperature), ("a", "b", "c"))
    assert found.temperature == pytest.approx(temperature, rel=0.12)
    assert (found.calibration_error < 0.02) == (temperature == 1.0)
    assert sum(each.samples for each in found.bins) == 4000


def test_confusions_are_counted_by_true_class_and_the_most_frequent_comes_first() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    given = np.array([0, 1, 1, 1, 2, 2])
    found = Classified.of(np.eye(3, dtype=np.float32)[given], labels, ("cat", "dog", "owl"))
    assert found.confusion == ((1, 2, 0), (0, 1, 1), (0, 0, 1))
    assert found.confusions() == [("cat", "dog", 2, 3), ("dog", "owl", 1, 2)]
    assert found.bins[0].right == pytest.approx(0.5)
    many = tuple(map(str, range(101)))
    assert Classified.of(np.eye(101, dtype=np.float32)[given], labels, many).confusion == ()


def test_the_report_shows_it_and_one_of_before_does_without(tmp_path: Path) -> None:
    epoch = Epoch(1, 10, 0.5, 0.4, "accuracy", 0.9, 0.001, 100.0)
    classified = Classified.of(*sure(300, 3.0), ("cat", "<dog>", "owl"))
    record = TrainingRecord("net", "data", {"train": 3}, {}, 1, False, classified=classified)
    write_curves(tmp_path, [epoch], record)
    assert read_record(tmp_path) == record
    page = write_training_report(tmp_path).read_text()
    assert "it is too sure of itself" in page
    assert "&lt;dog&gt; taken for" in page
    assert "<dog>" not in page
    before = msgspec.to_builtins(record)
    del before["classified"]
    (tmp_path / "training.json").write_bytes(msgspec.json.encode(before))
    assert "What is confused" not in write_training_report(tmp_path).read_text()
