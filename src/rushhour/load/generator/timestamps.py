"""When bytes arrived, by the kernel's receive timestamps: exact even if they are read later. Linux only, for TCP."""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
from time import monotonic, time

_TIMESTAMPNS = 35
"""`SO_TIMESTAMPNS` of most architectures; Python has no name for it. On others no timestamp comes."""
_as_timespec = struct.Struct("@ll").unpack
ANCILLARY_BYTES = 64
_STEP_S = 1e-4
_SAMPLES = 5

Ancillary = list[tuple[int, int, bytes]]


class Timestamps:
    """Converts the kernel's timestamps, which are in wall-clock time, to seconds of `time.monotonic`.

    Both clocks are slewed alike, so they differ by a constant until the wall clock is set. After such a step, and where
    there is no timestamp, the arrival is the time of reading: later than it was, never earlier.
    """

    def __init__(self) -> None:
        self.available = False
        """Whether the latest bytes came with a timestamp. If not, answers have to be read as soon as they arrive."""
        self._offset_s = _wall_clock_offset_s()
        self._is_steady = True

    def enable(self, wire: socket.socket) -> None:
        """Ask the kernel for receive timestamps on this socket, where it has them."""
        if sys.platform == "linux":
            with contextlib.suppress(OSError):
                wire.setsockopt(socket.SOL_SOCKET, _TIMESTAMPNS, 1)

    def refresh(self) -> None:
        """Detect whether the wall clock was set since the last call. Call it before arrivals are read."""
        now = monotonic()
        self._is_steady = -_STEP_S < time() - now - self._offset_s < _STEP_S
        if not self._is_steady:
            self._offset_s = _wall_clock_offset_s()

    def arrival(self, ancillary: Ancillary) -> float:
        """When the last of some bytes arrived, from the ancillary data that came with them."""
        if ancillary and ancillary[0][1] == _TIMESTAMPNS:
            self.available = True
            if self._is_steady:
                seconds, nanoseconds = _as_timespec(ancillary[0][2])
                return float(seconds - self._offset_s + 1e-9 * nanoseconds)
        else:
            self.available = False
        return monotonic()


def _wall_clock_offset_s() -> float:
    """`time.time` minus `time.monotonic`: the smallest of some samples, as a delay between the calls increases it."""
    return min(-monotonic() + time() for _ in range(_SAMPLES))
