"""Connections shared out evenly over worker processes (cells).

The kernel spreads connections over cells by a hash of addresses and ports: of a hundred over four cells, one has thirty
or more on most days, and is full when the others are not; of eight, one may have five. So a cell that accepts more than
the cell with the fewest hands the new connection to that one, over a Unix socket (SCM_RIGHTS), before it reads from it.

How many each has lies in memory that all of them map. Each number is written by one process only, so that there is
nothing to lock. A cell that is stopped, blocked or about to end gets none: it does not say that it is there. What had
been handed to one that died, and it had not taken yet, the supervisor hands to another.

TLS connections stay where the kernel puts them: they are known only after their handshake. So do gRPC's, which grpcio
accepts by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import socket
import tempfile
import time
from collections.abc import Callable
from typing import cast

import msgspec
import numpy as np
from numpy.typing import NDArray

_THERE_S = 0.25
"""How often a cell says that it is there."""
_GONE_S = 1.0
_BEAT, _OPEN, _RECEIVED, _SENT = range(4)
"""Columns of a cell's row: when it last was there, its open connections, those that it got from others in all, and from
there on, for each cell, those that it sent to it."""
_AT_ONCE = 64
_LEEWAY = 16
"""One in so many connections may be in the wrong place: moving one costs more than that."""


class Seat(msgspec.Struct, frozen=True):
    """What a cell inherits: file descriptors.

    Attributes:
        number: of the cell.
        table: the shared memory.
        inbox: where connections arrive for it.
        outboxes: of all cells, in the order of their numbers.
    """

    number: int
    table: int
    inbox: int
    outboxes: tuple[int, ...]

    @property
    def files(self) -> tuple[int, ...]:
        """All of them."""
        return self.table, self.inbox, *self.outboxes


class Seats:
    """What the supervisor keeps for its cells, so that a cell that is restarted has it again.

    Args:
        cells: how many there are.
    """

    def __init__(self, cells: int) -> None:
        self._opened = contextlib.ExitStack()
        self._file = _shared_memory()
        self._opened.callback(os.close, self._file)
        self._table = _mapped(self._file, cells)
        pairs = [socket.socketpair() for _ in range(cells)]
        self._boxes = [tuple(self._opened.enter_context(end) for end in pair) for pair in pairs]
        for pair in self._boxes:
            for end in pair:
                end.setblocking(False)

    def seat(self, number: int) -> Seat:
        """Of one cell."""
        outboxes = tuple(outbox.fileno() for _, outbox in self._boxes)
        return Seat(number, self._file, self._boxes[number][0].fileno(), outboxes)

    def vacate(self, number: int) -> None:
        """A cell has died, or still does not start: nothing is handed to it until it is there again."""
        self._table[number, _BEAT] = 0.0
        inbox = self._boxes[number][0]
        while True:
            try:
                _, files, _, _ = socket.recv_fds(inbox, 1, 1)
            except OSError:
                return
            self._table[number, _RECEIVED] += 1
            for file in files:
                other = _fewest(self._table, _counts(self._table))
                with contextlib.suppress(OSError):
                    if other is not None:
                        socket.send_fds(self._boxes[other][1], [b"."], [file])
                        self._table[-1, _SENT + other] += 1
                os.close(file)

    def close(self) -> None:
        """Close all of it."""
        self._opened.close()


def _shared_memory() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("rushhour-cells")
    file, path = tempfile.mkstemp()
    os.unlink(path)
    return file


def _mapped(file: int, cells: int) -> NDArray[np.float64]:
    """The table: a row for each cell, and one for what the supervisor hands over."""
    size = (cells + 1) * (_SENT + cells) * 8
    os.truncate(file, size)
    return np.frombuffer(mmap.mmap(file, size), np.float64).reshape(cells + 1, _SENT + cells)


def _counts(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """The connections of each cell, with those that are on their way."""
    return cast(NDArray[np.float64], table[:-1, _OPEN] - table[:-1, _RECEIVED] + table[:, _SENT:].sum(axis=0))


def _fewest(table: NDArray[np.float64], counts: NDArray[np.float64]) -> int | None:
    """Of the cells that are there the one with the fewest; None where none is there."""
    there = time.monotonic() - table[:-1, _BEAT] <= _GONE_S
    return int(np.where(there, counts, np.inf).argmin()) if there.any() else None


class Balance:
    """One cell's view: how many connections each has, and who gets the next.

    Args:
        seat: of this cell.
    """

    def __init__(self, seat: Seat) -> None:
        self._me = seat.number
        self._table = _mapped(seat.table, len(seat.outboxes))
        self._own = self._table[self._me]
        self._inbox = socket.socket(fileno=seat.inbox)
        self._outboxes = [socket.socket(fileno=outbox) for outbox in seat.outboxes]
        self._arriving: set[asyncio.Task[object]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._own[_OPEN] = 0  # of the process that had this seat before

    def accepting(self, make: Callable[[], asyncio.Protocol]) -> Callable[[], asyncio.Protocol]:
        """What makes the protocol of each connection that this cell accepts: another cell may get it.

        Args:
            make: makes that of one which stays. It calls `closed` when it is lost.
        """

        def made() -> asyncio.Protocol:
            other = self._lighter()
            if other is not None:
                return _Moving(lambda connection: self._send(other, connection), lambda: self._opened(make))
            return self._opened(make)

        return made

    def closed(self) -> None:
        """A connection of this cell has ended."""
        self._own[_OPEN] -= 1

    async def run(self, make: Callable[[], asyncio.Protocol]) -> None:
        """Take what other cells hand over, until cancelled; without it this cell gets nothing.

        Args:
            make: as in `accepting`.
        """
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._inbox.fileno(), self._receive, make)
        try:
            while True:
                self._own[_BEAT] = time.monotonic()
                await asyncio.sleep(_THERE_S)
        finally:
            self.leave()

    def leave(self) -> None:
        """Get no more connections; those that are on their way are taken."""
        self._own[_BEAT] = 0.0

    def close(self) -> None:
        """Close what it inherited: nothing arrives any more."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._inbox.fileno())
        for end in (self._inbox, *self._outboxes):
            end.close()

    def _opened(self, make: Callable[[], asyncio.Protocol]) -> asyncio.Protocol:
        self._own[_OPEN] += 1
        return make()

    def _lighter(self) -> int | None:
        """The cell that should have the next connection of this one."""
        counts = _counts(self._table)
        other = _fewest(self._table, counts)
        if other is None or other == self._me:
            return None
        return other if counts[self._me] > counts[other] + counts[other] // _LEEWAY else None

    def _send(self, other: int, connection: int) -> bool:
        try:
            socket.send_fds(self._outboxes[other], [b"."], [connection])
        except OSError:  # its inbox is full, or too many descriptors are under way
            return False
        self._own[_SENT + other] += 1
        return True

    def _receive(self, make: Callable[[], asyncio.Protocol]) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(_AT_ONCE):
            try:
                _, files, _, _ = socket.recv_fds(self._inbox, 1, 1)
            except BlockingIOError:
                return
            except OSError:  # no more files may be opened: the connection is lost, as one that cannot be accepted
                files = []
            self._own[_OPEN] += len(files)
            self._own[_RECEIVED] += 1
            for file in files:
                connection = socket.socket(fileno=file)
                connection.setblocking(False)
                task: asyncio.Task[object] = loop.create_task(loop.connect_accepted_socket(make, connection))
                self._arriving.add(task)
                task.add_done_callback(self._arrived)

    def _arrived(self, task: asyncio.Task[object]) -> None:
        self._arriving.discard(task)
        if not task.cancelled() and task.exception() is not None:  # it was closed meanwhile
            self.closed()


class _Moving(asyncio.Protocol):
    """A connection that another cell gets, before anything is read from it."""

    def __init__(self, send: Callable[[int], bool], make: Callable[[], asyncio.Protocol]) -> None:
        self._send = send
        self._make = make

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Hand it over and close this process's descriptor of it; keep it where that is not possible."""
        accepted = cast(asyncio.Transport, transport)  # uvloop's is one by its methods, not by its class
        if self._send(accepted.get_extra_info("socket").fileno()):
            accepted.abort()
            return
        kept = self._make()
        accepted.set_protocol(kept)
        kept.connection_made(accepted)
