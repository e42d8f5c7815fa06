"""Several cells behind one port: real processes, killed for real."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from conftest import Server, serving
from rushhour.bundle import Bundle
from rushhour.serve import ServeSettings
from rushhour.serve.child import ChildServer
from rushhour.serve.processes.supervisor import cores_of_each
from rushhour.serve.protocols.listener import bind_reserved, refuse_connections
from rushhour.testing.bundles import tiny_answers, tiny_bundle
from rushhour.wire import encode_request

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 1), dtype=np.uint8)


def cells_of(server: Server) -> list[int]:
    """The process ids of the cells that live."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return [int(child) for child in children]


def runs(pid: int) -> bool:
    """Whether the process has not ended. An orphan that has stays in /proc until init looks, at its leisure."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def ask(address: tuple[str, int], body: bytes, length: int) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(*address, timeout=10)
    try:
        headers = {"Inference-Header-Content-Length": str(length)}
        connection.request("POST", "/v2/models/tiny/infer", body, headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


class Clients:
    """Clients on connections of their own that ask until told to stop."""

    def __init__(self, address: tuple[str, int], clients: int) -> None:
        self.wrong: list[object] = []
        self._address = address
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def _ask(self) -> None:
        raise NotImplementedError

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join()


class Crowd(Clients):
    """Clients that know the answer."""

    def __init__(self, server: Server, bundle: Bundle, clients: int = 6) -> None:
        super().__init__(server.address, clients)
        self.right = 0
        self._length, self._body = encode_request(bundle.manifest.signature, {"image": IMAGES})

    def _ask(self) -> None:
        expected = tiny_answers(IMAGES)
        while not self._stop.is_set():
            try:
                status, answer = ask(self._address, self._body, self._length)
            except (OSError, http.client.HTTPException) as error:
                self.wrong.append(error)
                continue
            if status == 200 and np.allclose(
                np.frombuffer(answer[-24:], np.float32).reshape(2, 3), expected, atol=1e-5
            ):
                self.right += 1
            else:
                self.wrong.append((status, answer))


def wait_until(true: object, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@pytest.fixture
def two_cells(tiny: Bundle) -> Iterator[Server]:
    with serving(tiny.path, ServeSettings(http_port=0, cells=2)) as server:
        yield server


def test_a_killed_cell_costs_only_what_was_in_flight_on_it_and_comes_back(two_cells: Server, tiny: Bundle) -> None:
    first = cells_of(two_cells)
    assert len(first) == 2
    crowd = Crowd(two_cells, tiny)
    with crowd.asking():
        wait_until(lambda: crowd.right > 100)
        os.kill(first[0], signal.SIGKILL)
        wait_until(lambda: len(cells_of(two_cells)) == 2 and first[0] not in cells_of(two_cells))
        answered = crowd.right
        wait_until(lambda: crowd.right > answered + 200)
    # Each of the six clients has one request at a time; a second can reach the dying process before its socket closes.
    assert len(crowd.wrong) <= 12
    assert all(isinstance(failure, OSError | http.client.HTTPException) for failure in crowd.wrong)


def test_sigterm_drains_all_cells(tiny: Bundle) -> None:
    with serving(tiny.path, ServeSettings(http_port=0, cells=2)) as server:
        cells = cells_of(server)
        crowd = Crowd(server, tiny)
        with crowd.asking():
            wait_until(lambda: crowd.right > 50)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(20) == 0
        assert all(isinstance(failure, ConnectionRefusedError) for failure in crowd.wrong), (
            f"refused at the door, or answered, but {crowd.wrong}"
        )
        for pid in cells:
            assert not Path(f"/proc/{pid}").exists()


def test_sigterm_fails_no_request_on_connections_that_stay(tiny: Bundle) -> None:
    """Each client asks on one connection until it is told that an answer is the last: not one request is lost."""
    length, body = encode_request(tiny.manifest.signature, {"image": IMAGES})
    head = f"POST /v2/models/tiny/infer HTTP/1.1\r\nhost: x\r\ninference-header-content-length: {length}\r\n"
    whole = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
    with serving(tiny.path, ServeSettings(http_port=0, cells=2)) as server:
        answered, goodbyes, failed = [], [], list[object]()

        def client(connection: socket.socket) -> None:
            with connection:
                while True:
                    try:
                        connection.sendall(whole)
                        answer = connection.recv(65536)
                    except OSError as error:
                        failed.append(error)
                        return
                    if not answer.startswith(b"HTTP/1.1 200 "):
                        failed.append(answer)
                        return
                    answered.append(1)
                    if b"connection: close" in answer:
                        goodbyes.append(1)
                        return

        connections = [socket.create_connection(server.address, timeout=10) for _ in range(12)]  # before SIGTERM, all
        clients = [threading.Thread(target=client, args=(one,)) for one in connections]
        for each in clients:
            each.start()
        wait_until(lambda: len(answered) > 300)
        server.process.send_signal(signal.SIGTERM)
        for each in clients:
            each.join()
        assert failed == []
        assert len(goodbyes) == 12
        assert server.process.wait(20) == 0


def test_a_reload_of_all_cells_under_load_fails_nobody_and_mixes_no_versions(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "served", seed=0)
    right = {version: tiny_answers(IMAGES, seed=version - 1) for version in (1, 2)}
    length, body = encode_request(bundle.manifest.signature, {"image": IMAGES})
    with serving(bundle.path, ServeSettings(http_port=0, cells=2)) as server:
        stop, seen, wrong = threading.Event(), set[int](), list[object]()

        def client() -> None:
            while not stop.is_set():
                try:
                    status, answer = ask(server.address, body, length)
                except (OSError, http.client.HTTPException) as error:
                    wrong.append(error)
                    continue
                version = int(answer.partition(b'"model_version":"')[2][:1] or b"0")
                seen.add(version)
                values = np.frombuffer(answer[-24:], np.float32).reshape(2, 3)
                if status != 200 or not np.allclose(values, right[version], atol=1e-5):
                    wrong.append((status, answer))

        clients = [threading.Thread(target=client) for _ in range(6)]
        for each in clients:
            each.start()
        try:
            for turn in (1, 2, 3):
                tiny_bundle(bundle.path, seed=turn % 2)
                connection = http.client.HTTPConnection(*server.address, timeout=30)
                connection.request("POST", "/v2/repository/models/tiny/load")
                assert connection.getresponse().status == 200
                connection.close()
        finally:
            stop.set()
            for each in clients:
                each.join()
        assert wrong == []
        assert seen == {1, 2}


def test_cells_end_with_their_supervisor(tiny: Bundle) -> None:
    with serving(tiny.path, ServeSettings(http_port=0, cells=2)) as server:
        cells = cells_of(server)
        server.process.kill()
        wait_until(lambda: not any(runs(pid) for pid in cells))


def test_a_reload_reaches_every_cell_and_a_restarted_one(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "served", seed=0)
    with serving(bundle.path, ServeSettings(http_port=0, cells=2)) as server:
        tiny_bundle(bundle.path, seed=1)

        def post(path: str) -> int:
            connection = http.client.HTTPConnection(*server.address, timeout=30)
            connection.request("POST", path)
            status = connection.getresponse().status
            connection.close()
            return status

        assert post("/v2/repository/models/tiny/load") == 200
        first = cells_of(server)
        os.kill(first[0], signal.SIGKILL)
        wait_until(lambda: len(cells_of(server)) == 2 and first[0] not in cells_of(server))
        length, body = encode_request(bundle.manifest.signature, {"image": IMAGES})
        expected = tiny_answers(IMAGES, seed=1)
        for _ in range(60):  # connections land on either cell
            status, answer = ask(server.address, body, length)
            assert status == 200
            assert b'"model_version":"2"' in answer
            np.testing.assert_allclose(np.frombuffer(answer[-24:], np.float32).reshape(2, 3), expected, atol=1e-5)


def test_cores_are_shared_out() -> None:
    assert cores_of_each(2, [0, 1]) == [{0}, {1}]
    assert cores_of_each(2, [0, 1, 2, 5, 7]) == [{0, 1, 2}, {5, 7}]
    assert cores_of_each(3, [4]) == [{4}] * 3
    assert cores_of_each(4, [0, 2]) == [{0}, {2}, {0}, {2}], "none waits behind more than another"
    assert cores_of_each(3, [0, 2]) == [{0, 2}] * 3
    for cells in range(1, 9):
        shared = cores_of_each(cells, range(8))
        assert set().union(*shared) == set(range(8))
        assert sum(map(len, shared)) == 8


def test_more_cells_than_cores_start_one_stream_each(tiny: Bundle) -> None:
    """Each had a stream for every core: eight on two cores, which waited for each other for 20 ms."""
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("with one core each has one stream in any case")
    os.sched_setaffinity(0, sorted(allowed)[:2])  # of this thread, and of what it starts
    try:
        server = ChildServer(tiny.path, ServeSettings(http_port=0, cells=4))
    finally:
        os.sched_setaffinity(0, allowed)
    server.close()
    assert server.way.startswith("4 cells, each ")
    assert ": 1 streams of 1 threads" in server.way


def test_a_port_of_another_program_is_not_joined() -> None:
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as stranger, pytest.raises(OSError, match="in use"):
        bind_reserved("127.0.0.1", stranger.getsockname()[1])


def test_a_door_that_closes_lets_nobody_in_and_keeps_who_is_inside() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname(), timeout=10) as inside,
    ):
        refuse_connections(listener)
        with pytest.raises(TimeoutError):
            socket.create_connection(listener.getsockname(), timeout=0.2)
        taken, _ = listener.accept()
        with taken:
            inside.sendall(b"still heard")
            assert taken.recv(100) == b"still heard"
