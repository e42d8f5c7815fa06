"""The client: it sends requests on schedule and records what became of each, in the generator's process.

How requests reach the server, and how the client waits, is the task of a `Transport`: `pool.py` for HTTP, `grpc.py` for
gRPC. Times come from `time.monotonic` around the calls themselves, and from the kernel's receive timestamps; never from
an event loop's clock, which stands still while the loop works.
"""

from __future__ import annotations

import asyncio
import gc
import math
from array import array
from collections import Counter, deque
from collections.abc import Callable
from time import monotonic, process_time
from typing import Any

import msgspec
import numpy as np

from rushhour.errors import LoadError
from rushhour.load.generator.answers import AnswerCheck
from rushhour.load.generator.canary import Canary
from rushhour.load.generator.job import ClosedJob, Job, OpenJob, Tick
from rushhour.load.generator.pool import HttpTransport
from rushhour.load.generator.samples import Samples, Status
from rushhour.load.generator.transport import Transport
from rushhour.wire import decode_answer

_NAN = float("nan")
_SHED = (429, 503)
_REDIRECTED = (301, 302, 303, 307, 308)
_DENIED = (401, 403)
_REJECTED = (400, *_DENIED, 404, 405, 411, 413, 415, 422, *_REDIRECTED)
"""Statuses for a request that is itself wrong: as the first answer, they end the run."""

_START_DELAY_S = 0.02
_EXPIRE_S = 0.05
_TICK_S = 0.2
_LONGEST_REASON = 300
_RECENT = 4096
"""Latest requests in the live percentiles; more would cost time that the sending needs."""
_STOP_GRACE_S = 1.0
_PREOPENED = 128
_AT_ONCE = 32
"""Requests sent before answers are read again: a generator that was delayed catches up in small steps, so that it does
not read answers late as well."""
_PAUSE_S = 0.05
"""How long a user of a closed loop waits after an answer 429 or 503."""


async def run(
    job: OpenJob | ClosedJob, canary: Canary, on_tick: Callable[[Tick], None], stop: asyncio.Event
) -> Samples:
    """Run a job, and report its state five times a second.

    Once `stop` is set no request is sent any more; those in flight are awaited for up to twice the limit, at least a
    second, and what was measured until then is the result.

    Raises:
        LoadError: if the server cannot be reached at the start, rejects the requests, or answers with something
            that is not an answer; or if it was stopped before anything was measured.
    """
    loop = _OpenLoop(job, canary, on_tick) if isinstance(job, OpenJob) else _ClosedLoop(job, canary, on_tick)
    gc.collect()
    gc.disable()  # a collection in the middle of a run would delay requests
    try:
        return await loop.run(stop)
    finally:
        gc.enable()


class _Loop:
    """What open and closed loop share: the recorder, and the beginning and end of a run."""

    _prompt = False
    """Whether answers are read as soon as they arrive, because the next request waits for them."""

    def __init__(self, job: Job, canary: Canary, on_tick: Callable[[Tick], None]) -> None:
        self._job = job
        self._canary = canary
        self._on_tick = on_tick
        self._loop = asyncio.get_running_loop()
        self._finished: asyncio.Future[None] = self._loop.create_future()
        self._transport: Transport
        if job.protocol == "grpc":
            from rushhour.load.generator.grpc import GrpcTransport  # grpcio takes a quarter of a second to import
            from rushhour.load.generator.grpc_codec import decode_grpc_answer

            self._transport, answers = GrpcTransport(job, self), AnswerCheck(job, decode_grpc_answer)
        else:
            self._transport, answers = HttpTransport(job, self), AnswerCheck(job, decode_answer)
        self._send = self._transport.send
        self.fault_of = answers.fault_of
        self._deviation = answers.deviation
        self._limit_s = job.limit_s
        self._distinct = len(job.requests)
        self._check = job.check or bool(job.expected)
        self._any_answer = False
        self._first_error = ""
        self._kinds: Counter[str] = Counter()
        self._starved = 0
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
        self._stopped = False

    def sent(self, index: int) -> None:
        """See `Recorder`."""
        self._sent[index] = monotonic() - self._start

    def answered(self, index: int, body: bytes, header_length: int | None, at: float) -> None:
        """See `Recorder`."""
        done = at - self._start
        if done < self._sent[index]:  # it arrived before the sending was recorded
            done = self._sent[index]
        self._done[index] = done
        self._any_answer = True
        if self._check and (wrong := self._deviation(index % self._distinct, body, header_length)):
            self._note(f"an answer {wrong}")
            self._end(index, Status.ERROR, "mismatch")
            return
        if done - self._scheduled[index] > self._limit_s:
            self._late += 1
        self._status[index] = Status.OK
        self._ended += 1
        if self._ended == self._issued:
            self._finish_if_over()

    def error_status(self, index: int, status: int, body: bytes, at: float) -> None:
        """See `Recorder`."""
        self._done[index] = max(at - self._start, self._sent[index])
        if status in _SHED:
            self._end(index, Status.SHED)
            return
        message = _error_message(body)
        if status in _REJECTED and not self._any_answer:
            self._fail(
                LoadError(
                    f"the server rejects the request with status {status}",
                    message or "it gives no reason",
                    _remedy(status),
                )
            )
        self._note(f"status {status}" + (f" ({message})" if message else ""))
        self._end(index, Status.ERROR, f"status {status}")

    def malformed(self, index: int, what: str, why: str, at: float) -> None:
        """See `Recorder`. As the first answer they end the run, later they count as errors."""
        why = why[:_LONGEST_REASON]  # it may repeat what the server sent
        self._done[index] = max(at - self._start, self._sent[index])
        if not self._any_answer:
            self._fail(LoadError(what, why, "check the URL and the server"))
        self._note(f"{what}: {why}")
        self._end(index, Status.ERROR, "not an answer")

    def lost(self, index: int, kind: str, why: str) -> None:
        """See `Recorder`."""
        self._note(why)
        self._end(index, Status.LOST, kind)

    def starved(self, index: int) -> None:
        """See `Recorder`."""
        if index >= self._warmup:
            self._starved += 1

    def _end(self, index: int, status: Status, kind: str = "") -> None:
        """Record a request that was not answered well."""
        self._status[index] = status
        self._ended += 1
        self._late += 1
        if status is Status.SHED:
            self._shed += 1
        else:
            self._errors += 1
            if index >= self._warmup:
                self._kinds[kind] += 1
        if self._ended == self._issued:
            self._finish_if_over()

    def _finish_if_over(self) -> None:
        if self._ended == self._issued and self._all_issued() and not self._finished.done():
            self._finished.set_result(None)

    def _note(self, error: str) -> None:
        if not self._first_error:
            self._first_error = error

    def _fail(self, error: BaseException) -> None:
        if not self._finished.done():
            self._finished.set_exception(error)

    def _all_issued(self) -> bool:
        raise NotImplementedError

    def _expire(self) -> None:
        """Give up requests that are in flight for longer than the time-out."""
        before = monotonic() - self._start - self._job.timeout_s
        scheduled = self._scheduled
        why = f"no answer within {self._job.timeout_s:g} s"
        self._transport.expire(lambda index: scheduled[index] < before, "time-out", why)

    async def run(self, stop: asyncio.Event) -> Samples:
        """See `run`."""
        self._loop.set_exception_handler(self._on_error)
        noise = (0.0, 0.0, 0.0)
        stopping: asyncio.Task[None] | None = None
        try:
            await self._prepare()
            stopping = self._loop.create_task(self._stop_on(stop))
            await self._drive()
            await self._finished
            self._tick()
        finally:
            self._finished.cancel()
            if stopping is not None:
                stopping.cancel()
            await self._transport.close()
            await asyncio.sleep(0)  # cancelled tasks end here, not in the next run
            if self._measured_from:
                self._end_measuring()
                noise = self._canary.result()
        if self._stopped and self._issued <= self._warmup:
            raise LoadError("the load was stopped before anything was measured", "", "run it for longer")
        return self._samples(*noise)

    async def _drive(self) -> None:
        """Send requests that are due and read answers, in turns, until all requests have ended."""
        wait, finished = self._transport.wait, self._finished
        expired = ticked = monotonic()
        while not finished.done():
            due = self._issue_due()
            waiting = wait(min(due, expired + _EXPIRE_S), prompt=self._prompt or due == math.inf)
            if waiting is not None:
                await waiting
            if (now := monotonic()) >= expired + _EXPIRE_S:
                expired = now
                self._expire()
                if now >= ticked + _TICK_S:
                    ticked = now
                    self._tick()
                await asyncio.sleep(0)  # the event loop's turn: the order to stop, the end of the parent

    def _issue_due(self) -> float:
        """Send what is due; when to call again, in seconds of `time.monotonic`: infinity for at the next answer."""
        raise NotImplementedError

    async def _stop_on(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._stopped = True
        self._issue_no_more()
        self._finish_if_over()
        await asyncio.sleep(max(_STOP_GRACE_S, 2 * self._job.limit_s))
        self._transport.expire(lambda index: True, "stopped", "the load was stopped before an answer came")

    def _on_error(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """An exception that the event loop caught: network errors are recorded elsewhere, any other is a bug here."""
        error = context.get("exception") or RuntimeError(str(context.get("message")))
        if not isinstance(error, OSError):
            self._fail(error)

    async def _prepare(self) -> None:
        raise NotImplementedError

    def _issue_no_more(self) -> None:
        raise NotImplementedError

    def _begin_measuring(self) -> None:
        self._canary.start()
        self._measured_from, self._cpu_from = monotonic(), process_time()

    def _end_measuring(self) -> None:
        if not self._measured_to:
            self._measured_to, self._cpu_to = monotonic(), process_time()
            self._canary.stop()

    def _tick(self) -> None:
        p50, p99 = self._recent()
        self._on_tick(
            Tick(
                at_s=max(0.0, monotonic() - self._start),
                sent=self._issued,
                ended=self._ended,
                late=self._late,
                shed=self._shed,
                errors=self._errors,
                p50_ms=p50,
                p99_ms=p99,
            )
        )

    def _recent(self) -> tuple[float | None, float | None]:
        """Median and 99th percentile in ms of the answered ones among the latest requests."""
        part = slice(max(0, self._issued - _RECENT), self._issued)
        latencies = np.array(self._done[part]) - np.array(self._scheduled[part])
        is_answered = np.frombuffer(self._status[part], np.uint8) == Status.OK
        answered = latencies[is_answered]
        if not len(answered):
            return None, None
        answered.sort()
        last = len(answered) - 1
        return 1e3 * float(answered[last // 2]), 1e3 * float(answered[math.ceil(0.99 * last)])

    def _samples(self, overshoot_s: float, canary_cpu_s: float, steal: float) -> Samples:
        wall = max(1e-9, self._measured_to - self._measured_from)
        n = self._issued
        return Samples(
            scheduled=np.array(self._scheduled[:n]),
            taken=np.array(self._taken[:n]),
            sent=np.array(self._sent[:n]),
            done=np.array(self._done[:n]),
            status=np.frombuffer(bytes(self._status[:n]), np.uint8),
            warmup=self._warmup,
            generator_cpu=(self._cpu_to - self._cpu_from + canary_cpu_s) / wall,
            canary_p99_s=overshoot_s,
            steal=steal,
            connections=self._transport.peak_connections,
            starved=self._starved,
            timeout_s=self._job.timeout_s,
            first_error=self._first_error,
            error_kinds=dict(self._kinds),
        )


class _OpenLoop(_Loop):
    """Requests are sent when they are due, or a little later.

    The first that is due waits for a quantum, 0.5% of the limit and at most 0.25 ms, to be sent together with others:
    a wake-up costs more than a send. This delay counts as latency, as any delay of the generator does.
    """

    def __init__(self, job: OpenJob, canary: Canary, on_tick: Callable[[Tick], None]) -> None:
        super().__init__(job, canary, on_tick)
        self._scheduled = array("d", job.schedule)
        self._n = n = len(self._scheduled)
        blank = [_NAN] * n
        self._taken, self._sent, self._done = array("d", blank), array("d", blank), array("d", blank)
        self._status = bytearray(n)
        self._warmup = job.warmup
        self._quantum = min(2.5e-4, 0.005 * job.limit_s)

    def _all_issued(self) -> bool:
        return self._issued == self._n

    async def _prepare(self) -> None:
        rate = self._n / max(self._scheduled[-1], 1e-9)
        wanted = 1 + int(rate * self._job.limit_s)  # Little's law: requests in flight if each takes the limit
        await self._transport.open(min(wanted, _PREOPENED))
        self._start = monotonic() + _START_DELAY_S

    def _issue_due(self) -> float:
        scheduled, index, send = self._scheduled, self._issued, self._send
        last = min(self._n, index + _AT_ONCE)
        now = monotonic() - self._start
        while index < last and scheduled[index] <= now:
            if index == self._warmup:
                self._begin_measuring()
            self._taken[index] = now
            self._issued = index + 1
            send(index)
            index += 1
        if index >= self._n:
            self._end_measuring()
            return math.inf
        return 0.0 if index == last else self._start + scheduled[index] + self._quantum

    def _issue_no_more(self) -> None:
        self._n = self._issued
        if self._measured_from:
            self._end_measuring()


class _ClosedLoop(_Loop):
    """Each of `concurrency` users sends the next request when the last is answered, until the time is over.

    After an answer 429 or 503 a user pauses. Users that retry at once keep a server busy with shedding, so that one
    that was slow for a moment does not recover.
    """

    _prompt = True

    def __init__(self, job: ClosedJob, canary: Canary, on_tick: Callable[[Tick], None]) -> None:
        super().__init__(job, canary, on_tick)
        self._concurrency = job.concurrency
        self._duration_s = job.duration_s
        self._over = False
        self._pausing: deque[float] = deque()  # until when, in seconds from the start

    def _all_issued(self) -> bool:
        return self._over

    async def _prepare(self) -> None:
        await self._transport.open(self._concurrency)
        self._start = monotonic()
        self._begin_measuring()

    def _issue_no_more(self) -> None:
        self._duration_s = 0.0
        self._over = True
        self._end_measuring()

    def _end(self, index: int, status: Status, kind: str = "") -> None:
        if status is Status.SHED:
            self._pausing.append(monotonic() - self._start + _PAUSE_S)
        super()._end(index, status, kind)

    def _issue_due(self) -> float:
        pausing = self._pausing
        while pausing and pausing[0] <= monotonic() - self._start:
            pausing.popleft()
        for _ in range(self._concurrency - self._issued + self._ended - len(pausing)):
            now = monotonic() - self._start
            if now >= self._duration_s:
                self._over = True
                self._finish_if_over()
                break
            index = len(self._scheduled)
            self._scheduled.append(now)
            self._taken.append(now)
            self._sent.append(_NAN)
            self._done.append(_NAN)
            self._status.append(Status.UNANSWERED)
            self._issued += 1
            self._send(index)
        return self._start + pausing[0] if pausing else math.inf


def _remedy(status: int) -> str:
    """What to do about a status of `_REJECTED`."""
    if status in _REDIRECTED:
        return "it redirects: give the URL that it redirects to"
    if status in _DENIED:
        return "send the server's key with --header 'Authorization: Bearer KEY'"
    return (
        "check the model's name, the shape and type of the samples (--shape, --payloads), and whether the server takes "
        "raw tensors (--json-tensors sends JSON)"
    )


def _error_message(body: bytes) -> str:
    """A server's error message: the field `error` of its JSON, or the start of the text."""
    try:
        error = msgspec.json.decode(body, type=dict[str, object]).get("error")
    except (msgspec.DecodeError, ValueError, RecursionError):
        error = None
    return str(error)[:200] if error else body[:200].decode("utf-8", "replace")
