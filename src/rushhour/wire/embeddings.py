"""OpenAI's `POST /v1/embeddings`: what its requests and answers mean, and their bytes. No I/O here.

The texts of a request become a `TextRequest`, so that they are tokenised, queued and batched as any other.

Source: the API reference of OpenAI, "Create embeddings" and "Error codes".
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from rushhour.errors import RushhourError, WireError
from rushhour.wire.codec import Codec
from rushhour.wire.pieces import pause
from rushhour.wire.request import Body, Parts, TextRequest, Wanted
from rushhour.wire.values import json_numbers

EMBEDDINGS: Final = "/v1/embeddings"
MAX_TEXTS: Final = 2048
"""In one request, as OpenAI allows."""
_MAX_BYTES: Final = 4 * 2**20
"""Of a request: read in one go, in a few milliseconds. 2,048 texts of 2,000 characters."""
_AT_ONCE: Final = 16
"""Vectors that are written before other threads may run."""
_TYPES: Final = {429: "rate_limit_error", 401: "authentication_error"}
_CODES: Final = {401: "invalid_api_key", 429: "rate_limit_exceeded"}


class EmbeddingError(WireError):
    """A request for embeddings that is not valid.

    Args:
        param: the field that is wrong.
        code: for programs; empty for none.
    """

    def __init__(self, what: str, why: str, fix: str, *, param: str, code: str = "", status: int = 400) -> None:
        super().__init__(what, why, fix, status=status)
        self.param = param
        self.code = code


class EmbeddingRequest(TextRequest):
    """Texts whose embeddings are wanted in OpenAI's form.

    Args:
        texts: one or more.
        model: its name, which the answer repeats.
        encoding: numbers in JSON, or Base64 of little-endian float32.
    """

    __slots__ = ("_encoding", "_model")

    def __init__(self, texts: Sequence[str], model: str, encoding: Literal["float", "base64"]) -> None:
        super().__init__(texts, Wanted(id="", outputs=(0,), binary=(encoding == "base64",)))
        self._model = model
        self._encoding = encoding

    @property
    def is_large(self) -> bool:
        """Whether writing the answer takes long: then it must not be done on the event loop."""
        return self.rows > _AT_ONCE

    def encode(self, outputs: Sequence[memoryview]) -> Parts:
        """The answer's parts, in order.

        Args:
            outputs: the raw rows of each of the model's outputs; the first is the embedding, float32.
        """
        vectors = np.frombuffer(outputs[0], "<f4").reshape(self.rows, -1)
        parts: Parts = [b'{"object":"list","data":[']
        for first in range(0, self.rows, _AT_ONCE):
            if first:
                pause()
                parts.append(b",")
            some = [
                {"object": "embedding", "index": first + at, "embedding": self._written(vector)}
                for at, vector in enumerate(vectors[first : first + _AT_ONCE])
            ]
            parts.append(msgspec.json.encode(some)[1:-1])
        usage = {"prompt_tokens": self.tokens, "total_tokens": self.tokens}
        end = msgspec.json.encode({"model": self._model, "usage": usage})
        parts.append(b"]," + end[1:])
        return parts

    def _written(self, vector: NDArray[np.float32]) -> Any:
        return base64.b64encode(vector.tobytes()).decode() if self._encoding == "base64" else json_numbers(vector)


class _Described(msgspec.Struct):
    """The fields that are read; others (`user`) are ignored, as OpenAI's server ignores what it does not know."""

    input: Any
    model: str
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None


def embeds(codec: Codec, kind: str) -> bool:
    """Whether a model's answers are what this endpoint gives: a vector for each text.

    Args:
        codec: of the model.
        kind: of its task.
    """
    outputs = codec.signature.outputs
    vector = len(outputs) == 1 and len(outputs[0].shape) == 1 and outputs[0].dtype == "float32"
    return kind == "embedding" and codec.takes_texts and vector


class _Wanted(msgspec.Struct):
    model: str


def wanted_embedder(body: Body) -> str:
    """The model that a request for embeddings names; empty if it cannot be read."""
    try:
        return msgspec.json.decode(body, type=_Wanted).model if len(body) <= _MAX_BYTES else ""
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""


def decode_embeddings(codec: Codec, body: Body) -> EmbeddingRequest:
    """Read a request for embeddings.

    Args:
        codec: of the model that is served, for which `embeds` holds.
        body: JSON.

    Raises:
        EmbeddingError: if it is not valid, or for another model.
    """
    if len(body) > _MAX_BYTES:
        why = f"the body has {len(body)} bytes, and the limit is {_MAX_BYTES}"
        raise EmbeddingError("the request is too large", why, "send fewer texts", param="input", status=413)
    try:
        described = msgspec.json.decode(body, type=_Described)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        why = str(error)
        param = next((name for name in _Described.__struct_fields__ if f"`{name}`" in why or f"$.{name}" in why), "")
        raise EmbeddingError("the request cannot be read", why, "send model and input", param=param) from error
    if described.model != codec.model:
        raise EmbeddingError(
            f"the model {described.model[:100]!r} does not exist",
            f"this server has {codec.model}",
            "correct the field model",
            param="model",
            code="model_not_found",
            status=404,
        )
    (size,) = codec.signature.outputs[0].shape
    if described.dimensions not in (None, size):
        why = f"{codec.model} gives {size}"
        raise EmbeddingError(
            f"vectors of {described.dimensions} dimensions are wanted", why, "omit dimensions", param="dimensions"
        )
    return EmbeddingRequest(_texts(described.input, codec), codec.model, described.encoding_format or "float")


def _texts(given: Any, codec: Codec) -> list[str]:
    """The texts of the field `input`: a text or a list of them."""
    texts = [given] if isinstance(given, str) else given
    most = min(MAX_TEXTS, codec.elements)
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        numbers = isinstance(texts, list) and texts and all(isinstance(each, int | list) for each in texts)
        why = "it holds token numbers, of a tokenizer that this model may not have" if numbers else "it is no text"
        raise EmbeddingError("the input cannot be used", why, "send a text, or a list of texts", param="input")
    if len(texts) > most:
        why = f"{codec.model} takes at most {most} at once"
        raise EmbeddingError(f"there are {len(texts)} texts", why, "send fewer", param="input")
    if empty := [number for number, text in enumerate(texts) if not text]:
        raise EmbeddingError(f"input[{empty[0]}] is empty", "it has no meaning to embed", "leave it out", param="input")
    return texts


def openai_error(error: Exception, status: int) -> bytes:
    """The body of an answer with an error, as OpenAI's clients read it.

    Args:
        error: what went wrong.
        status: of the answer.
    """
    text = str(error) if isinstance(error, RushhourError) else f"internal error: {type(error).__name__}"
    other = "invalid_request_error" if status < 500 else "server_error"
    described = {
        "message": text,
        "type": _TYPES.get(status, other),
        "param": getattr(error, "param", "") or None,
        "code": getattr(error, "code", "") or _CODES.get(status),
    }
    return msgspec.json.encode({"error": described})
