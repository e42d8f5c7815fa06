"""The protocol's gRPC messages as bytes, where it counts: inference requests in, answers out. No I/O.

A request is taken apart at its top level without being parsed: its tensors stay views of the message, and what is left
is its header, which is parsed once and then looked up by its bytes, as over HTTP. The id is left out of it, because
clients number their requests. An answer is the header of its kind, made once, and the raw outputs behind it.

Source: kserve/open-inference-protocol, specification/protocol/inference_grpc.md; protobuf's encoding,
https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from google.protobuf.message import DecodeError

from rushhour.errors import WireError
from rushhour.protocol import message
from rushhour.wire import Codec, InferRequest, InputHeader, Layout, OutputHeader, RequestHeader

_Request = message("inference.ModelInferRequest")
_Response = message("inference.ModelInferResponse")
_StreamResponse = message("inference.ModelStreamInferResponse")

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_ID_IN = _ID_OUT = 3 << 3 | _BYTES
_RAW_IN, _RAW_OUT = 7 << 3 | _BYTES, 6 << 3 | _BYTES
_INFER_RESPONSE = 2 << 3 | _BYTES

_MAX_FIELDS = 4096
_MAX_CACHED_HEADERS = 256
_MAX_CACHED_HEADER_BYTES = 4096

_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


class Asked:
    """A decoded request, and what its answer needs.

    Attributes:
        request: for the cell.
        id: as the client gave it; echoed.
        header: of its kind.
    """

    __slots__ = ("header", "id", "request")

    def __init__(self, request: InferRequest, id: bytes, header: _Header) -> None:
        self.request = request
        self.id = id
        self.header = header


class _Header:
    """What is known of all requests with the same header.

    Attributes:
        sizes: of the raw tensors, in the order in which they come.
        straight: these are all there are, in the signature's order.
        answer: for each output of an answer its position, and the bytes before its raw content; empty where an answer
            is more than that.
    """

    __slots__ = ("answer", "layout", "sizes", "straight")

    def __init__(self, layout: Layout, answer: list[tuple[bytes, int]]) -> None:
        self.layout = layout
        self.sizes = [stop - start for start, stop in layout.slices.values()]
        self.straight = bool(layout.ordered) and list(layout.slices) == list(range(len(layout.slices)))
        self.answer = answer


class GrpcCodec:
    """The server's side for one model.

    Args:
        codec: of the model: what its requests and answers mean.
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self._headers: dict[bytes, _Header] = {}

    def decode(self, message: bytes) -> Asked:
        """Read a `ModelInferRequest`.

        Raises:
            WireError: if it is not a valid request for this model.
        """
        head, identity, raw = take_apart(message)
        header = self._headers.get(head)
        if header is None:
            header = self._read(head, raw)
        elif list(map(len, raw)) != header.sizes:
            raise WireError(
                f"raw_input_contents holds {', '.join(str(len(each)) for each in raw) or 'no'} bytes",
                f"the inputs need {', '.join(map(str, header.sizes)) or 'none'}",
                "send one entry for each input that is not elsewhere, whole",
            )
        layout = header.layout
        if header.straight:
            return Asked(InferRequest(layout.rows, tuple(raw), layout.wanted), identity, header)
        return Asked(self.codec.gather(layout, raw), identity, header)

    def encode(self, asked: Asked, outputs: Sequence[memoryview]) -> bytes:
        """Write a `ModelInferResponse`.

        Args:
            asked: the request.
            outputs: the raw rows of each of the signature's outputs, in its order.

        Raises:
            WireError: if an output cannot be written to its shared memory.
        """
        parts: list[bytes | memoryview] = []
        for before, position in asked.header.answer:
            parts.append(before)
            parts.append(outputs[position])
        if not parts:
            parts.append(self._answer(asked.header.layout, outputs))
        if asked.id:
            parts.append(_tagged(_ID_OUT, len(asked.id)))
            parts.append(asked.id)
        return b"".join(parts)

    def _read(self, head: bytes, raw: list[memoryview]) -> _Header:
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
        layout = self.codec.arrange(_described(parsed, raw))
        wanted = layout.wanted
        answer: list[tuple[bytes, int]] = []
        if not wanted.top and not wanted.places:
            before = self._answer_header(layout)
            for position in wanted.outputs:
                size = layout.rows * self.codec.signature.outputs[position].row_bytes
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
            name, datatype, shape = self.codec.describe(position, layout.rows)
            response.outputs.add(name=name, datatype=datatype, shape=shape)
        return bytes(response.SerializeToString())

    def _answer(self, layout: Layout, outputs: Sequence[memoryview]) -> bytes:
        response = _Response(model_name=self.codec.model, model_version=self.codec.version)
        for output in self.codec.outputs(layout.wanted, layout.rows, outputs):
            response.outputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
            response.raw_output_contents.append(b"" if output.raw is None else bytes(output.raw))
        return bytes(response.SerializeToString())


def stream_answer(response: bytes) -> bytes:
    """A `ModelStreamInferResponse` that holds a `ModelInferResponse`."""
    return _tagged(_INFER_RESPONSE, len(response)) + response


def stream_error(text: str, identity: bytes) -> bytes:
    """A `ModelStreamInferResponse` that says what went wrong with the request of this id."""
    response = _Response(id=identity.decode(errors="replace"))
    return bytes(_StreamResponse(error_message=text, infer_response=response).SerializeToString())


def identity_of(message: bytes) -> bytes:
    """The id of a `ModelInferRequest`, even of one that is otherwise not valid; empty where none can be found."""
    try:
        return take_apart(message)[1]
    except WireError:
        return b""


def take_apart(message: bytes) -> tuple[bytes, bytes, list[memoryview]]:
    """The top level of a `ModelInferRequest`: all fields but the id and the raw tensors, the id, the raw tensors.

    Raises:
        WireError: if it is no protobuf message.
    """
    view = memoryview(message)
    raw: list[memoryview] = []
    identity = b""
    rest: list[bytes] = []
    at = kept = fields = 0
    end = len(message)
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
                        rest.append(message[kept:start])
                    kept = stop
                    if tag == _RAW_IN:
                        raw.append(view[at:stop])
                    else:
                        identity = message[at:stop]
                at = stop
            elif kind == _VARINT:
                _, at = _number(message, at)
            elif kind == _FIXED64:
                at += 8
            elif kind == _FIXED32:
                at += 4
            else:
                raise _unreadable(f"a field is of the unknown kind {kind}")
    except IndexError:
        at = end + 1
    if at > end:
        raise _unreadable("it ends too early")
    if identity:
        _check_text(identity)
    if kept < end:
        rest.append(message[kept:])
    return (rest[0] if len(rest) == 1 else b"".join(rest)), identity, raw


def _number(message: bytes, at: int) -> tuple[int, int]:
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
    """The beginning of a length-delimited field."""
    encoded = [tag]
    while size > 0x7F:
        encoded.append(size & 0x7F | 0x80)
        size >>= 7
    encoded.append(size)
    return bytes(encoded)


def _check_text(identity: bytes) -> None:
    try:
        identity.decode()
    except UnicodeDecodeError as error:
        raise _unreadable("its id is not UTF-8") from error


def _unreadable(why: str) -> WireError:
    return WireError("the message cannot be read", why, "send a ModelInferRequest")


def _described(request: Any, raw: list[memoryview]) -> RequestHeader:
    """What a parsed request says of itself, in the words that both faces share."""
    inputs, given = [], iter(raw)
    for tensor in request.inputs:
        parameters = _plain(tensor.parameters)
        parameters.pop("binary_data_size", None)
        entry = InputHeader(tensor.name, tensor.datatype, list(tensor.shape), parameters=parameters)
        if tensor.HasField("contents"):
            field = _CONTENTS.get(tensor.datatype)
            if field is None:
                raise WireError(
                    f"the input {tensor.name!r} has contents of {tensor.datatype[:20]}",
                    f"contents carry {', '.join(_CONTENTS)}",
                    "send it in raw_input_contents",
                )
            entry.data = list(getattr(tensor.contents, field))
        elif "shared_memory_region" not in parameters and (content := next(given, None)) is not None:
            parameters["binary_data_size"] = len(content)
        inputs.append(entry)
    if next(given, None) is not None:
        raise WireError(
            f"raw_input_contents has {len(raw)} entries",
            "there is one for each input that has no contents and lies in no shared memory",
            "send each tensor once",
        )
    outputs = [OutputHeader(output.name, _plain(output.parameters)) for output in request.outputs]
    return RequestHeader(inputs, outputs, parameters=_plain(request.parameters))


def _plain(parameters: Any) -> dict[str, Any]:
    chosen = ((name, value, value.WhichOneof("parameter_choice")) for name, value in parameters.items())
    return {name: getattr(value, choice) for name, value, choice in chosen if choice is not None}
