"""Discovery: a model found on a server by its URL, and what the server declares of it."""

from __future__ import annotations

import urllib.parse
from typing import TypeVar

import msgspec

from rushhour.errors import LoadError, WireError
from rushhour.load.target.endpoint import Endpoint, endpoint
from rushhour.load.target.interface import Interface
from rushhour.load.target.model import Target
from rushhour.load.target.queries import error_message, query

T = TypeVar("T")

_WITH_KEY = "send its key with --header 'Authorization: Bearer KEY', and whole requests with --path and --body"


def discover(url: str, model: str | None = None, timeout_s: float = 5.0) -> Target:
    """Find a model on an Open Inference Protocol server.

    Args:
        url: `http://host:port`, with a path in front of `/v2` where there is one; or `grpc://host:port`.
        model: its name; None for the one model that is ready there.
        timeout_s: how long to wait for each answer.

    Raises:
        LoadError: if the URL cannot be used, no such server answers there, or it does not have that model.
    """
    at = endpoint(url)
    if at.protocol == "grpc":
        # grpcio takes a quarter of a second to import
        from rushhour.load.target.discovery_grpc import discover_grpc

        return discover_grpc(at, model, timeout_s)
    server = _ModelServer(at, timeout_s)
    name = model if model is not None else server.only_model()
    status, body = server.query("GET", f"/v2/models/{urllib.parse.quote(name, safe='')}")
    if status in (400, 404):
        ready = server.ready_models()
        raise LoadError(
            f"there is no model {name!r} at {server.at.url}",
            f"the server has {', '.join(ready)}"
            if ready
            else error_message(body) or f"it answers with status {status}",
            "name one of these with --model" if ready else _checked(server.at, "check the name and the URL"),
        )
    if status != 200:
        raise LoadError(
            f"cannot read the metadata of the model {name!r} at {server.at.url}",
            _said(status, body),
            _WITH_KEY if status in (401, 403) else "check that the model is loaded",
        )
    try:
        interface = Interface.read(body)
    except WireError as error:
        raise LoadError(f"cannot use the model {name!r} at {server.at.url}", error.why, error.fix) from error
    tells_speed = "speed" in server.extensions()
    return Target(server.at.url, server.at.host, server.at.port, server.at.prefix, name, interface, tells_speed)


class _Configured(msgspec.Struct):
    cascade: object = None
    models: dict[str, _Configured] = {}


def is_cascade(target: Target, timeout_s: float = 5.0) -> bool:
    """Whether a model is a cascade: how much it computes for a sample depends on the sample. Only Rushhour says so.

    Args:
        target: from `discover`.
        timeout_s: how long to wait for the answer.
    """
    if target.protocol == "grpc" or not target.tells_speed:
        return False
    settings = _ModelServer(target, timeout_s).settings()
    return settings is not None and settings.models.get(target.model, settings).cascade is not None


class _ModelServer:
    """The control endpoints of a model server over HTTP."""

    def __init__(self, at: Endpoint, timeout_s: float) -> None:
        self.at = at
        self._timeout_s = timeout_s
        self._denied = ""

    def query(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """As `query`."""
        return query(self.at, method, path, body, timeout_s=self._timeout_s)

    def ready_models(self) -> list[str]:
        """Names of the models that are ready; none where the server does not list them."""
        entries = self._optional("POST", "/v2/repository/index", b"{}", list[_Entry])
        if entries is None:  # KServe lists them elsewhere
            listed = self._optional("GET", "/v2/models", None, _Listed)
            return sorted(set(listed.models or ())) if listed is not None else []
        return sorted({entry.name for entry in entries if entry.state in (None, "", "READY")})

    def extensions(self) -> list[str]:
        """The extensions of the protocol that it has; none where it does not list them."""
        try:
            metadata = self._optional("GET", "/v2", None, _ServerMetadata)
        except LoadError:
            return []
        return metadata.extensions or [] if metadata is not None else []

    def settings(self) -> _Configured | None:
        """The settings in force, as Rushhour's servers show them; None where they do not."""
        try:
            return self._optional("GET", "/config", None, _Configured)
        except LoadError:
            return None

    def _optional(self, method: str, path: str, body: bytes | None, kind: type[T]) -> T | None:
        """The answer of an endpoint that a server need not have; None where it has none.

        Raises:
            LoadError: if the server does not answer at all.
        """
        status, content = self.query(method, path, body)
        if status in (401, 403):
            self._denied = _said(status, content)
        try:
            return msgspec.json.decode(content, type=kind) if status == 200 else None
        except (msgspec.DecodeError, ValueError, RecursionError):
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
                f"{self.at.url} has {len(ready)} models",
                f"they are {', '.join(ready[:10])}",
                "name one of them with --model",
            )
        raise LoadError(
            f"cannot tell which model to use at {self.at.url}",
            self._denied or "the server lists no model that is ready",
            _WITH_KEY if self._denied else _checked(self.at, "name it with --model, or load one into the server"),
        )


def _checked(at: Endpoint, usual: str) -> str:
    """What to do where nothing is found."""
    return "leave /v2 and what follows it out of the URL" if "/v2" in at.prefix else usual


def _said(status: int, body: bytes) -> str:
    return f"the server answers with status {status} {error_message(body)}".rstrip()


class _ServerMetadata(msgspec.Struct):
    extensions: list[str] | None = None


class _Listed(msgspec.Struct):
    models: list[str] | None = None


class _Entry(msgspec.Struct):
    name: str
    state: str | None = None
