"""Servers that answer as those of other makes do: raw bytes over a socket, and gRPC."""

from __future__ import annotations

import contextlib
import json
import socketserver
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from rushhour.protocol import message

Pieces = Sequence[bytes | float]
"""What is written one after the other; a number is a pause in seconds."""
Answer = Callable[[str, bytes], tuple[Pieces, bool]]
"""From a path and a body: what is written, and whether the connection is closed then."""


class _Connection(socketserver.StreamRequestHandler):
    server: _Server

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            while line := self.rfile.readline():
                length = 0
                while (field := self.rfile.readline().strip().lower()) != b"":
                    if field.startswith(b"content-length:"):
                        length = int(field.partition(b":")[2])
                pieces, is_last = self.server.answer(line.split()[1].decode(), self.rfile.read(length))
                for piece in pieces:
                    if isinstance(piece, float):
                        time.sleep(piece)
                    else:
                        self.wfile.write(piece)
                if is_last:
                    return


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 128
    answer: Answer


@contextlib.contextmanager
def http_peer(answer: Answer) -> Iterator[str]:
    """The URL of a server that answers so."""
    with _Server(("127.0.0.1", 0), _Connection) as server:
        server.answer = answer
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def whole(body: bytes, status: int = 200, head: str = "") -> tuple[Pieces, bool]:
    """An ordinary answer."""
    return [f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{head}\r\n".encode() + body], False


def serving_model(metadata: Any, infer: Callable[[bytes], tuple[Pieces, bool]], model: str = "m") -> Answer:
    """A server of one model, whose metadata is sent as it is; `infer` answers a request's body."""

    def answer(path: str, body: bytes) -> tuple[Pieces, bool]:
        if path == f"/v2/models/{model}":
            return whole(json.dumps(metadata).encode())
        if path == f"/v2/models/{model}/infer":
            return infer(body)
        if path == "/v2/repository/index":
            return whole(json.dumps([{"name": model, "version": None, "state": "READY", "reason": None}]).encode())
        if path == "/v2":
            return whole(b'{"name": null, "version": null, "extensions": null}')
        return whole(b'{"detail": "Not Found"}', 404)

    return answer


@contextlib.contextmanager
def grpc_peer(**methods: Callable[[Any], Any]) -> Iterator[str]:
    """The URL of a server that has these methods and no other; a raised `grpc.StatusCode` ends a call."""

    def handler(name: str, method: Callable[[Any], Any]) -> Any:
        def answer(request: Any, context: Any) -> Any:
            try:
                return method(request)
            except Refused as refused:
                context.abort(refused.code, refused.said)

        return grpc.unary_unary_rpc_method_handler(
            answer,
            request_deserializer=message(f"inference.{name}Request").FromString,
            response_serializer=lambda answered: answered.SerializeToString(),
        )

    server = grpc.server(ThreadPoolExecutor(4))
    handlers = {name: handler(name, method) for name, method in methods.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"grpc://127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


class Refused(Exception):
    """Ends a gRPC call with a status."""

    def __init__(self, code: grpc.StatusCode, said: str = "") -> None:
        super().__init__(code)
        self.code, self.said = code, said
