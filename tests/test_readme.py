"""The README's code runs, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from conftest import serving
from rushhour.cli import cli
from rushhour.serve import ServeSettings
from rushhour.testing.bundles import tiny_bundle

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_client_example_runs_as_it_stands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    # The name that training gives to the demo's model: network and data.
    settings = ServeSettings(http_port=0, model="article-fashion-mnist")
    with serving(tiny_bundle(tmp_path / "b", shape=(28, 28, 1), classes=10).path, settings) as server:
        exec(code.replace("127.0.0.1:8000", server.url.removeprefix("http://")), {})
    assert len(capsys.readouterr().out.split()) >= 10


def test_every_command_it_names_exists_and_every_command_is_named() -> None:
    named = set(re.findall(r"^(?:\| `)?rushhour (\w+)", README, re.MULTILINE))
    assert named == set(cli.commands)
