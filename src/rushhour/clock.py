"""Clocks. Decisions read the time from a clock that is passed in, so that tests replay them without sleeping."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """A source of the time in seconds: monotonic, from an arbitrary zero."""

    def now(self) -> float:
        """The time in seconds."""
        ...


class WallClock:
    """The machine's monotonic clock. On Linux its zero is shared by all processes of one boot."""

    now = staticmethod(time.monotonic)  # no wrapper: every request reads it several times


class VirtualClock:
    """A clock that moves only by `advance`: for simulation and tests.

    Args:
        start: the first reading, in seconds.
    """

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        """The time in seconds."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Move forward by `seconds`.

        Raises:
            ValueError: if `seconds` is negative.
        """
        if seconds < 0:
            raise ValueError(f"time does not run backwards, but got advance({seconds})")
        self._now += seconds
