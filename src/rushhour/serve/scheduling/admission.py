"""Predicts on arrival whether a request would meet its deadline; if not, it is shed at once.

Early shedding keeps the latency of admitted requests, and lets other clients retry elsewhere in time. Pure functions of
a profile of the engine and the state of the queue.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from rushhour.measurement import ServiceTimes

_REPLAYED = 16
"""Batches at the queue's end that are simulated one by one."""
_MEMORY = 0.02
"""Weight of the newest batch in the profile: about the last 50 batches count."""
_DISTRUSTED = 0.5
"""The same for the first batch after `distrust`; it decreases as in a mean over the batches since."""
_NEWEST = 0.1
"""Weight of the newest batch in moving averages."""
_CAUTION = 3.0
"""Mean deviations added to the mean prediction error; of normal errors 1 in 120 is larger. It shortens the queue, but
does not reduce throughput."""
_LONG_PREDICTION = 0.5
"""Predictions of at least this fraction of the time limit are compared with the outcome."""
_PROBE_EVERY_S = 1.0
"""After a probe that was late, the next one is admitted after this time."""
_CLEARLY = 1.05
"""A batch is cheaper than the line says if the line gives a sample so many times its measured time."""
_ANCHOR = 0.1
"""Weight of the times of the start, relative to the recent batches together."""


class Profile:
    """How long a batch of n samples takes: `a + b n` seconds, fitted at the start and updated by every batch.

    Exponentially weighted least squares: the weight of old batches decays, so the profile follows a machine that gets
    slower. The times of the start keep a small weight, scaled to the current speed: batches of one size alone do not
    determine the slope.

    Of samples of different sizes n is the work of a batch, in samples of the usual size (`PositionCost`).

    Args:
        times: measured before the first request, all streams busy.
        is_sure: whether nothing else computed while they were measured; else the profile is distrusted.

    Attributes:
        times: the same.
        cheapest: the batch in which a sample was measured to take clearly less than the line says: caches make some
            batches cheaper than smaller and larger ones. 0 where there is none.
    """

    def __init__(self, times: ServiceTimes, *, is_sure: bool = True) -> None:
        self.times = times
        self._weight = _MEMORY if is_sure else _DISTRUSTED
        points = list(zip(times.batch_sizes, times.seconds, strict=True))
        self._start = [sum(column) / len(points) for column in zip(*(_moments(n, s) for n, s in points), strict=True)]
        self._start_a, self._start_b = _line(self._start)
        least, rows = min((seconds / rows, rows) for rows, seconds in points)
        self.cheapest = rows if _CLEARLY * least <= self._start_a / rows + self._start_b else 0
        self._recent = list(self._start)
        self._took, self._expected = 1.0, 1.0
        self._a, self._b = self._start_a, self._start_b
        self._deviation = 0.0

    def seconds(self, rows: float) -> float:
        """Seconds that a batch of `rows` samples takes."""
        return self._a + self._b * rows

    def upper_seconds(self, rows: float) -> float:
        """Upper bound for a batch of `rows` samples: the prediction plus three mean deviations."""
        return self._a + self._b * rows + _CAUTION * self._deviation

    def rows_within(self, seconds: float) -> int:
        """The largest batch that takes no longer than `seconds`; 0 if none does."""
        if seconds < self._a + self._b:
            return 0
        return int((seconds - self._a) / self._b + 1e-9)

    def distrust(self) -> None:
        """The profile may be wrong: the next batches get more weight."""
        self._weight = _DISTRUSTED

    def update(self, rows: float, seconds: float) -> None:
        """A batch of `rows` samples has taken `seconds`."""
        self._deviation += _NEWEST * (abs(seconds - self.seconds(rows)) - self._deviation)
        # Outliers are capped at 4x the prediction.
        seconds = min(seconds, 4 * self.seconds(rows))
        expected = self._start_a + self._start_b * rows
        if self._took == self._expected == 1.0:
            self._took = self._expected = expected
        weight, self._weight = self._weight, max(_MEMORY, self._weight / (1 + self._weight))
        self._took += weight * (seconds - self._took)
        self._expected += weight * (expected - self._expected)
        scale = _ANCHOR * self._took / self._expected
        n, x, xx, y, xy = self._recent = [
            old + weight * (new - old) for old, new in zip(self._recent, _moments(rows, seconds), strict=True)
        ]
        sn, sx, sxx, sy, sxy = self._start
        self._a, self._b = _line(
            (n + _ANCHOR * sn, x + _ANCHOR * sx, xx + _ANCHOR * sxx, y + scale * sy, xy + scale * sxy)
        )


def _moments(rows: float, seconds: float) -> tuple[float, float, float, float, float]:
    return 1.0, rows, rows * rows, seconds, rows * seconds


def _line(sums: Sequence[float]) -> tuple[float, float]:
    """Intercept and slope of the least-squares line, neither of them negative."""
    n, x, xx, y, xy = sums
    spread = n * xx - x * x
    slope = (n * xy - x * y) / spread if spread > 1e-9 * n * xx else 0.0
    if slope <= 0:
        return max(y / n, 1e-9), 1e-12
    base = (y - slope * x) / n
    return (base, slope) if base >= 0 else (0.0, max(xy / xx, 1e-12))


def free_at(busy_until: Sequence[float], streams: int) -> Sequence[float]:
    """When each busy stream is free; of more batches than streams, the earliest are followed by others."""
    return busy_until if len(busy_until) <= streams else sorted(busy_until)[-streams:]


class Probes:
    """When a request is admitted although it is predicted to be late: only a batch can correct a wrong profile."""

    def __init__(self) -> None:
        self._from = -math.inf

    def are_due(self, now: float) -> bool:
        """Whether one may be admitted, if nothing else is in flight."""
        return now >= self._from

    def ended(self, until: float, now: float, profile: Profile) -> None:
        """A probe has ended. In time: the profile is wrong, admit the next. Late: trust the profile for a while."""
        if now <= until:
            self._from = now
            profile.distrust()
        else:
            self._from = now + _PROBE_EVERY_S


class Admission:
    """Predicts when a request would be answered.

    Args:
        profile: of the engine, shared with the batcher.
        max_batch: samples in one batch, at most.

    Attributes:
        max_batch: the same; it may change.
    """

    def __init__(self, profile: Profile, max_batch: int) -> None:
        self._profile = profile
        self.max_batch = max_batch
        self._mean_batch = 0.0
        self._error = 0.0
        self._deviation = 0.0

    def record(self, rows: float, expected_s: float, took_s: float) -> None:
        """A batch has ended.

        Args:
            rows: samples in it.
            expected_s: the predicted latency of its last request; 0 where none was predicted.
            took_s: the latency of that request.
        """
        self._mean_batch += _NEWEST * (rows - self._mean_batch)
        if expected_s:
            error = took_s - expected_s - self._error
            self._error += _NEWEST * error
            self._deviation += _NEWEST * (abs(error) - self._deviation)
        else:
            # Errors seen under overload decay after it: requests that are shed because of them cannot correct them.
            self._error *= 1 - _NEWEST
            self._deviation *= 1 - _NEWEST

    @property
    def margin_s(self) -> float:
        """Added to a long prediction: the mean of its errors plus three mean deviations, so that hardly 1% are late.

        As TCP estimates its retransmission timeout (Jacobson, Congestion Avoidance and Control, 1988).
        """
        return max(0.0, self._error + _CAUTION * self._deviation)

    def cautious(self, now: float, finish: float, within: float) -> tuple[float, float]:
        """A prediction with its margin, and the latency without it that the outcome is compared with.

        Errors of short predictions are another matter: they get no margin, and are not compared, which is 0.

        Args:
            now: the time.
            finish: as `finish` predicts it.
            within: the time limit, in seconds.
        """
        if finish - now <= _LONG_PREDICTION * within:
            return finish, 0.0
        return finish + self.margin_s, finish - now

    def finish(
        self,
        now: float,
        rows: float,
        waiting: float,
        busy_until: Sequence[float],
        streams: int,
        slow: float = 1.0,
        batch: int = 0,
    ) -> float:
        """When the last of `rows` samples that arrive now would be answered, on the clock of `now`.

        Args:
            now: the time.
            rows: of the request.
            waiting: samples before it in the queue.
            busy_until: when each batch in flight is expected to end, in any order. Of more than `streams` the earliest
                are followed by others that wait in the engine.
            streams: how many can run at once.
            slow: how many times longer the batches before it take than they compute, because others compute between.
            batch: samples in the batches that it waits for, at most; 0 is `max_batch`.
        """
        batch = batch or self.max_batch
        busy_until = free_at(busy_until, streams)
        batches = int(-(-(waiting + rows) // batch))
        size = waiting + rows - (batches - 1) * batch
        if batches > 1 or len(busy_until) >= streams:
            size = max(size, round(self._mean_batch))  # while it waits, others join its batch
        last = self._profile.seconds(size)
        if batches == 1:
            return (now if len(busy_until) < streams else max(now, min(busy_until))) + last
        # A long queue keeps all streams busy: all but its end is divided evenly among them.
        full = slow * self._profile.seconds(batch)
        free = [max(now, end) for end in busy_until] + [now] * (streams - len(busy_until))
        skipped = max(0, batches - _REPLAYED) // streams
        free = [end + skipped * full for end in free]
        heapq.heapify(free)
        for _ in range(batches - 1 - skipped * streams):
            heapq.heapreplace(free, free[0] + full)
        return free[0] + last

    def backlog_s(self, waiting: float, streams: int) -> float:
        """Seconds until `waiting` samples are answered: clients should try again after that."""
        return -(-waiting // (self.max_batch * streams)) * self._profile.seconds(self.max_batch)
