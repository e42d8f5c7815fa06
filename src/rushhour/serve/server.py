"""The server: opens what a plan names, answers, and drains when it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from email.utils import formatdate
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import uvloop

from rushhour.clock import WallClock
from rushhour.errors import ServeError
from rushhour.serve.observability import log
from rushhour.serve.observability.requests import ObservedConnection, Observer
from rushhour.serve.observability.statistics import State
from rushhour.serve.processes import allocator as memory
from rushhour.serve.processes.commands import Duties
from rushhour.serve.processes.messages import Do, Renew
from rushhour.serve.processes.renewal import Renewal
from rushhour.serve.processes.signals import SIGNALS
from rushhour.serve.processes.supervisor import Supervisor, pins
from rushhour.serve.processes.watchdog import Tether
from rushhour.serve.protocols.closing import let_nobody_in
from rushhour.serve.protocols.control import Control
from rushhour.serve.protocols.http import HttpConnection
from rushhour.serve.protocols.limits import Asker, Certificates, Keys, KnownAs, check_exposure, tls
from rushhour.serve.protocols.listener import Take, claim, everywhere, join, reserve
from rushhour.serve.protocols.routes import Answer, Routes
from rushhour.serve.protocols.shared_memory import SharedMemory
from rushhour.serve.repository import Opener, Repository, opener
from rushhour.serve.scheduling.cell import Cell
from rushhour.serve.settings import ServeSettings
from rushhour.serve.target import Target, open_target
from rushhour.system.machine import cores, describe, open_files

if TYPE_CHECKING:
    from rushhour.serve.protocols.grpc import GrpcFace

_ADMIN_HOST = "127.0.0.1"
_LINGER_SECONDS = 0.25
_HANDSHAKE_SECONDS = 0.05
_LATE_SECONDS = 1.0
_CLOSE_SECONDS = 5.0
"""From the end of draining: for the engine to end what it computes, though nobody waits for it any more."""
_SPANS_SECONDS = 2.0
_LAST_WORDS_SECONDS = 0.2
_OTHER_FILES = 256
_OWN_FILES = 64
"""That a server opens beside its connections, at most: engines, event loops, gRPC."""
_FEWEST_CONNECTIONS = 16
_GRPC_AGE_SECONDS = 60.0
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

    A second signal ends the process at once, as does the first one while nothing is served yet; SIGHUP has keys and
    certificates read again.

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
    with SIGNALS.held():
        settings.check()
        settings = _with_secrets(settings)
        check_exposure(settings.host, settings.api_keys, exposed=settings.exposed)
        asked = settings.limits.connections
        settings = _with_room(settings)
        memory.settle()
        if settings.admin_port is not None:
            check_exposure(settings.admin_host or _ADMIN_HOST, settings.api_keys, exposed=settings.exposed)
        planned = target.plan.policy.cells
        cells = settings.cells or (planned if settings.exact else min(planned, cores()))
        several = cells > 1 and not settings.one_of_many
        target = _laid_out(target, settings, cells if several else 1)
        limits = settings.limits
        if limits.grpc_age_s is None and (several or settings.one_of_many):
            limits = msgspec.structs.replace(limits, grpc_age_s=_GRPC_AGE_SECONDS)
        form = settings.log_format or log.usual_format()
        settings = msgspec.structs.replace(settings, log_format=form, limits=limits)
        with log.to_stderr(form, settings.log_level), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            SIGNALS.last_words = _last_words
            if limits.connections < asked and not settings.one_of_many:
                why = "the limit on open files leaves room for no more: ulimit -n"
                log.event(logging.WARNING, "fewer connections", connections=limits.connections, asked=asked, why=why)
            if not settings.exact and not settings.one_of_many:
                _say_differences(target)
            if several:
                started = runner.run(_supervise(target, settings, cells, ready))
            else:
                runner.run(_serve(target, settings, open_with or opener(settings.trusted), ready, tether))
                started = True
        interrupted = SIGNALS.interrupted
    if interrupted and not started:
        sys.exit(130)


def _with_secrets(settings: ServeSettings) -> ServeSettings:
    """The settings with the keys and the certificate that their files hold now.

    Raises:
        ServeError: if they cannot be used.
    """
    if settings.one_of_many:
        return settings  # its supervisor has read them: a cell that comes later uses what the others do
    keys = Keys.read(Path(settings.api_key_file)) if settings.api_key_file else settings.api_keys
    pair = (Path(file) if file else None for file in (settings.tls_certificate, settings.tls_key))
    return msgspec.structs.replace(settings, api_keys=keys, identity=tls(*pair))


def _laid_out(target: Target, settings: ServeSettings, cells: int) -> Target:
    """The target with the streams and threads that were asked for, or that fit as many cells as were.

    Raises:
        ServeError: if there is no room for what was asked.
    """
    room = min(map(len, pins(cells, sorted(os.sched_getaffinity(0))))) if cells > 1 else cores()
    asked = bool(settings.streams or settings.threads)
    target = target.laid_out(settings.streams, settings.threads, room)
    policy = target.plan.policy
    if not asked and cells not in (1, policy.cells):
        return target.fitted(room)  # the plan's layout is that of another number of cells
    if asked and policy.streams * policy.threads > room:
        raise ServeError(
            f"cannot run {policy.streams} streams of {policy.threads} threads in each of {cells} cells",
            f"each has {room} of this machine's cores",
            "give smaller --streams, --threads or --cells",
        )
    return target


def _say_differences(target: Target) -> None:
    """What the plan was measured with and is not so here."""
    for difference in target.differences(describe(), cores()):
        log.event(logging.WARNING, "this is not the machine that the plan was made on", difference=difference)


def _with_room(settings: ServeSettings) -> ServeSettings:
    """The settings with as many connections as the limit on open files has room for, once it is raised.

    Raises:
        ServeError: if that is next to none.
    """
    limits = settings.limits
    files, used = open_files(limits.connections + _OTHER_FILES)
    if files >= limits.connections + _OTHER_FILES:
        return settings
    kinds = 1 if settings.grpc_port is None else 2
    room = (files - used - _OWN_FILES) // kinds
    if room < min(_FEWEST_CONNECTIONS, limits.connections):
        raise ServeError(
            f"this process may open only {files} files",
            f"a server needs at least {used + _OWN_FILES + kinds * _FEWEST_CONNECTIONS}",
            "raise the limit: ulimit -n 4096",
        )
    fewer = msgspec.structs.replace(limits, connections=min(limits.connections, room))
    return msgspec.structs.replace(settings, limits=fewer)


def _last_words() -> None:
    """Of a process that a signal ends at once."""
    if not SIGNALS.stopping:
        log.event(logging.INFO, "stopped before it served")
    log.flush(_LAST_WORDS_SECONDS)


def _reopened(path: Path, settings: ServeSettings, cells: int) -> Target:
    return _laid_out(open_target(path), settings, cells)


async def _supervise(target: Target, settings: ServeSettings, cells: int, ready: Ready) -> bool:
    """Serve with several cells; whether they were ready before the end."""
    with contextlib.ExitStack() as held:
        ports = {
            name: None if port is None else _held(held, name, host, port, reserve)[0].getsockname()[1]
            for name, (host, port) in _places(settings).items()
        }
        shared = msgspec.structs.replace(settings, **ports, cells=None, one_of_many=True)
        grpc = None if shared.grpc_port is None else _address(settings.host, shared.grpc_port)
        log.event(logging.INFO, "start", target=str(target.path), cells=cells)
        supervisor = Supervisor(
            target,
            shared,
            pins(cells, sorted(os.sched_getaffinity(0))),
            partial(_reopened, target.path, settings, cells),
            _closing_s(settings),
        )

        def all_ready(url: str, way: str) -> None:
            log.event(logging.INFO, "all cells ready", url=url, grpc=grpc)
            ready(url, grpc, f"{cells} cells, each {way}")

        started = await supervisor.run(all_ready)
        log.event(logging.INFO, "all cells stopped")
        return started


def _closing_s(settings: ServeSettings) -> float:
    """From the signal to stop to the end of the process, at most."""
    return settings.drain_delay_s + settings.drain_timeout_s + _CLOSE_SECONDS + _SPANS_SECONDS + 2 * _LATE_SECONDS


def _places(settings: ServeSettings) -> dict[str, tuple[str, int | None]]:
    """Where to listen, by the name of the setting."""
    return {
        "http_port": (settings.host, settings.http_port),
        "grpc_port": (settings.host, settings.grpc_port),
        "admin_port": (settings.admin_host or _ADMIN_HOST, settings.admin_port),
    }


async def _serve(
    target: Target, settings: ServeSettings, open_with: Opener, ready: Ready, tether: Tether | None
) -> None:
    # The ports are taken before the model is loaded, so that one in use is said at once; they listen only when ready.
    with contextlib.ExitStack() as held:
        take = join if settings.one_of_many else claim
        places = {name: place for name, place in _places(settings).items() if place[1] is not None}
        listeners = {
            name: _held(held, name, host, port, take)
            for name, (host, port) in places.items()
            if name != "grpc_port" and port is not None
        }
        grpc: list[socket.socket] = []
        if settings.grpc_port is not None:
            # Held until the end: grpcio binds it by itself, and only when all is ready.
            grpc = _held(held, "grpc_port", *places["grpc_port"], join if settings.one_of_many else reserve)
        if not settings.one_of_many:
            log.event(logging.INFO, "start", target=str(target.path), cells=1)
        observer = held.enter_context(_observing(settings))
        regions = SharedMemory(settings.limits.body_bytes) if settings.shares_memory else None
        repository = Repository(
            target,
            settings.model,
            open_with,
            settings.versions,
            regions,
            settings.limits,
            settings.exact,
            partial(_reopened, target.path, settings, 1),
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
            first = listeners["http_port"][0].getsockname()
            port = grpc[0].getsockname()[1] if grpc else None
            bound = msgspec.structs.replace(settings, http_port=first[1], grpc_port=port)
            server = _Server(repository, bound, duties, regions, do, observer, listeners.get("admin_port"))
            await server.run(listeners["http_port"], [_address(*sock.getsockname()[:2]) for sock in grpc], ready)
        finally:
            await repository.unload(_CLOSE_SECONDS)
        log.event(logging.INFO, "stopped")


@contextlib.contextmanager
def _observing(settings: ServeSettings) -> Iterator[Observer | None]:
    """Who follows single requests, where that is asked for; spans that wait are sent at the end."""
    if not settings.otel:
        yield Observer(WallClock(), records=True) if settings.log_requests else None
        return
    from rushhour.serve.observability import tracing

    provider = tracing.exported(_sample(settings))
    try:
        yield Observer(WallClock(), records=settings.log_requests, spans=tracing.Spans(provider, WallClock()))
    finally:
        if not tracing.end(provider, _SPANS_SECONDS):
            why = f"the collector did not take them within {_SPANS_SECONDS:g} s"
            log.event(logging.WARNING, "spans lost", why=why)


def _held(held: contextlib.ExitStack, name: str, host: str, port: int | None, take: Take) -> list[socket.socket]:
    """Take a port on all addresses of the host, for as long as `held` lasts."""
    assert port is not None
    with _explained(name, host, port):
        return [held.enter_context(sock) for sock in everywhere(take, host, port)]


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

    def __init__(
        self,
        repository: Repository,
        control: Control,
        settings: ServeSettings,
        keys: Keys | None = None,
        *,
        infers: bool = True,
    ) -> None:
        self.connections: set[HttpConnection] = set()
        self.draining = False
        self.limits = settings.limits
        self.keys = Keys(settings.api_keys) if keys is None else keys
        self.budget = repository.budget
        self.date = b""
        self._repository = repository
        self._infers = infers
        self._routes = Routes(control, infers=infers, refused=self.refused)
        host = settings.host if infers else settings.admin_host or _ADMIN_HOST
        self._known_as = KnownAs(host, settings.known_as)
        self.tick()

    def tick(self) -> None:
        """To be called once a second: answers carry the date."""
        self.date = f"date: {formatdate(usegmt=True)}\r\n".encode()

    def cell_of(self, path: bytes) -> Cell | None:
        """The cell that answers at this path; none at all where there is no inference."""
        return self._repository.cell_of(path) if self._infers else None

    def refused(self, path: bytes, status: int, seconds: float = 0.0) -> None:
        """Count an answer with an error that no cell has counted."""
        infer = self._infers and path.startswith(b"/v2/models/") and path.endswith(b"/infer")
        self._repository.refuse(status, seconds, infer=infer)

    def control(
        self, method: bytes, path: bytes, body: bytes, accept: bytes, asker: Asker
    ) -> Answer | Awaitable[Answer]:
        """The answer to anything that is not inference. No web page knows a key, so where there are keys they do."""
        return self._routes.answer(method, path, body, accept, asker, None if self.keys else self._known_as)

    def check_origin(self, asker: Asker) -> None:
        """Raise a `WireError` where a web page asks for what only programs of this machine may have done."""
        if not self.keys:
            self._known_as.check_origin(asker)


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
        admin: Sequence[socket.socket] | None,
    ) -> None:
        self._settings = settings
        self._repository = repository
        self._observer = observer
        self._admin = admin or ()
        self._draining = False
        self._grpc: GrpcFace | None = None
        self._keys = Keys(settings.api_keys)
        self._certificates = None if settings.identity is None else Certificates(settings.identity)
        self._do = do
        duties.watch = self._describe
        duties.renew = self._renew

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

        self._control = control(admin=settings.admin and not admin)
        self._desk = _Desk(repository, self._control, settings, self._keys)
        self._desks = [self._desk]
        if admin:
            self._desks.append(_Desk(repository, control(admin=True), settings, self._keys, infers=False))

    async def run(self, listeners: Sequence[socket.socket], grpc: Sequence[str], ready: Ready) -> None:
        """Serve until a signal to stop, then drain.

        Args:
            listeners: for HTTP, bound.
            grpc: the addresses for gRPC, `host:port`.
            ready: called when requests are welcome.
        """
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        SIGNALS.stops(lambda: loop.call_soon_threadsafe(stop.set), patient=self._settings.one_of_many)
        context = None if self._certificates is None else self._certificates.context
        face = await self._open_grpc(grpc) if grpc else None
        servers = [
            await self._listen(desk, name, sock, context)
            for desk, name, socks in zip(
                self._desks, ("http_port", "admin_port"), (listeners, self._admin), strict=False
            )
            for sock in socks
        ]
        # What is loaded now lives as long as the server: the collector need not walk it during requests.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_COLLECT_AFTER)
        url = _url(listeners[0], context is not None)
        address = None if face is None else face.address
        admin = _url(self._admin[0], context is not None) if self._admin else None
        log.event(logging.INFO, "ready", url=url, grpc=address, admin=admin, model=self._repository.name)
        loaded = self._repository.loaded
        ready(url, address, "nothing, for it is unloaded" if loaded is None else str(loaded.way))
        tasks = [asyncio.ensure_future(self._sweep())]
        if self._settings.one_of_many:
            SIGNALS.renews(lambda: None)  # its supervisor does it, for all cells
        else:
            renewal = Renewal(self._settings, self._do)
            SIGNALS.renews(renewal.ask)
            tasks.append(asyncio.ensure_future(renewal.run()))
        await stop.wait()
        SIGNALS.bound(_closing_s(self._settings))
        self._draining = True
        if self._settings.drain_delay_s:
            log.event(logging.INFO, "readiness ends", drain_in_s=self._settings.drain_delay_s)
            await asyncio.sleep(self._settings.drain_delay_s)
        log.event(logging.INFO, "drain", connections=len(self._desk.connections))
        for task in tasks:
            task.cancel()
        for desk in self._desks:
            desk.draining = True
        for sock in (*listeners, *self._admin):
            let_nobody_in(sock)
        await asyncio.sleep(_HANDSHAKE_SECONDS)
        for server, close in servers:
            server.close()
            await close()
        within_s = self._settings.drain_timeout_s
        linger_s = min(_LINGER_SECONDS, within_s)
        await asyncio.gather(self._drain(linger_s, within_s), *([face.drain(linger_s, within_s)] if face else []))
        left = self._connections()
        if left:
            log.event(logging.WARNING, "connections cut off", connections=len(left), after_s=within_s)
        for connection in left:
            connection.abort()

    def _renew(self, new: Renew) -> None:
        """Use other keys from the next request on, and another certificate from the next handshake on."""
        if new.api_keys is not None:
            self._keys.renew(new.api_keys)
            for connection in self._connections():
                connection.forget()
        if new.identity is not None and self._certificates is not None:
            self._certificates.renew(new.identity)

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
            letting = [
                asyncio.ensure_future(loop.connect_accepted_socket(connection, accepted, ssl=context))
                for accepted in late
            ]
            if letting:  # a handshake may take its time, and one that fails is the client's affair
                done, _ = await asyncio.wait(letting, timeout=_LATE_SECONDS)
                for one in done:
                    one.exception()

        with _explained(name, *listener.getsockname()[:2]):
            patience_s = None if context is None else desk.limits.request_s
            server = await loop.create_server(
                connection, sock=listener, ssl=context, backlog=4096, ssl_handshake_timeout=patience_s
            )
            return server, close

    async def _open_grpc(self, addresses: Sequence[str]) -> GrpcFace:
        from rushhour.serve.protocols.grpc import GrpcFace  # grpcio is large: only who wants it pays for it

        face = GrpcFace(self._repository, self._control, self._desk.limits, self._keys, self._observer)
        await face.start(addresses[0], self._certificates, addresses[1:])
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
            for desk in self._desks:
                desk.tick()
            for connection in self._connections():
                connection.expire(now)
            gc.collect(1)  # what failed requests have left behind is to be gone soon, whatever the threshold

    async def _drain(self, linger_s: float, within_s: float) -> None:
        # Idle connections live a moment longer: a request that is on its way to one is still answered.
        deadline = asyncio.get_running_loop().time() + within_s
        await asyncio.sleep(linger_s)
        while (connections := self._connections()) and asyncio.get_running_loop().time() < deadline:
            for desk in self._desks:
                desk.tick()
            for connection in connections:
                connection.close_if_idle()
            await asyncio.sleep(0.02)


def _url(listener: socket.socket, encrypted: bool) -> str:
    return f"http{'s' if encrypted else ''}://{_address(*listener.getsockname()[:2])}"


def _shown(settings: ServeSettings, admin: Sequence[socket.socket]) -> dict[str, Any]:
    """How the server was started, as `/config` shows it: with what was left to it filled in, and without secrets."""
    return {
        "host": settings.host,
        "http_port": settings.http_port,
        "grpc_port": settings.grpc_port,
        "admin": settings.admin,
        "admin_address": _address(*admin[0].getsockname()[:2]) if admin else None,
        "api_keys": bool(settings.api_keys),
        "tls": settings.tls_certificate is not None,
        "exposed": settings.exposed,
        "shared_memory": settings.shares_memory,
        "limits": settings.limits,
        "drain_delay_s": settings.drain_delay_s,
        "drain_timeout_s": settings.drain_timeout_s,
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
