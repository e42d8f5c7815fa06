"""Steadiness: whether a window shows one steady state, so that percentiles describe it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rushhour.goal import SLO
from rushhour.load.generator.samples import Samples, Status
from rushhour.load.significance import differ
from rushhour.load.verdict.autocorrelation import BLOCKS, variance_inflation

_MIN_COMPLETED = 0.98
_HALVES_P = 0.01
_SLOPE_Z = 3.09  # one-sided p = .001
_SLOPE_SHARE = 0.25
_EACH_QUARTER = 0.1


def why_unstable(runs: Sequence[Samples], slo: SLO, rate_rps: float, benefit_s: float) -> str:
    """Why no percentile describes the window: the server answers fewer requests than arrive; empty where it keeps up.

    Args:
        runs: the parts of the window.
        slo: the SLO.
        rate_rps: of the window.
        benefit_s: subtracted from each latency, as in `decide`.
    """
    for run in runs:
        measured = run.measured()
        end = float(measured.scheduled[-1])
        # What was sent after the end of the schedule is the generator's delay.
        due = ~(measured.sent > end) & reached(measured, slo)
        in_time = measured.done <= end + slo.limit_s + benefit_s
        completed = float(np.count_nonzero(due & in_time)) / max(1, int(due.sum()))
        if completed < _MIN_COMPLETED:
            return f"the server fell behind: it answered {completed:.0%} of the requests in the window"
        growth = _growth(run)
        if growth >= max(3.0, rate_rps * (_SLOPE_SHARE * slo.limit_s + benefit_s)):
            return f"the server fell behind: requests in flight grew by {growth:.0f} during the window"
    return ""


def why_unsteady(late: NDArray[np.bool_]) -> str:
    """Why the two halves of the window come from different miss rates; empty where they agree."""
    inflation = variance_inflation(late)
    half = len(late) // 2
    first, second = int(late[:half].sum()), int(late[half:].sum())
    sizes = half / inflation, (len(late) - half) / inflation
    if differ(first / inflation, sizes[0], second / inflation, sizes[1], _HALVES_P):
        return f"latency is not stationary: {first:,} requests late in the first half, {second:,} in the second"
    return ""


def reached(window: Samples, slo: SLO) -> NDArray[np.bool_]:
    """Which requests count for the server, shape `(n,)`: all, unless the generator lacked connections. Then those that
    it sent early enough for an answer, as it gives a request up a fixed time after its schedule, however late it was
    sent."""
    if not window.starved:
        return np.ones(len(window), bool)
    late_by = window.sent - window.scheduled
    counts: NDArray[np.bool_] = (window.status == Status.OK) | (late_by <= window.timeout_s - slo.limit_s)
    return counts


def _growth(samples: Samples) -> float:
    """By how many the requests in flight at the server grew over the window; 0 where they show no upward trend.

    The trend is Mann and Kendall's test on 20 block means, which needs no distribution; the growth is the difference
    between the means of the last and the first quarter. A host that became slower during the window gives a trend too,
    but a step and not a slope: where a step fits the means better than a line, or a quarter of the window is hardly
    above the one before, there is none.
    """
    start, end = float(samples.scheduled[samples.warmup]), float(samples.scheduled[-1])
    times = np.linspace(start, end, 10 * BLOCKS)
    sent = np.sort(samples.sent[~np.isnan(samples.sent)])
    done = np.sort(samples.done[~np.isnan(samples.done)])
    in_flight = np.searchsorted(sent, times, "right") - np.searchsorted(done, times, "right")
    means = in_flight.reshape(BLOCKS, -1).mean(axis=1)
    score = float(np.sign(np.subtract.outer(means, means))[np.tril_indices(BLOCKS, -1)].sum())
    deviation = math.sqrt(BLOCKS * (BLOCKS - 1) * (2 * BLOCKS + 5) / 18)
    quarters = means.reshape(4, -1).mean(axis=1)
    growth = float(quarters[-1] - quarters[0])
    steady = bool((np.diff(quarters) >= _EACH_QUARTER * growth).all()) and not _is_step(means)
    return growth if score > _SLOPE_Z * deviation and steady else 0.0


def _is_step(means: NDArray[np.float64]) -> bool:
    """Whether two levels fit a series better than a line."""
    places = np.arange(len(means), dtype=np.float64)
    sloped = means - np.polyval(np.polyfit(places, means, 1), places)
    levels = min(
        float(part[0].var() * len(part[0]) + part[1].var() * len(part[1]))
        for part in (np.split(means, [at]) for at in range(1, len(means)))
    )
    return levels < float((sloped * sloped).sum())
