"""The alternate signal stack of a thread, restored after a library has changed it.

OpenVINO's CPU plugin sets an alternate signal stack for the thread that loads it, and frees that stack with the plugin
(`SigAltStackSetup` in its plugin.cpp). Where two plugins are not unloaded in the reverse order of loading, as in every
reload of a server, the thread is left with a freed stack: the next Ctrl-C or SIGTERM is a segmentation fault.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Iterator
from typing import Any


class _Stack(ctypes.Structure):
    """`stack_t` of Linux."""

    _fields_ = (("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextlib.contextmanager
def restored_signal_stack() -> Iterator[None]:
    """Restore this thread's signal stack at the end. Only on Linux."""
    if sys.platform != "linux":
        yield
        return
    sigaltstack, before = _sigaltstack(), _Stack()
    sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        sigaltstack(ctypes.byref(before), None)


@functools.cache
def _sigaltstack() -> Any:
    return ctypes.CDLL(None).sigaltstack
