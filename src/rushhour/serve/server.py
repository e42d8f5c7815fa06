"""The server: opens what a plan names, answers, and drains when it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import resource
import signal
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import uvloop

from rushhour.clock import WallClock
from rushhour.errors import ServeError
from rushhour.machine import cores, describe
from rushhour.serve import log, memory
from rushhour.serve.cell import Cell
from rushhour.serve.control import Control
from rushhour.serve.door import let_nobody_in
from rushhour.serve.duties import Duties
from rushhour.serve.guard import Budget, Keys, check_exposure, tls
from rushhour.serve.http import HttpConnection
from rushhour.serve.observe import ObservedConnection, Observer
from rushhour.serve.orders import Do
from rushhour.serve.repository import Opener, Repository, opener
from rushhour.serve.routes import Answer, Routes
from rushhour.serve.settings import ServeSettings
from rushhour.serve.shared_memory import SharedMemory
from rushhour.serve.statistics import State
from rushhour.serve.supervisor import Supervisor, join, pins, reserve
from rushhour.serve.target import Target
from rushhour.serve.tether import Tether

if TYPE_CHECKING:
    from rushhour.serve.grpc import GrpcFace

_ADMIN_HOST = "127.0.0.1"
_DRAIN_SECONDS = 30.0
_LINGER_SECONDS = 0.25
_HANDSHAKE_SECONDS = 0.05
_OTHER_FILES = 256
_COLLECT_AFTER = (50_000, 20, 20)
"""Requests are freed by their reference counts; what waits in a queue must not be walked every 700 objects."""

Ready = Callable[[str, str | None, str], None]
"""Called once when requests are welcome: with the URL, the address for gRPC where that is served, and what serves."""


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
    settings.check()
    check_exposure(settings.host, settings.api_keys, exposed=settings.exposed)
    _allow_files(settings.limits.connections + _OTHER_FILES)
    memory.settle()
    if settings.admin_port is not None:
        check_exposure(settings.admin_host or _ADMIN_HOST, settings.api_keys, exposed=settings.exposed)
    context = tls(*(Path(file) if file else None for file in (settings.tls_certificate, settings.tls_key)))
    planned = target.plan.policy.cells
    cells = settings.cells or (planned if settings.exact else min(planned, cores()))
    form = settings.log_format or log.usual_format()
    settings = msgspec.structs.replace(settings, log_format=form)
    with log.to_stderr(form, settings.log_level), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if not settings.exact and not settings.one_of_many:
            _say_differences(target)
        if cells > 1 and not settings.one_of_many:
            runner.run(_supervise(target, settings, cells, ready))
        else:
            opening = open_with or opener(settings.trusted)
            runner.run(_serve(target, settings, opening, context, ready, tether))


def _say_differences(target: Target) -> None:
    """What the plan was measured with and is not so here."""
    for difference in target.differences(describe(), cores()):
        log.event(logging.WARNING, "this is not the machine that the plan was made on", difference=difference)


def _allow_files(wanted: int) -> None:
    """Raise the limit on open files as far as the connections need and the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


async def _supervise(target: Target, settings: ServeSettings, cells: int, ready: Ready) -> None:
    with contextlib.ExitStack() as held:
        ports = {
            name: None if port is None else held.enter_context(_reserved(name, host, port)).getsockname()[1]
            for name, (host, port) in _places(settings).items()
        }
        shared = msgspec.structs.replace(settings, **ports, cells=None, one_of_many=True)
        grpc = None if shared.grpc_port is None else _address(settings.host, shared.grpc_port)
        log.event(logging.INFO, "start", target=str(target.path), cells=cells)
        supervisor = Supervisor(target.path, shared, pins(cells, sorted(os.sched_getaffinity(0))))

        def all_ready(url: str, way: str) -> None:
            log.event(logging.INFO, "all cells ready", url=url, grpc=grpc)
            ready(url, grpc, f"{cells} cells, each {way}")

        await supervisor.run(all_ready)
        log.event(logging.INFO, "all cells stopped")


def _places(settings: ServeSettings) -> dict[str, tuple[str, int | None]]:
    """Where to listen, by the name of the setting."""
    return {
        "http_port": (settings.host, settings.http_port),
        "grpc_port": (settings.host, settings.grpc_port),
        "admin_port": (settings.admin_host or _ADMIN_HOST, settings.admin_port),
    }


async def _serve(
    target: Target,
    settings: ServeSettings,
    open_with: Opener,
    context: ssl.SSLContext | None,
    ready: Ready,
    tether: Tether | None,
) -> None:
    # The ports are taken before the model is loaded, so that one in use is said at once; they listen only when ready.
    with contextlib.ExitStack() as held:
        listener = held.enter_context(_bound(settings, "http_port"))
        admin = held.enter_context(_bound(settings, "admin_port")) if settings.admin_port is not None else None
        grpc_port = settings.grpc_port
        if grpc_port is not None and not settings.one_of_many:
            # Held until the end: grpcio binds it by itself, and only when all is ready.
            grpc_port = held.enter_context(_reserved("grpc_port", settings.host, grpc_port)).getsockname()[1]
        if not settings.one_of_many:
            log.event(logging.INFO, "start", target=str(target.path), cells=1)
        observer = held.enter_context(_observing(settings))
        regions = SharedMemory(settings.limits.body_bytes) if settings.shares_memory else None
        repository = Repository(
            target, settings.model, open_with, settings.version, regions, settings.limits, settings.exact
        )
        duties = Duties(repository, regions)
        for region in settings.regions:
            lost = await duties.do(region)
            if lost.wrong:
                log.event(logging.WARNING, "a region of shared memory is lost", region=region.name, error=lost.wrong)
        do: Do = duties.do
        if tether is not None:
            tether.attach(duties.do)
            do = tether.ask if settings.one_of_many else do
        try:
            await (repository.unload() if settings.unloaded else repository.load())
            bound = msgspec.structs.replace(settings, http_port=listener.getsockname()[1], grpc_port=grpc_port)
            server = _Server(repository, bound, duties, regions, do, observer, admin)
            await server.run(listener, context, grpc_port, ready)
        finally:
            await repository.unload()
        log.event(logging.INFO, "stopped")


@contextlib.contextmanager
def _observing(settings: ServeSettings) -> Iterator[Observer | None]:
    """Who follows single requests, where that is asked for; spans that wait are sent at the end."""
    if not settings.otel:
        yield Observer(WallClock(), records=True) if settings.log_requests else None
        return
    from rushhour.serve import tracing  # an extra: only who wants it needs it

    provider = tracing.exported(_sample(settings))
    try:
        yield Observer(WallClock(), records=settings.log_requests, spans=tracing.Spans(provider, WallClock()))
    finally:
        provider.shutdown()


def _bound(settings: ServeSettings, name: str) -> socket.socket:
    host, port = _places(settings)[name]
    assert port is not None
    with _explained(name, host, port):
        if settings.one_of_many:
            return join(host, port)
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
        return listener


def _reserved(name: str, host: str, port: int) -> socket.socket:
    with _explained(name, host, port):
        return reserve(host, port)


def _address(host: str, port: int) -> str:
    return f"{f'[{host}]' if ':' in host else host}:{port}"


@contextlib.contextmanager
def _explained(name: str, host: str, port: int) -> Iterator[None]:
    """Turn what the system says of an address into what the user can do about it."""
    try:
        yield
    except OSError as error:
        why = {
            errno.EADDRINUSE: "another program listens there",
            errno.EACCES: "ports below 1024 need privileges",
            errno.EADDRNOTAVAIL: "that address is not one of this machine",
        }.get(error.errno or 0, str(error))
        option, instead = name.replace("_", "-"), "--admin-host" if name == "admin_port" else "--host"
        raise ServeError(
            f"cannot listen on {host}:{port}", why, f"choose another with --{option} (0 takes a free one) or {instead}"
        ) from error


class _Desk:
    """The desk of one listener's connections: which cell, which control answer, and whether the end has begun."""

    def __init__(self, repository: Repository | None, control: Control, settings: ServeSettings) -> None:
        self.connections: set[HttpConnection] = set()
        self.draining = False
        self.limits = settings.limits
        self.keys = Keys(settings.api_keys)
        self.budget = Budget(settings.limits.held_bytes) if repository is None else repository.budget
        self._repository = repository
        self._routes = Routes(control, infers=repository is not None)

    def cell_of(self, path: bytes) -> Cell | None:
        """The cell that answers at this path; none at all where there is no inference."""
        return None if self._repository is None else self._repository.cell_of(path)

    def control(self, method: bytes, path: bytes, body: bytes, accept: bytes) -> Answer | Awaitable[Answer]:
        """The answer to anything that is not inference."""
        return self._routes.answer(method, path, body, accept)


class _Server:
    """The faces of one cell, from the first connection to the last."""

    def __init__(
        self,
        repository: Repository,
        settings: ServeSettings,
        duties: Duties,
        regions: SharedMemory | None,
        do: Do,
        observer: Observer | None,
        admin: socket.socket | None,
    ) -> None:
        self._settings = settings
        self._repository = repository
        self._observer = observer
        self._admin = admin
        self._draining = False
        self._grpc: GrpcFace | None = None
        duties.watch = self._describe

        def control(*, admin: bool) -> Control:
            return Control(
                repository,
                lambda: self._draining,
                admin=admin,
                regions=regions,
                do=do,
                settings=_shown(settings, self._admin),
                tracing=_tracing(settings),
            )

        self._control = control(admin=settings.admin and admin is None)
        self._desk = _Desk(repository, self._control, settings)
        self._desks = [self._desk]
        if admin is not None:
            self._desks.append(_Desk(None, control(admin=True), settings))

    async def run(
        self, listener: socket.socket, context: ssl.SSLContext | None, grpc_port: int | None, ready: Ready
    ) -> None:
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        grpc = None if grpc_port is None else await self._open_grpc(listener.getsockname()[0], grpc_port)
        servers = [
            await self._listen(desk, name, sock, context)
            for desk, name, sock in zip(self._desks, ("http_port", "admin_port"), (listener, self._admin), strict=False)
            if sock is not None
        ]
        # What is loaded now lives as long as the server: the collector need not walk it during requests.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_COLLECT_AFTER)
        url = _url(listener, context is not None)
        address = None if grpc is None else grpc.address
        admin = None if self._admin is None else _url(self._admin, context is not None)
        log.event(logging.INFO, "ready", url=url, grpc=address, admin=admin, model=self._repository.name)
        loaded = self._repository.loaded
        ready(url, address, "nothing, for it is unloaded" if loaded is None else str(loaded.way))
        sweeping = asyncio.ensure_future(self._sweep())
        await stop.wait()
        sweeping.cancel()
        log.event(logging.INFO, "drain", connections=len(self._desk.connections))
        self._draining = True
        for desk in self._desks:
            desk.draining = True
        for sock in (listener, self._admin):
            if sock is not None:
                let_nobody_in(sock)
        await asyncio.sleep(_HANDSHAKE_SECONDS)
        for server, close in servers:
            server.close()
            await close()
        await asyncio.gather(self._drain(), *([grpc.drain(_LINGER_SECONDS, _DRAIN_SECONDS)] if grpc else []))

    async def _listen(
        self, desk: _Desk, name: str, listener: socket.socket, context: ssl.SSLContext | None
    ) -> tuple[asyncio.Server, Callable[[], Awaitable[None]]]:
        """Take connections; the server, and what to await once it is closed: who stands at the door is still let in."""
        loop, observer = asyncio.get_running_loop(), self._observer
        door = listener.dup()

        def connection() -> HttpConnection:
            return HttpConnection(desk) if observer is None else ObservedConnection(desk, observer)

        async def close() -> None:
            # The kernel has accepted connections that nobody has taken; closing would reset them.
            door.setblocking(False)
            late = []
            with contextlib.suppress(BlockingIOError):
                while True:
                    late.append(door.accept()[0])
            door.close()
            for accepted in late:
                with contextlib.suppress(OSError):
                    await loop.connect_accepted_socket(connection, accepted, ssl=context)

        with _explained(name, *listener.getsockname()[:2]):
            return await loop.create_server(connection, sock=listener, ssl=context, backlog=4096), close

    async def _open_grpc(self, host: str, port: int) -> GrpcFace:
        from rushhour.serve.grpc import GrpcFace  # grpcio is large: only who wants it pays for it

        face = GrpcFace(self._repository, self._control, self._desk.limits, self._desk.keys, self._observer)
        await face.start(_address(host, port), self._settings.tls_certificate, self._settings.tls_key)
        self._grpc = face
        return face

    def _describe(self, state: State) -> None:
        state.ready = state.ready and not self._draining
        state.connections = len(self._desk.connections)
        state.calls = 0 if self._grpc is None else self._grpc.calls

    def _connections(self) -> list[HttpConnection]:
        return [connection for desk in self._desks for connection in desk.connections]

    async def _sweep(self) -> None:
        """Look after slow and silent clients once a second: cheaper than a timer for each request."""
        while True:
            await asyncio.sleep(1.0)
            now = asyncio.get_running_loop().time()
            for connection in self._connections():
                connection.expire(now)
            gc.collect(1)  # what failed requests have left behind is to be gone soon, whatever the threshold

    async def _drain(self) -> None:
        # Idle connections live a moment longer: a request that is on its way to one is still answered.
        deadline = asyncio.get_running_loop().time() + _DRAIN_SECONDS
        await asyncio.sleep(_LINGER_SECONDS)
        while (connections := self._connections()) and asyncio.get_running_loop().time() < deadline:
            for connection in connections:
                connection.close_if_idle()
            await asyncio.sleep(0.02)


def _url(listener: socket.socket, encrypted: bool) -> str:
    return f"http{'s' if encrypted else ''}://{_address(*listener.getsockname()[:2])}"


def _shown(settings: ServeSettings, admin: socket.socket | None) -> dict[str, Any]:
    """How the server was started, as `/config` shows it: with what was left to it filled in, and without secrets."""
    return {
        "host": settings.host,
        "http_port": settings.http_port,
        "grpc_port": settings.grpc_port,
        "admin": settings.admin,
        "admin_address": None if admin is None else _address(*admin.getsockname()[:2]),
        "api_keys": bool(settings.api_keys),
        "tls": settings.tls_certificate is not None,
        "exposed": settings.exposed,
        "shared_memory": settings.shares_memory,
        "limits": settings.limits,
        "log_format": settings.log_format,
        "log_requests": settings.log_requests,
        "otel": settings.otel,
        "otel_sample": _sample(settings) if settings.otel else None,
    }


def _sample(settings: ServeSettings) -> float:
    return 1.0 if settings.otel_sample is None else settings.otel_sample


def _tracing(settings: ServeSettings) -> dict[str, Any]:
    """In the words of the protocol's trace extension."""
    if not settings.otel:
        return {"trace_level": ["OFF"]}
    sample = _sample(settings)
    return {
        "trace_level": ["TIMESTAMPS"],
        "trace_mode": "opentelemetry",
        "trace_rate": str(round(1 / sample) if sample else 0),
    }
