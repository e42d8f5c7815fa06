"""What this machine gives of a Plan that was measured on another one.

A Plan moves: to a node with another processor, to a container with a quota. Where nothing differs, nothing is measured.
Else the engine is timed for two seconds instead of an instant, and the capacity is simulated from these times and from
those of the Plan's machine, with the same overhead of serving: the one with which the simulation gives the capacity
that was found there.
"""

from __future__ import annotations

import os
from typing import Final

import msgspec

from rushhour.capacity import Overhead, Scenario, ServiceProfile, capacities, explained_overhead
from rushhour.goal import SLO
from rushhour.measurement import ServiceTimes
from rushhour.plan import Plan, Policy
from rushhour.system.machine import Machine, describe, limits

_TIMED_S: Final = 2.0
_ENOUGH_MEMORY: Final = 0.9


class Fit(msgspec.Struct, frozen=True):
    """How this machine differs from the one that a Plan was measured on, and what the Plan gave there.

    Attributes:
        differences: in words; at least one.
        slo: of the Plan.
        plan_rps: the capacity there, by simulation; 0 where it is not known.
        request_s: CPU seconds of a request beside the engine, in that simulation.
    """

    differences: tuple[str, ...]
    slo: SLO
    plan_rps: float = 0.0
    request_s: float = 0.0

    def share(self, times: ServiceTimes, policy: Policy, cores: int) -> float | None:
        """The capacity of a cell on this machine, as a share of the Plan's; None where that is not known.

        Args:
            times: of its engine, on this machine.
            policy: of the cell.
            cores: that the cell may use.
        """
        if not self.plan_rps:
            return None
        return float(capacities([_scenario(times, policy, cores, self.request_s)], self.slo)[0]) / self.plan_rps

    def line(self, share: float | None) -> str:
        """One line for people.

        Args:
            share: of all cells together.
        """
        why = "; ".join(self.differences)
        if share is None:
            return f"this is not the Plan's machine: {why}"
        return f"this node gives {share:.0%} of the Plan's capacity: {why}"


def seconds_per_size(max_batch: int) -> float:
    """How long each size of a batch is timed on another machine than the Plan's: two seconds in all."""
    return _TIMED_S / (2 * max_batch.bit_length())


def fit_of(plan: Plan) -> Fit | None:
    """How this machine differs from the plan's; None where it does not, or the plan has no evidence.

    Args:
        plan: as it was tuned, with its engine's times.
    """
    evidence = plan.evidence
    if evidence is None:
        return None
    found = differences(evidence.machine, describe(), limits())
    if not found:
        return None
    known, policy, slo = evidence.alone_rps or evidence.capacity_rps, plan.policy, plan.goal.slo
    times = evidence.service_times
    if times is None or not known:
        return Fit(found, slo, known)
    whole = msgspec.structs.replace(policy, streams=policy.cells * policy.streams)
    cores = evidence.machine.cores
    request_s, plan_rps = explained_overhead(lambda each: _scenario(times, whole, cores, each), known, slo)
    return Fit(found, slo, plan_rps, request_s)


def differences(there: Machine, here: Machine, granted: tuple[int, float | None]) -> tuple[str, ...]:
    """How a machine differs from the one that a plan was measured on, in words; empty where it does not.

    Args:
        there: the plan's machine.
        here: this one.
        granted: its cores by CPU affinity, and its CPUs by quota (`rushhour.system.machine.limits`).
    """
    found = []
    if here.cores < there.cores:
        found.append(f"{here.cores} of {there.cores} cores{_cause(granted)}")
    elif here.cores > there.cores:
        found.append(f"{here.cores} cores instead of {there.cores}")
    missing = [feature for feature in there.features if feature not in here.features]
    if here.isa != there.isa:
        found.append(f"class {here.isa} instead of {there.isa}")
    if missing:
        found.append(f"no {', '.join(missing)}")
    if here.cpu != there.cpu:
        found.append(f"{here.cpu} instead of {there.cpu}")
    if here.memory_gb < _ENOUGH_MEMORY * there.memory_gb:
        found.append(f"{here.memory_gb:g} of {there.memory_gb:g} GiB of memory")
    return tuple(found)


def _cause(granted: tuple[int, float | None]) -> str:
    """Why a process has fewer cores than there may be."""
    allowed, quota = granted
    if quota is not None and quota < allowed:
        return " (CFS quota)" if quota == int(quota) else f" (CFS quota of {quota:g})"
    return " (CPU affinity)" if allowed < (os.cpu_count() or allowed) else ""


def _scenario(times: ServiceTimes, policy: Policy, cores: int, request_s: float) -> Scenario:
    """All cells as one process.

    Args:
        times: of the engine.
        policy: its streams are those of all cells.
        cores: of all cells.
        request_s: CPU seconds of a request beside the engine.
    """
    profile, spare = ServiceProfile(times), max(0, cores - policy.streams * policy.threads)
    return Scenario(profile, policy.streams, min(policy.max_batch, profile.largest), Overhead(request_s, spare))
