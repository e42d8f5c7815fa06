"""A crowd, an overload and attackers: everybody gets the right answer or a clear no, and the server stays as it was."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import heapq
import json
import math
import os
import re
import resource
import signal
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc.aio
import tritonclient.utils
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Server, serving
from rushhour.bundle import Bundle
from rushhour.clock import VirtualClock
from rushhour.engines import EngineConfig
from rushhour.goal import SLO, Goal
from rushhour.measurement import ServiceTimes
from rushhour.plan import Plan, Policy, Variant
from rushhour.serve import Limits, ServeSettings, open_target
from rushhour.serve.processes.commands import Commands
from rushhour.serve.protocols.http.connection import HttpConnection
from rushhour.serve.repository import Repository
from rushhour.serve.scheduling.admission import Profile
from rushhour.serve.scheduling.cell import Cell
from rushhour.serve.scheduling.job import Shed, ShedError
from rushhour.serve.scheduling.variant import Variant as CellVariant
from rushhour.serve.service import Service
from rushhour.serve.worker import Worker
from rushhour.testing.bundles import tiny_answers
from rushhour.testing.fakes import FakeEngine, fake_answers, on_a_timer
from rushhour.wire import Codec, decode_answer, encode_request

PATH = "/v2/models/tiny/infer"
BATCHES = (1, 3, 8, 64, *(pytest.param(size, marks=pytest.mark.slow) for size in (2, 5, 16, 32)))


def images_of(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, 4, 4, 1), dtype=np.uint8)


def planned(tiny: Bundle, folder: Path, **policy: object) -> Path:
    """A run's folder, whose plan serves the tiny bundle."""
    tiny.copy_to(folder / "bundles" / "tiny")
    variant = Variant("v", "bundles/tiny", tiny.manifest.hash, "openvino", "f32")
    Plan(Goal(SLO.parse("p99<50ms")), (variant,), Policy(**policy)).save(folder / "plan.json")  # type: ignore[arg-type]
    return folder


def request_bytes(images: np.ndarray, bundle: Bundle) -> bytes:
    length, body = encode_request(bundle.manifest.signature, {"image": images})
    head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ninference-header-content-length: {length}\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


async def answer_from(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    fields = dict(line.split(": ", 1) for line in head[1:] if line)
    return int(head[0].split()[1]), fields, await reader.readexactly(int(fields["content-length"]))


# 256 callers at once, each with inputs that nobody else has.


async def crowd(
    address: tuple[str, int], bundle: Bundle, right: Callable[[np.ndarray], np.ndarray], turns: int, callers: int = 256
) -> None:
    async def caller(number: int) -> None:
        reader, writer = await asyncio.open_connection(*address)
        for turn in range(turns):
            images = images_of(1 + (number + turn) % 7, seed=1000 * number + turn)
            writer.write(request_bytes(images, bundle))
            status, fields, body = await answer_from(reader)
            assert status == 200, body
            answer = decode_answer(body, int(fields["inference-header-content-length"]))["probabilities"]
            np.testing.assert_allclose(answer, right(images), atol=1e-5)
        writer.close()

    await asyncio.gather(*(caller(number) for number in range(callers)))


async def crowd_over_grpc(address: str, callers: int) -> None:
    async with tritonclient.grpc.aio.InferenceServerClient(address) as client:

        async def caller(number: int) -> None:
            for turn in range(2):
                images = images_of(1 + (number + turn) % 7, seed=500_000 + 1000 * number + turn)
                tensor = tritonclient.grpc.InferInput("image", list(images.shape), "UINT8")
                tensor.set_data_from_numpy(images)
                answer = (await client.infer("tiny", [tensor])).as_numpy("probabilities")
                np.testing.assert_allclose(answer, tiny_answers(images), atol=1e-5)

        await asyncio.gather(*(caller(number) for number in range(callers)))


@pytest.mark.parametrize("max_batch", BATCHES)
def test_each_of_256_callers_gets_its_own_answer_at_every_batch_size(
    tiny: Bundle, tmp_path: Path, max_batch: int
) -> None:
    target = planned(tiny, tmp_path / "run", max_batch=max_batch, streams=2, queue_bound=4096)

    async def both(server: Server) -> None:
        await asyncio.gather(
            crowd(server.address, tiny, tiny_answers, turns=2), crowd_over_grpc(server.grpc, callers=32)
        )

    with serving(target, ServeSettings(http_port=0, grpc_port=0)) as server:
        asyncio.run(both(server))


@contextlib.asynccontextmanager
async def in_process(
    engine: FakeEngine, target: Path, limits: Limits | None = None
) -> AsyncIterator[tuple[tuple[str, int], Cell]]:
    """A server with this engine on a port of its own, in this process and loop."""
    service = Service(open_target(target), None, lambda bundle, config: engine)
    repository = Repository([service], service.shared)
    await service.load()
    commands = Commands(repository, None)
    server = Worker(repository, ServeSettings(limits=limits or Limits()), commands, None, commands.execute, None, None)
    desk = server._endpoint
    listener = await asyncio.get_running_loop().create_server(lambda: HttpConnection(desk), "127.0.0.1", 0)
    cell = desk.stages.get(PATH.encode())
    assert cell is not None
    try:
        yield listener.sockets[0].getsockname(), cell
    finally:
        listener.close()
        await asyncio.sleep(0)
        for connection in list(desk.connections):
            connection.close_if_idle()
        while desk.connections:
            await asyncio.sleep(0.001)
        await service.unload()


@pytest.mark.parametrize("max_batch", BATCHES)
def test_each_of_256_callers_gets_its_own_answer_from_a_slow_engine(
    tiny: Bundle, tmp_path: Path, max_batch: int
) -> None:
    target = planned(tiny, tmp_path / "run", max_batch=max_batch, streams=2, queue_bound=4096)
    slow = FakeEngine(
        EngineConfig("openvino", max_batch=max_batch, streams=2),
        service_s=lambda rows: 0.0005 + (rows % 3) * 0.0005,
        schedule=on_a_timer,
    )

    async def scenario() -> None:
        async with in_process(slow, target) as (address, cell):
            await crowd(address, tiny, fake_answers, turns=1)
            assert cell.idle

    asyncio.run(scenario())
    assert max(slow.batches) == max_batch, "they shared batches"


# Overload. Time is virtual: arrivals and the ends of batches are events, replayed in order.


class Replay:
    """A cell in front of an engine that takes exactly `a + b n` seconds of virtual time."""

    def __init__(self, max_batch: int, streams: int, queue_bound: int, deadline_ms: float) -> None:
        self.clock = VirtualClock()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self._cost = (0.010, 0.001)
        engine = FakeEngine(
            EngineConfig("openvino", max_batch=max_batch, streams=streams),
            service_s=self.seconds,
            schedule=lambda seconds, finish: self.at(self.clock.now() + seconds, finish),
        )
        sizes = tuple(2**k for k in range(8))
        profile = Profile(
            ServiceTimes(sizes, tuple(map(self.seconds, sizes)), tuple(n / self.seconds(n) for n in sizes))
        )
        policy = Policy(max_batch=max_batch, queue_bound=queue_bound, deadline_ms=deadline_ms)
        self.cell = Cell([CellVariant(engine, profile)], Codec("fake", engine.signature), policy, self.clock)

    def seconds(self, rows: int) -> float:
        return self._cost[0] + self._cost[1] * rows

    def at(self, time: float, event: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._events, (time, self._number, event))

    async def run(self) -> None:
        """Until nothing is left to happen."""
        while self._events:
            time, _, event = heapq.heappop(self._events)
            self.clock.advance(max(0.0, time - self.clock.now()))
            event()
            for _ in range(4):
                await asyncio.sleep(0)

    def ask(self, rows: int, seen: list[float | Shed]) -> None:
        """Submit a request now; `seen` gets how long it took, or why it was turned away."""
        length, body = encode_request(self.cell.codec.signature, {"image": images_of(rows, rows)})
        arrived = self.clock.now()

        def reply(result: Sequence[memoryview] | Exception) -> None:
            if isinstance(result, ShedError):  # its time was over before it came to a batch
                seen.append(Shed("deadline", str(result), result.retry_after_s))
                return
            assert not isinstance(result, Exception)
            np.testing.assert_array_equal(
                np.frombuffer(bytes(result[0]), np.float32).reshape(rows, 3), fake_answers(images_of(rows, rows))
            )
            seen.append(self.clock.now() - arrived)

        submitted = self.cell.submit(self.cell.codec.decode(body, length), reply)
        if isinstance(submitted, Shed):
            seen.append(submitted)


@settings(deadline=None, max_examples=30)
@given(
    gaps=st.lists(st.floats(0.0, 0.002), min_size=50, max_size=90),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=10),
    max_batch=st.sampled_from([1, 3, 8]),
    streams=st.integers(1, 2),
    queue_bound=st.sampled_from([4, 32, 1000]),
)
def test_far_above_capacity_who_is_let_in_is_in_time_and_the_others_are_told_at_once(
    gaps: list[float], sizes: list[int], max_batch: int, streams: int, queue_bound: int
) -> None:
    """At most 1 ms between requests on average, where a batch takes 11 to 18: 3 to 60 times of what can be done."""
    limit_s = 0.080

    async def scenario() -> None:
        replay = Replay(max_batch, streams, queue_bound, 1e3 * limit_s)
        seen: list[float | Shed] = []
        time = 0.0
        most = max(sizes)
        for number, gap in enumerate(gaps):
            time += gap

            def arrive(rows: int = sizes[number % len(sizes)]) -> None:
                replay.ask(rows, seen)
                assert replay.cell.waiting <= queue_bound + most, "large requests have room of their own"

            replay.at(time, arrive)
        await replay.run()
        shed = [each for each in seen if isinstance(each, Shed)]
        took = [each for each in seen if not isinstance(each, Shed)]
        assert len(seen) == len(gaps), "everybody is answered, once"
        assert took
        # A batch that is cut so that its head is in time makes one more batch of the rest, which was not foreseen. And
        # a request that needs several batches takes turns with those that were let in before it.
        unforeseen = 1 if max(sizes) <= max_batch else max_batch
        assert max(took) <= limit_s + replay.seconds(unforeseen)
        assert all(0 <= each.retry_after_s < math.inf for each in shed)
        counters = replay.cell.counters
        assert (counters.answered, counters.failed) == (len(took), 0)
        assert counters.shed_queue + counters.shed_deadline == len(shed)
        assert replay.cell.idle
        after: list[float | Shed] = []
        replay.ask(1, after)
        await asyncio.sleep(0)
        await replay.run()
        assert after == [pytest.approx(replay.seconds(1))], "afterwards all is as before"

    asyncio.run(scenario())


def test_an_urgent_request_is_not_turned_away_for_the_queue_that_it_overtakes() -> None:
    async def scenario() -> None:
        replay = Replay(max_batch=1, streams=1, queue_bound=1000, deadline_ms=100)
        seen: list[float | Shed] = []
        while not any(isinstance(each, Shed) for each in seen):
            replay.ask(1, seen)
            await asyncio.sleep(0)
        entry = {"name": "image", "shape": [1, 4, 4, 1], "datatype": "UINT8", "data": [0] * 16}
        body = json.dumps({"inputs": [entry], "parameters": {"priority": 1}}).encode()
        urgent = replay.cell.submit(replay.cell.codec.decode(body, None), lambda result: None)
        assert not isinstance(urgent, Shed)

    asyncio.run(scenario())


def test_over_http_the_queue_is_bounded_and_the_rest_is_told_to_come_back(tiny: Bundle, tmp_path: Path) -> None:
    target = planned(tiny, tmp_path / "run", max_batch=2, queue_bound=6)
    released: list[Callable[[], None]] = []
    begun = False

    def hold(seconds: float, finish: Callable[[], None]) -> None:
        if begun:
            released.append(finish)
        else:
            finish()

    engine = FakeEngine(EngineConfig("openvino", max_batch=2), schedule=hold)

    async def scenario() -> None:
        nonlocal begun
        async with in_process(engine, target) as (address, cell):
            begun = True

            async def caller(number: int) -> tuple[int, dict[str, str]]:
                reader, writer = await asyncio.open_connection(*address)
                writer.write(request_bytes(images_of(1, number), tiny))
                status, fields, body = await answer_from(reader)
                if status == 200:
                    answer = decode_answer(body, int(fields["inference-header-content-length"]))["probabilities"]
                    np.testing.assert_array_equal(answer, fake_answers(images_of(1, number)))
                writer.close()
                return status, fields

            waiting = [asyncio.ensure_future(caller(number)) for number in range(100)]
            while sum(each.done() for each in waiting) < 100 - 8:
                assert cell.waiting <= 6
                await asyncio.sleep(0.001)
            while not all(each.done() for each in waiting):
                for finish in released[:]:
                    released.remove(finish)
                    finish()
                await asyncio.sleep(0.001)
            answers = [each.result() for each in waiting]
            statuses = [status for status, _ in answers]
            assert set(statuses) == {200, 429}
            assert 6 <= statuses.count(200) <= 8
            assert all(int(fields["retry-after"]) >= 1 for status, fields in answers if status == 429)
            assert cell.idle
            assert cell.counters.shed_queue == statuses.count(429)
            last = asyncio.ensure_future(caller(1000))
            while not released:
                await asyncio.sleep(0.001)
            released.pop()()
            assert (await last)[0] == 200

    asyncio.run(scenario())


# Attackers.


def resident_mib(server: Server) -> float:
    return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def say(server: Server, sent: bytes, *, end: bool = True) -> bytes:
    """What the server says until it closes the connection."""
    with socket.create_connection(server.address, timeout=10) as connection:
        said = b""
        with contextlib.suppress(ConnectionError):
            connection.sendall(sent)
            if end:
                connection.shutdown(socket.SHUT_WR)
            while chunk := connection.recv(65536):
                said += chunk
        return said


def assert_served(server: Server, bundle: Bundle, seed: int = 0) -> None:
    images = images_of(2, seed)
    said = say(server, request_bytes(images, bundle))
    assert said.startswith(b"HTTP/1.1 200 ")
    np.testing.assert_allclose(np.frombuffer(said[-24:], np.float32).reshape(2, 3), tiny_answers(images), atol=1e-5)


def json_request(data: str, **changes: object) -> bytes:
    entry = {"name": "image", "shape": [1, 4, 4, 1], "datatype": "UINT8"} | changes
    body = ('{"inputs":[' + json.dumps(entry)[:-1] + ',"data":' + data + "}]}").encode()
    return post(body)


def post(body: bytes, fields: bytes = b"") -> bytes:
    return b"POST %s HTTP/1.1\r\nhost: x\r\n%scontent-length: %d\r\n\r\n%s" % (PATH.encode(), fields, len(body), body)


PIXELS = "[" + "1," * 15 + "1]"
ATTACKS: dict[str, tuple[bytes, int]] = {
    "wrong shape": (json_request(PIXELS, shape=[1, 4, 4]), 400),
    "negative shape": (json_request(PIXELS, shape=[-1, 4, 4, 1]), 400),
    "shape beyond memory": (json_request(PIXELS, shape=[2**62, 4, 4, 1]), 400),
    "wrong type": (json_request(PIXELS, datatype="FP32"), 400),
    "NaN": (json_request("[NaN" + ",1" * 15 + "]"), 400),
    "infinity": (json_request("[Infinity" + ",1" * 15 + "]"), 400),
    "1e999": (json_request("[1e999" + ",1" * 15 + "]"), 400),
    "a number of 5,000 digits": (json_request("[" + "9" * 5000 + ",1" * 15 + "]"), 400),
    "a number beyond 64 bits": (json_request("[" + str(2**64) + ",1" * 15 + "]"), 400),
    "deep": (json_request("[" * 100_000 + "]" * 100_000), 400),
    "deep objects": (json_request('{"a":' * 50_000 + "1" + "}" * 50_000), 400),
    "one long text": (json_request('["' + "a" * 100_000 + '"' + ',""' * 50_000 + "]"), 400),
    "not UTF-8": (post(b'{"inputs":[{"name":"\xed\xa0\x80","shape":[1,4,4,1],"datatype":"UINT8","data":[]}]}'), 400),
    "header longer than the body": (post(b"{}", b"inference-header-content-length: 99\r\n"), 400),
    "header length of 5,000 digits": (post(b"{}", b"inference-header-content-length: " + b"9" * 5000 + b"\r\n"), 400),
    "two lengths": (post(b"hello", b"content-length: 6\r\n"), 400),
    "the same length twice": (post(b"hello", b"content-length: 5\r\n"), 400),
    "length and chunks": (post(b"0\r\n\r\n", b"transfer-encoding: chunked\r\n"), 400),
    "chunks in disguise": (
        b"POST /v2 HTTP/1.1\r\nhost: x\r\ntransfer-encoding: xchunked\r\n\r\n0\r\n\r\nGET /v2 HTTP/1.1\r\n\r\n",
        501,
    ),
    "a chunk that is none": (b"POST /v2 HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n\r\n", 400),
    "a chunk beyond all bounds": (
        b"POST /v2 HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
        400,
    ),
    "gzip bomb": (post(gzip.compress(bytes(80_000_000)), b"content-encoding: gzip\r\n"), 413),
    "a header without end": (b"GET /v2 HTTP/1.1\r\nhost: x\r\n" + b"x: y\r\n" * 50_000 + b"\r\n", 431),
    "bare line feeds": (b"GET /v2 HTTP/1.1\nhost: x\n\n", 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100), 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_gets_its_code_and_the_next_request_is_served(server: Server, tiny: Bundle, attack: str) -> None:
    sent, status = ATTACKS[attack]
    said = say(server, sent)
    assert said.startswith(b"HTTP/1.1 %d " % status), said[:200]
    assert len(re.findall(rb"HTTP/1\.1 \d{3} ", said)) == 1
    assert_served(server, tiny)


def test_attackers_leave_nothing_behind(server: Server, tiny: Bundle) -> None:
    def attack() -> None:
        for name, (sent, _) in ATTACKS.items():
            if name != "gzip bomb":
                say(server, sent)
        whole = request_bytes(images_of(1, 0), tiny)
        for cut in range(0, len(whole), 5):  # gone in the middle, by reset
            with socket.create_connection(server.address, timeout=10) as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.sendall(whole[:cut])
        for _ in range(200):  # there and gone
            socket.create_connection(server.address, timeout=10).close()

    for _ in range(4):
        attack()
    before = resident_mib(server)
    for _ in range(8):
        attack()
    assert resident_mib(server) - before < 10
    assert_served(server, tiny)


def test_large_bodies_leave_nothing_behind(server: Server) -> None:
    """Once glibc had seen a block of 20 MiB freed, it kept as much for itself, and all that came between."""
    head = b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n"
    packed = {mib: gzip.compress(bytes(mib * 2**20), 1) for mib in (20, 12)}
    sent = {mib: head % (PATH.encode(), len(body)) + body for mib, body in packed.items()}
    assert say(server, sent[12]).startswith(b"HTTP/1.1 400 ")
    before = resident_mib(server)
    for mib in (20, 12, 12):
        assert say(server, sent[mib]).startswith(b"HTTP/1.1 400 ")
    assert resident_mib(server) - before < 8


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["a header without end", "chunks in disguise", "one long text", "TLS"])
def test_what_is_refused_does_not_wait_for_the_collector(server: Server, attack: str) -> None:
    sent, _ = ATTACKS[attack]
    for _ in range(20):
        say(server, sent)
    before = resident_mib(server)
    for _ in range(80):
        say(server, sent)
    assert resident_mib(server) - before < 3


def test_garbage_behind_requests_is_answered_after_them(server: Server, tiny: Bundle) -> None:
    length, body = encode_request(tiny.manifest.signature, {"image": images_of(1, 0)})
    fields = b"content-encoding: gzip\r\ninference-header-content-length: %d\r\n" % length
    packed = post(gzip.compress(body), fields)
    for _ in range(4):  # each of these cost a stream of the engine once
        said = say(server, packed + b"garbage\r\n\r\n", end=False)
        assert [part[:3] for part in said.split(b"HTTP/1.1 ")[1:]] == [b"200", b"400"]
    said = say(server, request_bytes(images_of(1, 0), tiny) + b"GET /v2 HTTP/1.1\r\nhost: x\r\n\r\n" * 5000)
    assert said.count(b"HTTP/1.1 200 OK") == 5001
    assert_served(server, tiny)


def test_refused_registrations_hold_no_files(tiny: Bundle) -> None:
    from multiprocessing.shared_memory import SharedMemory

    memory = SharedMemory(create=True, size=100)
    try:
        with serving(tiny.path, ServeSettings(http_port=0, grpc_port=0)) as server:
            with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
                for number in range(30):
                    with pytest.raises(tritonclient.utils.InferenceServerException, match="are requested"):
                        client.register_system_shared_memory(f"r{number}", memory.name, 100_000)
            files = []
            for file in Path(f"/proc/{server.process.pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):  # the client's connection is closed meanwhile
                    files.append(os.readlink(file))
            assert files
            assert not [file for file in files if memory.name in file]
    finally:
        memory.close()
        memory.unlink()


def test_slow_headers_and_slow_bodies_are_cut_off(tiny: Bundle) -> None:
    whole = request_bytes(images_of(1, 0), tiny)
    with serving(tiny.path, ServeSettings(http_port=0, limits=Limits(request_s=0.5))) as server:
        slow = []
        for cut in (10, len(whole) - 3):
            connection = socket.create_connection(server.address, timeout=10)
            connection.sendall(whole[:cut])
            slow.append(connection)
        assert_served(server, tiny)
        for connection in slow:
            assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")
            assert connection.recv(1000) == b""
            connection.close()
        assert_served(server, tiny)


@pytest.fixture
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 11_000:
        pytest.skip("this machine allows too few open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (11_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_files")
def test_ten_thousand_idle_connections_do_not_keep_others_out(tiny: Bundle) -> None:
    with serving(tiny.path) as server, contextlib.ExitStack() as held:
        keeper = held.enter_context(socket.create_connection(server.address, timeout=10))
        before = resident_mib(server)
        crowd = [held.enter_context(socket.create_connection(server.address, timeout=10)) for _ in range(10_000)]
        assert crowd[-1].recv(100).startswith(b"HTTP/1.1 503 ")
        keeper.sendall(request_bytes(images_of(1, 0), tiny))
        assert keeper.recv(1000).startswith(b"HTTP/1.1 200 ")
        assert resident_mib(server) - before < 200
        for connection in crowd:
            connection.close()
        assert_served(server, tiny)


def test_a_server_that_runs_out_of_files_goes_on_when_there_are_some_again(tiny: Bundle) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with serving(tiny.path) as server:
        used = len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (used + 20, hard))
        with contextlib.ExitStack() as held:
            for _ in range(60):
                held.enter_context(socket.create_connection(server.address, timeout=10))
        deadline = time.monotonic() + 10  # it has to notice first that they have gone
        while not say(server, request_bytes(images_of(2, 0), tiny)).startswith(b"HTTP/1.1 200 "):
            assert time.monotonic() < deadline
        assert_served(server, tiny)


def test_a_server_may_open_as_many_files_as_it_may_have_connections(tiny: Bundle) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        with serving(tiny.path, ServeSettings(http_port=0, limits=Limits(connections=1000))) as server:
            allowed, _ = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert allowed > 1000


# Peers that never read.

CONFIG = b"GET /config HTTP/1.1\r\nhost: x\r\n\r\n"


def deaf_peer(address: tuple[str, int], sent: bytes, context: ssl.SSLContext | None = None) -> socket.socket:
    """A client that has asked for more than the buffers on its way hold, and never reads."""
    peer = socket.socket()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    peer.settimeout(10)
    peer.connect(address)
    if context is not None:
        peer = context.wrap_socket(peer)
    peer.settimeout(2)
    with contextlib.suppress(TimeoutError):
        peer.sendall(sent)
    peer.settimeout(10)
    return peer


def connections(server: Server) -> int:
    said = say(server, b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n").decode()
    return round(float(said.partition('rushhour_connections{protocol="http"} ')[2].split()[0]))


@pytest.mark.parametrize("asked", ["for much", "for much, and goes on", "and half of another"])
def test_a_peer_that_never_reads_does_not_hold_up_the_end(tiny: Bundle, asked: str) -> None:
    with serving(tiny.path) as server:
        sent = CONFIG * 20_000 + (b"GET /v2 HTTP/1.1\r\nho" if "half" in asked else b"")
        with deaf_peer(server.address, sent) as peer:
            assert_served(server, tiny)
            server.process.send_signal(signal.SIGTERM)
            if "goes on" in asked:
                with contextlib.suppress(OSError):
                    peer.sendall(CONFIG * 1000)
            assert server.process.wait(timeout=20) == 0, "it took 30 s once: as long as a drain may take"


def test_a_peer_that_never_reads_is_cut_off_and_one_that_reads_slowly_is_not(tiny: Bundle) -> None:
    with serving(tiny.path, ServeSettings(http_port=0, limits=Limits(request_s=2.0))) as server:
        with deaf_peer(server.address, CONFIG * 20_000), deaf_peer(server.address, CONFIG * 1000) as slow:
            assert connections(server) == 3
            read = 0
            deadline = time.monotonic() + 30
            while connections(server) > 2:
                read += len(slow.recv(8192))
                assert time.monotonic() < deadline
                time.sleep(0.1)
            while chunk := slow.recv(65536):
                read += len(chunk)
                if read >= 1000 * 500 and chunk.endswith(b"}"):
                    break
        assert_served(server, tiny)


def test_an_answer_that_is_not_taken_does_not_keep_a_closing_connection(tiny: Bundle, tmp_path: Path) -> None:
    """The last answer of a connection, of a request that says so: it is flushed for a while, and then no more."""
    target = planned(tiny, tmp_path / "run", max_batch=64, queue_bound=8192)
    engine = FakeEngine(EngineConfig("openvino", max_batch=64))
    body = json.dumps(
        {"inputs": [{"name": "image", "shape": [4096, 4, 4, 1], "datatype": "UINT8", "data": [255] * 65536}]}
    ).encode()

    async def scenario() -> None:
        async with in_process(engine, target) as (address, cell):
            loop = asyncio.get_running_loop()
            known: list[HttpConnection] = []
            patch = pytest.MonkeyPatch()

            def made(self: HttpConnection, transport: asyncio.BaseTransport) -> None:
                usual(self, transport)
                transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
                known.append(self)

            usual = HttpConnection.connection_made
            patch.setattr(HttpConnection, "connection_made", made)
            try:
                peer = await loop.run_in_executor(None, deaf_peer, address, post(body, b"connection: close\r\n"))
                with peer:
                    while not cell.counters.answered:
                        await asyncio.sleep(0.01)
                    (connection,) = known
                    now = loop.time()
                    for second in (0.0, 1.0, 29.0):
                        connection.expire(now + second)
                        await asyncio.sleep(0)
                        assert connection._transport is not None, "it has its time"
                    connection.expire(now + 31.0)
                    await asyncio.sleep(0.01)
                    assert connection._transport is None
            finally:
                patch.undo()

    asyncio.run(scenario())
