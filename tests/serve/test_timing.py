"""Every answer gives its times, its batch, its variant and its version, over every face; a switch turns it off."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton
from tritonclient.grpc import service_pb2, service_pb2_grpc

from conftest import Server, serving
from rushhour.bundle import Bundle
from rushhour.load.generator.connection import KnownHead
from rushhour.serve import ServeSettings
from rushhour.serve.observability.explanation import Explanation
from rushhour.testing.bundles import tiny_answers
from rushhour.wire import encode_request

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 1), dtype=np.uint8)
TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
METRIC = re.compile(rf'{TOKEN}(?:;{TOKEN}=(?:{TOKEN}|"[^"\\]*"))*')
"""A metric of the standard (w3.org/TR/server-timing, 3.)"""


@pytest.fixture(scope="module")
def timed(tiny: Bundle) -> Iterator[Server]:
    with serving(tiny.path, ServeSettings(http_port=0, grpc_port=0)) as running:
        yield running


def parsed(value: str) -> dict[str, dict[str, str]]:
    """Metric -> parameter -> value."""
    found = {}
    for metric in value.split(", "):
        assert METRIC.fullmatch(metric), metric
        name, *parameters = metric.split(";")
        found[name] = dict(parameter.partition("=")[::2] for parameter in parameters)
    return found


def check(value: str, rows: int) -> None:
    found = parsed(value)
    assert list(found) == ["queue", "batch", "compute", "batch-size", "variant", "version", "total"]
    times = {name: float(found[name]["dur"]) for name in ("queue", "batch", "compute", "total")}
    assert min(times.values()) >= 0
    assert times["total"] == pytest.approx(times["queue"] + times["batch"] + times["compute"], abs=0.002)
    assert found["batch-size"] == {"desc": str(rows)}
    assert found["variant"] == {"desc": '"tiny-f32"'}
    assert found["version"] == {"desc": '"1"'}


def over_http(server: Server, body: bytes, headers: dict[str, str]) -> tuple[str | None, bytes]:
    connection = http.client.HTTPConnection(*server.address, timeout=20)
    try:
        connection.request("POST", "/v2/models/tiny/infer", body, headers)
        response = connection.getresponse()
        content = response.read()
        assert response.status == 200, content
        length = response.getheader("Inference-Header-Content-Length")
        return response.getheader("Server-Timing"), content[: None if length is None else int(length)]
    finally:
        connection.close()


def request_of(images: np.ndarray, bundle: Bundle, **more: object) -> tuple[bytes, dict[str, str]]:
    length, body = encode_request(bundle.manifest.signature, {"image": images})
    header = json.dumps(json.loads(body[:length]) | more).encode()
    return header + body[length:], {"Inference-Header-Content-Length": str(len(header))}


def test_an_answer_over_http_gives_its_times_and_its_variant(timed: Server, tiny: Bundle) -> None:
    data = [int(value) for value in IMAGES.ravel()]
    entry = {"name": "image", "shape": [3, 4, 4, 1], "datatype": "UINT8", "data": data}
    for body, headers in (request_of(IMAGES, tiny), (json.dumps({"inputs": [entry]}).encode(), {})):
        value, header = over_http(timed, body, headers)
        assert value is not None
        check(value, 3)
        assert json.loads(header)["parameters"] == {"variant": "tiny-f32"}


def test_repeated_requests_with_and_without_ids_are_answered_alike(timed: Server, tiny: Bundle) -> None:
    """The second one is recognised by its bytes, and its answer is prepared."""
    connection = http.client.HTTPConnection(*timed.address, timeout=20)
    for more in ({}, {"id": "a"}, {"id": "longer"}, {}, {"id": "b"}):
        body, headers = request_of(IMAGES, tiny, **more)
        for _ in range(2):
            connection.request("POST", "/v2/models/tiny/infer", body, headers)
            response = connection.getresponse()
            content = response.read()
            check(response.getheader("Server-Timing", ""), 3)
            length = int(response.getheader("Inference-Header-Content-Length", ""))
            header = json.loads(content[:length])
            assert header["parameters"] == {"variant": "tiny-f32"}
            assert header.get("id") == more.get("id")
            answer = np.frombuffer(content[length:], np.float32).reshape(3, 3)
            np.testing.assert_allclose(answer, tiny_answers(IMAGES), atol=1e-5)
    connection.close()


def test_an_error_says_nothing(timed: Server) -> None:
    connection = http.client.HTTPConnection(*timed.address, timeout=20)
    connection.request("POST", "/v2/models/tiny/infer", b"{}")
    response = connection.getresponse()
    assert response.status == 400
    assert response.getheader("Server-Timing") is None
    connection.close()


def message_of(images: np.ndarray, identity: str = "") -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name="tiny", id=identity)
    request.inputs.add(name="image", datatype="UINT8", shape=images.shape)
    request.raw_input_contents.append(images.tobytes())
    return request


def test_an_answer_over_grpc_gives_them_in_its_trailing_metadata(timed: Server) -> None:
    with grpc.insecure_channel(timed.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        response, call = stub.ModelInfer.with_call(message_of(IMAGES, "7"), timeout=20)
    assert response.id == "7"
    assert response.parameters["variant"].string_param == "tiny-f32"
    check(dict(call.trailing_metadata())["server-timing"], 3)
    answer = np.frombuffer(response.raw_output_contents[0], np.float32).reshape(3, 3)
    np.testing.assert_allclose(answer, tiny_answers(IMAGES), atol=1e-5)


def test_an_answer_of_a_stream_carries_them_itself(timed: Server) -> None:
    with grpc.insecure_channel(timed.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        sent = [message_of(IMAGES[:rows], str(rows)) for rows in (1, 2, 3)]
        answers = list(stub.ModelStreamInfer(iter(sent), timeout=20))
    for rows, answer in enumerate(answers, 1):
        response = answer.infer_response
        assert response.id == str(rows)
        assert response.parameters["variant"].string_param == "tiny-f32"
        found = parsed(response.parameters["server_timing"].string_param)
        assert int(found["batch-size"]["desc"]) >= rows


@pytest.mark.parametrize("face", ["http", "grpc"])
def test_an_unmodified_triton_client_works_as_before(timed: Server, face: str) -> None:
    module = triton_grpc if face == "grpc" else triton
    with module.InferenceServerClient(timed.grpc if face == "grpc" else timed.url[7:]) as client:
        tensor = module.InferInput("image", [3, 4, 4, 1], "UINT8")
        tensor.set_data_from_numpy(IMAGES)
        result = client.infer("tiny", [tensor], request_id="1")
        np.testing.assert_allclose(result.as_numpy("probabilities"), tiny_answers(IMAGES), atol=1e-5)


def test_curl_shows_it(timed: Server) -> None:
    url = f"{timed.url}/v2/models/tiny/infer"
    where = ["-H", "Inference-Header-Content-Length: 0", "--data-binary", "@-"]
    done = subprocess.run(["curl", "-si", url, *where], input=IMAGES.tobytes(), capture_output=True, check=True)
    (line,) = [line for line in done.stdout.split(b"\r\n") if line.lower().startswith(b"server-timing:")]
    check(line.decode().partition(": ")[2], 3)


def test_the_switch_turns_it_off(tiny: Bundle) -> None:
    with serving(tiny.path, ServeSettings(http_port=0, grpc_port=0, server_timing=False)) as server:
        value, header = over_http(server, *request_of(IMAGES, tiny))
        assert value is None
        assert "parameters" not in json.loads(header)
        with grpc.insecure_channel(server.grpc) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            response, call = stub.ModelInfer.with_call(message_of(IMAGES), timeout=20)
        assert not response.parameters
        assert "server-timing" not in dict(call.trailing_metadata())


class Ended(NamedTuple):
    variant: str = "small"
    rows: int = 16
    taken: float = 1.010
    started: float = 1.011
    ended: float = 1.015


def test_times_of_requests_that_shared_a_batch_are_their_own() -> None:
    explanation = Explanation()
    explanation.begin(Ended(), "3", 1.016)
    said = []
    for arrived, decoding_s in ((1.000, 0.0), (0.990, 0.012)):
        explanation.arrived, explanation.decoding_s = arrived, decoding_s
        assert explanation.field() == b"server-timing: %b\r\n" % explanation.times()
        said.append(parsed(explanation.times().decode()))
    first, second = said
    assert (first["queue"]["dur"], first["total"]["dur"]) == ("10.000", "16.000")
    assert (second["queue"]["dur"], second["decode"]["dur"], second["total"]["dur"]) == ("8.000", "12.000", "26.000")
    assert (first["batch"]["dur"], first["compute"]["dur"], first["batch-size"]["desc"]) == ("2.000", "4.000", "16")


def test_an_answer_that_is_written_later_says_what_it_would_have_said() -> None:
    explanation = Explanation()
    explanation.begin(Ended(), "3", 1.016)
    explanation.arrived = 1.0
    kept = explanation.keep()
    explanation.begin(Ended("large"), "4", 9.0)
    explanation.arrived = 8.0
    explanation.resume(kept, 1.020)
    said = parsed(explanation.times().decode())
    assert (explanation.variant, said["version"]["desc"]) == ("small", '"3"')
    assert (said["queue"]["dur"], said["batch"]["dur"], said["total"]["dur"]) == ("10.000", "6.000", "20.000")


def test_a_name_cannot_break_out_of_the_header() -> None:
    explanation = Explanation()
    explanation.begin(Ended('a"; x\r\nset-cookie: b=c\\ é'), "3", 2.0)
    value = explanation.times().decode("ascii")
    assert value.isprintable()
    assert ', variant;desc="a?; x??set-cookie: b=c? ?", version' in value


def test_the_load_generator_recognises_heads_whatever_their_times() -> None:
    known = KnownHead()
    head = b"HTTP/1.1 200 OK\r\ndate: x\r\nserver-timing: queue;dur=%b\r\ncontent-length: 3\r\n\r\n"
    known.learn(head % b"1.000", 3, None)
    for times in (b"1.000", b"12345.678", b""):
        assert known.end(head % times + b"abc") == len(head % times)
    assert known.end(head % b"1" + b"abcd") == -1
    assert known.end(head % b"1" + b"ab") == -1
    assert known.end(head[:40]) == -1
    assert known.end(head.replace(b"date: x", b"date: y") % b"1" + b"abc") == -1
    plain = b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n"
    known.learn(plain, 1, None)
    assert known.end(plain + b"x") == len(plain)
