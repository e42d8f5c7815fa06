"""How a server begins, goes on and ends, as its operators see it: signals, ports, unread logs, frozen cells."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import os
import queue
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import msgspec
import numpy as np
import pytest
import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc

from conftest import Server, serving
from rushhour.bundle import Bundle
from rushhour.errors import ServeError
from rushhour.goal import SLO, Goal
from rushhour.plan import Plan, Policy, Variant
from rushhour.serve import Limits, Served, ServeSettings, open_target
from rushhour.serve.access.certificates import read_identity
from rushhour.serve.access.exposure import check_exposure
from rushhour.serve.hosting import with_plan
from rushhour.serve.observability import log
from rushhour.serve.processes.messages import Beat, Renew, Result
from rushhour.serve.processes.renewal import Renewal
from rushhour.serve.processes.signals import SIGNALS
from rushhour.serve.processes.supervisor import Supervisor
from rushhour.serve.protocols.listener import bind_all, bind_alone, bind_reserved, bind_shared
from rushhour.serve.target import Target
from rushhour.testing.bundles import tiny_answers, tiny_bundle
from rushhour.wire import encode_request

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 1), dtype=np.uint8)
HEAD = "POST /v2/models/tiny/infer HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
IPV6 = False
with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
    probe.bind(("::1", 0))
    IPV6 = True


def wait_until(true: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def get(address: tuple[str, int], path: str, method: str = "GET", **headers: str) -> tuple[int, bytes]:
    """Over a connection of its own."""
    connection = http.client.HTTPConnection(*address, timeout=20)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def load(address: tuple[str, int]) -> tuple[int, bytes]:
    return get(address, "/v2/repository/models/tiny/load", "POST", content_type="application/json")


def metric(address: tuple[str, int], name: str) -> float:
    status, body = get(address, "/metrics")
    assert status == 200
    lines = [line.rpartition(" ") for line in body.decode().splitlines()]
    return sum(float(value) for key, _, value in lines if key == name or key.startswith(f"{name}{{"))


def answer(address: tuple[str, int], bundle: Bundle, **headers: str) -> tuple[int, bytes]:
    length, body = encode_request(bundle.manifest.signature, {"image": IMAGES})
    connection = http.client.HTTPConnection(*address, timeout=20)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(
            "POST", "/v2/models/tiny/infer", body, {"Inference-Header-Content-Length": str(length), **named}
        )
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def cells_of(server: Server) -> list[int]:
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return [int(child) for child in children]


@contextlib.contextmanager
def half_a_request(address: tuple[str, int]) -> Iterator[socket.socket]:
    """A connection over which half of a request has come, and been read."""
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(f"{HEAD}content-length: 100\r\n\r\n".encode() + b"{")
        time.sleep(0.1)
        yield connection


def ending(process: subprocess.Popen[bytes], within: float = 20) -> int:
    """The exit code, as a shell has it."""
    code = process.wait(within)
    return 128 - code if code < 0 else code


@contextlib.contextmanager
def logging_to(
    target: Path, settings: ServeSettings, stderr: int, **environment: str
) -> Iterator[tuple[Server, subprocess.Popen[bytes]]]:
    """A server whose standard error leads elsewhere."""
    process = subprocess.Popen(
        [sys.executable, "-m", "rushhour.serve", str(target), msgspec.json.encode(settings).decode()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env=os.environ | environment,
    )
    try:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        assert said["url"], said["error"]
        yield Server(process, said["url"], said["grpc"]), process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def logged(file: Path, event: str) -> list[dict[str, Any]]:
    return [record for line in file.read_text().splitlines() if (record := json.loads(line))["event"] == event]


# A log that nobody reads.


def chatter(address: tuple[str, int], requests: int) -> None:
    """So many requests over one connection, each with an id that makes its record long."""
    asked = f"GET /v2/health/live HTTP/1.1\r\nhost: x\r\nx-request-id: {'i' * 128}\r\n\r\n".encode()
    with socket.create_connection(address, timeout=20) as connection, connection.makefile("rb") as answers:
        for _ in range(requests // 25):
            connection.sendall(asked * 25)
            for _ in range(25):
                head = b""
                while not head.endswith(b"\r\n\r\n"):
                    line = answers.readline()
                    assert line, "the server has hung up"
                    head += line
                answers.read(int(head.lower().partition(b"content-length: ")[2].split()[0]))


@pytest.mark.parametrize(
    ("form", "cells"),
    [("json", 1), pytest.param("text", 1, marks=pytest.mark.slow), pytest.param("json", 2, marks=pytest.mark.slow)],
)
def test_a_log_that_nobody_reads_stops_nobody(tiny: Bundle, form: Any, cells: int) -> None:
    settings = ServeSettings(http_port=0, log_requests=True, log_format=form, cells=cells)
    with logging_to(tiny.path, settings, subprocess.PIPE) as (server, process):
        for _ in range(cells):
            chatter(server.address, 4000)
        assert get(server.address, "/v2/health/ready")[0] == 200
        assert answer(server.address, tiny)[0] == 200
        assert metric(server.address, "rushhour_log_lines_dropped_total") > 0
        process.send_signal(signal.SIGTERM)
        assert ending(process) == 0


def test_a_log_whose_reader_has_gone_stops_nobody(tiny: Bundle) -> None:
    reading, writing = os.pipe()
    with logging_to(tiny.path, ServeSettings(http_port=0, log_requests=True), writing) as (server, process):
        os.close(writing)
        os.close(reading)
        chatter(server.address, 100)
        wait_until(lambda: metric(server.address, "rushhour_log_lines_dropped_total") > 50)
        process.send_signal(signal.SIGTERM)
        assert ending(process) == 0


def test_a_log_that_is_read_again_says_what_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as reader, os.fdopen(writing, "w") as writer:
        monkeypatch.setattr(sys, "stderr", writer)
        with log.to_stderr("json", "info"):
            for number in range(20_000):
                log.event(logging.INFO, "request", number=number, padding="x" * 100)
            dropped = log.dropped()
            assert 0 < dropped < 20_000
            lines = queue.SimpleQueue[bytes]()
            thread = threading.Thread(target=lambda: [lines.put(line) for line in reader])
            thread.start()
            log.flush(10)
            log.event(logging.INFO, "after")
        monkeypatch.undo()
        writer.close()
        thread.join()
    records = [json.loads(lines.get()) for _ in range(lines.qsize())]
    said = [record for record in records if record["event"] == "log lines dropped"]
    assert sum(record["lines"] for record in said) == dropped
    numbers = [record["number"] for record in records if record["event"] == "request"]
    assert numbers == sorted(numbers)
    assert len(numbers) == 20_000 - dropped
    assert records[-1]["event"] == "after"


def test_what_libraries_log_and_python_prints_is_in_the_log() -> None:
    code = """
import asyncio, logging, threading, warnings
from rushhour.serve.observability import log
class Bad:
    def __del__(self): raise ValueError("del")
with log.to_stderr("json", "info"):
    logging.getLogger("some.library").warning("it %s", "failed")
    warnings.warn("old")
    Bad()
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start(); thread.join()
    loop = asyncio.new_event_loop()
    loop.call_exception_handler({"message": "a request failed", "exception": KeyError("x")})
    loop.close()
"""
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stderr.splitlines()]
    assert [record["event"] for record in records] == [
        "library", "library", "exception ignored", "thread ended", "library",
    ]  # fmt: skip
    assert (records[0]["logger"], records[0]["message"]) == ("some.library", "it failed")
    assert "KeyError" in records[-1]["exception"]


# Cells that do not answer.


def test_a_stopped_cell_is_replaced(tiny: Bundle) -> None:
    with serving(tiny.path, ServeSettings(http_port=0, cells=2, frozen_s=1)) as server:
        frozen = cells_of(server)[0]
        os.kill(frozen, signal.SIGSTOP)
        wait_until(lambda: len(cells_of(server)) == 2 and frozen not in cells_of(server))
        wait_until(lambda: metric(server.address, 'rushhour_cells{state="up"}') == 2)  # both are up, none is down
        for _ in range(20):
            assert answer(server.address, tiny)[0] == 200
        assert metric(server.address, "rushhour_cell_frozen_total") == 1
        assert metric(server.address, "rushhour_cell_restarts_total") == 1
        # And with all of them stopped the end comes nevertheless.
        for cell in cells_of(server):
            os.kill(cell, signal.SIGSTOP)
        server.process.send_signal(signal.SIGTERM)
        assert ending(server.process) == 0


@pytest.mark.long
@pytest.mark.slow
def test_a_pause_of_the_whole_machine_costs_no_cell(tiny: Bundle) -> None:
    """As of a container that is paused, or a laptop that sleeps: the supervisor was away, too."""
    with serving(tiny.path, ServeSettings(http_port=0, cells=2, frozen_s=1.5)) as server:
        cells = cells_of(server)
        for pid in (server.process.pid, *cells):
            os.kill(pid, signal.SIGSTOP)
        time.sleep(2.5)
        for pid in (server.process.pid, *cells):
            os.kill(pid, signal.SIGCONT)
        for _ in range(20):
            time.sleep(0.05)
            assert metric(server.address, "rushhour_cell_frozen_total") == 0
        assert cells_of(server) == cells


class Supervised:
    """Supervisor and cells on this loop."""

    def __init__(self, supervisor: Supervisor, url: str) -> None:
        self.supervisor = supervisor
        host, port = url.partition("://")[2].split(":")
        self.address = (host, int(port))

    def pids(self) -> list[int]:
        return [cell._process.pid for cell in self.supervisor._cells if cell._process is not None]

    async def until(self, true: Callable[[], object]) -> None:
        deadline = time.monotonic() + 30
        while not true():
            assert time.monotonic() < deadline, "it did not happen in time"
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def supervised(path: Path, kind: type[Supervisor] = Supervisor, **settings: Any) -> Any:
    def reopen(served: Served) -> Target:
        return open_target(Path(served.path))

    with bind_reserved("127.0.0.1", 0) as held:
        target = open_target(path)
        models = (with_plan(Served(str(path), target.name), target),)
        asked = ServeSettings(http_port=held.getsockname()[1], one_of_many=True, models=models, **settings)
        supervisor = kind(asked, [frozenset(os.sched_getaffinity(0))] * 2, reopen, None, 20.0)
        urls: list[str] = []
        running = asyncio.create_task(supervisor.run(lambda url, way: urls.append(url)))
        try:
            while not urls:
                assert not running.done(), running.exception()
                await asyncio.sleep(0.02)
            yield Supervised(supervisor, urls[0])
        finally:
            supervisor._stopping.set()
            await running


def within_signals(scenario: Callable[[], Any]) -> None:
    with SIGNALS.installed():
        asyncio.run(asyncio.wait_for(scenario(), 60))


class Mute(Supervisor):
    """Its cells say that they are ready, and nothing more: their loops are blocked."""

    def command(self) -> list[str]:
        said = '{"url": "http://127.0.0.1:1"}'
        code = f"import sys, time; sys.stdin.readline(); print({said!r}, flush=True); time.sleep(600)"
        return [sys.executable, "-c", code]


def test_a_cell_whose_loop_is_blocked_is_replaced(tiny: Bundle) -> None:
    async def scenario() -> None:
        async with supervised(tiny.path, Mute, frozen_s=1) as running:
            first = running.pids()
            await running.until(lambda: running.supervisor.frozen >= 2 and not set(first) & set(running.pids()))

    within_signals(scenario)


def test_a_task_that_is_cancelled_while_its_answer_arrives_ends(tiny: Bundle) -> None:
    """`asyncio.wait_for` of Python 3.11 returns the answer instead: a keeper or watcher then goes on for ever, and so
    does the end of the server, until its own time limit ends the process."""

    async def scenario() -> None:
        async with supervised(tiny.path) as running:
            cell = running.supervisor._cells[0]
            os.kill(running.pids()[0], signal.SIGSTOP)
            task = asyncio.create_task(cell.execute(Beat(), 30))
            before = set(cell._pending)
            while not set(cell._pending) - before:
                await asyncio.sleep(0)
            cell._pending[max(cell._pending)].set_result(Result())
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            os.kill(running.pids()[0], signal.SIGCONT)

    within_signals(scenario)


@pytest.mark.parametrize("error", [OSError("fork: Resource temporarily unavailable"), RuntimeError("not foreseen")])
def test_a_cell_comes_back_after_an_error_of_its_keeper(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async def scenario() -> None:
        async with supervised(tiny.path) as running:
            spawn, refused = asyncio.create_subprocess_exec, []

            async def fails_twice(*command: Any, **named: Any) -> Any:
                if len(refused) < 2:
                    refused.append(command)
                    raise error
                return await spawn(*command, **named)

            monkeypatch.setattr(asyncio, "create_subprocess_exec", fails_twice)
            first = running.pids()[0]
            os.kill(first, signal.SIGKILL)
            await running.until(lambda: len(refused) == 2 and first not in running.pids())
            status, _ = await asyncio.to_thread(get, running.address, "/v2/health/ready")
            assert status == 200

    within_signals(scenario)


@pytest.mark.slow
def test_a_cell_whose_cores_were_taken_away_runs_on_others(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(pid: int, cores: Any) -> None:
        raise OSError(22, "Invalid argument")

    async def scenario() -> None:
        monkeypatch.setattr(os, "sched_setaffinity", refused)
        async with supervised(tiny.path) as running:
            first = running.pids()[0]
            os.kill(first, signal.SIGKILL)
            await running.until(lambda: first not in running.pids())
            assert (await asyncio.to_thread(answer, running.address, tiny))[0] == 200

    within_signals(scenario)


# One version in all cells.


def versions_seen(address: tuple[str, int], bundle: Bundle, times: int = 40) -> set[tuple[str, bool]]:
    """What cells answer: the version they name, and whether the values are those of seed 0."""
    seen = set()
    for _ in range(times):
        status, body = answer(address, bundle)
        assert status == 200, body
        version = body.partition(b'"model_version":"')[2].partition(b'"')[0].decode()
        values = np.frombuffer(body[-24:], np.float32).reshape(2, 3)
        seen.add((version, bool(np.allclose(values, tiny_answers(IMAGES, seed=0), atol=1e-5))))
    return seen


def test_a_reload_that_fails_in_one_cell_happens_in_none_and_blocks_nothing(tmp_path: Path) -> None:
    """One cell may open no more files: not an error that anybody foresaw."""
    bundle = tiny_bundle(tmp_path / "served", seed=0)
    with serving(bundle.path, ServeSettings(http_port=0, cells=2)) as server:
        assert get(server.address, "/v2/health/ready")[0] == 200
        tiny_bundle(bundle.path, seed=1)
        poor = cells_of(server)[0]
        before = resource.prlimit(poor, resource.RLIMIT_NOFILE)
        connections = [http.client.HTTPConnection(*server.address, timeout=30) for _ in range(12)]
        for connection in connections:  # on both cells, made while both can take them
            connection.request("GET", "/v2/health/live")
            connection.getresponse().read()
        resource.prlimit(poor, resource.RLIMIT_NOFILE, (4, before[1]))
        connections[0].request("POST", "/v2/repository/models/tiny/load", headers={"content-type": "application/json"})
        response = connections[0].getresponse()
        said = response.read()
        resource.prlimit(poor, resource.RLIMIT_NOFILE, before)
        for connection in connections:
            connection.close()
        assert response.status >= 400, said
        assert versions_seen(server.address, bundle) == {("1", True)}
        assert load(server.address)[0] == 200
        assert {right for _, right in versions_seen(server.address, bundle)} == {False}
        assert len(versions_seen(server.address, bundle)) == 1


def test_a_restarted_cell_serves_what_the_others_do_or_not_at_all(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "served", seed=0)
    kept = bundle.copy_to(tmp_path / "kept")
    with serving(bundle.path, ServeSettings(http_port=0, cells=2)) as server:
        tiny_bundle(bundle.path, seed=1)  # laid there, but not loaded
        first = cells_of(server)[0]
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: first not in cells_of(server))
        for _ in range(8):
            assert versions_seen(server.address, bundle, 5) == {("1", True)}
            time.sleep(0.1)
        shutil.rmtree(bundle.path)
        shutil.copytree(kept.path, bundle.path)
        wait_until(lambda: metric(server.address, 'rushhour_cells{state="up"}') == 2 and len(cells_of(server)) == 2)
        assert versions_seen(server.address, bundle) == {("1", True)}


@pytest.mark.slow
def test_a_restarted_cell_of_a_run_opens_the_bundle_that_is_served_though_the_plan_has_changed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for seed in (0, 1):
        tiny_bundle(run / "bundles" / str(seed), seed=seed)

    def plan(seed: int) -> None:
        made = Bundle.open(run / "bundles" / str(seed))
        variant = Variant("v", f"bundles/{seed}", made.manifest.hash, "openvino", "f32")
        Plan(Goal(SLO.parse("p99<50ms")), (variant,), Policy(max_batch=4)).save(run / "plan.json")

    plan(0)
    bundle = Bundle.open(run / "bundles" / "0")
    with serving(run, ServeSettings(http_port=0, cells=2)) as server:
        plan(1)
        for first in cells_of(server):
            os.kill(first, signal.SIGKILL)
            wait_until(lambda first=first: first not in cells_of(server) and len(cells_of(server)) == 2)
            wait_until(lambda: get_ready(server.address))
        assert versions_seen(server.address, bundle) == {("1", True)}


def get_ready(address: tuple[str, int]) -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException):
        return get(address, "/v2/health/ready")[0] == 200
    return False


# The end.


@pytest.mark.parametrize(
    ("cells", "signals", "code"),
    [(1, (signal.SIGTERM, signal.SIGTERM), 143),
     pytest.param(1, (signal.SIGINT, signal.SIGINT), 130, marks=pytest.mark.slow),
     pytest.param(2, (signal.SIGTERM, signal.SIGINT), 130, marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_second_signal_ends_at_once(tiny: Bundle, cells: int, signals: tuple[int, int], code: int) -> None:
    settings = ServeSettings(http_port=0, cells=cells, drain_timeout_s=600)
    with serving(tiny.path, settings) as server, half_a_request(server.address):
        pids = cells_of(server)
        server.process.send_signal(signals[0])
        with pytest.raises(subprocess.TimeoutExpired):
            server.process.wait(1)
        server.process.send_signal(signals[1])
        assert ending(server.process) == code
        for pid in pids:
            wait_until(lambda pid=pid: not Path(f"/proc/{pid}").exists() or "Z" in stat_of(pid))


def stat_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


@pytest.mark.parametrize("cells", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_is_under_way_is_cut_off_when_draining_takes_too_long(tiny: Bundle, cells: int) -> None:
    settings = ServeSettings(http_port=0, grpc_port=0, cells=cells, drain_timeout_s=0.5)
    with serving(tiny.path, settings) as server, half_a_request(server.address) as connection:
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with deaf, contextlib.suppress(BlockingIOError):
            deaf.connect(server.address)  # one that asks and asks, and never reads
            deaf.setblocking(False)
            for _ in range(2000):
                deaf.send(b"GET /config HTTP/1.1\r\nhost: x\r\n\r\n" * 10)
        server.process.send_signal(signal.SIGTERM)
        assert ending(server.process) == 0
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(65536) == b""


@pytest.mark.slow
def test_a_signal_to_all_processes_at_once_drains_all_the_same(tiny: Bundle) -> None:
    """As a service manager sends it: each cell gets one from it, and one from the supervisor."""
    length, body = encode_request(tiny.manifest.signature, {"image": IMAGES})
    head = (
        f"{HEAD.replace('application/json', 'application/octet-stream')}inference-header-content-length: {length}\r\n"
    )
    sent = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
    with serving(tiny.path, ServeSettings(http_port=0, cells=2)) as server:
        with contextlib.ExitStack() as opened:
            connections = [opened.enter_context(socket.create_connection(server.address, timeout=20)) for _ in range(8)]
            for connection in connections:
                connection.sendall(sent[:-10])
            time.sleep(0.2)
            for pid in (server.process.pid, *cells_of(server)):
                os.kill(pid, signal.SIGTERM)
            time.sleep(0.5)
            for connection in connections:
                connection.sendall(sent[-10:])
                assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        assert ending(server.process) == 0


@pytest.mark.parametrize("cells", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_readiness_ends_before_the_door_closes(tiny: Bundle, cells: int) -> None:
    settings = ServeSettings(http_port=0, grpc_port=0, cells=cells, drain_delay_s=2)
    with serving(tiny.path, settings) as server, grpc.insecure_channel(server.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: get(server.address, "/v2/health/ready")[0] != 200)
        not_serving = health_pb2.HealthCheckResponse.NOT_SERVING
        wait_until(lambda: health.Check(health_pb2.HealthCheckRequest()).status == not_serving)
        # New connections are taken, and answered as usual.
        status, body = answer(server.address, tiny)
        assert status == 200
        assert get(server.address, "/v2/health/live")[0] == 200
        with triton.InferenceServerClient(server.grpc) as client:
            tensor = triton.InferInput("image", list(IMAGES.shape), "UINT8")
            tensor.set_data_from_numpy(IMAGES)
            client.infer("tiny", [tensor])
            assert not client.is_server_ready()
        assert ending(server.process) == 0
        assert body


def test_a_second_signal_ends_the_delay_too(tiny: Bundle) -> None:
    with serving(tiny.path, ServeSettings(http_port=0, drain_delay_s=600)) as server:
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: get(server.address, "/v2/health/ready")[0] != 200)
        server.process.send_signal(signal.SIGTERM)
        assert ending(server.process) == 143


# The beginning.

_SLOW = """
import os, sys, time
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["SLOW_IMPORT"]:
            open(os.path.join(os.environ["SLOW_MARK"], str(os.getpid())), "w").close()
            time.sleep(120)
sys.meta_path.insert(0, Slow())
"""


@contextlib.contextmanager
def starting(
    tmp_path: Path, slow: str, command: list[str], *, as_first: bool = False, ignoring: bool = False
) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], int]]]:
    """A program that takes two minutes to import a module; the process, and how many processes are about to."""
    (tmp_path / "sitecustomize.py").write_text(_SLOW)
    marks = tmp_path / "marks"
    marks.mkdir()
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [*(["unshare", "--pid", "--fork", "--kill-child"] if as_first else []), sys.executable, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "SLOW_IMPORT": slow, "SLOW_MARK": str(marks)},
        preexec_fn=(lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN)) if ignoring else None,
    )
    try:
        yield process, lambda: len(list(marks.iterdir()))
    finally:
        with contextlib.suppress(OSError):  # it has ended
            for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
                os.kill(int(child), signal.SIGKILL)
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stderr):
            assert pipe is not None
            pipe.close()


def may_unshare() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "--pid", "--fork", "true"], capture_output=True).returncode == 0


@pytest.mark.parametrize("cells", [1, 2])
@pytest.mark.parametrize("first", [True, False])
def test_a_signal_while_the_model_is_loaded_ends_the_first_process_of_a_container(
    tiny: Bundle, tmp_path: Path, cells: int, first: bool
) -> None:
    """The kernel drops signals to process 1 that have no handler, as it does where they are ignored."""
    if first and not may_unshare():
        pytest.skip("no process may be made the first of its namespace here")
    command = ["-m", "rushhour", "serve", str(tiny.path), "--http-port=0", "--grpc-port=0", f"--cells={cells}"]
    with starting(tmp_path, "openvino", command, as_first=first, ignoring=not first) as (process, begun):
        wait_until(lambda: begun() == cells or process.poll() is not None)
        assert process.poll() is None, process.stderr and process.stderr.read()
        told = process.pid
        if first:
            told = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
        os.kill(told, signal.SIGTERM)
        assert ending(process) == 0


@pytest.mark.parametrize(
    ("module", "number", "code"),
    [("rushhour", signal.SIGTERM, 0), ("rushhour.serve", signal.SIGTERM, 0), ("rushhour", signal.SIGINT, 130)],
)
def test_signals_are_heard_before_anything_slow_is_imported(
    tiny: Bundle, tmp_path: Path, module: str, number: int, code: int
) -> None:
    command = ["-m", module, *(["serve"] if module == "rushhour" else []), str(tiny.path)]
    with starting(tmp_path, "msgspec", command, ignoring=True) as (process, begun):
        wait_until(lambda: begun() == 1)
        process.send_signal(number)
        assert ending(process) == code


def test_sighup_while_the_model_is_loaded_is_no_end(tiny: Bundle, tmp_path: Path) -> None:
    command = ["-m", "rushhour", "serve", str(tiny.path), "--http-port=0", "--no-grpc"]
    with starting(tmp_path, "openvino", command) as (process, begun):
        wait_until(lambda: begun() == 1)
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(signal.SIGTERM)
        assert ending(process) == 0


# Ports.


def free_ports() -> tuple[int, int]:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        return one.getsockname()[1], two.getsockname()[1]


@pytest.mark.parametrize("cells", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_same_command_again_serves_at_once(tiny: Bundle, cells: int) -> None:
    """Though connections of the one before linger in the kernel: the server closed them first."""
    web, other = free_ports()
    settings = ServeSettings(http_port=web, grpc_port=other, cells=cells)
    for _ in range(2):
        with serving(tiny.path, settings) as server, contextlib.ExitStack() as opened:
            for _ in range(6):
                connection = opened.enter_context(socket.create_connection(server.address, timeout=20))
                connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\n\r\n")
                assert connection.recv(65536).startswith(b"HTTP/1.1 200")
            with grpc.insecure_channel(server.grpc) as channel:
                health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            server.process.send_signal(signal.SIGTERM)
            assert ending(server.process) == 0


@pytest.mark.parametrize("first", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_port_on_which_another_program_lives_is_refused(tiny: Bundle, first: int) -> None:
    with serving(tiny.path, ServeSettings(http_port=0, grpc_port=0, cells=first)) as server:
        for settings in (
            ServeSettings(http_port=server.address[1], cells=1),
            ServeSettings(http_port=server.address[1], cells=2),
            ServeSettings(http_port=0, grpc_port=int(server.grpc.rpartition(":")[2]), cells=3 - first),
        ):
            with pytest.raises(AssertionError, match="another program listens there"), serving(tiny.path, settings):
                pass


def test_a_port_that_is_taken_while_the_model_is_loaded_is_refused(tiny: Bundle) -> None:
    """As when two servers are started at the same time: both have bound it before one of them listens."""
    with bind_alone("127.0.0.1", 0) as other:
        settings = msgspec.json.encode(ServeSettings(http_port=other.getsockname()[1])).decode()
        command = [sys.executable, "-m", "rushhour.serve", str(tiny.path), settings]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        with subprocess.Popen(command, **pipes) as process:  # type: ignore[call-overload]
            assert b'"start"' in process.stderr.readline()
            other.listen()
            said = json.loads(process.stdout.readline())
            assert "another program listens there" in said["error"]
            assert process.wait(20) == 2


@pytest.mark.parametrize("second", [bind_alone, bind_reserved])
def test_a_port_whose_cells_have_yet_to_come_is_refused(second: Callable[[str, int], socket.socket]) -> None:
    with bind_reserved("127.0.0.1", 0) as held:
        with pytest.raises(OSError, match="in use"):
            second("127.0.0.1", held.getsockname()[1])
        bind_shared("127.0.0.1", held.getsockname()[1]).close()  # its own


@pytest.mark.skipif(not IPV6, reason="there is no IPv6 here")
@pytest.mark.parametrize("cells", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_all_addresses_of_a_name_are_bound(
    tiny: Bundle, cells: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import socket\nusual = socket.getaddrinfo\n"
        "def both(host, *rest, **named):\n"
        "    hosts = ['::1', '127.0.0.1'] if host == 'localhost' else [host]\n"
        "    return [found for each in hosts for found in usual(each, *rest, **named)]\n"
        "socket.getaddrinfo = both\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    settings = ServeSettings(
        host="localhost", http_port=0, grpc_port=0, cells=cells, admin_port=0, admin_host="localhost"
    )
    with serving(tiny.path, settings) as server:
        port, other = server.address[1], int(server.grpc.rpartition(":")[2])
        admin = json.loads(get(("127.0.0.1", port), "/config")[1])["server"]["admin_address"]
        for host in ("127.0.0.1", "::1"):
            assert get((host, port), "/v2/health/ready")[0] == 200
            assert get((host, int(admin.rpartition(":")[2])), "/v2/health/ready")[0] == 200
            with grpc.insecure_channel(f"[{host}]:{other}" if ":" in host else f"{host}:{other}") as channel:
                assert health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status == 1


@pytest.mark.skipif(not IPV6, reason="there is no IPv6 here")
def test_a_port_taken_on_one_address_of_a_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", naming("127.0.0.1", "::1"))
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as stranger:
        with pytest.raises(OSError, match="in use"):
            bind_all(bind_alone, "name", stranger.getsockname()[1])
        taken = bind_all(bind_alone, "name", 0)
        assert len(taken) == 2
        assert len({sock.getsockname()[1] for sock in taken}) == 1
        for sock in taken:
            sock.close()


def test_an_address_that_this_machine_has_not_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names have addresses of IPv6 where IPv6 is switched off."""
    monkeypatch.setattr(socket, "getaddrinfo", naming("192.0.2.1", "127.0.0.1"))
    (one,) = bind_all(bind_alone, "name", 0)
    assert one.getsockname()[0] == "127.0.0.1"
    one.close()
    monkeypatch.setattr(socket, "getaddrinfo", naming("192.0.2.1"))
    with pytest.raises(OSError, match="assign"):
        bind_all(bind_alone, "name", 0)


def naming(*addresses: str) -> Callable[..., Any]:
    """A `getaddrinfo` that knows one name."""
    usual = socket.getaddrinfo

    def found(host: str, port: int, **named: Any) -> Any:
        return [each for address in (addresses if host == "name" else [host]) for each in usual(address, port, **named)]

    return found


# Keys and certificates.

OLD, NEW = "an-old-key-of-many-characters", "a-new-key-of-many-characters"


@pytest.mark.parametrize("content", [None, "", "short\n"])
def test_keys_that_were_not_renewed_are_not_said_to_be(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[str, dict[str, Any]]] = []
    used: list[Renew] = []
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)

    async def renew(read: Renew) -> None:
        used.append(read)
        done.set()

    async def scenario() -> None:
        renewal = Renewal(ServeSettings(api_key_file=str(file)), renew)
        running = asyncio.ensure_future(renewal.run())
        renewal.request()
        await done.wait()
        await asyncio.sleep(0)
        running.cancel()

    done = asyncio.Event()
    monkeypatch.setattr(log, "event", lambda level, what, /, **fields: said.append((what, fields)))
    asyncio.run(scenario())
    assert used == [Renew(None, None)]
    assert [what for what, _ in said] == ["keys not renewed"]


@pytest.mark.parametrize("cells", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_keys_are_read_again_at_sighup(tiny: Bundle, tmp_path: Path, cells: int) -> None:
    file, told = tmp_path / "keys", tmp_path / "log"
    file.write_text(f"{OLD}\n")
    length, body = encode_request(tiny.manifest.signature, {"image": IMAGES})
    fields = f"authorization: Bearer {OLD}\r\ninference-header-content-length: {length}\r\n"
    sent = (
        f"POST /v2/models/tiny/infer HTTP/1.1\r\nhost: x\r\n{fields}content-length: {len(body)}\r\n\r\n".encode() + body
    )
    settings = ServeSettings(http_port=0, grpc_port=0, api_key_file=str(file), cells=cells)
    with (
        told.open("wb") as stderr,
        logging_to(tiny.path, settings, stderr.fileno()) as (server, process),
        contextlib.ExitStack() as opened,
    ):
        connections = [opened.enter_context(socket.create_connection(server.address, timeout=20)) for _ in range(6)]
        for connection in connections:  # thrice: heads that came before are not read again
            for _ in range(3):
                connection.sendall(sent)
                assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        file.write_text("short\n")
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: logged(told, "keys not renewed"))
        assert answer(server.address, tiny, authorization=f"Bearer {OLD}")[0] == 200
        file.write_text(f"# since today\n{NEW}\n")
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: logged(told, "renewed") and logged(told, "renewed")[-1]["what"] == ["keys"])
        for connection in connections:
            connection.sendall(sent)
            assert connection.recv(65536).startswith(b"HTTP/1.1 401")
        for _ in range(6):
            assert answer(server.address, tiny, authorization=f"Bearer {OLD}")[0] == 401
            assert answer(server.address, tiny, authorization=f"Bearer {NEW}")[0] == 200
            with triton.InferenceServerClient(server.grpc) as client:
                assert client.get_server_metadata(headers={"authorization": f"Bearer {NEW}"}).name == "rushhour"
        if cells == 2:  # a cell that comes later knows the same keys, whatever the file holds by then
            file.write_text("")
            first = cells_of(server)[0]
            os.kill(first, signal.SIGKILL)
            wait_until(lambda: len(cells_of(server)) == 2 and first not in cells_of(server))
            wait_until(lambda: logged(told, "cell restarted"))
            for _ in range(8):
                assert answer(server.address, tiny, authorization=f"Bearer {NEW}")[0] == 200


def certify(folder: Path, name: str, *algorithm: str) -> None:
    """A certificate and its key in a folder, written over what is there."""
    kind = algorithm or ("ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", *kind, "-nodes", "-days", "2",
         "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost",
         "-keyout", "key.pem", "-out", "cert.pem"],
        cwd=folder,
        capture_output=True,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("openssl is not there to make a certificate")


def served_name(address: tuple[str, int], alpn: list[str]) -> str:
    """The name in the certificate that a new handshake shows."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(alpn)
    with (
        socket.create_connection(address, timeout=20) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as encrypted,
    ):
        certificate = encrypted.getpeercert(binary_form=True)
        assert certificate is not None
    (name,) = [each for each in ("first", "second", "third", "fourth") if each.encode() in certificate]
    return name


@pytest.mark.parametrize("cells", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_renewed_certificate_serves_new_handshakes(tiny: Bundle, tmp_path: Path, cells: int) -> None:
    told = tmp_path / "log"
    certify(tmp_path, "first", "rsa:2048")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    settings = ServeSettings(http_port=0, grpc_port=0, tls_certificate=str(certificate), tls_key=str(key), cells=cells)
    with told.open("wb") as stderr, logging_to(tiny.path, settings, stderr.fileno()) as (server, process):
        faces = ((server.address, ["http/1.1"]), (("127.0.0.1", int(server.grpc.rpartition(":")[2])), ["h2"]))

        def shown() -> set[str]:
            return {served_name(address, alpn) for address, alpn in faces for _ in range(2 * cells)}

        assert shown() == {"first"}
        # Another kind of key, and nobody says anything: the files are looked at.
        certify(tmp_path, "second")
        wait_until(lambda: logged(told, "renewed"))
        assert shown() == {"second"}
        # Half of a pair, and then nonsense: the old ones stay.
        good = key.read_bytes()
        certify(tmp_path, "third")
        key.write_bytes(good)
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: logged(told, "certificate not renewed"))
        assert shown() == {"second"}
        certificate.write_text("nonsense")
        if cells == 2:
            first = cells_of(server)[0]
            os.kill(first, signal.SIGKILL)
            wait_until(lambda: logged(told, "cell restarted"))
        assert shown() == {"second"}
        certify(tmp_path, "fourth")
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: shown() == {"fourth"})


def test_an_encrypted_key_is_refused_and_not_asked_for_its_password(tmp_path: Path) -> None:
    certify(tmp_path, "secret")
    made = subprocess.run(
        ["openssl", "pkey", "-aes256", "-passout", "pass:secret", "-in", "key.pem", "-out", "locked.pem"],
        cwd=tmp_path,
        capture_output=True,
    )
    assert made.returncode == 0
    with pytest.raises(ServeError, match="cannot use the certificate"):
        read_identity(tmp_path / "cert.pem", tmp_path / "locked.pem")


# A collector that is not there.


@pytest.mark.parametrize("silent", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_collector_that_is_not_there_does_not_hold_up_the_end(tiny: Bundle, tmp_path: Path, silent: bool) -> None:
    told = tmp_path / "log"
    with socket.socket() as collector, told.open("wb") as stderr:
        collector.bind(("127.0.0.1", 0))
        if silent:
            collector.listen()  # and take nothing
        endpoint = f"http://127.0.0.1:{collector.getsockname()[1]}"
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_BSP_SCHEDULE_DELAY": "100"}
        settings = ServeSettings(http_port=0, otel=True)
        with logging_to(tiny.path, settings, stderr.fileno(), **environment) as (server, process):
            assert answer(server.address, tiny)[0] == 200
            if not silent:  # its own failures are records like all others
                wait_until(
                    lambda: [record for record in logged(told, "library") if "opentelemetry" in record["logger"]]
                )
            assert answer(server.address, tiny)[0] == 200
            process.send_signal(signal.SIGTERM)
            assert ending(process) == 0
    assert logged(told, "spans lost")
    assert logged(told, "stopped")


# Options.


@contextlib.contextmanager
def commanded(*options: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """`rushhour serve`, and what `--json` says of it."""
    with contextlib.ExitStack() as opened:
        file = Path(opened.enter_context(tempfile.TemporaryDirectory())) / "said.json"
        command = [sys.executable, "-m", "rushhour", "serve", *options, "--http-port=0", "--grpc-port=0"]
        process = opened.enter_context(
            subprocess.Popen([*command, f"--json={file}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        )
        errors: list[str] = []
        assert process.stderr is not None
        reader = threading.Thread(target=lambda: errors.extend(process.stderr), daemon=True)  # type: ignore[arg-type]
        reader.start()
        opened.callback(reader.join)
        opened.callback(process.kill)
        while not file.exists():
            assert process.poll() is None, errors
            time.sleep(0.02)
        yield process, json.loads(file.read_text())


def address_of(said: dict[str, Any]) -> tuple[str, int]:
    host, port = said["url"].partition("://")[2].rsplit(":", 1)
    return host, int(port)


def test_limits_are_options(tiny: Bundle) -> None:
    options = ["--idle-timeout=1s", "--request-timeout=2", "--max-body=1KiB", "--drain-timeout=1m", "--drain-delay=0"]
    more = ["--grpc-max-age=2m", "--grpc-ping-interval=0", "--grpc-keepalive=10s", "--frozen-after=3s"]
    with commanded(str(tiny.path), *options, *more, "--grpc-max-message=32MiB") as (process, said):
        address = address_of(said)
        shown = json.loads(get(address, "/config")[1])["server"]
        limits = shown["limits"]
        assert (limits["idle_s"], limits["request_s"], limits["body_bytes"]) == (1, 2, 1024)
        assert (limits["grpc_age_s"], limits["ping_s"], limits["keepalive_s"]) == (120, 0, 10)
        assert limits["grpc_bytes"] == 32 * 2**20
        assert (shown["drain_timeout_s"], shown["drain_delay_s"]) == (60, 0)
        connection = http.client.HTTPConnection(*address, timeout=20)
        connection.request("POST", "/v2/models/tiny/infer", bytes(1025))
        assert connection.getresponse().status == 413
        connection.close()
        with socket.create_connection(address, timeout=20) as idle:
            assert idle.recv(100) == b""  # closed for being idle
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


@pytest.mark.parametrize(
    ("option", "why"),
    [("--max-body=0", "between"), ("--idle-timeout=0s", "between"), ("--drain-timeout=forever", "units"),
     ("--max-body=64MBit", "units"), ("--request-timeout=-1", "units")],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(tiny: Bundle, option: str, why: str) -> None:
    command = [sys.executable, "-m", "rushhour", "serve", str(tiny.path), option]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert why in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "unix:/run/rushhour", "http://127.0.0.1", "[::1]", ""])
def test_what_is_no_host_is_not_advised_to_be_exposed(host: str) -> None:
    with pytest.raises(ServeError, match=r"it is no address and no host name: .*a port is --http-port"):
        check_exposure(host, (), exposed=False)


def run_of(tiny: Bundle, folder: Path, **policy: Any) -> Path:
    tiny.copy_to(folder / "bundles" / "tiny")
    variant = Variant("v", "bundles/tiny", tiny.manifest.hash, "openvino", "f32")
    Plan(Goal(SLO.parse("p99<50ms")), (variant,), Policy(**policy)).save(folder / "plan.json")
    return folder


def test_more_cells_than_planned_share_the_cores(tiny: Bundle, tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    run = run_of(tiny, tmp_path / "run", streams=cores, threads=1, max_batch=4)
    with commanded(str(run), f"--cells={max(2, cores)}") as (_, said):
        assert answer(address_of(said), tiny)[0] == 200
        assert "1 streams of 1 threads" in said["served"]


@pytest.mark.slow
def test_more_cells_than_planned_share_the_cores_where_the_plan_is_to_be_served_exactly(
    tiny: Bundle, tmp_path: Path
) -> None:
    cores = len(os.sched_getaffinity(0))
    for number, policy in enumerate(({"streams": cores}, {"threads": cores}, {"streams": cores, "threads": cores})):
        run = run_of(tiny, tmp_path / str(number), max_batch=4, **policy)
        with serving(run, ServeSettings(http_port=0, cells=max(2, cores))) as server:
            assert answer(server.address, tiny)[0] == 200


def test_streams_and_threads_are_options(tiny: Bundle, tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    run = run_of(tiny, tmp_path / "run", streams=cores, threads=1, max_batch=4)
    with commanded(str(run), "--streams=1", "--threads=1") as (_, said):
        assert "1 streams of 1 threads" in said["served"]
        assert (said["policy"]["streams"], said["policy"]["threads"]) == (1, 1)
        assert load(address_of(said))[0] == 200  # and so after a reload
        assert json.loads(get(address_of(said), "/config")[1])["engine"]["streams"] == 1
    command = [sys.executable, "-m", "rushhour", "serve", str(run), f"--streams={4 * cores}", "--http-port=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "--streams" in done.stderr


# Long connections over gRPC.


@pytest.mark.slow
def test_clients_may_ping_once_a_second(tiny: Bundle) -> None:
    settings = ServeSettings(http_port=0, grpc_port=0)
    options = [
        *(("grpc.keepalive_time_ms", 1000), ("grpc.keepalive_timeout_ms", 5000)),
        *(("grpc.keepalive_permit_without_calls", 1), ("grpc.http2.max_pings_without_data", 0)),
    ]
    with serving(tiny.path, settings) as server, grpc.insecure_channel(server.grpc, options) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=5)
        assert next(watch).status == 1
        with pytest.raises(grpc.RpcError) as caught:
            next(watch)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED, caught.value.details()


def connections_of(pids: list[int], port: int) -> set[int]:
    """Which of these processes have an open connection on this port of theirs."""
    rows = [line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()]
    inodes = {row[9] for row in rows[1:] if row[1].endswith(f":{port:04X}") and row[3] == "01"}
    found = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if os.readlink(descriptor).strip("socket:[]") in inodes:
                    found.add(pid)
    return found


def test_one_long_channel_goes_round_the_cells_and_no_call_fails(tiny: Bundle) -> None:
    settings = ServeSettings(http_port=0, grpc_port=0, cells=2, limits=Limits(grpc_age_s=0.4))
    with serving(tiny.path, settings) as server:
        pids, port = cells_of(server), int(server.grpc.rpartition(":")[2])
        tensor = triton.InferInput("image", list(IMAGES.shape), "UINT8")
        tensor.set_data_from_numpy(IMAGES)
        seen: set[int] = set()
        with triton.InferenceServerClient(server.grpc) as client:
            deadline = time.monotonic() + 60
            while not set(pids) <= seen:
                assert time.monotonic() < deadline, "it stays where it is"
                for _ in range(20):
                    client.infer("tiny", [tensor])
                seen |= connections_of(pids, port)


@pytest.mark.slow
def test_with_one_cell_a_channel_lives_as_long_as_it_likes(tiny: Bundle) -> None:
    with serving(tiny.path, ServeSettings(http_port=0, cells=1)) as server:
        assert json.loads(get(server.address, "/config")[1])["server"]["limits"]["grpc_age_s"] is None
    with serving(tiny.path, ServeSettings(http_port=0, cells=2)) as server:
        assert json.loads(get(server.address, "/config")[1])["server"]["limits"]["grpc_age_s"] == 60
