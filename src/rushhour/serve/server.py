"""The server: opens what a plan names, answers, and drains when it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import math
import re
import signal
import socket
from collections.abc import Callable
from typing import Any

import msgspec
import uvloop

from rushhour.clock import WallClock
from rushhour.engines import Engine, open_engine, time_service
from rushhour.errors import ServeError
from rushhour.machine import describe
from rushhour.serve.admission import Profile
from rushhour.serve.cell import Cell
from rushhour.serve.http import HttpConnection
from rushhour.serve.target import Target
from rushhour.wire import Codec, model_metadata

_DRAIN_SECONDS = 30.0
_PROFILE_SECONDS = 0.03
_LINGER_SECONDS = 0.25


class ServeSettings(msgspec.Struct, frozen=True):
    """Where and how to listen.

    Attributes:
        host: loopback by default: exposing a server is a decision, not a default.
        http_port: 0 takes a free one.
        model: the model's name on the wire; None takes the bundle's.
        trusted: factories (`module:factory`) that the torch engine may import beside Rushhour's own networks.
    """

    host: str = "127.0.0.1"
    http_port: int = 8000
    model: str | None = None
    trusted: tuple[str, ...] = ()


def serve(target: Target, settings: ServeSettings, ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; then take no new connections, answer what is under way, and return.

    Args:
        target: what to serve.
        settings: where.
        ready: called once with the server's URL when requests are welcome.

    Raises:
        ServeError: if the port cannot be had.
        EngineError: if the plan's engine cannot do what the plan says.
    """
    listener = _listen(settings.host, settings.http_port)
    try:
        engine = open_engine(target.bundle, target.engine_config, trusted=settings.trusted)
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(_serve(target, engine, settings, listener, ready))
        finally:
            engine.close()
    finally:
        listener.close()


async def _serve(
    target: Target, engine: Engine, settings: ServeSettings, listener: socket.socket, ready: Callable[[str], None]
) -> None:
    await _Server(target, engine, settings).run(listener, ready)


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
    """One model behind one listening socket; the desk of its connections."""

    def __init__(self, target: Target, engine: Engine, settings: ServeSettings) -> None:
        self.connections: set[HttpConnection] = set()
        self.draining = False
        self._target = target
        name = settings.model or target.bundle.manifest.name
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", name):
            raise ServeError(
                f"cannot serve a model under the name {name!r}",
                "a name is made of letters, digits, '.', '_' and '-'",
                "give another with --model-name",
            )
        codec = Codec(name, engine.signature)
        policy = target.plan.policy
        limit = math.inf if policy.deadline_ms is None else policy.deadline_ms / 1e3
        profile = Profile(time_service(engine, target.bundle, limit, _PROFILE_SECONDS))
        self._cell = Cell(engine, codec, policy, profile, WallClock())
        self._metadata = model_metadata(codec, platform=f"rushhour_{engine.config.engine}")
        base = f"/v2/models/{name}"
        self._infer_paths = {f"{base}/infer".encode(), f"{base}/versions/{codec.version}/infer".encode()}
        self._model_paths = {base.encode(), f"{base}/versions/{codec.version}".encode()}

    async def run(self, listener: socket.socket, ready: Callable[[str], None]) -> None:
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        server = await loop.create_server(lambda: HttpConnection(self), sock=listener, backlog=4096)
        # What is loaded now lives as long as the server: the collector need not walk it during requests.
        gc.collect()
        gc.freeze()
        host, port = listener.getsockname()[:2]
        ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        await stop.wait()
        self.draining = True
        server.close()
        await self._drain()

    async def _drain(self) -> None:
        # Idle connections live a moment longer: a request that is on its way to one is still answered.
        deadline = asyncio.get_running_loop().time() + _DRAIN_SECONDS
        await asyncio.sleep(_LINGER_SECONDS)
        while self.connections and asyncio.get_running_loop().time() < deadline:
            for connection in list(self.connections):
                connection.close_if_idle()
            with contextlib.suppress(TimeoutError):
                await asyncio.sleep(0.02)

    def cell_of(self, path: bytes) -> Cell | None:
        """The cell that answers at this path."""
        return self._cell if path in self._infer_paths else None

    def control(self, method: bytes, path: bytes) -> tuple[int, bytes]:
        """Everything that is not inference: rare, so clarity counts more than speed."""
        routes: dict[bytes, tuple[bytes, Callable[[], Any]]] = {
            b"/v2": (b"GET", self._server_metadata),
            b"/v2/health/live": (b"GET", lambda: {"live": True}),
            b"/v2/health/ready": (b"GET", lambda: {"ready": not self.draining}),
            b"/v2/repository/index": (b"POST", self._index),
            b"/config": (b"GET", self._config),
            b"/stats": (b"GET", self._stats),
        }
        for base in self._model_paths:
            routes[base] = (b"GET", lambda: msgspec.Raw(self._metadata))
            routes[base + b"/ready"] = (b"GET", lambda: {"ready": not self.draining})
        found = routes.get(path.rstrip(b"/") or b"/")
        if found is None:
            shown = path[:200].decode("latin-1")
            return 404, _json_error(f"there is nothing at {shown}: the model is {self._cell.codec.model}; see GET /v2")
        wanted, answer = found
        if method != wanted:
            return 405, _json_error(f"the method is {method.decode('latin-1')}: this path takes {wanted.decode()}")
        status = 503 if self.draining and path.rstrip(b"/").endswith(b"/ready") else 200
        return status, msgspec.json.encode(answer())

    def _server_metadata(self) -> dict[str, Any]:
        version = describe().versions.get("rushhour", "")
        return {"name": "rushhour", "version": version, "extensions": ["binary_tensor_data"]}

    def _index(self) -> list[dict[str, str]]:
        codec = self._cell.codec
        return [{"name": codec.model, "version": codec.version, "state": "READY", "reason": ""}]

    def _config(self) -> dict[str, Any]:
        engine = self._cell.engine
        return {
            "model": self._cell.codec.model,
            "bundle_hash": self._target.bundle.manifest.hash,
            "policy": msgspec.to_builtins(self._target.plan.policy),
            "engine": msgspec.to_builtins(engine.config),
            "effective": dict(engine.effective),
            "service_ms": {str(n): round(1e3 * self._cell.profile.seconds(n), 3) for n in (1, engine.config.max_batch)},
        }

    def _stats(self) -> dict[str, int]:
        counters = self._cell.counters
        return {name: getattr(counters, name) for name in counters.__slots__} | {"waiting": self._cell.waiting}


def _json_error(text: str) -> bytes:
    return msgspec.json.encode({"error": text})
