"""The Open Inference Protocol v2: what requests and answers mean, and their bytes over HTTP. No I/O here.

A request's body is a JSON header, then the tensors it does not hold itself as raw little-endian rows; the HTTP field
`Inference-Header-Content-Length` says where the header ends. What a server does at every request is kept cheap: a
header seen before is looked up by its bytes, tensors stay views of the body, and the header of an answer is built
once per shape. Over gRPC the bytes are others (`serve/protocols/grpc_codec.py`) and the meaning is the same: both faces
describe a request by a `RequestHeader` and have it read by `Codec.arrange`.

A model of pictures also takes them as they come, encoded, in a BYTES tensor of shape `[n]` or `[n, 1]`. JSON cannot
carry bytes: there an element is Base64.

Two things that JSON leaves open are as Triton has them: a field that is null is absent, and NaN and the infinities are
the literals `NaN`, `Infinity` and `-Infinity`.

Sources: kserve/open-inference-protocol, specification/protocol/inference_rest.md; triton-inference-server/server,
docs/protocol: extension_binary_data.md, extension_shared_memory.md, extension_classification.md.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeGuard, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from rushhour.bundle import Signature, TensorSpec
from rushhour.errors import WireError
from rushhour.wire.pieces import (
    WHOLE_BYTES,
    JsonTensor,
    Packed,
    Texts,
    assembled,
    cut_json,
    put_back,
    rest,
    with_literals,
)

HEADER_LENGTH = "Inference-Header-Content-Length"

_DATATYPES = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
}
_DTYPES = {datatype: dtype for dtype, datatype in _DATATYPES.items()}
_MAX_CACHED_HEADERS = 256
_MAX_CACHED_HEADER_BYTES = 4096
_AT_ONCE = 8192
"""Numbers of an answer that are written in one go, in about a millisecond. A class in words takes as long as 16 of
them, and to find the classes among some numbers as long as to write a sixteenth of these."""
_BYTES_AT_ONCE = 2**20
"""That are copied in one go."""
MAX_PICTURE_BYTES = 16 * 2**20
"""Of an encoded picture; larger ones than camera files are made to keep decoders busy."""
_ID_KEY = re.compile(rb'"id"[ \t\r\n]*:')
_ID = re.compile(rb'"id"[ \t\r\n]*:[ \t\r\n]*"([^"\\\x00-\x1f]+)"')

_LIST = b"\0"
"""Stands for a list that is written apart: nothing else in JSON has this byte."""

if TYPE_CHECKING:
    _Parameters = dict[str, Any]
    _Text = str
else:  # what is null is taken as absent, once, by `__post_init__`: who reads a header need not know of it
    _Parameters = dict[str, Any] | None
    _Text = str | None

_T = TypeVar("_T")

_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = 100
_shorten.maxlist = 12
_shown = _shorten.repr
"""`repr` of what a client sent, cut short: an error does not repeat megabytes."""


def datatype_of(spec: TensorSpec) -> str:
    """The protocol's name of a tensor's type: `UINT8`, `FP32`, ..."""
    return _DATATYPES[spec.dtype]


def dtype_of(datatype: str) -> np.dtype[Any]:
    """The type behind the protocol's name of it. Raises a `KeyError` for one that is not known."""
    return np.dtype(_DTYPES[datatype])


class InputHeader(msgspec.Struct):
    """What a request says of one of its inputs. Nothing is checked yet.

    Attributes:
        data: the tensor's values, flat or nested; None where they lie elsewhere.
        parameters: `binary_data_size` where its bytes follow the header, `shared_memory_region` and its companions
            where they lie in shared memory.
    """

    name: str
    datatype: str
    shape: list[int]
    data: Any = None
    parameters: _Parameters = {}

    def __post_init__(self) -> None:
        self.parameters = _without_null(self.parameters)


class OutputHeader(msgspec.Struct):
    """What a request says of an output that it asks for."""

    name: str
    parameters: _Parameters = {}

    def __post_init__(self) -> None:
        self.parameters = _without_null(self.parameters)


if TYPE_CHECKING:
    _Outputs = list[OutputHeader]
else:
    _Outputs = list[OutputHeader] | None


class RequestHeader(msgspec.Struct):
    """What a request says of itself. Nothing is checked yet."""

    inputs: list[InputHeader]
    outputs: _Outputs = []
    id: _Text = ""
    parameters: _Parameters = {}

    def __post_init__(self) -> None:
        self.outputs, self.id = self.outputs or [], self.id or ""
        self.parameters = _without_null(self.parameters)


def _without_null(parameters: dict[str, Any] | None) -> dict[str, Any]:
    if parameters is None:
        return {}
    if None in parameters.values():
        return {name: value for name, value in parameters.items() if value is not None}
    return parameters


_request_decoder = msgspec.json.Decoder(RequestHeader)


def _parsed(text: bytes, decoder: msgspec.json.Decoder[_T]) -> _T:
    """JSON that may hold the literals `NaN`, `Infinity` and `-Infinity`.

    Raises:
        msgspec.DecodeError, ValueError, RecursionError: if it is none, or not of the decoder's type, or a number in it
            is beyond 64-bit floats.
    """
    try:
        return decoder.decode(text)
    except msgspec.DecodeError:
        if b"NaN" not in text and b"Infinity" not in text:
            raise
    return msgspec.convert(with_literals(text), decoder.type)


def _numbers(values: NDArray[Any]) -> list[Any] | msgspec.Raw:
    """A tensor's values for JSON; as `_parsed` reads them where some are not finite."""
    listed: list[Any] = values.tolist()
    if values.dtype.kind != "f" or bool(np.isfinite(values).all()):
        return listed
    return msgspec.Raw(json.dumps(listed, separators=(",", ":")).encode())


class Place(msgspec.Struct, frozen=True):
    """Where a tensor's bytes lie in shared memory.

    Attributes:
        region: under which name a client has registered it.
        offset: in bytes, from the region's beginning.
    """

    region: str
    offset: int
    byte_size: int


class Regions(Protocol):
    """The shared memory that clients have registered. Whoever does I/O hands it in."""

    def check(self, place: Place, *, writes: bool = True) -> None:
        """Raise a `WireError` unless the place lies in a registered region, one that may be written if it is to be."""
        ...

    def read(self, place: Place) -> memoryview:
        """The bytes there, as they are now."""
        ...

    def write(self, place: Place, content: memoryview | bytes) -> None:
        """Put bytes there, from its beginning."""
        ...


class Wanted(msgspec.Struct, frozen=True):
    """What an answer is to hold, and how: the same for all requests with the same header.

    Attributes:
        id: echoed if not empty.
        outputs: positions in the signature's outputs, in the order of the answer.
        binary: for each of them, raw bytes behind the header or numbers in the JSON.
        timeout_s: how long the caller is willing to wait; None where it does not say.
        priority: 1 is the highest, 0 where the caller does not say.
        top: for each output, how many of the likeliest classes are wanted in words, 0 for the numbers themselves;
            empty where no output is wanted so.
        places: for each output, where in shared memory it is to be written; empty where none is.
    """

    id: str
    outputs: tuple[int, ...]
    binary: tuple[bool, ...]
    timeout_s: float | None = None
    priority: int = 0
    top: tuple[int, ...] = ()
    places: tuple[Place | None, ...] = ()


class InferRequest:
    """A decoded request.

    Attributes:
        rows: samples in it, at least 1.
        tensors: one view of `rows * row_bytes` bytes for each input, in the signature's order.
        wanted: what the answer is to hold.
        pictures: what the tensors are still to be made of; empty for all but a `PictureRequest`.
        elsewhere: bytes that are still to be read from shared memory; 0 for all but a `PlacedRequest`.
    """

    __slots__ = ("rows", "tensors", "wanted")
    pictures: Sequence[Encoded] = ()
    elsewhere = 0

    def __init__(self, rows: int, tensors: tuple[memoryview, ...], wanted: Wanted) -> None:
        self.rows = rows
        self.tensors = tensors
        self.wanted = wanted


Body = bytes | bytearray | memoryview
Parts = list[bytes | memoryview]

Encoded = memoryview | str
"""A picture as it was sent: its bytes, or these in Base64."""


class PictureRequest(InferRequest):
    """A decoded request whose pictures are not: whoever has threads makes tensors of them.

    Attributes:
        pictures: one for each sample.
    """

    __slots__ = ("pictures",)

    def __init__(self, pictures: Sequence[Encoded], wanted: Wanted) -> None:
        super().__init__(len(pictures), (), wanted)
        self.pictures = pictures


class PlacedRequest(InferRequest):
    """A decoded request of which tensors lie in shared memory: they are read once it is sure that it is let in.

    Attributes:
        elsewhere: bytes to be read.
    """

    __slots__ = ("_fetch", "elsewhere")

    def __init__(self, layout: Layout, fetch: Callable[[], InferRequest]) -> None:
        super().__init__(layout.rows, (), layout.wanted)
        self.elsewhere = sum(place.byte_size for place in layout.places.values())
        self._fetch = fetch

    def fetch(self) -> InferRequest:
        """Read them, on any thread: the request with all of its tensors.

        Raises:
            WireError: if a place is not there any more.
        """
        request = self._fetch()
        request.wanted = self.wanted
        return request

    @property
    def large(self) -> bool:
        """Reading it would hold the event loop up."""
        return self.elsewhere > _BYTES_AT_ONCE


class Layout:
    """A header, read and checked: where the tensors of its requests lie, and what their answers are to hold.

    Attributes:
        rows: samples in a request.
        wanted: what the answer is to hold.
        slices: position of an input -> where its bytes begin and end among those that follow the header, in the order
            in which they follow.
        total: bytes that follow the header.
        inline: position of an input -> its bytes, where the header itself held them.
        places: position of an input -> its place in shared memory.
        encoded: the one input is pictures, of any size: another request with this header may be longer.
        pictures: these, where the header itself held them.
    """

    __slots__ = ("encoded", "inline", "ordered", "pictures", "places", "rows", "slices", "total", "wanted")

    def __init__(self, rows: int, wanted: Wanted) -> None:
        self.rows = rows
        self.wanted = wanted
        self.slices: dict[int, tuple[int, int]] = {}
        self.total = 0
        self.inline: dict[int, memoryview] = {}
        self.places: dict[int, Place] = {}
        self.encoded = False
        self.pictures: Sequence[Encoded] = ()
        self.ordered: tuple[tuple[int, int], ...] = ()
        """The slices by position, where all there is to a request is slices."""

    def settle(self) -> Layout:
        """To be called when all inputs are in."""
        if not self.inline and not self.places and not self.wanted.places and not self.encoded:
            self.ordered = tuple(self.slices[position] for position in range(len(self.slices)))
        return self


class OutputTensor(NamedTuple):
    """One output of an answer.

    Attributes:
        words: the values of a BYTES tensor that is for JSON, some at a time; None for any other.
        raw: its bytes; None where they have been written to shared memory.
    """

    name: str
    datatype: str
    shape: list[int]
    words: Iterator[list[str]] | None
    raw: memoryview | bytes | None


class Codec:
    """The server's side for one model: requests in, answers out.

    Args:
        model: the model's name, as answers repeat it.
        signature: what the model takes and gives.
        version: the model's version, as answers repeat it.
        max_rows: samples in one request, at most.
        labels: the classes' names, where the model classifies.
        regions: the shared memory of the server's clients; None where it is not to be used.
        pictures: encoded pictures in one request, at most; 0 where the model takes none.
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
    ) -> None:
        self.model = model
        self.version = version
        self.signature = signature
        self.max_rows = max_rows
        self.labels = labels
        self._pictures = pictures
        self._regions = regions
        self._inputs = {spec.name: position for position, spec in enumerate(signature.inputs)}
        self._outputs = {spec.name: position for position, spec in enumerate(signature.outputs)}
        self._values = tuple(math.prod(spec.shape) for spec in signature.outputs)
        self._layouts: dict[bytes, Layout] = {}
        self._numbered: dict[bytes, Layout] = {}
        self._answer_headers: dict[tuple[tuple[int, ...], int], bytes] = {}
        self.id_at = len(msgspec.json.encode({"model_name": model, "model_version": version})) - 1
        """Where an id goes in the JSON header of an answer that has none."""

    @property
    def pictures(self) -> int:
        """Encoded pictures in one request, at most; 0 where the model takes none."""
        return min(self._pictures, self.max_rows)

    def known(self, header: bytes) -> Layout | None:
        """What a JSON header says, if one was read before that was equal but for the id; None if it must be read."""
        return self._layouts.get(header) or self._numbered.get(without_id(header)[0])

    def id_in(self, header: bytes) -> tuple[int, int] | None:
        """Where the id of a known JSON header begins and ends; None where another one would not be known, too."""
        bare, identity = without_id(header)
        if not identity or bare not in self._numbered:
            return None
        match = _ID.search(header)
        assert match is not None
        return match.span(1)

    def is_large(self, body: Body, header_length: int | None) -> bool:
        """Whether reading a request takes long: then it must not be done on the event loop's thread."""
        return (len(body) if header_length is None else header_length) > WHOLE_BYTES

    def decode(self, body: Body, header_length: int | None) -> InferRequest:
        """Read a request.

        Args:
            body: the whole body, already decompressed.
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
        """Read a request that is one encoded picture and nothing else; the answer is JSON.

        Raises:
            WireError: if the model takes no pictures.
        """
        if not self._pictures:
            raise WireError(
                "the request is a picture",
                f"{self.model} takes none",
                f"ask GET v2/models/{self.model} for what it takes",
                status=415,
            )
        every = tuple(range(len(self.signature.outputs)))
        wanted = Wanted(id="", outputs=every, binary=(False,) * len(every))
        self._check_json(wanted)
        return PictureRequest((memoryview(body),), wanted)

    def gather(self, layout: Layout, following: Sequence[memoryview]) -> InferRequest:
        """Bring a request's tensors together, wherever they lie.

        Args:
            layout: of the request's header.
            following: the tensors that follow the header, in the order of `layout.slices`.

        Raises:
            WireError: if a place in shared memory is not registered.
        """
        tensors = layout.inline | dict(zip(layout.slices, following, strict=True))
        for place in layout.places.values():
            self._shared().check(place, writes=False)
        for wanted in layout.wanted.places:
            if wanted is not None:
                self._shared().check(wanted, writes=True)

        def fetch() -> InferRequest:
            for position, place in layout.places.items():
                tensors[position] = self._shared().read(place)
            if layout.encoded:
                return PictureRequest(layout.pictures or _elements(tensors[0], layout.rows), layout.wanted)
            ordered = tuple(tensors[position] for position in range(len(self._inputs)))
            return InferRequest(layout.rows, ordered, layout.wanted)

        return PlacedRequest(layout, fetch) if layout.places else fetch()

    def writes_much(self, wanted: Wanted, rows: int) -> bool:
        """Whether writing an answer takes long: then it must not be done on the event loop's thread."""
        work = size = 0
        for number, position in enumerate(wanted.outputs):
            values = rows * self._values[position]
            if wanted.top and wanted.top[number]:
                work += values // 16 + 16 * rows * wanted.top[number]
            elif wanted.places and wanted.places[number] is not None:
                size += rows * self.signature.outputs[position].row_bytes
            elif not wanted.binary[number]:
                work += values
        return work > _AT_ONCE or size > _BYTES_AT_ONCE

    def encode(self, wanted: Wanted, rows: int, outputs: Sequence[memoryview]) -> tuple[int | None, Parts]:
        """Write an answer.

        Args:
            wanted: of the request.
            rows: samples in the answer.
            outputs: the raw rows of each of the signature's outputs, in its order.

        Returns:
            The length of the JSON header where raw bytes follow it (for `Inference-Header-Content-Length`), else
            None; and the parts of the body in order, some of them views of `outputs`.
        """
        if wanted.top or wanted.places or not all(wanted.binary):
            return self._encode_each(wanted, rows, outputs)
        header = self._binary_header(wanted, rows)
        return len(header), [header, *[outputs[position] for position in wanted.outputs]]

    def answer_header(self, wanted: Wanted, rows: int) -> bytes | None:
        """The JSON header of an answer whose body is that header and the outputs' raw rows in the signature's order.

        None where the answer is any other.
        """
        whole = wanted.outputs == tuple(range(len(self._outputs))) and all(wanted.binary)
        return self._binary_header(wanted, rows) if whole and not (wanted.top or wanted.places) else None

    def _binary_header(self, wanted: Wanted, rows: int) -> bytes:
        key = (wanted.outputs, rows)
        header = self._answer_headers.get(key)
        if header is None:
            described = [
                dict(zip(("name", "datatype", "shape"), self.describe(position, rows), strict=True))
                | {"parameters": {"binary_data_size": rows * self.signature.outputs[position].row_bytes}}
                for position in wanted.outputs
            ]
            header = self._answer("", described)
            if len(self._answer_headers) >= _MAX_CACHED_HEADERS:
                self._answer_headers.clear()
            self._answer_headers[key] = header
        if not wanted.id:
            return header
        return b'%b,"id":%b%b' % (header[: self.id_at], msgspec.json.encode(wanted.id), header[self.id_at :])

    def outputs(
        self, wanted: Wanted, rows: int, outputs: Sequence[memoryview], *, in_json: bool = False
    ) -> Iterator[OutputTensor]:
        """The outputs of an answer one by one, in the order wanted; those for shared memory are written there.

        Args:
            wanted: of the request.
            rows: samples in the answer.
            outputs: the raw rows of each of the signature's outputs, in its order.
            in_json: texts that are not wanted as bytes are for JSON.

        Raises:
            WireError: if a place in shared memory is no longer there, or too small.
        """
        for number, position in enumerate(wanted.outputs):
            spec = self.signature.outputs[position]
            top = wanted.top[number] if wanted.top else 0
            place = wanted.places[number] if wanted.places else None
            described = (spec.name, "BYTES", [rows, top]) if top else self.describe(position, rows)
            words = self._likeliest(spec, outputs[position], rows, top) if top else None
            if words is not None and in_json and place is None and not wanted.binary[number]:
                yield OutputTensor(*described, words, b"")
                continue
            raw = outputs[position] if words is None else b"".join(map(_bytes_tensor, words))
            if place is not None:
                self._shared().write(place, raw)
            yield OutputTensor(*described, None, raw if place is None else None)

    def _likeliest(self, spec: TensorSpec, rows_of: memoryview, rows: int, top: int) -> Iterator[list[str]]:
        """`value:index:label` of the `top` highest values of each sample, highest first; of some samples at a time."""
        values = np.frombuffer(rows_of, dtype=spec.dtype).reshape(rows, -1)
        shown = "{}:{}:{}" if values.dtype.kind in "iu" else "{:f}:{}:{}"
        at_once = max(1, _AT_ONCE // (16 * top + values.shape[1] // 16))
        for first in range(0, rows, at_once):
            if first:
                rest()
            some = values[first : first + at_once]
            order = np.argsort(-some.astype(np.float64), axis=1, kind="stable")[:, :top]
            yield [
                shown.format(some[row, index], index, self.labels[index])
                for row, each in enumerate(order)
                for index in each
            ]

    def _encode_each(self, wanted: Wanted, rows: int, outputs: Sequence[memoryview]) -> tuple[int | None, Parts]:
        described: list[dict[str, Any]] = []
        blobs: list[bytes | memoryview] = []
        lists: list[list[bytes]] = []
        for output, binary in zip(self.outputs(wanted, rows, outputs, in_json=True), wanted.binary, strict=True):
            entry: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": output.shape}
            if output.raw is None:
                pass  # it lies in shared memory, where the client has said
            elif binary:
                blobs.append(output.raw)
                entry["parameters"] = {"binary_data_size": len(blobs[-1])}
            elif output.words is not None:
                entry["data"] = _listed(output.words, lists)
            else:
                values = np.frombuffer(output.raw, dtype=_DTYPES[output.datatype])
                entry["data"] = _listed(_in_json(values), lists)
            described.append(entry)
        header = self._answer(wanted.id, described)
        parts = [header]
        for content in lists:
            before, _, after = parts.pop().partition(_LIST)
            parts += [before, *content, after]
        return (sum(map(len, parts)) if blobs else None), [*parts, *blobs]

    def _answer(self, identity: str, described: list[dict[str, Any]]) -> bytes:
        answer: dict[str, Any] = {"model_name": self.model, "model_version": self.version}
        if identity:
            answer["id"] = identity
        return msgspec.json.encode(answer | {"outputs": described})

    def describe(self, position: int, rows: int) -> tuple[str, str, list[int]]:
        """The name, datatype and shape of an output in an answer of so many samples."""
        spec = self.signature.outputs[position]
        return spec.name, datatype_of(spec), [rows, *spec.shape]

    def _raw(self, body: Body) -> InferRequest:
        if len(self.signature.inputs) != 1:
            raise WireError(
                f"a raw request holds one input, but {self.model} has {len(self.signature.inputs)}",
                f"{HEADER_LENGTH} is 0",
                "send a JSON header that names the inputs",
            )
        row_bytes = self.signature.inputs[0].row_bytes
        rows, rest = divmod(len(body), row_bytes)
        if rest or rows == 0:
            raise WireError(
                f"the raw body has {len(body)} bytes", f"one sample has {row_bytes}", "send whole samples, at least one"
            )
        self._check_rows(rows)
        every = tuple(range(len(self.signature.outputs)))
        return InferRequest(rows, (memoryview(body),), Wanted(id="", outputs=every, binary=(True,) * len(every)))

    def _decode_new(self, header: bytes, body: Body, header_length: int) -> InferRequest:
        tensors: list[JsonTensor] = []
        if header_length > WHOLE_BYTES:
            header, tensors = cut_json(memoryview(body)[:header_length], self.pictures)
        try:
            parsed = _parsed(header, _request_decoder)
            parsed.id.encode()  # it is echoed: half of a surrogate pair could not be
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise WireError(
                "the request's JSON cannot be read", str(error), "see the Open Inference Protocol, $inference_request"
            ) from error
        if tensors:
            for entry, data in zip(
                parsed.inputs, put_back([entry.data for entry in parsed.inputs], tensors), strict=True
            ):
                entry.data = data
        layout = self.arrange(parsed)
        self._check_json(layout.wanted)
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
        if len(layouts) >= _MAX_CACHED_HEADERS:
            layouts.clear()
        layouts[header] = layout

    def _check_json(self, wanted: Wanted) -> None:
        """Refuse now, before anything is computed, what JSON cannot carry."""
        for number, position in enumerate(wanted.outputs):
            spec = self.signature.outputs[position]
            other = wanted.binary[number] or (wanted.top and wanted.top[number])
            if spec.dtype == "float16" and not other and not (wanted.places and wanted.places[number]):
                raise WireError(f"the output {spec.name!r} is FP16", "JSON cannot carry it", "ask for binary data")

    def _gather(self, layout: Layout, blobs: memoryview) -> InferRequest:
        return self.gather(layout, [blobs[start:stop] for start, stop in layout.slices.values()])

    def arrange(self, header: RequestHeader) -> Layout:
        """Read and check what a request says of itself.

        Raises:
            WireError: if it is not a valid request for this model.
        """
        by_position = self._match_inputs(header.inputs)
        rows = self._rows_of(by_position)
        layout = Layout(rows, self._wanted(header, rows))
        for position, entry in by_position.items():
            layout.encoded = entry.datatype == "BYTES"
            size = None if layout.encoded else rows * self.signature.inputs[position].row_bytes
            stated, place = entry.parameters.get("binary_data_size"), self._place(entry, size)
            given = (stated, entry.data, place).count(None)
            if given != 2:
                raise WireError(
                    f"the input {entry.name!r} has {'no data' if given == 3 else 'data twice'}",
                    "an input carries 'data', or the parameter 'binary_data_size', or 'shared_memory_region'",
                    "send exactly one of them",
                )
            if place is not None:
                layout.places[position] = place
            elif stated is None and size is None:
                layout.pictures = _from_elements(entry)
            elif stated is None:
                layout.inline[position] = self._from_values(entry, position)
            elif not _is_size(stated) or size not in (None, stated):
                raise WireError(
                    f"the input {entry.name!r} has binary_data_size {_shown(stated)}",
                    f"shape {entry.shape} of {entry.datatype} is {size or 'any number of'} bytes",
                    "send the tensor's exact size",
                )
            else:
                layout.slices[position] = (layout.total, layout.total + stated)
                layout.total += stated
        return layout.settle()

    def _place(self, entry: InputHeader | OutputHeader, size: int | None = None) -> Place | None:
        """The place in shared memory that an input or output names, if it does; `size` is what it must have."""
        region = entry.parameters.get("shared_memory_region")
        if region is None:
            return None
        self._shared()
        offset = entry.parameters.get("shared_memory_offset", 0)
        byte_size = entry.parameters.get("shared_memory_byte_size")
        if not (isinstance(region, str) and _is_size(offset) and _is_size(byte_size)):
            raise WireError(
                f"{_shown(entry.name)} lies in shared memory, but where is not said",
                f"region {_shown(region)}, offset {_shown(offset)}, byte size {_shown(byte_size)}",
                "send shared_memory_region, shared_memory_byte_size and, if it is not 0, shared_memory_offset",
            )
        if size is not None and byte_size != size:
            raise WireError(
                f"the input {entry.name!r} has shared_memory_byte_size {byte_size}",
                f"a tensor of its shape and type is {size} bytes",
                "send the tensor's exact size",
            )
        return Place(region, offset, byte_size)

    def _shared(self) -> Regions:
        if self._regions is None:
            raise WireError("the request uses shared memory", "this server does not", "send the tensors", status=501)
        return self._regions

    def _match_inputs(self, inputs: list[InputHeader]) -> dict[int, InputHeader]:
        """Position -> input; every input of the model exactly once, with its type and shape."""
        found: dict[int, InputHeader] = {}
        for entry in inputs:
            position = self._inputs.get(entry.name)
            if position is None or position in found:
                raise WireError(
                    f"the input {_shown(entry.name)} is {'unknown' if position is None else 'there twice'}",
                    f"{self.model} takes {', '.join(self._inputs)}",
                    f"ask GET v2/models/{self.model}",
                )
            spec = self.signature.inputs[position]
            if entry.datatype == "BYTES" and self._pictures:
                self._check_pictures(entry)
            elif entry.datatype != datatype_of(spec):
                raise WireError(
                    f"the input {entry.name!r} has datatype {_shown(entry.datatype)}",
                    f"{self.model} takes {datatype_of(spec)}",
                    "convert it, or send another input",
                )
            elif len(entry.shape) != len(spec.shape) + 1 or tuple(entry.shape[1:]) != spec.shape:
                raise WireError(
                    f"the input {entry.name!r} has shape {_shown(entry.shape)}",
                    f"{self.model} takes {[-1, *spec.shape]}, the first being the number of samples",
                    "bring it to that shape",
                )
            found[position] = entry
        for name, position in self._inputs.items():
            if position not in found:
                raise WireError(
                    f"the input {name!r} is missing",
                    f"{self.model} takes {', '.join(self._inputs)}",
                    f"ask GET v2/models/{self.model}",
                )
        return found

    def _rows_of(self, inputs: Mapping[int, InputHeader]) -> int:
        counts = {entry.shape[0] for entry in inputs.values()}
        if len(counts) != 1:
            raise WireError(
                f"the inputs have {sorted(counts)} samples",
                "all inputs of a request have the same number",
                "align them",
            )
        (rows,) = counts
        self._check_rows(rows)
        return rows

    def _check_rows(self, rows: int) -> None:
        if not 1 <= rows <= self.max_rows:
            raise WireError(
                f"the request has {rows} samples", f"a request has 1 to {self.max_rows}", "split it into several"
            )

    def _check_pictures(self, entry: InputHeader) -> None:
        if len(entry.shape) not in (1, 2) or entry.shape[1:] not in ([], [1]):
            raise WireError(
                f"the input {entry.name!r} has shape {_shown(entry.shape)}",
                "encoded pictures have [-1] or [-1, 1], the first being their number",
                "bring it to that shape",
            )
        if entry.shape[0] > self._pictures:
            raise WireError(
                f"the request has {entry.shape[0]} pictures",
                f"decoded, {self._pictures} of them are as large as a request may be",
                "split it into several",
                status=413,
            )

    def _from_values(self, entry: InputHeader, position: int) -> memoryview:
        spec = self.signature.inputs[position]
        count = math.prod(entry.shape)
        try:
            if isinstance(entry.data, JsonTensor | Packed | Texts):
                array = assembled(entry.data, count, spec.dtype, partial(_converted_batch, spec))
                return array.reshape(-1).view(np.uint8).data
            values = _flat(entry.data, spec)
            if len(values) != count:
                raise ValueError(f"found {len(values)} values for shape {entry.shape}")
            array = _converted(spec, values)
        except (ValueError, TypeError, OverflowError, FloatingPointError) as error:
            raise WireError(
                f"the data of the input {entry.name!r} cannot be read",
                str(error),
                f"send {math.prod(entry.shape)} numbers of type {datatype_of(spec)}, flat or nested",
            ) from error
        return memoryview(array.tobytes())

    def _wanted(self, header: RequestHeader, rows: int) -> Wanted:
        all_binary = _truth(header.parameters, "binary_data_output", default=False)
        asked = header.outputs or [OutputHeader(name) for name in self._outputs]
        positions: list[int] = []
        binary, top = [], []
        places: list[Place | None] = []
        for output in asked:
            position = self._outputs.get(output.name)
            if position is None or position in positions:
                raise WireError(
                    f"the output {_shown(output.name)} is {'unknown' if position is None else 'there twice'}",
                    f"{self.model} gives {', '.join(self._outputs)}",
                    f"ask GET v2/models/{self.model}",
                )
            positions.append(position)
            binary.append(_truth(output.parameters, "binary_data", default=all_binary))
            top.append(self._top(output, position))
            size = rows * self.signature.outputs[position].row_bytes
            place = self._place(output)
            if place is not None and not top[-1] and size > place.byte_size:
                raise WireError(
                    f"the output {output.name!r} does not fit into its shared memory",
                    f"it has {size} bytes, and shared_memory_byte_size is {place.byte_size}",
                    "give it more room",
                )
            places.append(place)
        timeout, priority = header.parameters.get("timeout"), header.parameters.get("priority", 0)
        if timeout is not None and not _is_size(timeout):
            raise WireError(
                f"the timeout is {_shown(timeout)}", "it is a whole number of microseconds", "send 0 or more"
            )
        if not _is_size(priority):
            raise WireError(
                f"the priority is {_shown(priority)}", "1 is the highest, larger is lower", "send 0 or more"
            )
        return Wanted(
            id=header.id,
            outputs=tuple(positions),
            binary=tuple(binary),
            timeout_s=timeout / 1e6 if timeout else None,
            priority=priority,
            top=tuple(top) if any(top) else (),
            places=tuple(places) if any(places) else (),
        )

    def _top(self, output: OutputHeader, position: int) -> int:
        """How many classes of an output are wanted in words."""
        asked, spec = output.parameters.get("classification", 0), self.signature.outputs[position]
        if not _is_size(asked):
            raise WireError(
                f"the output {output.name!r} asks for classification {_shown(asked)}",
                "it is a number of classes",
                "send a whole number, 0 for the tensor itself",
            )
        if asked and math.prod(spec.shape) != len(self.labels):
            raise WireError(
                f"the output {output.name!r} asks for classification",
                f"{self.model} does not classify with it",
                "ask for the tensor itself",
            )
        return min(asked, len(self.labels))


def _converted(spec: TensorSpec, values: Sequence[int | float] | NDArray[Any]) -> NDArray[Any]:
    """Numbers in the type of a tensor; a `ValueError` or the like where they do not fit."""
    kind = np.dtype(spec.dtype).kind
    # Of a list numpy's choice would be floats where some integers are beyond 63 bits and others are not.
    found = np.asarray(values, np.uint64 if spec.dtype == "uint64" else None)
    if kind != "f" and found.size:
        least, most = (0, 1) if kind == "b" else (np.iinfo(spec.dtype).min, np.iinfo(spec.dtype).max)
        if found.dtype.kind == "f" or int(found.min()) < least or int(found.max()) > most:
            raise ValueError(f"a value lies outside {least}..{most}")
    with np.errstate(over="raise"):
        array: NDArray[Any] = found.astype(spec.dtype)
    return array


def _converted_batch(spec: TensorSpec, values: Sequence[int | float] | NDArray[Any]) -> NDArray[Any]:
    """The same for some of the numbers of a tensor that is read in pieces."""
    if not isinstance(values, np.ndarray):
        _check_types(set(map(type, values)), spec)
    return _converted(spec, values)


def _check_types(found: set[type], spec: TensorSpec) -> None:
    others = found - {"b": {bool, int}, "f": {int, float}}.get(np.dtype(spec.dtype).kind, {int})
    if others - {int, float, bool}:
        raise ValueError("found something else than numbers")
    if bool in others:
        raise ValueError("found true or false among the numbers")
    if others:
        raise ValueError(f"found values that are not {datatype_of(spec)}")


def without_id(header: bytes) -> tuple[bytes, str]:
    """A JSON header with an empty id, and its id; as it is, with none, where there is doubt which text is its id."""
    key = _ID_KEY.search(header)
    match = None if key is None else _ID.match(header, key.start())
    if match is None or b"\\" in header or _ID_KEY.search(header, match.end()):
        return header, ""
    start, stop = match.span(1)
    try:
        return header[:start] + header[stop:], header[start:stop].decode()
    except UnicodeDecodeError:
        return header, ""


def _in_json(values: NDArray[Any]) -> Iterator[list[Any] | msgspec.Raw]:
    """Numbers as they are written in JSON, some at a time."""
    for first in range(0, len(values), _AT_ONCE):
        if first:
            rest()
        yield _numbers(values[first : first + _AT_ONCE])


def _listed(batches: Iterator[list[Any] | msgspec.Raw], lists: list[list[bytes]]) -> Any:
    """Values as they stand in JSON. Of several batches it is a placeholder, and their parts are added to `lists`."""
    first = next(batches)
    second = next(batches, None)
    if second is None:
        return first
    parts = [msgspec.json.encode(first)[:-1]]
    for batch in chain((second,), batches):
        parts.append(b"," + msgspec.json.encode(batch)[1:-1])
    parts.append(b"]")
    lists.append(parts)
    return msgspec.Raw(_LIST)


def _flat(data: object, spec: TensorSpec) -> list[int | float]:
    """The values of a tensor in JSON, flat or nested, as one list.

    Not by numpy, which gives each element as much room as the largest needs: one text of a megabyte among as many
    empty ones would ask for a terabyte.
    """
    if not isinstance(data, list):
        raise ValueError("it is no list")
    while (kinds := set(map(type, data))) == {list}:
        if len(set(map(len, data))) > 1:
            raise ValueError("its lists differ in length")
        data = list(chain.from_iterable(data))
    _check_types(kinds, spec)
    return data


def _truth(parameters: Mapping[str, object], name: str, *, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise WireError(f"the parameter {name} is {_shown(value)}", "it is true or false", "send one of them")
    return value


def _is_size(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _bytes_tensor(words: Sequence[str]) -> bytes:
    """A BYTES tensor as it is sent: each element's length in four bytes, then the element."""
    return b"".join(len(word).to_bytes(4, "little") + word for word in map(str.encode, words))


def _elements(content: memoryview, number: int) -> list[memoryview]:
    """The elements of a BYTES tensor, as `_bytes_tensor` writes them; none is copied."""
    found: list[memoryview] = []
    at, end = 0, len(content)
    while at + 4 <= end and len(found) < number:
        stop = at + 4 + int.from_bytes(content[at : at + 4], "little")
        if stop > end:
            break
        found.append(content[at + 4 : stop])
        at = stop
    if at != end or len(found) != number:
        raise WireError(
            f"the BYTES tensor holds {len(found)} whole elements in {at} of its {end} bytes",
            f"its shape says {number}",
            "send each element's length in four bytes, little-endian, and then the element",
        )
    return found


def _from_elements(entry: InputHeader) -> Sequence[Encoded]:
    """The pictures that a header holds itself: Base64 in JSON, bytes over gRPC."""
    data = entry.data
    if isinstance(data, JsonTensor | Packed | Texts):
        try:
            data = data.texts()
        except ValueError as error:
            raise WireError(
                f"the data of the input {entry.name!r} cannot be read", str(error), "send pictures in Base64"
            ) from error
    if len(entry.shape) == 2 and isinstance(data, list) and all(isinstance(row, list) for row in data):
        data = [element for row in data for element in row]
    if not isinstance(data, list) or not all(isinstance(element, str | bytes | memoryview) for element in data):
        raise WireError(
            f"the data of the input {entry.name!r} cannot be read", "it is no list of text", "send pictures in Base64"
        )
    if len(data) != entry.shape[0]:
        raise WireError(
            f"the data of the input {entry.name!r} has {len(data)} elements",
            f"its shape is {entry.shape}",
            "send one element for each picture",
        )
    return [memoryview(element) if isinstance(element, bytes) else element for element in data]


def content_of(picture: Encoded) -> bytes:
    """The bytes of a picture, however it was sent.

    Raises:
        WireError: if it is not Base64 where it ought to be.
    """
    if len(picture) > MAX_PICTURE_BYTES:
        limit = f"encoded it may have {MAX_PICTURE_BYTES} bytes"
        raise WireError(f"a picture of {len(picture)} bytes is too large", limit, "send a smaller one", status=413)
    if not isinstance(picture, str):
        whole = io.BytesIO()
        for at in range(0, len(picture), _BYTES_AT_ONCE):
            if at:
                rest()
            whole.write(picture[at : at + _BYTES_AT_ONCE])
        return whole.getvalue()
    try:
        return base64.b64decode(picture, validate=True)
    except ValueError as error:
        raise WireError("a picture is not Base64", str(error), "JSON carries pictures as Base64 only") from error


def _wrong_length(expected: int, found: int) -> WireError:
    return WireError(
        f"{found} bytes follow the JSON header", f"its inputs need {expected}", "send the header's tensors, whole"
    )


class Content(NamedTuple):
    """A tensor on its way to a server of any make.

    Attributes:
        datatype: the protocol's name of its type, `BYTES` and `BF16` among them.
        array: its values; for BYTES `bytes` objects, for BF16 numbers of any float type.
    """

    name: str
    datatype: str
    array: NDArray[Any]

    @property
    def raw(self) -> bytes:
        """Its values as they are sent behind a header, or over gRPC."""
        if self.datatype == "BYTES":
            return b"".join(len(each).to_bytes(4, "little") + each for each in self.array.flat)
        if self.datatype == "BF16":
            with np.errstate(over="ignore"):
                bits = np.ascontiguousarray(self.array, np.float32).view(np.uint32)
            rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
            return np.where(np.isnan(self.array), 0x7FC0, rounded).astype("<u2").tobytes()
        return np.ascontiguousarray(self.array, dtype_of(self.datatype).newbyteorder("<")).tobytes()


def encode_tensors(contents: Sequence[Content]) -> tuple[int, bytes]:
    """A client's request with binary inputs and binary outputs: the header's length and the body."""
    described, blobs = [], []
    for content in contents:
        blob = content.raw
        described.append(
            {
                "name": content.name,
                "shape": list(content.array.shape),
                "datatype": content.datatype,
                "parameters": {"binary_data_size": len(blob)},
            }
        )
        blobs.append(blob)
    header = msgspec.json.encode({"inputs": described, "parameters": {"binary_data_output": True}})
    return len(header), b"".join([header, *blobs])


def encode_json_tensors(contents: Sequence[Content]) -> bytes:
    """A client's request with all tensors as JSON numbers or text.

    Raises:
        WireError: if JSON cannot carry one of them.
    """
    described = []
    for content in contents:
        values: list[Any] | msgspec.Raw
        if content.datatype == "BYTES":
            try:
                values = [each.decode() for each in content.array.ravel().tolist()]
            except UnicodeDecodeError as error:
                raise WireError(
                    f"the input {content.name!r} cannot be sent as JSON", "its bytes are no text", "send raw tensors"
                ) from error
        else:
            values = _numbers(content.array.ravel())
        described.append(
            {
                "name": content.name,
                "shape": list(content.array.shape),
                "datatype": content.datatype,
                "data": values,
            }
        )
    return msgspec.json.encode({"inputs": described})


def encode_request(signature: Signature, inputs: Mapping[str, NDArray[Any]]) -> tuple[int, bytes]:
    """`encode_tensors` for a bundle's own model.

    Args:
        signature: of the model.
        inputs: name -> array of shape `(rows, *shape)`.
    """
    return encode_tensors(_contents(signature, inputs))


def encode_json_request(signature: Signature, inputs: Mapping[str, NDArray[Any]]) -> bytes:
    """`encode_json_tensors` for a bundle's own model."""
    return encode_json_tensors(_contents(signature, inputs))


def _contents(signature: Signature, inputs: Mapping[str, NDArray[Any]]) -> list[Content]:
    return [Content(spec.name, datatype_of(spec), inputs[spec.name]) for spec in signature.inputs]


def decode_answer(body: bytes, header_length: int | None) -> dict[str, NDArray[Any]]:
    """A client's view of an answer: output name -> array of the shape that the server says.

    Servers of other makes write `null` for optional fields, `NaN` in JSON or `null` in its place, BYTES and BF16.

    Args:
        body: the whole body.
        header_length: the value of `Inference-Header-Content-Length`, None where there is none.

    Raises:
        WireError: if it is not a valid answer.
    """
    end = len(body) if header_length is None else header_length
    try:
        answer = msgspec.convert(json_of(body[:end]), type=_Answer, strict=False)
        outputs: dict[str, NDArray[Any]] = {}
        for entry in answer.outputs:
            if entry.data is not None:
                outputs[entry.name] = array_of_values(entry.datatype, entry.data, entry.shape)
                continue
            size = (entry.parameters or {}).get("binary_data_size")
            if not _is_size(size):
                raise ValueError(f"the output {entry.name!r} has neither data nor binary_data_size")
            if end + size > len(body):
                raise ValueError(f"the output {entry.name!r} ends after the body")
            outputs[entry.name] = array_of_bytes(entry.datatype, body[end : end + size], entry.shape)
            end += size
    except (msgspec.DecodeError, RecursionError, ValueError, TypeError, OverflowError) as error:
        raise WireError(
            "the server's answer is not Open Inference Protocol",
            f"{type(error).__name__}: {error}",
            "check the URL and the server",
        ) from error
    return outputs


def json_of(text: bytes) -> Any:
    """What a server wrote as JSON; many write `NaN` and `Infinity`, which JSON does not have.

    Raises:
        msgspec.DecodeError: if it is none.
        RecursionError: if it is nested too deep.
    """
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        try:
            return json.loads(text)
        except ValueError:
            raise error from None


def array_of_bytes(datatype: str, content: bytes, shape: Sequence[int]) -> NDArray[Any]:
    """A tensor from its raw bytes: BF16 as float32, BYTES as `bytes` objects, a type that is not known as its bytes.

    Raises:
        ValueError: if the bytes do not fill the shape.
    """
    if datatype == "BYTES":
        try:
            elements = _elements(memoryview(content), math.prod(shape))
        except WireError as error:
            raise ValueError(f"{error.what}: {error.why}") from error
        return _objects([bytes(element) for element in elements]).reshape(shape)
    if datatype == "BF16":
        return (np.frombuffer(content, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    if datatype not in _DTYPES:
        return np.frombuffer(content, np.uint8)
    return np.frombuffer(content, dtype_of(datatype).newbyteorder("<")).reshape(shape)


def array_of_values(datatype: str, data: object, shape: Sequence[int]) -> NDArray[Any]:
    """A tensor from JSON or from a message's typed contents, flat or nested; among floats, None is a NaN.

    Raises:
        ValueError, TypeError, OverflowError: if they are not values of this type, or do not fill the shape.
    """
    if datatype in _DTYPES or datatype == "BF16":
        with np.errstate(over="ignore"):
            return np.asarray(data, np.float32 if datatype == "BF16" else dtype_of(datatype)).reshape(shape)
    flat = data
    while isinstance(flat, list) and flat and all(isinstance(each, list) for each in flat):
        flat = list(chain.from_iterable(flat))
    if not isinstance(flat, list):
        raise ValueError("the data is no list")
    return _objects([each.encode() if isinstance(each, str) else each for each in flat]).reshape(shape)


def _objects(elements: Sequence[object]) -> NDArray[Any]:
    return np.fromiter(elements, object, len(elements))


class _Output(msgspec.Struct):
    name: str
    datatype: str
    shape: list[int]
    data: Any = None
    parameters: dict[str, Any] | None = None


class _Answer(msgspec.Struct):
    outputs: list[_Output]


def model_metadata(codec: Codec, platform: str) -> bytes:
    """The answer to GET v2/models/MODEL."""

    def describe(specs: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
        return [{"name": spec.name, "datatype": datatype_of(spec), "shape": [-1, *spec.shape]} for spec in specs]

    return msgspec.json.encode(
        {
            "name": codec.model,
            "versions": [codec.version],
            "platform": platform,
            "inputs": describe(codec.signature.inputs),
            "outputs": describe(codec.signature.outputs),
        }
    )
