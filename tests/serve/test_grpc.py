"""The whole protocol over both faces, with the clients of the field: gRPC, statistics, configuration, shared memory."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import queue
import signal
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException
from tritonclient.utils import shared_memory as shm

from conftest import Server, serving
from rushhour.bundle import Bundle
from rushhour.clock import WallClock
from rushhour.engines import EngineConfig
from rushhour.errors import EngineError, ServeError
from rushhour.measurement import ServiceTimes
from rushhour.plan import Policy
from rushhour.serve import Limits, ServeSettings, open_target
from rushhour.serve.access.keys import Keys
from rushhour.serve.memory.shared_memory import SharedMemory
from rushhour.serve.opening import opener
from rushhour.serve.protocols.control import Control
from rushhour.serve.protocols.grpc.server import GrpcServer
from rushhour.serve.protocols.listener import bind_reserved
from rushhour.serve.repository import Repository
from rushhour.serve.scheduling.admission import Profile
from rushhour.serve.scheduling.cell import Cell
from rushhour.serve.scheduling.variant import Variant
from rushhour.serve.service import Loaded, Service
from rushhour.serve.target import ServedVariant
from rushhour.testing.bundles import tiny_answers, tiny_bundle
from rushhour.testing.fakes import FakeEngine, fake_answers
from rushhour.wire import Codec, Place, encode_request

BOTH = ServeSettings(http_port=0, grpc_port=0)
KEY = "a-key-of-more-than-16-letters"


@pytest.fixture(scope="module")
def server(tiny: Bundle) -> Iterator[Server]:
    with serving(tiny.path, BOTH) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.grpc) as opened:
        yield opened


@pytest.fixture
def web(server: Server) -> Iterator[tritonclient.http.InferenceServerClient]:
    with tritonclient.http.InferenceServerClient(server.url.removeprefix("http://")) as opened:
        yield opened


def unique(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, 4, 4, 1), dtype=np.uint8)


def tensor(images: np.ndarray, module: Any = triton) -> Any:
    made = module.InferInput("image", list(images.shape), "UINT8")
    made.set_data_from_numpy(images)
    return made


def ask(client: triton.InferenceServerClient, images: np.ndarray, **options: Any) -> np.ndarray:
    answer = client.infer("tiny", [tensor(images)], **options).as_numpy("probabilities")
    assert answer is not None
    return answer


def over_http(server: Server, method: str, path: str, body: object = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(*server.address, timeout=10)
    try:
        connection.request(method, path, b"" if body is None else json.dumps(body).encode())
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def asking(images: np.ndarray, name: str = "tiny", **fields: Any) -> Any:
    request = service_pb2.ModelInferRequest(model_name=name, **fields)
    request.inputs.add(name="image", datatype="UINT8", shape=images.shape)
    request.raw_input_contents.append(images.tobytes())
    return request


# Inference.


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_an_unmodified_triton_client_gets_the_right_answers(client: triton.InferenceServerClient, rows: int) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "1")
    assert not client.is_model_ready("tiny", "2")
    assert not client.is_model_ready("other")
    metadata = client.get_model_metadata("tiny")
    assert (metadata.name, list(metadata.versions), list(metadata.inputs[0].shape)) == ("tiny", ["1"], [-1, 4, 4, 1])
    assert client.get_server_metadata().name == "rushhour"
    (model,) = client.get_model_repository_index().models
    assert (model.name, model.version, model.state) == ("tiny", "1", "READY")
    images = unique(rows, seed=rows)
    answer = client.infer("tiny", [tensor(images)], request_id="seven", model_version="1")
    np.testing.assert_allclose(answer.as_numpy("probabilities"), tiny_answers(images), atol=1e-5)
    response = answer.get_response()
    assert (response.id, response.model_name, response.model_version) == ("seven", "tiny", "1")
    assert len(response.raw_output_contents) == len(response.outputs) == 1


def test_typed_contents_are_answered_too(server: Server) -> None:
    images = unique(2, 0)
    request = asking(images)
    request.ClearField("raw_input_contents")
    request.inputs[0].contents.uint_contents.extend(images.ravel().tolist())
    with grpc.insecure_channel(server.grpc) as channel:
        response = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
    answer = np.frombuffer(response.raw_output_contents[0], np.float32).reshape(2, 3)
    np.testing.assert_allclose(answer, tiny_answers(images), atol=1e-5)


def test_every_one_of_256_callers_gets_its_own_answer(server: Server) -> None:
    async def callers() -> None:
        async with tritonclient.grpc.aio.InferenceServerClient(server.grpc) as opened:

            async def caller(number: int) -> None:
                for turn in range(4):
                    images = unique(1 + (number + turn) % 7, seed=1000 * number + turn)
                    answer = await opened.infer("tiny", [tensor(images)], request_id=f"{number}.{turn}")
                    assert answer.get_response().id == f"{number}.{turn}"
                    np.testing.assert_allclose(answer.as_numpy("probabilities"), tiny_answers(images), atol=1e-5)

            await asyncio.gather(*(caller(number) for number in range(256)))

    asyncio.run(callers())


def test_the_asynchronous_http_client_gets_the_right_answers(server: Server) -> None:
    async def caller() -> None:
        async with tritonclient.http.aio.InferenceServerClient(server.url.removeprefix("http://")) as opened:
            assert await opened.is_server_ready()
            assert (await opened.get_model_config("tiny"))["name"] == "tiny"
            images = [unique(rows, seed=rows) for rows in range(1, 20)]
            answers = await asyncio.gather(
                *(opened.infer("tiny", [tensor(each, tritonclient.http)], request_id="x") for each in images)
            )
            for each, answer in zip(images, answers, strict=True):
                np.testing.assert_allclose(answer.as_numpy("probabilities"), tiny_answers(each), atol=1e-5)

    asyncio.run(caller())


def test_callbacks_and_compression(client: triton.InferenceServerClient) -> None:
    images, answers = unique(5, 5), queue.SimpleQueue[Any]()
    client.async_infer("tiny", [tensor(images)], lambda result, error: answers.put((result, error)))
    result, error = answers.get(timeout=10)
    assert error is None
    np.testing.assert_allclose(result.as_numpy("probabilities"), tiny_answers(images), atol=1e-5)
    for algorithm in ("gzip", "deflate"):
        np.testing.assert_allclose(
            ask(client, images, compression_algorithm=algorithm), tiny_answers(images), atol=1e-5
        )


def test_a_stream_is_answered_in_order_and_survives_a_bad_request(client: triton.InferenceServerClient) -> None:
    answers = queue.SimpleQueue[Any]()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for number in range(600):  # more than a stream has under way at once
        client.async_stream_infer(
            "tiny" if number != 300 else "other", [tensor(unique(1 + number % 3, number))], request_id=str(number)
        )
    for number in range(600):
        result, error = answers.get(timeout=20)
        if number == 300:
            assert "no model 'other'" in str(error)
            continue
        assert error is None
        assert result.get_response().id == str(number)
        images = unique(1 + number % 3, number)
        np.testing.assert_allclose(result.as_numpy("probabilities"), tiny_answers(images), atol=1e-5)
    client.stop_stream()


@pytest.mark.parametrize("binary", [True, False])
def test_the_likeliest_classes_in_words(
    client: triton.InferenceServerClient, web: tritonclient.http.InferenceServerClient, binary: bool
) -> None:
    images = unique(4, 4)
    right = np.argsort(-tiny_answers(images), axis=1)[:, :2]
    wanted = [tritonclient.http.InferRequestedOutput("probabilities", binary_data=binary, class_count=2)]
    for answer in (
        client.infer("tiny", [tensor(images)], outputs=[triton.InferRequestedOutput("probabilities", class_count=2)]),
        web.infer("tiny", [tensor(images, tritonclient.http)], outputs=wanted),
    ):
        words = answer.as_numpy("probabilities")
        assert words.shape == (4, 2)
        for row in range(4):
            for place, word in enumerate(words[row]):
                text = word.decode() if isinstance(word, bytes) else word
                value, index, label = text.split(":")
                assert int(index) == right[row, place]
                assert label == f"class {index}"
                assert float(value) == pytest.approx(tiny_answers(images)[row, int(index)], abs=1e-5)


# What goes wrong.


@pytest.mark.parametrize(
    ("request_", "code", "says"),
    [
        (asking(unique(1, 0), name="other"), grpc.StatusCode.NOT_FOUND, "no model 'other'"),
        (asking(unique(1, 0), model_version="9"), grpc.StatusCode.NOT_FOUND, "version '9'"),
        (asking(np.zeros((1, 5, 4, 1), np.uint8)), grpc.StatusCode.INVALID_ARGUMENT, "shape"),
        (asking(np.zeros((0, 4, 4, 1), np.uint8)), grpc.StatusCode.INVALID_ARGUMENT, "0 samples"),
        (asking(np.zeros((5000, 4, 4, 1), np.uint8)), grpc.StatusCode.INVALID_ARGUMENT, "5000 samples"),
        (service_pb2.ModelInferRequest(model_name="tiny"), grpc.StatusCode.INVALID_ARGUMENT, "missing"),
    ],
)
def test_wrong_requests_get_a_code_and_a_reason(
    server: Server, request_: Any, code: grpc.StatusCode, says: str
) -> None:
    with grpc.insecure_channel(server.grpc) as channel, pytest.raises(grpc.RpcError, match=says) as caught:
        service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request_)
    assert caught.value.code() == code


def test_a_message_beyond_the_limit_is_refused_packed_or_not(tiny: Bundle) -> None:
    limits = Limits(body_bytes=2**20)
    with serving(tiny.path, ServeSettings(http_port=0, grpc_port=0, limits=limits)) as small:
        statm = Path(f"/proc/{small.process.pid}/statm")
        before = int(statm.read_text().split()[1])
        with grpc.insecure_channel(small.grpc, options=[("grpc.max_send_message_length", -1)]) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            for compression, size in ((None, 2 * 2**20), (grpc.Compression.Gzip, 200 * 2**20)):
                with pytest.raises(grpc.RpcError) as caught:
                    stub.ModelInfer(asking(np.zeros((size // 16, 4, 4, 1), np.uint8)), compression=compression)
                assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            images = unique(1, 0)
            assert stub.ModelInfer(asking(images)).outputs[0].shape == [1, 3]
        assert (int(statm.read_text().split()[1]) - before) * 4096 < 50 * 2**20


def test_connections_are_bounded_and_silent_ones_closed(tiny: Bundle) -> None:
    limits = Limits(connections=3, request_s=1.0)
    with serving(tiny.path, ServeSettings(http_port=0, grpc_port=0, limits=limits)) as small:
        host, port = small.grpc.split(":")
        silent = [socket.create_connection((host, int(port)), timeout=10) for _ in range(4)]
        with contextlib.ExitStack() as opened:
            for connection in silent:
                opened.enter_context(connection)
            with triton.InferenceServerClient(small.grpc) as shut_out, pytest.raises(InferenceServerException):
                shut_out.is_server_live(client_timeout=0.5)
            for connection in silent:
                with contextlib.suppress(ConnectionError):
                    while connection.recv(65536):
                        pass
            with triton.InferenceServerClient(small.grpc) as let_in:
                assert let_in.is_server_live()


def test_bytes_that_are_no_message_harm_nobody_else(server: Server, client: triton.InferenceServerClient) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        for method in ("ModelInfer", "ModelMetadata", "Nothing"):
            call = channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
            with pytest.raises(grpc.RpcError) as caught:
                call(b"\xff" * 100)
            assert (
                caught.value.code()
                in {
                    "ModelInfer": (grpc.StatusCode.INVALID_ARGUMENT,),
                    "ModelMetadata": (grpc.StatusCode.INVALID_ARGUMENT,),
                    "Nothing": (grpc.StatusCode.UNIMPLEMENTED,),
                }[method]
            )
    host, port = server.grpc.split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        connection.settimeout(10)
        with contextlib.suppress(ConnectionError):
            while connection.recv(65536):
                pass
    np.testing.assert_allclose(ask(client, unique(1, 1)), tiny_answers(unique(1, 1)), atol=1e-5)


def test_keys_hold_for_grpc_too(tiny: Bundle) -> None:
    with serving(tiny.path, ServeSettings(http_port=0, grpc_port=0, api_keys=(KEY,))) as guarded:
        with triton.InferenceServerClient(guarded.grpc) as opened:
            assert opened.is_server_live()
            assert opened.is_server_ready()
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}):
                for call in (
                    lambda headers=headers: ask(opened, unique(1, 0), headers=headers),
                    lambda headers=headers: opened.get_model_metadata("tiny", headers=headers),
                    lambda headers=headers: opened.unload_model("tiny", headers=headers),
                ):
                    with pytest.raises(InferenceServerException, match="UNAUTHENTICATED"):
                        call()
            right = {"authorization": f"Bearer {KEY}"}
            np.testing.assert_allclose(ask(opened, unique(1, 0), headers=right), tiny_answers(unique(1, 0)), atol=1e-5)
        with grpc.insecure_channel(guarded.grpc) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.ModelStreamInfer(iter([asking(unique(1, 0))])))
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
            assert health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status == 1


def test_tls_holds_for_grpc_too(tiny: Bundle, tmp_path: Path) -> None:
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"],
        cwd=tmp_path,
        capture_output=True,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("openssl is not there to make a certificate")
    certificate = tmp_path / "cert.pem"
    settings = ServeSettings(
        http_port=0, grpc_port=0, tls_certificate=str(certificate), tls_key=str(tmp_path / "key.pem")
    )
    with serving(tiny.path, settings) as secret:
        with triton.InferenceServerClient(secret.grpc, ssl=True, root_certificates=str(certificate)) as opened:
            np.testing.assert_allclose(ask(opened, unique(2, 7)), tiny_answers(unique(2, 7)), atol=1e-5)
        with triton.InferenceServerClient(secret.grpc) as opened, pytest.raises(InferenceServerException):
            ask(opened, unique(1, 0))


# The server's own account of itself.


def test_what_perf_analyzer_asks_over_http_and_what_it_reads(server: Server) -> None:
    """In its order: metadata, configuration, server, statistics. It reads these fields without looking first."""
    status, metadata = over_http(server, "GET", "/v2/models/tiny")
    assert status == 200
    status, config = over_http(server, "GET", "/v2/models/tiny/config")
    assert status == 200
    assert isinstance(config["max_batch_size"], int)
    assert config["max_batch_size"] > 0
    assert "dynamic_batching" in config
    assert config["model_transaction_policy"]["decoupled"] is False
    assert config["response_cache"]["enable"] is False
    for side, known in (("input", metadata["inputs"]), ("output", metadata["outputs"])):
        shapes = {entry["name"]: entry for entry in known}
        for entry in config[side]:
            assert shapes[entry["name"]]["shape"] == [-1, *entry["dims"]]
            assert f"TYPE_{shapes[entry['name']]['datatype']}" == entry["data_type"]
    status, shown = over_http(server, "GET", "/v2")
    assert status == 200
    assert isinstance(shown["name"], str)
    assert isinstance(shown["version"], str)
    assert {"statistics", "speed", "system_shared_memory", "classification"} <= set(shown["extensions"])
    for path in ("/v2/models/tiny/stats", "/v2/models/tiny/versions/1/stats", "/v2/models/stats"):
        status, statistics = over_http(server, "GET", path)
        assert status == 200
        (entry,) = statistics["model_stats"]
        assert (entry["name"], entry["version"]) == ("tiny", "1")
        for name in ("last_inference", "inference_count", "execution_count"):
            assert isinstance(entry[name], int)
        assert isinstance(entry["batch_stats"], list)
        stages = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
        for name in (*stages, "cache_hit", "cache_miss"):
            duration = entry["inference_stats"][name]
            assert isinstance(duration["count"], int)
            assert isinstance(duration["ns"], int)


def test_what_perf_analyzer_asks_over_grpc_and_what_it_reads(client: triton.InferenceServerClient) -> None:
    """There it turns messages into JSON, in which 64-bit integers are strings and defaults are left out."""
    metadata = client.get_model_metadata("tiny", as_json=True)
    config = client.get_model_config("tiny", as_json=True)["config"]
    assert config["max_batch_size"] == 16
    assert "dynamic_batching" in config
    assert "model_transaction_policy" in config
    assert "response_cache" in config
    assert [entry["name"] for entry in config["input"]] == [entry["name"] for entry in metadata["inputs"]]
    assert [entry["name"] for entry in config["output"]] == [entry["name"] for entry in metadata["outputs"]]
    assert config["input"][0] == {"name": "image", "data_type": "TYPE_UINT8", "dims": ["4", "4", "1"]}
    assert "statistics" in client.get_server_metadata(as_json=True)["extensions"]
    ask(client, unique(1, 0))
    (entry,) = client.get_inference_statistics("tiny").model_stats
    assert (entry.name, entry.version) == ("tiny", "1")
    for _, duration in entry.inference_stats.ListFields():
        assert duration.DESCRIPTOR.full_name == "inference.StatisticDuration"
    for name in ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output"):
        assert entry.inference_stats.HasField(name)


def test_statistics_say_what_happened(tiny: Bundle) -> None:
    with serving(tiny.path, BOTH) as fresh, triton.InferenceServerClient(fresh.grpc) as opened:
        (before,) = opened.get_inference_statistics("tiny").model_stats
        assert (before.inference_count, before.execution_count, before.last_inference) == (0, 0, 0)
        began = time.time()
        # The last one takes three batches, or more where smaller ones were measured to be cheaper.
        sizes = (1, 5, 16, 40)
        for rows in sizes:
            ask(opened, unique(rows, rows))
        took = time.time() - began
        with pytest.raises(InferenceServerException):
            opened.infer("tiny", [tensor(np.zeros((1, 3), np.uint8))])
        (after,) = over_http(fresh, "GET", "/v2/models/tiny/stats")[1]["model_stats"]
    assert after["inference_count"] == sum(sizes)
    batches = {entry["batch_size"]: entry["compute_infer"]["count"] for entry in after["batch_stats"]}
    assert after["execution_count"] == sum(batches.values()) >= 6
    assert sum(size * count for size, count in batches.items()) == sum(sizes)
    assert {1, 5, 16} <= batches.keys()
    assert max(batches) == 16
    assert began * 1e3 - 1 <= after["last_inference"] <= (began + took) * 1e3 + 1
    stages = after["inference_stats"]
    parts = ("queue", "compute_input", "compute_infer", "compute_output")
    for name in ("success", *parts):
        assert stages[name]["count"] == 4
        assert 0 < stages[name]["ns"] < took * 1e9 * (3 if name in parts else 1)
    assert stages["fail"]["count"] == 1
    for name in parts[1:]:
        assert sum(entry[name]["ns"] for entry in after["batch_stats"]) == pytest.approx(stages[name]["ns"], abs=10)


def test_health_and_repository_over_grpc(tiny: Bundle) -> None:
    with (
        serving(tiny.path, BOTH) as fresh,
        triton.InferenceServerClient(fresh.grpc) as opened,
        grpc.insecure_channel(fresh.grpc) as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)

        def status(service: str = "") -> int:
            return int(health.Check(health_pb2.HealthCheckRequest(service=service)).status)

        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        assert status() == status("inference.GRPCInferenceService") == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            status("other")
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        opened.unload_model("tiny")
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert status() == health_pb2.HealthCheckResponse.NOT_SERVING
        assert not opened.is_server_ready()
        assert opened.get_model_repository_index().models[0].state == "UNAVAILABLE"
        with pytest.raises(InferenceServerException, match=r"NOT_FOUND.*not loaded"):
            ask(opened, unique(1, 0))
        opened.load_model("tiny")
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        assert opened.infer("tiny", [tensor(unique(1, 0))]).get_response().model_version == "1"
        watch.cancel()
        for load, code in (
            (lambda: opened.load_model("other"), "NOT_FOUND"),
            (lambda: opened.load_model("tiny", config="{}"), "UNIMPLEMENTED"),
            (lambda: opened.load_model("tiny", files={"file:1/model.onnx": b"x"}, config="{}"), "UNIMPLEMENTED"),
        ):
            with pytest.raises(InferenceServerException, match=code):
                load()
        assert opened.is_model_ready("tiny", "1")
    with (
        serving(tiny.path, ServeSettings(http_port=0, grpc_port=0, admin=False)) as closed,
        triton.InferenceServerClient(closed.grpc) as opened,
        pytest.raises(InferenceServerException, match="PERMISSION_DENIED"),
    ):
        opened.unload_model("tiny")


def test_what_is_traced_and_logged_can_be_asked_and_the_level_set(
    client: triton.InferenceServerClient, web: tritonclient.http.InferenceServerClient
) -> None:
    assert web.get_trace_settings() == {"trace_level": ["OFF"]}
    assert web.update_trace_settings("tiny", {"trace_level": ["OFF"]}) == {"trace_level": ["OFF"]}
    assert web.update_trace_settings(settings={"trace_level": None}) == {"trace_level": ["OFF"]}
    assert list(client.get_trace_settings("tiny").settings["trace_level"].value) == ["OFF"]
    client.update_trace_settings(settings={"trace_level": "OFF"})
    assert web.get_log_settings()["log_error"] is True
    assert client.get_log_settings().settings["log_error"].bool_param is True
    assert client.update_log_settings({"log_verbose_level": 3}).settings["log_verbose_level"].uint32_param == 1
    assert web.update_log_settings({"log_warning": False})["log_info"] is False
    client.update_log_settings({"log_verbose_level": 0, "log_info": True})
    assert web.get_log_settings() == {
        "log_file": "",
        "log_format": "default",
        "log_verbose_level": 0,
        "log_info": True,
        "log_warning": True,
        "log_error": True,
    }
    for refused in (
        lambda: web.update_trace_settings(settings={"trace_level": ["TIMESTAMPS"]}),
        lambda: web.update_log_settings({"log_format": "ISO8601"}),
        lambda: client.update_trace_settings(settings={"trace_level": ["TIMESTAMPS"]}),
        lambda: client.update_log_settings({"log_file": "/tmp/x"}),
    ):
        with pytest.raises(InferenceServerException, match="are fixed"):
            refused()
    with pytest.raises(InferenceServerException, match="no model"):
        web.get_trace_settings("other")


# Shared memory.


@contextlib.contextmanager
def region(size: int) -> Iterator[tuple[str, Any]]:
    """A shared memory object of this test's own: its key, and tritonclient's handle."""
    key = f"/rushhour-test-{uuid.uuid4().hex}"
    handle = shm.create_shared_memory_region("region", key, size)
    try:
        yield key, handle
    finally:
        shm.destroy_shared_memory_region(handle)


@pytest.mark.parametrize("face", ["grpc", "http"])
def test_tensors_in_shared_memory(
    client: triton.InferenceServerClient, web: tritonclient.http.InferenceServerClient, face: str
) -> None:
    opened, module = (client, triton) if face == "grpc" else (web, tritonclient.http)
    images, other = unique(5, 1), unique(5, 2)
    with region(1000) as (key, handle):
        opened.register_system_shared_memory("in", key, 500, offset=100)
        opened.register_system_shared_memory("out", key, 400, offset=600)
        sent = module.InferInput("image", [5, 4, 4, 1], "UINT8")
        sent.set_shared_memory("in", 80, offset=20)
        wanted = module.InferRequestedOutput("probabilities")
        wanted.set_shared_memory("out", 60, offset=30)
        for _ in range(2):
            for pictures in (images, other):
                shm.set_shared_memory_region(handle, [pictures], offset=120)
                answer = opened.infer("tiny", [sent], outputs=[wanted])
                got = shm.get_contents_as_numpy(handle, np.float32, [5, 3], offset=630)
                np.testing.assert_allclose(got, tiny_answers(pictures), atol=1e-5)
                if face == "http":
                    assert answer.get_output("probabilities") == {
                        "name": "probabilities",
                        "datatype": "FP32",
                        "shape": [5, 3],
                    }
                else:
                    assert list(answer.get_response().raw_output_contents) == [b""]
        # Each alone.
        got = opened.infer("tiny", [sent]).as_numpy("probabilities")
        np.testing.assert_allclose(got, tiny_answers(other), atol=1e-5)
        opened.infer("tiny", [tensor(images, module)], outputs=[wanted])
        got = shm.get_contents_as_numpy(handle, np.float32, [5, 3], offset=630)
        np.testing.assert_allclose(got, tiny_answers(images), atol=1e-5)
        shown = opened.get_system_shared_memory_status(as_json=True) if face == "grpc" else None
        regions = shown["regions"].values() if shown else web.get_system_shared_memory_status()
        assert {entry["name"] for entry in regions} == {"in", "out"}
        entry = over_status(opened, "in")
        assert (entry["key"], int(entry["offset"]), int(entry["byte_size"])) == (key, 100, 500)
        opened.unregister_system_shared_memory("in")
        with pytest.raises(InferenceServerException, match="no region 'in'"):
            opened.infer("tiny", [sent])
        with pytest.raises(InferenceServerException, match="no region 'in'"):
            over_status(opened, "in")
        opened.unregister_system_shared_memory("in")  # once more is no error
        opened.unregister_system_shared_memory()
        with pytest.raises(InferenceServerException, match="no region 'out'"):
            opened.infer("tiny", [tensor(images, module)], outputs=[wanted])
    opened.unregister_cuda_shared_memory()
    opened.unregister_cuda_shared_memory("some")
    assert web.get_cuda_shared_memory_status() == []
    assert not client.get_cuda_shared_memory_status().regions
    with pytest.raises(InferenceServerException, match="CUDA"):
        opened.register_cuda_shared_memory("some", b"aGFuZGxl", 0, 100)


def over_status(opened: Any, name: str) -> dict[str, Any]:
    if isinstance(opened, triton.InferenceServerClient):
        found: dict[str, Any] = opened.get_system_shared_memory_status(name, as_json=True)["regions"][name]
        return found
    (entry,) = opened.get_system_shared_memory_status(name)
    return dict(entry)


def test_hostile_registrations_are_refused_over_both_faces(server: Server, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(1000))
    link = Path(f"/dev/shm/rushhour-test-{uuid.uuid4().hex}")
    link.symlink_to(secret)
    folder = Path(f"{link}-folder")
    folder.mkdir()
    fifo = Path(f"{link}-fifo")
    os.mkfifo(fifo)
    try:
        with region(1000) as (key, _), grpc.insecure_channel(server.grpc) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            for name, of, offset, size, says in (
                ("r", key, 0, 1001, "it has 1000"),
                ("r", key, 900, 101, "it has 1000"),
                ("r", key, 2**40, 1, "it has 1000"),
                ("r", key, 2**63, 2**63, "are not valid"),
                ("r", key, 0, 0, "are not valid"),
                ("r", key, -1, 10, "offset"),
                ("r", key, 0, -10, "byte_size|size"),
                ("r", "/rushhour-test-unknown", 0, 10, "No such file"),
                ("r", "../x", 0, 10, "is not the key of"),
                ("r", "/../x", 0, 10, "is not the key of"),
                ("r", "..", 0, 10, "is not the key of"),
                ("r", ".", 0, 10, "is not the key of"),
                ("r", "", 0, 10, "is not the key of"),
                ("r", "/", 0, 10, "is not the key of"),
                ("r", "/a/b", 0, 10, "is not the key of"),
                ("r", "a\x00b", 0, 10, "is not the key of"),
                ("r", str(secret), 0, 10, "is not the key of"),
                ("r", f"/{link.name}", 0, 10, "symbolic link"),
                ("r", f"/{folder.name}", 0, 10, "directory"),
                ("r", f"/{fifo.name}", 0, 10, "not a shared memory"),
                ("n" * 300, key, 0, 10, "name"),
            ):
                body = {"key": of, "offset": offset, "byte_size": size}
                status, answer = over_http(server, "POST", f"/v2/systemsharedmemory/region/{name}/register", body)
                assert status == 400, answer
                assert any(word in answer["error"] for word in says.split("|")), answer
                if offset < 0 or size < 0:
                    continue  # these cannot be said in the message
                request = service_pb2.SystemSharedMemoryRegisterRequest(
                    name=name, key=of, offset=min(offset, 2**64 - 1), byte_size=size
                )
                with pytest.raises(grpc.RpcError, match=says) as caught:
                    stub.SystemSharedMemoryRegister(request)
                assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            for body in ({}, {"key": key}, {"key": 5, "byte_size": 1}, {"key": key, "byte_size": "1"}, [], "x"):
                assert over_http(server, "POST", "/v2/systemsharedmemory/region/r/register", body)[0] == 400
            register = service_pb2.SystemSharedMemoryRegisterRequest(name="twice", key=key, offset=0, byte_size=10)
            stub.SystemSharedMemoryRegister(register)
            with pytest.raises(grpc.RpcError) as caught:
                stub.SystemSharedMemoryRegister(register)
            assert caught.value.code() == grpc.StatusCode.ALREADY_EXISTS
            body = {"key": key, "byte_size": 10}
            assert over_http(server, "POST", "/v2/systemsharedmemory/region/twice/register", body)[0] == 409
            stub.SystemSharedMemoryUnregister(service_pb2.SystemSharedMemoryUnregisterRequest(name="twice"))
            assert over_http(server, "GET", "/v2/systemsharedmemory/status") == (200, [])
    finally:
        link.unlink()
        folder.rmdir()
        fifo.unlink()


def test_requests_cannot_reach_beyond_their_region(
    server: Server, client: triton.InferenceServerClient, web: tritonclient.http.InferenceServerClient
) -> None:
    with region(1000) as (key, _):
        client.register_system_shared_memory("r", key, 100, offset=50)
        try:
            for opened, module in ((client, triton), (web, tritonclient.http)):
                for size, offset, says in (
                    (16, 85, "not in the region"),
                    (16, 2**62, "not in the region"),
                    (16, -1, "shared_memory"),
                    (15, 0, "16 bytes"),
                    (2**40, 0, "16 bytes"),
                ):
                    sent = module.InferInput("image", [1, 4, 4, 1], "UINT8")
                    sent.set_shared_memory("r", size, offset=offset)
                    with pytest.raises(InferenceServerException, match=says):
                        opened.infer("tiny", [sent])
                for size, offset, says in (
                    (12, 89, "not in the region"),
                    (11, 0, "does not fit"),
                    (2**40, 0, "not in"),
                ):
                    wanted = module.InferRequestedOutput("probabilities")
                    wanted.set_shared_memory("r", size, offset=offset)
                    with pytest.raises(InferenceServerException, match=says):
                        opened.infer("tiny", [tensor(unique(1, 0), module)], outputs=[wanted])
        finally:
            client.unregister_system_shared_memory()


def test_an_object_cut_short_by_its_owner_is_an_error_and_not_the_end(
    server: Server, client: triton.InferenceServerClient
) -> None:
    with region(8192) as (key, _):
        client.register_system_shared_memory("r", key, 8192)
        os.truncate(f"/dev/shm{key}", 10)
        sent = triton.InferInput("image", [1, 4, 4, 1], "UINT8")
        sent.set_shared_memory("r", 16, offset=5000)
        wanted = triton.InferRequestedOutput("probabilities")
        wanted.set_shared_memory("r", 12, offset=5000)
        with pytest.raises(InferenceServerException, match="become shorter"):
            client.infer("tiny", [sent])
        with pytest.raises(InferenceServerException, match="become shorter"):
            client.infer("tiny", [tensor(unique(1, 0))], outputs=[wanted])
        assert os.stat(f"/dev/shm{key}").st_size == 10
        client.unregister_system_shared_memory("r")
    assert server.process.poll() is None


def test_unregistering_while_requests_use_a_region_harms_nobody(server: Server) -> None:
    images, stop, wrong = unique(4, 4), threading.Event(), list[str]()
    with region(1000) as (key, handle):
        shm.set_shared_memory_region(handle, [images])

        def caller() -> None:
            sent = triton.InferInput("image", [4, 4, 4, 1], "UINT8")
            sent.set_shared_memory("r", 64)
            wanted = triton.InferRequestedOutput("probabilities")
            wanted.set_shared_memory("r", 48, offset=500)
            with triton.InferenceServerClient(server.grpc) as opened:
                while not stop.is_set():
                    try:
                        opened.infer("tiny", [sent], outputs=[wanted])
                    except InferenceServerException as error:
                        if "no region" not in str(error):
                            wrong.append(str(error))

        with ThreadPoolExecutor(4) as pool:
            callers = [pool.submit(caller) for _ in range(4)]
            with triton.InferenceServerClient(server.grpc) as opened:
                for _ in range(100):
                    opened.register_system_shared_memory("r", key, 1000)
                    time.sleep(0.003)
                    opened.unregister_system_shared_memory("r")
            stop.set()
            for done in callers:
                done.result()
        assert wrong == []
        np.testing.assert_allclose(
            shm.get_contents_as_numpy(handle, np.float32, [4, 3], offset=500), tiny_answers(images), atol=1e-5
        )
    open_files = [
        os.readlink(f"/proc/{server.process.pid}/fd/{n}") for n in os.listdir(f"/proc/{server.process.pid}/fd")
    ]
    assert not [name for name in open_files if "/dev/shm/rushhour-test" in name], (
        "regions are closed, not only forgotten"
    )


def test_shared_memory_can_be_switched_off(tiny: Bundle) -> None:
    with (
        serving(tiny.path, ServeSettings(http_port=0, grpc_port=0, shared_memory=False)) as closed,
        triton.InferenceServerClient(closed.grpc) as opened,
        region(100) as (key, _),
    ):
        assert "system_shared_memory" not in opened.get_server_metadata().extensions
        with pytest.raises(InferenceServerException, match=r"UNIMPLEMENTED.*switched off"):
            opened.register_system_shared_memory("r", key, 100)
        assert (
            over_http(closed, "POST", "/v2/systemsharedmemory/region/r/register", {"key": key, "byte_size": 1})[0]
            == 501
        )
        sent = triton.InferInput("image", [1, 4, 4, 1], "UINT8")
        sent.set_shared_memory("r", 16)
        with pytest.raises(InferenceServerException, match="UNIMPLEMENTED"):
            opened.infer("tiny", [sent])
        opened.unregister_system_shared_memory()  # clients tidy up whether or not there is anything
        assert over_http(closed, "GET", "/v2/systemsharedmemory/status") == (200, [])


def test_a_tensor_beyond_the_limit_is_not_read_from_shared_memory() -> None:
    with region(1000) as (key, _):
        regions = SharedMemory(limit=100)
        regions.register("r", key, 0, 1000)
        assert len(regions.read(Place("r", 900, 100))) == 100
        with pytest.raises(Exception, match="limit is 100"):
            regions.read(Place("r", 0, 101))


# Starting, draining, several cells.


def test_serving_over_http_alone_does_not_load_grpc(tiny: Bundle) -> None:
    with serving(tiny.path) as plain:
        assert plain.grpc == ""
        maps = Path(f"/proc/{plain.process.pid}/maps").read_text()
        assert "grpc" not in maps
        assert "protobuf" not in maps and "_upb" not in maps  # noqa: PT018 - one thing


def test_a_port_in_use_is_an_error_that_says_so(server: Server, tiny: Bundle) -> None:
    taken = ServeSettings(http_port=0, grpc_port=int(server.grpc.split(":")[1]))
    with (
        pytest.raises(AssertionError, match=r"another program listens there; choose another with --grpc-port"),
        serving(tiny.path, taken),
    ):
        pass


def test_cells_share_the_port_for_grpc(tiny: Bundle) -> None:
    with serving(tiny.path, ServeSettings(http_port=0, grpc_port=0, cells=2)) as both:
        for seed in range(8):
            options = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own
            with triton.InferenceServerClient(both.grpc, channel_args=options) as opened:
                np.testing.assert_allclose(ask(opened, unique(2, seed)), tiny_answers(unique(2, seed)), atol=1e-5)
                assert "system_shared_memory" in opened.get_server_metadata().extensions
        both.process.send_signal(signal.SIGTERM)
        assert both.process.wait(20) == 0


def test_sigterm_drains_streams_watchers_and_requests(tiny: Bundle) -> None:
    with serving(tiny.path, BOTH) as draining, grpc.insecure_channel(draining.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        requests = queue.SimpleQueue[Any]()
        stream = stub.ModelStreamInfer(iter(requests.get, None))
        requests.put(asking(unique(1, 0)))
        assert next(stream).infer_response.outputs[0].shape == [1, 3]
        answered, failures, stop = [], [], threading.Event()

        def caller() -> None:
            request = asking(unique(1, 3))
            while not stop.is_set():
                try:
                    stub.ModelInfer(request)
                    answered.append(1)
                except grpc.RpcError as error:
                    failures.append(error.code())
                    return

        threads = [threading.Thread(target=caller) for _ in range(4)]
        for thread in threads:
            thread.start()
        while len(answered) < 100:
            time.sleep(0.005)
        began = time.monotonic()
        draining.process.send_signal(signal.SIGTERM)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert list(watch) == []
        with pytest.raises(grpc.RpcError) as caught:
            next(stream)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        requests.put(None)
        assert draining.process.wait(10) == 0
        assert time.monotonic() - began < 5
        stop.set()
        for thread in threads:
            thread.join()
        assert set(failures) <= {grpc.StatusCode.UNAVAILABLE}


def test_a_reload_under_load_fails_nobody_and_mixes_no_versions(tmp_path: Path) -> None:
    first, second = tiny_bundle(tmp_path / "a", seed=0), tiny_bundle(tmp_path / "b", seed=1)
    first.copy_to(tmp_path / "served")
    images = unique(3, 1)
    right = {0: tiny_answers(images, seed=0), 1: tiny_answers(images, seed=1)}
    with serving(tmp_path / "served", BOTH) as reloading:
        stop, seen, wrong = threading.Event(), set[str](), list[object]()

        def caller() -> None:
            with triton.InferenceServerClient(reloading.grpc) as opened:
                while not stop.is_set():
                    answer = opened.infer("tiny", [tensor(images)])
                    version = answer.get_response().model_version
                    seen.add(version)
                    if not np.allclose(answer.as_numpy("probabilities"), right[(int(version) - 1) % 2], atol=1e-5):
                        wrong.append(version)

        with ThreadPoolExecutor(4) as pool, triton.InferenceServerClient(reloading.grpc) as opened:
            callers = [pool.submit(caller) for _ in range(4)]
            try:
                for turn in range(2):
                    (second, first)[turn].copy_to(tmp_path / "served")
                    opened.load_model("tiny")
            finally:
                stop.set()
            for done in callers:
                done.result()
        assert wrong == []
        assert seen == {"1", "2"}


# The face itself, before an engine that does what it is told.


class Held:
    """Batches that end when the test says so."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def schedule(self, seconds: float, finish: Callable[[], None]) -> None:
        self.waiting.append(finish)

    async def release(self) -> None:
        while not self.waiting:
            await asyncio.sleep(0.001)
        self.waiting.pop(0)()


@contextlib.asynccontextmanager
async def face_of(tiny: Bundle, engine: FakeEngine, **policy: Any) -> AsyncIterator[tuple[GrpcServer, Cell, Any]]:
    """A face on this loop: it, its cell, and a stub."""
    service = Service(open_target(tiny.path), None, opener(()))
    repository = Repository([service], service.shared)
    profile = Profile(ServiceTimes((1, 2, 4), (0.011, 0.012, 0.014), (90.0, 166.0, 285.0)))
    settings = Policy(max_batch=engine.config.max_batch, **policy)
    cell = Cell([Variant(engine, profile)], Codec("tiny", engine.signature), settings, WallClock())
    target = open_target(tiny.path)
    service.loaded = Loaded(target, ServedVariant(target.bundle, target.engine_config), engine, cell)
    face = GrpcServer(repository, Control(repository, lambda: False), Limits(), Keys(()))
    with bind_reserved("127.0.0.1", 0) as held:
        await face.start(f"127.0.0.1:{held.getsockname()[1]}", None, None)
        try:
            async with grpc.aio.insecure_channel(face.address) as channel:
                yield face, cell, service_pb2_grpc.GRPCInferenceServiceStub(channel)
        finally:
            await face.drain(0, 1)


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.001)


def test_a_cancelled_call_cancels_its_request(tiny: Bundle) -> None:
    async def scenario() -> None:
        held = Held()
        engine = FakeEngine(EngineConfig("openvino", max_batch=1), schedule=held.schedule)
        async with face_of(tiny, engine) as (_, cell, stub):
            calls = []
            for seed in range(3):
                calls.append(stub.ModelInfer(asking(unique(1, seed))))
                await until(lambda seed=seed: engine.batches == [1] and cell.waiting == seed)
            calls[2].cancel()
            await until(lambda: cell.waiting == 1)
            assert cell.counters.cancelled == 1
            calls[0].cancel()
            await until(lambda: cell.counters.cancelled == 2)
            await held.release()
            await held.release()
            answer = np.frombuffer((await calls[1]).raw_output_contents[0], np.float32)
            np.testing.assert_array_equal(answer, fake_answers(unique(1, 1))[0])
            assert engine.batches == [1, 1]
            with pytest.raises(grpc.aio.AioRpcError) as caught:  # its deadline ends it on both sides
                await stub.ModelInfer(asking(unique(1, 0)), timeout=0.2)
            assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            await until(lambda: cell.counters.cancelled == 3)
            await held.release()
            await until(lambda: cell.idle)

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_cancelled_stream_cancels_all_that_is_under_way(tiny: Bundle) -> None:
    async def scenario() -> None:
        held = Held()
        engine = FakeEngine(EngineConfig("openvino", max_batch=1), schedule=held.schedule)
        async with face_of(tiny, engine) as (_, cell, stub):
            stream = stub.ModelStreamInfer()
            for seed in range(5):
                await stream.write(asking(unique(1, seed), id=str(seed)))
            await until(lambda: cell.waiting == 4)
            await held.release()
            assert (await stream.read()).infer_response.id == "0"
            stream.cancel()
            await until(lambda: cell.counters.cancelled == 4)
            assert cell.waiting == 0
            await held.release()
            await until(lambda: cell.idle)

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_what_is_shed_is_told_when_to_come_back(tiny: Bundle) -> None:
    async def scenario() -> None:
        held = Held()
        engine = FakeEngine(EngineConfig("openvino", max_batch=1), schedule=held.schedule)
        async with face_of(tiny, engine, queue_bound=1) as (_, cell, stub):
            first = stub.ModelInfer(asking(unique(1, 0)))
            await until(lambda: engine.batches == [1])
            second = stub.ModelInfer(asking(unique(1, 1)))
            await until(lambda: cell.waiting == 1)
            with pytest.raises(grpc.aio.AioRpcError, match="queue is full") as caught:
                await stub.ModelInfer(asking(unique(1, 2)))
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert int(dict(caught.value.trailing_metadata())["retry-after-ms"]) >= 1
            # A deadline that cannot be met is known at the arrival, whether it is the call's or the request's.
            tight = asking(unique(1, 2))
            tight.parameters["timeout"].int64_param = 5000
            assert cell.counters.shed_deadline == 0
            with pytest.raises(grpc.aio.AioRpcError, match="would take") as caught:
                await stub.ModelInfer(tight)
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            stream = stub.ModelStreamInfer()
            await stream.write(asking(unique(1, 3), id="x"))
            refused = await stream.read()
            assert "queue is full" in refused.error_message
            assert refused.infer_response.id == "x"
            await stream.done_writing()
            for call, seed in ((first, 0), (second, 1)):
                await held.release()
                answer = np.frombuffer((await call).raw_output_contents[0], np.float32)
                np.testing.assert_array_equal(answer, fake_answers(unique(1, seed))[0])
            assert cell.statistics.fail.count == 3

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_an_engine_that_fails_is_an_internal_error(tiny: Bundle) -> None:
    async def scenario() -> None:
        engine = FakeEngine(EngineConfig("openvino", max_batch=2))
        async with face_of(tiny, engine) as (_, cell, stub):
            engine.fail_next(EngineError("the engine stumbled"))
            with pytest.raises(grpc.aio.AioRpcError, match="stumbled") as caught:
                await stub.ModelInfer(asking(unique(1, 0)))
            assert caught.value.code() == grpc.StatusCode.INTERNAL
            assert (await stub.ModelInfer(asking(unique(1, 0)))).outputs[0].name == "probabilities"
            assert (cell.totals().fail.count, cell.totals().success.count) == (1, 1)

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_draining_finishes_what_is_under_way_and_takes_nothing_new(tiny: Bundle) -> None:
    async def scenario() -> None:
        held = Held()
        engine = FakeEngine(EngineConfig("openvino", max_batch=1), schedule=held.schedule)
        async with face_of(tiny, engine) as (face, cell, stub):
            stream = stub.ModelStreamInfer()
            await stream.write(asking(unique(1, 0)))
            await until(lambda: engine.batches == [1])
            call = stub.ModelInfer(asking(unique(1, 1)))
            await until(lambda: cell.waiting == 1)
            ending = asyncio.create_task(face.drain(0.05, 10))
            lingering = stub.ModelInfer(asking(unique(1, 2)))
            await until(lambda: cell.waiting == 2)
            await asyncio.sleep(0.1)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ModelInfer(asking(unique(1, 3)))
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            assert not ending.done()
            for _ in range(3):
                await held.release()
            read = np.frombuffer((await stream.read()).infer_response.raw_output_contents[0], np.float32)
            np.testing.assert_array_equal(read, fake_answers(unique(1, 0))[0])
            for sent, seed in ((call, 1), (lingering, 2)):
                answer = np.frombuffer((await sent).raw_output_contents[0], np.float32)
                np.testing.assert_array_equal(answer, fake_answers(unique(1, seed))[0])
            with pytest.raises(grpc.aio.AioRpcError, match="stopping"):
                await stream.read()
            await ending

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_an_address_that_cannot_be_had_is_an_error(tiny: Bundle) -> None:
    async def scenario() -> None:
        service = Service(open_target(tiny.path), None, opener(()))
        repository = Repository([service], service.shared)
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            face = GrpcServer(repository, Control(repository, lambda: False), Limits(), Keys(()))
            with pytest.raises(ServeError, match="for gRPC"):
                await face.start(f"127.0.0.1:{taken.getsockname()[1]}", None, None)
            await face.drain(0, 0)

    asyncio.run(scenario())


def test_both_faces_have_the_same_request_in_mind(server: Server, client: triton.InferenceServerClient) -> None:
    images = unique(3, 3)
    codec = Codec("tiny", open_target(Path(server.process.args[3])).bundle.manifest.signature)  # type: ignore[index, arg-type]
    length, body = encode_request(codec.signature, {"image": images})
    connection = http.client.HTTPConnection(*server.address, timeout=10)
    headers = {"Inference-Header-Content-Length": str(length)}
    connection.request("POST", "/v2/models/tiny/infer", body, headers)
    response = connection.getresponse()
    raw = response.read()[int(response.headers["Inference-Header-Content-Length"]) :]
    connection.close()
    assert raw == ask(client, images).tobytes()


# Before a message is read.


@pytest.fixture(scope="module")
def keyed(tiny: Bundle) -> Iterator[Server]:
    with serving(tiny.path, ServeSettings(http_port=0, grpc_port=0, api_keys=(KEY,))) as running:
        yield running


@pytest.mark.parametrize("method", ["ModelInfer", "ModelStreamInfer", "ModelMetadata", "RepositoryModelUnload"])
@pytest.mark.parametrize("sent", [{}, {"authorization": "Bearer wrong"}, {"authorization": KEY}])
def test_who_has_no_key_is_told_so_before_sending_a_message(keyed: Server, method: str, sent: dict[str, str]) -> None:
    async def scenario(address: str) -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            call = channel.stream_stream(f"/inference.GRPCInferenceService/{method}")(
                metadata=tuple(sent.items()), timeout=20
            )
            assert await call.code() == grpc.StatusCode.UNAUTHENTICATED, "and nothing has been sent"
            large = channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await large(bytes(30 * 2**20), metadata=tuple(sent.items()), timeout=20)
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED

    asyncio.run(scenario(keyed.grpc))


def test_what_needs_no_key_needs_none(keyed: Server) -> None:
    with triton.InferenceServerClient(keyed.grpc) as opened:
        assert opened.is_server_live()
        assert opened.is_server_ready()
    with grpc.insecure_channel(keyed.grpc) as channel:
        assert health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status == 1
        nothing = channel.unary_unary("/inference.GRPCInferenceService/Nothing")
        with pytest.raises(grpc.RpcError) as caught:
            nothing(b"")
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


# Names that are empty.


def test_an_empty_name_is_no_model(client: triton.InferenceServerClient, server: Server) -> None:
    for call in (
        lambda: client.get_model_metadata(""),
        lambda: client.get_model_config(""),
        lambda: client.get_model_metadata("", "1"),
        lambda: client.get_inference_statistics("", "1"),
        lambda: client.get_inference_statistics("", "9"),
        lambda: client.get_inference_statistics("tiny", "9"),
        lambda: client.load_model(""),
        lambda: client.unload_model(""),
        lambda: client.infer("", [tensor(unique(1, 0))]),
        lambda: client.infer("", [tensor(unique(1, 0))], model_version="1"),
        lambda: client.infer("tiny", [tensor(unique(1, 0))], model_version=" "),
    ):
        with pytest.raises(InferenceServerException, match="NOT_FOUND"):
            call()
    assert not client.is_model_ready("")
    assert not client.is_model_ready("", "1")
    (entry,) = client.get_inference_statistics("").model_stats  # as the protocol has it: of all models
    assert entry.name == "tiny"


@pytest.mark.parametrize(
    "path",
    [
        *("/v2/models/", "/v2/models//", "/v2/models//ready", "/v2/models//config", "/v2/models//stats"),
        *("/v2/models//versions/1", "/v2/models//versions/1/stats", "/v2/models/tiny/versions//stats"),
        *("/v2/models/tiny/versions//ready", "/v2/models/tiny/versions//config", "/v2/models/tiny/versions//speed"),
        *("/v2/models/tiny//stats", "/v2/models//trace/setting", "/v2/models/tiny/versions//trace/setting"),
        *("/v2/models/%20/stats", "/v2/models/tiny/versions/%20/stats", "/v2/systemsharedmemory/region//status"),
    ],
)
def test_an_empty_name_or_version_in_a_path_is_none(server: Server, path: str) -> None:
    assert over_http(server, "GET", path)[0] == 404


@pytest.mark.parametrize("rest", ["", "/ready", "/config", "/stats", "/speed", "/trace/setting"])
def test_a_version_that_is_not_served_is_none(server: Server, rest: str) -> None:
    """The settings of tracing were shown of any version."""
    assert over_http(server, "GET", f"/v2/models/tiny/versions/1{rest}")[0] == 200
    assert over_http(server, "GET", f"/v2/models/tiny/versions/0{rest}")[0] == 404


@pytest.mark.parametrize(
    "path",
    [
        *("/v2/models//infer", "/v2/models/tiny/versions//infer", "/v2/models//versions/1/infer"),
        *("/v2/repository/models//load", "/v2/repository/models//unload"),
        *("/v2/systemsharedmemory/region//register", "/v2/systemsharedmemory/region//unregister"),
    ],
)
def test_nothing_is_done_to_an_empty_name(server: Server, path: str) -> None:
    assert over_http(server, "POST", path, {})[0] == 404
    assert over_http(server, "GET", "/v2/models/tiny/ready")[0] == 200


# What is null in the JSON of other requests.


def test_null_is_absent_in_every_request(server: Server) -> None:
    index = over_http(server, "POST", "/v2/repository/index")
    assert over_http(server, "POST", "/v2/repository/index", {"ready": None}) == index
    assert over_http(server, "POST", "/v2/repository/index", {"ready": "yes"})[0] == 400
    for parameters in (None, {}, {"config": None}, {"unload_dependents": None, "file:x": None}):
        assert over_http(server, "POST", "/v2/repository/models/tiny/load", {"parameters": parameters}) == (200, {})
    assert over_http(server, "POST", "/v2/repository/models/tiny/load", {"parameters": {"config": "{}"}})[0] == 501
    assert over_http(server, "POST", "/v2/repository/models/tiny/load", {"parameters": []})[0] == 400
    before = over_http(server, "GET", "/v2/logging")
    assert over_http(server, "POST", "/v2/logging", {"log_info": None, "log_file": None}) == before
    tracing = over_http(server, "GET", "/v2/trace/setting")
    assert over_http(server, "POST", "/v2/trace/setting", {"trace_level": None}) == tracing
    region = shm.create_shared_memory_region("null", "/rushhour-null", 16)
    try:
        asked = {"key": "/rushhour-null", "byte_size": 16, "offset": None}
        assert over_http(server, "POST", "/v2/systemsharedmemory/region/null/register", asked) == (200, {})
        assert over_http(server, "POST", "/v2/systemsharedmemory/region/null/unregister") == (200, {})
    finally:
        shm.destroy_shared_memory_region(region)
