"""`MessageReader`: bytes become requests, within the limits on heads and bodies.

The parser is llhttp, through httptools. docs/http.md lists what is done with each part of the standards.
"""

from __future__ import annotations

import asyncio
import re

import httptools

from rushhour.errors import WireError
from rushhour.serve.access.origin import ORIGIN_FIELDS
from rushhour.serve.protocols.http.answers import CLOSE, KEEP_ALIVE
from rushhour.serve.protocols.http.endpoint import HttpEndpoint
from rushhour.serve.protocols.http.handler import HELD_BYTES, MAX_KNOWN, RequestHandler
from rushhour.serve.protocols.http.message import KnownHead, Message
from rushhour.serve.protocols.http.pipeline import MAX_PIPELINED, MAX_PIPELINED_BYTES

_TWICE = "a header field was sent twice"
_LONG_LINE = 1024
"""Longer lines of a head are buffered until they are complete: the parser copies an incomplete one at each read."""
_BODY_TAIL = 64
"""Bytes at the end of a body that are searched for to find its end in what was read."""
_BETWEEN_FIELDS = 256
"""Bytes of a head that are not counted elsewhere: colons, line ends and spaces."""
_BETWEEN_CHUNKS = 64 * 1024
"""Overhead between two bytes of a chunked body, at most, in addition to the limit of a header."""
_SLICE, _MOST_EVENTS = 16 * 1024, 512
"""Bytes parsed in one go; and requests and parts of bodies, after which other connections have their turn."""
MAX_KNOWN_BYTES = 4096
_ABSOLUTE = re.compile(rb"https?://([^/?#]*)(.*)", re.IGNORECASE | re.DOTALL)
_HOST = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+;=%-]*|\[[0-9A-Fa-fvV:.%]+\])(?::[0-9]*)?")
"""RFC 3986, 3.2.2; without the comma, which would accept a list of hosts."""
_REQUEST_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+ [!-~]+ HTTP/1\.[01]\r\n")
_UNRESERVED = re.compile(rb"%(2[DE]|3[0-9]|[46][1-9A-F]|5[0-9AF]|7[0-9AE])", re.IGNORECASE)
"""RFC 3986, 2.3 and 6.2.2.2: with these characters decoded or not, a target is the same."""


class MessageReader(RequestHandler):
    """Reads the requests of one connection.

    Args:
        endpoint: that the connection belongs to.
    """

    def __init__(self, endpoint: HttpEndpoint) -> None:
        super().__init__(endpoint)
        self._parser = httptools.HttpRequestParser(self)
        self._message = Message()
        self._known: list[KnownHead] = []
        self._header_bytes = 0
        self._body_bytes = 0
        self._in_body = False
        self._chunked = False
        self._expected = False
        self._head_checked = False
        self._denied = False
        self._framing = b""
        self._upgrade: Message | None = None
        self._line_bytes = 0
        self._line: list[bytes] = []
        self._in_target = False
        self._overhead = 0
        self._events = 0
        self._chunk = self._head = self._body_part = b""
        self._refused: WireError | None = None

    def _refuse(self, error: WireError) -> None:
        """Answer what cannot be read, after all requests before it, and close the connection."""
        raise NotImplementedError

    def _check_early(self, message: Message) -> None:
        """Answer a request whose body needs further reads, if it will be refused in any case."""
        raise NotImplementedError

    def _dropped(self) -> None:
        """A body that was dropped has ended."""
        raise NotImplementedError

    def _parse(self, data: bytes) -> None:
        """Parse what was read, up to a bound after which other connections have their turn."""
        self._chunk = b"" if self._reading else data
        if self._reading and not self._in_body:
            whole = self._lines(data)
            if whole is None:
                return
            data = whole
        self._events, fed = 0, len(data)
        try:
            for at in range(0, len(data), _SLICE):
                self._feed(data if len(data) <= _SLICE else data[at : at + _SLICE])
                if self._events > _MOST_EVENTS and at + _SLICE < len(data):
                    fed = at + _SLICE
                    self._unparsed = data[fed:]
                    break
        except httptools.HttpParserError as error:
            self._refuse(self._refused or self._unreadable(data, error))
            if self._refused is not None:
                # The parser keeps the error, whose frames keep what was read: free that without a garbage collection.
                self._refused.__traceback__ = None
                self._refused = None
        else:
            if self._in_body:
                if not (self._head_checked or self._unparsed):
                    self._head_checked = True
                    self._head = self._head_of_chunk()
                    self._message.method = self._parser.get_method()
                    self._message.keep_alive = self._parser.should_keep_alive()
                    self._check_early(self._message)
                elif self._chunked and self._overhead > self._limits.header_bytes + _BETWEEN_CHUNKS:
                    self._refuse(self._too_long())
                self._read_more(self._body_bytes, fed)
            elif self._reading:
                begins = self._line_begins(data, fed)
                if begins or not self._line_bytes:
                    self._line_bytes = fed - begins
                    self._in_target = data.startswith(self._parser.get_method() + b" ", begins)
                self._check_line()
        if self._completed > MAX_PIPELINED and self._current is None and not self._advancing:
            self._advancing = True
            asyncio.get_running_loop().call_soon(self._advance)
        self._completed, self._chunk, self._body_part = 0, b"", b""
        if self._unparsed and self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._parse_rest)

    def _parse_rest(self) -> None:
        """Parse what was read before; then read on."""
        if self._transport is None or self._transport.is_closing() or self._paused:
            return  # if paused, `_advance` calls it again
        left, self._unparsed = self._unparsed, b""
        if left and not self._discarding:
            self._parse(left)
        self._resume()

    def _feed(self, data: bytes | memoryview) -> None:
        self._overhead += len(data)
        while True:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                data = memoryview(data)[offer.args[0] :]
                if self._upgrade is not None:
                    self._decline(self._upgrade)
            else:
                return

    def _decline(self, message: Message) -> None:
        """Ignore the offer of another protocol and continue in HTTP/1.1 (RFC 9110, 7.8).

        httptools leaves the body of such a request to the other protocol. Here a new parser reads the body after a
        head of the same framing without the offer.
        """
        method, version = self._parser.get_method(), self._parser.get_http_version().encode()
        expected, counted = self._expected, self._header_bytes
        self._upgrade, self._header_bytes, self._in_body = None, 0, False
        self._parser = httptools.HttpRequestParser(self)
        head = b"%s / HTTP/%s\r\nhost: x\r\n%s%s\r\n"
        self._parser.feed_data(head % (method, version, KEEP_ALIVE if message.keep_alive else CLOSE, self._framing))
        self._message, self._expected, self._header_bytes = message, expected, counted

    def _lines(self, data: bytes) -> bytes | None:
        """More of a head, with what was buffered of it before; None while a long line is not complete."""
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
        """Where the last, incomplete line of what was fed begins: after a line end, or after a body."""
        begins = data.rfind(b"\n", 0, fed) + 1
        behind = self._body_part[-_BODY_TAIL:]
        at = data.rfind(behind, max(begins - len(behind), 0), fed) if behind else -1
        return max(begins, at + len(behind))

    def _check_line(self) -> bool:
        """Whether a head is within its limit, together with its incomplete line."""
        within = self._header_bytes + self._line_bytes <= self._limits.header_bytes + _BETWEEN_FIELDS
        if not within:
            self._refuse(self._too_long())
        return within

    def _unreadable(self, data: bytes, error: httptools.HttpParserError) -> WireError:
        unknown = isinstance(error, httptools.HttpParserInvalidMethodError) and not self._completed
        if unknown and _REQUEST_LINE.match(data):
            shown = data.partition(b" ")[0][:40].decode()
            return WireError(f"the method is {shown}", "this server does not support it", "see GET /v2", status=501)
        if str(error) == "Invalid HTTP version":
            why = "this server supports 1.1 and 1.0"
            return WireError("the version of HTTP is unknown", why, "use one of them", status=505)
        if str(error) == "Pause on PRI/Upgrade":
            why = "this port speaks HTTP/1.1 and 1.0; gRPC has its own"
            return WireError("the connection begins in HTTP/2", why, "use the other version, or the other port")
        return WireError("the request is not valid HTTP/1.1", str(error))

    # Called by the parser.

    def on_message_begin(self) -> None:
        """A new request begins."""
        self._events += 1
        self._message = Message()
        self._reading = True
        self._chunked = self._expected = self._head_checked = self._dropping = self._denied = False
        self._framing, self._overhead, self._line_bytes, self._in_target = b"", 0, 0, False
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
            return  # trailer fields are ignored (RFC 9110, 6.5.1)
        lowered, message, value = name.lower(), self._message, value.rstrip(b" \t")
        if lowered in ORIGIN_FIELDS:
            before = message.client.get(lowered)
            message.client[lowered] = value if before is None else before + b", " + value
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
        """Refuse a field that was sent twice: a proxy might use the other value."""
        if before is not None:
            raise self._stop(WireError(_TWICE, name[:40].decode("latin-1"), "send it once"))

    def on_headers_complete(self) -> None:
        """The header is complete; a body may follow."""
        self._in_body = True
        self._line_bytes = 0
        message, version = self._message, self._parser.get_http_version()
        if self._parser.should_upgrade() and self._parser.get_method() == b"CONNECT":
            why = "this server is not a proxy"
            raise self._stop(WireError("the method is CONNECT", why, "see GET /v2", status=501))
        if version != "1.1":
            self._check_old(message, version)
        elif message.host is None:
            raise self._stop(WireError("the request names no host", "the field Host is missing", "send it"))
        if message.host is not None and not _HOST.fullmatch(message.host):
            raise self._stop(WireError(f"the host is {message.host[:100]!r}", "it is not valid", "send host:port"))
        if message.target[:1] != b"/":
            self._check_target(message)
        if b"%" in message.target:
            message.target = _UNRESERVED.sub(_decoded, message.target)

    def _check_old(self, message: Message, version: str) -> None:
        if version != "1.0":
            what = f"the version of HTTP is {version}"
            raise self._stop(WireError(what, "this server supports 1.1 and 1.0", "use one of them", status=505))
        if self._chunked:  # a proxy may not support chunks (RFC 9112, 6.1)
            why = "HTTP/1.0 does not have chunks"
            raise self._stop(WireError("the body is sent in chunks", why, "send Content-Length"))
        message.old = True
        self._expected = False

    def _check_target(self, message: Message) -> None:
        """The forms of a target that are not a path (RFC 9112, 3.2)."""
        absolute = _ABSOLUTE.fullmatch(message.target)
        if absolute is not None and absolute[1] and _HOST.fullmatch(absolute[1]):
            rest = absolute[2]
            message.host, message.target = absolute[1], rest if rest[:1] == b"/" else b"/" + rest
            message.client[b"host"] = absolute[1]
        elif message.target != b"*" or self._parser.get_method() != b"OPTIONS":
            shown = message.target[:100].decode("latin-1")
            raise self._stop(WireError(f"the target is {shown!r}", "it is not a path", "send one that begins with /"))

    def on_chunk_header(self) -> None:
        """A chunk begins, or the trailer."""
        self._overhead = 0

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._events += 1
        self._body_bytes += len(body)
        self._overhead = 0
        self._body_part = body
        if self._body_bytes > self._limits.body_bytes:
            raise self._stop(self._too_large())
        if self._dropping or self._denied:
            return
        if self._body_bytes > HELD_BYTES:
            self._hold(body)
        else:
            self._message.body.append(body)

    def _hold(self, body: bytes) -> None:
        """A part of a large body: appended to one buffer, because many small parts cost more memory."""
        message = self._message
        try:
            if message.grant is None:
                message.grant = self._endpoint.budget.grant(self._body_bytes)
                message.body = [bytearray(b"".join(message.body))]
            else:
                message.grant.grow(len(body))
        except WireError as error:
            raise self._stop(error) from None
        held = message.body[0]
        assert isinstance(held, bytearray)
        held += body
        if self._body_bytes > MAX_PIPELINED_BYTES and (self._current is not None or self._ready):
            self._pause()

    def on_message_complete(self) -> None:
        """The request is complete."""
        message = self._message
        message.keep_alive = self._parser.should_keep_alive()
        if self._framing and self._parser.should_upgrade():
            self._upgrade = message  # its body is read by `_decline`
            return
        message.method = self._parser.get_method()
        self._remember(message)
        self._header_bytes = self._body_bytes = 0
        self._reading = self._in_body = False
        if self._dropping or self._discarding:
            self._dropped()
            return
        self._completed += 1
        if message.grant is not None:
            self._message = Message()  # so that the grant ends with the request, not when the next one begins
        self._complete(message)

    def _remember(self, message: Message) -> None:
        """Keep the head to recognise the next request, if it is known where the head ends."""
        head = self._head if self._head_checked else self._head_of_chunk()
        if not (0 < len(head) <= MAX_KNOWN_BYTES and message.body and message.keep_alive):
            return
        if not (self._chunked or self._expected or message.old):
            message.known = KnownHead(head, self._body_bytes, message)
            self._known = [message.known, *(known for known in self._known if known.head != head)][:MAX_KNOWN]

    def _head_of_chunk(self) -> bytes:
        """The head of the current request, if the last read began with it and holds nothing else."""
        end = len(self._chunk) - self._body_bytes
        return self._chunk[:end] if end > 0 and self._chunk.find(b"\r\n\r\n") + 4 == end else b""

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
        """Keep the error: httptools wraps what its callbacks raise."""
        self._refused = error
        return error


def _decoded(encoded: re.Match[bytes]) -> bytes:
    return bytes.fromhex(encoded[1].decode())


def _no_transfer(codings: bytes) -> WireError:
    """The error for a transfer coding that is not supported (RFC 9112, 6.1 and 6.3)."""
    names = [name.strip() for name in codings.lower().split(b",")]
    if names[-1] in (b"identity", b"gzip", b"x-gzip", b"deflate", b"compress", b"x-compress"):
        return WireError("the transfer encoding does not end with 'chunked'", "the body has no end", "send a length")
    if names.count(b"chunked") > 1:
        return WireError("the transfer encoding is 'chunked' twice", "", "send it once")
    why = "this server supports 'chunked' only"
    return WireError("the transfer encoding is not supported", why, "use Content-Encoding", status=501)
