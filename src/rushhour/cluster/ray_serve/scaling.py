"""How many replicas the load needs: from goodput, shed requests and waits, never from CPU use.

Ray runs this in its controller, which has a copy of this file and nothing else of Rushhour: it imports the standard
library alone.
"""

from __future__ import annotations

import math
from typing import Any

ANSWERED, OFFERED, SHED, WAIT = "answered_rps", "offered_rps", "shed_rps", "wait_s"
"""What each replica reports: requests per second that were answered within the SLO, that arrived, that were turned
away because they would have been late; and seconds that a request waits for its batch."""

_FULL = 0.85
"""Share of its capacity that a replica is loaded with at most: rates vary."""
_SPARE = 0.6
"""A replica is ended when the others would be loaded with this share of theirs at most."""
_SHED = 0.01
"""Share of requests turned away from which on another replica is started, whatever the capacity is thought to be."""
_WAITED = 0.5
"""Likewise the share of the limit that requests wait."""


def needed(
    reports: dict[str, list[float]],
    running: int,
    target: int,
    capacity_rps: float | None,
    limit_s: float,
) -> int:
    """How many replicas there should be.

    Args:
        reports: by name, a value of each replica.
        running: replicas that answer.
        target: replicas that there are to be so far.
        capacity_rps: of one replica; None where nothing is known.
        limit_s: of the SLO.
    """
    offered, shed = sum(reports.get(OFFERED, ())), sum(reports.get(SHED, ()))
    wait_s = max(reports.get(WAIT, ()), default=0.0)
    wanted = 1
    if capacity_rps:
        wanted = math.ceil(offered / (_FULL * capacity_rps) - 1e-9)
    if shed > _SHED * offered or wait_s > _WAITED * limit_s:
        # Those that start already may be enough.
        return max(wanted, target if target > running else running + 1)
    if wanted >= target or target > running:
        return max(wanted, target)
    if capacity_rps and offered <= _SPARE * capacity_rps * (target - 1):
        return target - 1
    return target


class Goodput:
    """The policy as Ray Serve calls it.

    Args:
        capacity_rps: of one replica, from its Plan.
        limit_s: of the Plan's SLO.
    """

    def __init__(self, capacity_rps: float | None = None, limit_s: float = 0.05) -> None:
        self._capacity_rps = capacity_rps
        self._limit_s = limit_s

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """How many replicas there should be, and what is remembered: the highest goodput of a replica so far."""
        reported = context.aggregated_metrics or {}
        reports = {name: list(values.values()) for name, values in reported.items()}
        best = max([context.policy_state.get("best_rps", 0.0), *reports.get(ANSWERED, ())])
        capacity_rps = max(self._capacity_rps or 0.0, best) or None
        wanted = needed(reports, context.current_num_replicas, context.target_num_replicas, capacity_rps, self._limit_s)
        least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        return min(max(wanted, least), most), {"best_rps": best}
