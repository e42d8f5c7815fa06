"""`Cores`: the cores of a process, shared by the models of a server according to their weights.

Every batch occupies as many cores as its stream has threads, and all batches together no more than there are: each
takes the time that its profile says. Which model computes next is start-time fair queueing over the time that batches
take: a batch begins at a virtual time, the later of the server's and of the end of the model's batch before, and ends
there so many core seconds later, over the weight. The batch with the earliest begin is next. So a model that has work
gets its share at least, whatever the others send; what others leave is divided by weight; and who was idle collects no
claim.

A batch is never interrupted, so who has sent little waits for the end of one batch of another model. While others have
requests, no batch of a model takes longer than a quarter of the tightest limit among them, or than one sample takes.

Sources: Goyal, Vin and Cheng, Start-time fair queueing, SIGCOMM 1996; for several batches at the same time Jin, Chase
and Kaur, SIGMETRICS 2004.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from rushhour.clock import Clock

if TYPE_CHECKING:
    from rushhour.serve.scheduling.cell import Cell
    from rushhour.serve.scheduling.lanes import Lanes
    from rushhour.serve.scheduling.stream import Stream

_MEMORY_S: Final = 1.0
"""Time constant of the averages of what models use."""
_REVIEW_S: Final = 0.05
"""How often shares and bounds of batches are computed anew."""
_ACTIVE: Final = 0.01
"""Who uses this share of the cores has requests; it takes five time constants to fall from all to this."""
_PATIENCE: Final = 0.25
"""Fraction of the tightest limit of other models that a batch may take."""
_MOST_IDLE: Final = 0.9
"""Of what a model occupies, cores that are only kept for its wide batches make up this much at most, by its own
prediction."""


def shared_cores(layouts: Sequence[tuple[int, int]], room: int) -> int:
    """How many cores batches of all models may occupy at the same time.

    As many as all streams together, but no more than there are; and one is left to the event loop, unless a model's own
    layout leaves it none.

    Args:
        layouts: streams and threads of each model, as it runs alone.
        room: cores of the process.
    """
    alone = [streams * threads for streams, threads in layouts]
    widest = max(alone, default=1)
    return max(widest, min(sum(alone), room - 1 if widest < room else room))


class Cores:
    """The cores of a process. Used on the event loop's thread.

    Args:
        room: how many there are.
        clock: of the cells.

    Attributes:
        size: on how many batches may run.
    """

    def __init__(self, room: int, clock: Clock) -> None:
        self.size = room
        self._room = room
        self._clock = clock
        self._models: list[Lanes] = []
        self._busy = 0
        self._now = 0.0  # virtual: the begin of the batch that began last
        self._reviewed = -math.inf
        self._dispatching = False
        self._kept_for: Lanes | None = None
        self._kept_since = 0.0

    def join(self, lanes: Lanes) -> None:
        """A cell of a model computes on them from now on."""
        if lanes not in self._models:
            self._models.append(lanes)
        self._resize()

    def leave(self, lanes: Lanes) -> None:
        """A model does not compute any more, whatever its engine does. Further calls have no effect."""
        if lanes in self._models:
            self._models.remove(lanes)
            self._kept_for = None
            self._busy -= sum(stream.of.threads for stream in lanes.running)
            self._resize()
            self._review(self._clock.now())
            self._dispatch_soon()

    def least(self, weight: float) -> float:
        """The cores that a model of this weight can count on while all compute."""
        return self.size * weight / sum(lanes.weight for lanes in self._models)

    def _resize(self) -> None:
        self.size = shared_cores([_layout(lanes) for lanes in self._models], self._room)

    # Which batch is next.

    def dispatch(self) -> None:
        """Begin batches, as long as there are cores for the one that is next."""
        self._count_kept()
        nothing: set[Lanes] = set()
        while True:
            first: tuple[float, Lanes, Cell] | None = None
            for lanes in self._models:
                begin = max(self._now, lanes.tag)
                if (first is None or begin < first[0]) and lanes not in nothing:
                    cell = next((cell for cell in lanes.cells if cell.waiting and cell.is_due()), None)
                    if cell is not None:
                        first = begin, lanes, cell
            if first is None:
                return
            _, lanes, cell = first
            if self._busy and self._busy + cell.active.threads > self.size:
                # Cores that are free are kept for it, or a wider batch would wait for ever.
                self._kept_for, self._kept_since = lanes, self._clock.now()
                return
            if not cell.begin():
                nothing.add(lanes)

    def _count_kept(self) -> None:
        """Cores that were kept for a model until now are charged to it with its next batch."""
        lanes, self._kept_for = self._kept_for, None
        if lanes is not None:
            lanes.kept += (self.size - self._busy) * max(0.0, self._clock.now() - self._kept_since)

    def _dispatch_soon(self) -> None:
        if not self._dispatching:
            self._dispatching = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._dispatching = False
        self.dispatch()

    # What batches take.

    def began(self, lanes: Lanes, stream: Stream) -> None:
        """A batch begins. Its time is charged as predicted, until it has ended."""
        variant, rows = stream.of, sum(part.rows for part in stream.parts)
        self._busy += variant.threads
        self._now = max(self._now, lanes.tag)
        stream.charged = variant.threads * variant.profile.seconds(rows)
        kept, lanes.kept = lanes.kept, 0.0
        lanes.tag = self._now + (kept + stream.charged) / lanes.weight
        if kept:
            _use(lanes, self._clock.now(), kept)
            lanes.idle += kept / _MEMORY_S

    def ended(self, lanes: Lanes, stream: Stream) -> None:
        """A batch has ended: charge what it took, and let the next begin."""
        if lanes not in self._models:
            return
        self._count_kept()  # more are free from now on
        now, threads = self._clock.now(), stream.of.threads
        took = threads * (now - stream.taken)
        self._busy -= threads
        lanes.tag += (took - stream.charged) / lanes.weight
        _use(lanes, now, took)
        if now - self._reviewed >= _REVIEW_S:
            self._review(now)
        self._dispatch_soon()

    # What a model can count on.

    def busy_until(self, lanes: Lanes, cell: Cell, own: list[float]) -> list[float]:
        """When a cell's streams are expected to be free for its next batches.

        Args:
            lanes: of the cell's model.
            own: when the batches in flight of this model end.

        Returns:
            the times of the streams that are not free now: of those that compute, and of those whose cores others
            occupy; none before the model's turn.
        """
        free = len(cell.active.engine.slots) - len(own) - (self.size - self._busy) // cell.active.threads
        if free > 0:
            own += sorted(stream.until for each in self._models if each is not lanes for stream in each.running)[:free]
        turn = self._clock.now() + max(0.0, lanes.tag - self._now) * lanes.rivals / self.size
        return [max(end, turn) for end in own]

    def _review(self, now: float) -> None:
        """What each model can count on, and how long its batches may take.

        A model counts on what the others have left of late, and on its share of all that have requests at least. The
        rest of a stream's time is others': its queue takes so much longer than alone.
        """
        self._reviewed = now
        used = {lanes: _decayed(lanes, now) for lanes in self._models}
        active = [lanes for lanes in self._models if used[lanes] > _ACTIVE * self.size or _has_work(lanes)]
        for lanes in self._models:
            others = [each for each in active if each is not lanes]
            lanes.rivals = sum(each.weight for each in others)
            own = min(self.size, math.prod(_layout(lanes)))
            fair = self.size * lanes.weight / (lanes.weight + lanes.rivals)
            unused = self.size - sum(min(used[each], math.prod(_layout(each))) for each in others)
            computing = 1 - min(_MOST_IDLE, lanes.idle / lanes.used) if lanes.used else 1.0
            lanes.slow = own / (computing * min(own, max(fair, unused)))
            limit_s = min((_limit_s(each) for each in others), default=math.inf)
            for cell in lanes.cells:
                cell.bound_batches(_PATIENCE * limit_s)


def _layout(lanes: Lanes) -> tuple[int, int]:
    """Streams and threads of a model."""
    active = lanes.cells[0].active
    return len(active.engine.slots), active.threads


def _use(lanes: Lanes, now: float, core_s: float) -> None:
    """Count core seconds that a model has occupied."""
    left = math.exp((lanes.counted - now) / _MEMORY_S)
    lanes.used, lanes.idle = lanes.used * left + core_s / _MEMORY_S, lanes.idle * left
    lanes.counted = now


def _decayed(lanes: Lanes, now: float) -> float:
    return lanes.used * math.exp((lanes.counted - now) / _MEMORY_S)


def _has_work(lanes: Lanes) -> bool:
    return bool(lanes.running) or any(cell.waiting for cell in lanes.cells)


def _limit_s(lanes: Lanes) -> float:
    deadline_ms = lanes.cells[0].policy.deadline_ms
    return math.inf if deadline_ms is None else deadline_ms / 1e3
