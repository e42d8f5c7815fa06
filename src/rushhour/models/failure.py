"""What went wrong in a user's network, in one line: the first cause, and the place in the user's own code."""

from __future__ import annotations

import re
import sysconfig
import traceback
from pathlib import Path

_LONGEST = 300
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_NOT_THEIRS = (*{sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}, "<")
_ROOM = str(Path(__file__).resolve().parent.parent)
_KITS = str(Path(_ROOM) / "testing")
_DATA_DEPENDENT = ("GuardOnDataDependentSymNode", "PendingUnbackedSymbolNotFound", "DataDependentOutputException")


def why_failed(error: BaseException) -> str:
    """The first cause of an error, in one line.

    Args:
        error: as it was caught, with its traceback. Exporters wrap what happened in pages of advice; causes are
            followed to the first.
    """
    causes = _causes(error)
    first = causes[-1]
    kind = type(first).__name__
    if any(type(one).__name__ in _DATA_DEPENDENT for one in causes):
        said = "what it computes depends on the values of a tensor (if, while, .item(), a mask that selects)"
    else:
        lines = [" ".join(line.split()) for line in _COLOURS.sub("", str(first)).splitlines() if line.strip()]
        more = lines[1:3] if lines and lines[0].endswith(("following indices", ":")) else []
        said = f"{kind}: {' '.join([lines[0], *more])}" if lines else kind
    return (said if len(said) <= _LONGEST else f"{said[:_LONGEST]}...") + where_failed(error)


def where_failed(error: BaseException) -> str:
    """The line of the user's own code, in brackets behind a space; empty where it was none."""
    return next((place for place in map(_place, _causes(error)[::-1]) if place), "")


def _causes(error: BaseException) -> list[BaseException]:
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    return causes


def _place(error: BaseException) -> str:
    """The innermost line of the user's own code."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        ours = frame.filename.startswith(_ROOM) and not frame.filename.startswith(_KITS)
        if not ours and not frame.filename.startswith(_NOT_THEIRS):
            return f" ({Path(frame.filename).name}, line {frame.lineno})"
    return ""
