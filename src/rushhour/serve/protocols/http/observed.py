"""A connection whose requests are followed for the log and for tracing."""

from __future__ import annotations

from typing import Any, cast

from rushhour.errors import WireError
from rushhour.serve.observability.requests import CANCELLED, FollowedRequest, Observer
from rushhour.serve.protocols.http.connection import HttpConnection
from rushhour.serve.protocols.http.endpoint import HttpEndpoint
from rushhour.serve.protocols.http.message import Message
from rushhour.serve.scheduling.followed import followed_cell
from rushhour.serve.scheduling.job import Shed
from rushhour.serve.scheduling.stage import Stage
from rushhour.wire import Body, Parts

_TRACE_FIELDS = frozenset(("x-request-id", "traceparent", "tracestate"))


class _ObservedMessage(Message):
    """A request with its id and its trace context."""

    __slots__ = ("fields",)

    def __init__(self) -> None:
        super().__init__()
        self.fields: dict[str, str] = {}


class ObservedConnection(HttpConnection):
    """A connection whose requests are followed. Each head is parsed: the fields that are kept differ.

    Args:
        endpoint: that the connection belongs to.
        observer: follows its requests.
    """

    def __init__(self, endpoint: HttpEndpoint, observer: Observer) -> None:
        super().__init__(endpoint)
        self._observer = observer
        self._followed: FollowedRequest | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has disconnected."""
        self._end(CANCELLED)
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """A new request begins."""
        super().on_message_begin()
        self._message = _ObservedMessage()

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header field."""
        super().on_header(name, value)
        lowered = name.lower().decode("latin-1")
        if lowered in _TRACE_FIELDS and not self._in_body:
            cast(_ObservedMessage, self._message).fields[lowered] = value.decode("latin-1")

    def _remember(self, message: Message) -> None:
        pass

    def _follow(self, message: Message) -> None:
        path = message.target.partition(b"?")[0].decode("latin-1")
        fields = cast(_ObservedMessage, message).fields
        self._followed = self._observer.begin("http", message.method.decode("latin-1"), path, fields)

    def _begin(self, message: Message) -> None:
        self._follow(message)
        super()._begin(message)

    def _drop_rest(self) -> None:
        self._follow(self._message)  # it is answered before it is complete
        super()._drop_rest()

    def _send_shed(self, shed: Shed) -> None:
        if self._followed is not None:
            self._followed.shed = shed.reason
        super()._send_shed(shed)

    def _submit(self, cell: Stage, message: Message, body: Body) -> None:
        super()._submit(cell if self._followed is None else followed_cell(cell, self._followed), message, body)

    def _send(self, status: int, body: bytes, *more: Any, **named: Any) -> None:
        self._end(status)
        super()._send(status, body, *more, **named)

    def _send_parts(self, header_length: int, parts: Parts, extra: bytes, *, lasts: bool = False) -> None:
        self._end(200)
        super()._send_parts(header_length, parts, extra, lasts=lasts)

    def _send_list(self, parts: Parts, extra: bytes) -> None:
        self._end(200)
        super()._send_list(parts, extra)

    def _send_final(self, error: WireError, path: bytes) -> None:
        if not self._dropping:  # the request never became complete
            self._observer.begin("http", "", path.decode("latin-1"), {}).end(error.status)
        super()._send_final(error, path)

    def _end(self, status: int) -> None:
        followed, self._followed = self._followed, None
        if followed is not None:
            followed.end(status)
