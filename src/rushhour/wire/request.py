"""Decoded requests, their layouts, and what their answers hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from rushhour.bundle import Sizes
from rushhour.errors import WireError
from rushhour.wire.pieces import BYTES_AT_ONCE


class Place(msgspec.Struct, frozen=True):
    """Where a tensor's bytes are in shared memory.

    Attributes:
        region: the name that a client has registered.
        offset: in bytes, from the region's beginning.
    """

    region: str
    offset: int
    byte_size: int


class Regions(Protocol):
    """The shared memory that clients have registered, which the caller provides."""

    def check(self, place: Place, *, writes: bool = True) -> None:
        """Raise a `WireError` unless the place lies in a registered region, one that may be written if `writes`."""
        ...

    def read(self, place: Place) -> memoryview:
        """The bytes there, as they are now."""
        ...

    def write(self, place: Place, content: memoryview | bytes) -> None:
        """Write bytes there, from its beginning."""
        ...


class Wanted(msgspec.Struct, frozen=True):
    """The outputs that a request wants, and how: the same for all requests with the same header.

    Attributes:
        id: echoed if not empty.
        outputs: positions in the signature's outputs, in the order of the answer.
        binary: for each of them, raw bytes behind the header or numbers in the JSON.
        timeout_s: how long the client waits; None if it does not say.
        priority: 1 is the highest, 0 if the client does not say.
        top: for each output, how many of the most likely classes are wanted as text, 0 for the numbers; empty if
            all are numbers.
        places: for each output, where in shared memory it is written; empty if none is.
        sizes: of the model's open dimensions, in its inputs and outputs; empty where it has none, and where texts are
            not tokenised yet.
        shapes: for each of the signature's outputs, the shape of one sample's answer; empty where it is the
            signature's.
    """

    id: str
    outputs: tuple[int, ...]
    binary: tuple[bool, ...]
    timeout_s: float | None = None
    priority: int = 0
    top: tuple[int, ...] = ()
    places: tuple[Place | None, ...] = ()
    sizes: Sizes = ()
    shapes: tuple[tuple[int, ...], ...] = ()


class InferRequest:
    """A decoded request.

    Attributes:
        rows: samples in it, at least 1.
        tensors: one view of the raw rows of each input, in the signature's order.
        wanted: what the answer holds.
        pictures: encoded pictures or texts that become the tensors; empty except in a `PictureRequest`.
        unread_bytes: bytes still to be read from shared memory; 0 except in a `PlacedRequest`.
        lazy: it has no tensors: its samples are made when `write` puts them into a batch.
    """

    __slots__ = ("rows", "tensors", "wanted")
    pictures: Sequence[Encoded] = ()
    unread_bytes = 0
    lazy = False

    def __init__(self, rows: int, tensors: tuple[memoryview, ...], wanted: Wanted) -> None:
        self.rows = rows
        self.tensors = tensors
        self.wanted = wanted

    def write(self, buffers: Sequence[memoryview], at: int, first: int, rows: int) -> None:
        """Put some samples of a lazy request into a batch; each is written once.

        Args:
            buffers: of the batch, one of bytes for each input.
            at: the row of the batch that they begin at.
            first: of the request's samples.
            rows: how many.
        """
        raise NotImplementedError


Body = bytes | bytearray | memoryview
Parts = list[bytes | memoryview]
Encoded = memoryview | str
"""A picture as it was sent: its bytes, or Base64. Of a text: UTF-8, or the text itself."""


class PictureRequest(InferRequest):
    """A request whose pictures are still encoded: the server decodes them on threads.

    Attributes:
        pictures: one for each sample.
        sides: height and width of each picture as it was sent, once it is decoded; (0, 0) before that.
    """

    __slots__ = ("pictures", "sides")

    def __init__(self, pictures: Sequence[Encoded], wanted: Wanted) -> None:
        super().__init__(len(pictures), (), wanted)
        self.pictures = pictures
        self.sides = [(0, 0)] * len(pictures)


class TextRequest(PictureRequest):
    """A request of texts, which the server makes tokens of on threads, as it decodes pictures.

    Attributes:
        pictures: the texts, one for each sample: as they are, or in UTF-8.
        tokens: in all texts together, without padding; 0 until they are tokenised.
    """

    __slots__ = ("tokens",)

    def __init__(self, pictures: Sequence[Encoded], wanted: Wanted) -> None:
        super().__init__(pictures, wanted)
        self.tokens = 0


class PlacedRequest(InferRequest):
    """A request with tensors in shared memory, which are read when it is admitted.

    Attributes:
        unread_bytes: bytes to be read.
    """

    __slots__ = ("_fetch", "unread_bytes")

    def __init__(self, layout: Layout, fetch: Callable[[], InferRequest]) -> None:
        super().__init__(layout.rows, (), layout.wanted)
        self.unread_bytes = sum(place.byte_size for place in layout.places.values())
        self._fetch = fetch

    def fetch(self) -> InferRequest:
        """Read them, on any thread; returns the request with all of its tensors.

        Raises:
            WireError: if a place does not exist any more.
        """
        request = self._fetch()
        request.wanted = self.wanted
        return request

    @property
    def large(self) -> bool:
        """Whether reading it would block the event loop."""
        return self.unread_bytes > BYTES_AT_ONCE


class Layout:
    """A header, read and checked: where the tensors of its requests are, and what their answers hold.

    Attributes:
        rows: samples in a request.
        wanted: what the answer holds.
        slices: position of an input -> where its bytes begin and end among those that follow the header, in the order
            in which they follow.
        total: bytes that follow the header.
        inline: position of an input -> its bytes, where the header holds them.
        places: position of an input -> its place in shared memory.
        encoded: whether the one input is pictures or texts, whose size the header does not determine.
        pictures: these, where the header holds them.
        checked: whether the values of an input have bounds.
    """

    __slots__ = ("checked", "encoded", "inline", "ordered", "pictures", "places", "rows", "slices", "total", "wanted")

    def __init__(self, rows: int, wanted: Wanted) -> None:
        self.rows = rows
        self.wanted = wanted
        self.slices: dict[int, tuple[int, int]] = {}
        self.total = 0
        self.inline: dict[int, memoryview] = {}
        self.places: dict[int, Place] = {}
        self.encoded = self.checked = False
        self.pictures: Sequence[Encoded] = ()
        self.ordered: tuple[tuple[int, int], ...] = ()
        """The slices by position, if all inputs are slices whose values need no look."""

    def finish(self) -> Layout:
        """Call this when all inputs are added."""
        aside = self.inline or self.places or self.wanted.places or self.encoded
        if not aside and not self.checked:
            self.ordered = tuple(self.slices[position] for position in range(len(self.slices)))
        return self


def open_regions(regions: Regions | None) -> Regions:
    """The regions of clients. Raises a `WireError` where the server does not use shared memory."""
    if regions is None:
        raise WireError("the request uses shared memory", "this server does not", "send the tensors", status=501)
    return regions
