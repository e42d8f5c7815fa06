"""What a training leaves to look at: curves, TensorBoard's files, Weights & Biases' offline, and their report."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_cli import answer_to
from test_train import Notes, table
from test_train_loop import MLP, StopAt, learned

from rushhour.errors import DataError
from rushhour.records.curves import CURVES, Epoch, TrainingRecord, read_curves, write_curves
from rushhour.report import write_training_report
from rushhour.train import Tracking, TrainSettings

SETTINGS = TrainSettings(epochs=3, batch=64, bf16=False)  # 5 steps an epoch


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_curves_and_tensorboard_say_the_same(tmp_path: Path) -> None:
    heard: list[Epoch] = []
    learned(tmp_path, table(400), MLP, SETTINGS, tracking=Tracking(tmp_path / "t"), on_epoch=heard.append)
    epochs = read_curves(tmp_path / "t")
    assert list(epochs) == heard
    assert [epoch.step for epoch in epochs] == [5, 10, 15]
    assert epochs[-1].metric == "r2"
    assert epochs[-1].lr < epochs[0].lr
    seen = scalars(tmp_path / "t")
    assert [step for step, _ in seen["step/loss"]] == list(range(1, 16))
    for tag, name in (
        ("epoch/validation/r2", "value"),
        ("epoch/loss", "loss"),
        ("epoch/samples_per_s", "samples_per_s"),
    ):
        assert [value for _, value in seen[tag]] == pytest.approx([getattr(epoch, name) for epoch in epochs], rel=1e-6)
    mean = sum(value for step, value in seen["step/loss"] if step <= 5) / 5
    assert epochs[0].loss == pytest.approx(mean, rel=1e-6)


def test_a_resumed_training_leaves_the_curves_of_an_undisturbed_one(tmp_path: Path) -> None:
    def told(epochs: tuple[Epoch, ...]) -> list[tuple[float, ...]]:
        return [(epoch.step, epoch.loss, epoch.validation_loss, epoch.value, epoch.lr) for epoch in epochs]

    learned(tmp_path / "a", table(400), MLP, SETTINGS, tracking=Tracking(tmp_path / "a" / "t"))
    for stop in (3, 9, 12):
        with pytest.raises(KeyboardInterrupt):
            learned(
                tmp_path / "b", table(400), MLP, SETTINGS, tracking=Tracking(tmp_path / "b" / "t"),
                progress=StopAt(stop), checkpoint_every_s=0.0,
            )  # fmt: skip
    heard: list[Epoch] = []
    learned(tmp_path / "b", table(400), MLP, SETTINGS, tracking=Tracking(tmp_path / "b" / "t"), on_epoch=heard.append)
    assert told(read_curves(tmp_path / "b" / "t")) == told(read_curves(tmp_path / "a" / "t")) == told(tuple(heard))
    seen = scalars(tmp_path / "b" / "t")["step/loss"]
    assert [step for step, _ in seen] == list(range(1, 16)), "what was done twice is there once"


@pytest.mark.slow
def test_weights_and_biases_keeps_a_run_offline(tmp_path: Path) -> None:
    """In a process of its own, because wandb starts another one and sets handlers."""
    code = (
        "import sys, pathlib; sys.path[:0] = ['tests', 'tests/cli', 'tests/train']; "
        "import test_train as t, test_tracking as k; "
        "at = pathlib.Path(sys.argv[1]); "
        "k.learned(at, t.table(400), k.MLP, k.SETTINGS, tracking=k.Tracking(at, tensorboard=False, wandb='tests'))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2], timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (record,) = run.glob("*.wandb")
    assert b"validation/r2" in record.read_bytes()
    assert not (tmp_path / "tensorboard").exists()


def test_without_tracking_nothing_is_left(tmp_path: Path) -> None:
    learned(tmp_path, table(400), MLP, SETTINGS, progress=Notes())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["work"]


def test_the_report_of_a_training_draws_its_curves(tmp_path: Path) -> None:
    folder = tmp_path / "photos-training"
    folder.mkdir()
    values = (0.5, 0.8125, 0.75)
    write_curves(
        folder, [Epoch(n, n * 5, 1 / n, 2 / n, "accuracy", value, 0.1, 123.0) for n, value in enumerate(values, 1)]
    )
    page = write_training_report(folder).read_text()
    assert "81.25%" in page
    assert "after epoch 3 of 3" in page
    assert "Epoch 2 was better, with 81.25%" in page
    assert page.count("<svg") == 4, "both for a desk and for a phone"
    assert "://" not in page.replace("http://www.w3.org/", "")
    assert write_training_report(folder).read_text() == page


@pytest.mark.parametrize("content", [None, b"", b"{", b'{"epoch": 1}\n'])
def test_curves_that_cannot_be_drawn_are_said(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / CURVES).write_bytes(content)
    with pytest.raises(DataError, match=r"curves"):
        write_training_report(tmp_path)


def _epoch(number: int, value: float, loss: float = 0.5) -> Epoch:
    return Epoch(number, 4 * number, 0.6, loss, "accuracy", value, 1e-3, 100.0)


def _record(**changed: Any) -> TrainingRecord:
    record = TrainingRecord(
        "net", "photos", {"train": 400, "validation": 50, "test": 50}, {"lr": 0.002, "batch": 128}, 3, False
    )
    return msgspec.structs.replace(record, **changed)


@pytest.mark.parametrize(
    ("record", "headline", "says"),
    [
        (_record(), "31.70% on the validation part, after epoch 3 of 3", "Epoch 1 was better, with 40.00%"),
        (
            _record(sealed=1, keeps_best=True),
            "40.00% on the validation part, after epoch 1 of 3",
            "--patience was given",
        ),
        (_record(resumed=(5, 9), planned=((2, 5),)), "31.70%", "after step 5, 9, where the training was interrupted"),
    ],
    ids=["the last one", "the best one", "gone on"],
)
def test_the_headline_is_the_epoch_that_was_sealed(
    record: TrainingRecord, headline: str, says: str, tmp_path: Path
) -> None:
    """40.0% was shown, and 31.7% sealed."""
    write_curves(tmp_path, [_epoch(1, 0.4), _epoch(2, 0.3), _epoch(3, 0.317)], record)
    text = " ".join(write_training_report(tmp_path).read_text().split())
    assert headline in text.partition("<h1>")[2].partition("</h1>")[0]
    for part in (says, "400 train, 50 validation, 50 test samples", "lr 0.002, batch 128"):
        assert part in text
    assert ("2 epochs until step 5" in text) == bool(record.planned)


@pytest.mark.parametrize(("epochs", "rows"), [(3, 3), (15, 15), (60, 17), (1000, 16)])
def test_a_long_table_is_shortened_and_can_be_opened(epochs: int, rows: int, tmp_path: Path) -> None:
    """60 epochs made 60 rows."""
    best = 2 if epochs > 2 else 1
    curve = [_epoch(number, 0.9 if number == best else 0.5) for number in range(1, epochs + 1)]
    write_curves(tmp_path, curve, _record(sealed=epochs))
    text = write_training_report(tmp_path).read_text()
    shown, _, folded = text.partition("<details>")
    assert abs(shown.count('<th scope="row"') - rows) <= 1
    assert folded.count('<th scope="row"') == (epochs if epochs > 15 else 0)
    assert shown.count("<td>best</td>") == shown.count("<td>in the bundle</td>") == 1


@pytest.mark.parametrize("name", ["plan.json", "workers.json"])
def test_a_training_by_several_workers_is_no_tuning_run(name: str, tmp_path: Path) -> None:
    """Its own plan was taken for a Plan, which it is not."""
    write_curves(tmp_path / "mine-training", [_epoch(1, 0.4)], _record(sealed=1))
    (tmp_path / "mine-training" / name).write_text('{"mesh": {"data": 2}, "layers": []}')
    for asked in (tmp_path / "mine-training", tmp_path / "mine"):
        done = answer_to("report", asked)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == str(tmp_path / "mine-training" / "report.html")


def test_a_record_that_is_damaged_is_said(tmp_path: Path) -> None:
    write_curves(tmp_path, [_epoch(1, 0.4)])
    assert "after epoch 1 of 1" in write_training_report(tmp_path).read_text()
    (tmp_path / "training.json").write_text("{")
    with pytest.raises(DataError, match=r"training\.json"):
        write_training_report(tmp_path)
