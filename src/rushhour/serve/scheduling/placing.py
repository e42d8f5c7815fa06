"""`Placing`: a stage in front of a cell that gives answers about places in pixels of the picture as it was sent.

A picture is brought to the size of the model's samples when it is decoded. Boxes and maps that the model finds there
are brought back here. Samples that are sent as tensors are answered in their own pixels.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from rushhour.bundle import Signature, TensorSpec
from rushhour.clock import Clock
from rushhour.errors import WireError
from rushhour.serve.memory.budget import Budget
from rushhour.serve.observability.explanation import Explanation
from rushhour.serve.scheduling.cell import Cell
from rushhour.serve.scheduling.job import LATER, Job, OwnedViews, Reply, Shed, owned
from rushhour.wire import InferRequest, PictureRequest

_WINDOW = 4
"""The map of one picture takes at most 1 / 4 of the bytes that requests may hold."""
_INLINE_BYTES = 64 * 2**10
"""Answers up to this size are brought back on the event loop; larger ones on a thread."""

Sides = tuple[int, int]


def places_of(signature: Signature) -> bool:
    """Whether an output of a model is about places in its picture."""
    return any(spec.places in ("map", "boxes") for spec in signature.outputs)


def declared_maps(signature: Signature) -> dict[str, tuple[int, ...]]:
    """Output -> the shape of an answer, with -1 for the sizes that are those of the picture; empty without maps."""
    return {spec.name: (-1, -1, *spec.shape[2:]) for spec in signature.outputs if spec.places == "map"}


class Placing:
    """A cell whose answers about places are in pixels of the picture. Everything but `submit` is the cell's.

    Args:
        cell: computes samples.
        clock: of requests.
        budget: of large requests; its threads enlarge maps.
        explanation: what answers say about themselves; None where they do not.
    """

    def __init__(self, cell: Cell, clock: Clock, budget: Budget, explanation: Explanation | None) -> None:
        self.cell = cell
        self._signature = cell.active.engine.signature
        self._clock = clock
        self._budget = budget
        self._explanation = explanation
        self._loop = asyncio.get_running_loop()
        self._enlarging: set[asyncio.Task[None]] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cell, name)

    @property
    def idle(self) -> bool:
        """As of the cell; and no map is enlarged."""
        return self.cell.idle and not self._enlarging

    def shown(self) -> Mapping[str, Any]:
        """As of the cell."""
        return self.cell.shown()

    def submit(self, request: InferRequest, reply: Reply) -> Job | Shed:
        """As of the cell; answers to pictures are brought to their size."""
        if not request.pictures:
            return self.cell.submit(request, reply)
        pictures = cast(PictureRequest, request)

        def computed(result: Sequence[memoryview] | Exception) -> int | None:
            return reply(result) if isinstance(result, Exception) else self._computed(pictures, result, reply)

        return self.cell.submit(request, computed)

    def _computed(self, request: PictureRequest, result: Sequence[memoryview], reply: Reply) -> int | None:
        """The samples are computed: bring the answers back, now or on a thread."""
        specs = self._signature.outputs
        size = max(
            math.prod((*sides, *spec.shape[2:])) * np.dtype(spec.dtype).itemsize if spec.places == "map" else 0
            for spec in specs
            for sides in request.sides
        )
        if size > self._budget.size // _WINDOW:
            why = f"the map of its pixels takes {size} bytes, and the limit is {self._budget.size // _WINDOW}"
            return reply(WireError("the picture is too large", why, "send it smaller, or in parts", status=413))
        if size <= _INLINE_BYTES:
            return self._answer(request, self._placed(request, result), reply)
        kept = None if self._explanation is None else self._explanation.keep()
        views = owned(result)

        async def enlarge() -> None:
            status: int | None = 500
            try:
                placed = await self._budget.on_thread(self._placed, request, views)
                if self._explanation is not None and kept is not None:
                    self._explanation.resume(kept, self._clock.now())
                status = self._answer(request, placed, reply)
            except Exception as error:
                self._loop.call_exception_handler({"message": "enlarging a map failed", "exception": error})
                reply(WireError("the map cannot be enlarged", repr(error), "", status=500))
            if status != LATER:
                self.cell.written(request, status)

        task = asyncio.ensure_future(enlarge())
        self._enlarging.add(task)
        task.add_done_callback(self._enlarging.discard)
        return LATER

    def _placed(self, request: PictureRequest, result: Sequence[memoryview]) -> list[NDArray[Any]]:
        """The answer, for each output an array `(pictures, *shape)`."""
        tile = self._signature.inputs[0].shape
        return [
            _brought_back(spec, np.frombuffer(view, spec.dtype).reshape(-1, *spec.shape), request.sides, tile)
            for spec, view in zip(self._signature.outputs, result, strict=True)
        ]

    def _answer(self, request: PictureRequest, placed: list[NDArray[Any]], reply: Reply) -> int | None:
        if any(spec.places == "map" for spec in self._signature.outputs):
            shapes = tuple(array.shape[1:] for array in placed)
            request.wanted = msgspec.structs.replace(request.wanted, shapes=shapes)
        return reply(OwnedViews(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data for array in placed))


def _brought_back(
    spec: TensorSpec, answers: NDArray[Any], pictures: Sequence[Sides], sample: tuple[int, ...]
) -> NDArray[Any]:
    """The answers to samples in pixels of their pictures, which all have one size where they are maps."""
    if spec.places == "boxes":
        placed = answers.copy()
        for row, (height, width) in enumerate(pictures):
            placed[row, :, [0, 2]] = np.minimum(placed[row, :, [0, 2]] * (width / sample[1]), width)
            placed[row, :, [1, 3]] = np.minimum(placed[row, :, [1, 3]] * (height / sample[0]), height)
        return placed
    if spec.places == "map":
        ((height, width),) = set(pictures)
        rows, columns = (
            ((np.arange(wanted) + 0.5) * (given / wanted)).astype(np.intp)
            for wanted, given in ((height, answers.shape[1]), (width, answers.shape[2]))
        )
        enlarged: NDArray[Any] = answers[:, rows][:, :, columns]
        return enlarged
    return answers
