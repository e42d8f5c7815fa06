"""Load on servers of other makes: how they frame answers, what they leave out or null, what they take and give."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from peers import Pieces, Refused, grpc_peer, http_peer, serving_model, whole
from rushhour.errors import LoadError, WireError
from rushhour.load import (
    Generator,
    OpenJob,
    Samples,
    Shape,
    Status,
    Target,
    body_payloads,
    discover,
    endpoint,
    folder_payloads,
    payload,
    payloads,
    poisson,
    read_shapes,
)
from rushhour.protocol import message
from rushhour.wire import decode_answer


@pytest.fixture(scope="module")
def generator() -> Iterator[Generator]:
    with Generator() as running:
        yield running


def run(generator: Generator, target: Any, requests: list[bytes], n: int = 60, **changes: Any) -> Samples:
    settings: dict[str, Any] = {
        "host": target.host,
        "port": target.port,
        "protocol": target.protocol,
        "requests": tuple(requests),
        "limit_s": 0.05,
        "timeout_s": 5.0,
        "outputs": target.outputs,
        "schedule": poisson(200, n=n, seed=3).tobytes(),
    }
    return generator.run(OpenJob(**(settings | changes)))


METADATA = {
    "name": "m",
    "versions": None,
    "platform": None,
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4], "parameters": None}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 2], "parameters": None}],
    "properties": None,
}


def answer_of(data: Any = (1.0, 0.5), datatype: str = "FP32", shape: Any = (1, 2), **fields: Any) -> bytes:
    """As KServe and MLServer answer: JSON, with null where they have nothing to say."""
    output = {"name": "y", "shape": shape, "datatype": datatype, "parameters": None, "data": data} | fields
    said = {"model_name": "m", "model_version": None, "id": None, "parameters": None, "outputs": [output]}
    return json.dumps(said).encode()


BODY = answer_of()


# -- how answers are framed (RFC 9112, section 6.3; RFC 9110, section 15.2)


def chunks(body: bytes, size: int, trailer: bytes = b"") -> bytes:
    parts = (body[at : at + size] for at in range(0, len(body), size))
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n" + trailer + b"\r\n"


SIZED = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
FRAMINGS: dict[str, tuple[Pieces, bool]] = {
    "1.0, until the end": ([b"HTTP/1.0 200 OK\r\nServer: x\r\n\r\n" + BODY], True),
    "1.0, until a late end": ([b"HTTP/1.0 200 OK\r\n\r\n" + BODY, 0.01], True),
    "1.0, until the end, in pieces": ([b"HTTP/1.0 200 OK\r\n\r\n", 0.002, BODY[:30], 0.002, BODY[30:]], True),
    "1.0, with a length": ([b"HTTP/1.0 200 OK\r\n" + SIZED + b"\r\n" + BODY], True),
    "1.0, kept": ([b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n" + SIZED + b"\r\n" + BODY], False),
    "1.1, until the end": ([b"HTTP/1.1 200 OK\r\n\r\n" + BODY], True),
    "1.1, until the end that was announced": ([b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + BODY], True),
    "1.1, closed after each": ([b"HTTP/1.1 200 OK\r\nConnection: close\r\n" + SIZED + b"\r\n" + BODY], True),
    "in one chunk": ([b"HTTP/1.1 200 OK\r\n" + CHUNKED + b"\r\n" + chunks(BODY, 999)], False),
    "in chunks apart": (
        [b"HTTP/1.1 200 OK\r\n" + CHUNKED + b"\r\n", chunks(BODY, 50)[:60], 0.002, chunks(BODY, 50)[60:]],
        False,
    ),
    "in chunks, with a trailer": (
        [b"HTTP/1.1 200 OK\r\n" + CHUNKED + b"\r\n" + chunks(BODY, 50, b"Server-Timing: a\r\n")],
        False,
    ),
    "in chunks, closed": (
        [b"HTTP/1.1 200 OK\r\nConnection: close\r\n" + CHUNKED + b"\r\n" + chunks(BODY, 50)],
        True,
    ),
    "after 100": ([b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n" + SIZED + b"\r\n" + BODY], False),
    "after 100, apart": (
        [b"HTTP/1.1 100 Continue\r\n\r\n", 0.002, b"HTTP/1.1 200 OK\r\n" + SIZED + b"\r\n" + BODY],
        False,
    ),
    "after 103 and 102, closed": (
        [
            b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\nContent-Length: 3\r\n\r\n"
            b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 200 OK\r\n\r\n" + BODY
        ],
        True,
    ),
    "after 100, until the end": ([b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.0 200 OK\r\n\r\n" + BODY], True),
}


@pytest.mark.parametrize("framing", FRAMINGS)
def test_an_answer_is_whole_however_it_is_framed(framing: str, generator: Generator) -> None:
    with http_peer(serving_model(METADATA, lambda _: FRAMINGS[framing])) as url:
        target = discover(url)
        found = run(generator, target, payloads(target), check=True)
    assert found.count(Status.OK) == 60, found.first_error
    assert found.error_kinds == {}


def test_an_answer_that_ends_with_the_connection_is_timed_by_that_end(generator: Generator) -> None:
    pieces: Pieces = [b"HTTP/1.0 200 OK\r\n\r\n" + BODY, 0.03]
    with http_peer(serving_model(METADATA, lambda _: (pieces, True))) as url:
        target = discover(url)
        found = run(generator, target, payloads(target), n=20)
    assert found.count(Status.OK) == 20, found.first_error
    assert found.latencies().min() >= 0.03


@pytest.mark.parametrize(
    "pieces",
    [
        [b"HTTP/1.1 200 OK\r\n" + SIZED + b"\r\n" + BODY[:-1]],
        [b"HTTP/1.0 200 OK\r\n" + SIZED + b"\r\n" + BODY[:-1]],
        [b"HTTP/1.1 200 OK\r\n" + CHUNKED + b"\r\n" + chunks(BODY, 50)[:-4]],
        [b"HTTP/1.0 200 OK\r\nServer: x\r\n"],
        [b"HTTP/1.1 100 Continue\r\n\r\n"],
        [],
    ],
)
def test_an_answer_that_breaks_off_is_none(pieces: Pieces, generator: Generator) -> None:
    with http_peer(serving_model(METADATA, lambda _: (pieces, True))) as url:
        target = discover(url)
        found = run(generator, target, payloads(target), n=20)
    assert found.count(Status.LOST) == 20
    assert found.error_kinds == {"closed": 20}


def test_an_error_until_the_end_is_told_with_its_words(generator: Generator) -> None:
    pieces: Pieces = [b'HTTP/1.0 503 Full\r\n\r\n{"error": "full"}']
    with http_peer(serving_model(METADATA, lambda _: (pieces, True))) as url:
        target = discover(url)
        assert run(generator, target, payloads(target), n=20).count(Status.SHED) == 20
    with http_peer(serving_model(METADATA, lambda _: ([b"HTTP/1.0 422 X\r\n\r\nno such form"], True))) as url:
        target = discover(url)
        with pytest.raises(LoadError, match=r"status 422: no such form; .*--json-tensors"):
            run(generator, target, payloads(target), n=20)


def test_another_protocol_is_no_answer(generator: Generator) -> None:
    pieces: Pieces = [b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n..."]
    with http_peer(serving_model(METADATA, lambda _: (pieces, True))) as url:
        target = discover(url)
        with pytest.raises(LoadError, match="does not speak HTTP: it switches to another protocol"):
            run(generator, target, payloads(target), n=20)


def test_a_second_answer_that_nobody_asked_for_is_left_unread(generator: Generator) -> None:
    other = answer_of([7.0, 7.0])
    both = b"HTTP/1.1 200 OK\r\n" + SIZED + b"\r\n" + BODY + b"HTTP/1.1 500 X\r\n" + SIZED + b"\r\n" + other
    with http_peer(serving_model(METADATA, lambda _: ([both], False))) as url:
        target = discover(url)
        found = run(generator, target, payloads(target), n=40, check=True)
    assert found.count(Status.OK) == 40, found.first_error


# -- what is null, and how values are written


@pytest.mark.parametrize(
    "metadata",
    [
        METADATA,
        METADATA | {"outputs": None},
        METADATA | {"name": None, "outputs": []},
        {"name": "m", "inputs": METADATA["inputs"]},
        METADATA | {"inputs": [{"name": "x", "datatype": "fp32", "shape": ["-1", "4"], "tags": {}}]},
        METADATA | {"inputs": [{"name": "x", "datatype": "FP32", "shape": [None, 4]}]},
        METADATA | {"inputs": [{"name": "x", "datatype": "FP32", "shape": ["batch", 4]}]},
        METADATA | {"inputs": [{"name": "x", "datatype": "FP32", "shape": [0, 4]}]},
    ],
)
def test_metadata_with_nulls_are_read(metadata: Any, generator: Generator) -> None:
    with http_peer(serving_model(metadata, lambda _: whole(BODY))) as url:
        target = discover(url)
        assert (target.model, target.tells_speed) == ("m", False)
        assert shapes_in(payloads(target, encoding="json")[0]) == {"x": ("FP32", [1, 4])}
        assert run(generator, target, payloads(target), n=20, check=True).count(Status.OK) == 20


@pytest.mark.parametrize("metadata", [None, [], "m", {}, {"name": "m", "inputs": {}}, {"name": "m", "inputs": [{}]}])
def test_what_is_no_metadata_is_one_line(metadata: Any) -> None:
    with (
        http_peer(serving_model(metadata, lambda _: whole(BODY))) as url,
        pytest.raises(LoadError, match="cannot use the model 'm'"),
    ):
        discover(url)


NAN = float("nan")


@pytest.mark.parametrize(
    ("body", "values"),
    [
        (BODY, [[1, 0.5]]),
        (answer_of([[1.0, 0.5]]), [[1, 0.5]]),
        (answer_of(shape=["1", "2"]), [[1, 0.5]]),
        (answer_of([1.0, None]), [[1, NAN]]),
        (answer_of([1.0, NAN]), [[1, NAN]]),
        (answer_of([1.0, math.inf], "fp64"), [[1, math.inf]]),
        (answer_of([1.0, 0.5], "BF16"), [[1, 0.5]]),
        (answer_of([1, 2], "INT64"), [[1, 2]]),
        (answer_of([True, False], "BOOL"), [[True, False]]),
        (answer_of(["cat", "dög"], "BYTES"), [[b"cat", "dög".encode()]]),
        (answer_of([["cat"], ["dog"]], "BYTES", (2, 1)), [[b"cat"], [b"dog"]]),
        (answer_of([], shape=[0, 2]), np.zeros((0, 2))),
        (answer_of(id=None, contentType=None), [[1, 0.5]]),
    ],
)
def test_values_are_read_as_they_are_written(body: bytes, values: Any) -> None:
    found = decode_answer(body, None)["y"]
    wanted = np.array(values)
    assert found.shape == wanted.shape
    if found.dtype == object:
        assert found.tolist() == values
    else:
        assert np.array_equal(found.astype(float), wanted.astype(float), equal_nan=True)


@pytest.mark.parametrize(
    ("datatype", "raw", "values"),
    [
        ("FP32", struct.pack("<2f", 1, 0.5), [[1, 0.5]]),
        ("FP16", struct.pack("<2e", 1, 0.5), [[1, 0.5]]),
        ("BF16", struct.pack("<2H", 0x3F80, 0xBF00), [[1, -0.5]]),
        ("BYTES", b"\x03\x00\x00\x00cat\x00\x00\x00\x00", [[b"cat", b""]]),
    ],
)
def test_raw_values_are_read(datatype: str, raw: bytes, values: Any) -> None:
    header = answer_of(None, datatype, parameters={"binary_data_size": len(raw)})
    assert decode_answer(header + raw, len(header))["y"].tolist() == values
    with pytest.raises(WireError, match="ends after the body"):
        decode_answer(header + raw[:-1], len(header))


@pytest.mark.parametrize(
    "body",
    [
        answer_of(None),
        answer_of("text"),
        answer_of([1.0]),
        answer_of(["a", "b"]),
        answer_of([1, None], "INT32"),
        answer_of([1, 300], "UINT8"),
        answer_of(["cat"], "BYTES"),
        answer_of("cat", "BYTES"),
        answer_of([{}, []]),
        b'{"outputs": null}',
        b'{"outputs": [{"name": "y"}]}',
        b"null",
        b"NaN",
    ],
)
def test_values_that_are_none_are_one_line(body: bytes) -> None:
    with pytest.raises(WireError, match="not Open Inference Protocol"):
        decode_answer(body, None)


def test_a_type_that_nobody_knows_is_compared_and_not_refused(generator: Generator) -> None:
    raw = bytes(range(9))
    header = answer_of(None, "FP8_E4M3", parameters={"binary_data_size": len(raw)})
    head = f"Inference-Header-Content-Length: {len(header)}\r\n"
    with http_peer(serving_model(METADATA, lambda _: whole(header + raw, head=head))) as url:
        target = discover(url)
        assert run(generator, target, payloads(target), n=20, check=True).count(Status.OK) == 20


# -- answers without a number


def _raw(datatype: str, raw: bytes) -> tuple[Pieces, bool]:
    header = answer_of(None, datatype, parameters={"binary_data_size": len(raw)})
    return whole(header + raw, head=f"Inference-Header-Content-Length: {len(header)}\r\n")


VOID: dict[str, tuple[Pieces, bool]] = {
    "literals": whole(answer_of([NAN, NAN])),
    "nulls": whole(answer_of([None, None])),
    "infinities": whole(answer_of([math.inf, -math.inf])),
    "raw": _raw("FP32", struct.pack("<2f", NAN, NAN)),
    "raw BF16": _raw("BF16", struct.pack("<2H", 0x7FC0, 0xFFC0)),
    "raw FP16": _raw("FP16", struct.pack("<2e", NAN, NAN)),
}


@pytest.mark.parametrize("form", VOID)
def test_an_answer_of_nothing_but_nan_never_passes_a_check(form: str, generator: Generator) -> None:
    with http_peer(serving_model(METADATA, lambda _: VOID[form])) as url:
        target = discover(url)
        found = run(generator, target, payloads(target), check=True)
        assert found.count(Status.OK) == 0
        assert found.first_error == "an answer holds no finite number"
        assert found.error_kinds == {"mismatch": 60}
        assert run(generator, target, payloads(target), n=20).count(Status.OK) == 20, "nobody asked for a check"


def test_one_output_of_nan_is_enough(generator: Generator) -> None:
    """Classes that were computed from scores that are none look well."""
    said = json.loads(answer_of([NAN, NAN]))
    said["outputs"].append({"name": "label", "datatype": "INT64", "shape": [1], "data": [0]})
    with http_peer(serving_model(METADATA, lambda _: whole(json.dumps(said).encode()))) as url:
        target = discover(url)
        assert run(generator, target, payloads(target), n=20, check=True).count(Status.OK) == 0


@pytest.mark.parametrize(
    "said", ['{"predictions": [[NaN, NaN]], "ms": 3}', "[NaN]", '{"outputs": [{"score": Infinity}]}']
)
def test_any_endpoint_that_answers_nan_does_not_pass_a_check(said: str, generator: Generator) -> None:
    with http_peer(lambda path, body: whole(said.encode())) as url:
        at = endpoint(url)
        found = run(generator, at, body_payloads(at, [("application/json", b"{}")]), n=20, check=True)
    assert found.count(Status.OK) == 0
    assert found.first_error == "an answer holds no finite number"


@pytest.mark.parametrize("said", ['{"predictions": [[NaN, 1.5]]}', "{}", "NaN text", '{"a": null, "b": []}'])
def test_any_other_answer_of_an_endpoint_passes(said: str, generator: Generator) -> None:
    with http_peer(lambda path, body: whole(said.encode())) as url:
        at = endpoint(url)
        found = run(generator, at, body_payloads(at, [("application/json", b"{}")]), n=20, check=True)
    assert found.count(Status.OK) == 20, found.first_error


@pytest.mark.parametrize(
    ("first", "then", "passes"),
    [
        ([NAN, 1.0], [NAN, 1.001], True),
        ([NAN, 1.0], [1.0, NAN], False),
        ([math.inf, 1.0], [math.inf, 1.001], True),
        ([math.inf, 1.0], [-math.inf, 1.0], False),
        ([math.inf, 1.0], [math.inf, 2.0], False),
        ([1.0, 0.5], [NAN, 0.5], False),
    ],
)
def test_a_nan_among_numbers_has_to_stay_one(first: Any, then: Any, passes: bool, generator: Generator) -> None:
    count = [0]

    def infer(_: bytes) -> tuple[Pieces, bool]:
        count[0] += 1
        return whole(answer_of(first if count[0] == 1 else then))

    with http_peer(serving_model(METADATA, infer)) as url:
        target = discover(url)
        found = run(generator, target, payloads(target)[:1], n=20, check=True)
    # On a busy machine the server's first answer is not always the first to arrive, with which the others are compared.
    assert (found.count(Status.OK) == 20) == passes, found.first_error


# -- what a model takes


def shapes_in(request: bytes) -> dict[str, tuple[str, list[int]]]:
    """Input name -> datatype and shape, in a request as JSON."""
    said = json.loads(request.partition(b"\r\n\r\n")[2])
    for each in said["inputs"]:
        assert len(each["data"]) == math.prod(each["shape"])
    return {each["name"]: (each["datatype"], each["shape"]) for each in said["inputs"]}


def taking(*inputs: tuple[str, str, Any]) -> Target:
    """A target as it is discovered from metadata that declare these inputs."""
    declared = [{"name": name, "datatype": datatype, "shape": shape} for name, datatype, shape in inputs]
    with http_peer(serving_model(METADATA | {"inputs": declared}, lambda _: whole(BODY))) as url:
        return discover(url)


def sent(target: Target, *shapes: str, rows: int = 1) -> dict[str, tuple[str, list[int]]]:
    return shapes_in(payloads(target.shaped(read_shapes(shapes)), rows=rows, encoding="json")[0])


@pytest.mark.parametrize(
    ("shape", "given", "rows", "is_sent"),
    [
        ([4], [], 1, [4]),
        ([8, 3], [], 1, [8, 3]),
        ([1, 3, 2, 2], [], 1, [1, 3, 2, 2]),
        ([], [], 1, []),
        ([-1], [], 3, [3]),
        ([-1, 4], [], 3, [3, 4]),
        ([-1, 3, -1, -1], ["x:3,8,8"], 1, [1, 3, 8, 8]),
        ([-1, 3, -1, -1], ["x:3,8,8"], 2, [2, 3, 8, 8]),
        ([-1, 3, -1, -1], ["x:5,3,8,8"], 1, [5, 3, 8, 8]),
        ([3, -1, -1], ["x:3,8,8"], 1, [3, 8, 8]),
        ([4], ["x:1,4"], 1, [1, 4]),
        (None, ["x:4"], 2, [2, 4]),
    ],
)
def test_the_shape_sent_is_the_one_declared_or_said(
    shape: Any, given: list[str], rows: int, is_sent: list[int]
) -> None:
    assert sent(taking(("x", "FP32", shape)), *given, rows=rows) == {"x": ("FP32", is_sent)}


def test_only_what_has_an_axis_of_samples_gets_rows() -> None:
    target = taking(("x", "FP32", [-1, 2]), ("threshold", "FP32", [1]), ("ids", "INT64", [-1, -1]))
    assert sent(target, "ids:7", rows=3) == {
        "x": ("FP32", [3, 2]),
        "threshold": ("FP32", [1]),
        "ids": ("INT64", [3, 7]),
    }


@pytest.mark.parametrize(
    ("inputs", "given", "is_sent"),
    [
        ([], ["x:4"], {"x": ("FP32", [1, 4])}),
        ([], ["x:INT64:4", "y:BYTES:1"], {"x": ("INT64", [1, 4]), "y": ("BYTES", [1, 1])}),
        ([], ["serving:input:0:UINT8:2,2"], {"serving:input:0": ("UINT8", [1, 2, 2])}),
        ([], ["input:0:2"], {"input:0": ("FP32", [1, 2])}),
        ([("x", None, [-1, 4])], ["x:FP64:4"], {"x": ("FP64", [1, 4])}),
        ([("x", "", [-1, 4])], ["x:4"], {"x": ("FP32", [1, 4])}),
    ],
)
def test_a_server_that_declares_nothing_can_be_loaded(
    inputs: list[tuple[str, Any, Any]], given: list[str], is_sent: dict[str, tuple[str, list[int]]]
) -> None:
    assert sent(taking(*inputs), *given) == is_sent


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ([], r"metadata names no input; name them with --shape NAME:FP32:SIZE,SIZE, or send .*--payloads"),
        (
            [("x", "FP32", [-1, 3, -1, -1])],
            r"leaves a size or the datatype open; set it with --shape x:3,SIZE,SIZE, or send .*--payloads",
        ),
        ([("x", "FP32", [3, -1])], r"--shape x:3,SIZE"),
        ([("x", "FP32", None)], r"'x'.*--shape x:SIZE"),
        ([("x", "STRING", [-1, 1])], r"'x'.*STRING.*--payloads"),
        ([("x", None, [-1, 1])], r"'x'.*any type.*--shape x:FP32:1"),
    ],
)
def test_what_the_metadata_leave_open_is_one_line(inputs: list[tuple[str, Any, Any]], says: str) -> None:
    with pytest.raises(LoadError, match=says) as caught:
        payloads(taking(*inputs))
    assert "\n" not in str(caught.value)


def test_rows_are_refused_where_there_is_no_axis_for_them() -> None:
    for shape in ([4], [1, 4], []):
        with pytest.raises(LoadError, match="has no batch axis: it takes float32 of shape"):
            payloads(taking(("x", "FP32", shape)), rows=2)


def test_a_shape_beyond_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    target = taking(("x", "FP32", [-1, -1, -1]))
    with pytest.raises(LoadError, match="MiB are kept in memory"):
        payloads(target.shaped({"x": Shape((100_000, 100_000))}))
    monkeypatch.setattr(payload, "_MOST_BYTES", 100_000)
    assert len(payloads(target.shaped({"x": Shape((50, 100))}))) == 5, "fewer where they are large"


@pytest.mark.parametrize(
    "text", ["x", "x:", ":3", "x:a", "x:3,", "x:3,-1", "x:0", "x:3.5", "x:FP32:", "x:3 4", "x:99999999999", "x:²"]
)
def test_a_shape_that_is_none_is_one_line(text: str) -> None:
    with pytest.raises(LoadError, match=r"cannot use the shape .*write for example --shape image:3,224,224"):
        read_shapes([text])


def test_a_shape_of_no_input_is_one_line() -> None:
    with pytest.raises(LoadError, match="m has no input 'z': its inputs are x"):
        taking(("x", "FP32", [-1, 4])).shaped(read_shapes(["z:4"]))
    with pytest.raises(LoadError, match="named before"):
        read_shapes(["x:4", "x:5"])


def tensors_in(request: bytes) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors of a binary request; its header has the form of an answer's."""
    head, _, body = request.partition(b"\r\n\r\n")
    fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
    length = int(fields["Inference-Header-Content-Length"])
    said = body[:length].replace(b'"inputs"', b'"outputs"', 1)
    return decode_answer(said + body[length:], len(said))


def test_words_and_short_floats_are_made() -> None:
    target = taking(("words", "BYTES", [-1, 2]), ("x", "BF16", [-1, 4]), ("flags", "BOOL", [-1, 3]))
    requests = payloads(target, rows=2)
    found = tensors_in(requests[0])
    assert found["words"].shape == (2, 2)
    assert all(len(word) == 16 and word.isalpha() for word in found["words"].flat)
    assert found["x"].shape == (2, 4)
    assert ((found["x"] >= 0) & (found["x"] <= 1)).all()
    assert found["flags"].dtype == bool
    assert len(set(requests)) == 32
    assert requests == payloads(target, rows=2)


def test_bf16_is_rounded_to_the_nearest() -> None:
    target = taking(("x", "BF16", [-1, 6]))
    values = np.array([[1.0, -2.5, 3.14159, np.inf, np.nan, 1e-40]], np.float64)
    found = tensors_in(payloads(target, {"x": values})[0])["x"]
    assert found[0, :2].tolist() == [1.0, -2.5]
    assert found[0, 2] == 3.140625
    assert found[0, 3] == np.inf
    assert np.isnan(found[0, 4])
    with pytest.raises(LoadError, match="takes BF16 of shape"):
        payloads(target, {"x": np.zeros((1, 6), np.uint16)})


def test_files_say_what_the_metadata_cannot(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((3, 5, 6), np.float32))
    np.save(tmp_path / "b.npy", np.ones((2, 3, 7, 7), np.float32))
    found = folder_payloads(taking(("x", "FP32", [-1, 3, -1, -1])), tmp_path)
    assert [tensors_in(each)["x"].shape for each in found] == [(1, 3, 5, 6), (2, 3, 7, 7)]

    other = tmp_path / "other"
    other.mkdir()
    np.savez(other / "a.npz", ids=np.arange(6, dtype=np.int64).reshape(1, 6), text=np.array([["a cat"]]))
    (other / "b.json").write_text('{"inputs": [1]}')
    arrays, body = folder_payloads(taking(), other)
    assert tensors_in(arrays)["ids"].tolist() == [[0, 1, 2, 3, 4, 5]]
    assert tensors_in(arrays)["text"].tolist() == [[b"a cat"]]
    assert body.endswith(b'{"inputs": [1]}')


def test_files_lose_or_gain_the_axis_of_one_sample(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones(4, np.float32))
    np.save(tmp_path / "b.npy", np.ones((1, 4), np.float32))
    for shape in ([4], [1, 4], [-1, 4]):
        found = folder_payloads(taking(("x", "FP32", shape)), tmp_path)
        assert [list(tensors_in(each)["x"].shape) for each in found] == [[abs(size) for size in shape]] * 2
    with pytest.raises(LoadError, match=r"takes float32 of shape \[5\]"):
        folder_payloads(taking(("x", "FP32", [5])), tmp_path)
    with pytest.raises(LoadError, match=r"declares no input; give them by name in \.npz"):
        folder_payloads(taking(), tmp_path)


def test_pictures_and_texts_are_sent_as_they_are_to_bytes(tmp_path: Path) -> None:
    Image.new("RGB", (5, 4), (9, 8, 7)).save(tmp_path / "a.png")
    (tmp_path / "b.txt").write_text("a cät")
    np.save(tmp_path / "c.npy", np.array(["cat", "dog"]))
    files = (tmp_path / "a.png").read_bytes(), "a cät".encode()
    for shape in ([-1], [-1, 1], [1]):
        if shape != [-1]:
            (tmp_path / "c.npy").unlink(missing_ok=True)
        requests = folder_payloads(taking(("x", "BYTES", shape)), tmp_path)
        found = [tensors_in(each)["x"] for each in requests]
        assert [each.ravel().tolist() for each in found[:2]] == [[file] for file in files]
        assert {each.ndim for each in found[:2]} == {len(shape)}
    (tmp_path / "a.png").unlink()
    with pytest.raises(LoadError, match=r"b.txt: m does not take one BYTES tensor"):
        folder_payloads(taking(("x", "FP32", [-1, 4])), tmp_path)
    with pytest.raises(LoadError, match=r"takes BYTES of shape \[-1, 2\]"):
        folder_payloads(taking(("x", "BYTES", [-1, 2])), tmp_path)


def test_bytes_that_are_no_text_cannot_be_json() -> None:
    target = taking(("x", "BYTES", [-1]))
    samples = {"x": np.array([b"\xff\xfe"])}
    assert tensors_in(payloads(target, samples)[0])["x"].tolist() == [b"\xff\xfe"]
    with pytest.raises(LoadError, match="not text; leave out --json-tensors"):
        payloads(target, samples, encoding="json")


def test_a_server_that_lists_its_models_as_kserve_does_is_found() -> None:
    inner = serving_model(METADATA, lambda _: whole(BODY))

    def answer(path: str, body: bytes) -> tuple[Pieces, bool]:
        if path == "/v2/repository/index":
            return whole(b'{"detail": "Method Not Allowed"}', 405)
        return whole(b'{"models": ["m"]}') if path == "/v2/models" else inner(path, body)

    with http_peer(answer) as url:
        assert discover(url).model == "m"


@pytest.mark.parametrize("status", [404, 405, 500, 501])
def test_a_server_that_lists_no_models_is_told_how_to_be_asked(status: int) -> None:
    inner = serving_model(METADATA, lambda _: whole(BODY))

    def answer(path: str, body: bytes) -> tuple[Pieces, bool]:
        return inner(path, body) if path.startswith("/v2/models/") else whole(b"<html>", status)

    with http_peer(answer) as url:
        with pytest.raises(LoadError, match="name it with --model"):
            discover(url)
        assert discover(url, "m").model == "m"


def test_questions_about_the_model_wait_for_the_final_answer() -> None:
    inner = serving_model(METADATA, lambda _: whole(BODY))

    def answer(path: str, body: bytes) -> tuple[Pieces, bool]:
        pieces, is_last = inner(path, body)
        return [b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 102 X\r\n\r\n", *pieces], is_last

    with http_peer(answer) as url:
        assert discover(url).model == "m"


def test_an_error_in_another_form_is_told(generator: Generator) -> None:
    """As FastAPI has it, behind KServe and MLServer."""
    detail = b'{"detail": [{"loc": ["body", "inputs"], "msg": "field required"}]}'
    with http_peer(serving_model(METADATA, lambda _: whole(detail, 422))) as url:
        target = discover(url)
        with pytest.raises(LoadError, match=r"status 422: .*field required"):
            run(generator, target, payloads(target), n=20)
    with http_peer(lambda path, _: whole(detail, 404)) as url, pytest.raises(LoadError, match="field required"):
        discover(url, "m")


def test_a_name_of_its_own_does_not_change_the_path() -> None:
    """Metadata of an alias may name what it stands for."""
    with http_peer(serving_model(METADATA | {"name": "m-v17"}, lambda _: whole(BODY))) as url:
        assert discover(url).infer_path == "/v2/models/m/infer"


# -- over gRPC


def described(*inputs: tuple[str, str, list[int]]) -> Callable[[Any], Any]:
    def metadata(request: Any) -> Any:
        if request.name != "m":
            raise Refused(grpc.StatusCode.NOT_FOUND, f"no model {request.name}")
        answer = message("inference.ModelMetadataResponse")(name="m")
        for name, datatype, shape in inputs:
            answer.inputs.add(name=name, datatype=datatype, shape=shape)
        answer.outputs.add(name="y", datatype="FP32", shape=[-1, 2])
        return answer

    return metadata


def index(*names: str) -> Callable[[Any], Any]:
    def answer(_: Any) -> Any:
        found = message("inference.RepositoryIndexResponse")()
        for name in names:
            found.models.add(name=name, state="READY")
        return found

    return answer


def answering(datatype: str, raw: bytes = b"", **contents: list[Any]) -> Callable[[Any], Any]:
    def infer(request: Any) -> Any:
        answer = message("inference.ModelInferResponse")(model_name="m")
        output = answer.outputs.add(name="y", datatype=datatype, shape=[1, 2])
        for field, values in contents.items():
            getattr(output.contents, field).extend(values)
        if raw:
            answer.raw_output_contents.append(raw)
        return answer

    return infer


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        None,
    ],
)
def test_a_grpc_server_without_a_list_of_models_is_told_how_to_be_asked(code: grpc.StatusCode | None) -> None:
    """RepositoryIndex is an extension: KServe has none, MLServer has it in another service."""

    def refuse(_: Any) -> Any:
        assert code is not None
        raise Refused(code, "not here")

    methods: dict[str, Any] = {"ModelMetadata": described(("x", "FP32", [-1, 4]))}
    if code is not grpc.StatusCode.UNIMPLEMENTED:
        methods["RepositoryIndex"] = index() if code is None else refuse
    with grpc_peer(**methods) as url:
        with pytest.raises(LoadError, match=r"cannot tell which model.*name it with --model") as caught:
            discover(url)
        assert code is None or code.name in caught.value.why
        target = discover(url, "m")
        assert (target.model, target.outputs) == ("m", ("y",))
        with pytest.raises(LoadError, match="NOT_FOUND"):
            discover(url, "other")


@pytest.mark.parametrize(
    "infer",
    [
        answering("FP32", fp32_contents=[1.0, 0.5]),
        answering("FP32", struct.pack("<2f", 1.0, 0.5)),
        answering("INT8", int_contents=[-1, 2]),
        answering("UINT64", uint64_contents=[1, 2**63]),
        answering("BYTES", bytes_contents=[b"cat", b"dog"]),
        answering("BYTES", b"\x03\x00\x00\x00cat\x03\x00\x00\x00dog"),
        answering("BOOL", bool_contents=[True, False]),
        answering("BF16", struct.pack("<2H", 0x3F80, 0xBF00)),
    ],
)
def test_values_come_raw_or_typed(infer: Callable[[Any], Any], generator: Generator) -> None:
    methods = {"ModelMetadata": described(("x", "FP32", [-1, 4])), "RepositoryIndex": index("m"), "ModelInfer": infer}
    with grpc_peer(**methods) as url:
        target = discover(url)
        found = run(generator, target, payloads(target), n=20, check=True)
    assert found.count(Status.OK) == 20, found.first_error


@pytest.mark.parametrize(
    ("infer", "says"),
    [
        (answering("FP32", fp32_contents=[NAN, NAN]), "holds no finite number"),
        (answering("FP64", struct.pack("<2d", NAN, math.inf)), "holds no finite number"),
    ],
)
def test_nan_over_grpc_never_passes_a_check(infer: Callable[[Any], Any], says: str, generator: Generator) -> None:
    methods = {"ModelMetadata": described(("x", "FP32", [-1, 4])), "RepositoryIndex": index("m"), "ModelInfer": infer}
    with grpc_peer(**methods) as url:
        target = discover(url)
        found = run(generator, target, payloads(target), n=20, check=True)
    assert found.count(Status.OK) == 0
    assert says in found.first_error


def test_what_grpc_answers_with_neither_is_one_line(generator: Generator) -> None:
    for infer in (answering("FP32"), answering("FP16"), answering("FP32", b"\x00" * 7)):
        methods = {"ModelMetadata": described(("x", "FP32", [-1, 4])), "ModelInfer": infer}
        with grpc_peer(**methods) as url:
            target = discover(url, "m")
            with pytest.raises(LoadError, match="not an answer"):
                run(generator, target, payloads(target), n=20)


def test_odd_inputs_go_over_grpc(generator: Generator) -> None:
    seen: list[Any] = []

    def infer(request: Any) -> Any:
        seen.append(request)
        return answering("FP32", fp32_contents=[1.0, 0.5])(request)

    metadata = described(("x", "FP32", [4]), ("words", "BYTES", [-1, 1]), ("b", "BF16", [-1, -1]))
    with grpc_peer(ModelMetadata=metadata, RepositoryIndex=index("m"), ModelInfer=infer) as url:
        target = discover(url).shaped(read_shapes(["b:3"]))
        assert run(generator, target, payloads(target, rows=2), n=10).count(Status.OK) == 10
    request = seen[0]
    assert [(each.name, each.datatype, list(each.shape)) for each in request.inputs] == [
        ("x", "FP32", [4]),
        ("words", "BYTES", [2, 1]),
        ("b", "BF16", [2, 3]),
    ]
    assert [len(raw) for raw in request.raw_input_contents] == [16, 40, 12]


# -- the command line


def rushhour(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rushhour", *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def test_the_command_line_takes_shapes() -> None:
    seen: list[bytes] = []

    def infer(body: bytes) -> tuple[Pieces, bool]:
        seen.append(body)
        return [b"HTTP/1.0 200 OK\r\n\r\n" + BODY], True

    with http_peer(serving_model(METADATA | {"inputs": []}, infer)) as url:
        done = rushhour("load", url, "--closed-loop", "1", "--duration", "0.3s", "--shape", "x:INT32:4", "--check",
                        "--rows", "2", "--json-tensors")  # fmt: skip
        assert done.returncode == 0, done.stderr
        (entry,) = json.loads(seen[0])["inputs"]
        assert (entry["datatype"], entry["shape"]) == ("INT32", [2, 4])
        for arguments, says in (
            ([], "--shape NAME:FP32:SIZE,SIZE"),
            (["--shape", "x"], "cannot use the shape 'x'"),
            (["--shape", "x:4", "--path", "/predict"], "without --model and --shape"),
        ):
            done = rushhour("load", url, "--rate", "10", *arguments)
            assert done.returncode == 2
            line = done.stderr.strip().splitlines()[-1]
            assert line.startswith("rushhour: ")
            assert says in line
            assert "Traceback" not in done.stderr
