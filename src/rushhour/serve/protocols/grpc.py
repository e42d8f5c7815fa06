"""The Open Inference Protocol over gRPC: grpcio's asyncio server, on the loop of HTTP and before the same cells.

Imported only where gRPC is switched on. Sources: kserve/open-inference-protocol,
specification/protocol/inference_grpc.md; grpc/grpc, doc/health-checking.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any, NoReturn, cast
from urllib.parse import unquote

import grpc
import msgspec
from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError
from grpc import aio

from rushhour.errors import RushhourError, ServeError, WireError
from rushhour.protocol import HEALTH, INFERENCE, message
from rushhour.serve.observability.requests import CANCELLED, Followed, Observer
from rushhour.serve.protocols.control import Control
from rushhour.serve.protocols.grpc_codec import Asked, GrpcCodec, identity_of, stream_answer, stream_error
from rushhour.serve.protocols.limits import (
    Asker,
    Budget,
    Certificates,
    Grant,
    Identity,
    Keys,
    Limits,
    inflate,
    without_frames,
)
from rushhour.serve.repository import Loaded, Repository
from rushhour.serve.scheduling.cell import LATER, Cell, Job, Shed, TurnedAway, lasting
from rushhour.wire import PlacedRequest
from rushhour.wire.pieces import WHOLE_BYTES

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.ALREADY_EXISTS,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
_OPEN_METHODS = frozenset(("ServerLive", "ServerReady"))
"""Asked by whoever watches over the server, as is all of the health service; they carry no key."""
_ASK_WHO = frozenset(("SystemSharedMemoryRegister",))
"""Methods whose answer depends on who calls."""
_INFERENCE_METHODS = frozenset(("ModelInfer", "ModelStreamInfer"))
_REFUSE_SECONDS = 0.1
"""For so long at the end everybody is told that it is the end; grpcio itself would only cancel them."""
_STREAM_WINDOW = 256
"""Requests of one stream that are under way at the same time; further ones are read when answers have been."""
_MAX_DETAILS = 1000
_MAX_CONTROL_BYTES = 64 * 2**10
"""Of a message that is no inference request: it is parsed on the loop's thread."""
_GZIP, _ZLIB = b"\x1f\x8b", (b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda")
_LARGE_BYTES = 2**20
"""From here on a message leaves so much behind that it is worth giving back."""
_WATCH_SECONDS = 0.5
_SERVING, _NOT_SERVING, _SERVICE_UNKNOWN = 1, 2, 3

_HealthRequest = message("grpc.health.v1.HealthCheckRequest")
_HealthResponse = message("grpc.health.v1.HealthCheckResponse")

Context = Any
"""`grpc.aio.ServicerContext`; grpcio has no types."""


class GrpcFace:
    """A gRPC server. Must be made on the running loop.

    Args:
        repository: where inference requests go.
        control: what answers all others.
        limits: what one client may cost.
        keys: that clients must send; none lets everybody in.
        observer: who follows single requests, if anybody does.

    Attributes:
        address: where it listens.
    """

    def __init__(
        self,
        repository: Repository,
        control: Control,
        limits: Limits,
        keys: Keys,
        observer: Observer | None = None,
    ) -> None:
        self.address = ""
        self._observer = observer
        self._repository = repository
        self._control = control
        self._keys = keys
        self._most = limits.body_bytes
        self._codec: GrpcCodec | None = None
        self._ending = asyncio.Event()
        self._stopping = False
        self._active = 0
        self._readers: set[asyncio.Task[None]] = set()
        self._server = aio.server(
            handlers=[_Gate(self._inference(), self._unknown), self._health()],
            maximum_concurrent_rpcs=limits.connections,
            options=[
                ("grpc.max_receive_message_length", min(limits.body_bytes, limits.grpc_bytes)),
                ("grpc.per_message_decompression", 0),  # it is done here, on a thread
                ("grpc.max_send_message_length", -1),
                ("grpc.max_metadata_size", limits.header_bytes),
                ("grpc.absolute_max_metadata_size", limits.header_bytes),
                ("grpc.max_allowed_incoming_connections", limits.connections),
                ("grpc.max_connection_idle_ms", math.ceil(1e3 * limits.idle_s)),
                ("grpc.server_handshake_timeout_ms", math.ceil(1e3 * limits.request_s)),
                ("grpc.so_reuseport", 1),
                *_keepalive(limits),
            ],
        )

    async def start(
        self, address: str, certificates: Certificates | None = None, more: Sequence[str] | None = None
    ) -> None:
        """Listen, from now on.

        Args:
            address: `host:port`. Servers that share the port are joined: whether it is free is to be seen to before.
            certificates: for TLS; None serves without.
            more: further addresses.

        Raises:
            ServeError: if one of them cannot be had.
        """
        self.address = address
        try:
            for each in (address, *(more or ())):
                if certificates is None:
                    self._server.add_insecure_port(each)
                else:
                    self._server.add_secure_port(each, _credentials(certificates))
            await self._server.start()
        except (RuntimeError, OSError) as error:
            raise ServeError(
                f"cannot listen on {address} for gRPC", str(error), "choose another port with --grpc-port"
            ) from error

    @property
    def calls(self) -> int:
        """Inference calls and streams under way."""
        return self._active

    async def drain(self, linger_s: float, within_s: float) -> None:
        """Say that the end is near, go on for a moment, then take nothing new, finish what is under way and stop.

        Args:
            linger_s: how long new requests are still answered.
            within_s: how long those under way may take.
        """
        loop = asyncio.get_running_loop()
        self._ending.set()
        await asyncio.sleep(linger_s)
        self._stopping = True
        for reader in self._readers:
            reader.cancel()
        began = loop.time()
        await asyncio.sleep(_REFUSE_SECONDS)
        while self._active and loop.time() < began + within_s:
            await asyncio.sleep(0.02)
        await self._server.stop(max(0.0, began + within_s - loop.time()))

    # Inference.

    async def _infer(self, messages: object, context: Context) -> bytes:
        self._active += 1
        followed = self._follow("ModelInfer", context)
        try:
            with self._counting():
                sent = await self._only(context, self._most)
                submitting = self._submit(sent, context.time_remaining(), followed)
                del sent
                answering = (await submitting).answer()
            return await answering
        except Exception as error:
            _end(followed, _status(error))
            refusing = _refuse(context, error)
            del context  # which keeps the error, whose frames would keep it: they are to go now
            await refusing
        finally:
            self._active -= 1

    async def _stream(self, messages: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        """Answers in the order of their requests, which are computed together. One that fails does not end the rest."""
        begun: asyncio.Queue[_Call | bytes | None] = asyncio.Queue()
        room = asyncio.Semaphore(_STREAM_WINDOW)
        reader = asyncio.create_task(self._read(messages, begun, room, context))
        self._readers.add(reader)
        self._active += 1
        try:
            while (call := await begun.get()) is not None:
                yield call if isinstance(call, bytes) else await call.stream_answer()
                room.release()
        finally:
            self._active -= 1
            self._readers.discard(reader)
            reader.cancel()
            while not begun.empty():
                call = begun.get_nowait()
                if isinstance(call, _Call):
                    call.cancel()
        if self._stopping:
            await _refuse(context, _stopping())

    async def _read(
        self,
        messages: AsyncIterator[bytes],
        begun: asyncio.Queue[_Call | bytes | None],
        room: asyncio.Semaphore,
        context: Context,
    ) -> None:
        try:
            async for sent in messages:
                await room.acquire()
                followed = self._follow("ModelStreamInfer", context)
                try:
                    with self._counting():
                        sent = await self._unpacked(sent, self._most)
                        begun.put_nowait(await self._submit(sent, None, followed))
                except Exception as error:
                    _end(followed, _status(error))
                    begun.put_nowait(stream_error(_text(error), identity_of(sent)))
                del sent  # until the next one comes, which may be long
        finally:
            begun.put_nowait(None)

    def _follow(self, method: str, context: Context) -> Followed | None:
        if self._observer is None:
            return None
        fields = {name: value for name, value in context.invocation_metadata() or () if isinstance(value, str)}
        return self._observer.begin("grpc", method, "", fields)

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        """Every error in an inference request on its way to its cell is counted, and so is one in its answer."""
        arrived = asyncio.get_running_loop().time()
        try:
            yield
        except TurnedAway:
            raise  # the cell has counted it
        except Exception as error:
            self._repository.refuse(_status(error), asyncio.get_running_loop().time() - arrived, infer=True)
            raise

    async def _submit(self, sent: bytes, within_s: float | None, followed: Followed | None) -> _Call:
        """Put a request to its cell."""
        budget, began = self._repository.budget, asyncio.get_running_loop().time()
        grant = budget.grant(len(sent)) if len(sent) > WHOLE_BYTES else None
        while True:
            loaded, codec = self._loaded()
            cell = loaded.cell if followed is None else followed.into(loaded.cell)
            if grant is None or not codec.is_large(sent):
                asked = codec.decode(sent)
            else:
                asked = await budget.aside(codec.decode, sent)
            if asked.request.elsewhere:
                await self._fetch(cell, asked)
            if loaded is self._repository.loaded:
                break  # else it was replaced meanwhile, and the request is read for what is there now
        if followed is not None:
            followed.id = asked.id.decode() or followed.id
        if within_s is not None:
            within_s -= asyncio.get_running_loop().time() - began
        return _Call(cell, codec, asked, within_s, followed, budget, grant)

    async def _fetch(self, cell: Cell, asked: Asked) -> None:
        """Read what lies in shared memory, if the request is let in at all."""
        placed = cast(PlacedRequest, asked.request)
        shed = cell.foresee(placed)
        if shed is not None:
            raise TurnedAway(shed.why, shed.retry_after_s)
        asked.request = await self._repository.budget.aside(placed.fetch) if placed.large else placed.fetch()

    def _loaded(self) -> tuple[Loaded, GrpcCodec]:
        if self._stopping:
            raise _stopping()
        loaded = self._repository.loaded
        if loaded is None:
            raise WireError(f"the model {self._repository.name} is not loaded", "", "load it first", status=404)
        codec = self._codec
        if codec is None or codec.codec is not loaded.cell.codec:
            codec = self._codec = GrpcCodec(loaded.cell.codec)
        return loaded, codec

    async def _only(self, context: Context, most: int) -> bytes:
        """The message of a call that has one; unpacked it has `most` bytes at most."""
        sent = await context.read()
        if sent is aio.EOF:
            raise WireError("the call ended without a message", "this method takes one", "send it", status=501)
        return await self._unpacked(sent, most)

    async def _unpacked(self, sent: bytes, most: int) -> bytes:
        """A message as it was before it was compressed.

        grpcio would unpack it in one go, and does not say whether it is compressed. Of a message that is not, the first
        byte is never gzip's, and zlib's only where a field comes first that the protocol does not have.
        """
        budget = self._repository.budget
        if len(sent) > _LARGE_BYTES:
            budget.trim_soon()
        is_gzip = sent.startswith(_GZIP)
        if not (is_gzip or sent.startswith(_ZLIB)):
            return sent
        try:
            unpacked = await budget.unpack(inflate, sent, b"gzip" if is_gzip else b"deflate", most)
        except WireError as error:
            if error.status == 413:
                raise _TooLarge(most) from None
            if is_gzip:
                raise
            return sent
        if len(unpacked) > _LARGE_BYTES:
            budget.trim_soon()
        return bytes(unpacked) if len(unpacked) <= WHOLE_BYTES else cast(bytes, unpacked)

    def _unknown(self, details: Any) -> Any | None:
        """What answers a caller without a key, from its metadata alone: its message is never read."""
        name = details.method.rpartition("/")[2]
        if not self._keys or name in _OPEN_METHODS:
            return None
        sent = dict(details.invocation_metadata or ()).get("authorization")
        if self._keys.admit(sent.encode() if isinstance(sent, str) else sent):
            return None

        async def deny(messages: AsyncIterator[bytes], context: Context) -> None:
            followed = self._follow(name, context)
            self._repository.refuse(401, 0.0, infer=name in _INFERENCE_METHODS)
            _end(followed, 401)
            why = "this server takes requests with an API key only"
            await _refuse(context, WireError(why, "", "send the metadata 'authorization: Bearer KEY'", status=401))

        return grpc.stream_stream_rpc_method_handler(deny)

    def _inference(self) -> Any:
        """The service."""
        handlers = {
            # As if of several messages: grpcio itself leaves a call alone whose client ends it without a message.
            "ModelInfer": grpc.stream_unary_rpc_method_handler(self._infer),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(self._stream),
        }
        answers = self._answers()
        for method in INFERENCE.methods:
            if method.name not in handlers:
                handlers[method.name] = self._answering(method, answers[method.name])
        return grpc.method_handlers_generic_handler(INFERENCE.full_name, handlers)

    # Everything else.

    def _answering(self, method: Any, answer: Callable[..., Any]) -> Any:
        request, response = (message(kind.full_name) for kind in (method.input_type, method.output_type))

        async def answering(messages: object, context: Context) -> Any:
            followed = self._follow(method.name, context)
            try:
                parsed = _parsed(request, await self._only(context, _MAX_CONTROL_BYTES))
                answered = answer(parsed, self._asker(context)) if method.name in _ASK_WHO else answer(parsed)
                if isinstance(answered, Awaitable):
                    answered = await answered
                encoded = ParseDict(answered or {}, response()).SerializeToString()
                _end(followed, 200)
                return encoded
            except Exception as error:
                self._repository.refuse(_status(error), 0.0, infer=False)
                _end(followed, _status(error))
                await _refuse(context, error)

        return grpc.stream_unary_rpc_method_handler(answering)

    def _answers(self) -> dict[str, Callable[..., Any]]:
        """Method -> what answers it, in plain values under the names of its response."""
        control = self._control
        return {
            "ServerLive": lambda asked: {"live": True},
            "ServerReady": lambda asked: {"ready": control.ready()},
            "ServerMetadata": lambda asked: control.server(),
            "ModelReady": lambda asked: {"ready": control.model_ready(asked.name, asked.version)},
            "ModelMetadata": lambda asked: control.metadata(asked.name, asked.version),
            "ModelConfig": lambda asked: {"config": control.config(asked.name, asked.version)},
            "ModelStatistics": lambda asked: control.statistics(asked.name, asked.version),
            "RepositoryIndex": lambda asked: {"models": control.index(ready_only=asked.ready)},
            "RepositoryModelLoad": lambda asked: control.change("load", asked.model_name, asked.parameters),
            "RepositoryModelUnload": lambda asked: control.change("unload", asked.model_name, asked.parameters),
            "SystemSharedMemoryStatus": lambda asked: {
                "regions": {region["name"]: region for region in control.region_status(asked.name or None)}
            },
            "SystemSharedMemoryRegister": lambda asked, asker: control.register(
                asked.name, asked.key, asked.offset, asked.byte_size, None, asker
            ),
            "SystemSharedMemoryUnregister": lambda asked: control.unregister(asked.name or None),
            "CudaSharedMemoryStatus": lambda asked: {},
            "CudaSharedMemoryRegister": lambda asked: control.refuse_cuda(),
            "CudaSharedMemoryUnregister": lambda asked: {},
            "TraceSetting": self._tracing,
            "LogSettings": self._logging,
        }

    def _asker(self, context: Context) -> Asker:
        """Who calls; without addresses where grpcio does not give them."""
        kind, _, place = unquote(context.peer()).partition(":")
        host, _, port = place.rpartition(":")
        if kind not in ("ipv4", "ipv6") or not port.isdigit():
            return Asker()
        host = host.strip("[]").partition("%")[0]
        # Within the machine both ends have the same address, but for servers that listen on several.
        return Asker(peer=(host, int(port)), here=(host, int(self.address.rpartition(":")[2])))

    def _tracing(self, asked: Any) -> dict[str, Any]:
        # A setting without a value asks for the default.
        wanted = {name: list(setting.value) or None for name, setting in asked.settings.items()}
        settings = self._control.tracing(wanted, asked.model_name)
        return {"settings": {name: {"value": value} for name, value in settings.items()}}

    async def _logging(self, asked: Any) -> dict[str, Any]:
        wanted = {
            name: getattr(setting, choice)
            for name, setting in asked.settings.items()
            if (choice := setting.WhichOneof("parameter_choice")) is not None
        }
        fields = {bool: "bool_param", int: "uint32_param", str: "string_param"}
        settings = await self._control.logging(wanted)
        return {"settings": {name: {fields[type(value)]: value} for name, value in settings.items()}}

    # The health service.

    def _health(self) -> Any:
        handlers = {
            "Check": grpc.stream_unary_rpc_method_handler(self._check),
            "Watch": grpc.stream_stream_rpc_method_handler(self._watch),
        }
        return grpc.method_handlers_generic_handler(HEALTH.full_name, handlers)

    async def _check(self, messages: object, context: Context) -> bytes:
        try:
            service = _parsed(_HealthRequest, await self._only(context, _MAX_CONTROL_BYTES)).service
            status = self._status(service)
            if status == _SERVICE_UNKNOWN:
                raise WireError(f"there is no service {service[:100]!r}", status=404)
        except WireError as error:
            self._repository.refuse(error.status, 0.0, infer=False)
            await _refuse(context, error)
        return _health(status)

    async def _watch(self, messages: object, context: Context) -> AsyncIterator[bytes]:
        try:
            service = _parsed(_HealthRequest, await self._only(context, _MAX_CONTROL_BYTES)).service
        except WireError as error:
            self._repository.refuse(error.status, 0.0, infer=False)
            await _refuse(context, error)
        said = None
        while not self._ending.is_set():
            status = self._status(service)
            if status != said:
                yield _health(status)
            said = status
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), _WATCH_SECONDS)
        yield _health(_NOT_SERVING)

    def _status(self, service: str) -> int:
        if service not in ("", INFERENCE.full_name):
            return _SERVICE_UNKNOWN
        return _SERVING if self._control.ready() else _NOT_SERVING


class _Gate(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Handlers that are asked for only after another had its chance to answer in their place.

    Args:
        behind: these handlers.
        before: gives the handler that answers instead, if any.
    """

    def __init__(self, behind: Any, before: Callable[[Any], Any | None]) -> None:
        self._behind = behind
        self._before = before

    def service(self, handler_call_details: Any) -> Any | None:
        """What answers a call; None if that is for others."""
        found = self._behind.service(handler_call_details)
        return found and (self._before(handler_call_details) or found)


class _Call:
    """An inference request on its way through a cell."""

    __slots__ = ("_answered", "_asked", "_budget", "_cell", "_codec", "_followed", "_grant", "_job", "_writing")

    def __init__(
        self,
        cell: Cell,
        codec: GrpcCodec,
        asked: Asked,
        within_s: float | None,
        followed: Followed | None,
        budget: Budget,
        grant: Grant | None,
    ) -> None:
        self._answered: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._writing: asyncio.Task[None] | None = None
        self._budget = budget
        self._grant = grant
        self._cell = cell
        self._codec = codec
        self._asked = asked
        self._followed = followed
        request = asked.request
        if within_s is not None:  # the client's own deadline: later it would not be there any more
            wanted = request.wanted
            timeout = within_s if wanted.timeout_s is None else min(within_s, wanted.timeout_s)
            request.wanted = msgspec.structs.replace(wanted, timeout_s=max(timeout, 1e-6))
        submitted = cell.submit(request, self._reply)
        if isinstance(submitted, Shed):
            raise TurnedAway(submitted.why, submitted.retry_after_s)
        self._job: Job | None = submitted

    async def answer(self) -> bytes:
        """The answer as a message; if whoever waits for it is cancelled, so is the request."""
        try:
            return await self._answered
        except asyncio.CancelledError:
            self.cancel()
            raise

    async def stream_answer(self) -> bytes:
        """The answer as a message of a stream, or what went wrong as one."""
        try:
            return stream_answer(await self.answer())
        except Exception as error:
            return stream_error(_text(error), self._asked.id)

    def cancel(self) -> None:
        """Nobody waits for the answer any more."""
        self._answered.cancel()
        if self._job is not None:
            self._cell.cancel(self._job)
            self._job = None
        _end(self._followed, CANCELLED)

    def _reply(self, result: Sequence[memoryview] | Exception) -> int | None:
        self._job = None
        if self._answered.done():
            return None
        if isinstance(result, Exception):
            self._fail(result)
            return None
        if self._codec.writes_much(self._asked):
            self._writing = asyncio.ensure_future(self._write_aside(lasting(result)))
            return LATER
        try:
            self._succeed(self._codec.encode(self._asked, result))
        except Exception as error:
            self._fail(error)
            return _status(error)
        return None

    async def _write_aside(self, result: Sequence[memoryview]) -> None:
        status: int | None = None
        try:
            self._succeed(await self._budget.aside(self._codec.encode, self._asked, result))
        except Exception as error:
            status = _status(error)
            self._fail(error)
        finally:
            self._cell.written(self._asked.request, status)

    def _succeed(self, answer: bytes) -> None:
        self._grant = None
        if not self._answered.done():
            self._answered.set_result(answer)
            _end(self._followed, 200)

    def _fail(self, error: Exception) -> None:
        self._grant = None
        if not self._answered.done():  # what failed may have been what follows the answer
            # Its frames would hold what the request spoke of (a region, a body) until cycles are sought.
            self._answered.set_exception(without_frames(error))
        _end(self._followed, _status(error))


def _keepalive(limits: Limits) -> list[tuple[str, int]]:
    """How pings and long connections are taken. Source: grpc/grpc, doc/keepalive.md; A9-server-side-conn-mgt.md."""
    options = [
        ("grpc.http2.min_ping_interval_without_data_ms", math.floor(1e3 * limits.ping_s)),
        ("grpc.keepalive_permit_without_calls", 1),  # else a client without calls may ping every two hours only
        *([] if limits.ping_s else [("grpc.http2.max_ping_strikes", 0)]),
    ]
    if limits.keepalive_s is not None:
        options += [
            ("grpc.keepalive_time_ms", math.ceil(1e3 * limits.keepalive_s)),
            ("grpc.keepalive_timeout_ms", math.ceil(1e3 * limits.keepalive_s)),
        ]
    if limits.grpc_age_s is not None:
        options.append(("grpc.max_connection_age_ms", math.ceil(1e3 * limits.grpc_age_s)))
        if limits.grpc_grace_s is not None:
            options.append(("grpc.max_connection_age_grace_ms", math.ceil(1e3 * limits.grpc_grace_s)))
    return options


def _credentials(certificates: Certificates) -> Any:
    """TLS with the certificate that is in use when a client comes; grpcio asks before each handshake."""
    given = certificates.identity

    def pair(identity: Identity) -> Any:
        chain, key = identity.pem
        return grpc.ssl_server_certificate_configuration([(key, chain)])

    def renewed() -> Any:
        nonlocal given
        if certificates.identity is given:
            return None
        given = certificates.identity
        return pair(given)

    return grpc.dynamic_ssl_server_credentials(pair(given), renewed)


class _TooLarge(WireError):
    """A message that is larger than it may be, once it is unpacked."""

    def __init__(self, most: int) -> None:
        super().__init__("the message is too large", f"the limit is {most} bytes unpacked", "split it", status=413)


def _stopping() -> WireError:
    return WireError("the server is stopping", "", "ask another", status=503)


def _status(error: Exception) -> int:
    return error.status if isinstance(error, WireError) else 500


def _end(followed: Followed | None, status: int) -> None:
    if followed is not None:
        followed.end(status)


async def _refuse(context: Context, error: Exception) -> NoReturn:
    code = _CODES.get(_status(error), grpc.StatusCode.INTERNAL)
    if isinstance(error, _TooLarge):
        code = grpc.StatusCode.RESOURCE_EXHAUSTED  # as grpcio has it for those that are not compressed
    without_frames(error)  # abort's own error keeps this one, whose frames would keep the message
    # Not `grpc-retry-pushback-ms`: with it, clients whose policy retries would do so at once and by themselves.
    metadata: tuple[tuple[str, str], ...] = ()
    if isinstance(error, TurnedAway):
        metadata = (("retry-after-ms", str(math.ceil(1e3 * error.retry_after_s))),)
    aborting = context.abort(code, _text(error), metadata)
    del context
    await aborting
    raise AssertionError("abort does not return")


def _text(error: Exception) -> str:
    text = str(error) if isinstance(error, RushhourError) else f"internal error: {type(error).__name__}"
    return text[:_MAX_DETAILS]


def _parsed(request: Any, sent: bytes) -> Any:
    if len(sent) > _MAX_CONTROL_BYTES:
        raise WireError("the message is too large", f"here the limit is {_MAX_CONTROL_BYTES} bytes", "send less")
    try:
        return request.FromString(sent)
    except DecodeError as error:
        what = f"the message is no {request.DESCRIPTOR.name}"
        raise WireError(what, str(error), "see the protocol's inference.proto") from error


def _health(status: int) -> bytes:
    return bytes(_HealthResponse(status=status).SerializeToString())
