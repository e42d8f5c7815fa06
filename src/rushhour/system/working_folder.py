"""The working folder while a user's code runs: paths on the command line are relative to that of the start."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def same_working_folder() -> Iterator[None]:
    """Return to the working folder afterwards, if the code inside changes it."""
    try:
        before = os.getcwd()
    except OSError:  # it was deleted
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if os.getcwd() != before:
                os.chdir(before)
