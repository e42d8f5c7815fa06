"""A base installation serves and loads; a verb that needs more says in one line which extra to install."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from plans import run_of

from rushhour.errors import InstallError
from rushhour.system.extras import EXTRAS, explain_missing, require

ROOT = Path(__file__).parents[2]
MODULES = [name for modules in EXTRAS.values() for name in modules]


@pytest.fixture
def base(tmp_path: Path) -> dict[str, str]:
    """An environment in which no package of an extra can be imported, as after `pip install rushhour`."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({MODULES}))\n")
    path = os.pathsep.join(filter(None, [str(folder), *sys.path]))
    return {**os.environ, "PYTHONPATH": path}


def run(base: dict[str, str], *words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rushhour", *map(str, words)]
    return subprocess.run(command, env=base, capture_output=True, text=True, timeout=120, check=False)


def test_the_extras_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def modules(lines: list[str]) -> set[str]:
        names = {re.split(r"[\[<>=]", line)[0].replace("-", "_") for line in lines if not line.startswith("rushhour")}
        return {{"scikit_learn": "sklearn"}.get(name, name) for name in names}

    optional = project["optional-dependencies"]
    for extra, names in EXTRAS.items():
        assert modules(optional[extra]) == set(names), extra
    assert not modules(project["dependencies"]) & set(MODULES)
    assert optional["all"] == ["rushhour[compress]"]
    assert "rushhour[report,train]" in optional["compress"]


def test_what_is_installed_needs_nothing() -> None:
    require("train", "compress", "report")


def test_a_missing_package_is_named_with_the_extra_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InstallError) as raised:
        require("compress")
    assert str(raised.value) == (
        "the package torch is not installed: this needs Rushhour's extra compress; "
        "install it with `pip install 'rushhour[compress]'`"
    )


def test_only_imports_of_these_packages_are_explained() -> None:
    assert "rushhour[compress]" in str(explain_missing([ModuleNotFoundError("", name="torch_pruning.pruner")]))
    for error in (ModuleNotFoundError("", name="mynet"), ImportError("", name="torch"), ValueError("torch")):
        assert explain_missing([error]) is None


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        (["train", "mlp", "--data", "x.npz", "--out", "b"], "train"),
        (["compress", "b", "--data", "x.npz", "--out", "c"], "compress"),
        (["tune", "mlp", "--data", "x.npz", "--out", "r"], "compress"),
        (["report", "r"], "report"),
        (["import", "m.onnx", "--out", "b"], "train"),
    ],
)
def test_a_verb_without_its_extra_is_one_line(base: dict[str, str], words: list[str], extra: str) -> None:
    done = run(base, *words)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("rushhour: the package ")
    assert line.endswith(f"`pip install 'rushhour[{extra}]'`")


def test_the_help_needs_no_extra(base: dict[str, str]) -> None:
    assert "export" in run(base, "--help").stdout


@pytest.mark.parametrize("precision", ["f32", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_base_installation_serves_loads_and_exports(base: dict[str, str], tmp_path: Path, precision: str) -> None:
    served = run_of(tmp_path / "run", precision=precision)
    code = (
        "import rushhour, sys\n"
        f"with rushhour.serve({str(served)!r}, http_port=0, grpc_port=0) as server:\n"
        "    for url in (server.url, server.grpc_url):\n"
        "        print(rushhour.load(url, closed_loop=2, duration=0.5))\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=base, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    exported = run(base, "export", served, "--docker", tmp_path / "image", "--json", tmp_path / "e.json")
    assert exported.returncode == 0, exported.stderr
    assert json.loads((tmp_path / "e.json").read_text())["memory_mib"] > 512
