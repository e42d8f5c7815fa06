"""A small Open Inference Protocol server in a process of its own that misbehaves as it is told to.

It answers requests one after the other, `service_s` each, like a model that runs one at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httptools

OUTPUT = b'{"name":"y","datatype":"FP32","shape":[1,2],"parameters":{"binary_data_size":8}}'
HEADER = b'{"model_name":"tiny","outputs":[' + OUTPUT + b"]}"
BODY = HEADER + struct.pack("<2f", 1.0, 0.5)
METADATA = {
    "name": "tiny",
    "versions": ["1"],
    "platform": "test",
    "inputs": [{"name": "x", "datatype": "UINT8", "shape": [-1, 4, 4, 1]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 2]}],
}


@dataclasses.dataclass
class Behaviour:
    """How the server misbehaves; numbers count inference requests from 1."""

    service_s: float = 0.0
    stall_at: int = 0
    stall_s: float = 0.0
    shed_every: int = 0
    fail_every: int = 0
    reject: bool = False
    garbage_from: int = 0
    not_http: bool = False
    wrong_output: bool = False
    change_from: int = 0
    change_by: float = 0.0
    close_from: int = 0
    hang_from: int = 0
    keep_alive: bool = True
    in_pieces: bool = False
    dated: bool = False
    hang_up: bool = False
    large: int = 0
    models: tuple[str, ...] = ("tiny",)


class State:
    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.count = 0
        self.free_at = 0.0
        self.transports: set[asyncio.Transport] = set()
        self.server: asyncio.Server | None = None


class Connection(asyncio.Protocol):
    def __init__(self, state: State) -> None:
        self.state = state
        self.parser = httptools.HttpRequestParser(self)
        self.path = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.state.transports.add(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self.state.transports.discard(self.transport)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self.path = url

    def on_message_complete(self) -> None:
        path = self.path.decode()
        if self.state.behaviour.not_http:
            self.transport.write(b"220 mail.example ESMTP ready\r\n")
            self.transport.close()
        elif path == "/v2/repository/index":
            models = [{"name": name, "version": "1", "state": "READY"} for name in self.state.behaviour.models]
            self.reply(200, json.dumps(models).encode())
        elif path == "/v2/models/tiny":
            self.reply(200, json.dumps(METADATA).encode())
        elif path == "/large":
            self.reply(200, bytes(self.state.behaviour.large))
        elif path == "/v2/models/tiny/infer":
            self.infer()
        else:
            self.reply(404, b'{"error":"no such model"}')

    def infer(self) -> None:
        state, behaviour = self.state, self.state.behaviour
        state.count += 1
        number = state.count
        if behaviour.close_from and number >= behaviour.close_from:
            assert state.server is not None
            state.server.close()
            for transport in list(state.transports):
                transport.abort()
            return
        if behaviour.hang_from and number >= behaviour.hang_from:
            return
        if behaviour.reject:
            self.reply(400, b'{"error":"shape [1, 4, 4, 1] is not what I take"}')
        elif behaviour.shed_every and number % behaviour.shed_every == 0:
            self.reply(429, b'{"error":"full"}')
        elif behaviour.fail_every and number % behaviour.fail_every == 0:
            self.reply(500, b'{"error":"out of luck"}')
        elif behaviour.garbage_from and number >= behaviour.garbage_from:
            self.reply(200, b"<html>hello</html>")
        elif behaviour.wrong_output:
            self.reply(200, BODY.replace(b'"y"', b'"z"'), len(HEADER))
        else:
            self.work(number)

    def work(self, number: int) -> None:
        state, behaviour = self.state, self.state.behaviour
        loop = asyncio.get_running_loop()
        state.free_at = max(state.free_at, loop.time()) + behaviour.service_s
        if number == behaviour.stall_at:
            state.free_at += behaviour.stall_s
        body = BODY
        if behaviour.change_from and number >= behaviour.change_from:
            body = HEADER + struct.pack("<2f", 1.0, 0.5 + behaviour.change_by)
        if behaviour.service_s == 0 and state.free_at <= loop.time():
            self.reply(200, body, len(HEADER))
        else:
            loop.call_at(state.free_at, self.reply, 200, body, len(HEADER))

    def reply(self, status: int, body: bytes, header_length: int | None = None) -> None:
        head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n"
        if header_length is not None:
            head += f"Inference-Header-Content-Length: {header_length}\r\n"
        if self.state.behaviour.dated:
            head += f"Date: {self.state.count}\r\n"
        if not self.state.behaviour.keep_alive:
            head += "Connection: close\r\n"
        answer = head.encode() + b"\r\n" + body
        if self.state.behaviour.in_pieces:
            self.transport.write(answer[:50])
            asyncio.get_running_loop().call_later(0.001, self.transport.write, answer[50:])
            return
        self.transport.write(answer)
        if self.state.behaviour.hang_up or not self.state.behaviour.keep_alive:
            self.transport.close()


async def main() -> None:
    settings = json.loads(sys.argv[1])
    state = State(Behaviour(**settings))
    state.server = await asyncio.get_running_loop().create_server(
        lambda: Connection(state), "127.0.0.1", 0, backlog=1024
    )
    print(state.server.sockets[0].getsockname()[1], flush=True)
    await asyncio.Event().wait()


@contextlib.contextmanager
def behaving(**settings: object) -> Iterator[str]:
    """The URL of a server that does what `settings` (fields of `Behaviour`) say."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), json.dumps(settings)], stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


if __name__ == "__main__":
    asyncio.run(main())
