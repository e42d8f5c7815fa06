"""How many machines a rate takes, from a Plan's capacity and the simulator that predicted it.

A machine of the Plan's kind carries what was measured there. Another one, or another number of processes, carries as
much more or less as the simulation says: processes share nothing but the cores, so each is a queue of its own with its
part of the requests. What the balancer in front of them costs is not counted.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from rushhour.capacity import Overhead, Scenario, ServiceProfile, capacities, explained_overhead
from rushhour.errors import GoalError, PlanError
from rushhour.measurement import Interval
from rushhour.plan import Evidence, Plan
from rushhour.system.machine import Machine

_BIN_ARRIVALS: Final = 50
"""Of a trace in one step of time, on average: below it, chance would look like bursts."""
_MOST_MACHINES: Final = 10_000_000
_SHARED_LOOP_S, _SHARED_CORES = 300e-6, 1.1
"""Where several streams of one process use all cores, a batch waits for the event loop that they share, and takes
longer by this factor, because its thread may be moved to a core where another runs. Fitted on the 30 pairs of plans in
benchmarks/results/tune_space.json that differ in nothing but one process or two: so the capacity of two is predicted
from that of one with an error of 11% in the median, without it of 21%. Full batches that wait in the engine wait for no
loop (docs/decisions/0063); those pairs were measured before there were any."""
_ON_ONE_CORE: Final = 0.9
"""What several processes carry on one core, of what one carries there: each has fewer requests for a batch. Four on two
cores carried 0.90 of two on one kind of machine, and 0.76 to 0.93 on another."""


class Node(msgspec.Struct, frozen=True):
    """A machine that is to serve.

    Attributes:
        cores: it has.
        speed: of one core, over that of the Plan's machine.
        watts: it takes under load; None where that is not known.
        processes: of the server; None for as many for each core as the Plan has.
    """

    cores: int
    speed: float = 1.0
    watts: float | None = None
    processes: int | None = None


@dataclasses.dataclass(frozen=True)
class Sizing:
    """What a rate takes.

    Attributes:
        rate_rps: on average.
        peak_rps: the highest of the trace, over the time of one of its steps; the rate itself without a trace.
        machine_rps: what one machine carries within the SLO.
        machine_interval_rps: 95%; None where the Plan has none.
        kind: how the capacity is known: `proven` or `estimated` on the Plan's machine; `predicted` from there for
            another machine or other processes.
        carrying: machines that carry the rate.
        spare: further ones, which may fail at the same time.
        machines: both together.
        machines_interval: the same at both ends of the interval; None where there is none.
        processes: of the server, on all machines.
        cores: of all machines.
        watts: of all machines; None where a machine's are not known.
        alone_rps: what one machine is predicted to carry without the load generator, which the measurement had on it.
        slo: of the Plan.
        node: one machine.
        notes: what the numbers assume.
    """

    rate_rps: float
    peak_rps: float
    machine_rps: float
    machine_interval_rps: Interval | None
    kind: str
    carrying: int
    spare: int
    machines: int
    machines_interval: tuple[int, int] | None
    processes: int
    cores: int
    watts: float | None
    alone_rps: float | None
    slo: str
    node: Node
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """What `rushhour plan --json` writes."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found


def read_node(text: str, there: Machine) -> Node:
    """A machine as words: `cores=16`, `cores=16,speed=0.8,watts=250,processes=4`.

    Args:
        text: what differs from the Plan's machine.
        there: that machine.

    Raises:
        GoalError: if it cannot be read.
    """
    given: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (each.strip() for each in part.partition("="))
        if not equals or name in given or name not in _LIMITS:
            why = f"{name!r} is given twice" if name in given else f"{part!r} is none of its settings"
            raise _unreadable(text, why)
        given[name] = value
    found: dict[str, Any] = {"cores": there.cores}
    for name, value in given.items():
        kind, most = _LIMITS[name]
        try:
            number = kind(value)
        except ValueError:
            raise _unreadable(text, f"{value!r} is no {'whole ' if kind is int else ''}number") from None
        if not 0 < number <= most:
            raise _unreadable(text, f"{name} is {value}, and must be above 0 and at most {most:g}")
        found[name] = number
    return Node(**found)


def size(
    plan: Plan, rate_rps: float, node: Node, *, failures: int = 1, trace: NDArray[np.float64] | None = None
) -> Sizing:
    """How many machines carry a rate within the Plan's SLO.

    Args:
        plan: with evidence.
        rate_rps: on average, in requests per second.
        node: one of the machines.
        failures: machines that may fail at the same time.
        trace: arrivals in seconds, ascending, shape `(n,)`: how the rate varies around its average. None for
            independent users at a steady rate.

    Raises:
        GoalError: if the rate is not above 0, or takes more than ten million machines.
        PlanError: if the plan says nothing of its capacity.
    """
    if not (math.isfinite(rate_rps) and rate_rps > 0):
        raise GoalError(f"cannot plan for {rate_rps:g} requests per second", "it is not above 0", "give a rate above 0")
    if failures < 0:
        raise GoalError(f"cannot plan for {failures} machines that fail", "it is below 0", "give 0 or more")
    evidence = plan.evidence
    if evidence is None or not evidence.capacity_rps:
        why = "it has no evidence" if evidence is None else "its SLO held at no rate"
        raise PlanError("cannot plan with this Plan", why, "tune it first: rushhour tune")
    share, notes = _share(plan, evidence, node)
    shown = Node(node.cores, node.speed, node.watts, _processes(plan, evidence, node))
    machine_rps = evidence.capacity_rps * share
    bounds = evidence.capacity_interval_rps
    around = None if bounds is None else (min(bounds[0], evidence.capacity_rps), max(bounds[1], evidence.capacity_rps))
    measured = "proven" if evidence.proven else "estimated"
    kind = measured if _is_measured(plan, evidence, shown) else "predicted"
    rates = _Rates(rate_rps, trace, plan.goal.slo.limit_ms / 1e3)
    allowed = plan.goal.slo.allowed_miss_rate

    def needed(capacity_rps: float) -> int:
        return rates.machines(capacity_rps * share, allowed)

    carrying = needed(evidence.capacity_rps)
    interval = None
    if around is not None:
        interval = needed(around[1]) + failures, needed(around[0]) + failures
    machines = carrying + failures
    return Sizing(
        rate_rps=rate_rps,
        peak_rps=rates.peak_rps,
        machine_rps=machine_rps,
        machine_interval_rps=None if around is None else (around[0] * share, around[1] * share),
        kind=kind,
        carrying=carrying,
        spare=failures,
        machines=machines,
        machines_interval=interval,
        processes=machines * (shown.processes or 1),
        cores=machines * node.cores,
        watts=None if node.watts is None else machines * node.watts,
        alone_rps=None if evidence.alone_rps is None else evidence.alone_rps * share,
        slo=str(plan.goal.slo),
        node=shown,
        notes=notes,
    )


class _Rates:
    """The rate over time, in steps of equal length.

    Args:
        rate_rps: on average.
        trace: arrivals in seconds, ascending; None for a steady rate.
        limit_s: of the latency: what is shorter than that, a queue takes.
    """

    def __init__(self, rate_rps: float, trace: NDArray[np.float64] | None, limit_s: float) -> None:
        self._rates = np.array([rate_rps])
        if trace is not None:
            lasts_s = float(trace[-1] - trace[0])
            steps = max(1, int(min(len(trace) / _BIN_ARRIVALS, lasts_s / limit_s)))
            counts, _ = np.histogram(trace, bins=steps)
            self._rates = rate_rps * counts / counts.mean()

    @property
    def peak_rps(self) -> float:
        """The highest."""
        return float(self._rates.max())

    def machines(self, capacity_rps: float, allowed: float) -> int:
        """The least number of machines that together answer all requests in time, but for the share `allowed`.

        What is above their capacity is late or turned away; the rest is in time.

        Raises:
            GoalError: if it takes more than ten million.
        """
        whole = self._rates.sum()
        if self.peak_rps / capacity_rps > _MOST_MACHINES:
            why = f"it takes more than {_MOST_MACHINES:,} machines of {capacity_rps:,.3g} requests per second each"
            raise GoalError(f"cannot plan for {self._rates.mean():,.3g} requests per second", why, "give a lower rate")
        low, high = 0, max(1, math.ceil(self.peak_rps / capacity_rps))
        while high - low > 1:  # `high` are enough, `low` are not
            middle = (low + high) // 2
            missed = np.maximum(0.0, self._rates - middle * capacity_rps).sum()
            low, high = (low, middle) if missed <= allowed * whole and len(self._rates) > 1 else (middle, high)
        return high


def _processes(plan: Plan, evidence: Evidence, node: Node) -> int:
    """Server processes on one machine: for each core as many as on the Plan's machine."""
    return node.processes or max(1, node.cores * plan.policy.cells // max(1, evidence.machine.cores))


def _is_measured(plan: Plan, evidence: Evidence, node: Node) -> bool:
    """Whether a machine is as the Plan's, with as many processes."""
    return (node.cores, node.processes, node.speed) == (max(1, evidence.machine.cores), plan.policy.cells, 1.0)


def _share(plan: Plan, evidence: Evidence, node: Node) -> tuple[float, tuple[str, ...]]:
    """The capacity of a machine as a share of the Plan's, and what that assumes."""
    processes = _processes(plan, evidence, node)
    notes = ["requests are spread evenly over all machines; what a balancer costs is not counted"]
    if _is_measured(plan, evidence, Node(node.cores, node.speed, processes=processes)):
        return 1.0, tuple(notes)
    own = max(1, evidence.machine.cores), plan.policy.cells
    notes.append("memory bandwidth and caches are taken to grow with the cores")
    if evidence.service_times is None:
        notes.append("the Plan has no service times: its capacity is scaled by cores and speed")
        return node.cores / own[0] * node.speed, tuple(notes)
    request_s = _request_s(plan, evidence)
    here, there = capacities(
        [
            _scenario(plan, evidence, *own, 1.0, request_s),
            _scenario(plan, evidence, node.cores, processes, node.speed, request_s),
        ],
        plan.goal.slo,
    ).tolist()
    return there * _worth(processes, node.cores) / (here * _worth(own[1], own[0])), tuple(notes)


def _queues(processes: int, cores: int) -> int:
    """As how many processes so many count: of more than cores, those of one core take turns batch by batch, nearly as
    one with all their requests does."""
    return min(processes, cores)


def _worth(processes: int, cores: int) -> float:
    """As how many queues so many processes carry."""
    return _queues(processes, cores) * (_ON_ONE_CORE if processes > cores else 1.0)


def _goes_ahead(plan: Plan) -> bool:
    """Whether full batches wait in the engine."""
    engine, policy = plan.variants[0].engine, plan.policy
    queues = engine == "openvino" or (engine == "onnxruntime" and policy.threads == 1)
    alone = not plan.ladder and plan.cascade is None
    return queues and alone and isinstance(policy.buckets, msgspec.UnsetType)


def _request_s(plan: Plan, evidence: Evidence) -> float:
    """CPU seconds of a request beside the engine with which the simulation gives the Plan's capacity."""
    cores, cells = max(1, evidence.machine.cores), plan.policy.cells
    request_s, _ = explained_overhead(
        lambda each: _scenario(plan, evidence, cores, cells, 1.0, each),
        evidence.capacity_rps,
        plan.goal.slo,
        processes=_queues(cells, cores),
    )
    return request_s


def _scenario(plan: Plan, evidence: Evidence, cores: int, processes: int, speed: float, request_s: float) -> Scenario:
    """One of the processes of a machine.

    Each is a queue of its own. It has its part of the cores, and the engine the share of them that it has in the Plan.
    """
    policy, times = plan.policy, evidence.service_times
    assert times is not None
    processes = _queues(processes, cores)
    room = max(1, cores // processes)
    measured = max(1, evidence.machine.cores // policy.cells)
    lanes = max(1, room * policy.streams * policy.threads // measured)
    threads = min(policy.threads, lanes)
    streams, longer = lanes // threads, max(1.0, processes * lanes / cores) / speed
    stretched = msgspec.structs.replace(
        times,
        seconds=tuple(seconds * longer for seconds in times.seconds),
        throughput=tuple(rate / longer for rate in times.throughput),
    )
    profile, spare = ServiceProfile(stretched), max(0, room - streams * threads)
    shared = streams > 1 and not spare
    slowdown = _SHARED_CORES if shared else 1.0
    batch_s = _SHARED_LOOP_S / speed if shared and not _goes_ahead(plan) else 0.0
    overhead = Overhead(request_s * longer, spare, slowdown, batch_s)
    return Scenario(profile, streams, min(policy.max_batch, profile.largest), overhead)


_LIMITS: Final[dict[str, tuple[type[int] | type[float], float]]] = {
    "cores": (int, 100_000),
    "processes": (int, 100_000),
    "speed": (float, 1000.0),
    "watts": (float, 1e6),
}


def _unreadable(text: str, why: str) -> GoalError:
    return GoalError(f"cannot read the machine {text!r}", why, "write for example cores=16,speed=0.8,watts=250")
