"""`Codec`: requests and answers for one model, over HTTP.

What a server does for every request is kept cheap: a header that was read before is looked up by its bytes, tensors
stay views of the body, and the header of an answer is built once per shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec
import numpy as np

from rushhour.bundle import Signature, Sizes, TensorSpec
from rushhour.errors import WireError
from rushhour.wire.answers import MAX_CACHED_HEADERS, AnswerWriter
from rushhour.wire.datatypes import datatype_of
from rushhour.wire.elements import elements_of
from rushhour.wire.header import HEADER_LENGTH, RequestHeader, id_span, parsed, request_decoder, without_id
from rushhour.wire.json_pieces import JsonTensor, cut_json, put_back
from rushhour.wire.layouts import HeaderReader
from rushhour.wire.pieces import WHOLE_BYTES
from rushhour.wire.request import (
    Body,
    InferRequest,
    Layout,
    PictureRequest,
    PlacedRequest,
    Regions,
    TextRequest,
    Wanted,
    open_regions,
)

_AS_PICTURE: Final = "send the file itself: curl --data-binary @a.jpg -H 'content-type: image/jpeg'"
_UNSAID: Final = "it is a picture, and the content type does not say so"
_OTHER_KINDS: Final = (
    (b"--", "it is a form (multipart/form-data)", _AS_PICTURE),
    *(
        (beginning, _UNSAID, _AS_PICTURE)
        for beginning in (b"\xff\xd8\xff", b"\x89PNG\r", b"GIF8", b"RIFF", b"II*\0", b"MM\0*")
    ),
    (b"\x93NUMPY", "it is a .npy file", "send its values as JSON, or binary as the Open Inference Protocol says"),
)
"""How other content begins, what it is, and what to do."""
_MAX_CACHED_HEADER_BYTES = 4096


class Codec(AnswerWriter):
    """The server's side for one model: requests in, answers out.

    Args:
        model: the model's name, as answers repeat it.
        signature: the model's inputs and outputs.
        version: the model's version, as answers repeat it.
        max_rows: samples in one request, at most.
        labels: the classes' names, where the model classifies.
        regions: the shared memory of clients; None where it is not used.
        pictures: encoded pictures in one request, at most; 0 where the model takes none.
        texts: texts in one request, likewise.
        declared: output -> the shape of one sample as the protocol declares it, -1 for a size that depends on the
            request; None where all are the signature's.
        usual: the sizes of the open dimensions in a raw body, where its length does not determine them.
        rows: rows of named values in one request, at most; 0 where the model takes none.
        kind: of the task.
        targets: names of the values that it answers with, where they have some.

    Attributes:
        arrange: checks a header and returns its layout; see `HeaderReader.arrange`.
    """

    def __init__(
        self,
        model: str,
        signature: Signature,
        version: str = "1",
        max_rows: int = 4096,
        labels: tuple[str, ...] = (),
        regions: Regions | None = None,
        pictures: int = 0,
        texts: int = 0,
        declared: Mapping[str, tuple[int, ...]] | None = None,
        usual: Sizes = (),
        rows: int = 0,
        kind: str = "",
        targets: tuple[str, ...] = (),
    ) -> None:
        super().__init__(model, signature, version, labels, regions)
        self._declared = declared or {}
        self._usual = usual
        self.max_rows = max_rows
        self._pictures = pictures
        self._texts = texts
        self._rows = rows
        self.kind = kind
        self.targets = targets
        self._reader = HeaderReader(model, signature, max_rows, labels, regions, pictures, texts, rows)
        self.arrange: Callable[[RequestHeader], Layout] = self._reader.arrange
        self._layouts: dict[bytes, Layout] = {}
        self._numbered: dict[bytes, Layout] = {}

    def declared(self, spec: TensorSpec) -> list[int]:
        """The shape of one sample as the protocol declares it: -1 for a size that depends on the request."""
        given = self._declared.get(spec.name)
        return self.signature.declared(spec) if given is None else list(given)

    @property
    def takes_texts(self) -> bool:
        """Whether texts may be sent in place of the inputs."""
        return self._texts > 0

    @property
    def takes_rows(self) -> bool:
        """Whether rows of named values may be sent in place of the input."""
        return self._rows > 0

    @property
    def elements(self) -> int:
        """Encoded pictures, texts or rows in one request, at most; 0 where the model takes none."""
        return min(self._pictures or self._texts or self._rows, self.max_rows)

    def known(self, header: bytes) -> Layout | None:
        """The layout of a JSON header, if one that was equal except for the id was read before; else None."""
        return self._layouts.get(header) or self._numbered.get(without_id(header)[0])

    def id_in(self, header: bytes) -> tuple[int, int] | None:
        """Where the id of a known JSON header begins and ends; None if a header with another id is not known."""
        bare, identity = without_id(header)
        if not identity or bare not in self._numbered:
            return None
        return id_span(header)

    def is_large(self, body: Body, header_length: int | None) -> bool:
        """Whether reading a request takes long: then it must not be done on the event loop."""
        return (len(body) if header_length is None else header_length) > WHOLE_BYTES

    def decode(self, body: Body, header_length: int | None) -> InferRequest:
        """Read a request.

        Args:
            body: decompressed.
            header_length: the value of `Inference-Header-Content-Length`; None where the request has none (all
                JSON), 0 for a raw body that holds the one input's rows and nothing else.

        Raises:
            WireError: if it is not a valid request for this model.
        """
        if header_length == 0:
            return self._raw(body)
        if header_length is None:
            header_length = len(body)
        elif not 0 < header_length <= len(body):
            raise WireError(
                f"{HEADER_LENGTH} is {header_length}",
                f"the body has {len(body)} bytes",
                "send the length of the JSON header in bytes",
            )
        if header_length > WHOLE_BYTES:
            return self._decode_new(b"", body, header_length)
        header = bytes(body[:header_length])
        layout = self._layouts.get(header)
        if layout is not None:
            return self._decode_known(layout, body, header_length)
        bare, identity = without_id(header)
        layout = self._numbered.get(bare) if identity else None
        if layout is None:
            return self._decode_new(header, body, header_length)
        request = self._decode_known(layout, body, header_length)
        request.wanted = msgspec.structs.replace(layout.wanted, id=identity)
        return request

    def _decode_known(self, layout: Layout, body: Body, header_length: int) -> InferRequest:
        if len(body) - header_length != layout.total:
            raise _wrong_length(layout.total, len(body) - header_length)
        view = memoryview(body)
        if not layout.ordered:
            return self._gather(layout, view[header_length:])
        tensors = tuple([view[header_length + start : header_length + stop] for start, stop in layout.ordered])
        return InferRequest(layout.rows, tensors, layout.wanted)

    def decode_picture(self, body: Body) -> PictureRequest:
        """Read a request whose body is one encoded picture; the answer is JSON.

        Raises:
            WireError: if the model takes no pictures.
        """
        if not self._pictures:
            raise WireError(
                "the request is a picture",
                f"{self.model} does not take pictures",
                f"see GET v2/models/{self.model} for its inputs",
                status=415,
            )
        every = tuple(range(len(self.signature.outputs)))
        wanted = Wanted(id="", outputs=every, binary=(False,) * len(every))
        self.check_json(wanted)
        return PictureRequest((memoryview(body),), wanted)

    def gather(self, layout: Layout, following: Sequence[memoryview]) -> InferRequest:
        """Collect a request's tensors from the header, the body and shared memory.

        Args:
            layout: of the request's header.
            following: the tensors that follow the header, in the order of `layout.slices`.

        Raises:
            WireError: if a place in shared memory is not registered.
        """
        tensors = layout.inline | dict(zip(layout.slices, following, strict=True))
        for place in layout.places.values():
            open_regions(self._regions).check(place, writes=False)
        for wanted in layout.wanted.places:
            if wanted is not None:
                open_regions(self._regions).check(wanted, writes=True)

        def fetch() -> InferRequest:
            for position, place in layout.places.items():
                tensors[position] = open_regions(self._regions).read(place)
            if layout.encoded:
                kind = TextRequest if self._texts or self._rows else PictureRequest
                return kind(layout.pictures or elements_of(tensors[0], layout.rows), layout.wanted)
            ordered = tuple(tensors[position] for position in range(len(self.signature.inputs)))
            if layout.checked:
                self._check_values(ordered)
            return InferRequest(layout.rows, ordered, layout.wanted)

        return PlacedRequest(layout, fetch) if layout.places else fetch()

    def _raw(self, body: Body) -> InferRequest:
        if len(self.signature.inputs) != 1:
            raise WireError(
                f"a raw request holds one input, but {self.model} has {len(self.signature.inputs)}",
                f"{HEADER_LENGTH} is 0",
                "send a JSON header that names the inputs",
            )
        sizes: Sizes = ()
        if self.signature.dimensions:
            sizes = self._usual or self._raw_sizes(len(body))
        row_bytes = self.signature.row_bytes(self.signature.inputs[0], sizes)
        rows, rest = divmod(len(body), row_bytes)
        if rest or rows == 0:
            raise WireError(
                f"the raw body has {len(body)} bytes",
                f"one sample has {row_bytes}",
                "send complete samples, at least one",
            )
        self._reader.check_rows(rows)
        every = tuple(range(len(self.signature.outputs)))
        wanted = Wanted(id="", outputs=every, binary=(True,) * len(every), sizes=sizes)
        self._check_values((memoryview(body),))
        return InferRequest(rows, (memoryview(body),), wanted)

    def _check_values(self, tensors: Sequence[memoryview]) -> None:
        """Raise unless whole numbers that the model looks up are within their bounds.

        Raises:
            WireError: naming the first that is not.
        """
        for spec, tensor in zip(self.signature.inputs, tensors, strict=True):
            if isinstance(spec.below, msgspec.UnsetType):
                continue
            values = np.frombuffer(tensor, spec.dtype)
            if int(values.min()) < 0 or int(values.max()) >= spec.below:
                wrong = values[(values < 0) | (values >= spec.below)][0]
                raise WireError(
                    f"the input {spec.name!r} holds the value {wrong}",
                    f"{self.model} takes 0 to {spec.below - 1}",
                    "send values within these bounds",
                )

    def _raw_sizes(self, size: int) -> Sizes:
        """The size of the one open dimension of the one sample in a raw body of so many bytes, as Triton reads it.

        Raises:
            WireError: if it does not follow from the bytes.
        """
        (spec,) = self.signature.inputs
        if len(self.signature.dimensions) > 1:
            raise WireError(
                "the shape of a raw body is not clear",
                f"{self.model} takes {self.signature.described(spec)}",
                "send a JSON header with the shape",
            )
        (dimension,) = self.signature.dimensions
        found, rest = divmod(size, self.signature.row_bytes(spec, (1,)))
        if rest or not dimension.smallest <= found <= dimension.largest:
            raise WireError(
                f"the raw body has {size} bytes",
                f"it is one sample of {self.signature.described(spec)} values of {spec.dtype}",
                "send one complete sample, or several with a JSON header",
            )
        return (found,)

    def _decode_new(self, header: bytes, body: Body, header_length: int) -> InferRequest:
        tensors: list[JsonTensor] = []
        _check_kind(bytes(memoryview(body)[:16]))
        if header_length > WHOLE_BYTES:
            header, tensors = cut_json(memoryview(body)[:header_length], self.elements)
        try:
            described = parsed(header, request_decoder)
            described.id.encode()  # it is echoed: half of a surrogate pair could not be
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise WireError(
                "the request's JSON cannot be read", str(error), "see the Open Inference Protocol, $inference_request"
            ) from error
        if tensors:
            for entry, data in zip(
                described.inputs, put_back([entry.data for entry in described.inputs], tensors), strict=True
            ):
                entry.data = data
        layout = self.arrange(described)
        self.check_json(layout.wanted)
        if len(body) - header_length != layout.total:
            raise _wrong_length(layout.total, len(body) - header_length)
        request = self._gather(layout, memoryview(body)[header_length:])
        if not (layout.inline or layout.encoded or tensors) and len(header) <= _MAX_CACHED_HEADER_BYTES:
            self._remember(header, layout)
        return request

    def _remember(self, header: bytes, layout: Layout) -> None:
        layouts, identity = self._layouts, layout.wanted.id
        if identity:
            bare, found = without_id(header)
            if found != identity:
                return
            header, layouts = bare, self._numbered
            layout.wanted = msgspec.structs.replace(layout.wanted, id="")
        if len(layouts) >= MAX_CACHED_HEADERS:
            layouts.clear()
        layouts[header] = layout

    def _gather(self, layout: Layout, blobs: memoryview) -> InferRequest:
        return self.gather(layout, [blobs[start:stop] for start, stop in layout.slices.values()])


def _check_kind(beginning: bytes) -> None:
    """Raise if a body begins as another kind of content that people send: with what to send instead.

    Raises:
        WireError: of status 400.
    """
    for signature, kind, fix in _OTHER_KINDS:
        if beginning.startswith(signature):
            raise WireError("the request's JSON cannot be read", kind, fix)


def _wrong_length(expected: int, found: int) -> WireError:
    return WireError(
        f"{found} bytes follow the JSON header",
        f"its inputs need {expected}",
        "send the tensors that the header describes, complete",
    )


def model_metadata(codec: Codec, platform: str) -> bytes:
    """The answer to GET v2/models/MODEL."""

    def describe(specs: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
        return [
            {"name": spec.name, "datatype": datatype_of(spec), "shape": [-1, *codec.declared(spec)]} for spec in specs
        ]

    return msgspec.json.encode(
        {
            "name": codec.model,
            "versions": [codec.version],
            "platform": platform,
            "inputs": describe(codec.signature.inputs),
            "outputs": describe(codec.signature.outputs),
        }
    )
