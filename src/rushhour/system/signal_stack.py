"""The stack that signal handlers of a thread run on stays as it was, whatever a library does to it.

OpenVINO's CPU plugin, where it is loaded, gives the thread that loads it an alternate signal stack of its own, and
frees it with the plugin (`SigAltStackSetup` in its plugin.cpp). Where two plugins end in another order than the
reverse of their beginning, as with every reload of a server, the thread is left with one that is freed: the next
Ctrl-C or SIGTERM is then a segmentation fault.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Iterator
from typing import Any


class _Stack(ctypes.Structure):
    """`stack_t` of Linux, on all processors that OpenVINO runs on."""

    _fields_ = (("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextlib.contextmanager
def own_signal_stack() -> Iterator[None]:
    """Give this thread its signal stack back at the end. Elsewhere than on Linux this does nothing."""
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
