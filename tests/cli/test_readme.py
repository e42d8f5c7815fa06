"""The README's code runs, and its commands exist."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from conftest import serving
from rushhour.bundle import Bundle
from rushhour.cli import cli
from rushhour.goal import SLO, Goal
from rushhour.plan import Plan, Policy, Variant
from rushhour.testing.bundles import tiny_bundle

README = (Path(__file__).parents[2] / "README.md").read_text()


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
    codes = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (command,) = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    assert len(codes) == 2
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (640, 480), "orange").save("cat.jpg")
    with serving(demo_won_by_int8(tmp_path / "demo")) as server:
        address = server.url.removeprefix("http://")
        for code in codes:
            exec(code.replace("127.0.0.1:8000", address), {})
            assert len(capsys.readouterr().out.split()) >= 10
        if shutil.which("curl"):
            said = subprocess.run(shlex.split(command.replace("127.0.0.1:8000", address)), capture_output=True)
            assert len(json.loads(said.stdout)["outputs"][0]["data"]) == 10


def test_every_command_it_names_exists_and_every_command_is_named() -> None:
    named = set(re.findall(r"^(?:\| `)?rushhour (\w+)", README, re.MULTILINE))
    assert named == set(cli.commands)


def test_the_model_it_asks_for_is_the_one_that_the_demo_serves() -> None:
    """Whatever wins: network and data, as training names a bundle."""
    said = README + str(cli.commands["serve"].help)
    asked = set(re.findall(r"/models/([\w.-]+)", said)) | set(re.findall(r"infer\(\"([\w.-]+)\"", said))
    assert asked - {"NAME"} == {"article-fashion-mnist"}
