"""A slot of the engine with its buffers, and the batch that it computes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np

from rushhour.bundle import Signature
from rushhour.clock import Clock
from rushhour.engines import Slot
from rushhour.serve.scheduling.batcher import Part
from rushhour.serve.scheduling.job import Job


class Stream:
    """A slot of the engine, its input buffers as bytes, and the batch that runs on it.

    Args:
        slot: of the engine.
        signature: of the model.
        loop: the event loop of the cell.
        clock: of the cell.
        finished: called on the event loop when a batch has ended, with the error where there was one.
    """

    __slots__ = (
        *("_clock", "_finished", "_loop", "_row_bytes"),
        *("buffers", "ended", "parts", "rows", "slot", "started", "taken", "until"),
    )

    def __init__(
        self,
        slot: Slot,
        signature: Signature,
        loop: asyncio.AbstractEventLoop,
        clock: Clock,
        finished: Callable[[Stream, BaseException | None], None],
    ) -> None:
        self.slot = slot
        self.buffers = [slot.inputs[spec.name].reshape(-1).view(np.uint8).data for spec in signature.inputs]
        self.parts: list[Part[Job]] = []
        self.rows = 0
        self.taken = 0.0
        self.started = 0.0
        self.until = 0.0
        self.ended = 0.0
        self._row_bytes = tuple(spec.row_bytes for spec in signature.inputs)
        self._loop = loop
        self._clock = clock
        self._finished = finished

    def fill(self, parts: list[Part[Job]]) -> int:
        """Write a batch into the input buffers, each request once and in place; returns its rows."""
        buffers, row_bytes_in = self.buffers, self._row_bytes
        at = 0
        for part in parts:
            ticket, first = part.ticket, part.first
            job, end = ticket.item, at + part.rows
            whole = part.rows == ticket.rows
            for buffer, tensor, row_bytes in zip(buffers, job.request.tensors, row_bytes_in, strict=True):
                rows = tensor if whole else tensor[first * row_bytes : (first + part.rows) * row_bytes]
                buffer[at * row_bytes : end * row_bytes] = rows
            at = end
            if whole or first + part.rows == ticket.rows:
                # Ticket and job refer to each other: a body is freed when it was copied, not by the garbage collector.
                job.ticket = None
                job.request.tensors = ()
        return at

    def done(self, error: BaseException | None) -> None:
        """A batch has ended. Called by the engine on a thread of its own; hands over to the event loop."""
        self.ended = self._clock.now()
        self._loop.call_soon_threadsafe(self._finished, self, error)
