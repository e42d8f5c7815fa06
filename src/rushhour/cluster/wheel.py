"""This Rushhour as a wheel: what a container installs is what exported it, from a checkout or an installation."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from importlib.metadata import distribution
from pathlib import Path
from typing import Final

from rushhour.system.storage import explained

_LEFT_OUT: Final = frozenset(("__pycache__", "testing"))
_WHEEL: Final = "Wheel-Version: 1.0\nGenerator: rushhour\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
_TIME: Final = (1980, 1, 1, 0, 0, 0)
"""Of every file: equal content gives an equal wheel."""


def write_wheel(folder: Path) -> Path:
    """Write the wheel into a folder. Source: packaging.python.org, binary distribution format.

    Raises:
        StorageError: if it cannot be written.
    """
    installed = distribution("rushhour")
    path = folder / f"rushhour-{installed.version}-py3-none-any.whl"
    info = f"rushhour-{installed.version}.dist-info"
    package = Path(__file__).parents[1]
    metadata = installed.read_text("METADATA") or installed.read_text("PKG-INFO") or ""
    files = {
        f"{info}/METADATA": metadata.encode(),
        f"{info}/WHEEL": _WHEEL.encode(),
        f"{info}/entry_points.txt": (installed.read_text("entry_points.txt") or "").encode(),
    }
    with explained(f"write {path}"):
        for file in sorted(package.rglob("*")):
            relative = file.relative_to(package.parent)
            if file.is_file() and _LEFT_OUT.isdisjoint(relative.parts):
                files[relative.as_posix()] = file.read_bytes()
        rows = [f"{name},sha256={_digest(content)},{len(content)}" for name, content in files.items()]
        files[f"{info}/RECORD"] = ("\n".join([*rows, f"{info}/RECORD,,"]) + "\n").encode()
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                entry = zipfile.ZipInfo(name, _TIME)
                entry.external_attr = 0o644 << 16
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, content)
    return path


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
