"""The data plane over real sockets, in real processes, with the clients of the field."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import http.client
import itertools
import json
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as triton

from conftest import Server, serving
from rushhour.bundle import Bundle
from rushhour.clock import Clock, VirtualClock, WallClock
from rushhour.engines import EngineConfig
from rushhour.errors import BundleError, EngineError, PlanError, ServeError
from rushhour.goal import SLO, Goal
from rushhour.measurement import BatchCost, ServiceTimes
from rushhour.plan import Plan, Policy, Variant
from rushhour.serve import Limits, ServeSettings, open_target
from rushhour.serve.access.certificates import read_identity
from rushhour.serve.scheduling.admission import Profile
from rushhour.serve.scheduling.cell import Cell
from rushhour.serve.scheduling.job import Job, Shed
from rushhour.serve.scheduling.variant import Variant as CellVariant
from rushhour.testing.bundles import tiny_answers, tiny_bundle
from rushhour.testing.fakes import FakeEngine, fake_answers, on_a_timer
from rushhour.wire import Codec, InferRequest, Wanted, encode_request


def unique(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, 4, 4, 1), dtype=np.uint8)


def ask(client: triton.InferenceServerClient, images: np.ndarray, *, binary: bool = True) -> np.ndarray:
    tensor = triton.InferInput("image", list(images.shape), "UINT8")
    tensor.set_data_from_numpy(images, binary_data=binary)
    wanted = [triton.InferRequestedOutput("probabilities", binary_data=binary)]
    answer = client.infer("tiny", [tensor], outputs=wanted).as_numpy("probabilities")
    assert answer is not None
    return answer


def request(server: Server, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, dict[str, object]]:
    connection = http.client.HTTPConnection(*server.address, timeout=10)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def raw(server: Server, sent: bytes) -> bytes:
    """Everything the server says to `sent` until it closes the connection."""
    with socket.create_connection(server.address, timeout=10) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
        return received


def infer_bytes(images: np.ndarray, signature: object, extra: bytes = b"") -> bytes:
    length, body = encode_request(signature, {"image": images})  # type: ignore[arg-type]
    head = (
        f"POST /v2/models/tiny/infer HTTP/1.1\r\nhost: x\r\ninference-header-content-length: {length}\r\n"
        f"content-length: {len(body)}\r\n"
    )
    return head.encode() + extra + b"\r\n" + body


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_an_unmodified_triton_client_gets_the_right_answers(server: Server, rows: int, binary: bool) -> None:
    images = unique(rows, seed=rows)
    with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("tiny")
        assert client.get_model_metadata("tiny")["inputs"][0]["shape"] == [-1, 4, 4, 1]
        assert client.get_server_metadata()["name"] == "rushhour"
        assert client.get_model_repository_index()[0]["name"] == "tiny"
        np.testing.assert_allclose(ask(client, images, binary=binary), tiny_answers(images), atol=1e-5)


def test_every_one_of_many_callers_gets_its_own_answer(server: Server) -> None:
    def caller(number: int) -> None:
        with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
            for turn in range(10):
                images = unique(1 + (number + turn) % 5, seed=1000 * number + turn)
                np.testing.assert_allclose(ask(client, images), tiny_answers(images), atol=1e-5)

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(caller, range(64)))


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "says"),
    [
        ("GET", "/v2/models/other", b"", 404, "no model"),
        ("POST", "/v2/models/other/infer", b"{}", 404, "no model"),
        ("GET", "/v2/models/tiny/infer", b"", 405, "POST"),
        ("POST", "/v2/health/live", b"", 405, "accepts GET"),
        ("POST", "/v2/models/tiny/infer", b"{", 400, "JSON"),
        ("POST", "/v2/models/tiny/infer", b"", 400, "JSON"),
    ],
)
def test_wrong_requests_get_a_status_and_a_reason(
    server: Server, method: str, path: str, body: bytes, status: int, says: str
) -> None:
    got, answer = request(server, method, path, body)
    assert got == status
    assert says in str(answer["error"])


def test_the_effective_configuration_is_shown(server: Server) -> None:
    status, shown = request(server, "GET", "/config")
    assert status == 200
    assert shown["engine"]["engine"] == "openvino"  # type: ignore[index]
    assert shown["effective"], "the engine's own words"


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_requests_are_read(server: Server, algorithm: str) -> None:
    images = unique(5, seed=5)
    tensor = triton.InferInput("image", list(images.shape), "UINT8")
    tensor.set_data_from_numpy(images)
    with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
        answer = client.infer("tiny", [tensor], request_compression_algorithm=algorithm)
        np.testing.assert_allclose(answer.as_numpy("probabilities"), tiny_answers(images), atol=1e-5)


@pytest.mark.parametrize(
    ("body", "encoding", "status"),
    [
        (b"\x1f\x8b", "gzip", 400),
        (gzip.compress(b"{}")[:-4], "gzip", 400),
        (b"plain", "deflate", 400),
        (b"plain", "br", 415),
        (gzip.compress(b"\0" * 300_000_000), "gzip", 413),
    ],
    ids=["two bytes", "cut short", "not deflated", "unknown", "bomb"],
)
def test_a_bad_compressed_body_is_refused_and_never_unpacked_beyond_the_limit(
    server: Server, body: bytes, encoding: str, status: int
) -> None:
    got, answer = request(server, "POST", "/v2/models/tiny/infer", body, **{"Content-Encoding": encoding})
    assert got == status, answer
    peak = Path(f"/proc/{server.process.pid}/status").read_text().split("VmHWM:")[1].split()[0]
    assert int(peak) < 700_000, "kilobytes"


def test_pipelined_requests_are_answered_in_order(server: Server, tiny: Bundle) -> None:
    images = [unique(1, seed) for seed in range(50)]
    sent = b"".join(infer_bytes(image, tiny.manifest.signature) for image in images)
    received = raw(server, sent)
    answers = received.split(b"HTTP/1.1 200 OK")[1:]
    assert len(answers) == 50
    for image, answer in zip(images, answers, strict=True):
        np.testing.assert_allclose(np.frombuffer(answer[-12:], np.float32), tiny_answers(image)[0], atol=1e-5)


def test_a_head_seen_before_means_the_same_again_and_another_one_does_not(server: Server, tiny: Bundle) -> None:
    """Equal heads are not parsed twice; heads that look alike are."""

    def speak(connection: socket.socket, sent: bytes) -> bytes:
        connection.sendall(sent)
        return connection.recv(65536)

    with socket.create_connection(server.address, timeout=10) as connection:
        for seed in range(5):
            image = unique(1, seed)
            answer = speak(connection, infer_bytes(image, tiny.manifest.signature))
            np.testing.assert_allclose(np.frombuffer(answer[-12:], np.float32), tiny_answers(image)[0], atol=1e-5)
        known = infer_bytes(unique(1, 0), tiny.manifest.signature)
        assert b" 404 " in speak(connection, known.replace(b"/tiny/", b"/none/"))
        assert b" 200 " in speak(connection, known)
        # The same head in two reads, and two requests in one.
        connection.sendall(known[:50])
        time.sleep(0.05)
        assert b" 200 " in speak(connection, known[50:])
        answers = b""
        connection.sendall(known + known)
        while answers.count(b"HTTP/1.1 200 OK") < 2:
            answers += connection.recv(65536)
        # Right length, but garbage where the JSON should be: an error, and the connection goes on.
        broken = known[:-16] + b"x" * 16
        assert b" 200 " in speak(connection, broken), "pixels may be any bytes"
        head, _, body = known.partition(b"\r\n\r\n")
        assert b" 400 " in speak(connection, head + b"\r\n\r\n" + b"x" * len(body))
        assert b" 200 " in speak(connection, known)
        last = speak(connection, known.replace(b"host: x", b"host: x\r\nconnection: close"))
        assert b" 200 " in last
        assert b"connection: close" in last
        assert connection.recv(10) == b""


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"garbage\r\n\r\n", b"400"),
        (b"POST /v2/models/tiny/infer HTTP/1.1\r\ncontent-length: 99999999999\r\n\r\n", b"413"),
        (b"POST /v2/models/tiny/infer HTTP/1.1\r\ncontent-length: x\r\n\r\n", b"400"),
        (b"GET /v2 HTTP/1.1\r\nx: " + b"y" * 100_000 + b"\r\n\r\n", b"431"),
        (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n", b"414"),
        (
            b"POST /v2/models/tiny/infer HTTP/1.1\r\nhost: x\r\ninference-header-content-length: -5\r\n\r\n",
            b"400",
        ),
        (b"GET /v2 HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n", b"200"),
    ],
)
def test_hostile_bytes_get_an_answer_and_harm_nobody_else(server: Server, sent: bytes, status: bytes) -> None:
    assert raw(server, sent).startswith(b"HTTP/1.1 " + status)
    assert request(server, "GET", "/v2/health/ready")[0] == 200


def test_a_truncated_request_and_a_vanishing_client_harm_nobody_else(server: Server, tiny: Bundle) -> None:
    whole = infer_bytes(unique(1, 0), tiny.manifest.signature)
    for cut in (1, 20, len(whole) - 1):
        assert raw(server, whole[:cut]) == b""
    for _ in range(20):  # gone before the answer
        with socket.create_connection(server.address) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
            connection.sendall(whole)
    with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
        np.testing.assert_allclose(ask(client, unique(2, 5)), tiny_answers(unique(2, 5)), atol=1e-5)


def test_sigterm_drains_without_failing_a_request(tiny: Bundle) -> None:
    with serving(tiny.path) as server:
        stop, answered, failures = threading.Event(), [], []
        whole = infer_bytes(unique(1, 3), tiny.manifest.signature)

        def caller() -> None:
            with socket.create_connection(server.address, timeout=10) as connection:
                while not stop.is_set():
                    connection.sendall(whole)
                    response = connection.recv(65536)
                    if not response.startswith(b"HTTP/1.1 200"):
                        failures.append(response)
                        return
                    answered.append(1)
                    if b"connection: close" in response:
                        return

        threads = [threading.Thread(target=caller) for _ in range(8)]
        for thread in threads:
            thread.start()
        while len(answered) < 200:
            time.sleep(0.005)
        server.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        stop.set()
        assert failures == []
        assert server.process.wait(10) == 0


def test_a_reload_under_load_fails_nobody_and_mixes_no_versions(tmp_path: Path) -> None:
    """Two bundles with other weights take turns at one path; every answer is wholly of the version it names."""
    first, second = tiny_bundle(tmp_path / "a", seed=0), tiny_bundle(tmp_path / "b", seed=1)
    first.copy_to(tmp_path / "served")
    images = unique(3, 1)
    right = {0: tiny_answers(images, seed=0), 1: tiny_answers(images, seed=1)}
    with serving(tmp_path / "served") as server:
        stop, seen, wrong = threading.Event(), set[str](), list[object]()

        def caller() -> None:
            tensor = triton.InferInput("image", [3, 4, 4, 1], "UINT8")
            tensor.set_data_from_numpy(images)
            with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
                while not stop.is_set():
                    answer = client.infer("tiny", [tensor])
                    version = answer.get_response()["model_version"]
                    seen.add(version)
                    if not np.allclose(answer.as_numpy("probabilities"), right[(int(version) - 1) % 2], atol=1e-5):
                        wrong.append(version)

        with ThreadPoolExecutor(6) as pool:
            callers = [pool.submit(caller) for _ in range(6)]
            try:
                for turn in range(4):
                    (second, first)[turn % 2].copy_to(tmp_path / "served")
                    assert request(server, "POST", "/v2/repository/models/tiny/load")[0] == 200
            finally:
                stop.set()
            for done in callers:
                done.result()
        assert wrong == []
        assert seen == {"1", "2"}


def test_a_reload_that_fails_leaves_the_old_version_serving(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "served")
    with serving(bundle.path) as server:
        bundle.model.write_bytes(b"not a model")
        status, answer = request(server, "POST", "/v2/repository/models/tiny/load")
        assert status == 400
        assert "does not match its hash" in str(answer["error"])
        assert request(server, "GET", "/v2/models/tiny/versions/1/ready")[0] == 200
        assert request(server, "POST", "/v2/repository/models/tiny/unload")[0] == 200
        assert request(server, "GET", "/v2/health/ready")[0] == 503
        assert request(server, "POST", "/v2/models/tiny/infer", b"{}")[0] == 404
        assert request(server, "GET", "/v2/health/live")[0] == 200


def test_slow_clients_are_cut_off_and_others_are_served(tiny: Bundle) -> None:
    settings = ServeSettings(http_port=0, limits=Limits(request_s=0.5, idle_s=1.0, connections=3))
    with serving(tiny.path, settings) as server:
        with socket.create_connection(server.address, timeout=10) as slow:
            slow.sendall(b"POST /v2/models/tiny/infer HTTP/1.1\r\ncontent-le")
            assert request(server, "GET", "/v2/health/ready")[0] == 200
            assert slow.recv(1000).startswith(b"HTTP/1.1 408")
        with socket.create_connection(server.address, timeout=10) as silent:
            assert silent.recv(1000) == b"", "an idle connection is closed without a word"
        crowd = [socket.create_connection(server.address, timeout=10) for _ in range(4)]
        assert crowd[3].recv(1000).startswith(b"HTTP/1.1 503")
        for connection in crowd:
            connection.close()
        assert server.process.poll() is None


def test_a_client_that_never_reads_does_not_fill_the_memory(server: Server) -> None:
    def resident() -> int:
        return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * 4096

    before = resident()
    with socket.create_connection(server.address, timeout=2) as connection:
        with contextlib.suppress(TimeoutError):
            while True:
                connection.sendall(b"GET /config HTTP/1.1\r\nhost: x\r\n\r\n" * 1000)
        assert request(server, "GET", "/v2/health/ready")[0] == 200
        assert resident() - before < 50_000_000


def test_keys_keep_the_door(tiny: Bundle) -> None:
    key = "a-key-of-some-length"
    with serving(tiny.path, ServeSettings(http_port=0, api_keys=(key,))) as server:
        assert request(server, "GET", "/v2/health/ready")[0] == 200
        for wrong in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {key}"}, {"Authorization": key}):
            assert request(server, "GET", "/v2", **wrong)[0] == 401
            assert request(server, "POST", "/v2/models/tiny/infer", b"{}", **wrong)[0] == 401
        assert request(server, "GET", "/v2", Authorization=f"Bearer {key}")[0] == 200


def test_a_server_for_everybody_has_to_be_meant(tiny: Bundle) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rushhour", "serve", str(tiny.path), "--host", "0.0.0.0", "--http-port", "0"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "--api-key-file" in done.stderr
    assert "--expose" in done.stderr


def test_the_admin_endpoints_can_be_switched_off(tiny: Bundle) -> None:
    with serving(tiny.path, ServeSettings(http_port=0, admin=False)) as server:
        assert request(server, "POST", "/v2/repository/models/tiny/unload")[0] == 403
        assert request(server, "GET", "/v2/models/tiny/ready")[0] == 200


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with key.pem and cert.pem."""
    folder = tmp_path_factory.mktemp("certificate")
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"],
        cwd=folder,
        capture_output=True,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("openssl is not there to make a certificate")
    return folder


@pytest.mark.parametrize("secure", [False, True])
def test_large_requests_on_one_connection_in_any_pieces(secure: bool, certificate: Path, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "tiny", shape=(200, 300, 3))
    keys = {"tls_certificate": str(certificate / "cert.pem"), "tls_key": str(certificate / "key.pem")}
    random = np.random.default_rng(0)
    with serving(bundle.path, ServeSettings(http_port=0, **(keys if secure else {}))) as server:
        client = socket.create_connection(server.address)
        if secure:
            client = ssl.create_default_context(cafile=str(certificate / "cert.pem")).wrap_socket(
                client, server_hostname="127.0.0.1"
            )
        client.settimeout(10)
        reader = client.makefile("rb")
        sent, pictures = b"", random.integers(0, 256, (6, 1, 200, 300, 3), dtype=np.uint8)
        for picture in pictures:
            length, body = encode_request(bundle.manifest.signature, {"image": picture})
            head = (
                f"POST /v2/models/tiny/infer HTTP/1.1\r\nhost: x\r\ninference-header-content-length: {length}\r\n"
                f"content-length: {len(body)}\r\n\r\n"
            ).encode()
            sent += head + body
        each = len(sent) // len(pictures)
        # whole; head first; cut in the JSON header; the last ones run into each other
        cuts = [each, each + len(head), 2 * each, 2 * each + len(head) + 20, 3 * each, 4 * each - 5, 5 * each + 7]
        edges = [0, *cuts, len(sent)]
        answered = 0
        for start, stop in itertools.pairwise(edges):
            client.sendall(sent[start:stop])
            time.sleep(0.02)
            while answered < stop // each:
                lines = list(iter(reader.readline, b"\r\n"))
                assert b"200" in lines[0]
                sizes = [int(line.split()[1]) for line in lines[1:] if line.startswith(b"content-length")]
                answer = np.frombuffer(reader.read(sizes[0])[-12:], np.float32)
                np.testing.assert_allclose(answer, tiny_answers(pictures[answered])[0], atol=1e-5)
                answered += 1
        assert answered == len(pictures)
        client.sendall(sent[: each // 2])
        client.close()
        assert request(server, "GET", "/v2/health/ready")[0] == 200 if not secure else server.process.poll() is None


def test_tls(tiny: Bundle, certificate: Path) -> None:
    settings = ServeSettings(
        http_port=0, tls_certificate=str(certificate / "cert.pem"), tls_key=str(certificate / "key.pem")
    )
    with serving(tiny.path, settings) as server:
        context = ssl.create_default_context(cafile=str(certificate / "cert.pem"))
        connection = http.client.HTTPSConnection(*server.address, context=context, timeout=10)
        length, body = encode_request(tiny.manifest.signature, {"image": unique(2, 7)})
        connection.request("POST", "/v2/models/tiny/infer", body, {"Inference-Header-Content-Length": str(length)})
        response = connection.getresponse()
        answer = response.read()
        assert response.status == 200
        np.testing.assert_allclose(
            np.frombuffer(answer[-24:], np.float32).reshape(2, 3), tiny_answers(unique(2, 7)), atol=1e-5
        )
        connection.close()
    with pytest.raises(ServeError, match="--tls-key"):
        read_identity(certificate / "cert.pem", None)


def test_a_server_ends_with_whoever_started_it(tiny: Bundle) -> None:
    with serving(tiny.path) as server:
        assert server.process.stdin is not None
        server.process.stdin.close()
        assert server.process.wait(10) == 0


def test_serving_openvino_loads_no_torch(server: Server) -> None:
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "openvino" in maps
    assert "libtorch" not in maps


def test_import_is_cheap_and_loads_no_torch() -> None:
    code = "import sys, rushhour; print(sorted({m.split('.')[0] for m in sys.modules} & {'torch','openvino','onnx'}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_port_in_use_is_one_line_and_exit_code_2(server: Server, tiny: Bundle) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rushhour", "serve", str(tiny.path), "--http-port", str(server.address[1])],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "another program listens there" in done.stderr
    assert "--http-port" in done.stderr


def test_a_plan_names_its_bundle_by_hash_and_below_itself(tiny: Bundle, tmp_path: Path) -> None:
    bundle = tiny.copy_to(tmp_path / "run" / "bundles" / "reference")

    def save(path: str, content_hash: str) -> None:
        variant = Variant("v", path, content_hash, "openvino", "f32")
        Plan(Goal(SLO.parse("p99<50ms")), (variant,), Policy()).save(tmp_path / "run" / "plan.json")

    save("bundles/reference", bundle.manifest.hash)
    assert open_target(tmp_path / "run").bundle.manifest.hash == bundle.manifest.hash
    save("bundles/reference", "0" * 64)
    with pytest.raises(BundleError, match="not the one"):
        open_target(tmp_path / "run")
    save("../../bundles/tiny", bundle.manifest.hash)
    with pytest.raises(PlanError, match="inside its plan"):
        open_target(tmp_path / "run")
    with pytest.raises(PlanError, match="nothing to serve"):
        open_target(tmp_path)


def test_a_model_name_that_is_no_path_segment_is_refused(tiny: Bundle) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rushhour", "serve", str(tiny.path), "--no-grpc", "--http-port=0", "--model-name=a/b"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "letters, digits" in done.stderr


# The cell itself, with an engine that does what it is told.


class Held:
    """Batches that end when the test says so."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def schedule(self, seconds: float, finish: Callable[[], None]) -> None:
        self.waiting.append(finish)

    def release(self) -> None:
        self.waiting.pop(0)()


def submit(cell: Cell, images: np.ndarray) -> tuple[asyncio.Future[np.ndarray], Callable[[], None]]:
    """The answer to come, and how to cancel the request."""
    length, body = encode_request(cell.codec.signature, {"image": images})
    answer: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()

    def reply(result: Sequence[memoryview] | Exception) -> None:
        if isinstance(result, Exception):
            answer.set_exception(result)
        else:
            answer.set_result(np.frombuffer(bytes(result[0]), np.float32).reshape(len(images), 3))

    submitted = cell.submit(cell.codec.decode(body, length), reply)
    if isinstance(submitted, Shed):
        raise LookupError(submitted.reason)
    return answer, lambda: cell.cancel(submitted)


def cell_of(
    engine: FakeEngine,
    queue_bound: int = 100,
    deadline_ms: float | None = None,
    clock: Clock | None = None,
    cost: BatchCost | None = None,
) -> Cell:
    profile = Profile(ServiceTimes((1, 2, 4), (0.011, 0.012, 0.014), (90.0, 166.0, 285.0)))  # 10 ms + 1 ms a sample
    policy = Policy(max_batch=engine.config.max_batch, queue_bound=queue_bound, deadline_ms=deadline_ms)
    return Cell(
        [CellVariant(engine, profile, cost=cost)], Codec("fake", engine.signature), policy, clock or WallClock()
    )


def test_requests_of_one_turn_share_a_batch_and_later_ones_wait_for_a_stream() -> None:
    async def scenario() -> None:
        held = Held()
        engine = FakeEngine(EngineConfig("openvino", max_batch=4), schedule=held.schedule)
        cell = cell_of(engine)
        pictures = [unique(1, seed) for seed in range(7)]
        answers = [submit(cell, picture)[0] for picture in pictures[:3]]
        await asyncio.sleep(0)
        assert engine.batches == [3]
        answers += [submit(cell, picture)[0] for picture in pictures[3:]]
        await asyncio.sleep(0)
        assert engine.batches == [3], "the one stream is busy"
        held.release()
        for _ in range(3):
            await asyncio.sleep(0)
        assert engine.batches == [3, 4]
        held.release()
        for picture, answer in zip(pictures, answers, strict=True):
            np.testing.assert_array_equal(await answer, fake_answers(picture))
        assert cell.idle

    asyncio.run(scenario())


def test_under_little_load_a_batch_waits_for_more_and_not_for_ever() -> None:
    async def scenario() -> None:
        engine, clock = FakeEngine(EngineConfig("openvino", max_batch=4)), VirtualClock()
        cell = cell_of(engine, deadline_ms=1000, clock=clock, cost=BatchCost(0.010, 0.001))

        async def crowd(size: int) -> list[asyncio.Future[np.ndarray]]:
            answers = []
            for seed in range(size):
                clock.advance(0.010)
                answers.append(submit(cell, unique(1, seed))[0])
            for _ in range(4):
                await asyncio.sleep(0)
            return answers

        for _ in range(40):
            await asyncio.wait_for(asyncio.gather(*await crowd(4)), 10)
        assert set(engine.batches[-20:]) == {4}
        (first,) = await crowd(1)
        assert not first.done(), "three more are usual"
        (second,) = await crowd(1)
        assert not second.done()
        clock.advance(0.2)
        np.testing.assert_array_equal(await asyncio.wait_for(first, 10), fake_answers(unique(1, 0)))
        assert second.done(), "in the same batch"
        assert engine.batches[-1] == 2
        assert cell.idle

    asyncio.run(scenario())


def test_a_request_is_gone_with_its_answer_and_needs_no_collector() -> None:
    """A body that waits for the cycle collector is memory that the next one cannot use."""

    async def scenario() -> None:
        held = Held()
        cell = cell_of(FakeEngine(EngineConfig("openvino", max_batch=4), schedule=held.schedule))
        wanted = Wanted(id="", outputs=(0,), binary=(True,))
        bodies = [np.ones(8 * 16, np.uint8) for _ in range(3)]
        gone = [weakref.ref(body) for body in bodies]
        jobs = [cell.submit(InferRequest(8, (memoryview(body),), wanted), lambda result: None) for body in bodies]
        del bodies
        assert isinstance(jobs[2], Job)
        cell.cancel(jobs[2])
        jobs.clear()
        for _ in range(8):
            await asyncio.sleep(0)
            if held.waiting:
                held.release()
        await asyncio.sleep(0)
        assert cell.idle
        assert [body() for body in gone] == [None] * 3

    gc.disable()
    try:
        asyncio.run(scenario())
    finally:
        gc.enable()


def test_what_was_learned_in_a_rush_locks_nobody_out() -> None:
    async def scenario() -> None:
        engine = FakeEngine(EngineConfig("openvino", max_batch=4), schedule=on_a_timer)
        cell = cell_of(engine, deadline_ms=100)
        for _ in range(300):
            cell.profile.update(4, 10.0)
        assert cell.profile.seconds(1) > 0.1, "no batch seems to be in time any more"
        answer, _ = submit(cell, unique(1, 0))
        np.testing.assert_array_equal(await answer, fake_answers(unique(1, 0)))

    asyncio.run(scenario())


def test_a_split_request_comes_back_whole_and_in_order() -> None:
    async def scenario() -> None:
        engine = FakeEngine(EngineConfig("openvino", max_batch=4, streams=2), schedule=on_a_timer)
        cell = cell_of(engine)
        sizes = (1, 11, 2, 30, 1)
        pictures = [unique(rows, seed=rows) for rows in sizes]
        answers = [submit(cell, picture)[0] for picture in pictures]
        for picture, answer in zip(pictures, answers, strict=True):
            np.testing.assert_array_equal(await answer, fake_answers(picture))
        assert sum(engine.batches) == sum(sizes)

    asyncio.run(scenario())


def test_a_failing_batch_fails_its_own_callers_and_no_others() -> None:
    async def scenario() -> None:
        held = Held()
        engine = FakeEngine(EngineConfig("openvino", max_batch=2), schedule=held.schedule)
        engine.fail_next(EngineError("the engine stumbled"))
        cell = cell_of(engine)
        first = [submit(cell, unique(1, seed))[0] for seed in range(2)]
        second, _ = submit(cell, unique(1, 9))
        await asyncio.sleep(0)
        held.release()
        for answer in first:
            with pytest.raises(EngineError, match="stumbled"):
                await answer
        await asyncio.sleep(0)
        held.release()
        np.testing.assert_array_equal(await second, fake_answers(unique(1, 9)))
        assert (cell.counters.failed, cell.counters.answered) == (2, 1)

    asyncio.run(scenario())


def test_a_full_queue_sheds_at_once_and_a_cancelled_request_makes_room() -> None:
    async def scenario() -> None:
        held = Held()
        engine = FakeEngine(EngineConfig("openvino", max_batch=1), schedule=held.schedule)
        cell = cell_of(engine, queue_bound=2)
        running, _ = submit(cell, unique(1, 0))
        await asyncio.sleep(0)
        first, cancel_first = submit(cell, unique(1, 1))
        second, _ = submit(cell, unique(1, 2))
        with pytest.raises(LookupError, match="queue"):
            submit(cell, unique(1, 3))
        assert cell.counters.shed_queue == 1
        cancel_first()
        fourth, _ = submit(cell, unique(1, 4))
        for _ in range(3):
            held.release()
            for _ in range(3):
                await asyncio.sleep(0)
        assert not first.done()
        for answer, seed in ((running, 0), (second, 2), (fourth, 4)):
            np.testing.assert_array_equal(await answer, fake_answers(unique(1, seed)))

    asyncio.run(scenario())


def test_what_cannot_be_answered_in_time_is_turned_away_at_once() -> None:
    async def scenario() -> None:
        held, clock = Held(), VirtualClock()
        engine = FakeEngine(EngineConfig("openvino", max_batch=4), schedule=held.schedule)
        cell = cell_of(engine, deadline_ms=50, clock=clock)
        admitted = []
        while not cell.counters.shed_deadline:
            with contextlib.suppress(LookupError):
                admitted.append(submit(cell, unique(1, 0))[0])
            await asyncio.sleep(0)
        # 45 ms for queue and engine; a batch of four takes 14 ms: three batches of them, but the first took only one.
        assert 9 <= len(admitted) <= 12
        assert cell.counters.shed_deadline == 1
        while not cell.idle:
            clock.advance(0.014)
            held.release()
            for _ in range(3):
                await asyncio.sleep(0)
        assert all(answer.done() for answer in admitted)
        assert clock.now() <= 0.05 + 0.014

    asyncio.run(scenario())


def test_a_request_with_a_timeout_of_its_own_is_held_to_it() -> None:
    async def scenario() -> None:
        engine = FakeEngine(EngineConfig("openvino", max_batch=4), schedule=Held().schedule)
        cell = cell_of(engine)
        body = json.dumps(
            {
                "inputs": [{"name": "image", "shape": [1, 4, 4, 1], "datatype": "UINT8", "data": [0] * 16}],
                "parameters": {"timeout": 5000},
            }
        ).encode()
        probe = cell.submit(cell.codec.decode(body, None), lambda result: None)
        assert isinstance(probe, Job), "nothing else shows whether the profile is right"
        shed = cell.submit(cell.codec.decode(body, None), lambda result: None)
        assert isinstance(shed, Shed)
        assert shed.reason == "deadline"

    asyncio.run(scenario())
