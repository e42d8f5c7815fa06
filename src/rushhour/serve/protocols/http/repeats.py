"""Requests that repeat an earlier one of their connection: only their tensors are new, or their ids."""

from __future__ import annotations

import re

from rushhour.serve.protocols.http.answers import BINARY
from rushhour.serve.protocols.http.message import KnownHead, between, match_fixed
from rushhour.wire import Codec, InferRequest, Layout

_MAX_VARIANTS = 64
"""Whose answers one known request keeps prepared."""
_ID = re.compile(rb'[^"\\\x00-\x1f]+')


class PreparedAnswer:
    """The answer to a recognised request, except its date, its times and its tensors.

    Attributes:
        id: as the client sent it.
        ready: what `head` returned last, for the variant `ready_for`; None for no variant yet.
    """

    __slots__ = ("id",)
    keep_alive = True
    ready: bytes | None = None
    ready_for: str | None = None

    def __init__(self, id: bytes) -> None:
        self.id = id

    def head(self, variant: str) -> bytes | None:
        """The bytes before the tensors of an answer by this variant, without status and date.

        None unless the raw tensors follow in the signature's order.
        """
        raise NotImplementedError


class _NumberedAnswer(PreparedAnswer):
    """The same to a request that differs from the known one in its id."""

    __slots__ = ("_known",)

    def __init__(self, known: KnownRequest, id: bytes) -> None:
        super().__init__(id)
        self._known = known

    def head(self, variant: str) -> bytes | None:
        before, after = self._known.around(variant)
        return before + self.id + after if after else None


class KnownRequest(PreparedAnswer):
    """A request whose head and JSON header were received before, byte for byte, except for ids.

    Its layout is known, and so is all of its answer except the tensors. It holds for the version of the model that
    read it; after a reload the request is read again.
    """

    __slots__ = (
        *("_around", "_heads", "_prefix_of_id", "_fields", "_id_bytes", "_suffix", "codec"),
        *("path", "prefix", "ready", "ready_for", "rows", "size", "slices", "wanted"),
    )

    def __init__(self, known: KnownHead, codec: Codec, path: bytes, header: bytes, layout: Layout) -> None:
        self.prefix = known.head + header
        self.size = len(known.head) + known.body_bytes
        self.path = path
        self.codec = codec
        self.rows = layout.rows
        self.wanted = layout.wanted
        self.slices = tuple(slice(len(self.prefix) + start, len(self.prefix) + stop) for start, stop in layout.ordered)
        place = codec.id_in(header)
        identity = b"" if place is None else header[slice(*place)]
        self._id_bytes = len(identity)
        *fields, rest = known.fixed
        self._fields = tuple(fields)
        self._prefix_of_id, self._suffix = (
            (b"", rest + header) if place is None else between(rest + header, (_moved(place, rest),))
        )
        self._around: dict[str, tuple[bytes, bytes]] = {}
        self._heads: dict[str, bytes] = {}
        self.ready = self.ready_for = None
        super().__init__(identity)

    def head(self, variant: str) -> bytes | None:
        """As of `PreparedAnswer`."""
        head = self._heads.get(variant)
        if head is None:
            before, after = self.around(variant)
            if after:
                head = self._heads[variant] = before + self.id + after
        self.ready, self.ready_for = head, variant
        return head

    def around(self, variant: str) -> tuple[bytes, bytes]:
        """The bytes before the tensors of an answer by this variant, up to the id and after it; empty for none."""
        around = self._around.get(variant)
        if around is None:
            if len(self._around) >= _MAX_VARIANTS:
                self._around.clear()
                self._heads.clear()
            around = self._around[variant] = self._prepared(variant)
        return around

    def _prepared(self, variant: str) -> tuple[bytes, bytes]:
        codec, identity = self.codec, self.id
        described = codec.answer_header(self.wanted, self.rows, variant)
        if described is None:
            return b"", b""
        if identity:
            described = b'%b,"id":"%b"%b' % (described[: codec.id_at], identity, described[codec.id_at :])
        outputs = range(len(codec.signature.outputs))
        size = len(described) + sum(codec.output_bytes(each, self.rows, self.wanted.sizes) for each in outputs)
        fields = BINARY % (len(described), b"", size)
        at = codec.id_at + len(b',"id":"') if identity else codec.id_at
        return fields + described[:at], described[at + len(identity) :]

    @property
    def exact(self) -> bool:
        """Whether every repetition has the same bytes, except the tensors."""
        return not (self._fields or self._id_bytes)

    def request(self, data: bytes | memoryview) -> InferRequest:
        """The request in `data`, which begins with the prefix and has the right size."""
        view = memoryview(data)
        if len(self.slices) == 1:
            return InferRequest(self.rows, (view[self.slices[0]],), self.wanted)
        return InferRequest(self.rows, tuple([view[place] for place in self.slices]), self.wanted)

    def again(self, data: bytes, whole: bytes | memoryview) -> tuple[PreparedAnswer, InferRequest] | None:
        """The request in `whole`, of which `data` is the beginning, if it is this one except for its ids.

        Its body has the same length as before, because the head's length fields are the same.
        """
        at = match_fixed(self._fields, data)
        start = at + len(self._prefix_of_id)
        stop = start + self._id_bytes
        shift = stop + len(self._suffix) - len(self.prefix)
        if at < 0 or len(whole) - self.size != shift or not data.startswith(self._suffix, stop):
            return None
        if shift:
            view = memoryview(whole)
            tensors = tuple([view[place.start + shift : place.stop + shift] for place in self.slices])
            request = InferRequest(self.rows, tensors, self.wanted)
        else:
            request = self.request(whole)
        if not self._id_bytes:
            return self, request
        identity = data[start:stop]
        if not (data.startswith(self._prefix_of_id, at) and identity.isascii() and _ID.fullmatch(identity)):
            return None
        return _NumberedAnswer(self, identity), request


def _moved(place: tuple[int, int], before: bytes) -> tuple[int, int]:
    return place[0] + len(before), place[1] + len(before)
