"""`GrpcServer`: the Open Inference Protocol over gRPC, by grpcio's asyncio server on the event loop of HTTP.

Imported only where gRPC is switched on. Sources: kserve/open-inference-protocol,
specification/protocol/inference_grpc.md; grpc/grpc, doc/keepalive.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, cast

import grpc
from grpc import aio

from rushhour.errors import ServeError, WireError
from rushhour.protocol import INFERENCE
from rushhour.serve.access.certificates import Certificates, Identity
from rushhour.serve.access.keys import Keys
from rushhour.serve.limits import Limits
from rushhour.serve.memory.decompression import inflate
from rushhour.serve.observability.explanation import FIELD
from rushhour.serve.observability.requests import FollowedRequest, Observer
from rushhour.serve.protocols.control import Control
from rushhour.serve.protocols.grpc.call import InferCall
from rushhour.serve.protocols.grpc.codec import GrpcCodec, GrpcRequest, identity_of, model_of, stream_error
from rushhour.serve.protocols.grpc.control import ControlMethods
from rushhour.serve.protocols.grpc.errors import Context, TooLarge, end, error_text, refuse, status_of, stopping
from rushhour.serve.protocols.grpc.health import Health
from rushhour.serve.repository import Repository
from rushhour.serve.scheduling.followed import followed_cell
from rushhour.serve.scheduling.job import ShedError
from rushhour.serve.scheduling.stage import Stage
from rushhour.serve.service import Loaded, Service
from rushhour.wire import PlacedRequest
from rushhour.wire.pieces import WHOLE_BYTES

_OPEN_METHODS = frozenset(("ServerLive", "ServerReady"))
"""Health checks, as are all methods of the health service; they need no API key."""
_INFERENCE_METHODS = frozenset(("ModelInfer", "ModelStreamInfer"))
_REFUSE_SECONDS = 0.1
"""At the end, new calls get UNAVAILABLE for so long; grpcio itself would only cancel them."""
_STREAM_WINDOW = 256
"""Requests of one stream in flight at the same time; further ones are read when the client reads answers."""
_GZIP, _ZLIB = b"\x1f\x8b", (b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda")
_LARGE_BYTES = 2**20
"""After a message of this size free memory is returned to the system."""


class GrpcServer:
    """A gRPC server. Must be created on the running event loop.

    Args:
        repository: the models, which answer inference requests.
        control: answers all other requests.
        limits: what one client may use.
        keys: that clients must send; empty accepts every request.
        observer: follows single requests, if any are followed.

    Attributes:
        address: that it listens on.
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
        self._keys = keys
        self._limit = limits.body_bytes
        self._codecs: dict[str, GrpcCodec] = {}
        self._ending = asyncio.Event()
        self._stopping = False
        self._active = 0
        self._readers: set[asyncio.Task[None]] = set()
        self._methods = ControlMethods(repository, control, self._read_message, self._follow)
        health = Health(repository, control, self._read_message, self._ending)
        self._server = aio.server(
            handlers=[_KeyCheck(self._inference(), self._without_key), health.handlers()],
            maximum_concurrent_rpcs=limits.connections,
            options=[
                ("grpc.max_receive_message_length", min(limits.body_bytes, limits.grpc_bytes)),
                ("grpc.per_message_decompression", 0),  # done here, on a thread
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
        """Listen from now on.

        Args:
            address: `host:port`. The port may be shared: the caller checks that no other program uses it.
            certificates: for TLS; None serves without.
            more: further addresses.

        Raises:
            ServeError: if one of them cannot be bound.
        """
        self.address = self._methods.address = address
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
        """Inference calls and streams in flight."""
        return self._active

    async def drain(self, linger_s: float, within_s: float) -> None:
        """Report NOT_SERVING, then refuse new calls, finish those in flight, and stop.

        Args:
            linger_s: how long new requests are still answered.
            within_s: how long those in flight may take.
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

    async def _infer(self, messages: object, context: Context) -> bytes:
        self._active += 1
        followed = self._follow("ModelInfer", context)
        try:
            with self._counting() as named:
                sent = await self._read_message(context, self._limit)
                submitting = self._submit(sent, named, context.time_remaining(), followed)
                del sent
                call = await submitting
            answer = await call.answer()
            if call.times:
                context.set_trailing_metadata(((FIELD, call.times),))
            return answer
        except Exception as error:
            end(followed, status_of(error))
            refusing = refuse(context, error)
            del context  # it refers to the error, whose frames refer to it
            await refusing
        finally:
            self._active -= 1

    async def _stream(self, messages: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        """Answers in the order of their requests, which are computed together. An error does not end the stream."""
        begun: asyncio.Queue[InferCall | bytes | None] = asyncio.Queue()
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
                if isinstance(call, InferCall):
                    call.cancel()
        if self._stopping:
            await refuse(context, stopping())

    async def _read(
        self,
        messages: AsyncIterator[bytes],
        begun: asyncio.Queue[InferCall | bytes | None],
        room: asyncio.Semaphore,
        context: Context,
    ) -> None:
        try:
            async for sent in messages:
                await room.acquire()
                followed = self._follow("ModelStreamInfer", context)
                try:
                    with self._counting() as named:
                        sent = await self._decompressed(sent, self._limit)
                        begun.put_nowait(await self._submit(sent, named, None, followed))
                except Exception as error:
                    end(followed, status_of(error))
                    begun.put_nowait(stream_error(error_text(error), identity_of(sent)))
                del sent  # free it before the next one arrives
        finally:
            begun.put_nowait(None)

    def _follow(self, method: str, context: Context) -> FollowedRequest | None:
        if self._observer is None:
            return None
        fields = {name: value for name, value in context.invocation_metadata() or () if isinstance(value, str)}
        return self._observer.begin("grpc", method, "", fields)

    @contextlib.contextmanager
    def _counting(self) -> Iterator[list[str]]:
        """Count errors in an inference request before it reaches its cell; the name of its model goes into the list."""
        arrived = asyncio.get_running_loop().time()
        named: list[str] = []
        try:
            yield named
        except ShedError:
            raise  # the cell has counted it
        except Exception as error:
            took_s = asyncio.get_running_loop().time() - arrived
            self._repository.refuse(status_of(error), took_s, infer=True, model=named[0] if named else "")
            raise

    async def _submit(
        self, sent: bytes, named: list[str], within_s: float | None, followed: FollowedRequest | None
    ) -> InferCall:
        """Decode a request and submit it to its cell.

        Args:
            named: gets the name of its model.
        """
        budget, began = self._repository.budget, asyncio.get_running_loop().time()
        grant = budget.grant(len(sent)) if len(sent) > WHOLE_BYTES else None
        while True:
            service, loaded, codec = self._loaded(sent)
            named[:] = [service.name]
            cell = loaded.cell if followed is None else followed_cell(loaded.cell, followed)
            if grant is None or not codec.is_large(sent):
                request = codec.decode(sent)
            else:
                request = await budget.on_thread(codec.decode, sent)
            if request.request.unread_bytes:
                await self._fetch(cell, request)
            if loaded is service.loaded:
                break  # else a reload has replaced it: decode again
        if followed is not None:
            followed.id = request.id.decode() or followed.id
        if within_s is not None:
            within_s -= asyncio.get_running_loop().time() - began
        return InferCall(cell, codec, request, within_s, followed, budget, grant, self._repository.explanation)

    async def _fetch(self, cell: Stage, request: GrpcRequest) -> None:
        """Read tensors from shared memory, if the request is admitted."""
        placed = cast(PlacedRequest, request.request)
        shed = cell.shed_early(placed)
        if shed is not None:
            raise ShedError(shed.why, shed.retry_after_s)
        request.request = await self._repository.budget.on_thread(placed.fetch) if placed.large else placed.fetch()

    def _loaded(self, sent: bytes) -> tuple[Service, Loaded, GrpcCodec]:
        """What answers a request.

        Raises:
            WireError: if it names no model that is loaded.
        """
        if self._stopping:
            raise stopping()
        service = self._repository.only or self._repository.named(model_of(sent))
        loaded = service.loaded
        if loaded is None:
            raise WireError(f"the model {service.name} is not loaded", "", "load it first", status=404)
        codec = self._codecs.get(service.name)
        if codec is None or codec.codec is not loaded.cell.codec:
            codec = self._codecs[service.name] = GrpcCodec(loaded.cell.codec)
        return service, loaded, codec

    async def _read_message(self, context: Context, limit: int) -> bytes:
        """The one message of a call; decompressed it has `limit` bytes at most."""
        sent = await context.read()
        if sent is aio.EOF:
            raise WireError("the call ended without a message", "this method takes one", "send it", status=501)
        return await self._decompressed(sent, limit)

    async def _decompressed(self, sent: bytes, limit: int) -> bytes:
        """A message before compression.

        grpcio would decompress it in one go, and does not report whether it is compressed. An uncompressed message
        never begins with gzip's first byte, and with zlib's only if it begins with a field that the protocol does not
        have.
        """
        budget = self._repository.budget
        if len(sent) > _LARGE_BYTES:
            budget.trim_soon()
        is_gzip = sent.startswith(_GZIP)
        if not (is_gzip or sent.startswith(_ZLIB)):
            return sent
        try:
            message = await budget.decompress(inflate, sent, b"gzip" if is_gzip else b"deflate", limit)
        except WireError as error:
            if error.status == 413:
                raise TooLarge(limit) from None
            if is_gzip:
                raise
            return sent
        if len(message) > _LARGE_BYTES:
            budget.trim_soon()
        return bytes(message) if len(message) <= WHOLE_BYTES else cast(bytes, message)

    def _without_key(self, details: Any) -> Any | None:
        """The handler for a call without a valid API key, by its metadata alone: its message is never read."""
        name = details.method.rpartition("/")[2]
        if not self._keys or name in _OPEN_METHODS:
            return None
        sent = dict(details.invocation_metadata or ()).get("authorization")
        if self._keys.admit(sent.encode() if isinstance(sent, str) else sent):
            return None

        async def deny(messages: AsyncIterator[bytes], context: Context) -> None:
            followed = self._follow(name, context)
            self._repository.refuse(401, 0.0, infer=name in _INFERENCE_METHODS)
            end(followed, 401)
            why = "this server needs an API key"
            await refuse(context, WireError(why, "", "send the metadata 'authorization: Bearer KEY'", status=401))

        return grpc.stream_stream_rpc_method_handler(deny)

    def _inference(self) -> Any:
        """The inference service."""
        handlers = {
            # As a stream: grpcio itself never ends a unary call whose client sends no message.
            "ModelInfer": grpc.stream_unary_rpc_method_handler(self._infer),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(self._stream),
        }
        handlers |= self._methods.handlers(method for method in INFERENCE.methods if method.name not in handlers)
        return grpc.method_handlers_generic_handler(INFERENCE.full_name, handlers)


class _KeyCheck(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Handlers behind a check of the API key.

    Args:
        handlers: of the service.
        refusal: returns the handler that answers instead, if the key is not valid.
    """

    def __init__(self, handlers: Any, refusal: Callable[[Any], Any | None]) -> None:
        self._handlers = handlers
        self._refusal = refusal

    def service(self, handler_call_details: Any) -> Any | None:
        """The handler of a call; None if it is not a method of this service."""
        found = self._handlers.service(handler_call_details)
        return found and (self._refusal(handler_call_details) or found)


def _keepalive(limits: Limits) -> list[tuple[str, int]]:
    """Options for pings and long connections. Source: grpc/grpc, doc/keepalive.md; A9-server-side-conn-mgt.md."""
    options = [
        ("grpc.http2.min_ping_interval_without_data_ms", math.floor(1e3 * limits.ping_s)),
        ("grpc.keepalive_permit_without_calls", 1),  # else a client without calls may ping only every two hours
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
    """TLS with the certificate that is in use at the handshake; grpcio calls `renewed` before each."""
    used = certificates.identity

    def pair(identity: Identity) -> Any:
        chain, key = identity.pem
        return grpc.ssl_server_certificate_configuration([(key, chain)])

    def renewed() -> Any:
        nonlocal used
        if certificates.identity is used:
            return None
        used = certificates.identity
        return pair(used)

    return grpc.dynamic_ssl_server_credentials(pair(used), renewed)
