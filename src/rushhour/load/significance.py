"""Significance: exact tests of counts, confidence intervals of percentiles, and the quantiles that they need.

Source of the binomial test: MLPerf Inference's Server scenario. All functions are pure.
"""

from __future__ import annotations

import math
import statistics

from rushhour.goal import SLO

CONFIDENCE = 0.95
ERROR = 1 - CONFIDENCE
"""How often a rate that does not hold may pass, by default."""
_Z = 1.959964  # two-sided 95% of the normal distribution


def needed_n(slo: SLO, late: int = 0, error: float = ERROR) -> int:
    """The fewest requests of which `late` may be late for the SLO to be proven at 95% confidence.

    For p99: 299 with none late, 473 with one, 1693 with ten.

    Args:
        slo: the SLO.
        late: number of late requests.
        error: instead of 5%.
    """
    high = max(1, late)
    while not passes(high, late, slo.allowed_miss_rate, error):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle, late, slo.allowed_miss_rate, error) else (middle, high)
    return high


def passes(n: float, late: float, allowed: float, significance: float = ERROR) -> bool:
    """Whether `late` of `n` prove a miss rate below `allowed`: at that rate, so few would occur in under 5% of windows.

    Args:
        n: requests, rounded down.
        late: of these, rounded up.
        allowed: the miss rate, 0.01 for p99.
        significance: instead of 5%.
    """
    return _binomial_cdf(math.ceil(late), math.floor(n), allowed) <= significance


def _binomial_cdf(k: int, n: int, p: float) -> float:
    """P(X <= k) of n trials. It returns 1 where k is above the mean, which suffices for a test for few."""
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


def upper_share(k: int, n: int, error: float) -> float:
    """The upper bound of a share of which `k` of `n` were seen: a share above it would give so few in `error` of tests.

    Clopper and Pearson 1934, one-sided: exact, and never below its confidence. The lower bound is
    `1 - upper_share(n - k, n, error)`.

    Args:
        k: seen.
        n: trials, at least one.
        error: how often the bound may be too low.
    """
    low, high = k / n, 1.0
    if k >= n:
        return 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _binomial_cdf(k, n, middle) > error else (low, middle)
    return high


def percentile_ranks(n: int, percentile: float, inflation: float = 1.0) -> tuple[int, int]:
    """Ranks (1 the smallest) of the order statistics that bound a percentile with 95% confidence.

    For p99: 983 to 997 of 1000. Where n is so small that no rank bounds it above, the largest is given.

    Args:
        n: samples.
        percentile: 0 to 100.
        inflation: of the variance, by autocorrelation.
    """
    q = percentile / 100
    half = _Z * math.sqrt(n * q * (1 - q) * inflation)
    return max(1, math.floor(n * q - half)), min(n, math.ceil(n * q + half))


def differ(late_a: float, n_a: float, late_b: float, n_b: float, significance: float) -> bool:
    """Fisher's exact test, two-sided: whether two counts come from different rates. Arguments are rounded.

    Args:
        late_a, n_a: late requests and all requests of one sample.
        late_b, n_b: of the other.
        significance: of both sides together.
    """
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
    return 2 * tail < significance


def chi_squared_quantile(p: float, freedom: float) -> float:
    """The quantile of chi-squared, after Wilson and Hilferty 1931; slightly too small for small p, which is safe."""
    part = 2 / (9 * freedom)
    return freedom * max(0.0, 1 - part + statistics.NormalDist().inv_cdf(p) * math.sqrt(part)) ** 3


def t_quantile(p: float, freedom: int) -> float:
    """The quantile of Student's t for p above one half: by bisection of its distribution, Simpson's rule inside."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)

    def beyond_middle(t: float) -> float:
        # With t = sqrt(freedom) tan(a) the density becomes a power of a cosine, smooth for all degrees of freedom.
        end, steps = math.atan(t / math.sqrt(freedom)), 200
        at = [math.cos(end * i / steps) ** (freedom - 1) for i in range(steps + 1)]
        simpson = at[0] + at[-1] + 4 * sum(at[1:-1:2]) + 2 * sum(at[2:-1:2])
        return scale * math.sqrt(freedom) * simpson * end / steps / 3

    low, high = 0.0, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if beyond_middle(middle) < p - 0.5 else (low, middle)
    return high


def sign_test(above: int, below: int) -> float:
    """The two-sided significance of the sign test, of counts above and below the median that is tested."""
    return min(1.0, 2 * coin_cdf(min(above, below), above + below))


def coin_cdf(k: int, n: int) -> float:
    """P(X <= k) of n trials with probability one half."""
    return float(sum(math.comb(n, i) for i in range(k + 1)) / 2**n)
