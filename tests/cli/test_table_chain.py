"""A table from its file to answers in words, through every command, as a stranger would do it."""

from __future__ import annotations

import csv
import http.client
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import serving
from rushhour.bundle import Bundle

pytest.importorskip("pyarrow")


def rushhour(*arguments: str | Path) -> str:
    command = [sys.executable, "-m", "rushhour", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def ratings(path: Path, count: int = 3000) -> Path:
    """People of three kinds like films of three kinds, more than chance; some ages are missing."""
    random = np.random.default_rng(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user_id", "age", "kind", "film", "day", "liked"])
        for at in range(count):
            kind, film = random.integers(3), random.integers(12)
            liked = int(random.random() < (0.9 if film % 3 == kind else 0.2))
            age = "" if at % 40 == 3 else random.integers(18, 80)
            writer.writerow([random.integers(300), age, f"kind {kind}", f"film {film}", at // 10, liked])
    return path


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_table_through_every_command(tmp_path: Path) -> None:
    data = ratings(tmp_path / "ratings.csv")
    of_data = ("--data", data, "--task", "ranking")
    said = rushhour(
        "train", "deepfm", *of_data, "--target", "liked", "--group", "user_id", "--time", "day", "--epochs", "8",
        "--out", tmp_path / "network",
    )  # fmt: skip
    assert "split in time" in said
    bundle = Bundle.open(tmp_path / "network")
    table = bundle.manifest.table
    assert table is not None
    assert [column.name for column in table.columns] == ["age", "kind", "film"]
    assert (table.targets, table.group, table.time) == (("liked",), "user_id", "day")

    steps = tmp_path / "steps"
    rushhour(
        "compress", tmp_path / "network", "--data", data, "--recipe", "prune:0.5:epochs=1,int8", "--epochs", "1",
        "--steps", steps, "--out", tmp_path / "smaller", "--max-accuracy-drop", "10%",
    )  # fmt: skip
    made = [Bundle.open(each.parent) for each in steps.glob("*/bundle.json")]
    assert {each.manifest.precision for each in made} == {"f32", "int8"}
    assert all(each.manifest.table == table for each in made)
    assert min(each.manifest.parameters for each in made) < 0.8 * bundle.manifest.parameters

    rushhour(
        "tune", tmp_path / "network", "--data", data, "--slo", "p99<200ms", "--max-accuracy-drop", "10%",
        "--recipes", "none", "--budget", "40s", "--out", tmp_path / "run",
    )  # fmt: skip
    with serving(tmp_path / "run") as server:
        rows = [{"age": 31, "kind": f"kind {kind}", "film": f"film {film}"} for kind in range(3) for film in range(12)]
        connection = http.client.HTTPConnection(*server.address, timeout=60)
        connection.request("POST", "/v2/models/network/rows", json.dumps({"rows": rows}))
        answer = json.loads(connection.getresponse().read())
        connection.close()
        scores = np.array([each["score"] for each in answer["answers"]]).reshape(3, 12)
        alike = np.arange(12) % 3 == np.arange(3)[:, None]
        assert scores[alike].min() > scores[~alike].max()
        found = tmp_path / "load.json"
        rushhour("load", server.url, "--named-rows", "--rate", "30", "--duration", "2s", "--slo", "p99<2s",
                 "--json", found)  # fmt: skip
        assert json.loads(found.read_text())["runs"][0]["errors"] == 0
