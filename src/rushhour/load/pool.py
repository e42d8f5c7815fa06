"""The pool of HTTP connections: one request on each at a time, and more connections when a request finds none free."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from rushhour.errors import LoadError
from rushhour.load.carrier import Book
from rushhour.load.connection import Connection, KnownHead
from rushhour.load.job import Job

_OPENING = 64
"""Connections being opened at the same time; a kernel's queue of them is short."""


class HttpCarrier:
    """Carries requests over HTTP/1.1. Must be made on the running loop.

    Args:
        job: what to send, and where.
        book: is told what happens.
    """

    def __init__(self, job: Job, book: Book) -> None:
        self._job = job
        self._book = book
        self._requests = job.requests
        self._distinct = len(job.requests)
        self._loop = asyncio.get_running_loop()
        self._connections: set[Connection] = set()
        self._idle: list[Connection] = []  # last in, first out, so that as few as will do stay busy
        self._waiting: deque[int] = deque()  # without a connection yet; oldest first
        self._opening: set[asyncio.Task[None]] = set()
        self._known = KnownHead()
        self._closed = False
        self.most_connections = 0

    async def open(self, wanted: int) -> None:
        """See `Carrier`."""
        for done in range(min(wanted, self._job.max_connections)):
            try:
                async with asyncio.timeout(self._job.timeout_s):
                    self._idle.append(await self._connect())
            except (OSError, TimeoutError) as error:
                if done:  # it takes some: how many it takes when they are needed is part of what is measured
                    return
                raise LoadError(
                    f"cannot connect to {self._job.host}:{self._job.port}",
                    getattr(error, "strerror", None) or str(error) or f"no answer within {self._job.timeout_s:g} s",
                    "check the URL, and that the server is running",
                ) from error

    def carry(self, index: int) -> None:
        """See `Carrier`."""
        if self._idle:
            self._idle.pop().send(index, self._requests[index % self._distinct])
            self._book.sent(index)
            return
        self._waiting.append(index)
        self._grow()
        if len(self._connections) + len(self._opening) >= self._job.max_connections:
            self._book.starved(index)

    def sweep(self, is_over: Callable[[int], bool], kind: str, why: str) -> None:
        """See `Carrier`."""
        while self._waiting and is_over(self._waiting[0]):
            self._book.lost(self._waiting.popleft(), kind, why)
        for connection in list(self._connections):
            if connection.index >= 0 and is_over(connection.index):
                self._book.lost(connection.index, kind, why)
                connection.abort()

    async def close(self) -> None:
        """See `Carrier`."""
        self._closed = True
        for task in self._opening:
            task.cancel()
        for connection in list(self._connections):
            connection.abort()
        await asyncio.sleep(0)  # what was cancelled ends here, not in the next run

    def opened(self, connection: Connection) -> None:
        """A connection stands."""
        self._connections.add(connection)
        self.most_connections = max(self.most_connections, len(self._connections))

    def free(self, connection: Connection) -> None:
        """A connection can carry the next request."""
        if self._waiting:
            if connection.usable:
                index = self._waiting.popleft()
                connection.send(index, self._requests[index % self._distinct])
                self._book.sent(index)
        else:
            self._idle.append(connection)

    def closed(self, connection: Connection, why: str) -> None:
        """A connection is gone, by either side's doing."""
        self._connections.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if connection.index >= 0:
            self._book.lost(connection.index, "closed", why)
            connection.index = -1
        self._grow()

    def _grow(self) -> None:
        """Open connections for the requests that wait, within the bounds."""
        while (
            not self._closed
            and len(self._opening) < min(len(self._waiting), _OPENING)
            and len(self._connections) + len(self._opening) < self._job.max_connections
        ):
            task = self._loop.create_task(self._open())
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _open(self) -> None:
        try:
            self.free(await self._connect())
        except OSError as error:
            self._refused(f"cannot connect ({error.strerror or error})")

    async def _connect(self) -> Connection:
        _, connection = await self._loop.create_connection(
            lambda: Connection(self._book, self, self._known), self._job.host, self._job.port
        )
        return connection

    def _refused(self, why: str) -> None:
        """A user who cannot connect has an error. With no connection left, so have all who wait."""
        losing = len(self._waiting) if not self._connections else min(1, len(self._waiting))
        for _ in range(losing):
            self._book.lost(self._waiting.popleft(), "refused", why)
