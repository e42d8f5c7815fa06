"""Spans of requests for OpenTelemetry: the request, its time in the queue, its batch on the engine.

Imported only where tracing is switched on. OpenTelemetry's own environment variables say where spans are sent and how
they are buffered (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME, OTEL_BSP_...).

Source: w3.org/TR/trace-context; opentelemetry.io/docs/specs/semconv.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

from rushhour.clock import Clock
from rushhour.errors import ServeError
from rushhour.system.machine import describe

try:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError as error:
    raise ServeError(
        "cannot trace requests", f"OpenTelemetry is not installed ({error})", "pip install 'rushhour[otel]'"
    ) from error


def provider(sample: float) -> TracerProvider:
    """Makes and samples spans, without an exporter.

    Args:
        sample: the fraction of requests that is traced where the caller has not decided.
    """
    usual = {"service.name": "rushhour", "service.version": describe().versions.get("rushhour", "")}
    # The user's environment variables take precedence.
    named = Resource(usual).merge(OTELResourceDetector().detect())
    resource = Resource.create(named.attributes)
    # Its own hook at the end of the program would wait for the collector again, without a limit.
    sampler = ParentBased(TraceIdRatioBased(sample))
    return TracerProvider(sampler=sampler, resource=resource, shutdown_on_exit=False)


def exporting_provider(sample: float) -> TracerProvider:
    """The same, with the exporter that OpenTelemetry's environment variables name; `shut_down` sends the last spans."""
    exporting = provider(sample)
    exporting.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return exporting


def shut_down(provider: TracerProvider, within_s: float) -> bool:
    """Send the buffered spans, but take no longer than this; returns whether the exporter has finished.

    Args:
        provider: from `exporting_provider`. Its own shutdown waits for the collector, up to half a minute.
        within_s: in seconds.
    """
    sending = threading.Thread(target=provider.shutdown, name="spans", daemon=True)
    sending.start()
    sending.join(within_s)
    return not sending.is_alive()


class Spans:
    """Makes the spans of requests.

    Args:
        provider: of spans.
        clock: of the cells.
    """

    def __init__(self, provider: TracerProvider, clock: Clock) -> None:
        self._tracer = provider.get_tracer("rushhour")
        self._clock = clock
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, name: str, fields: Mapping[str, str], began_ns: int) -> Span:
        """The span of a request, a child of its caller's span if `fields` name one.

        Args:
            name: of the span.
            fields: of the request, with `traceparent` if its caller traces.
            began_ns: when it arrived, in nanoseconds since 1970.
        """
        context = self._propagator.extract(fields)
        return self._tracer.start_span(name, context, kind=SpanKind.SERVER, start_time=began_ns)

    def end(
        self,
        span: Span,
        attributes: Mapping[str, str | int],
        times: tuple[float, float, float, float] | None,
        now: float,
        status: int,
    ) -> None:
        """End it, with a child for the queue and one for the engine.

        Args:
            span: of the request.
            attributes: of the request.
            times: when it was queued, and its batch taken, started and ended; None where it was not computed.
            now: the time; all of them on the clock of the cells.
            status: of HTTP.
        """
        if not span.is_recording():
            return
        zero = time.time_ns() - round(1e9 * now)
        if times is not None:
            below = set_span_in_context(span)
            arrived, taken, started, ended = (zero + round(1e9 * time_s) for time_s in times)
            for name, begin, end in (("queue", arrived, taken), ("infer", started, ended)):
                self._tracer.start_span(name, below, start_time=begin).end(end)
        span.set_attributes(dict(attributes))
        if status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end(zero + round(1e9 * now))
