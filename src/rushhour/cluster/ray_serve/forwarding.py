"""Requests that come through Ray's proxies go on to the server of the replica, bytes as they are."""

from __future__ import annotations

import json
from typing import Any, Final

_HOP: Final = frozenset(
    (
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer"),
        *("transfer-encoding", "upgrade", "host", "content-length"),
    )
)
"""Fields that concern one connection, and not the request. Source: RFC 9110, section 7.6.1."""
_RAYS: Final = frozenset(("application", "request_id", "multiplexed_model_id", "session_id", "user-agent"))
_LONGEST_S: Final = 300.0

SERVICE: Final = "inference.GRPCInferenceService"
METHODS: Final = (
    *("ServerLive", "ServerReady", "ServerMetadata", "ModelReady", "ModelMetadata", "ModelConfig"),
    *("ModelStatistics", "ModelInfer"),
)
"""That have one request and one answer. Streams keep to one replica, and go to it directly."""


class Message:
    """An answer over gRPC, as bytes: Ray asks it for them."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def SerializeToString(self) -> bytes:
        """The bytes."""
        return self._content


class Forwarder:
    """Connections to one server, from the event loop of a replica.

    Args:
        http: of the server: `http://127.0.0.1:34567`.
        grpc: host and port; empty without.
    """

    def __init__(self, http: str, grpc: str) -> None:
        self._http, self._grpc = http, grpc
        self._session: Any = None
        self._channel: Any = None

    async def request(self, request: Any) -> Any:
        """Send a request of Starlette on; the answer is one of Starlette.

        503 where the server does not accept connections.
        """
        import aiohttp
        from starlette.responses import Response

        scope = request.scope
        path = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/")) or "/"
        query = scope.get("query_string", b"").decode("latin-1")
        fields = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        headers = [(name, value) for name, value in fields if name.lower() not in _HOP]
        body = await request.body()
        try:
            async with self._client().request(
                scope["method"],
                self._url(path, query),
                headers=headers,
                data=body or None,
                allow_redirects=False,
            ) as answer:
                content = await answer.read()
        except (aiohttp.ClientConnectionError, TimeoutError) as error:
            what = {"error": f"the server of this replica does not answer: {error or type(error).__name__}"}
            return Response(json.dumps(what), 503, {"Retry-After": "1"}, "application/json")
        response = Response(content, answer.status)
        kept = [(name.lower(), value) for name, value in answer.raw_headers if name.lower().decode() not in _HOP]
        response.raw_headers = [*kept, (b"content-length", str(len(content)).encode())]
        return response

    async def text(self, path: str, timeout_s: float) -> str:
        """What the server answers to GET.

        Raises:
            OSError: if it does not answer with 200 in time.
        """
        import aiohttp

        limit = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._client().get(self._url(path, ""), timeout=limit) as answer:
                if answer.status != 200:
                    raise OSError(f"{path} is answered with {answer.status}")
                found: str = await answer.text()
                return found
        except (aiohttp.ClientError, TimeoutError) as error:
            raise OSError(f"{path} is not answered: {error or type(error).__name__}") from error

    async def call(self, method: str, message: bytes, context: Any) -> Message:
        """Send a call over gRPC on; an error goes back with its status."""
        import grpc

        if self._channel is None:
            size = ("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)
            self._channel = grpc.aio.insecure_channel(self._grpc, options=size)
        metadata = [
            (name, value)
            for name, value in context.invocation_metadata()
            if name not in _RAYS and not name.startswith(("grpc-", ":"))
        ]
        send = self._channel.unary_unary(f"/{SERVICE}/{method}")
        try:
            return Message(await send(message, metadata=metadata, timeout=_LONGEST_S))
        except grpc.aio.AioRpcError as error:
            context.set_code(error.code())
            context.set_details(error.details() or "")
            raise

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
        if self._channel is not None:
            await self._channel.close()

    def _client(self) -> Any:
        import aiohttp

        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                auto_decompress=False,
                skip_auto_headers=("Accept-Encoding", "User-Agent", "Content-Type"),
                timeout=aiohttp.ClientTimeout(total=_LONGEST_S),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session

    def _url(self, path: str, query: str) -> Any:
        from yarl import URL

        return URL(self._http + path + (f"?{query}" if query else ""), encoded=True)


def add_servicer(servicer: Any, server: Any) -> None:
    """Add the protocol's methods to Ray's gRPC proxy, which replaces what they do: messages stay bytes."""
    import grpc

    def unused(request: bytes, context: Any) -> bytes:
        raise NotImplementedError

    handlers = {method: grpc.unary_unary_rpc_method_handler(unused) for method in METHODS}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
