"""What all windows of a search say together of a capacity, proven or not.

Every window, at whatever rate and however long, tells a share of late requests. More load makes no server faster, so
the shares rise with the rate: isotonic regression (Barlow et al. 1972) fits them, weighted by their requests. The
estimate is the rate at which the fit crosses the share that the SLO allows. Its interval comes from resampling the
windows by blocks of neighbours, so that bursts count as what they are.
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
_TOLD = (Outcome.PASS, Outcome.FAIL, Outcome.UNSTABLE, Outcome.INCONCLUSIVE)
"""Outcomes of windows in which the server was asked at the rate, on a machine that let it answer."""
_NOT_ITSELF = 0.5
"""Of a core: a generator that uses less was held up by the machine, and not near its own limit."""
_BEHIND = 0.5
"""A server that falls behind is late for all in the end, whatever share was late in a short window: at least this."""


class Estimate(msgspec.Struct, frozen=True):
    """A capacity, estimated.

    Attributes:
        rate_rps: at which the share of late requests crosses what the SLO allows.
        interval_rps: its 95% interval.
        bounded: whether any window lay above; without one it is the highest rate that was tried.
        requests: that it rests on.
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
    """Four digits, and none of them as a power of ten."""
    return f"{rate:,.0f}" if rate >= 1000 else f"{rate:.4g}"


def estimate(windows: Sequence[Measurement], slo: SLO, *, seed: int = 0) -> Estimate | None:
    """The capacity that these windows of one server tell; None where the SLO held in no window.

    Where it held in some, and others at rates no higher were worse, it is the lowest rate at which it was seen to hold:
    a host that became slower meanwhile is no reason to say that nothing ever held.

    Args:
        windows: any; those that say nothing of the server are left out, see `tells`.
        slo: what is asked; the windows' own.
        seed: of the resampling.
    """
    told = sorted((window for window in windows if tells(window)), key=lambda window: window.rate_rps)
    if not told:
        return None
    rates = np.log([window.rate_rps for window in told])
    weights = np.array([float(window.n) for window in told])
    allowed = slo.allowed_miss_rate
    best = _crossing(rates, np.array([[_share(window, window.late / window.n)] for window in told]), weights, allowed)
    if not math.isfinite(best[0]):
        return _seen(told)
    found = _crossing(rates, _resampled(told, np.random.default_rng(seed)), weights, allowed)
    held = np.where(np.isfinite(found), found, rates[0])
    low, high = (math.exp(float(value)) for value in np.quantile(held, [0.025, 0.975]))
    rate = math.exp(float(best[0]))
    highest = math.exp(float(rates[-1]))
    bounded = rate < highest * (1 - 1e-9)
    return Estimate(rate, (min(low, rate), max(high, rate)), bounded, sum(window.n for window in told))


def _seen(told: Sequence[Measurement]) -> Estimate | None:
    held = [window.rate_rps for window in told if window.keeps_slo and not window.outcome.refutes]
    if not held:
        return None
    return Estimate(min(held), (min(told[0].rate_rps, min(held)), max(held)), True, sum(window.n for window in told))


def tells(window: Measurement) -> bool:
    """Whether a window says something of the server, which an undisturbed one always does.

    Where the machine was disturbed, or the generator held up, and hardly any request was late all the same, the server
    carried the rate in spite of it: that proves nothing, but it is seen. Where many were late, who knows why.
    """
    if not window.n or window.outcome in _TOLD:
        return bool(window.n)
    is_held_up = window.outcome is Outcome.VOID or window.generator_cpu < _NOT_ITSELF
    return is_held_up and window.keeps_slo


def _share(window: Measurement, late: float) -> float:
    return max(late, _BEHIND) if window.outcome is Outcome.UNSTABLE else late


def _resampled(told: Sequence[Measurement], random: np.random.Generator) -> NDArray[np.float64]:
    """Shares of late requests, shape `(windows, resamples)`."""
    rows = []
    for window in told:
        if window.blocks:
            blocks = np.array(window.blocks, dtype=np.float64)
            drawn = blocks[random.integers(0, len(blocks), (_RESAMPLES, len(blocks)))]
            shares = drawn.sum(axis=1) / max(1, len(blocks) * (window.n // len(blocks)))
        else:
            shares = random.binomial(window.n, window.late / window.n, _RESAMPLES) / window.n
        rows.append(np.array([_share(window, float(share)) for share in shares]))
    return np.array(rows)


def _crossing(
    rates: NDArray[np.float64], shares: NDArray[np.float64], weights: NDArray[np.float64], allowed: float
) -> NDArray[np.float64]:
    """Log rate at which the fit of each column of `shares` crosses `allowed`; minus infinity where it is above at all.

    Args:
        rates: ascending, shape `(windows,)`.
        shares: shape `(windows, columns)`.
        weights: shape `(windows,)`.
    """
    levels, where = np.unique(rates, return_inverse=True)
    found = []
    together = np.bincount(where, weights).astype(np.float64)
    for column in shares.T:
        fit = _isotonic(np.bincount(where, weights * column) / together, together)
        held = np.nonzero(fit <= allowed)[0]
        if not len(held):
            found.append(-math.inf)
            continue
        last = int(held[-1])
        if last == len(levels) - 1:
            found.append(float(levels[last]))
            continue
        part = (allowed - fit[last]) / (fit[last + 1] - fit[last])
        found.append(float(levels[last] + part * (levels[last + 1] - levels[last])))
    return np.array(found)


def _isotonic(values: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """The non-decreasing values nearest to these, by pooling adjacent violators."""
    pools: list[tuple[float, float, int]] = []  # value, weight, length
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        pools.append((value, weight, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, wa, na), (b, wb, nb) = pools.pop(-2), pools.pop()
            pools.append(((a * wa + b * wb) / (wa + wb), wa + wb, na + nb))
    return np.concatenate([np.full(length, value) for value, _, length in pools])
