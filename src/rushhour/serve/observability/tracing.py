"""Spans of requests for OpenTelemetry: the request, its time in the queue, its batch on the engine.

Imported only where tracing is switched on. Where spans go and how they are kept on the way is for OpenTelemetry's own
environment variables to say (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME, OTEL_BSP_...).

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
    """Where spans are made and sampled, with no way out yet.

    Args:
        sample: the share of requests that is traced where their caller has not decided.
    """
    usual = {"service.name": "rushhour", "service.version": describe().versions.get("rushhour", "")}
    # The user's environment variables go before these.
    named = Resource(usual).merge(OTELResourceDetector().detect())
    resource = Resource.create(named.attributes)
    # At the end of the program it would wait for the collector once more, for as long as it likes.
    sampler = ParentBased(TraceIdRatioBased(sample))
    return TracerProvider(sampler=sampler, resource=resource, shutdown_on_exit=False)


def exported(sample: float) -> TracerProvider:
    """The same, with the way out that OpenTelemetry's environment variables name; `end` sends what waits."""
    made = provider(sample)
    made.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return made


def end(made: TracerProvider, within_s: float) -> bool:
    """Send the spans that wait, for no longer than this; whether they were sent or given up by then.

    Args:
        made: by `exported`. Its own shutdown takes as long as the collector likes, up to half a minute.
        within_s: in seconds.
    """
    sending = threading.Thread(target=made.shutdown, name="spans", daemon=True)
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
        """The span of a request, below that of its caller if `fields` name one.

        Args:
            name: of the span.
            fields: of the request, with `traceparent` if its caller traces.
            began_ns: when it came, in nanoseconds since 1970.
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
            attributes: what became known of it.
            times: when it was queued, its batch taken, begun and ended; None where it never came so far.
            now: the time; all of them on the clock of the cells.
            status: of HTTP.
        """
        if not span.is_recording():
            return
        zero = time.time_ns() - round(1e9 * now)
        if times is not None:
            below = set_span_in_context(span)
            arrived, taken, started, ended = (zero + round(1e9 * moment) for moment in times)
            for name, begin, end in (("queue", arrived, taken), ("infer", started, ended)):
                self._tracer.start_span(name, below, start_time=begin).end(end)
        span.set_attributes(dict(attributes))
        if status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end(zero + round(1e9 * now))
