"""The two sides of the client: who carries requests to the server, and who keeps the book of what became of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol


class Book(Protocol):
    """Is told what becomes of each request, which it knows by its index in the schedule.

    `at` is when the last byte of an answer arrived, in seconds of `time.monotonic`.
    """

    def sent(self, index: int) -> None:
        """It is on its way: its bytes were written."""
        ...

    def answered(self, index: int, body: bytes, header_length: int | None, at: float) -> None:
        """A good status, and a body without a fault; `header_length` is its JSON header's where it has one."""
        ...

    def turned_down(self, index: int, status: int, body: bytes, at: float) -> None:
        """Any other HTTP status, or what corresponds to it."""
        ...

    def garbled(self, index: int, what: str, why: str, at: float) -> None:
        """Bytes that are no answer."""
        ...

    def lost(self, index: int, kind: str, why: str) -> None:
        """No answer will come. `kind` is the sort of error in a word or two, `why` says more."""
        ...

    def starved(self, index: int) -> None:
        """It has to wait, because a bound of the generator's own is reached."""
        ...

    def fault_of(self, body: bytes, header_length: int | None) -> str:
        """Why a body is not what was asked for; empty if it is."""
        ...


class Carrier(Protocol):
    """Carries requests over connections of its own."""

    @property
    def most_connections(self) -> int:
        """The most that were open at once."""
        ...

    async def open(self, wanted: int) -> None:
        """Open up to `wanted` connections.

        Raises:
            LoadError: if there is no server.
        """
        ...

    def carry(self, index: int) -> None:
        """Send a request as soon as possible."""
        ...

    def rest(self, until: float, *, prompt: bool) -> Awaitable[None] | None:
        """Let time pass, then tell the book of what has come.

        Args:
            until: seconds of `time.monotonic`, within 0.1 ms where the system keeps time so finely; if that is over,
                what is there is read all the same.
            prompt: return as soon as anything has come. Without it a carrier may leave answers unread until then, if
                it knows afterwards when they came.

        Returns:
            What is to be awaited meanwhile; None if the time has passed already, without an event loop.
        """
        ...

    def sweep(self, is_over: Callable[[int], bool], kind: str, why: str) -> None:
        """Give up on the requests under way of which `is_over` holds; they are lost."""
        ...

    async def close(self) -> None:
        """Let go of everything, without a word to the book."""
        ...
