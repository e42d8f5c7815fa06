"""A whole run on a small data set: real training, real servers, real load; killed, resumed, and reported."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rushhour.bundle import Bundle
from rushhour.journal import Journal
from rushhour.plan import Plan
from rushhour.serve import open_target

RUN = """
import sys
from pathlib import Path
from rushhour.data import load
from rushhour.goal import SLO, AccuracyBudget, Goal
from rushhour.models import source_for
from rushhour.progress import Silent
from rushhour.report import write_report
from rushhour.train import TrainSettings
from rushhour.tune import TuneSettings, tune_run

data, run = sys.argv[1:]
dataset = load(data)
tune_run(
    source_for("article", dataset.sample_shape, dataset.task),
    dataset,
    Goal(SLO.parse("p90<50ms"), AccuracyBudget.parse("10%")),
    run=Path(run),
    training=TrainSettings(epochs=1, batch=32),
    settings=TuneSettings(window_s=0.4, proof_s=2.0, resolution=0.5, race=1),
    progress=Silent(),
)
write_report(Path(run))
"""


def small_data(file: Path) -> None:
    """Four classes of 12x12 pictures: a bright quarter on noise."""
    random = np.random.default_rng(0)
    labels = np.arange(480, dtype=np.int64) % 4
    pictures = random.integers(0, 120, (480, 12, 12, 1), dtype=np.uint8)
    for picture, label in zip(pictures, labels, strict=True):
        row, column = divmod(int(label), 2)
        picture[6 * row : 6 * row + 6, 6 * column : 6 * column + 6] += 100
    np.savez(file, x=pictures, y=labels)


def lines(run: Path) -> list[bytes]:
    file = run / "measurements.jsonl"
    return file.read_bytes().splitlines(keepends=True) if file.exists() else []


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_a_run_killed_again_and_again_goes_on_and_ends_in_a_plan(tmp_path: Path) -> None:
    small_data(tmp_path / "small.npz")
    run = tmp_path / "run"
    command = [sys.executable, "-c", RUN, str(tmp_path / "small.npz"), str(run)]
    earlier: list[bytes] = []
    for stop_after in (1, 12, 20, None):
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE)
        while process.poll() is None and (stop_after is None or len(lines(run)) < stop_after):
            time.sleep(0.02)
        if stop_after is not None:
            process.kill()
        _, errors = process.communicate()
        assert process.returncode == (0 if stop_after is None else -signal.SIGKILL), errors.decode()
        now = lines(run)
        assert now[: len(earlier)] == earlier, "nothing that was measured is lost"
        earlier = [line for line in now if line.endswith(b"\n")]

    keys = [(entry["phase"], entry["subject"], entry["detail"]) for entry in map(json.loads, earlier)]
    assert len(keys) == len(set(keys)), "nothing is measured twice"
    assert all(entry["machine"]["cpu"] for entry in map(json.loads, earlier))

    plan = Plan.load(run / "plan.json")
    evidence = plan.evidence
    assert plan.feasible
    assert evidence is not None
    assert evidence.capacity_rps > evidence.baseline_capacity_rps > 0
    assert evidence.accuracy > 0.8
    assert [rung.step for rung in evidence.ladder][:2] == ["as it is", "compiled"]
    assert {trial.fate for trial in evidence.trials} >= {"won", "baseline"}
    assert open_target(run).bundle.manifest.hash == plan.variants[0].bundle_hash
    assert len(Journal(run / "measurements.jsonl")) == len(earlier)
    assert (run / "report.html").stat().st_size < 2_000_000
    assert {path.name for path in run.iterdir() if not path.name.startswith(".")} == {
        "plan.json",
        "measurements.jsonl",
        "report.html",
        "bundles",
        "training",
    }
    for role in ("reference", "int8"):
        assert not list((run / "bundles" / role).glob("*.pkl"))
        Bundle.open(run / "bundles" / role)

    # A run that is complete measures nothing more.
    subprocess.run(command, check=True)
    assert lines(run) == earlier
