"""`Explanation`: what an answer says about itself: the variant that computed it, and its times (`Server-Timing`).

What the answers of a batch share is formatted once per batch; a request adds two numbers.

Source: w3.org/TR/server-timing.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

FIELD = "server-timing"
"""Of an answer's header over HTTP, of the trailing metadata over gRPC."""
_MAX_SOURCES = 64


class Computed(Protocol):
    """A batch: its variant and its size, and when it was taken, started and ended, in seconds of the cell's clock."""

    @property
    def variant(self) -> str:
        """That computed it, by its name in the plan."""
        ...

    @property
    def rows(self) -> int:
        """Samples in it."""
        ...

    @property
    def taken(self) -> float:
        """When it left the queue."""
        ...

    @property
    def started(self) -> float:
        """When the engine began."""
        ...

    @property
    def ended(self) -> float:
        """When the engine was done."""
        ...


class Kept(NamedTuple):
    """What an answer says that is written later: its batch, and its request's times."""

    rows: int
    taken: float
    started: float
    ended: float
    variant: str
    version: str
    arrived: float
    decoding_s: float


class Explanation:
    """What the answer that is being written says about itself. One for all cells of an event loop.

    A cell sets it before it gives a request its answer; whoever writes the answer reads it during that call.

    Attributes:
        variant: that computed the answer.
        arrived: when the request entered its cell, in seconds of the cell's clock.
        decoding_s: of its pictures, until they could be queued; 0 where nothing was decoded.
    """

    __slots__ = (
        *("_before", "_ended", "_now_ms", "_rows", "_sources", "_started", "_taken", "_taken_ms", "_version"),
        *("arrived", "decoding_s", "variant"),
    )

    def __init__(self) -> None:
        self.variant = ""
        self.arrived = 0.0
        self.decoding_s = 0.0
        self._taken = 0.0
        self._taken_ms = 0.0
        self._now_ms = 0.0
        self._before = b""
        self._rows = 0
        self._started = 0.0
        self._ended = 0.0
        self._version = ""
        self._sources: dict[tuple[str, str], bytes] = {}

    def begin(self, batch: Computed, version: str, now: float) -> None:
        """The requests of a batch are answered from now on.

        Args:
            batch: its times, and the variant that computed it.
            version: of the model.
            now: on the clock of the batch.
        """
        variant = batch.variant
        source = self._sources.get((variant, version))
        if source is None:
            source = self._source(variant, version)
        started, ended = batch.started, max(batch.started, batch.ended)
        self.variant, self._version, self._rows = variant, version, batch.rows
        self._taken, self._started, self._ended = batch.taken, started, ended
        self._taken_ms, self._now_ms = 1e3 * batch.taken, 1e3 * now
        waited_ms = 1e3 * (now - batch.taken - (ended - started))
        self._before = b", batch;dur=%.3f, compute;dur=%.3f, batch-size;desc=%d%b, total;dur=" % (
            waited_ms,
            1e3 * (ended - started),
            batch.rows,
            source,
        )

    def keep(self) -> Kept:
        """What the present answer says, to say it later."""
        times = self._rows, self._taken, self._started, self._ended
        return Kept(*times, self.variant, self._version, self.arrived, self.decoding_s)

    def resume(self, kept: Kept, now: float) -> None:
        """An answer is written later than its batch ended: what it waited since then counts as time in its batch."""
        self.begin(kept, kept.version, now)
        self.arrived, self.decoding_s = kept.arrived, kept.decoding_s

    def times(self) -> bytes:
        """The value of `Server-Timing`: durations in milliseconds, which add up to the total.

        `queue` is from the arrival to the request's last batch, `decode` the decoding of its pictures before that,
        `batch` what the request waited in its batch, `compute` the engine's time for that batch.
        """
        arrived_ms, decoded_ms = 1e3 * self.arrived, 1e3 * self.decoding_s
        queued_ms, total_ms = self._taken_ms - arrived_ms, self._now_ms - arrived_ms
        if decoded_ms:
            queued_ms -= decoded_ms
            return b"queue;dur=%.3f, decode;dur=%.3f%b%.3f" % (queued_ms, decoded_ms, self._before, total_ms)
        return b"queue;dur=%.3f%b%.3f" % (queued_ms, self._before, total_ms)

    def field(self) -> bytes:
        """The same as a header field, with its line end."""
        if self.decoding_s:
            return b"server-timing: %b\r\n" % self.times()
        arrived_ms = 1e3 * self.arrived
        queued_ms, total_ms = self._taken_ms - arrived_ms, self._now_ms - arrived_ms
        return b"server-timing: queue;dur=%.3f%b%.3f\r\n" % (queued_ms, self._before, total_ms)

    def _source(self, variant: str, version: str) -> bytes:
        """Variant and version. Names come from a plan's file: what a header cannot hold is replaced."""
        if len(self._sources) >= _MAX_SOURCES:
            self._sources.clear()
        name = "".join(letter if " " <= letter <= "~" and letter not in '"\\' else "?" for letter in variant)
        source = self._sources[variant, version] = f', variant;desc="{name}", version;desc="{version}"'.encode()
        return source
