"""Requests whose samples choose their own size: what is understood over both protocols, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from rushhour.bundle import OpenDimension, Signature, TensorSpec
from rushhour.errors import WireError
from rushhour.serve.protocols.grpc.codec import GrpcCodec
from rushhour.wire import Codec, datatype_of, decode_answer, encode_json_request, encode_request, model_metadata

TEXT = Signature(
    inputs=(TensorSpec("ids", "int64", (16,)), TensorSpec("mask", "int8", (16,))),
    outputs=(TensorSpec("scores", "float32", (3,)), TensorSpec("tags", "float32", (16, 2))),
    open=(OpenDimension("length", 16, {"ids": 0, "mask": 0, "tags": 0}, smallest=2, padding={"ids": 0, "mask": 0}),),
)
SOUND = Signature(
    inputs=(TensorSpec("sound", "float32", (1000,)),),
    outputs=(TensorSpec("level", "float32", (1,)),),
    open=(OpenDimension("samples", 1000, {"sound": 0}, smallest=10),),
)


def texts(rows: int, length: int) -> dict[str, np.ndarray]:
    ids = np.arange(rows * length, dtype=np.int64).reshape(rows, length)
    return {"ids": ids, "mask": np.ones((rows, length), np.int8)}


def outputs(rows: int, length: int) -> list[np.ndarray]:
    scores = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
    return [scores, np.arange(rows * length * 2, dtype=np.float32).reshape(rows, length, 2)]


def body(shapes: dict[str, list[int]]) -> bytes:
    entries: list[dict[str, Any]] = []
    for spec in TEXT.inputs:
        shape = shapes.get(spec.name, [1, 4])
        size = min(64, max(0, int(np.prod([float(each) for each in shape]))))
        entries.append({"name": spec.name, "shape": shape, "datatype": datatype_of(spec), "data": [1] * size})
    return json.dumps({"inputs": entries}).encode()


@pytest.mark.parametrize(("rows", "length"), [(1, 2), (1, 16), (3, 7)])
def test_binary_and_json_requests_of_any_length_are_read_and_answered(rows: int, length: int) -> None:
    codec = Codec("m", TEXT)
    arrays, answers = texts(rows, length), outputs(rows, length)
    size, binary = encode_request(TEXT, arrays)
    in_json = encode_json_request(TEXT, arrays)
    for request in (codec.decode(binary, size), codec.decode(binary, size), codec.decode(in_json, None)):
        assert request.rows == rows
        assert request.wanted.sizes == (length,)
        assert [bytes(each) for each in request.tensors] == [array.tobytes() for array in arrays.values()]
        header, parts = codec.encode(request.wanted, rows, [memoryview(each.tobytes()) for each in answers])
        found = decode_answer(b"".join(parts), header)
        np.testing.assert_array_equal(found["scores"], answers[0])
        np.testing.assert_array_equal(found["tags"], answers[1])


def test_lengths_that_follow_each_other_do_not_share_a_header() -> None:
    codec = Codec("m", TEXT)
    for length in (3, 9, 3):
        size, binary = encode_request(TEXT, texts(2, length))
        request = codec.decode(binary, size)
        assert request.wanted.sizes == (length,)
        assert codec.answer_header(request.wanted, 2) == codec.answer_header(codec.decode(binary, size).wanted, 2)
        described = json.loads(codec.answer_header(request.wanted, 2) or b"")["outputs"][1]
        assert described["shape"] == [2, length, 2]
        assert described["parameters"]["binary_data_size"] == 2 * length * 2 * 4


@pytest.mark.parametrize("length", [0, 1, 17, 10**9, 2**62, -1, -5])
def test_a_length_out_of_bounds_is_refused_with_what_is_allowed(length: int) -> None:
    with pytest.raises(WireError, match=r"takes \[-1, 2 to 16\]") as refused:
        Codec("m", TEXT).decode(body({"ids": [1, length], "mask": [1, length]}), None)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("shape", [[1], [1, 4, 1], [], [1, 4, 4]])
def test_another_number_of_dimensions_is_refused(shape: list[int]) -> None:
    with pytest.raises(WireError, match="has shape"):
        Codec("m", TEXT).decode(body({"ids": shape}), None)


def test_inputs_that_disagree_in_length_are_refused() -> None:
    with pytest.raises(WireError, match="the inputs differ in length: 'ids' has 4, 'mask' has 5"):
        Codec("m", TEXT).decode(body({"ids": [1, 4], "mask": [1, 5]}), None)


def test_data_of_another_length_than_the_shape_is_refused() -> None:
    size, binary = encode_request(TEXT, texts(1, 5))
    changed = binary[:size].replace(b"[1,5]", b"[1,6]") + binary[size:]
    with pytest.raises(WireError, match="exact size"):
        Codec("m", TEXT).decode(changed, size)


def test_classes_of_an_open_output_are_refused() -> None:
    labels = tuple(map(str, range(32)))
    codec = Codec("m", TEXT, labels=labels)  # as many as the largest output has values
    asked = json.loads(body({})) | {"outputs": [{"name": "tags", "parameters": {"classification": 1}}]}
    with pytest.raises(WireError, match="no class labels"):
        codec.decode(json.dumps(asked).encode(), None)


def test_a_raw_body_is_one_sample_of_its_own_length() -> None:
    codec = Codec("m", SOUND)
    request = codec.decode(np.zeros(123, np.float32).tobytes(), 0)
    assert (request.rows, request.wanted.sizes) == (1, (123,))
    for size in (0, 39, 4 * 9, 4 * 1001):
        with pytest.raises(WireError, match="raw body"):
            codec.decode(bytes(size), 0)


def test_metadata_declares_open_dimensions_as_the_protocol_does() -> None:
    shown = json.loads(model_metadata(Codec("m", TEXT), "p"))
    assert [each["shape"] for each in shown["inputs"]] == [[-1, -1], [-1, -1]]
    assert [each["shape"] for each in shown["outputs"]] == [[-1, 3], [-1, -1, 2]]


def grpc_request(arrays: dict[str, np.ndarray]) -> bytes:
    request = service_pb2.ModelInferRequest(model_name="m", id="7")
    for spec in TEXT.inputs:
        request.inputs.add(name=spec.name, datatype=datatype_of(spec), shape=list(arrays[spec.name].shape))
        request.raw_input_contents.append(arrays[spec.name].tobytes())
    return bytes(request.SerializeToString())


def test_grpc_requests_of_any_length_are_read_and_answered() -> None:
    codec = GrpcCodec(Codec("m", TEXT))
    for rows, length in ((1, 3), (2, 16), (1, 3)):
        request = codec.decode(grpc_request(texts(rows, length)))
        assert request.request.wanted.sizes == (length,)
        raw = [memoryview(each.tobytes()) for each in outputs(rows, length)]
        answer = service_pb2.ModelInferResponse.FromString(codec.encode(request, raw))
        assert [list(each.shape) for each in answer.outputs] == [[rows, 3], [rows, length, 2]]
        assert list(answer.raw_output_contents) == [bytes(each) for each in raw]
    with pytest.raises(WireError, match="2 to 16"):
        codec.decode(grpc_request(texts(1, 17)))


def test_a_repeated_request_is_answered_with_its_own_sizes() -> None:
    codec = Codec("m", TEXT)
    for length in (5, 8):
        size, binary = encode_request(TEXT, texts(1, length))
        codec.decode(binary, size)
        layout = codec.known(binary[:size])
        assert layout is not None
        assert layout.wanted.sizes == (length,)
        assert sum(codec.output_bytes(each, 1, layout.wanted.sizes) for each in (0, 1)) == 12 + length * 8
