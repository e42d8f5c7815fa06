"""`examples/quickstart.ipynb` runs as it stands, cell by cell, inside a running event loop as in Jupyter."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


def cells(kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


@pytest.mark.slow
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names: dict[str, Any] = {"__name__": "__main__"}

    async def run() -> None:
        try:
            for number, code in enumerate(cells("code")):
                exec(compile(code, f"{NOTEBOOK.name}, code cell {number}", "exec"), names)
        finally:
            if "server" in names:
                names["server"].close()

    asyncio.run(run())
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "requests" in shown.out
    assert shown.out.splitlines()[-1].startswith("cannot read the SLO '50ms': ")


def test_it_is_a_notebook_without_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert all(cell["outputs"] == [] for cell in notebook["cells"] if cell["cell_type"] == "code")
    for block in re.findall(r"```python\n(.*?)```", "\n".join(cells("markdown")), re.DOTALL):
        compile(block, "markdown", "exec")
