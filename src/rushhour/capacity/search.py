"""The search for capacities: the highest rate at which a simulated scenario meets the SLO, for many at once.

Rates are tried on a grid of steps of 2% below the rate at which a scenario is saturated, so that a result does not
depend on what else is searched with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rushhour.capacity.lockstep import late_shares
from rushhour.capacity.overhead import ALONE, Overhead
from rushhour.capacity.profile import ServiceProfile
from rushhour.capacity.scenario import Scenario
from rushhour.capacity.traffic import Traffic
from rushhour.goal import SLO
from rushhour.measurement import ServiceTimes

_STEP = 1.02
_STEPS = 210
"""Down to 1/64 of that rate."""
_COLUMNS = 1024
"""Simulated at once, about: with fewer, numpy's calls cost more than its work; with many more, caches overflow."""
_POINTS = (15, 3, 1)
"""Rates that are tried at once between the two that are known: more where there are few scenarios."""
_N = 3000
_REQUEST_S = (0.0, *np.geomspace(1e-6, 3e-2, 63).tolist())
"""CPU seconds of a request that are tried."""


def capacities(
    scenarios: Sequence[Scenario], slo: SLO, traffic: Traffic | None = None, *, seed: int = 0
) -> NDArray[np.float64]:
    """The highest rate of each scenario at which no more requests are late than the SLO allows.

    Args:
        scenarios: any.
        slo: the SLO.
        traffic: the arrivals; None for 3,000 of a Poisson process.
        seed: of that process, and of the times of batches.

    Returns:
        Requests per second, to 2%, shape `(scenarios,)`; 0 where none holds.
    """
    traffic = traffic or Traffic.poisson(_N, seed)
    found = np.zeros(len(scenarios))
    for at in range(0, len(scenarios), _COLUMNS):
        part = scenarios[at : at + _COLUMNS]
        found[at : at + len(part)] = _found(part, slo, traffic, seed)
    return found


def _found(scenarios: Sequence[Scenario], slo: SLO, traffic: Traffic, seed: int) -> NDArray[np.float64]:
    highest = np.array([each.highest_rps for each in scenarios])
    allowed = slo.allowed_miss_rate + 1e-9

    def hold(which: NDArray[np.int64], steps: NDArray[np.int64]) -> NDArray[np.bool_]:
        rates = highest[which] * _STEP ** -steps.astype(np.float64)
        chosen = [scenarios[at] for at in which.tolist()]
        return late_shares(chosen, rates, slo.limit_s, traffic, seed=seed, enough=allowed) <= allowed

    everyone = np.arange(len(scenarios))
    fails = np.zeros(len(scenarios), dtype=np.int64)
    is_highest = hold(everyone, fails)
    holds = np.where(is_highest, 0, _STEPS + 1)  # the lowest rate of all is not tried: it counts as none
    open_ = everyone[~is_highest]
    while len(open_):
        points = next((each for each in _POINTS if len(open_) * each <= _COLUMNS), 1)
        inside = np.linspace(fails[open_], holds[open_], points + 2)[1:-1].round().astype(np.int64)  # (points, open)
        inside = np.clip(inside, fails[open_] + 1, holds[open_] - 1)
        held = hold(np.tile(open_, points), inside.reshape(-1)).reshape(inside.shape)
        holds[open_] = np.where(held, inside, holds[open_]).min(axis=0)
        below = np.where(~held & (inside < holds[open_]), inside, fails[open_])
        fails[open_] = below.max(axis=0)
        open_ = open_[holds[open_] - fails[open_] > 1]
    return np.where(holds > _STEPS, 0.0, highest * _STEP ** -holds.astype(np.float64))


def predicted_capacity(
    profile: ServiceProfile,
    *,
    streams: int,
    max_batch: int,
    slo: SLO,
    overhead: Overhead = ALONE,
    seed: int = 0,
) -> float:
    """The highest rate whose simulated percentile meets the SLO, to 2%, in requests per second; 0 if none does."""
    return float(capacities([Scenario(profile, streams, max_batch, overhead)], slo, seed=seed)[0])


def explained_overhead(
    scenario_of: Callable[[float], Scenario], capacity_rps: float, slo: SLO, *, processes: int = 1
) -> tuple[float, float]:
    """The CPU seconds of a request beside the engine with which the simulation comes nearest to a measured capacity.

    Args:
        scenario_of: one process with so many seconds of a request.
        capacity_rps: that was measured, of all processes.
        slo: of it.
        processes: alike, that share nothing.

    Returns:
        These seconds, and the capacity that the simulation gives with them.
    """
    simulated = processes * capacities([scenario_of(each) for each in _REQUEST_S], slo)
    nearest = int(np.abs(simulated - capacity_rps).argmin())
    return _REQUEST_S[nearest], float(simulated[nearest])


def best_batch(times: ServiceTimes, *, streams: int, slo: SLO, overhead: Overhead = ALONE) -> tuple[int, float]:
    """The batch bound to serve with, of the sizes timed, and the capacity predicted for it in requests per second."""
    profile = ServiceProfile(times)
    scenarios = [Scenario(profile, streams, bound, overhead) for bound in times.batch_sizes]
    predicted = dict(zip(times.batch_sizes, capacities(scenarios, slo).tolist(), strict=True))
    bound = smallest_bound(predicted)
    return bound, predicted[bound]


def smallest_bound(predicted: Mapping[int, float]) -> int:
    """The batch bound to serve with: the smallest within 2% of the best.

    Service times are no more precise, and a late batch delays fewer requests if it is small.

    Args:
        predicted: batch bound -> predicted capacity, at least one.
    """
    least = 0.98 * max(predicted.values())
    return min(bound for bound, rate in predicted.items() if rate >= least)
