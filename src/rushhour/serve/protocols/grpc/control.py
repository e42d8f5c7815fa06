"""Control requests over gRPC: every method other than inference."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any
from urllib.parse import unquote

import grpc
from google.protobuf.json_format import ParseDict

from rushhour.protocol import message
from rushhour.serve.access.origin import Client
from rushhour.serve.observability.requests import FollowedRequest
from rushhour.serve.protocols.control import Control
from rushhour.serve.protocols.grpc.errors import Context, end, refuse, status_of
from rushhour.serve.protocols.grpc.messages import MAX_CONTROL_BYTES, parsed
from rushhour.serve.repository import Repository

_NEED_CLIENT = frozenset(("SystemSharedMemoryRegister",))
"""Methods whose answer depends on the client."""


class ControlMethods:
    """Answers control requests.

    Args:
        repository: counts errors.
        control: computes the answers.
        read: reads the message of a call; it has so many bytes at most.
        follow: follows a call, if calls are followed.

    Attributes:
        address: that the server listens on.
    """

    def __init__(
        self,
        repository: Repository,
        control: Control,
        read: Callable[[Context, int], Awaitable[bytes]],
        follow: Callable[[str, Context], FollowedRequest | None],
    ) -> None:
        self.address = ""
        self._repository = repository
        self._control = control
        self._read_message = read
        self._follow = follow

    def handlers(self, methods: Iterable[Any]) -> dict[str, Any]:
        """Handlers of these methods of the service, by name."""
        answers = self._methods()
        return {method.name: self._handler(method, answers[method.name]) for method in methods}

    def _handler(self, method: Any, answer: Callable[..., Any]) -> Any:
        kind, response = (message(kind.full_name) for kind in (method.input_type, method.output_type))

        async def answering(messages: object, context: Context) -> Any:
            followed = self._follow(method.name, context)
            try:
                request = parsed(kind, await self._read_message(context, MAX_CONTROL_BYTES))
                result = answer(request, self._client(context)) if method.name in _NEED_CLIENT else answer(request)
                if isinstance(result, Awaitable):
                    result = await result
                encoded = ParseDict(result or {}, response()).SerializeToString()
                end(followed, 200)
                return encoded
            except Exception as error:
                self._repository.refuse(status_of(error), 0.0, infer=False)
                end(followed, status_of(error))
                await refuse(context, error)

        return grpc.stream_unary_rpc_method_handler(answering)

    def _methods(self) -> dict[str, Callable[..., Any]]:
        """Method -> function that answers it, with plain values under the names of its response."""
        control = self._control
        return {
            "ServerLive": lambda request: {"live": True},
            "ServerReady": lambda request: {"ready": control.ready()},
            "ServerMetadata": lambda request: control.server(),
            "ModelReady": lambda request: {"ready": control.model_ready(request.name, request.version)},
            "ModelMetadata": lambda request: control.metadata(request.name, request.version),
            "ModelConfig": lambda request: {"config": control.config(request.name, request.version)},
            "ModelStatistics": lambda request: control.statistics(request.name, request.version),
            "RepositoryIndex": lambda request: {"models": control.index(ready_only=request.ready)},
            "RepositoryModelLoad": lambda request: control.change("load", request.model_name, request.parameters),
            "RepositoryModelUnload": lambda request: control.change("unload", request.model_name, request.parameters),
            "SystemSharedMemoryStatus": lambda request: {
                "regions": {region["name"]: region for region in control.region_status(request.name or None)}
            },
            "SystemSharedMemoryRegister": lambda request, client: control.register(
                request.name, request.key, request.offset, request.byte_size, None, client
            ),
            "SystemSharedMemoryUnregister": lambda request: control.unregister(request.name or None),
            "CudaSharedMemoryStatus": lambda request: {},
            "CudaSharedMemoryRegister": lambda request: control.refuse_cuda(),
            "CudaSharedMemoryUnregister": lambda request: {},
            "TraceSetting": self._tracing,
            "LogSettings": self._logging,
        }

    def _client(self, context: Context) -> Client:
        """The client of a call; without addresses where grpcio does not report them."""
        kind, _, place = unquote(context.peer()).partition(":")
        host, _, port = place.rpartition(":")
        if kind not in ("ipv4", "ipv6") or not port.isdigit():
            return Client()
        host = host.strip("[]").partition("%")[0]
        # Within the machine both ends have the same address, except for servers that listen on several.
        return Client(peer=(host, int(port)), here=(host, int(self.address.rpartition(":")[2])))

    def _tracing(self, request: Any) -> dict[str, Any]:
        # A setting without a value means the default.
        changes = {name: list(setting.value) or None for name, setting in request.settings.items()}
        settings = self._control.tracing(changes, request.model_name)
        return {"settings": {name: {"value": value} for name, value in settings.items()}}

    async def _logging(self, request: Any) -> dict[str, Any]:
        changes = {
            name: getattr(setting, choice)
            for name, setting in request.settings.items()
            if (choice := setting.WhichOneof("parameter_choice")) is not None
        }
        fields = {bool: "bool_param", int: "uint32_param", str: "string_param"}
        settings = await self._control.logging(changes)
        return {"settings": {name: {fields[type(value)]: value} for name, value in settings.items()}}
