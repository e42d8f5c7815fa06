"""A race: which of two servers has the higher throughput inside the limit? Short alternating windows, until it is sure.

Each window is a closed loop of as many users as a server answers within 0.4 of the limit, against one server and then
the other: A B, B A, A B, ... It counts the answers in time; each pair of windows gives a ratio. (Open-loop load above
the capacity gives 3,500 or 8,500 answers a second, depending on how many requests are shed; near the capacity hardly a
request is late. Neither orders two servers within a minute.)

A host whose speed varies over seconds slows both windows of a pair alike, unless the speed changes between them; a
burst of another process spoils single pairs. Such pairs are outliers. So only the signs count (the sign test, exact for
any distribution of the ratios), and the estimate is the median. In simulations it orders two plans as often as tests
that weigh the ratios, and sooner than most.

The race is analysed while it runs. Each interim analysis may spend a share of the error in proportion to its new pairs,
and several rivals share the error of one (Bonferroni).

Windows minutes apart, one server after the other, order nothing on such a host.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from rushhour.load.significance import coin_cdf, sign_test
from rushhour.measurement import Interval

_ERROR = 0.04
"""How often one of several equal rivals may be called faster or slower than the incumbent."""
_TIE = 0.04
"""Two servers are a tie if the interval of their ratio lies within this: a smaller difference matters little."""
_INTERIM_PAIRS = (10, 15, 22, 32, 45, 54)
"""Pairs at which a race is analysed; with fewer than 10, hardly a result is significant."""

MeasureThroughput = Callable[[int], float]
"""Measures answers in time per second in one short window of a server; the argument numbers the window."""

_LEAST_RPS = 1e-3
"""What is counted for a window without an answer."""

Order = Literal["faster", "slower", "tie"]


class Race(msgspec.Struct, frozen=True):
    """The result of a race.

    Attributes:
        order: of the rival, against the incumbent. After a time-out a tie does not prove that they are equal.
        ratio: the rival's answers in time over the incumbent's.
        interval: its 95% interval.
        pairs: pairs of windows measured.
        throughput_rps: median of the incumbent's windows and of the rival's.
    """

    order: Order
    ratio: float
    interval: Interval
    pairs: int
    throughput_rps: tuple[float, float]

    @property
    def rival_leads(self) -> bool:
        """Whether the rival is the better choice: it is faster, or after a tie its estimate is higher."""
        return self.order == "faster" or (self.order == "tie" and self.ratio > 1)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.ratio:.2f}x ({low:.2f} to {high:.2f}) in {self.pairs} pairs of windows"


def race(
    incumbent: MeasureThroughput,
    rival: MeasureThroughput,
    *,
    rivals: int = 1,
    is_over: Callable[[], bool] = lambda: False,
) -> Race:
    """Race two servers.

    Args:
        incumbent: measures a window of the server to beat.
        rival: measures one of the other, with as many users and as long.
        rivals: number of rivals that race this incumbent in total.
        is_over: whether the time is up, so that no further pair begins. The first interim analysis always takes place.

    Raises:
        LoadError: as the windows do.
    """
    servers = (incumbent, rival)
    measured: tuple[list[float], list[float]] = ([], [])
    spent = 0
    while True:
        pair = len(measured[0])
        for server in (0, 1) if pair % 2 == 0 else (1, 0):
            measured[server].append(max(servers[server](pair), _LEAST_RPS))
        pairs = pair + 1
        timed_out = pairs >= _INTERIM_PAIRS[0] and is_over()
        if pairs not in _INTERIM_PAIRS and not timed_out:
            continue
        ratios = [theirs / ours for ours, theirs in zip(*measured, strict=True)]
        allowed = _ERROR / rivals * (pairs - spent) / _INTERIM_PAIRS[-1]
        if 2 * 0.5**pairs <= allowed:  # else no result could be significant: the error is left for the next analysis
            spent = pairs
        ratio, (low, high) = _median(ratios)
        order: Order | None = None
        if _significance(ratios) <= allowed:
            order = "faster" if ratio > 1 else "slower"
        elif 1 / (1 + _TIE) < low <= high < 1 + _TIE or timed_out or pairs == _INTERIM_PAIRS[-1]:
            order = "tie"
        if order is not None:
            medians = (statistics.median(measured[0]), statistics.median(measured[1]))
            return Race(order, ratio, (low, high), pairs, medians)


def _significance(ratios: Sequence[float]) -> float:
    """Of the sign test that the median of these ratios is 1, two-sided."""
    return sign_test(sum(ratio > 1 for ratio in ratios), sum(ratio < 1 for ratio in ratios))


def _median(ratios: Sequence[float]) -> tuple[float, Interval]:
    """The median and its 95% interval: the ratios that the sign test does not reject as the median."""
    ordered, n = sorted(ratios), len(ratios)
    rejected = 0  # on either side
    while 2 * coin_cdf(rejected, n) <= 0.05:
        rejected += 1
    lowest = max(0, rejected - 1)
    return statistics.median(ordered), (ordered[lowest], ordered[n - 1 - lowest])
