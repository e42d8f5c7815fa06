"""Which requests go into the next batch: pure decisions on a queue, a service-time profile and a clock, no I/O.

The rule is "batch what waits when a stream is free": nobody waits for company, and under load batches grow by
themselves, because requests arrive while the streams are busy. What bounds a batch is its size, and the time that its
first request has left: a batch that would make the head late is cut to what keeps it, if those behind can afford that.
A request larger than a batch is split over several; its rows stay in order and come together again at the caller.

Sources: the profile and the deadline queue are Clockwork's (Gujarati et al., OSDI 2020), sizing by the head's
remaining budget Nexus's (Shen et al., SOSP 2019).
"""

from __future__ import annotations

import math
from collections import deque
from typing import Generic, Protocol, TypeVar

from rushhour.clock import Clock

T = TypeVar("T")


class Times(Protocol):
    """What the batcher must know of the engine."""

    def seconds(self, rows: int) -> float:
        """Seconds that a batch of `rows` samples takes."""
        ...

    def rows_within(self, seconds: float) -> int:
        """The largest batch that takes no longer than `seconds`; 0 if none does."""
        ...


class Ticket(Generic[T]):
    """A request in the queue.

    Attributes:
        item: what the caller handed in.
        rows: its samples.
        arrived: when, in seconds of the batcher's clock.
        deadline: when its answer must be there, on the same clock; infinite where nobody said.
        taken: of its samples, how many are in batches already.
        cancelled: nobody waits for it any more.
    """

    __slots__ = ("arrived", "cancelled", "deadline", "item", "priority", "rows", "taken")

    def __init__(self, item: T, rows: int, arrived: float, deadline: float, priority: int) -> None:
        self.item = item
        self.rows = rows
        self.arrived = arrived
        self.deadline = deadline
        self.priority = priority
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
    """A bounded queue, first come first served within a priority, that gives out batches.

    Args:
        max_batch: samples in one batch, at most.
        queue_bound: samples that may wait, at most.
        times: how long batches take.
        clock: where arrival times are read.
    """

    def __init__(self, max_batch: int, queue_bound: int, times: Times, clock: Clock) -> None:
        if max_batch < 1 or queue_bound < 1:
            raise ValueError(
                f"max_batch and queue_bound must be at least 1, but got (max_batch={max_batch}, bound={queue_bound})"
            )
        self.max_batch = max_batch
        self.queue_bound = queue_bound
        self.waiting = 0
        self._times = times
        self._clock = clock
        self._queues: dict[int, deque[Ticket[T]]] = {}
        self._order: list[int] = []

    def waiting_before(self, priority: int) -> int:
        """Samples that a request of this priority would wait for: all of its own and of higher priorities."""
        if not self._order or self._order[-1] <= priority:
            return self.waiting
        return sum(
            ticket.rows - ticket.taken
            for level in self._order
            if level <= priority
            for ticket in self._queues[level]
            if not ticket.cancelled
        )

    def full(self, rows: int) -> bool:
        """Whether a request of `rows` samples would be shed."""
        return self.waiting > 0 and self.waiting + rows > self.queue_bound

    def offer(self, item: T, rows: int, *, deadline: float = math.inf, priority: int = 0) -> Ticket[T] | None:
        """Queue a request of `rows` samples; None where the queue is full and the request must be shed.

        A request larger than the whole queue is taken when nothing waits, so that no size is refused for ever.

        Args:
            item: handed back with the ticket.
            rows: its samples.
            deadline: when its answer must be there, in seconds of the batcher's clock.
            priority: lower numbers are taken first.
        """
        if self.full(rows):
            return None
        ticket = Ticket(item, rows, self._clock.now(), deadline, priority)
        queue = self._queues.get(priority)
        if queue is None:
            queue = self._queues[priority] = deque()
            self._order = sorted(self._queues)
        queue.append(ticket)
        self.waiting += rows
        return ticket

    def reserve(self, rows: int) -> bool:
        """Keep room for samples that are on their way: they count as waiting. False where the queue is full."""
        if self.full(rows):
            return False
        self.waiting += rows
        return True

    def release(self, rows: int) -> None:
        """Give back room that was kept: what was on its way is there, and offered next, or will not come."""
        self.waiting -= rows

    def cancel(self, ticket: Ticket[T]) -> None:
        """Nobody waits for this request any more; what is not yet in a batch is dropped. May be called again."""
        if not ticket.cancelled:
            ticket.cancelled = True
            self.waiting -= ticket.rows - ticket.taken

    def take(self) -> list[Part[T]]:
        """The next batch: what waits, first come first, up to the bound and the head's time; empty if nothing waits."""
        parts: list[Part[T]] = []
        room = 0
        for level in self._order:
            queue = self._queues[level]
            while queue:
                ticket = queue[0]
                if ticket.cancelled:
                    queue.popleft()
                    continue
                if not parts:
                    room = self._room(queue)
                if not room:
                    return parts
                rows = min(room, ticket.rows - ticket.taken)
                parts.append(Part(ticket, ticket.taken, rows))
                ticket.taken += rows
                room -= rows
                self.waiting -= rows
                if ticket.taken == ticket.rows:
                    queue.popleft()
        return parts

    def _room(self, queue: deque[Ticket[T]]) -> int:
        """Samples in a batch that the head of `queue` leads: all there is room for, or fewer to keep it in time.

        A head that is late whatever is done does not bound its batch. Nor does one whose cut would make those behind
        it late: under overload all heads have little time left, and small batches would carry less and less.
        """
        head = queue[0]
        if head.deadline == math.inf:
            return self.max_batch
        now = self._clock.now()
        fits = self._times.rows_within(head.deadline - now)
        if fits >= min(self.max_batch, self.waiting) or fits < min(self.max_batch, head.rows - head.taken):
            return self.max_batch
        rest = min(self.max_batch, self.waiting - fits)
        next_end = now + self._times.seconds(fits) + self._times.seconds(rest)
        room = fits
        for ticket in queue:
            if not ticket.cancelled:
                room -= ticket.rows - ticket.taken
                if room < 0:
                    return fits if next_end <= ticket.deadline else self.max_batch
        return fits
