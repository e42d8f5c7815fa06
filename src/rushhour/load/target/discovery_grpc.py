"""Discovery over gRPC. Imported only where it is used: grpcio takes a quarter of a second to import."""

from __future__ import annotations

from typing import Any

import grpc

from rushhour.errors import LoadError
from rushhour.load.generator.grpc import CHANNEL_OPTIONS, SERVICE
from rushhour.load.target.endpoint import Endpoint
from rushhour.load.target.interface import Interface
from rushhour.load.target.model import Target
from rushhour.protocol import message


def discover_grpc(at: Endpoint, model: str | None, timeout_s: float) -> Target:
    """As `discover`, over gRPC."""
    with grpc.insecure_channel(at.authority, options=CHANNEL_OPTIONS) as channel:
        try:
            ready, unlisted = _ready_models(channel, at, timeout_s)
        except LoadError:
            if model is None:
                raise
            ready, unlisted = [], ""
        if model is None and len(ready) != 1:
            raise LoadError(
                f"cannot tell which model to use at {at.url}",
                unlisted or f"the server has {', '.join(ready[:10]) or 'no model that is ready'}",
                "name it with --model",
            )
        name = model if model is not None else ready[0]
        try:
            found = _call(channel, at, "ModelMetadata", timeout_s, name=name)
        except LoadError as error:
            if name in ready or not ready:
                raise
            raise LoadError(
                f"there is no model {name!r} at {at.url}",
                f"the server has {', '.join(ready)}",
                "name one of these with --model",
            ) from error
    interface = Interface.declared(
        [(each.name, each.datatype, each.shape) for each in found.inputs], [each.name for each in found.outputs]
    )
    return Target(at.url, at.host, at.port, at.prefix, name, interface)


def _ready_models(channel: Any, at: Endpoint, timeout_s: float) -> tuple[list[str], str]:
    """Names of the models that are ready; and why there are none, where the server does not list them.

    Raises:
        LoadError: if it does not answer at all.
    """
    try:
        index = _call(channel, at, "RepositoryIndex", timeout_s)
    except _CallFailed as error:  # RepositoryIndex is an extension of the protocol
        return [], f"the server does not list its models: {error.why}"
    return sorted({entry.name for entry in index.models if entry.state in ("", "READY")}), ""


class _CallFailed(LoadError):
    """The server answers a call with an error."""


def _call(channel: Any, at: Endpoint, method: str, timeout_s: float, **fields: str) -> Any:
    response = message(f"inference.{method}Response")
    call = channel.unary_unary(
        SERVICE + method,
        request_serializer=lambda request: request.SerializeToString(),
        response_deserializer=response.FromString,
    )
    try:
        return call(message(f"inference.{method}Request")(**fields), timeout=timeout_s, wait_for_ready=False)
    except grpc.RpcError as error:
        code, details = error.code(), str(error.details() or "")[:200]
        why = f"{code.name} ({details})"
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            raise LoadError(
                f"cannot reach {at.url}", why, "check the URL, and that a gRPC server is running there"
            ) from error
        denied = code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
        fix = "load it over HTTP, where --header sends a key" if denied else "check the model's name"
        raise _CallFailed(f"{at.url} does not answer {method}", why, fix) from error
