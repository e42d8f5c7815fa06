"""The protocol's bytes: what a client of the field sends is understood, and nothing else is."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rushhour.bundle import Signature, TensorSpec
from rushhour.errors import WireError
from rushhour.load import Interface
from rushhour.wire import (
    Codec,
    Place,
    decode_answer,
    encode_json_request,
    encode_request,
    model_metadata,
)

IMAGE = TensorSpec("image", "uint8", (2, 2, 1))
EXTRA = TensorSpec("extra", "float32", (3,))
ANSWER = TensorSpec("probabilities", "float32", (3,))
ONE = Signature(inputs=(IMAGE,), outputs=(ANSWER,))
TWO = Signature(inputs=(IMAGE, EXTRA), outputs=(ANSWER, TensorSpec("label", "int64", (1,))))


def images(rows: int) -> np.ndarray:
    return np.arange(rows * 4, dtype=np.uint8).reshape(rows, 2, 2, 1)


def header(**changes: object) -> bytes:
    entry = {"name": "image", "shape": [1, 2, 2, 1], "datatype": "UINT8", "data": [1, 2, 3, 4]} | changes
    return json.dumps({"inputs": [{k: v for k, v in entry.items() if v is not None}]}).encode()


@pytest.mark.parametrize("rows", [1, 3, 17])
def test_binary_requests_are_read_back(rows: int) -> None:
    codec = Codec("m", TWO)
    extra = np.linspace(0, 1, rows * 3, dtype=np.float32).reshape(rows, 3)
    length, body = encode_request(TWO, {"image": images(rows), "extra": extra})
    for _ in range(2):  # the second time from the cached header
        request = codec.decode(body, length)
        assert request.rows == rows
        assert bytes(request.tensors[0]) == images(rows).tobytes()
        assert bytes(request.tensors[1]) == extra.tobytes()
        assert request.wanted.outputs == (0, 1)
        assert request.wanted.binary == (True, True)


def test_binary_inputs_in_another_order_reach_their_own_places() -> None:
    extra = np.ones((1, 3), dtype=np.float32)
    swapped = Signature(inputs=(EXTRA, IMAGE), outputs=TWO.outputs)
    length, body = encode_request(swapped, {"image": images(1), "extra": extra})
    codec = Codec("m", TWO)
    for _ in range(2):
        request = codec.decode(body, length)
        assert bytes(request.tensors[0]) == images(1).tobytes()
        assert bytes(request.tensors[1]) == extra.tobytes()


def test_json_requests_flat_and_nested_mean_the_same() -> None:
    codec = Codec("m", ONE)
    flat = codec.decode(encode_json_request(ONE, {"image": images(2)}), None)
    nested = codec.decode(header(shape=[2, 2, 2, 1], data=images(2).tolist()), None)
    assert bytes(flat.tensors[0]) == bytes(nested.tensors[0]) == images(2).tobytes()
    assert flat.wanted.binary == (False,)


def test_a_raw_body_is_whole_rows_of_the_one_input() -> None:
    request = Codec("m", ONE).decode(images(3).tobytes(), 0)
    assert request.rows == 3
    with pytest.raises(WireError, match="one sample has 4"):
        Codec("m", ONE).decode(b"12345", 0)
    with pytest.raises(WireError, match="has 2"):
        Codec("m", TWO).decode(b"1234", 0)


@pytest.mark.parametrize("binary", [True, False])
def test_answers_are_read_back(binary: bool) -> None:
    codec = Codec("m", TWO)
    parameters = {"binary_data_output": binary, "timeout": 5000, "priority": 2}
    body = json.dumps(
        {
            "id": "abc",
            "inputs": [
                {"name": "image", "shape": [2, 2, 2, 1], "datatype": "UINT8", "data": [1] * 8},
                {"name": "extra", "shape": [2, 3], "datatype": "FP32", "data": [0.5] * 6},
            ],
            "parameters": parameters,
        }
    ).encode()
    request = codec.decode(body, None)
    assert request.wanted.timeout_s == pytest.approx(0.005)
    assert request.wanted.priority == 2
    probabilities = np.arange(6, dtype=np.float32).reshape(2, 3)
    label = np.array([[7], [-1]], dtype=np.int64)
    length, parts = codec.encode(request.wanted, 2, [memoryview(probabilities.tobytes()), memoryview(label.tobytes())])
    answer = b"".join(parts)
    assert (length is not None) == binary
    outputs = decode_answer(answer, length)
    np.testing.assert_array_equal(outputs["probabilities"], probabilities)
    np.testing.assert_array_equal(outputs["label"], label)
    assert json.loads(answer[:length])["id"] == "abc"


def test_only_the_outputs_asked_for_in_the_order_asked_for() -> None:
    codec = Codec("m", TWO)
    length, body = encode_request(TWO, {"image": images(1), "extra": np.zeros((1, 3), np.float32)})
    asked = json.loads(body[:length]) | {
        "outputs": [{"name": "label", "parameters": {"binary_data": False}}, {"name": "probabilities"}]
    }
    new = json.dumps(asked).encode()
    request = codec.decode(new + body[length:], len(new))
    assert request.wanted.outputs == (1, 0)
    assert request.wanted.binary == (False, True)


@pytest.mark.parametrize(
    ("body", "length", "says"),
    [
        (b"", None, "JSON cannot be read"),
        (b"{}", None, "JSON cannot be read"),
        (b"\xff\xfe", None, "JSON cannot be read"),
        (b"[" * 100_000, None, "JSON cannot be read"),
        (b'{"inputs": []}', None, "'image' is missing"),
        (header(name="other"), None, "'other' is unknown"),
        (header(datatype="FP32"), None, "takes UINT8"),
        (header(shape=[1, 4]), None, "shape"),
        (header(shape=[0, 2, 2, 1]), None, "0 samples"),
        (header(shape=[-1, 2, 2, 1]), None, "-1 samples"),
        (header(shape=[2**62, 2, 2, 1]), None, "samples"),
        (header(data=[1, 2, 3]), None, "3 values"),
        (header(data=[1, 2, 3, 256]), None, "0..255"),
        (header(data=[1, 2, 3, -1]), None, "0..255"),
        (header(data=[1, 2, 3, 4.5]), None, "not UINT8"),
        (header(data=[1, 2, 3, "4"]), None, "cannot be read"),
        (header(data=[True, False, True, True]), None, "true or false"),
        (header(data=[[1, 2], [3]]), None, "cannot be read"),
        (header(data={"a": 1}), None, "cannot be read"),
        (header(data=None), None, "no data"),
        (b'{"inputs":[{"name":"image","shape":[1,2,2,1],"datatype":"UINT8","data":[1,2,3,NaN]}]}', None, "JSON"),
        (header(parameters={"binary_data_size": 4}), None, "data twice"),
        (header(data=None, parameters={"binary_data_size": 5}), None, "binary_data_size 5"),
        (header(data=None, parameters={"binary_data_size": True}), None, "binary_data_size True"),
        (header(data=None, parameters={"binary_data_size": 4}), None, "0 bytes follow"),
        (header(data=None, parameters={"binary_data_size": 4}) + b"12345", 99999, "body has"),
        (header(data=None, parameters={"shared_memory_region": "r"}), None, "shared memory"),
    ],
)
def test_what_is_not_a_request_is_refused_with_a_reason(body: bytes, length: int | None, says: str) -> None:
    with pytest.raises(WireError, match=says) as caught:
        Codec("m", ONE).decode(body, length)
    assert 400 <= caught.value.status <= 501
    assert "\n" not in str(caught.value)


def test_a_wrong_length_is_refused_also_behind_a_cached_header() -> None:
    codec = Codec("m", ONE)
    length, body = encode_request(ONE, {"image": images(1)})
    codec.decode(body, length)
    for wrong in (body[:-1], body + b"x"):
        with pytest.raises(WireError, match="follow the JSON header"):
            codec.decode(wrong, length)


def test_the_header_cache_does_not_grow_without_end() -> None:
    codec = Codec("m", ONE, max_rows=10_000)
    for rows in range(1, 2000):
        length, body = encode_request(ONE, {"image": np.zeros((rows, 2, 2, 1), np.uint8)})
        codec.decode(body, length)
    assert len(codec._layouts) <= 256


@given(st.binary(max_size=400), st.one_of(st.none(), st.integers(0, 500)))
@example(header(), None)
def test_any_bytes_give_a_request_or_a_wire_error(body: bytes, length: int | None) -> None:
    try:
        request = Codec("m", ONE).decode(body, length)
    except WireError:
        return
    assert [len(tensor) for tensor in request.tensors] == [request.rows * 4]


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
        max_leaves=12,
    )
)
def test_any_json_as_data_gives_a_request_or_a_wire_error(data: object) -> None:
    try:
        Codec("m", ONE).decode(header(data=data), None)
    except WireError:
        return


@pytest.mark.parametrize("body", [b"", b"{}", b"<html>", b'{"outputs":[{"name":"x","datatype":"FP32","shape":[2]}]}'])
def test_an_answer_that_is_none_is_refused(body: bytes) -> None:
    with pytest.raises(WireError, match="not Open Inference Protocol"):
        decode_answer(body, None)


def test_metadata_goes_both_ways() -> None:
    assert Interface.read(model_metadata(Codec("m", TWO), "rushhour_openvino")) == Interface.of(TWO)


LABELS = ("cat", "dog", "fox")


def wanting(*outputs: dict[str, object], **parameters: object) -> bytes:
    entry = {"name": "image", "shape": [2, 2, 2, 1], "datatype": "UINT8", "data": [1] * 8}
    return json.dumps({"inputs": [entry], "outputs": list(outputs), "parameters": parameters}).encode()


@pytest.mark.parametrize("binary", [True, False])
def test_the_likeliest_classes_in_words(binary: bool) -> None:
    codec = Codec("m", ONE, labels=LABELS)
    asked = {"classification": 2, "binary_data": binary}
    request = codec.decode(wanting({"name": "probabilities", "parameters": asked}), None)
    probabilities = np.array([[0.125, 0.75, 0.125], [0.5, np.nan, 0.25]], np.float32)
    length, parts = codec.encode(request.wanted, 2, [memoryview(probabilities.tobytes())])
    body = b"".join(parts)
    (output,) = json.loads(body[:length])["outputs"]
    words = ["0.750000:1:dog", "0.125000:0:cat", "0.500000:0:cat", "0.250000:2:fox"]
    assert (output["datatype"], output["shape"]) == ("BYTES", [2, 2])
    if binary:
        assert length is not None
        assert body[length:] == b"".join(len(word).to_bytes(4, "little") + word.encode() for word in words)
        assert output["parameters"] == {"binary_data_size": len(body) - length}
    else:
        assert (length, output["data"]) == (None, words)


def test_more_classes_than_there_are_is_all_of_them_and_whole_numbers_stay_whole() -> None:
    signature = Signature(inputs=(IMAGE,), outputs=(TensorSpec("scores", "uint8", (3,)),))
    codec = Codec("m", signature, labels=LABELS)
    request = codec.decode(wanting({"name": "scores", "parameters": {"classification": 99}}), None)
    _, parts = codec.encode(request.wanted, 2, [memoryview(bytes([3, 200, 5, 0, 0, 7]))])
    (output,) = json.loads(b"".join(parts))["outputs"]
    assert output["data"] == ["200:1:dog", "5:2:fox", "3:0:cat", "7:2:fox", "0:0:cat", "0:1:dog"]


@pytest.mark.parametrize(
    ("parameters", "labels", "says"),
    [
        ({"classification": -1}, LABELS, "number of classes"),
        ({"classification": True}, LABELS, "number of classes"),
        ({"classification": "2"}, LABELS, "number of classes"),
        ({"classification": 2}, (), "does not classify"),
        ({"classification": 2}, ("cat", "dog"), "does not classify"),
        ({"shared_memory_region": "r", "shared_memory_byte_size": 24}, LABELS, "this server does not"),
    ],
)
def test_outputs_that_cannot_be_given_are_refused(
    parameters: dict[str, object], labels: tuple[str, ...], says: str
) -> None:
    with pytest.raises(WireError, match=says):
        Codec("m", ONE, labels=labels).decode(wanting({"name": "probabilities", "parameters": parameters}), None)


@pytest.mark.parametrize(
    "parameters",
    [
        {"shared_memory_region": 5, "shared_memory_byte_size": 4},
        {"shared_memory_region": "r"},
        {"shared_memory_region": "r", "shared_memory_byte_size": "4"},
        {"shared_memory_region": "r", "shared_memory_byte_size": -4},
        {"shared_memory_region": "r", "shared_memory_byte_size": 5},
        {"shared_memory_region": "r", "shared_memory_byte_size": 4, "shared_memory_offset": -1},
        {"shared_memory_region": "r", "shared_memory_byte_size": 4, "shared_memory_offset": 2**70},
        {"shared_memory_region": "r", "shared_memory_byte_size": 4, "binary_data_size": 4},
    ],
)
def test_places_in_shared_memory_that_are_none_are_refused(parameters: dict[str, object]) -> None:
    class Nothing:
        def check(self, place: Place) -> None:
            raise AssertionError(place)

        def read(self, place: Place) -> memoryview:
            raise AssertionError(place)

        def write(self, place: Place, content: memoryview | bytes) -> None:
            raise AssertionError(place)

    with pytest.raises(WireError):
        Codec("m", ONE, regions=Nothing()).decode(header(data=None, parameters=parameters), None)


def test_numbers_beyond_all_bounds_are_refused() -> None:
    for parameters in ({"timeout": 10**400}, {"timeout": 2**63}, {"priority": 2**63}):
        with pytest.raises(WireError):
            Codec("m", ONE).decode(wanting(**parameters), None)
