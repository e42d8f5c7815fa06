"""When requests arrive: whole schedules, made beforehand from a seed, so that no server can slow its own crowd down."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from rushhour.errors import LoadError


def poisson(
    rate_rps: float, *, n: int | None = None, duration_s: float | None = None, seed: int
) -> NDArray[np.float64]:
    """Arrivals of a crowd of many independent users (MLPerf LoadGen's Server scenario).

    Args:
        rate_rps: requests per second, on average.
        n: how many arrivals, or
        duration_s: for how long; exactly one of the two.
        seed: the same seed gives the same arrivals; a longer schedule begins like a shorter one.

    Returns:
        Seconds from the start, ascending, shape `(n,)`.

    Raises:
        LoadError: if the rate, the number or the duration is not above zero.
    """
    if not (math.isfinite(rate_rps) and rate_rps > 0):
        raise LoadError(f"cannot send {rate_rps:g} requests per second", "a rate is above zero", "use --rate 100")
    if (n is None) == (duration_s is None):
        raise ValueError(f"give either n or duration_s, but got n={n} and duration_s={duration_s}")
    if n is not None:
        if n < 1:
            raise LoadError(f"cannot send {n} requests", "a load is at least one request", "use a larger number")
        return np.cumsum(np.random.default_rng(seed).exponential(1 / rate_rps, n))
    assert duration_s is not None
    if not (math.isfinite(duration_s) and duration_s > 0):
        raise LoadError(f"cannot send requests for {duration_s:g} s", "a time is above zero", "use --duration 10s")
    expected = rate_rps * duration_s
    enough = math.ceil(expected + 10 * math.sqrt(expected) + 10)  # ten standard deviations above what is expected
    arrivals = np.cumsum(np.random.default_rng(seed).exponential(1 / rate_rps, enough))
    return arrivals[arrivals <= duration_s]
