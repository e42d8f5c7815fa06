"""Unexpected errors: one line with what was being done and what happened, and a file with the traceback."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

from rushhour.system.machine import describe
from rushhour.system.storage import reason

_MOST_LETTERS = 300
_WHILE = "while "
_ROOM = str(Path(__file__).resolve().parents[1])
_KITS = str(Path(_ROOM) / "testing")


def note_activity(error: BaseException, what: str) -> None:
    """Note on an exception what was being done when it was raised; the first such note counts."""
    first = what[:1].lower() if what[1:2].islower() else what[:1]
    error.add_note(f"{_WHILE}{first}{what[1:]}")


def user_code_line(error: BaseException) -> str:
    """The innermost line of the user's own code in a traceback, as ` (FILE, line N)`; empty if there is none."""
    return next((place for place in map(_place, cause_chain(error)[::-1]) if place), "")


def cause_chain(error: BaseException) -> list[BaseException]:
    """An error and the errors it was raised from, up to the first."""
    found = [error]
    while (cause := found[-1].__cause__ or found[-1].__context__) is not None and cause not in found:
        found.append(cause)
    return found


def summary_of(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


@functools.cache
def _installed_prefixes() -> tuple[str, ...]:
    """Path prefixes of Python and of installed packages. Computed on first use, which takes milliseconds."""
    paths = sysconfig.get_paths()
    return (*{paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}, "<")


def _place(error: BaseException) -> str:
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        ours = frame.filename.startswith(_ROOM) and not frame.filename.startswith(_KITS)
        if not ours and not frame.filename.startswith(_installed_prefixes()):
            return f" ({Path(frame.filename).name}, line {frame.lineno})"
    return ""


def report_unexpected(error: BaseException, doing: str) -> str:
    """One line on an exception that is not a `RushhourError`. Its traceback is written to a file, which the line names.

    Args:
        error: with a note on what was being done, if there is one (`note_activity`).
        doing: what was being done otherwise.
    """
    notes = (note for note in getattr(error, "__notes__", ()) if note.startswith(_WHILE))
    what, known, theirs = next(notes, _WHILE + doing), _known(error), user_code_line(error)
    text = " ".join(str(error).split())[:_MOST_LETTERS]
    happened = known or type(error).__name__ + (f": {text}" if text else "") + (
        f", in your own code{theirs}" if theirs else ", which Rushhour does not expect"
    )
    kept = _kept(error, f"{what}: {happened}")
    if kept is not None:
        report = "" if known or theirs else ": please report the error with that file"
        return f"{what}: {happened}; its traceback is in {kept}{report}"
    if not known:
        traceback.print_exception(error, file=sys.stderr)  # there is no other place for it
    shown = "" if known else ", and is shown above"
    return f"{what}: {happened}; its traceback could not be written to a file{shown}"


def _known(error: BaseException) -> str:
    """Reason and remedy of an error of the machine, not of the program; empty for others."""
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "there is not enough memory; free some, or use smaller batches and fewer workers"
    found = reason(error) if isinstance(error, OSError) else None
    if found is None:
        return ""
    assert isinstance(error, OSError)
    return f"{found[0]}{'' if error.filename is None else f' ({os.fsdecode(error.filename)})'}; {found[1]}"


def _kept(error: BaseException, what: str) -> Path | None:
    shown = "".join(traceback.format_exception(error))
    text = f"{what}\n\n{shlex.join(sys.argv)}\n{describe().report()}\n\n{shown}"
    for place in _places():
        try:
            handle, name = tempfile.mkstemp(prefix="rushhour-error-", suffix=".txt", dir=place)
        except OSError:
            continue
        try:
            with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
                file.write(text)
            return Path(name)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(name)
    return None


def _places() -> Iterator[str]:
    with contextlib.suppress(OSError):  # there is no writable one
        yield tempfile.gettempdir()
    with contextlib.suppress(OSError):  # it may be deleted
        yield os.getcwd()
