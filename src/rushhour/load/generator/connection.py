"""One HTTP/1.1 connection of the client: a request's bytes out, an answer's bytes in, one at a time."""

from __future__ import annotations

import socket
from time import monotonic
from typing import Protocol

import httptools

from rushhour.load.generator.carrier import Book
from rushhour.load.generator.stamps import ANCILLARY_BYTES, Stamps
from rushhour.wire import HEADER_LENGTH

_HEADER_LENGTH = HEADER_LENGTH.lower().encode()
_PIECE_BYTES = 1 << 16
"""Read at once."""
_SMALL_BYTES = 1 << 14
"""An answer of so many bytes fits a socket's buffer whatever its size: left unread, it holds nobody up."""


class Pool(Protocol):
    """Whom a connection belongs to."""

    def free(self, connection: Connection) -> None:
        """The connection can carry the next request."""
        ...

    def blocked(self, connection: Connection) -> None:
        """A part of a request is still to be written, by `write_on` when there is room for it."""
        ...

    def unblocked(self, connection: Connection) -> None:
        """It has been written, or never will be."""
        ...

    def came(self, *, small: bool) -> None:
        """An answer was read in the long way; `small` if it came in one piece of a few KB."""
        ...

    def closed(self, connection: Connection, why: str) -> None:
        """The connection is over, and with it the answer it still owes (`index`)."""
        ...


class KnownHead:
    """The head of an answer that httptools has read: a good status, a body of a known length, the connection kept.

    An answer with the same head, byte for byte, says the same thing again and need not be read again. All
    connections to one server share it; a server that dates its answers changes it once a second.
    """

    __slots__ = ("head", "header_length", "total")

    def __init__(self) -> None:
        self.head = b""
        self.header_length: int | None = None
        self.total = -1


class Connection:
    """A connection and the request it carries (`index`, -1 for none).

    Args:
        wire: a socket that does not block.
        book: is told of answers.
        pool: it belongs to.
        known: shared by all connections to the server.
        stamps: tells when bytes arrived.
    """

    __slots__ = (
        "_body",
        "_book",
        "_complete",
        "_fresh",
        "_header_length",
        "_keep",
        "_known",
        "_length",
        "_parser",
        "_pool",
        "_receive",
        "_send",
        "_sized",
        "_stamps",
        "_status",
        "_unsent",
        "_until_end",
        "index",
        "opening",
        "wire",
    )

    def __init__(self, wire: socket.socket, book: Book, pool: Pool, known: KnownHead, stamps: Stamps) -> None:
        self.wire = wire
        self.index = -1
        self.opening = False
        self._send = wire.send
        self._receive = wire.recvmsg
        self._book = book
        self._pool = pool
        self._known = known
        self._stamps = stamps
        self._parser = httptools.HttpResponseParser(self)
        self._body: list[bytes] = []
        self._header_length: int | None = None
        self._complete = False
        self._keep = True
        self._fresh = True
        self._status = 0
        self._length: int | None = None
        self._sized = False
        self._until_end = False
        self._unsent = memoryview(b"")

    def send(self, index: int, request: bytes) -> None:
        """Write a whole request; its answer will be reported under `index`."""
        self.index = index
        try:
            written = self._send(request)
        except BlockingIOError:
            written = 0
        except OSError as error:
            self._gone(error)
            return
        if written < len(request):
            self._unsent = memoryview(request)[written:]
            self._pool.blocked(self)

    def write_on(self) -> None:
        """Write more of a request that was too long to be written at once."""
        try:
            self._unsent = self._unsent[self._send(self._unsent) :]
        except BlockingIOError:
            return
        except OSError as error:
            self._gone(error)
            return
        if not self._unsent:
            self._pool.unblocked(self)

    def abort(self) -> None:
        """Close at once, without a word about what it carries."""
        self.index = -1
        self._close("")

    def read(self) -> None:
        """Take what has arrived."""
        try:
            data, ancillary, _, _ = self._receive(_PIECE_BYTES, ANCILLARY_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._gone(error)
            return
        if not data:
            if self._until_end:
                self._keep = False
                self._finish(monotonic(), b"")
            else:
                self._gone(None)
            return
        at = self._stamps.of(ancillary)
        book, known, index = self._book, self._known, self.index
        if index < 0:  # bytes that nobody asked for: what follows them could not be told from an answer
            self.abort()
            return
        if self._fresh and len(data) == known.total and data.startswith(known.head) and not self._unsent:
            self.index = -1
            book.answered(index, data[len(known.head) :], known.header_length, at)
            self._pool.free(self)
            return
        fresh, self._fresh = self._fresh, False
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.abort()
            book.garbled(index, "the server does not speak HTTP", str(error), at)
            return
        except httptools.HttpParserUpgrade:
            self.abort()
            book.garbled(index, "the server does not speak HTTP", "it switches to another protocol", at)
            return
        if self._complete:
            self._finish(at, data if fresh else b"")
        elif self._until_end:  # its end has no note of its own: it must not lie unread
            self._pool.came(small=False)

    def _finish(self, at: float, data: bytes) -> None:
        """Report an answer that is whole; `data` is all of it where it came in one piece."""
        book, known, index = self._book, self._known, self.index
        body, length, status, header_length = b"".join(self._body), self._length, self._status, self._header_length
        self._body.clear()
        self._complete, self._until_end, self._fresh, self.index = False, False, True, -1
        self._pool.came(small=0 < len(data) <= _SMALL_BYTES)
        if not 200 <= status < 300:
            book.turned_down(index, status, body, at)
        elif fault := book.fault_of(body, header_length):
            book.garbled(index, "the server answered 200 with something that is not an answer", fault, at)
        else:
            head = data[: len(data) - len(body)]
            if data and self._keep and length == len(body) and head.endswith(b"\r\n\r\n"):
                known.head, known.total, known.header_length = head, len(data), header_length
            book.answered(index, body, header_length, at)
        if self._keep and not self._unsent:  # an answer before the question was over says that nobody reads the rest
            self._pool.free(self)
        else:
            self._close("")

    def on_message_begin(self) -> None:
        """Called by the parser."""
        if self._complete:  # nobody asked for a second answer
            self._keep = False
        else:
            self._header_length, self._length, self._sized = None, None, False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser."""
        if self._complete:
            return
        name = name.lower()
        if name == _HEADER_LENGTH and value.isdigit():
            self._header_length = int(value)
        elif name == b"content-length" and value.isdigit():
            self._length, self._sized = int(value), True
        elif name == b"transfer-encoding" and value.lower().endswith(b"chunked"):
            self._sized = True

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        if not self._complete:
            self._status = self._parser.get_status_code()
            self._until_end = self._status >= 200 and not self._sized

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        if not self._complete:
            self._body.append(body)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        if self._complete or self._status < 200:  # 100, 103: the answer is still to come
            return
        self._complete = True
        self._keep = self._parser.should_keep_alive()

    def _gone(self, error: OSError | None) -> None:
        self._close(f"the server closed the connection ({error or 'end of stream'})")

    def _close(self, why: str) -> None:
        if self._unsent:
            self._unsent = memoryview(b"")
            self._pool.unblocked(self)
        self._pool.closed(self, why)
