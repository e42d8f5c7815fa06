"""What a training's report draws: precision and recall, residuals; counted right, and in the page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rushhour.records.curves import Epoch, TrainingRecord, read_record, write_curves
from rushhour.records.judged import Judged
from rushhour.report.training import write_training_report
from rushhour.task import Task


def test_precision_and_recall_of_a_ranking_are_those_of_the_definition() -> None:
    scores, wanted = np.array([0.9, 0.8, 0.8, 0.5, 0.1], np.float32), np.array([1, 0, 1, 0, 1], np.float32)
    (found,) = Judged.of(Task("ranking"), scores[:, None], wanted, ("liked",)).found
    assert (found.name, found.wanted) == ("liked", 3)
    assert found.recall == pytest.approx((1 / 3, 2 / 3, 2 / 3, 1)), "equal scores are taken together"
    assert found.precision == pytest.approx((1, 2 / 3, 1 / 2, 3 / 5))
    assert found.area == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    chance = np.random.default_rng(0)
    many = Judged.of(Task("ranking"), chance.random((5000, 1)), chance.integers(0, 2, 5000)).found[0]
    assert len(many.recall) == 100
    assert (many.recall[-1], many.name) == (1, "wanted")


def test_precision_and_recall_of_a_detection_are_those_of_its_metric() -> None:
    task = Task("detection", ("car", "person", "train"), 3)
    targets = np.array([[[0, 0, 10, 10, 0], [20, 20, 30, 30, 1]], [[0, 0, 10, 10, 0], [0, 0, 0, 0, -1]]], np.float32)
    answers = np.array(
        [[[0, 0, 10, 10, 0.9, 0], [20, 20, 31, 30, 0.5, 1]], [[50, 50, 60, 60, 0.8, 0], [0, 0, 10, 11, 0.3, 0]]],
        np.float32,
    )
    car, person = Judged.of(task, answers, targets).found
    assert (car.name, car.wanted, person.name, person.wanted) == ("car", 2, "person", 1)
    assert car.precision == pytest.approx((1, 1 / 2, 2 / 3))
    assert np.mean([car.area, person.area]) == pytest.approx(task.evaluate(answers, targets)[0])
    nothing = Judged.of(task, np.zeros_like(answers), targets).found
    assert [each.area for each in nothing] == [0, 0]


def test_residuals_are_by_the_size_of_the_answer() -> None:
    answers = np.linspace(0, 100, 1000)[:, None]
    targets = answers + np.where(answers > 50, 5, 0)
    (found,) = Judged.of(Task("regression"), answers, targets).residuals
    assert [group.middle for group in found.groups] == pytest.approx([0] * 5 + [5] * 5)
    assert sum(group.samples for group in found.groups) == 1000
    assert found.name == "value 1"
    assert len(Judged.of(Task("regression"), answers[:3], targets[:3]).residuals[0].groups) == 3
    assert Judged.of(Task("embedding", outputs=1), answers, targets) == Judged()


def test_the_page_draws_them_without_trusting_names(tmp_path: Path) -> None:
    epoch = Epoch(1, 10, 0.5, 0.4, "auc", 0.9, 0.001, 100.0)
    chance = np.random.default_rng(0)
    answers = chance.random((300, 1))
    ranked = Judged.of(Task("ranking"), answers, chance.integers(0, 2, 300), ("<b>liked",))
    valued = Judged.of(Task("regression"), answers, answers**2, ("<b>price",))
    record = TrainingRecord(
        "net", "data", {"train": 3}, {}, 1, False, found=ranked.found * 6, residuals=valued.residuals
    )
    write_curves(tmp_path, [epoch], record)
    assert read_record(tmp_path) == record
    page = write_training_report(tmp_path).read_text()
    assert "Precision and recall" in page
    assert "Residuals" in page
    assert "<b>" not in page
    assert "&lt;b&gt;liked" in page
