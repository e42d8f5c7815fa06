"""What a host of varying speed leaves of a capacity.

On a shared host the same batches take longer for a while, because of others. Where such a while is long against the
limit, the server answers what it can in it and the rest is late: the fluid limit of a queue that sheds (Newell,
Applications of Queueing Theory, 1971, ch. 2). The simulation covers what is shorter.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

_TRIED = np.linspace(0.3, 1.0, 141)


def steady_share(speeds: ArrayLike, allowed: float, *, together: int = 1) -> float:
    """The share of a capacity at the median speed that holds at all these speeds.

    Args:
        speeds: of the host in consecutive intervals of one length, on any scale, shape `(n,)`.
        allowed: share of late requests.
        together: so many intervals are averaged first, because a shorter variation does not fill the queue.

    Returns:
        Between 0.3 and 1; 1 where there are too few intervals to tell.
    """
    values = np.asarray(speeds, dtype=np.float64)
    if len(values) < 4 * together:
        return 1.0
    means = np.convolve(values, np.full(together, 1 / together), "valid")
    relative = means / np.median(means)
    late = np.maximum(0.0, 1 - relative[None, :] / _TRIED[:, None]).mean(axis=1)
    holding = _TRIED[late <= allowed]
    return float(holding[-1]) if len(holding) else float(_TRIED[0])
