"""The gRPC messages: the standard ones, and bytes that mean what protobuf says they mean."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.json_format import MessageToDict
from hypothesis import example, given
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2, service_pb2

from rushhour import protocol
from rushhour.bundle import Signature, TensorSpec
from rushhour.errors import WireError
from rushhour.protocol import HEALTH, INFERENCE, message
from rushhour.serve.protocols.grpc.codec import GrpcCodec, identity_of, split_message, stream_answer, stream_error
from rushhour.wire import Codec, Place

IMAGE = TensorSpec("image", "uint8", (2, 2, 1))
EXTRA = TensorSpec("extra", "float32", (3,))
PROBABILITIES = TensorSpec("probabilities", "float32", (3,))
LABEL = TensorSpec("label", "int64", (1,))
ONE = Signature(inputs=(IMAGE,), outputs=(PROBABILITIES,))
TWO = Signature(inputs=(IMAGE, EXTRA), outputs=(PROBABILITIES, LABEL))
FOLDER = Path(protocol.__file__).parent


def theirs(name: str) -> Any:
    short = name.removeprefix("inference.")
    found = model_config_pb2 if hasattr(model_config_pb2, short.partition(".")[0]) else service_pb2
    for part in short.split("."):
        found = getattr(found, part)
    return found


def every_message(found: Any) -> list[Any]:
    return [found, *(inner for nested in found.nested_types for inner in every_message(nested))]


MESSAGES = sorted(
    each.full_name for top in INFERENCE.file.message_types_by_name.values() for each in every_message(top)
)


@pytest.mark.parametrize("name", MESSAGES)
def test_names_numbers_and_types_are_those_of_tritonclient(name: str) -> None:
    standard = theirs(name).DESCRIPTOR.fields_by_name
    for field in message(name).DESCRIPTOR.fields:
        other = standard[field.name]
        assert (field.number, field.type, field.is_repeated) == (other.number, other.type, other.is_repeated)
        for kind in ("message_type", "enum_type", "containing_oneof"):
            mine, its = getattr(field, kind), getattr(other, kind)
            assert (mine and mine.full_name) == (its and its.full_name)


def test_enumerations_and_methods_are_those_of_tritonclient() -> None:
    for name, enum in INFERENCE.file.enum_types_by_name.items():
        assert [(value.name, value.number) for value in enum.values] == list(getattr(model_config_pb2, name).items())
    standard = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    assert INFERENCE.full_name == standard.full_name
    assert [
        (each.name, each.input_type.full_name, each.output_type.full_name, each.client_streaming, each.server_streaming)
        for each in INFERENCE.methods
    ] == [
        (each.name, each.input_type.full_name, each.output_type.full_name, each.client_streaming, each.server_streaming)
        for each in standard.methods
    ]


@pytest.mark.parametrize("name", [name for name in MESSAGES if "Config" not in name.partition(".")[2][:11]])
def test_nothing_that_a_client_may_send_is_missing(name: str) -> None:
    if name.endswith(("Request", "InferParameter", "InferTensorContents", "InferInputTensor")):
        mine = {field.name for field in message(name).DESCRIPTOR.fields}
        assert mine == {field.name for field in theirs(name).DESCRIPTOR.fields}


def test_the_health_service_is_the_standard_one() -> None:
    from grpc_health.v1 import health_pb2

    assert HEALTH.full_name == "grpc.health.v1.Health"
    for name in ("HealthCheckRequest", "HealthCheckResponse"):
        mine, its = message(f"grpc.health.v1.{name}").DESCRIPTOR, getattr(health_pb2, name).DESCRIPTOR
        assert [(f.name, f.number, f.type) for f in mine.fields] == [(f.name, f.number, f.type) for f in its.fields]
        for enum in its.enum_types:
            assert enum.values_by_name.keys() == mine.enum_types_by_name[enum.name].values_by_name.keys()


def test_the_descriptors_are_those_of_the_proto_files(tmp_path: Path) -> None:
    files = sorted(str(file.name) for file in FOLDER.glob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--descriptor_set_out={tmp_path / 'out'}", *files]
    subprocess.run(command, cwd=FOLDER, check=True)
    fresh, kept = (
        descriptor_pb2.FileDescriptorSet.FromString(file.read_bytes())
        for file in (tmp_path / "out", FOLDER / "messages.binpb")
    )
    assert fresh == kept


def images(rows: int) -> np.ndarray:
    return np.arange(rows * 4, dtype=np.uint8).reshape(rows, 2, 2, 1)


def asking(rows: int = 1, **fields: Any) -> Any:
    """A valid request for `ONE`, by tritonclient's own class."""
    request = service_pb2.ModelInferRequest(model_name="m", **fields)
    request.inputs.add(name="image", datatype="UINT8", shape=[rows, 2, 2, 1])
    request.raw_input_contents.append(images(rows).tobytes())
    return request


def views(*arrays: np.ndarray) -> list[memoryview]:
    return [memoryview(array.tobytes()) for array in arrays]


@pytest.mark.parametrize("identity", ["", "7", "é" * 200])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_requests_and_answers_are_read_back(rows: int, identity: str) -> None:
    codec = GrpcCodec(Codec("m", ONE, version="4"))
    sent = asking(rows, id=identity, model_version="4").SerializeToString()
    answer = np.linspace(0, 1, rows * 3, dtype=np.float32)
    for _ in range(2):  # the second time from the known header
        asked = codec.decode(sent)
        assert asked.request.rows == rows
        assert bytes(asked.request.tensors[0]) == images(rows).tobytes()
        response = service_pb2.ModelInferResponse.FromString(codec.encode(asked, views(answer)))
        assert MessageToDict(response, preserving_proto_field_name=True) | {"raw_output_contents": []} == {
            "model_name": "m",
            "model_version": "4",
            **({"id": identity} if identity else {}),
            "outputs": [{"name": "probabilities", "datatype": "FP32", "shape": [str(rows), "3"]}],
            "raw_output_contents": [],
        }
        assert list(response.raw_output_contents) == [answer.tobytes()]
    assert len(codec._headers) == 1


def test_a_tensor_is_not_copied() -> None:
    sent = asking(3).SerializeToString()
    codec = GrpcCodec(Codec("m", ONE))
    for _ in range(2):
        assert codec.decode(sent).request.tensors[0].obj is sent


def test_requests_that_differ_only_in_their_id_are_of_one_kind() -> None:
    codec = GrpcCodec(Codec("m", ONE))
    for number in range(1000):
        asked = codec.decode(asking(id=str(number)).SerializeToString())
        assert asked.id == str(number).encode()
    assert len(codec._headers) == 1


def test_the_known_headers_do_not_grow_without_end() -> None:
    codec = GrpcCodec(Codec("m", ONE))
    for number in range(1000):
        request = asking()
        request.parameters["number"].int64_param = number
        codec.decode(request.SerializeToString())
    assert len(codec._headers) <= 256


def test_typed_contents_and_inputs_in_another_order() -> None:
    request = service_pb2.ModelInferRequest(model_name="m")
    extra = request.inputs.add(name="extra", datatype="FP32", shape=[2, 3])
    request.inputs.add(name="image", datatype="UINT8", shape=[2, 2, 2, 1])
    request.raw_input_contents.extend([np.arange(6, dtype=np.float32).tobytes(), images(2).tobytes()])
    codec = GrpcCodec(Codec("m", TWO))
    for _ in range(2):
        tensors = codec.decode(request.SerializeToString()).request.tensors
        assert [bytes(tensor) for tensor in tensors] == [images(2).tobytes(), np.arange(6, dtype=np.float32).tobytes()]
    extra.contents.fp32_contents.extend([0.5] * 6)  # one typed, one raw
    request.raw_input_contents.pop(0)
    for _ in range(2):
        tensors = codec.decode(request.SerializeToString()).request.tensors
        assert [bytes(tensor) for tensor in tensors] == [images(2).tobytes(), np.full(6, 0.5, np.float32).tobytes()]


@pytest.mark.parametrize(
    ("dtype", "field", "value"),
    [
        ("bool", "bool_contents", True),
        ("int8", "int_contents", -128),
        ("int16", "int_contents", -(2**15)),
        ("int32", "int_contents", 2**31 - 1),
        ("int64", "int64_contents", -(2**63)),
        ("uint8", "uint_contents", 255),
        ("uint16", "uint_contents", 2**16 - 1),
        ("uint32", "uint_contents", 2**32 - 1),
        ("uint64", "uint64_contents", 2**64 - 1),
        ("float32", "fp32_contents", 0.25),
        ("float64", "fp64_contents", 1e-300),
    ],
)
def test_every_type_of_contents(dtype: Any, field: str, value: Any) -> None:
    spec = TensorSpec("x", dtype, (2,))
    codec = Codec("m", Signature((spec,), (PROBABILITIES,)))
    request = service_pb2.ModelInferRequest(model_name="m")
    datatype = {"bool": "BOOL"}.get(dtype, dtype.upper().replace("FLOAT", "FP"))
    tensor = request.inputs.add(name="x", datatype=datatype, shape=[1, 2])
    getattr(tensor.contents, field).extend([value, value])
    (read,) = GrpcCodec(codec).decode(request.SerializeToString()).request.tensors
    np.testing.assert_array_equal(np.frombuffer(read, dtype), np.array([value, value], dtype))


def test_parameters_of_every_type_reach_the_cell() -> None:
    request = asking()
    request.parameters["timeout"].int64_param = 5000
    request.parameters["priority"].uint64_param = 2
    wanted = GrpcCodec(Codec("m", ONE)).decode(request.SerializeToString()).request.wanted
    assert (wanted.timeout_s, wanted.priority) == (pytest.approx(0.005), 2)


def test_outputs_wanted_one_raw_entry_each_in_the_order_asked_for() -> None:
    codec = GrpcCodec(Codec("m", TWO, labels=("cat", "dog", "fox")))
    request = asking()
    request.inputs.add(name="extra", datatype="FP32", shape=[1, 3])
    request.raw_input_contents.append(bytes(12))
    probabilities, label = np.array([[0.25, 0.5, 0.25]], np.float32), np.array([[-7]], np.int64)
    request.outputs.add(name="label")
    request.outputs.add(name="probabilities")
    for _ in range(2):
        asked = codec.decode(request.SerializeToString())
        response = service_pb2.ModelInferResponse.FromString(codec.encode(asked, views(probabilities, label)))
        assert [output.name for output in response.outputs] == ["label", "probabilities"]
        assert list(response.raw_output_contents) == [label.tobytes(), probabilities.tobytes()]
    request.outputs[1].parameters["classification"].int64_param = 2
    asked = codec.decode(request.SerializeToString())
    response = service_pb2.ModelInferResponse.FromString(codec.encode(asked, views(probabilities, label)))
    assert (response.outputs[1].datatype, list(response.outputs[1].shape)) == ("BYTES", [1, 2])
    words = [b"0.500000:1:dog", b"0.250000:0:cat"]  # equal values in the order of their indices
    assert response.raw_output_contents[1] == b"".join(len(word).to_bytes(4, "little") + word for word in words)


def changed(change: Any) -> bytes:
    request = asking()
    change(request)
    return bytes(request.SerializeToString())


def set_parameter(name: str, field: str, value: object) -> Any:
    return lambda request: setattr(request.parameters[name], field, value)


def with_contents(field: str, values: list[Any]) -> Any:
    def change(request: Any) -> None:
        getattr(request.inputs[0].contents, field).extend(values)

    return change


@pytest.mark.parametrize(
    ("sent", "status", "says"),
    [
        (b"", 404, "no model"),
        (changed(lambda r: setattr(r, "model_name", "x")), 404, "no model 'x'"),
        (changed(lambda r: setattr(r, "model_version", "9")), 404, "version '9'"),
        (changed(lambda r: r.ClearField("inputs")), 400, "raw_input_contents has 1"),
        (changed(lambda r: r.ClearField("raw_input_contents")), 400, "no data"),
        (changed(lambda r: r.raw_input_contents.append(b"")), 400, "has 2 entries"),
        (changed(lambda r: r.raw_input_contents.__setitem__(0, b"123")), 400, "4 bytes"),
        (changed(lambda r: setattr(r.inputs[0], "datatype", "FP32")), 400, "takes UINT8"),
        (changed(lambda r: setattr(r.inputs[0], "name", "y")), 400, "'y' is unknown"),
        (changed(lambda r: r.inputs[0].shape.append(1)), 400, "shape"),
        (changed(lambda r: r.inputs[0].shape.__setitem__(0, -1)), 400, "samples"),
        (changed(lambda r: r.inputs.add().CopyFrom(r.inputs[0])), 400, "given twice"),
        (changed(lambda r: r.outputs.add(name="z")), 400, "'z' is unknown"),
        (changed(with_contents("uint_contents", [1, 2, 3, 4])), 400, "has 1 entries"),
        (changed(set_parameter("timeout", "int64_param", -5)), 400, "timeout"),
        (changed(set_parameter("priority", "string_param", "high")), 400, "priority"),
        (changed(lambda r: set_parameter("shared_memory_region", "string_param", "r")(r.inputs[0])), 400, "entries"),
        (b"\x0b\x0c", 400, "unknown kind"),
        (b"\x0a\x05ab", 400, "too early"),
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", 400, "too early"),
        (b"\xff" * 20, 400, "too long"),
        (b"\x1a\x02\xff\xfe", 400, "UTF-8"),
        (b"\x0a\x02\xff\xfe", 400, "cannot be read"),
        (b"\x3a\x00" * 100_000, 400, "fields"),
    ],
)
def test_what_is_not_a_request_is_refused_with_a_reason(sent: bytes, status: int, says: str) -> None:
    with pytest.raises(WireError, match=says) as caught:
        GrpcCodec(Codec("m", ONE)).decode(sent)
    assert caught.value.status == status


@pytest.mark.parametrize("dtype", ["float16"])
def test_contents_cannot_carry_half_floats(dtype: Any) -> None:
    codec = GrpcCodec(Codec("m", Signature((TensorSpec("x", dtype, (2,)),), (PROBABILITIES,))))
    request = service_pb2.ModelInferRequest(model_name="m")
    request.inputs.add(name="x", datatype="FP16", shape=[1, 2]).contents.fp32_contents.extend([1, 2])
    with pytest.raises(WireError, match="contents of FP16"):
        codec.decode(request.SerializeToString())


def test_a_wrong_length_is_refused_also_behind_a_known_header() -> None:
    codec = GrpcCodec(Codec("m", ONE))
    codec.decode(asking().SerializeToString())
    for wrong in (b"", b"123", b"12345"):
        request = asking()
        request.raw_input_contents[0] = wrong
        with pytest.raises(WireError, match="the inputs need 4"):
            codec.decode(request.SerializeToString())
    request = asking()
    request.raw_input_contents.append(b"1234")
    with pytest.raises(WireError, match="4, 4 bytes"):
        codec.decode(request.SerializeToString())


def test_streamed_answers_are_the_standard_messages() -> None:
    codec = GrpcCodec(Codec("m", ONE))
    asked = codec.decode(asking(100, id="x").SerializeToString())
    answer = codec.encode(asked, views(np.zeros(300, np.float32)))
    read = service_pb2.ModelStreamInferResponse.FromString(stream_answer(answer))
    assert (read.error_message, read.infer_response.id) == ("", "x")
    assert len(read.infer_response.raw_output_contents[0]) == 1200
    read = service_pb2.ModelStreamInferResponse.FromString(stream_error("no", b"y"))
    assert (read.error_message, read.infer_response.id) == ("no", "y")
    assert identity_of(asking(id="z").SerializeToString()) == b"z"
    assert identity_of(b"\xff") == b""


class Region:
    """Shared memory of one region, in a bytearray."""

    def __init__(self, size: int) -> None:
        self.content = bytearray(size)
        self.checked: list[Place] = []

    def check(self, place: Place, *, writes: bool = True) -> None:
        self.checked.append(place)
        if place.region != "r":
            raise WireError("there is no region", status=404)

    def read(self, place: Place) -> memoryview:
        self.check(place)
        return memoryview(bytes(self.content[place.offset : place.offset + place.byte_size]))

    def write(self, place: Place, content: memoryview | bytes) -> None:
        self.check(place)
        self.content[place.offset : place.offset + len(content)] = content


def place(tensor: Any, region: str, size: int, offset: int = 0) -> None:
    tensor.parameters["shared_memory_region"].string_param = region
    tensor.parameters["shared_memory_byte_size"].int64_param = size
    if offset:
        tensor.parameters["shared_memory_offset"].int64_param = offset


def test_classes_in_words_into_shared_memory() -> None:
    region = Region(100)
    codec = GrpcCodec(Codec("m", ONE, labels=("cat", "dog", "fox"), regions=region))
    request = asking()
    output = request.outputs.add(name="probabilities")
    output.parameters["classification"].int64_param = 1
    place(output, "r", 18, offset=10)
    answer = views(np.array([[0.25, 0.5, 0.25]], np.float32))
    response = service_pb2.ModelInferResponse.FromString(
        codec.encode(codec.decode(request.SerializeToString()), answer)
    )
    assert (response.outputs[0].datatype, list(response.raw_output_contents)) == ("BYTES", [b""])
    assert region.content[10:28] == b"\x0e\x00\x00\x000.500000:1:dog"


def test_tensors_in_shared_memory() -> None:
    region = Region(100)
    codec = GrpcCodec(Codec("m", TWO, regions=region))
    request = asking()
    extra = request.inputs.add(name="extra", datatype="FP32", shape=[1, 3])
    place(extra, "r", 12, offset=8)
    place(request.outputs.add(name="probabilities"), "r", 12, offset=40)
    request.outputs.add(name="label")
    for number in range(2):
        region.content[8:20] = np.full(3, number, np.float32).tobytes()
        asked = codec.decode(request.SerializeToString())
        fetched = asked.request.fetch()
        np.testing.assert_array_equal(np.frombuffer(fetched.tensors[1], np.float32), [number] * 3)
        answers = views(np.full((1, 3), number + 0.5, np.float32), np.array([[number]], np.int64))
        response = service_pb2.ModelInferResponse.FromString(codec.encode(asked, answers))
        assert list(response.raw_output_contents) == [b"", np.array([number], np.int64).tobytes()]
        assert region.content[40:52] == np.full(3, number + 0.5, np.float32).tobytes()
    place(extra, "other", 12)
    with pytest.raises(WireError, match="no region"):
        codec.decode(request.SerializeToString())
    for size, offset in ((11, 0), (13, 0), (12, -1)):
        place(extra, "r", size, offset)
        with pytest.raises(WireError, match="shared_memory"):
            codec.decode(request.SerializeToString())
    with pytest.raises(WireError, match="shared memory") as caught:
        GrpcCodec(Codec("m", TWO)).decode(request.SerializeToString())
    assert caught.value.status == 501


@given(st.binary(max_size=300))
@example(asking().SerializeToString())
def test_any_bytes_give_a_request_or_a_wire_error(sent: bytes) -> None:
    try:
        asked = GrpcCodec(Codec("m", ONE)).decode(sent)
    except WireError:
        return
    assert [len(tensor) for tensor in asked.request.tensors] == [asked.request.rows * 4]


@given(st.integers(0, 255), st.integers(0, 40), st.booleans())
def test_a_request_with_a_byte_changed_gives_a_request_or_a_wire_error(byte: int, at: int, known: bool) -> None:
    codec = GrpcCodec(Codec("m", ONE))
    sent = bytearray(asking(id="id").SerializeToString())
    if known:
        codec.decode(bytes(sent))
    sent[at % len(sent)] = byte
    try:
        asked = codec.decode(bytes(sent))
    except WireError:
        return
    assert [len(tensor) for tensor in asked.request.tensors] == [asked.request.rows * 4]


@given(
    st.lists(st.binary(max_size=300), max_size=4),
    st.text(max_size=200),
    st.text(max_size=20),
    st.dictionaries(st.text(max_size=5), st.integers(-(2**63), 2**63 - 1), max_size=3),
)
def test_a_message_is_taken_apart_as_protobuf_reads_it(
    raw: list[bytes], identity: str, name: str, parameters: dict[str, int]
) -> None:
    request = service_pb2.ModelInferRequest(model_name=name, id=identity, raw_input_contents=raw)
    for key, value in parameters.items():
        request.parameters[key].int64_param = value
    rest, found, contents = split_message(request.SerializeToString())
    head = b"".join(rest)
    assert found.decode() == identity
    assert [bytes(each) for each in contents] == raw
    request.ClearField("id")
    request.ClearField("raw_input_contents")
    assert service_pb2.ModelInferRequest.FromString(head) == request
