"""A program that uses a core in bursts, like another tenant of the host. It needs the standard library alone.

    python -I -S burner.py CORE SHARE SEED

It prints one line with its priority, and ends when the process that started it ends.
"""

from __future__ import annotations

import math
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator

_MEDIAN_S, _SPREAD, _LONGEST_S = 0.02, 1.2, 1.0
_NAP_S = 0.2


def bursts(core: int, share: float, seed: int) -> Iterator[tuple[float, float]]:
    """Pauses, and the bursts after them, in seconds: log-normal bursts of up to 1 s, and exponential pauses.

    Args:
        core: each has bursts of its own.
        share: mean share of the core; above 0 and below 1.
        seed: of all that is random.
    """
    normal = statistics.NormalDist()
    cut = math.log(_LONGEST_S / _MEDIAN_S) / _SPREAD
    mean_s = _MEDIAN_S * math.exp(_SPREAD**2 / 2) * normal.cdf(cut - _SPREAD) + _LONGEST_S * normal.cdf(-cut)
    pause_s = mean_s * (1 - share) / share
    chance = random.Random(f"{seed} {core}")
    while True:
        burst_s = min(_LONGEST_S, _MEDIAN_S * math.exp(_SPREAD * chance.gauss(0, 1)))
        yield chance.expovariate(1 / pause_s), burst_s


def priority() -> str:
    """Take the highest priority on this core that is allowed. Returns its description."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except OSError as error:
        refused = f"SCHED_FIFO is not allowed ({error.strerror})"
    else:
        return "SCHED_FIFO"
    try:
        os.setpriority(os.PRIO_PROCESS, 0, -20)
    except OSError as error:
        return f"normal priority: {refused}, nor is nice -20 ({error.strerror})"
    return f"nice -20: {refused}"


def _main(core: int, share: float, seed: int, parent: int) -> None:
    os.sched_setaffinity(0, {core})
    print(priority(), flush=True)
    for pause_s, burst_s in bursts(core, share, seed):
        until = time.monotonic() + pause_s
        while (left := until - time.monotonic()) > 0 and os.getppid() == parent:
            time.sleep(min(left, _NAP_S))
        if os.getppid() != parent:
            return
        end = time.thread_time() + burst_s
        while time.thread_time() < end:
            pass


if __name__ == "__main__":
    _main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), os.getppid())
