"""Whatever goes wrong with one request, batch or engine costs its own callers only; who is late is not computed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_hostile import answer_from, in_process, planned, request_bytes
from test_pictures import cell_of as cell_of_pictures
from test_pictures import decoding, noise, png
from test_pictures import submit as submit_pictures

from conftest import Server, serving
from rushhour.bundle import Bundle
from rushhour.clock import Clock, VirtualClock, WallClock
from rushhour.engines import EngineConfig
from rushhour.errors import EngineError, WireError
from rushhour.measurement import ServiceTimes
from rushhour.plan import Policy
from rushhour.serve import ServeSettings, open_target, service
from rushhour.serve.memory.budget import Budget
from rushhour.serve.protocols.http.connection import HttpConnection
from rushhour.serve.scheduling.admission import Profile
from rushhour.serve.scheduling.batcher import Batcher
from rushhour.serve.scheduling.cell import Cell
from rushhour.serve.scheduling.job import Job, Shed, ShedError
from rushhour.serve.scheduling.variant import Variant
from rushhour.serve.service import Service
from rushhour.testing.fakes import FakeEngine, fake_answers, on_a_timer
from rushhour.wire import Codec, InferRequest, Wanted

WANTED = Wanted(id="", outputs=(0,), binary=(True,))
Result = Sequence[memoryview] | Exception


def unique(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, 4, 4, 1), dtype=np.uint8)


class Held:
    """Batches that end when the test says so, or never."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def schedule(self, seconds: float, finish: Callable[[], None]) -> None:
        self.waiting.append(finish)

    async def release(self) -> None:
        self.waiting.pop(0)()
        await turns()


async def turns(count: int = 6) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def times(base_s: float = 0.010, sample_s: float = 0.001) -> ServiceTimes:
    seconds = tuple(base_s + sample_s * rows for rows in (1, 2, 4))
    return ServiceTimes((1, 2, 4), seconds, tuple(rows / s for rows, s in zip((1, 2, 4), seconds, strict=True)))


def cell_of(
    engine: FakeEngine,
    profile: Profile | None = None,
    *,
    deadline_ms: float | None = None,
    queue_bound: int = 100,
    clock: Clock | None = None,
) -> Cell:
    policy = Policy(max_batch=engine.config.max_batch, queue_bound=queue_bound, deadline_ms=deadline_ms)
    return Cell(
        [Variant(engine, profile or Profile(times()))], Codec("fake", engine.signature), policy, clock or WallClock()
    )


def put(
    cell: Cell,
    images: np.ndarray,
    reply: Callable[[Result], None] | None = None,
    timeout_s: float | None = None,
    priority: int = 0,
) -> asyncio.Future[np.ndarray]:
    """The answer to come; `reply` is called before it is there."""
    answer: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()

    def answered(result: Result) -> None:
        if reply is not None:
            reply(result)
        if isinstance(result, Exception):
            answer.set_exception(result)
        else:
            answer.set_result(np.frombuffer(bytes(result[0]), np.float32).reshape(len(images), 3))

    wanted = Wanted(id="", outputs=(0,), binary=(True,), timeout_s=timeout_s, priority=priority)
    request = InferRequest(len(images), (memoryview(images.tobytes()),), wanted)
    submitted = cell.submit(request, answered)
    if isinstance(submitted, Shed):
        raise LookupError(submitted.reason)
    return answer


@contextlib.contextmanager
def reports() -> Iterator[list[BaseException]]:
    """What the running loop is told that should not have happened."""
    told: list[BaseException] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda loop, context: told.append(context["exception"]))
    try:
        yield told
    finally:
        loop.set_exception_handler(None)


def stumbles(result: Result) -> None:
    raise RuntimeError("the caller's own fault")


def right(answer: asyncio.Future[np.ndarray], images: np.ndarray) -> None:
    np.testing.assert_array_equal(answer.result(), fake_answers(images))


# A reply, a batch or an engine that goes wrong.


def test_a_reply_that_raises_costs_nobody_else_anything() -> None:
    async def scenario() -> None:
        held = Held()
        engine = FakeEngine(EngineConfig("openvino", max_batch=4), schedule=held.schedule)
        cell = cell_of(engine)
        with reports() as told:
            before, broken, after = put(cell, unique(1, 0)), put(cell, unique(2, 1), stumbles), put(cell, unique(1, 2))
            await turns()
            later = put(cell, unique(1, 3))
            await held.release()
            right(before, unique(1, 0))
            right(after, unique(1, 2))
            await held.release()
            right(later, unique(1, 3))
            assert not broken.done()
            assert cell.idle, "the stream is free"
            assert [str(error) for error in told] == ["the caller's own fault"]
            assert engine.batches == [4, 1]
            assert cell.running == (0, 0)

    asyncio.run(scenario())


def test_a_reply_that_raises_over_an_error_costs_nobody_else_anything() -> None:
    async def scenario() -> None:
        held = Held()
        engine = FakeEngine(EngineConfig("openvino", max_batch=2), schedule=held.schedule)
        cell = cell_of(engine)
        engine.fail_next(EngineError("the engine stumbled"))
        with reports() as told:
            put(cell, unique(1, 0), stumbles)
            second = put(cell, unique(1, 1))
            await turns()
            later = put(cell, unique(2, 3))
            await held.release()
            with pytest.raises(EngineError, match="stumbled"):
                second.result()
            await held.release()
            right(later, unique(2, 3))
            assert (cell.idle, len(told), cell.counters.failed) == (True, 1, 2)

    asyncio.run(scenario())


def test_a_reply_that_raises_over_the_last_part_of_a_split_request_costs_nobody_anything() -> None:
    async def scenario() -> None:
        engine = FakeEngine(EngineConfig("openvino", max_batch=2, streams=2), schedule=on_a_timer)
        cell = cell_of(engine)
        with reports() as told:
            put(cell, unique(7, 0), stumbles)
            later = put(cell, unique(5, 1))
            np.testing.assert_array_equal(await later, fake_answers(unique(5, 1)))
            while not cell.idle:
                await asyncio.sleep(0.001)
            assert len(told) == 1

    asyncio.run(asyncio.wait_for(scenario(), 20))


@pytest.mark.parametrize("replies", [None, stumbles], ids=["told", "raises"])
def test_a_batch_that_cannot_be_filled_is_an_error_of_its_requests(replies: Callable[[Result], None] | None) -> None:
    async def scenario() -> None:
        engine = FakeEngine(EngineConfig("openvino", max_batch=2))
        cell = cell_of(engine)
        with reports() as told:
            answers: list[Result] = []

            def reply(result: Result) -> None:
                answers.append(result)
                if replies is not None:
                    replies(result)

            short = InferRequest(1, (memoryview(bytes(3)),), WANTED)
            assert isinstance(cell.submit(short, reply), Job)
            await turns()
            assert [type(answer) for answer in answers] == [ValueError]
            assert cell.idle
            assert len(told) == (replies is not None)
            np.testing.assert_array_equal(await put(cell, unique(2, 1)), fake_answers(unique(2, 1)))

    asyncio.run(asyncio.wait_for(scenario(), 20))


@pytest.mark.parametrize("what", ["profile.update", "_host_speed.record", "_admission.record", "statistics.count"])
def test_what_fails_beside_the_answers_keeps_no_stream(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        cell = cell_of(FakeEngine(EngineConfig("openvino", max_batch=2)))
        owner, _, method = what.partition(".")
        with reports() as told:
            with monkeypatch.context() as patch:
                patch.setattr(getattr(cell, owner), method, stumbles)
                first = put(cell, unique(1, 0))
                await turns()
            assert first.done(), "with its answer, or with an error"
            if first.exception() is None:
                right(first, unique(1, 0))
            assert len(told) == 1
            assert cell.idle
            np.testing.assert_array_equal(await put(cell, unique(2, 1)), fake_answers(unique(2, 1)))

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_decoder_that_takes_nothing_leaves_no_room_taken() -> None:
    async def scenario() -> None:
        with decoding(held=False) as decoder:
            cell = cell_of_pictures(decoder)
            decoder.close()
            with pytest.raises(RuntimeError):
                submit_pictures(cell, png(0))
            assert (cell.waiting, cell.idle) == (0, True)

    asyncio.run(scenario())


def test_over_http_an_answer_that_cannot_be_sent_is_an_error_and_the_others_have_theirs(
    tiny: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = planned(tiny, tmp_path / "run", max_batch=4)
    sent = HttpConnection._send_parts
    broken: list[HttpConnection] = []

    def send(connection: HttpConnection, *parts: Any, **named: Any) -> None:
        if not broken:
            broken.append(connection)
            raise RuntimeError("an exporter of spans that is down")
        sent(connection, *parts, **named)

    monkeypatch.setattr(HttpConnection, "_send_parts", send)

    async def scenario() -> None:
        engine = FakeEngine(EngineConfig("openvino", max_batch=4), schedule=on_a_timer)
        async with in_process(engine, target) as (address, cell):
            with reports():
                opened = [await asyncio.open_connection(*address) for _ in range(3)]
                for _, writer in opened:
                    writer.write(request_bytes(unique(1, 0), tiny))
                answers = [await answer_from(reader) for reader, _ in opened]
                assert sorted(status for status, _, _ in answers) == [200, 200, 500]
                for reader, writer in opened:  # and all connections go on
                    writer.write(request_bytes(unique(1, 1), tiny))
                    assert (await answer_from(reader))[0] == 200
                    writer.close()
            assert cell.idle

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_over_grpc_what_fails_behind_the_answer_does_not_undo_it() -> None:
    from rushhour.serve.protocols.grpc.call import InferCall

    class Codec_:
        def is_large_answer(self, asked: object) -> bool:
            return False

        def encode(self, asked: object, result: object, variant: str = "") -> bytes:
            return b"the answer"

    class Followed_:
        def end(self, status: int) -> None:
            raise RuntimeError("an exporter of spans that is down")

    class Asked_:
        request = InferRequest(1, (memoryview(bytes(16)),), WANTED)

    async def scenario() -> None:
        cell = cell_of(FakeEngine(EngineConfig("openvino", max_batch=2)))
        with reports() as told:
            call = InferCall(cell, Codec_(), Asked_(), None, Followed_(), Budget(1), None)  # type: ignore[arg-type]
            assert await call.answer() == b"the answer"
            await turns()
            assert cell.idle
            assert [type(error) for error in told] == [RuntimeError]

    asyncio.run(asyncio.wait_for(scenario(), 20))


# An engine that does not end its batches.


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_STUCK_S", 0.05)
    monkeypatch.setattr(service, "_STUCK_BATCHES", 0.0)


def opened(target: Path, engines: list[FakeEngine]) -> Service:
    """Each load opens the next engine."""
    return Service(open_target(target), None, lambda bundle, config: engines.pop(0))


class Stuck:
    """Batches that end until it is told to hold them."""

    def __init__(self) -> None:
        self.held: list[Callable[[], None]] | None = None

    def schedule(self, seconds: float, finish: Callable[[], None]) -> None:
        if self.held is None:
            finish()
        else:
            self.held.append(finish)


@pytest.mark.parametrize("how", ["load", "unload"])
def test_an_engine_that_hangs_keeps_no_reload_and_no_end_waiting(
    tiny: Bundle, tmp_path: Path, how: str, impatient: None, caplog: pytest.LogCaptureFixture
) -> None:
    target = planned(tiny, tmp_path / "run", max_batch=2)

    async def scenario() -> None:
        stuck = Stuck()
        first = FakeEngine(EngineConfig("openvino", max_batch=2), schedule=stuck.schedule)
        second = FakeEngine(EngineConfig("openvino", max_batch=2))
        served = opened(target, [first, second])
        await served.load()
        assert served.loaded is not None
        old = served.loaded.cell
        stuck.held = []
        waiting = [put(old, unique(1, seed)) for seed in range(5)]
        await turns()
        await (served.load() if how == "load" else served.unload())
        for answer in waiting:
            with pytest.raises(EngineError, match="does not finish its batches"):
                await answer
        assert old.counters.failed == 5
        assert (old.waiting, served.totals()["1"].failed) == (0, 5)
        if how == "load":
            assert served.loaded is not None
            assert served.loaded.version == "1", "the same bundle"
            answer = put(served.loaded.cell, unique(2, 9))
            np.testing.assert_array_equal(await answer, fake_answers(unique(2, 9)))
        for finish in stuck.held:  # what ends after all is answered to nobody
            finish()
        await turns()

    with caplog.at_level(logging.ERROR):
        asyncio.run(asyncio.wait_for(scenario(), 20))


def test_an_old_version_that_still_moves_is_not_given_up(
    tiny: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_STUCK_S", 1.5)
    monkeypatch.setattr(service, "_STUCK_BATCHES", 0.0)
    target = planned(tiny, tmp_path / "run", max_batch=1)

    async def scenario() -> None:
        stuck = Stuck()
        first = FakeEngine(EngineConfig("openvino", max_batch=1), schedule=stuck.schedule)
        served = opened(target, [first, FakeEngine(EngineConfig("openvino", max_batch=1))])
        await served.load()
        assert served.loaded is not None
        stuck.held = []
        waiting = [put(served.loaded.cell, unique(1, seed)) for seed in range(6)]
        await turns()
        loading = asyncio.create_task(served.load())
        while not loading.done():  # together much longer than a cell may stand still
            await asyncio.sleep(0.4)
            if stuck.held:
                stuck.held.pop(0)()
        for seed, answer in enumerate(waiting):
            right(answer, unique(1, seed))

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_the_end_of_a_server_waits_no_longer_than_it_is_told_to(tiny: Bundle, tmp_path: Path) -> None:
    target = planned(tiny, tmp_path / "run", max_batch=2)

    async def scenario() -> None:
        stuck = Stuck()
        served = opened(target, [FakeEngine(EngineConfig("openvino", max_batch=2), schedule=stuck.schedule)])
        await served.load()
        assert served.loaded is not None
        stuck.held = []
        waiting = put(served.loaded.cell, unique(1, 0))
        await turns()
        await served.unload(within_s=0.05)
        with pytest.raises(EngineError, match="does not finish"):
            await waiting

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_pictures_that_are_being_decoded_are_told_of_the_end_too() -> None:
    async def scenario() -> None:
        with decoding() as decoder:
            cell = cell_of_pictures(decoder)
            answer, _ = submit_pictures(cell, png(0))
            cell.abandon(EngineError("it is over"))
            with pytest.raises(EngineError, match="over"):
                await answer
            assert (cell.waiting, cell.counters.failed) == (0, 1)
            assert decoder.gate is not None
            decoder.gate.set()
            await asyncio.sleep(0.05)
            assert cell.counters.batches == 0

    asyncio.run(asyncio.wait_for(scenario(), 20))


# A profile that is wrong: it must not lock everybody out.


def test_whatever_the_profile_says_an_idle_cell_finds_out() -> None:
    async def scenario() -> None:
        engine = FakeEngine(EngineConfig("openvino", max_batch=4), schedule=on_a_timer)
        cell = cell_of(engine, Profile(times(base_s=2.0)), deadline_ms=1000)
        for seed in range(80):  # one after the other, as long as it takes to learn
            np.testing.assert_array_equal(await put(cell, unique(1, seed)), fake_answers(unique(1, seed)))
        assert cell.counters.shed_deadline == 0
        assert cell.profile.seconds(1) < 0.9
        together = [put(cell, unique(1, seed)) for seed in range(8)]
        assert len(await asyncio.gather(*together)) == 8, "and then lets in who comes at the same time"

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_request_with_a_time_of_its_own_is_a_probe_as_well() -> None:
    async def scenario() -> None:
        engine = FakeEngine(EngineConfig("openvino", max_batch=4), schedule=on_a_timer)
        cell = cell_of(engine, Profile(times(base_s=2.0)))  # the plan has no limit
        for seed in range(5):
            answer = await put(cell, unique(1, seed), timeout_s=1.0)
            np.testing.assert_array_equal(answer, fake_answers(unique(1, seed)))

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_pictures_are_let_in_as_probes_whatever_profile_and_decoder_say() -> None:
    async def scenario() -> None:
        with decoding(held=False) as decoder:
            cell = cell_of_pictures(decoder, deadline_ms=1000)
            for _ in range(300):
                cell.profile.update(4, 10.0)
            assert cell.profile.seconds(1) > 1
            for seed in range(3):
                answer, _ = submit_pictures(cell, png(seed))
                np.testing.assert_array_equal(await answer, fake_answers(noise(seed)[None]))
            cell = cell_of_pictures(decoder, deadline_ms=1000)
            decoder._bytes, decoder._seconds = 1_000.0, 60.0
            for seed in range(3):
                answer, _ = submit_pictures(cell, png(seed))
                np.testing.assert_array_equal(await answer, fake_answers(noise(seed)[None]))

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_one_probe_at_a_time_and_one_that_was_late_is_believed_for_a_while() -> None:
    async def scenario() -> None:
        held, clock = Held(), VirtualClock()
        engine = FakeEngine(EngineConfig("openvino", max_batch=4), schedule=held.schedule)
        cell = cell_of(engine, Profile(times(base_s=0.2)), deadline_ms=100, clock=clock)
        probe = put(cell, unique(1, 0))
        with pytest.raises(LookupError, match="deadline"):
            put(cell, unique(1, 1))
        await turns()
        clock.advance(0.2)
        await held.release()
        right(probe, unique(1, 0))
        assert cell.idle
        with pytest.raises(LookupError, match="deadline"):  # it was late indeed
            put(cell, unique(1, 1))
        clock.advance(1.5)
        second = put(cell, unique(1, 2))
        await turns()
        clock.advance(0.01)
        await held.release()
        right(second, unique(1, 2))
        third = put(cell, unique(1, 3))  # the last was in time: the profile is wrong, and learns
        await turns()
        await held.release()
        right(third, unique(1, 3))

    asyncio.run(scenario())


def test_a_probe_that_goes_away_or_fails_makes_room_for_the_next() -> None:
    async def scenario() -> None:
        engine = FakeEngine(EngineConfig("openvino", max_batch=4))
        cell = cell_of(engine, Profile(times(base_s=2.0)), deadline_ms=100)
        job = cell.submit(InferRequest(1, (memoryview(bytes(16)),), WANTED), lambda result: None)
        assert isinstance(job, Job)
        cell.cancel(job)
        await turns()
        engine.fail_next(EngineError("the engine stumbled"))
        with pytest.raises(EngineError):
            await put(cell, unique(1, 0))
        np.testing.assert_array_equal(await put(cell, unique(1, 1)), fake_answers(unique(1, 1)))

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_an_engine_that_was_timed_beside_another_is_learned_anew_when_that_has_gone() -> None:
    sure, doubted = Profile(times(base_s=1.0)), Profile(times(base_s=1.0), is_sure=False)
    for profile in (sure, doubted):
        for _ in range(10):
            profile.update(1, 1.001)  # while the other one still computes
    doubted.distrust()
    for profile in (sure, doubted):
        for _ in range(10):
            profile.update(2, 0.012)
    assert sure.seconds(2) > 0.5, "usually some slow batches change little"
    assert doubted.seconds(2) < 0.25


def test_a_reload_beside_a_busy_engine_is_in_doubt_and_one_of_the_same_bundle_is_not(
    tiny: Bundle, tmp_path: Path
) -> None:
    target = planned(tiny, tmp_path / "run", max_batch=2)

    async def scenario() -> None:
        stuck = Stuck()
        engines = [FakeEngine(EngineConfig("openvino", max_batch=2), schedule=stuck.schedule) for _ in range(3)]
        served = opened(target, list(engines))
        await served.load()
        first = served.loaded
        assert first is not None
        assert first.was_alone
        await served.load()
        again = served.loaded
        assert again is not None
        assert again.opened[0].times is first.opened[0].times, "nothing else says how fast it is when it is alone"
        # Served another way, while the old one computes: what is measured then is in doubt.
        planned(tiny, tmp_path / "other", max_batch=1)
        (tmp_path / "other" / "plan.json").replace(target / "plan.json")
        stuck.held = []
        waiting = put(again.cell, unique(1, 0))
        await turns()
        held, stuck.held = stuck.held, None
        loading = asyncio.create_task(served.load())
        while served.loaded is again:
            await asyncio.sleep(0.005)
        assert served.loaded is not None
        assert not served.loaded.was_alone
        held.pop(0)()
        await loading
        right(waiting, unique(1, 0))

    asyncio.run(asyncio.wait_for(scenario(), 20))


# Late requests.


def test_after_a_pause_only_those_are_computed_who_still_wait() -> None:
    async def scenario() -> None:
        held, clock = Held(), VirtualClock()
        engine = FakeEngine(EngineConfig("openvino", max_batch=2), schedule=held.schedule)
        cell = cell_of(engine, deadline_ms=100, clock=clock)
        running = put(cell, unique(2, 0))
        await turns()
        late = [put(cell, unique(1, seed)) for seed in range(1, 9)]
        clock.advance(0.3)  # the machine stood still
        await held.release()
        right(running, unique(2, 0))
        for answer in late:
            with pytest.raises(ShedError) as caught:
                answer.result()
            assert caught.value.status == 429
        assert (cell.waiting, cell.idle) == (0, True)
        assert engine.batches == [2]
        assert (cell.counters.shed_deadline, cell.totals().fail.count) == (8, 8)
        fresh = put(cell, unique(2, 30))
        await turns()
        await held.release()
        right(fresh, unique(2, 30))

    asyncio.run(scenario())


def test_the_late_part_of_a_split_request_is_left_out_and_others_behind_it_are_not() -> None:
    async def scenario() -> None:
        held, clock = Held(), VirtualClock()
        engine = FakeEngine(EngineConfig("openvino", max_batch=2), schedule=held.schedule)
        cell = cell_of(engine, clock=clock)
        large = put(cell, unique(6, 0), timeout_s=0.2)
        await turns()
        small, without = put(cell, unique(1, 1), timeout_s=5.0), put(cell, unique(1, 2))
        assert engine.batches == [2]
        clock.advance(0.3)
        await held.release()
        with pytest.raises(ShedError):
            large.result()
        await held.release()
        right(small, unique(1, 1))
        right(without, unique(1, 2))
        assert engine.batches == [2, 2]
        assert cell.idle

    asyncio.run(scenario())


def test_late_requests_of_any_priority_are_left_out_and_make_room() -> None:
    clock = VirtualClock()
    batcher: Batcher[str] = Batcher(4, 4, Profile(times()), clock)
    batcher.offer("high and late", 1, deadline=0.1, priority=1)
    batcher.offer("low and late", 2, deadline=0.1, priority=8)
    batcher.offer("low", 1, deadline=1.0, priority=8)
    assert batcher.offer("too much", 1) is None
    clock.advance(0.2)
    assert [part.ticket.item for part in batcher.take()] == ["low"]
    assert [ticket.item for ticket in batcher.late] == ["high and late", "low and late"]
    assert (batcher.waiting, batcher.in_flight) == (0, 1)
    assert batcher.offer("there is room", 4) is not None


def test_over_http_who_waited_too_long_is_told_to_come_back(tiny: Bundle, tmp_path: Path) -> None:
    target = planned(tiny, tmp_path / "run", max_batch=1, deadline_ms=200)
    stuck = Stuck()
    engine = FakeEngine(EngineConfig("openvino", max_batch=1), schedule=stuck.schedule)

    async def scenario() -> None:
        async with in_process(engine, target) as (address, cell):
            stuck.held = []
            opened = [await asyncio.open_connection(*address) for _ in range(4)]
            for number, (_, writer) in enumerate(opened):
                writer.write(request_bytes(unique(1, number), tiny))
                while cell.running[1] + cell.waiting <= number:
                    await asyncio.sleep(0.001)
            await asyncio.sleep(0.25)
            held, stuck.held = stuck.held, None
            held.pop(0)()
            answers = [await answer_from(reader) for reader, _ in opened]
            assert [status for status, _, _ in answers] == [200, 200, 429, 429], "one was computed, one was next"
            assert int(answers[2][1]["retry-after"]) >= 1
            assert "longer than its time limit" in json.loads(answers[2][2])["error"]
            for _, writer in opened:
                writer.close()
            assert cell.counters.rows == 2

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_pictures_that_waited_too_long_are_left_out() -> None:
    async def scenario() -> None:
        with decoding(held=False) as decoder:
            clock = VirtualClock()
            cell = cell_of_pictures(decoder, deadline_ms=1000, clock=clock)
            answer, _ = submit_pictures(cell, png(0))
            busy = list(cell._free)
            cell._free.clear()  # as if all streams computed
            while not answer.done() and not cell.batcher._queues:
                await asyncio.sleep(0.002)
            clock.advance(2.0)
            cell._free.extend(busy)
            cell.dispatch_soon()
            with pytest.raises(WireError, match="longer than its time limit"):
                await answer
            assert cell.counters.batches == 0

    asyncio.run(asyncio.wait_for(scenario(), 20))


# The real thing.


def test_after_reloads_under_load_everybody_is_let_in_again(tiny: Bundle, tmp_path: Path) -> None:
    """Two plans for one bundle take turns, so that each engine is timed anew while the other one computes."""
    target = planned(tiny, tmp_path / "run", max_batch=8, deadline_ms=50)
    planned(tiny, tmp_path / "other", max_batch=4, deadline_ms=50)
    plans = [(tmp_path / folder / "plan.json").read_bytes() for folder in ("other", "run")]

    async def crowd(server: Server) -> None:
        stop = False

        async def caller(seed: int) -> None:
            reader, writer = await asyncio.open_connection(*server.address)
            while not stop:
                writer.write(request_bytes(unique(1, seed), tiny))
                status, _, _ = await answer_from(reader)
                assert status in (200, 429)
            writer.close()

        async def post() -> None:
            reader, writer = await asyncio.open_connection(*server.address)
            path = "/v2/repository/models/tiny/load"
            writer.write(f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n".encode())
            assert (await answer_from(reader))[0] == 200
            writer.close()

        callers = [asyncio.create_task(caller(seed)) for seed in range(16)]
        for plan in (*plans, *plans):
            (target / "plan.json").write_bytes(plan)
            await post()
        stop = True
        await asyncio.gather(*callers)
        reader, writer = await asyncio.open_connection(*server.address)
        statuses = []
        for seed in range(150):  # one after the other: the cell is idle each time
            writer.write(request_bytes(unique(1, seed), tiny))
            statuses.append((await answer_from(reader))[0])
        writer.close()
        assert statuses[-20:] == [200] * 20

    with serving(target, ServeSettings(http_port=0)) as server:
        asyncio.run(asyncio.wait_for(crowd(server), 60))
