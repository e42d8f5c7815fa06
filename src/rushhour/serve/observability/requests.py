"""Follows single requests from arrival to answer: a record in the log, spans for OpenTelemetry.

Used only where one of them is switched on; otherwise no request passes through this code.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rushhour.clock import Clock
from rushhour.serve.observability import log
from rushhour.serve.observability.statistics import Batch
from rushhour.wire import InferRequest

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from rushhour.serve.observability.tracing import Spans

CANCELLED = 499
"""The status of a request whose client disconnected before the answer, as in nginx."""
_MAX_ID = 128


class Observer:
    """Follows requests.

    Args:
        clock: of the cells.
        records: whether each request is logged.
        spans: makes spans; None makes none.
    """

    def __init__(self, clock: Clock, *, records: bool, spans: Spans | None = None) -> None:
        self.clock = clock
        self.records = records
        self.spans = spans

    def begin(self, protocol: str, method: str, path: str, fields: Mapping[str, str]) -> FollowedRequest:
        """Follow a request that has arrived.

        Args:
            protocol: `http` or `grpc`.
            method: of HTTP, or of the service.
            path: of HTTP; empty for gRPC.
            fields: of its header, or its metadata, by name in lower case.
        """
        return FollowedRequest(self, protocol, method, path, fields)


class FollowedRequest:
    """One request, and what is known of it so far."""

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
        """When it was queued, and its last batch taken, started and ended, in seconds of the observer's clock."""
        self._observer = observer
        self._fields = fields
        self._began = observer.clock.now()
        self._began_ns = time.time_ns()
        self._arrived = self._began
        self._span: Span | None = None
        self._ended = False

    def begin(self, model: str, version: str) -> None:
        """It is an inference request, for this version of this model."""
        self.version = version
        spans = self._observer.spans
        if spans is not None:
            self._span = spans.begin(f"infer {model}", self._fields, self._began_ns)

    def queued(self, request: InferRequest) -> None:
        """It enters the queue."""
        self.id = request.wanted.id[:_MAX_ID] or self.id
        self.rows = request.rows
        self._arrived = self._observer.clock.now()

    def computed(self, batch: Batch | None) -> None:
        """Its last batch was computed; None where it never reached one."""
        if batch is not None:
            self.batch = batch.rows
            self.times = (self._arrived, batch.taken, batch.started, max(batch.started, batch.ended))

    def end(self, status: int) -> None:
        """It was answered, or never will be. Further calls have no effect.

        Args:
            status: of HTTP, also for gRPC.
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
        """Under the names of OpenTelemetry's semantic conventions where they exist."""
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


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)
