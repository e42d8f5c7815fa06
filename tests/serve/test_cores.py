"""Models share the cores of a process by weight: none starves another, and nobody waits while cores are idle.

Everything is replayed in virtual time: arrivals, batches and answers of whole cells.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_cell import Held, put, turns, unique

from rushhour.clock import WallClock
from rushhour.engines import EngineConfig
from rushhour.errors import EngineError
from rushhour.measurement import ServiceTimes
from rushhour.plan import Policy
from rushhour.serve.scheduling.admission import Profile
from rushhour.serve.scheduling.cell import Cell
from rushhour.serve.scheduling.cores import Cores, shared_cores
from rushhour.serve.scheduling.lanes import Lanes
from rushhour.serve.scheduling.variant import Variant
from rushhour.testing.fakes import FakeEngine
from rushhour.testing.virtual_loop import VirtualLoop, run_virtually
from rushhour.wire import Codec, InferRequest, Wanted

WANTED = Wanted(id="", outputs=(0,), binary=(True,))


@dataclasses.dataclass
class Model:
    """A model of a node in virtual time, and what its requests met.

    Attributes:
        latencies: of answers, in seconds.
    """

    cell: Cell
    engine: FakeEngine
    limit_s: float
    seconds: Callable[[int], float]
    asked: int = 0
    latencies: list[float] = dataclasses.field(default_factory=list)

    @property
    def capacity(self) -> float:
        """Samples per second, alone, in batches of the largest size."""
        config = self.engine.config
        return config.streams * config.max_batch / self.seconds(config.max_batch)

    @property
    def goodput(self) -> float:
        """The share of its requests that were answered within the limit."""
        return sum(latency <= self.limit_s for latency in self.latencies) / self.asked

    def ask(self, loop: VirtualLoop) -> None:
        self.asked += 1
        arrived = loop.now()
        request = InferRequest(1, (memoryview(unique(1, 0).tobytes()),), WANTED)
        self.cell.submit(request, lambda result: self._answered(result, loop.now() - arrived))

    def _answered(self, result: object, took_s: float) -> None:
        if not isinstance(result, Exception):
            self.latencies.append(took_s)


class Node:
    """Models on the cores of one process, on the running virtual loop."""

    def __init__(self, room: int) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self.loop = loop
        self.cores = Cores(room, loop)

    def model(
        self,
        *,
        limit_s: float,
        base_s: float,
        sample_s: float,
        max_batch: int = 16,
        streams: int = 1,
        threads: int = 1,
        weight: float = 1.0,
    ) -> Model:
        config = EngineConfig("openvino", streams=streams, threads=threads, max_batch=max_batch)

        def took(rows: int) -> float:
            return base_s + sample_s * rows

        engine = FakeEngine(config, service_s=took, schedule=self.loop.call_later)
        sizes = (1, max_batch // 2, max_batch)
        seconds = tuple(map(took, sizes))
        profile = Profile(ServiceTimes(sizes, seconds, tuple(n / s for n, s in zip(sizes, seconds, strict=True))))
        policy = Policy(streams=streams, max_batch=max_batch, queue_bound=1000, deadline_ms=1e3 * limit_s)
        cell = Cell(
            [Variant(engine, profile)],
            Codec("fake", engine.signature),
            policy,
            self.loop,
            lanes=Lanes(self.cores, weight),
        )
        return Model(cell, engine, limit_s, took)

    async def load(self, rates: list[tuple[Model, float]], seconds: float, seed: int = 0) -> None:
        """Poisson arrivals at each model, at its rate per second, and the answers to all of them."""
        random = np.random.default_rng(seed)
        for model, rate in rates:
            if rate:
                gaps = random.exponential(1 / rate, math.ceil(2 * seconds * rate))
                for at in np.cumsum(gaps)[np.cumsum(gaps) < seconds]:
                    self.loop.call_later(float(at), model.ask, self.loop)
        await asyncio.sleep(seconds + 5 * max(model.limit_s for model, _ in rates))


@pytest.mark.parametrize("cores", [1, 2])
def test_a_flood_at_ten_times_a_models_capacity_does_not_starve_another(cores: int) -> None:
    async def scenario() -> None:
        node = Node(cores)
        greedy = node.model(limit_s=2.0, base_s=0.04, sample_s=0.02, streams=cores)
        other = node.model(limit_s=0.5, base_s=0.02, sample_s=0.01, streams=cores)
        await node.load([(greedy, 10 * greedy.capacity), (other, 0.4 * other.capacity / 2)], 40 / cores)
        assert np.percentile(other.latencies, 99) <= other.limit_s
        assert other.goodput == 1
        busy = sum(map(greedy.seconds, greedy.engine.batches)) + sum(map(other.seconds, other.engine.batches))
        assert busy >= 0.98 * 40, "what one leaves the other uses"
        late = sum(latency > greedy.limit_s for latency in greedy.latencies)
        assert late <= 0.01 * len(greedy.latencies), "who floods is told at once what would be late"

    run_virtually(scenario())


def test_what_two_floods_get_is_as_their_weights_whatever_their_batches_take() -> None:
    async def scenario() -> None:
        node = Node(2)
        heavy = node.model(limit_s=4.0, base_s=0.3, sample_s=0.04, weight=1, streams=2)
        light = node.model(limit_s=2.0, base_s=0.02, sample_s=0.01, weight=3, threads=2)
        flood = [(heavy, 3 * heavy.capacity), (light, 3 * light.capacity)]
        await node.load(flood, 10)
        for model in (heavy, light):
            model.latencies.clear()
            model.engine.batches.clear()
        await node.load(flood, 60, seed=1)
        used = [
            model.engine.config.threads * sum(map(model.seconds, model.engine.batches)) / 2 / 60
            for model in (heavy, light)
        ]
        assert used[0] == pytest.approx(0.25, abs=0.02)
        assert 0.5 <= used[1] <= 0.75, "a batch on two cores waits until both are free, at its own cost"
        for model in (heavy, light):
            late = sum(latency > model.limit_s for latency in model.latencies)
            assert late <= 0.1 * len(model.latencies), "each predicts with the share that it can count on"

    run_virtually(scenario())


def test_a_model_alone_is_as_fast_as_without_others_on_the_server() -> None:
    async def answered(others: int) -> list[float]:
        node = Node(2)
        model = node.model(limit_s=2.0, base_s=0.04, sample_s=0.02, streams=2)
        for _ in range(others):
            node.model(limit_s=0.1, base_s=0.01, sample_s=0.01)
        await node.load([(model, 1.5 * model.capacity)], 10)
        return model.latencies

    assert run_virtually(answered(0)) == run_virtually(answered(3))


def test_who_was_idle_has_no_claim_to_the_past() -> None:
    async def scenario() -> None:
        node = Node(1)
        early, late = (node.model(limit_s=1.0, base_s=0.01, sample_s=0.01) for _ in range(2))
        await node.load([(early, 3 * early.capacity), (late, 0)], 10)
        before = len(early.latencies)
        await node.load([(early, 3 * early.capacity), (late, 3 * late.capacity)], 10)
        assert len(early.latencies) - before == pytest.approx(len(late.latencies), rel=0.1)

    run_virtually(scenario())


def test_a_model_whose_engine_is_stuck_gives_its_cores_back_when_it_is_given_up() -> None:
    async def scenario() -> None:
        cores, held = Cores(1, WallClock()), Held()
        config = EngineConfig("openvino", max_batch=4)
        profile = Profile(ServiceTimes((1, 4), (0.01, 0.02), (100.0, 200.0)))

        def cell(engine: FakeEngine) -> Cell:
            policy = Policy(max_batch=4, queue_bound=10)
            return Cell(
                [Variant(engine, profile)], Codec("fake", engine.signature), policy, WallClock(), lanes=Lanes(cores)
            )

        stuck, other = cell(FakeEngine(config, schedule=held.schedule)), cell(FakeEngine(config))
        lost = put(stuck, unique(1, 0))
        await turns()
        waiting = put(other, unique(1, 1))
        await turns()
        assert not waiting.done()
        stuck.abandon(EngineError("stuck"))
        stuck.close()
        await turns()
        assert waiting.done()
        with pytest.raises(EngineError):
            await lost
        await held.release()  # the engine ends its batch after all
        again = put(other, unique(1, 2))
        await turns()
        assert again.done()

    asyncio.run(scenario())


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=4), st.integers(1, 16))
def test_cores_fit_each_model_alone_and_leave_one_where_every_plan_does(
    layouts: list[tuple[int, int]], room: int
) -> None:
    layouts = [(streams, threads) for streams, threads in layouts if streams * threads <= room] or [(1, 1)]
    alone = [streams * threads for streams, threads in layouts]
    found = shared_cores(layouts, room)
    assert max(alone) <= found <= max(room, 1)
    if max(alone) < room:
        assert found < room
    assert found == min(sum(alone), max(max(alone), room - (max(alone) < room)))
