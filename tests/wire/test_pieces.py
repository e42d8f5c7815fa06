"""Large tensors read in pieces mean what they mean when they are read whole; what cannot be is refused by its size."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from rushhour.bundle import Signature, TensorSpec
from rushhour.errors import WireError
from rushhour.serve.protocols.grpc import codec as codec_module
from rushhour.serve.protocols.grpc.codec import GrpcCodec
from rushhour.wire import Codec, content_of, decode_answer, encode_json_request, encode_request, pieces
from rushhour.wire.header import without_id

ANSWER = TensorSpec("p", "float32", (3,))
PICTURE = Signature(inputs=(TensorSpec("image", "uint8", (28, 28, 1)),), outputs=(ANSWER,))
TWO = Signature(inputs=(TensorSpec("a", "float32", (2, 3)), TensorSpec("b", "int64", (2,))), outputs=(ANSWER,))


@pytest.fixture(autouse=True)
def no_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_PAUSE_S", 0.0)


@pytest.fixture(params=[16, 64, 1000])
def small_pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Everything is large, and a piece is small."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", request.param)
    monkeypatch.setattr("rushhour.wire.json_pieces._SMALL_BYTES", 5)
    monkeypatch.setattr("rushhour.wire.codec.WHOLE_BYTES", 0)
    monkeypatch.setattr(codec_module, "WHOLE_BYTES", -1)
    size: int = request.param
    return size


def json_of(data: str, shape: list[int], name: str = "image", datatype: str = "UINT8") -> bytes:
    entry = json.dumps({"name": name, "shape": shape, "datatype": datatype})[:-1]
    return ('{"inputs":[' + entry + ',"data":' + data + "}]}").encode()


# JSON.


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("spaces", [None, 1])
def test_a_large_request_in_json_is_read_as_a_small_one(nested: bool, spaces: int | None) -> None:
    images = np.random.default_rng(0).integers(0, 256, (200, 28, 28, 1), dtype=np.uint8)
    data = images.tolist() if nested else images.ravel().tolist()
    entry = {"data": data, "name": "image", "shape": list(images.shape), "datatype": "UINT8"}  # the data comes first
    body = json.dumps({"id": "seven", "inputs": [entry], "parameters": {"priority": 3}}, indent=spaces).encode()
    codec = Codec("m", PICTURE)
    assert codec.is_large(body, None)
    request = codec.decode(body, None)
    assert bytes(request.tensors[0]) == images.tobytes()
    assert (request.rows, request.wanted.id, request.wanted.priority) == (200, "seven", 3)


def test_large_json_beside_small_and_binary() -> None:
    a = np.random.default_rng(0).normal(size=(3000, 2, 3)).astype(np.float32)
    b = np.random.default_rng(1).integers(-(2**63), 2**63 - 1, (3000, 2), dtype=np.int64)
    request = Codec("m", TWO).decode(encode_json_request(TWO, {"a": a, "b": b}), None)
    assert [bytes(tensor) for tensor in request.tensors] == [a.tobytes(), b.tobytes()]
    blob = {"name": "b", "shape": [3000, 2], "datatype": "INT64", "parameters": {"binary_data_size": b.nbytes}}
    entry = {"name": "a", "shape": [3000, 2, 3], "datatype": "FP32", "data": a.ravel().tolist()}
    header = json.dumps({"inputs": [blob, entry]}).encode()
    request = Codec("m", TWO).decode(header + b.tobytes(), len(header))
    assert [bytes(tensor) for tensor in request.tensors] == [a.tobytes(), b.tobytes()]


@pytest.mark.parametrize("form", ["flat", "column", "escaped"])
def test_large_pictures_in_base64_are_read(form: str) -> None:
    contents = [np.random.default_rng(n).bytes(30_000 + n) for n in range(5)]
    texts = [base64.b64encode(content).decode() for content in contents]
    data = json.dumps([[text] for text in texts] if form == "column" else texts)
    data = data.replace("/", "\\/") if form == "escaped" else data
    shape = [5, 1] if form == "column" else [5]
    request = Codec("m", PICTURE, pictures=8).decode(json_of(data, shape, datatype="BYTES"), None)
    assert [content_of(picture) for picture in request.pictures] == contents


VALUES = "[" + ",".join(map(str, range(16))) + "]"
LONG = 51 * 784


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (json_of("[" + "[]," * LONG + "[]]", [1, 28, 28, 1]), "differ in length"),
        (json_of("[" + "0," * LONG + "0]", [1, 28, 28, 1]), "more than 784"),
        (json_of("[" + "0," * 100 + " " * LONG + "0]", [1, 28, 28, 1]), "more than 32768 characters"),
        (json_of("[" + "0," * LONG + "]", [51, 28, 28, 1]), "cannot be read"),
        (json_of("[," + "0," * LONG + "0]", [51, 28, 28, 1]), "cannot be read"),
        (json_of("[" + "0," * LONG, [51, 28, 28, 1])[:-3], "does not end"),
        (json_of("[" * LONG, [1, 28, 28, 1]), "too deep"),
        (json_of("[" + "9" * LONG + "]", [1, 28, 28, 1]), "characters"),
        (json_of("[" + '"",' * LONG + '""]', [1, 28, 28, 1]), "something other than numbers"),
        (json_of("[" + "{}," * LONG + "{}]", [51, 28, 28, 1]), "something other than numbers"),
        (json_of("[" + "null," * LONG + "1]", [51, 28, 28, 1]), "something other than numbers"),
        (json_of("[" + "0 0," * LONG + "1]", [51, 28, 28, 1]), "cannot be read"),
        (json_of("[[" + "0," * 28 + "0],[" + "0," * LONG + "0]]", [51, 28, 28, 1]), "differ in length"),
        (json_of("[[" + "0],[" * LONG + "0,0]]", [51, 28, 28, 1]), "differ in length"),
        (json_of("[" + "0,[" * 2 + "0," * LONG + "0]]]", [51, 28, 28, 1]), "differ in length"),
        (json_of('"' + "a" * LONG + '"', [1, 28, 28, 1]), "too long"),
        (json_of("[1]", [1, 28, 28, 1], name="x" * LONG), "too long"),
        (json_of("[1]", [1, 28, 28, 1]).replace(b"}]}", b'}],"id":"' + b"x" * LONG + b'"}'), "too long"),
        (json_of("[1]", [1, 28, 28, 1]).replace(b"}]}", b'}],"parameters":{' + b'"a":1,' * LONG + b'"a":1}}'), "long"),
        (b'{"inputs":[' + b'{"name":"","datatype":"","shape":[]},' * LONG + b"]}", "too long"),
        (b'{"inputs":[],"parameters":{"data":[' + b"1," * LONG + b"1]}}", "outside an input"),
        (
            json_of("[0]", [1, 28, 28, 1]).replace(b'"data"', b'"data":[' + b"1," * LONG + b'1],"data"'),
            "outside an input",
        ),
    ],
)
def test_what_is_large_and_not_valid_is_refused(body: bytes, says: str) -> None:
    with pytest.raises(WireError, match=says) as caught:
        Codec("m", PICTURE).decode(body, None)
    assert caught.value.status == 400
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ('["' + "A" * LONG + '=AAA"]', "not Base64"),
        ('["' + "A" * LONG + "!" + '"]', "not Base64"),
        ('["' + "\\\\" * LONG + '"]', "not Base64"),
        ('["' + "A" * LONG, "does not end"),
        ('["' + "A" * LONG + "\\", "does not end"),
        ('["' + "A" * LONG + '",5]', "not a list of text"),
        ('["' + "A" * LONG + '",,"AAAA"]', "cannot be read"),
        ("[" + '"AAAA",' * 8 + '"' + "A" * LONG + '"]', "more than 8 texts"),
        ('["' + "A" * LONG + '"' + " " * LONG + "]", "more spaces than text"),
    ],
)
def test_large_texts_that_are_not_pictures_are_refused(data: str, says: str) -> None:
    with pytest.raises(WireError, match=says):
        Codec("m", PICTURE, pictures=8).decode(json_of(data, [1], datatype="BYTES"), None)


ARRAYS = st.lists(st.integers(1, 4), min_size=1, max_size=4).flatmap(
    lambda shape: st.tuples(
        st.just(shape), st.lists(st.integers(0, 255), min_size=math.prod(shape), max_size=math.prod(shape))
    )
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ARRAYS, st.integers(0, 3), st.booleans(), st.data())
def test_any_nested_list_is_read_in_pieces_as_it_is_read_whole(
    small_pieces: int, array: tuple[list[int], list[int]], spaces: int, nested: bool, data: st.DataObject
) -> None:
    shape, values = array
    content: Any = np.array(values).reshape(shape).tolist() if nested else values
    text = json.dumps(content, indent=spaces or None, separators=(",", ":"))
    if data.draw(st.booleans()):  # something in it is wrong, perhaps
        at = data.draw(st.integers(0, len(text) - 1))
        text = (
            text[:at]
            + data.draw(st.sampled_from(["[", "]", ",", "", " ", "1", "-", ".5", "e", "[]", "],["]))
            + text[at + 1 :]
        )
    signature = Signature(inputs=(TensorSpec("x", "uint8", tuple(shape[1:])),), outputs=(ANSWER,))
    body = json_of(text, shape, "x")
    codec = Codec("m", signature)

    def read() -> bytes | None:
        try:
            return bytes(codec.decode(body, None).tensors[0])
        except WireError as error:
            return None if "characters" not in str(error) else b"not in pieces of this size"

    in_pieces = read()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rushhour.wire.codec.WHOLE_BYTES", 2**20)
        whole = read()
    assert in_pieces in (whole, b"not in pieces of this size")


# Protobuf.

NUMBERS = {
    "BOOL": ("bool_contents", "bool", st.booleans()),
    "INT8": ("int_contents", "int8", st.integers(-(2**31), 2**31 - 1)),
    "INT16": ("int_contents", "int16", st.integers(-(2**15), 2**15 - 1)),
    "INT32": ("int_contents", "int32", st.integers(-(2**31), 2**31 - 1)),
    "INT64": ("int64_contents", "int64", st.integers(-(2**63), 2**63 - 1)),
    "UINT8": ("uint_contents", "uint8", st.integers(0, 300)),
    "UINT16": ("uint_contents", "uint16", st.integers(0, 2**16 - 1)),
    "UINT32": ("uint_contents", "uint32", st.integers(0, 2**32 - 1)),
    "UINT64": ("uint64_contents", "uint64", st.integers(0, 2**64 - 1)),
    "FP32": ("fp32_contents", "float32", st.floats(width=32)),
    "FP64": ("fp64_contents", "float64", st.floats()),
}


def outcome(codec: Codec, sent: bytes) -> object:
    try:
        request = GrpcCodec(codec).decode(sent).request
    except WireError as error:
        return str(error.status)
    if request.pictures:
        return [content_of(picture) for picture in request.pictures]
    return [bytes(tensor) for tensor in request.tensors], request.wanted


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(NUMBERS)), st.data())
def test_any_typed_contents_are_read_in_pieces_as_protobuf_reads_them(
    small_pieces: int, datatype: str, data: st.DataObject
) -> None:
    field, dtype, values = NUMBERS[datatype]
    given_values = data.draw(st.lists(values, min_size=1, max_size=40))
    signature = Signature(inputs=(TensorSpec("x", dtype, ()),), outputs=(ANSWER,))  # type: ignore[arg-type]
    request = service_pb2.ModelInferRequest(model_name="m", id=data.draw(st.sampled_from(["", "7"])))
    rows = len(given_values) + data.draw(st.sampled_from([0, 0, 0, -1, 1]))
    tensor = request.inputs.add(name="x", datatype=datatype, shape=[rows])
    getattr(tensor.contents, field).extend(given_values)
    if data.draw(st.booleans()):
        tensor.contents.bytes_contents.append(b"of no use")
    sent = request.SerializeToString()
    if data.draw(st.booleans()):  # once more with the same contents in two parts, as protobuf allows
        more = service_pb2.ModelInferRequest()
        getattr(more.inputs.add().contents, field).extend(given_values)
        part = more.inputs[0].SerializeToString()
        whole = request.inputs[0].SerializeToString() + part
        tensor.ClearField("contents")
        request.ClearField("inputs")
        sent = request.SerializeToString() + b"\x2a" + bytes(wire_number(len(whole))) + whole
    codec = Codec("m", signature)
    in_pieces = outcome(codec, sent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec_module, "WHOLE_BYTES", 2**20)
        assert outcome(codec, sent) == in_pieces


def wire_number(number: int) -> list[int]:
    return [number] if number < 0x80 else [number & 0x7F | 0x80, *wire_number(number >> 7)]


def varint(number: int) -> bytes:
    return bytes(wire_number(number))


def contents_of(inner: bytes, datatype: str = "UINT8", rows: int = 1) -> bytes:
    head = service_pb2.ModelInferRequest.InferInputTensor(name="x", datatype=datatype, shape=[rows])
    tensor = head.SerializeToString() + b"\x2a" + varint(len(inner)) + inner
    return service_pb2.ModelInferRequest(model_name="m").SerializeToString() + b"\x2a" + varint(len(tensor)) + tensor


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(NUMBERS)), st.binary(max_size=60), st.integers(1, 4))
@example("UINT8", b"\x22\x01\x07", 1)  # packed
@example("UINT8", b"\x20\x07", 1)  # not packed
@example("UINT8", b"\x20\x07\x22\x02\x08\x09\x20\x0a", 4)  # in turns
@example("INT8", b"\x12\x0a" + b"\xff" * 9 + b"\x01", 1)  # -1
@example("INT8", b"\x12\x0b" + b"\xff" * 10 + b"\x01", 1)  # too long
@example("UINT8", b"\x22\x03\x80\x80\x00", 1)  # zero, in more bytes than it needs
@example("UINT8", b"\x22\x02\x01\x80", 1)  # cut
@example("FP32", b"\x32\x05\x00\x00\x80\x3f\x00", 1)  # cut
@example("FP32", b"\x35\x00\x00\x80\x3f", 1)  # not packed
@example("FP64", b"\x35\x00\x00\x80\x3f", 1)  # of another type
@example("BYTES", b"\x42\x00\x42\x01\x00", 2)
def test_any_bytes_as_contents_are_read_in_pieces_as_protobuf_reads_them(
    small_pieces: int, datatype: str, inner: bytes, rows: int
) -> None:
    """The short version of the fuzzer's target `grpc`."""
    dtype = "uint8" if datatype == "BYTES" else NUMBERS[datatype][1]
    signature = Signature(inputs=(TensorSpec("x", dtype, ()),), outputs=(ANSWER,))  # type: ignore[arg-type]
    sent = contents_of(inner, datatype, rows)
    codec = Codec("m", signature)
    try:
        service_pb2.ModelInferRequest.FromString(sent)
    except Exception:
        outcome(codec, sent)  # of contents that nobody asked for it may be content with less
        return
    in_pieces = outcome(codec, sent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec_module, "WHOLE_BYTES", 2**20)
        whole = outcome(codec, sent)
    assert in_pieces == whole or b"\x0b" in inner or b"\x0c" in inner or any(byte & 7 in (3, 4) for byte in inner)


def test_large_typed_contents_of_every_type_reach_the_model() -> None:
    for datatype, (field, dtype, _) in NUMBERS.items():
        values = np.random.default_rng(0).integers(
            -100 if dtype[0] in "if" else 0, 2 if dtype == "bool" else 100, 60_000
        )
        signature = Signature(inputs=(TensorSpec("x", dtype, (100,)),), outputs=(ANSWER,))  # type: ignore[arg-type]
        request = service_pb2.ModelInferRequest(model_name="m", id="seven")
        tensor = request.inputs.add(name="x", datatype=datatype, shape=[600, 100])
        getattr(tensor.contents, field).extend(values.astype(dtype).tolist())
        sent = request.SerializeToString()
        codec = GrpcCodec(Codec("m", signature))
        assert codec.is_large(sent)
        asked = codec.decode(sent)
        assert bytes(asked.request.tensors[0]) == values.astype(dtype).tobytes(), datatype
        assert (asked.id, asked.request.rows) == (b"seven", 600)


def test_large_pictures_over_grpc_are_read() -> None:
    contents = [np.random.default_rng(n).bytes(30_000 + n) for n in range(5)]
    request = service_pb2.ModelInferRequest(model_name="m")
    request.inputs.add(name="image", datatype="BYTES", shape=[5]).contents.bytes_contents.extend(contents)
    asked = GrpcCodec(Codec("m", PICTURE, pictures=8)).decode(request.SerializeToString())
    assert [content_of(picture) for picture in asked.request.pictures] == contents


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (contents_of(b"\x22" + varint(LONG) + bytes(LONG)), "more than 1 values"),
        (contents_of(b"\x20\x07" * LONG), "more than 4096 fields"),
        (contents_of(b"\x42\x00" * LONG, "BYTES"), "datatype|more than 4096 fields"),
        (contents_of(b"\x32" + varint(LONG) + bytes(LONG)), "0 are needed|at most 0"),
        (service_pb2.ModelInferRequest(model_name="x" * LONG).SerializeToString(), "too long"),
        (service_pb2.ModelInferRequest(model_name="m", id="x" * LONG).SerializeToString(), "too long"),
        (b"\x2a\xc4\xb8\x02\x1a\xc0\xb8\x02" + bytes(40_000), "too long"),
    ],
)
def test_large_messages_that_are_not_valid_are_refused(sent: bytes, says: str) -> None:
    signature = Signature(inputs=(TensorSpec("x", "uint8", ()),), outputs=(ANSWER,))
    with pytest.raises(WireError, match=says):
        GrpcCodec(Codec("m", signature)).decode(sent)


# Large answers.


@pytest.mark.parametrize("top", [0, 2])
@pytest.mark.parametrize("rows", [3, 4096])
def test_a_large_answer_in_json_is_that_of_many_small_ones(rows: int, top: int) -> None:
    signature = Signature(inputs=PICTURE.inputs, outputs=(ANSWER, TensorSpec("n", "int64", (2,))))
    codec = Codec("m", signature, labels=("a", "b", "c"))
    outputs = [{"name": "p", "parameters": {"classification": top}}, {"name": "n"}]
    header = json.dumps(
        {
            "id": "x",
            "inputs": [
                {
                    "name": "image",
                    "shape": [rows, 28, 28, 1],
                    "datatype": "UINT8",
                    "parameters": {"binary_data_size": rows * 784},
                }
            ],
            "outputs": outputs,
        }
    ).encode()
    request = codec.decode(header + bytes(rows * 784), len(header))
    p = np.random.default_rng(0).random((rows, 3), dtype=np.float32)
    n = np.arange(2 * rows, dtype=np.int64).reshape(rows, 2)
    assert codec.is_large_answer(request.wanted, rows) == (rows == 4096)
    length, parts = codec.encode(request.wanted, rows, [memoryview(p).cast("B"), memoryview(n).cast("B")])
    assert length is None
    answer = json.loads(b"".join(parts))
    assert answer["id"] == "x"
    first, second = answer["outputs"]
    np.testing.assert_array_equal(np.reshape(second["data"], (rows, 2)), n)
    if top:
        assert first["shape"] == [rows, top]
        index = np.argsort(-p, axis=1)[:, :top]
        assert first["data"] == [f"{p[row, each]:f}:{each}:{'abc'[each]}" for row in range(rows) for each in index[row]]
    else:
        np.testing.assert_allclose(np.reshape(first["data"], (rows, 3)), p)
        np.testing.assert_allclose(decode_answer(b"".join(parts), None)["p"], p)


# Ids.


@pytest.mark.parametrize(
    ("header", "identity"),
    [
        ('{"id":"seven","inputs":[]}', "seven"),
        ('{"inputs":[],"id" : "é 7"}', "é 7"),
        ('{"inputs":[]}', ""),
        ('{"id":"","inputs":[]}', ""),
        ('{"id":5,"inputs":[]}', ""),
        ('{"id":"a","parameters":{"id":"b"}}', ""),
        ('{"id":"a\\u0062"}', ""),
        ('{"i\\u0064":"a","id":"b"}', ""),
    ],
)
def test_an_id_is_cut_out_where_there_is_no_doubt_which_it_is(header: str, identity: str) -> None:
    bare, found = without_id(header.encode())
    assert found == identity
    assert bare == (header.replace(f'"{identity}"', '""').encode() if identity else header.encode())


def numbered(identity: object, before: bool, **parameters: object) -> tuple[bytes, bytes]:
    entry = {"name": "image", "shape": [1, 28, 28, 1], "datatype": "UINT8", "parameters": {"binary_data_size": 784}}
    rest = {"inputs": [entry], "parameters": {"binary_data_output": True, **parameters}}
    header = {"id": identity, **rest} if before else {**rest, "id": identity}
    return json.dumps(header).encode(), bytes(784)


@pytest.mark.parametrize("before", [True, False])
def test_requests_that_differ_in_their_id_alone_are_of_one_kind(before: bool) -> None:
    codec = Codec("m", PICTURE)
    for number in range(600):
        header, body = numbered(f"r-{number}", before)
        request = codec.decode(header + body, len(header))
        assert request.wanted.id == f"r-{number}"
        length, parts = codec.encode(request.wanted, 1, [memoryview(bytes(12))])
        assert length is not None
        answer = json.loads(b"".join(parts)[:length])
        assert list(answer) == ["model_name", "model_version", "id", "outputs"]
        assert answer["id"] == f"r-{number}"
    assert (len(codec._layouts), len(codec._numbered), len(codec._answer_headers)) == (0, 1, 1)


def test_an_id_elsewhere_is_not_taken_for_the_requests() -> None:
    codec = Codec("m", PICTURE)
    for inner in ("", "a", "b"):
        for outer in (None, "", "a", "c"):
            header, body = numbered(outer or "", before=False, id=inner)
            if outer is None:
                header = header.replace(b', "id": ""}', b"}")
            for _ in range(2):
                assert codec.decode(header + body, len(header)).wanted.id == (outer or "")


def test_ids_with_quotes_and_backslashes_come_back() -> None:
    codec = Codec("m", PICTURE)
    for identity in ('a"b', "a\\b", "a\nb", "\u2028", "😀"):
        for _ in range(2):
            header, body = numbered(identity, before=True)
            request = codec.decode(header + body, len(header))
            length, parts = codec.encode(request.wanted, 1, [memoryview(bytes(12))])
            assert json.loads(b"".join(parts)[:length])["id"] == identity


def test_the_known_ids_do_not_grow_without_end() -> None:
    codec = Codec("m", PICTURE)
    for number in range(1000):
        header, body = numbered("x", before=True, number=number)
        codec.decode(header + body, len(header))
    assert len(codec._numbered) <= 256


def test_the_size_of_a_row_is_computed_once() -> None:
    spec = TensorSpec("x", "float16", (3, 4))
    assert spec.row_bytes == 24
    assert "row_bytes" in vars(spec)
    assert spec == TensorSpec("x", "float16", (3, 4))
    assert hash(spec) == hash(TensorSpec("x", "float16", (3, 4)))
    length, body = encode_request(PICTURE, {"image": np.zeros((1, 28, 28, 1), np.uint8)})
    assert len(body) - length == 784
