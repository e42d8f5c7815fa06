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
from rushhour.cli import cli
from rushhour.serve import ServeSettings
from rushhour.testing.bundles import tiny_bundle

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_client_examples_run_as_they_stand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (command,) = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    assert len(codes) == 2
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (640, 480), "orange").save("cat.jpg")
    # The name that training gives to the demo's model: network and data.
    settings = ServeSettings(http_port=0, model="article-fashion-mnist")
    with serving(tiny_bundle(tmp_path / "b", shape=(28, 28, 1), classes=10).path, settings) as server:
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
