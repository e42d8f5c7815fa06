"""The estimate of a capacity from all windows of a search, proven or not.

Every window, at any rate and of any length, gives a miss rate. More load makes no server faster, so miss rates rise
with the rate: isotonic regression (Barlow et al. 1972) fits them, weighted by their requests. The estimate is the rate
at which the fit crosses the miss rate that the SLO allows. Its interval comes from a block bootstrap of the windows,
which keeps their autocorrelation. Between two rates that were tried the miss rate rises by an unknown power: near its
capacity a queue hardly misses, then suddenly does. The estimate takes the straight line, which is the cautious end; the
interval covers powers up to `_STEEPEST`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from rushhour.goal import SLO
from rushhour.measurement import Interval, Measurement, Outcome

_RESAMPLES = 1_000
_VALID = (Outcome.PASS, Outcome.FAIL, Outcome.UNSTABLE, Outcome.INCONCLUSIVE)
"""Outcomes of windows in which the server was tested at the rate, on an undisturbed machine."""
_DELAYED_CPU = 0.5
"""Of a core: a generator that uses less was delayed by the machine, and is not near its own limit."""
_STEEPEST = 10.0
"""Power by which the miss rate may rise between two rates."""
_UNSTABLE_MISS_RATE = 0.5
"""At least: the miss rate of a server that falls behind goes to 1, whatever it is in a short window."""


class Estimate(msgspec.Struct, frozen=True):
    """An estimated capacity.

    Attributes:
        rate_rps: at which the miss rate crosses what the SLO allows.
        interval_rps: its 95% interval.
        bounded: whether any window was above it; if not, it is the highest rate that was tried.
        requests: in all windows.
    """

    rate_rps: float
    interval_rps: Interval
    bounded: bool
    requests: int

    def __str__(self) -> str:
        low, high = self.interval_rps
        least = "" if self.bounded else "at least "
        rate, low_, high_ = map(_readable, (self.rate_rps, low, high))
        return f"{least}{rate} requests/s ({low_} to {high_}; estimated, not proven)"


def _readable(rate: float) -> str:
    """Four digits, without an exponent."""
    return f"{rate:,.0f}" if rate >= 1000 else f"{rate:.4g}"


def estimate(windows: Sequence[Measurement], slo: SLO, *, seed: int = 0) -> Estimate | None:
    """The capacity by these windows of one server; None where the SLO held in no window.

    Where it held in some, and windows at rates no higher were worse, it is the lowest rate at which it held: the host
    may have become slower meanwhile.

    Args:
        windows: any; those that are not informative are left out, see `is_informative`.
        slo: of the windows.
        seed: of the resampling.
    """
    informative = sorted((each for each in windows if is_informative(each)), key=lambda window: window.rate_rps)
    if not informative:
        return None
    rates = np.log([window.rate_rps for window in informative])
    weights = np.array([float(window.n) for window in informative])
    allowed = slo.allowed_miss_rate
    shares = np.array([[_miss_rate(window, window.late / window.n)] for window in informative])
    best = _crossing(rates, shares, weights, allowed)
    if not math.isfinite(best[0]):
        return _lowest_held(informative)
    random = np.random.default_rng(seed)
    found = _crossing(rates, _resampled(informative, random), weights, allowed, _powers(random))
    held = np.where(np.isfinite(found), found, rates[0])
    low, high = (math.exp(float(value)) for value in np.quantile(held, [0.025, 0.975]))
    rate = math.exp(float(best[0]))
    highest = math.exp(float(rates[-1]))
    bounded = rate < highest * (1 - 1e-9)
    return Estimate(rate, (min(low, rate), max(high, rate)), bounded, sum(window.n for window in informative))


def _lowest_held(windows: Sequence[Measurement]) -> Estimate | None:
    held = [window.rate_rps for window in windows if window.keeps_slo and not window.outcome.refutes]
    if not held:
        return None
    interval = (min(windows[0].rate_rps, min(held)), max(held))
    return Estimate(min(held), interval, True, sum(window.n for window in windows))


def is_informative(window: Measurement) -> bool:
    """Whether a window informs about the server. An undisturbed one always does.

    Where the machine was disturbed, or the generator delayed, and still few requests were late, the server kept up with
    the rate: that is no proof, but it is information. Where many were late, the cause is not known.
    """
    if not window.n or window.outcome in _VALID:
        return bool(window.n)
    is_delayed = window.outcome is Outcome.VOID or window.generator_cpu < _DELAYED_CPU
    return is_delayed and window.keeps_slo


def _miss_rate(window: Measurement, late: float) -> float:
    return max(late, _UNSTABLE_MISS_RATE) if window.outcome is Outcome.UNSTABLE else late


def _resampled(windows: Sequence[Measurement], random: np.random.Generator) -> NDArray[np.float64]:
    """Miss rates of resampled windows, shape `(windows, resamples)`."""
    rows = []
    for window in windows:
        if window.blocks:
            blocks = np.array(window.blocks, dtype=np.float64)
            drawn = blocks[random.integers(0, len(blocks), (_RESAMPLES, len(blocks)))]
            shares = drawn.sum(axis=1) / max(1, len(blocks) * (window.n // len(blocks)))
        else:
            shares = random.binomial(window.n, window.late / window.n, _RESAMPLES) / window.n
        rows.append(np.array([_miss_rate(window, float(share)) for share in shares]))
    return np.array(rows)


def _powers(random: np.random.Generator) -> NDArray[np.float64]:
    """By which the miss rate rises, one for each resample: from 1 to the steepest, even in their logarithms."""
    return np.exp(random.uniform(0.0, math.log(_STEEPEST), _RESAMPLES))


def _crossing(
    rates: NDArray[np.float64],
    shares: NDArray[np.float64],
    weights: NDArray[np.float64],
    allowed: float,
    powers: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """Log rate at which the fit of each column of `shares` crosses `allowed`; minus infinity where all of it is above.

    Args:
        rates: ascending, shape `(windows,)`.
        shares: shape `(windows, columns)`.
        weights: shape `(windows,)`.
        powers: by which the miss rate rises between two rates, shape `(columns,)`; None for a straight line.
    """
    levels, where = np.unique(rates, return_inverse=True)
    found = []
    total = np.bincount(where, weights).astype(np.float64)
    for column, power in zip(shares.T, np.ones(shares.shape[1]) if powers is None else powers, strict=True):
        fit = _isotonic(np.bincount(where, weights * column) / total, total)
        held = np.nonzero(fit <= allowed)[0]
        if not len(held):
            found.append(-math.inf)
            continue
        last = int(held[-1])
        if last == len(levels) - 1:
            found.append(float(levels[last]))
            continue
        part = ((allowed - fit[last]) / (fit[last + 1] - fit[last])) ** (1 / power)
        found.append(float(levels[last] + part * (levels[last + 1] - levels[last])))
    return np.array(found)


def _isotonic(values: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """The non-decreasing least-squares fit, by pooling adjacent violators."""
    pools: list[tuple[float, float, int]] = []  # value, weight, length
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        pools.append((value, weight, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, wa, na), (b, wb, nb) = pools.pop(-2), pools.pop()
            pools.append(((a * wa + b * wb) / (wa + wb), wa + wb, na + nb))
    return np.concatenate([np.full(length, value) for value, _, length in pools])
