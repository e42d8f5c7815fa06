"""`Message`: one request as it is read, and heads that are recognised by their bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rushhour.serve.memory.budget import Grant
from rushhour.wire import Body

IDENTIFYING_FIELDS = re.compile(
    rb"\r\n(?:(?:[a-z0-9-]+-)?(?:request|correlation|trace|span|parentspan|transaction|message|operation)-?id"
    rb"|traceparent|tracestate|baggage|b3|sentry-trace|uber-trace-id|x-cloud-trace-context|cf-ray|x-amz-cf-id"
    rb"|forwarded|x-forwarded-for|x-real-ip|date):([\x20-\x7e\t]*)(?=\r\n)",
    re.IGNORECASE,
)
"""Fields that identify a request and do not change its answer."""
_VALUE = re.compile(rb"[\x20-\x7e\t]{0,512}")


class Message:
    """One request, as far as it has been read.

    Attributes:
        client: the header fields that say where it comes from.
        old: it is HTTP/1.0, whose connections close unless both sides send keep-alive.
    """

    __slots__ = (
        "accept",
        "authorization",
        "body",
        "client",
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
        self.client: dict[bytes, bytes] = {}
        self.host: bytes | None = None
        self.keep_alive = True
        self.old = False
        self.known: KnownHead | None = None


class KnownHead:
    """A request head that was parsed before: the same bytes need not be parsed again.

    Most heads on a connection are equal, except for the fields that identify a request. Only heads with a
    Content-Length are kept; everything else goes through the parser.
    """

    __slots__ = ("_parsed", "body_bytes", "fixed", "head")

    def __init__(self, head: bytes, body_bytes: int, message: Message) -> None:
        self.head = head
        self.body_bytes = body_bytes
        self.fixed = between(head, (match.span(1) for match in IDENTIFYING_FIELDS.finditer(head)))
        self._parsed = (
            message.target,
            message.method,
            message.header_length,
            message.encoding,
            message.authorization,
            message.is_picture,
            message.client,
        )

    def end(self, data: bytes) -> int:
        """Where this head ends, if `data` begins with it; else -1."""
        if data.startswith(self.head):
            return len(self.head)
        at = match_fixed(self.fixed[:-1], data) if len(self.fixed) > 1 else -1
        return at + len(self.fixed[-1]) if at >= 0 and data.startswith(self.fixed[-1], at) else -1

    def again(self, data: bytes | memoryview, end: int) -> Message:
        """The request that `data` begins with, in which the head ends at `end`."""
        message = Message()
        (
            message.target,
            message.method,
            message.header_length,
            message.encoding,
            message.authorization,
            message.is_picture,
            message.client,
        ) = self._parsed
        message.body.append(data[end:])
        message.known = self
        return message


def between(data: bytes, places: Iterable[tuple[int, int]]) -> list[bytes]:
    """The bytes before, between and after some places."""
    found, at = [], 0
    for start, stop in places:
        found.append(data[at:start])
        at = stop
    return [*found, data[at:]]


def match_fixed(fixed: Sequence[bytes], data: bytes) -> int:
    """Where `data` goes on after these parts, each followed by a variable value; -1 if it does not begin with them."""
    at = 0
    for part in fixed:
        if not data.startswith(part, at):
            return -1
        match = _VALUE.match(data, at + len(part))
        assert match is not None  # the pattern matches nothing, too
        at = match.end()
    return at
