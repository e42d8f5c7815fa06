"""Statistics of requests and batches: counted once per batch, added up over versions and worker processes.

A request's durations are those of the batch it was in: each of ten requests that shared a batch of 3 ms has waited
3 ms for the engine, so ten are counted with 30 ms together, and `ns / count` is the time of one request. A request that
was split over several batches counts once, with the durations of all of them.

Everything here is plain data that can be sent between processes and added: `Totals` of one version, `Report` of one
worker process or of all. `Totals.shown` formats it for the protocol, `metrics.py` for Prometheus.

Source: triton-inference-server/server, docs/protocol/extension_statistics.md.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Protocol

import msgspec
import numpy as np

from rushhour.clock import Clock

BOUNDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0),
)
"""Upper bounds of the latency histograms' buckets, in seconds: dense where latency limits are set."""
_BOUNDS = np.array(BOUNDS)
_BUCKETS = len(BOUNDS) + 1
_WAITING = 1024
"""Latencies that are sorted into the buckets together: so many take a tenth of a millisecond."""
_VERSIONS = 32
"""Versions of the model that are counted separately, those with the highest numbers; older ones are one."""
_OLDER = "older"

_ADDED = (
    *("answered", "failed", "invalid", "shed_queue", "shed_deadline", "cancelled"),
    *("samples", "batches", "positions", "padding", "switches", "spent", "cut", "tiles", "escalated"),
)
_REASONS = {
    400: "invalid",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    409: "conflict",
    413: "too_large",
    414: "target_too_long",
    415: "unsupported_media_type",
    429: "queue",
    431: "header_too_large",
    501: "not_implemented",
    503: "unavailable",
    505: "version_not_supported",
}


def reason_of(status: int) -> str:
    """Why a request was answered with an error, in a word, by the HTTP status; `internal` for the server's faults."""
    return _REASONS.get(status, "internal")


class Duration(msgspec.Struct):
    """How often something happened, and how long it took in total."""

    count: int = 0
    seconds: float = 0.0

    def add(self, count: int, seconds: float) -> None:
        """It happened `count` times, and took `seconds` in total."""
        self.count += count
        self.seconds += seconds

    def shown(self) -> dict[str, int]:
        """As the protocol says it."""
        return {"count": self.count, "ns": round(self.seconds * 1e9)}


class Stages(msgspec.Struct):
    """The three stages of a batch on its stream."""

    filling: Duration = msgspec.field(default_factory=Duration)
    computing: Duration = msgspec.field(default_factory=Duration)
    replying: Duration = msgspec.field(default_factory=Duration)

    def count(self, count: int, times: int, batch: Batch, now: float) -> None:
        """Count a batch's durations, each `times` times."""
        self.filling.add(count, times * (batch.started - batch.taken))
        self.computing.add(count, times * (batch.ended - batch.started))
        self.replying.add(count, times * (now - batch.ended))

    def add(self, other: Stages) -> None:
        """Add those of other batches."""
        for own, more in zip(self.named(), other.named(), strict=True):
            own[1].add(more[1].count, more[1].seconds)

    def named(self) -> Iterator[tuple[str, Duration]]:
        """Under the protocol's names."""
        yield "compute_input", self.filling
        yield "compute_infer", self.computing
        yield "compute_output", self.replying


class Histogram(msgspec.Struct):
    """How many values lie in each bucket of `BOUNDS` and beyond the last, and their sum, in seconds."""

    counts: list[int] = msgspec.field(default_factory=lambda: [0] * _BUCKETS)
    sum: float = 0.0

    def count(self, values: np.ndarray[Any, np.dtype[np.float64]]) -> None:
        """Sort values in, all in one step."""
        found = np.bincount(np.searchsorted(_BOUNDS, values), minlength=_BUCKETS).tolist()
        self.counts = [have + more for have, more in zip(self.counts, found, strict=True)]
        self.sum += float(values.sum())

    def add(self, other: Histogram) -> None:
        """Add another's values."""
        self.counts = [have + more for have, more in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum


class Totals(msgspec.Struct):
    """Counters of one version of the model; they only grow, and those of several worker processes can be added.

    Attributes:
        answered, failed: requests that reached the engine, and how they ended.
        invalid: requests that were no valid request for this model.
        shed_queue, shed_deadline: requests rejected without being computed.
        cancelled: requests whose client disconnected before the answer.
        success: requests answered, from arrival to answer.
        fail: requests answered with an error, from arrival to answer, shed ones among them.
        errors: the same by reason: `reason_of` their status, or `queue`, `deadline` or `engine`.
        queue: of requests, from arrival to the batch.
        stages: of requests, in their batches.
        of_size: of batches, by their samples.
        samples: computed by the engine.
        batches: run by the engine.
        positions: of samples with open dimensions that the engine computed: tokens, pixels.
        padding: positions that were computed to make the samples of a batch equal in size.
        cut, tiles: pictures that were cut into tiles, and these tiles.
        last_s: when the last batch left the queue, in seconds since 1970; 0 for never.
        queue_s, request_s: latencies of requests: in the queue, and from arrival to answer.
        inference_s: times that the engine took for batches.
        of_variant: samples by the variant that computed them.
        switches: how often the active variant changed.
        spent: the sum of the expected accuracy drops of all samples that a ladder computed: over `samples` it is their
            mean drop.
        escalated: samples that went on to the next variant of a cascade.
        unknown: categories of rows that the training data did not have, by column.
        imputed: missing values of rows, by column.
        stood: requests of which samples should have gone on and were answered by the variant before, by reason.
    """

    answered: int = 0
    failed: int = 0
    invalid: int = 0
    shed_queue: int = 0
    shed_deadline: int = 0
    cancelled: int = 0
    success: Duration = msgspec.field(default_factory=Duration)
    fail: Duration = msgspec.field(default_factory=Duration)
    errors: dict[str, int] = msgspec.field(default_factory=dict)
    queue: Duration = msgspec.field(default_factory=Duration)
    stages: Stages = msgspec.field(default_factory=Stages)
    of_size: dict[int, Stages] = msgspec.field(default_factory=dict)
    samples: int = 0
    batches: int = 0
    positions: int = 0
    padding: int = 0
    cut: int = 0
    tiles: int = 0
    last_s: float = 0.0
    queue_s: Histogram = msgspec.field(default_factory=Histogram)
    inference_s: Histogram = msgspec.field(default_factory=Histogram)
    request_s: Histogram = msgspec.field(default_factory=Histogram)
    of_variant: dict[str, int] = msgspec.field(default_factory=dict)
    switches: int = 0
    spent: float = 0.0
    escalated: int = 0
    stood: dict[str, int] = msgspec.field(default_factory=dict)
    unknown: dict[str, int] = msgspec.field(default_factory=dict)
    imputed: dict[str, int] = msgspec.field(default_factory=dict)

    def add(self, other: Totals) -> None:
        """Add another's."""
        for name in _ADDED:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("success", "fail", "queue"):
            more: Duration = getattr(other, name)
            getattr(self, name).add(more.count, more.seconds)
        for name in ("stages", "queue_s", "inference_s", "request_s"):
            getattr(self, name).add(getattr(other, name))
        for rows, stages in other.of_size.items():
            self.of_size.setdefault(rows, Stages()).add(stages)
        add_counts(self.errors, other.errors)
        add_counts(self.of_variant, other.of_variant)
        add_counts(self.stood, other.stood)
        add_counts(self.unknown, other.unknown)
        add_counts(self.imputed, other.imputed)
        self.last_s = max(self.last_s, other.last_s)

    def shown(self, name: str, version: str) -> dict[str, Any]:
        """As the protocol says it: an entry of `model_stats`."""
        durations = {"success": self.success, "fail": self.fail, "queue": self.queue, **dict(self.stages.named())}
        never = Duration()
        return {
            "name": name,
            "version": version,
            "last_inference": round(self.last_s * 1e3),
            "inference_count": self.samples,
            "execution_count": self.batches,
            "inference_stats": {
                stage: duration.shown()
                for stage, duration in {**durations, "cache_hit": never, "cache_miss": never}.items()
            },
            "batch_stats": [
                {"batch_size": rows, **{stage: duration.shown() for stage, duration in stages.named()}}
                for rows, stages in sorted(self.of_size.items())
            ],
        }


class ModelState(msgspec.Struct):
    """The state of one model in one worker process.

    Attributes:
        waiting: samples in the queue.
        running: samples in the batches in flight.
        batches: in flight.
        base_s, sample_s: a batch of n samples is expected to take `base_s + n sample_s`.
        speed: of the host in the last ten seconds of work, 1 as at the start; None before the first batch.
        plan_share: its capacity on this machine, as a share of the Plan's; None on the Plan's machine.
        variant: that computes the next batch.
        missing: variants of the ladder that could not be opened.
        drop: the mean expected accuracy drop of the newest answers, as many as the plan's accuracy window; None without
            a ladder.
    """

    waiting: int = 0
    running: int = 0
    batches: int = 0
    base_s: float = 0.0
    sample_s: float = 0.0
    speed: float | None = None
    plan_share: float | None = None
    variant: str = ""
    missing: tuple[str, ...] = ()
    drop: float | None = None


class State(msgspec.Struct):
    """The state of one worker process.

    Attributes:
        ready: whether it accepts requests.
        connections: over HTTP, open.
        calls: over gRPC, in flight.
        process: Prometheus' standard metrics of a process, by name.
        models: the state of each model that is loaded, by its name.
    """

    ready: bool = False
    connections: int = 0
    calls: int = 0
    process: dict[str, float] = {}
    models: dict[str, ModelState] = {}


class Counted(msgspec.Struct):
    """The counters of one model.

    Attributes:
        versions: the counters of each version, in the order in which they were loaded.
        bundles: the version of each bundle that was served, by its hash.
    """

    versions: dict[str, Totals] = {}
    bundles: dict[str, int] = {}

    @property
    def total(self) -> Totals:
        """Of all versions together."""
        return _sum(self.versions.values())


class Report(msgspec.Struct):
    """Counters and state of a server: of one worker process, or of all together.

    Attributes:
        models: the counters of each model, by its name.
        cells: the state of each worker process that responds, by its number.
        down: worker processes that do not respond.
        restarts: how often a worker process was restarted.
        frozen: how often a worker process was killed because it did not respond.
        dropped: lines of the log that were dropped.
        errors: answers with an error to requests other than inference, or for no model that is loaded, by reason.
    """

    models: dict[str, Counted]
    cells: dict[int, State] = {}
    down: int = 0
    restarts: int = 0
    frozen: int = 0
    dropped: int = 0
    errors: dict[str, int] = {}

    def states(self, model: str) -> dict[int, ModelState]:
        """The state of a model in each worker process where it is loaded."""
        return {number: cell.models[model] for number, cell in self.cells.items() if model in cell.models}

    def plan_share(self, model: str) -> float | None:
        """The capacity of all worker processes on this machine, as a share of the Plan's; None where it is not known,
        and on the Plan's machine."""
        shares = [state.plan_share for state in self.states(model).values() if state.plan_share is not None]
        return sum(shares) if shares else None

    @property
    def total(self) -> Totals:
        """Of all models together."""
        return _sum(totals for model in self.models.values() for totals in model.versions.values())


def _sum(each: Iterable[Totals]) -> Totals:
    total = Totals()
    for one in each:
        total.add(one)
    return total


def sum_by_version(counted: Iterable[dict[str, Totals]]) -> dict[str, Totals]:
    """The sums for each version, in new objects; of very many versions the oldest become one."""
    sums: dict[str, Totals] = {}
    for versions in counted:
        for version, totals in versions.items():
            sums.setdefault(version, Totals()).add(totals)
    known = sorted(sums.keys() - {_OLDER}, key=int)
    for version in known[: max(0, len(known) - _VERSIONS)]:
        sums.setdefault(_OLDER, Totals()).add(sums.pop(version))
    return sums


def newest_versions(versions: Mapping[str, int]) -> dict[str, int]:
    """Of versions by bundle, those that are counted separately; a bundle that comes back later is a new one."""
    newest = sorted(versions, key=versions.__getitem__)[-_VERSIONS:]
    return {bundle: versions[bundle] for bundle in newest}


def add_counts(counts: dict[str, int], more: Mapping[str, int]) -> None:
    """Add counts to those of the same names."""
    for name, count in more.items():
        counts[name] = counts.get(name, 0) + count


class Counters:
    """Counters of one cell since it was created."""

    __slots__ = ("answered", "batches", "cancelled", "failed", "invalid", "rows", "shed_deadline", "shed_queue")

    def __init__(self) -> None:
        self.answered = 0
        self.failed = 0
        self.invalid = 0
        self.shed_queue = 0
        self.shed_deadline = 0
        self.cancelled = 0
        self.batches = 0
        self.rows = 0

    def refuse(self, status: int) -> None:
        """Count an answer with an error of this HTTP status."""
        if status >= 500 and status != 501:
            self.failed += 1
        elif status == 429:
            self.shed_queue += 1
        else:
            self.invalid += 1

    def into(self, totals: Totals) -> Totals:
        """Write the counts into `totals`, and return it."""
        for name in ("answered", "failed", "invalid", "shed_queue", "shed_deadline", "cancelled"):
            setattr(totals, name, getattr(self, name))
        return totals


class Batch(Protocol):
    """The times of a batch, in seconds of the statistics' clock.

    Attributes:
        variant: that computes it, by its name in the plan.
        rows: samples in it.
        taken: when it left the queue.
        started: when its inputs were written and the engine began.
        ended: when the engine was done.
        positions: of samples with open dimensions; 0 for all others.
        padding: positions that were added to them.
    """

    variant: str
    rows: int
    positions: int
    padding: int
    taken: float
    started: float
    ended: float


class Statistics:
    """Counts the requests and batches of one version of the model, since it was loaded.

    Args:
        clock: on which all times are read.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._totals = Totals()
        self._last: float | None = None
        self._waiting = 0
        self._taken: list[tuple[float, Sequence[float]]] = []
        self._answered: list[tuple[float, Sequence[float]]] = []
        self._computed: list[float] = []

    @property
    def fail(self) -> Duration:
        """Requests answered with an error, from arrival to answer, shed ones among them."""
        return self._totals.fail

    def failed(self, reason: str, seconds: float) -> None:
        """A request was answered with an error, `seconds` after its arrival."""
        self._totals.fail.add(1, seconds)
        add_counts(self._totals.errors, {reason: 1})

    def answered(self, seconds: float) -> None:
        """A request was answered `seconds` after its arrival, and some time after its batch had been counted."""
        self._totals.success.add(1, seconds)
        self._answered.append((seconds, (0.0,)))
        self._waiting += 1

    def count(self, batch: Batch, requests: int, begun: Sequence[float], answered: Sequence[float]) -> None:
        """A batch has been computed and answered, just now.

        Args:
            batch: its times.
            requests: with samples in it.
            begun: arrivals of the requests whose first samples were in it; must not be changed afterwards.
            answered: arrivals of the requests whose last samples were in it; likewise.
        """
        now = self._clock.now()
        totals = self._totals
        totals.batches += 1
        totals.samples += batch.rows
        totals.positions += batch.positions
        totals.padding += batch.padding
        self._last = batch.taken
        totals.queue.add(len(begun), len(begun) * batch.taken - sum(begun))
        totals.success.add(len(answered), len(answered) * now - sum(answered))
        totals.stages.count(len(begun), requests, batch, now)
        of_size = totals.of_size.get(batch.rows)
        if of_size is None:
            of_size = totals.of_size[batch.rows] = Stages()
        of_size.count(1, 1, batch, now)
        self._taken.append((batch.taken, begun))
        self._answered.append((now, answered))
        self._computed.append(batch.ended - batch.started)
        self._waiting += 1 + len(begun) + len(answered)
        if self._waiting >= _WAITING:
            self._sort()

    def totals(self) -> Totals:
        """All that was counted up to now. Not a copy."""
        self._sort()
        if self._last is not None:
            self._totals.last_s = time.time() - (self._clock.now() - self._last)
        return self._totals

    def _sort(self) -> None:
        """Sort the waiting latencies into their histograms."""
        self._totals.queue_s.count(_latencies(self._taken))
        self._totals.request_s.count(_latencies(self._answered))
        self._totals.inference_s.count(np.array(self._computed))
        for waiting in (self._taken, self._answered, self._computed):
            waiting.clear()
        self._waiting = 0


def _latencies(ends: list[tuple[float, Sequence[float]]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """From each arrival to its end."""
    begun = np.fromiter(chain.from_iterable(begun for _, begun in ends), np.float64)
    ended = np.repeat(np.array([end for end, _ in ends], np.float64), [len(begun) for _, begun in ends])
    latencies: np.ndarray[Any, np.dtype[np.float64]] = ended - begun
    return latencies
