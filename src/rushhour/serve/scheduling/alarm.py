"""`Alarm`: one timer of the event loop, for the earliest of many times."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from rushhour.clock import Clock


class Alarm:
    """Calls a function at the earliest time that was set since it was called last.

    Nothing is cancelled, because that costs more than a call that finds nothing to do: who sets a time in vain is
    called once.

    Args:
        clock: of the times.
        act: called on the running event loop.
    """

    def __init__(self, clock: Clock, act: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._clock = clock
        self._act = act
        self._next = math.inf

    def set(self, time: float) -> None:
        """Call it at that time. An earlier one that is set already is enough."""
        if time < self._next:
            self._next = time
            self._loop.call_later(max(0.0, time - self._clock.now()), self._ring, time)

    def _ring(self, time: float) -> None:
        if time == self._next:  # else an earlier one has come between
            self._next = math.inf
            self._act()
