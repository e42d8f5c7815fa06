"""The Open Inference Protocol v2: what requests and answers mean, and their bytes over HTTP. No I/O here.

A request's body is a JSON header, then the tensors that are not in the header as raw little-endian rows; the HTTP field
`Inference-Header-Content-Length` says where the header ends. Over gRPC the bytes are others
(`serve/protocols/grpc/codec.py`) and the meaning is the same: both describe a request by a `RequestHeader`, which
`Codec.arrange` checks.

A model of pictures also takes encoded pictures in a BYTES tensor of shape `[n]` or `[n, 1]`. JSON cannot hold bytes:
there an element is Base64.

A model of texts also takes texts: a BYTES tensor of the name `text` and the same shape, in place of all its inputs. In
JSON they are written as they are.

Where JSON leaves something open, this follows Triton: a field that is null is absent, and NaN and the infinities are
the literals `NaN`, `Infinity` and `-Infinity`.

Sources: kserve/open-inference-protocol, specification/protocol/inference_rest.md; triton-inference-server/server,
docs/protocol: extension_binary_data.md, extension_shared_memory.md, extension_classification.md.
"""

from rushhour.wire.answers import OutputTensor
from rushhour.wire.client import (
    Content,
    array_of_bytes,
    array_of_values,
    decode_answer,
    encode_json_request,
    encode_json_tensors,
    encode_request,
    encode_tensors,
    json_of,
)
from rushhour.wire.codec import Codec, model_metadata
from rushhour.wire.datatypes import datatype_of, dtype_of
from rushhour.wire.elements import MAX_PICTURE_BYTES, MAX_TEXT_BYTES, content_of, text_of
from rushhour.wire.embeddings import (
    EMBEDDINGS,
    MAX_TEXTS,
    EmbeddingError,
    EmbeddingRequest,
    decode_embeddings,
    embeds,
    openai_error,
    wanted_embedder,
)
from rushhour.wire.header import HEADER_LENGTH, InputHeader, OutputHeader, RequestHeader
from rushhour.wire.layouts import ROW, TEXT
from rushhour.wire.pieces import WHOLE_BYTES
from rushhour.wire.request import (
    Body,
    Encoded,
    InferRequest,
    Layout,
    Parts,
    PictureRequest,
    Place,
    PlacedRequest,
    Regions,
    TextRequest,
    Wanted,
)
from rushhour.wire.rows import ROWS, RowsRequest, decode_rows, row_of_json

__all__ = [
    "EMBEDDINGS",
    "HEADER_LENGTH",
    "MAX_PICTURE_BYTES",
    "MAX_TEXTS",
    "MAX_TEXT_BYTES",
    "ROW",
    "ROWS",
    "TEXT",
    "WHOLE_BYTES",
    "Body",
    "Codec",
    "Content",
    "EmbeddingError",
    "EmbeddingRequest",
    "Encoded",
    "InferRequest",
    "InputHeader",
    "Layout",
    "OutputHeader",
    "OutputTensor",
    "Parts",
    "PictureRequest",
    "Place",
    "PlacedRequest",
    "Regions",
    "RequestHeader",
    "RowsRequest",
    "TextRequest",
    "Wanted",
    "array_of_bytes",
    "array_of_values",
    "content_of",
    "datatype_of",
    "decode_answer",
    "decode_embeddings",
    "decode_rows",
    "dtype_of",
    "embeds",
    "encode_json_request",
    "encode_json_tensors",
    "encode_request",
    "encode_tensors",
    "json_of",
    "model_metadata",
    "openai_error",
    "row_of_json",
    "text_of",
    "wanted_embedder",
]
