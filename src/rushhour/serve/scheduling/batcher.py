"""Which requests go into the next batch: pure decisions on a queue, a service-time profile and a clock, no I/O.

When a stream is free, the waiting requests form a batch: under load batches grow by themselves, because requests arrive
while the streams are busy. A batch is bounded by its size, and by the time that its first request (the head) has left:
a batch that would make the head late is cut to what meets its deadline, if the requests behind still meet theirs. A
request larger than a batch is split over several; its rows stay in order and the caller joins them.

Large requests, of more samples than a batch, have a queue of their own. While both wait, either gets half of the
samples that are computed, by deficit round robin: the others go first, and what the large ones miss they are owed. What
large ones compute while no other waits is a credit of the others for a burst. While large requests wait, no batch is
larger than is efficient, because whoever arrives next waits for one of them, and the others are spread over the
streams. So a request of a thousand samples delays a single one by a short batch, not by a thousand samples
(docs/decisions/0051).

Under light load a batch of one wastes CPU. There, `dispatch_at` lets a batch wait for more samples: only where a larger
batch saves much, only requests that have a deadline, only for a small part of it, and only while more are expected
(docs/decisions/0021).

Sources: the profile and the deadline queue are Clockwork's (Gujarati et al., OSDI 2020), sizing by the head's
remaining budget Nexus's (Shen et al., SOSP 2019), deficit round robin is Shreedhar and Varghese's (SIGCOMM 1995).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Generic, TypeVar

from rushhour.bundle import Sizes
from rushhour.clock import Clock
from rushhour.measurement import BatchCost
from rushhour.serve.scheduling.sizing import Times, efficient_batch, hardly_slower

T = TypeVar("T")

_SHARE = 0.2
"""Fraction of the time that a request has left, beyond two batches at their upper bound, that a batch may wait."""
_BATCHES = 8.0
"""A batch waits for no longer than so many batches of its target size take, as measured at the start. At a quarter of
one stream's capacity a batch is filled in about four."""
_BUSY = 0.5
"""Utilisation of the streams, in large batches, above which no batch waits."""
_RATIO = 1.0
"""Samples of large requests for each one of the others, while both wait: neither takes more than twice as long for the
other."""
_BURST_S = 0.25
"""What large requests compute while no other waits lets others go first later: so many seconds of computing at most."""
_PATIENCE, _RECENT_S = 1.5, 10.0
"""If others arrived in the last 10 s, it takes no longer than 1.5 single samples: who arrives next waits for it."""
FINISHED = 4
"""Batches of a request that an engine still computes after another was chosen, at most."""
_NEWEST, _DECAY = 0.1, 0.02
"""Weight of the newest gap between two arrivals, and of the newest count of requests in flight."""


class Ticket(Generic[T]):
    """A request in the queue.

    Attributes:
        item: of the caller.
        rows: its samples.
        arrived: when, in seconds of the batcher's clock.
        deadline: when it must be answered, on the same clock; infinite where there is none.
        large: it has more samples than a batch.
        since: when it began to wait: on arrival, or, where large requests take turns with others, after its last turn;
            only in a batcher of samples of different sizes.
        taken: how many of its samples are in batches already.
        cancelled: its answer is not needed any more.
    """

    __slots__ = ("arrived", "cancelled", "deadline", "item", "large", "priority", "rows", "since", "taken")
    since: float

    def __init__(self, item: T, rows: int, arrived: float, deadline: float, priority: int, large: bool = False) -> None:
        self.item = item
        self.rows = rows
        self.arrived = arrived
        self.deadline = deadline
        self.priority = priority
        self.large = large
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
    """A bounded queue, first come first served within a priority, that forms batches.

    Args:
        max_batch: samples in one batch, at most.
        queue_bound: samples that may wait, at most, not counting those of large requests; and, for a further large
            request, all of them together.
        times: how long batches take.
        clock: for arrival times.
        cost: CPU time of batches; None where no batch waits for more samples.
        streams: batches that run at the same time.
        grace: how long after its deadline a request is still computed, as a fraction of its time limit.

    Attributes:
        waiting: samples in the queue, and those that room is reserved for.
        in_flight: requests in the queue or in batches that have not ended.
        target_batch: samples that a batch waits for, at most; 1 where none waits.
        late: requests that `take` left out, because their deadline passed before they joined a batch. The caller of
            `take` answers them, and empties it.
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
        self._large_from = max_batch + 1
        self._large: dict[int, deque[Ticket[T]]] = {}
        self._large_waiting = 0
        self._owed = 0.0
        self._other_arrived = -math.inf
        self.queue_bound = queue_bound
        self.waiting = 0
        self._reserved = 0
        self._begins = 0.0
        self.late: list[Ticket[T]] = []
        self._clock = clock
        self._queues: dict[int, deque[Ticket[T]]] = {}
        self._order: list[int] = []
        self._streams = streams
        self._grace = grace
        self.target_batch = 1
        self._wait_ends = math.inf
        self.in_flight = 0
        self._usual_in_flight = 1.0
        self._gap = 1.0
        self.switch(max_batch, times, cost)

    def switch(self, max_batch: int, times: Times, cost: BatchCost | None) -> None:
        """Form batches for another engine from now on; what waits keeps its place. Arguments as of the class."""
        if self.target_batch == 1:
            self._last = self._clock.now()  # arrivals were not recorded
        self.max_batch = max_batch
        self._times = times
        self.target_batch = 1 if cost is None else efficient_batch(max_batch, cost)
        self._longest_s = _BATCHES * times.seconds(self.target_batch)

    def waiting_before(self, priority: int, rows: int = 1) -> float:
        """Samples that are computed before the last one of a request of `rows` samples, without its own.

        All of higher priorities; of its own those of its queue, and those of the other that share its batches.
        """
        everybody = not self._order or self._order[-1] <= priority
        if everybody and not self._large_waiting and rows < self._large_from:
            return self.waiting
        levels = [level for level in self._order if level <= priority]
        if everybody:
            others, large = self.waiting - self._large_waiting, self._large_waiting
        else:
            others, large = (
                sum(_rest(ticket) for level in levels for ticket in queues[level])
                for queues in (self._queues, self._large)
            )
        first = sum(_rest(ticket) for level in levels if level < priority for ticket in self._large[level])
        large -= first
        quantum = self._quantum()
        if rows >= self._large_from:
            # Smaller batches take longer: in samples of efficient ones.
            batch = hardly_slower(self.max_batch, self._times)
            longer = self._times.seconds(quantum) / quantum * batch / self._times.seconds(batch)
            return first + min(others, large + rows) + longer * (large + rows) - rows
        needed, batch = others + rows, hardly_slower(self.max_batch, self._times)
        turns = (needed - 1) // batch  # of large ones, before the last batch of the others
        owed = self._owed if self._owed < 0 or self._owed >= quantum else 0
        between = max(0, turns * batch + int(owed))
        return first + others + min(large, between + max(0, quantum - (needed - turns * batch)))

    def batch(self, rows: int) -> int:
        """Samples in the batches that a request of `rows` samples waits for, at most."""
        if not self._large_waiting and rows < self._large_from:
            return self.max_batch
        return hardly_slower(self.max_batch, self._times)

    def work(self, rows: int, sizes: Sizes) -> float:
        """Of samples of these sizes, in samples of the usual size."""
        return rows

    def full(self, rows: int) -> bool:
        """Whether a request of `rows` samples would be shed. A large one fills the queue for large ones only."""
        others = self.waiting - self._large_waiting
        if rows >= self._large_from:
            too_many = self._large_waiting > 0 and self.waiting + rows > self.queue_bound
            return too_many or others >= self.queue_bound
        return others > 0 and others + rows > self.queue_bound

    def offer(self, item: T, rows: int, *, deadline: float = math.inf, priority: int = 0) -> Ticket[T] | None:
        """Queue a request of `rows` samples; None where the queue is full and the request must be shed.

        A request larger than the whole queue is taken when no large one waits and the others do not fill the queue, so
        that no size is shed for ever.

        Args:
            item: of the caller; kept in the ticket.
            rows: its samples.
            deadline: when it must be answered, in seconds of the batcher's clock.
            priority: lower numbers are taken first.
        """
        if self.full(rows):
            return None
        large = rows >= self._large_from
        ticket = Ticket(item, rows, self._clock.now(), deadline, priority, large)
        queue = self._queues.get(priority)
        if queue is None:
            queue = self._queues[priority] = deque()
            self._large[priority] = deque()
            self._order = sorted(self._queues)
        if large:
            queue = self._large[priority]
            self._large_waiting += rows
        else:
            self._other_arrived = ticket.arrived
        queue.append(ticket)
        self.waiting += rows
        self.in_flight += 1
        if self.target_batch > 1:
            self._record_arrival(ticket)
        return ticket

    def _record_arrival(self, ticket: Ticket[T]) -> None:
        """Update the averages of arrivals, and until when the next batch may wait."""
        now = ticket.arrived
        self._gap += _NEWEST * (now - self._last - self._gap)
        self._last = now
        usual = self._usual_in_flight
        self._usual_in_flight = max(self.in_flight, usual + _DECAY * (self.in_flight - usual))
        self._wait_ends = min(self._wait_ends, now + self.max_wait_s(ticket.deadline - now))

    def max_wait_s(self, within_s: float) -> float:
        """How long a request with a time limit of `within_s` may wait for more samples, in seconds."""
        if self.target_batch == 1 or within_s == math.inf:
            return 0.0
        upper_s = self._times.upper_seconds(self.target_batch)
        return max(0.0, min(_SHARE * (within_s - 2 * upper_s), self._longest_s))

    def dispatch_at(self) -> float:
        """When the next batch should be taken, if nothing arrives before; in the past for at once.

        At once if so many samples wait that more would save little, or if the streams are busy, for then batches grow
        by themselves. Also if as many requests are in flight as usual at most: in a closed loop, no client would send
        another one. Else as long as the request with the least time left allows, if the next arrival is expected
        within that: a single request does not wait.
        """
        if self._wait_ends == math.inf or self.in_flight > self._usual_in_flight - 0.5:
            return -math.inf
        batch_s, every_s = self._times.seconds(self.target_batch), self.target_batch * self._gap
        if self.waiting >= self.target_batch or batch_s > _BUSY * self._streams * every_s:
            return -math.inf
        left_s = self._wait_ends - self._clock.now()
        return self._wait_ends if left_s >= self._gap else -math.inf

    def ended(self, parts: Sequence[Part[T]]) -> None:
        """A batch has been computed, or has failed."""
        last = parts[-1]
        self.in_flight -= len(parts) - (last.first + last.rows < last.ticket.rows)

    def reserve(self, rows: int) -> bool:
        """Reserve room for samples that are being decoded: they count as waiting. False where the queue is full."""
        if self.full(rows):
            return False
        self.waiting += rows
        self._reserved += rows
        if rows >= self._large_from:
            self._large_waiting += rows
        return True

    def release(self, rows: int) -> None:
        """Release reserved room: the samples are decoded, and offered next, or not needed any more."""
        self.waiting -= rows
        self._reserved -= rows
        if rows >= self._large_from:
            self._large_waiting -= rows

    def cancel(self, ticket: Ticket[T]) -> None:
        """Drop what is not yet in a batch of this request. Further calls have no effect."""
        if not ticket.cancelled:
            ticket.cancelled = True
            self.waiting -= ticket.rows - ticket.taken
            if ticket.large:
                self._large_waiting -= ticket.rows - ticket.taken
            self.in_flight -= ticket.taken < ticket.rows

    def has_full_batch(self) -> bool:
        """Whether the next batch is complete: whoever arrives later would not be in it, and large requests that waited
        for its end would be alone."""
        if self._large_waiting:
            return self._is_alone and any(self._large.values())
        return self.waiting - self._reserved >= self.max_batch

    def take(self, begins: float | None = None) -> list[Part[T]]:
        """The next batch, in order of arrival, up to the batch bound and the head's deadline; empty if nothing waits.

        A request whose deadline has passed is not computed: it is moved to `late`. Only the last part of a batch may
        leave samples of its request in the queue.

        Args:
            begins: when the engine is expected to begin with it; None for now.
        """
        parts: list[Part[T]] = []
        room, now = 0, self._clock.now()
        self._begins = now if begins is None else begins
        for level in self._order:
            queue = self._queues[level]
            if self._large_waiting:
                room = self._take_both(queue, self._large[level], parts, room, now)
                if parts and not room and self.waiting:
                    return parts
                continue
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
        self._wait_ends = math.inf
        return parts

    def take_begun(self) -> list[Part[T]]:
        """The rest of requests that are partly in batches, up to the batch bound; no other request joins them.

        Without large requests of which more than a few batches are left: they are not waited for.
        """
        parts: list[Part[T]] = []
        room, now = self.max_batch, self._clock.now()
        for level in self._order:
            for queue in (self._queues[level], self._large[level]):
                first = self._head(queue, now) if room else None
                if first is not None and first.taken and _rest(first) <= FINISHED * self.max_batch:
                    room -= self._fill(queue, parts, min(room, _rest(first)), now)
        return parts

    def _take_both(
        self, others: deque[Ticket[T]], large: deque[Ticket[T]], parts: list[Part[T]], room: int, now: float
    ) -> int:
        """Add the parts of one priority to a batch, while a large request waits; returns the room that is left."""
        first, larger = self._head(others, now), self._head(large, now)
        if first is None and larger is None:
            return room
        quantum = self._quantum()
        if not parts:
            room = self._room(large if first is None else others)
            if first is not None and larger is not None:
                room = min(room, max(quantum, self._beside_large(first)))
        quantum = min(quantum, room)
        if first is None:
            filled = self._fill(large, parts, quantum, now)
            self._owed = max(-self._burst(), min(0.0, self._owed) - filled)
            return self._left(large, room - filled, now)
        if larger is None:
            self._owed = min(0.0, self._owed)
            return room - self._fill(others, parts, room, now)
        kept = min(int(self._owed), room) if self._owed >= quantum else 0
        filled = self._fill(others, parts, room - kept, now, whole=kept > 0 or _rest(first) <= room)
        room -= filled
        taken = self._fill(large, parts, min(room, max(kept, quantum - filled)), now)
        self._owed = max(-self._burst(), self._owed + _RATIO * filled - taken)
        room = self._left(large, room - taken, now)
        return room - self._fill(others, parts, room, now)

    def _left(self, large: deque[Ticket[T]], room: int, now: float) -> int:
        """The room of a batch that is left for others: none while large requests of the same priority wait."""
        return 0 if self._head(large, now) is not None else room

    def _beside_large(self, first: Ticket[T]) -> int:
        """Samples in a batch while large requests and others wait: of the others what each stream gets of them, and no
        more than is efficient. The first of them is not split for that."""
        each = -(-(self.waiting - self._large_waiting) // self._streams)
        return max(_rest(first), min(each, hardly_slower(self.max_batch, self._times)))

    def _burst(self) -> float:
        """Samples of others that may be computed before those of large requests that have waited longer."""
        return _BURST_S * self._streams * self.max_batch / self._times.seconds(self.max_batch)

    @property
    def _is_alone(self) -> bool:
        """Whether large requests are alone: no other has arrived of late."""
        return self._clock.now() - self._other_arrived >= _RECENT_S

    def _quantum(self) -> int:
        """Samples of large requests in one batch: as many as are efficient, unless another batch was measured to be
        cheaper; and fewer where others arrive, who would wait for its end.
        """
        is_alone = self._is_alone
        if is_alone and 0 < self._times.cheapest <= self.max_batch:
            return self._times.cheapest
        efficient = hardly_slower(self.max_batch, self._times)
        if efficient > 1 and not is_alone:
            return max(1, min(efficient, self._times.rows_within(_PATIENCE * self._times.seconds(1))))
        return efficient

    def _fill(
        self, queue: deque[Ticket[T]], parts: list[Part[T]], room: int, now: float, *, whole: bool = False
    ) -> int:
        """Move samples of a queue into a batch, up to its room; returns how many.

        Args:
            queue: of one priority.
            parts: of the batch.
            room: samples, at most.
            now: the time.
            whole: requests that do not fit are left, with all behind them; else the last one is split.
        """
        filled = 0
        while filled < room and (ticket := self._head(queue, now)) is not None:
            rest = _rest(ticket)
            rows = min(rest, room - filled)
            if whole and rows < rest:
                break
            parts.append(Part(ticket, ticket.taken, rows))
            ticket.taken += rows
            filled += rows
            if ticket.large:
                self._large_waiting -= rows
            if rows == rest:
                queue.popleft()
        self.waiting -= filled
        return filled

    def _head(self, queue: deque[Ticket[T]], now: float) -> Ticket[T] | None:
        """The first request in a queue that is still to be computed; those before it are removed."""
        while queue:
            ticket = queue[0]
            if not ticket.cancelled:
                if ticket.deadline >= now or not self._is_over(ticket, now):
                    return ticket
                self.cancel(ticket)
                self.late.append(ticket)
            queue.popleft()
        return None

    def _is_over(self, ticket: Ticket[T], now: float) -> bool:
        """Whether it is so late that its answer is of no use."""
        return now > ticket.deadline + self._grace * (ticket.deadline - ticket.arrived)

    def drain(self) -> list[Ticket[T]]:
        """Empty the queue; returns the requests that waited."""
        queues = [queue for level in self._order for queue in (self._queues[level], self._large[level])]
        left = [ticket for queue in queues for ticket in queue if not ticket.cancelled]
        for ticket in left:
            self.cancel(ticket)
        for queue in queues:
            queue.clear()
        return left

    def _room(self, queue: deque[Ticket[T]]) -> int:
        """Samples in a batch that begins with the head of `queue`: the bound, or fewer to meet the head's deadline.

        A head that is late in any case does not bound its batch. Nor does one whose bound would make the requests
        behind it late: under overload all heads have little time left, and small batches would reduce throughput.
        """
        head = queue[0]
        if head.deadline == math.inf:
            return self.max_batch
        now = self._begins
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


def _rest(ticket: Ticket[T]) -> int:
    """Samples of a request that wait."""
    return 0 if ticket.cancelled else ticket.rows - ticket.taken
