"""The error of a user's network in one line: the first cause, and the line in the user's own code."""

from __future__ import annotations

import re

from rushhour.system.faults import cause_chain, user_code_line

_LONGEST = 300
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_DATA_DEPENDENT = ("GuardOnDataDependentSymNode", "PendingUnbackedSymbolNotFound", "DataDependentOutputException")


def why_failed(error: BaseException) -> str:
    """The first cause of an error, in one line.

    Args:
        error: as it was caught, with its traceback. Exporters wrap what happened in pages of advice; causes are
            followed to the first.
    """
    found = cause_chain(error)
    first = found[-1]
    kind = type(first).__name__
    if any(type(one).__name__ in _DATA_DEPENDENT for one in found):
        text = "what it computes depends on the values of a tensor (if, while, .item(), a mask that selects)"
    else:
        lines = [" ".join(line.split()) for line in _COLOURS.sub("", str(first)).splitlines() if line.strip()]
        more = lines[1:3] if lines and lines[0].endswith(("following indices", ":")) else []
        text = f"{kind}: {' '.join([lines[0], *more])}" if lines else kind
    return (text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...") + user_code_line(error)
