"""Factories that need no word of trust: those of bundles that this person trained on this machine.

A bundle names the code that builds its network, and importing that runs it; so a bundle from elsewhere is never
believed (`source.py`). But whoever trained a bundle has run that code already. What is noted then is the hash of the
weights with the hash of the file that the factory lies in: neither another bundle nor other code of the same name is
meant by it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from rushhour.bundle import WEIGHTS, Bundle
from rushhour.models.structure import file_of

_FILE = "trained-here"


def remember(bundle: Bundle) -> None:
    """Note that the factory of this bundle was run here. Where nothing can be noted, nothing is."""
    line, file = _line(bundle), _file()
    if line is None or line in _known(file):
        return
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(file, "a", opener=lambda path, flags: os.open(path, flags, 0o600)) as noted:
            noted.write(f"{line}\n")


def trusted_of(bundle: Bundle, trusted: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The factories that may be imported for this bundle: those that a person said, and its own if it was noted."""
    line, source = _line(bundle), bundle.manifest.source
    if line is None or source is None or line not in _known(_file()):
        return trusted
    return (*trusted, source.factory)


def _line(bundle: Bundle) -> str | None:
    """What is noted of a bundle; None where there is nothing to be."""
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
    """What is on file, if nobody else can have written it."""
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
    except RuntimeError:  # nobody's home
        return Path(os.devnull)
    return state / "rushhour" / _FILE
