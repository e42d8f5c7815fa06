"""`Pipeline`: requests of one connection are answered in order, and large answers are written in parts."""

from __future__ import annotations

import asyncio
import fcntl
import struct
import termios
from collections import deque
from typing import Any

from rushhour.errors import WireError
from rushhour.serve.memory.budget import Grant
from rushhour.serve.protocols.http.answers import BINARY, CLOSE, KEEP_ALIVE, OK, REASONS, without_body
from rushhour.serve.protocols.http.endpoint import HttpEndpoint
from rushhour.serve.protocols.http.message import Message
from rushhour.serve.protocols.http.repeats import PreparedAnswer
from rushhour.serve.protocols.http.routes import JSON
from rushhour.serve.protocols.http.turns import TURN_BYTES
from rushhour.wire import Body, Parts

MAX_PIPELINED = 32
"""Requests of one connection that may wait before reading pauses, and that begin in one turn of the event loop."""
_LEAST_READ = 1024
"""Bytes: a client that has read fewer within the time limit is stalled."""
MAX_PIPELINED_BYTES = 2**20
"""Of these requests together, before reading pauses."""
_TURN_BYTES = 256 * 1024
"""Of an answer, written in one turn of the event loop: the kernel buffers it, and a local client reads it meanwhile."""


class Pipeline(asyncio.Protocol):
    """The requests of one connection, of which one at a time is answered, and its answers.

    A connection is one object, and its class is built in four steps: `Pipeline` orders requests and writes answers,
    `RequestHandler` answers a request, `MessageReader` reads requests, `HttpConnection` adds the connection's events.
    They share attributes, because an object for each would cost time in every request (docs/decisions/0033).

    Args:
        endpoint: that the connection belongs to.
    """

    def __init__(self, endpoint: HttpEndpoint) -> None:
        self._endpoint = endpoint
        self._limits = endpoint.limits
        self._clock = asyncio.get_running_loop().time
        self._since = self._clock()
        self._transport: asyncio.Transport | None = None
        self._current: Message | PreparedAnswer | None = None
        self._ready: deque[Message] = deque()
        self._pipelined = 0
        self._completed = 0
        self._advancing = False
        self._reading = False
        self._dropping = False
        self._close_after_body = False
        self._discarding = False
        self._ended = False
        self._final_error: tuple[WireError, bytes] | None = None
        self._unparsed = b""
        self._paused = False
        self._waits_turn = False
        self._writing_paused = False
        self._sending: Grant | None = None
        self._outgoing: deque[Body] = deque()
        self._unsent = 0
        self._unsent_since = 0.0

    def _begin(self, message: Message) -> None:
        """Start to answer a request."""
        raise NotImplementedError

    def _parse_rest(self) -> None:
        """Parse what was read and not parsed yet."""
        raise NotImplementedError

    def _send_final(self, error: WireError, path: bytes) -> None:
        """Answer with an error, and close the connection."""
        raise NotImplementedError

    # Back-pressure.

    @property
    def idle(self) -> bool:
        """Whether no request is being answered or read."""
        return self._current is None and not (self._ready or self._reading or self._unparsed)

    def _pause(self) -> None:
        """Too much waits: read no more until earlier requests are answered."""
        if not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def _resume(self) -> None:
        """Read on, unless reading has to pause."""
        if self._paused or self._waits_turn or self._writing_paused or self._unparsed:
            return
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def _read_more(self, received: int, size: int) -> None:
        """More of a body has been read, and it is not complete: if it is large, others may have their turn now.

        Args:
            received: bytes of it so far.
            size: of what was read.
        """
        if received <= TURN_BYTES or self._waits_turn or self._transport is None:
            return
        if self._endpoint.turns.has_to_wait(self, size):
            self._waits_turn = True
            self._transport.pause_reading()

    def go_on(self) -> None:
        """Read on: it is this connection's turn."""
        self._waits_turn = False
        self._resume()

    def pause_writing(self) -> None:
        """The client does not read its answers: read no further requests until it does."""
        self._writing_paused = True
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """The client reads again."""
        self._writing_paused, self._unsent = False, 0
        if self._outgoing:
            self._write_on()
        else:
            self._sending = None
        self._resume()
        if self._ready and self._current is None and not self._advancing:
            self._advance()

    def _is_stalled(self, now: float, within_s: float) -> bool:
        """Whether the client has read none of its answers for so long."""
        transport = self._transport
        assert transport is not None
        if not (self._writing_paused or transport.is_closing()):
            return False
        waiting = transport.get_write_buffer_size()
        unsent = waiting + _in_kernel(transport) if waiting else 0
        if not unsent or not self._unsent or unsent <= self._unsent - _LEAST_READ:
            self._unsent, self._unsent_since = unsent, now
        self._unsent = max(self._unsent, unsent)
        return unsent > 0 and now - self._unsent_since > within_s

    # The order of requests.

    def _complete(self, message: Message) -> None:
        """A request is complete: answer it, or let it wait for those before it."""
        self._since = self._clock()
        if self._current is None and self._completed <= MAX_PIPELINED and not (self._advancing or self._writing_paused):
            self._begin(message)
            return
        self._ready.append(message)
        self._pipelined += sum(map(len, message.body))
        if len(self._ready) >= MAX_PIPELINED or self._pipelined >= MAX_PIPELINED_BYTES:
            self._pause()

    def _next(self, close: bool) -> None:
        self._current = None
        if close:
            self._ready.clear()
            if self._dropping:
                self._close_after_body = True  # to close while the body arrives would reset the answer
            elif self._transport is not None:
                self._discarding = True
                self._transport.close()
        elif (self._ready or self._ended or self._final_error or self._paused) and not self._advancing:
            self._advance()

    def _advance(self) -> None:
        """Begin waiting requests without recursion: one read may bring thousands."""
        self._advancing = True
        for _ in range(MAX_PIPELINED):
            if self._current is not None or not self._ready or self._writing_paused:
                break
            message = self._ready.popleft()
            self._pipelined -= sum(map(len, message.body))
            self._begin(message)
        few = len(self._ready) < MAX_PIPELINED and self._pipelined < MAX_PIPELINED_BYTES
        if self._paused and few and self._transport is not None and (self._current is None or not self._reading):
            self._paused = False
            self._since = self._clock()
            if self._unparsed:
                asyncio.get_running_loop().call_soon(self._parse_rest)
            self._resume()
        if self._current is None and self._ready and not self._writing_paused:
            asyncio.get_running_loop().call_soon(self._advance)  # other connections have their turn first
            return
        self._advancing = False
        if self._current is None and not self._ready and self._transport is not None:
            if self._final_error is not None:
                self._send_final(*self._final_error)
            elif self._ended:
                self._transport.close()

    # Writing.

    def _send_answer(self, status: int, body: bytes, kind: bytes = JSON, extra: bytes = b"") -> None:
        self._send(status, body, extra, kind)

    def _send(self, status: int, body: bytes, extra: bytes = b"", kind: bytes = JSON) -> None:
        close = self._closing()
        if self._transport is not None:
            answer = self._response(status, body, extra + self._persistence(close), kind)
            if isinstance(self._current, Message) and self._current.method == b"HEAD":
                answer = without_body(answer)
            self._transport.write(answer)
            self._next(close)

    def _send_encoded(self, length: int | None, parts: Parts, extra: bytes, *, lasts: bool) -> None:
        if length is not None:
            self._send_parts(length, parts, extra, lasts=lasts)
        elif len(parts) == 1:
            self._send(200, bytes(parts[0]), extra)
        else:
            self._send_list(parts, extra)

    def _send_parts(self, header_length: int, parts: Parts, extra: bytes, *, lasts: bool = False) -> None:
        """An answer of a JSON header and raw tensors.

        Args:
            header_length: of the JSON header in bytes.
            parts: of the body.
            extra: fields of the header.
            lasts: whether they stay valid, and need not be copied now.
        """
        close = self._closing()
        if self._transport is not None:
            size = sum(map(len, parts))
            fields = BINARY % (header_length, self._persistence(close), size)
            head = b"".join((OK, self._endpoint.date, extra, fields))
            if lasts and size > MAX_PIPELINED_BYTES:
                self._write_each([head, *parts])
                return
            self._transport.write(b"".join([head, *parts]))
            self._next(close)

    def _send_list(self, parts: Parts, extra: bytes) -> None:
        """An answer in JSON, in several parts."""
        if self._transport is not None:
            fields = extra + self._persistence(self._closing())
            self._write_each([self._heading(200, sum(map(len, parts)), fields), *parts])

    def _write_each(self, parts: Parts) -> None:
        """Write a large answer without joining its parts, a piece in each turn of the event loop.

        Until it is sent its bytes count in the budget.
        """
        self._outgoing.extend(parts)
        self._sending = self._endpoint.budget.grant()
        self._sending.take(sum(map(len, parts)))
        self._write_on()

    def _write_on(self) -> None:
        """Write more of a large answer; after its end the next request begins."""
        if self._transport is None:
            return
        left = _TURN_BYTES
        while self._outgoing:
            if self._writing_paused:
                return  # `resume_writing` calls it again
            if left <= 0:
                asyncio.get_running_loop().call_soon(self._write_on)
                return
            part = memoryview(self._outgoing.popleft())
            if len(part) > left:
                self._outgoing.appendleft(part[left:])
            self._transport.write(part[:left])
            left -= min(left, len(part))
        if not self._writing_paused:
            self._sending = None
        if self._current is not None:
            self._next(self._closing())

    def _response(self, status: int, body: bytes, extra: bytes = b"", kind: bytes = JSON) -> bytes:
        return self._heading(status, len(body), extra, kind) + body

    def _heading(self, status: int, size: int, extra: bytes, kind: bytes = JSON) -> bytes:
        return b"HTTP/1.1 %d %s\r\n%scontent-type: %s\r\n%scontent-length: %d\r\n\r\n" % (
            status,
            REASONS[status].encode(),
            self._endpoint.date,
            kind,
            extra,
            size,
        )

    def _persistence(self, close: bool) -> bytes:
        if close:
            return CLOSE
        return KEEP_ALIVE if isinstance(self._current, Message) and self._current.old else b""

    def _closing(self) -> bool:
        return self._endpoint.draining or (self._current is not None and not self._current.keep_alive)


def _in_kernel(transport: asyncio.Transport) -> int:
    """Bytes in the kernel's send buffer, not yet acknowledged."""
    sock: Any = transport.get_extra_info("socket")
    try:
        return int(struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))[0])
    except (AttributeError, OSError):
        return 0
