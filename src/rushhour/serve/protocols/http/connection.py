"""`HttpConnection`: one client's connection, from accept to close.

httptools' parser on an asyncio protocol, without a framework between the socket and the batcher: on one core a 3 KB
request costs about 13 µs this way, and 80 to 90 µs through the fastest of the general frameworks.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import cast

from rushhour.errors import WireError
from rushhour.serve.protocols.http.answers import CLOSE, error_body, retry_field, without_body
from rushhour.serve.protocols.http.endpoint import HttpEndpoint
from rushhour.serve.protocols.http.handler import header_length
from rushhour.serve.protocols.http.message import KnownHead, Message
from rushhour.serve.protocols.http.reader import MAX_KNOWN_BYTES, MessageReader
from rushhour.serve.protocols.http.upload import Upload
from rushhour.serve.scheduling.job import Shed

_LINGER_SECONDS = 1.0
"""After an answer that ends the connection, what the client still sends is read for so long."""
_FLUSH_SECONDS = 2.0
"""While draining, a client that reads none of its answers for so long is disconnected."""
_LARGE = 32 * 1024
"""A request of which more bytes are missing is received into a buffer of its own."""


class HttpConnection(MessageReader):
    """One client's connection. Pipelined requests are answered one after another, in order.

    Args:
        endpoint: that the connection belongs to.
    """

    def __init__(self, endpoint: HttpEndpoint) -> None:
        super().__init__(endpoint)
        self._upload: Upload | None = None
        self._lingering: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by its methods, not by its class
        self._endpoint.connections.add(self)
        if len(self._endpoint.connections) > self._limits.connections:
            full = f"{self._limits.connections} connections are open"
            self._refuse(WireError(full, "the server accepts no more", "try again later", status=503))

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has disconnected: cancel its requests."""
        self._transport = None
        self._ready.clear()
        self._outgoing.clear()
        if self._lingering is not None:
            self._lingering.cancel()
        self._endpoint.lost(self)
        if self._job is not None and self._cell is not None:
            self._cell.cancel(self._job)
        self._cell = self._request = self._job = self._upload = self._sending = None
        del self._parser  # they refer to each other: free both now, not at a garbage collection

    def data_received(self, data: bytes) -> None:
        """Bytes of one request, of a part of one, or of several."""
        repeat = self._repeat
        if (
            repeat is not None
            and len(data) == repeat.size
            and self._current is None
            and not self._reading
            and not self._ready
            and not self._discarding
            and data.startswith(repeat.prefix)
        ):
            cell = self._endpoint.stages.get(repeat.path)
            if cell is not None and cell.codec is repeat.codec:
                self._since = self._clock()
                self._current = repeat
                self._enqueue(cell, repeat.request(data))
                return
            self._repeat = None
        if self._discarding or (self._known and not self._reading and self._recognise(data)):
            return
        self._parse(data)

    def eof_received(self) -> bool:
        """The client sends no more; complete requests are still answered."""
        if self._line and not self._discarding:  # the buffered line may be invalid
            self._line_bytes = 0
            self._parse(b"")
        self._ended = self._current is not None or bool(self._ready)
        return self._ended

    # Requests whose head is known, and large ones.

    def _recognise(self, data: bytes) -> bool:
        """Take a request whose head is known, if it is one; else it has to be parsed."""
        free = self._current is None and not self._ready
        if free and self._take_repeat(data, data):
            return True
        for number, known in enumerate(self._known):
            end = known.end(data)
            if end < 0:
                continue
            missing = end + known.body_bytes - len(data)
            if missing and not (free and missing >= _LARGE):
                continue
            if number:
                self._known.insert(0, self._known.pop(number))
            if missing:
                self._receive(known, data, end)
            else:
                self._complete(known.again(data, end))
            return True
        return False

    def _take_repeat(self, data: bytes, whole: bytes | memoryview) -> bool:
        """Queue a request whose head and JSON header are known, if it is one.

        Args:
            data: its beginning, with head and JSON header.
            whole: all of it.
        """
        for number, repeat in enumerate(self._repeats):
            found = repeat.again(data, whole)
            if found is None:
                continue
            cell = self._endpoint.stages.get(repeat.path)
            if cell is None or cell.codec is not repeat.codec:
                del self._repeats[number]
                return False
            if number:
                self._repeats.insert(0, self._repeats.pop(number))
            if repeat.exact:
                self._repeat = repeat
            self._since = self._clock()
            self._current, request = found
            self._enqueue(cell, request)
            return True
        return False

    def _receive(self, known: KnownHead, data: bytes, end: int) -> None:
        """The first read of a large request whose head is known: the rest needs neither parser nor copy."""
        assert self._transport is not None
        self._reading, self._dropping, self._expected = True, False, False
        self._since = self._clock()
        message = self._message = known.again(data, end)
        refused: WireError | None = None
        try:
            message.grant = self._endpoint.budget.grant(known.body_bytes)
        except WireError as error:
            refused = error
        done = partial(self._received, known, end)
        self._upload = Upload(self._transport, self, data, end + known.body_bytes, self._read_more, done)
        if refused is None:
            self._check_early(message)
        else:
            self._drop_rest()
            self._current = message
            self._fail(refused)

    def _received(self, known: KnownHead, end: int, whole: memoryview) -> None:
        """A large request is complete."""
        begun, self._message = self._message, Message()
        self._reading, self._upload = False, None
        self._since = self._clock()
        if self._dropping or self._discarding:
            self._dropped()
            return
        if self._take_repeat(bytes(whole[: end + MAX_KNOWN_BYTES]), whole):
            return
        message = known.again(whole, end)
        message.grant = begun.grant
        self._complete(message)

    def _check_early(self, message: Message) -> None:
        """Answer a request whose body needs further reads, if it will be refused or shed in any case.

        The body is read and dropped, within the usual limits, so that the connection can be used again, or the client
        reads the answer before the connection closes. Not called for requests that arrive in one read.
        """
        path, _, _ = message.target.partition(b"?")
        admitted = self._admits(path, message)
        if not admitted:
            self._denied = True
            message.body.clear()
            message.grant = None
        if self._current is None and not self._ready:
            if not admitted:
                self._drop_rest()
                self._current = message
                self._challenge()
                return
            shed = None if self._endpoint.draining else self._shed_early(path, message)
            if shed is not None:
                self._drop_rest()
                self._current = message
                self._send_shed(shed)
                return
        if admitted and self._expected and self._transport is not None:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _shed_early(self, path: bytes, message: Message) -> Shed | None:
        cell = self._endpoint.stages.get(path)
        if cell is None or message.method != b"POST":
            return None
        try:
            length = header_length(message.header_length)
        except WireError:
            return None
        packed = message.encoding not in (b"", b"identity")
        return cell.shed_early(None if packed or not length else cell.codec.known(b"".join(message.body)[:length]))

    def _drop_rest(self) -> None:
        self._dropping = True
        self._message.body.clear()
        self._message.grant = None
        if self._upload is not None:
            self._upload.drop()

    def _dropped(self) -> None:
        """A body that was dropped has ended."""
        self._dropping = False
        self._since = self._clock()
        if self._close_after_body and self._transport is not None:
            self._discarding = True
            self._transport.close()

    # The end.

    def expire(self, now: float) -> None:
        """Close the connection if its request or its idle time took too long.

        Args:
            now: in seconds of the event loop's clock.
        """
        if self._transport is None:
            return
        if self._is_stalled(now, self._limits.request_s):
            self._transport.abort()
            return
        if self._current is not None or self._lingering is not None or self._writing_paused:
            return
        if not self.idle and now - self._since > self._limits.request_s:
            late = f"the request was not complete after {self._limits.request_s:g} s"
            self._refuse(WireError(late, "", "send it faster", status=408))
        elif self.idle and now - self._since > self._limits.idle_s:
            self._transport.close()

    def close_if_idle(self) -> None:
        """Close the connection if no request is in flight, for draining. Called again until it has closed.

        Answers that the client does not read are dropped after 2 s.
        """
        if self._transport is None:
            return
        if self._is_stalled(self._clock(), _FLUSH_SECONDS):
            self._transport.abort()
        elif self.idle:
            self._transport.close()

    def abort(self) -> None:
        """Close the connection at once, whatever is in flight."""
        if self._transport is not None:
            self._transport.abort()

    def forget(self) -> None:
        """Forget known heads: the API key in them may have been withdrawn."""
        self._known, self._repeats, self._repeat = [], [], None

    def _refuse(self, error: WireError) -> None:
        """Answer what cannot be read, after all requests before it, and close: the next request cannot be found.

        What else arrives is read and dropped for 1 s first: closing a connection with unread bytes resets it, and the
        client would not receive the answer.
        """
        path = self._message.target.partition(b"?")[0]
        self._discarding = True
        self._message = Message()
        self._line.clear()
        if self._transport is None:
            return
        if self._current is not None or self._ready:
            self._final_error = error, path
            return
        self._send_final(error, path)

    def _send_final(self, error: WireError, path: bytes) -> None:
        assert self._transport is not None
        if self._transport.is_closing():
            return
        if not self._dropping:  # else this request has its answer already
            self._endpoint.refused(path, error.status, self._clock() - self._since)
            head_only = self._in_body and self._parser.get_method() == b"HEAD"
            answer = self._response(error.status, error_body(error), retry_field(error) + CLOSE)
            self._transport.write(without_body(answer) if head_only else answer)
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._lingering = asyncio.get_running_loop().call_later(_LINGER_SECONDS, self._transport.close)
