"""Modules of users: edited after their import, run as scripts, and with habits that change the whole process."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rushhour.bundle import Source
from rushhour.errors import ModelError
from rushhour.models import build, source_for
from rushhour.models.structure import code_of
from rushhour.task import Task

CODE = """
import functools
from torch import nn

class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.body = nn.Linear(width, 3)
        self.names = {"a", "b"} if width in {1, 2} else None

    def forward(self, x):
        return self.body(x).relu()

    @staticmethod
    def scaled(x):
        return [each * 2 for each in x]

def build():
    return Net()
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "parts_net.py"
    sys.modules.pop("parts_net", None)


def _code_of() -> dict[str, str]:
    return code_of(Source("parts_net:build"), ("parts_net:build",))


@pytest.mark.parametrize(
    ("old", "new", "function"),
    [
        (".relu()", ".tanh()", "Net.forward"),
        ("width=8", "width=8, depth=2", "Net.__init__"),
        ("each * 2", "each * 3", "Net.scaled"),
        ("return Net()", "return Net(9)", "build"),
        ("{1, 2}", "{1, 3}", "Net.__init__"),
    ],
)
def test_a_file_that_was_edited_after_its_import_is_refused(module: Path, old: str, new: str, function: str) -> None:
    """The old network would be trained, and recorded with the hash of the new code."""
    module.write_text(CODE)
    _code_of()
    module.write_text(CODE.replace(old, new))
    with pytest.raises(ModelError, match=rf"parts_net.py has changed since it was imported: .*the old {function}; "):
        _code_of()
    importlib.reload(sys.modules["parts_net"])
    _code_of()


def test_comments_and_lines_are_no_change(module: Path) -> None:
    module.write_text(CODE)
    before = _code_of()
    module.write_text(f"# moved\n\n{CODE}\n# more")
    assert _code_of() == before


@pytest.mark.parametrize("code", ["import sys; sys.exit(2)", "import argparse; argparse.ArgumentParser().parse_args()"])
def test_a_module_that_is_a_script_does_not_end_the_process(
    module: Path, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module.write_text(code)
    monkeypatch.setattr(sys, "argv", ["rushhour", "train"])
    with pytest.raises(ModelError, match=r"cannot import the model 'parts_net:build': SystemExit: 2; .*__main__"):
        _code_of()


def test_a_factory_that_ends_the_process_is_refused(module: Path) -> None:
    module.write_text("def build():\n    raise SystemExit('no GPU')")
    with pytest.raises(ModelError, match="cannot build the model 'parts_net:build': SystemExit: no GPU"):
        build(Source("parts_net:build"), ("parts_net:build",))


HABITS = """
import os, torch
os.chdir("/")
torch.set_grad_enabled(False)
torch.set_default_dtype(torch.float64)

def build():
    os.chdir("/usr")
    torch.set_grad_enabled(False)
    return torch.nn.Linear(2, 2, dtype=torch.float32)
"""


def test_what_a_module_changes_for_the_whole_process_is_restored(module: Path) -> None:
    """The bundle was written to another folder, and training failed without gradients."""
    module.write_text(HABITS)
    before = Path.cwd()
    try:
        build(Source("parts_net:build"), ("parts_net:build",))
        assert Path.cwd() == before
        assert torch.is_grad_enabled()
        assert torch.get_default_dtype() == torch.float32
    finally:
        os.chdir(before)
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float32)


def test_the_file_of_a_module_without_the_factory_is_named(module: Path) -> None:
    module.write_text("")
    with pytest.raises(
        ModelError, match=r"the module 'parts_net' \(.*parts_net\.py\) has no function or class 'build'"
    ):
        _code_of()


@pytest.mark.parametrize(
    ("model", "meant"),
    [("nets.py", "nets:FACTORY"), ("nets.small", "nets:small"), ("./zoo/nets.py", "zoo.nets:FACTORY")],
)
def test_a_file_or_a_dotted_name_is_told_what_it_would_be(model: str, meant: str) -> None:
    with pytest.raises(ModelError, match=f"your own as module:factory: {meant}$"):
        source_for(model, (8,), Task("regression", outputs=1))


def test_the_file_of_a_factory_is_told_its_module() -> None:
    with pytest.raises(ModelError, match=r"on PYTHONPATH: zoo\.nets:small$"):
        build(Source("zoo/nets.py:small"), ("zoo/nets.py:small",))
