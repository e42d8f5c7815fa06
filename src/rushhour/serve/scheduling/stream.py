"""A slot of the engine with its buffers, and the batch that it computes."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rushhour.bundle import Signature
from rushhour.clock import Clock
from rushhour.engines import Slot
from rushhour.serve.scheduling.batcher import Batcher, Part
from rushhour.serve.scheduling.buckets import Buckets, SizedBatcher
from rushhour.serve.scheduling.job import Job

if TYPE_CHECKING:
    from rushhour.serve.scheduling.variant import Variant


class Stream:
    """A slot of the engine, its input buffers as bytes, and the batch that runs on it.

    Args:
        slot: of the engine.
        signature: of the model.
        loop: the event loop of the cell.
        clock: of the cell.
        finished: called on the event loop when a batch has ended, with the error where there was one.
        of: the variant that the slot belongs to.

    Attributes:
        variant: its name.
        charged: core seconds that its batch was charged with when it began, where models share cores.
        work: of the batch, in samples of the usual size: its rows, where all samples have one size.
        positions: of samples with open dimensions: tokens, pixels; 0 for all others.
        padding: positions that were added to them.
        at: first row of the request that is being answered.
        judged: what a cascade decided on each row of the batch; None where it has not.
    """

    __slots__ = (
        *("_clock", "_finished", "_loop", "_names_out", "_row_bytes", "_row_bytes_out"),
        *("at", "buffers", "charged", "ended", "judged", "of", "parts", "rows", "slot", "started", "taken", "until"),
        *("variant", "work"),
    )
    positions = padding = 0

    def __init__(
        self,
        slot: Slot,
        signature: Signature,
        loop: asyncio.AbstractEventLoop,
        clock: Clock,
        finished: Callable[[Stream, BaseException | None], None],
        of: Variant,
    ) -> None:
        self.slot = slot
        self.of = of
        self.variant = of.name
        self.buffers = [slot.inputs[spec.name].reshape(-1).view(np.uint8).data for spec in signature.inputs]
        self.parts: list[Part[Job]] = []
        self.rows = 0
        self.work: float = 0
        self.at = 0
        self.judged: list[bool] | None = None
        self.taken = 0.0
        self.started = 0.0
        self.until = 0.0
        self.charged = 0.0
        self.ended = 0.0
        self._row_bytes = tuple(spec.row_bytes for spec in signature.inputs)
        self._row_bytes_out = tuple(spec.row_bytes for spec in signature.outputs)
        self._names_out = tuple(spec.name for spec in signature.outputs)
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
            if job.request.lazy:
                job.request.write(buffers, at, first, part.rows)
            else:
                for buffer, tensor, row_bytes in zip(buffers, job.request.tensors, row_bytes_in, strict=True):
                    rows = tensor if whole else tensor[first * row_bytes : (first + part.rows) * row_bytes]
                    buffer[at * row_bytes : end * row_bytes] = rows
            at = end
            if whole or first + part.rows == ticket.rows:
                # Ticket and job refer to each other: a body is freed when it was copied, not by the garbage collector.
                job.ticket = None
                if not self.of.keeps:
                    job.request.tensors = ()
        self.work = at
        return at

    def answers(self, parts: Sequence[Part[Job]]) -> Iterator[Sequence[memoryview]]:
        """For each part of the batch the raw rows of each output, in the signature's order."""
        at, outputs = 0, self.slot.outputs
        views = [outputs[name].data.cast("B") for name in self._names_out]
        columns = list(zip(views, self._row_bytes_out, strict=True))
        if len(columns) == 1:
            view, size = columns[0]
            for part in parts:
                end = at + part.rows
                yield (view[at * size : end * size],)
                at = end
            return
        for part in parts:
            end = at + part.rows
            yield [view[at * size : end * size] for view, size in columns]
            at = end

    def done(self, error: BaseException | None) -> None:
        """A batch has ended. Called by the engine on a thread of its own; hands over to the event loop."""
        self.ended = self._clock.now()
        self.judged = None
        self._loop.call_soon_threadsafe(self._finished, self, error)


class SizedStream(Stream):
    """A stream of a model with open dimensions: a batch has the sizes of its bucket, and shorter samples are padded.

    Args:
        buckets: of the sizes.
        slot, signature, loop, clock, finished, of: as of `Stream`.
    """

    __slots__ = ("_buckets", "_inputs", "_signature", "padding", "positions")

    def __init__(
        self,
        buckets: Buckets,
        slot: Slot,
        signature: Signature,
        loop: asyncio.AbstractEventLoop,
        clock: Clock,
        finished: Callable[[Stream, BaseException | None], None],
        of: Variant,
    ) -> None:
        super().__init__(slot, signature, loop, clock, finished, of)
        self._buckets = buckets
        self._signature = signature
        self._inputs = [
            (spec, np.dtype(spec.dtype), self._padding_of(spec.name) if buckets.padded is not None else 0)
            for spec in signature.inputs
        ]
        self.positions = self.padding = 0

    def _padding_of(self, name: str) -> int | float:
        assert self._buckets.padded is not None
        return self._signature.dimensions[self._buckets.padded].padding.get(name, 0)

    def fill(self, parts: list[Part[Job]]) -> int:
        """Write a batch into the input buffers, as of `Stream`, padded to the sizes of its largest bucket."""
        shape, slot = self._signature.shape, self.slot
        sizes = max(self._buckets.of(part.ticket.item.request.wanted.sizes) for part in parts)
        slot.resize(sizes)
        at = positions = 0
        for part in parts:
            ticket, first = part.ticket, part.first
            job, end = ticket.item, at + part.rows
            own = job.request.wanted.sizes
            for (spec, dtype, padding), tensor in zip(self._inputs, job.request.tensors, strict=True):
                rows = np.frombuffer(tensor, dtype).reshape(ticket.rows, *shape(spec, own))[first : first + part.rows]
                place = slot.inputs[spec.name][at:end]
                if rows.shape != place.shape:
                    place[:] = padding
                    place = place[tuple(slice(size) for size in rows.shape)]
                place[:] = rows
            at = end
            positions += part.rows * math.prod(own)
            if first + part.rows == ticket.rows:
                job.ticket = None
                if not self.of.keeps:
                    job.request.tensors = ()
        self.work = at * self._buckets.work(sizes)
        self.positions, self.padding = positions, at * math.prod(sizes) - positions
        return at

    def answers(self, parts: Sequence[Part[Job]]) -> Iterator[Sequence[memoryview]]:
        """As of `Stream`, without the padding behind each row."""
        at = 0
        for part in parts:
            own, found = part.ticket.item.request.wanted.sizes, []
            for spec in self._signature.outputs:
                rows: NDArray[Any] = self.slot.outputs[spec.name][at : at + part.rows]
                shape = (part.rows, *self._signature.shape(spec, own))
                if rows.shape != shape:
                    rows = np.ascontiguousarray(rows[tuple(slice(size) for size in shape)])
                found.append(rows.reshape(-1).view(np.uint8).data)
            yield found
            at += part.rows


def stream_of(batcher: Batcher[Job]) -> Callable[..., Stream]:
    """Makes the streams that run a batcher's batches, from the arguments of `Stream`."""
    return partial(SizedStream, batcher.buckets) if isinstance(batcher, SizedBatcher) else Stream
