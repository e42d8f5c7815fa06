"""Rushes: hours of changing load on a real cell with its ladder, in virtual time.

Queue, admission, controller and account are the server's own; only the engines are fakes, with given times. So what is
seen here is what the server does, except for what the network and the processor add.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from rushhour.engines import EngineConfig
from rushhour.goal import SLO, AccuracyBudget, Goal
from rushhour.ladder import WINDOW, LadderPoint
from rushhour.measurement import ServiceTimes
from rushhour.plan import Plan, Policy, Variant
from rushhour.serve.scheduling.admission import Profile
from rushhour.serve.scheduling.cell import Cell
from rushhour.serve.scheduling.job import Shed
from rushhour.serve.scheduling.ladder import Ladder
from rushhour.serve.scheduling.variant import Variant as CellVariant
from rushhour.testing.fakes import FakeEngine
from rushhour.testing.virtual_loop import VirtualLoop, run_virtually
from rushhour.wire import Codec, InferRequest, Wanted

_WANTED: Final = Wanted(id="", outputs=(0,), binary=(True,))
_SAMPLE: Final = bytes(16)
_LAST_S: Final = 5.0


@dataclasses.dataclass(frozen=True)
class Step:
    """One rung of a ladder under test.

    Attributes:
        base_s, sample_s: a batch of n samples takes `base_s + n sample_s`.
        rate: samples per second that it is said to carry.
        drop: the accuracy drop of each answer.
        max_batch: samples in one batch.
    """

    base_s: float
    sample_s: float
    rate: float
    drop: float
    max_batch: int = 8

    def seconds(self, rows: int) -> float:
        """Of a batch."""
        return self.base_s + self.sample_s * rows


@dataclasses.dataclass(frozen=True)
class Answers:
    """What became of the requests of a rush.

    Attributes:
        ended_s: when each answer was given, in that order.
        rung: that gave it.
        latency_s: from its arrival.
        shed: requests that were shed.
        switches: when the rung changed, and to which.
        limit_s: of the latency.
    """

    ended_s: NDArray[np.float64]
    rung: NDArray[np.int64]
    latency_s: NDArray[np.float64]
    shed: int
    switches: tuple[tuple[float, int], ...]
    limit_s: float

    @property
    def good(self) -> int:
        """Answers within the limit."""
        return int((self.latency_s <= self.limit_s).sum())

    def share(self, rung: int, begin_s: float = 0.0, end_s: float = np.inf) -> float:
        """The share of a rung among the answers between two times; 1 where there are none."""
        inside = (self.ended_s >= begin_s) & (self.ended_s < end_s)
        return float((self.rung[inside] == rung).mean()) if inside.any() else 1.0

    def highest_mean(self, drops: Sequence[float], window: int) -> float:
        """The highest mean drop of any `window` answers in a row; answers before the first count as accurate ones."""
        sums = np.concatenate([np.zeros(window), [0.0], np.cumsum(np.asarray(drops)[self.rung])])
        return round(float((sums[window:] - sums[:-window]).max()) / window, 12)


def arrivals(rates: Sequence[tuple[float, float]], seed: int) -> NDArray[np.float64]:
    """Times of Poisson arrivals, ascending.

    Args:
        rates: `(seconds, rate at their end)`: the rate moves evenly to it. It begins with the first one's rate.
        seed: of the random numbers.
    """
    ends = np.cumsum([0.0, *(seconds for seconds, _ in rates)])
    values = np.array([rates[0][1], *(rate for _, rate in rates)])
    grid = np.linspace(0.0, ends[-1], max(2, int(ends[-1] * 100)))
    expected = np.concatenate([[0.0], np.cumsum(np.diff(grid) * np.interp(grid, ends, values)[1:])])
    random = np.random.default_rng(seed)
    units = np.cumsum(random.exponential(1.0, int(expected[-1] * 1.2) + 100))
    times: NDArray[np.float64] = np.interp(units[units < expected[-1]], expected, grid)
    return times


def random_rates(seed: int, top: float, seconds: float = 120.0) -> list[tuple[float, float]]:
    """Load that nobody planned: quiet, jumps, ramps, spikes and waves, from 0.05 to 4 times a rate.

    Args:
        seed: of the random numbers.
        top: that rate.
        seconds: of all together.
    """
    random = np.random.default_rng([seed, 11])
    rates: list[tuple[float, float]] = []
    left = seconds
    while left > 0:
        rate = top * float(np.exp(random.uniform(np.log(0.05), np.log(4.0))))
        kind = random.integers(5)
        if kind == 0:
            rates += [(0.01, rate), (float(random.uniform(2, 30)), rate)]
        elif kind == 1:
            rates.append((float(random.uniform(1, 20)), rate))
        elif kind == 2:
            rates += [(2.0, 4 * rate), (float(random.uniform(1, 8)), 4 * rate), (2.0, rate)]
        elif kind == 3:
            for _ in range(int(random.integers(2, 8))):
                rates += [(float(random.uniform(0.5, 4)), rate), (float(random.uniform(0.5, 4)), 0.3 * rate)]
        else:
            rates += [(0.01, 0.2 * top), (float(random.uniform(5, 30)), 0.2 * top)]
        left = seconds - sum(duration for duration, _ in rates)
    return rates


def plan_of(steps: Sequence[Step], limit_s: float, budget: float, window: int) -> Plan:
    """A plan with this ladder; its variants are called `0`, `1`, ..."""
    variants = tuple(
        Variant(str(number), f"bundles/{number}", "0" * 64, "openvino", "f32") for number in range(len(steps))
    )
    goal = Goal(SLO(99, limit_s), AccuracyBudget(budget))
    plan = Plan(goal, variants, Policy(max_batch=max(step.max_batch for step in steps), deadline_ms=1e3 * limit_s))
    return plan.with_ladder(
        [
            LadderPoint(str(number), step.max_batch, step.rate, 1 - step.drop, step.drop, (step.drop, step.drop))
            for number, step in enumerate(steps)
        ],
        window=window,
    )


def rush(
    times: NDArray[np.float64],
    steps: Sequence[Step],
    *,
    limit_s: float = 0.05,
    budget: float = 0.01,
    window: int = WINDOW,
    streams: int = 1,
    fixed: int | None = None,
) -> Answers:
    """Send requests of one sample each to a cell, at these times.

    Args:
        times: of their arrivals, in seconds, ascending.
        steps: of the ladder, from the most accurate to the fastest.
        limit_s: of the latency; what would be late is shed.
        budget: of accuracy.
        window: answers that the budget is kept over.
        streams: batches at the same time.
        fixed: the rung that stays; None has the controller choose.
    """
    return run_virtually(_rush(times, steps, limit_s, budget, window, streams, fixed))


async def _rush(
    times: NDArray[np.float64],
    steps: Sequence[Step],
    limit_s: float,
    budget: float,
    window: int,
    streams: int,
    fixed: int | None,
) -> Answers:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    plan = plan_of(steps, limit_s, budget, window)
    variants = []
    for number, step in enumerate(steps):
        config = EngineConfig("openvino", streams=streams, max_batch=step.max_batch)
        engine = FakeEngine(config, service_s=step.seconds, schedule=loop.call_later)
        sizes = tuple(dict.fromkeys((1, max(1, step.max_batch // 2), step.max_batch)))
        seconds = tuple(step.seconds(size) for size in sizes)
        speeds = tuple(streams * size / s for size, s in zip(sizes, seconds, strict=True))
        variants.append(CellVariant(engine, Profile(ServiceTimes(sizes, seconds, speeds)), name=str(number)))
    codec = Codec("fake", variants[0].engine.signature)
    cell = Cell(variants, codec, plan.policy, loop)
    if fixed is None:
        cell.ladder = Ladder(cell, plan)
    else:
        cell.use(variants[fixed])
    ended: list[tuple[float, int, float]] = []
    switches: list[tuple[float, int]] = []
    active, shed, at = cell.active, 0, 0

    def send() -> None:
        nonlocal at, shed, active
        while at < len(times) and times[at] <= loop.time() + 1e-9:
            arrived = float(times[at])
            at += 1

            def reply(result: Sequence[memoryview] | Exception, arrived: float = arrived) -> None:
                nonlocal shed, active
                if isinstance(result, Exception):
                    shed += 1
                    return
                assert cell.answering is not None
                ended.append((loop.time(), int(cell.answering.variant), loop.time() - arrived))

            if isinstance(cell.submit(InferRequest(1, (memoryview(_SAMPLE),), _WANTED), reply), Shed):
                shed += 1
        if cell.active is not active:
            active = cell.active
            switches.append((loop.time(), int(active.name)))
        if at < len(times):
            loop.call_at(float(times[at]), send)

    if len(times):
        loop.call_at(float(times[0]), send)
        await asyncio.sleep(float(times[-1]) + _LAST_S)
    cell.close()
    found = np.array(ended, dtype=np.float64).reshape(-1, 3)
    return Answers(found[:, 0], found[:, 1].astype(np.int64), found[:, 2], shed, tuple(switches), limit_s)
