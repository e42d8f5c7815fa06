"""Jobs: requests on their way through a cell, how they are answered, and how they are shed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rushhour.errors import WireError
from rushhour.serve.scheduling.batcher import Part, Ticket
from rushhour.serve.scheduling.preparation import Preparation
from rushhour.wire import InferRequest, Wanted

_DEFAULT_PRIORITY, _LOWEST_PRIORITY = 4, 8
"""1 is the highest, as the protocol defines; a request without a priority is in the middle."""
Reply = Callable[[Sequence[memoryview] | Exception], int | None]
"""Called once, on the event loop: the raw rows of each output, in the signature's order, or the error.

The views are valid only during the call. It returns the status of the error that it had to answer instead, if any;
`LATER` where it still writes its answer, and will call `Stage.written`.
What it raises is reported to the event loop, and affects no other request.
"""
LATER = -1


class OwnedViews(list[memoryview]):
    """Views that stay valid when the call of a `Reply` is over."""


def owned(result: Sequence[memoryview]) -> OwnedViews:
    """Such views of the outputs that a `Reply` is given; copies, unless they are owned already."""
    return result if isinstance(result, OwnedViews) else OwnedViews(memoryview(bytes(view)) for view in result)


class Job:
    """A request on its way through the cell.

    Attributes:
        decoding_s: how long its pictures were decoded.
    """

    __slots__ = ("collected", "decoding_s", "expected_s", "missing", "probe_until", "reply", "request", "ticket")

    def __init__(self, request: InferRequest, reply: Reply) -> None:
        self.decoding_s = 0.0
        self.expected_s = 0.0
        self.probe_until: float | None = None
        self.request = request
        self.reply: Reply | None = reply
        self.missing = request.rows
        self.collected: OwnedViews | None = None
        self.ticket: Ticket[Job] | None = None

    def collect(self, part: Part[Job], rows: Sequence[memoryview]) -> OwnedViews:
        """Copy the rows of a part of the request; returns all of its rows so far.

        Args:
            part: of this request.
            rows: of each output, as bytes.
        """
        if self.collected is None:
            sizes = (len(view) // part.rows * self.request.rows for view in rows)
            self.collected = OwnedViews(np.empty(size, np.uint8).data for size in sizes)
        for whole, view in zip(self.collected, rows, strict=True):
            first = part.first * (len(view) // part.rows)
            whole[first : first + len(view)] = view
        return self.collected


class PictureJob(Job):
    """A job whose pictures or texts are decoded first; it has no ticket until then, but room in the queue."""

    __slots__ = ("decoding",)
    decoding: Preparation | None


class TiledJob(Job):
    """A request whose pictures or recordings are cut into tiles.

    Attributes:
        arrived: when, in seconds of the clock.
        inner: the job of its tiles, once they are queued.
        pixels: of its pictures, where they were sent as a tensor; empty once they are queued.
        held: bytes of its pixels, and of its tiles' answers.
        tiles: of its pictures.
        has_room: whether the bytes are counted in the window.
        has_place: whether room for the tiles is reserved in the cell's queue.
    """

    __slots__ = ("arrived", "has_place", "has_room", "held", "inner", "pixels", "tiles")

    def __init__(self, request: InferRequest, reply: Reply, arrived: float) -> None:
        super().__init__(request, reply)
        self.arrived = arrived
        self.inner: Job | None = None
        self.pixels: list[NDArray[Any]] = []
        self.has_room = False
        self.has_place = False
        self.held = 0
        self.tiles = 0


class Shed:
    """A request that was rejected on arrival.

    Attributes:
        reason: `queue` (it is full) or `deadline` (the answer would be late).
        why: the same in words.
        retry_after_s: after how many seconds the client should try again.
    """

    __slots__ = ("reason", "retry_after_s", "why")

    def __init__(self, reason: Literal["queue", "deadline"], why: str, retry_after_s: float) -> None:
        self.reason = reason
        self.why = why
        self.retry_after_s = retry_after_s


class ShedError(WireError):
    """A request is not computed, because its answer would be late or the queue is full.

    Args:
        why: in words.
        retry_after_s: after how many seconds the client should try again.
    """

    def __init__(self, why: str, retry_after_s: float) -> None:
        super().__init__(why, status=429)
        self.retry_after_s = retry_after_s


def priority_of(wanted: Wanted) -> int:
    """The queue that a request belongs to: 1 is the highest priority, 8 the lowest."""
    return min(wanted.priority, _LOWEST_PRIORITY) if wanted.priority else _DEFAULT_PRIORITY
