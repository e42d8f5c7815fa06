"""What nobody foresaw: one line that says what was being done and what happened, and a file that holds the rest."""

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


def during(error: BaseException, what: str) -> None:
    """Note on an exception what was being done when it came; the first such note counts."""
    first = what[:1].lower() if what[1:2].islower() else what[:1]
    error.add_note(f"{_WHILE}{first}{what[1:]}")


def where(error: BaseException) -> str:
    """The innermost line of the user's own code that an error came through, in brackets behind a space; else empty."""
    return next((place for place in map(_place, causes(error)[::-1]) if place), "")


def causes(error: BaseException) -> list[BaseException]:
    """An error and what it was raised from, to the first."""
    found = [error]
    while (cause := found[-1].__cause__ or found[-1].__context__) is not None and cause not in found:
        found.append(cause)
    return found


def in_short(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


@functools.cache
def _not_theirs() -> tuple[str, ...]:
    """How the files of Python and of what is installed begin; found when it is asked for: it takes milliseconds."""
    paths = sysconfig.get_paths()
    return (*{paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}, "<")


def _place(error: BaseException) -> str:
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        ours = frame.filename.startswith(_ROOM) and not frame.filename.startswith(_KITS)
        if not ours and not frame.filename.startswith(_not_theirs()):
            return f" ({Path(frame.filename).name}, line {frame.lineno})"
    return ""


def unforeseen(error: BaseException, doing: str) -> str:
    """One line on an exception that is not Rushhour's own. Its traceback is kept in a file, which the line names.

    Args:
        error: with a note on what was being done, where somebody has made one (`during`).
        doing: what that was in other cases.
    """
    notes = (note for note in getattr(error, "__notes__", ()) if note.startswith(_WHILE))
    what, known, theirs = next(notes, _WHILE + doing), _known(error), where(error)
    said = " ".join(str(error).split())[:_MOST_LETTERS]
    happened = known or type(error).__name__ + (f": {said}" if said else "") + (
        f", in your own code{theirs}" if theirs else ", which Rushhour does not know"
    )
    kept = _kept(error, f"{what}: {happened}")
    if kept is not None:
        report = "" if known or theirs else ": please report it with that"
        return f"{what}: {happened}; its traceback is in {kept}{report}"
    if not known:
        traceback.print_exception(error, file=sys.stderr)  # better on the screen than nowhere
    shown = "" if known else ", and stands above"
    return f"{what}: {happened}; its traceback could be written to no file{shown}"


def _known(error: BaseException) -> str:
    """Why and what to do, where the fault is the machine's and not the program's; empty where it is not."""
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "there is not enough memory; free some, or use smaller batches and fewer workers"
    found = reason(error) if isinstance(error, OSError) else None
    if found is None:
        return ""
    assert isinstance(error, OSError)
    return f"{found[0]}{'' if error.filename is None else f' ({os.fsdecode(error.filename)})'}; {found[1]}"


def _kept(error: BaseException, what: str) -> Path | None:
    said = "".join(traceback.format_exception(error))
    text = f"{what}\n\n{shlex.join(sys.argv)}\n{describe().report()}\n\n{said}"
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
    with contextlib.suppress(OSError):  # where none can be written to
        yield tempfile.gettempdir()
    with contextlib.suppress(OSError):  # it may be gone
        yield os.getcwd()
