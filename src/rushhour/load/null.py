"""The null server: answers everything at once. What a generator gets out of it is the generator's own bound.

Its process (`main`, arguments SIZE [CORE ...]) answers with bodies of SIZE bytes, says its port on standard output,
and ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import cast

import numpy as np
import uvloop

from rushhour.errors import LoadError
from rushhour.load.generator import Generator
from rushhour.load.job import ClosedJob
from rushhour.load.samples import Status

_CONCURRENCY = 64
_SECONDS, _SETTLED_S = 1.0, 0.2
_ANSWER_BYTES = 64
_LENGTH = re.compile(rb"content-length:[ ]*(\d+)", re.IGNORECASE)

_known: dict[int, float] = {}


@contextlib.contextmanager
def null_server(cores: Collection[int] | None = None, answer_bytes: int = _ANSWER_BYTES) -> Iterator[int]:
    """A null server in a process of its own, as a context; gives its port on 127.0.0.1.

    Args:
        cores: to pin it to; None leaves that to the kernel.
        answer_bytes: length of the body of every answer.

    Raises:
        LoadError: if it does not start.
    """
    pinned = [str(core) for core in cores or ()]
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", "from rushhour.load.null import main; main()", str(answer_bytes), *pinned],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        said = process.stdout.readline()
        if not said:
            raise LoadError("the null server does not start", f"it ended with {process.wait()}", "run it by hand")
        yield int(said)
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


def null_throughput(generator: Generator, requests: Sequence[bytes]) -> float:
    """What the generator gets out of a server that does nothing, in requests per second.

    Measured once for each size of request, in a second, and kept as long as this process lives: on file it would
    outlive what may have disturbed it.

    Args:
        generator: that sends.
        requests: that it is going to send.

    Raises:
        LoadError: if the generator is gone.
    """
    size = max(map(len, requests)).bit_length()
    if size not in _known:
        with null_server() as port:
            job = ClosedJob(
                host="127.0.0.1",
                port=port,
                requests=tuple(requests),
                limit_s=_SECONDS,
                timeout_s=10.0,
                concurrency=_CONCURRENCY,
                duration_s=_SECONDS,
            )
            samples = generator.run(job)
        done = samples.done[samples.status == Status.OK]
        settled = np.count_nonzero((done >= _SETTLED_S) & (done <= _SECONDS))
        _known[size] = float(settled) / (_SECONDS - _SETTLED_S)
    return _known[size]


class _Null(asyncio.Protocol):
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


async def _serve(answer_bytes: int) -> None:
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    answer = f"HTTP/1.1 200 OK\r\nContent-Length: {answer_bytes}\r\n\r\n".encode() + bytes(answer_bytes)
    server = await loop.create_server(lambda: _Null(answer), "127.0.0.1", 0, backlog=1024)
    loop.add_reader(sys.stdin.fileno(), over.set)
    print(server.sockets[0].getsockname()[1], flush=True)
    await over.wait()


def main() -> None:
    """Serve until standard input ends."""
    if cores := set(map(int, sys.argv[2:])):
        os.sched_setaffinity(0, cores)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(int(sys.argv[1])))
