"""The server: opens what a plan names, answers, and drains when it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import resource
import signal
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
import uvloop

from rushhour.errors import ServeError
from rushhour.serve.cell import Cell
from rushhour.serve.control import Control
from rushhour.serve.guard import Keys, check_exposure, tls
from rushhour.serve.http import HttpConnection
from rushhour.serve.repository import Opener, Repository, opener
from rushhour.serve.routes import Answer, Routes
from rushhour.serve.settings import ServeSettings
from rushhour.serve.shared_memory import SharedMemory
from rushhour.serve.supervisor import Supervisor, join, pins, reserve
from rushhour.serve.target import Target
from rushhour.serve.tether import Tether

if TYPE_CHECKING:
    from rushhour.serve.grpc import GrpcFace

_DRAIN_SECONDS = 30.0
_LINGER_SECONDS = 0.25
_OTHER_FILES = 256
_COLLECT_AFTER = (50_000, 20, 20)
"""Requests are freed by their reference counts; what waits in a queue must not be walked every 700 objects."""

Ready = Callable[[str, str | None], None]
"""Called once when requests are welcome: with the URL, and with the address for gRPC where that is served."""


def serve(
    target: Target,
    settings: ServeSettings,
    ready: Ready,
    *,
    open_with: Opener | None = None,
    tether: Tether | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; then take no new connections, answer what is under way, and return.

    Args:
        target: what to serve.
        settings: where.
        ready: called once when requests are welcome.
        open_with: opens engines; the plan's own by default. Of no use with several cells, which are other processes.
        tether: this server's line to whoever started it.

    Raises:
        ServeError: if the port cannot be had.
        EngineError: if the plan's engine cannot do what the plan says.
    """
    check_exposure(settings.host, settings.api_keys, exposed=settings.exposed)
    _allow_files(settings.limits.connections + _OTHER_FILES)
    context = tls(*(Path(file) if file else None for file in (settings.tls_certificate, settings.tls_key)))
    cells = settings.cells or target.plan.policy.cells
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if cells > 1 and not settings.one_of_many:
            runner.run(_supervise(target, settings, cells, ready))
        else:
            opening = open_with or opener(settings.trusted)
            runner.run(_serve(target, settings, opening, context, ready, tether))


def _allow_files(wanted: int) -> None:
    """Raise the limit on open files as far as the connections need and the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


async def _supervise(target: Target, settings: ServeSettings, cells: int, ready: Ready) -> None:
    with _explained(settings), reserve(settings.host, settings.http_port) as held, _grpc_port(settings) as grpc_port:
        shared = msgspec.structs.replace(
            settings, http_port=held.getsockname()[1], grpc_port=grpc_port, cells=None, one_of_many=True
        )
        grpc = None if grpc_port is None else _address(settings.host, grpc_port)
        supervisor = Supervisor(target.path, shared, pins(cells, sorted(os.sched_getaffinity(0))))
        await supervisor.run(lambda url: ready(url, grpc))


async def _serve(
    target: Target,
    settings: ServeSettings,
    open_with: Opener,
    context: ssl.SSLContext | None,
    ready: Ready,
    tether: Tether | None,
) -> None:
    # The ports are taken before the model is loaded, so that one in use is said at once; they listen only when ready.
    with _bound(settings) as listener, _grpc_port(settings) as grpc_port:
        regions = None
        if settings.shared_memory and not settings.one_of_many:  # cells share no registrations
            regions = SharedMemory(settings.limits.body_bytes)
        repository = Repository(target, settings.model, open_with, settings.version, regions, settings.limits)
        if tether is not None:
            tether.attach(repository.apply)
            repository.spread = tether.ask if settings.one_of_many else None
        try:
            await repository.load()
            await _Server(repository, settings, regions).run(listener, context, grpc_port, ready)
        finally:
            await repository.unload()


def _bound(settings: ServeSettings) -> socket.socket:
    with _explained(settings):
        if settings.one_of_many:
            return join(settings.host, settings.http_port)
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.http_port, type=socket.SOCK_STREAM
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
        return listener


@contextlib.contextmanager
def _grpc_port(settings: ServeSettings) -> Iterator[int | None]:
    """The port for gRPC, held until the end: grpcio binds it by itself, and only when all is ready."""
    if settings.grpc_port is None or settings.one_of_many:
        yield settings.grpc_port
        return
    with _explained(settings, "grpc"):
        held = reserve(settings.host, settings.grpc_port)
    with held:
        yield held.getsockname()[1]


def _address(host: str, port: int) -> str:
    return f"{f'[{host}]' if ':' in host else host}:{port}"


@contextlib.contextmanager
def _explained(settings: ServeSettings, face: Literal["http", "grpc"] = "http") -> Iterator[None]:
    """Turn what the system says of an address into what the user can do about it."""
    try:
        yield
    except OSError as error:
        why = {
            errno.EADDRINUSE: "another program listens there",
            errno.EACCES: "ports below 1024 need privileges",
            errno.EADDRNOTAVAIL: "that address is not one of this machine",
        }.get(error.errno or 0, str(error))
        raise ServeError(
            f"cannot listen on {settings.host}:{settings.http_port if face == 'http' else settings.grpc_port}",
            why,
            f"choose another with --{face}-port (0 takes a free one) or --host",
        ) from error


class _Server:
    """The desk of all connections: which cell, which control answer, and whether the end has begun."""

    def __init__(self, repository: Repository, settings: ServeSettings, regions: SharedMemory | None) -> None:
        self.connections: set[HttpConnection] = set()
        self.draining = False
        self.limits = settings.limits
        self.keys = Keys(settings.api_keys)
        self._settings = settings
        self._repository = repository
        self._control = Control(repository, lambda: self.draining, admin=settings.admin, regions=regions)
        self._routes = Routes(self._control)

    async def run(
        self, listener: socket.socket, context: ssl.SSLContext | None, grpc_port: int | None, ready: Ready
    ) -> None:
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        grpc = None if grpc_port is None else await self._open_grpc(listener.getsockname()[0], grpc_port)
        with _explained(self._settings):
            server = await loop.create_server(lambda: HttpConnection(self), sock=listener, ssl=context, backlog=4096)
        # What is loaded now lives as long as the server: the collector need not walk it during requests.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_COLLECT_AFTER)
        host, port = listener.getsockname()[:2]
        ready(f"http{'s' if context else ''}://{_address(host, port)}", grpc.address if grpc else None)
        sweeping = asyncio.ensure_future(self._sweep())
        await stop.wait()
        sweeping.cancel()
        self.draining = True
        with listener.dup() as last:
            server.close()
            await self._take_last(last, context)
        await asyncio.gather(self._drain(), *([grpc.drain(_LINGER_SECONDS, _DRAIN_SECONDS)] if grpc else []))

    async def _take_last(self, listener: socket.socket, context: ssl.SSLContext | None) -> None:
        """Accept who has connected already: a listener that closes resets them, request and all."""
        loop = asyncio.get_running_loop()
        until = loop.time() + _LINGER_SECONDS
        listener.setblocking(False)
        with contextlib.suppress(OSError):  # nobody is left, or nothing can be opened
            while loop.time() < until:
                await asyncio.sleep(0)
                accepted, _ = listener.accept()
                with contextlib.suppress(OSError):  # gone again
                    await loop.connect_accepted_socket(lambda: HttpConnection(self), accepted, ssl=context)

    async def _open_grpc(self, host: str, port: int) -> GrpcFace:
        from rushhour.serve.grpc import GrpcFace  # grpcio is large: only who wants it pays for it

        face = GrpcFace(self._repository, self._control, self.limits, self.keys)
        await face.start(_address(host, port), self._settings.tls_certificate, self._settings.tls_key)
        return face

    async def _sweep(self) -> None:
        """Look after slow and silent clients once a second: cheaper than a timer for each request."""
        while True:
            await asyncio.sleep(1.0)
            now = asyncio.get_running_loop().time()
            for connection in list(self.connections):
                connection.expire(now)

    async def _drain(self) -> None:
        # Idle connections live a moment longer: a request that is on its way to one is still answered.
        deadline = asyncio.get_running_loop().time() + _DRAIN_SECONDS
        await asyncio.sleep(_LINGER_SECONDS)
        while self.connections and asyncio.get_running_loop().time() < deadline:
            for connection in list(self.connections):
                connection.close_if_idle()
            await asyncio.sleep(0.02)

    def cell_of(self, path: bytes) -> Cell | None:
        """The cell that answers at this path."""
        return self._repository.cell_of(path)

    def control(self, method: bytes, path: bytes, body: bytes) -> Answer | Awaitable[Answer]:
        """The answer to anything that is not inference."""
        return self._routes.answer(method, path, body)
