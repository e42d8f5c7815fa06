"""95% intervals of metrics: of proportions in closed form, of all else by resampling samples, or groups of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rushhour.measurement import Interval

Z: Final = 1.959963984540054
"""Two-sided 95% of the normal distribution."""
_ROUNDS: Final = 1000


def wilson(successes: int, n: int) -> Interval:
    """Wilson's 95% score interval of a proportion (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    share, z2 = successes / n, Z * Z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_proportions(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> tuple[float, Interval]:
    """How much fewer are true in `after`, as a share, and the adjusted interval of Agresti and Min.

    It keeps its coverage where few differ (Statistics in Medicine 2005).

    Args:
        before: shape `(n,)`.
        after: of the same samples.
    """
    lost, won, n = int((before & ~after).sum()), int((~before & after).sum()), len(before)
    lost_, won_, n_ = lost + 0.5, won + 0.5, n + 2
    middle = (lost_ - won_) / n_
    half = Z * math.sqrt(max(0.0, lost_ + won_ - (lost_ - won_) ** 2 / n_)) / n_
    return (lost - won) / n, (middle - half, middle + half)


def bootstrap(statistic: Callable[[NDArray[np.intp]], float], n: int, groups: NDArray[Any] | None = None) -> Interval:
    """Percentile bootstrap over samples with a fixed seed (Efron and Tibshirani 1993).

    Args:
        statistic: of the rows that are given, with repetitions.
        n: samples.
        groups: shape `(n,)`: whose samples belong together, such as those of one person. Whole groups are resampled
            then: samples of a group are not independent, and the interval would be too narrow.
    """
    random = np.random.default_rng(0)
    if groups is None:
        values = [statistic(random.integers(0, n, n)) for _ in range(_ROUNDS)]
    else:
        _, member = np.unique(groups, return_inverse=True)
        order = np.argsort(member, kind="stable")
        members = np.split(order, np.cumsum(np.bincount(member))[:-1])
        drawn = (random.integers(0, len(members), len(members)) for _ in range(_ROUNDS))
        values = [statistic(np.concatenate([members[each] for each in chosen])) for chosen in drawn]
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
