"""Factories that are trusted without an option: those of bundles that this user trained on this machine.

A bundle names the code that builds its network, and importing that runs it; so a bundle from elsewhere is not trusted
(`source.py`). But who trained a bundle has run that code already. A line in a file of the user records the hash of the
weights with the hash of the factory's file: another bundle, or other code of the same name, does not match it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from rushhour.bundle import WEIGHTS, Bundle
from rushhour.models.structure import file_of

_FILE = "trained-here"


def record_factory(bundle: Bundle) -> None:
    """Record that the factory of this bundle was run here; does nothing where the file cannot be written."""
    line, file = _line(bundle), _file()
    if line is None or line in _known(file):
        return
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(file, "a", opener=lambda path, flags: os.open(path, flags, 0o600)) as file_:
            file_.write(f"{line}\n")


def trusted_factories(bundle: Bundle, trusted: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The factories that may be imported for this bundle: those that are given, and its own if it was recorded."""
    line, source = _line(bundle), bundle.manifest.source
    if line is None or source is None or line not in _known(_file()):
        return trusted
    return (*trusted, source.factory)


def _line(bundle: Bundle) -> str | None:
    """The line that records a bundle; None where there is nothing to record."""
    source, files = bundle.manifest.source, bundle.manifest.files
    if source is None or WEIGHTS not in files or source.factory.startswith("rushhour."):
        return None
    file = file_of(source.factory.partition(":")[0])
    if file is None:
        return None
    try:
        code = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return None
    return f"{files[WEIGHTS].sha256} {code} {source.factory}"


def _known(file: Path) -> frozenset[str]:
    """The recorded lines, if no other user can have written them."""
    try:
        about = file.stat()
        if about.st_uid != os.geteuid() or about.st_mode & 0o022:
            return frozenset()
        return frozenset(file.read_text().splitlines())
    except (OSError, UnicodeDecodeError):
        return frozenset()


def _file() -> Path:
    try:
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    except RuntimeError:  # the user has no home folder
        return Path(os.devnull)
    return state / "rushhour" / _FILE
