"""The batcher's promises, replayed on a virtual clock: order, bounds, splitting, cancellation."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rushhour.clock import VirtualClock
from rushhour.serve.batcher import Batcher


def make(max_batch: int = 4, queue_bound: int = 8) -> Batcher[str]:
    return Batcher(max_batch, queue_bound, VirtualClock())


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


def test_a_request_larger_than_a_batch_is_split_in_order() -> None:
    batcher = make(max_batch=4)
    batcher.offer("small", 1)
    batcher.offer("large", 6)
    batcher.offer("next", 1)
    assert taken(batcher) == [("small", 0, 1), ("large", 0, 3)]
    assert taken(batcher) == [("large", 3, 3), ("next", 0, 1)]


def test_a_full_queue_sheds_and_an_empty_one_takes_any_size() -> None:
    batcher = make(queue_bound=3)
    assert batcher.offer("whole queue and more", 5) is not None
    assert batcher.offer("late", 1) is None
    batcher.take()
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
    batcher: Batcher[int] = Batcher(max_batch, bound, VirtualClock())
    alive: dict[int, tuple[object, int]] = {}
    seen: list[tuple[int, int, int]] = []
    number = 0
    for step in [*script, *["take"] * 200]:
        if isinstance(step, int):
            before = batcher.waiting
            ticket = batcher.offer(number, step)
            assert (ticket is None) == (before > 0 and before + step > bound)
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
    assert batcher.waiting == 0
    assert [item for item, _, _ in seen] == sorted(item for item, _, _ in seen), "nobody overtakes"
    for item, (_, rows) in alive.items():
        covered = [row for at, first, n in seen if at == item for row in range(first, first + n)]
        assert covered == list(range(rows)), "every row exactly once, in order"
