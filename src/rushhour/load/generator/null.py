"""The null server: answers every request at once, without computing. Its throughput is the bound of the generator.

Its process (`main`, arguments PROTOCOL SIZE [CORE ...]) answers HTTP or gRPC with bodies of SIZE bytes, prints its port
on standard output, and ends when its standard input is closed. For gRPC it implements the part of HTTP/2 (RFC 9113)
that this takes: a server made of grpcio would be slower than the generator.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import struct
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import cast

import numpy as np
import uvloop

from rushhour.errors import LoadError
from rushhour.load.generator.job import ClosedJob, Protocol
from rushhour.load.generator.process import Generator
from rushhour.load.generator.samples import Status

_CONCURRENCY = 64
_SECONDS, _SETTLED_S = 1.0, 0.2
_ANSWER_BYTES = 64
_LENGTH = re.compile(rb"content-length:[ ]*(\d+)", re.IGNORECASE)

_measured: dict[tuple[Protocol, int], float] = {}


@contextlib.contextmanager
def null_server(
    cores: Collection[int] | None = None, answer_bytes: int = _ANSWER_BYTES, protocol: Protocol = "http"
) -> Iterator[int]:
    """A null server in a process of its own, as a context; gives its port on 127.0.0.1.

    Args:
        cores: to pin it to; None leaves that to the kernel.
        answer_bytes: length of the body of every answer, over gRPC of the message.
        protocol: of its port.

    Raises:
        LoadError: if it does not start.
    """
    arguments = [protocol, str(answer_bytes), *(str(core) for core in cores or ())]
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", "from rushhour.load.generator.null import main; main()", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise LoadError(
                "the null server does not start",
                f"its process ended with code {process.wait()}",
                "run the command again",
            )
        yield int(line)
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


def null_throughput(generator: Generator, requests: Sequence[bytes], protocol: Protocol = "http") -> float:
    """The generator's throughput against the null server, in requests per second.

    Measured once for each protocol and size of request, for a second, and kept as long as this process lives. It is not
    kept in a file: a disturbed measurement would be used again and again.

    Args:
        generator: to measure.
        requests: that it is going to send.
        protocol: of the requests.

    Raises:
        LoadError: if the generator is gone.
    """
    key = protocol, max(map(len, requests)).bit_length()
    if key not in _measured:
        with null_server(protocol=protocol) as port:
            job = ClosedJob(
                host="127.0.0.1",
                port=port,
                requests=tuple(requests),
                limit_s=_SECONDS,
                timeout_s=10.0,
                concurrency=_CONCURRENCY,
                duration_s=_SECONDS,
                protocol=protocol,
            )
            samples = generator.run(job)
        done = samples.done[samples.status == Status.OK]
        settled = np.count_nonzero((done >= _SETTLED_S) & (done <= _SECONDS))
        _measured[key] = float(settled) / (_SECONDS - _SETTLED_S)
    return _measured[key]


class _NullHttp(asyncio.Protocol):
    """One connection. A client sends the next request when the last is answered."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._missing = 0
        self._head = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        if self._missing:
            self._missing -= len(data)
        else:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            length = _LENGTH.search(self._head, 0, end)
            self._missing = end + 4 + (int(length[1]) if length else 0) - len(self._head)
            self._head = b""
        if self._missing <= 0:
            self._missing = 0
            self._transport.write(self._answer)


_FRAME = struct.Struct(">HBBBI")
"""The head of a frame of HTTP/2: its length in three bytes, type, flags, stream."""
_DATA, _HEADERS, _SETTINGS, _PING, _WINDOW_UPDATE = 0, 1, 4, 6, 8
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4
_PREFACE_BYTES = len(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
_INITIAL_WINDOW_SIZE, _LARGEST_WINDOW, _USUAL_WINDOW = 4, 2**31 - 1, 2**16 - 1
# HPACK (RFC 7541): `:status: 200` is entry 8 of the static table, `content-type` the name of entry 31; the rest is
# literal. Nothing enters the dynamic table, so that all answers have the same bytes.
_GOOD = b"\x88\x0f\x10\x10application/grpc"
_TRAILERS = b"\x00\x0bgrpc-status\x010"


def _frame(kind: int, flags: int, stream: int, content: bytes) -> bytes:
    return _FRAME.pack(len(content) >> 8, len(content) & 255, kind, flags, stream) + content


class _NullGrpc(asyncio.Protocol):
    """One connection, on which a client may have any number of calls in flight."""

    def __init__(self, answer: bytes) -> None:
        message = b"\x00" + len(answer).to_bytes(4, "big") + answer
        self._parts = (
            _frame(_HEADERS, _END_HEADERS, 0, _GOOD),
            _frame(_DATA, 0, 0, message),
            _frame(_HEADERS, _END_HEADERS | _END_STREAM, 0, _TRAILERS),
        )
        self._unread = bytearray()
        self._at = _PREFACE_BYTES
        self._taken = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        settings = struct.pack(">HI", _INITIAL_WINDOW_SIZE, _LARGEST_WINDOW)
        self._transport.write(_frame(_SETTINGS, 0, 0, settings) + self._window_update(_LARGEST_WINDOW - _USUAL_WINDOW))

    def _window_update(self, by: int) -> bytes:
        """A frame that grants the client this many bytes more on the connection."""
        return _frame(_WINDOW_UPDATE, 0, 0, by.to_bytes(4, "big"))

    def data_received(self, data: bytes) -> None:
        unread, at, replies = self._unread, self._at, []
        unread += data
        while len(unread) >= at + _FRAME.size:
            high, low, kind, flags, stream = _FRAME.unpack_from(unread, at)
            end = at + _FRAME.size + (high << 8 | low)
            if len(unread) < end:
                break
            if kind in (_DATA, _HEADERS) and flags & _END_STREAM:
                replies += [part[:5] + stream.to_bytes(4, "big") + part[9:] for part in self._parts]
            if kind == _DATA:
                self._taken += end - at - _FRAME.size
            elif kind in (_SETTINGS, _PING) and not flags & _ACK:
                replies.append(_frame(kind, _ACK, 0, bytes(unread[at + _FRAME.size : end]) if kind == _PING else b""))
            at = end
        if self._taken > _LARGEST_WINDOW // 2:
            replies.append(self._window_update(self._taken))
            self._taken = 0
        if at <= len(unread):  # else the preface is not complete
            del unread[:at]
            at = 0
        self._at = at
        if replies:
            self._transport.write(b"".join(replies))


async def _serve(protocol: str, answer_bytes: int) -> None:
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    body = bytes(answer_bytes)
    whole = f"HTTP/1.1 200 OK\r\nContent-Length: {answer_bytes}\r\n\r\n".encode() + body
    server = await loop.create_server(
        lambda: _NullGrpc(body) if protocol == "grpc" else _NullHttp(whole), "127.0.0.1", 0, backlog=1024
    )
    loop.add_reader(sys.stdin.fileno(), over.set)
    print(server.sockets[0].getsockname()[1], flush=True)
    await over.wait()


def main() -> None:
    """Serve until standard input ends."""
    if cores := set(map(int, sys.argv[3:])):
        os.sched_setaffinity(0, cores)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(sys.argv[1], int(sys.argv[2])))
