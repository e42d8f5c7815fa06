"""The Open Inference Protocol v2 over HTTP, as bytes: no I/O here.

A request's body is a JSON header, then the tensors it does not hold itself as raw little-endian rows; the HTTP field
`Inference-Header-Content-Length` says where the header ends. What a server does at every request is kept cheap: a
header seen before is looked up by its bytes, tensors stay views of the body, and the header of an answer is built
once per shape.

Source: kserve/open-inference-protocol, specification/protocol/inference_rest.md, and its binary data extension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from rushhour.bundle import Signature, TensorSpec
from rushhour.errors import WireError

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


def datatype_of(spec: TensorSpec) -> str:
    """The protocol's name of a tensor's type: `UINT8`, `FP32`, ..."""
    return _DATATYPES[spec.dtype]


class _Input(msgspec.Struct):
    name: str
    datatype: str
    shape: list[int]
    data: Any = None
    parameters: dict[str, Any] = {}


class _Output(msgspec.Struct):
    name: str
    parameters: dict[str, Any] = {}


class _Header(msgspec.Struct):
    inputs: list[_Input]
    outputs: list[_Output] = []
    id: str = ""
    parameters: dict[str, Any] = {}


_decode_header = msgspec.json.Decoder(_Header).decode


class Wanted(msgspec.Struct, frozen=True):
    """What an answer is to hold, and how: the same for all requests with the same header.

    Attributes:
        id: echoed if not empty.
        outputs: positions in the signature's outputs, in the order of the answer.
        binary: for each of them, raw bytes behind the header or numbers in the JSON.
        timeout_s: how long the caller is willing to wait; None where it does not say.
        priority: 1 is the highest, 0 where the caller does not say.
    """

    id: str
    outputs: tuple[int, ...]
    binary: tuple[bool, ...]
    timeout_s: float | None = None
    priority: int = 0


class InferRequest:
    """A decoded request.

    Attributes:
        rows: samples in it, at least 1.
        tensors: one view of `rows * row_bytes` bytes for each input, in the signature's order.
        wanted: what the answer is to hold.
    """

    __slots__ = ("rows", "tensors", "wanted")

    def __init__(self, rows: int, tensors: tuple[memoryview, ...], wanted: Wanted) -> None:
        self.rows = rows
        self.tensors = tensors
        self.wanted = wanted


class _Layout:
    """Where the tensors of a request lie behind its header, if its header says so for all of them."""

    __slots__ = ("rows", "slices", "total", "wanted")

    def __init__(self, rows: int, slices: tuple[tuple[int, int], ...], total: int, wanted: Wanted) -> None:
        self.rows = rows
        self.slices = slices
        self.total = total
        self.wanted = wanted


class Codec:
    """The server's side for one model: requests in, answers out.

    Args:
        model: the model's name, as answers repeat it.
        signature: what the model takes and gives.
        version: the model's version, as answers repeat it.
        max_rows: samples in one request, at most.
    """

    def __init__(self, model: str, signature: Signature, version: str = "1", max_rows: int = 4096) -> None:
        self.model = model
        self.version = version
        self.signature = signature
        self.max_rows = max_rows
        self._inputs = {spec.name: position for position, spec in enumerate(signature.inputs)}
        self._outputs = {spec.name: position for position, spec in enumerate(signature.outputs)}
        self._layouts: dict[bytes, _Layout] = {}
        self._answer_headers: dict[tuple[Wanted, int], bytes] = {}

    def decode(self, body: bytes, header_length: int | None) -> InferRequest:
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
        header = body[:header_length]
        layout = self._layouts.get(header)
        if layout is None:
            return self._decode_new(header, body, header_length)
        if len(body) - header_length != layout.total:
            raise _wrong_length(layout.total, len(body) - header_length)
        view = memoryview(body)
        tensors = tuple([view[header_length + start : header_length + stop] for start, stop in layout.slices])
        return InferRequest(layout.rows, tensors, layout.wanted)

    def encode(self, wanted: Wanted, rows: int, outputs: Sequence[memoryview]) -> tuple[int | None, list[bytes]]:
        """Write an answer.

        Args:
            wanted: of the request.
            rows: samples in the answer.
            outputs: the raw rows of each of the signature's outputs, in its order.

        Returns:
            The length of the JSON header where raw bytes follow it (for `Inference-Header-Content-Length`), else
            None; and the parts of the body in order.
        """
        if not all(wanted.binary):
            return self._encode_json(wanted, rows, outputs)
        key = (wanted, rows)
        header = self._answer_headers.get(key)
        if header is None:
            described = [
                self._describe(position, rows)
                | {"parameters": {"binary_data_size": rows * self.signature.outputs[position].row_bytes}}
                for position in wanted.outputs
            ]
            header = self._answer(wanted, described)
            if not wanted.id and len(self._answer_headers) < _MAX_CACHED_HEADERS:
                self._answer_headers[key] = header
        return len(header), [header, *[bytes(outputs[position]) for position in wanted.outputs]]

    def _encode_json(self, wanted: Wanted, rows: int, outputs: Sequence[memoryview]) -> tuple[int | None, list[bytes]]:
        described, blobs = [], []
        for position, binary in zip(wanted.outputs, wanted.binary, strict=True):
            entry, spec = self._describe(position, rows), self.signature.outputs[position]
            if binary:
                blobs.append(bytes(outputs[position]))
                entry["parameters"] = {"binary_data_size": len(blobs[-1])}
            else:
                if spec.dtype == "float16":
                    raise WireError(f"the output {spec.name!r} is FP16", "JSON cannot carry it", "ask for binary data")
                entry["data"] = np.frombuffer(outputs[position], dtype=spec.dtype).tolist()
            described.append(entry)
        header = self._answer(wanted, described)
        return (len(header) if blobs else None), [header, *blobs]

    def _answer(self, wanted: Wanted, described: list[dict[str, Any]]) -> bytes:
        answer: dict[str, Any] = {"model_name": self.model, "model_version": self.version}
        if wanted.id:
            answer["id"] = wanted.id
        return msgspec.json.encode(answer | {"outputs": described})

    def _describe(self, position: int, rows: int) -> dict[str, Any]:
        spec = self.signature.outputs[position]
        return {"name": spec.name, "datatype": datatype_of(spec), "shape": [rows, *spec.shape]}

    def _raw(self, body: bytes) -> InferRequest:
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

    def _decode_new(self, header: bytes, body: bytes, header_length: int) -> InferRequest:
        try:
            parsed = _decode_header(header)
        except (msgspec.DecodeError, RecursionError) as error:
            raise WireError(
                "the request's JSON cannot be read", str(error), "see the Open Inference Protocol, $inference_request"
            ) from error
        by_position = self._match_inputs(parsed.inputs)
        rows = self._rows_of(by_position)
        wanted = self._wanted(parsed)
        blobs = memoryview(body)[header_length:]
        slices: dict[int, tuple[int, int]] = {}
        from_json: dict[int, memoryview] = {}
        offset = 0
        for entry in parsed.inputs:
            position = self._inputs[entry.name]
            size = rows * self.signature.inputs[position].row_bytes
            stated = entry.parameters.get("binary_data_size")
            if "shared_memory_region" in entry.parameters:
                raise WireError(
                    f"the input {entry.name!r} lies in shared memory", "this server does not open it", status=501
                )
            if (stated is None) == (entry.data is None):
                raise WireError(
                    f"the input {entry.name!r} has {'no data' if stated is None else 'data twice'}",
                    "an input carries either 'data' or the parameter 'binary_data_size'",
                    "send exactly one of them",
                )
            if stated is None:
                from_json[position] = self._from_json(entry, position, size)
                continue
            if not isinstance(stated, int) or isinstance(stated, bool) or stated != size:
                raise WireError(
                    f"the input {entry.name!r} has binary_data_size {stated!r}",
                    f"shape {entry.shape} of {entry.datatype} is {size} bytes",
                    "send the tensor's exact size",
                )
            slices[position] = (offset, offset + size)
            offset += size
        if len(blobs) != offset:
            raise _wrong_length(offset, len(blobs))
        if not from_json and len(header) <= _MAX_CACHED_HEADER_BYTES and not wanted.id:
            if len(self._layouts) >= _MAX_CACHED_HEADERS:
                self._layouts.clear()
            ordered = tuple(slices[position] for position in range(len(slices)))
            self._layouts[header] = _Layout(rows, ordered, offset, wanted)
        tensors = tuple(
            from_json[position] if position in from_json else blobs[slices[position][0] : slices[position][1]]
            for position in range(len(self._inputs))
        )
        return InferRequest(rows, tensors, wanted)

    def _match_inputs(self, inputs: list[_Input]) -> dict[int, _Input]:
        """Position -> input; every input of the model exactly once, with its type and shape."""
        found: dict[int, _Input] = {}
        for entry in inputs:
            position = self._inputs.get(entry.name)
            if position is None or position in found:
                raise WireError(
                    f"the input {entry.name!r} is {'unknown' if position is None else 'there twice'}",
                    f"{self.model} takes {', '.join(self._inputs)}",
                    f"ask GET v2/models/{self.model}",
                )
            spec = self.signature.inputs[position]
            if entry.datatype != datatype_of(spec):
                raise WireError(
                    f"the input {entry.name!r} has datatype {entry.datatype}",
                    f"{self.model} takes {datatype_of(spec)}",
                    "convert it, or send another input",
                )
            if len(entry.shape) != len(spec.shape) + 1 or tuple(entry.shape[1:]) != spec.shape:
                raise WireError(
                    f"the input {entry.name!r} has shape {entry.shape}",
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

    def _rows_of(self, inputs: Mapping[int, _Input]) -> int:
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

    def _from_json(self, entry: _Input, position: int, size: int) -> memoryview:
        spec = self.signature.inputs[position]
        try:
            values = np.asarray(entry.data)
            if values.dtype.kind not in ("biu" if np.dtype(spec.dtype).kind in "iu" else "biuf"):
                raise ValueError(f"found values that are not {datatype_of(spec)}")
            if values.dtype.kind == "b" and spec.dtype != "bool":
                raise ValueError("found true or false among the numbers")
            flat = values.ravel()
            if flat.size != math.prod(entry.shape):
                raise ValueError(f"found {flat.size} values for shape {entry.shape}")
            if np.dtype(spec.dtype).kind in "iu" and flat.size:
                limits = np.iinfo(np.dtype(spec.dtype))
                if int(flat.min()) < limits.min or int(flat.max()) > limits.max:
                    raise ValueError(f"a value lies outside {limits.min}..{limits.max}")
            array = flat.astype(spec.dtype)
        except (ValueError, TypeError, OverflowError) as error:
            raise WireError(
                f"the data of the input {entry.name!r} cannot be read",
                str(error),
                f"send {size // np.dtype(spec.dtype).itemsize} numbers of type {datatype_of(spec)}, flat or nested",
            ) from error
        return memoryview(array.tobytes())

    def _wanted(self, header: _Header) -> Wanted:
        all_binary = header.parameters.get("binary_data_output") is True
        asked = header.outputs or [_Output(name) for name in self._outputs]
        positions, binary = [], []
        for output in asked:
            position = self._outputs.get(output.name)
            if position is None or position in positions:
                raise WireError(
                    f"the output {output.name!r} is {'unknown' if position is None else 'there twice'}",
                    f"{self.model} gives {', '.join(self._outputs)}",
                    f"ask GET v2/models/{self.model}",
                )
            for unsupported in ("classification", "shared_memory_region"):
                if output.parameters.get(unsupported):
                    raise WireError(
                        f"the output {output.name!r} asks for {unsupported}", "this server does not do it", status=501
                    )
            positions.append(position)
            binary.append(output.parameters.get("binary_data", all_binary) is True)
        timeout, priority = header.parameters.get("timeout"), header.parameters.get("priority", 0)
        if timeout is not None and (not isinstance(timeout, int) or isinstance(timeout, bool) or timeout < 0):
            raise WireError(f"the timeout is {timeout!r}", "it is a whole number of microseconds", "send 0 or more")
        if not isinstance(priority, int) or isinstance(priority, bool) or priority < 0:
            raise WireError(f"the priority is {priority!r}", "1 is the highest, larger is lower", "send 0 or more")
        return Wanted(
            id=header.id,
            outputs=tuple(positions),
            binary=tuple(binary),
            timeout_s=timeout / 1e6 if timeout else None,
            priority=priority,
        )


def _wrong_length(expected: int, found: int) -> WireError:
    return WireError(
        f"{found} bytes follow the JSON header", f"its inputs need {expected}", "send the header's tensors, whole"
    )


def encode_request(signature: Signature, inputs: Mapping[str, NDArray[Any]]) -> tuple[int, bytes]:
    """A client's request with binary inputs and binary outputs: the header's length and the body.

    Args:
        signature: of the model.
        inputs: name -> array of shape `(rows, *shape)`.
    """
    described, blobs = [], []
    for spec in signature.inputs:
        blob = np.ascontiguousarray(inputs[spec.name], dtype=np.dtype(spec.dtype).newbyteorder("<")).tobytes()
        described.append(
            {
                "name": spec.name,
                "shape": list(inputs[spec.name].shape),
                "datatype": datatype_of(spec),
                "parameters": {"binary_data_size": len(blob)},
            }
        )
        blobs.append(blob)
    header = msgspec.json.encode({"inputs": described, "parameters": {"binary_data_output": True}})
    return len(header), b"".join([header, *blobs])


def encode_json_request(signature: Signature, inputs: Mapping[str, NDArray[Any]]) -> bytes:
    """A client's request with all tensors as JSON numbers."""
    described = [
        {
            "name": spec.name,
            "shape": list(inputs[spec.name].shape),
            "datatype": datatype_of(spec),
            "data": inputs[spec.name].ravel().tolist(),
        }
        for spec in signature.inputs
    ]
    return msgspec.json.encode({"inputs": described})


def decode_answer(body: bytes, header_length: int | None) -> dict[str, NDArray[Any]]:
    """A client's view of an answer: output name -> array of shape `(rows, *shape)`.

    Args:
        body: the whole body.
        header_length: the value of `Inference-Header-Content-Length`, None where there is none.

    Raises:
        WireError: if it is not a valid answer.
    """
    end = len(body) if header_length is None else header_length
    try:
        answer = msgspec.json.decode(body[:end], type=_Answer)
        outputs: dict[str, NDArray[Any]] = {}
        for entry in answer.outputs:
            dtype = np.dtype(_DTYPES[entry.datatype])
            if entry.data is not None:
                outputs[entry.name] = np.asarray(entry.data, dtype=dtype).reshape(entry.shape)
                continue
            size = int(entry.parameters["binary_data_size"])
            outputs[entry.name] = np.frombuffer(body[end : end + size], dtype=dtype).reshape(entry.shape)
            end += size
    except (msgspec.DecodeError, KeyError, ValueError, TypeError) as error:
        raise WireError(
            "the server's answer is not Open Inference Protocol",
            f"{type(error).__name__}: {error}",
            "check the URL and the server",
        ) from error
    return outputs


class _Answer(msgspec.Struct):
    outputs: list[_Input]


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


def read_metadata(body: bytes) -> tuple[str, Signature]:
    """A client's view of GET v2/models/MODEL: the model's name and signature.

    Raises:
        WireError: if it is not valid metadata, or a tensor has a shape or type that no sample can be made for.
    """
    try:
        metadata = msgspec.json.decode(body, type=_Metadata)
        inputs = tuple(_spec(entry) for entry in metadata.inputs)
        return metadata.name, Signature(inputs=inputs, outputs=tuple(_spec(entry) for entry in metadata.outputs))
    except (msgspec.DecodeError, KeyError, ValueError, TypeError) as error:
        raise WireError(
            "the model's metadata cannot be used", f"{type(error).__name__}: {error}", "check the URL and the server"
        ) from error


class _Metadata(msgspec.Struct):
    name: str
    inputs: list[_Input]
    outputs: list[_Input]


def _spec(entry: _Input) -> TensorSpec:
    if len(entry.shape) < 1 or any(size < 1 for size in entry.shape[1:]):
        raise ValueError(f"tensor {entry.name!r} has shape {entry.shape}")
    return msgspec.convert(
        {"name": entry.name, "dtype": _DTYPES[entry.datatype], "shape": entry.shape[1:]}, type=TensorSpec
    )
