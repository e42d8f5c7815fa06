"""Which requests go into the next batch: pure decisions on a queue and a clock, no I/O.

The rule is "batch what waits when a stream is free": nobody waits for company, and under load batches grow by
themselves because requests arrive while the streams are busy. A request larger than a batch is split over several;
its rows stay in order and come together again at the caller.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

from rushhour.clock import Clock

T = TypeVar("T")


class Ticket(Generic[T]):
    """A request in the queue.

    Attributes:
        item: what the caller handed in.
        rows: its samples.
        arrived: when, in seconds of the batcher's clock.
        taken: of its samples, how many are in batches already.
    """

    __slots__ = ("arrived", "cancelled", "item", "rows", "taken")

    def __init__(self, item: T, rows: int, arrived: float) -> None:
        self.item = item
        self.rows = rows
        self.arrived = arrived
        self.taken = 0
        self.cancelled = False


class Part(Generic[T]):
    """Rows `first` to `first + rows` of a ticket's request: its share of one batch."""

    __slots__ = ("first", "rows", "ticket")

    def __init__(self, ticket: Ticket[T], first: int, rows: int) -> None:
        self.ticket = ticket
        self.first = first
        self.rows = rows


class Batcher(Generic[T]):
    """A bounded first-come queue that gives out batches.

    Args:
        max_batch: samples in one batch, at most.
        queue_bound: samples that may wait, at most.
        clock: where arrival times are read.
    """

    def __init__(self, max_batch: int, queue_bound: int, clock: Clock) -> None:
        if max_batch < 1 or queue_bound < 1:
            raise ValueError(
                f"max_batch and queue_bound must be at least 1, but got (max_batch={max_batch}, bound={queue_bound})"
            )
        self.max_batch = max_batch
        self.queue_bound = queue_bound
        self.waiting = 0
        self._clock = clock
        self._queue: deque[Ticket[T]] = deque()

    def offer(self, item: T, rows: int) -> Ticket[T] | None:
        """Queue a request of `rows` samples; None where the queue is full and the request must be shed.

        A request larger than the whole queue is taken when nothing waits, so that no size is refused for ever.
        """
        if self.waiting and self.waiting + rows > self.queue_bound:
            return None
        ticket = Ticket(item, rows, self._clock.now())
        self._queue.append(ticket)
        self.waiting += rows
        return ticket

    def cancel(self, ticket: Ticket[T]) -> None:
        """Nobody waits for this request any more; what is not yet in a batch is dropped. May be called again."""
        if not ticket.cancelled:
            ticket.cancelled = True
            self.waiting -= ticket.rows - ticket.taken

    def take(self) -> list[Part[T]]:
        """The next batch: what waits, first come first, up to `max_batch` samples; empty where nothing waits."""
        parts: list[Part[T]] = []
        room = self.max_batch
        while room and self._queue:
            ticket = self._queue[0]
            if ticket.cancelled:
                self._queue.popleft()
                continue
            rows = min(room, ticket.rows - ticket.taken)
            parts.append(Part(ticket, ticket.taken, rows))
            ticket.taken += rows
            room -= rows
            self.waiting -= rows
            if ticket.taken == ticket.rows:
                self._queue.popleft()
        return parts
