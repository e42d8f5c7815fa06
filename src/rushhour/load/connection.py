"""One HTTP/1.1 connection of the client: a request's bytes out, an answer's bytes in, one at a time."""

from __future__ import annotations

import asyncio
from typing import Protocol, cast

import httptools

from rushhour.load.carrier import Book
from rushhour.wire import HEADER_LENGTH

_HEADER_LENGTH = HEADER_LENGTH.lower().encode()


class Pool(Protocol):
    """Whom a connection belongs to."""

    def opened(self, connection: Connection) -> None:
        """The connection stands."""
        ...

    def free(self, connection: Connection) -> None:
        """The connection can carry the next request."""
        ...

    def closed(self, connection: Connection, why: str) -> None:
        """The connection is gone, and with it the answer it still owed."""
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


class Connection(asyncio.Protocol):
    """A connection and the request it carries (`index`, -1 for none)."""

    __slots__ = (
        "_body",
        "_book",
        "_complete",
        "_fresh",
        "_header_length",
        "_keep",
        "_known",
        "_parser",
        "_pool",
        "_transport",
        "index",
    )

    def __init__(self, book: Book, pool: Pool, known: KnownHead) -> None:
        self._book = book
        self._pool = pool
        self._known = known
        self._parser = httptools.HttpResponseParser(self)
        self._body: list[bytes] = []
        self._header_length: int | None = None
        self._complete = False
        self._keep = True
        self._fresh = True
        self._transport: asyncio.Transport
        self.index = -1

    @property
    def usable(self) -> bool:
        """Whether it can still be written to."""
        return not self._transport.is_closing()

    def send(self, index: int, request: bytes) -> None:
        """Write a whole request; its answer will be reported under `index`."""
        self.index = index
        self._transport.write(request)

    def abort(self) -> None:
        """Close at once, without a word about what it carries."""
        self.index = -1
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own class, which is no subclass
        self._pool.opened(self)

    def connection_lost(self, error: Exception | None) -> None:
        """Called by the loop."""
        self._pool.closed(self, f"the server closed the connection ({error or 'end of stream'})")

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        book, known, index = self._book, self._known, self.index
        if index < 0:  # bytes that nobody asked for: what follows them could not be told from an answer
            self.abort()
            return
        if self._fresh and len(data) == known.total and data.startswith(known.head):
            self.index = -1
            book.answered(index, data[len(known.head) :], known.header_length)
            self._pool.free(self)
            return
        fresh, self._fresh = self._fresh, False
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.abort()
            book.garbled(index, "the server does not speak HTTP", str(error))
            return
        if not self._complete:
            return
        body = b"".join(self._body)
        status, header_length = self._parser.get_status_code(), self._header_length
        self._body.clear()
        self._header_length, self._complete, self._fresh, self.index = None, False, True, -1
        if not 200 <= status < 300:
            book.turned_down(index, status, body)
        elif fault := book.fault_of(body, header_length):
            book.garbled(index, "the server answered 200 with something that is not an answer", fault)
        else:
            head = data[: len(data) - len(body)]
            if fresh and self._keep and head.endswith(b"\r\n\r\n"):  # in one piece, and not in chunks
                known.head, known.total, known.header_length = head, len(data), header_length
            book.answered(index, body, header_length)
        if self._keep:
            self._pool.free(self)
        else:
            self._transport.close()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser."""
        if name.lower() == _HEADER_LENGTH and value.isdigit():
            self._header_length = int(value)

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        self._body.append(body)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self._complete = True
        self._keep = self._parser.should_keep_alive()
