"""The paths of everything over HTTP that is not inference, and what lies behind them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import unquote

import msgspec

from rushhour.errors import WireError
from rushhour.serve.control import Control

Answer = tuple[int, bytes] | tuple[int, bytes, bytes]
"""A status, a body, and its content type where that is not JSON."""

Handler = Callable[[bytes], Any]
"""Takes the request's body; gives what is to be answered as JSON, or that as a whole `Answer` where its
status is not 200, or an awaitable of either."""

MAX_BODY_BYTES = 64 * 2**10
"""Of a request that is no inference: it is parsed on the event loop."""


class Routes:
    """Answers control requests over HTTP.

    Args:
        control: what knows the answers.
        infers: whether inference is taken here.
    """

    def __init__(self, control: Control, *, infers: bool = True) -> None:
        self._control = control
        self._infers = infers

    def answer(self, method: bytes, path: bytes, body: bytes, accept: bytes = b"") -> Answer | Awaitable[Answer]:
        """The answer to a request; awaitable where it takes time."""
        shown, asked = path.decode("latin-1"), method.decode("latin-1")
        try:
            handlers = self._at([unquote(segment) for segment in shown.strip("/").split("/")], accept.decode("latin-1"))
            if handlers is None:
                name = self._control.index()[0]["name"]
                raise WireError(f"there is nothing at {shown[:200]}", f"the model is {name}", "see GET /v2", status=404)
            if asked not in handlers:
                raise WireError(
                    f"the method is {asked}", f"this path takes {' or '.join(handlers)}", "use that", status=405
                )
            answer = handlers[asked](body)
        except WireError as error:
            return _error(error)
        return self._later(answer) if isinstance(answer, Awaitable) else _json(answer)

    async def _later(self, answer: Awaitable[Any]) -> Answer:
        try:
            return _json(await answer)
        except WireError as error:
            return _error(error)

    def _at(self, path: list[str], accept: str) -> dict[str, Handler] | None:
        """Method -> what answers it at this path; None where there is nothing."""
        control = self._control
        match path:
            case ["v2"]:
                return {"GET": lambda body: control.server()}
            case ["v2", "health", "live"]:
                return {"GET": lambda body: {"live": True}}
            case ["v2", "health", "ready"]:
                return {"GET": lambda body: _ready(control.ready())}
            case ["v2", "models", "stats"]:
                return {"GET": lambda body: control.statistics()}
            case ["v2", "models", name, "versions", version, *rest]:
                return self._of_model(name, version, rest)
            case ["v2", "models", name, *rest]:
                return self._of_model(name, "", rest)
            case ["v2", "repository", "index"]:
                return {"POST": lambda body: control.index(ready_only=_parsed(body).get("ready") is True)}
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
                return {"POST": lambda body: self._register(name, body)}
            case ["v2", "systemsharedmemory", "region", name, "unregister"]:
                return {"POST": lambda body: control.unregister(name)}
            case ["v2", "cudasharedmemory", *rest]:
                return self._cuda(rest)
            case ["v2", "trace", "setting"]:
                return {"GET": lambda body: control.tracing({}), "POST": lambda body: control.tracing(_parsed(body))}
            case ["v2", "logging"]:
                return {"GET": lambda body: control.logging({}), "POST": lambda body: control.logging(_parsed(body))}
            case ["config"]:
                return {"GET": lambda body: control.effective()}
            case ["stats"]:
                return {"GET": lambda body: control.counters()}
            case ["metrics"]:
                return {"GET": lambda body: self._metrics(accept)}
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
                    "GET": lambda body: control.tracing({}, name),
                    "POST": lambda body: control.tracing(_parsed(body), name),
                }
            case ["infer"]:
                return {"POST": lambda body: self._not_inferred(name, version)}
        return None

    def _not_inferred(self, name: str, version: str) -> None:
        """What is served is answered before it comes here: say why this is not."""
        self._control.metadata(name, version)
        if not self._infers:
            raise WireError("this is the port for administration", "", "send requests to the other", status=404)
        raise WireError("there is nothing at this path", "", f"use v2/models/{name}/infer", status=404)

    def _cuda(self, rest: list[str]) -> dict[str, Handler] | None:
        """Of CUDA memory nothing is registered, and nothing can be; clients unregister all the same."""
        match rest:
            case ["status"] | ["region", _, "status"]:
                return {"GET": lambda body: []}
            case ["unregister"] | ["region", _, "unregister"]:
                return {"POST": lambda body: None}
            case ["region", _, "register"]:
                return {"POST": lambda body: self._control.refuse_cuda()}
        return None

    def _model_ready(self, name: str, version: str) -> Any:
        if not self._control.model_ready(name, version):
            self._control.metadata(name, version)  # says what is wrong with the name, if that is wrong
            return _ready(False)
        return _ready(True)

    async def _load(self, name: str, body: bytes) -> dict[str, Any]:
        await self._control.change("load", name, _parameters(body))
        return {}

    async def _unload(self, name: str, body: bytes) -> dict[str, Any]:
        await self._control.change("unload", name, _parameters(body))
        return {}

    async def _metrics(self, accept: str) -> Answer:
        content_type, text = await self._control.metrics(accept)
        return 200, text, content_type.encode()

    def _register(self, name: str, body: bytes) -> Awaitable[None]:
        try:
            region = msgspec.convert(_parsed(body), _Region)
        except msgspec.ValidationError as error:
            raise WireError(
                f"cannot register the region {name[:100]!r}", str(error), "send key, byte_size and offset"
            ) from error
        return self._control.register(name, region.key, region.offset, region.byte_size)


class _Region(msgspec.Struct):
    key: str
    byte_size: int
    offset: int = 0


def _ready(ready: bool) -> Answer:
    return (200 if ready else 503), msgspec.json.encode({"ready": ready})


def _parsed(body: bytes) -> dict[str, Any]:
    if not body:
        return {}
    if len(body) > MAX_BODY_BYTES:
        raise WireError("the body is too large", f"here the limit is {MAX_BODY_BYTES} bytes", "send less", status=413)
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError("the request's JSON cannot be read", str(error), "send an object") from error


def _parameters(body: bytes) -> dict[str, Any]:
    parameters = _parsed(body).get("parameters", {})
    return parameters if isinstance(parameters, dict) else {}


def _json(content: Any) -> Answer:
    if isinstance(content, tuple):
        return content
    return 200, msgspec.json.encode({} if content is None else content)


def _error(error: WireError) -> Answer:
    return error.status, msgspec.json.encode({"error": str(error)})
