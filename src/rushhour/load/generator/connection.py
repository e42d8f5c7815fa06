"""One HTTP/1.1 connection of the client: it sends one request at a time and reads its answer."""

from __future__ import annotations

import socket
from time import monotonic
from typing import Protocol

import httptools

from rushhour.load.generator.timestamps import ANCILLARY_BYTES, Timestamps
from rushhour.load.generator.transport import Recorder
from rushhour.wire import HEADER_LENGTH

_HEADER_LENGTH = HEADER_LENGTH.lower().encode()
_TIMING = b"\r\nserver-timing:"
_PIECE_BYTES = 1 << 16
"""Read in one call."""
_SMALL_BYTES = 1 << 14
"""An answer of up to this size fits into any socket buffer, so leaving it unread does not block the server."""
_OVERHEAD_BYTES = 1 << 20
"""Of an answer before its body, or between two parts of it."""
_HELD_BYTES = 1 << 29
"""Of the bodies of all answers that are not complete."""


class Pool(Protocol):
    """The owner of a connection."""

    def free(self, connection: Connection) -> None:
        """The connection is ready for the next request."""
        ...

    def blocked(self, connection: Connection) -> None:
        """A part of a request is not written yet; call `write_on` when the socket is writable."""
        ...

    def unblocked(self, connection: Connection) -> None:
        """The request is written whole, or the connection is closed."""
        ...

    def answer_read(self, *, small: bool) -> None:
        """An answer was read by the parser; `small` if it came in one piece of a few KB."""
        ...

    def closed(self, connection: Connection, why: str) -> None:
        """The connection is closed; the answer to the request `index`, if any, will not arrive."""
        ...


class KnownHead:
    """The head of an answer that httptools has parsed: status 2xx, a body of known length, the connection kept open.

    An answer whose head has the same bytes is not parsed again; only the value of `Server-Timing` may differ. All
    connections to one server share this object; where a server sends a Date header, the head changes once a second.

    Attributes:
        header_length: the length of the JSON header, if raw bytes follow it.
        held: bytes of answers that are not complete, on all connections.
    """

    __slots__ = ("_after", "_before", "_left", "header_length", "held")

    def __init__(self) -> None:
        self.header_length: int | None = None
        self.held = 0
        self._before = self._after = b""
        self._left = -1

    def learn(self, head: bytes, body_bytes: int, header_length: int | None) -> None:
        """Recognise this head from now on.

        Args:
            head: of a complete answer.
            body_bytes: after it.
            header_length: of the JSON header, if raw bytes follow it.
        """
        at = head.find(_TIMING) + len(_TIMING)
        if at < len(_TIMING):
            self._before, self._after = head, b""
        else:
            self._before, self._after = head[:at], head[head.index(b"\r\n", at) :]
        self.header_length, self._left = header_length, len(self._after) + body_bytes

    def end(self, data: bytes) -> int:
        """Where the head of a complete answer ends, if it is this one; else -1."""
        before, after = self._before, self._after
        if not data.startswith(before):
            return -1
        at = len(before)
        if after:
            at = data.find(b"\r\n", at)
            if at < 0 or not data.startswith(after, at):
                return -1
        return at + len(after) if len(data) - at == self._left else -1


class Connection:
    """A connection and the index of the request in flight on it (`index`, -1 for none).

    Args:
        wire: a non-blocking socket.
        recorder: records answers.
        pool: the owner.
        known: shared by all connections to the server.
        timestamps: when bytes arrived.
    """

    __slots__ = (
        "_body",
        "_complete",
        "_fresh",
        "_header_length",
        "_held",
        "_keep",
        "_known",
        "_length",
        "_overhead",
        "_parser",
        "_pool",
        "_receive",
        "_recorder",
        "_send",
        "_sized",
        "_status",
        "_timestamps",
        "_unsent",
        "_until_end",
        "index",
        "opening",
        "wire",
    )

    def __init__(
        self, wire: socket.socket, recorder: Recorder, pool: Pool, known: KnownHead, timestamps: Timestamps
    ) -> None:
        self.wire = wire
        self.index = -1
        self.opening = False
        self._send = wire.send
        self._receive = wire.recvmsg
        self._recorder = recorder
        self._pool = pool
        self._known = known
        self._timestamps = timestamps
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
        self._overhead = 0
        self._held = 0
        self._unsent = memoryview(b"")

    def send(self, index: int, request: bytes) -> None:
        """Write a whole request; its answer is recorded under `index`."""
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
        """Continue a request that was too long for one write."""
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
        """Close at once, without recording the request in flight."""
        self.index = -1
        self._close("")

    def read(self) -> None:
        """Read what has arrived."""
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
        at = self._timestamps.arrival(ancillary)
        recorder, known, index = self._recorder, self._known, self.index
        if index < 0:  # no request is in flight: these bytes would be taken for the next answer
            self.abort()
            return
        if self._fresh and not self._unsent and (end := known.end(data)) > 0:
            self.index = -1
            recorder.answered(index, data[end:], known.header_length, at)
            self._pool.free(self)
            return
        fresh, self._fresh = self._fresh, False
        self._overhead += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.abort()
            recorder.malformed(index, "the server does not speak HTTP", str(error), at)
            return
        except httptools.HttpParserUpgrade:
            self.abort()
            recorder.malformed(index, "the server does not speak HTTP", "it switches to another protocol", at)
            return
        if self._complete:
            self._finish(at, data if fresh else b"")
        elif self._overhead > _OVERHEAD_BYTES or known.held > _HELD_BYTES:
            self.abort()
            recorder.malformed(index, "the server's answer does not end", "it fills the memory of this process", at)
        elif self._until_end:  # the end of the stream has no timestamp: it has to be read as soon as it comes
            self._pool.answer_read(small=False)

    def _finish(self, at: float, data: bytes) -> None:
        """Record a complete answer; `data` is all of it where it came in one piece."""
        recorder, known, index = self._recorder, self._known, self.index
        body, length, status, header_length = b"".join(self._body), self._length, self._status, self._header_length
        self._drop()
        self._complete, self._until_end, self._fresh, self.index = False, False, True, -1
        self._pool.answer_read(small=0 < len(data) <= _SMALL_BYTES)
        if not 200 <= status < 300:
            recorder.error_status(index, status, body, at)
        elif fault := recorder.fault_of(body, header_length):
            recorder.malformed(index, "the server answered 200, but the body is not an answer", fault, at)
        else:
            head = data[: len(data) - len(body)]
            if data and self._keep and length == len(body) and head.endswith(b"\r\n\r\n"):
                known.learn(head, len(body), header_length)
            recorder.answered(index, body, header_length, at)
        if self._keep and not self._unsent:  # an answer before the end of the request: the server reads no more of it
            self._pool.free(self)
        else:
            self._close("")

    def on_message_begin(self) -> None:
        """Called by the parser."""
        if self._complete:  # a second answer to one request
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
            self._overhead = 0
            self._held += len(body)
            self._known.held += len(body)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        if self._complete or self._status < 200:  # 100, 103: the final answer follows
            return
        self._complete = True
        self._keep = self._parser.should_keep_alive()

    def _drop(self) -> None:
        """Hold nothing of an answer any more."""
        self._body.clear()
        self._known.held -= self._held
        self._held = self._overhead = 0

    def _gone(self, error: OSError | None) -> None:
        self._close(f"the server closed the connection ({error or 'end of stream'})")

    def _close(self, why: str) -> None:
        if self._unsent:
            self._unsent = memoryview(b"")
            self._pool.unblocked(self)
        self._drop()
        self._pool.closed(self, why)
