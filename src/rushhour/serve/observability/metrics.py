"""Metrics for Prometheus and OpenMetrics, made from a `Report` at each scrape.

Source: prometheus.io/docs/instrumenting/exposition_formats, and writing_exporters for the names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from rushhour.serve.observability.statistics import BOUNDS, Report, State, Totals
from rushhour.system.machine import describe

_BATCH_BOUNDS = tuple(2**power for power in range(11))


def render(report: Report, accept: str) -> tuple[str, bytes]:
    """The content type and the text.

    Args:
        report: of one cell or of all.
        accept: the request's `Accept` field; Prometheus' text format where it is empty.
    """
    encode, content_type = choose_encoder(accept)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(report))
    return content_type, encode(registry)


class _Families(Collector):
    def __init__(self, report: Report) -> None:
        self._report = report

    def collect(self) -> Iterator[Metric]:
        report = self._report
        versions = describe().versions
        yield InfoMetricFamily("rushhour_build", "The version that runs.", {"version": versions.get("rushhour", "")})
        yield from _counted(report)
        yield from _latencies(report.model, report.total)
        yield from _now(report)
        yield from _processes(report.cells)


def _counted(report: Report) -> Iterator[Metric]:
    requests = CounterMetricFamily(
        "rushhour_requests", "Inference requests, by how they ended.", labels=("model", "version", "outcome")
    )
    for version, totals in report.versions.items():
        for outcome, count in (
            ("success", totals.answered),
            ("failure", totals.failed),
            ("invalid", totals.invalid),
            ("shed", totals.shed_queue + totals.shed_deadline),
            ("cancelled", totals.cancelled),
        ):
            requests.add_metric((report.model, version, outcome), count)
    yield requests
    errors = CounterMetricFamily(
        "rushhour_errors",
        "Answers with an error. Without a model's name: to requests other than inference.",
        labels=("model", "version", "reason"),
    )
    for version, totals in report.versions.items():
        for reason, count in totals.errors.items():
            errors.add_metric((report.model, version, reason), count)
    for reason, count in report.errors.items():
        errors.add_metric(("", "", reason), count)
    yield errors
    total = report.total
    shed = CounterMetricFamily("rushhour_shed", "Requests rejected without being computed.", labels=("model", "reason"))
    shed.add_metric((report.model, "queue"), total.shed_queue)
    shed.add_metric((report.model, "deadline"), total.shed_deadline)
    yield shed
    yield from _of_ladder(report, total)
    yield from _of_cascade(report, total)
    cancelled = CounterMetricFamily(
        "rushhour_cancelled", "Requests whose client disconnected before the answer.", labels=("model",)
    )
    cancelled.add_metric((report.model,), total.cancelled)
    yield cancelled
    if total.positions:
        positions = CounterMetricFamily(
            "rushhour_positions",
            "Tokens or pixels that were computed, of samples of different sizes and of their padding.",
            labels=("model", "kind"),
        )
        positions.add_metric((report.model, "sample"), total.positions)
        positions.add_metric((report.model, "padding"), total.padding)
        yield positions
    for name, what, counts in (
        ("rushhour_unknown_categories", "Categories in rows that the training data did not have.", total.unknown),
        ("rushhour_imputed_values", "Missing values in rows, whose place was filled.", total.imputed),
    ):
        if counts:
            cells = CounterMetricFamily(name, what, labels=("model", "column"))
            for column, count in counts.items():
                cells.add_metric((report.model, column), count)
            yield cells
    for name, what, count in (
        ("rushhour_cut_pictures", "Pictures that were cut into tiles.", total.cut),
        ("rushhour_tiles", "Tiles of pictures that were cut.", total.tiles),
    ):
        pictures = CounterMetricFamily(name, what, labels=("model",))
        pictures.add_metric((report.model,), count)
        yield pictures
    for name, what, count in (
        ("rushhour_cell_restarts", "Worker processes (cells) that died and were restarted.", report.restarts),
        ("rushhour_cell_frozen", "Worker processes (cells) that did not respond and were killed.", report.frozen),
        ("rushhour_log_lines_dropped", "Log lines dropped because the log was not read in time.", report.dropped),
    ):
        yield CounterMetricFamily(name, what, count)


def _of_cascade(report: Report, total: Totals) -> Iterator[Metric]:
    """What the first variant of a cascade sent on, and how often its answer stood all the same."""
    if not total.stood:
        return
    escalated = CounterMetricFamily(
        "rushhour_escalated_samples", "Samples that went on to the next variant of the cascade.", labels=("model",)
    )
    escalated.add_metric((report.model,), total.escalated)
    yield escalated
    stood = CounterMetricFamily(
        "rushhour_first_answers",
        "Requests with samples that should have gone on and were answered by the variant before.",
        labels=("model", "reason"),
    )
    for reason, count in total.stood.items():
        stood.add_metric((report.model, reason), count)
    yield stood


def _of_ladder(report: Report, total: Totals) -> Iterator[Metric]:
    """By variant: who answered, and what it cost in accuracy."""
    samples = CounterMetricFamily(
        "rushhour_variant_samples", "Samples computed, by variant.", labels=("model", "variant")
    )
    for variant, count in total.of_variant.items():
        samples.add_metric((report.model, variant), count)
    yield samples
    for name, what, value in (
        ("rushhour_variant_switches", "Changes of the variant that answers.", float(total.switches)),
        ("rushhour_accuracy_spent", "Sum of the expected accuracy drops of all samples.", total.spent),
    ):
        family = CounterMetricFamily(name, what, labels=("model",))
        family.add_metric((report.model,), value)
        yield family
    drops = {number: state.drop for number, state in report.cells.items() if state.drop is not None}
    if drops:
        what = "Mean expected accuracy drop of the newest answers, as many as the plan's accuracy window."
        mean = GaugeMetricFamily("rushhour_accuracy_drop_ratio", what, labels=("cell",))
        for number, drop in drops.items():
            mean.add_metric((str(number),), drop)
        yield mean
    active = GaugeMetricFamily("rushhour_variant_active", "1 for the variant that answers.", labels=("cell", "variant"))
    missing = GaugeMetricFamily(
        "rushhour_variants_missing", "Variants of the ladder that could not be opened.", labels=("cell",)
    )
    for number, state in report.cells.items():
        if state.variant:
            active.add_metric((str(number), state.variant), 1.0)
            missing.add_metric((str(number),), float(len(state.missing)))
    yield active
    yield missing


def _latencies(model: str, total: Totals) -> Iterator[Metric]:
    for name, what, histogram in (
        ("rushhour_queue_seconds", "From a request's arrival to its batch.", total.queue_s),
        ("rushhour_inference_seconds", "Computation of a batch by the engine.", total.inference_s),
        ("rushhour_request_seconds", "From a request's arrival to its answer.", total.request_s),
    ):
        family = HistogramMetricFamily(name, what, labels=("model",))
        family.add_metric((model,), _buckets(BOUNDS, histogram.counts), histogram.sum)
        yield family
    sizes = HistogramMetricFamily("rushhour_batch_size", "Samples in a batch.", labels=("model",))
    counts = [0] * (len(_BATCH_BOUNDS) + 1)
    for rows, stages in total.of_size.items():
        counts[sum(rows > bound for bound in _BATCH_BOUNDS)] += stages.computing.count
    sizes.add_metric((model,), _buckets(_BATCH_BOUNDS, counts), total.samples)
    yield sizes


def _buckets(bounds: Iterable[float], counts: list[int]) -> list[tuple[str, float]]:
    """Cumulative counts, as the format requires."""
    buckets, below = [], 0
    for bound, count in zip((*(f"{bound:g}" for bound in bounds), "+Inf"), counts, strict=True):
        below += count
        buckets.append((bound, float(below)))
    return buckets


def _now(report: Report) -> Iterator[Metric]:
    states = report.cells.values()
    for name, what, value in (
        ("rushhour_ready", "1 if the server accepts requests.", float(any(state.ready for state in states))),
        ("rushhour_queue_samples", "Samples in the queue.", sum(state.waiting for state in states)),
        ("rushhour_in_flight_batches", "Batches in flight.", sum(state.batches for state in states)),
        ("rushhour_in_flight_samples", "Samples in the batches in flight.", sum(state.running for state in states)),
    ):
        yield GaugeMetricFamily(name, what, value)
    connections = GaugeMetricFamily(
        "rushhour_connections", "Open connections over HTTP, calls in flight over gRPC.", labels=("protocol",)
    )
    connections.add_metric(("http",), sum(state.connections for state in states))
    connections.add_metric(("grpc",), sum(state.calls for state in states))
    yield connections
    cells = GaugeMetricFamily("rushhour_cells", "Worker processes (cells) behind the port.", labels=("state",))
    cells.add_metric(("up",), len(states))
    cells.add_metric(("down",), report.down)
    yield cells
    if report.plan_share is not None:
        what = "Predicted capacity on this machine over that on the Plan's. Absent where the two do not differ."
        yield GaugeMetricFamily("rushhour_plan_capacity_ratio", what, report.plan_share)
    service = GaugeMetricFamily(
        "rushhour_service_time_seconds",
        "A batch of n samples is expected to take base + n per_sample.",
        labels=("cell", "coefficient"),
    )
    for number, state in report.cells.items():
        service.add_metric((str(number), "base"), state.base_s)
        service.add_metric((str(number), "per_sample"), state.sample_s)
    yield service
    speed = GaugeMetricFamily(
        "rushhour_host_speed",
        "Expected time of the last ten seconds' batches by the profile of the start, over their measured time.",
        labels=("cell",),
    )
    for number, state in report.cells.items():
        if state.speed is not None:
            speed.add_metric((str(number),), state.speed)
    yield speed


def _processes(cells: dict[int, State]) -> Iterator[Metric]:
    """Prometheus' standard process metrics, of each worker process: they start again from zero when it is restarted."""
    for name in sorted({name for state in cells.values() for name in state.process}):
        counter = name.endswith("_total")
        kind = CounterMetricFamily if counter else GaugeMetricFamily
        family = kind(name.removesuffix("_total"), "Of a worker process (cell).", labels=("cell",))
        for number, state in cells.items():
            if name in state.process:
                family.add_metric((str(number),), state.process[name])
        yield family
