"""Single requests, followed from arrival to answer: a record in the log, spans for OpenTelemetry.

Made only where one of them is switched on; a server that does neither has no trace of this on the way of a request.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from rushhour.clock import Clock
from rushhour.errors import WireError
from rushhour.serve.observability import log
from rushhour.serve.protocols.http import Desk, HttpConnection, Message
from rushhour.serve.scheduling.cell import Cell, Job, Reply, Shed, TurnedAway
from rushhour.wire import Body, InferRequest, Parts

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from rushhour.serve.observability.tracing import Spans

CANCELLED = 499
"""The status of a request whose client did not wait for one; nginx has made it usual."""

_KEPT = frozenset(("x-request-id", "traceparent", "tracestate"))
_MAX_ID = 128


class Observer:
    """Follows requests.

    Args:
        clock: of the cells.
        records: whether each request gets a record in the log.
        spans: where spans are made; None makes none.
    """

    def __init__(self, clock: Clock, *, records: bool, spans: Spans | None = None) -> None:
        self.clock = clock
        self.records = records
        self.spans = spans

    def begin(self, protocol: str, method: str, path: str, fields: Mapping[str, str]) -> Followed:
        """A request has come.

        Args:
            protocol: `http` or `grpc`.
            method: of HTTP, or of the service.
            path: of HTTP; empty for gRPC.
            fields: of its header, or its metadata, by names in lower case.
        """
        return Followed(self, protocol, method, path, fields)


class Followed:
    """One request. What is known of it grows on its way."""

    __slots__ = (
        *("_arrived", "_began", "_began_ns", "_ended", "_fields", "_observer"),
        *("_span", "batch", "id", "method", "path", "protocol", "rows", "shed", "times", "version"),
    )

    def __init__(self, observer: Observer, protocol: str, method: str, path: str, fields: Mapping[str, str]) -> None:
        self.protocol = protocol
        self.method = method
        self.path = path
        self.id = fields.get("x-request-id", "")[:_MAX_ID]
        self.rows = 0
        self.batch = 0
        self.shed = ""
        self.version = ""
        self.times: tuple[float, float, float, float] | None = None
        """When it was queued, and its last batch taken, begun and ended, in seconds of the observer's clock."""
        self._observer = observer
        self._fields = fields
        self._began = observer.clock.now()
        self._began_ns = time.time_ns()
        self._arrived = self._began
        self._span: Span | None = None
        self._ended = False

    def into(self, cell: Cell) -> Cell:
        """The cell for this one request, which is followed through it."""
        self.version = cell.codec.version
        spans = self._observer.spans
        if spans is not None:
            self._span = spans.begin(f"infer {cell.codec.model}", self._fields, self._began_ns)
        return cast(Cell, _Through(cell, self))

    def queued(self, request: InferRequest) -> None:
        """It is put to its cell."""
        self.id = request.wanted.id[:_MAX_ID] or self.id
        self.rows = request.rows
        self._arrived = self._observer.clock.now()

    def answered(self, cell: Cell) -> None:
        """The cell has its answer."""
        batch = cell.answering
        if batch is not None:
            self.batch = batch.rows
            self.times = (self._arrived, batch.taken, batch.started, max(batch.started, batch.ended))

    def end(self, status: int) -> None:
        """It is answered, or will never be. May be called again.

        Args:
            status: of HTTP, for gRPC too.
        """
        if self._ended:
            return
        self._ended = True
        now = self._observer.clock.now()
        self.id = self.id or secrets.token_hex(8)
        if self._span is not None and self._observer.spans is not None:
            self._observer.spans.end(self._span, self._attributes(status), self.times, now, status)
        if self._observer.records:
            log.event(logging.INFO, "request", **self._record(status, now))

    def _record(self, status: int, now: float) -> dict[str, Any]:
        record: dict[str, Any] = {
            "id": self.id,
            "protocol": self.protocol,
            "method": self.method,
            "path": self.path,
            "status": status,
            "latency_ms": _ms(now - self._began),
        }
        if self.rows:
            record |= {"version": self.version, "samples": self.rows}
        if self.times is not None:
            arrived, taken, started, ended = self.times
            record |= {"batch": self.batch, "queue_ms": _ms(taken - arrived), "inference_ms": _ms(ended - started)}
        if self.shed:
            record["shed"] = self.shed
        return record

    def _attributes(self, status: int) -> dict[str, str | int]:
        """In OpenTelemetry's words where it has them."""
        attributes: dict[str, str | int] = {
            "rushhour.request_id": self.id,
            "rushhour.samples": self.rows,
            "rushhour.batch_size": self.batch,
            "rushhour.model_version": self.version,
        }
        if self.protocol == "http":
            attributes |= {
                "http.request.method": self.method,
                "url.path": self.path,
                "http.response.status_code": status,
            }
        else:
            attributes |= {"rpc.system": "grpc", "rpc.method": self.method}
        if self.shed:
            attributes["rushhour.shed"] = self.shed
        return attributes


class _Through:
    """A cell, as one request sees it."""

    def __init__(self, cell: Cell, followed: Followed) -> None:
        self._cell = cell
        self._followed = followed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cell, name)

    def submit(self, request: InferRequest, reply: Reply) -> Job | Shed:
        self._followed.queued(request)

        def answered(result: Sequence[memoryview] | Exception) -> int | None:
            if isinstance(result, TurnedAway):
                self._followed.shed = "deadline"
            else:
                self._followed.answered(self._cell)
            return reply(result)

        submitted = self._cell.submit(request, answered)
        if isinstance(submitted, Shed):
            self._followed.shed = submitted.reason
        return submitted


class _KeptMessage(Message):
    """A request with the fields that say where it comes from."""

    __slots__ = ("fields",)

    def __init__(self) -> None:
        super().__init__()
        self.fields: dict[str, str] = {}


class ObservedConnection(HttpConnection):
    """A connection whose requests are followed. Heads are parsed each time: what is kept of them differs.

    Args:
        desk: the server.
        observer: who follows.
    """

    def __init__(self, desk: Desk, observer: Observer) -> None:
        super().__init__(desk)
        self._observer = observer
        self._followed: Followed | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        self._end(CANCELLED)
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """A new request begins."""
        super().on_message_begin()
        self._message = _KeptMessage()

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header field."""
        super().on_header(name, value)
        lowered = name.lower().decode("latin-1")
        if lowered in _KEPT and not self._in_body:
            cast(_KeptMessage, self._message).fields[lowered] = value.decode("latin-1")

    def _remember(self, message: Message) -> None:
        pass

    def _follow(self, message: Message) -> None:
        path = message.target.partition(b"?")[0].decode("latin-1")
        fields = cast(_KeptMessage, message).fields
        self._followed = self._observer.begin("http", message.method.decode("latin-1"), path, fields)

    def _begin(self, message: Message) -> None:
        self._follow(message)
        super()._begin(message)

    def _drop_rest(self) -> None:
        self._follow(self._message)  # it is answered before it is whole
        super()._drop_rest()

    def _turn_away(self, shed: Shed) -> None:
        if self._followed is not None:
            self._followed.shed = shed.reason
        super()._turn_away(shed)

    def _submit(self, cell: Cell, message: Message, body: Body) -> None:
        super()._submit(cell if self._followed is None else self._followed.into(cell), message, body)

    def _send(self, status: int, body: bytes, *more: Any, **named: Any) -> None:
        self._end(status)
        super()._send(status, body, *more, **named)

    def _send_parts(self, header_length: int, parts: Parts, *, lasts: bool = False) -> None:
        self._end(200)
        super()._send_parts(header_length, parts, lasts=lasts)

    def _send_list(self, parts: Parts) -> None:
        self._end(200)
        super()._send_list(parts)

    def _say_farewell(self, error: WireError, path: bytes) -> None:
        if not self._dropping:  # it never came so far as to be a request
            self._observer.begin("http", "", path.decode("latin-1"), {}).end(error.status)
        super()._say_farewell(error, path)

    def _end(self, status: int) -> None:
        followed, self._followed = self._followed, None
        if followed is not None:
            followed.end(status)


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)
