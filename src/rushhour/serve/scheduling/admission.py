"""Will this request be answered in time? Asked at its arrival: what cannot be is turned away at once.

Turning away early keeps the promise to those who are let in, and tells the others while there is still time to go
elsewhere. Pure: a profile of the engine and the state of the queue in, a time out.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from rushhour.measurement import ServiceTimes

_REPLAYED = 16
"""Batches of the queue's end that are replayed one by one."""
_MEMORY = 0.02
"""Weight of the newest batch in the profile: about the last 50 batches decide."""
_DOUBTED = 0.5
"""The same for the first batch after the profile has come into doubt; it falls as in a mean over the batches since."""
_NEWEST = 0.1
"""Weight of the newest batch in what is usual."""
_CAUTION = 3.0
"""Mean deviations of what was mispredicted that are expected on top of its mean; of normal errors 1 in 120 is larger.
What is lost by it is the end of the queue, not throughput."""
_ANCHOR = 0.1
"""Weight of the start's times against that of the recent batches together."""


class Profile:
    """How long a batch of n samples takes: `a + b n` seconds, fitted at the start and kept fresh by every batch.

    Exponentially weighted least squares: old batches fade, so the profile follows a machine that gets slower. The
    times of the start stay in it, scaled to the speed of now and with a small weight: a long run of equal batches
    says nothing of the others, and the line's slope must come from somewhere.

    Args:
        times: measured before the first request, all streams busy.
        is_sure: whether nothing else computed while they were measured; else they are in doubt.

    Attributes:
        times: the same.
    """

    def __init__(self, times: ServiceTimes, *, is_sure: bool = True) -> None:
        self.times = times
        self._weight = _MEMORY if is_sure else _DOUBTED
        points = list(zip(times.batch_sizes, times.seconds, strict=True))
        self._start = [sum(column) / len(points) for column in zip(*(_moments(n, s) for n, s in points), strict=True)]
        self._start_a, self._start_b = _line(self._start)
        self._recent = list(self._start)
        self._took, self._expected = 1.0, 1.0
        self._a, self._b = self._start_a, self._start_b
        self._uneven = 0.0

    def seconds(self, rows: int) -> float:
        """Seconds that a batch of `rows` samples takes."""
        return self._a + self._b * rows

    def seconds_at_worst(self, rows: int) -> float:
        """Seconds that hardly a batch of `rows` samples exceeds, by how unevenly the last ones came."""
        return self._a + self._b * rows + _CAUTION * self._uneven

    def rows_within(self, seconds: float) -> int:
        """The largest batch that takes no longer than `seconds`; 0 if none does."""
        if seconds < self._a + self._b:
            return 0
        return int((seconds - self._a) / self._b + 1e-9)

    def doubt(self) -> None:
        """What is known comes from another time: the next batches say more than usual."""
        self._weight = _DOUBTED

    def learn(self, rows: int, seconds: float) -> None:
        """A batch of `rows` samples has taken `seconds`."""
        self._uneven += _NEWEST * (abs(seconds - self.seconds(rows)) - self._uneven)
        # A hiccup of the machine is no property of the engine.
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


def _moments(rows: int, seconds: float) -> tuple[float, float, float, float, float]:
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


class Admission:
    """Predicts when a request would be answered.

    Args:
        profile: of the engine, shared with the batcher.
        max_batch: samples in one batch, at most.
    """

    def __init__(self, profile: Profile, max_batch: int) -> None:
        self._profile = profile
        self._max_batch = max_batch
        self._usual = 0.0
        self._late = 0.0
        self._uneven = 0.0

    def saw(self, rows: int, expected_s: float, took_s: float) -> None:
        """A batch has ended.

        Args:
            rows: samples in it.
            expected_s: what was predicted for its last request; 0 where nothing was.
            took_s: what that request took.
        """
        self._usual += _NEWEST * (rows - self._usual)
        if expected_s:
            wrong = took_s - expected_s - self._late
            self._late += _NEWEST * wrong
            self._uneven += _NEWEST * (abs(wrong) - self._uneven)
        else:
            # What was learned in a rush is forgotten after it: whoever is turned away for it cannot disprove it.
            self._late *= 1 - _NEWEST
            self._uneven *= 1 - _NEWEST

    @property
    def late_s(self) -> float:
        """By how much to distrust a long prediction: what the profile cannot see, and how unevenly it comes.

        Mean and mean deviations, as TCP keeps them for its time-out (Jacobson, Congestion Avoidance and Control, 1988),
        so that of those admitted hardly one in a hundred is late.
        """
        return max(0.0, self._late + _CAUTION * self._uneven)

    def finish(self, now: float, rows: int, waiting: int, busy_until: Sequence[float], streams: int) -> float:
        """When the last of `rows` samples that come now would be answered, in seconds of the clock of `now`.

        Args:
            now: the time.
            rows: of the request.
            waiting: samples before it in the queue.
            busy_until: when each batch that runs now is expected to end, in any order.
            streams: how many can run at once.
        """
        batches = -(-(waiting + rows) // self._max_batch)
        size = waiting + rows - (batches - 1) * self._max_batch
        if batches > 1 or len(busy_until) >= streams:
            size = max(size, round(self._usual))  # while it waits, others join its batch
        last = self._profile.seconds(size)
        if batches == 1:
            return (now if len(busy_until) < streams else max(now, min(busy_until))) + last
        # A long queue keeps all streams busy: all but its end is work shared out evenly.
        full = self._profile.seconds(self._max_batch)
        free = [max(now, end) for end in busy_until] + [now] * (streams - len(busy_until))
        skipped = max(0, batches - _REPLAYED) // streams
        free = [end + skipped * full for end in free]
        heapq.heapify(free)
        for _ in range(batches - 1 - skipped * streams):
            heapq.heapreplace(free, free[0] + full)
        return free[0] + last

    def backlog_s(self, waiting: int, streams: int) -> float:
        """Seconds until `waiting` samples are answered: after so long it is worth asking again."""
        return -(-waiting // (self._max_batch * streams)) * self._profile.seconds(self._max_batch)
