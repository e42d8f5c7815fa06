"""Whom to load: a server found by its URL, and what is known about it."""

from __future__ import annotations

import dataclasses
import http.client
import time
import urllib.parse
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import msgspec

from rushhour.errors import LoadError, WireError
from rushhour.load.declared import Interface, Shape

_SPEED_S = 2.0
"""How long to wait for what is of use but not needed."""

Protocol = Literal["http", "grpc"]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Whatever answers HTTP there; nothing is known about its answers but their status.

    Attributes:
        url: as it was given, without a slash at the end.
        host: its host, as a client connects to it.
        port: its port.
        prefix: the URL's path; in front of `/v2` where it is a server of models, mostly empty.
    """

    url: str
    host: str
    port: int
    prefix: str

    @property
    def protocol(self) -> Protocol:
        """How it is spoken to."""
        return "grpc" if self.url.startswith("grpc://") else "http"

    @property
    def outputs(self) -> tuple[str, ...] | None:
        """Names of the outputs that an answer holds; None where answers are not looked into."""
        return None

    @property
    def authority(self) -> str:
        """`host:port`, an IPv6 address in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclasses.dataclass(frozen=True)
class Target(Endpoint):
    """A model on a server.

    Attributes:
        model: the model's name.
        interface: what it takes and gives, as the server declares it.
        tells_speed: the server says how long its batches take against their profile, as Rushhour's do.
    """

    model: str
    interface: Interface
    tells_speed: bool = False

    @property
    def infer_path(self) -> str:
        """The path that requests are sent to."""
        return f"{self.prefix}/v2/models/{urllib.parse.quote(self.model, safe='')}/infer"

    def speeds(self, since: float, until: float) -> tuple[float, ...]:
        """The host's speed in each 100 ms of a time in which a batch ended; empty where the server does not say.

        Args:
            since, until: on this machine's monotonic clock (`time.monotonic`).
        """
        if not self.tells_speed:
            return ()
        path = f"/v2/models/{urllib.parse.quote(self.model, safe='')}/speed"
        try:
            status, body = _Server(self.url, _SPEED_S).ask("GET", path)
            told = msgspec.json.decode(body, type=_Told) if status == 200 else _Told()
        except (LoadError, msgspec.DecodeError):
            return ()
        now = time.monotonic()
        return tuple(
            round(expected_s / took_s, 3)
            for age_s, expected_s, took_s in zip(told.age_s, told.expected_s, told.took_s, strict=False)
            if since <= now - age_s <= until and took_s > 0
        )

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs that an answer holds."""
        return self.interface.outputs

    def shaped(self, shapes: Mapping[str, Shape]) -> Target:
        """The same with shapes of inputs that the server's metadata leaves open.

        Raises:
            LoadError: if the model has no such input.
        """
        return dataclasses.replace(self, interface=self.interface.shaped(shapes, self.model))


def discover(url: str, model: str | None = None, timeout_s: float = 5.0) -> Target:
    """Find a model on an Open Inference Protocol server.

    Args:
        url: `http://host:port`, with a path in front of `/v2` where there is one; or `grpc://host:port`.
        model: its name; None for the one model that is ready there.
        timeout_s: how long to wait for each answer.

    Raises:
        LoadError: if the URL cannot be used, nobody answers there, what answers is not such a server, or it does
            not have that model.
    """
    if url.strip().startswith("grpc://"):
        from rushhour.load.generator.grpc import discover_grpc  # grpcio takes a quarter of a second to import

        return discover_grpc(endpoint(url), model, timeout_s)
    server = _Server(url, timeout_s)
    name = model if model is not None else server.only_model()
    status, body = server.ask("GET", f"/v2/models/{urllib.parse.quote(name, safe='')}")
    if status in (400, 404):
        ready = server.ready_models()
        raise LoadError(
            f"there is no model {name!r} at {server.url}",
            f"the server has {', '.join(ready)}" if ready else _said(body) or f"it answers with status {status}",
            "name one of these with --model" if ready else "check the name and the URL",
        )
    if status != 200:
        raise LoadError(
            f"cannot read about the model {name!r} at {server.url}",
            f"the server answers with status {status}{_said(body, ' ')}",
            "check that the model is loaded",
        )
    try:
        interface = Interface.read(body)
    except WireError as error:
        raise LoadError(f"cannot use the model {name!r} at {server.url}", error.why, error.fix) from error
    tells_speed = "speed" in server.extensions()
    return Target(server.url, server.host, server.port, server.prefix, name, interface, tells_speed)


def endpoint(url: str) -> Endpoint:
    """A URL taken apart, for what need not be a server of models. Nothing is asked there yet.

    Raises:
        LoadError: if the URL cannot be used.
    """
    clean = url.strip().rstrip("/")
    try:
        parts = urllib.parse.urlsplit(clean)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise _unusable(url, str(error)) from error
    if parts.scheme == "https":
        raise LoadError(
            f"cannot load {url}", "https is not supported: it would be timed with the server", "use http://"
        )
    if parts.scheme not in ("http", "grpc") or not host:
        raise _unusable(url, "it is not of the form http://host:port")
    if parts.query or parts.fragment or parts.username:
        raise _unusable(url, "it holds more than a host, a port and a path")
    if parts.scheme == "grpc" and (parts.path or port is None):
        raise _unusable(url, "a gRPC server is a host and a port")
    return Endpoint(clean, host, 80 if port is None else port, parts.path)


class _Server:
    """Questions to a server, each on a connection of its own."""

    def __init__(self, url: str, timeout_s: float) -> None:
        at = endpoint(url)
        self.url, self.host, self.port, self.prefix = at.url, at.host, at.port, at.prefix
        self._timeout_s = timeout_s

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """The status and body of an answer.

        Raises:
            LoadError: if there is none.
        """
        connection = http.client.HTTPConnection(self.host, self.port, timeout=self._timeout_s)
        connection.response_class = _FinalResponse
        try:
            headers = {} if body is None else {"Content-Type": "application/json"}
            connection.request(method, self.prefix + path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except TimeoutError as error:
            raise LoadError(
                f"{self.url} does not answer", f"nothing came within {self._timeout_s:g} s", "check the server"
            ) from error
        except http.client.InvalidURL as error:
            raise _unusable(self.url, str(error)) from error
        except (http.client.HTTPException, ConnectionResetError) as error:
            raise LoadError(
                f"{self.url} does not speak HTTP",
                f"{type(error).__name__}: {str(error)[:100]}",
                "check the port: a gRPC port does not answer HTTP",
            ) from error
        except (OSError, UnicodeError) as error:
            raise LoadError(
                f"cannot reach {self.url}",
                getattr(error, "strerror", None) or str(error),
                "check the URL, and that the server is running",
            ) from error
        finally:
            connection.close()

    def ready_models(self) -> list[str]:
        """Names of the models that are ready; none where the server does not list them."""
        entries = self._answered("POST", "/v2/repository/index", b"{}", list[_Entry])
        if entries is None:  # KServe lists them elsewhere
            listed = self._answered("GET", "/v2/models", None, _Listed)
            return sorted(set(listed.models or ())) if listed is not None else []
        return sorted({entry.name for entry in entries if entry.state in (None, "", "READY")})

    def extensions(self) -> list[str]:
        """The protocol's extensions that it has; none where it does not say."""
        try:
            about = self._answered("GET", "/v2", None, _About)
        except LoadError:
            return []
        return about.extensions or [] if about is not None else []

    def _answered(self, method: str, path: str, body: bytes | None, kind: type[T]) -> T | None:
        """What a server says to a question that it need not know; None where it does not.

        Raises:
            LoadError: if it does not answer at all.
        """
        status, content = self.ask(method, path, body)
        try:
            return msgspec.json.decode(content, type=kind) if status == 200 else None
        except (msgspec.DecodeError, RecursionError):
            return None

    def only_model(self) -> str:
        """The name of the one model that is ready.

        Raises:
            LoadError: if there is none, or more than one.
        """
        ready = self.ready_models()
        if len(ready) == 1:
            return ready[0]
        if ready:
            raise LoadError(
                f"{self.url} has {len(ready)} models",
                f"they are {', '.join(ready[:10])}",
                "name one of them with --model",
            )
        raise LoadError(
            f"cannot tell which model to ask at {self.url}",
            "the server lists no model that is ready",
            "name it with --model, or load one",
        )


class _FinalResponse(http.client.HTTPResponse):
    """Reads on after any 1xx answer, where http.client does so after 100 alone."""

    def _read_status(self) -> tuple[str, int, str]:
        version, status, reason = super()._read_status()  # type: ignore[misc]
        return version, http.client.CONTINUE if 101 < status < 200 else status, reason


class _About(msgspec.Struct):
    extensions: list[str] | None = None


class _Listed(msgspec.Struct):
    models: list[str] | None = None


class _Told(msgspec.Struct):
    age_s: list[float] = []
    expected_s: list[float] = []
    took_s: list[float] = []


class _Entry(msgspec.Struct):
    name: str
    state: str | None = None


def _said(body: bytes, before: str = "") -> str:
    """A server's error message, where there is one."""
    try:
        said = msgspec.json.decode(body, type=dict[str, Any])
    except msgspec.DecodeError:
        return ""
    error = said.get("error") or said.get("detail")  # the latter is FastAPI's
    return f"{before}({str(error)[:200]})" if error else ""


def _unusable(url: str, why: str) -> LoadError:
    return LoadError(f"cannot use the URL {url!r}", why, "write for example http://localhost:8000")
