"""A full batch waits in the engine while all streams compute, and begins as soon as one is free."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from test_batcher import line
from test_cell import WANTED, Held, put, right, times, turns, unique

from rushhour.clock import VirtualClock
from rushhour.engines import EngineConfig
from rushhour.errors import EngineError
from rushhour.plan import Policy
from rushhour.serve.scheduling.admission import Admission, Profile, free_at
from rushhour.serve.scheduling.batcher import Batcher
from rushhour.serve.scheduling.cell import Cell
from rushhour.serve.scheduling.job import Job
from rushhour.serve.scheduling.variant import Variant
from rushhour.testing.fakes import FakeEngine, fake_answers, on_a_timer
from rushhour.wire import Codec, InferRequest


def cell_of(engine: FakeEngine, clock: VirtualClock | None = None, deadline_ms: float | None = None) -> Cell:
    policy = Policy(max_batch=engine.config.max_batch, queue_bound=2000, deadline_ms=deadline_ms)
    variant, codec = Variant(engine, Profile(times())), Codec("fake", engine.signature)
    return Cell([variant], codec, policy, clock or VirtualClock(), spare=engine.spare())


def held_engine(held: Held, streams: int = 1, max_batch: int = 2) -> FakeEngine:
    return FakeEngine(EngineConfig("openvino", streams=streams, max_batch=max_batch), schedule=held.schedule)


def test_a_full_batch_is_started_while_the_stream_computes_and_no_other() -> None:
    async def scenario() -> None:
        held = Held()
        engine = held_engine(held)
        cell = cell_of(engine)
        answers = [put(cell, unique(2, 0)), put(cell, unique(1, 1))]
        await turns()
        assert (engine.batches, cell.waiting) == ([2], 1), "half a batch waits for more"
        answers += [put(cell, unique(1, 2)), put(cell, unique(2, 3))]
        await turns()
        assert (engine.batches, cell.waiting) == ([2, 2], 2), "one batch for each stream"
        assert len(held.waiting) == 1, "it does not compute yet"
        held.waiting.pop(0)()
        assert len(held.waiting) == 1, "it computes before the event loop has seen the end of the first"
        await turns()
        assert engine.batches == [2, 2, 2]
        await held.release()
        await held.release()
        for answer, images in zip(answers, (unique(2, 0), unique(1, 1), unique(1, 2), unique(2, 3)), strict=True):
            right(answer, images)
        assert (cell.idle, cell.running) == (True, (0, 0))

    asyncio.run(scenario())


def test_its_time_begins_when_the_engine_begins_with_it() -> None:
    async def scenario() -> None:
        held, clock, learnt, waited = Held(), VirtualClock(), [], []
        cell = cell_of(held_engine(held), clock)
        cell.profile.update = lambda rows, seconds: learnt.append((rows, round(seconds, 6)))  # type: ignore[method-assign]
        cell.statistics.count = lambda batch, *_: waited.append((batch.taken, batch.started))  # type: ignore[method-assign]
        put(cell, unique(2, 0))
        await turns()
        put(cell, unique(2, 1))
        await turns()
        clock.advance(0.5)
        await held.release()
        clock.advance(0.25)
        await held.release()
        assert learnt == [(2, 0.5), (2, 0.25)]
        assert waited == [(0.0, 0.0), (0.5, 0.5)], "as if it had waited in the queue"

    asyncio.run(scenario())


def test_a_batch_that_cannot_be_filled_takes_the_place_of_no_other_in_the_engine() -> None:
    async def scenario() -> None:
        held, clock, learnt = Held(), VirtualClock(), []
        cell = cell_of(held_engine(held, streams=2), clock)
        cell.profile.update = lambda rows, seconds: learnt.append(round(seconds, 6))  # type: ignore[method-assign]
        for seed in range(3):
            put(cell, unique(2, seed))
            await turns()
        answers: list[object] = []
        assert isinstance(cell.submit(InferRequest(2, (memoryview(bytes(3)),), WANTED), answers.append), Job)
        await turns()
        assert [type(answer) for answer in answers] == [ValueError]
        for _ in range(3):
            clock.advance(0.5)
            await held.release()
        assert learnt == [0.5, 1.0, 1.0], "two from the beginning, one from the end of the first"
        assert cell.running == (0, 0)

    asyncio.run(scenario())


def test_who_arrives_is_told_what_waits_in_the_engine() -> None:
    async def scenario() -> None:
        held, clock = Held(), VirtualClock()
        cell = cell_of(held_engine(held, streams=2), clock, deadline_ms=26 / 0.9)  # a batch of two takes 12 ms
        for seed in range(4):
            put(cell, unique(2, seed))
            await turns()
        assert cell.running == (4, 8)
        with pytest.raises(LookupError, match="deadline"):
            put(cell, unique(2, 9))  # 12 ms until a stream is free, 12 ms of what waits in the engine, and its own
        for _ in range(4):
            await held.release()

    asyncio.run(scenario())


def test_an_engine_that_fails_or_hangs_costs_those_in_it_and_nobody_twice() -> None:
    async def scenario() -> None:
        held = Held()
        engine = held_engine(held)
        cell = cell_of(engine)
        engine.fail_next(EngineError("the engine stumbled"))
        first = put(cell, unique(2, 0))
        await turns()
        second = put(cell, unique(2, 1))
        await turns()
        await held.release()
        with pytest.raises(EngineError, match="stumbled"):
            first.result()
        await held.release()
        right(second, unique(2, 1))
        stuck = [put(cell, unique(2, 2)), put(cell, unique(2, 3))]
        await turns()
        cell.abandon(EngineError("the engine hangs"))
        for answer in stuck:
            with pytest.raises(EngineError, match="hangs"):
                answer.result()
        while held.waiting:
            await held.release()  # nobody is answered twice

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_many_requests_on_threads_are_all_answered() -> None:
    async def scenario() -> None:
        engine = FakeEngine(
            EngineConfig("openvino", streams=2, max_batch=4), service_s=lambda rows: 0.0005 * rows, schedule=on_a_timer
        )
        cell = cell_of(engine)
        sent = [(1 + seed % 7, seed) for seed in range(300)]
        answers = [put(cell, unique(*each)) for each in sent[:40]]
        for each in sent[40:]:
            answers.append(put(cell, unique(*each)))
            await asyncio.sleep(0.0005)
        for answer, each in zip(answers, sent, strict=True):
            np.testing.assert_array_equal(await answer, fake_answers(unique(*each)))
        assert (cell.idle, cell.running) == (True, (0, 0))

    asyncio.run(asyncio.wait_for(scenario(), 30))


# Which batches are complete.


def make(clock: VirtualClock | None = None) -> Batcher[str]:
    return Batcher(4, 100, line(0.010, 0.001), clock or VirtualClock())


def test_room_that_is_reserved_fills_no_batch() -> None:
    batcher = make()
    batcher.offer("a", 2)
    assert batcher.reserve(2)
    assert not batcher.has_full_batch()
    batcher.release(2)
    batcher.offer("b", 2)
    assert batcher.has_full_batch()
    batcher.take()
    assert not batcher.has_full_batch()


def test_a_large_request_goes_ahead_only_where_it_is_alone() -> None:
    clock = VirtualClock()
    batcher = make(clock)
    batcher.offer("large", 50)
    assert batcher.has_full_batch()
    batcher.offer("small", 1)
    assert not batcher.has_full_batch(), "who arrives next would wait for it, too"
    batcher.take()
    clock.advance(30)
    assert batcher.has_full_batch()


def test_what_is_reserved_for_a_large_request_is_no_batch() -> None:
    batcher = make()
    assert batcher.reserve(50)
    assert not batcher.has_full_batch()


def test_a_batch_that_begins_later_is_cut_to_what_keeps_its_head_in_time() -> None:
    clock = VirtualClock()
    batcher = make(clock)
    batcher.offer("head", 2, deadline=0.030)
    batcher.offer("others", 6, deadline=1.0)
    assert sum(part.rows for part in batcher.take(begins=0.018)) == 2  # 12 ms are left for it
    batcher.offer("head", 2, deadline=0.030)
    batcher.offer("others", 6, deadline=1.0)
    assert sum(part.rows for part in batcher.take()) == 4


def test_streams_are_free_after_what_waits_in_the_engine() -> None:
    assert list(free_at([3.0], 2)) == [3.0]
    assert list(free_at([3.0, 1.0, 5.0, 4.0], 2)) == [4.0, 5.0]
    admission = Admission(line(0.0, 1.0), 4)
    assert admission.finish(0.0, 4, 0, [3.0, 1.0, 5.0, 4.0], 2) == 8.0
