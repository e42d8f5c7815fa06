"""Evidence: what the latencies of a window prove of an SLO, for it and against it.

A miss rate is proven by two tests, and both must hold. The first is the binomial test of the count of late requests,
with their bursts discounted. It alone passes a queue at exactly its limit in about every second window of 10 s: the
latency of a queue is correlated over seconds, a short window may hold none of its slow periods, and late requests that
did not occur cannot show it. So the second test asks for enough independent evidence; the autocorrelation is estimated
from latencies that are slow often enough to be seen (`Evidence`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from rushhour.goal import SLO
from rushhour.load.significance import chi_squared_quantile, passes
from rushhour.load.verdict.autocorrelation import long_variance_inflation, variance_inflation

_SLOW = 0.9
_TAIL = 0.3
_NEAR, _FAR_BELOW = 2.0, 1 / 20
_CAUTION = 3.0
_HOPELESS = 0.01
_LONGER = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0, 20.0, 24.0, 32.0)


class Evidence:
    """What the latencies of a window prove of an SLO.

    Args:
        latencies: of all requests in the order of the schedule, infinite where there was no answer.
        slo: the SLO.
        shed: number of requests that were shed.
        errors: number of requests that ended in errors or without an answer. With any the tail proves nothing.

    The binomial test of the late requests has to hold with bursts discounted. Then it has to hold with the
    autocorrelation discounted that the slowest tenth of the requests shows. Where the window is too short for that, the
    tail may prove it: the tail of a queue's latency is exponential (Asmussen, Applied Probability and Queues, XIII.5).
    With the slowest 30% beyond u, and m their mean excess over u, P(over the limit) is 0.3 e^(-(limit - u) / m). The
    effective sample size of the tail gives an upper bound of m (of the gamma distribution), and with that bound P has
    to be within what the SLO allows. A tail that falls faster, as behind a batching server, is judged too strictly,
    never too leniently.

    Where the host's own speed varies over seconds, the slowest 30% are those of its slow periods, of which a window
    sees few. Then the latencies just beyond the percentile are better evidence: the host's speed matters less there
    than the queue. So the slowest 2%, for p99, may prove it in the same way, with their own autocorrelation. Little is
    extrapolated, and the risk is chance: so it counts only if the tail has fallen to a twentieth of what is allowed.

    A server that sheds load cuts its own tail off: in a slow period no more requests are late than arrive above its
    capacity. So where most of the late requests were shed, they are discounted by their own autocorrelation. They may
    be few, and then the tail may still prove it. A shed request would have taken longer than any that was answered,
    and how much longer need not be known (a censored sample); what has to be rare is to reach the latency of the
    slowest answer, because there the server sheds.

    A variance inflation estimated from 20 blocks is uncertain, and too small just where a window was lucky: its excess
    over 1 counts three times, which gives an error of 5% in simulated queues.
    """

    def __init__(self, latencies: NDArray[np.float64], slo: SLO, shed: int, errors: int) -> None:
        late = latencies > slo.limit_s
        self._slo = slo
        self._n, self._late = len(latencies), int(late.sum())
        self._bursts = variance_inflation(late)
        self._own, slow = (
            long_variance_inflation(late),
            long_variance_inflation(latencies > np.quantile(latencies, _SLOW, method="lower")),
        )
        inflation = 1 + _CAUTION * (max(self._own, slow) - 1)
        mostly_shed = shed and 2 * shed >= self._late
        self._counted = 1 + _CAUTION * (self._own - 1) if mostly_shed else inflation
        self._tails = () if errors else tuple(_tails(latencies, slo, inflation))
        p99 = float(np.quantile(latencies, 0.99, method="higher"))
        self._p99 = f", p99 {p99 * 1e3:.3g} ms" if math.isfinite(p99) else ""

    @property
    def summary(self) -> str:
        """For people: `19 of 2,000 late, p99 48.2 ms`."""
        return f"{self._late:,} of {self._n:,} late{self._p99}"

    @property
    def allowed(self) -> str:
        """For people, the late requests that the SLO allows in this window: `p99<50ms allows 20`."""
        return f"{self._slo} allows {math.floor(self._n * self._slo.allowed_miss_rate):,}"

    @property
    def exceeds(self) -> bool:
        """Whether more requests were late than the SLO allows."""
        return self._late > self._n * self._slo.allowed_miss_rate

    def proves(self, significance: float, longer: float = 1.0) -> bool:
        """Whether the SLO is proven; with `longer`, whether a window so many times as long would prove it."""
        n, late, allowed = self._n * longer, self._late * longer, self._slo.allowed_miss_rate
        if not passes(n / self._bursts, late / self._bursts, allowed):
            return False
        if passes(n / self._counted, late / self._counted, allowed, significance):
            return True
        return any(tail.proves(significance, longer) for tail in self._tails)

    def refutes(self, significance: float) -> bool:
        """Whether it is proven that the SLO does not hold, with the late requests' own autocorrelation discounted."""
        inflation = 1 + _CAUTION * (self._own - 1)
        n, on_time = self._n / inflation, (self._n - self._late) / inflation
        return passes(n, on_time, 1 - self._slo.allowed_miss_rate, significance)

    def hopeless(self, share: float) -> str:
        """Why no longer window is likely to pass; empty if one may.

        Either it could not pass if no further request were late, or the rate does not hold with 99% confidence.

        Args:
            share: of the planned requests, measured so far.
        """
        allowed = self._slo.allowed_miss_rate
        if not passes(self._n / share, self._late, allowed):
            return f"{self.summary}: too many to pass in a longer window. Try a lower rate"
        n, on_time = self._n / self._own, (self._n - self._late) / self._own
        if passes(n, on_time, 1 - allowed, _HOPELESS):
            return f"{self.summary}, and {self.allowed}: a longer window is unlikely to pass. Try a lower rate"
        return ""

    def lacking(self, needs_s: float | None = None) -> str:
        """What is missing for a proof, and how much longer it would take at this rate.

        Args:
            needs_s: from `needs_s`.
        """
        if self.exceeds:
            return f"{self.summary}, and {self.allowed}: too few requests for a proof either way. Try a lower rate"
        effective = self._n / max(self._bursts, self._counted)
        is_correlated = effective < 0.9 * self._n
        why = (
            f", but latency is autocorrelated (effective sample size {effective:,.0f})"
            if is_correlated
            else f", and {self.allowed}: too close to the limit for a proof"
        )
        if needs_s is None:
            return f"{self.summary}{why}. A lower rate is proven sooner"
        return f"{self.summary}{why}. About {_duration(needs_s)} more at this rate would decide"

    def needs_s(self, duration_s: float, error: float) -> float | None:
        """Seconds more that would prove the SLO, if latencies stay as they are; None beyond 32 times the window.

        Args:
            duration_s: of the window.
            error: how often a rate that does not hold may pass.
        """
        for longer in _LONGER:
            if self.proves(error, longer):
                return (longer - 1) * duration_s
        return None


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def _tails(latencies: NDArray[np.float64], slo: SLO, inflation: float) -> Iterator[_Tail]:
    """The tails that may prove the SLO: the slowest 30%, and twice as many as may be late if few of them would be."""
    share = min(1.0, _NEAR * slo.allowed_miss_rate)
    own = 1 + _CAUTION * (long_variance_inflation(latencies > np.quantile(latencies, 1 - share, method="lower")) - 1)
    near = _Tail.of(latencies, slo, share, own)
    if 3 * slo.allowed_miss_rate <= _TAIL and (tail := _Tail.of(latencies, slo, _TAIL, inflation)):
        yield tail
    if near is not None and near.miss_rate <= _FAR_BELOW * slo.allowed_miss_rate:
        yield near


@dataclasses.dataclass(frozen=True)
class _Tail:
    """The slowest requests, as an exponential tail in which the limit lies.

    An infinite latency is that of a shed request: it counts as one as slow as the slowest answer, and is no evidence.

    Attributes:
        share: of all requests.
        mean_s: mean excess over the latency at which the tail begins.
        end_s: distance from there to the limit.
        steps: the limit has to lie this many means away.
        evidence: number of requests in the tail that were answered.
        inflation: of their variance.
    """

    share: float
    mean_s: float
    end_s: float
    steps: float
    evidence: float
    inflation: float

    @classmethod
    def of(cls, latencies: NDArray[np.float64], slo: SLO, share: float, inflation: float) -> _Tail | None:
        """None where the limit is not in the tail, or no request of it was answered."""
        start = float(np.quantile(latencies, 1 - share, method="lower"))
        if not math.isfinite(start):
            return None
        slowest = latencies[latencies > start] - start
        answered = slowest[np.isfinite(slowest)]
        steps = math.log(share / slo.allowed_miss_rate)
        if not len(answered):
            beyond = len(slowest) or start >= slo.limit_s
            return None if beyond else cls(share, 0.0, slo.limit_s - start, steps, 1.0, inflation)
        furthest, end = float(answered.max()), slo.limit_s - start
        if len(answered) < len(slowest):
            end = min(end, furthest)
        mean = float(np.minimum(slowest, furthest).sum()) / len(answered)
        return cls(share, mean, end, steps, share * len(latencies) * len(answered) / len(slowest), inflation)

    @property
    def miss_rate(self) -> float:
        """The estimated miss rate where the limit lies in the tail; else the share of the tail."""
        if self.end_s <= 0:
            return self.share
        return self.share * math.exp(-self.end_s / self.mean_s) if self.mean_s else 0.0

    def proves(self, significance: float, longer: float) -> bool:
        """Whether the limit is far enough away even with the upper bound of the mean."""
        freedom = max(2.0, 2 * longer * self.evidence / self.inflation)  # the effective sample size is at least 1
        return self.mean_s * self.steps * freedom < self.end_s * chi_squared_quantile(significance, freedom)
