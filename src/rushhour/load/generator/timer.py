"""A timer with the precision of the kernel: event loops keep time in whole milliseconds, schedules do not."""

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


class Timer:
    """Calls a function on the event loop at the time it is set to, within 0.1 ms where there is `timerfd` (Linux).

    Elsewhere it is the event loop's own timer, precise to 1 ms; the verdict then reports the send delay.

    Args:
        loop: the event loop.
        callback: what to call.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._callback = callback
        self._fd = -1
        self._timer: asyncio.TimerHandle | None = None
        self._spec = _Spec()
        if sys.platform == "linux":
            self._libc = ctypes.CDLL(None, use_errno=True)
            self._fd = self._libc.timerfd_create(_CLOCK_MONOTONIC, _NONBLOCK_CLOEXEC)
            if self._fd >= 0:
                loop.add_reader(self._fd, callback)  # the descriptor is not read: setting the timer clears it too

    def set(self, at: float) -> None:
        """Expire at `at` (seconds of `time.monotonic`), at once if that is past. It replaces any time set before.

        The callback sets the next time or calls `disarm`; otherwise it is called again and again.
        """
        if self._fd < 0:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_later(max(0.0, at - time.monotonic()), self._callback)
            return
        nanoseconds = max(1, int(at * 1e9))
        self._spec.s, self._spec.ns = divmod(nanoseconds, 1_000_000_000)
        self._libc.timerfd_settime(self._fd, _ABSOLUTE, ctypes.byref(self._spec), None)

    def disarm(self) -> None:
        """Do not expire until it is set again."""
        if self._timer is not None:
            self._timer.cancel()
        if self._fd >= 0:
            self._spec.s = self._spec.ns = 0
            self._libc.timerfd_settime(self._fd, _ABSOLUTE, ctypes.byref(self._spec), None)

    def close(self) -> None:
        """Release the descriptor; the timer never expires again."""
        if self._timer is not None:
            self._timer.cancel()
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
