"""Which requests go into the next batch: pure decisions on a queue, a service-time profile and a clock, no I/O.

The rule is "batch what waits when a stream is free": under load batches grow by themselves, because requests arrive
while the streams are busy. What bounds a batch is its size, and the time that its first request has left: a batch that
would make the head late is cut to what keeps it, if those behind can afford that. A request larger than a batch is
split over several; its rows stay in order and come together again at the caller.

Under little load a batch of one wastes CPU. There, `leave_at` lets a batch wait for more samples: only where a larger
batch saves much, only requests that have a deadline, only for a small part of it, and only while more are expected
(docs/decisions/0021).

Sources: the profile and the deadline queue are Clockwork's (Gujarati et al., OSDI 2020), sizing by the head's
remaining budget Nexus's (Shen et al., SOSP 2019).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from rushhour.clock import Clock
from rushhour.measurement import BatchCost

T = TypeVar("T")

_NEAR_BEST = 1.25
"""A batch is large enough once a sample costs at most so many times what it costs in the largest."""
_REQUEST_S, _BATCH_S = 1e-4, 5e-5
"""CPU seconds that a request and a batch cost beside the engine: sockets, parsing, the event loop's wake-ups. Where a
batch of one costs no more than its request, the others are not waited for."""
_SHARE = 0.2
"""Of the time that a request has left beyond two batches at their worst, so much may be spent on waiting for others."""
_BATCHES = 8.0
"""No batch waits for longer than so many batches of the size it waits for take at the start: where they are quick, next
to nothing. At a quarter of one stream's capacity a batch is filled in about four."""
_BUSY = 0.5
"""Of what the streams can compute in large batches: with more to do than that, no batch waits."""
_NEWEST, _FADING = 0.1, 0.02
"""Weight of the newest gap between two arrivals, and of the newest count of requests under way."""


class Times(Protocol):
    """What the batcher must know of the engine."""

    def seconds(self, rows: int) -> float:
        """Seconds that a batch of `rows` samples takes."""
        ...

    def seconds_at_worst(self, rows: int) -> float:
        """Seconds that hardly a batch of `rows` samples exceeds."""
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
        cost: CPU time of batches; None where none is to wait for more samples.
        streams: batches that run at the same time.
        grace: how long after its deadline a request is still worth computing, as a share of its time until then.

    Attributes:
        waiting: samples in the queue, and those that room is kept for.
        under_way: requests in the queue or in batches that have not ended.
        enough: samples that a batch waits for, at most; 1 where none waits.
        late: requests that `take` left out, because their time was over before they came to a batch. Whoever takes
            batches answers them, and empties it.
    """

    def __init__(
        self,
        max_batch: int,
        queue_bound: int,
        times: Times,
        clock: Clock,
        *,
        cost: BatchCost | None = None,
        streams: int = 1,
        grace: float = 0.0,
    ) -> None:
        if max_batch < 1 or queue_bound < 1:
            raise ValueError(
                f"max_batch and queue_bound must be at least 1, but got (max_batch={max_batch}, bound={queue_bound})"
            )
        self.max_batch = max_batch
        self.queue_bound = queue_bound
        self.waiting = 0
        self.late: list[Ticket[T]] = []
        self._times = times
        self._clock = clock
        self._queues: dict[int, deque[Ticket[T]]] = {}
        self._order: list[int] = []
        self._streams = streams
        self._grace = grace
        self.enough = 1 if cost is None else large_enough(max_batch, cost)
        self._longest_s = _BATCHES * times.seconds(self.enough)
        self._patience_ends = math.inf
        self.under_way = 0
        self._crowd = 1.0
        self._last = clock.now()
        self._gap = 1.0

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
        self.under_way += 1
        if self.enough > 1:
            self._notice(ticket)
        return ticket

    def _notice(self, ticket: Ticket[T]) -> None:
        """What this arrival tells of the next ones, and until when it may wait for them."""
        now = ticket.arrived
        self._gap += _NEWEST * (now - self._last - self._gap)
        self._last = now
        self._crowd = max(self.under_way, self._crowd + _FADING * (self.under_way - self._crowd))
        self._patience_ends = min(self._patience_ends, now + self.patience_s(ticket.deadline - now))

    def patience_s(self, within_s: float) -> float:
        """Seconds for which a request waits for more samples, at most, that is to be answered `within_s`."""
        if self.enough == 1 or within_s == math.inf:
            return 0.0
        worst_s = self._times.seconds_at_worst(self.enough)
        return max(0.0, min(_SHARE * (within_s - 2 * worst_s), self._longest_s))

    def leave_at(self) -> float:
        """When the next batch should be taken, if nothing comes before that; in the past for at once.

        At once if so many samples wait that more would save little, or if the streams have much to do, for then batches
        grow by themselves. Also if as many requests are under way as usually at most: users who ask again only when
        they are answered would wait in vain. Else as long as the request with the least time allows, if the next one
        is expected within that: who is alone does not wait.
        """
        if self._patience_ends == math.inf or self.under_way > self._crowd - 0.5:
            return -math.inf
        batch_s, every_s = self._times.seconds(self.enough), self.enough * self._gap
        if self.waiting >= self.enough or batch_s > _BUSY * self._streams * every_s:
            return -math.inf
        left_s = self._patience_ends - self._clock.now()
        return self._patience_ends if left_s >= self._gap else -math.inf

    def ended(self, parts: Sequence[Part[T]]) -> None:
        """A batch has been computed, or has failed."""
        last = parts[-1]
        self.under_way -= len(parts) - (last.first + last.rows < last.ticket.rows)

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
            self.under_way -= ticket.taken < ticket.rows

    def take(self) -> list[Part[T]]:
        """The next batch: what waits, first come first, up to the bound and the head's time; empty if nothing waits.

        A request that nobody waits for any more is not computed: it goes to `late`.
        """
        parts: list[Part[T]] = []
        room, now = 0, self._clock.now()
        for level in self._order:
            queue = self._queues[level]
            while queue:
                ticket = queue[0]
                if ticket.cancelled:
                    queue.popleft()
                    continue
                if ticket.deadline < now and self._is_over(ticket, now):
                    queue.popleft()
                    self.cancel(ticket)
                    self.late.append(ticket)
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
        self._patience_ends = math.inf
        return parts

    def _is_over(self, ticket: Ticket[T], now: float) -> bool:
        """Whether whoever sent it has stopped waiting: so late its answer is of no use."""
        return now > ticket.deadline + self._grace * (ticket.deadline - ticket.arrived)

    def drain(self) -> list[Ticket[T]]:
        """All that waits, none of which will be computed."""
        left = [ticket for level in self._order for ticket in self._queues[level] if not ticket.cancelled]
        for ticket in left:
            self.cancel(ticket)
        for queue in self._queues.values():
            queue.clear()
        return left

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


def large_enough(max_batch: int, cost: BatchCost) -> int:
    """The fewest samples with which one costs hardly more CPU time than in the largest batch; 1 where all cost little.

    A sample of n costs `a / n + b`, with what request and batch cost beside the engine.
    """
    if cost.batch_s + cost.sample_s <= _REQUEST_S:
        return 1
    a, b = cost.batch_s + _BATCH_S, cost.sample_s + _REQUEST_S
    return math.ceil(a / (_NEAR_BEST * (a / max_batch + b) - b))
