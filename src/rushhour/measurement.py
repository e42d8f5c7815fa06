"""Measurements: latencies under load, service times of an engine alone, accuracy on held-out data.

Latencies are stored as an HdrHistogram (3 significant digits, 1 µs to 1 hour) in its standard base64 encoding, so that
any HdrHistogram tool can read a line of `measurements.jsonl`.
"""

from __future__ import annotations

import enum
import math
from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from rushhour.errors import StorageError
from rushhour.goal import SLO

_LOWEST_US, _HIGHEST_US, _DIGITS = 1, 3_600_000_000, 3


class Outcome(enum.StrEnum):
    """The verdict on one load: does the SLO hold at this rate?

    `PASS` and `FAIL` are proven; the others are not, and count as neither.
    """

    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"
    """Not enough evidence for pass or fail: a longer window may decide."""
    UNSTABLE = "unstable"
    """The queue grew during the window, so no percentile describes the latency."""
    GENERATOR_LIMITED = "generator_limited"
    """The load generator fell behind its schedule, so the server was not tested at this rate."""
    VOID = "void"
    """Other processes disturbed the machine during the window, so nothing can be concluded."""

    @property
    def words(self) -> str:
        """The outcome as words: `generator limited`."""
        return self.value.replace("_", " ")

    @property
    def refutes(self) -> bool:
        """Whether it is proven that the server does not hold the rate."""
        return self in (Outcome.FAIL, Outcome.UNSTABLE)


Number = Annotated[float, msgspec.Meta(ge=-1e30, le=1e30)]
"""A metric, or anything else that may be negative. The bounds reject files with edited values."""
Rate = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
"""Per second."""
Time = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
"""Seconds or milliseconds."""
_Count = Annotated[int, msgspec.Meta(ge=0, le=10**12)]
_Share = Annotated[float, msgspec.Meta(ge=0, le=1e6)]

Interval = tuple[Number, Number]
"""A two-sided 95% confidence interval, low and high."""


class Measurement(msgspec.Struct, frozen=True, tag_field="kind", tag="load"):
    """One window of open-loop load on a server: what was sent, what was answered, and the verdict.

    Attributes:
        slo: that the verdict is about.
        rate_rps: scheduled requests per second (Poisson).
        seed: of the arrival schedule.
        duration_s: length of the schedule.
        n: scheduled requests.
        late: of these, not answered within the limit: too slow, with an error, shed, or never.
        errors: of these, refused connections, time-outs, malformed answers, statuses other than 200, 429 and 503.
        shed: of these, refused by the server (429 or 503).
        p50_ms: median latency from the scheduled arrival, over all requests answered.
        p99_ms: the 99th percentile over all scheduled requests, with unanswered ones as infinitely late; None where
            there are too few samples, the server was unstable, or the percentile is an unanswered request.
        p99_interval_ms: the 95% interval of `p99_ms` from order statistics; None where `p99_ms` is.
        goodput_rps: answers per second that met the limit.
        generator_cpu: the generator's CPU time over the wall time, 1.0 = one core.
        server_cpu: the same of the server with all its processes; None where it is not known.
        speeds: of the host, in each 100 ms of the window: the duration of the server's batches by its profile, over
            the measured one. Below 1 is slower than the profile; empty where the server does not report it.
        send_delay_p99_ms: how late the generator itself sent, 99th percentile.
        outcome: the verdict; `reason` explains it.
        latencies: HdrHistogram of the answered requests in microseconds, base64.
        error_kinds: how many of `errors` are of each kind: `mismatch`, `status 500`, `time-out`, `closed`, ...
        decided: false where a longer window may decide it.
        needs_s: about how many more seconds at this rate would decide it; None where it is decided or cannot be.
        blocks: late requests in each of 20 blocks of consecutive requests, for resampling; an incomplete block is left
            out.
        looks: how many times the verdict was computed while the window grew (a group-sequential test).
        retries: disturbed windows that were discarded before this one.
    """

    slo: SLO
    rate_rps: Rate
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    duration_s: Time
    n: _Count
    late: _Count
    errors: _Count
    shed: _Count
    p50_ms: Time | None
    p99_ms: Time | None
    p99_interval_ms: Interval | None
    goodput_rps: Rate
    generator_cpu: _Share
    send_delay_p99_ms: Number
    outcome: Outcome
    reason: str
    latencies: str
    error_kinds: dict[str, _Count] = {}
    decided: bool = True
    looks: _Count = 1
    retries: _Count = 0
    needs_s: Number | None = None
    blocks: tuple[_Count, ...] = ()
    server_cpu: _Share | None = None
    speeds: tuple[_Share, ...] = ()

    @property
    def keeps_slo(self) -> bool:
        """Whether no more requests were late than the SLO allows, proven or not."""
        return self.late <= self.n * self.slo.allowed_miss_rate

    @property
    def speed(self) -> float | None:
        """The median of `speeds`; None where the server does not report them."""
        return float(np.median(self.speeds)) if self.speeds else None

    @property
    def slow_speed(self) -> float | None:
        """The 10th percentile of `speeds`."""
        return float(np.percentile(self.speeds, 10)) if self.speeds else None


class PositionCost(msgspec.Struct, frozen=True):
    """How the time of a sample depends on its size, of a model with open dimensions.

    A batch of n samples with t positions together (tokens, pixels, padding included) takes `a + b n + c t` seconds.
    Relative to n samples of the usual size that is `a + s w`, with the work `w = n (1 - share) + share t / usual`.

    Attributes:
        usual: positions of one sample of those that were timed: the product of its open dimensions.
        share: of the time of such a sample, beside that of its batch, that grows with its positions.
    """

    usual: Annotated[int, msgspec.Meta(ge=1, le=2**62)]
    share: Annotated[float, msgspec.Meta(ge=0, le=1)]

    def work(self, sizes: tuple[int, ...]) -> float:
        """Of one sample of these sizes: as many samples of the usual size take as long, beside their batch."""
        return 1 - self.share + self.share * math.prod(sizes) / self.usual


class ServiceTimes(msgspec.Struct, frozen=True, tag_field="kind", tag="service_times"):
    """Duration of a batch on the engine alone, with all streams busy.

    Attributes:
        batch_sizes: ascending, from 1 to the largest batch.
        seconds: median seconds of one batch on one stream while all streams are busy, same order.
        throughput: inferences per second over all streams, same order.
        quantiles: of the seconds of single batches, as factors of the median at 16 equally likely points, ascending,
            same order; an empty row where too few batches ran, and no rows where they were not recorded.
        positions: how the time depends on the samples' size; unset without open dimensions.
    """

    batch_sizes: Annotated[tuple[Annotated[int, msgspec.Meta(ge=1, le=2**30)], ...], msgspec.Meta(min_length=1)]
    seconds: tuple[Annotated[float, msgspec.Meta(gt=0, le=1e9)], ...]
    throughput: tuple[Number, ...]
    quantiles: tuple[tuple[_Share, ...], ...] = ()
    positions: PositionCost | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        if self.quantiles and (
            len(self.quantiles) != len(self.batch_sizes) or len({len(row) for row in self.quantiles if row}) > 1
        ):
            raise ValueError("`quantiles` are not one row of the same length for each of `batch_sizes`")
        if not len(self.batch_sizes) == len(self.seconds) == len(self.throughput):
            raise ValueError("`batch_sizes`, `seconds` and `throughput` differ in length")
        if list(self.batch_sizes) != sorted(set(self.batch_sizes)):
            raise ValueError("`batch_sizes` do not ascend")


class BatchCost(msgspec.Struct, frozen=True):
    """CPU time of a single batch after a pause, summed over all threads of the engine until they are idle again.

    It is more than a stream's share of `ServiceTimes`: caches are cold, and some threads spin after the batch.

    Attributes:
        batch_s: CPU seconds of a batch, whatever its size.
        sample_s: CPU seconds more of each sample in it.
    """

    batch_s: float
    sample_s: float


class Accuracy(msgspec.Struct, frozen=True, tag_field="kind", tag="accuracy"):
    """The task's metric of a compiled artefact on held-out data, and its drop below the reference.

    Attributes:
        metric: name of the metric; higher is better.
        value: the metric.
        interval: its 95% interval.
        n: samples.
        split: which held-out part of the data.
        drop: reference minus this one on the same samples (0 for the reference itself).
        drop_interval: its paired 95% interval.
        class_drops: of a classification, the drop among the samples that this one answers with each class; empty where
            it was not measured, or there is no drop.
    """

    metric: str
    value: Number
    interval: Interval
    n: Annotated[int, msgspec.Meta(ge=1, le=10**12)]
    split: str
    drop: Number = 0.0
    drop_interval: Interval = (0.0, 0.0)
    class_drops: tuple[Number, ...] = ()


class ClosedLoop(msgspec.Struct, frozen=True, tag_field="kind", tag="closed_loop"):
    """A closed loop.

    Attributes:
        concurrency: N, requests in flight.
        throughput_rps: X, answers per second.
        latency_s: R, the mean latency.
    """

    concurrency: Annotated[int, msgspec.Meta(ge=1, le=10**6)]
    throughput_rps: Rate
    latency_s: Time

    @property
    def little(self) -> float:
        """X R / N: 1 where Little's law holds; far from it where the generator, not the server, is the bottleneck."""
        return self.throughput_rps * self.latency_s / self.concurrency

    @property
    def consistent(self) -> bool:
        """Whether Little's law holds within 5%."""
        return abs(self.little - 1) <= 0.05


class Priors(msgspec.Struct, frozen=True, tag_field="kind", tag="priors"):
    """What earlier runs on the same machine measured, as a run has it from its start (`rushhour.tune.priors`).

    Attributes:
        values: name -> mean: `request/1x2x1`, CPU seconds of a request beside the engine with that layout of the cores
            (processes x streams x threads); `slowdown`, the factor by which batches take longer beside serving;
            `residual/openvino/1x2x1x2`, the log of measured over predicted capacity (the last number is 1 for one
            sample at a time); `step/KEY`, seconds of a step of a training.
    """

    values: dict[str, Annotated[float, msgspec.Meta(ge=-1e9, le=1e9)]] = {}


Reading = Measurement | ServiceTimes | Accuracy | ClosedLoop | Priors
"""Anything that `measurements.jsonl` holds."""


def pack_latencies(seconds: NDArray[np.float64]) -> str:
    """The histogram of these latencies as HdrHistogram's compressed base64.

    Args:
        seconds: latencies, shape `(n,)`; values beyond the histogram's range are clipped to its ends.
    """
    from hdrh.histogram import HdrHistogram  # of load tests: a server needs none

    histogram = HdrHistogram(_LOWEST_US, _HIGHEST_US, _DIGITS)
    micros = np.clip(np.rint(seconds * 1e6), _LOWEST_US, _HIGHEST_US).astype(np.int64)
    values, counts = np.unique(micros, return_counts=True)
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        histogram.record_value(value, count)
    encoded: bytes = histogram.encode()
    return encoded.decode("ascii")


def latency_curve(latencies: str, percentiles: tuple[float, ...]) -> list[float]:
    """Latencies in milliseconds at `percentiles` (0 to 100) of a histogram made by `pack_latencies`.

    Raises:
        StorageError: if it is damaged.
    """
    from hdrh.histogram import HdrHistogram

    try:
        histogram = HdrHistogram.decode(latencies.encode("ascii"))
    except Exception as error:  # of base64, of zlib, of the histogram: they have no base of their own
        raise StorageError(
            "the latencies of a window are damaged",
            f"{type(error).__name__}: {error}",
            "restore measurements.jsonl, or remove that line",
        ) from error
    if histogram.get_total_count() == 0:
        return [0.0 for _ in percentiles]
    return [histogram.get_value_at_percentile(percentile) / 1e3 for percentile in percentiles]
