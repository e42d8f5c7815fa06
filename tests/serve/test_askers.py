"""Who may change a server without keys: its own clients, and no web page; and what may be written for whom."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import select
import signal
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException
from tritonclient.utils import shared_memory as shm

from conftest import Server, serving
from rushhour.bundle import Bundle
from rushhour.errors import ServeError, WireError
from rushhour.serve import ServeSettings
from rushhour.serve.access.origin import Client, OriginCheck
from rushhour.serve.access.peer import user_of
from rushhour.serve.memory.shared_memory import SharedMemory
from rushhour.testing.bundles import tiny_answers
from rushhour.wire import Place

KEY = "a-key-of-more-than-16-letters"
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 1), dtype=np.uint8)
CHANGES = (
    "/v2/repository/models/tiny/unload",
    "/v2/repository/models/tiny/load",
    "/v2/logging",
    "/v2/trace/setting",
    "/v2/models/tiny/trace/setting",
    "/v2/systemsharedmemory/region/r/register",
    "/v2/systemsharedmemory/unregister",
    "/v2/systemsharedmemory/region/r/unregister",
    "/v2/cudasharedmemory/unregister",
)


@pytest.fixture(scope="module")
def server(tiny: Bundle) -> Iterator[Server]:
    with serving(tiny.path, ServeSettings(http_port=0, grpc_port=0, known_as=("models.example.com",))) as running:
        yield running


def post(server: Server, path: str, body: bytes = b"{}", **fields: str) -> tuple[int, Any]:
    """With these header fields and no others; `host` is the server's address where it is not given."""
    connection = http.client.HTTPConnection(*server.address, timeout=20)
    try:
        connection.putrequest("POST", path, skip_host="host" in fields, skip_accept_encoding=True)
        for name, value in fields.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.putheader("content-length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def ready(server: Server) -> bool:
    connection = http.client.HTTPConnection(*server.address, timeout=20)
    connection.request("GET", "/v2/models/tiny/ready")
    status = connection.getresponse().status
    connection.close()
    return status == 200


FOREIGN: dict[str, dict[str, str]] = {
    "page": {"origin": "https://evil.example", "content_type": "text/plain"},
    "page, JSON": {"origin": "https://evil.example", "content_type": "application/json"},
    "page without a type": {"origin": "https://evil.example"},
    "sandboxed page": {"origin": "null", "content_type": "application/json"},
    "extension": {"origin": "chrome-extension://abc", "content_type": "application/json"},
    "local page of another port": {"origin": "http://127.0.0.1:1", "content_type": "application/json"},
    "local page of another name": {"origin": "http://localhost", "content_type": "application/json"},
    "rebound": {"host": "evil.example", "content_type": "application/json"},
    "rebound, own port": {
        "host": "evil.example:8000",
        "origin": "http://evil.example:8000",
        "sec_fetch_site": "same-origin",
        "content_type": "application/json",
    },
    "looks like loopback": {"host": "127.0.0.1.evil.example", "content_type": "application/json"},
    "ends like localhost": {"host": "evil-localhost", "content_type": "application/json"},
    "other machine": {"host": "203.0.113.9:8000", "content_type": "application/json"},
    "any address": {"host": "0.0.0.0:8000", "content_type": "application/json"},
    "empty name": {"host": "", "content_type": "application/json"},
    "cross-site": {"sec_fetch_site": "cross-site", "content_type": "application/json"},
    "same site": {"sec_fetch_site": "same-site", "content_type": "application/json"},
}
FORMS = (
    "text/plain",
    "text/plain;charset=UTF-8",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
)


@pytest.mark.parametrize("fields", FOREIGN.values(), ids=FOREIGN)
def test_no_web_page_changes_a_server(server: Server, fields: dict[str, str]) -> None:
    for path in CHANGES:
        status, answer = post(server, path, **fields)
        assert status == 403, (path, answer)
        assert "without API keys" in answer["error"]
    assert ready(server)


@pytest.mark.parametrize("kind", FORMS)
def test_what_a_form_can_send_changes_nothing(server: Server, kind: str) -> None:
    for agent in ({}, {"user_agent": "Mozilla/5.0 (X11; Linux x86_64) Firefox/1.0"}, {"user_agent": "curl/8.0"}):
        for path in CHANGES:
            status, answer = post(server, path, content_type=kind, **agent)
            assert status == 415, (path, answer)
            assert "send application/json" in answer["error"]
    assert ready(server)


OWN: dict[str, dict[str, str]] = {
    "a program": {},
    "JSON": {"content_type": "application/json"},
    "JSON of a charset": {"content_type": "Application/JSON; charset=utf-8"},
    "localhost": {"host": "localhost:9999"},
    "localhost of a folder": {"host": "rushhour.localhost"},
    "other loopback": {"host": "127.8.9.1"},
    "IPv6": {"host": "[::1]:8000"},
    "own name": {"host": socket.gethostname()},
    "behind a proxy": {"host": "models.example.com"},
    "page behind a proxy": {
        "host": "127.0.0.1:8000",
        "origin": "https://models.example.com",
        "content_type": "application/json",
    },
    "own page": {
        "host": "localhost:8000",
        "origin": "http://localhost:8000",
        "sec_fetch_site": "same-origin",
        "content_type": "application/json",
    },
    "typed into a browser": {"sec_fetch_site": "none", "content_type": "application/json"},
}


@pytest.mark.parametrize("fields", OWN.values(), ids=OWN)
def test_its_own_clients_change_a_server(server: Server, fields: dict[str, str]) -> None:
    assert post(server, "/v2/logging", b'{"log_verbose_level": 0}', **fields)[0] == 200
    assert post(server, "/v2/systemsharedmemory/unregister", b"", **fields)[0] == 200


def test_what_changes_nothing_is_answered_to_all(server: Server) -> None:
    assert post(server, "/v2/repository/index", host="evil.example", content_type="text/plain")[0] == 200
    assert post(server, "/v2/models/other/infer", host="evil.example", content_type="text/plain")[0] == 404


def test_the_fields_count_on_requests_whose_head_came_before(server: Server) -> None:
    """A connection's heads are remembered, and with them who asked."""
    connection = http.client.HTTPConnection(*server.address, timeout=20)
    body = b'{"log_verbose_level": 0}'
    for fields, status in (({}, 200), ({"origin": "https://evil.example"}, 403)):
        for _ in range(3):
            connection.request("POST", "/v2/logging", body, {"content-type": "application/json", **fields})
            answer = connection.getresponse()
            answer.read()
            assert answer.status == status
    connection.close()


def test_the_official_clients_change_a_server(server: Server) -> None:
    plain = server.url.removeprefix("http://")

    async def on_aiohttp() -> None:
        async with tritonclient.http.aio.InferenceServerClient(plain) as client:
            await client.load_model("tiny")
            await client.update_log_settings({"log_verbose_level": 0})
            await client.get_model_repository_index()
            await client.unregister_system_shared_memory()
            await client.unload_model("tiny")
            await client.load_model("tiny")
            assert await client.is_model_ready("tiny")

    with triton.InferenceServerClient(plain) as web, triton_grpc.InferenceServerClient(server.grpc) as client:
        for opened in (web, client):
            opened.unload_model("tiny")
            opened.load_model("tiny")
            opened.update_log_settings({"log_verbose_level": 0})
            opened.unregister_system_shared_memory()
            assert opened.is_model_ready("tiny")
    asyncio.run(on_aiohttp())
    # The one in C++, on libcurl, says nothing of what it posts.
    kind = "application/x-www-form-urlencoded"
    assert post(server, CHANGES[2], user_agent="libcurl-agent/1.0", content_type=kind)[0] == 200


def test_keys_are_proof_enough_and_the_port_for_administration_is_held_too(tiny: Bundle) -> None:
    page = {"host": "evil.example", "origin": "https://evil.example", "content_type": "text/plain"}
    with serving(tiny.path, ServeSettings(http_port=0, api_keys=(KEY,))) as keyed:
        assert post(keyed, "/v2/logging", **page)[0] == 401
        assert post(keyed, "/v2/logging", authorization=f"Bearer {KEY}", **page)[0] == 200
    with serving(tiny.path, ServeSettings(http_port=0, admin_port=0)) as running:
        connection = http.client.HTTPConnection(*running.address, timeout=20)
        connection.request("GET", "/config")
        host, port = json.loads(connection.getresponse().read())["server"]["admin_address"].split(":")
        connection.close()
        admin = Server(running.process, f"http://{host}:{port}")
        assert post(admin, "/v2/repository/models/tiny/unload", **page)[0] == 403
        assert post(admin, "/v2/repository/models/tiny/unload")[0] == 200


@pytest.mark.parametrize(
    ("host", "asked", "is_known"),
    [
        ("0.0.0.0", "192.0.2.7:8000", True),
        ("0.0.0.0", "[2001:db8::1]", True),
        ("0.0.0.0", "evil.example", False),
        ("10.0.0.5", "localhost", True),
        ("serving.internal", "SERVING.internal:80", True),
        ("serving.internal", "serving.internal.evil.example", False),
        ("::1", "[::ffff:127.0.0.1]:80", True),
        ("127.0.0.1", "2130706433", False),
    ],
)
def test_the_names_of_a_server(host: str, asked: str, is_known: bool) -> None:
    known = OriginCheck(host)
    asker = Client({b"host": asked.encode()})
    if is_known:
        known.check(asker)
    else:
        with pytest.raises(WireError, match="not a name"):
            known.check(asker)


@pytest.mark.parametrize("name", ["203.0.113.7", "2001:db8::7", "api.example.com", "API.example.com."])
@pytest.mark.parametrize("port", ["", ":8000"])
def test_a_name_that_was_given_is_known(name: str, port: str) -> None:
    asked = f"[{name}]{port}" if ":" in name else f"{name}{port}"
    OriginCheck("127.0.0.1", (name,)).check(Client({b"host": asked.encode()}))
    with pytest.raises(WireError, match="not a name"):
        OriginCheck("127.0.0.1").check(Client({b"host": asked.encode()}))


@pytest.mark.parametrize("name", ["http://x.example", "x.example:443", "x/y", "[::1]", "", "a b", "ü.example"])
def test_a_name_that_no_request_can_name_is_refused(name: str) -> None:
    with pytest.raises(ServeError, match=r"--known-as .* has no effect"):
        ServeSettings(known_as=("fine.example", name)).check()


def test_an_address_may_be_written_as_in_urls() -> None:
    settings = ServeSettings(host="[::1]", admin_port=0, admin_host="[::1]")
    assert (settings.host, settings.admin_host) == ("::1", "::1")
    assert msgspec.json.decode(b'{"host":"[::1]"}', type=ServeSettings).host == "::1"


# Shared memory.


@contextlib.contextmanager
def region(content: bytes) -> Iterator[tuple[str, Path]]:
    """A shared memory object of this test's own: its key and file."""
    key = f"rushhour-test-{uuid.uuid4().hex}"
    file = Path("/dev/shm") / key
    file.write_bytes(content)
    try:
        yield f"/{key}", file
    finally:
        file.unlink()


def asks_for_output_in(region: str, size: int = 60) -> bytes:
    entry = {"name": "image", "shape": [5, 4, 4, 1], "datatype": "UINT8", "data": IMAGES.ravel().tolist()}
    place = {"shared_memory_region": region, "shared_memory_byte_size": size}
    return json.dumps({"inputs": [entry], "outputs": [{"name": "probabilities", "parameters": place}]}).encode()


def test_a_region_registered_for_reading_is_not_written(server: Server) -> None:
    before = bytes(range(100))
    with region(before) as (key, file):
        asked = {"key": key, "byte_size": 100, "access": "read"}
        file.chmod(0o400)
        assert post(server, "/v2/systemsharedmemory/region/read/register", json.dumps(asked).encode())[0] == 200
        status, answer = post(server, "/v2/models/tiny/infer", asks_for_output_in("read"))
        assert (status, file.read_bytes()) == (403, before)
        assert "registered for reading" in answer["error"]
        with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
            tensor = triton.InferInput("image", [5, 4, 4, 1], "UINT8")
            tensor.set_shared_memory("read", 80)
            got = client.infer("tiny", [tensor]).as_numpy("probabilities")
            images = np.frombuffer(before[:80], np.uint8).reshape(5, 4, 4, 1)
            np.testing.assert_allclose(got, tiny_answers(images), atol=1e-5)
            client.unregister_system_shared_memory("read")
        file.chmod(0o600)
        for access in ("write", None):
            asked["access"] = access
            path = f"/v2/systemsharedmemory/region/{access}/register"
            assert post(server, path, json.dumps(asked).encode())[0] == 200
            assert post(server, "/v2/models/tiny/infer", asks_for_output_in(str(access)))[0] == 200
            answers = np.frombuffer(file.read_bytes()[:60], np.float32).reshape(5, 3)
            np.testing.assert_allclose(answers, tiny_answers(IMAGES), atol=1e-5)
            file.write_bytes(before)
        asked["access"] = "execute"
        assert post(server, "/v2/systemsharedmemory/region/x/register", json.dumps(asked).encode())[0] == 400
        assert post(server, "/v2/systemsharedmemory/unregister", b"")[0] == 200


@pytest.mark.parametrize("fields", FOREIGN.values(), ids=FOREIGN)
def test_no_web_page_has_an_answer_written_where_a_program_registered_memory(
    server: Server, fields: dict[str, str]
) -> None:
    before = bytes(range(60))
    with region(before) as (key, file):
        asked = json.dumps({"key": key, "byte_size": 60}).encode()
        assert post(server, "/v2/systemsharedmemory/region/out/register", asked)[0] == 200
        for _ in range(2):  # the second time the head is known
            status, _ = post(server, "/v2/models/tiny/infer", asks_for_output_in("out"), **fields)
            assert (status, file.read_bytes()) == (403, before)
        assert post(server, "/v2/models/tiny/infer", asks_for_output_in("out"), content_type="text/plain")[0] == 200
        assert file.read_bytes() != before
        assert post(server, "/v2/systemsharedmemory/unregister", b"")[0] == 200


def test_an_object_of_another_user_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    with region(bytes(100)) as (key, file):
        regions = SharedMemory(limit=1000)
        regions.register("own", key, 0, 100)
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        regions.register("of another", key, 0, 100)
        assert len(regions.read(Place("of another", 0, 50))) == 50
        for attempt in (lambda place: regions.check(place), lambda place: regions.write(place, b"x")):
            with pytest.raises(WireError, match="another user") as caught:
                attempt(Place("of another", 0, 50))
            assert caught.value.status == 403
        assert file.read_bytes() == bytes(100)
        regions.write(Place("own", 0, 50), b"x")
        assert file.read_bytes() == b"x" + bytes(99)


@contextlib.contextmanager
def as_another_user(address: tuple[str, int]) -> Iterator[str]:
    """A place from which connections go on to `address` as those of another user's program."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                os.setuid(65534)
                _relay(listener, address)
            os._exit(1)
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _relay(listener: socket.socket, address: tuple[str, int]) -> None:
    other: dict[socket.socket, socket.socket] = {}
    while True:
        for ready in select.select([listener, *other], [], [])[0]:
            if ready is listener:
                accepted, onward = listener.accept()[0], socket.create_connection(address)
                other[accepted], other[onward] = onward, accepted
            elif content := ready.recv(65536):
                other[ready].sendall(content)
            else:
                for end in (ready, other[ready]):
                    del other[end]
                    end.close()
                break


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
@pytest.mark.parametrize("face", ["http", "grpc"])
def test_a_program_of_another_user_cannot_have_a_region_written(server: Server, face: str) -> None:
    host, _, port = server.grpc.rpartition(":")
    with region(bytes(100)) as (key, file):
        with as_another_user(server.address if face == "http" else (host, int(port))) as place:
            module = triton if face == "http" else triton_grpc
            with module.InferenceServerClient(place) as client:
                client.register_system_shared_memory(face, key, 100)
            if face == "http":
                asked = json.dumps({"key": key, "byte_size": 100, "access": "write"}).encode()
                relay = Server(server.process, f"http://{place}")
                status, answer = post(relay, "/v2/systemsharedmemory/region/own/register", asked)
                assert (status, "another user" in answer["error"]) == (403, True)
        status, answer = post(server, "/v2/models/tiny/infer", asks_for_output_in(face))
        assert (status, file.read_bytes()) == (403, bytes(100))
        assert "registered for reading" in answer["error"]
        assert post(server, "/v2/systemsharedmemory/unregister", b"")[0] == 200


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_the_user_at_the_other_end_is_found(family: socket.AddressFamily) -> None:
    if family == socket.AF_INET6 and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    with socket.socket(family) as listener:
        try:
            listener.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        except OSError:
            pytest.skip("no such loopback here")
        listener.listen()
        with socket.create_connection(listener.getsockname()[:2]) as client:
            accepted, peer = listener.accept()
            here = listener.getsockname()
            found = user_of(peer[:2], here[:2])
            assert found in (os.getuid(), None), "None where the system has no such tables"
            if Path("/proc/net/tcp").exists():
                assert found == os.getuid()
            assert user_of(("192.0.2.1", 1), ("127.0.0.1", 2)) is None
            assert user_of(("no address", 1), ("127.0.0.1", 2)) is None
            accepted.close()
            client.close()


def test_shared_memory_of_the_official_clients_is_written(server: Server) -> None:
    key = f"/rushhour-test-{uuid.uuid4().hex}"
    handle = shm.create_shared_memory_region("out", key, 60)
    plain = server.url.removeprefix("http://")
    try:
        with triton.InferenceServerClient(plain) as web, triton_grpc.InferenceServerClient(server.grpc) as client:
            for opened, module in ((web, triton), (client, triton_grpc)):
                opened.register_system_shared_memory("out", key, 60)
                tensor = module.InferInput("image", [5, 4, 4, 1], "UINT8")
                tensor.set_data_from_numpy(IMAGES)
                wanted = module.InferRequestedOutput("probabilities")
                wanted.set_shared_memory("out", 60)
                shm.set_shared_memory_region(handle, [np.zeros(15, np.float32)])
                opened.infer("tiny", [tensor], outputs=[wanted])
                got = shm.get_contents_as_numpy(handle, np.float32, [5, 3])
                np.testing.assert_allclose(got, tiny_answers(IMAGES), atol=1e-5)
                opened.unregister_system_shared_memory("out")
                with pytest.raises(InferenceServerException, match="no region"):
                    opened.infer("tiny", [tensor], outputs=[wanted])
    finally:
        shm.destroy_shared_memory_region(handle)
