"""The command line: what a careless and a hostile hand get. Each error is one line with exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from in_process import answer_to

from conftest import Server
from rushhour.bundle import Bundle
from rushhour.goal import SLO, Goal
from rushhour.load import why_longer
from rushhour.plan import Plan, Policy, Variant


def rushhour(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rushhour", *map(str, arguments)], capture_output=True, text=True, timeout=120, cwd=cwd
    )


def refused(done: subprocess.CompletedProcess[str], *says: str) -> None:
    """An error in one line, after nothing but progress, and exit code 2."""
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2, done.stderr
    assert line.startswith("rushhour: ")
    assert "Traceback" not in done.stderr
    for text in says:
        assert text in line


@pytest.mark.parametrize("command", [["demo"], ["tune", "article", "--data", "fashion-mnist"], ["load", "http://x"]])
@pytest.mark.parametrize("slo", ["p99", "50ms", "p100<1s", "p99<0ms", "p99<50", "p99<50ms; rm -rf /", ""])
def test_an_slo_that_cannot_be_read(command: list[str], slo: str, tmp_path: Path) -> None:
    out = [] if command[0] == "load" else ["--out", tmp_path / "run"]
    done = answer_to(*command, "--slo", slo, *out)
    refused(done, "for example")
    assert list(tmp_path.iterdir()) == []


def test_a_budget_without_its_percent_sign(tmp_path: Path) -> None:
    refused(answer_to("demo", "--max-accuracy-drop", "1", "--out", tmp_path / "run"), "1%")


@pytest.mark.parametrize(
    ("budget", "says"),
    [("0", "a duration is above 0"), ("-5m", "a duration is above 0"), ("1s", "cannot tune within 1 s")],
)
@pytest.mark.parametrize("command", [["demo"], ["tune", "article", "--data", "fashion-mnist"]])
def test_a_time_that_is_too_short_for_any_answer(command: list[str], budget: str, says: str, tmp_path: Path) -> None:
    refused(answer_to(*command, f"--budget={budget}", "--out", tmp_path / "run"), says)
    assert list(tmp_path.iterdir()) == []


def test_a_budget_that_is_none_cannot_grow(tmp_path: Path) -> None:
    command = ["tune", "article", "--data", "fashion-mnist", "--stretch", "3m", "--out", tmp_path / "run"]
    refused(answer_to(*command), "the stretch of the budget has no effect", "give a budget too")
    assert list(tmp_path.iterdir()) == []


def test_data_without_labels_cannot_train_what_is_tuned(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).integers(0, 256, (100, 4, 4, 1), dtype=np.uint8))
    refused(answer_to("tune", "mlp", "--data", tmp_path / "x.npz", "--out", tmp_path / "run"), "has no labels")
    assert not (tmp_path / "run").exists()


def test_missing_data(tmp_path: Path) -> None:
    refused(answer_to("tune", "article", "--data", tmp_path / "none", "--out", tmp_path / "run"), "none")
    assert not (tmp_path / "run").exists()


def test_data_with_one_class(tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", x=np.zeros((20, 8, 8, 1), np.uint8), y=np.zeros(20, np.int64))
    refused(answer_to("tune", "article", "--data", tmp_path / "one.npz", "--out", tmp_path / "run"), "class")
    assert not (tmp_path / "run").exists()


@pytest.mark.long
@pytest.mark.slow
def test_data_without_labels_is_for_a_bundle(tiny: Bundle, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).integers(0, 256, (100, 4, 4, 1), dtype=np.uint8))
    refused(answer_to("train", "mlp", "--data", tmp_path / "x.npz", "--out", tmp_path / "out"), "has no labels")
    command = ["compress", tiny.path, "--data", tmp_path / "x.npz", "--max-accuracy-drop", "50%"]
    done = answer_to(*command, "--out", tmp_path / "small")
    assert done.returncode in (0, 1), done.stderr
    assert "agreement" in done.stdout + done.stderr


def test_a_model_whose_output_does_not_fit(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        "from torch import nn\ndef seven():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))\n"
    )
    random = np.random.default_rng(0)
    labels = np.arange(60, dtype=np.int64) % 3
    np.savez(tmp_path / "three.npz", x=random.integers(0, 255, (60, 8, 8, 1), dtype=np.uint8), y=labels)
    done = rushhour("tune", "nets:seven", "--data", "three.npz", "--out", "run", cwd=tmp_path)
    refused(done, "7", "3 classes")
    assert not (tmp_path / "run" / "bundles").exists()


def test_a_changed_byte_in_a_bundle(tiny: Bundle, tmp_path: Path) -> None:
    copy = tiny.copy_to(tmp_path / "bundle")
    content = bytearray(copy.model.read_bytes())
    content[len(content) // 2] ^= 1
    copy.model.write_bytes(content)
    refused(answer_to("serve", copy.path), "model.onnx does not match its hash")


def test_a_plan_of_a_newer_schema(tmp_path: Path) -> None:
    plan = Plan(Goal(SLO.parse("p99<50ms")), (Variant("v", "bundles/x", "0", "openvino", "f32"),), Policy())
    plan.save(tmp_path / "plan.json")
    document = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps(document | {"schema": 99}))
    refused(answer_to("serve", tmp_path), "schema 99", "upgrade")
    refused(answer_to("report", tmp_path), "schema 99", "upgrade")


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    random, labels = np.random.default_rng(0), np.arange(60, dtype=np.int64) % 3
    np.savez(tmp_path / "three.npz", x=random.integers(0, 255, (60, 8, 8, 1), dtype=np.uint8), y=labels)
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        (small / "filler").write_bytes(b"x" * 40_000)
        done = rushhour("tune", "article", "--data", tmp_path / "three.npz", "--out", small / "run")
        refused(done, "the disk is full", "--out")
        left = {file.name.partition(".")[0] for file in small.rglob("*") if file.is_file() and file.name != "filler"}
        expected = {"", "run", "training", "events", "curves", "measurements"}  # the last with what earlier runs taught
        assert left <= expected, "what was asked, and the first lines learned"
    finally:
        subprocess.run(["umount", small], check=True)


def test_an_unknown_option_and_a_missing_argument() -> None:
    refused(answer_to("serve"), "see rushhour serve --help")
    refused(answer_to("demo", "--slow"), "--slow")


@pytest.mark.parametrize(
    "url", ["nonsense", "http://127.0.0.1:1", "ftp://127.0.0.1", "http://[::1", "http://127.0.0.1:x"]
)
def test_a_url_that_leads_nowhere(url: str) -> None:
    refused(answer_to("load", url, "--rate", "10"))


def test_a_model_name_that_the_server_does_not_have(server: Server) -> None:
    refused(answer_to("load", server.url, "--model", "other", "--rate", "10"), "other")


@pytest.mark.slow
def test_load_at_a_rate_gives_a_verdict_for_machines(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "load.json"
    done = rushhour("load", server.url, "--slo", "p99<500ms", "--rate", "300", "--duration", "3s", "--json", file)
    result = json.loads(file.read_text())
    assert done.returncode == (0 if result["outcome"] == "pass" else 1)
    assert result["slo"] == "p99<500ms"
    run = result["runs"][0]
    for name in ("rate_rps", "n", "late", "p50_ms", "p99_ms", "p99_interval_ms", "errors", "shed", "generator_cpu"):
        assert name in run
        assert name in result
    assert run["n"] > 700
    assert max(run["speeds"]) > 0
    assert "of its usual speed" in done.stdout
    assert run["errors"] == 0


def test_what_takes_longer_than_was_asked_for_is_said_before_it_begins(server: Server) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "rushhour", "load", server.url, "--rate", "20", "--duration", "3s"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as begun:
        try:
            assert begun.stderr is not None
            first = begun.stderr.readline()
        finally:
            begun.kill()
    assert first.startswith("20 requests/s take up to 34 s, not 3 s: a verdict on p99<50ms takes 473 requests (24 s); ")
    assert "200 requests of warm-up (10 s)" in first


@pytest.mark.parametrize(
    ("slo", "rate", "window_s", "says"),
    [
        ("p99<50ms", 500, 10, ""),
        ("p99<50ms", 100, 3, "takes 900 requests (9 s)"),
        ("p99<1s", 1000, 3, "20 times the limit (20 s)"),
        ("p50<50ms", 5, 3, "warm-up (10 s)"),
        ("p99.9<50ms", 100, 3, "a verdict on p99.9<50ms takes"),
    ],
)
def test_why_a_window_is_longer(slo: str, rate: float, window_s: float, says: str) -> None:
    why = why_longer(SLO.parse(slo), rate, window_s)
    assert (says in why) if says else not why


def test_a_search_says_that_it_does_not_heed_a_duration(tmp_path: Path) -> None:
    done = answer_to("load", "http://127.0.0.1:1", "--duration", "3s")
    assert "the search for the capacity takes" in done.stderr.splitlines()[0]
    refused(done, "cannot reach")


@pytest.mark.parametrize("command", ["demo", "train", "compress", "tune", "serve", "load", "compare", "report"])
def test_help_teaches(command: str) -> None:
    done = rushhour(command, "--help")
    assert done.returncode == 0
    assert "Usage: rushhour" in done.stdout
    assert "--json" in done.stdout
