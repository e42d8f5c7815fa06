"""The client: requests onto connections and answers off them, on one event loop. Runs in the generator's process.

A connection carries one request at a time, as HTTP/1.1 without pipelining does; the pool grows when a request finds
no free connection. What is timed is taken from `time.monotonic` around the calls themselves, never from the loop's
clock, which stands still while the loop works.
"""

from __future__ import annotations

import asyncio
import gc
import time
from array import array
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from rushhour.errors import LoadError, WireError
from rushhour.load.alarm import Alarm
from rushhour.load.canary import Canary
from rushhour.load.connection import Connection, KnownHead
from rushhour.load.job import ClosedJob, Job, OpenJob, Tick
from rushhour.load.samples import Samples, Status
from rushhour.wire import decode_answer

_NAN = float("nan")
_SHED = (429, 503)
_REJECTED = (400, 404, 405, 411, 413, 415, 422)
"""The server says that the request itself is wrong: with the first answer there is nothing to measure."""

_START_DELAY_S = 0.02
_SWEEP_S = 0.05
_TICK_S = 0.25
_PREOPENED = 128
_AT_ONCE = 32
"""Requests taken up before the loop may look at answers again: a generator that was held up catches up in small
steps, so that it does not read answers late as well."""
_OPENING = 64
"""Connections being opened at the same time; a kernel's queue of them is short."""
_LENGTHS = 64
"""Distinct lengths of answers that are each looked into once. A server with more of them writes numbers as text."""


async def run(job: OpenJob | ClosedJob, canary: Canary, on_tick: Callable[[Tick], None]) -> Samples:
    """Do what `job` says, and say four times a second how it stands.

    Raises:
        LoadError: if the server cannot be reached at the start, rejects the requests, or answers with something
            that is not an answer.
    """
    load = _OpenLoop(job, canary, on_tick) if isinstance(job, OpenJob) else _ClosedLoop(job, canary, on_tick)
    gc.collect()
    gc.disable()  # a collection in the middle of a run would be a stall of the generator's own making
    try:
        return await load.go()
    finally:
        gc.enable()


class _Load:
    """What both loops share: the pool of connections and the book of what happened."""

    def __init__(self, job: Job, canary: Canary, on_tick: Callable[[Tick], None]) -> None:
        self._job = job
        self._canary = canary
        self._on_tick = on_tick
        self._loop = asyncio.get_running_loop()
        self._finished: asyncio.Future[None] = self._loop.create_future()
        self._connections: set[Connection] = set()
        self._idle: list[Connection] = []  # last in, first out, so that as few as will do stay busy
        self._waiting: deque[int] = deque()  # taken up, without a connection yet; oldest first
        self._opening: set[asyncio.Task[None]] = set()
        self._most_connections = 0
        self._starved = 0
        self._known = KnownHead()
        self._valid: set[tuple[int, int | None]] = set()
        self._any_answer = False
        self._first_error = ""
        self._start = 0.0
        self._scheduled = array("d")
        self._taken = array("d")
        self._sent = array("d")
        self._done = array("d")
        self._status = bytearray()
        self._issued = 0
        self._ended = 0
        self._late = 0
        self._shed = 0
        self._errors = 0
        self._measured_from = self._measured_to = 0.0
        self._cpu_from = self._cpu_to = 0.0
        self._warmup = 0

    def opened(self, connection: Connection) -> None:
        """A connection stands."""
        self._connections.add(connection)
        self._most_connections = max(self._most_connections, len(self._connections))

    def answered(self, index: int, body: bytes) -> None:
        """A 200 that is an answer."""
        now = self._done[index] = time.monotonic() - self._start
        self._any_answer = True
        expected = self._job.expected
        if expected and body != expected[index % len(expected)]:
            self._note("an answer is not the one expected")
            self._end(index, Status.ERROR)
            return
        if now - self._scheduled[index] > self._job.limit_s:
            self._late += 1
        self._end(index, Status.OK)

    def turned_down(self, index: int, status: int, body: bytes) -> None:
        """Any other status."""
        self._done[index] = time.monotonic() - self._start
        if status in _SHED:
            self._end(index, Status.SHED)
            return
        said = _in_words(body)
        if status in _REJECTED and not self._any_answer:
            self._fail(
                LoadError(
                    f"the server rejects the request with status {status}",
                    said or "it does not say why",
                    "check the model's name and the shape and type of the samples",
                )
            )
        self._note(f"status {status}" + (f" ({said})" if said else ""))
        self._end(index, Status.ERROR)

    def garbled(self, index: int, what: str, why: str) -> None:
        """Bytes that are no answer. As the first thing a server says they end the run, later they are errors."""
        self._done[index] = time.monotonic() - self._start
        if not self._any_answer:
            self._fail(LoadError(what, why, "check the URL and the server"))
        self._note(f"{what}: {why}")
        self._end(index, Status.ERROR)

    def fault_of(self, body: bytes, header_length: int | None) -> str:
        """Why a body is not what was asked for, or nothing. Each length is looked into once: answers to requests
        of one shape that have one length have one form."""
        key = (len(body), header_length)
        if not self._job.outputs or key in self._valid or len(self._valid) >= _LENGTHS:
            return ""
        try:
            outputs = decode_answer(body, header_length)
        except (WireError, RecursionError) as error:
            return getattr(error, "why", str(error))
        missing = [name for name in self._job.outputs if name not in outputs]
        if missing:
            return f"it has no output {missing[0]!r}"
        self._valid.add(key)
        return ""

    def closed(self, connection: Connection, why: str) -> None:
        """A connection is gone, by either side's doing."""
        self._connections.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if connection.index >= 0:
            self._lose(connection.index, why)
            connection.index = -1
        self._grow()

    def _take(self, index: int) -> None:
        """A request is due: send it on a free connection, or let it wait for one."""
        self._taken[index] = time.monotonic() - self._start
        self._issued += 1
        if self._idle:
            self._send(self._idle.pop(), index)
            return
        self._waiting.append(index)
        self._grow()
        if index >= self._warmup and len(self._connections) + len(self._opening) >= self._job.max_connections:
            self._starved += 1

    def _send(self, connection: Connection, index: int) -> None:
        requests = self._job.requests
        connection.send(index, requests[index % len(requests)])
        self._sent[index] = time.monotonic() - self._start

    def _end(self, index: int, status: Status) -> None:
        self._status[index] = status
        self._ended += 1
        if status is not Status.OK:
            self._late += 1
            if status is Status.SHED:
                self._shed += 1
            else:
                self._errors += 1
        self._finish_if_over()

    def _finish_if_over(self) -> None:
        if self._ended == self._issued and self._all_issued() and not self._finished.done():
            self._finished.set_result(None)

    def _lose(self, index: int, why: str) -> None:
        self._note(why)
        self._end(index, Status.LOST)

    def _note(self, error: str) -> None:
        if not self._first_error:
            self._first_error = error

    def _fail(self, error: BaseException) -> None:
        if not self._finished.done():
            self._finished.set_exception(error)

    def _all_issued(self) -> bool:
        raise NotImplementedError

    def free(self, connection: Connection) -> None:
        """A connection can carry the next request."""
        if not connection.usable:
            return
        if self._waiting:
            self._send(connection, self._waiting.popleft())
        else:
            self._idle.append(connection)

    def _grow(self) -> None:
        """Open connections for the requests that wait, within the bounds."""
        if self._finished.done():
            return
        while (
            len(self._opening) < min(len(self._waiting), _OPENING)
            and len(self._connections) + len(self._opening) < self._job.max_connections
        ):
            task = self._loop.create_task(self._open())
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _open(self) -> None:
        try:
            self.free(await self._connect())
        except OSError as error:
            self._refused(f"cannot connect ({error.strerror or error})")

    async def _connect(self) -> Connection:
        _, connection = await self._loop.create_connection(
            lambda: Connection(self, self._known), self._job.host, self._job.port
        )
        return connection

    def _refused(self, why: str) -> None:
        """A user who cannot connect has an error. With no connection left, so have all who wait."""
        losing = len(self._waiting) if not self._connections else min(1, len(self._waiting))
        for _ in range(losing):
            self._lose(self._waiting.popleft(), why)

    async def _open_first(self, count: int) -> None:
        """Open `count` connections before the schedule begins.

        Raises:
            LoadError: if there is no server.
        """
        for done in range(count):
            try:
                async with asyncio.timeout(self._job.timeout_s):
                    self._idle.append(await self._connect())
            except (OSError, TimeoutError) as error:
                if done:  # it takes some: how many it takes when they are needed is part of what is measured
                    return
                raise LoadError(
                    f"cannot connect to {self._job.host}:{self._job.port}",
                    getattr(error, "strerror", None) or str(error) or f"no answer within {self._job.timeout_s:g} s",
                    "check the URL, and that the server is running",
                ) from error

    def _sweep(self) -> None:
        """Give up on what has been under way for too long."""
        before = time.monotonic() - self._start - self._job.timeout_s
        why = f"no answer within {self._job.timeout_s:g} s"
        while self._waiting and self._scheduled[self._waiting[0]] < before:
            self._lose(self._waiting.popleft(), why)
        for connection in list(self._connections):
            if connection.index >= 0 and self._scheduled[connection.index] < before:
                self._lose(connection.index, why)
                connection.abort()

    async def go(self) -> Samples:
        """Run, and return what happened."""
        self._loop.set_exception_handler(self._on_error)
        noise = (0.0, 0.0, 0.0)
        try:
            await self._prepare()
            housekeeping = self._loop.create_task(self._keep_house())
            try:
                await self._finished
            finally:
                housekeeping.cancel()
            self._tick()
        finally:
            self._finished.cancel()
            self._close()
            for task in self._opening:
                task.cancel()
            for connection in list(self._connections):
                connection.abort()
            if self._measured_from:
                self._end_measuring()
                noise = self._canary.result()
            await asyncio.sleep(0)  # what was cancelled ends here, not in the next run
        return self._samples(*noise)

    def _on_error(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """What the loop caught: the network's doing ends in `connection_lost`, all else is a fault of this program."""
        error = context.get("exception") or RuntimeError(str(context.get("message")))
        if not isinstance(error, OSError):
            self._fail(error)

    async def _prepare(self) -> None:
        raise NotImplementedError

    def _close(self) -> None:
        """Whatever a loop has to release."""

    def _begin_measuring(self) -> None:
        self._canary.start()
        self._measured_from, self._cpu_from = time.monotonic(), time.process_time()

    def _end_measuring(self) -> None:
        if not self._measured_to:
            self._measured_to, self._cpu_to = time.monotonic(), time.process_time()
            self._canary.stop()

    async def _keep_house(self) -> None:
        ticked = time.monotonic()
        while True:
            await asyncio.sleep(_SWEEP_S)
            self._sweep()
            if time.monotonic() - ticked >= _TICK_S:
                ticked = time.monotonic()
                self._tick()

    def _tick(self) -> None:
        self._on_tick(
            Tick(
                at_s=max(0.0, time.monotonic() - self._start),
                sent=self._issued,
                ended=self._ended,
                late=self._late,
                shed=self._shed,
                errors=self._errors,
            )
        )

    def _samples(self, overshoot_s: float, canary_cpu_s: float, steal: float) -> Samples:
        wall = max(1e-9, self._measured_to - self._measured_from)
        return Samples(
            scheduled=np.array(self._scheduled),
            taken=np.array(self._taken),
            sent=np.array(self._sent),
            done=np.array(self._done),
            status=np.frombuffer(bytes(self._status), np.uint8),
            warmup=self._warmup,
            generator_cpu=(self._cpu_to - self._cpu_from + canary_cpu_s) / wall,
            canary_p99_s=overshoot_s,
            steal=steal,
            connections=self._most_connections,
            starved=self._starved,
            timeout_s=self._job.timeout_s,
            first_error=self._first_error,
        )


class _OpenLoop(_Load):
    """Requests go out when they are due. An alarm rings at the next due time, but not more often than the quantum.

    The quantum, a hundredth of the limit and at most 0.2 ms, is what bounds the cost of ringing at high rates: all
    that has become due in the meantime goes out at one ring.
    """

    def __init__(self, job: OpenJob, canary: Canary, on_tick: Callable[[Tick], None]) -> None:
        super().__init__(job, canary, on_tick)
        self._scheduled = array("d", job.schedule)
        self._n = n = len(self._scheduled)
        blank = [_NAN] * n
        self._taken, self._sent, self._done = array("d", blank), array("d", blank), array("d", blank)
        self._status = bytearray(n)
        self._warmup = job.warmup
        self._quantum = min(2e-4, 0.01 * job.limit_s)
        self._next = 0
        self._alarm = Alarm(self._loop, self._ring)

    def _all_issued(self) -> bool:
        return self._next == self._n

    async def _prepare(self) -> None:
        rate = self._n / max(self._scheduled[-1], 1e-9)
        wanted = 1 + int(rate * self._job.limit_s)  # Little's law: so many are under way when all take the limit
        await self._open_first(min(wanted, _PREOPENED, self._job.max_connections))
        self._start = time.monotonic() + _START_DELAY_S
        self._alarm.set(self._start + self._scheduled[0])

    def _ring(self) -> None:
        scheduled, index = self._scheduled, self._next
        last = min(self._n, index + _AT_ONCE)
        now = time.monotonic() - self._start
        while index < last and scheduled[index] <= now:
            if index == self._warmup:
                self._begin_measuring()
            self._next = index + 1
            self._take(index)
            index += 1
        if index == self._n:
            self._end_measuring()
        elif index == last:
            self._alarm.set(0.0)
        else:
            self._alarm.set(self._start + max(scheduled[index], now + self._quantum))

    def _close(self) -> None:
        self._alarm.close()


class _ClosedLoop(_Load):
    """Each of `concurrency` users sends the next request when the last is answered, until the time is over."""

    def __init__(self, job: ClosedJob, canary: Canary, on_tick: Callable[[Tick], None]) -> None:
        super().__init__(job, canary, on_tick)
        self._concurrency = job.concurrency
        self._duration_s = job.duration_s
        self._over = False

    def _all_issued(self) -> bool:
        return self._over

    async def _prepare(self) -> None:
        await self._open_first(min(self._concurrency, self._job.max_connections))
        self._start = time.monotonic()
        self._begin_measuring()
        for _ in range(self._concurrency):
            self._issue()

    def _issue(self) -> None:
        now = time.monotonic() - self._start
        if self._finished.done():
            return
        if now >= self._duration_s:
            self._over = True
            self._finish_if_over()
            return
        index = len(self._scheduled)
        self._scheduled.append(now)
        self._taken.append(_NAN)
        self._sent.append(_NAN)
        self._done.append(_NAN)
        self._status.append(Status.UNANSWERED)
        self._take(index)

    def _end(self, index: int, status: Status) -> None:
        super()._end(index, status)
        self._loop.call_soon(self._issue)  # soon, because the connection is not free yet


def _in_words(body: bytes) -> str:
    """A server's error message: the field `error` of its JSON, or the start of the text."""
    try:
        error = msgspec.json.decode(body, type=dict[str, object]).get("error", "")
        return str(error)[:200]
    except msgspec.DecodeError:
        return body[:200].decode("utf-8", "replace")
