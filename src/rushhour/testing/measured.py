"""A small space of plans that was measured exhaustively: the record that searches are replayed on (`replay`)."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from rushhour.capacity import Overhead, ServiceProfile, predicted_capacity
from rushhour.goal import SLO, Goal
from rushhour.load import estimate
from rushhour.measurement import Accuracy, Interval, Measurement, Outcome, ServiceTimes
from rushhour.plan import EngineName, Precision
from rushhour.system.storage import write_whole
from rushhour.tune.space import Candidate, basic_layouts

BLOCKS = 20
"""Of a window, as in `Measurement.blocks`."""


class OpenWindow(msgspec.Struct, frozen=True, omit_defaults=True):
    """A recorded window of open-loop load: what a replay needs of a `Measurement`."""

    rate_rps: float
    n: int
    late: int
    outcome: Outcome
    blocks: tuple[int, ...] = ()
    p50_ms: float | None = None
    p99_ms: float | None = None
    generator_cpu: float = 0.0
    server_cpu: float | None = None
    speeds: tuple[float, ...] = ()

    @classmethod
    def of(cls, window: Measurement) -> OpenWindow:
        """What is kept of a window."""

        def short(value: float | None, digits: int = 4) -> float | None:
            return None if value is None else float(f"{value:.{digits}g}")

        return cls(
            rate_rps=window.rate_rps,
            n=window.n,
            late=window.late,
            outcome=window.outcome,
            blocks=window.blocks if window.late else (),
            p50_ms=short(window.p50_ms),
            p99_ms=short(window.p99_ms),
            generator_cpu=round(window.generator_cpu, 3),
            server_cpu=short(window.server_cpu),
            speeds=tuple(round(speed, 2) for speed in window.speeds),
        )

    def as_measurement(self, slo: SLO) -> Measurement:
        """As one, without what was not kept."""
        return measurement(
            slo, self.rate_rps, 0, self.n, self.late, self.outcome, self, blocks=self.blocks or (0,) * BLOCKS
        )


class MeasuredPlan(msgspec.Struct, frozen=True):
    """One plan of the space and its measurements.

    Attributes:
        bundle: its role.
        layout: cells, streams of each, threads of each.
        closed: users and answers in time per second of each closed loop.
        windows: of open-loop load.
        capacity_rps: by all windows; 0 where the SLO held in none.
        interval_rps: its 95% interval.
        seconds: that it took to measure.
        speed: of the host beside it, relative to a reading that all speeds of the space share.
        order: of its first measurement among all.
    """

    bundle: str
    engine: EngineName
    precision: Precision
    layout: tuple[int, int, int]
    max_batch: int
    closed: tuple[tuple[int, float], ...]
    windows: tuple[OpenWindow, ...]
    capacity_rps: float
    interval_rps: Interval
    seconds: float = 0.0
    order: int = 0
    speed: float = 1.0

    @property
    def artefact(self) -> str:
        """Its bundle, engine and precision."""
        return f"{self.bundle}/{self.engine}/{self.precision}"

    @property
    def compiled(self) -> str:
        """The same with its layout of the cores."""
        return f"{self.artefact}/c{self.layout[0]}s{self.layout[1]}t{self.layout[2]}"

    @property
    def name(self) -> str:
        """The same with the batch bound."""
        return f"{self.compiled}b{self.max_batch}"


class MeasuredSpace(msgspec.Struct, frozen=True, dict=True):
    """A space of plans that was measured exhaustively.

    Attributes:
        goal: of all measurements.
        cores: of the machine.
        precisions: role -> precision of its bundle; the first role is `reference`.
        service: `MeasuredPlan.compiled` -> service times of the engine alone.
        accuracy: `MeasuredPlan.artefact` -> accuracy on the validation part and on the test part.
        plans: each once.
        speeds: `MeasuredPlan.compiled` -> speed of the host while its engine was timed, as `MeasuredPlan.speed`; 1
            where it is not recorded.
        about: of the measurement: machine, versions, date, and what shows its noise.
    """

    goal: Goal
    cores: int
    precisions: dict[str, Precision]
    service: dict[str, ServiceTimes]
    accuracy: dict[str, tuple[Accuracy, Accuracy]]
    plans: tuple[MeasuredPlan, ...]
    speeds: dict[str, float] = {}
    about: dict[str, Any] = {}

    @classmethod
    def load(cls, path: Path) -> MeasuredSpace:
        """Read it, and check its form."""
        return msgspec.json.decode(path.read_bytes(), type=cls)

    def save(self, path: Path) -> None:
        """Write it as JSON, one plan a line."""
        whole = msgspec.to_builtins(self)
        parts = [f'"{key}":{_json(value)}' for key, value in whole.items() if key != "plans"]
        plans = ",\n".join(map(_json, whole["plans"]))
        write_whole(path, ("{" + ",\n".join(parts) + f',\n"plans":[\n{plans}\n]}}\n').encode())

    @functools.cached_property
    def by_name(self) -> dict[str, MeasuredPlan]:
        """The plans by their names."""
        return {plan.name: plan for plan in self.plans}

    def bounds(self, compiled: str) -> tuple[int, ...]:
        """The batch bounds at which a compiled artefact was measured, ascending."""
        return tuple(sorted(plan.max_batch for plan in self.plans if plan.compiled == compiled))


def name_of(candidate: Candidate) -> str:
    """The name of a candidate's plan in a `MeasuredSpace`, whatever the bytes of its bundle."""
    return f"{compiled_of(candidate)}b{candidate.policy.max_batch}"


def artefact_of(candidate: Candidate) -> str:
    """As `MeasuredPlan.artefact`."""
    return f"{candidate.bundle}/{candidate.engine}/{candidate.precision}"


def compiled_of(candidate: Candidate) -> str:
    """As `MeasuredPlan.compiled`."""
    cells, streams, threads = candidate.layout
    return f"{artefact_of(candidate)}/c{cells}s{streams}t{threads}"


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def measurement(
    slo: SLO,
    rate_rps: float,
    seed: int,
    n: int,
    late: int,
    outcome: Outcome,
    of: OpenWindow,
    *,
    blocks: Sequence[int] = (),
) -> Measurement:
    """A replayed window, with the latencies and the CPU time of a recorded one."""
    p99 = None if outcome is Outcome.UNSTABLE else of.p99_ms
    scale = rate_rps / of.rate_rps
    return Measurement(
        slo=slo,
        rate_rps=rate_rps,
        seed=seed,
        duration_s=n / rate_rps,
        n=n,
        late=late,
        errors=0,
        shed=0,
        p50_ms=of.p50_ms,
        p99_ms=p99,
        p99_interval_ms=None if p99 is None else (p99, p99),
        goodput_rps=rate_rps * (n - late) / n,
        generator_cpu=of.generator_cpu * scale,
        send_delay_p99_ms=0.0,
        outcome=outcome,
        reason="replayed",
        latencies="",
        blocks=tuple(blocks),
        server_cpu=None if of.server_cpu is None else of.server_cpu * scale,
        speeds=of.speeds,
    )


def invented_space(cores: int, goal: Goal, *, seed: int = 0, bounds: Sequence[int] = (1, 4, 16)) -> MeasuredSpace:
    """A space that nobody measured: service times are numbers, and capacities follow from them by simulation.

    Args:
        cores: as in `MeasuredSpace`.
        goal: of all windows.
        seed: of service times and windows.
        bounds: of the batches.
    """
    random = np.random.default_rng(seed)
    precisions: dict[str, Precision] = {"reference": "f32", "int8": "int8", "small": "f32", "small-int8": "int8"}
    service: dict[str, ServiceTimes] = {}
    accuracy: dict[str, tuple[Accuracy, Accuracy]] = {}
    plans: list[MeasuredPlan] = []
    engines: tuple[EngineName, ...] = ("openvino", "onnxruntime")
    for (role, precision), engine, layout in itertools.product(precisions.items(), engines, basic_layouts(cores)):
        streams = layout[0] * layout[1]
        sample_s = (0.5 if "small" in role else 1.0) * (0.4 if precision == "int8" else 1.0) * 0.4e-3
        sample_s *= (1.3 if engine == "onnxruntime" else 1.0) * float(random.uniform(0.9, 1.1)) * streams / cores
        sizes = tuple(2**power for power in range(7))
        seconds = tuple(3 * sample_s + sample_s * size for size in sizes)
        times = ServiceTimes(sizes, seconds, tuple(streams * size / s for size, s in zip(sizes, seconds, strict=True)))
        for bound in bounds:
            plan = MeasuredPlan(role, engine, precision, layout, bound, (), (), 0.0, (0.0, 0.0), 15.0, len(plans))
            capacity = predicted_capacity(
                ServiceProfile(times), streams=streams, max_batch=bound, slo=goal.slo, overhead=Overhead(60e-6)
            )
            plans.append(_invented(plan, capacity, goal.slo, random))
            service[plan.compiled] = times
            value = 0.89 if "small" in role else 0.9
            validation, test = (
                Accuracy(
                    "accuracy", value, (value - 0.01, value + 0.01), 5000, part, 0.9 - value, (0.0, 0.9001 - value)
                )
                for part in ("validation", "test")
            )
            accuracy[plan.artefact] = validation, test
    return MeasuredSpace(goal, cores, precisions, service, accuracy, tuple(plans))


def _invented(plan: MeasuredPlan, capacity: float, slo: SLO, random: np.random.Generator) -> MeasuredPlan:
    """A plan with windows around its capacity."""
    windows = []
    for share in (0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.15):
        n = max(500, round(1.5 * share * capacity))
        miss = min(0.9, slo.allowed_miss_rate * math.exp(40 * (share - 1)))
        blocks = tuple(random.binomial(n // BLOCKS, miss, BLOCKS).tolist())
        late = sum(blocks)
        outcome = Outcome.UNSTABLE if miss > 0.5 else Outcome.INCONCLUSIVE
        windows.append(
            OpenWindow(float(f"{share * capacity:.4g}"), n, late, outcome, blocks, 5.0, 40.0, 0.2, 0.8, (1.0,) * 12)
        )
    users = max(1, round(0.4 * capacity * slo.limit_s))
    closed = tuple((users, float(capacity * random.normal(1.1, 0.02))) for _ in range(5))
    found = estimate([window.as_measurement(slo) for window in windows], slo)
    rate, interval = (found.rate_rps, found.interval_rps) if found else (0.0, (0.0, 0.0))
    return msgspec.structs.replace(
        plan, closed=closed, windows=tuple(windows), capacity_rps=rate, interval_rps=interval
    )
