"""The two sides of the client: the transport sends requests and reads answers, the recorder keeps the results."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol


class Recorder(Protocol):
    """Records the result of each request. A request is identified by its index in the schedule.

    `at` is when the last byte of an answer arrived, in seconds of `time.monotonic`.
    """

    def sent(self, index: int) -> None:
        """The bytes of the request were written."""
        ...

    def answered(self, index: int, body: bytes, header_length: int | None, at: float) -> None:
        """A status 2xx and a valid body; `header_length` is the length of its JSON header, where it has one."""
        ...

    def error_status(self, index: int, status: int, body: bytes, at: float) -> None:
        """Any other HTTP status, or the gRPC status that corresponds to it."""
        ...

    def malformed(self, index: int, what: str, why: str, at: float) -> None:
        """The bytes that arrived are not a valid answer."""
        ...

    def lost(self, index: int, kind: str, why: str) -> None:
        """No answer will arrive. `kind` names the error in a word or two, `why` explains it."""
        ...

    def starved(self, index: int) -> None:
        """The request waits for a connection, because the generator's bound on connections is reached."""
        ...

    def fault_of(self, body: bytes, header_length: int | None) -> str:
        """Why a body is not a valid answer; empty if it is valid."""
        ...


class Transport(Protocol):
    """Sends requests over connections of its own."""

    @property
    def peak_connections(self) -> int:
        """The largest number of connections that were open at once."""
        ...

    async def open(self, wanted: int) -> None:
        """Open up to `wanted` connections.

        Raises:
            LoadError: if there is no server.
        """
        ...

    def send(self, index: int) -> None:
        """Send a request as soon as possible."""
        ...

    def wait(self, until: float, *, prompt: bool) -> Awaitable[None] | None:
        """Wait, then report the answers that arrived to the recorder.

        Args:
            until: seconds of `time.monotonic`, within 0.1 ms where the system keeps time so precisely. If it is past,
                answers that arrived are read all the same.
            prompt: return as soon as an answer arrives. Without it a transport may leave answers unread until then, if
                it knows afterwards when they arrived.

        Returns:
            What is to be awaited; None if the wait is over already, without an event loop.
        """
        ...

    def expire(self, is_expired: Callable[[int], bool], kind: str, why: str) -> None:
        """Give up the requests in flight for which `is_expired` holds, and record them as lost."""
        ...

    async def close(self) -> None:
        """Close all connections without recording anything."""
        ...
