"""The client's side: requests for a server of any make, and its answers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from rushhour.bundle import Signature
from rushhour.errors import WireError
from rushhour.wire.datatypes import DTYPES, datatype_of, dtype_of
from rushhour.wire.elements import elements_of
from rushhour.wire.layouts import is_size
from rushhour.wire.values import json_numbers


class Content(NamedTuple):
    """A tensor for a server of any make.

    Attributes:
        datatype: the protocol's name of its type, `BYTES` and `BF16` among them.
        array: its values; for BYTES `bytes` objects, for BF16 numbers of any float type.
    """

    name: str
    datatype: str
    array: NDArray[Any]

    @property
    def raw(self) -> bytes:
        """Its values as they are sent after a header, or over gRPC."""
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
        WireError: if JSON cannot hold one of them.
    """
    described = []
    for content in contents:
        values: list[Any] | msgspec.Raw
        if content.datatype == "BYTES":
            try:
                values = [each.decode() for each in content.array.ravel().tolist()]
            except UnicodeDecodeError as error:
                raise WireError(
                    f"the input {content.name!r} cannot be sent as JSON", "its bytes are not text", "send raw tensors"
                ) from error
        else:
            values = json_numbers(content.array.ravel())
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
    """Read an answer: output name -> array of the shape that the server declares.

    Servers of other makes write `null` for optional fields, `NaN` in JSON or `null` instead, BYTES and BF16.

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
            if not is_size(size):
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
    """Read JSON from a server; many write `NaN` and `Infinity`, which JSON does not have.

    Raises:
        msgspec.DecodeError: if it is not JSON.
        RecursionError: if it is nested too deeply.
    """
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        try:
            return json.loads(text)
        except ValueError:
            raise msgspec.DecodeError(str(error)) from None


def array_of_bytes(datatype: str, content: bytes, shape: Sequence[int]) -> NDArray[Any]:
    """A tensor from its raw bytes: BF16 as float32, BYTES as `bytes` objects, an unknown type as uint8.

    Raises:
        ValueError: if the bytes do not fill the shape.
    """
    if datatype == "BYTES":
        try:
            elements = elements_of(memoryview(content), math.prod(shape))
        except WireError as error:
            raise ValueError(f"{error.what}: {error.why}") from error
        return _objects([bytes(element) for element in elements]).reshape(shape)
    if datatype == "BF16":
        return (np.frombuffer(content, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    if datatype not in DTYPES:
        return np.frombuffer(content, np.uint8)
    return np.frombuffer(content, dtype_of(datatype).newbyteorder("<")).reshape(shape)


def array_of_values(datatype: str, data: object, shape: Sequence[int]) -> NDArray[Any]:
    """A tensor from JSON or from a message's typed contents, flat or nested; among floats, None is NaN.

    Raises:
        ValueError, TypeError, OverflowError: if they are not values of this type, or do not fill the shape.
    """
    if datatype in DTYPES or datatype == "BF16":
        with np.errstate(over="ignore"):
            return np.asarray(data, np.float32 if datatype == "BF16" else dtype_of(datatype)).reshape(shape)
    flat = data
    while isinstance(flat, list) and flat and all(isinstance(each, list) for each in flat):
        flat = list(chain.from_iterable(flat))
    if not isinstance(flat, list):
        raise ValueError("the data is not a list")
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
