"""Whom to load and with what: a server found by its URL, and requests encoded before the clock starts."""

from __future__ import annotations

import dataclasses
import http.client
import urllib.parse
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from rushhour.bundle import Signature, TensorSpec
from rushhour.errors import LoadError, WireError
from rushhour.wire import HEADER_LENGTH, encode_request, read_metadata

Payload = bytes
"""A whole HTTP request, head and body."""

_DISTINCT = 32
"""Requests in rotation: enough that no cache answers for the model, few enough to stay in memory."""
_SMALL_IDS = 100
"""Random values of wide integers lie below this: as token ids or categories they stay inside any vocabulary."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A model on a server.

    Attributes:
        url: as it was given, without a slash at the end.
        host: its host, as a client connects to it.
        port: its port.
        prefix: the path in front of `/v2`, mostly empty.
        model: the model's name.
        signature: what it takes and gives.
    """

    url: str
    host: str
    port: int
    prefix: str
    model: str
    signature: Signature

    @property
    def infer_path(self) -> str:
        """The path that requests are sent to."""
        return f"{self.prefix}/v2/models/{urllib.parse.quote(self.model, safe='')}/infer"

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs that an answer holds."""
        return tuple(spec.name for spec in self.signature.outputs)


def discover(url: str, model: str | None = None, timeout_s: float = 5.0) -> Target:
    """Find a model on an Open Inference Protocol server.

    Args:
        url: `http://host:port`, with a path in front of `/v2` where there is one.
        model: its name; None for the one model that is ready there.
        timeout_s: how long to wait for each answer.

    Raises:
        LoadError: if the URL cannot be used, nobody answers there, what answers is not such a server, or it does
            not have that model.
    """
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
        found, signature = read_metadata(body)
    except WireError as error:
        raise LoadError(f"cannot use the model {name!r} at {server.url}", error.why, error.fix) from error
    return Target(server.url, server.host, server.port, server.prefix, found, signature)


class _Server:
    """An URL taken apart, and questions to the server there, each on a connection of its own."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url = url.strip().rstrip("/")
        self._timeout_s = timeout_s
        try:
            parts = urllib.parse.urlsplit(self.url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise _unusable(url, str(error)) from error
        if parts.scheme == "https":
            raise LoadError(
                f"cannot load {url}", "https is not supported: it would be timed with the server", "use http://"
            )
        if parts.scheme != "http" or not host:
            raise _unusable(url, "it is not of the form http://host:port")
        if parts.query or parts.fragment or parts.username:
            raise _unusable(url, "it holds more than a host, a port and a path")
        self.host = host
        self.port = 80 if port is None else port
        self.prefix = parts.path

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """The status and body of an answer.

        Raises:
            LoadError: if there is none.
        """
        connection = http.client.HTTPConnection(self.host, self.port, timeout=self._timeout_s)
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
        status, body = self.ask("POST", "/v2/repository/index", b"{}")
        if status != 200:
            return []
        try:
            entries = msgspec.json.decode(body, type=list[_Entry])
        except msgspec.DecodeError:
            return []
        return sorted({entry.name for entry in entries if entry.state == "READY"})

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


class _Entry(msgspec.Struct):
    name: str
    state: str = "READY"


def payloads(
    target: Target, samples: Mapping[str, NDArray[Any]] | None = None, *, rows: int = 1, seed: int = 0
) -> list[Payload]:
    """Whole HTTP requests for a model, 32 distinct ones, to be sent in rotation.

    Args:
        target: the model.
        samples: input name -> array of shape `(k, *shape)`, real ones if there are any; None for seeded random
            values in the range of each type.
        rows: samples in one request.
        seed: decides which samples go together, or the random values.

    Raises:
        LoadError: if the samples do not fit the model.
    """
    if rows < 1:
        raise LoadError(f"cannot send requests of {rows} samples", "a request carries at least one", "use --rows 1")
    random = np.random.default_rng(seed)
    if samples is None:
        pool = {spec.name: _random(spec, _DISTINCT * rows, random) for spec in target.signature.inputs}
        chosen = np.arange(_DISTINCT * rows)
    else:
        pool, count = _fitting(target, samples)
        # Whole permutations one after the other: every sample is sent before one is sent twice.
        rounds = -(-_DISTINCT * rows // count)
        chosen = np.concatenate([random.permutation(count) for _ in range(rounds)])[: _DISTINCT * rows]
    return [
        _http_request(target, {name: array[part] for name, array in pool.items()})
        for part in chosen.reshape(_DISTINCT, rows)
    ]


def _fitting(target: Target, samples: Mapping[str, NDArray[Any]]) -> tuple[dict[str, NDArray[Any]], int]:
    """The samples of the model's inputs, and how many there are."""
    pool = {}
    for spec in target.signature.inputs:
        array = samples.get(spec.name)
        if array is None:
            raise LoadError(
                f"the samples lack the input {spec.name!r}",
                f"they hold {', '.join(samples) or 'nothing'}",
                f"give all inputs of {target.model}",
            )
        if array.shape[1:] != spec.shape or array.dtype != np.dtype(spec.dtype):
            raise LoadError(
                f"the samples of {spec.name!r} are {array.dtype} of shape {list(array.shape)}",
                f"{target.model} takes {spec.dtype} of shape {[-1, *spec.shape]}",
                "bring them to that form",
            )
        pool[spec.name] = array
    counts = {len(array) for array in pool.values()}
    if len(counts) != 1 or 0 in counts:
        raise LoadError(
            f"the inputs have {', '.join(map(str, sorted(counts)))} samples",
            "all inputs have the same number, at least one",
            "align them",
        )
    return pool, counts.pop()


def _random(spec: TensorSpec, count: int, random: np.random.Generator) -> NDArray[Any]:
    shape, dtype = (count, *spec.shape), np.dtype(spec.dtype)
    if dtype.kind == "f":
        return random.random(shape).astype(dtype)
    if dtype.kind == "b":
        return random.integers(0, 2, shape).astype(dtype)
    high = _SMALL_IDS if dtype.itemsize > 1 else np.iinfo(dtype).max + 1
    return random.integers(0, high, shape).astype(dtype)


def _http_request(target: Target, inputs: Mapping[str, NDArray[Any]]) -> Payload:
    header_length, body = encode_request(target.signature, inputs)
    host = f"[{target.host}]" if ":" in target.host else target.host
    head = (
        f"POST {target.infer_path} HTTP/1.1\r\n"
        f"Host: {host}:{target.port}\r\n"
        "Content-Type: application/octet-stream\r\n"
        f"{HEADER_LENGTH}: {header_length}\r\n"
        f"Content-Length: {len(body)}\r\n"
        "\r\n"
    )
    return head.encode("ascii") + body


def _said(body: bytes, before: str = "") -> str:
    """A server's error message, where there is one."""
    try:
        error = msgspec.json.decode(body, type=dict[str, Any]).get("error")
    except msgspec.DecodeError:
        return ""
    return f"{before}({str(error)[:200]})" if error else ""


def _unusable(url: str, why: str) -> LoadError:
    return LoadError(f"cannot use the URL {url!r}", why, "write for example http://localhost:8000")
