"""`Lanes`: the cores that the cells of a cascade share.

Each cell alone has as many streams as fit the cores. Together they would take turns on them, and every batch would take
longer than its profile says. So all of them together run no more batches at once than one has streams.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rushhour.serve.scheduling.cell import Cell
    from rushhour.serve.scheduling.stream import Stream


class Lanes:
    """The batches of several cells. Used on the event loop's thread.

    Attributes:
        running: those in flight.
    """

    def __init__(self) -> None:
        self.running: list[Stream] = []
        self._cells: list[Cell] = []

    def join(self, cell: Cell) -> None:
        """Share them. Who joined last is served first: what has come further in a cascade has less time left."""
        self._cells.insert(0, cell)

    def ended(self, stream: Stream) -> None:
        """A batch has ended: whoever waits may begin the next."""
        self.running.remove(stream)
        for cell in self._cells:
            if cell.waiting:
                cell.dispatch_soon()
