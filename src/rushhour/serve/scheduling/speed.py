"""The host's speed: the durations of the server's own batches, relative to the profile of the start.

Another process on the same core slows computing, and neither steal time nor late wake-ups show it. The batches do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import msgspec
import numpy as np

from rushhour.capacity import ServiceProfile
from rushhour.measurement import ServiceTimes

INTERVAL_S = 0.1
_KEPT = 3000
"""Intervals with a batch: five minutes, if every interval has one."""
_RECENT = 100
"""So many of them are the current speed."""


class Speeds(msgspec.Struct):
    """The expected and the measured times of batches, in intervals of 100 ms.

    Attributes:
        now: the time, in seconds of the machine's monotonic clock, which all worker processes share.
        parts: number of the interval (0 began at that clock's zero) -> seconds expected and seconds taken of the
            batches that ended in it, ascending. Intervals without a batch are left out.
    """

    now: float
    parts: dict[int, tuple[float, float]] = {}

    def shown(self) -> dict[str, Any]:
        """For clients, the newest interval last; `age_s` is counted from the middle of an interval."""
        return {
            "interval_s": INTERVAL_S,
            "age_s": [round(max(0.0, self.now - (part + 0.5) * INTERVAL_S), 3) for part in self.parts],
            "expected_s": [round(expected, 6) for expected, _ in self.parts.values()],
            "took_s": [round(took, 6) for _, took in self.parts.values()],
        }


def sum_speeds(each: Iterable[Speeds]) -> Speeds:
    """The speeds of several worker processes together.

    Args:
        each: at least one.
    """
    each = list(each)
    parts: dict[int, tuple[float, float]] = {}
    for number in sorted({number for speeds in each for number in speeds.parts}):
        pairs = [speeds.parts[number] for speeds in each if number in speeds.parts]
        parts[number] = (sum(expected for expected, _ in pairs), sum(took for _, took in pairs))
    return Speeds(max(speeds.now for speeds in each), parts)


class HostSpeed:
    """Adds up the expected and the measured times of batches.

    What is expected comes from the times before the first request. Unlike admission's profile they are not updated: a
    reference that follows the host cannot show by how much it changed.
    """

    def __init__(self) -> None:
        self._parts: deque[tuple[int, float, float]] = deque(maxlen=_KEPT)
        self._part = 0
        self._expected_s = 0.0
        self._took_s = 0.0

    def record(self, expected_s: float, ended: float, took_s: float) -> None:
        """A batch that was to take `expected_s` has ended, at `ended` on the clock, after `took_s`."""
        part = int(ended / INTERVAL_S)
        if part > self._part:  # streams may alternate between neighbouring intervals
            self._keep()
            self._part, self._expected_s, self._took_s = part, 0.0, 0.0
        self._expected_s += expected_s
        self._took_s += took_s

    def speeds(self, now: float) -> Speeds:
        """All intervals that are kept, at `now` on the clock."""
        self._keep()
        return Speeds(now, {part: (expected_s, took_s) for part, expected_s, took_s in self._parts})

    def recent(self) -> float | None:
        """The speed over the last 100 intervals with a batch, 1 as at the start; None before the first."""
        self._keep()
        pairs = list(islice(reversed(self._parts), _RECENT))
        took_s = sum(took for _, _, took in pairs)
        return sum(expected for _, expected, _ in pairs) / took_s if took_s > 0 else None

    def _keep(self) -> None:
        """Store the current interval, in place of what was stored of it before."""
        if self._took_s > 0:
            if self._parts and self._parts[-1][0] == self._part:
                self._parts.pop()
            self._parts.append((self._part, self._expected_s, self._took_s))


def expected_seconds(times: ServiceTimes) -> Callable[[Any], float]:
    """How long a batch of so many samples, or of so much work, takes by these times."""
    if isinstance(times.positions, msgspec.UnsetType):
        return ServiceProfile(times).seconds
    # Work is no whole number where samples differ in size.
    slope, base = np.polyfit(times.batch_sizes, times.seconds, 1) if len(times.seconds) > 1 else (0.0, times.seconds[0])
    least = min(times.seconds) / 16  # of a line that crosses zero

    def seconds(work: float) -> float:
        return max(least, float(base + slope * work))

    return seconds
