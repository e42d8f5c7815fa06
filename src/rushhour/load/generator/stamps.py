"""When bytes arrived, as the kernel noted it: who reads them later still knows. Linux alone notes it for TCP."""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
from time import monotonic, time

_TIMESTAMPNS = 35
"""`SO_TIMESTAMPNS` of most processors, which Python has no name for. On another nothing is noted, and that is seen."""
_as_timespec = struct.Struct("@ll").unpack
ANCILLARY_BYTES = 64
_STEP_S = 1e-4
_LOOKS = 5

Ancillary = list[tuple[int, int, bytes]]


class Stamps:
    """Turns the kernel's notes, which are in the time of day, into seconds of `time.monotonic`.

    Both clocks are slewed alike, so that they differ by a constant until somebody sets the time of day. Then, and
    where there is no note, the arrival is the time of reading: later than it was, never earlier.
    """

    def __init__(self) -> None:
        self.kept = False
        """Whether the latest bytes came with a note: else they have to be read as soon as they come."""
        self._ahead = _ahead_s()
        self._steady = True

    def ask(self, wire: socket.socket) -> None:
        """Have the kernel note when bytes arrive on this socket, where it can."""
        if sys.platform == "linux":
            with contextlib.suppress(OSError):
                wire.setsockopt(socket.SOL_SOCKET, _TIMESTAMPNS, 1)

    def refresh(self) -> None:
        """To be called before arrivals are read: was the time of day set since the last?"""
        now = monotonic()
        self._steady = -_STEP_S < time() - now - self._ahead < _STEP_S
        if not self._steady:
            self._ahead = _ahead_s()

    def of(self, ancillary: Ancillary) -> float:
        """When the last of some bytes arrived, from the ancillary data that came with them."""
        if ancillary and ancillary[0][1] == _TIMESTAMPNS:
            self.kept = True
            if self._steady:
                seconds, nanoseconds = _as_timespec(ancillary[0][2])
                return float(seconds - self._ahead + 1e-9 * nanoseconds)
        else:
            self.kept = False
        return monotonic()


def _ahead_s() -> float:
    """The time of day less `time.monotonic`. Whoever is held up between the two takes it for more: the least is it."""
    return min(-monotonic() + time() for _ in range(_LOOKS))
