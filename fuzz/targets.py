"""The targets of the fuzzer, and the invariants that must hold for any input. A violation is an AssertionError.

`wire` is `Codec.decode`, of a request read whole and in pieces. `grpc` is `GrpcCodec.decode`, of a message parsed whole
and with its typed contents cut out. `http` is one connection of a whole server (all routes, an engine that sums
pixels) behind a transport that delivers the bytes in any pieces. The test suite replays the corpus through the same
functions.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httptools

from rushhour.bundle import Signature, TensorSpec
from rushhour.errors import WireError
from rushhour.serve import Limits, ServeSettings, open_target
from rushhour.serve.protocols.control import Control
from rushhour.serve.protocols.grpc import codec as codec_module
from rushhour.serve.protocols.grpc.codec import GrpcCodec
from rushhour.serve.protocols.http import connection as connection_module
from rushhour.serve.protocols.http import handler, reader
from rushhour.serve.protocols.http.connection import HttpConnection
from rushhour.serve.protocols.http.endpoint import HttpEndpoint
from rushhour.serve.repository import Repository
from rushhour.serve.service import Service
from rushhour.testing.bundles import tiny_bundle
from rushhour.testing.fakes import FakeEngine
from rushhour.wire import Codec, InferRequest, content_of, pieces
from rushhour.wire import codec as wire_codec

CORPUS = Path(__file__).parent / "corpus"
CUT = b"\xff\xfe"
"""Separates the reads of an input of `http`; the server does not see it."""
KEY = "a-key-of-some-length"
LIMITS = Limits(connections=4, body_bytes=4096, header_bytes=1024)
SMALL = (
    (connection_module, "_LARGE", 100),
    (reader, "_SLICE", 400),
    (reader, "_MOST_EVENTS", 16),
    (reader, "HELD_BYTES", 300),
    (handler, "HELD_BYTES", 300),
    (reader, "_LONG_LINE", 2048),
)
"""Smaller bounds of the connection, so that an input may exceed them."""
_TOO_LONG = (414, 431)
"""Statuses of heads that are too long: in pieces the spaces around values are counted, too."""
_PIECE_BYTES = 24
_LARGE_JSON = 700
_QUIET_TURNS = 16
_MOST_TURNS = 10_000
_MOST_PIECES = 24
_ALL_JSON = 0xFFFF

_IMAGE = TensorSpec("image", "uint8", (2, 2, 1))
_ANSWER = TensorSpec("probabilities", "float32", (3,))
_SIGNATURES = (
    Signature(inputs=(_IMAGE,), outputs=(_ANSWER,)),
    Signature(inputs=(_IMAGE, TensorSpec("extra", "float16", (3,))), outputs=(_ANSWER, TensorSpec("n", "int64", (1,)))),
    Signature(inputs=(TensorSpec("x", "bool", ()), TensorSpec("y", "uint64", (2,))), outputs=(_ANSWER,)),
)


# wire


class Refused(str):
    """Why a request is not valid."""


def wire(data: bytes) -> None:
    """One byte chooses the model, two give the header's length (65,535 for all JSON), the rest is the body."""
    if len(data) < 3:
        return
    codec = _codec(data[0])
    number = int.from_bytes(data[1:3], "little")
    length = None if number == _ALL_JSON else number
    first, again = (_decoded(codec, lambda: codec.decode(data[3:], length)) for _ in range(2))
    assert first == again, "a header seen before means the same"
    if length == 0 or b"NaN" in data or b"Infinity" in data:
        return
    with _changed(wire_codec, "WHOLE_BYTES", 0), _changed(pieces, "PIECE_BYTES", _PIECE_BYTES):
        in_pieces = _decoded(codec, lambda: codec.decode(data[3:], length))
    _assert_equivalent(first, in_pieces, _ONLY_WHOLE)


_ONLY_WHOLE = re.compile(
    r"too long|outside an input|more than \d+ (characters|texts|fields)|nested too deep|more spaces than text"
    r"|not Base64|unknown kind|found something other than numbers|does not end"
)
"""Reasons for which a valid request may be refused when it is read in pieces."""


def _assert_equivalent(whole: object, cut: object, only_whole: re.Pattern[str]) -> None:
    """A request read in pieces gives the same result as one read whole."""
    if isinstance(cut, Refused):
        assert isinstance(whole, Refused) or only_whole.search(cut), (whole, cut)
    else:
        assert whole == cut, (whole, cut)


@contextlib.contextmanager
def _changed(module: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _codec(choice: int) -> Codec:
    """For one of the models; some of them take pictures."""
    pictures = 3 if choice & 0x80 and choice % len(_SIGNATURES) == 0 else 0
    signature = _SIGNATURES[choice % len(_SIGNATURES)]
    return Codec("m", signature, max_rows=64, labels=("a", "b", "c"), pictures=pictures)


def _decoded(codec: Codec, decode: Callable[[], InferRequest]) -> object:
    try:
        request = decode()
        return _whole(codec, request)
    except WireError as caught:
        refused = caught
    assert 400 <= refused.status <= 501
    assert len(str(refused)) < 1000, "an error does not repeat what was sent"
    return Refused(refused)


def _whole(codec: Codec, request: InferRequest) -> object:
    assert 1 <= request.rows <= codec.max_rows
    if request.pictures:
        assert len(request.pictures) == request.rows
        return [content_of(picture) for picture in request.pictures], request.wanted
    sizes = [request.rows * spec.row_bytes for spec in codec.signature.inputs]
    assert [len(tensor) for tensor in request.tensors] == sizes
    zeros = [memoryview(bytes(request.rows * spec.row_bytes)) for spec in codec.signature.outputs]
    header_length, parts = codec.encode(request.wanted, request.rows, zeros)
    assert header_length is None or 0 < header_length <= sum(map(len, parts))
    return [bytes(tensor) for tensor in request.tensors], request.wanted


# grpc


def grpc(data: bytes) -> None:
    """One byte chooses the model, the rest is a `ModelInferRequest`."""
    if not data:
        return
    codec = _codec(data[0])
    first, cut = GrpcCodec(codec), GrpcCodec(codec)
    whole = _decoded(codec, lambda: first.decode(data[1:]).request)
    assert whole == _decoded(codec, lambda: first.decode(data[1:]).request), "a header seen before means the same"
    with _changed(codec_module, "WHOLE_BYTES", -1), _changed(pieces, "PIECE_BYTES", _PIECE_BYTES):
        in_pieces = _decoded(codec, lambda: cut.decode(data[1:]).request)
    if isinstance(whole, Refused) and "cannot be read" in whole:
        return  # only the parser finds faults in contents that are not needed
    _assert_equivalent(whole, in_pieces, _ONLY_WHOLE)


# http


class Answer(NamedTuple):
    """One final answer of the server."""

    status: int
    head: bytes
    body: bytes

    @property
    def last(self) -> bool:
        """The server closes after it."""
        return b"\r\nconnection: close\r\n" in self.head


class Exchange(NamedTuple):
    """What the server sent on one connection.

    Attributes:
        answers: in order, without interim ones.
        closed: by the server, or about to be.
    """

    answers: list[Answer]
    closed: bool


class _Transport(asyncio.Transport):
    """As strict as uvloop's: no write after the end."""

    def __init__(self, connection: HttpConnection) -> None:
        super().__init__()
        self.sent = bytearray()
        self.ended = False
        self.paused = False
        self._closing = False
        self._connection = connection
        self._protocol: asyncio.BaseProtocol = connection

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        if self.ended:
            raise RuntimeError("Cannot call write() after write_eof()")
        if not self._closing:
            self.sent += data

    def write_eof(self) -> None:
        self.ended = True

    def can_write_eof(self) -> bool:
        return True

    def is_closing(self) -> bool:
        return self._closing

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def deliver(self, read: bytes) -> None:
        """One read of the client's bytes; what does not fit into a buffer goes into the next one."""
        while read and not self._closing:
            if isinstance(self._protocol, asyncio.BufferedProtocol):
                room = self._protocol.get_buffer(-1)
                taken = min(len(room), len(read))
                assert taken, "a buffer has room"
                room[:taken] = read[:taken]
                read = read[taken:]
                self._protocol.buffer_updated(taken)
            else:
                taken, read = read, b""
                self._connection.data_received(taken)

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            asyncio.get_running_loop().call_soon(self._connection.connection_lost, None)


class _AtOnce(ThreadPoolExecutor):
    """Runs functions for threads at once, so that every run is the same."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except BaseException as error:
            done.set_exception(error)
        return done


class Stack:
    """A whole server without its sockets, on an event loop of its own.

    Args:
        keys: API keys that it asks for.
        full: its queue is full, and stays so.
    """

    def __init__(self, *, keys: tuple[str, ...] = (), full: bool = False) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(_AtOnce(1))
        self._loop.set_exception_handler(lambda loop, context: self._failures.append(context))
        self._failures: list[object] = []
        self._full = full
        self._server: HttpEndpoint = self._loop.run_until_complete(self._open(keys))

    async def _open(self, keys: tuple[str, ...]) -> HttpEndpoint:
        with tempfile.TemporaryDirectory() as folder:
            bundle = tiny_bundle(Path(folder) / "tiny")
            service = Service(open_target(bundle.path), None, lambda _, config: FakeEngine(config))
            repository = Repository([service], service.shared)
            await service.load()
        settings = ServeSettings(limits=LIMITS, api_keys=keys, admin=False, shared_memory=False)
        server = HttpEndpoint(repository, Control(repository, lambda: False, admin=settings.admin), settings)
        if self._full:
            cell = server.stages.get(b"/v2/models/tiny/infer")
            assert cell is not None
            cell.batcher.queue_bound = 1
            cell._free.clear()
            request = cell.codec.decode(bytes(16), 0)
            cell.submit(request, lambda result: None)
        return server

    def converse(self, reads: Iterable[bytes], *, hasty: bool = False, methods: Sequence[bytes] = ()) -> Exchange:
        """One connection from its beginning to its end.

        Args:
            reads: what the client sends, read by read.
            hasty: the client ends its side at once, and all reads fall into one turn of the loop.
            methods: of the requests in it, for answers without a body.
        """
        with contextlib.ExitStack() as changed:
            for module, name, value in SMALL:
                changed.enter_context(_changed(module, name, value))
            heard = self._loop.run_until_complete(self._converse(reads, hasty, methods))
        assert not self._failures, self._failures
        return heard

    async def _converse(self, reads: Iterable[bytes], hasty: bool, methods: Sequence[bytes]) -> Exchange:
        connection = HttpConnection(self._server)
        transport = _Transport(connection)
        connection.connection_made(transport)
        for read in reads:
            if transport.paused or not hasty:
                await self._quiet(transport)
            if transport.is_closing():
                break
            assert not transport.paused, "nothing is under way, and nothing is read"
            transport.deliver(read)
        if transport.paused or not hasty:
            await self._quiet(transport)
        closed = transport.ended or transport.is_closing()
        if not transport.is_closing() and not connection.eof_received():
            transport.close()
        await self._quiet(transport)
        closed = closed or (hasty and (transport.ended or transport.is_closing()))
        transport.close()
        await self._quiet(transport)
        assert connection not in self._server.connections
        return Exchange(_answers(bytes(transport.sent), methods), closed)

    async def _quiet(self, transport: _Transport) -> None:
        """Let the event loop run until nothing happens any more."""
        still, before = 0, -1
        cell = self._server.stages.get(b"/v2/models/tiny/infer")
        for _ in range(_MOST_TURNS):
            if still >= _QUIET_TURNS and not transport.paused and (self._full or cell is None or cell.idle):
                return
            still, before = (still + 1 if len(transport.sent) == before else 0), len(transport.sent)
            await asyncio.sleep(0)
        raise AssertionError("the server is stuck")

    def close(self) -> None:
        """End the loop."""
        self._loop.close()


_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) [A-Za-z ]+\r\n((?:[a-z-]+: [^\r\n]*\r\n)*)\r\n")
_LENGTH = re.compile(rb"^content-length: (\d+)\r\n", re.MULTILINE)
_OFFER = re.compile(rb"\nupgrade:", re.IGNORECASE)


def _answers(sent: bytes, methods: Sequence[bytes]) -> list[Answer]:
    """The final answers in the bytes that the server sent; every byte must belong to one."""
    found: list[Answer] = []
    at = 0
    while at < len(sent):
        match = _STATUS.match(sent, at)
        assert match is not None, sent[at : at + 200]
        at = match.end()
        if match[1] == b"100":
            assert not match[2]
            continue
        (length,) = _LENGTH.findall(match[2])
        bodiless = len(found) < len(methods) and methods[len(found)] == b"HEAD"
        # A request refused before its method is known to be HEAD may get a body: nothing follows it.
        size = int(length) if not bodiless else len(sent) - at if b"\nconnection: close\r" in match[2] else 0
        found.append(Answer(int(match[1]), b"\r\n" + match[2], sent[at : at + size]))
        assert len(found[-1].body) == size
        at += size
    return found


class _Reference:
    """The requests that httptools alone can parse.

    Attributes:
        methods: of each request whose header is whole.
        whole: requests that are.
        sound: all of it was parsed.
        over: the following bytes are no request.
    """

    def __init__(self, sent: bytes) -> None:
        self.methods: list[bytes] = []
        self.whole = 0
        self.sound = True
        self.over = False
        parser = self._parser = httptools.HttpRequestParser(self)
        try:
            parser.feed_data(_OFFER.sub(b"\nignored:", sent))  # else its body would belong to another protocol
        except httptools.HttpParserUpgrade:
            self.over = True
        except httptools.HttpParserError:
            self.sound = False

    def on_headers_complete(self) -> None:
        if not self.over:
            self.methods.append(self._parser.get_method())

    def on_message_complete(self) -> None:
        if not self.over:
            self.whole += 1
            self.over = not self._parser.should_keep_alive()


class _Stacks:
    """Made at first use: a server takes time to start."""

    def __init__(self) -> None:
        self._made: dict[int, Stack] = {}

    def __getitem__(self, kind: int) -> Stack:
        if kind not in self._made:
            made = self._made[kind] = (Stack, lambda: Stack(keys=(KEY,)), lambda: Stack(full=True))[kind]()
            atexit.register(made.close)
        return self._made[kind]


_stacks = _Stacks()


def http(data: bytes) -> None:
    """One byte chooses server, haste and size of pieces, the rest is sent by a client."""
    if len(data) < 2:
        return
    kind, hasty, piece = data[0] % 3, bool(data[0] & 0x40), 1 + (data[0] >> 2) % 16
    reads = [read for read in data[1:].split(CUT) if read]
    sent = b"".join(reads)
    reference = _Reference(sent)
    cut = _cut(sent, max(piece, len(sent) // _MOST_PIECES))
    with _changed(wire_codec, "WHOLE_BYTES", _LARGE_JSON):
        heard = [
            _stacks[kind].converse(given, hasty=hasty, methods=reference.methods) for given in ([sent], reads, cut)
        ]
    for answers, closed in heard:
        _check(answers, closed, reference, early=kind != 0)
    if kind == 0 and not any(answer.status in _TOO_LONG for answers, _ in heard for answer in answers):
        assert len({tuple(_outcome(answer) for answer in answers) for answers, _ in heard}) == 1, "however it is cut"
        assert len({tuple(_tensors(answers)) for answers, _ in heard}) == 1, "however it is cut"


def _check(answers: list[Answer], closed: bool, reference: _Reference, *, early: bool) -> None:
    whole = reference.whole
    assert not any(answer.last for answer in answers[:-1]), "nothing follows connection: close"
    assert not any(answer.status == 500 for answer in answers)
    if answers and answers[-1].last:
        assert closed
        assert len(answers) <= whole + 1, "one answer for each request, and one error at most"
    else:
        assert reference.sound or reference.over or early, "what cannot be parsed is refused"
        assert whole <= len(answers) <= whole + early, "each request is answered, and once"


def _outcome(answer: Answer) -> int | None:
    """Which of two faults is found first may depend on the pieces; that there is one must not."""
    return None if answer.last and answer.status >= 400 else answer.status


def _tensors(answers: Iterable[Answer]) -> list[bytes]:
    return [answer.body for answer in answers if b"octet-stream" in answer.head]


def _cut(sent: bytes, piece: int) -> list[bytes]:
    return [sent[at : at + piece] for at in range(0, len(sent), piece)]


TARGETS = {"wire": wire, "grpc": grpc, "http": http}
