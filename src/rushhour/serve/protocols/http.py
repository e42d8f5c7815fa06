"""HTTP for one connection: httptools' parser on an asyncio protocol, straight to the cell and back.

No framework between the socket and the batcher: on one core a 3 KB request costs about 13 µs this way, and 80 to 90
µs through the fastest of the general frameworks.
"""

from __future__ import annotations

import asyncio
import fcntl
import math
import re
import struct
import termios
from collections import deque
from collections.abc import Awaitable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol, cast

import httptools
import msgspec

from rushhour.errors import RushhourError, WireError
from rushhour.serve.protocols.limits import ASKER_FIELDS, Asker, Budget, Grant, Keys, Limits, inflate
from rushhour.serve.protocols.routes import JSON, MAX_BODY_BYTES, Answer, not_allowed
from rushhour.serve.protocols.upload import Upload
from rushhour.serve.scheduling.cell import LATER, Cell, Job, Lasting, Shed, TurnedAway, lasting
from rushhour.wire import Body, Codec, InferRequest, Layout, Parts, PlacedRequest

_OPEN_PATHS = frozenset((b"/v2/health/live", b"/v2/health/ready"))
"""Asked by whoever watches over the server; they carry no key, and learn nothing but yes or no."""
_CHALLENGE = b"www-authenticate: Bearer\r\n"
_MAX_PIPELINED = 32
"""Requests of one connection that may wait, before no more is read; and that are begun in one turn of the loop."""
_TWICE = "a field that may come once came twice"
_LINGER_SECONDS = 1.0
_FLUSH_SECONDS = 2.0
"""So long, at the end, a client may take nothing of what was written for it."""
_LEAST_TAKEN = 1024
"""Bytes: a client that has taken fewer in its time has as good as taken none."""
_LONG_LINE = 1024
"""Bytes of a line in a head, from which on it waits for its end before the parser sees it."""
_TELLING = 64
"""Bytes at the end of a body by which its end is found again among what was read."""
_BETWEEN_FIELDS = 256
"""Bytes of a head that are not counted elsewhere: colons, line ends and the usual spaces."""
_BETWEEN_CHUNKS = 64 * 1024
"""Bytes that may follow each other in a body of chunks without a byte of the body among them, beside a header's."""
_MAX_PIPELINED_BYTES = 2**20
"""Of these requests together, before no more is read."""
_LARGE = 32 * 1024
"""Bytes still to come, from which on a request is worth a buffer of its own."""
_SLICE, _MOST_MET = 16 * 1024, 512
"""Bytes that are parsed in one go; and requests and parts of bodies in them, after which the others have their turn."""
_TURN_BYTES = 256 * 1024
"""Of an answer, that are written in one turn: the kernel takes all that a client on this machine reads meanwhile."""
_HELD_BYTES = 64 * 1024
"""Of a body, from which on it counts among what the process may hold."""
_MAX_KNOWN = 8
"""Heads of a connection that are remembered: behind a proxy it carries the requests of several clients in turn."""
_MAX_KNOWN_BYTES = 4096
_TELLING_APART = re.compile(
    rb"\r\n(?:(?:[a-z0-9-]+-)?(?:request|correlation|trace|span|parentspan|transaction|message|operation)-?id"
    rb"|traceparent|tracestate|baggage|b3|sentry-trace|uber-trace-id|x-cloud-trace-context|cf-ray|x-amz-cf-id"
    rb"|forwarded|x-forwarded-for|x-real-ip|date):([\x20-\x7e\t]*)(?=\r\n)",
    re.IGNORECASE,
)
"""Fields that tell requests apart, and mean nothing here."""
_VALUE = re.compile(rb"[\x20-\x7e\t]{0,512}")
_ID = re.compile(rb'[^"\\\x00-\x1f]+')

_REASONS = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    411: "Length Required",
    413: "Content Too Large",
    414: "URI Too Long",
    415: "Unsupported Media Type",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}

_OK = b"HTTP/1.1 200 OK\r\n"
_BINARY = (
    b"content-type: application/octet-stream\r\ninference-header-content-length: %d\r\n%scontent-length: %d\r\n\r\n"
)
"""What follows the status and the date of an answer with tensors."""
_CLOSE, _KEEP = b"connection: close\r\n", b"connection: keep-alive\r\n"
_PACKINGS = b"accept-encoding: gzip, deflate\r\n"

_ABSOLUTE = re.compile(rb"https?://([^/?#]*)(.*)", re.IGNORECASE | re.DOTALL)
_HOST = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+;=%-]*|\[[0-9A-Fa-fvV:.%]+\])(?::[0-9]*)?")
"""RFC 3986, 3.2.2; without the comma, which would let a list of hosts pass."""
_REQUEST_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+ [!-~]+ HTTP/1\.[01]\r\n")


class Desk(Protocol):
    """What a connection needs of the server behind it."""

    connections: set[HttpConnection]
    draining: bool
    limits: Limits
    keys: Keys
    budget: Budget
    date: bytes
    """The field `date` of an answer now, with its line end."""

    def cell_of(self, path: bytes) -> Cell | None:
        """The cell that answers inference requests at this exact path, if there is one."""
        ...

    def control(
        self, method: bytes, path: bytes, body: bytes, accept: bytes, asker: Asker
    ) -> Answer | Awaitable[Answer]:
        """The answer to any other request; awaitable where that takes time."""
        ...

    def check_origin(self, asker: Asker) -> None:
        """Raise a `WireError` where a web page asks for what only programs of this machine may have done."""
        ...

    def refused(self, path: bytes, status: int, seconds: float = 0.0) -> None:
        """Count an answer with an error that neither a cell nor `control` has counted."""
        ...


class Message:
    """One request, as far as it has been read.

    Attributes:
        old: it is HTTP/1.0, whose connections close unless both sides say otherwise.
    """

    __slots__ = (
        "accept",
        "asker",
        "authorization",
        "body",
        "encoding",
        "grant",
        "header_length",
        "host",
        "is_picture",
        "keep_alive",
        "known",
        "method",
        "old",
        "target",
    )

    def __init__(self) -> None:
        self.target = b""
        self.method = b""
        self.body: list[Body] = []
        self.grant: Grant | None = None
        self.header_length: bytes | None = None
        self.is_picture = False
        self.encoding = b""
        self.authorization: bytes | None = None
        self.accept = b""
        self.asker: dict[bytes, bytes] = {}
        self.host: bytes | None = None
        self.keep_alive = True
        self.old = False
        self.known: _Known | None = None


class _Known:
    """A request head that was parsed before, and what it said: the same bytes say the same again.

    A client repeats itself: most heads on a connection are equal, but for what tells its requests apart. Only heads
    that frame their body by its length are kept; everything else goes through the parser.
    """

    __slots__ = ("_said", "body_bytes", "fixed", "head")

    def __init__(self, head: bytes, body_bytes: int, message: Message) -> None:
        self.head = head
        self.body_bytes = body_bytes
        self.fixed = _between(head, (match.span(1) for match in _TELLING_APART.finditer(head)))
        self._said = (
            message.target,
            message.method,
            message.header_length,
            message.encoding,
            message.authorization,
            message.is_picture,
            message.asker,
        )

    def end(self, data: bytes) -> int:
        """Where the head ends that `data` begins with, if it is this one; else -1."""
        if data.startswith(self.head):
            return len(self.head)
        at = _behind(self.fixed[:-1], data) if len(self.fixed) > 1 else -1
        return at + len(self.fixed[-1]) if at >= 0 and data.startswith(self.fixed[-1], at) else -1

    def again(self, data: bytes | memoryview, end: int) -> Message:
        """The request that `data`, in which the head ends there, holds or begins."""
        message = Message()
        (
            message.target,
            message.method,
            message.header_length,
            message.encoding,
            message.authorization,
            message.is_picture,
            message.asker,
        ) = self._said
        message.body.append(data[end:])
        message.known = self
        return message


def _between(data: bytes, places: Iterable[tuple[int, int]]) -> list[bytes]:
    """What stands before, between and behind some places."""
    found, at = [], 0
    for start, stop in places:
        found.append(data[at:start])
        at = stop
    return [*found, data[at:]]


def _moved(place: tuple[int, int], before: bytes) -> tuple[int, int]:
    return place[0] + len(before), place[1] + len(before)


def _behind(fixed: Sequence[bytes], data: bytes) -> int:
    """Where `data` goes on behind these parts and what may stand behind each of them; -1 if they are not there."""
    at = 0
    for part in fixed:
        if not data.startswith(part, at):
            return -1
        match = _VALUE.match(data, at + len(part))
        assert match is not None  # the pattern matches nothing, too
        at = match.end()
    return at


class _Turn:
    """A request that is answered without having been a `Message`.

    Attributes:
        answer: what of it stands between its date and its tensors, if they follow whole and in the signature's order.
        id: as the client gave it.
    """

    __slots__ = ("answer", "id")
    keep_alive = True

    def __init__(self, answer: bytes | None, id: bytes = b"") -> None:
        self.answer = answer
        self.id = id


class _Repeat(_Turn):
    """A request whose head and JSON header came before, byte for byte: only its tensors are new, or its ids.

    What it asks for is known, and so is all of its answer but the tensors. It holds for the version of the model that
    read it; after a reload the request is read anew.
    """

    __slots__ = (
        *("_around", "_before", "_fields", "_id_bytes", "_last", "codec"),
        *("path", "prefix", "rows", "size", "slices", "wanted"),
    )

    def __init__(self, known: _Known, codec: Codec, path: bytes, header: bytes, layout: Layout) -> None:
        self.prefix = known.head + header
        self.size = len(known.head) + known.body_bytes
        self.path = path
        self.codec = codec
        self.rows = layout.rows
        self.wanted = layout.wanted
        self.slices = tuple(slice(len(self.prefix) + start, len(self.prefix) + stop) for start, stop in layout.ordered)
        place = codec.id_in(header)
        identity = b"" if place is None else header[slice(*place)]
        self._id_bytes = len(identity)
        *fields, rest = known.fixed
        self._fields = tuple(fields)
        self._before, self._last = (
            (b"", rest + header) if place is None else _between(rest + header, (_moved(place, rest),))
        )
        described, self._around = codec.answer_header(layout.wanted, layout.rows), (b"", b"")
        answer = None
        if described is not None:
            if identity:
                described = b'%b,"id":"%b"%b' % (described[: codec.id_at], identity, described[codec.id_at :])
            size = len(described) + self.rows * sum(spec.row_bytes for spec in codec.signature.outputs)
            answer = _BINARY % (len(described), b"", size)
            at = len(answer) + codec.id_at + len(b',"id":"')
            answer += described
            self._around = answer[:at], answer[at + len(identity) :]
        super().__init__(answer, identity)

    @property
    def exact(self) -> bool:
        """Nothing in it differs from time to time."""
        return not (self._fields or self._id_bytes)

    def request(self, data: bytes | memoryview) -> InferRequest:
        """The request that `data`, which begins with the prefix and has the right size, holds."""
        view = memoryview(data)
        if len(self.slices) == 1:
            return InferRequest(self.rows, (view[self.slices[0]],), self.wanted)
        return InferRequest(self.rows, tuple([view[place] for place in self.slices]), self.wanted)

    def again(self, data: bytes, whole: bytes | memoryview) -> tuple[_Turn, InferRequest] | None:
        """The request that `data` begins and `whole` holds, if it is this one but for its ids.

        Its length is the one before: what the head says of lengths is the same.
        """
        at = _behind(self._fields, data)
        start = at + len(self._before)
        stop = start + self._id_bytes
        shift = stop + len(self._last) - len(self.prefix)
        if at < 0 or len(whole) - self.size != shift or not data.startswith(self._last, stop):
            return None
        if shift:
            view = memoryview(whole)
            tensors = tuple([view[place.start + shift : place.stop + shift] for place in self.slices])
            request = InferRequest(self.rows, tensors, self.wanted)
        else:
            request = self.request(whole)
        if not self._id_bytes:
            return self, request
        identity = data[start:stop]
        if not (data.startswith(self._before, at) and identity.isascii() and _ID.fullmatch(identity)):
            return None
        before, after = self._around
        return _Turn(before + identity + after if after else None, identity), request


class HttpConnection(asyncio.Protocol):
    """One client's connection. Pipelined requests are answered one after another, in order.

    Args:
        desk: the server.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._limits = desk.limits
        self._clock = asyncio.get_running_loop().time
        self._since = self._clock()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._message = Message()
        self._header_bytes = 0
        self._body_bytes = 0
        self._in_body = False
        self._expected = False
        self._foreseen = False
        self._dropping = False
        self._denied = False
        self._last = False
        self._framing = b""
        self._offered: Message | None = None
        self._line_bytes = 0
        self._line: list[bytes] = []
        self._in_target = False
        self._between = 0
        self._begun = 0
        self._advancing = False
        self._deaf = False
        self._refused: WireError | None = None
        self._broken: tuple[WireError, bytes] | None = None
        self._ready: deque[Message] = deque()
        self._current: Message | _Turn | None = None
        self._cell: Cell | None = None
        self._request: InferRequest | None = None
        self._job: Job | None = None
        self._paused = False
        self._known: list[_Known] = []
        self._repeat: _Repeat | None = None
        self._repeats: list[_Repeat] = []
        self._upload: Upload | None = None
        self._pipelined = 0
        self._left = b""
        self._met = 0
        self._chunk = self._head = self._body_part = b""
        self._chunked = False
        self._ended = False
        self._unread = False
        self._sending: Grant | None = None
        self._outgoing: deque[Body] = deque()
        self._unsent = 0
        self._unsent_since = 0.0
        self._reading = False
        self._lingering: asyncio.TimerHandle | None = None
        self._waiting: asyncio.Future[None] | None = None

    # The transport's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is there."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by its methods, not by its class
        self._desk.connections.add(self)
        if len(self._desk.connections) > self._limits.connections:
            full = f"{self._limits.connections} connections are open"
            self._refuse(WireError(full, "the server takes no more", "try again later", status=503))

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone: whatever runs for it is cancelled."""
        self._transport = None
        self._ready.clear()
        self._outgoing.clear()
        if self._lingering is not None:
            self._lingering.cancel()
        self._desk.connections.discard(self)
        if self._job is not None and self._cell is not None:
            self._cell.cancel(self._job)
        self._cell = self._request = self._job = self._upload = self._sending = None
        del self._parser  # which holds this connection: they are to go now, not when cycles are sought

    def data_received(self, data: bytes) -> None:
        """Bytes of one request, of a part of one, or of several."""
        repeat = self._repeat
        if (
            repeat is not None
            and len(data) == repeat.size
            and self._current is None
            and not self._reading
            and not self._ready
            and not self._deaf
            and data.startswith(repeat.prefix)
        ):
            cell = self._desk.cell_of(repeat.path)
            if cell is not None and cell.codec is repeat.codec:
                self._since = self._clock()
                self._current = repeat
                self._hand_in(cell, repeat.request(data))
                return
            self._repeat = None
        if self._deaf or (self._known and not self._reading and self._recognise(data)):
            return
        self._parse(data)

    def _parse(self, data: bytes) -> None:
        """Have the parser read what came, until it has met so much that the others should have their turn."""
        self._chunk = b"" if self._reading else data
        if self._reading and not self._in_body:
            whole = self._lines(data)
            if whole is None:
                return
            data = whole
        self._met, fed = 0, len(data)
        try:
            for at in range(0, len(data), _SLICE):
                self._feed(data if len(data) <= _SLICE else data[at : at + _SLICE])
                if self._met > _MOST_MET and at + _SLICE < len(data):
                    fed = at + _SLICE
                    self._left = data[fed:]
                    break
        except httptools.HttpParserError as error:
            self._refuse(self._refused or self._unreadable(data, error))
            if self._refused is not None:
                # It was raised over what was read, and the parser keeps it: all that would wait for the collector.
                self._refused.__traceback__ = None
                self._refused = None
        else:
            if self._in_body:
                if not (self._foreseen or self._left):
                    self._foreseen = True
                    self._head = self._head_of_chunk()
                    self._message.method = self._parser.get_method()
                    self._message.keep_alive = self._parser.should_keep_alive()
                    self._foresee(self._message)
                elif self._chunked and self._between > self._limits.header_bytes + _BETWEEN_CHUNKS:
                    self._refuse(self._too_long())
            elif self._reading:
                begins = self._line_begins(data, fed)
                if begins or not self._line_bytes:
                    self._line_bytes = fed - begins
                    self._in_target = data.startswith(self._parser.get_method() + b" ", begins)
                self._check_line()
        if self._begun > _MAX_PIPELINED and self._current is None and not self._advancing:
            self._advancing = True
            asyncio.get_running_loop().call_soon(self._advance)
        self._begun, self._chunk, self._body_part = 0, b"", b""
        if self._left and self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._parse_left)

    def _parse_left(self) -> None:
        """Go on with what came before, or else let more come."""
        if self._transport is None or self._transport.is_closing() or self._paused:
            return  # in the last case it is called again
        left, self._left = self._left, b""
        if left and not self._deaf:
            self._parse(left)
        self._resume()

    def _resume(self) -> None:
        """Read more, unless something is against it."""
        if self._paused or self._unread or self._left:
            return
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def _recognise(self, data: bytes) -> bool:
        """Take up a request whose head came before, if it is one; else the parser has to see it."""
        free = self._current is None and not self._ready
        if free and self._take_again(data, data):
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
                self._gather(known, data, end)
            else:
                self._complete(known.again(data, end))
            return True
        return False

    def _take_again(self, data: bytes, whole: bytes | memoryview) -> bool:
        """Hand a request in whose head and JSON header came before, if it is one.

        Args:
            data: its beginning, with both.
            whole: all of it.
        """
        for number, repeat in enumerate(self._repeats):
            found = repeat.again(data, whole)
            if found is None:
                continue
            cell = self._desk.cell_of(repeat.path)
            if cell is None or cell.codec is not repeat.codec:
                del self._repeats[number]
                return False
            if number:
                self._repeats.insert(0, self._repeats.pop(number))
            if repeat.exact:
                self._repeat = repeat
            self._since = self._clock()
            self._current, request = found
            self._hand_in(cell, request)
            return True
        return False

    def _feed(self, data: bytes | memoryview) -> None:
        self._between += len(data)
        while True:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                data = memoryview(data)[offer.args[0] :]
                if self._offered is not None:
                    self._decline(self._offered)
            else:
                return

    def _decline(self, message: Message) -> None:
        """Go on in HTTP/1.1 with a request that offers another protocol, as one may (RFC 9110, 7.8).

        httptools leaves the body of such a request to the other protocol. Here it is read behind a head that offers
        none and frames it alike.
        """
        method, version = self._parser.get_method(), self._parser.get_http_version().encode()
        expected, counted = self._expected, self._header_bytes
        self._offered, self._header_bytes, self._in_body = None, 0, False
        self._parser = httptools.HttpRequestParser(self)
        head = b"%s / HTTP/%s\r\nhost: x\r\n%s%s\r\n"
        self._parser.feed_data(head % (method, version, _KEEP if message.keep_alive else _CLOSE, self._framing))
        self._message, self._expected, self._header_bytes = message, expected, counted

    def _lines(self, data: bytes) -> bytes | None:
        """More of a head, and what was held of it before; None while a long line is not whole.

        The parser copies all that it has of a line with each piece that comes.
        """
        end = data.find(b"\n")
        self._line_bytes += len(data) if end < 0 else end + 1
        if not self._check_line():
            return None
        if end < 0 and self._line_bytes > _LONG_LINE:
            self._line.append(data)
            return None
        if self._line:
            data = b"".join((*self._line, data))
            self._line.clear()
        return data

    def _line_begins(self, data: bytes, fed: int) -> int:
        """Where the line of a head begins that ends none of what was fed: behind a line's end, or behind a body."""
        begins = data.rfind(b"\n", 0, fed) + 1
        behind = self._body_part[-_TELLING:]
        at = data.rfind(behind, max(begins - len(behind), 0), fed) if behind else -1
        return max(begins, at + len(behind))

    def _check_line(self) -> bool:
        """Whether a head is within its bounds together with its line that is not whole yet."""
        within = self._header_bytes + self._line_bytes <= self._limits.header_bytes + _BETWEEN_FIELDS
        if not within:
            self._refuse(self._too_long())
        return within

    def _unreadable(self, data: bytes, error: httptools.HttpParserError) -> WireError:
        unknown = isinstance(error, httptools.HttpParserInvalidMethodError) and not self._begun
        if unknown and _REQUEST_LINE.match(data):
            shown = data.partition(b" ")[0][:40].decode()
            return WireError(f"the method is {shown}", "this server does not know it", "see GET /v2", status=501)
        if str(error) == "Invalid HTTP version":
            return WireError("the version of HTTP is unknown", "this server speaks 1.1 and 1.0", "use one", status=505)
        return WireError("the request is not valid HTTP/1.1", str(error))

    def eof_received(self) -> bool:
        """The client sends no more; what it has asked for is still answered."""
        if self._line and not self._deaf:  # which may show that it is no request
            self._line_bytes = 0
            self._parse(b"")
        self._ended = self._current is not None or bool(self._ready)
        return self._ended

    def pause_writing(self) -> None:
        """The client does not read its answers: nothing more is read from it until it does."""
        self._unread = True
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """The client reads again."""
        self._unread, self._unsent = False, 0
        if self._outgoing:
            self._write_on()
        else:
            self._sending = None
        self._resume()
        if self._ready and self._current is None and not self._advancing:
            self._advance()

    def expire(self, now: float) -> None:
        """Close the connection if the client's time is over: for sending a request, or for not sending any.

        Args:
            now: in seconds of the loop's clock.
        """
        if self._transport is None:
            return
        if self._untaken(now, self._limits.request_s):
            self._transport.abort()
            return
        if self._current is not None or self._lingering is not None or self._unread:
            return
        if not self.idle and now - self._since > self._limits.request_s:
            said = f"the request was not whole after {self._limits.request_s:g} s"
            self._refuse(WireError(said, "it came too slowly", "send it faster", status=408))
        elif self.idle and now - self._since > self._limits.idle_s:
            self._transport.close()

    def _untaken(self, now: float, within_s: float) -> bool:
        """Whether the client has for so long taken nothing of what was written for it."""
        transport = self._transport
        assert transport is not None
        if not (self._unread or transport.is_closing()):
            return False
        waiting = transport.get_write_buffer_size()
        unsent = waiting + _in_kernel(transport) if waiting else 0
        if not unsent or not self._unsent or unsent <= self._unsent - _LEAST_TAKEN:
            self._unsent, self._unsent_since = unsent, now
        self._unsent = max(self._unsent, unsent)
        return unsent > 0 and now - self._unsent_since > within_s

    @property
    def idle(self) -> bool:
        """No request is being answered or read."""
        return self._current is None and not (self._ready or self._reading or self._left)

    def close_if_idle(self) -> None:
        """Close the connection unless it has work: for draining. To be called again until it has closed.

        What was written for a client that does not take it is dropped after a moment.
        """
        if self._transport is None:
            return
        if self._untaken(self._clock(), _FLUSH_SECONDS):
            self._transport.abort()
        elif self.idle:
            self._transport.close()

    def abort(self) -> None:
        """Close the connection over whatever is under way: its time is over."""
        if self._transport is not None:
            self._transport.abort()

    def forget(self) -> None:
        """Judge the next request anew: the key that was right before may have been withdrawn."""
        self._known, self._repeats, self._repeat = [], [], None

    # The parser's side.

    def on_message_begin(self) -> None:
        """A new request begins."""
        self._met += 1
        self._message = Message()
        self._reading = True
        self._chunked = self._expected = self._foreseen = self._dropping = self._denied = False
        self._framing, self._between, self._line_bytes, self._in_target = b"", 0, 0, False
        self._since = self._clock()

    def on_url(self, url: bytes) -> None:
        """The request's target, possibly in parts."""
        self._header_bytes += len(url)
        if self._header_bytes > self._limits.header_bytes:
            self._in_target = True
            raise self._stop(self._too_long())
        self._message.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header field."""
        self._count_header(len(name) + len(value))
        if self._in_body:
            return  # a trailer says nothing that the header may say (RFC 9110, 6.5.1)
        lowered, message, value = name.lower(), self._message, value.rstrip(b" \t")
        if lowered in ASKER_FIELDS:
            before = message.asker.get(lowered)
            message.asker[lowered] = value if before is None else before + b", " + value
        if lowered == b"inference-header-content-length":
            self._once(name, message.header_length)
            message.header_length = value
        elif lowered == b"content-encoding":
            self._once(name, message.encoding or None)
            message.encoding = value.lower()
        elif lowered == b"content-type":
            message.is_picture = value.lower().startswith(b"image/")
        elif lowered == b"host":
            self._once(name, message.host)
            message.host = value
        elif lowered == b"content-length":
            if int(value) > self._limits.body_bytes:
                raise self._stop(self._too_large())
            self._framing = b"content-length: %s\r\n" % value if int(value) else b""
        elif lowered == b"authorization":
            self._once(name, message.authorization)
            message.authorization = value
        elif lowered == b"accept":
            message.accept = value
        elif lowered == b"transfer-encoding":
            self._once(name, value if self._chunked else None)
            self._chunked, self._framing = True, b"transfer-encoding: chunked\r\n"
            if value.lower() != b"chunked":
                raise self._stop(_no_transfer(value))
        elif lowered == b"expect" and value.lower() == b"100-continue":
            self._expected = True

    def _once(self, name: bytes, before: bytes | None) -> None:
        """Which of two is meant, whoever stands in front of this server may see otherwise: neither is taken."""
        if before is not None:
            raise self._stop(WireError(_TWICE, name[:40].decode("latin-1"), "send it once"))

    def on_headers_complete(self) -> None:
        """The header is whole; a body may follow."""
        self._in_body = True
        self._line_bytes = 0
        message, version = self._message, self._parser.get_http_version()
        if self._parser.should_upgrade() and self._parser.get_method() == b"CONNECT":
            raise self._stop(WireError("the method is CONNECT", "this server is no proxy", "see GET /v2", status=501))
        if version != "1.1":
            self._check_old(message, version)
        elif message.host is None:
            raise self._stop(WireError("the request names no host", "the field Host is missing", "send it"))
        if message.host is not None and not _HOST.fullmatch(message.host):
            raise self._stop(WireError(f"the host is {message.host[:100]!r}", "that is none", "send host:port"))
        if message.target[:1] != b"/":
            self._check_target(message)

    def _check_old(self, message: Message, version: str) -> None:
        if version != "1.0":
            what = f"the version of HTTP is {version}"
            raise self._stop(WireError(what, "this server speaks 1.1 and 1.0", "use one of them", status=505))
        if self._chunked:  # whoever stands in front of this server may not know of chunks (RFC 9112, 6.1)
            raise self._stop(WireError("the body is sent in chunks", "HTTP/1.0 has none", "send Content-Length"))
        message.old = True
        self._expected = False

    def _check_target(self, message: Message) -> None:
        """The forms of a target that are not a path (RFC 9112, 3.2)."""
        absolute = _ABSOLUTE.fullmatch(message.target)
        if absolute is not None and absolute[1] and _HOST.fullmatch(absolute[1]):
            rest = absolute[2]
            message.host, message.target = absolute[1], rest if rest[:1] == b"/" else b"/" + rest
            message.asker[b"host"] = absolute[1]
        elif message.target != b"*" or self._parser.get_method() != b"OPTIONS":
            shown = message.target[:100].decode("latin-1")
            raise self._stop(WireError(f"the target is {shown!r}", "it is no path", "send one that begins with /"))

    def on_chunk_header(self) -> None:
        """A chunk begins, or the trailers do."""
        self._between = 0

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._met += 1
        self._body_bytes += len(body)
        self._between = 0
        self._body_part = body
        if self._body_bytes > self._limits.body_bytes:
            raise self._stop(self._too_large())
        if self._dropping or self._denied:
            return
        if self._body_bytes > _HELD_BYTES:
            self._hold(body)
        else:
            self._message.body.append(body)

    def _hold(self, body: bytes) -> None:
        """A part of a large body: in one piece from the beginning, for small parts cost more than they hold."""
        message = self._message
        try:
            if message.grant is None:
                message.grant = self._desk.budget.grant(self._body_bytes)
                message.body = [bytearray(b"".join(message.body))]
            else:
                message.grant.grow(len(body))
        except WireError as error:
            raise self._stop(error) from None
        held = message.body[0]
        assert isinstance(held, bytearray)
        held += body
        if self._body_bytes > _MAX_PIPELINED_BYTES and (self._current is not None or self._ready):
            self._pause()

    def _pause(self) -> None:
        """Enough waits for those before it: read no more until they are answered."""
        if not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def _gather(self, known: _Known, data: bytes, end: int) -> None:
        """The first read of a large request whose head is known: the rest needs no parser, and no copies."""
        assert self._transport is not None
        self._reading, self._dropping, self._expected = True, False, False
        self._since = self._clock()
        message = self._message = known.again(data, end)
        refused: WireError | None = None
        try:
            message.grant = self._desk.budget.grant(known.body_bytes)
        except WireError as error:
            refused = error
        done = partial(self._gathered, known, end)
        self._upload = Upload(self._transport, self, data, end + known.body_bytes, done)
        if refused is None:
            self._foresee(message)
        else:
            self._drop_rest()
            self._current = message
            self._fail(refused)

    def _gathered(self, known: _Known, end: int, whole: memoryview) -> None:
        """All of it is there."""
        begun, self._message = self._message, Message()
        self._reading, self._upload = False, None
        self._since = self._clock()
        if self._dropping or self._deaf:
            self._dropped()
            return
        if self._take_again(bytes(whole[: end + _MAX_KNOWN_BYTES]), whole):
            return
        message = known.again(whole, end)
        message.grant = begun.grant
        self._complete(message)

    def _foresee(self, message: Message) -> None:
        """Answer a request whose body needs several reads after the first, if it will be turned away anyway.

        The body is read and dropped, within the same bounds as any other, so that the connection can go on, or the
        client sees the answer before it closes. Requests in one read never come here: they have cost what they cost.
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
            shed = None if self._desk.draining else self._foreseen_by(path, message)
            if shed is not None:
                self._drop_rest()
                self._current = message
                self._turn_away(shed)
                return
        if admitted and self._expected and self._transport is not None:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _foreseen_by(self, path: bytes, message: Message) -> Shed | None:
        cell = self._desk.cell_of(path)
        if cell is None or message.method != b"POST":
            return None
        try:
            length = _header_length(message.header_length)
        except WireError:
            return None
        packed = message.encoding not in (b"", b"identity")
        return cell.foresee(None if packed or not length else cell.codec.known(b"".join(message.body)[:length]))

    def _drop_rest(self) -> None:
        self._dropping = True
        self._message.body.clear()
        self._message.grant = None
        if self._upload is not None:
            self._upload.drop()

    def _dropped(self) -> None:
        """The end of a body that was not kept."""
        self._dropping = False
        self._since = self._clock()
        if self._last and self._transport is not None:
            self._deaf = True
            self._transport.close()

    def on_message_complete(self) -> None:
        """The request is whole."""
        message = self._message
        message.keep_alive = self._parser.should_keep_alive()
        if self._framing and self._parser.should_upgrade():
            self._offered = message  # and its body is still to be read
            return
        message.method = self._parser.get_method()
        self._remember(message)
        self._header_bytes = self._body_bytes = 0
        self._reading = self._in_body = False
        if self._dropping or self._deaf:
            self._dropped()
            return
        self._begun += 1
        if message.grant is not None:
            self._message = Message()  # the grant is to end with the request, not when the next one begins
        self._complete(message)

    def _remember(self, message: Message) -> None:
        """Keep the head for the next request, if this one's head and body can be told apart."""
        head = self._head if self._foreseen else self._head_of_chunk()
        if not (0 < len(head) <= _MAX_KNOWN_BYTES and message.body and message.keep_alive):
            return
        if not (self._chunked or self._expected or message.old):
            message.known = _Known(head, self._body_bytes, message)
            self._known = [message.known, *(known for known in self._known if known.head != head)][:_MAX_KNOWN]

    def _head_of_chunk(self) -> bytes:
        """The head of the request that is being read, if the last read was of it alone and began with it."""
        end = len(self._chunk) - self._body_bytes
        return self._chunk[:end] if end > 0 and self._chunk.find(b"\r\n\r\n") + 4 == end else b""

    def _complete(self, message: Message) -> None:
        """A request is there: answer it, or let it wait for those before it."""
        self._since = self._clock()
        if self._current is None and self._begun <= _MAX_PIPELINED and not (self._advancing or self._unread):
            self._begin(message)
            return
        self._ready.append(message)
        self._pipelined += sum(map(len, message.body))
        if len(self._ready) >= _MAX_PIPELINED or self._pipelined >= _MAX_PIPELINED_BYTES:
            self._pause()

    def _count_header(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > self._limits.header_bytes:
            raise self._stop(self._too_long())

    def _too_long(self) -> WireError:
        limit = f"the limit is {self._limits.header_bytes} bytes"
        if self._in_target:
            return WireError("the target is too long", limit, "send a shorter one", status=414)
        return WireError("the header is too large", limit, "send fewer or shorter fields", status=431)

    def _too_large(self) -> WireError:
        limit = f"the limit is {self._limits.body_bytes} bytes"
        return WireError("the body is too large", limit, "split the request", status=413)

    def _stop(self, error: WireError) -> WireError:
        """Remember the reason: httptools wraps what its callbacks raise."""
        self._refused = error
        return error

    def _refuse(self, error: WireError) -> None:
        """Answer what cannot be read, after all before it, and close: where the next request begins is unknown.

        What is still on its way is read and dropped for a moment first; a connection closed over unread bytes is
        reset, and the client would never see the answer.
        """
        path = self._message.target.partition(b"?")[0]
        self._deaf = True
        self._message = Message()
        self._line.clear()
        if self._transport is None:
            return
        if self._current is not None or self._ready:
            self._broken = error, path
            return
        self._say_farewell(error, path)

    def _say_farewell(self, error: WireError, path: bytes) -> None:
        assert self._transport is not None
        if self._transport.is_closing():
            return
        if not self._dropping:  # else this request has its answer already
            self._desk.refused(path, error.status, self._clock() - self._since)
            head_only = self._in_body and self._parser.get_method() == b"HEAD"
            answer = self._response(error.status, _error_body(error), _retry(error) + _CLOSE)
            self._transport.write(_without_body(answer) if head_only else answer)
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._lingering = asyncio.get_running_loop().call_later(_LINGER_SECONDS, self._transport.close)

    # The answer's side.

    def _begin(self, message: Message) -> None:
        self._current = message
        try:
            self._take_up(message)
        except Exception as error:
            self._stumble(error)

    def _stumble(self, error: Exception) -> None:
        """Answer 500 for what should not have happened, and tell the log; nobody else is to suffer from it."""
        self._report(error)
        if self._current is not None:
            self._count(500)
            self._break_off(error)

    def _break_off(self, error: Exception) -> None:
        try:
            self._send_error(error)
        except Exception:  # it cannot even be said
            if self._transport is not None:
                self._transport.abort()

    def _report(self, error: Exception) -> None:
        asyncio.get_running_loop().call_exception_handler({"message": "a request failed", "exception": error})

    def _admits(self, path: bytes, message: Message) -> bool:
        return not self._desk.keys or path in _OPEN_PATHS or self._desk.keys.admit(message.authorization)

    def _challenge(self) -> None:
        self._count(401)
        why = "this server takes requests with an API key only"
        self._send(401, _error_body(WireError(why, "", "send 'Authorization: Bearer KEY'")), _CHALLENGE)

    def _take_up(self, message: Message) -> None:
        path, _, _ = message.target.partition(b"?")
        if not self._admits(path, message):
            self._challenge()
            return
        cell = self._desk.cell_of(path)
        if cell is None or message.method == b"OPTIONS":
            if message.body and message.encoding not in (b"", b"identity"):
                why = "this path takes no compressed body"
                self._fail(WireError("the body is compressed", why, "send it as it is", status=415))
                return
            body = b"".join(memoryview(part)[: MAX_BODY_BYTES + 1] for part in message.body)
            answer = self._desk.control(message.method, path, body, message.accept, self._asker(message))
            if isinstance(answer, tuple):
                self._send_answer(*answer)
            else:
                self._waiting = asyncio.ensure_future(self._send_later(answer))
        elif message.method != b"POST":
            self._count(405)
            self._send_answer(*not_allowed(message.method, ("POST", "OPTIONS")))
        else:
            self._infer(cell, message)

    def _asker(self, message: Message) -> Asker:
        if self._transport is None:
            return Asker(message.asker)
        peer, here = (self._transport.get_extra_info(name) for name in ("peername", "sockname"))
        return Asker(message.asker, peer[:2] if peer else None, here[:2] if here else None)

    async def _send_later(self, answer: Awaitable[Answer]) -> None:
        try:
            self._send_answer(*await answer)
        except Exception as error:
            self._stumble(error)

    def _send_answer(self, status: int, body: bytes, kind: bytes = JSON, extra: bytes = b"") -> None:
        self._send(status, body, extra, kind)

    def _infer(self, cell: Cell, message: Message) -> None:
        body = message.body[0] if len(message.body) == 1 else b"".join(message.body)
        message.body.clear()
        if message.encoding in (b"", b"identity"):
            self._submit(cell, message, body)
        else:
            self._waiting = asyncio.ensure_future(self._inflate(message, body))

    async def _inflate(self, message: Message, body: Body) -> None:
        """Unpack on a thread: a small body may unpack into a large one, and the loop has others to serve."""
        try:
            unpacked = await self._desk.budget.unpack(inflate, body, message.encoding, self._limits.body_bytes)
            if len(unpacked) > _HELD_BYTES:
                message.grant = self._desk.budget.grant(len(unpacked))
                self._desk.budget.trim_soon()
            message.body, message.encoding = [unpacked], b""
            if self._transport is not None:
                self._take_up(message)  # anew: a reload may have retired the cell that was there before
        except WireError as error:
            self._fail(error, _PACKINGS if error.status == 415 else b"")
        except Exception as error:
            self._stumble(error)

    def _submit(self, cell: Cell, message: Message, body: Body) -> None:
        try:
            request: InferRequest
            if message.is_picture and message.header_length is None:
                request = cell.codec.decode_picture(body)
            else:
                length = _header_length(message.header_length)
                if cell.codec.is_large(body, length):
                    self._waiting = asyncio.ensure_future(self._decode_aside(cell, message, body, length))
                    return
                request = cell.codec.decode(body, length)
            self._check_origin(message, request)
        except WireError as error:
            self._refuse_request(cell, error)
            return
        if message.known is not None and message.header_length:
            self._remember_whole(message.known, cell.codec, message, bytes(body[: int(message.header_length)]))
        if request.elsewhere:
            self._fetch(cell, message, body, cast(PlacedRequest, request))
        else:
            self._hand_in(cell, request)

    def _check_origin(self, message: Message, request: InferRequest) -> None:
        """No web page is to have an answer written into the memory of another program."""
        if request.wanted.places:
            self._desk.check_origin(Asker(message.asker))

    def _refuse_request(self, cell: Cell, error: WireError) -> None:
        cell.refuse(error.status, self._clock() - self._since)
        self._send_error(error)

    def _remember_whole(self, known: _Known, codec: Codec, message: Message, header: bytes) -> None:
        """Keep head and JSON header for the next request, if there is nothing else to it but tensors."""
        layout = codec.known(header)
        if layout is not None and layout.ordered:
            repeat = _Repeat(known, codec, message.target.partition(b"?")[0], header, layout)
            self._repeats = [repeat, *self._repeats[: _MAX_KNOWN - 1]]
            if repeat.exact:
                self._repeat = repeat

    async def _decode_aside(self, cell: Cell, message: Message, body: Body, length: int | None) -> None:
        """Read a large request on a thread."""
        try:
            request = await self._desk.budget.aside(cell.codec.decode, body, length)
            self._check_origin(message, request)
        except WireError as error:
            self._refuse_request(cell, error)
        except Exception as error:
            self._stumble(error)
        else:
            self._go_on(cell, message, body, request)

    def _fetch(self, cell: Cell, message: Message, body: Body, request: PlacedRequest) -> None:
        """Read what lies in shared memory, if the request is let in at all."""
        shed = cell.foresee(request)
        if shed is not None:
            self._turn_away(shed)
        elif request.large:
            self._waiting = asyncio.ensure_future(self._fetch_aside(cell, message, body, request))
        else:
            try:
                fetched = request.fetch()
            except WireError as error:
                self._refuse_request(cell, error)
                return
            self._hand_in(cell, fetched)

    async def _fetch_aside(self, cell: Cell, message: Message, body: Body, request: PlacedRequest) -> None:
        try:
            message.grant = self._desk.budget.grant(request.elsewhere)
            fetched = await self._desk.budget.aside(request.fetch)
        except WireError as error:
            self._refuse_request(cell, error)
        except Exception as error:
            self._stumble(error)
        else:
            self._go_on(cell, message, body, fetched)

    def _go_on(self, cell: Cell, message: Message, body: Body, request: InferRequest) -> None:
        """A request has been read on a thread."""
        if self._transport is None:
            return
        try:
            now = self._desk.cell_of(message.target.partition(b"?")[0])
            if now is None or now.codec is not cell.codec:
                message.body = [body]
                self._take_up(message)  # anew: a reload has retired the cell that was there before
            elif request.elsewhere:
                self._fetch(cell, message, body, cast(PlacedRequest, request))
            else:
                self._hand_in(cell, request)
        except Exception as error:
            self._stumble(error)

    def _hand_in(self, cell: Cell, request: InferRequest) -> None:
        self._cell, self._request = cell, request
        submitted = cell.submit(request, self._answered)
        if isinstance(submitted, Shed):
            self._turn_away(submitted)
        else:
            self._job = submitted

    def _turn_away(self, shed: Shed) -> None:
        self._send_error(TurnedAway(shed.why, shed.retry_after_s))

    def _answered(self, result: Sequence[memoryview] | Exception) -> int | None:
        cell, request, current = self._cell, self._request, self._current
        self._job = self._request = None
        assert cell is not None
        assert request is not None
        try:
            if isinstance(result, Exception):
                self._send_error(result)
            elif isinstance(current, _Turn) and current.answer is not None and not self._desk.draining:
                if self._transport is not None:
                    self._transport.write(b"".join((_OK, self._desk.date, current.answer, *result)))
                    self._next(close=False)
            else:
                if isinstance(current, _Turn) and current.id:
                    request.wanted = msgspec.structs.replace(request.wanted, id=current.id.decode())
                return self._reply(cell, request, result)
        except Exception as error:
            return self._give_up(error)
        return None

    def _reply(self, cell: Cell, request: InferRequest, result: Sequence[memoryview]) -> int | None:
        """Answer, or say what went wrong with that: its status, which the cell counts."""
        if cell.codec.writes_much(request.wanted, request.rows):
            self._waiting = asyncio.ensure_future(self._write_aside(cell, request, lasting(result)))
            return LATER
        try:
            length, parts = cell.codec.encode(request.wanted, request.rows, result)
        except Exception as error:  # out of here it would reach the cell, and those who share the batch
            return self._unwritten(error)
        self._send_encoded(length, parts, lasts=isinstance(result, Lasting))
        return None

    async def _write_aside(self, cell: Cell, request: InferRequest, result: Sequence[memoryview]) -> None:
        """Write a large answer on a thread."""
        status: int | None = None
        try:
            try:
                length, parts = await self._desk.budget.aside(cell.codec.encode, request.wanted, request.rows, result)
            except Exception as error:
                status = self._unwritten(error)
            else:
                self._send_encoded(length, parts, lasts=True)
        except Exception as error:
            status = self._give_up(error)
        finally:
            cell.written(request, status)

    def _unwritten(self, error: Exception) -> int:
        """Answer with an error after all: its status, which is to be counted."""
        if not isinstance(error, WireError):
            self._report(error)
        self._send_error(error)
        return _status(error)

    def _give_up(self, error: Exception) -> int:
        """Whoever asked is not to wait for ever."""
        self._report(error)
        if self._current is not None:
            self._break_off(error)
        return 500

    def _send_encoded(self, length: int | None, parts: Parts, *, lasts: bool) -> None:
        if length is not None:
            self._send_parts(length, parts, lasts=lasts)
        elif len(parts) == 1:
            self._send(200, bytes(parts[0]))
        else:
            self._send_list(parts)

    def _count(self, status: int) -> None:
        current = self._current
        if isinstance(current, Message) and self._transport is not None:
            self._desk.refused(current.target.partition(b"?")[0], status, self._clock() - self._since)

    def _fail(self, error: Exception, extra: bytes = b"") -> None:
        """Answer with an error that nobody has counted."""
        self._count(_status(error))
        self._send_error(error, extra)

    def _send_error(self, error: Exception, extra: bytes = b"") -> None:
        self._send(_status(error), _error_body(error), extra + _retry(error))

    def _send(self, status: int, body: bytes, extra: bytes = b"", kind: bytes = JSON) -> None:
        close = self._closing()
        if self._transport is not None:
            answer = self._response(status, body, extra + self._persistence(close), kind)
            if isinstance(self._current, Message) and self._current.method == b"HEAD":
                answer = _without_body(answer)
            self._transport.write(answer)
            self._next(close)

    def _send_parts(self, header_length: int, parts: Parts, *, lasts: bool = False) -> None:
        """An answer of a JSON header and raw tensors.

        Args:
            header_length: of the JSON header in bytes.
            parts: of the body.
            lasts: they stay as they are, and need not be copied now.
        """
        close = self._closing()
        if self._transport is not None:
            size = sum(map(len, parts))
            head = b"".join((_OK, self._desk.date, _BINARY % (header_length, self._persistence(close), size)))
            if lasts and size > _MAX_PIPELINED_BYTES:
                self._write_each([head, *parts])
                return
            self._transport.write(b"".join([head, *parts]))
            self._next(close)

    def _send_list(self, parts: Parts) -> None:
        """An answer in JSON that is so long that it comes in parts."""
        if self._transport is not None:
            close = self._persistence(self._closing())
            self._write_each([self._heading(200, sum(map(len, parts)), close), *parts])

    def _write_each(self, parts: Parts) -> None:
        """Write a large answer without copying it into one, a piece in each turn, for the others are to have theirs.

        Until it is sent it counts among what is held.
        """
        self._outgoing.extend(parts)
        self._sending = self._desk.budget.grant()
        self._sending.take(sum(map(len, parts)))
        self._write_on()

    def _write_on(self) -> None:
        """Write more of a large answer; at its end the next request has its turn."""
        if self._transport is None:
            return
        left = _TURN_BYTES
        while self._outgoing:
            if self._unread:
                return  # it is called again
            if left <= 0:
                asyncio.get_running_loop().call_soon(self._write_on)
                return
            part = memoryview(self._outgoing.popleft())
            if len(part) > left:
                self._outgoing.appendleft(part[left:])
            self._transport.write(part[:left])
            left -= min(left, len(part))
        if not self._unread:
            self._sending = None
        if self._current is not None:
            self._next(self._closing())

    def _response(self, status: int, body: bytes, extra: bytes = b"", kind: bytes = JSON) -> bytes:
        return self._heading(status, len(body), extra, kind) + body

    def _heading(self, status: int, size: int, extra: bytes, kind: bytes = JSON) -> bytes:
        return b"HTTP/1.1 %d %s\r\n%scontent-type: %s\r\n%scontent-length: %d\r\n\r\n" % (
            status,
            _REASONS[status].encode(),
            self._desk.date,
            kind,
            extra,
            size,
        )

    def _persistence(self, close: bool) -> bytes:
        if close:
            return _CLOSE
        return _KEEP if isinstance(self._current, Message) and self._current.old else b""

    def _closing(self) -> bool:
        return self._desk.draining or (self._current is not None and not self._current.keep_alive)

    def _next(self, close: bool) -> None:
        self._current = None
        if close:
            self._ready.clear()
            if self._dropping:
                self._last = True  # the client has its answer; over a body that is still coming it would lose it
            elif self._transport is not None:
                self._deaf = True
                self._transport.close()
        elif (self._ready or self._ended or self._broken or self._paused) and not self._advancing:
            self._advance()

    def _advance(self) -> None:
        """Begin what waits: one after another without recursion, for one read may have brought thousands."""
        self._advancing = True
        for _ in range(_MAX_PIPELINED):
            if self._current is not None or not self._ready or self._unread:
                break
            message = self._ready.popleft()
            self._pipelined -= sum(map(len, message.body))
            self._begin(message)
        few = len(self._ready) < _MAX_PIPELINED and self._pipelined < _MAX_PIPELINED_BYTES
        if self._paused and few and self._transport is not None and (self._current is None or not self._reading):
            self._paused = False
            self._since = self._clock()
            if self._left:
                asyncio.get_running_loop().call_soon(self._parse_left)
            self._resume()
        if self._current is None and self._ready and not self._unread:
            asyncio.get_running_loop().call_soon(self._advance)  # the others have their turn
            return
        self._advancing = False
        if self._current is None and not self._ready and self._transport is not None:
            if self._broken is not None:
                self._say_farewell(*self._broken)
            elif self._ended:
                self._transport.close()


def _retry(error: Exception) -> bytes:
    """When to ask again, for who is turned away."""
    if _status(error) != 429:
        return b""
    after_s = error.retry_after_s if isinstance(error, TurnedAway) else 0.0
    return b"retry-after: %d\r\n" % max(1, math.ceil(after_s))


def _without_body(answer: bytes) -> bytes:
    """To HEAD: the client expects no body, and would take it for the next answer."""
    head, end, _ = answer.partition(b"\r\n\r\n")
    return head + end


def _header_length(value: bytes | None) -> int | None:
    if value is None:
        return None
    if not (value.isdigit() and len(value) <= 12):
        raise WireError(
            f"Inference-Header-Content-Length is {value[:40].decode('latin-1')!r}",
            "it is the length of the JSON header in bytes",
            "send a whole number",
        )
    return int(value)


def _no_transfer(codings: bytes) -> WireError:
    """Why a body in this transfer coding is not read (RFC 9112, 6.1 and 6.3)."""
    names = [name.strip() for name in codings.lower().split(b",")]
    if names[-1] in (b"identity", b"gzip", b"x-gzip", b"deflate", b"compress", b"x-compress"):
        return WireError("the transfer encoding does not end with 'chunked'", "the body has no end", "send a length")
    if names.count(b"chunked") > 1:
        return WireError("the transfer encoding is 'chunked' twice", "chunks are not in chunks", "send it once")
    why = "this server reads 'chunked' alone"
    return WireError("the transfer encoding is another", why, "use Content-Encoding", status=501)


def _in_kernel(transport: asyncio.Transport) -> int:
    """Bytes that were sent, and that the client's machine has not confirmed."""
    sock: Any = transport.get_extra_info("socket")
    try:
        return int(struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))[0])
    except (AttributeError, OSError):
        return 0


def _status(error: Exception) -> int:
    return error.status if isinstance(error, WireError) else 500


def _error_body(error: Exception) -> bytes:
    text = str(error) if isinstance(error, RushhourError) else f"internal error: {type(error).__name__}"
    return msgspec.json.encode({"error": text})
