"""The server: opens what a plan names, answers, and drains when it is told to stop."""

from __future__ import annotations

import asyncio
import errno
import gc
import signal
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import uvloop

from rushhour.errors import ServeError
from rushhour.serve.cell import Cell
from rushhour.serve.control import Answer, Control
from rushhour.serve.guard import Keys, Limits, check_exposure, tls
from rushhour.serve.http import HttpConnection
from rushhour.serve.repository import Opener, Repository, opener
from rushhour.serve.target import Target

_DRAIN_SECONDS = 30.0
_LINGER_SECONDS = 0.25


class ServeSettings(msgspec.Struct, frozen=True):
    """Where and how to listen.

    Attributes:
        host: loopback by default: exposing a server is a decision, not a default.
        http_port: 0 takes a free one.
        model: the model's name on the wire; None takes the bundle's.
        trusted: factories (`module:factory`) that the torch engine may import beside Rushhour's own networks.
        limits: what one connection may cost.
        api_keys: clients must send one of these; empty lets everybody in.
        tls_certificate: path of the certificate chain, with `tls_key`; None serves without TLS.
        exposed: listening for everybody, without keys, is meant.
        admin: whether clients may load and unload the model.
    """

    host: str = "127.0.0.1"
    http_port: int = 8000
    model: str | None = None
    trusted: tuple[str, ...] = ()
    limits: Limits = Limits()
    api_keys: tuple[str, ...] = ()
    tls_certificate: str | None = None
    tls_key: str | None = None
    exposed: bool = False
    admin: bool = True


def serve(
    target: Target, settings: ServeSettings, ready: Callable[[str], None], *, open_with: Opener | None = None
) -> None:
    """Serve until SIGTERM or SIGINT; then take no new connections, answer what is under way, and return.

    Args:
        target: what to serve.
        settings: where.
        ready: called once with the server's URL when requests are welcome.
        open_with: opens engines; the plan's own by default.

    Raises:
        ServeError: if the port cannot be had.
        EngineError: if the plan's engine cannot do what the plan says.
    """
    check_exposure(settings.host, settings.api_keys, exposed=settings.exposed)
    context = tls(*(Path(file) if file else None for file in (settings.tls_certificate, settings.tls_key)))
    listener = _listen(settings.host, settings.http_port)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(target, settings, open_with or opener(settings.trusted), listener, context, ready))
    finally:
        listener.close()


async def _serve(
    target: Target,
    settings: ServeSettings,
    open_with: Opener,
    listener: socket.socket,
    context: ssl.SSLContext | None,
    ready: Callable[[str], None],
) -> None:
    repository = Repository(target, settings.model, open_with)
    try:
        await repository.load()
        await _Server(repository, settings).run(listener, context, ready)
    finally:
        await repository.unload()


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket: before the model is loaded, so that a port in use is said at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ServeError(f"cannot listen on {host!r}", str(error), "give an address of this machine") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(4096)
    except OSError as error:
        listener.close()
        why = {
            errno.EADDRINUSE: "another program listens there",
            errno.EACCES: "ports below 1024 need privileges",
            errno.EADDRNOTAVAIL: "that address is not one of this machine",
        }.get(error.errno or 0, str(error))
        raise ServeError(
            f"cannot listen on {host}:{port}", why, "choose another with --http-port (0 takes a free one)"
        ) from error
    return listener


class _Server:
    """The desk of all connections: which cell, which control answer, and whether the end has begun."""

    def __init__(self, repository: Repository, settings: ServeSettings) -> None:
        self.connections: set[HttpConnection] = set()
        self.draining = False
        self.limits = settings.limits
        self.keys = Keys(settings.api_keys)
        self._repository = repository
        self._control = Control(repository, lambda: self.draining, admin=settings.admin)

    async def run(self, listener: socket.socket, context: ssl.SSLContext | None, ready: Callable[[str], None]) -> None:
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        server = await loop.create_server(lambda: HttpConnection(self), sock=listener, ssl=context, backlog=4096)
        # What is loaded now lives as long as the server: the collector need not walk it during requests.
        gc.collect()
        gc.freeze()
        host, port = listener.getsockname()[:2]
        ready(f"http{'s' if context else ''}://{f'[{host}]' if ':' in host else host}:{port}")
        sweeping = asyncio.ensure_future(self._sweep())
        await stop.wait()
        sweeping.cancel()
        self.draining = True
        server.close()
        await self._drain()

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
        return self._control.answer(method, path, body)
