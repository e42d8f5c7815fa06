"""Batches of like lengths, replayed on a virtual clock: who joins whom, bounds, order, nobody starves."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_batcher import line

from rushhour.bundle import OpenDimension, Signature, TensorSpec
from rushhour.clock import VirtualClock
from rushhour.measurement import PositionCost, ServiceTimes
from rushhour.plan import Policy
from rushhour.serve.scheduling.admission import Profile
from rushhour.serve.scheduling.batcher import Batcher
from rushhour.serve.scheduling.buckets import Buckets, SizedBatcher, batcher_of
from rushhour.serve.scheduling.job import Job
from rushhour.wire import InferRequest, Wanted

IDS, ANSWER = TensorSpec("ids", "int64", (128,)), TensorSpec("answer", "float32", (3,))
PADDED = Signature((IDS,), (ANSWER,), open=(OpenDimension("length", 128, {"ids": 0}, padding={"ids": 0}),))
EQUAL = Signature((IDS,), (ANSWER,), open=(OpenDimension("length", 128, {"ids": 0}),))
BY_LENGTH = PositionCost(usual=16, share=1.0)


def job(name: str, length: int, rows: int = 1) -> Job:
    request = InferRequest(rows, (), Wanted(name, (0,), (True,), sizes=(length,)))
    return Job(request, lambda result: None)


def make(
    signature: Signature = PADDED,
    *,
    max_batch: int = 4,
    bound: int = 1000,
    times: Profile | None = None,
    clock: VirtualClock | None = None,
    bounds: tuple[int, ...] = (),
) -> SizedBatcher:
    buckets = Buckets(signature, bounds, BY_LENGTH)
    return SizedBatcher(buckets, max_batch, bound, times or line(1e-6, 0.001), clock or VirtualClock())


def put(batcher: SizedBatcher, name: str, length: int, rows: int = 1, **how: float) -> None:
    assert batcher.offer(job(name, length, rows), rows, **how) is not None  # type: ignore[arg-type]


def taken(batcher: SizedBatcher) -> list[tuple[str, int, int]]:
    return [(part.ticket.item.request.wanted.id, part.first, part.rows) for part in batcher.take()]


def names(batcher: SizedBatcher) -> str:
    return "".join(name for name, _, _ in taken(batcher))


def test_a_batch_is_of_like_lengths_and_begins_with_the_oldest() -> None:
    clock = VirtualClock()
    batcher = make(clock=clock)
    for name, length in (("a", 100), ("b", 10), ("c", 12), ("d", 110), ("e", 9)):
        put(batcher, name, length)
        clock.advance(0.001)
    assert names(batcher) == "a"  # one of 128 is as much work as 8 of 16, more than the bound
    assert names(batcher) == "bce"
    assert names(batcher) == "d"
    assert names(batcher) == ""
    assert batcher.waiting == 0


def test_a_batch_holds_as_much_work_as_the_bound_and_no_more_samples() -> None:
    batcher = make(max_batch=8)
    for name in "abcdefghijkl":
        put(batcher, name, 8)
    assert names(batcher) == "abcdefgh"
    assert names(batcher) == "ijkl"
    for name in "abcdefgh":
        put(batcher, name, 32)
    assert names(batcher) == "abcd"  # twice the usual work each


def test_shorter_ones_join_only_where_padding_costs_less_than_a_batch_of_their_own() -> None:
    for base_s, expected in ((0.0101, "ab"), (0.0001, "a")):
        batcher = make(max_batch=16, times=line(base_s, 0.001))
        put(batcher, "a", 64)  # padding b from 16 to 64 is the work of 3 usual samples: 3 ms
        put(batcher, "b", 16)
        assert names(batcher) == expected
    batcher = make(max_batch=16, times=line(0.0101, 0.001))
    put(batcher, "a", 64)
    for name in "bcdefgh":
        put(batcher, name, 16)  # 7 of them would be 21 ms of padding
    assert names(batcher) == "a"


def test_longer_ones_never_join() -> None:
    clock = VirtualClock()
    batcher = make(max_batch=16, times=line(1.0, 0.001), clock=clock)
    put(batcher, "a", 16)
    clock.advance(0.001)
    put(batcher, "b", 128)
    assert names(batcher) == "a"
    assert names(batcher) == "b"


def test_without_padding_only_equal_sizes_share_a_batch() -> None:
    clock = VirtualClock()
    batcher = make(EQUAL, max_batch=16, times=line(1.0, 0.001), clock=clock)
    for name, length in (("a", 16), ("b", 15), ("c", 16)):
        put(batcher, name, length)
        clock.advance(0.001)
    assert names(batcher) == "ac"
    assert names(batcher) == "b"
    assert names(batcher) == ""
    assert not batcher._levels  # sizes that were seen once are not kept


def test_a_request_larger_than_a_batch_is_split_in_order() -> None:
    batcher = make(max_batch=4)
    put(batcher, "a", 16, rows=6)
    put(batcher, "b", 16)
    assert taken(batcher) == [("a", 0, 4)]
    assert taken(batcher) == [("b", 0, 1), ("a", 4, 2)], "it waits again, behind who came before"


def test_the_rest_of_a_request_is_finished_alone_before_another_engine_takes_the_queue() -> None:
    batcher = make()
    for name, rows in (("a", 6), ("b", 1)):
        put(batcher, name, 10, rows)
    assert batcher.take_begun() == [], "nothing was begun"
    assert taken(batcher) == [("a", 0, 4)]
    (part,) = batcher.take_begun()
    assert (part.ticket.item.request.wanted.id, part.first, part.rows) == ("a", 4, 2)
    assert batcher.take_begun() == []
    batcher.switch(2, line(1e-6, 0.001), None)
    put(batcher, "c", 10, 3)
    assert [taken(batcher), taken(batcher)] == [[("b", 0, 1), ("c", 0, 1)], [("c", 1, 2)]]
    assert batcher.waiting == 0
    assert batcher.waiting_before(0) == 0


def test_higher_priorities_come_first_and_lower_ones_of_the_same_length_join() -> None:
    clock = VirtualClock()
    batcher = make(max_batch=4, clock=clock)
    for name, length, priority in (("low", 16, 5), ("long", 100, 1), ("high", 16, 1)):
        put(batcher, name, length, priority=priority)
        clock.advance(0.001)
    assert names(batcher) == "long"
    assert names(batcher) == "highlow"


def test_what_is_cancelled_is_not_computed_and_its_work_is_forgotten() -> None:
    batcher = make()
    first = batcher.offer(job("a", 16), 1)
    put(batcher, "b", 32)
    assert batcher.waiting_before(0) == pytest.approx(3)
    assert first is not None
    batcher.cancel(first)
    batcher.cancel(first)
    assert batcher.waiting_before(0) == pytest.approx(2)
    assert names(batcher) == "b"
    assert batcher.waiting_before(0) == 0


def test_the_work_before_a_request_is_that_of_its_priority_and_above() -> None:
    batcher = make()
    put(batcher, "a", 16, priority=1)
    put(batcher, "b", 64, priority=5)
    assert batcher.waiting_before(1) == pytest.approx(1)
    assert batcher.waiting_before(5) == pytest.approx(5)


def test_what_is_late_is_left_out() -> None:
    clock = VirtualClock()
    batcher = make(clock=clock)
    put(batcher, "a", 16, deadline=0.5)
    put(batcher, "b", 16)
    clock.advance(1.0)
    assert names(batcher) == "b"
    assert [ticket.item.request.wanted.id for ticket in batcher.late] == ["a"]


def test_a_batch_is_cut_to_meet_the_deadline_of_its_first() -> None:
    batcher = make(max_batch=8, times=line(0.0, 0.010))
    put(batcher, "a", 16, deadline=0.035)
    for name in "bcdef":
        put(batcher, name, 16, deadline=1.0)
    assert names(batcher) == "abc"


def test_a_full_queue_sheds_and_reserved_room_counts() -> None:
    batcher = make(bound=3)
    assert batcher.reserve(2)
    put(batcher, "a", 16)
    assert batcher.offer(job("b", 16), 1) is None
    assert batcher.waiting_before(0) == pytest.approx(3)
    batcher.release(2)
    assert batcher.waiting_before(0) == pytest.approx(1)
    assert [ticket.item.request.wanted.id for ticket in batcher.drain()] == ["a"]
    assert (batcher.waiting, batcher.in_flight) == (0, 0)


@given(st.integers(0, 10**9))
def test_every_sample_is_taken_once_and_nobody_is_overtaken_by_a_later_batch_start(seed: int) -> None:
    chance = random.Random(seed)
    clock = VirtualClock()
    times = line(chance.choice((0.0, 0.001, 0.1)), 0.001)
    batcher = make(chance.choice((PADDED, EQUAL)), max_batch=chance.randint(1, 8), times=times, clock=clock)
    wanted: dict[str, int] = {}
    arrived: dict[str, float] = {}
    seen: dict[str, int] = {}

    def take() -> None:
        parts = batcher.take()
        if not parts:
            return
        head = parts[0].ticket
        left = [name for name in wanted if seen.get(name, 0) < wanted[name]]
        assert arrived[head.item.request.wanted.id] == min(arrived[name] for name in left)
        bucket = batcher.buckets.of(head.item.request.wanted.sizes)
        assert 1 <= sum(part.rows for part in parts) <= batcher.max_batch
        for part in parts:
            name, sizes = part.ticket.item.request.wanted.id, part.ticket.item.request.wanted.sizes
            assert part.first == seen.get(name, 0)
            seen[name] = part.first + part.rows
            if part.ticket.large:
                arrived[name] = clock.now()
            assert batcher.buckets.of(sizes) == bucket or batcher.buckets.holds(bucket, batcher.buckets.of(sizes))

    for number in range(40):
        clock.advance(chance.random())
        name, rows = str(number), chance.randint(1, 6)
        wanted[name], arrived[name] = rows, clock.now()
        put(batcher, name, chance.randint(1, 128), rows)
        if chance.random() < 0.5:
            take()
    while batcher.waiting:
        take()
    assert seen == wanted
    assert batcher.waiting_before(0) == 0
    assert batcher.in_flight == 40


def test_the_plan_decides_the_buckets_and_the_profile_the_work() -> None:
    times = ServiceTimes((1, 2), (0.1, 0.2), (10.0, 10.0), positions=PositionCost(usual=32, share=0.5))
    made = batcher_of(PADDED, Policy(buckets=(16, 48, 500)), times)(4, 10, Profile(times), VirtualClock())
    assert isinstance(made, SizedBatcher)
    assert made.buckets.bounds == (16, 48, 128)  # what no sample can have is left out, the largest is one
    assert made.buckets.of((17,)) == (48,)
    assert made.work(2, (64,)) == pytest.approx(2 * (0.5 + 0.5 * 128 / 32))
    usual = batcher_of(PADDED, Policy(), times)(4, 10, Profile(times), VirtualClock())
    assert isinstance(usual, SizedBatcher)
    assert usual.buckets.bounds == (8, 12, 16, 24, 32, 48, 64, 96, 128)
    fixed = batcher_of(Signature((IDS,), (ANSWER,)), Policy(), times)(4, 10, Profile(times), VirtualClock())
    assert type(fixed) is Batcher


def test_all_batches_are_known_before_the_first() -> None:
    buckets = Buckets(PADDED, (16, 64), BY_LENGTH)
    assert buckets.batches((20,), 8) == {(16,): 8, (64,): 2, (128,): 1}
    assert Buckets(EQUAL, (), BY_LENGTH).batches((20,), 8) == {}


def test_infinite_deadlines_do_not_bound_a_batch() -> None:
    batcher = make(max_batch=4, times=line(0.0, 10.0))
    for name in "abcd":
        put(batcher, name, 16, deadline=math.inf)
    assert names(batcher) == "abcd"
