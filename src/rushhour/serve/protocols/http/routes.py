"""The HTTP paths other than inference, and what answers them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NoReturn
from urllib.parse import unquote

import msgspec

from rushhour.errors import WireError
from rushhour.serve.access.origin import Client, OriginCheck
from rushhour.serve.memory.shared_memory import Access
from rushhour.serve.protocols.control import Control
from rushhour.serve.protocols.http import openapi
from rushhour.serve.protocols.http.answers import error_body

Answer = tuple[int, bytes] | tuple[int, bytes, bytes] | tuple[int, bytes, bytes, bytes]
"""A status, a body, its content type where that is not JSON, and further fields of the header, with their line ends."""

Handler = Callable[[bytes], Any]
"""Called with the request's body; returns what is answered as JSON, or an `Answer` where the status is not 200, or an
awaitable of either."""

Refused = Callable[[bytes, int], None]
"""Called for each answer with an error: the path and the status."""

JSON = b"application/json"
MAX_BODY_BYTES = 64 * 2**10
"""Of a request other than inference: it is parsed on the event loop."""
_OF_THE_SERVER = ("GET", "HEAD", "POST", "OPTIONS")


class Routes:
    """Answers control requests over HTTP.

    Args:
        control: computes the answers.
        infers: whether this port answers inference requests.
        refused: called for each error.
    """

    def __init__(self, control: Control, *, infers: bool = True, refused: Refused = lambda path, status: None) -> None:
        self._control = control
        self._infers = infers
        self._refused = refused
        self._described: tuple[tuple[str, ...], bytes] | None = None

    def answer(
        self,
        method: bytes,
        path: bytes,
        body: bytes,
        accept: bytes = b"",
        client: Client = Client(),  # noqa: B008 - frozen
        origins: OriginCheck | None = None,
    ) -> Answer | Awaitable[Answer]:
        """The answer to a request; awaitable where it takes time.

        Args:
            origins: checks where requests for changes come from; None where API keys are required.
        """
        shown, verb = path.decode("latin-1"), method.decode("latin-1")
        try:
            if path == b"*" and verb == "OPTIONS":
                return _options(_OF_THE_SERVER)
            segments = [unquote(segment) for segment in shown.strip("/").split("/")]
            handlers = self._handlers(segments, accept.decode("latin-1"), client)
            if handlers is None:
                raise WireError(f"there is no path {shown[:200]}", self._control.said, "see GET /v2", status=404)
            if verb == "HEAD":
                verb = "GET"  # the connection leaves the body out
            if verb not in handlers:
                taken = (*handlers, *(("HEAD",) if "GET" in handlers else ()), "OPTIONS")
                if verb == "OPTIONS":
                    return _options(taken)
                self._refused(path, 405)
                return not_allowed(method, taken)
            if origins is not None and verb == "POST" and not _only_reads(segments):
                origins.check(client)
            answer = handlers[verb](body)
        except WireError as error:
            return self._error(path, error)
        return self._later(path, answer) if isinstance(answer, Awaitable) else _json(answer)

    async def _later(self, path: bytes, answer: Awaitable[Any]) -> Answer:
        try:
            return _json(await answer)
        except WireError as error:
            return self._error(path, error)

    def _error(self, path: bytes, error: WireError) -> Answer:
        self._refused(path, error.status)
        return error.status, error_body(error, path)

    def _handlers(self, path: list[str], accept: str, client: Client) -> dict[str, Handler] | None:
        """Method -> handler at this path; None if there is no such path."""
        control = self._control
        if "" in path:
            return None  # an empty name or version does not mean any
        match path:
            case ["v2"]:
                return {"GET": lambda body: control.server()}
            case ["v2", "health", "live"]:
                return {"GET": lambda body: {"live": True}}
            case ["v2", "health", "ready"]:
                return {"GET": lambda body: _ready(control.ready())}
            case ["v2", "models", "stats"]:
                return {"GET": lambda body: control.statistics()}
            case ["v2", "models", name, "versions", version, *rest] if name and version:
                return self._of_model(name, version, rest)
            case ["v2", "models", name, *rest] if name:
                return self._of_model(name, "", rest)
            case ["v2", "repository", "index"]:
                return {"POST": lambda body: control.index(ready_only=_ready_only(body))}
            case ["v2", "repository", "models", name, "load"]:
                return {"POST": lambda body: self._load(name, body)}
            case ["v2", "repository", "models", name, "unload"]:
                return {"POST": lambda body: self._unload(name, body)}
            case ["v2", "systemsharedmemory", "status"]:
                return {"GET": lambda body: control.region_status(None)}
            case ["v2", "systemsharedmemory", "unregister"]:
                return {"POST": lambda body: control.unregister(None)}
            case ["v2", "systemsharedmemory", "region", name, "status"]:
                return {"GET": lambda body: control.region_status(name)}
            case ["v2", "systemsharedmemory", "region", name, "register"]:
                return {"POST": lambda body: self._register(name, body, client)}
            case ["v2", "systemsharedmemory", "region", name, "unregister"]:
                return {"POST": lambda body: control.unregister(name)}
            case ["v2", "cudasharedmemory", *rest]:
                return self._cuda(rest)
            case ["v2", "trace", "setting"]:
                return {"GET": lambda body: control.tracing({}), "POST": lambda body: control.tracing(_parsed(body))}
            case ["v2", "logging"]:
                return {"GET": lambda body: control.logging({}), "POST": lambda body: control.logging(_parsed(body))}
            case ["v1", "models"]:
                return {"GET": lambda body: {"object": "list", "data": self._embedders()}}
            case ["v1", "models", name]:
                return {"GET": lambda body: self._embedder(name)}
            case ["v1", "embeddings"]:
                return {"POST": lambda body: self._not_embedded()}
            case ["config"]:
                return {"GET": lambda body: control.effective()}
            case ["stats"]:
                return {"GET": lambda body: control.counters()}
            case ["metrics"]:
                return {"GET": lambda body: self._metrics(accept)}
            case ["openapi.json"]:
                return {"GET": lambda body: (200, self._description())}
        return None

    def _of_model(self, name: str, version: str, rest: list[str]) -> dict[str, Handler] | None:
        control = self._control
        match rest:
            case []:
                return {"GET": lambda body: control.metadata(name, version)}
            case ["ready"]:
                return {"GET": lambda body: self._model_ready(name, version)}
            case ["config"]:
                return {"GET": lambda body: control.config(name, version)}
            case ["stats"]:
                return {"GET": lambda body: control.statistics(name, version)}
            case ["speed"]:
                return {"GET": lambda body: control.speed(name, version)}
            case ["trace", "setting"]:
                return {
                    "GET": lambda body: control.tracing({}, name, version),
                    "POST": lambda body: control.tracing(_parsed(body), name, version),
                }
            case ["infer"]:
                return {"POST": lambda body: self._not_inferred(name, version)}
            case ["rows"]:
                return {
                    "GET": lambda body: control.rows(name, version),
                    "POST": lambda body: self._no_rows(name, version),
                }
        return None

    def _not_inferred(self, name: str, version: str) -> NoReturn:
        """Say why this is not the path of the served model, which is answered before it comes here."""
        self._control.metadata(name, version)
        if not self._infers:
            raise WireError("this port is for administration only", "", "send requests to the other port", status=404)
        raise WireError("there is no such path", "", f"use v2/models/{name}/infer", status=404)

    def _no_rows(self, name: str, version: str) -> None:
        """Say why rows are not answered at this path; where they are, requests are answered before they come here."""
        self._control.rows(name, version)
        self._not_inferred(name, version)

    def _cuda(self, rest: list[str]) -> dict[str, Handler] | None:
        """CUDA memory cannot be registered; unregistering succeeds, because clients always do it."""
        match rest:
            case ["status"] | ["region", _, "status"]:
                return {"GET": lambda body: []}
            case ["unregister"] | ["region", _, "unregister"]:
                return {"POST": lambda body: None}
            case ["region", _, "register"]:
                return {"POST": lambda body: self._control.refuse_cuda()}
        return None

    def _embedders(self) -> list[dict[str, Any]]:
        """The models that answer at `/v1/embeddings`, as OpenAI's clients list them.

        Raises:
            WireError: if there is none.
        """
        ready = [each["name"] for each in self._control.index(ready_only=True)] if self._control.ready() else []
        names = [name for name in ready if self._infers and self._control.bounds(name)["embeds"]]
        if not names:
            self._not_embedded()
        return [{"id": name, "object": "model", "created": 0, "owned_by": "rushhour"} for name in names]

    def _embedder(self, name: str) -> dict[str, Any]:
        """One of them."""
        served = self._control.names
        if name not in served:
            what = f"the model {name[:100]!r} does not exist"
            raise WireError(what, f"this server has {', '.join(served)}", "", status=404)
        found = next((each for each in self._embedders() if each["id"] == name), None)
        if found is None:
            self._not_embedded(name)
        return found

    def _not_embedded(self, name: str = "") -> NoReturn:
        """Say why texts are not embedded at this path; where they are, requests are answered before they come here."""
        names = [name] if name else self._control.names
        if self._infers and self._control.ready():
            why = "it is no text encoder with a tokenizer"
            if len(names) > 1:
                raise WireError("no model embeds texts", "none is a text encoder with a tokenizer", "", status=404)
            raise WireError(f"{names[0]} does not embed texts", why, f"see GET v2/models/{names[0]}", status=404)
        self._not_inferred(names[0], "")

    def _model_ready(self, name: str, version: str) -> Any:
        if not self._control.model_ready(name, version):
            self._control.metadata(name, version)  # raises if the name or version is wrong
            return _ready(False)
        return _ready(True)

    async def _load(self, name: str, body: bytes) -> dict[str, Any]:
        await self._control.change("load", name, _parameters(body))
        return {}

    async def _unload(self, name: str, body: bytes) -> dict[str, Any]:
        await self._control.change("unload", name, _parameters(body))
        return {}

    def _description(self) -> bytes:
        """The description in OpenAPI, written once for each version: pipelined requests for it would block others."""
        version = tuple(text for entry in self._control.index() for text in entry.values())
        if self._described is None or self._described[0] != version:
            described = openapi.description(self._control, infers=self._infers)
            self._described = version, msgspec.json.encode(described)
        return self._described[1]

    async def _metrics(self, accept: str) -> Answer:
        content_type, text = await self._control.metrics(accept)
        return 200, text, content_type.encode()

    def _register(self, name: str, body: bytes, client: Client) -> Awaitable[None]:
        try:
            region = msgspec.convert(_parsed(body), _Region)
        except msgspec.ValidationError as error:
            raise WireError(
                f"cannot register the region {name[:100]!r}", str(error), "send key, byte_size and offset"
            ) from error
        return self._control.register(name, region.key, region.offset or 0, region.byte_size, region.access, client)


class _Region(msgspec.Struct):
    key: str
    byte_size: int
    offset: int | None = None
    access: Access | None = None


def _only_reads(path: list[str]) -> bool:
    """Whether a POST to this path changes nothing."""
    return path == ["v2", "repository", "index"] or path[-1] == "infer"


def _ready(ready: bool) -> Answer:
    return (200 if ready else 503), msgspec.json.encode({"ready": ready})


def _parsed(body: bytes) -> dict[str, Any]:
    if not body:
        return {}
    if len(body) > MAX_BODY_BYTES:
        limit = f"the limit of this path is {MAX_BODY_BYTES} bytes"
        raise WireError("the body is too large", limit, "send less", status=413)
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError("the request's JSON cannot be read", str(error), "send an object") from error


def _ready_only(body: bytes) -> bool:
    wanted = _parsed(body).get("ready")
    if wanted is not None and not isinstance(wanted, bool):
        raise WireError("'ready' is not valid", "it is true or false", "send one of them, or omit it")
    return bool(wanted)


def _parameters(body: bytes) -> dict[str, Any]:
    parameters = _parsed(body).get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise WireError("the parameters are not valid", "they are not an object", "send an object, or omit them")
    return {name: value for name, value in parameters.items() if value is not None}


def _json(content: Any) -> Answer:
    if isinstance(content, tuple):
        return content
    return 200, msgspec.json.encode({} if content is None else content)


def _options(methods: Sequence[str]) -> Answer:
    return 200, b"", JSON, _allow(methods)


def not_allowed(method: bytes, methods: Sequence[str]) -> Answer:
    """The answer to a method that the path does not accept."""
    error = WireError(f"the method is {method.decode('latin-1')}", f"this path accepts {', '.join(methods)}", "use one")
    return 405, msgspec.json.encode({"error": str(error)}), JSON, _allow(methods)


def _allow(methods: Sequence[str]) -> bytes:
    return f"allow: {', '.join(methods)}\r\n".encode()
