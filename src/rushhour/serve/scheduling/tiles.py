"""`Tiles`: a stage in front of a cell that cuts pictures or recordings into tiles, and merges their answers.

The tiles of a request are the samples of one request to the cell, so they share batches with whatever else waits, and a
large picture delays nobody for long (`batcher.py`). A picture is decoded on a thread when there is room for its pixels;
until then it waits as it was sent. Tiles are never copied beside the picture: each is written from its pixels into the
engine's input when its batch begins. Recordings are tensors, and like those of pictures cut without a thread.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from rushhour.bundle import TensorSpec, Tiling
from rushhour.bundle.tiling import sides_of, tiled_axes, tiles_of
from rushhour.clock import Clock
from rushhour.errors import DataError, WireError
from rushhour.serve.memory.budget import Budget
from rushhour.serve.observability.explanation import Explanation
from rushhour.serve.observability.statistics import Totals
from rushhour.serve.scheduling.cell import Cell
from rushhour.serve.scheduling.decoding import FORMATS, Decoder
from rushhour.serve.scheduling.job import LATER, Job, OwnedViews, Reply, Shed, ShedError, TiledJob, owned
from rushhour.serve.scheduling.merging import Grid
from rushhour.wire import InferRequest, PictureRequest, Wanted, content_of

_WINDOW = 4
"""Pictures whose tiles wait or are computed take at most 1 / 4 of the bytes that requests may hold."""
_LOOK_S = 0.005
_INLINE_BYTES = 64 * 2**10
"""Answers of tiles up to this size are merged on the event loop; larger ones on a thread."""

Pixels = NDArray[Any]
"""A picture or a recording."""


class TileRequest(InferRequest):
    """The tiles of a request's pictures, or recordings.

    Args:
        pictures: each of the type and number of dimensions of `spec`.
        spec: of a tile.
        grids: of each picture.
        fill: the value of what is beyond a picture.
        wanted: of the request.
        written: called with the pictures after the last tile; it empties the list.
    """

    __slots__ = ("_fill", "_left", "_pictures", "_spec", "_written", "grids")
    lazy = True

    def __init__(
        self,
        pictures: Sequence[Pixels],
        spec: TensorSpec,
        grids: Sequence[Grid],
        fill: int,
        wanted: Wanted,
        written: Callable[[list[Pixels]], None],
    ) -> None:
        super().__init__(sum(grid.count for grid in grids), (), wanted)
        self._written = written
        self.grids = grids
        self._fill = fill
        self._spec = spec
        self._pictures = list(pictures)
        self._left = self.rows

    def write(self, buffers: Sequence[memoryview], at: int, first: int, rows: int) -> None:
        """As `InferRequest.write`."""
        batch = np.frombuffer(buffers[0], self._spec.dtype).reshape(-1, *self._spec.shape)
        begins = 0
        for picture, grid in enumerate(self.grids):
            for number in range(max(first, begins), min(first + rows, begins + grid.count)):
                self._put(self._pictures[picture][grid.window(number - begins)], batch[at + number - first])
            begins += grid.count
        self._left -= rows
        if not self._left:
            self._written(self._pictures)

    def _put(self, cut: Pixels, tile: Pixels) -> None:
        if cut.shape != tile.shape:
            tile[...] = self._fill
        tile[tuple(map(slice, cut.shape))] = cut


class Tiles:
    """A cell that takes pictures or recordings larger than its samples. Everything but their `submit` is the cell's.

    Args:
        cell: computes the tiles; its decoder decodes the pictures, if it takes any.
        tiling: how they are cut and merged.
        clock: of the cell.
        budget: of all large requests; a share of its size bounds the pictures that are decoded at the same time.
        explanation: what answers say about themselves; None where they do not.

    Attributes:
        cell: the same.
        cut: pictures that were cut until now.
        tiles: of them.
    """

    def __init__(
        self, cell: Cell, tiling: Tiling, clock: Clock, budget: Budget, explanation: Explanation | None = None
    ) -> None:
        self.cut = 0
        self.tiles = 0
        self.cell = cell
        self._decoder = cell.decoder if isinstance(cell.decoder, Decoder) else None
        self._tiling = tiling
        self._signature = cell.active.engine.signature
        self._spec = self._signature.inputs[0]
        self._axes, self._tile = tiled_axes(self._spec), sides_of(self._signature)
        self._noun = "picture" if len(self._axes) == 2 else "recording"
        self._clock = clock
        self._budget = budget
        self._explanation = explanation
        self._window = budget.size // _WINDOW
        self._held = 0
        # The engine needs the cores, too.
        self._at_once = 1 if self._decoder is None else max(1, self._decoder.settings.threads // 2)
        self._decoding = 0
        self._looking = False
        self._waiting: deque[TiledJob] = deque()
        self._jobs: set[TiledJob] = set()
        self._written: dict[InferRequest, InferRequest] = {}
        self._merging: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cell, name)

    @property
    def idle(self) -> bool:
        """As of the cell; and no picture waits."""
        return self.cell.idle and not self._jobs

    @property
    def progress(self) -> tuple[int, ...]:
        """As of the cell; pictures that are cut count too."""
        return (*self.cell.progress, self.cut, len(self._waiting))

    def totals(self) -> Totals:
        """As of the cell, with the pictures that were cut."""
        totals = self.cell.totals()
        totals.cut, totals.tiles = self.cut, self.tiles
        return totals

    def shown(self) -> Mapping[str, Any]:
        """As of the cell, with the tiling."""
        return {**self.cell.shown(), "tiles": self._tiling}

    def submit(self, request: InferRequest, reply: Reply) -> Job | Shed:
        """As of the cell; pictures are cut. A tensor of the size of a tile is answered as such."""
        sizes = request.wanted.sizes
        if not request.pictures and sizes in ((), self._tile):
            return self.cell.submit(request, reply)
        if len(self._jobs) >= self.cell.policy.queue_bound:
            return self.cell.no_room()
        shed = self.cell.shed_early(request)
        if shed is not None:
            return shed
        job = TiledJob(request, reply, self._clock.now())
        self._jobs.add(job)
        if request.rows > 1 and not self._tiling.is_fixed:
            merge = self._tiling.merge
            why = f"the size of an answer depends on that of its {self._noun}: tiles are merged by {merge!r}"
            wrong = WireError(f"the request has {request.rows} {self._noun}s", why, "send one in each request")
            self._loop.call_soon(self._fail, job, wrong)
            return job
        if sizes:
            shape = list(self._spec.shape)
            for axis, side in zip(self._axes, sizes, strict=True):
                shape[axis] = side
            job.pixels = list(np.frombuffer(request.tensors[0], self._spec.dtype).reshape(request.rows, *shape))
            request.tensors = ()
            self._loop.call_soon(self._wait, job, [sizes] * request.rows)
            return job
        pictures, decoder = request.pictures, self._decoder
        assert decoder is not None  # pictures are accepted only with one

        def measured() -> list[tuple[int, ...]]:
            return [decoder.size(content_of(picture)) for picture in pictures]

        self._on_thread(job, measured, lambda sizes: self._wait(job, sizes))
        return job

    def _wait(self, job: TiledJob, sizes: Sequence[tuple[int, ...]]) -> None:
        """The sizes of its pictures are known: it waits for room."""
        if job.reply is None:
            return
        try:
            self._check(job, sizes)
        except WireError as wrong:
            self._fail(job, wrong)
            return
        self._waiting.append(job)
        self._advance()

    def written(self, request: InferRequest, status: int | None) -> None:
        """As of the cell."""
        self.cell.written(self._written.pop(request, request), status)

    def cancel(self, job: Job) -> None:
        """As of the cell."""
        if not isinstance(job, TiledJob):
            self.cell.cancel(job)
            return
        job.reply = None
        if job.inner is not None:
            self.cell.cancel(job.inner)
        else:
            self.cell.counters.cancelled += 1
        self._end(job)

    def abandon(self, error: Exception) -> None:
        """As of the cell."""
        self.cell.abandon(error)
        for job in list(self._jobs):
            self._fail(job, error)

    def _on_thread(
        self,
        job: TiledJob,
        work: Callable[[], Any],
        done: Callable[[Any], None],
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        """Do a part of a job on a thread, and go on with its result on the event loop, if it is still needed.

        Args:
            job: of which `work` is a part.
            work: called on a thread.
            done: called with its result on the event loop.
            ended: called before that in any case.
        """

        def run() -> None:
            result: object
            try:
                result = work() if job.reply is not None else None
            except DataError as wrong:
                fix = f"send complete files in {', '.join(FORMATS)}"
                result = WireError("the picture cannot be read", wrong.why, fix)
            except WireError as wrong:
                result = wrong
            except Exception as wrong:
                result = WireError("a picture cannot be decoded", repr(wrong), "", status=500)
            self._loop.call_soon_threadsafe(finish, result)

        def finish(result: object) -> None:
            ended()
            if job.reply is None:
                return
            try:
                if isinstance(result, WireError):
                    raise result
                done(result)
            except Exception as wrong:
                self._fail(job, wrong)

        assert self._decoder is not None
        self._decoder.on_thread(run)

    def _check(self, job: TiledJob, sizes: Sequence[tuple[int, ...]]) -> None:
        """Note the memory for a job's pictures and answers. Raises a `WireError` if it is too much."""
        own = [tiles_of(self._tiling, self._signature, size) for size in sizes]
        job.tiles = sum(own)
        shown = ", ".join(_size(size) for size in sizes[:3])
        too_large = f"the {self._noun} of {shown} is too large"
        if job.tiles > self.cell.codec.max_rows:
            why = f"it makes {job.tiles} tiles, and a request has up to {self.cell.codec.max_rows}"
            raise WireError(too_large, why, "send it in parts", status=413)
        # Of all tiles, and merged.
        answers = 2 * job.tiles * sum(output.row_bytes for output in self._signature.outputs)
        place = self._spec.row_bytes // math.prod(self._tile)
        job.held = answers + sum(math.prod(size) * place for size in sizes)
        if answers > self._window:
            why = f"the answers of its {job.tiles} tiles take {answers} bytes, and the limit is {self._window}"
            raise WireError(too_large, why, "send it in parts", status=413)
        if len(sizes) > 1 and job.held > self._window:
            why = f"together they take {job.held} bytes, and the limit is {self._window}"
            raise WireError(
                f"the request has {len(sizes)} {self._noun}s", why, "send them in several requests", status=413
            )

    def _advance(self) -> None:
        """Decode the pictures that wait, as far as there is room for their pixels, and in the queue for their tiles."""
        while self._waiting:
            job = self._waiting[0]
            if job.reply is not None:
                if self._decoding >= self._at_once or (self._held and self._held + job.held > self._window):
                    return  # the end of another calls this again
                if not self.cell.batcher.reserve(job.tiles):
                    self._look_again()
                    return
                self._held += job.held
                job.has_room = job.has_place = True
                self._decode(job)
            self._waiting.popleft()

    def _look_again(self) -> None:
        """Soon: the queue is full of other requests, whose end is not known here."""

        def look() -> None:
            self._looking = False
            self._advance()

        if not self._looking:
            self._looking = True
            self._loop.call_later(_LOOK_S, look)

    def _leave_place(self, job: TiledJob) -> None:
        """Its tiles are queued next, or not any more."""
        if job.has_place:
            job.has_place = False
            self.cell.batcher.release(job.tiles)

    def _decode(self, job: TiledJob) -> None:
        if job.pixels:
            pixels, job.pixels = job.pixels, []
            try:
                self._queue(job, pixels)
            except Exception as wrong:
                self._fail(job, wrong)
            return
        pictures, decoder = job.request.pictures, self._decoder
        assert decoder is not None

        def decoded() -> list[Pixels]:
            return [decoder.whole(content_of(picture)) for picture in pictures]

        def queue(pixels: list[Pixels]) -> None:
            cast(PictureRequest, job.request).pictures = ()
            self._queue(job, pixels)

        def ended() -> None:
            self._decoding -= 1
            self._loop.call_soon(self._advance)

        if self._left_s(job) > 0:
            self._decoding += 1
            self._on_thread(job, decoded, queue, ended)
        else:
            self._fail(job, self._late(job))

    def _left_s(self, job: TiledJob) -> float:
        """Seconds to the deadline of a request; infinite where it has none."""
        timeout_s, deadline_ms = job.request.wanted.timeout_s, self.cell.policy.deadline_ms
        limits = (timeout_s or math.inf, math.inf if deadline_ms is None else deadline_ms / 1e3)
        return min(limits) - (self._clock.now() - job.arrived)

    def _late(self, job: TiledJob) -> ShedError:
        waited_s = self._clock.now() - job.arrived
        why = f"the {self._noun} waited {waited_s:.3f} s for its tiles, longer than its time limit"
        return ShedError(why, self.cell.profile.seconds(1))

    def _queue(self, job: TiledJob, pixels: list[Pixels]) -> None:
        """The pictures are decoded: their tiles are the samples of a request to the cell."""
        now, wanted, left_s = self._clock.now(), job.request.wanted, self._left_s(job)
        if left_s <= 0:
            raise self._late(job)
        wanted = msgspec.structs.replace(wanted, sizes=(), timeout_s=left_s if left_s < math.inf else None)
        sizes = [tuple(picture.shape[axis] for axis in self._axes) for picture in pixels]
        grids = [Grid(self._tiling, self._signature, size) for size in sizes]
        request = TileRequest(pixels, self._spec, grids, self._tiling.fill, wanted, self._free)
        self.cut += len(pixels)
        self.tiles += request.rows

        def reply(result: Sequence[memoryview] | Exception) -> int | None:
            return self._computed(job, request, result)

        self._leave_place(job)
        submitted = self.cell.submit(request, reply)
        if isinstance(submitted, Shed):
            job_reply = self._end(job)
            if job_reply is not None:
                job_reply(ShedError(submitted.why, submitted.retry_after_s))
            return
        job.inner = submitted
        submitted.decoding_s = 0.0 if job.request.wanted.sizes else now - job.arrived
        assert submitted.ticket is not None  # batches begin at the end of this turn of the event loop
        submitted.ticket.arrived = job.arrived

    def _free(self, pictures: list[Pixels]) -> None:
        """Give decoded pixels back to the system: of 12 megapixels that takes milliseconds, so on a thread."""
        if self._decoder is None:
            pictures.clear()
        else:
            self._decoder.on_thread(pictures.clear)

    def _computed(self, job: TiledJob, request: TileRequest, result: Sequence[memoryview] | Exception) -> int | None:
        """All tiles are computed: merge and answer, now or from a thread."""
        if isinstance(result, Exception):
            job_reply = self._end(job)
            return None if job_reply is None else job_reply(result)
        if sum(map(len, result)) <= _INLINE_BYTES:
            return self._answer(job, request, self._merged(request, result))
        kept = None if self._explanation is None else self._explanation.keep()
        views = owned(result)

        async def merge() -> None:
            status: int | None = None
            try:
                merged = await self._budget.on_thread(self._merged, request, views)
                if self._explanation is not None and kept is not None:
                    self._explanation.resume(kept, self._clock.now())
                status = self._answer(job, request, merged)
            except Exception as error:
                status = 500
                self._loop.call_exception_handler({"message": "merging tiles failed", "exception": error})
                job_reply = self._end(job)
                if job_reply is not None:
                    job_reply(WireError("the answers of the tiles cannot be merged", repr(error), "", status=500))
            if status != LATER:
                self.cell.written(request, status)

        merging = asyncio.ensure_future(merge())
        self._merging.add(merging)
        merging.add_done_callback(self._merging.discard)
        return LATER

    def _merged(self, request: TileRequest, result: Sequence[memoryview]) -> list[NDArray[Any]]:
        """The answer, for each output an array `(pictures, *shape)`."""
        arrays = [
            np.frombuffer(view, spec.dtype).reshape(-1, *spec.shape)
            for view, spec in zip(result, self._signature.outputs, strict=True)
        ]
        merged, first = [], 0
        for grid in request.grids:
            merged.append(grid.merge([array[first : first + grid.count] for array in arrays]))
            first += grid.count
        return [np.ascontiguousarray(np.stack(column)) for column in zip(*merged, strict=True)]

    def _answer(self, job: TiledJob, request: TileRequest, merged: list[NDArray[Any]]) -> int | None:
        reply = self._end(job)
        if reply is None:
            return None
        outer = job.request
        if not self._tiling.is_fixed:
            outer.wanted = msgspec.structs.replace(outer.wanted, shapes=tuple(array.shape[1:] for array in merged))
        status = reply(OwnedViews(array.reshape(-1).view(np.uint8).data for array in merged))
        if status == LATER:
            self._written[outer] = request
        return status

    def _fail(self, job: TiledJob, error: Exception) -> None:
        """Answer a request that is not in the cell with an error, and count it."""
        if job.inner is not None:
            return  # the cell answers it
        reply = self._end(job)
        if reply is not None:
            self.cell.refuse(error.status if isinstance(error, WireError) else 500, self._clock.now() - job.arrived)
            reply(error)

    def _end(self, job: TiledJob) -> Reply | None:
        """Give its memory back; returns its reply, once."""
        reply, job.reply = job.reply, None
        self._jobs.discard(job)
        self._leave_place(job)
        if job.has_room:
            job.has_room = False
            self._held -= job.held
        self._loop.call_soon(self._advance)
        return reply


def _size(size: tuple[int, ...]) -> str:
    """For people: `4000x3000 pixels`, width first, or `90000 steps`."""
    return f"{size[1]}x{size[0]} pixels" if len(size) == 2 else f"{size[0]} steps"
