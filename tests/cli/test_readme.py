"""README and docs: their code runs; their commands, options, links, files and names exist."""

from __future__ import annotations

import functools
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image

from conftest import serving
from rushhour.bundle import Bundle
from rushhour.cli import cli
from rushhour.goal import SLO, Goal
from rushhour.plan import Plan, Policy, Variant
from rushhour.serve import open_target
from rushhour.testing.bundles import tiny_bundle

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
RENDERED = "docs/benchmarks.md"  # from results, whose words are those of their time
GUIDES = ["README.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))]
GUIDES.remove(RENDERED)
DECISIONS = sorted(f"docs/decisions/{file.name}" for file in (ROOT / "docs" / "decisions").glob("*.md"))

FOREIGN_OPTIONS = {  # of torchrun, pytest, curl and the benchmarks
    *("--nnodes", "--max-restarts", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-conf", "--local-addr"),
    *("--dist", "--pdb", "--data-binary", "--only", "--seeds", "--out"),
}
FILES_OF_USERS = {  # of runs, bundles and examples
    *("examples/FIELD/NAME.toml", "street.json", "street.avi"),
    *("plan.json", "plan-so-far.json", "run.json", "report.html", "measurements.jsonl", "curves.jsonl"),
    *("bundle.json", "compression.json", "mynet.py", "nets.py", "trace.csv", "load.html", "load.png", "cat.jpg"),
    "tokenizer.json",
    *("keys", "cert.pem", "key.pem", "model.onnx", "runs/demo/report.html", "_pb2.py"),
}
CODE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
ENDINGS = r"(?:py|md|json|jsonl|proto|c|binpb|ipynb|svg|toml|html|css|yml)"


@functools.cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def code_of(page: str, language: str) -> list[str]:
    return [code for name, code in CODE.findall(text_of(page)) if name == language]


def spans_of(page: str) -> list[str]:
    """What a page has in backticks, outside its blocks of code."""
    return [" ".join(span.split()) for span in SPAN.findall(CODE.sub("", text_of(page)))]


def commands_of(page: str) -> Iterator[list[str]]:
    """The words behind each `rushhour` of a page, in blocks and in backticks."""
    lines = [line for _, code in CODE.findall(text_of(page)) for line in code.replace(", ", " ").splitlines()]
    for line in (*lines, *spans_of(page)):
        for found in re.finditer(r"(?<![\w./-])rushhour +([a-z].*)", line):
            words = re.sub(r"\s#.*|\bthe\b.*", "", found[1]).replace("'", "").replace('"', "").rstrip("]")
            yield words.split()


def options_of(command: click.Command) -> set[str]:
    return {name for each in command.params for name in (*each.opts, *each.secondary_opts)} | {"--help"}


# -- the code


def demo_won_by_int8(run: Path) -> Path:
    """A run like the demo's: its reference is named by network and data, and another bundle is served."""
    for role, name in (("reference", "article-fashion-mnist"), ("int8", "article-fashion-mnist-int8")):
        tiny_bundle(run / "bundles" / role, name=name, shape=(28, 28, 1), classes=10)
    served = Bundle.open(run / "bundles" / "int8")
    variant = Variant("int8-openvino-f32", "bundles/int8", served.manifest.hash, "openvino", "f32")
    model = Bundle.open(run / "bundles" / "reference").manifest.name
    Plan(Goal(SLO.parse("p99<50ms")), (variant,), Policy(), model=model).save(run / "plan.json")
    return run


def test_the_client_examples_run_as_they_stand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # that of OpenAI's client needs a text encoder: tests/serve/test_embeddings.py
    codes = [code for code in code_of("docs/serving.md", "python") if "openai" not in code]
    (command,) = code_of("docs/serving.md", "sh")
    assert len(codes) == 2
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (640, 480), "orange").save("cat.jpg")
    with serving(demo_won_by_int8(tmp_path / "demo")) as server:
        address = server.url.removeprefix("http://")
        for code in codes:
            exec(code.replace("127.0.0.1:8000", address), {})
            assert len(capsys.readouterr().out.split()) >= 10
        if shutil.which("curl"):
            done = subprocess.run(shlex.split(command.replace("127.0.0.1:8000", address)), capture_output=True)
            assert len(json.loads(done.stdout)["outputs"][0]["data"]) == 10


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(400)
def test_the_notebook_example_runs(tmp_path: Path) -> None:
    """As it stands, but for its times; in an interpreter of its own, which begins as a notebook's does."""
    (code,) = code_of("README.md", "python")
    (tmp_path / "mynet.py").write_text(
        "import torch\n\ndef build(input, classes):\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(classes))\n"
    )
    random = np.random.default_rng(0)
    for kind, grey in (("dark", 60), ("light", 180)):
        for index in range(300):
            file = tmp_path / "photos" / kind / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((grey + random.integers(-50, 50, (16, 16, 3))).astype(np.uint8)).save(file)
    code = code.replace('"8m"', '"15s"').replace('"10s"', '"2s"')
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=390)
    assert done.returncode == 0, done.stderr
    assert " late" in done.stdout or "void" in done.stdout, "a verdict, or that the machine was too busy for one"


def test_a_file_from_elsewhere_becomes_a_bundle_as_it_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = code_of("docs/compression.md", "python")
    monkeypatch.chdir(tmp_path)
    shutil.copy(tiny_bundle(tmp_path / "tiny").path / "model.onnx", "model.onnx")
    exec(code, {})
    assert "image" in capsys.readouterr().out


def test_a_ladder_by_hand_is_made_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = code_of("docs/ladder.md", "python")
    monkeypatch.chdir(tmp_path)
    run = Path("runs/photos")
    variants = []
    for seed, name in enumerate(("accurate", "fast")):
        bundle = tiny_bundle(run / "bundles" / name, seed=seed)
        variants.append(Variant(name, f"bundles/{name}", bundle.manifest.hash, "openvino", "f32"))
    Plan(Goal(SLO.parse("p99<50ms")), tuple(variants), Policy(), model="tiny").save(run / "plan.json")
    exec(code, {})
    assert [point.variant for point in open_target(run).plan.ladder] == ["accurate", "fast"]


def test_no_other_page_has_code_that_nothing_runs() -> None:
    pages = {page for page in GUIDES if code_of(page, "python") or code_of(page, "sh")}
    read_by_other_tests = {"docs/tasks.md"}
    assert pages == {"README.md", "docs/serving.md", "docs/compression.md", "docs/ladder.md"} | read_by_other_tests


# -- commands and options


@pytest.mark.parametrize("page", [*GUIDES, *DECISIONS])
def test_every_command_and_option_exists(page: str) -> None:
    for words in commands_of(page):
        verb = words[0]
        if "=" in verb or verb not in cli.commands:
            assert not re.fullmatch(r"[a-z]+", verb), f"rushhour {verb}"
            continue
        named = {re.split(r"[=,;:)]", word)[0] for word in words if word.startswith("--")}
        assert named <= options_of(cli.commands[verb]), f"rushhour {verb}"
    known = set[str]().union(*map(options_of, cli.commands.values()))
    named = {found for span in spans_of(page) for found in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)}
    assert named <= known | FOREIGN_OPTIONS


def test_every_command_is_in_the_readme() -> None:
    assert set(re.findall(r"^\| `rushhour (\w+)", README, re.MULTILINE)) == set(cli.commands)


@pytest.mark.parametrize("page", [*GUIDES, *DECISIONS])
def test_every_make_target_exists(page: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = [line for _, code in CODE.findall(text_of(page)) for line in code.splitlines()]
    named = {found for text in (*lines, *spans_of(page)) for found in re.findall(r"^make ([\w-]+)", text)}
    assert {name for name in named if not name.endswith("-NAME")} <= targets


def test_the_model_in_the_docs_is_the_one_that_the_demo_serves() -> None:
    """Whatever wins: network and data, as training names a bundle."""
    text = "".join(map(text_of, GUIDES)) + str(cli.commands["serve"].help)
    asked = set(re.findall(r"/models/([\w.-]+)", text)) | set(re.findall(r"infer\(\"([\w.-]+)\"", text))
    assert asked - {"NAME", "run"} == {"article-fashion-mnist"}


# -- links, files and names


def heading_ids(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*GUIDES, *DECISIONS, "CHANGELOG.md"])
def test_every_link_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in heading_ids(file), target


@functools.cache
def files_by_name() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for folder in ("src", "tests", "benchmarks", "docs", "fuzz"):
        for file in (ROOT / folder).rglob("*.*"):
            found.setdefault(file.name, []).append(file)
    return found


def places_of(path: str) -> list[Path]:
    """The files and folders that a page may mean by a path: from the root, from `src` or from the package."""
    if "/" not in path:
        return files_by_name().get(path, []) or [file for file in (ROOT / path,) if file.exists()]
    return [place for base in (ROOT, ROOT / "src", ROOT / "src" / "rushhour", ROOT / "docs")
            if (place := base / path).exists()]  # fmt: skip


@pytest.mark.parametrize("page", [*GUIDES, *DECISIONS, "CHANGELOG.md"])
def test_every_file_exists_and_has_what_it_is_named_for(page: str) -> None:
    """`serve/protocols/http.py`, `load/race.py: race`, `train/`."""
    rooms = {folder.name for folder in (ROOT / "src" / "rushhour").iterdir() if folder.is_dir()}
    rooms |= {"tests", "benchmarks", "docs", "fuzz", "examples", "src", "rushhour"}
    for span in spans_of(page):
        whole = re.fullmatch(rf"([\w./-]+\.{ENDINGS})(?:: ([\w.]+))?", span)
        if whole is None:
            folder = re.fullmatch(r"([\w-]+)/[\w/-]*", span)
            if folder is not None and folder[1] in rooms:
                assert places_of(span), span
            continue
        path, name = whole.groups()
        if path in FILES_OF_USERS or "*" in path:
            continue
        places = places_of(path)
        assert places, f"{span} is not there"
        for part in name.split(".") if name else ():
            assert any(re.search(rf"\b{part}\b", place.read_text()) for place in places), span


def test_the_floors_are_those_that_are_checked() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    checked = [{name.strip() for name in floor.split("|")} for floor in contracts[0]["layers"]]
    rows = re.findall(r"^\| (`.*?) \|", text_of("docs/architecture.md"), re.MULTILINE)
    assert [set(re.findall(r"`(\w+)(?:/|\.py)`", row)) for row in rows] == checked


@pytest.mark.parametrize("page", [*GUIDES, *DECISIONS, "CHANGELOG.md"])
def test_every_dotted_name_exists(page: str) -> None:
    prose = CODE.sub("", text_of(page))
    for dotted in set(re.findall(r"\brushhour(?:\.[a-zA-Z_]\w*)+(?!\.\w)", prose)):
        parts = dotted.split(".")
        thing: object = importlib.import_module(parts[0])
        for depth, part in enumerate(parts[1:], start=2):
            if not hasattr(thing, part):
                importlib.import_module(".".join(parts[:depth]))
            thing = getattr(thing, part)


FOREIGN_MEMBERS = {
    "ImageDataGenerator.flow",
    "torch.nn.Module",
    "Tensor.contiguous",
    "OverflowFix.ENABLE",
}  # of Keras, torch and NNCF


@functools.cache
def sources() -> dict[str, str]:
    """Class -> the text of the files that define it."""
    found: dict[str, str] = {}
    for file in (ROOT / "src").rglob("*.py"):
        text = file.read_text()
        for name in re.findall(r"^class (\w+)", text, re.MULTILINE):
            found[name] = found.get(name, "") + text
    return found


@pytest.mark.parametrize("page", [*GUIDES, *DECISIONS, "CHANGELOG.md"])
def test_every_member_of_a_class_exists(page: str) -> None:
    """`Batcher.take`, `capacity.Overhead`, `wire.Codec.decode`."""
    for span in spans_of(page):
        found = re.fullmatch(r"(?:[a-z_]+\.)*([A-Z]\w*[a-z]\w*)(?:\.([a-z_]\w*))?(?:\(.*\))?", span)
        if found is None or ("." not in span) or span in FOREIGN_MEMBERS:
            continue
        name, member = found.groups()
        assert name in sources(), span
        assert member is None or re.search(rf"\b{member}\b", sources()[name]), span
