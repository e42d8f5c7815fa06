"""How many requests a window needs: for a proof, for a search, for an interim analysis, and for its warm-up."""

from __future__ import annotations

import math

from rushhour.goal import SLO
from rushhour.load.significance import ERROR, needed_n

WARMUP_S = 2.0
"""Of every part of a window."""
_WARMUP_REQUESTS = 200
_WARMUP_MOST_S = 10.0
_LATE, _FEWEST_LATE = 10, 1
_STRETCH = 3.0
_SEARCH_MOST_S = 10.0
_LIMITS = 20.0
_FIRST_ANALYSIS_S = 5.0


def window_n(slo: SLO, rate_rps: float, window_s: float = 3.0, error: float = ERROR) -> int:
    """The number of requests in a window: `window_s` long, longer where the SLO needs it.

    It needs enough requests for a clear verdict (10 late ones allowed), or at least for a possible one (1 late one)
    where the former would take three times as long as asked. And it lasts 20 times the limit or more: with a backlog
    that grows by 5% of the time, a server over its capacity exceeds the limit within that time.

    Args:
        slo: the SLO.
        rate_rps: requests per second.
        window_s: length of the window.
        error: how often a rate that does not hold may pass.
    """
    seconds = max(window_s, _LIMITS * slo.limit_s)
    clear, least = needed_n(slo, _LATE, error), needed_n(slo, _FEWEST_LATE, error)
    clear = min(clear, max(least, math.ceil(rate_rps * seconds * _STRETCH)))
    return max(clear, math.ceil(rate_rps * seconds))


def search_window_n(slo: SLO, rate_rps: float, window_s: float) -> int:
    """The number of requests in a window of a search, which proves little: as few as allow one late request.

    Where these would take more than 10 s, as many as arrive in 10 s: then it only shows whether many are late.
    """
    fewest = min(needed_n(slo, _FEWEST_LATE), math.ceil(rate_rps * _SEARCH_MOST_S))
    return max(math.ceil(rate_rps * max(window_s, _LIMITS * slo.limit_s)), fewest)


def interim_sizes(slo: SLO, rate_rps: float, n: int) -> tuple[int, ...]:
    """The numbers of requests at which a window that grows up to `n` is analysed: each twice the last, `n` at the end.

    The first is after 5 s, 20 times the limit, and as many requests as a clear verdict needs, whichever is longest.
    """
    first = max(math.ceil(rate_rps * max(_FIRST_ANALYSIS_S, _LIMITS * slo.limit_s)), needed_n(slo, _LATE))
    sizes = [n]
    while sizes[0] / 2 >= first:
        sizes.insert(0, sizes[0] // 2)
    return tuple(sizes)


def warmup_n(rate_rps: float, warmup_s: float = WARMUP_S, *, is_warm: bool = False) -> int:
    """The number of requests in a warm-up: `warmup_s` long, and at least 200 requests or 10 s unless it is warm."""
    least = 1 if is_warm else min(_WARMUP_REQUESTS, math.ceil(rate_rps * _WARMUP_MOST_S))
    return max(math.ceil(rate_rps * warmup_s), least)


def why_longer(slo: SLO, rate_rps: float, window_s: float) -> str:
    """How long `measure` may take at this rate, and why, where that is longer than asked for; else empty.

    Args:
        slo: the SLO.
        rate_rps: requests per second.
        window_s: that was asked for.
    """
    n, warmup = window_n(slo, rate_rps, window_s), warmup_n(rate_rps)
    parts = len(interim_sizes(slo, rate_rps, n))
    takes_s = (n + parts * warmup) / rate_rps
    if takes_s <= 1.5 * window_s + WARMUP_S + 1:
        return ""
    reasons = []
    if n > math.ceil(rate_rps * window_s):
        because = f"a verdict on {slo} takes {n:,} requests"
        if n == math.ceil(rate_rps * _LIMITS * slo.limit_s):
            because = f"a growing queue shows after {_LIMITS:g} times the limit"
        reasons.append(f"{because} ({n / rate_rps:.0f} s)")
    each = f"each of its {parts} parts begins" if parts > 1 else "it begins"
    reasons.append(f"{each} with {warmup:,} requests of warm-up ({warmup / rate_rps:.0f} s)")
    return f"{rate_rps:g} requests/s take up to {takes_s:.0f} s, not {window_s:g} s: {'; '.join(reasons)}"
