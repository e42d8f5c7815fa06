"""Traffic: when requests arrive, as one schedule of which every rate uses a scaled copy (common random numbers)."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import ArrayLike, NDArray

_ROOM = 2.0


@dataclasses.dataclass(frozen=True, eq=False)
class Traffic:
    """Arrivals at any rate.

    They are regular or random in a time of their own, in which one request arrives each second on average. Bursts are
    parts in which that time runs faster than the clock: at every rate they come at the same moments.

    Attributes:
        units: arrivals in that time, ascending, shape `(n,)`.
        clock_s: moments on the clock, ascending from 0, shape `(k,)`; none where the two times are proportional.
        passed_s: how far that time is at these moments, at one request per second, shape `(k,)`.
    """

    units: NDArray[np.float64]
    clock_s: NDArray[np.float64] = dataclasses.field(default_factory=lambda: np.empty(0))
    passed_s: NDArray[np.float64] = dataclasses.field(default_factory=lambda: np.empty(0))

    @classmethod
    def poisson(cls, n: int, seed: int = 0) -> Traffic:
        """`n` arrivals of independent users."""
        return cls(np.cumsum(np.random.default_rng(seed).exponential(1.0, n)))

    @classmethod
    def recorded(cls, seconds: ArrayLike) -> Traffic:
        """Recorded arrivals, scaled in time to each rate.

        Args:
            seconds: ascending, from any zero, shape `(n,)` with at least two different ones.
        """
        times = np.asarray(seconds, dtype=np.float64)
        gap = (times[-1] - times[0]) / (len(times) - 1)
        return cls((times - times[0]) / gap + 1.0)

    @classmethod
    def bursty(
        cls, n: int, seed: int = 0, *, intensity: float, share: float, burst_s: float, longest_s: float = 600.0
    ) -> Traffic:
        """`n` arrivals of a Poisson process that switches between a calm and a burst state (MMPP-2).

        Args:
            n: how many.
            seed: of arrivals and states.
            intensity: the rate in a burst over that in the calm state.
            share: of the time in bursts.
            burst_s: mean length of a burst; lengths are exponentially distributed.
            longest_s: bursts are drawn for that long; afterwards the rate is the mean.
        """
        random = np.random.default_rng([seed, 1])
        calm = 1 / (1 + share * (intensity - 1))
        is_burst = np.arange(2 * int(_ROOM + longest_s * share / burst_s)) % 2 == int(random.random() < share)
        lengths = random.exponential(1.0, len(is_burst)) * np.where(is_burst, burst_s, burst_s * (1 - share) / share)
        clock = np.concatenate([[0.0], np.cumsum(lengths)])
        passed = np.concatenate([[0.0], np.cumsum(lengths * np.where(is_burst, intensity * calm, calm))])
        after = n + passed[-1]  # far beyond the last arrival at 1/s or more
        clock, passed = np.append(clock, clock[-1] + after), np.append(passed, passed[-1] + after)
        return cls(cls.poisson(n, seed).units, clock, passed)

    def times(self, units: NDArray[np.float64], rates_rps: NDArray[np.float64]) -> NDArray[np.float64]:
        """Seconds at which that time is at `units`, at these rates."""
        seconds: NDArray[np.float64] = units / rates_rps
        return np.interp(seconds, self.passed_s, self.clock_s) if len(self.clock_s) else seconds

    def passed(self, seconds: NDArray[np.float64], rates_rps: NDArray[np.float64]) -> NDArray[np.float64]:
        """How far that time is at `seconds` on the clock, at these rates: the inverse of `times`."""
        if len(self.clock_s):
            seconds = np.interp(seconds, self.clock_s, self.passed_s)
        units: NDArray[np.float64] = seconds * rates_rps
        return units
