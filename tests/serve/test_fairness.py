"""Large requests and the others share batches: neither waits for all of the other, replayed on a virtual clock."""

from __future__ import annotations

import asyncio
import heapq

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_batcher import TIMES, line, taken
from test_buckets import make as sized
from test_buckets import put as put_sized
from test_buckets import taken as taken_sized
from test_cell import Held, cell_of, put, turns, unique

from rushhour.clock import VirtualClock
from rushhour.engines import EngineConfig
from rushhour.serve.scheduling.admission import Admission, Profile
from rushhour.serve.scheduling.batcher import Batcher, Part
from rushhour.testing.fakes import FakeEngine, fake_answers

BATCH = 8


def make(clock: VirtualClock | None = None, *, queue_bound: int = 10_000) -> Batcher[str]:
    return Batcher(BATCH, queue_bound, TIMES, clock or VirtualClock())


def batches_until(batcher: Batcher[str], item: str) -> int:
    """How many batches are taken up to the last sample of a request."""
    for number in range(1, 10_000):
        for part in batcher.take():
            if part.ticket.item == item and part.first + part.rows == part.ticket.rows:
                return number
    raise AssertionError(f"{item} is never computed")


def test_a_small_request_joins_the_next_batch_of_a_large_one() -> None:
    clock = VirtualClock()
    batcher = make(clock)
    batcher.offer("large", 1000)
    assert taken(batcher) == [("large", 0, 8)]
    batcher.offer("small", 1)
    assert taken(batcher) == [("small", 0, 1), ("large", 8, 5)], "as long as one and a half of its own at most"
    assert taken(batcher) == [("large", 13, 6)], "for the next small one"
    clock.advance(10.1)
    assert taken(batcher) == [("large", 19, 8)]


def test_small_requests_that_keep_coming_leave_the_large_one_half_of_each_batch() -> None:
    batcher = make()
    batcher.offer("large", 40)
    for number in range(400):
        batcher.offer(f"small {number}", 1)
    shares = [sum(part.rows for part in batcher.take() if part.ticket.item == "large") for _ in range(10)]
    assert [one + other for one, other in zip(shares[::2], shares[1::2], strict=True)] == [BATCH] * 5
    assert batcher.waiting == 400 - 40


def test_a_batch_of_one_is_taken_in_turns() -> None:
    batcher: Batcher[str] = Batcher(1, 100, TIMES, VirtualClock())
    batcher.offer("large", 4)
    for number in range(4):
        batcher.offer(f"small {number}", 1)
    order = [taken(batcher)[0][0][:5] for _ in range(8)]
    assert order == ["small", "large"] * 4


def test_a_request_that_fits_into_a_batch_is_not_split_for_a_large_one() -> None:
    batcher = make()
    batcher.offer("large", 100)
    for number in range(20):
        batcher.offer(f"six {number}", 6)
    shares, sizes = [], []
    for _ in range(16):
        parts = batcher.take()
        sizes.append(sum(part.rows for part in parts))
        assert all(part.rows == 6 for part in parts if part.ticket.item != "large")
        shares.append(sum(part.rows for part in parts if part.ticket.item == "large"))
    assert sum(shares) == pytest.approx(sum(sizes) / 2, rel=0.15)


def test_batches_of_a_large_request_are_as_small_as_is_efficient() -> None:
    """Where a batch costs nothing beside its samples, nobody who arrives should wait for a large one."""
    for times, rows, beside in (
        (line(0.0001, 0.01), 1, 1),
        (line(0.001, 0.001), 6, 2),
        (line(0.1, 0.0001), 8, 8),
    ):
        batcher: Batcher[str] = Batcher(BATCH, 1000, times, VirtualClock())
        batcher.offer("large", 100)
        assert taken(batcher) == [("large", 0, rows)]
        batcher.offer("small", 1)
        assert batcher.waiting_before(0, 1) <= beside + 1
        assert taken(batcher) == [("small", 0, 1), *([("large", rows, beside - 1)] if beside > 1 else [])]
        parts = [part for _ in range(6) for part in batcher.take()]
        assert sum(part.rows for part in parts) == 6 * beside


LINEAR = line(0.0, 0.01)
"""Of an engine whose batches save nothing: tiles of a photograph, for example."""


def test_where_larger_batches_save_nothing_others_are_spread_over_the_streams() -> None:
    """In one batch of all, each would wait for all; and for as many samples of the large one, which it is owed."""
    batcher: Batcher[str] = Batcher(16, 1000, LINEAR, VirtualClock(), streams=2)
    batcher.offer("large", 300)
    for number in range(12):
        batcher.offer(f"small {number}", 1)
    order = [taken(batcher) for _ in range(24)]
    assert [parts[0][0][:5] for parts in order] == ["small", "large"] * 12
    assert all(len(parts) == 1 for parts in order)


def test_others_are_batched_as_far_as_that_saves_time() -> None:
    batcher: Batcher[str] = Batcher(16, 1000, line(0.001, 0.001), VirtualClock(), streams=2)
    batcher.offer("large", 300)
    for number in range(8):
        batcher.offer(f"small {number}", 1)
    assert [(name[:5], rows) for name, _, rows in taken(batcher)] == [("small", 1)] * 4, "half of them on each stream"
    for number in range(40):
        batcher.offer(f"more {number}", 1)
    assert [sum(part.rows for part in batcher.take()) for _ in range(4)] == [9] * 4, "as large as is efficient"


def test_a_burst_of_others_comes_before_the_large_request_that_had_the_streams_until_then() -> None:
    batcher: Batcher[str] = Batcher(16, 1000, LINEAR, VirtualClock(), streams=2)
    batcher.offer("large", 900)
    for _ in range(100):
        assert taken(batcher)[0][0] == "large"
    for number in range(70):
        batcher.offer(f"small {number}", 1)
    assert batcher.waiting_before(0, 1) == 70 + 20
    order = [taken(batcher)[0][0][:5] for _ in range(80)]
    assert order[:50] == ["small"] * 50, "a quarter of a second on two streams"
    assert order[50:] == ["small", "large"] * 15
    for _ in range(10):
        batcher.take()
    batcher.offer("one more", 1)
    assert batcher.waiting_before(0, 1) == 1
    assert taken(batcher)[0][0] == "one more"


def test_higher_priorities_come_before_any_large_request_and_large_ones_of_a_higher_before_all_others() -> None:
    batcher = make()
    batcher.offer("large", 20, priority=4)
    batcher.offer("usual", 1, priority=4)
    batcher.offer("large first", 12, priority=1)
    batcher.offer("first", 1, priority=1)
    assert taken(batcher) == [("first", 0, 1), ("large first", 0, 5)]
    assert taken(batcher) == [("large first", 5, 6)]
    assert taken(batcher) == [("large first", 11, 1), ("usual", 0, 1), ("large", 0, 5)]


def test_the_deadline_of_a_small_request_bounds_the_batch_that_it_shares() -> None:
    clock = VirtualClock()
    batcher = make(clock)
    batcher.offer("large", 100)
    batcher.offer("small", 1, deadline=0.0145)  # a batch of 4 takes 14 ms
    assert sum(part.rows for part in batcher.take()) == 4


def test_a_large_request_that_is_late_is_left_out_and_takes_no_room() -> None:
    clock = VirtualClock()
    batcher = make(clock)
    batcher.offer("large", 100, deadline=0.05)
    batcher.take()
    batcher.offer("small", 1)
    clock.advance(0.1)
    assert taken(batcher) == [("small", 0, 1)]
    assert [ticket.item for ticket in batcher.late] == ["large"]
    assert batcher.waiting == 0


def test_large_requests_fill_the_queue_for_each_other_only() -> None:
    batcher = make(queue_bound=100)
    assert batcher.offer("large", 500) is not None, "no size is shed for ever"
    assert batcher.offer("another", 9) is None
    for _ in range(100):
        assert batcher.offer("small", 1) is not None
    assert batcher.offer("one more", 1) is None
    assert batcher.reserve(9) is False
    assert batcher.waiting == 600


def test_reserved_room_of_a_large_request_does_not_shed_others() -> None:
    batcher = make(queue_bound=20)
    assert batcher.reserve(50)
    assert batcher.offer("small", 8) is not None
    assert batcher.waiting_before(0, 1) < 3 * BATCH, "it does not wait for all of them"
    batcher.release(50)
    assert batcher.waiting == 8
    assert batcher.waiting_before(0, 1) == 8


requests = st.lists(
    st.tuples(st.sampled_from([1, 1, 1, 2, 5, 8, 9, 30, 100]), st.sampled_from([4, 4, 4, 1])), max_size=40
)


@given(max_batch=st.integers(1, 8), requests=requests, script=st.lists(st.booleans(), max_size=80))
def test_any_mixture_is_computed_once_in_the_order_of_its_queue(
    max_batch: int, requests: list[tuple[int, int]], script: list[bool]
) -> None:
    batcher: Batcher[int] = Batcher(max_batch, 10_000, TIMES, VirtualClock())
    left = list(enumerate(requests))
    seen: list[Part[int]] = []

    def take() -> None:
        parts = batcher.take()
        assert sum(part.rows for part in parts) <= max_batch
        assert all(part.first + part.rows == part.ticket.rows for part in parts[:-1]), "only the last one goes on"
        assert bool(parts) == bool(parts or batcher.waiting), "nothing waits for nothing"
        if parts:
            batcher.ended(parts)
        seen.extend(parts)

    for offers in script:
        if offers and left:
            number, (rows, priority) = left.pop(0)
            batcher.offer(number, rows, priority=priority)
        else:
            take()
    while batcher.waiting:
        take()
    assert batcher.in_flight == 0
    for number, (rows, _) in list(enumerate(requests))[: len(requests) - len(left)]:
        covered = [
            row for part in seen if part.ticket.item == number for row in range(part.first, part.first + part.rows)
        ]
        assert covered == list(range(rows))
    for large in (False, True):
        for priority in (1, 4):
            kind = [part.ticket for part in seen if part.ticket.large is large and part.ticket.priority == priority]
            numbers = [ticket.item for ticket in kind]
            assert numbers == sorted(numbers), "nobody overtakes its like"


@given(
    streams=st.integers(1, 4),
    load=st.floats(0.1, 0.45),
    seed=st.integers(0, 100),
    times=st.sampled_from([LINEAR, line(0.002, 0.008), line(0.008, 0.002)]),
)
def test_beside_large_requests_others_below_half_of_capacity_hardly_wait(
    streams: int, load: float, seed: int, times: Profile
) -> None:
    """Poisson arrivals beside large requests without end, replayed: each waits for the end of a batch of large ones,
    and for the others that came before. Without large ones it would wait for those, too."""
    clock = VirtualClock()
    batcher: Batcher[float] = Batcher(16, 100_000, times, clock, streams=streams)
    batcher.offer(-1.0, 50_000)
    capacity = streams / times.seconds(1)
    arrivals = np.random.default_rng(seed).exponential(1 / (load * capacity), 300).cumsum().tolist()
    alone_s = _latencies(Batcher(16, 100_000, times, VirtualClock(), streams=streams), times, arrivals, streams)
    beside_s = _latencies(batcher, times, arrivals, streams)
    assert np.percentile(beside_s, 99) <= 2 * np.percentile(alone_s, 99) + 1.5 * times.seconds(1)
    assert np.mean(beside_s) <= np.mean(alone_s) + 1.5 * times.seconds(1)


def _latencies(batcher: Batcher[float], times: Profile, arrivals: list[float], streams: int) -> list[float]:
    """Seconds from the arrival of each single sample to the end of its batch."""
    clock = batcher._clock
    assert isinstance(clock, VirtualClock)
    waiting, free, found = arrivals.copy(), [0.0] * streams, []
    while len(found) < len(arrivals):
        now = heapq.heappop(free)
        while waiting and waiting[0] <= now:
            clock.advance(waiting[0] - clock.now())
            batcher.offer(waiting[0], 1)
            del waiting[0]
        clock.advance(now - clock.now())
        parts = batcher.take()
        end = now + times.seconds(sum(part.rows for part in parts)) if parts else waiting[0]
        found += [end - part.ticket.item for part in parts if not part.ticket.large]
        heapq.heappush(free, end)
    return found


@given(large=st.lists(st.integers(9, 400), max_size=4), others=st.lists(st.integers(1, 8), max_size=60))
def test_neither_waits_for_more_samples_of_the_other_than_of_its_own(large: list[int], others: list[int]) -> None:
    """Up to three batches: what one of them took last, and what the other is owed."""
    batcher = make()
    for number, rows in enumerate(large):
        batcher.offer(f"large {number}", rows)
    for number, rows in enumerate(others):
        batcher.offer(f"other {number}", rows)
    computed = {True: 0, False: 0}
    while parts := batcher.take():
        for part in parts:
            computed[part.ticket.large] += part.rows
        for part in parts:
            kind = part.ticket.large
            assert computed[not kind] <= computed[kind] + 3 * BATCH
    assert computed == {True: sum(large), False: sum(others)}


@given(
    streams=st.integers(1, 4),
    large=st.integers(0, 300),
    waiting=st.integers(0, 100),
    rows=st.sampled_from([1, 2, 8, 9, 50, 200]),
    times=st.sampled_from([TIMES, LINEAR]),
)
def test_admission_predicts_the_shared_order(streams: int, large: int, waiting: int, rows: int, times: Profile) -> None:
    """Replayed: with nothing else arriving, the prediction is the time of the answer."""
    batcher: Batcher[str] = Batcher(BATCH, 10_000, times, VirtualClock(), streams=streams)
    if large > BATCH:
        batcher.offer("large", large)
    for _ in range(waiting):
        batcher.offer("before", 1)
    before = batcher.waiting_before(0, rows)
    predicted = Admission(times, BATCH).finish(0.0, rows, before, [], streams, batch=batcher.batch(rows))
    batcher.offer("asked", rows)
    free = [0.0] * streams
    finish = 0.0
    while parts := batcher.take():
        end = heapq.heappop(free) + times.seconds(sum(part.rows for part in parts))
        heapq.heappush(free, end)
        if any(part.ticket.item == "asked" for part in parts):
            finish = max(finish, end)
    # Where the others leave it half, its batches are larger than predicted.
    assert abs(predicted - finish) <= 2 * times.seconds(BATCH) + 0.1 * finish, (predicted, finish)


def test_single_samples_are_answered_while_a_large_request_is_computed() -> None:
    async def scenario() -> None:
        engine_batches = Held()
        cell = cell_of(FakeEngine(EngineConfig("openvino", max_batch=4), schedule=engine_batches.schedule))
        large = put(cell, unique(40, 0))
        await turns()
        small = [put(cell, unique(1, seed)) for seed in (1, 2)]
        for _ in range(2):
            await engine_batches.release()
            await turns()
        for seed, answer in zip((1, 2), small, strict=True):
            np.testing.assert_array_equal(answer.result(), fake_answers(unique(1, seed)))
        assert not large.done()
        while not large.done():
            await engine_batches.release()
            await turns()
        np.testing.assert_array_equal(large.result(), fake_answers(unique(40, 0)))

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_where_sizes_differ_a_large_request_waits_again_after_each_batch() -> None:
    clock = VirtualClock()
    batcher = sized(clock=clock)
    put_sized(batcher, "large", 16, 100)
    assert taken_sized(batcher) == [("large", 0, 4)]
    for name, length in (("same", 16), ("long", 128)):
        clock.advance(0.001)
        put_sized(batcher, name, length)
    assert batcher.waiting_before(0, 1) == pytest.approx(4 + 1 + 8), "of the large one a batch"
    assert taken_sized(batcher) == [("large", 4, 4)], "its turn began before they came"
    clock.advance(0.001)
    assert taken_sized(batcher) == [("same", 0, 1), ("large", 8, 3)]
    assert taken_sized(batcher) == [("long", 0, 1)]
    assert taken_sized(batcher) == [("large", 11, 4)]
    assert batcher.waiting == 85


@given(
    lengths=st.lists(st.sampled_from([8, 16, 64, 128]), max_size=12),
    rows=st.lists(st.sampled_from([1, 2, 4, 5, 30]), min_size=12, max_size=12),
    script=st.lists(st.booleans(), max_size=40),
)
def test_where_sizes_differ_any_mixture_is_computed_once_and_in_order(
    lengths: list[int], rows: list[int], script: list[bool]
) -> None:
    clock = VirtualClock()
    batcher = sized(clock=clock)
    left = list(enumerate(lengths))
    seen: list[tuple[str, int, int]] = []

    def take() -> None:
        clock.advance(0.001)
        parts = batcher.take()
        assert all(part.first + part.rows == part.ticket.rows for part in parts[:-1])
        seen.extend((part.ticket.item.request.wanted.id, part.first, part.rows) for part in parts)
        if parts:
            batcher.ended(parts)

    for offers in script:
        if offers and left:
            number, length = left.pop(0)
            put_sized(batcher, str(number), length, rows[number])
        else:
            take()
    while batcher.waiting:
        take()
    assert batcher.in_flight == 0
    assert batcher.waiting_before(0, 1) == 0
    for number in range(len(lengths) - len(left)):
        covered = [row for name, first, n in seen if name == str(number) for row in range(first, first + n)]
        assert covered == list(range(rows[number]))
