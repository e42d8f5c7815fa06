"""`Lanes`: the batches that one model runs at the same time, in one cell or in the cells of its cascade.

Each cell alone has as many streams as fit the cores. Together they would take turns on them, and every batch would take
longer than its profile says. So all of them together run no more batches at once than one has streams. Where a server
has several models, their lanes share the cores too (`Cores`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rushhour.serve.scheduling.cell import Cell
    from rushhour.serve.scheduling.cores import Cores
    from rushhour.serve.scheduling.stream import Stream


class Lanes:
    """The batches of several cells. Used on the event loop's thread.

    Args:
        cores: that other models compute on, too; None where there is no other model.
        weight: of this model among them.

    Attributes:
        running: those in flight.
        cells: of one model. Who joined last is first: what has come further in a cascade has less time left.
        cores, weight: the same.
        slow: how many times longer than alone the queue takes, because others compute between its batches.
        rivals: the weights of the other models that have requests, together.
        tag: the virtual time at which its next batch may begin (`Cores`).
        kept: core seconds that were kept free for its next batch.
        used: of the cores, in the last second or so: core seconds per second.
        idle: of these, for cores that were only kept free.
        counted: when that was counted.
    """

    def __init__(self, cores: Cores | None = None, weight: float = 1.0) -> None:
        self.running: list[Stream] = []
        self.cells: list[Cell] = []
        self.cores = cores
        self.weight = weight
        self.slow = 1.0
        self.rivals = 0.0
        self.tag = 0.0
        self.kept = 0.0
        self.used = 0.0
        self.idle = 0.0
        self.counted = 0.0

    def join(self, cell: Cell) -> None:
        """Share them."""
        self.cells.insert(0, cell)
        if self.cores is not None:
            self.cores.join(self)

    def busy_until(self, cell: Cell) -> list[float]:
        """When each batch in flight is expected to end; and when those streams of the cell will be free whose cores
        other models occupy."""
        ends = [stream.until for stream in self.running]
        return ends if self.cores is None else self.cores.busy_until(self, cell, ends)

    def began(self, stream: Stream) -> None:
        """A batch begins."""
        self.running.append(stream)
        if self.cores is not None:
            self.cores.began(self, stream)

    def ended(self, stream: Stream) -> None:
        """A batch has ended: whoever waits may begin the next."""
        self.running.remove(stream)
        if self.cores is not None:
            self.cores.ended(self, stream)
            return
        for each in self.cells:
            if each.waiting:
                each.dispatch_soon()

    def close(self) -> None:
        """No batch begins any more. Those in flight keep no cores from other models. Further calls have no effect."""
        if self.cores is not None:
            self.cores.leave(self)
