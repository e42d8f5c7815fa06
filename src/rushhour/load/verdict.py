"""The verdict: does the SLO hold at this rate, how sure is that, and can it be known from this window at all?

Pure functions of samples. The order of questions, first answer wins:

1. Are there enough samples for any proof? If not: inconclusive, "insufficient samples".
2. Is there a steady state, and what do the misses prove? Where the machine was disturbed or the generator late, the
   server is given the benefit of it: what the canary and the generator lost at their 99th percentiles is taken off
   every latency first. A server that is unstable or fails even so is unstable or fails, whoever else was slow:
   an overloaded server on shared cores disturbs the canary itself, and must not hide behind that. It fails only if
   the misses prove that the SLO does not hold; what is proven neither way is inconclusive.
3. Was the generator the bottleneck (its CPU, its bound on connections, what it can send to a server that does
   nothing)? Then generator_limited: the server was not asked at this rate, or was asked in bunches.
4. Was the machine disturbed? Then void. It comes before the send delay, which a disturbed machine causes too.
5. Was the generator late? Then generator_limited.
6. Otherwise pass, or inconclusive. So a pass needs everything to be in order; no disturbance ever turns into one.

A miss rate is proven twice over. First by its count, with bursts discounted. That alone passes a queue at exactly its
limit in about every second window of 10 s. For a queue is slow in long waves, a short window easily misses the bad
ones, and misses that did not happen cannot show it. So, second, the window has to hold enough independent evidence,
where what is independent is learnt from what is slow often enough to be seen: see `_lacking`.

A window may be looked at while it grows, to end it as soon as it is decided. Looking often finds luck, so each look
may only spend a part of the 5% (`Look`): a group-sequential test. Without looks it is the test of fixed n. How often
either passes a queue at its limit, and 10% inside it, is simulated by `benchmarks/load.py`.

The speed of an ordinary host comes in waves of seconds, and no statistics of a window tell of what lies outside it. So
a window that may grow passes after 12 s at the earliest, a step in the queue is not taken for a slope, and a tail is
also judged from near its end, where few waves tell more (`_Evidence`). What that gives is simulated by
`benchmarks/noise_verdict.py`. A window that is short as a whole is judged by what it holds: its 5% are those of a host
whose speed lasts longer.

Sources: the binomial test is that of MLPerf Inference's Server scenario; spending: Lan and DeMets 1983, Kim and
DeMets 1987 (power family); exponential tails of queues: Asmussen, Applied Probability and Queues, XIII.5.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from rushhour.goal import SLO
from rushhour.load.generator.job import MAX_CONNECTIONS
from rushhour.load.generator.samples import Samples, Status, joined
from rushhour.measurement import Interval, Measurement, Outcome, pack_latencies
from rushhour.system.machine import open_files

CONFIDENCE = 0.95
ERROR = 1 - CONFIDENCE
_Z = 1.959964  # two-sided 95% of the normal distribution

_BLOCKS = 20
_MIN_COMPLETED = 0.98
_HALVES_P = 0.01
_SLOPE_Z = 3.09  # one-sided p = .001
_SLOPE_SHARE = 0.25
_EACH_QUARTER = 0.1
_SLOW = 0.9
_TAIL = 0.3
_NEAR, _FAR_BELOW = 2.0, 1 / 20
_CAUTION = 3.0
_SPENDING = 3.0
_WAVES_S = 12.0
"""A window that may grow does not pass before: it may lie in fast seconds of the host, and nothing in it tells."""
_HOPELESS = 0.01
_REFUTED = 0.01
"""How often a rate that holds may be called failing, at the most."""
_LONGER = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0, 20.0, 24.0, 32.0)
_MAX_CANARY = 0.10
_MAX_SEND_DELAY = 0.05
_MAX_STEAL = 0.05
_MAX_GENERATOR_CPU = 0.70
_NULL_SHARE = 0.5


@dataclasses.dataclass(frozen=True)
class Look:
    """One look at a window that may grow.

    Attributes:
        share: of the requests that are planned at most, so many have been measured.
        before: the same at the look before; 0 at the first.
        error: how often all looks together may pass what does not hold; less than 5% where several windows are tried
            for one claim.
    """

    share: float = 1.0
    before: float = 0.0
    error: float = ERROR

    @property
    def spent(self) -> float:
        """The share of the error that this look may spend: little at first, where estimates are poor."""
        spent: float = self.share**_SPENDING - self.before**_SPENDING
        return spent

    @property
    def significance(self) -> float:
        """How often this look may pass what does not hold."""
        return self.error * self.spent


def needed_n(slo: SLO, misses: int = 0, error: float = ERROR) -> int:
    """The fewest requests of which `misses` may be late for the SLO to be proven at 95% confidence.

    For p99: 299 with none late, 473 with one, 1693 with ten.

    Args:
        error: instead of 5%.
    """
    high = max(1, misses)
    while not passes(high, misses, slo.allowed_miss_rate, error):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle, misses, slo.allowed_miss_rate, error) else (middle, high)
    return high


def passes(n: float, late: float, allowed: float, significance: float = ERROR) -> bool:
    """Whether `late` of `n` prove a miss rate below `allowed`: were it at `allowed`, so few would come in under 5%.

    Args:
        n: requests; a share of one is not counted.
        late: of these; a share of one counts as one.
        allowed: the miss rate, 0.01 for p99.
        significance: instead of 5%.
    """
    return _binomial_cdf(math.ceil(late), math.floor(n), allowed) <= significance


def _binomial_cdf(k: int, n: int, p: float) -> float:
    """P(X <= k) of n trials. Where k is above the mean it returns 1, which is all a test for "few" has to know."""
    if k >= n * p:
        return 1.0
    log_top = (
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * math.log(p) + (n - k) * math.log1p(-p)
    )
    term = total = 1.0
    for i in range(k, 0, -1):  # from P(X = k) down; each is smaller than the last, because k is below the mean
        term *= i * (1 - p) / ((n - i + 1) * p)
        total += term
        if term < 1e-17 * total:
            break
    return math.exp(log_top) * total


def variance_inflation(late: NDArray[np.bool_]) -> float:
    """How much wider the count of misses scatters than independent ones would, at least 1.

    Misses come in bursts, so n of them say less than n independent ones. From 20 blocks of neighbours: block size
    times the variance of the blocks' miss rates, over q(1-q).

    Args:
        late: of each request, in the order of the schedule.
    """
    size = len(late) // _BLOCKS
    if size == 0:
        return 1.0
    rates = late[len(late) - size * _BLOCKS :].reshape(_BLOCKS, size).mean(axis=1)
    q = float(rates.mean())
    if not 0 < q < 1:
        return 1.0
    return max(1.0, size * float(rates.var(ddof=1)) / (q * (1 - q)))


def _wave_inflation(slow: NDArray[np.bool_]) -> float:
    """`variance_inflation` for waves that may be longer than a block: then neighbouring blocks are alike, and their
    correlation r says by how much the waves are longer, (1 + r) / (1 - r) as for a series that forgets at that rate."""
    size = len(slow) // _BLOCKS
    if size == 0:
        return 1.0
    around = slow[len(slow) - size * _BLOCKS :].reshape(_BLOCKS, size).mean(axis=1)
    around = around - around.mean()
    spread = float((around * around).sum())
    if spread < 1e-12:  # all blocks alike, but for rounding
        return 1.0
    # 1/20 is the bias of a correlation estimated from 20 blocks; beyond 0.8 the window is too short to say.
    r = min(max(float((around[1:] * around[:-1]).sum()) / spread + 1 / _BLOCKS, 0.0), 0.8)
    return max(1.0, variance_inflation(slow) * (1 + r) / (1 - r))


def percentile_ranks(n: int, percentile: float, inflation: float = 1.0) -> tuple[int, int]:
    """Ranks (1 the smallest) of the order statistics that bound a percentile with 95% confidence.

    For p99: 983 to 997 of 1000. Where n is so small that no rank bounds it above, the largest is given.
    """
    q = percentile / 100
    half = _Z * math.sqrt(n * q * (1 - q) * inflation)
    return max(1, math.floor(n * q - half)), min(n, math.ceil(n * q + half))


def judge(
    samples: Samples | Sequence[Samples],
    slo: SLO,
    *,
    rate_rps: float,
    seed: int,
    look: Look | None = None,
    null_rps: float | None = None,
) -> Measurement:
    """The verdict on one window of open-loop load.

    Args:
        samples: of the whole run; those of its warm-up are left out here. Several runs at the same rate, each with a
            warm-up and a seed of its own, are one window.
        slo: what is asked.
        rate_rps: at which it was asked.
        seed: of the schedule, of the first run where there are several.
        look: where the window may still grow, which look at it this is; None where it is complete.
        null_rps: what the generator sends to a server that does nothing, where that is known.

    Returns:
        The measurement. Where it is not `decided`, a longer window may decide it.
    """
    runs = [samples] if isinstance(samples, Samples) else list(samples)
    window = joined(runs)
    n = len(window)
    duration = max(sum(_duration(run) for run in runs), 1e-9)
    latencies = window.latencies()
    late = latencies > slo.limit_s
    outcome, reason = decide(runs, slo, rate_rps=rate_rps, look=look, null_rps=null_rps)
    needs_s = None
    if outcome is Outcome.INCONCLUSIVE and n >= needed_n(slo):
        away, broken = window.count(Status.SHED), window.count(Status.ERROR) + window.count(Status.LOST)
        needs_s = _needs_s(_Evidence(latencies, slo, away, broken), duration, (look or Look()).error)
    p99, interval = (None, None) if outcome is Outcome.UNSTABLE else _p99(latencies, window.timeout_s)
    answered = latencies[np.isfinite(latencies)]
    send_delay = _quantile(window.sent - window.scheduled, 0.99)
    return Measurement(
        slo=slo,
        rate_rps=rate_rps,
        seed=seed,
        duration_s=duration,
        n=n,
        late=int(late.sum()),
        errors=window.count(Status.ERROR) + window.count(Status.LOST),
        shed=window.count(Status.SHED),
        p50_ms=float(np.median(answered)) * 1e3 if len(answered) else None,
        p99_ms=p99,
        p99_interval_ms=interval,
        goodput_rps=(n - int(late.sum())) / duration,
        generator_cpu=window.generator_cpu,
        send_delay_p99_ms=send_delay * 1e3,
        outcome=outcome or Outcome.INCONCLUSIVE,
        reason=reason,
        latencies=pack_latencies(answered),
        error_kinds=dict(window.error_kinds),
        decided=outcome is not None,
        looks=len(runs),
        needs_s=needs_s,
        blocks=_late_by_block(late),
    )


def _late_by_block(late: NDArray[np.bool_]) -> tuple[int, ...]:
    size = len(late) // _BLOCKS
    return tuple(late[len(late) - size * _BLOCKS :].reshape(_BLOCKS, size).sum(axis=1).tolist()) if size else ()


def _duration(run: Samples) -> float:
    return float(run.scheduled[-1]) - (float(run.scheduled[run.warmup - 1]) if run.warmup else 0.0)


def decide(
    runs: Sequence[Samples], slo: SLO, *, rate_rps: float, look: Look | None = None, null_rps: float | None = None
) -> tuple[Outcome | None, str]:
    """What `judge` concludes, without the figures: the outcome, None where the window has to grow; and why."""
    look, window = look or Look(), joined(runs)
    n = len(window)
    fewest = needed_n(slo)
    grows = look.share < 1
    if n < fewest:
        said = f"insufficient samples: {n} requests, {slo} needs at least {fewest}{_blame(window)}"
        return None if grows else Outcome.INCONCLUSIVE, said
    doubts = _doubts(window, slo, rate_rps, null_rps)
    benefit = 0.0
    latencies = window.latencies()
    if doubts:
        benefit = window.canary_p99_s + _quantile(window.taken - window.scheduled, 0.99)
        # From the sending on: what a request waited for one of the generator's connections is not the server's.
        latencies = np.where(window.status == Status.OK, window.done - window.sent - benefit, np.inf)
        latencies = latencies[_reached(window, slo)]
        on_time = int((latencies <= slo.limit_s).sum())
        if len(latencies) < fewest and not passes(len(latencies), on_time, 1 - slo.allowed_miss_rate, _HOPELESS):
            return Outcome.GENERATOR_LIMITED, f"{doubts.bound}; it sent {len(latencies)} of {n} requests"
    late = latencies > slo.limit_s
    behind = _falls_behind(runs, slo, rate_rps, benefit)
    if behind:
        return Outcome.UNSTABLE, behind + _blame(window)
    away, broken = window.count(Status.SHED), window.count(Status.ERROR) + window.count(Status.LOST)
    evidence = _Evidence(latencies, slo, away, broken)
    if evidence.refutes(_REFUTED * look.spent):
        return Outcome.FAIL, f"{evidence.count} requests missed {slo}: it does not hold{_blame(window)}"
    drifts = _drifts(late, slo)
    too_short = grows and sum(_duration(run) for run in runs) < _WAVES_S
    if drifts or too_short or not evidence.proves(look.significance):
        hopeless = evidence.hopeless(look.share) if grows else ""
        if grows and not hopeless and not doubts:
            return None, drifts or evidence.lacking()
        if not doubts:
            needs_s = _needs_s(evidence, sum(_duration(run) for run in runs), look.error)
            said = drifts or hopeless or evidence.lacking(needs_s)
            return Outcome.INCONCLUSIVE, said + _blame(window)
    if doubts.bound:
        return Outcome.GENERATOR_LIMITED, doubts.bound
    if doubts.noise:
        return Outcome.VOID, doubts.noise
    if doubts.delay:
        return Outcome.GENERATOR_LIMITED, doubts.delay
    return Outcome.PASS, f"{evidence.count} requests missed {slo}{_blame(window)}"


class _Evidence:
    """What the latencies of a window prove of an SLO, either way.

    Args:
        latencies: of all requests in the order of the schedule, infinite where there was no answer.
        slo: what is asked.
        away: how many were turned away.
        broken: how many ended in errors or never: these say nothing of a tail, and with any it proves nothing.

    The count of misses has to pass, with bursts discounted. Then the same has to hold with waves discounted, as they
    are seen where a tenth of the requests is slower. Where that is too much to ask of the window, its slow ones may
    prove it: the tail of a queue falls exponentially. So with the slowest 30% beyond u, and m being the mean way
    beyond it, P(over the limit) is 0.3 e^(-(limit - u) / m). As much evidence about m as there are waves gives it an
    upper bound (of the gamma distribution), and with that bound P has to be within what is allowed. A tail that falls
    faster than that, as behind a batching server, is judged too strictly, never too kindly.

    Where the host's own speed comes in waves, the slowest 30% are those of its slow seconds, and few waves are seen.
    How fast answers are just beyond the percentile is then the better witness: there the waves of speed matter less
    than the queue. So the slowest 2%, for p99, may prove it in the same way, by the waves that they themselves come in.
    What is extrapolated is little, and the risk is luck: so it counts only if the tail has fallen to a twentieth of
    what is allowed.

    A server that turns requests away cuts its own tail off: however slow it is in a bad wave, no more miss than come
    too many. So where most of what missed was turned away, misses are counted by the waves that they themselves come
    in. They may be few, and then the tail may prove it all the same. What was turned away would have taken longer than
    anything that was answered, and how much longer need not be known (a censored sample); what has to be rare is to
    get as far as the slowest answer, for it is there that this server turns away.

    An inflation estimated from 20 blocks is uncertain, and too small just where a window was lucky: what it has over
    1 counts three times, which is what makes 5% of 5% in simulated queues.
    """

    def __init__(self, latencies: NDArray[np.float64], slo: SLO, away: int, broken: int) -> None:
        late = latencies > slo.limit_s
        self._slo = slo
        self._n, self._late = len(latencies), int(late.sum())
        self._bursts = variance_inflation(late)
        self._own, slow = (
            _wave_inflation(late),
            _wave_inflation(latencies > np.quantile(latencies, _SLOW, method="lower")),
        )
        waves = 1 + _CAUTION * (max(self._own, slow) - 1)
        only_away = away and 2 * away >= self._late
        self._counted = 1 + _CAUTION * (self._own - 1) if only_away else waves
        self._tails = () if broken else tuple(_tails(latencies, slo, waves))
        p99 = float(np.quantile(latencies, 0.99, method="higher"))
        self._p99 = f", p99 {p99 * 1e3:.3g} ms" if math.isfinite(p99) else ""

    @property
    def count(self) -> str:
        """Misses, in words."""
        return f"{self._late} of {self._n}"

    @property
    def exceeds(self) -> bool:
        """Whether more missed than may."""
        return self._late > self._n * self._slo.allowed_miss_rate

    def proves(self, significance: float, longer: float = 1.0) -> bool:
        """Whether the SLO is proven; with `longer`, whether it would be by a window so many times as long."""
        n, late, allowed = self._n * longer, self._late * longer, self._slo.allowed_miss_rate
        if not passes(n / self._bursts, late / self._bursts, allowed):
            return False
        if passes(n / self._counted, late / self._counted, allowed, significance):
            return True
        return any(tail.proves(significance, longer) for tail in self._tails)

    def refutes(self, significance: float) -> bool:
        """Whether it is proven that the SLO does not hold, with the misses' own waves discounted."""
        waves = 1 + _CAUTION * (self._own - 1)
        n, on_time = self._n / waves, (self._n - self._late) / waves
        return passes(n, on_time, 1 - self._slo.allowed_miss_rate, significance)

    def hopeless(self, share: float) -> str:
        """Why no longer window can pass, or hardly any: not even if nothing more were late, or with 99% confidence."""
        allowed = self._slo.allowed_miss_rate
        said = f"{self.count} requests missed {self._slo}: "
        if not passes(self._n / share, self._late, allowed):
            return said + "too many for any longer test"
        n, on_time = self._n / self._own, (self._n - self._late) / self._own
        return said + "it hardly holds" if passes(n, on_time, 1 - allowed, _HOPELESS) else ""

    def lacking(self, needs_s: float | None = None) -> str:
        """What is missing for a proof, and how much longer it would take at this rate."""
        if self.exceeds:
            return f"{self.count} requests missed {self._slo}, more than may: try a lower rate"
        worth = self._n / max(self._bursts, self._counted)
        more = "a lower rate is sooner proven" if needs_s is None else f"about {_long(needs_s)} more would decide"
        waves = f", but latency is autocorrelated (effective sample size {worth:.0f})" if worth < 0.9 * self._n else ""
        return f"{self.count} requests missed {self._slo}{self._p99}{waves or ', too near to what may'}: {more}"


def _long(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def _needs_s(evidence: _Evidence, duration_s: float, error: float) -> float | None:
    """Seconds more that would prove it, if they went on as those before; None beyond 32 times the window."""
    for longer in _LONGER:
        if evidence.proves(error, longer):
            return (longer - 1) * duration_s
    return None


def _tails(latencies: NDArray[np.float64], slo: SLO, waves: float) -> Iterator[_Tail]:
    """Those that may prove the SLO: of the slowest 30%, and of twice as many as may miss where few of them would."""
    share = min(1.0, _NEAR * slo.allowed_miss_rate)
    own = 1 + _CAUTION * (_wave_inflation(latencies > np.quantile(latencies, 1 - share, method="lower")) - 1)
    near = _Tail.of(latencies, slo, share, own)
    if 3 * slo.allowed_miss_rate <= _TAIL and (tail := _Tail.of(latencies, slo, _TAIL, waves)):
        yield tail
    if near is not None and near.miss_rate <= _FAR_BELOW * slo.allowed_miss_rate:
        yield near


@dataclasses.dataclass(frozen=True)
class _Tail:
    """The slowest requests: how far the limit lies in a tail that falls exponentially.

    What is infinite was turned away: it counts as having got as far as the slowest answer, and for no evidence.

    Attributes:
        share: of all requests.
        mean_s: way of the slowest beyond where they begin, as steep as the tail is.
        end_s: way to the limit.
        steps: by so many times the mean the limit has to lie further.
        evidence: how many of the slowest were answered.
        waves: what they have to be discounted by.
    """

    share: float
    mean_s: float
    end_s: float
    steps: float
    evidence: float
    waves: float

    @classmethod
    def of(cls, latencies: NDArray[np.float64], slo: SLO, share: float, waves: float) -> _Tail | None:
        """None where the limit is not in the tail, or there is none to be seen."""
        start = float(np.quantile(latencies, 1 - share, method="lower"))
        if not math.isfinite(start):
            return None
        slowest = latencies[latencies > start] - start
        answered = slowest[np.isfinite(slowest)]
        steps = math.log(share / slo.allowed_miss_rate)
        if not len(answered):
            beyond = len(slowest) or start >= slo.limit_s
            return None if beyond else cls(share, 0.0, slo.limit_s - start, steps, 1.0, waves)
        furthest, end = float(answered.max()), slo.limit_s - start
        if len(answered) < len(slowest):
            end = min(end, furthest)
        mean = float(np.minimum(slowest, furthest).sum()) / len(answered)
        return cls(share, mean, end, steps, share * len(latencies) * len(answered) / len(slowest), waves)

    @property
    def miss_rate(self) -> float:
        """As it is estimated, where the limit lies in the tail; else as many as are in it."""
        if self.end_s <= 0:
            return self.share
        return self.share * math.exp(-self.end_s / self.mean_s) if self.mean_s else 0.0

    def proves(self, significance: float, longer: float) -> bool:
        """Whether an upper bound of the mean still leaves the limit far enough out."""
        freedom = max(2.0, 2 * longer * self.evidence / self.waves)  # the window itself is one wave, at least
        return self.mean_s * self.steps * freedom < self.end_s * _chi_squared(significance, freedom)


def _chi_squared(p: float, freedom: float) -> float:
    """Its quantile, after Wilson and Hilferty 1931; at the far low end a little small, which is on the safe side."""
    part = 2 / (9 * freedom)
    return freedom * max(0.0, 1 - part + statistics.NormalDist().inv_cdf(p) * math.sqrt(part)) ** 3


@dataclasses.dataclass(frozen=True)
class _Doubts:
    """Why a window may say nothing about the server; each is empty where there is no such reason."""

    bound: str
    noise: str
    delay: str

    def __bool__(self) -> bool:
        return bool(self.bound or self.noise or self.delay)


def _few_files() -> str:
    """Why the bound may be lower than usual, where it may."""
    files, _ = open_files(MAX_CONNECTIONS)
    return f", for it may open only {files} files: raise the limit (ulimit -n)" if files < MAX_CONNECTIONS else ""


def _doubts(measured: Samples, slo: SLO, rate_rps: float, null_rps: float | None) -> _Doubts:
    bound = noise = delay = ""
    if measured.starved:
        bound = (
            f"{measured.starved} requests waited for a connection: the generator's bound of "
            f"{measured.connections} was reached{_few_files()}"
        )
    elif measured.generator_cpu > _MAX_GENERATOR_CPU:
        bound = f"the generator used {measured.generator_cpu:.0%} of a core, over {_MAX_GENERATOR_CPU:.0%}"
    elif null_rps is not None and rate_rps > _NULL_SHARE * null_rps:
        bound = (
            f"the generator gets {null_rps:,.0f} requests/s out of a server that does nothing, "
            f"less than twice the {rate_rps:,.0f} tested"
        )
    if measured.canary_p99_s > _MAX_CANARY * slo.limit_s:
        noise = (
            f"the machine was disturbed: short sleeps took up to {measured.canary_p99_s * 1e3:.1f} ms longer (p99), "
            f"over {_MAX_CANARY:.0%} of the limit"
        )
    elif measured.steal > _MAX_STEAL:
        noise = (
            f"the machine was disturbed: {measured.steal:.0%} of the time was lost to its hypervisor, "
            "or to waiting for memory or disk"
        )
    send_delay = _quantile(measured.sent - measured.scheduled, 0.99)
    if send_delay > _MAX_SEND_DELAY * slo.limit_s:
        delay = (
            f"requests were sent up to {send_delay * 1e3:.1f} ms late (p99), over {_MAX_SEND_DELAY:.0%} of the limit"
        )
    return _Doubts(bound, noise, delay)


def _falls_behind(runs: Sequence[Samples], slo: SLO, rate_rps: float, benefit_s: float) -> str:
    """Why no percentile describes the window: the server answers less than is asked; empty where it keeps up."""
    for run in runs:
        measured = run.measured()
        end = float(measured.scheduled[-1])
        # What was sent after the end of the schedule is the generator's delay.
        asked = ~(measured.sent > end) & _reached(measured, slo)
        in_time = measured.done <= end + slo.limit_s + benefit_s
        completed = float(np.count_nonzero(asked & in_time)) / max(1, int(asked.sum()))
        if completed < _MIN_COMPLETED:
            return f"the server fell behind: it answered {completed:.0%} of the requests in the window"
        growth = _growth(run)
        if growth >= max(3.0, rate_rps * (_SLOPE_SHARE * slo.limit_s + benefit_s)):
            return f"the server fell behind: {growth:.0f} more requests were in flight at the end than at the start"
    return ""


def _drifts(missed: NDArray[np.bool_], slo: SLO) -> str:
    """Whether one half of the window was another load than the other; empty where they are alike."""
    inflation = variance_inflation(missed)
    half = len(missed) // 2
    first, second = int(missed[:half].sum()), int(missed[half:].sum())
    if _differ(first / inflation, half / inflation, second / inflation, (len(missed) - half) / inflation):
        return f"the load was not steady: {first} requests missed {slo} in the first half, {second} in the second"
    return ""


def _reached(window: Samples, slo: SLO) -> NDArray[np.bool_]:
    """Which requests count for the server. All, but where the generator lacked connections, those that it sent while
    there was time for an answer: it gives a request up so long after its schedule, however late it was sent."""
    if not window.starved:
        return np.ones(len(window), bool)
    late_by = window.sent - window.scheduled
    reached: NDArray[np.bool_] = (window.status == Status.OK) | (late_by <= window.timeout_s - slo.limit_s)
    return reached


def _growth(samples: Samples) -> float:
    """By how many the requests in flight at the server grew over the window; 0 where they show no upward trend.

    The trend is Mann and Kendall's test on 20 block means, which needs no distribution; the growth is the
    difference between the means of the last and the first quarter. A host that became slower within the window gives a
    trend too, but a step and not a slope: where a step explains the means better than a line does, or a quarter of the
    window is hardly above the one before, there is none.
    """
    start, end = float(samples.scheduled[samples.warmup]), float(samples.scheduled[-1])
    times = np.linspace(start, end, 10 * _BLOCKS)
    sent = np.sort(samples.sent[~np.isnan(samples.sent)])
    done = np.sort(samples.done[~np.isnan(samples.done)])
    in_flight = np.searchsorted(sent, times, "right") - np.searchsorted(done, times, "right")
    means = in_flight.reshape(_BLOCKS, -1).mean(axis=1)
    score = float(np.sign(np.subtract.outer(means, means))[np.tril_indices(_BLOCKS, -1)].sum())
    deviation = math.sqrt(_BLOCKS * (_BLOCKS - 1) * (2 * _BLOCKS + 5) / 18)
    quarters = means.reshape(4, -1).mean(axis=1)
    growth = float(quarters[-1] - quarters[0])
    steady = bool((np.diff(quarters) >= _EACH_QUARTER * growth).all()) and not _is_step(means)
    return growth if score > _SLOPE_Z * deviation and steady else 0.0


def _is_step(means: NDArray[np.float64]) -> bool:
    """Whether two levels describe a series better than a line does."""
    places = np.arange(len(means), dtype=np.float64)
    sloped = means - np.polyval(np.polyfit(places, means, 1), places)
    levels = min(
        float(part[0].var() * len(part[0]) + part[1].var() * len(part[1]))
        for part in (np.split(means, [at]) for at in range(1, len(means)))
    )
    return levels < float((sloped * sloped).sum())


def _differ(late_a: float, n_a: float, late_b: float, n_b: float) -> bool:
    """Fisher's exact test, two-sided at 1%: do two counts of misses come from different rates? Shares are rounded."""
    a, b, size_a, size_b = round(late_a), round(late_b), round(n_a), round(n_b)
    if a * size_b > b * size_a:
        a, b, size_a, size_b = b, a, size_b, size_a
    total = a + b

    def log_choose(n: int, k: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)

    all_ways = log_choose(size_a + size_b, total)
    tail = sum(
        math.exp(log_choose(size_a, i) + log_choose(size_b, total - i) - all_ways)
        for i in range(max(0, total - size_b), a + 1)
    )
    return 2 * tail < _HALVES_P


def _p99(latencies: NDArray[np.float64], timeout_s: float) -> tuple[float | None, Interval | None]:
    """The 99th percentile and its interval in milliseconds, None where there is no telling.

    An upper end among the unanswered is given as the time-out: it is at least that.
    """
    n = len(latencies)
    if n < needed_n(SLO(percentile=99, limit_s=1)):
        return None, None
    ordered = np.sort(latencies)
    p99 = float(ordered[math.ceil(0.99 * n) - 1])
    if math.isinf(p99):
        return None, None
    low, high = percentile_ranks(n, 99, _wave_inflation(latencies > p99))
    upper = float(ordered[high - 1])
    return p99 * 1e3, (float(ordered[low - 1]) * 1e3, (max(p99, timeout_s) if math.isinf(upper) else upper) * 1e3)


def _quantile(seconds: NDArray[np.float64], q: float) -> float:
    known = seconds[~np.isnan(seconds)]
    return float(np.quantile(known, q)) if len(known) else 0.0


def _blame(measured: Samples) -> str:
    """Errors and shed requests in words."""
    errors, shed = measured.count(Status.ERROR) + measured.count(Status.LOST), measured.count(Status.SHED)
    said = f"; {shed} were shed" if shed else ""
    return said + (f"; {errors} ended in errors, the first: {measured.first_error}" if errors else "")
