"""A race: which of two servers carries more inside the limit? Short windows in turn, until that is sure.

As many users as a server answers after 0.4 of the limit ask again as soon as they are answered, for a moment, of one
server and then of the other: A B, B A, A B, ... What counts is how many are answered in time, and of each pair of
windows the ratio. (Asked by a crowd for more than it can carry, a server answers now 3,500 a second and now 8,500, as
it turns more or fewer away; near its capacity hardly a request is late. Neither orders two servers in a minute.)

A host whose speed comes in waves of seconds slows both windows of a pair alike but where a wave begins between them,
and a burst of a neighbour spoils a pair now and then; such pairs lie far out. So only their signs count (the sign test,
exact whatever the ratios are distributed like), and the estimate is the median. In simulated waves and bursts that
orders two plans as often as any test that weighs the ratios, and sooner than most.

The race is looked at as it goes. Each look may spend a share of the error in proportion to its new pairs, and no more
is claimed of many rivals than of one: the error is shared out among them (Bonferroni).

Windows minutes apart, one server after the other, order nothing on such a host.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from rushhour.measurement import Interval

_ERROR = 0.04
"""How often one of several equal rivals may be called faster or slower than the incumbent."""
_TIE = 0.04
"""Two that are shown to lie no further apart than this are a tie: to tell more would cost time and change little."""
_LOOKS = (10, 15, 22, 32, 45, 54)
"""Pairs at which a race is looked at; with fewer than 10, hardly an outcome is rare enough."""

Ask = Callable[[int], float]
"""Answers in time per second in one short window of a server; asked for by its turn."""

_LEAST_RPS = 1e-3
"""What is counted for a window without an answer."""

Order = Literal["faster", "slower", "tie"]


class Race(msgspec.Struct, frozen=True):
    """How a race ended.

    Attributes:
        order: of the rival, against the incumbent. A tie is no proof that they are equal where the time was up.
        ratio: the rival's answers in time over the incumbent's.
        interval: its 95% interval.
        pairs: of windows that it took.
        throughput_rps: median of the incumbent's windows and of the rival's.
    """

    order: Order
    ratio: float
    interval: Interval
    pairs: int
    throughput_rps: tuple[float, float]

    @property
    def rival_leads(self) -> bool:
        """Whether the rival is the better choice: it is faster, or looks faster after a tie, where either may be."""
        return self.order == "faster" or (self.order == "tie" and self.ratio > 1)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.ratio:.2f}x ({low:.2f} to {high:.2f}) in {self.pairs} pairs of windows"


def race(incumbent: Ask, rival: Ask, *, rivals: int = 1, is_over: Callable[[], bool] = lambda: False) -> Race:
    """Race two servers.

    Args:
        incumbent: takes a window of the one to beat.
        rival: takes one of the other, with as many users and as long.
        rivals: that race this incumbent, all in all.
        is_over: whether no further pair is to begin: the time is up. The first look is always taken.

    Raises:
        LoadError: as the windows do.
    """
    servers = (incumbent, rival)
    seen: tuple[list[float], list[float]] = ([], [])
    spent = 0
    while True:
        pair = len(seen[0])
        for server in (0, 1) if pair % 2 == 0 else (1, 0):
            seen[server].append(max(servers[server](pair), _LEAST_RPS))
        pairs = pair + 1
        cut_off = pairs >= _LOOKS[0] and is_over()
        if pairs not in _LOOKS and not cut_off:
            continue
        ratios = [theirs / ours for ours, theirs in zip(*seen, strict=True)]
        allowed = _ERROR / rivals * (pairs - spent) / _LOOKS[-1]
        if 2 * 0.5**pairs <= allowed:  # else no outcome could decide, and what was not spent is left for the next look
            spent = pairs
        ratio, (low, high) = _median(ratios)
        order: Order | None = None
        if _significance(ratios) <= allowed:
            order = "faster" if ratio > 1 else "slower"
        elif 1 / (1 + _TIE) < low <= high < 1 + _TIE or cut_off or pairs == _LOOKS[-1]:
            order = "tie"
        if order is not None:
            medians = (statistics.median(seen[0]), statistics.median(seen[1]))
            return Race(order, ratio, (low, high), pairs, medians)


def _significance(ratios: Sequence[float]) -> float:
    """Of the sign test that the median of these is 1, two-sided."""
    above, below = sum(ratio > 1 for ratio in ratios), sum(ratio < 1 for ratio in ratios)
    return min(1.0, 2 * _at_most(min(above, below), above + below))


def _median(ratios: Sequence[float]) -> tuple[float, Interval]:
    """The median and its 95% interval: those of the ratios that the sign test would not call off the median."""
    ordered, n = sorted(ratios), len(ratios)
    off = 0  # so many on either side
    while 2 * _at_most(off, n) <= 0.05:
        off += 1
    lowest = max(0, off - 1)
    return statistics.median(ordered), (ordered[lowest], ordered[n - 1 - lowest])


def _at_most(k: int, n: int) -> float:
    """The chance of at most k heads among n coins."""
    return float(sum(math.comb(n, i) for i in range(k + 1)) / 2**n)
