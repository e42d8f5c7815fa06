"""`rushhour train` as a person types it: what it leaves, what it says, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli import answer_to, refused, rushhour

from rushhour.bundle import Bundle
from rushhour.system.machine import cores


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Light and dark pictures, one of which is cut short."""
    random = np.random.default_rng(0)
    for name, base in (("dark", 0), ("light", 150)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(40):
            pixels = (base + random.integers(0, 100, (12, 10, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{index}.png")
    spoiled = tmp_path / "photos" / "dark" / "7.png"
    spoiled.write_bytes(spoiled.read_bytes()[:40])
    return tmp_path / "photos"


@pytest.mark.slow
def test_a_folder_of_photos_with_everything_on(photos: Path, tmp_path: Path) -> None:
    command = [
        "train", "article", "--data", photos, "--size", "16x16", "--skip-corrupt", "--augment", "flip,crop,colour",
        "--epochs", "2", "--batch", "16", "--optimizer", "adamw", "--weight-decay", "0.01", "--schedule", "cosine",
        "--clip", "1", "--ema", "0.9", "--patience", "2", "--out", tmp_path / "run", "--json", tmp_path / "run.json",
    ]  # fmt: skip
    done = rushhour(*command)
    assert done.returncode == 0, done.stderr
    assert "left out: cannot read the picture" in done.stderr
    assert "7.png" in done.stderr
    assert "images/s" in done.stderr or "accuracy" in done.stderr
    bundle = Bundle.open(tmp_path / "run")
    assert bundle.manifest.signature.inputs[0].shape == (16, 16, 3)
    assert json.loads((tmp_path / "run.json").read_text())["hash"] == bundle.manifest.hash
    logs = tmp_path / "run-training"
    assert len((logs / "curves.jsonl").read_text().splitlines()) == 2
    assert list((logs / "tensorboard").iterdir())
    drawn = answer_to("report", logs, "--json", tmp_path / "report.json")
    assert drawn.returncode == 0, drawn.stderr
    assert Path(json.loads((tmp_path / "report.json").read_text())["report"]) == logs / "report.html"
    refused(answer_to("train", "article", "--data", photos, "--out", tmp_path / "other"), "7.png", "skip")
    assert not (tmp_path / "other").exists()


def test_a_search_on_the_command_line(photos: Path, tmp_path: Path) -> None:
    (photos / "dark" / "7.png").unlink()
    done = answer_to(
        "train", "mlp", "--data", photos, "--epochs", "1", "--batch", "16", "--search", "2", "--no-tensorboard",
        "--out", tmp_path / "best", "--json", tmp_path / "best.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Trials of the search" in done.stdout
    said = json.loads((tmp_path / "best.json").read_text())
    assert [tried["number"] for tried in said["search"]["trials"]] == [0, 1]
    assert said["hash"] == Bundle.open(tmp_path / "best").manifest.hash
    assert (tmp_path / "best-training" / "search.db").is_file()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--augment", "blur"], "cannot augment with 'blur'"),
        (["--size", "224"], "cannot use the size '224'"),
        (["--patience", "0"], "patience=0"),
        (["--ema", "2"], "ema=2"),
        (["--optimizer", "lion"], "lion"),
        (["--search", "3", "--workers", "2"], "cannot search on 2 workers"),
        (["--local-sgd", "3", "--diloco", "2"], "cannot synchronise in two ways"),
        (["--diloco", "2", "--parallel", "pipeline"], "a pipeline plan cannot be relaxed"),
        (["--memory", "0"], "cannot use 0 GB"),
        (["--diloco", "8"], "one worker has nothing to exchange"),
        (["--batch-norm", "local"], "one worker has nothing to exchange"),
        (["--local-sgd", "0"], "--local-sgd"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(options: list[str], says: str, tmp_path: Path) -> None:
    labels = np.arange(60, dtype=np.int64) % 3
    np.savez(tmp_path / "three.npz", x=np.zeros((60, 8, 8, 1), np.uint8), y=labels)
    done = answer_to("train", "mlp", "--data", tmp_path / "three.npz", *options, "--out", tmp_path / "run")
    refused(done, says)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["three.npz"]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    inputs = np.random.default_rng(0).normal(size=(120, 6)).astype(np.float32)
    np.savez(tmp_path / "rows.npz", x=inputs, y=np.arange(120) % 3)
    return tmp_path / "rows.npz"


@pytest.mark.parametrize(
    "sharing", [[], pytest.param(["--workers", "2", "--parallel", "pipeline"], marks=pytest.mark.slow)]
)
def test_a_loss_that_is_no_number_ends_it_and_names_the_batch(sharing: list[str], rows: Path, tmp_path: Path) -> None:
    done = answer_to(
        "train",
        "mlp",
        "--data",
        rows,
        "--batch",
        "16",
        "--lr",
        "1e30",
        "--epochs",
        "3",
        "--no-bf16",
        *sharing,
        "--out",
        tmp_path / "run",
    )
    refused(
        done, "the training of mlp diverged at step 2 of 18", "step 2 of epoch 1", "its samples are", "lower the lear"
    )
    assert not (tmp_path / "run").exists()


def test_data_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    inputs = np.random.default_rng(0).normal(size=(120, 6)).astype(np.float32)
    inputs[41] = np.inf
    np.savez(tmp_path / "rows.npz", x=inputs, y=np.arange(120) % 3)
    done = answer_to("train", "mlp", "--data", tmp_path / "rows.npz", "--out", tmp_path / "run")
    refused(done, "the train part of rows holds NaN or infinity")
    assert "Warning" not in done.stderr


@pytest.mark.slow
def test_a_network_that_no_plan_fits_in_memory_is_refused(rows: Path, tmp_path: Path) -> None:
    done = answer_to("train", "mlp", "--data", rows, "--workers", "2", "--memory", "0.0001", "--out", tmp_path / "run")
    refused(done, "no plan fits in memory: the smallest needs", "use more machines")


def test_an_empty_class_is_named(photos: Path, tmp_path: Path) -> None:
    (photos / "grey").mkdir()
    refused(answer_to("train", "mlp", "--data", photos, "--out", tmp_path / "run"), "the class 'grey'", "is empty")


def test_a_bundle_is_not_trained_again(tiny: Bundle, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    shape = tiny.manifest.signature.inputs[0].shape
    labels = np.arange(60, dtype=np.int64) % tiny.manifest.task.outputs
    np.savez(tmp_path / "x.npz", x=random.integers(0, 255, (60, *shape), dtype=np.uint8), y=labels)
    refused(answer_to("train", tiny.path, "--data", tmp_path / "x.npz", "--out", tmp_path / "run"), "is a bundle")


@pytest.mark.long
@pytest.mark.slow
def test_more_workers_than_cores_are_warned_of_and_work(photos: Path, tmp_path: Path) -> None:
    (photos / "dark" / "7.png").unlink()
    workers = cores() + 1
    done = rushhour(
        "train", "mlp", "--data", photos, "--epochs", "1", "--batch", "16", "--workers", str(workers),
        "--no-tensorboard", "--out", tmp_path / "run", "--json", tmp_path / "run.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads((tmp_path / "run.json").read_text())["plan"]
    assert said["workers"] == workers
    assert f"{said['mode']} ({said['mesh']['data']} x " in done.stderr, "the plan is shown, with what others cost"
    assert f"{workers} workers share {cores()} cores" in done.stderr
    assert Bundle.open(tmp_path / "run").manifest.name == "run"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".run.checkpoints",
        "photos",
        "run",
        "run-training",
        "run.json",
    ]
    assert list((tmp_path / ".run.checkpoints").iterdir()) == []
