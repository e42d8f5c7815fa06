"""Metrics for Prometheus and OpenMetrics, made from a `Report` at each scrape.

Source: prometheus.io/docs/instrumenting/exposition_formats, and writing_exporters for the names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

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
        totals = {name: model.total for name, model in report.models.items()}
        yield from _counted(report, totals)
        yield from _latencies(totals)
        yield from _now(report)
        yield from _processes(report.cells)


def _by_model(name: str, what: str, values: Mapping[str, float]) -> CounterMetricFamily:
    """A counter of each model."""
    family = CounterMetricFamily(name, what, labels=("model",))
    for model, value in values.items():
        family.add_metric((model,), value)
    return family


def _by(label: str, name: str, what: str, counts: Mapping[str, Mapping[str, int]]) -> CounterMetricFamily:
    """A counter of each model, and of each value of a further label."""
    family = CounterMetricFamily(name, what, labels=("model", label))
    for model, values in counts.items():
        for value, count in values.items():
            family.add_metric((model, value), count)
    return family


def _counted(report: Report, totals: Mapping[str, Totals]) -> Iterator[Metric]:
    requests = CounterMetricFamily(
        "rushhour_requests", "Inference requests, by how they ended.", labels=("model", "version", "outcome")
    )
    errors = CounterMetricFamily(
        "rushhour_errors",
        "Answers with an error. Without a model's name: to requests other than inference.",
        labels=("model", "version", "reason"),
    )
    for name, model in report.models.items():
        for version, each in model.versions.items():
            for outcome, count in (
                ("success", each.answered),
                ("failure", each.failed),
                ("invalid", each.invalid),
                ("shed", each.shed_queue + each.shed_deadline),
                ("cancelled", each.cancelled),
            ):
                requests.add_metric((name, version, outcome), count)
            for reason, count in each.errors.items():
                errors.add_metric((name, version, reason), count)
    yield requests
    for reason, count in report.errors.items():
        errors.add_metric(("", "", reason), count)
    yield errors
    shed = {name: {"queue": total.shed_queue, "deadline": total.shed_deadline} for name, total in totals.items()}
    yield _by("reason", "rushhour_shed", "Requests rejected without being computed.", shed)
    yield from _of_ladders(report, totals)
    yield from _of_cascades({name: total for name, total in totals.items() if total.stood})
    cancelled = {name: total.cancelled for name, total in totals.items()}
    yield _by_model("rushhour_cancelled", "Requests whose client disconnected before the answer.", cancelled)
    positions = {
        name: {"sample": total.positions, "padding": total.padding} for name, total in totals.items() if total.positions
    }
    for label, what, says, counts in (
        (
            "kind",
            "rushhour_positions",
            "Tokens or pixels that were computed, of samples of different sizes and of their padding.",
            positions,
        ),
        (
            "column",
            "rushhour_unknown_categories",
            "Categories in rows that the training data did not have.",
            {name: total.unknown for name, total in totals.items() if total.unknown},
        ),
        (
            "column",
            "rushhour_imputed_values",
            "Missing values in rows, whose place was filled.",
            {name: total.imputed for name, total in totals.items() if total.imputed},
        ),
    ):
        if counts:
            yield _by(label, what, says, counts)
    cut = {name: total.cut for name, total in totals.items()}
    yield _by_model("rushhour_cut_pictures", "Pictures that were cut into tiles.", cut)
    tiles = {name: total.tiles for name, total in totals.items()}
    yield _by_model("rushhour_tiles", "Tiles of pictures that were cut.", tiles)
    for name, what, count in (
        ("rushhour_cell_restarts", "Worker processes (cells) that died and were restarted.", report.restarts),
        ("rushhour_cell_frozen", "Worker processes (cells) that did not respond and were killed.", report.frozen),
        ("rushhour_log_lines_dropped", "Log lines dropped because the log was not read in time.", report.dropped),
    ):
        yield CounterMetricFamily(name, what, count)


def _of_cascades(totals: Mapping[str, Totals]) -> Iterator[Metric]:
    """What the first variant of a cascade sent on, and how often its answer stood all the same."""
    if not totals:
        return
    escalated = {name: total.escalated for name, total in totals.items()}
    what = "Samples that went on to the next variant of the cascade."
    yield _by_model("rushhour_escalated_samples", what, escalated)
    what = "Requests with samples that should have gone on and were answered by the variant before."
    yield _by("reason", "rushhour_first_answers", what, {name: total.stood for name, total in totals.items()})


def _of_ladders(report: Report, totals: Mapping[str, Totals]) -> Iterator[Metric]:
    """By variant: who answered, and what it cost in accuracy."""
    samples = {name: total.of_variant for name, total in totals.items()}
    yield _by("variant", "rushhour_variant_samples", "Samples computed, by variant.", samples)
    switches = {name: float(total.switches) for name, total in totals.items()}
    yield _by_model("rushhour_variant_switches", "Changes of the variant that answers.", switches)
    spent = {name: total.spent for name, total in totals.items()}
    yield _by_model("rushhour_accuracy_spent", "Sum of the expected accuracy drops of all samples.", spent)
    what = "Mean expected accuracy drop of the newest answers, as many as the plan's accuracy window."
    mean = GaugeMetricFamily("rushhour_accuracy_drop_ratio", what, labels=("model", "cell"))
    what = "1 for the variant that answers."
    active = GaugeMetricFamily("rushhour_variant_active", what, labels=("model", "cell", "variant"))
    what = "Variants of the ladder that could not be opened."
    missing = GaugeMetricFamily("rushhour_variants_missing", what, labels=("model", "cell"))
    for name in report.models:
        for number, state in report.states(name).items():
            if state.drop is not None:
                mean.add_metric((name, str(number)), state.drop)
            if state.variant:
                active.add_metric((name, str(number), state.variant), 1.0)
                missing.add_metric((name, str(number)), float(len(state.missing)))
    if mean.samples:
        yield mean
    yield active
    yield missing


def _latencies(totals: Mapping[str, Totals]) -> Iterator[Metric]:
    queue, inference, request = (
        HistogramMetricFamily(name, what, labels=("model",))
        for name, what in (
            ("rushhour_queue_seconds", "From a request's arrival to its batch."),
            ("rushhour_inference_seconds", "Computation of a batch by the engine."),
            ("rushhour_request_seconds", "From a request's arrival to its answer."),
        )
    )
    for model, total in totals.items():
        for family, histogram in ((queue, total.queue_s), (inference, total.inference_s), (request, total.request_s)):
            family.add_metric((model,), _buckets(BOUNDS, histogram.counts), histogram.sum)
    yield from (queue, inference, request)
    sizes = HistogramMetricFamily("rushhour_batch_size", "Samples in a batch.", labels=("model",))
    for model, total in totals.items():
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
    cells = report.cells.values()
    ready = float(any(state.ready for state in cells))
    yield GaugeMetricFamily("rushhour_ready", "1 if the server accepts requests.", ready)
    gauges = [
        GaugeMetricFamily(name, what, labels=("model",))
        for name, what in (
            ("rushhour_model_ready", "1 if requests for the model are accepted."),
            ("rushhour_queue_samples", "Samples in the queue."),
            ("rushhour_in_flight_batches", "Batches in flight."),
            ("rushhour_in_flight_samples", "Samples in the batches in flight."),
        )
    ]
    for name in report.models:
        states = report.states(name).values()
        values = (
            float(any(cell.ready and name in cell.models for cell in cells)),
            sum(state.waiting for state in states),
            sum(state.batches for state in states),
            sum(state.running for state in states),
        )
        for gauge, value in zip(gauges, values, strict=True):
            gauge.add_metric((name,), value)
    yield from gauges
    connections = GaugeMetricFamily(
        "rushhour_connections", "Open connections over HTTP, calls in flight over gRPC.", labels=("protocol",)
    )
    connections.add_metric(("http",), sum(state.connections for state in cells))
    connections.add_metric(("grpc",), sum(state.calls for state in cells))
    yield connections
    up = GaugeMetricFamily("rushhour_cells", "Worker processes (cells) behind the port.", labels=("state",))
    up.add_metric(("up",), len(cells))
    up.add_metric(("down",), report.down)
    yield up
    yield from _speeds(report)


def _speeds(report: Report) -> Iterator[Metric]:
    """How fast each model computes here."""
    what = "Predicted capacity on this machine over that on the Plan's. Absent where the two do not differ."
    ratio = GaugeMetricFamily("rushhour_plan_capacity_ratio", what, labels=("model",))
    what = "A batch of n samples is expected to take base + n per_sample."
    service = GaugeMetricFamily("rushhour_service_time_seconds", what, labels=("model", "cell", "coefficient"))
    what = "Expected time of the last ten seconds' batches by the profile of the start, over their measured time."
    speed = GaugeMetricFamily("rushhour_host_speed", what, labels=("model", "cell"))
    for name in report.models:
        share = report.plan_share(name)
        if share is not None:
            ratio.add_metric((name,), share)
        for number, state in report.states(name).items():
            service.add_metric((name, str(number), "base"), state.base_s)
            service.add_metric((name, str(number), "per_sample"), state.sample_s)
            if state.speed is not None:
                speed.add_metric((name, str(number)), state.speed)
    if ratio.samples:
        yield ratio
    yield service
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
