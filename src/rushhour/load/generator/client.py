"""The client: when requests go out, and the book of what became of them, in the generator's process.

How they get to the server, and how time passes in between, is a `Carrier`'s affair: `pool.py` for HTTP, `grpc.py` for
gRPC. What is timed is taken from `time.monotonic` around the calls themselves, and from the kernel's note of when an
answer came; never from an event loop's clock, which stands still while the loop works.
"""

from __future__ import annotations

import asyncio
import gc
import math
from array import array
from collections import Counter, deque
from collections.abc import Callable, Mapping
from time import monotonic, process_time
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from rushhour.errors import LoadError, WireError
from rushhour.load.generator.canary import Canary
from rushhour.load.generator.carrier import Carrier
from rushhour.load.generator.job import ClosedJob, Job, OpenJob, Tick
from rushhour.load.generator.pool import HttpCarrier
from rushhour.load.generator.samples import Samples, Status
from rushhour.wire import decode_answer, json_of

_NAN = float("nan")
_SHED = (429, 503)
_REJECTED = (400, 404, 405, 411, 413, 415, 422)
"""The server says that the request itself is wrong: with the first answer there is nothing to measure."""

_START_DELAY_S = 0.02
_SWEEP_S = 0.05
_TICK_S = 0.2
_RECENT = 4096
"""The live percentiles are those of so many latest requests; more would cost time that the sending needs."""
_STOP_GRACE_S = 1.0
_PREOPENED = 128
_AT_ONCE = 32
"""Requests taken up before answers are looked at again: a generator that was held up catches up in small
steps, so that it does not read answers late as well."""
_PAUSE_S = 0.05
"""How long a user of a closed loop who was turned away waits."""
_LENGTHS = 64
"""Distinct lengths of answers that are each looked into once. A server with more of them writes numbers as text."""


async def run(
    job: OpenJob | ClosedJob, canary: Canary, on_tick: Callable[[Tick], None], stop: asyncio.Event
) -> Samples:
    """Do what `job` says, and say five times a second how it stands.

    Once `stop` is set no request goes out any more; those under way are waited for as long as twice the limit, at
    least a second, and what was measured until then is the result.

    Raises:
        LoadError: if the server cannot be reached at the start, rejects the requests, or answers with something
            that is not an answer; or if it was stopped before anything was measured.
    """
    load = _OpenLoop(job, canary, on_tick) if isinstance(job, OpenJob) else _ClosedLoop(job, canary, on_tick)
    gc.collect()
    gc.disable()  # a collection in the middle of a run would be a stall of the generator's own making
    try:
        return await load.go(stop)
    finally:
        gc.enable()


class _Load:
    """What both loops share: the book, and its beginning and end."""

    _prompt = False
    """Whether answers are read as they come, because the next request waits for them."""

    def __init__(self, job: Job, canary: Canary, on_tick: Callable[[Tick], None]) -> None:
        self._job = job
        self._canary = canary
        self._on_tick = on_tick
        self._loop = asyncio.get_running_loop()
        self._finished: asyncio.Future[None] = self._loop.create_future()
        self._carrier: Carrier
        self._decode: Callable[[bytes, int | None], Mapping[str, NDArray[Any]]]
        if job.protocol == "grpc":
            from rushhour.load.generator.grpc import GrpcCarrier, decode_grpc_answer  # a quarter of a second to import

            self._carrier, self._decode = GrpcCarrier(job, self), decode_grpc_answer
        else:
            self._carrier, self._decode = HttpCarrier(job, self), decode_answer
        self._carry = self._carrier.carry
        self._limit_s = job.limit_s
        self._distinct = len(job.requests)
        self._check = job.check or bool(job.expected)
        self._expected: dict[int, tuple[bytes, int | None]] = {
            position: (body, None) for position, body in enumerate(job.expected)
        }
        self._sound: set[int] = set()
        self._valid: set[tuple[int, int | None]] = set()
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
        """See `Book`."""
        self._sent[index] = monotonic() - self._start

    def answered(self, index: int, body: bytes, header_length: int | None, at: float) -> None:
        """See `Book`."""
        done = at - self._start
        if done < self._sent[index]:  # it was here before it was noted that its request is out
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

    def turned_down(self, index: int, status: int, body: bytes, at: float) -> None:
        """See `Book`."""
        self._done[index] = max(at - self._start, self._sent[index])
        if status in _SHED:
            self._end(index, Status.SHED)
            return
        said = _in_words(body)
        if status in _REJECTED and not self._any_answer:
            self._fail(
                LoadError(
                    f"the server rejects the request with status {status}",
                    said or "it does not say why",
                    "check the model's name, the shape and type of the samples (--shape, --payloads), and whether the "
                    "server takes raw tensors (--json-tensors sends JSON)",
                )
            )
        self._note(f"status {status}" + (f" ({said})" if said else ""))
        self._end(index, Status.ERROR, f"status {status}")

    def garbled(self, index: int, what: str, why: str, at: float) -> None:
        """See `Book`. As the first thing a server says they end the run, later they are errors."""
        self._done[index] = max(at - self._start, self._sent[index])
        if not self._any_answer:
            self._fail(LoadError(what, why, "check the URL and the server"))
        self._note(f"{what}: {why}")
        self._end(index, Status.ERROR, "not an answer")

    def lost(self, index: int, kind: str, why: str) -> None:
        """See `Book`."""
        self._note(why)
        self._end(index, Status.LOST, kind)

    def starved(self, index: int) -> None:
        """See `Book`."""
        if index >= self._warmup:
            self._starved += 1

    def fault_of(self, body: bytes, header_length: int | None) -> str:
        """See `Book`. Each length is looked into once: answers to requests of one shape that have one length have
        one form."""
        key = (len(body), header_length)
        if self._job.outputs is None or key in self._valid or len(self._valid) >= _LENGTHS:
            return ""
        try:
            outputs = self._decode(body, header_length)
        except (WireError, RecursionError) as error:
            return getattr(error, "why", str(error))
        missing = [name for name in self._job.outputs if name not in outputs]
        if missing:
            return f"it has no output {missing[0]!r}"
        self._valid.add(key)
        return ""

    def _deviation(self, position: int, body: bytes, header_length: int | None) -> str:
        """What is wrong with an answer; where none is expected, the first one to a request becomes that."""
        expected, its_header = self._expected.setdefault(position, (body, header_length))
        if its_header is None:  # one that was given beforehand has no header length of its own
            its_header = header_length
        if position not in self._sound:
            if self._is_void(expected, its_header):
                if not self._job.expected:
                    del self._expected[position]
                return "holds no finite number"
            self._sound.add(position)
        if body == expected:
            return ""
        if self._job.outputs is not None:
            try:
                right, given = self._decode(expected, its_header), self._decode(body, header_length)
                if _alike(right, given, self._job.tolerance):
                    return ""
            except (WireError, RecursionError):
                pass
        return "is not the one expected"

    def _is_void(self, body: bytes, header_length: int | None) -> bool:
        """Whether an output is nothing but NaN and infinities: a model that is broken answers so, always alike."""
        try:
            if self._job.outputs is None:
                return _has_void(json_of(body))
            outputs = self._decode(body, header_length)
        except (WireError, msgspec.DecodeError, RecursionError):
            return False
        return any(each.dtype.kind == "f" and each.size and not np.isfinite(each).any() for each in outputs.values())

    def _end(self, index: int, status: Status, kind: str = "") -> None:
        """In any other way than well."""
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

    def _sweep(self) -> None:
        """Give up on what has been under way for too long."""
        before = monotonic() - self._start - self._job.timeout_s
        scheduled = self._scheduled
        why = f"no answer within {self._job.timeout_s:g} s"
        self._carrier.sweep(lambda index: scheduled[index] < before, "time-out", why)

    async def go(self, stop: asyncio.Event) -> Samples:
        """Run, and return what happened."""
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
            await self._carrier.close()
            await asyncio.sleep(0)  # what was cancelled ends here, not in the next run
            if self._measured_from:
                self._end_measuring()
                noise = self._canary.result()
        if self._stopped and self._issued <= self._warmup:
            raise LoadError("the load was stopped before anything was measured", "", "let it run for longer")
        return self._samples(*noise)

    async def _drive(self) -> None:
        """Send what is due and read what has come, in turns, until all is over."""
        rest, finished = self._carrier.rest, self._finished
        swept = ticked = monotonic()
        while not finished.done():
            due = self._issue_due()
            passing = rest(min(due, swept + _SWEEP_S), prompt=self._prompt or due == math.inf)
            if passing is not None:
                await passing
            if (now := monotonic()) >= swept + _SWEEP_S:
                swept = now
                self._sweep()
                if now >= ticked + _TICK_S:
                    ticked = now
                    self._tick()
                await asyncio.sleep(0)  # the loop's turn: the word to stop, the parent's end

    def _issue_due(self) -> float:
        """Take up what is due; when to be called again, in seconds of `time.monotonic`: infinity at the next answer."""
        raise NotImplementedError

    async def _stop_on(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._stopped = True
        self._issue_no_more()
        self._finish_if_over()
        await asyncio.sleep(max(_STOP_GRACE_S, 2 * self._job.limit_s))
        self._carrier.sweep(lambda index: True, "stopped", "the load was stopped before an answer came")

    def _on_error(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """What the loop caught: the network's doing ends in `connection_lost`, all else is a fault of this program."""
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
        """Median and 99th percentile in ms of what was answered of the latest requests."""
        part = slice(max(0, self._issued - _RECENT), self._issued)
        latencies = np.array(self._done[part]) - np.array(self._scheduled[part])
        answered = latencies[~np.isnan(latencies)]
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
            connections=self._carrier.most_connections,
            starved=self._starved,
            timeout_s=self._job.timeout_s,
            first_error=self._first_error,
            error_kinds=dict(self._kinds),
        )


class _OpenLoop(_Load):
    """Requests go out when they are due, or a little later.

    The first that is due waits as long as the quantum, half a hundredth of the limit and at most 0.25 ms, for others to
    go out with: to be woken costs more than to send. That delay counts as latency, as any of the generator's does.
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
        wanted = 1 + int(rate * self._job.limit_s)  # Little's law: so many are under way when all take the limit
        await self._carrier.open(min(wanted, _PREOPENED))
        self._start = monotonic() + _START_DELAY_S

    def _issue_due(self) -> float:
        scheduled, index, carry = self._scheduled, self._issued, self._carry
        last = min(self._n, index + _AT_ONCE)
        now = monotonic() - self._start
        while index < last and scheduled[index] <= now:
            if index == self._warmup:
                self._begin_measuring()
            self._taken[index] = now
            self._issued = index + 1
            carry(index)
            index += 1
        if index >= self._n:
            self._end_measuring()
            return math.inf
        return 0.0 if index == last else self._start + scheduled[index] + self._quantum

    def _issue_no_more(self) -> None:
        self._n = self._issued
        if self._measured_from:
            self._end_measuring()


class _ClosedLoop(_Load):
    """Each of `concurrency` users sends the next request when the last is answered, until the time is over.

    Who is turned away waits a little before: users who ask again at once keep a server busy with turning them away, and
    one that was slow for a moment never gets out of that.
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
        await self._carrier.open(self._concurrency)
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
            self._carry(index)
        return self._start + pausing[0] if pausing else math.inf


def _alike(right: Mapping[str, NDArray[Any]], given: Mapping[str, NDArray[Any]], tolerance: float) -> bool:
    """Whether two answers say the same: numbers up to a share of their output's largest, all else exactly."""
    if right.keys() != given.keys():
        return False
    for name, wanted in right.items():
        found = given[name]
        if wanted.shape != found.shape or wanted.dtype != found.dtype:
            return False
        if wanted.dtype.kind != "f":
            if not np.array_equal(wanted, found):
                return False
            continue
        finite = np.isfinite(wanted)
        if not np.array_equal(finite, np.isfinite(found)):
            return False
        if not np.array_equal(wanted[~finite], found[~finite], equal_nan=True):
            return False
        numbers = wanted[finite].astype(np.float64)
        if numbers.size and np.abs(found[finite] - numbers).max() > tolerance * np.abs(numbers).max():
            return False
    return True


def _has_void(said: object) -> bool:
    """Whether a value in an answer of any form is numbers, of which none is finite."""
    waiting = [said]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
            continue
        leaves = value if isinstance(value, list) else [value]
        while any(isinstance(each, list) for each in leaves):
            leaves = [leaf for each in leaves for leaf in (each if isinstance(each, list) else [each])]
        numbers = [each for each in leaves if isinstance(each, float | int) and not isinstance(each, bool)]
        if numbers and not any(isinstance(each, int) or math.isfinite(each) for each in numbers):
            return True
        waiting += [each for each in leaves if isinstance(each, dict)]
    return False


def _in_words(body: bytes) -> str:
    """A server's error message: the field `error` of its JSON, or the start of the text."""
    try:
        error = msgspec.json.decode(body, type=dict[str, object]).get("error")
    except msgspec.DecodeError:
        error = None
    return str(error)[:200] if error else body[:200].decode("utf-8", "replace")
