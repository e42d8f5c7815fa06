"""The benchmark of doors, at a small scale."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import doors  # noqa: E402
import render  # noqa: E402
from bench.brought import KINDS  # noqa: E402
from bench.record import Record  # noqa: E402

ALL = dict.fromkeys(doors.CELLS, "works")


def test_a_row_says_which_cells_do_not_work() -> None:
    whole = doors.judged_row("lstm", KINDS["lstm"], doors.Row({**ALL, "equality": "works (2e-07)"}, (100, 40)))
    assert whole.checks[0].holds
    assert whole.tables[0].rows[0][-1] == "100 -> 40"
    part = doors.judged_row("lstm", KINDS["lstm"], doors.Row({**ALL, "int8": "no convolution"}))
    (check,) = part.checks
    assert (check.holds, check.value) == (False, 4)
    assert "int8: no convolution" in (check.why or "")
    assert "no" in part.tables[0].rows[0]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = doors.Kind("something", lambda folder: pytest.fail("made"), ("no_such_package",), "tabular")
    monkeypatch.setattr(doors, "KINDS", {"strange": kind})
    part = doors.row("strange", doors.Scale())
    assert "no_such_package is not installed (extra tabular)" in (part.checks[0].why or "")


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_model_goes_all_the_way_and_a_run_resumes(tmp_path: Path) -> None:
    out = tmp_path / "doors.json"
    command = [sys.executable, str(BENCHMARKS / "doors.py"), "--out", str(out), "--only", "residual", "--epochs", "1"]
    for _ in range(2):
        done = subprocess.run([*command, "--keep"], capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
    found = Record.load(out)
    assert render.render([("doors", found)])
    checks = {check.id: check for check in found.checks}
    assert checks["1.residual"].holds, checks["1.residual"].why
    assert checks["1"].value == 1
    assert checks["1.faults"].holds


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_articles_service_is_loaded_beside_its_plan(tmp_path: Path) -> None:
    if any(importlib.util.find_spec(name) is None for name in ("keras", "fastapi", "uvicorn")):
        pytest.skip("Keras or FastAPI is not installed")
    out = tmp_path / "doors.json"
    command = [sys.executable, str(BENCHMARKS / "doors.py"), "--out", str(out), "--only", "article,own-size,speed"]
    command += ["--images", "300", "--tests", "60", "--budget", "60s", "--rounds", "1", "--seconds", "0.3"]
    command += ["--own-side", "32", "--speed-side", "32", "--work", str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    checks = {check.id: check for check in Record.load(out).checks}
    assert {"2.capacity", "2.accuracy", "2.own-size", "3.article", "3.mobilenet"} <= set(checks)
    assert all(check.value is not None for name, check in checks.items() if name[0] in "23")
