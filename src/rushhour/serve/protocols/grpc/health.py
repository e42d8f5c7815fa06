"""The standard health service. Source: grpc/grpc, doc/health-checking.md."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from rushhour.errors import WireError
from rushhour.protocol import HEALTH, INFERENCE, message
from rushhour.serve.protocols.control import Control
from rushhour.serve.protocols.grpc.errors import Context, refuse
from rushhour.serve.protocols.grpc.messages import MAX_CONTROL_BYTES, parsed
from rushhour.serve.repository import Repository

_WATCH_SECONDS = 0.5
_SERVING, _NOT_SERVING, _SERVICE_UNKNOWN = 1, 2, 3
_HealthRequest = message("grpc.health.v1.HealthCheckRequest")
_HealthResponse = message("grpc.health.v1.HealthCheckResponse")


class Health:
    """Answers `Check` and `Watch`.

    Args:
        repository: counts errors.
        control: knows whether requests are accepted.
        read: reads the message of a call; it has so many bytes at most.
        ending: set when the server is about to stop.
    """

    def __init__(
        self,
        repository: Repository,
        control: Control,
        read: Callable[[Context, int], Awaitable[bytes]],
        ending: asyncio.Event,
    ) -> None:
        self._repository = repository
        self._control = control
        self._read_message = read
        self._ending = ending
        self._watchers = 0
        self._watching: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    def handlers(self) -> Any:
        """The service."""
        handlers = {
            "Check": grpc.stream_unary_rpc_method_handler(self._check),
            "Watch": grpc.stream_stream_rpc_method_handler(self._watch),
        }
        return grpc.method_handlers_generic_handler(HEALTH.full_name, handlers)

    async def _check(self, messages: object, context: Context) -> bytes:
        try:
            service = parsed(_HealthRequest, await self._read_message(context, MAX_CONTROL_BYTES)).service
            status = self._status(service)
            if status == _SERVICE_UNKNOWN:
                raise WireError(f"there is no service {service[:100]!r}", status=404)
        except WireError as error:
            self._repository.refuse(error.status, 0.0, infer=False)
            await refuse(context, error)
        return _health(status)

    async def _watch(self, messages: object, context: Context) -> AsyncIterator[bytes]:
        try:
            service = parsed(_HealthRequest, await self._read_message(context, MAX_CONTROL_BYTES)).service
        except WireError as error:
            self._repository.refuse(error.status, 0.0, infer=False)
            await refuse(context, error)
        sent = None
        self._watchers += 1
        if self._watching is None:
            self._watching = asyncio.ensure_future(self._notify())
        try:
            while not self._ending.is_set():
                changed = self._changed
                status = self._status(service)
                if status != sent:
                    yield _health(status)
                sent = status
                await changed.wait()
        finally:
            self._watchers -= 1
        yield _health(_NOT_SERVING)

    async def _notify(self) -> None:
        """Wake all watchers when the status has changed: one task, because one client may watch thousands of times."""
        before = self._control.ready()
        while self._watchers and not self._ending.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_WATCH_SECONDS):
                    await self._ending.wait()
            now = self._control.ready()
            if now != before or self._ending.is_set():
                changed, self._changed = self._changed, asyncio.Event()
                changed.set()
            before = now
        self._watching = None

    def _status(self, service: str) -> int:
        if service not in ("", INFERENCE.full_name):
            return _SERVICE_UNKNOWN
        return _SERVING if self._control.ready() else _NOT_SERVING


def _health(status: int) -> bytes:
    return bytes(_HealthResponse(status=status).SerializeToString())
