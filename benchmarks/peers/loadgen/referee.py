"""`python referee.py PORT REQUEST RATE N FOLDER`: MLPerf LoadGen's Server scenario against a server; JSON at the end.

REQUEST is a file with a whole HTTP request. LoadGen calls `issue` when a query is due; the request goes out on an
asyncio loop in a thread of its own, and LoadGen is told when its answer is complete.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import threading
from collections import deque
from pathlib import Path
from typing import Any

import mlperf_loadgen as lg

_HEAD_END = b"\r\n\r\n"
_LENGTH = re.compile(rb"content-length:\s*(\d+)", re.IGNORECASE)


class Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._answer = bytearray()
        self.query = 0

    def connection_made(self, transport: Any) -> None:
        """As the loop calls it."""
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        """As the loop calls it."""
        if self.query:
            self._pool.errors += 1
            self._pool.complete(self.query)

    def data_received(self, data: bytes) -> None:
        """As the loop calls it."""
        self._answer += data
        end = self._answer.find(_HEAD_END)
        if end < 0:
            return
        length = _LENGTH.search(self._answer, 0, end)
        if len(self._answer) < end + 4 + int(length[1]):
            return
        if not self._answer.startswith(b"HTTP/1.1 200"):
            self._pool.errors += 1
        self._answer.clear()
        query, self.query = self.query, 0
        self._pool.complete(query)
        self._pool.free(self)


class Pool:
    """Connections that grow with need."""

    def __init__(self, port: int, request: bytes, loop: asyncio.AbstractEventLoop) -> None:
        self._port, self._request, self._loop = port, request, loop
        self._idle: list[Connection] = []
        self._waiting: deque[int] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self.errors = 0

    async def open(self, count: int) -> None:
        """Connections before the first request."""
        for _ in range(count):
            self._idle.append(await self._connect())

    def send(self, query: int) -> None:
        """On the loop."""
        if not self._idle:
            self._waiting.append(query)
            task = self._loop.create_task(self._grow())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return
        connection = self._idle.pop()
        connection.query = query
        connection.transport.write(self._request)

    def free(self, connection: Connection) -> None:
        """It can carry the next."""
        self._idle.append(connection)
        if self._waiting:
            self.send(self._waiting.popleft())

    def complete(self, query: int) -> None:
        """Tell LoadGen."""
        lg.QuerySamplesComplete([lg.QuerySampleResponse(query, 0, 0)])

    async def _grow(self) -> None:
        self.free(await self._connect())

    async def _connect(self) -> Connection:
        _, connection = await self._loop.create_connection(lambda: Connection(self), "127.0.0.1", self._port)
        return connection


def main() -> None:
    """Run the test and say what LoadGen found."""
    port, file, rate, n, folder = int(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    pool = Pool(port, file.read_bytes(), loop)
    asyncio.run_coroutine_threadsafe(pool.open(32), loop).result()

    def issue(queries: list[Any]) -> None:
        for query in queries:
            loop.call_soon_threadsafe(pool.send, query.id)

    settings = lg.TestSettings()
    settings.scenario = lg.TestScenario.Server
    settings.mode = lg.TestMode.PerformanceOnly
    settings.server_target_qps = rate
    settings.server_target_latency_ns = 10**10
    settings.server_target_latency_percentile = 0.99
    settings.min_query_count = settings.max_query_count = n
    settings.min_duration_ms = 0
    log = lg.LogSettings()
    log.log_output.outdir = folder
    log.log_output.copy_summary_to_stdout = False
    log.enable_trace = False
    system = lg.ConstructSUT(issue, lambda: None)
    samples = lg.ConstructQSL(32, 32, lambda indices: None, lambda indices: None)
    lg.StartTestWithLogSettings(system, samples, settings, log)
    lg.DestroyQSL(samples)
    lg.DestroySUT(system)
    summary = (Path(folder) / "mlperf_log_summary.txt").read_text()
    p99 = re.search(r"99\.00 percentile latency \(ns\)\s*:\s*(\d+)", summary)
    if p99 is None:
        raise SystemExit(f"LoadGen gave no percentile: {summary[-300:]}")
    print(json.dumps({"p99_ms": int(p99[1]) / 1e6, "errors": pool.errors}))


if __name__ == "__main__":
    main()
