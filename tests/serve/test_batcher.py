"""The batcher's promises, replayed on a virtual clock: order, bounds, splitting, cancellation."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rushhour.clock import VirtualClock
from rushhour.measurement import BatchCost, ServiceTimes
from rushhour.serve.scheduling.admission import Admission, Profile
from rushhour.serve.scheduling.batcher import Batcher, Part
from rushhour.serve.scheduling.sizing import efficient_batch


def line(a: float, b: float, largest: int = 64) -> Profile:
    """A profile of an engine whose batches take a + b n seconds."""
    sizes = tuple(2**k for k in range(int(math.log2(largest)) + 1))
    seconds = tuple(a + b * n for n in sizes)
    return Profile(ServiceTimes(sizes, seconds, tuple(n / s for n, s in zip(sizes, seconds, strict=True))))


TIMES = line(0.010, 0.001)
COST = BatchCost(batch_s=0.0012, sample_s=0.0001)


def make(max_batch: int = 4, queue_bound: int = 8, clock: VirtualClock | None = None) -> Batcher[str]:
    return Batcher(max_batch, queue_bound, TIMES, clock or VirtualClock())


def taken(batcher: Batcher[str]) -> list[tuple[str, int, int]]:
    return [(part.ticket.item, part.first, part.rows) for part in batcher.take()]


def test_takes_what_waits_first_come_first() -> None:
    batcher = make()
    for item in "abc":
        batcher.offer(item, 1)
    assert taken(batcher) == [("a", 0, 1), ("b", 0, 1), ("c", 0, 1)]
    assert taken(batcher) == []


def test_a_batch_is_bounded_and_the_rest_waits() -> None:
    batcher = make(max_batch=2)
    for item in "abc":
        batcher.offer(item, 1)
    assert taken(batcher) == [("a", 0, 1), ("b", 0, 1)]
    assert taken(batcher) == [("c", 0, 1)]


def test_a_large_request_alone_is_cut_into_the_batches_that_are_measured_to_be_cheapest() -> None:
    sizes, each_ms = (1, 4, 8, 12, 16, 32), (4.0, 2.5, 2.2, 2.0, 2.3, 2.4)
    seconds = tuple(1e-3 * n * ms for n, ms in zip(sizes, each_ms, strict=True))
    profile = Profile(ServiceTimes(sizes, seconds, tuple(1e3 / ms for ms in each_ms)))
    clock = VirtualClock()
    batcher: Batcher[str] = Batcher(32, 100, profile, clock)
    batcher.offer("photograph", 100)
    assert taken(batcher) == [("photograph", 0, 12)]
    batcher.offer("small", 1)
    assert taken(batcher)[0] == ("small", 0, 1)
    assert taken(batcher)[0][2] < 12, "who arrives next waits for the end of a batch"


def test_a_request_larger_than_a_batch_is_split_in_order() -> None:
    batcher = make(max_batch=4)
    batcher.offer("small", 1)
    batcher.offer("large", 8)
    assert taken(batcher) == [("small", 0, 1), ("large", 0, 3)]
    assert taken(batcher) == [("large", 3, 4)]
    assert taken(batcher) == [("large", 7, 1)]


def test_a_full_queue_sheds_and_an_empty_one_takes_any_size() -> None:
    batcher = make(queue_bound=3)
    assert batcher.offer("whole queue and more", 4) is not None
    assert batcher.offer("late", 1) is None
    batcher.take()
    assert batcher.offer("again", 3) is not None


def test_cancelled_requests_leave_the_queue() -> None:
    batcher = make()
    first = batcher.offer("gone", 3)
    batcher.offer("stays", 1)
    assert first is not None
    batcher.cancel(first)
    batcher.cancel(first)
    assert batcher.waiting == 1
    assert taken(batcher) == [("stays", 0, 1)]
    assert batcher.waiting == 0


def test_cancelling_a_half_taken_request_drops_its_rest() -> None:
    batcher = make(max_batch=2)
    ticket = batcher.offer("half", 5)
    assert ticket is not None
    assert taken(batcher) == [("half", 0, 2)]
    batcher.cancel(ticket)
    assert batcher.waiting == 0
    assert taken(batcher) == []


@given(
    max_batch=st.integers(1, 8),
    bound=st.integers(1, 40),
    script=st.lists(st.one_of(st.integers(1, 12), st.just("take"), st.just("cancel")), max_size=60),
)
def test_any_trace_keeps_every_promise(max_batch: int, bound: int, script: list[int | str]) -> None:
    batcher: Batcher[int] = Batcher(max_batch, bound, TIMES, VirtualClock(), cost=BatchCost(0.01, 0.001))
    alive: dict[int, tuple[object, int]] = {}
    seen: list[tuple[int, int, int]] = []
    number = 0

    def counted(large: bool) -> list[int]:
        return [t.rows - t.taken for t, rows in alive.values() if (rows > max_batch) is large]  # type: ignore[attr-defined]

    for step in [*script, *["take"] * 200]:
        if isinstance(step, int):
            large = step > max_batch
            before, of_all = sum(counted(large)), batcher.waiting
            ticket = batcher.offer(number, step)
            full = before > 0 and (of_all if large else before) + step > bound
            assert (ticket is None) == (full or (large and of_all - before >= bound))
            if ticket is not None:
                alive[number] = (ticket, step)
            number += 1
        elif step == "cancel" and alive:
            item, (ticket, _) = next(iter(alive.items()))
            batcher.cancel(ticket)  # type: ignore[arg-type]
            del alive[item]
        elif step == "take":
            parts = batcher.take()
            assert sum(part.rows for part in parts) <= max_batch
            seen.extend((part.ticket.item, part.first, part.rows) for part in parts)
            if parts:
                batcher.ended(parts)
    assert batcher.waiting == batcher.in_flight == 0
    for item, (_, rows) in alive.items():
        covered = [row for at, first, n in seen if at == item for row in range(first, first + n)]
        assert covered == list(range(rows)), "every row exactly once, in order"


def test_a_batch_is_cut_to_what_keeps_its_head_in_time() -> None:
    clock = VirtualClock()
    batcher = make(max_batch=8, queue_bound=100, clock=clock)
    batcher.offer("head", 1, deadline=0.0145)  # a batch of 4 takes 14 ms
    for _ in range(7):
        batcher.offer("next", 1, deadline=1.0)
    assert len(taken(batcher)) == 4
    assert len(taken(batcher)) == 4, "the next head has time for all that wait"


def test_under_overload_batches_stay_full() -> None:
    """All have the same time allowed, and the head little of it left: to cut its batch would cost all behind it."""
    clock = VirtualClock()
    batcher = make(max_batch=8, queue_bound=100, clock=clock)
    for number in range(24):
        batcher.offer(str(number), 1, deadline=0.050 + number * 1e-4)  # a batch of 8 takes 18 ms
    clock.advance(0.034)  # the head has time for a batch of 6, and the next one not for another after that
    assert len(taken(batcher)) == 8
    clock.advance(0.016)
    assert len(taken(batcher)) == 8


def test_a_head_that_is_late_anyway_does_not_make_batches_small() -> None:
    clock = VirtualClock()
    batcher = make(max_batch=8, queue_bound=100, clock=clock)
    batcher.offer("late", 1, deadline=0.105)  # its time is not over, but a batch of one takes 11 ms
    for _ in range(7):
        batcher.offer("next", 1, deadline=1.0)
    clock.advance(0.1)
    assert len(taken(batcher)) == 8


def test_who_waits_a_little_longer_than_the_deadline_is_still_computed() -> None:
    clock = VirtualClock(5.0)
    batcher: Batcher[str] = Batcher(4, 8, TIMES, clock, grace=0.1)
    for item in ("in time", "late"):
        batcher.offer(item, 1, deadline=5.1 if item == "in time" else 5.05)
    batcher.offer("whenever", 1)
    clock.advance(0.109)
    assert [item for item, _, _ in taken(batcher)] == ["in time", "whenever"]
    assert [ticket.item for ticket in batcher.late] == ["late"]


def test_higher_priorities_are_taken_first_and_in_order_among_themselves() -> None:
    batcher = make(max_batch=10, queue_bound=100)
    for number, priority in enumerate([4, 1, 4, 2, 1]):
        batcher.offer(str(number), 1, priority=priority)
    assert batcher.waiting_before(1) == 2
    assert batcher.waiting_before(2) == 3
    assert batcher.waiting_before(4) == 5
    assert [item for item, _, _ in taken(batcher)] == ["1", "4", "3", "0", "2"]


def test_the_profile_follows_the_engine() -> None:
    profile = line(0.002, 0.0005)
    assert profile.seconds(10) == pytest.approx(0.007)
    assert profile.rows_within(0.007) == 10
    assert profile.rows_within(0.0024) == 0
    for step in range(400):
        rows = 1 + step % 16
        profile.update(rows, 0.004 + 0.001 * rows)
    assert profile.seconds(16) == pytest.approx(0.020, rel=0.15)
    assert profile.seconds(1) == pytest.approx(0.005, rel=0.30)


def test_batches_that_come_unevenly_leave_less_time_to_wait_for_others() -> None:
    profile = line(0.002, 0.0005)
    batcher: Batcher[str] = Batcher(16, 100, profile, VirtualClock(), cost=COST)
    assert profile.upper_seconds(8) == profile.seconds(8)
    calm = batcher.max_wait_s(0.045)
    assert 0.005 < calm < 0.2 * 0.045
    for number in range(50):
        profile.update(8, 0.001 if number % 2 else 0.025)
    assert profile.upper_seconds(8) > 0.025
    assert batcher.max_wait_s(0.045) == 0.0, "what is usual is not at risk, but what happens is"


def test_a_long_run_of_equal_batches_leaves_the_other_sizes_sensible() -> None:
    profile = line(0.002, 0.0005)
    for _ in range(5000):
        profile.update(8, 0.006)
    assert profile.seconds(8) == pytest.approx(0.006, rel=0.05)
    assert profile.seconds(64) == pytest.approx(0.034, rel=0.15)


@given(st.lists(st.tuples(st.integers(1, 64), st.floats(1e-7, 10.0)), max_size=300))
def test_whatever_the_profile_learns_it_stays_a_profile(batches: list[tuple[int, float]]) -> None:
    profile = line(0.002, 0.0005)
    for rows, seconds in batches:
        profile.update(rows, seconds)
        assert 0 < profile.seconds(1) <= profile.seconds(64) < 1e4
        fits = profile.rows_within(profile.seconds(32))
        assert fits >= 31


@given(
    streams=st.integers(1, 4),
    waiting=st.integers(0, 400),
    rows=st.integers(1, 8),
    ends=st.lists(st.floats(0.0, 0.1), max_size=4),
)
def test_admission_predicts_what_the_batcher_then_does(
    streams: int, waiting: int, rows: int, ends: list[float]
) -> None:
    """Replayed: with only this traffic and exact service times, the prediction is the time of the answer."""
    busy = ends[:streams]
    predicted = Admission(TIMES, 8).finish(0.0, rows, waiting, busy, streams)
    free = sorted([*busy, *[0.0] * (streams - len(busy))])
    heapq.heapify(free)
    batcher: Batcher[str] = Batcher(8, 10_000, TIMES, VirtualClock())
    for _ in range(waiting):
        batcher.offer("before", 1)
    batcher.offer("asked", rows)
    finish = 0.0
    while parts := batcher.take():
        start = heapq.heappop(free)
        end = start + TIMES.seconds(sum(part.rows for part in parts))
        heapq.heappush(free, end)
        if parts[-1].ticket.item == "asked":
            finish = end
    # Where the streams' ends lie far apart, a long queue shared out evenly is off by up to one batch.
    slack = 1e-9 if waiting + rows <= 16 * 8 else TIMES.seconds(8)
    assert predicted == pytest.approx(finish, abs=slack)


# Waiting for more samples, replayed: one stream whose batches take 0.35 ms and 0.13 ms a sample.

SMALL = line(0.00035, 0.00013)
BUDGET_S = 0.045
"""That each request has, as under p99<50ms."""


class Replay:
    """What requests meet: sizes of batches, and latencies, over five seconds.

    Args:
        rate_rps: of Poisson arrivals; 0 for none.
        users: that send the next request 0.3 ms after an answer.
    """

    def __init__(
        self, *, rate_rps: float = 0.0, users: int = 0, budget_s: float = BUDGET_S, cost: BatchCost | None = COST
    ) -> None:
        self.sizes: list[int] = []
        self.latencies: list[float] = []
        self._clock = VirtualClock()
        self._batcher: Batcher[None] = Batcher(16, 1000, SMALL, self._clock, cost=cost)
        self._budget_s = budget_s
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._busy = False
        chance = random.Random(1)

        def arrive() -> None:
            self._batcher.offer(None, 1, deadline=self._clock.now() + budget_s)
            if rate_rps:
                self._after(chance.expovariate(rate_rps), arrive)

        self._again = arrive if users else None
        for number in range(users or 1):
            self._after(number * 1e-4, arrive)
        while self._events and self._clock.now() < 5:
            at, _, event = heapq.heappop(self._events)
            self._clock.advance(max(0.0, at - self._clock.now()))
            event()
            self._dispatch()

    def _after(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self._clock.now() + seconds, len(self.latencies) + random.getrandbits(40), event))

    def _dispatch(self) -> None:
        left = self._batcher.dispatch_at() - self._clock.now()
        if self._busy or left > 1e-3:
            if not self._busy:
                self._after(left, lambda: None)
            return
        parts = self._batcher.take()
        if parts:
            self._busy = True
            self.sizes.append(sum(part.rows for part in parts))
            self._after(SMALL.seconds(self.sizes[-1]), lambda: self._end(parts))

    def _end(self, parts: list[Part[None]]) -> None:
        self._busy = False
        self._batcher.ended(parts)
        for part in parts:
            self.latencies.append(self._clock.now() - part.ticket.arrived)
            if self._again:
                self._after(3e-4, self._again)

    @property
    def mean_size(self) -> float:
        return sum(self.sizes) / len(self.sizes)

    def latency(self, share: float) -> float:
        return sorted(self.latencies)[int(share * len(self.latencies))]


def test_at_a_quarter_of_capacity_batches_are_large_enough_and_answers_come_in_a_fraction_of_the_time() -> None:
    rate_rps = 16 / SMALL.seconds(16) / 4
    enough = efficient_batch(16, COST)
    assert enough == 9
    waiting, not_waiting = Replay(rate_rps=rate_rps), Replay(rate_rps=rate_rps, cost=None)
    assert not_waiting.mean_size < 1.5
    assert waiting.mean_size > 0.7 * enough
    assert waiting.latency(0.999) < 0.25 * BUDGET_S


@pytest.mark.parametrize("rate_rps", [1.0, 20.0, 50.0])
def test_who_is_alone_does_not_wait(rate_rps: float) -> None:
    assert Replay(rate_rps=rate_rps).latency(0.9) == pytest.approx(SMALL.seconds(1))


@pytest.mark.parametrize("users", [1, 2, 3, 5, 8, 30])
def test_users_who_wait_for_their_answers_do_not_wait_for_each_other(users: int) -> None:
    waiting, not_waiting = Replay(users=users), Replay(users=users, cost=None)
    assert len(waiting.latencies) > 0.95 * len(not_waiting.latencies)


@pytest.mark.parametrize(
    "spared",
    [
        {"budget_s": math.inf},
        {"budget_s": 2 * SMALL.seconds(10)},
        {"cost": BatchCost(0.00008, 0.00001)},
        {"cost": BatchCost(0.0, 0.01)},
        {"rate_rps": 0.8 * 16 / SMALL.seconds(16)},
    ],
    ids=["no deadline", "no time", "cheap", "nothing saved", "busy"],
)
def test_nobody_waits_where_it_costs_too_much_or_saves_nothing(spared: dict[str, float | BatchCost]) -> None:
    asked: dict[str, float | BatchCost | None] = {"rate_rps": 1500.0, **spared}
    waited = Replay(**asked)  # type: ignore[arg-type]
    at_once = Replay(**{**asked, "cost": None})  # type: ignore[arg-type]
    assert waited.mean_size == pytest.approx(at_once.mean_size, rel=0.05)


def test_the_request_with_the_least_time_decides_how_long_all_wait() -> None:
    clock = VirtualClock()
    batcher: Batcher[str] = Batcher(16, 100, SMALL, clock, cost=COST)
    for _ in range(100):  # a crowd of four, every 2 ms
        for _ in range(4):
            clock.advance(0.0005)
            batcher.offer("crowd", 1, deadline=clock.now() + BUDGET_S)
        batcher.ended(batcher.take())
    batcher.offer("patient", 1, deadline=clock.now() + BUDGET_S)
    patient = batcher.dispatch_at()
    assert clock.now() + 0.005 < patient <= clock.now() + 0.2 * BUDGET_S
    batcher.offer("in a hurry", 1, deadline=clock.now() + 0.015)
    assert clock.now() < batcher.dispatch_at() < clock.now() + 0.2 * 0.015
    batcher.offer("has no deadline", 1)
    assert batcher.dispatch_at() <= clock.now()
    assert len(batcher.take()) == 3
    assert batcher.dispatch_at() == -math.inf, "nobody is there"
