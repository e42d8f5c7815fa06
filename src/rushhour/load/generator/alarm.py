"""An alarm that rings on time: event loops keep time in whole milliseconds, arrivals do not."""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
import time
from collections.abc import Callable

_CLOCK_MONOTONIC = 1
_NONBLOCK_CLOEXEC = 0o2004000
_ABSOLUTE = 1


class _Spec(ctypes.Structure):
    """`struct itimerspec`: interval and value, each in seconds and nanoseconds."""

    _fields_ = (
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("s", ctypes.c_long),
        ("ns", ctypes.c_long),
    )


class Alarm:
    """Calls `ring` on the loop at the time it is set to, within the kernel's 0.1 ms where there is `timerfd` (Linux).

    Elsewhere it is the loop's own timer, true to a millisecond; the verdict's check of the send delay then says so.

    Args:
        loop: the loop it rings on.
        ring: called once each time it was set.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, ring: Callable[[], None]) -> None:
        self._loop = loop
        self._ring = ring
        self._fd = -1
        self._timer: asyncio.TimerHandle | None = None
        self._spec = _Spec()
        if sys.platform == "linux":
            self._libc = ctypes.CDLL(None, use_errno=True)
            self._fd = self._libc.timerfd_create(_CLOCK_MONOTONIC, _NONBLOCK_CLOEXEC)
            if self._fd >= 0:
                loop.add_reader(self._fd, ring)  # it is not read: to set it anew does as much

    def set(self, at: float) -> None:
        """Ring at `at` (seconds of `time.monotonic`), at once if that is over, and not at any time set before.

        Whoever is rung sets the next time, or calls `silence`: until then it goes on ringing.
        """
        if self._fd < 0:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_later(max(0.0, at - time.monotonic()), self._ring)
            return
        nanoseconds = max(1, int(at * 1e9))
        self._spec.s, self._spec.ns = divmod(nanoseconds, 1_000_000_000)
        self._libc.timerfd_settime(self._fd, _ABSOLUTE, ctypes.byref(self._spec), None)

    def silence(self) -> None:
        """Do not ring until it is set again."""
        if self._timer is not None:
            self._timer.cancel()
        if self._fd >= 0:
            self._spec.s = self._spec.ns = 0
            self._libc.timerfd_settime(self._fd, _ABSOLUTE, ctypes.byref(self._spec), None)

    def close(self) -> None:
        """Never ring again."""
        if self._timer is not None:
            self._timer.cancel()
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
