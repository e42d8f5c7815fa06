"""The end of a process: its exit handlers run, then it ends without Python's finalization.

Finalization ends every daemon thread by `pthread_exit` when it next takes the GIL. If C++ code of a library is on the
stack of that thread, the process aborts: "FATAL: exception not rethrown", and exit code 134 after all work is done.
Source: CPython issue 87135.

Imported before anything slow, so nothing slow may be imported here.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from typing import NoReturn

_code = 1


def install() -> None:
    """Call it before anything slow is imported: the handler that is registered first runs last."""
    atexit.register(_leave)


def leave(code: str | int | None) -> NoReturn:
    """Exit with this code, as `sys.exit`: non-daemon threads are joined, then exit handlers run.

    Args:
        code: None is 0; a text is written to standard error, and the code is 1.

    Raises:
        SystemExit: always.
    """
    global _code
    _code = code if isinstance(code, int) else 0 if code is None else 1
    sys.exit(code)


def _leave() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(_code & 0xFF)
