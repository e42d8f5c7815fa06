"""The memory and the threads that large requests may use together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from rushhour.errors import WireError
from rushhour.serve.memory import allocator

T = TypeVar("T")

_ON_THREADS, _DECOMPRESSING = 2, 4
"""Large messages that are read or written, and bodies that are decompressed, at the same time."""
_TRIM_S = 1.0
"""Free memory is returned to the system so long after the last large message."""


class Budget:
    """Bounds what large requests cost a process together: the bytes that it holds, and the threads that read them.

    Args:
        size: bytes.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.held = 0
        self._threads = asyncio.Semaphore(_ON_THREADS)
        self._decompressing = asyncio.Semaphore(_DECOMPRESSING)
        self._running = 0
        self._trimming: asyncio.TimerHandle | None = None

    def grant(self, size: int = 0) -> Grant:
        """Room for so many bytes, as long as the returned object lives.

        Raises:
            WireError: 429 if there is none. The first request always gets room.
        """
        grant = Grant(self)
        grant.grow(size)
        return grant

    async def on_thread(self, function: Callable[..., T], *arguments: object) -> T:
        """Call a function that takes long on a thread, and lets other threads run meanwhile."""
        async with self._threads:
            self._running += 1
            try:
                return await asyncio.to_thread(function, *arguments)
            finally:
                self._running -= 1
                self.trim_soon()

    async def decompress(self, function: Callable[..., T], *arguments: object) -> T:
        """The same for a function that takes some tenths of a second at most: it does not wait for the longer ones."""
        async with self._decompressing:
            return await asyncio.to_thread(function, *arguments)

    def trim_soon(self) -> None:
        """Return free memory to the system when no large message is in progress."""
        if self._trimming is not None:
            self._trimming.cancel()
        self._trimming = asyncio.get_running_loop().call_later(_TRIM_S, self._trim)

    def _trim(self) -> None:
        self._trimming = None
        if self._running:
            self.trim_soon()
        else:
            asyncio.get_running_loop().run_in_executor(None, allocator.trim)


class Grant:
    """Room in a budget, for as long as this object lives."""

    __slots__ = ("_budget", "_size")

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._size = 0

    def grow(self, size: int) -> None:
        """Take room for so many bytes more.

        Raises:
            WireError: 429 if there is none.
        """
        held = self._budget.held
        if held > self._size and held + size > self._budget.size:
            limit = f"they hold {held} bytes together, and the limit is {self._budget.size}"
            raise WireError("too many large requests are in flight", limit, "try again later", status=429)
        self.take(size)

    def take(self, size: int) -> None:
        """Take the room even beyond the limit: for what cannot be refused any more."""
        self._size += size
        self._budget.held += size

    def __del__(self) -> None:
        self._budget.held -= self._size
