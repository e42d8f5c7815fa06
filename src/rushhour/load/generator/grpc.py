"""The gRPC transport: each request is a call on one of a few shared connections.

Imported only where it is used. grpcio's own core does the work of HTTP/2, at several times the CPU of an HTTP/1.1
request here: a few thousand requests per second on a core, beyond which the verdict is `generator_limited`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from grpc import aio

from rushhour.errors import LoadError
from rushhour.load.generator.job import Job
from rushhour.load.generator.timer import Timer
from rushhour.load.generator.transport import Recorder

SERVICE = "/inference.GRPCInferenceService/"
"""In front of the name of a method."""
CHANNEL_OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1))
"""Of every channel: a connection of its own, and answers of any size."""
_CHANNELS = 8
"""Connections that all requests share: a gRPC connection holds many calls. Several, so that several cells get some."""
_HTTP_STATUS = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.UNIMPLEMENTED: 404,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
}
_LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


class GrpcTransport:
    """Sends requests as calls over a few shared connections. A request counts as sent when grpcio has accepted it.

    Create it on the running event loop, which reads the answers while this waits.

    Args:
        job: what to send, and where.
        recorder: records the results.
    """

    def __init__(self, job: Job, recorder: Recorder) -> None:
        self._job = job
        self._recorder = recorder
        self._calls: dict[int, asyncio.Task[None]] = {}
        self._channels: list[Any] = []
        self._methods: list[Callable[[bytes], Any]] = []
        self._loop = asyncio.get_running_loop()
        self._timer = Timer(self._loop, self._wake)
        self._waited: asyncio.Future[None] = self._loop.create_future()
        self._prompt = False

    @property
    def peak_connections(self) -> int:
        """See `Transport`."""
        return len(self._channels)

    async def open(self, wanted: int) -> None:
        """See `Transport`."""
        host = f"[{self._job.host}]" if ":" in self._job.host else self._job.host
        for _ in range(min(max(wanted, 1), _CHANNELS)):
            channel = aio.insecure_channel(f"{host}:{self._job.port}", options=CHANNEL_OPTIONS)
            self._channels.append(channel)
            self._methods.append(channel.unary_unary(SERVICE + "ModelInfer"))
        try:
            async with asyncio.timeout(self._job.timeout_s):
                for channel in self._channels:
                    while (state := channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
                        if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                            raise OSError("no gRPC server answers there")
                        await channel.wait_for_state_change(state)
        except (OSError, TimeoutError) as error:
            raise LoadError(
                f"cannot connect to {self._job.host}:{self._job.port}",
                str(error) or f"no answer within {self._job.timeout_s:g} s",
                "check the URL, and that the server is running",
            ) from error

    def send(self, index: int) -> None:
        """See `Transport`."""
        call = self._loop.create_task(self._call(index))
        self._calls[index] = call
        call.add_done_callback(lambda _: self._calls.pop(index, None))

    def wait(self, until: float, *, prompt: bool) -> Awaitable[None]:
        """See `Transport`."""
        self._waited = self._loop.create_future()
        self._prompt = prompt
        self._timer.set(until)
        return self._waited

    def _wake(self) -> None:
        self._timer.disarm()
        if not self._waited.done():
            self._waited.set_result(None)

    def expire(self, is_expired: Callable[[int], bool], kind: str, why: str) -> None:
        """See `Transport`."""
        for index in [index for index in self._calls if is_expired(index)]:
            self._calls.pop(index).cancel()
            self._recorder.lost(index, kind, why)

    async def close(self) -> None:
        """See `Transport`."""
        self._timer.close()
        for call in self._calls.values():
            call.cancel()
        await asyncio.gather(*self._calls.values(), return_exceptions=True)
        for channel in self._channels:
            await channel.close()

    async def _call(self, index: int) -> None:
        requests = self._job.requests
        call = self._methods[index % len(self._methods)](requests[index % len(requests)])
        self._recorder.sent(index)
        try:
            body = await call
            at = time.monotonic()
        except aio.AioRpcError as error:
            code, details = error.code(), str(error.details() or "")[:200]
            if code in _LOST:
                self._recorder.lost(index, code.name, f"{code.name} ({details})")
            else:
                self._recorder.error_status(index, _HTTP_STATUS.get(code, 500), details.encode(), time.monotonic())
        else:
            if fault := self._recorder.fault_of(body, None):
                what = "the server answered, but the message is not an answer"
                self._recorder.malformed(index, what, fault, at)
            else:
                self._recorder.answered(index, body, None, at)
        if self._prompt:
            self._wake()
