"""The Open Inference Protocol over gRPC, as a client: a model found, requests encoded, calls made and timed.

Imported only where it is used. grpcio's own core does the work of HTTP/2, at several times the CPU of an HTTP/1.1
request here: a few thousand requests per second on a core, beyond which the verdict is `generator_limited`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc import aio
from numpy.typing import NDArray

from rushhour.errors import LoadError, WireError
from rushhour.load.declared import Interface
from rushhour.load.generator.alarm import Alarm
from rushhour.load.generator.carrier import Book
from rushhour.load.generator.job import Job
from rushhour.load.target import Endpoint, Target
from rushhour.protocol import CONTENTS, message
from rushhour.wire import Content, array_of_bytes, array_of_values

_SERVICE = "/inference.GRPCInferenceService/"
_CHANNELS = 8
"""Connections that the crowd shares, as gRPC's many calls on one do; several, so that several cells get some."""
_OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1))
_HTTP_STATUS = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.UNIMPLEMENTED: 404,
}
_LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


def discover_grpc(at: Endpoint, model: str | None, timeout_s: float) -> Target:
    """As `discover`, over gRPC."""
    with grpc.insecure_channel(at.authority, options=_OPTIONS) as channel:
        try:
            ready, unlisted = _ready_models(channel, at, timeout_s)
        except LoadError:
            if model is None:
                raise
            ready, unlisted = [], ""
        if model is None and len(ready) != 1:
            raise LoadError(
                f"cannot tell which model to ask at {at.url}",
                unlisted or f"the server has {', '.join(ready[:10]) or 'no model that is ready'}",
                "name it with --model",
            )
        name = model if model is not None else ready[0]
        try:
            found = _ask(channel, at, "ModelMetadata", timeout_s, name=name)
        except LoadError as error:
            if name in ready or not ready:
                raise
            raise LoadError(
                f"there is no model {name!r} at {at.url}",
                f"the server has {', '.join(ready)}",
                "name one of these with --model",
            ) from error
    interface = Interface.declared(
        [(each.name, each.datatype, each.shape) for each in found.inputs], [each.name for each in found.outputs]
    )
    return Target(at.url, at.host, at.port, at.prefix, name, interface)


def _ready_models(channel: Any, at: Endpoint, timeout_s: float) -> tuple[list[str], str]:
    """Names of the models that are ready; and why there are none, where the server does not list them.

    Raises:
        LoadError: if it does not answer at all.
    """
    try:
        index = _ask(channel, at, "RepositoryIndex", timeout_s)
    except _NotAnswered as error:  # RepositoryIndex is an extension of the protocol
        return [], f"the server does not list its models: {error.why}"
    return sorted({entry.name for entry in index.models if entry.state in ("", "READY")}), ""


class _NotAnswered(LoadError):
    """A server that is there and answers a call with an error."""


def _ask(channel: Any, at: Endpoint, method: str, timeout_s: float, **fields: str) -> Any:
    response = message(f"inference.{method}Response")
    call = channel.unary_unary(
        _SERVICE + method,
        request_serializer=lambda asked: asked.SerializeToString(),
        response_deserializer=response.FromString,
    )
    try:
        return call(message(f"inference.{method}Request")(**fields), timeout=timeout_s, wait_for_ready=False)
    except grpc.RpcError as error:
        code, said = error.code(), str(error.details() or "")[:200]
        why = f"{code.name} ({said})"
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            raise LoadError(
                f"cannot reach {at.url}", why, "check the URL, and that a gRPC server is running there"
            ) from error
        raise _NotAnswered(f"{at.url} does not answer {method}", why, "check the model's name") from error


def encode_grpc_request(target: Target, contents: Sequence[Content]) -> bytes:
    """A `ModelInferRequest` with raw tensors."""
    request = message("inference.ModelInferRequest")(model_name=target.model)
    for content in contents:
        request.inputs.add(name=content.name, datatype=content.datatype, shape=content.array.shape)
        request.raw_input_contents.append(content.raw)
    encoded: bytes = request.SerializeToString()
    return encoded


def decode_grpc_answer(body: bytes, _: int | None = None) -> dict[str, NDArray[Any]]:
    """Output name -> array of a `ModelInferResponse`, whose tensors are raw (Triton) or typed contents (MLServer).

    Raises:
        WireError: if it is none.
    """
    try:
        answer = message("inference.ModelInferResponse").FromString(body)
        if not answer.raw_output_contents:
            return {each.name: _typed(each) for each in answer.outputs}
        return {
            each.name: array_of_bytes(each.datatype, raw, tuple(each.shape))
            for each, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
        }
    except (DecodeError, ValueError, TypeError, OverflowError) as error:
        raise WireError(
            "the server's answer is not Open Inference Protocol",
            f"{type(error).__name__}: {error}",
            "check the URL and the server",
        ) from error


def _typed(output: Any) -> NDArray[Any]:
    field = CONTENTS.get(output.datatype)
    if field is None:
        raise ValueError(f"the output {output.name!r} has the datatype {output.datatype!r} and no raw bytes")
    return array_of_values(output.datatype, list(getattr(output.contents, field)), tuple(output.shape))


class GrpcCarrier:
    """Carries requests as calls over a few shared connections. A request counts as sent when grpcio has taken it.

    Must be made on the running loop, which reads the answers while this rests.

    Args:
        job: what to send, and where.
        book: is told what happens.
    """

    def __init__(self, job: Job, book: Book) -> None:
        self._job = job
        self._book = book
        self._calls: dict[int, asyncio.Task[None]] = {}
        self._channels: list[Any] = []
        self._methods: list[Callable[[bytes], Any]] = []
        self._loop = asyncio.get_running_loop()
        self._alarm = Alarm(self._loop, self._wake)
        self._rested: asyncio.Future[None] = self._loop.create_future()
        self._prompt = False

    @property
    def most_connections(self) -> int:
        """See `Carrier`."""
        return len(self._channels)

    async def open(self, wanted: int) -> None:
        """See `Carrier`."""
        host = f"[{self._job.host}]" if ":" in self._job.host else self._job.host
        for _ in range(min(max(wanted, 1), _CHANNELS)):
            channel = aio.insecure_channel(f"{host}:{self._job.port}", options=_OPTIONS)
            self._channels.append(channel)
            self._methods.append(channel.unary_unary(_SERVICE + "ModelInfer"))
        try:
            async with asyncio.timeout(self._job.timeout_s):
                for channel in self._channels:
                    while (state := channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
                        if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                            raise OSError("nobody speaks gRPC there")
                        await channel.wait_for_state_change(state)
        except (OSError, TimeoutError) as error:
            raise LoadError(
                f"cannot connect to {self._job.host}:{self._job.port}",
                str(error) or f"no answer within {self._job.timeout_s:g} s",
                "check the URL, and that the server is running",
            ) from error

    def carry(self, index: int) -> None:
        """See `Carrier`."""
        call = self._loop.create_task(self._call(index))
        self._calls[index] = call
        call.add_done_callback(lambda _: self._calls.pop(index, None))

    def rest(self, until: float, *, prompt: bool) -> Awaitable[None]:
        """See `Carrier`."""
        self._rested = self._loop.create_future()
        self._prompt = prompt
        self._alarm.set(until)
        return self._rested

    def _wake(self) -> None:
        self._alarm.silence()
        if not self._rested.done():
            self._rested.set_result(None)

    def sweep(self, is_over: Callable[[int], bool], kind: str, why: str) -> None:
        """See `Carrier`."""
        for index in [index for index in self._calls if is_over(index)]:
            self._calls.pop(index).cancel()
            self._book.lost(index, kind, why)

    async def close(self) -> None:
        """See `Carrier`."""
        self._alarm.close()
        for call in self._calls.values():
            call.cancel()
        await asyncio.gather(*self._calls.values(), return_exceptions=True)
        for channel in self._channels:
            await channel.close()

    async def _call(self, index: int) -> None:
        requests = self._job.requests
        call = self._methods[index % len(self._methods)](requests[index % len(requests)])
        self._book.sent(index)
        try:
            body = await call
            at = time.monotonic()
        except aio.AioRpcError as error:
            code, said = error.code(), str(error.details() or "")[:200]
            if code in _LOST:
                self._book.lost(index, code.name, f"{code.name} ({said})")
            else:
                self._book.turned_down(index, _HTTP_STATUS.get(code, 500), said.encode(), time.monotonic())
        else:
            if fault := self._book.fault_of(body, None):
                what = "the server answered with something that is not an answer"
                self._book.garbled(index, what, fault, at)
            else:
                self._book.answered(index, body, None, at)
        if self._prompt:
            self._wake()
