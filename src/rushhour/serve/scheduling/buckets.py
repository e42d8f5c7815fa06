"""Batches of samples of different sizes: the queue of a model with open dimensions.

Requests wait in buckets of like sizes. The next batch begins with the request that has waited longest, whatever its
size, so that none starves, and takes the others of its bucket in order of arrival. A request of more samples than a
batch waits again after each batch, behind all that came before: it delays them by one. Where room is left, a bucket of
shorter samples joins whole if that costs less than a batch of its own: padding them takes time, and each batch has a
part that does not depend on its samples.

A batch holds as much work as `max_batch` samples of the usual size: fewer long samples, and no more than `max_batch`
short ones.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import msgspec

from rushhour.bundle import Signature, Sizes
from rushhour.capacity import usual_bounds
from rushhour.measurement import PositionCost, ServiceTimes
from rushhour.plan import Policy
from rushhour.serve.scheduling.batcher import FINISHED, Batcher, Part, Ticket
from rushhour.serve.scheduling.job import Job


class Buckets:
    """Which sizes a batch has that a sample is in, and how much work samples are.

    Args:
        signature: of the model.
        bounds: of the sizes in the padded dimension, ascending; empty for the usual ones. The largest size is always
            one of them.
        cost: of positions; None where it was not measured: then all of a sample's time grows with them.
    """

    def __init__(self, signature: Signature, bounds: Sequence[int] = (), cost: PositionCost | None = None) -> None:
        self.padded = signature.padded
        self.bounds: tuple[int, ...] = ()
        if self.padded is not None:
            dimension = signature.dimensions[self.padded]
            inside = {bound for bound in bounds if dimension.smallest <= bound < dimension.largest}
            known = (*sorted(inside), dimension.largest) if bounds else ()
            self.bounds = known or usual_bounds(dimension.smallest, dimension.largest)
        self._cost = cost or PositionCost(usual=math.prod(each.largest for each in signature.dimensions), share=1.0)

    def of(self, sizes: Sizes) -> Sizes:
        """The sizes to which a sample is padded: in the padded dimension the next bound, in others its own."""
        if self.padded is None:
            return sizes
        bound = self.bounds[bisect.bisect_left(self.bounds, sizes[self.padded])]
        return (*sizes[: self.padded], bound, *sizes[self.padded + 1 :])

    def work(self, sizes: Sizes) -> float:
        """Of one sample padded to these sizes, in samples of the usual size."""
        return self._cost.work(sizes)

    def rows(self, sizes: Sizes, max_batch: int) -> int:
        """Samples of these sizes in a batch, at most: as much work as the bound, and no more samples."""
        return max(1, min(max_batch, int(max_batch / self.work(sizes) + 1e-9)))

    def batches(self, usual: Sizes, max_batch: int) -> dict[Sizes, int]:
        """The sizes of all batches, where samples are padded, and the samples in each, at most.

        Args:
            usual: sizes in other dimensions.
            max_batch: samples of the usual size in a batch.
        """
        at = self.padded
        every = () if at is None else ((*usual[:at], bound, *usual[at + 1 :]) for bound in self.bounds)
        return {sizes: self.rows(sizes, max_batch) for sizes in every}

    def holds(self, sizes: Sizes, shorter: Sizes) -> bool:
        """Whether samples in the bucket `shorter` can be padded to these sizes."""
        at = self.padded
        return (
            at is not None and shorter[at] < sizes[at]
            and (*shorter[:at], *shorter[at + 1 :]) == (*sizes[:at], *sizes[at + 1 :])
        )  # fmt: skip


class SizedBatcher(Batcher[Job]):
    """A batcher of samples of different sizes.

    Args:
        buckets: of their sizes.
        arguments, settings: of `Batcher`.

    Attributes:
        buckets: the same.
    """

    def __init__(self, buckets: Buckets, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.buckets = buckets
        self._levels: dict[int, dict[Sizes, deque[Ticket[Job]]]] = {}
        self._work = 0.0
        self._large_work = 0.0

    def work(self, rows: int, sizes: Sizes) -> float:
        """As of a `Batcher`."""
        return rows * self.buckets.work(self.buckets.of(sizes))

    def _work_of(self, ticket: Ticket[Job]) -> float:
        """Of what is not yet in a batch of a request."""
        return self.work(ticket.rows - ticket.taken, ticket.item.request.wanted.sizes)

    def full(self, rows: int) -> bool:
        """As of a `Batcher`, of all requests together."""
        return self.waiting > 0 and self.waiting + rows > self.queue_bound

    def waiting_before(self, priority: int, rows: int = 1) -> float:
        """Work before a request of this priority, in samples of the usual size: of large requests one batch."""
        if all(level <= priority for level in self._levels):
            turns = self._large_work - self.max_batch if rows < self._large_from and self._large_waiting else 0.0
            return self._work - max(0.0, turns) if self.waiting else 0.0
        before = (queue for level, queues in self._levels.items() if level <= priority for queue in queues.values())
        return sum(self._work_of(ticket) for ticket in chain.from_iterable(before) if not ticket.cancelled)

    def batch(self, rows: int) -> int:
        """As of a `Batcher`; large requests do not make batches smaller."""
        return self.max_batch

    def offer(self, item: Job, rows: int, *, deadline: float = math.inf, priority: int = 0) -> Ticket[Job] | None:
        """As of a `Batcher`."""
        if self.full(rows):
            return None
        sizes = self.buckets.of(item.request.wanted.sizes)
        work = rows * self.buckets.work(sizes)
        ticket = Ticket(item, rows, self._clock.now(), deadline, priority, work > self.max_batch and rows > 1)
        ticket.since = ticket.arrived
        self._levels.setdefault(priority, {}).setdefault(sizes, deque()).append(ticket)
        self._work = work + (self._work if self.waiting else 0.0)  # no rounding errors for ever
        if ticket.large:
            self._large_work = work + (self._large_work if self._large_waiting else 0.0)
            self._large_waiting += rows
        self.waiting += rows
        self.in_flight += 1
        if self.target_batch > 1:
            self._record_arrival(ticket)
        return ticket

    def reserve(self, rows: int) -> bool:
        """As of a `Batcher`; samples whose size is not known yet count as usual ones."""
        if not super().reserve(rows):
            return False
        self._work += rows
        self._large_work += rows if rows >= self._large_from else 0
        return True

    def release(self, rows: int) -> None:
        """As of a `Batcher`."""
        super().release(rows)
        self._work -= rows
        self._large_work -= rows if rows >= self._large_from else 0

    def cancel(self, ticket: Ticket[Job]) -> None:
        """As of a `Batcher`."""
        if not ticket.cancelled:
            self._work -= self._work_of(ticket)
            self._large_work -= self._work_of(ticket) if ticket.large else 0.0
        super().cancel(ticket)

    def drain(self) -> list[Ticket[Job]]:
        """As of a `Batcher`."""
        queues = [queue for queues in self._levels.values() for queue in queues.values()]
        left = [ticket for ticket in chain.from_iterable(queues) if not ticket.cancelled]
        for ticket in left:
            self.cancel(ticket)
        self._levels.clear()
        return left

    def has_full_batch(self) -> bool:
        """As of a `Batcher`: not known here, the sizes of those that arrive decide which batch is next."""
        return False

    def take(self, begins: float | None = None) -> list[Part[Job]]:
        """The next batch: of the bucket of the request that has waited longest among those of the highest priority,
        and of shorter ones where that saves time. Empty if nothing waits.

        A request whose deadline has passed is not computed: it is moved to `late`.

        Args:
            begins: as of a `Batcher`; now, because no batch of theirs waits in the engine.
        """
        now = self._clock.now()
        parts: list[Part[Job]] = []
        found = self._longest_waiting(now)
        if found is not None:
            level, sizes = found
            parts, room = self._join(sizes, self._rows(level, sizes, now), now)
            if room:
                for shorter in self._shorter(sizes):
                    if room and self._saves(shorter, sizes, room):
                        joined, room = self._join(shorter, room, now)
                        parts += joined
        if not self.waiting:
            self._wait_ends = math.inf
        return parts

    def _longest_waiting(self, now: float) -> tuple[int, Sizes] | None:
        """The priority and the bucket of the request that the next batch begins with."""
        for level in sorted(self._levels):
            queues = self._levels[level]
            for sizes in list(queues):
                if not self._pruned(queues[sizes], now):
                    del queues[sizes]
            if queues:
                return level, min(queues, key=lambda sizes: queues[sizes][0].since)
            del self._levels[level]
        return None

    def _pruned(self, queue: deque[Ticket[Job]], now: float) -> bool:
        """Remove what is cancelled or late from the beginning of a queue; returns whether anything is left."""
        while queue:
            ticket = queue[0]
            if ticket.cancelled:
                queue.popleft()
            elif ticket.deadline < now and self._is_over(ticket, now):
                queue.popleft()
                self.cancel(ticket)
                self.late.append(ticket)
            else:
                return True
        return False

    def _join(self, sizes: Sizes, room: int, now: float) -> tuple[list[Part[Job]], int]:
        """Samples of a bucket, in order of priority and arrival, and the room that is left."""
        parts: list[Part[Job]] = []
        for level in sorted(self._levels):
            queue = self._levels[level].get(sizes, deque())
            while room and self._pruned(queue, now):
                parts.append(self._part(queue, room))
                room -= parts[-1].rows
        return parts, room

    def _part(self, queue: deque[Ticket[Job]], room: int) -> Part[Job]:
        """So many samples of the first request of a queue, or what is left of it."""
        ticket = queue[0]
        part = Part(ticket, ticket.taken, min(room, ticket.rows - ticket.taken))
        before = self._work_of(ticket)
        ticket.taken += part.rows
        done = before - self._work_of(ticket)
        self._work -= done
        self.waiting -= part.rows
        if ticket.large:
            self._large_work -= done
            self._large_waiting -= part.rows
        if ticket.taken == ticket.rows:
            queue.popleft()
        elif ticket.large:
            ticket.since = self._clock.now()
            queue.rotate(-1)  # it waits again, behind the others
        return part

    def take_begun(self) -> list[Part[Job]]:
        """As of a `Batcher`: of one request, as others may have another size."""
        now = self._clock.now()
        for level in sorted(self._levels):
            for sizes, queue in self._levels[level].items():
                begun = (ticket for ticket in queue if ticket.taken and not ticket.cancelled)
                first = next(begun, None) if self._pruned(queue, now) else None
                if first is not None and self._work_of(first) <= FINISHED * self.max_batch:
                    queue.remove(first)
                    queue.appendleft(first)
                    return [self._part(queue, self._rows(level, sizes, now))]
        return []

    def _shorter(self, sizes: Sizes) -> list[Sizes]:
        """The buckets whose samples can be padded to these sizes, the longest first."""
        known = {each for queues in self._levels.values() for each in queues}
        return sorted((each for each in known if self.buckets.holds(sizes, each)), reverse=True)

    def _waiting_in(self, sizes: Sizes, most: int) -> int:
        """Samples that wait in a bucket, counted up to `most + 1`."""
        total = 0
        for ticket in self._tickets(sizes):
            total += ticket.rows - ticket.taken
            if total > most:
                return most + 1
        return total

    def _tickets(self, sizes: Sizes) -> Iterator[Ticket[Job]]:
        for level in sorted(self._levels):
            yield from (ticket for ticket in self._levels[level].get(sizes, ()) if not ticket.cancelled)

    def _saves(self, shorter: Sizes, sizes: Sizes, room: int) -> bool:
        """Whether padding all that waits in a shorter bucket takes less time than a batch of its own."""
        rows = self._waiting_in(shorter, room)
        if not 0 < rows <= room:
            return False
        padding = rows * (self.buckets.work(sizes) - self.buckets.work(shorter))
        own_s = self._times.seconds(0)
        return self._times.seconds(padding) - own_s < own_s

    def _rows(self, level: int, sizes: Sizes, now: float) -> int:
        """Samples of these sizes in a batch: as much work as the bound, or fewer to meet the deadline of the first; as
        `Batcher` decides it."""
        work, most = self.buckets.work(sizes), self.buckets.rows(sizes, self.max_batch)
        head = self._levels[level][sizes][0]
        if head.deadline == math.inf:
            return most
        fits = int(self._times.rows_within(head.deadline - now) / work + 1e-9)
        waiting = self._waiting_in(sizes, most)
        if fits >= min(most, waiting) or fits < min(most, head.rows - head.taken):
            return most
        next_end = now + self._times.seconds(fits * work) + self._times.seconds(min(most, waiting - fits) * work)
        room = fits
        for ticket in self._tickets(sizes):
            room -= ticket.rows - ticket.taken
            if room < 0:
                return fits if next_end <= ticket.deadline else most
        return fits


def batcher_of(signature: Signature, policy: Policy, times: ServiceTimes) -> Callable[..., Batcher[Job]]:
    """Makes the batcher of a model, from the arguments of `Batcher`."""
    return partial(SizedBatcher, buckets_of(signature, policy, times)) if signature.dimensions else Batcher


def buckets_of(signature: Signature, policy: Policy, times: ServiceTimes) -> Buckets:
    """Of a model with open dimensions, as its plan says."""
    bounds = () if isinstance(policy.buckets, msgspec.UnsetType) else policy.buckets
    return Buckets(signature, bounds, None if isinstance(times.positions, msgspec.UnsetType) else times.positions)
