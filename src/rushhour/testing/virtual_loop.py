"""An event loop in virtual time: what waits for a timer goes on at once, and the clock has moved to it."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Selector(selectors.DefaultSelector):
    """Moves the loop's clock where a selector would sleep."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> Any:
        found = super().select(0)
        if not found:
            if timeout is None:
                raise RuntimeError("nothing is left that could go on")
            self.loop.virtual_s += max(0.0, timeout)
        return found


class VirtualLoop(asyncio.SelectorEventLoop):
    """An asyncio loop whose time passes only while nothing can run. Sockets and threads are not waited for.

    It is a `Clock` too.

    Attributes:
        virtual_s: the time, in seconds from 0.
    """

    def __init__(self) -> None:
        self.virtual_s = 0.0
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        """The virtual time."""
        return self.virtual_s

    def now(self) -> float:
        """The same, as a `Clock`."""
        return self.virtual_s


def run_virtually(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on a `VirtualLoop` to its end."""
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(main)
    finally:
        loop.close()
