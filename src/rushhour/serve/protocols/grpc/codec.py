"""`GrpcCodec`: inference requests and answers as gRPC messages. No I/O.

A request is split at its top level without being parsed: its tensors stay views of the message, and the rest is its
header, which is parsed once and then looked up by its bytes, as over HTTP. The id is not part of the header, because
clients number their requests. Typed contents are part of it. If the header is large, they are cut out before it is
parsed, and read in pieces (`rushhour.wire.pieces`). An answer is the header of its kind, built once, and the raw
outputs after it.

Source: kserve/open-inference-protocol, specification/protocol/inference_grpc.md; protobuf's encoding,
https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from google.protobuf.message import DecodeError

from rushhour.errors import WireError
from rushhour.protocol import CONTENTS, message
from rushhour.wire import Codec, InferRequest, InputHeader, Layout, OutputHeader, RequestHeader
from rushhour.wire.pieces import WHOLE_BYTES, too_long
from rushhour.wire.protobuf_pieces import Packed, Texts

_Request = message("inference.ModelInferRequest")
_Response = message("inference.ModelInferResponse")
_StreamResponse = message("inference.ModelStreamInferResponse")

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_ID_IN = _ID_OUT = 3 << 3 | _BYTES
_MODEL_IN = 1 << 3 | _BYTES
_RAW_IN, _RAW_OUT = 7 << 3 | _BYTES, 6 << 3 | _BYTES
_INFER_RESPONSE = 2 << 3 | _BYTES
_MODEL_FIRST = bytes([_MODEL_IN])
_INPUT, _CONTENTS_IN = 5 << 3 | _BYTES, 5 << 3 | _BYTES
"""Fields of a request, and of one of its inputs."""

_MAX_FIELDS = 4096
_LEFT_BYTES = WHOLE_BYTES
"""Of a message's header, without the contents that were cut out."""
_MAX_CACHED_HEADERS = 256
_MAX_CACHED_HEADER_BYTES = 4096

_CONTENT_FIELDS = _Request().inputs.add().contents.DESCRIPTOR.fields_by_name
_NUMBERS = {
    "bool_contents": "bool",
    "int_contents": "int32",
    "int64_contents": "int64",
    "uint_contents": "uint32",
    "uint64_contents": "uint64",
    "fp32_contents": "float32",
    "fp64_contents": "float64",
}
_KINDS = {"float32": _FIXED32, "float64": _FIXED64}
_TAGS = {
    field.number << 3 | kind
    for name, field in _CONTENT_FIELDS.items()
    for kind in {_BYTES, _KINDS.get(_NUMBERS[name], _VARINT) if name in _NUMBERS else _BYTES}
}
"""Of numbers, packed or single, and of texts."""


class GrpcRequest:
    """A decoded request, and what its answer needs.

    Attributes:
        request: for the cell.
        id: as the client sent it; echoed.
        header: of its kind.
    """

    __slots__ = ("header", "id", "request")

    def __init__(self, request: InferRequest, id: bytes, header: _Header) -> None:
        self.request = request
        self.id = id
        self.header = header


class _Header:
    """What requests with the same header have in common.

    Attributes:
        sizes: of the raw tensors, in the order in which they follow.
        only_raw: whether all tensors are raw, in the signature's order.
        answer: for each output of an answer the bytes before its raw content, and its position; empty where an answer
            needs more than that.
    """

    __slots__ = ("answer", "layout", "only_raw", "sizes")

    def __init__(self, layout: Layout, answer: list[tuple[bytes, int]]) -> None:
        self.layout = layout
        self.sizes = [stop - start for start, stop in layout.slices.values()]
        self.only_raw = bool(layout.ordered) and list(layout.slices) == list(range(len(layout.slices)))
        self.answer = answer


class GrpcCodec:
    """The server's side for one model.

    Args:
        codec: of the model: what its requests and answers mean.
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self._headers: dict[bytes, _Header] = {}
        self._variants: dict[str, bytes] = {}

    @staticmethod
    def is_large(message: bytes) -> bool:
        """Whether reading a message takes long: then it must not be done on the event loop."""
        try:
            return len(message) > WHOLE_BYTES and sum(map(len, split_message(message)[0])) > WHOLE_BYTES
        except WireError:
            return False

    def is_large_answer(self, request: GrpcRequest) -> bool:
        """Whether writing the answer takes long, likewise."""
        wanted = request.header.layout.wanted
        given = request.request.wanted
        if given.shapes:
            return any(math.prod(shape) > WHOLE_BYTES for shape in given.shapes)
        return bool(wanted.top or wanted.places) and self.codec.is_large_answer(wanted, request.request.rows)

    def decode(self, message: bytes) -> GrpcRequest:
        """Read a `ModelInferRequest`.

        Raises:
            WireError: if it is not a valid request for this model.
        """
        rest, identity, raw = split_message(message)
        if sum(map(len, rest)) > WHOLE_BYTES:
            cut = self._read(*_cut(rest), raw)
            return GrpcRequest(self.codec.gather(cut.layout, raw), identity, cut)
        head = bytes(rest[0]) if len(rest) == 1 else b"".join(rest)
        header = self._headers.get(head)
        if header is None:
            header = self._read(head, (), raw)
        elif list(map(len, raw)) != header.sizes:
            raise WireError(
                f"raw_input_contents holds {', '.join(str(len(each)) for each in raw) or 'no'} bytes",
                f"the inputs need {', '.join(map(str, header.sizes)) or 'none'}",
                "send one entry for each input without contents or shared memory, complete",
            )
        layout = header.layout
        if header.only_raw:
            return GrpcRequest(InferRequest(layout.rows, tuple(raw), layout.wanted), identity, header)
        return GrpcRequest(self.codec.gather(layout, raw), identity, header)

    def encode(self, request: GrpcRequest, outputs: Sequence[memoryview], variant: str = "") -> bytes:
        """Write a `ModelInferResponse`.

        Args:
            request: that is answered.
            outputs: the raw rows of each of the signature's outputs, in its order.
            variant: that computed it, for the answer's parameters; empty for none.

        Raises:
            WireError: if an output cannot be written to its shared memory.
        """
        parts: list[bytes | memoryview] = []
        if not request.request.wanted.shapes:
            for before, position in request.header.answer:
                parts.append(before)
                parts.append(outputs[position])
        if not parts:
            parts.append(self._answer(request.request, outputs))
        if request.id:
            parts.append(_tagged(_ID_OUT, len(request.id)))
            parts.append(request.id)
        if variant:
            parts.append(self._variants.get(variant) or self._as_parameter(variant))
        return b"".join(parts)

    def _as_parameter(self, variant: str) -> bytes:
        if len(self._variants) >= _MAX_CACHED_HEADERS:
            self._variants.clear()
        parameter = self._variants[variant] = parameter_of("variant", variant)
        return parameter

    def _read(self, head: bytes, contents: Sequence[_Contents | None], raw: list[memoryview]) -> _Header:
        try:
            parsed = _Request.FromString(head)
        except DecodeError as error:
            raise _unreadable(str(error)) from error
        if parsed.model_name != self.codec.model or parsed.model_version not in ("", self.codec.version):
            raise WireError(
                f"there is no model {parsed.model_name[:100]!r} in version {parsed.model_version[:40]!r}",
                "",
                f"the model is {self.codec.model}, its version {self.codec.version}",
                status=404,
            )
        layout = self.codec.arrange(_described(parsed, raw, contents))
        wanted = layout.wanted
        answer: list[tuple[bytes, int]] = []
        has_size = not layout.encoded or not self.codec.signature.dimensions  # else texts have none yet
        if not wanted.top and not wanted.places and has_size:
            before = self._answer_header(layout)
            for position in wanted.outputs:
                size = self.codec.output_bytes(position, layout.rows, wanted.sizes)
                answer.append((before + _tagged(_RAW_OUT, size), position))
                before = b""
        header = _Header(layout, answer)
        if not layout.inline and not layout.encoded and len(head) <= _MAX_CACHED_HEADER_BYTES:
            if len(self._headers) >= _MAX_CACHED_HEADERS:
                self._headers.clear()
            self._headers[head] = header
        return header

    def _answer_header(self, layout: Layout) -> bytes:
        response = _Response(model_name=self.codec.model, model_version=self.codec.version)
        for position in layout.wanted.outputs:
            name, datatype, shape = self.codec.describe(position, layout.rows, layout.wanted.sizes)
            response.outputs.add(name=name, datatype=datatype, shape=shape)
        return bytes(response.SerializeToString())

    def _answer(self, request: InferRequest, outputs: Sequence[memoryview]) -> bytes:
        response = _Response(model_name=self.codec.model, model_version=self.codec.version)
        for output in self.codec.outputs(request.wanted, request.rows, outputs):  # few values, or on a thread
            response.outputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
            response.raw_output_contents.append(b"" if output.raw is None else bytes(output.raw))
        return bytes(response.SerializeToString())


def parameter_of(name: str, text: str) -> bytes:
    """A parameter of an answer: appended to a `ModelInferResponse`, it becomes a part of it."""
    response = _Response()
    response.parameters[name].string_param = text
    return bytes(response.SerializeToString())


def stream_answer(response: bytes) -> bytes:
    """A `ModelStreamInferResponse` that holds a `ModelInferResponse`."""
    return _tagged(_INFER_RESPONSE, len(response)) + response


def stream_error(text: str, identity: bytes) -> bytes:
    """A `ModelStreamInferResponse` with the error of the request of this id."""
    response = _Response(id=identity.decode(errors="replace"))
    return bytes(_StreamResponse(error_message=text, infer_response=response).SerializeToString())


def identity_of(message: bytes) -> bytes:
    """The id of a `ModelInferRequest`, even of an invalid one; empty where none can be found."""
    try:
        return split_message(message)[1]
    except WireError:
        return b""


def model_of(message: bytes) -> str:
    """The model that a `ModelInferRequest` names. Clients write the name first, but need not.

    Raises:
        WireError: if the message cannot be read.
    """
    name = b""
    if message[:1] == _MODEL_FIRST and len(message) > 1 and message[1] < 0x80:
        name = bytes(message[2 : 2 + message[1]])
    else:
        for tag, _, at, end in _fields(memoryview(message), _MAX_FIELDS):
            if tag == _MODEL_IN:
                name = bytes(message[at:end])
    _check_text(name, "model's name")
    return name.decode()


def split_message(message: bytes) -> tuple[list[Any], bytes, list[memoryview]]:
    """Split a `ModelInferRequest`: all fields except id and raw tensors; the id; the raw tensors.

    The first are parts of one or more fields, bytes or views.

    Raises:
        WireError: if it is not a protobuf message, or its id is too long.
    """
    view = memoryview(message)
    raw: list[memoryview] = []
    identity = b""
    rest: list[Any] = []
    at = kept = fields = 0
    end = len(message)
    source: bytes | memoryview = message if end <= WHOLE_BYTES else view
    try:
        while at < end:
            fields += 1
            if fields > _MAX_FIELDS:
                raise _unreadable(f"it has more than {_MAX_FIELDS} fields")
            start = at
            tag, at = _number(message, at)
            kind = tag & 7
            if kind == _BYTES:
                size, at = _number(message, at)
                stop = at + size
                if tag in (_RAW_IN, _ID_IN):
                    if kept < start:
                        rest.append(source[kept:start])
                    kept = stop
                    if tag == _RAW_IN:
                        raw.append(view[at:stop])
                    elif size > _LEFT_BYTES:
                        raise too_long("the id")
                    else:
                        identity = bytes(message[at:stop])
                at = stop
            elif kind == _VARINT:
                _, at = _number(message, at)
            elif kind == _FIXED64:
                at += 8
            elif kind == _FIXED32:
                at += 4
            else:
                raise _unreadable(f"a field has the unknown kind {kind}")
    except IndexError:
        at = end + 1
    if at > end:
        raise _unreadable("it ends too early")
    if identity:
        _check_text(identity)
    if kept < end:
        rest.append(source[kept:])
    return rest, identity, raw


def _fields(message: memoryview, most: int) -> Iterator[tuple[int, int, int, int]]:
    """The fields of a message: the tag, where field and content begin, and where both end."""
    at = found = 0
    end = len(message)
    while at < end:
        found += 1
        if found > most:
            raise _unreadable(f"a part of it has more than {most} fields")
        start = at
        try:
            tag, at = _number(message, at)
            content, kind = at, tag & 7
            if tag < 8:
                raise _unreadable("a field has the number 0")
            if kind == _BYTES:
                size, content = _number(message, at)
                at = content + size
            elif kind == _VARINT:
                _, at = _number(message, at)
            elif kind in (_FIXED32, _FIXED64):
                at += 8 if kind == _FIXED64 else 4
            else:
                raise _unreadable(f"a field has the unknown kind {kind}")
        except IndexError:
            at = end + 1
        if at > end:
            raise _unreadable("it ends too early")
        yield tag, start, content, at


class _Contents:
    """The typed contents of a tensor, cut out of a message: views of each field's values."""

    def __init__(self) -> None:
        self._spans: dict[int, list[memoryview]] = {}

    def add(self, contents: memoryview) -> None:
        """Add a part of them: a message may hold several."""
        for tag, _, start, stop in _fields(contents, _MAX_FIELDS):
            if tag in _TAGS:
                self._spans.setdefault(tag >> 3, []).append(contents[start:stop])

    def of(self, field: str) -> Packed | Texts:
        """The values of one field."""
        spans = self._spans.get(_CONTENT_FIELDS[field].number, [])
        return Packed(_NUMBERS[field], spans) if field in _NUMBERS else Texts(spans)


def _cut(parts: Sequence[bytes | memoryview]) -> tuple[bytes, list[_Contents | None]]:
    """A request without the contents of its inputs, and the contents: None for an input that has none."""
    left: list[bytes | memoryview] = []
    found: list[_Contents | None] = []
    for each in parts:
        part = memoryview(each)
        for tag, start, content, stop in _fields(part, _MAX_FIELDS):
            if tag != _INPUT:
                left.append(part[start:stop])
                continue
            tensor, described = part[content:stop], []
            found.append(None)
            for inner, begin, inside, end in _fields(tensor, _MAX_FIELDS):
                if inner != _CONTENTS_IN:
                    described.append(tensor[begin:end])
                else:
                    contents = found[-1] = found[-1] or _Contents()
                    contents.add(tensor[inside:end])
            left += [_tagged(_INPUT, sum(map(len, described))), *described]
    if sum(map(len, left)) > _LEFT_BYTES:
        raise too_long("the message")
    return b"".join(left), found


def _number(message: bytes | memoryview, at: int) -> tuple[int, int]:
    """A varint, and where it ends."""
    byte = message[at]
    if byte < 0x80:
        return byte, at + 1
    number, shift = byte & 0x7F, 7
    while True:
        at += 1
        byte = message[at]
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at + 1
        shift += 7
        if shift > 63:
            raise _unreadable("a number is too long")


def _tagged(tag: int, size: int) -> bytes:
    """The tag and the length of a length-delimited field."""
    encoded = [tag]
    while size > 0x7F:
        encoded.append(size & 0x7F | 0x80)
        size >>= 7
    encoded.append(size)
    return bytes(encoded)


def _check_text(text: bytes, what: str = "id") -> None:
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise _unreadable(f"its {what} is not UTF-8") from error


def _unreadable(why: str) -> WireError:
    return WireError("the message cannot be read", why, "send a valid ModelInferRequest")


def _described(request: Any, raw: list[memoryview], contents: Sequence[_Contents | None]) -> RequestHeader:
    """The header of a parsed request, as HTTP and gRPC share it.

    Args:
        request: without the contents that were cut out.
        raw: its raw tensors.
        contents: for each input the contents that were cut out; empty where nothing was.
    """
    inputs, given = [], iter(raw)
    for number, tensor in enumerate(request.inputs):
        cut = contents[number] if contents else None
        parameters = _plain(tensor.parameters)
        parameters.pop("binary_data_size", None)
        entry = InputHeader(tensor.name, tensor.datatype, list(tensor.shape), parameters=parameters)
        if cut is not None or tensor.HasField("contents"):
            field = CONTENTS.get(tensor.datatype)
            if field is None:
                raise WireError(
                    f"the input {tensor.name!r} has contents of {tensor.datatype[:20]}",
                    f"contents carry {', '.join(CONTENTS)}",
                    "send it in raw_input_contents",
                )
            entry.data = list(getattr(tensor.contents, field)) if cut is None else cut.of(field)
        elif "shared_memory_region" not in parameters and (content := next(given, None)) is not None:
            parameters["binary_data_size"] = len(content)
        inputs.append(entry)
    if next(given, None) is not None:
        raise WireError(
            f"raw_input_contents has {len(raw)} entries",
            "there must be one for each input without contents or shared memory",
            "send each tensor once",
        )
    outputs = [OutputHeader(output.name, _plain(output.parameters)) for output in request.outputs]
    return RequestHeader(inputs, outputs, parameters=_plain(request.parameters))


def _plain(parameters: Any) -> dict[str, Any]:
    chosen = ((name, value, value.WhichOneof("parameter_choice")) for name, value in parameters.items())
    return {name: getattr(value, choice) for name, value, choice in chosen if choice is not None}
