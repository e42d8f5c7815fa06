"""Code that is trusted without an option: that of bundles that this user trained on this machine.

A bundle names the code that builds its network, and perhaps that of its task, and importing that runs it; so a bundle
from elsewhere is not trusted (`source.py`). But who trained a bundle has run that code already. A line in a file of the
user records the hash of the weights with the hash of the code's file: another bundle, or other code of the same name,
does not match it.
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
    """Record that the code of this bundle was run here; does nothing where the file cannot be written."""
    file = _file()
    known = _known(file)
    lines = [line for line in _lines(bundle) if line not in known]
    if not lines:
        return
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(file, "a", opener=lambda path, flags: os.open(path, flags, 0o600)) as file_:
            file_.writelines(f"{line}\n" for line in lines)


def trusted_factories(bundle: Bundle, trusted: tuple[str, ...] = ()) -> tuple[str, ...]:
    """What may be imported for this bundle: what is given, and its own factory and task if they were recorded."""
    lines = _lines(bundle)
    known = _known(_file()) if lines else frozenset()
    return (*trusted, *(name for line, name in lines.items() if line in known))


def _lines(bundle: Bundle) -> dict[str, str]:
    """The lines that record a bundle -> the factory, or the task of the user's own, that each of them is about."""
    source, files, kind = bundle.manifest.source, bundle.manifest.files, bundle.manifest.task.kind
    if source is None or WEIGHTS not in files:
        return {}
    lines = {}
    for name in (source.factory, *((kind,) if ":" in kind else ())):
        file = None if name.startswith("rushhour.") else file_of(name.partition(":")[0])
        if file is None:
            continue
        with contextlib.suppress(OSError):
            code = hashlib.sha256(file.read_bytes()).hexdigest()
            lines[f"{files[WEIGHTS].sha256} {code} {name}"] = name
    return lines


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
