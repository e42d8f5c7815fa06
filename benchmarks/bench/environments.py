"""The peers' own environments, `.bench/NAME`, made when they are first needed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path


class CannotInstall(Exception):
    """A peer's environment could not be made; the message is pip's last line."""


def python_of(peer: Path, bench: Path, *, engine: bool = True) -> Path:
    """The Python of a peer's environment, which is made if it is not there or was made for something else.

    Args:
        peer: its folder, with `requirements.txt`.
        bench: `.bench`.
        engine: whether it needs OpenVINO, in the version of ours.

    Raises:
        CannotInstall: if pip fails.
    """
    environment = bench / peer.name
    python, mark = environment / "bin" / "python", environment / ".made-for"
    wanted = [
        *filter(None, (peer / "requirements.txt").read_text().split("\n")),
        *((f"openvino=={importlib.metadata.version('openvino')}", "numpy") if engine else ()),
    ]
    made_for = hashlib.sha256("\n".join([sys.version, *wanted]).encode()).hexdigest()
    if mark.exists() and mark.read_text() == made_for:
        return python
    print(f"installing {peer.name} in {environment}", file=sys.stderr)
    _run([sys.executable, "-m", "venv", "--clear", str(environment)])
    # torch first and pinned, where a peer brings it: any other order pulls in a build of several gigabytes.
    if any(line.startswith("torch==") for line in wanted):
        _run([str(python), "-m", "pip", "install", "--quiet", *(line for line in wanted if line.startswith("torch=="))])
    _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted])
    mark.write_text(made_for)
    return python


def versions_of(python: Path, packages: tuple[str, ...]) -> dict[str, str]:
    """package -> version, of those that are there."""
    code = (
        "import importlib.metadata as m, json, sys\nfound = {}\nfor name in sys.argv[1:]:\n"
        "    try: found[name] = m.version(name)\n    except m.PackageNotFoundError: pass\nprint(json.dumps(found))"
    )
    import json

    said = subprocess.run([str(python), "-c", code, *packages], capture_output=True, text=True, check=True).stdout
    found: dict[str, str] = json.loads(said)
    return found


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise CannotInstall((errors or ["pip printed no message"])[-1][:300])
