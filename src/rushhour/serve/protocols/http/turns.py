"""`Turns`: large bodies are read a part at a time, in turn, so that many at once do not delay everybody else."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

TURN_BYTES = 256 * 1024
"""Of large bodies, read in one turn of the event loop: about 0.2 ms. uvloop reads as many at a time, and goes on with
one connection for up to 32 times of that before it looks at another. A body of no more bytes is not a large one, and
does not wait behind those that are."""


class Reader(Protocol):
    """A connection whose client sends a large body."""

    def go_on(self) -> None:
        """Read on: it is its turn."""
        ...


class Turns:
    """What was read of large bodies in this turn of the event loop, and who waits for the next.

    The connection that has the turn keeps it while more of its body is there: bodies become complete one after
    another, and not all at the end.
    """

    def __init__(self) -> None:
        self._left = TURN_BYTES
        self._waiting: deque[Reader] = deque()
        self._holder: Reader | None = None
        self._late = False
        self._counting = False

    def has_to_wait(self, reader: Reader, read: int) -> bool:
        """Count what was read of a large body that is not complete.

        Args:
            reader: its connection.
            read: bytes.

        Returns:
            Whether it has to stop reading until its `go_on` is called.
        """
        self._left -= read
        if not self._counting:
            self._counting = True
            asyncio.get_running_loop().call_soon(self._next)
        if self._left > 0 and (reader is self._holder or not self._waiting):
            return False
        if reader is self._holder:
            self._holder = None
            self._waiting.appendleft(reader)
        else:
            self._waiting.append(reader)
        return True

    def _next(self) -> None:
        """The next turn of the event loop."""
        self._left = TURN_BYTES
        self._counting = bool(self._waiting)
        if not self._waiting:
            self._holder = None
            return
        asyncio.get_running_loop().call_soon(self._next)
        if self._holder is not None and not self._late:
            self._late = True  # asyncio's own loop reads after this, uvloop before
            return
        self._holder, self._late = self._waiting.popleft(), False
        self._holder.go_on()
