"""The verb `plan`: how many machines, processes, cores and watts a rate takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rushhour.api.values import StrPath, read_path
from rushhour.errors import PlanError

if TYPE_CHECKING:
    from rushhour.cluster import Sizing


def size(run: StrPath, *, rate: float, trace: StrPath | None = None, machine: str = "", failures: int = 1) -> Sizing:
    """How many machines carry a rate within the SLO of a run's Plan, with the capacity's error bars.

        rushhour.size("runs/photos", rate=100_000).machines
        rushhour.size(tuned, rate=100_000, machine="cores=16,speed=0.8,watts=250", failures=2)

    Args:
        run: a run's folder, a plan's file, or the result of `tune`.
        rate: requests per second, on average.
        trace: a file of recorded arrivals, as of `rushhour.load`: the rate varies around its average as it does there.
        machine: what differs from the Plan's machine: `cores=16`, `speed=0.8` (of one core, over that of the Plan's
            machine), `watts=250` (under load), `processes=4` (of the server on it).
        failures: machines that may fail at the same time.

    Raises:
        PlanError: if there is no plan, or it says nothing of its capacity.
        GoalError: if a number cannot be used.
        LoadError: if the trace cannot be read.
    """
    from rushhour.cluster import read_node
    from rushhour.cluster import size as sized
    from rushhour.load.arrivals import read_trace
    from rushhour.serve import open_target

    path = read_path(run)
    plan = open_target(path).plan
    if plan.evidence is None:
        raise PlanError(f"cannot plan with {path}", "it was never measured under load", "tune it first: rushhour tune")
    node = read_node(machine, plan.evidence.machine)
    arrivals = None if trace is None else np.cumsum(read_trace(read_path(trace)).gaps)
    return sized(plan, rate, node, failures=failures, trace=arrivals)
