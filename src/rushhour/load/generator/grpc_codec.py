"""Messages of the Open Inference Protocol's gRPC service, as a client encodes and decodes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from rushhour.errors import WireError
from rushhour.protocol import CONTENTS, message
from rushhour.wire import Content, array_of_bytes, array_of_values


def encode_grpc_request(model: str, contents: Sequence[Content]) -> bytes:
    """A `ModelInferRequest` with raw tensors."""
    request = message("inference.ModelInferRequest")(model_name=model)
    for content in contents:
        request.inputs.add(name=content.name, datatype=content.datatype, shape=content.array.shape)
        request.raw_input_contents.append(content.raw)
    encoded: bytes = request.SerializeToString()
    return encoded


def decode_grpc_answer(body: bytes, _: int | None = None) -> dict[str, NDArray[Any]]:
    """Output name -> array of a `ModelInferResponse`, whose tensors are raw (Triton) or typed contents (MLServer).

    Raises:
        WireError: if the bytes are no such message.
    """
    try:
        answer = message("inference.ModelInferResponse").FromString(body)
        if not answer.raw_output_contents:
            return {each.name: _typed(each) for each in answer.outputs}
        return {
            each.name: array_of_bytes(each.datatype, raw, tuple(each.shape))
            for each, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
        }
    except (DecodeError, ValueError, TypeError, OverflowError) as error:
        raise WireError(
            "the server's answer is not Open Inference Protocol",
            f"{type(error).__name__}: {error}",
            "check the URL and the server",
        ) from error


def _typed(output: Any) -> NDArray[Any]:
    field = CONTENTS.get(output.datatype)
    if field is None:
        raise ValueError(f"the output {output.name!r} has the datatype {output.datatype!r} and no raw bytes")
    return array_of_values(output.datatype, list(getattr(output.contents, field)), tuple(output.shape))
