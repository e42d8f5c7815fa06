"""One model on one event loop: requests are queued, put on the engine in batches, and answered.

Everything here runs on the loop's thread but `_Stream.done`, which the engine calls and which only hands over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import numpy as np

from rushhour.clock import WallClock
from rushhour.engines import Engine, Slot
from rushhour.errors import EngineError
from rushhour.serve.batcher import Batcher, Part, Ticket
from rushhour.wire import Codec, InferRequest

Reply = Callable[[Sequence[memoryview] | Exception], None]
"""Called once, on the loop: the raw rows of each output, in the signature's order, or what went wrong.

The views are valid only during the call.
"""


class Job:
    """A request on its way through the cell. `cancel` when nobody waits for the answer any more."""

    __slots__ = ("collected", "missing", "reply", "request")

    def __init__(self, request: InferRequest, reply: Reply) -> None:
        self.request = request
        self.reply: Reply | None = reply
        self.missing = request.rows
        self.collected: list[bytearray] | None = None

    def cancel(self) -> None:
        """Drop the answer when it comes."""
        self.reply = None


class Counters:
    """What the cell has done since it started."""

    __slots__ = ("answered", "batches", "cancelled", "failed", "rows", "shed")

    def __init__(self) -> None:
        self.answered = 0
        self.failed = 0
        self.shed = 0
        self.cancelled = 0
        self.batches = 0
        self.rows = 0


class Cell:
    """An engine behind a batcher on the running event loop.

    Args:
        engine: compiled and warm.
        codec: of the model, for its name and signature.
        queue_bound: samples that may wait, at most.
    """

    def __init__(self, engine: Engine, codec: Codec, queue_bound: int) -> None:
        self.codec = codec
        self.engine = engine
        self.counters = Counters()
        self._loop = asyncio.get_running_loop()
        self._batcher: Batcher[Job] = Batcher(engine.config.max_batch, queue_bound, WallClock())
        self._row_bytes_in = tuple(spec.row_bytes for spec in engine.signature.inputs)
        self._row_bytes_out = tuple(spec.row_bytes for spec in engine.signature.outputs)
        self._output_names = tuple(spec.name for spec in engine.signature.outputs)
        self._free = [_Stream(self, slot) for slot in engine.slots]
        self._streams = len(self._free)
        self._dispatching = False

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self._batcher.waiting and len(self._free) == self._streams

    @property
    def waiting(self) -> int:
        """Samples in the queue."""
        return self._batcher.waiting

    def submit(self, request: InferRequest, reply: Reply) -> tuple[Job, Ticket[Job]] | None:
        """Queue a request; None where the queue is full. `reply` is called later, never from within this call."""
        job = Job(request, reply)
        ticket = self._batcher.offer(job, request.rows)
        if ticket is None:
            self.counters.shed += 1
            return None
        # Not at once: the other requests that this turn of the loop reads from its sockets belong into the batch.
        if self._free and not self._dispatching:
            self._dispatching = True
            self._loop.call_soon(self._dispatch)
        return job, ticket

    def cancel(self, job: Job, ticket: Ticket[Job]) -> None:
        """The caller has gone: drop what waits, and the answer to what runs."""
        self.counters.cancelled += 1
        job.cancel()
        self._batcher.cancel(ticket)

    def _dispatch(self) -> None:
        self._dispatching = False
        while self._free:
            parts = self._batcher.take()
            if not parts:
                return
            stream = self._free.pop()
            rows = self._fill(stream, parts)
            self.counters.batches += 1
            self.counters.rows += rows
            stream.parts = parts
            try:
                stream.slot.start(rows, stream.done)
            except Exception as error:
                self._finished(stream, error)

    def _fill(self, stream: _Stream, parts: list[Part[Job]]) -> int:
        """Write a batch into the stream's input buffers, each request once and in place; returns its rows."""
        at = 0
        for part in parts:
            for buffer, tensor, row_bytes in zip(
                stream.buffers, part.ticket.item.request.tensors, self._row_bytes_in, strict=True
            ):
                start = at * row_bytes
                size = part.rows * row_bytes
                first = part.first * row_bytes
                buffer[start : start + size] = tensor[first : first + size]
            at += part.rows
        return at

    def _finished(self, stream: _Stream, error: BaseException | None) -> None:
        parts, stream.parts = stream.parts, []
        if error is None:
            outputs = stream.slot.outputs
            views = [outputs[name].data.cast("B") for name in self._output_names]
            at = 0
            for part in parts:
                self._answer(part, views, at)
                at += part.rows
        else:
            for part in parts:
                self._fail(part.ticket.item, error)
        self._free.append(stream)
        if self._batcher.waiting and not self._dispatching:
            self._dispatching = True
            self._loop.call_soon(self._dispatch)

    def _answer(self, part: Part[Job], views: list[memoryview], at: int) -> None:
        job = part.ticket.item
        job.missing -= part.rows
        if job.reply is None:
            return
        if part.rows == job.request.rows:
            self.counters.answered += 1
            job.reply(
                [
                    view[at * size : (at + part.rows) * size]
                    for view, size in zip(views, self._row_bytes_out, strict=True)
                ]
            )
            return
        if job.collected is None:
            job.collected = [bytearray(job.request.rows * size) for size in self._row_bytes_out]
        for whole, view, size in zip(job.collected, views, self._row_bytes_out, strict=True):
            first = part.first * size
            whole[first : first + part.rows * size] = view[at * size : (at + part.rows) * size]
        if job.missing == 0:
            self.counters.answered += 1
            job.reply([memoryview(whole) for whole in job.collected])

    def _fail(self, job: Job, error: BaseException) -> None:
        if job.reply is not None:
            reply, job.reply = job.reply, None
            self.counters.failed += 1
            reply(error if isinstance(error, Exception) else EngineError("the engine stopped", repr(error)))


class _Stream:
    """A slot of the engine, its buffers as bytes, and the batch that runs on it."""

    __slots__ = ("_cell", "_loop", "buffers", "parts", "slot")

    def __init__(self, cell: Cell, slot: Slot) -> None:
        self.slot = slot
        self.buffers = [slot.inputs[spec.name].reshape(-1).view(np.uint8).data for spec in cell.engine.signature.inputs]
        self.parts: list[Part[Job]] = []
        self._cell = cell
        self._loop = cell._loop

    def done(self, error: BaseException | None) -> None:
        """Hand the result over to the loop's thread."""
        self._loop.call_soon_threadsafe(self._cell._finished, self, error)
