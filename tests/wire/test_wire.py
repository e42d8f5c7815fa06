"""The protocol's bytes: what a client of the field sends is understood, and nothing else is."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rushhour.bundle import Signature, TensorSpec
from rushhour.errors import WireError
from rushhour.load import Interface
from rushhour.wire import (
    Codec,
    InferRequest,
    Place,
    datatype_of,
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
        (b"--------------------------d7\r\nContent-Disposition: form-data", None, "it is a form.*--data-binary"),
        (b"\xff\xd8\xff\xe0" + bytes(600_000), None, "it is a picture.*content-type: image/jpeg"),
        (b"\x89PNG\r\n\x1a\n", None, "it is a picture"),
        (b"\x93NUMPY\x01\x00", None, "npy file"),
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
        (b'{"inputs":[{"name":"image","shape":[1,2,2,1],"datatype":"UINT8","data":[1,2,3,NaN]}]}', None, "not UINT8"),
        (header(parameters={"binary_data_size": 4}), None, "data twice"),
        (header(data=None, parameters={"binary_data_size": 5}), None, "has 5 bytes"),
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
        ({"classification": 2}, (), "has no class labels"),
        ({"classification": 2}, ("cat", "dog"), "has no class labels"),
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
        def check(self, place: Place, *, writes: bool = True) -> None:
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


# What JSON leaves open: null, NaN and infinities.

FLOATS = Signature(inputs=(TensorSpec("x", "float32", (4,)),), outputs=(TensorSpec("y", "float32", (4,)),))
NULLS: list[tuple[dict[str, object], dict[str, object]]] = [
    ({"id": None}, {}),
    ({"parameters": None}, {}),
    ({"outputs": None}, {}),
    ({"id": None, "parameters": None, "outputs": None, "unknown": None}, {}),
    ({"parameters": {"timeout": None, "priority": None, "binary_data_output": None, "sequence_id": None}}, {}),
    ({"outputs": [{"name": "probabilities", "parameters": None}]}, {"outputs": [{"name": "probabilities"}]}),
    (
        {
            "outputs": [
                {
                    "name": "probabilities",
                    "parameters": {
                        "binary_data": None,
                        "classification": None,
                        "shared_memory_region": None,
                        "shared_memory_byte_size": None,
                    },
                }
            ],
            "parameters": {"binary_data_output": True},
        },
        {"outputs": [{"name": "probabilities"}], "parameters": {"binary_data_output": True}},
    ),
]


@pytest.mark.parametrize(("null", "absent"), NULLS)
def test_what_is_null_is_absent(null: dict[str, object], absent: dict[str, object]) -> None:
    entry = {"name": "image", "shape": [1, 2, 2, 1], "datatype": "UINT8"}
    data = {"data": [1, 2, 3, 4]}
    wanted = []
    for said in (null, absent):
        for parameters in ({}, {"parameters": None}, {"parameters": {"binary_data_size": None, "other": None}}):
            body = json.dumps({"inputs": [entry | data | parameters]} | said).encode()
            asked = Codec("m", ONE).decode(body, None)
            assert bytes(asked.tensors[0]) == b"\1\2\3\4"
            wanted.append(asked.wanted)
        header = json.dumps({"inputs": [entry | {"data": None, "parameters": {"binary_data_size": 4}}]} | said).encode()
        for _ in range(2):
            wanted.append(Codec("m", ONE).decode(header + b"\1\2\3\4", len(header)).wanted)
    assert len(set(wanted)) == 1


def test_what_is_required_is_not_null() -> None:
    whole: dict[str, object] = {"name": "image", "shape": [1, 2, 2, 1], "datatype": "UINT8", "data": [1, 2, 3, 4]}
    for name in whole:
        with pytest.raises(WireError):
            Codec("m", ONE).decode(json.dumps({"inputs": [whole | {name: None}]}).encode(), None)
    for inputs in (None, [None]):
        with pytest.raises(WireError):
            Codec("m", ONE).decode(json.dumps({"inputs": inputs}).encode(), None)
    with pytest.raises(WireError, match="something other than numbers"):
        Codec("m", ONE).decode(json.dumps({"inputs": [whole | {"data": [1, None, 3, 4]}]}).encode(), None)


def test_an_answer_with_nulls_is_read() -> None:
    outputs = [{"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [1, 2], "parameters": None}]
    answer = {"model_name": "m", "id": None, "parameters": None, "outputs": outputs}
    np.testing.assert_array_equal(decode_answer(json.dumps(answer).encode(), None)["y"], [[1, 2]])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("nested", [False, True])
def test_nan_and_infinities_are_read(dtype: Any, nested: bool) -> None:
    signature = Signature(inputs=(TensorSpec("x", dtype, (4,)),), outputs=FLOATS.outputs)
    data = "[NaN, Infinity, -Infinity, -0.5]"
    text = f"[{data}]" if nested else data
    datatype = datatype_of(signature.inputs[0])
    body = f'{{"inputs":[{{"name":"x","shape":[1,4],"datatype":"{datatype}","data":{text}}}]}}'
    (tensor,) = Codec("m", signature).decode(body.encode(), None).tensors
    np.testing.assert_array_equal(np.frombuffer(tensor, dtype), np.array([np.nan, np.inf, -np.inf, -0.5], dtype))


@pytest.mark.parametrize(
    ("dtype", "data"),
    [
        ("uint8", "[NaN, 1, 1, 1]"),
        ("int64", "[1, 1, -Infinity, 1]"),
        ("bool", "[true, true, true, NaN]"),
        ("bool", "[true, true, true, 0.5]"),
        ("bool", "[0, 1, 2, 1]"),
        ("bool", "[0, 1, -1, 1]"),
        ("float32", "[true, 0.5, 1, 1]"),
        ("float32", "[NaN, 1e999, 1, 1]"),
        ("float64", "[NaN, -1e999, 1, 1]"),
        ("float64", "[NaN, 1" + "0" * 400 + ".0, 1, 1]"),
        ("float32", "[NaN, 1e300, 1, 1]"),
        ("float32", "[NaN, null, 1, 1]"),
        ("float32", '["NaN", 1, 1, 1]'),
        ("float32", "[nan, 1, 1, 1]"),
        ("float32", "[+Infinity, 1, 1, 1]"),
        ("float32", "[inf, NaN, 1, 1]"),
    ],
)
def test_a_value_that_a_type_does_not_have_is_refused_and_never_made_another(dtype: Any, data: str) -> None:
    signature = Signature(inputs=(TensorSpec("x", dtype, (4,)),), outputs=FLOATS.outputs)
    datatype = datatype_of(signature.inputs[0])
    body = f'{{"inputs":[{{"name":"x","shape":[1,4],"datatype":"{datatype}","data":{data}}}]}}'
    with pytest.raises(WireError, match="cannot be read"):
        Codec("m", signature).decode(body.encode(), None)


@pytest.mark.parametrize(
    ("dtype", "data", "values"),
    [
        ("bool", "[true, false, 1, 0]", [True, False, True, False]),
        ("float32", "[1, 2, 3, 4.5]", [1, 2, 3, 4.5]),
        ("uint64", "[18446744073709551615, 0, 1, 2]", [2**64 - 1, 0, 1, 2]),
    ],
)
def test_a_value_that_a_type_has_is_read(dtype: Any, data: str, values: list[float]) -> None:
    signature = Signature(inputs=(TensorSpec("x", dtype, (4,)),), outputs=FLOATS.outputs)
    datatype = datatype_of(signature.inputs[0])
    body = f'{{"inputs":[{{"name":"x","shape":[1,4],"datatype":"{datatype}","data":{data}}}]}}'
    (tensor,) = Codec("m", signature).decode(body.encode(), None).tensors
    np.testing.assert_array_equal(np.frombuffer(tensor, dtype), np.array(values, dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nan_and_infinities_are_written(dtype: Any) -> None:
    values = np.array([[np.nan, np.inf, -np.inf, 0.1], [1, -1, 1e30, 0]], dtype)
    codec = Codec("m", Signature(inputs=FLOATS.inputs, outputs=(TensorSpec("y", dtype, (4,)),)))
    request = codec.decode(encode_json_request(codec.signature, {"x": np.zeros((2, 4), np.float32)}), None)
    length, parts = codec.encode(request.wanted, 2, [memoryview(values.tobytes())])
    answer = b"".join(parts)
    assert length is None
    assert b'"data":[NaN,Infinity,-Infinity,' in answer
    np.testing.assert_array_equal(decode_answer(answer, None)["y"], values)
    (output,) = json.loads(answer)["outputs"]  # as Triton's clients read it
    np.testing.assert_array_equal(np.array(output["data"], dtype).reshape(2, 4), values)


def test_a_client_writes_nan_and_infinities_too() -> None:
    values = np.array([[np.nan, np.inf, -np.inf, 0.1]], np.float32)
    asked = Codec("m", FLOATS).decode(encode_json_request(FLOATS, {"x": values}), None)
    np.testing.assert_array_equal(np.frombuffer(asked.tensors[0], np.float32), values[0])


@pytest.mark.parametrize("text", ['"\\ud800"', '"NaN \\udfff"'])
def test_an_id_that_could_not_be_echoed_is_refused(text: str) -> None:
    body = f'{{"id":{text},"inputs":[{{"name":"x","shape":[1,4],"datatype":"FP32","data":[NaN,1,1,1]}}]}}'
    with pytest.raises(WireError, match="cannot be read"):
        Codec("m", FLOATS).decode(body.encode(), None)


def test_what_json_cannot_carry_is_refused_before_anything_is_computed() -> None:
    half = Signature(inputs=FLOATS.inputs, outputs=(TensorSpec("y", "float16", (4,)), TensorSpec("z", "float32", (4,))))
    codec = Codec("m", half, labels=("a", "b", "c", "d"), pictures=4)
    asked = json.loads(encode_json_request(half, {"x": np.zeros((1, 4), np.float32)}))

    def decode(**more: object) -> InferRequest:
        return codec.decode(json.dumps(asked | more).encode(), None)

    for outputs in (None, [{"name": "y"}], [{"name": "z", "parameters": {"binary_data": True}}, {"name": "y"}]):
        with pytest.raises(WireError, match="'y' is FP16"):
            decode(outputs=outputs)
    with pytest.raises(WireError, match="'y' is FP16"):
        codec.decode_picture(b"a picture")
    decode(outputs=[{"name": "z"}])
    decode(outputs=[{"name": "y", "parameters": {"classification": 2}}])
    decode(outputs=[{"name": "y", "parameters": {"binary_data": True}}])
    decode(parameters={"binary_data_output": True})


@pytest.mark.parametrize("value", ["yes", 1, [], {}])
def test_what_is_no_truth_is_not_taken_for_one(value: object) -> None:
    asked = json.loads(encode_json_request(ONE, {"image": np.zeros((1, 2, 2, 1), np.uint8)}))
    for more in (
        {"parameters": {"binary_data_output": value}},
        {"outputs": [{"name": "probabilities", "parameters": {"binary_data": value}}]},
    ):
        with pytest.raises(WireError, match="it is true or false"):
            Codec("m", ONE).decode(json.dumps(asked | more).encode(), None)
