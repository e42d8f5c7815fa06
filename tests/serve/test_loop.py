"""One client does not keep a server from the others: nothing large is done on the event loop, and memory is bounded."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, ClassVar

import grpc
import numpy as np
import pytest
from test_hostile import resident_mib
from tritonclient.grpc import service_pb2

from conftest import Server, serving
from rushhour.bundle import Bundle
from rushhour.clock import WallClock
from rushhour.engines import EngineConfig
from rushhour.errors import WireError
from rushhour.measurement import ServiceTimes
from rushhour.plan import Policy
from rushhour.serve import Limits, ServeSettings, open_target
from rushhour.serve.access.keys import Keys
from rushhour.serve.memory.budget import Budget
from rushhour.serve.memory.decompression import inflate
from rushhour.serve.protocols.control import Control
from rushhour.serve.protocols.grpc import health
from rushhour.serve.protocols.grpc.errors import without_frames
from rushhour.serve.protocols.grpc.server import GrpcServer
from rushhour.serve.protocols.http import connection as connection_module
from rushhour.serve.protocols.http.connection import HttpConnection
from rushhour.serve.protocols.http.endpoint import HttpEndpoint
from rushhour.serve.protocols.http.upload import Upload
from rushhour.serve.protocols.listener import bind_reserved
from rushhour.serve.repository import Repository
from rushhour.serve.scheduling.admission import Profile
from rushhour.serve.scheduling.cell import Cell
from rushhour.serve.scheduling.variant import Variant
from rushhour.serve.service import Loaded, Service, Shared
from rushhour.serve.target import ServedVariant
from rushhour.testing.bundles import tiny_bundle
from rushhour.testing.fakes import FakeEngine, fake_answers
from rushhour.wire import Codec, Place, decode_answer, pieces

PATH = "/v2/models/tiny/infer"
READY = b"GET /v2/health/ready HTTP/1.1\r\nhost: x\r\n\r\n"
_MIB = 2**20
_WAIT_S = 20.0
LIMITS = Limits()


def images_of(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, 4, 4, 1), dtype=np.uint8)


def post(body: bytes, *fields: str) -> bytes:
    head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\n" + "".join(f"{field}\r\n" for field in fields)
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def in_json(images: np.ndarray, **more: object) -> bytes:
    entry = {"name": "image", "shape": list(images.shape), "datatype": "UINT8", "data": images.ravel().tolist()}
    return json.dumps({"inputs": [entry], **more}).encode()


def binary(images: np.ndarray, *fields: str, header: bytes | None = None) -> bytes:
    if header is None:
        entry = {"name": "image", "shape": list(images.shape), "datatype": "UINT8"}
        described = entry | {"parameters": {"binary_data_size": images.nbytes}}
        header = json.dumps({"inputs": [described], "parameters": {"binary_data_output": True}}).encode()
    return post(header + images.tobytes(), f"inference-header-content-length: {len(header)}", *fields)


def classified(images: np.ndarray, top: int) -> bytes:
    entry = {"name": "image", "shape": list(images.shape), "datatype": "UINT8"}
    described = entry | {"parameters": {"binary_data_size": images.nbytes}}
    output = {"name": "probabilities", "parameters": {"classification": top}}
    return binary(images, header=json.dumps({"inputs": [described], "outputs": [output]}).encode())


class Answer:
    """One answer over HTTP."""

    def __init__(self, status: int, fields: dict[str, str], body: bytes) -> None:
        self.status = status
        self.fields = fields
        self.body = body

    @property
    def json(self) -> Any:
        length = self.fields.get("inference-header-content-length")
        return json.loads(self.body if length is None else self.body[: int(length)])

    @property
    def values(self) -> np.ndarray:
        length = self.fields.get("inference-header-content-length")
        return decode_answer(self.body, None if length is None else int(length))["probabilities"]


class Client:
    """A connection over HTTP."""

    opened: ClassVar[list[asyncio.StreamWriter]] = []

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def to(cls, address: tuple[str, int]) -> Client:
        reader, writer = await asyncio.open_connection(*address, limit=2**26)
        cls.opened.append(writer)
        return cls(reader, writer)

    @classmethod
    async def close_all(cls) -> None:
        for writer in cls.opened:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        cls.opened.clear()

    async def ask(self, sent: bytes) -> Answer:
        self.writer.write(sent)
        return await self.answer()

    async def answer(self) -> Answer:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        fields = dict(line.split(": ", 1) for line in head[1:] if line)
        return Answer(int(head[0].split()[1]), fields, await self.reader.readexactly(int(fields["content-length"])))


class Held:
    """An engine's batches, that end when they are told to."""

    def __init__(self) -> None:
        self.holding = False
        self.finishes: list[Callable[[], None]] = []

    def schedule(self, seconds: float, finish: Callable[[], None]) -> None:
        if self.holding:
            self.finishes.append(finish)
        else:
            finish()

    def release(self) -> None:
        self.holding = False
        for finish in self.finishes:
            finish()
        self.finishes.clear()


class Served:
    """A server on this loop: both faces before one cell."""

    def __init__(self, desk: HttpEndpoint, address: tuple[str, int], cell: Cell, grpc_address: str, held: Held) -> None:
        self.desk = desk
        self.address = address
        self.cell = cell
        self.grpc = grpc_address
        self.held = held

    async def call(self, sent: bytes, method: str = "ModelInfer") -> bytes:
        options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        async with grpc.aio.insecure_channel(self.grpc, options) as channel:
            return await channel.unary_unary(f"/inference.GRPCInferenceService/{method}")(sent)


@contextlib.asynccontextmanager
async def served(
    tiny: Bundle, limits: Limits = LIMITS, regions: Any = None, max_batch: int = 64, **policy: Any
) -> AsyncIterator[Served]:
    held = Held()
    engine = FakeEngine(EngineConfig("openvino", max_batch=max_batch), schedule=held.schedule)
    target = open_target(tiny.path)
    shared = Shared(limits)
    service = Service(target, None, lambda bundle, config: engine, limits=limits, regions=regions, shared=shared)
    repository = Repository([service], shared)
    profile = Profile(ServiceTimes((1, 2, 4), (0.011, 0.012, 0.014), (90.0, 166.0, 285.0)))
    settings = Policy(max_batch=max_batch, **policy)
    codec = Codec("tiny", engine.signature, labels=("a", "b", "c"), regions=regions)
    cell = Cell([Variant(engine, profile)], codec, service._bounded(settings, engine.signature), WallClock())
    service.serve(Loaded(target, ServedVariant(target.bundle, target.engine_config), engine, cell))
    control = Control(repository, lambda: False, regions=regions)
    desk = HttpEndpoint(repository, control, ServeSettings(limits=limits))
    face = GrpcServer(repository, control, limits, Keys(()))
    listener = await asyncio.get_running_loop().create_server(lambda: HttpConnection(desk), "127.0.0.1", 0)
    with bind_reserved("127.0.0.1", 0) as port:
        await face.start(f"127.0.0.1:{port.getsockname()[1]}", None, None)
        try:
            yield Served(desk, listener.sockets[0].getsockname(), cell, face.address, held)
        finally:
            held.release()
            listener.close()
            await Client.close_all()
            await face.drain(0, 1)
            for connection in list(desk.connections):
                if connection._transport is not None:
                    connection._transport.abort()
            while desk.connections:
                await asyncio.sleep(0.001)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(scenario(), 60)

    asyncio.run(bounded())


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.001)


# What is large is read and written in pieces on a thread: the others are answered in between.


@pytest.fixture
def rests(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Served], Awaitable[None]]]:
    """Stops whoever reads or writes in pieces between two of them; what is given waits until it stands there."""
    resting, going_on = threading.Event(), threading.Event()

    def rest(seconds: float) -> None:
        if not going_on.is_set():
            resting.set()
            assert going_on.wait(_WAIT_S), "on the event loop's own thread nobody can be answered meanwhile"

    monkeypatch.setattr(pieces.time, "sleep", rest)

    async def others_are_answered(server: Served) -> None:
        await asyncio.to_thread(resting.wait, _WAIT_S)
        assert resting.is_set(), "it was not read in pieces"
        client = await Client.to(server.address)
        assert (await client.ask(READY)).status == 200
        np.testing.assert_array_equal((await client.ask(binary(images_of(1)))).values, fake_answers(images_of(1)))
        going_on.set()

    yield others_are_answered
    going_on.set()


LARGE = images_of(3000)
ZEROS = json.dumps({"name": "image", "shape": [1, 4, 4, 1], "datatype": "UINT8"})[:-1].encode()


def with_data(data: bytes) -> bytes:
    return b'{"inputs":[' + ZEROS + b',"data":' + data + b"}]}"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        pytest.param(post(in_json(LARGE)), 200, id="numbers"),
        pytest.param(post(gzip.compress(in_json(LARGE)), "content-encoding: gzip"), 200, id="numbers, packed"),
        pytest.param(post(with_data(b"[" + b"[]," * 100_000 + b"[]]")), 400, id="empty lists"),
        pytest.param(
            post(gzip.compress(with_data(b"[" + b"0," * _MIB + b"0]")), "content-encoding: gzip"),
            400,
            id="zeros, packed",
        ),
        pytest.param(
            binary(LARGE, header=None).replace(b"binary_data_output", b"xxxxxx_data_output"), 200, id="answer"
        ),
        pytest.param(classified(LARGE, 3), 200, id="classes"),
    ],
)
def test_over_http_others_are_answered_while_a_large_message_is_read_or_written(
    tiny: Bundle, rests: Callable[[Served], Awaitable[None]], sent: bytes, status: int
) -> None:
    async def scenario() -> None:
        async with served(tiny, queue_bound=4096) as server:
            client = await Client.to(server.address)
            asking = asyncio.ensure_future(client.ask(sent))
            await rests(server)
            answer = await asking
            assert answer.status == status, answer.body[:500]
            if status == 200 and answer.json["outputs"][0]["datatype"] == "FP32":
                np.testing.assert_array_equal(answer.values, fake_answers(LARGE))
            elif status == 200:
                words = answer.json["outputs"][0]["data"]
                assert words[:3] == [f"{LARGE[0].sum() + each:f}:{each}:{'abc'[each]}" for each in (2, 1, 0)]
                assert len(words) == 9000
            np.testing.assert_array_equal((await client.ask(binary(LARGE))).values, fake_answers(LARGE))

    run(scenario)


def typed(rows: int, values: list[int]) -> bytes:
    request = service_pb2.ModelInferRequest(model_name="tiny", id="x")
    request.inputs.add(name="image", datatype="UINT8", shape=[rows, 4, 4, 1]).contents.uint_contents.extend(values)
    return bytes(request.SerializeToString())


def worded(top: int) -> bytes:
    request = service_pb2.ModelInferRequest(model_name="tiny", id="x")
    request.inputs.add(name="image", datatype="UINT8", shape=LARGE.shape)
    request.outputs.add(name="probabilities").parameters["classification"].int64_param = top
    request.raw_input_contents.append(LARGE.tobytes())
    return bytes(request.SerializeToString())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("sent", "right"),
    [
        pytest.param(typed(3000, LARGE.ravel().tolist()), True, id="typed contents"),
        pytest.param(typed(3000, [200] * 48_001), False, id="too many"),
        pytest.param(worded(3), True, id="classes"),
    ],
)
def test_over_grpc_others_are_answered_while_a_large_message_is_read_or_written(
    tiny: Bundle, rests: Callable[[Served], Awaitable[None]], sent: bytes, right: bool, stream: bool
) -> None:
    async def scenario() -> None:
        async with served(tiny, queue_bound=4096) as server:
            asking = asyncio.ensure_future(ask(server))
            await rests(server)
            answer = await asking
            assert (answer is not None) == right
            if answer is not None:
                assert answer.id == "x"
                first = answer.raw_output_contents[0]
                expected = fake_answers(LARGE).tobytes() if answer.outputs[0].datatype == "FP32" else first
                assert first == expected

    async def ask(server: Served) -> Any:
        if not stream:
            if right:
                return service_pb2.ModelInferResponse.FromString(await server.call(sent))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await server.call(sent)
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            return None
        async with grpc.aio.insecure_channel(server.grpc) as channel:
            call = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(iter([sent]))
            answer = service_pb2.ModelStreamInferResponse.FromString(await call.read())
            return None if answer.error_message else answer.infer_response

    run(scenario)


def test_a_model_replaced_while_a_large_request_is_read_answers_it(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with served(tiny, queue_bound=4096) as server:
            service = server.desk._repository.only
            assert service is not None
            assert service.loaded is not None
            client = await Client.to(server.address)
            reading, old = threading.Event(), service.loaded
            monkeypatch.setattr(pieces.time, "sleep", lambda seconds: reading.set() or going_on.wait(_WAIT_S))
            going_on = threading.Event()
            asking = asyncio.ensure_future(client.ask(post(in_json(LARGE))))
            await asyncio.to_thread(reading.wait, _WAIT_S)
            codec = Codec("tiny", old.engine.signature, version="2")
            cell = Cell([Variant(old.engine, old.cell.profile)], codec, old.cell.policy, WallClock())
            service.serve(Loaded(old.target, old.variant, old.engine, cell))
            going_on.set()
            answer = await asking
            assert answer.json["model_version"] == "2"
            np.testing.assert_array_equal(answer.values, fake_answers(LARGE))

    run(scenario)


def test_thousands_of_small_things_in_one_read_leave_the_others_their_turn(tiny: Bundle) -> None:
    """Requests, or parts of a body: the parser calls back for each."""

    async def scenario() -> None:
        async with served(tiny) as server:
            turns = 0

            async def counting() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await asyncio.sleep(0)

            connection = HttpConnection(server.desk)
            transport = Transport(connection)
            connection.connection_made(transport)
            chunk = b"2\r\nxx\r\n"
            head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n".encode()
            for sent in (READY * 5000, head + chunk * 30_000 + b"0\r\n\r\n" + READY):
                connection.data_received(sent)
                assert transport.paused, "the rest has to wait"
                counter = asyncio.ensure_future(counting())
                await until(lambda: not transport.paused)
                counter.cancel()
                assert turns > 5
                turns = 0
            await until(lambda: transport.sent.count(b"HTTP/1.1 ") == 5002)
            assert transport.sent.count(b"HTTP/1.1 200 OK") == 5001
            assert transport.sent.count(b"HTTP/1.1 400 ") == 1
            connection.connection_lost(None)

    run(scenario)


class Transport(asyncio.Transport):
    """Keeps what is written, and whether more is to be read."""

    def __init__(self, connection: HttpConnection) -> None:
        super().__init__()
        self.connection = connection
        self.sent = bytearray()
        self.paused = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.sent += data

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def is_closing(self) -> bool:
        return False

    def can_write_eof(self) -> bool:
        return False

    def close(self) -> None:
        pass

    def abort(self) -> None:
        self.connection.connection_lost(None)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        pass


def test_a_control_message_is_small(tiny: Bundle) -> None:
    async def scenario() -> None:
        async with served(tiny) as server:
            client = await Client.to(server.address)
            body = b'{"parameters":{"a":[' + b"[]," * 50_000 + b"1]}}"
            path = "/v2/repository/models/tiny/load"
            sent = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n".encode()
            answer = await client.ask(sent + b"content-length: %d\r\n\r\n%b" % (len(body), body))
            assert answer.status == 413
            request = service_pb2.RepositoryModelLoadRequest(model_name="tiny")
            for number in range(10_000):
                request.parameters[str(number)].string_param = "x"
            with pytest.raises(grpc.aio.AioRpcError, match="limit of") as caught:
                await server.call(request.SerializeToString(), "RepositoryModelLoad")
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT

    run(scenario)


# A call that ends without a message.


@pytest.mark.parametrize(
    "method",
    [
        "/inference.GRPCInferenceService/ModelInfer",
        "/inference.GRPCInferenceService/ServerLive",
        "/inference.GRPCInferenceService/ModelStatistics",
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
    ],
)
def test_a_call_that_ends_without_a_message_is_answered_at_once(tiny: Bundle, method: str) -> None:
    async def scenario() -> None:
        async with served(tiny) as server, grpc.aio.insecure_channel(server.grpc) as channel:
            call = channel.stream_stream(method)(iter(()), timeout=_WAIT_S)
            with pytest.raises(grpc.aio.AioRpcError, match="without a message") as caught:
                await call.read()
            assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
            assert (await channel.unary_unary("/grpc.health.v1.Health/Check")(b"")) == b"\x08\x01"

    run(scenario)


def test_many_watchers_of_the_health_cost_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client may open thousands of such calls on one connection."""
    monkeypatch.setattr(health, "_WATCH_SECONDS", 0.01)

    class Asked:
        times = 0
        is_ready = True

        def ready(self) -> bool:
            self.times += 1
            return self.is_ready

    async def empty(context: Any, limit: int) -> bytes:
        return b""

    async def scenario() -> None:
        ending, asked, loop = asyncio.Event(), Asked(), asyncio.get_running_loop()
        service: Any = health.Health(None, asked, empty, ending)  # type: ignore[arg-type]
        watchers = [service._watch((), None) for _ in range(200)]
        assert {await anext(watcher) for watcher in watchers} == {b"\x08\x01"}
        waiting = [asyncio.ensure_future(anext(watcher)) for watcher in watchers]
        await asyncio.sleep(0.02)
        asked.times, began = 0, loop.time()
        await asyncio.sleep(0.2)
        assert asked.times <= (loop.time() - began) / 0.01 + 2
        asked.is_ready = False
        assert {await each for each in waiting} == {b"\x08\x02"}
        asked.is_ready = True
        assert {await anext(watcher) for watcher in watchers} == {b"\x08\x01"}
        ending.set()
        assert {await anext(watcher) for watcher in watchers} == {b"\x08\x02"}
        await asyncio.gather(*(watcher.aclose() for watcher in watchers))

    run(scenario)


# Memory: what one process holds, and that it comes back.


async def settled(server: Served) -> None:
    await until(lambda: server.desk.budget.held == 0)


def test_large_uploads_beyond_the_budget_are_turned_away_and_room_comes_back(tiny: Bundle) -> None:
    async def scenario() -> None:
        limits = Limits(body_bytes=2 * _MIB, held_bytes=2 * _MIB)
        async with served(tiny, limits) as server:
            first, second = await Client.to(server.address), await Client.to(server.address)
            large = binary(images_of(100_000))  # 1.6 MB, and more samples than a request may have: it is refused
            most = 1_200_000
            for known in (False, True):
                first.writer.write(large[:most])
                await until(lambda: server.desk.budget.held > _MIB)
                answer = await second.ask(large)
                assert answer.status == 429
                assert int(answer.fields["retry-after"]) >= 1
                assert ("connection" in answer.fields) != known, "what is known needs no parser, and can be dropped"
                first.writer.write(large[most:])
                answer = await first.answer()
                assert answer.status == 400
                assert b"100000 samples" in answer.body
                await settled(server)
                second = second if known else await Client.to(server.address)
                assert (await second.ask(large)).status == 400
                await settled(server)
            images = images_of(1)
            np.testing.assert_array_equal((await second.ask(binary(images))).values, fake_answers(images))

    run(scenario)


def test_a_grant_is_given_back_whoever_lets_it_go() -> None:
    async def scenario() -> None:
        budget = Budget(100)
        first = budget.grant(500)  # the first one is always let in
        with pytest.raises(WireError) as caught:
            budget.grant(1)
        assert caught.value.status == 429
        first.grow(5)
        assert budget.held == 505
        del first
        assert budget.held == 0
        both = [budget.grant(50), budget.grant(50)]
        with pytest.raises(WireError):
            both[0].grow(1)
        both.clear()
        assert budget.held == 0

    run(scenario)


def test_a_large_message_over_grpc_beyond_the_budget_is_turned_away(tiny: Bundle) -> None:
    async def scenario() -> None:
        async with served(tiny, Limits(held_bytes=_MIB), queue_bound=100_000, max_batch=8) as server:
            request = service_pb2.ModelInferRequest(model_name="tiny")
            images = images_of(4000)
            request.inputs.add(name="image", datatype="UINT8", shape=images.shape)
            request.raw_input_contents.append(images.tobytes())
            sent = request.SerializeToString()
            server.held.holding = True
            calls = [asyncio.ensure_future(server.call(sent)) for _ in range(30)]
            await until(lambda: sum(call.done() for call in calls) >= 30 - _MIB // len(sent))
            assert server.desk.budget.held <= _MIB
            server.held.release()
            answers = await asyncio.gather(*calls, return_exceptions=True)
            refused = [each for each in answers if isinstance(each, grpc.aio.AioRpcError)]
            assert {each.code() for each in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
            assert len(answers) - len(refused) == _MIB // len(sent)
            await settled(server)
            assert await server.call(sent)

    run(scenario)


def test_few_bytes_of_pipelined_bodies_wait_on_one_connection(tiny: Bundle) -> None:
    async def scenario() -> None:
        async with served(tiny, queue_bound=100_000) as server:
            images = [images_of(4000, seed) for seed in range(60)]  # 64 KB each, 3.8 MB together
            client = await Client.to(server.address)
            server.held.holding = True
            client.writer.write(b"".join(map(binary, images)))
            (connection,) = server.desk.connections
            await until(lambda: connection._paused)
            await asyncio.sleep(0.05)
            assert len(connection._ready) < 32
            waiting = sum(len(part) for message in connection._ready for part in message.body)
            assert waiting < 2 * _MIB
            server.held.release()
            for each in images:
                np.testing.assert_array_equal((await client.answer()).values, fake_answers(each))

    run(scenario)


def test_a_large_body_waits_in_its_socket_while_the_one_before_it_is_answered(tiny: Bundle) -> None:
    async def scenario() -> None:
        async with served(tiny, Limits(body_bytes=32 * _MIB), queue_bound=100_000) as server:
            client = await Client.to(server.address)
            server.held.holding = True
            chunks = (b"%x\r\n%b\r\n" % (_MIB, bytes(_MIB))) * 20 + b"0\r\n\r\n"
            head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n".encode()
            client.writer.write(binary(images_of(1)) + head + chunks + READY)
            (connection,) = server.desk.connections
            await until(lambda: connection._paused)
            await asyncio.sleep(0.05)
            assert server.desk.budget.held < 3 * _MIB
            server.held.release()
            assert [(await client.answer()).status for _ in range(3)] == [200, 400, 200]
            await settled(server)

    run(scenario)


async def fill(server: Served) -> None:
    """One request runs and one waits; there is room for no more."""
    server.held.holding = True
    for _ in range(2):
        (await Client.to(server.address)).writer.write(binary(images_of(1)))
    await until(lambda: server.cell.waiting == 1)


def test_what_was_turned_away_is_not_stored(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads: list[Upload] = []

    class Kept(Upload):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            uploads.append(self)

    monkeypatch.setattr(connection_module, "Upload", Kept)

    async def scenario() -> None:
        async with served(tiny, queue_bound=1, max_batch=1) as server:
            client = await Client.to(server.address)
            large = binary(images_of(4096))
            assert (await client.ask(large)).status == 200  # its head is known now
            await fill(server)
            client.writer.write(large[:1000])
            answer = await client.answer()
            assert answer.status == 429
            (upload,) = uploads
            assert len(upload._whole) <= 64 * 2**10
            assert server.desk.budget.held == 0
            server.held.release()
            client.writer.write(large[1000:] + READY)
            assert (await client.answer()).status == 200
            assert (await client.ask(large)).status == 200
            np.testing.assert_array_equal((await client.ask(large)).values, fake_answers(images_of(4096)))

    run(scenario)


class Regions:
    """Shared memory that counts who reads it."""

    def __init__(self) -> None:
        self.read_by: list[int] = []

    def check(self, place: Place, *, writes: bool = True) -> None:
        pass

    def read(self, place: Place) -> memoryview:
        self.read_by.append(threading.get_ident())
        return memoryview(bytes(place.byte_size))

    def write(self, place: Place, content: memoryview | bytes) -> None:
        raise AssertionError("nothing is written")


def placed(rows: int) -> bytes:
    parameters = {"shared_memory_region": "r", "shared_memory_byte_size": rows * 16}
    entry = {"name": "image", "shape": [rows, 4, 4, 1], "datatype": "UINT8", "parameters": parameters}
    return post(json.dumps({"id": "x", "inputs": [entry]}).encode())


def placed_over_grpc(rows: int) -> bytes:
    request = service_pb2.ModelInferRequest(model_name="tiny", id="x")
    parameters = request.inputs.add(name="image", datatype="UINT8", shape=[rows, 4, 4, 1]).parameters
    parameters["shared_memory_region"].string_param = "r"
    parameters["shared_memory_byte_size"].int64_param = rows * 16
    return bytes(request.SerializeToString())


def test_shared_memory_is_read_when_the_request_is_let_in_and_large_tensors_on_a_thread(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rushhour.wire.request.BYTES_AT_ONCE", 1000)

    async def scenario() -> None:
        regions = Regions()
        async with served(tiny, regions=regions, queue_bound=1, max_batch=1) as server:
            client = await Client.to(server.address)
            for rows in (1, 100):
                answer = await client.ask(placed(rows))
                assert answer.status == 200
                assert answer.json["id"] == "x"
                await server.call(placed_over_grpc(rows))
            here = threading.get_ident()
            assert [thread == here for thread in regions.read_by] == [True, True, False, False]
            regions.read_by.clear()
            await fill(server)
            for rows in (1, 100):
                assert (await client.ask(placed(rows))).status == 429
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await server.call(placed_over_grpc(rows))
                assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert regions.read_by == []

    run(scenario)


def test_the_queue_is_bounded_in_bytes_too(tiny: Bundle) -> None:
    target = open_target(tiny.path)
    limits = Limits(held_bytes=16 * 40)
    service = Service(target, None, lambda bundle, config: FakeEngine(config), limits=limits)

    async def scenario() -> None:
        await service.load()
        assert service.loaded is not None
        policy = target.plan.policy
        assert service.loaded.cell.policy.queue_bound == 40 < policy.queue_bound
        repository = Repository([service], service.shared)
        assert Control(repository, lambda: False).effective()["policy"].queue_bound == 40
        await service.unload()

    run(scenario)


def test_a_packed_body_takes_the_memory_that_it_fills() -> None:
    for size in (0, 1, 100, 300_000, 3 * _MIB):
        content = np.random.default_rng(size).integers(0, 4, size, dtype=np.uint8).tobytes()
        for packed in (gzip.compress(content), gzip.compress(content, 0)):
            assert inflate(packed, b"gzip", 4 * _MIB) == content
            with pytest.raises(WireError, match="too early"):
                inflate(packed[:-9], b"gzip", 4 * _MIB)
    assert inflate(gzip.compress(bytes(1000)), b"gzip", 1000) == bytes(1000)
    with pytest.raises(WireError, match="too large"):
        inflate(gzip.compress(bytes(1001)), b"gzip", 1000)


def test_an_error_without_frames_has_no_causes_with_frames() -> None:
    def fail() -> None:
        try:
            try:
                raise ValueError("first")
            except ValueError as error:
                raise KeyError("second") from error
        except KeyError:
            raise WireError("third")  # noqa: B904 - the context counts, too

    with pytest.raises(WireError) as caught:
        fail()
    error: BaseException | None = without_frames(caught.value)
    while error is not None:
        assert error.__traceback__ is None
        error = error.__cause__ or error.__context__


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    bundle = tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny", shape=(28, 28, 1))
    with serving(bundle.path, ServeSettings(http_port=0, grpc_port=0)) as server:
        yield server


def zeros_in_contents(size: int) -> bytes:
    """A message whose contents are so many zeros, without building them one by one."""
    tensor = service_pb2.ModelInferRequest.InferInputTensor(name="image", datatype="UINT8", shape=[1, 28, 28, 1])
    inner = b"\x22" + varint(size) + bytes(size)
    entry = tensor.SerializeToString() + b"\x2a" + varint(len(inner)) + inner
    return service_pb2.ModelInferRequest(model_name="tiny").SerializeToString() + b"\x2a" + varint(len(entry)) + entry


def varint(number: int) -> bytes:
    return bytes([number]) if number < 0x80 else bytes([number & 0x7F | 0x80]) + varint(number >> 7)


@pytest.mark.parametrize(
    ("size", "times", "compression"),
    [
        (60 * _MIB, 2, grpc.Compression.Gzip),
        (_MIB, 40, grpc.Compression.NoCompression),
        (100_000, 200, grpc.Compression.NoCompression),
    ],
)
def test_what_typed_contents_took_comes_back(process: Server, size: int, times: int, compression: Any) -> None:
    sent = zeros_in_contents(size)
    with grpc.insecure_channel(process.grpc, [("grpc.max_send_message_length", -1)]) as channel:
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")

        def refused(message: bytes) -> None:
            with pytest.raises(grpc.RpcError) as caught:
                infer(message, compression=compression, timeout=_WAIT_S)
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT

        refused(zeros_in_contents(40_000))
        before = resident_mib(process)
        for _ in range(times):
            refused(sent)
    assert comes_back(process, before + 12)


def comes_back(server: Server, mib: float) -> bool:
    """Whether its memory falls below that within some seconds."""
    deadline = time.monotonic() + 8
    while resident_mib(server) > mib and time.monotonic() < deadline:
        time.sleep(0.1)
    return resident_mib(server) <= mib


def test_what_large_json_took_comes_back(process: Server) -> None:
    entry = json.dumps({"name": "image", "shape": [1, 28, 28, 1], "datatype": "UINT8"})[:-1].encode()

    def packed(data: bytes) -> bytes:
        return post(gzip.compress(b'{"inputs":[' + entry + b',"data":' + data + b"}]}"), "content-encoding: gzip")

    async def ask(sent: bytes) -> int:
        status = (await (await Client.to(process.address)).ask(sent)).status
        await Client.close_all()
        return status

    assert asyncio.run(ask(packed(b"[" + b"0," * 100_000 + b"0]"))) == 400
    before = resident_mib(process)
    for data in (b"[" + b"[]," * (8 * _MIB) + b"[]]", b"[" + b"0," * (16 * _MIB) + b"0]"):
        assert asyncio.run(ask(packed(data))) == 400
    assert comes_back(process, before + 12)


# Heads and ids that differ from request to request.


def numbered(number: int, *, in_head: bool, in_json: bool, also: str = "") -> bytes:
    images = images_of(2, number)
    entry = {"name": "image", "shape": [2, 4, 4, 1], "datatype": "UINT8", "parameters": {"binary_data_size": 32}}
    header: dict[str, object] = {"id": f"r-{number:06}"} if in_json else {}
    header |= {"inputs": [entry], "parameters": {"binary_data_output": True}}
    fields = [f"x-request-id: {number:032x}", f"Traceparent: 00-{number:032x}-01"] if in_head else []
    return binary(images, *fields, *([also] if also else []), header=json.dumps(header).encode())


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What the parser was given."""
    given: list[bytes] = []
    parse = HttpConnection._parse

    def counted(self: HttpConnection, data: bytes) -> None:
        given.append(data)
        parse(self, data)

    monkeypatch.setattr(HttpConnection, "_parse", counted)
    return given


@pytest.mark.parametrize("in_head", [False, True])
@pytest.mark.parametrize("in_json", [False, True])
def test_a_request_that_differs_in_its_ids_alone_is_parsed_once(
    tiny: Bundle, parsed: list[bytes], in_head: bool, in_json: bool
) -> None:
    async def scenario() -> None:
        async with served(tiny) as server:
            client = await Client.to(server.address)
            for number in range(50):
                answer = await client.ask(numbered(number, in_head=in_head, in_json=in_json))
                assert answer.json.get("id") == (f"r-{number:06}" if in_json else None)
                np.testing.assert_array_equal(answer.values, fake_answers(images_of(2, number)))
            assert len(parsed) == 1

    run(scenario)


def test_the_requests_of_several_clients_behind_a_proxy_are_parsed_once_each(tiny: Bundle, parsed: list[bytes]) -> None:
    async def scenario() -> None:
        async with served(tiny) as server:
            client = await Client.to(server.address)
            for number in range(60):
                kind = number % 6
                sent = numbered(number, in_head=kind < 4, in_json=kind % 2 == 0, also=f"user-agent: {kind}")
                answer = await client.ask(sent)
                assert answer.json.get("id") == (f"r-{number:06}" if kind % 2 == 0 else None)
                np.testing.assert_array_equal(answer.values, fake_answers(images_of(2, number)))
            assert len(parsed) == 6
            (connection,) = server.desk.connections
            for number in range(100):
                await client.ask(numbered(number, in_head=True, in_json=False, also=f"user-agent: {number}"))
            assert len(connection._known) == len(connection._repeats) == 8

    run(scenario)


@pytest.mark.parametrize("in_json", [False, True])
def test_large_requests_that_differ_in_their_ids_need_no_parser(
    tiny: Bundle, parsed: list[bytes], in_json: bool
) -> None:
    async def scenario() -> None:
        async with served(tiny, queue_bound=100_000) as server:
            client = await Client.to(server.address)
            for number in range(4):
                images = images_of(4096, number)
                entry = {"name": "image", "shape": [4096, 4, 4, 1], "datatype": "UINT8"}
                described = entry | {"parameters": {"binary_data_size": images.nbytes}}
                header: dict[str, object] = {"id": f"r-{number}"} if in_json else {}
                header |= {"inputs": [described], "parameters": {"binary_data_output": True}}
                sent = binary(images, f"x-request-id: {'x' * number}", header=json.dumps(header).encode())
                before = len(parsed)
                client.writer.write(sent[:1000])
                await asyncio.sleep(0.02)
                client.writer.write(sent[1000:])
                answer = await client.answer()
                np.testing.assert_array_equal(answer.values, fake_answers(images))
                assert answer.json.get("id") == (f"r-{number}" if in_json else None)
                assert (len(parsed) > before) == (number == 0)

    run(scenario)


@pytest.mark.parametrize(
    ("value", "status"),
    [
        (b"plain", 200),
        (b"", 200),
        (b"with spaces \t and tabs", 200),
        (b"x" * 5000, 200),
        (b"\xe9", 200),
        (b"a\0b", 400),
        (b"a\rb", 400),
        (b"a\r\n folded", 400),
        (b"a\r\ncontent-length: 3", 400),
    ],
)
def test_a_known_head_hides_nothing_that_the_parser_would_refuse(tiny: Bundle, value: bytes, status: int) -> None:
    async def scenario() -> None:
        async with served(tiny) as server:
            client = await Client.to(server.address)
            sent = binary(images_of(1), "x-request-id: 0")
            for _ in range(2):
                assert (await client.ask(sent)).status == 200
            assert (await client.ask(sent.replace(b"x-request-id: 0", b"x-request-id: " + value))).status == status

    run(scenario)


def test_an_id_of_another_length_is_no_shift_of_the_tensor(tiny: Bundle) -> None:
    """A longer id within the same lengths would take its room from the tensor behind it."""

    async def scenario() -> None:
        async with served(tiny) as server:
            client = await Client.to(server.address)
            sent = numbered(7, in_head=True, in_json=True)
            for _ in range(2):
                assert (await client.ask(sent)).status == 200
            longer = sent.replace(b"r-000007", b"r-0000007")
            assert (await client.ask(longer[:-1])).status == 400
            other = await Client.to(server.address)
            for identity in ("short", "a much longer one", "é", 'with "quotes"'):
                entry = {"name": "image", "shape": [1, 4, 4, 1], "datatype": "UINT8"}
                described = entry | {"parameters": {"binary_data_size": 16}}
                header = {"id": identity, "inputs": [described], "parameters": {"binary_data_output": True}}
                for _ in range(3):
                    encoded = json.dumps(header, ensure_ascii=False).encode()
                    answer = await other.ask(binary(images_of(1), header=encoded))
                    assert answer.json["id"] == identity
                    np.testing.assert_array_equal(answer.values, fake_answers(images_of(1)))

    run(scenario)


def test_the_last_answer_of_a_known_request_has_its_id(tiny: Bundle) -> None:
    async def scenario() -> None:
        async with served(tiny) as server:
            client = await Client.to(server.address)
            for number in range(3):
                await client.ask(numbered(number, in_head=True, in_json=True))
            server.desk.draining = True
            answer = await client.ask(numbered(7, in_head=True, in_json=True))
            assert (answer.json["id"], answer.fields["connection"]) == ("r-000007", "close")
            np.testing.assert_array_equal(answer.values, fake_answers(images_of(2, 7)))

    run(scenario)


def test_a_known_request_is_read_anew_after_a_reload(tiny: Bundle) -> None:
    async def scenario() -> None:
        async with served(tiny) as server:
            service = server.desk._repository.only
            assert service is not None
            client = await Client.to(server.address)
            for version in ("2", "3"):
                for number in range(3):
                    await client.ask(numbered(number, in_head=True, in_json=True))
                old = service.loaded
                assert old is not None
                codec = Codec("tiny", old.engine.signature, version=version)
                cell = Cell([Variant(old.engine, old.cell.profile)], codec, old.cell.policy, WallClock())
                service.serve(Loaded(old.target, old.variant, old.engine, cell))
                for number in range(3):
                    answer = await client.ask(numbered(number, in_head=True, in_json=True))
                    assert (answer.json["model_version"], answer.json["id"]) == (version, f"r-{number:06}")

    run(scenario)


def test_an_answer_in_another_form_carries_its_id_too(tiny: Bundle) -> None:
    async def scenario() -> None:
        async with served(tiny) as server:
            client = await Client.to(server.address)
            for number in range(4):
                sent = numbered(number, in_head=False, in_json=True).replace(
                    b"binary_data_output", b"xxxxxx_data_output"
                )
                answer = await client.ask(sent)
                assert answer.json["id"] == f"r-{number:06}"
                np.testing.assert_array_equal(answer.values, fake_answers(images_of(2, number)))

    run(scenario)
