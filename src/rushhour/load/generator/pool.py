"""The pool of HTTP connections: one request in flight on each, and a new connection when a request finds none free.

It waits and reads on plain sockets, without an event loop: at low rates the cost of a request is the wake-ups of the
process, each of which finds the caches cold. Small answers do not wake it: the kernel keeps their arrival times
(`timestamps.py`), and several are read at once when the next request is due.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import socket
from collections import deque
from collections.abc import Callable
from time import monotonic, sleep
from typing import Any

from rushhour.errors import LoadError
from rushhour.load.generator.connection import Connection, KnownHead
from rushhour.load.generator.job import Job
from rushhour.load.generator.timestamps import Timestamps
from rushhour.load.generator.transport import Recorder

_OPENING = 64
"""Connections being opened at the same time: the listen backlog of the server is short."""
_AT_ONCE = 32
"""Answers read before requests that are due are sent."""
_UNREAD_S = 0.005
"""For this time answers may stay unread, where a connection is free for the next request. Longer saves little."""
_INCOMING = select.EPOLLIN | select.EPOLLRDHUP

_Address = tuple[socket.AddressFamily, Any]


class HttpTransport:
    """Sends requests over HTTP/1.1. Create it on a running event loop, which resolves the server's name.

    Args:
        job: what to send, and where.
        recorder: records the results.
    """

    def __init__(self, job: Job, recorder: Recorder) -> None:
        self._job = job
        self._recorder = recorder
        self._requests = job.requests
        self._distinct = len(job.requests)
        self._loop = asyncio.get_running_loop()
        self._where: _Address | None = None
        self._events = select.epoll()
        self._connections: dict[int, Connection] = {}  # by file descriptor; those being opened among them
        self._idle: list[Connection] = []  # last in, first out, so that as few as will do stay busy
        self._waiting: deque[int] = deque()  # without a connection yet; oldest first
        self._opening = 0
        self._blocked = 0
        self._small = False
        self._read_at = 0.0
        self._known = KnownHead()
        self._timestamps = Timestamps()
        self._closed = False
        self.peak_connections = 0

    async def open(self, wanted: int) -> None:
        """See `Transport`."""
        for done in range(min(wanted, self._job.max_connections)):
            try:
                async with asyncio.timeout(self._job.timeout_s):
                    self._idle.append(await self._connect())
            except (OSError, TimeoutError) as error:
                if done:  # how many connections the server accepts under load is part of the measurement
                    return
                raise LoadError(
                    f"cannot connect to {self._job.host}:{self._job.port}",
                    getattr(error, "strerror", None) or str(error) or f"no answer within {self._job.timeout_s:g} s",
                    "check the URL, and that the server is running",
                ) from error

    def send(self, index: int) -> None:
        """See `Transport`."""
        if not self._idle:
            self._read()
        if self._idle:
            self._idle.pop().send(index, self._requests[index % self._distinct])
            self._recorder.sent(index)
            return
        self._waiting.append(index)
        self._grow()
        if len(self._connections) >= self._job.max_connections:
            self._recorder.starved(index)

    def wait(self, until: float, *, prompt: bool) -> None:
        """See `Transport`."""
        now = monotonic()
        if (
            prompt
            or self._waiting
            or self._opening
            or self._blocked
            or not (self._small and self._timestamps.available)
        ):
            if until > now:
                select.select((self._events,), (), (), until - now)  # epoll's own time-out is in whole milliseconds
            self._read()
            return
        if until > now:
            sleep(until - now)
        if now >= self._read_at:
            self._read_at = now + _UNREAD_S
            self._read()

    def expire(self, is_expired: Callable[[int], bool], kind: str, why: str) -> None:
        """See `Transport`."""
        while self._waiting and is_expired(self._waiting[0]):
            self._recorder.lost(self._waiting.popleft(), kind, why)
        for connection in list(self._connections.values()):
            if connection.index >= 0 and is_expired(connection.index):
                self._recorder.lost(connection.index, kind, why)
                connection.abort()

    async def close(self) -> None:
        """See `Transport`."""
        self._closed = True
        self._idle.clear()
        for connection in list(self._connections.values()):
            connection.abort()
        self._events.close()

    def free(self, connection: Connection) -> None:
        """See `Pool`."""
        if self._waiting:
            index = self._waiting.popleft()
            connection.send(index, self._requests[index % self._distinct])
            self._recorder.sent(index)
        else:
            self._idle.append(connection)

    def blocked(self, connection: Connection) -> None:
        """See `Pool`."""
        self._blocked += 1
        self._events.modify(connection.wire.fileno(), _INCOMING | select.EPOLLOUT)

    def unblocked(self, connection: Connection) -> None:
        """See `Pool`."""
        self._blocked -= 1
        self._events.modify(connection.wire.fileno(), _INCOMING)

    def answer_read(self, *, small: bool) -> None:
        """See `Pool`."""
        self._small = small

    def closed(self, connection: Connection, why: str) -> None:
        """See `Pool`."""
        self._remove(connection)
        if connection.index >= 0:
            self._recorder.lost(connection.index, "closed", why)
            connection.index = -1
        elif connection in self._idle:
            self._idle.remove(connection)
        self._grow()

    def _read(self) -> None:
        """Read the answers that arrived, up to a bound."""
        arrived = self._events.poll(0, _AT_ONCE)
        if not arrived:
            return
        if len(arrived) == _AT_ONCE:
            self._read_at = 0.0
        self._timestamps.refresh()
        for descriptor, what in arrived:
            connection = self._connections[descriptor]
            if what == select.EPOLLIN:
                connection.read()
            elif connection.opening:
                self._opened(connection)
            elif what == select.EPOLLOUT:
                connection.write_on()
            else:
                connection.read()
                if what & select.EPOLLRDHUP and self._connections.get(descriptor) is connection:  # not a newer one
                    connection.read()  # the end of the stream, before the next request is sent into it

    def _grow(self) -> None:
        """Open connections for the waiting requests, within the bounds."""
        while (
            not self._closed
            and self._opening < min(len(self._waiting), _OPENING)
            and len(self._connections) < self._job.max_connections
        ):
            assert self._where is not None
            family, address = self._where
            try:
                connection = self._new_connection(family)
            except OSError as error:
                self._refused(f"cannot connect ({error.strerror or error})")
                return
            connection.opening = True
            self._opening += 1
            self._events.modify(connection.wire.fileno(), _INCOMING | select.EPOLLOUT)
            code = connection.wire.connect_ex(address)
            if code not in (0, errno.EINPROGRESS):
                self._remove(connection)
                self._refused(f"cannot connect ({os.strerror(code)})")
                return

    def _opened(self, connection: Connection) -> None:
        """A connection attempt succeeded or failed."""
        if code := connection.wire.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._remove(connection)
            self._refused(f"cannot connect ({os.strerror(code)})")
            return
        connection.opening = False
        self._opening -= 1
        self._events.modify(connection.wire.fileno(), _INCOMING)
        self.peak_connections = max(self.peak_connections, len(self._connections) - self._opening)
        self.free(connection)

    async def _connect(self) -> Connection:
        """A connection to the first of the server's addresses that accepts it; all later ones use this address."""
        if self._where is not None:
            return await self._connected(*self._where)
        found = await self._loop.getaddrinfo(self._job.host, self._job.port, type=socket.SOCK_STREAM)
        for left, (family, _, _, _, address) in zip(reversed(range(len(found))), found, strict=True):
            try:
                connection = await self._connected(family, address)
            except OSError:
                if not left:
                    raise
            else:
                self._where = family, address
                return connection
        raise OSError("the name has no address")

    async def _connected(self, family: socket.AddressFamily, address: Any) -> Connection:
        connection = self._new_connection(family)
        try:
            await self._loop.sock_connect(connection.wire, address)
        except BaseException:
            self._remove(connection)
            raise
        self.peak_connections = max(self.peak_connections, len(self._connections) - self._opening)
        return connection

    def _new_connection(self, family: socket.AddressFamily) -> Connection:
        wire = socket.socket(family, socket.SOCK_STREAM)
        wire.setblocking(False)
        wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._timestamps.enable(wire)
        connection = Connection(wire, self._recorder, self, self._known, self._timestamps)
        self._connections[wire.fileno()] = connection
        self._events.register(wire.fileno(), _INCOMING)
        return connection

    def _remove(self, connection: Connection) -> None:
        """Close its socket, which removes it from epoll too."""
        del self._connections[connection.wire.fileno()]
        connection.wire.close()
        if connection.opening:
            self._opening -= 1

    def _refused(self, why: str) -> None:
        """Record one waiting request as lost; all of them if no connection is left."""
        alone = len(self._connections) == self._opening
        losing = len(self._waiting) if alone else min(1, len(self._waiting))
        for _ in range(losing):
            self._recorder.lost(self._waiting.popleft(), "refused", why)
