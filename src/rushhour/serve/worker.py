"""`Worker`: the HTTP and gRPC servers of one worker process, from the first connection to the end of draining."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from rushhour.serve.access.certificates import Certificates
from rushhour.serve.access.keys import Keys
from rushhour.serve.memory.shared_memory import SharedMemory
from rushhour.serve.observability import log
from rushhour.serve.observability.requests import Observer
from rushhour.serve.observability.statistics import State
from rushhour.serve.processes.commands import Commands
from rushhour.serve.processes.messages import Execute, Renew
from rushhour.serve.processes.renewal import Renewal
from rushhour.serve.processes.signals import SIGNALS
from rushhour.serve.protocols.control import Control
from rushhour.serve.protocols.http.connection import HttpConnection
from rushhour.serve.protocols.http.endpoint import HttpEndpoint, OpenConnection
from rushhour.serve.protocols.http.observed import ObservedConnection
from rushhour.serve.protocols.listener import explained, host_and_port, refuse_connections
from rushhour.serve.repository import Repository
from rushhour.serve.seats import Balance
from rushhour.serve.settings import ServeSettings

if TYPE_CHECKING:
    from rushhour.serve.protocols.grpc.server import GrpcServer

_LINGER_SECONDS = 0.25
_HANDSHAKE_SECONDS = 0.05
_LATE_SECONDS = 1.0
_BACKLOG = 4096
CLOSE_SECONDS = 5.0
"""After draining, the engine has so long to finish its batches, though their answers are not needed any more."""
SPANS_SECONDS = 2.0
_GC_THRESHOLDS = (50_000, 20, 20)
"""Requests are freed by their reference counts; the garbage collector must not walk the queue every 700 objects."""

Ready = Callable[[str, str | None, str], None]
"""Called once when requests are accepted: with the URL, the address for gRPC, if any, and the variant."""


class Worker:
    """The servers of one worker process.

    Args:
        repository: the models.
        settings: of the server, with the ports that were bound.
        commands: of this process.
        regions: shared memory of clients; None where it is switched off.
        execute: executes commands, in all worker processes if there are several.
        observer: follows single requests, if any are followed.
        admin: bound sockets for administration; None if it has no port of its own.
    """

    def __init__(
        self,
        repository: Repository,
        settings: ServeSettings,
        commands: Commands,
        regions: SharedMemory | None,
        execute: Execute,
        observer: Observer | None,
        admin: Sequence[socket.socket] | None,
    ) -> None:
        self._settings = settings
        self._repository = repository
        self._observer = observer
        self._admin = admin or ()
        self._draining = False
        self._grpc: GrpcServer | None = None
        self._keys = Keys(settings.api_keys)
        self._certificates = None if settings.identity is None else Certificates(settings.identity)
        self._execute = execute
        commands.describe = self._describe
        commands.renew = self._renew
        address = host_and_port(*self._admin[0].getsockname()[:2]) if self._admin else None

        def control(*, admin: bool) -> Control:
            return Control(
                repository,
                lambda: self._draining,
                admin=admin,
                regions=regions,
                execute=execute,
                settings=settings.shown(address),
                tracing=settings.trace_settings,
            )

        self._control = control(admin=settings.admin and not admin)
        self._endpoint = HttpEndpoint(repository, self._control, settings, self._keys)
        self._endpoints = [self._endpoint]
        self._balance = None if settings.seat is None or settings.identity is not None else Balance(settings.seat)
        if self._balance is not None:
            self._endpoint.on_lost = self._balance.closed
        if admin:
            self._endpoints.append(HttpEndpoint(repository, control(admin=True), settings, self._keys, infers=False))

    async def run(self, listeners: Sequence[socket.socket], grpc: Sequence[str], ready: Ready) -> None:
        """Serve until a signal to stop, then drain.

        Args:
            listeners: for HTTP, bound.
            grpc: the addresses for gRPC, `host:port`.
            ready: called when requests are accepted.
        """
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        SIGNALS.on_stop(lambda: loop.call_soon_threadsafe(stop.set), ignore_further=self._settings.one_of_many)
        context = None if self._certificates is None else self._certificates.context
        server = await self._open_grpc(grpc) if grpc else None
        servers = [
            await self._listen(endpoint, name, sock, context)
            for endpoint, name, socks in zip(
                self._endpoints, ("http_port", "admin_port"), (listeners, self._admin), strict=False
            )
            for sock in socks
        ]
        # What is loaded now lives as long as the server: the garbage collector need not walk it during requests.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_GC_THRESHOLDS)
        url = _url(listeners[0], context is not None)
        address = None if server is None else server.address
        admin = _url(self._admin[0], context is not None) if self._admin else None
        services = self._repository.services.values()
        models = ", ".join(service.name for service in services)
        log.event(logging.INFO, "ready", url=url, grpc=address, admin=admin, model=models)
        ready(url, address, "\n".join(service.way for service in services))
        tasks = [asyncio.ensure_future(self._sweep())]
        if self._balance is not None:
            tasks.append(asyncio.ensure_future(self._balance.run(self._connection(self._endpoint))))
        if self._settings.one_of_many:
            SIGNALS.on_reload(lambda: None)  # the supervisor does it, for all worker processes
        else:
            renewal = Renewal(self._settings, self._execute)
            SIGNALS.on_reload(renewal.request)
            tasks.append(asyncio.ensure_future(renewal.run()))
        await stop.wait()
        SIGNALS.limit_lifetime(closing_s(self._settings))
        self._draining = True
        if self._balance is not None:
            self._balance.leave()
        if self._settings.drain_delay_s:
            log.event(logging.INFO, "readiness ends", drain_in_s=self._settings.drain_delay_s)
            await asyncio.sleep(self._settings.drain_delay_s)
        log.event(logging.INFO, "drain", connections=len(self._endpoint.connections))
        for task in tasks:
            task.cancel()
        await self._drain(listeners, servers, server)
        if self._balance is not None:
            self._balance.close()

    async def _drain(
        self,
        listeners: Sequence[socket.socket],
        servers: Sequence[tuple[asyncio.Server, Callable[[], Awaitable[None]]]],
        grpc: GrpcServer | None,
    ) -> None:
        """Stop accepting, accept what is queued, close; answer what is in flight, within the drain timeout."""
        for endpoint in self._endpoints:
            endpoint.draining = True
        for sock in (*listeners, *self._admin):
            refuse_connections(sock)
        await asyncio.sleep(_HANDSHAKE_SECONDS)
        for server, close in servers:
            server.close()
            await close()
        within_s = self._settings.drain_timeout_s
        linger_s = min(_LINGER_SECONDS, within_s)
        draining = [self._drain_http(linger_s, within_s), *([grpc.drain(linger_s, within_s)] if grpc else [])]
        await asyncio.gather(*draining)
        left = self._connections()
        if left:
            log.event(logging.WARNING, "connections cut off", connections=len(left), after_s=within_s)
        for connection in left:
            connection.abort()

    async def _drain_http(self, linger_s: float, within_s: float) -> None:
        # Idle connections stay open a moment longer: a request that is already sent on one is still answered.
        deadline = asyncio.get_running_loop().time() + within_s
        await asyncio.sleep(linger_s)
        while (connections := self._connections()) and asyncio.get_running_loop().time() < deadline:
            for endpoint in self._endpoints:
                endpoint.update_date()
            for connection in connections:
                connection.close_if_idle()
            await asyncio.sleep(0.02)

    def _renew(self, new: Renew) -> None:
        """Use other API keys from the next request on, and another certificate from the next handshake on."""
        if new.api_keys is not None:
            self._keys.renew(new.api_keys)
            for connection in self._connections():
                connection.forget()
        if new.identity is not None and self._certificates is not None:
            self._certificates.renew(new.identity)

    def _connection(self, endpoint: HttpEndpoint) -> Callable[[], asyncio.Protocol]:
        """What makes the protocol of a new connection."""
        observer = self._observer
        if observer is None:
            return lambda: HttpConnection(endpoint)
        return lambda: ObservedConnection(endpoint, observer)

    async def _listen(
        self, endpoint: HttpEndpoint, name: str, listener: socket.socket, context: ssl.SSLContext | None
    ) -> tuple[asyncio.Server, Callable[[], Awaitable[None]]]:
        """Accept connections; returns the server, and what to await once it is closed: it accepts what is queued."""
        loop = asyncio.get_running_loop()
        queued = listener.dup()
        connection = self._connection(endpoint)
        if self._balance is not None and endpoint is self._endpoint:
            connection = self._balance.accepting(connection)

        async def accept_queued() -> None:
            # The kernel has completed handshakes of connections that are not accepted yet; closing would reset them.
            queued.setblocking(False)
            late = []
            with contextlib.suppress(BlockingIOError):
                while True:
                    late.append(queued.accept()[0])
            queued.close()
            accepting = [
                asyncio.ensure_future(loop.connect_accepted_socket(connection, accepted, ssl=context))
                for accepted in late
            ]
            if accepting:  # a TLS handshake takes time, and if one fails that is the client's error
                done, _ = await asyncio.wait(accepting, timeout=_LATE_SECONDS)
                for one in done:
                    one.exception()

        with explained(name, *listener.getsockname()[:2]):
            # uvloop does not report that another server, which started at the same time, listens there by now.
            listener.listen(_BACKLOG)
            timeout_s = None if context is None else endpoint.limits.request_s
            server = await loop.create_server(
                connection, sock=listener, ssl=context, backlog=_BACKLOG, ssl_handshake_timeout=timeout_s
            )
            return server, accept_queued

    async def _open_grpc(self, addresses: Sequence[str]) -> GrpcServer:
        from rushhour.serve.protocols.grpc.server import GrpcServer  # grpcio is large: loaded only where it is used

        server = GrpcServer(self._repository, self._control, self._endpoint.limits, self._keys, self._observer)
        await server.start(addresses[0], self._certificates, addresses[1:])
        self._grpc = server
        return server

    def _describe(self, state: State) -> None:
        state.ready = state.ready and not self._draining
        state.connections = len(self._endpoint.connections)
        state.calls = 0 if self._grpc is None else self._grpc.calls

    def _connections(self) -> list[OpenConnection]:
        return [connection for endpoint in self._endpoints for connection in endpoint.connections]

    async def _sweep(self) -> None:
        """Close slow and idle connections once a second: cheaper than a timer for each request."""
        while True:
            await asyncio.sleep(1.0)
            now = asyncio.get_running_loop().time()
            for endpoint in self._endpoints:
                endpoint.update_date()
            for connection in self._connections():
                connection.expire(now)
            gc.collect(1)  # free what failed requests have left, whatever the thresholds


def closing_s(settings: ServeSettings) -> float:
    """From the signal to stop to the end of the process, at most."""
    return settings.drain_delay_s + settings.drain_timeout_s + CLOSE_SECONDS + SPANS_SECONDS + 2 * _LATE_SECONDS


def _url(listener: socket.socket, encrypted: bool) -> str:
    return f"http{'s' if encrypted else ''}://{host_and_port(*listener.getsockname()[:2])}"
