"""One model on one event loop: requests are queued, put on the engine in batches, and answered.

Everything here runs on the loop's thread but `_Stream.done`, which the engine calls and which only hands over.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Literal, cast

import numpy as np

from rushhour.clock import Clock
from rushhour.engines import Engine, Slot
from rushhour.errors import EngineError, WireError
from rushhour.measurement import BatchCost
from rushhour.plan import Policy
from rushhour.serve.observability.statistics import Batch, Statistics, Totals, reason_of
from rushhour.serve.scheduling.admission import Admission, Profile
from rushhour.serve.scheduling.batcher import Batcher, Part, Ticket
from rushhour.serve.scheduling.decoding import Decoder, Decoding
from rushhour.serve.scheduling.speed import Speedometer, Speeds
from rushhour.wire import Codec, InferRequest, Layout, PictureRequest, Wanted

_USUAL_PRIORITY, _LOWEST_PRIORITY = 4, 8
"""1 is the highest, as the protocol has it; a request that does not say is in the middle."""
_SHARE_OF_DEADLINE = 0.9
"""Of the time allowed, for queue and engine; the rest is for what the cell cannot see: sockets and the client."""
_TICK_S = 1e-3
"""What the loop's timers count in: for less no batch waits."""
_TELLING = 0.5
"""Of the time allowed: predictions of at least so much are compared with what came."""
_PROBE_EVERY_S = 1.0
"""After a probe that was late, the next one is let in after this time."""

Reply = Callable[[Sequence[memoryview] | Exception], int | None]
"""Called once, on the loop: the raw rows of each output, in the signature's order, or what went wrong.

The views are valid only during the call. It gives the status of the error that it had to answer instead, if any;
`LATER` where it still writes its answer, and will call `Cell.written`.
What it raises is reported to the loop, and costs nobody else anything.
"""

LATER = -1


class Lasting(list[memoryview]):
    """Views that stay valid when the call of a `Reply` is over."""


def lasting(result: Sequence[memoryview]) -> Lasting:
    """Such views of what a `Reply` is given; copies, unless they are such already."""
    return result if isinstance(result, Lasting) else Lasting(memoryview(bytes(view)) for view in result)


class Job:
    """A request on its way through the cell."""

    __slots__ = ("collected", "expected_s", "missing", "probe_until", "reply", "request", "ticket")

    def __init__(self, request: InferRequest, reply: Reply) -> None:
        self.expected_s = 0.0
        self.probe_until: float | None = None
        self.request = request
        self.reply: Reply | None = reply
        self.missing = request.rows
        self.collected: Lasting | None = None
        self.ticket: Ticket[Job] | None = None


class _PictureJob(Job):
    """A job whose pictures are decoded first; until then it has no ticket, but room is kept for it."""

    __slots__ = ("decoding",)
    decoding: Decoding | None


class Shed:
    """A request that was turned away at its arrival.

    Attributes:
        reason: `queue` (it is full) or `deadline` (the answer would come too late).
        why: the same in words.
        retry_after_s: when it is worth asking again.
    """

    __slots__ = ("reason", "retry_after_s", "why")

    def __init__(self, reason: Literal["queue", "deadline"], why: str, retry_after_s: float) -> None:
        self.reason = reason
        self.why = why
        self.retry_after_s = retry_after_s


class TurnedAway(WireError):
    """A request that is not computed, because its answer would come too late or there is no room for it.

    Args:
        why: in words.
        retry_after_s: when it is worth asking again.
    """

    def __init__(self, why: str, retry_after_s: float) -> None:
        super().__init__(why, status=429)
        self.retry_after_s = retry_after_s


class Counters:
    """What the cell has done since it started."""

    __slots__ = ("answered", "batches", "cancelled", "failed", "invalid", "rows", "shed_deadline", "shed_queue")

    def __init__(self) -> None:
        self.answered = 0
        self.failed = 0
        self.invalid = 0
        self.shed_queue = 0
        self.shed_deadline = 0
        self.cancelled = 0
        self.batches = 0
        self.rows = 0


class Cell:
    """An engine behind a batcher on the running event loop.

    Args:
        engine: compiled and warm.
        codec: of the model, for its name and signature.
        policy: of the plan: the bound of the queue, and the deadline.
        profile: how long the engine's batches take; kept fresh here.
        clock: what deadlines are read on.
        decoder: of encoded pictures; None where the codec takes none.
        cost: CPU time of the engine's batches; None where no batch is to wait for more samples.
    """

    def __init__(
        self,
        engine: Engine,
        codec: Codec,
        policy: Policy,
        profile: Profile,
        clock: Clock,
        decoder: Decoder | None = None,
        cost: BatchCost | None = None,
    ) -> None:
        self.codec = codec
        self.engine = engine
        self.decoder = decoder
        self.counters = Counters()
        self.statistics = Statistics(clock)
        self.profile = profile
        self.policy = policy
        self._loop = asyncio.get_running_loop()
        self._clock = clock
        self._speedometer = Speedometer(profile.times)
        self._deadline_s = math.inf if policy.deadline_ms is None else policy.deadline_ms / 1e3
        self._admission = Admission(profile, engine.config.max_batch)
        self._batcher: Batcher[Job] = Batcher(
            engine.config.max_batch,
            policy.queue_bound,
            profile,
            clock,
            cost=cost,
            streams=len(engine.slots),
            grace=1 / _SHARE_OF_DEADLINE - 1,
        )
        self._row_bytes_in = tuple(spec.row_bytes for spec in engine.signature.inputs)
        self._row_bytes_out = tuple(spec.row_bytes for spec in engine.signature.outputs)
        self._output_names = tuple(spec.name for spec in engine.signature.outputs)
        self._free = [_Stream(self, slot) for slot in engine.slots]
        self._busy: list[_Stream] = []
        self._streams = len(self._free)
        self._dispatching = False
        self._wakes_at = math.inf
        self._decoding: set[_PictureJob] = set()
        self._probe_from = -math.inf
        self._writing: dict[InferRequest, float] = {}
        """Requests whose answers are being written, and when they arrived."""
        self.answering: Batch | None = None
        """The batch whose requests are being answered: for who follows single requests."""

    @property
    def idle(self) -> bool:
        """Nothing waits, nothing runs, and no answer is being written."""
        return not (self._batcher.waiting or self._busy or self._writing)

    @property
    def waiting(self) -> int:
        """Samples in the queue."""
        return self._batcher.waiting

    @property
    def running(self) -> tuple[int, int]:
        """Batches that run, and their samples."""
        return len(self._busy), sum(stream.rows for stream in self._busy)

    @property
    def waits_for(self) -> tuple[int, float]:
        """Samples that a batch waits for under little load, and seconds, at most, where the plan has a deadline."""
        return self._batcher.enough, self._batcher.patience_s(_SHARE_OF_DEADLINE * self._deadline_s)

    @property
    def progress(self) -> tuple[int, ...]:
        """Changes whenever a request or a batch ends or begins: what it does not do for long does not go on."""
        counters = self.counters
        return counters.batches, counters.answered, counters.failed, counters.invalid, self.running[0], self.waiting

    @property
    def speed(self) -> float | None:
        """Of the host in the last ten seconds of work, 1 as when the profile was made; None before the first batch."""
        return self._speedometer.recent()

    def speeds(self) -> Speeds:
        """What batches took in the last minutes, and what they were to take."""
        return self._speedometer.told(self._clock.now())

    def totals(self) -> Totals:
        """What was done here up to now, in numbers. Not a copy."""
        totals, counters = self.statistics.totals(), self.counters
        for name in ("answered", "failed", "invalid", "shed_queue", "shed_deadline", "cancelled"):
            setattr(totals, name, getattr(counters, name))
        return totals

    def submit(self, request: InferRequest, reply: Reply) -> Job | Shed:
        """Queue a request, or turn it away. `reply` is called later, never from within this call."""
        if request.pictures:
            return self._submit_pictures(cast(PictureRequest, request), reply)
        wanted = request.wanted
        priority = _priority_of(wanted)
        found = self._deadline_of(request.rows, wanted, priority)
        if isinstance(found, Shed):
            return found
        job = Job(request, reply)
        deadline, job.expected_s, is_probe = found
        if is_probe:
            job.probe_until, deadline = deadline, math.inf
        job.ticket = self._batcher.offer(job, request.rows, deadline=deadline, priority=priority)
        if job.ticket is None:
            return self._no_room()
        self._dispatch_soon()
        return job

    def foresee(self, layout: Layout | InferRequest | None) -> Shed | None:
        """Turn a request away whose tensors are still to be read, if that is what would happen to it now.

        Args:
            layout: what its header says; None where that is not known, and a single sample is assumed.
        """
        if layout is not None:
            priority = _priority_of(layout.wanted)
            found = self._deadline_of(layout.rows, layout.wanted, priority)
            if isinstance(found, Shed):
                return found
        return self._no_room() if self._batcher.full(1 if layout is None else layout.rows) else None

    def _deadline_of(
        self, rows: int, wanted: Wanted, priority: int, decoding_s: float = 0.0
    ) -> tuple[float, float, bool] | Shed:
        """When the answer must be there, on the cell's clock, and the seconds it is expected in; or that it cannot be.

        The expectation is 0 where it is too short to tell anything. Third, whether it is let in as a probe: where
        nothing else is under way, one request is, whatever the profile says. The profile may be wrong by now, or from
        the start (an engine that was timed while another computed), and only a batch can correct it: else all would
        be shed for ever.

        Args:
            decoding_s: until the samples are there; the engine goes on with others meanwhile.
        """
        within = self._deadline_s if wanted.timeout_s is None else min(self._deadline_s, wanted.timeout_s)
        if within == math.inf:
            return math.inf, 0.0, False
        expected_s = 0.0
        now = self._clock.now()
        deadline = now + _SHARE_OF_DEADLINE * within
        waiting = self._batcher.waiting_before(priority)
        busy_until = [stream.until for stream in self._busy]
        finish = self._admission.finish(now, rows, waiting, busy_until, self._streams)
        if decoding_s:
            finish = max(finish, self._admission.finish(now + decoding_s, rows, 0, busy_until, self._streams))
        if finish - now > _TELLING * within:  # a short wait says little of how a long one is mistaken
            expected_s = finish - now
            finish += self._admission.late_s
        if finish <= deadline:
            return deadline, expected_s, False
        if self.idle and now >= self._probe_from:
            return deadline, 0.0, True
        self.counters.shed_deadline += 1
        self.statistics.failed("deadline", 0.0)
        why = f"the answer would take {finish - now:.3f} s, and {within:g} s are allowed"
        return Shed("deadline", why, self._admission.backlog_s(waiting, self._streams))

    def _no_room(self) -> Shed:
        self.counters.shed_queue += 1
        self.statistics.failed("queue", 0.0)
        return Shed("queue", "the queue is full: more requests come than can be answered", self._retry_after_s())

    def _retry_after_s(self) -> float:
        return self._admission.backlog_s(self._batcher.waiting, self._streams)

    def refuse(self, status: int, seconds: float) -> None:
        """Count a request that was answered with an error by whoever read it, or was to write its answer.

        Args:
            status: of HTTP.
            seconds: from its arrival to this answer.
        """
        if status >= 500 and status != 501:
            self.counters.failed += 1
        elif status == 429:
            self.counters.shed_queue += 1
        else:
            self.counters.invalid += 1
        self.statistics.failed(reason_of(status), seconds)

    def written(self, request: InferRequest, status: int | None) -> None:
        """The answer to a request whose reply gave `LATER` is written, or an error of this status in its place."""
        seconds = self._clock.now() - self._writing.pop(request)
        if status:
            self.refuse(status, seconds)
        else:
            self.counters.answered += 1
            self.statistics.answered(seconds)

    def cancel(self, job: Job) -> None:
        """The caller has gone: drop what waits, and the answer to what runs."""
        self.counters.cancelled += 1
        if job.ticket is not None:
            self._drop(job.ticket)
        elif isinstance(job, _PictureJob):
            self._leave_out(job)
        job.reply = None

    def _leave_out(self, job: _PictureJob) -> None:
        """Nobody waits for what is being decoded, if it still is."""
        if job.decoding is not None:
            job.decoding.cancel()
            self._decoded(job)

    def _decoded(self, job: _PictureJob) -> None:
        """Its pictures are decoded, or will not be: the room that was kept for it is free."""
        job.decoding = None
        self._decoding.discard(job)
        self._batcher.release(job.request.rows)

    def give_up(self, error: Exception) -> None:
        """Answer all that is still here with `error`: an engine that does not end its batches is left to itself.

        Streams whose batch has not ended stay busy. A batch that does end later is answered to nobody.
        """
        for stream in self._busy:
            parts, stream.parts = stream.parts, []
            if parts:
                self._batcher.ended(parts)
            self._fail_all(parts, error)
        for ticket in self._batcher.drain():
            self._fail_all([Part(ticket, ticket.taken, 0)], error)
        for job in list(self._decoding):
            self._leave_out(job)
            self._count_failed(0.0)
            self._reply_once(job, error)

    def _submit_pictures(self, request: PictureRequest, reply: Reply) -> Job | Shed:
        """Decide at arrival, as for any request, but with the time that decoding takes; then decode, then queue.

        While its pictures are decoded, a request counts as waiting. Once it is in, nobody can take its room.
        """
        assert self.decoder is not None
        wanted, batcher, rows = request.wanted, self._batcher, request.rows
        priority = _priority_of(wanted)
        arrived = self._clock.now()
        found = self._deadline_of(rows, wanted, priority, self.decoder.seconds(request))
        if isinstance(found, Shed):
            return found
        deadline, _, is_probe = found
        job = _PictureJob(request, reply)
        if is_probe:
            job.probe_until = deadline
        if not batcher.reserve(rows):
            return self._no_room()

        def enter(samples: memoryview | WireError) -> None:
            self._decoded(job)
            request.pictures = ()
            if isinstance(samples, WireError):
                self.refuse(samples.status, self._clock.now() - arrived)
                self._reply_once(job, samples)
                return
            now = self._clock.now()
            expected_s = 0.0 if is_probe else self.profile.seconds(min(rows, batcher.max_batch))
            if now + expected_s > deadline:
                self.counters.shed_deadline += 1
                self.statistics.failed("deadline", now - arrived)
                self._probed(job)
                why = "decoding took longer than the deadline leaves time for"
                self._reply_once(job, TurnedAway(why, self._retry_after_s()))
                return
            request.tensors = (samples,)
            job.ticket = batcher.offer(job, rows, deadline=math.inf if is_probe else deadline, priority=priority)
            assert job.ticket is not None  # its room was kept
            job.ticket.arrived = arrived
            self._dispatch_soon()

        try:
            job.decoding = self.decoder.start(request, enter)
        except BaseException:
            batcher.release(rows)
            raise
        self._decoding.add(job)
        return job

    def _dispatch_soon(self) -> None:
        """Not at once: the other requests that this turn of the loop reads from its sockets belong into the batch."""
        if self._free and not self._dispatching:
            self._dispatching = True
            self._loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._dispatching = False
        while self._free:
            leave_at = self._batcher.leave_at()
            if leave_at > -math.inf and leave_at - self._clock.now() >= _TICK_S:
                self._wake_at(leave_at)
                return
            parts = self._batcher.take()
            if self._batcher.late:
                self._turn_late_away()
            if not parts:
                return
            stream = self._free.pop()
            self._busy.append(stream)
            stream.parts = parts
            stream.until = stream.taken = self._clock.now()
            try:
                stream.rows = rows = self._fill(stream, parts)
                self.counters.batches += 1
                self.counters.rows += rows
                stream.started = self._clock.now()
                stream.until = stream.started + self.profile.seconds(rows)
                stream.slot.start(rows, stream.done)
            except Exception as error:
                self._finished(stream, error)

    def _turn_late_away(self) -> None:
        """Answer requests whose time was over before they came to a batch: nobody could use what they would cost."""
        now = self._clock.now()
        while self._batcher.late:
            ticket = self._batcher.late.pop()
            self.counters.shed_deadline += 1
            self.statistics.failed("deadline", now - ticket.arrived)
            job = ticket.item
            self._drop(ticket)
            why = f"the request waited for {now - ticket.arrived:.3f} s, longer than it may take"
            self._reply_once(job, TurnedAway(why, self._retry_after_s()))

    def _wake_at(self, time: float) -> None:
        """Look again at that time. A timer that is there already and comes earlier is enough, whatever it was for."""
        if time < self._wakes_at:
            self._wakes_at = time
            self._loop.call_later(time - self._clock.now(), self._wake, time)

    def _wake(self, time: float) -> None:
        if time == self._wakes_at:
            self._wakes_at = math.inf
        self._dispatch_soon()

    def _fill(self, stream: _Stream, parts: list[Part[Job]]) -> int:
        """Write a batch into the stream's input buffers, each request once and in place; returns its rows."""
        buffers, row_bytes_in = stream.buffers, self._row_bytes_in
        at = 0
        for part in parts:
            ticket, first = part.ticket, part.first
            job, end = ticket.item, at + part.rows
            whole = part.rows == ticket.rows
            for buffer, tensor, row_bytes in zip(buffers, job.request.tensors, row_bytes_in, strict=True):
                rows = tensor if whole else tensor[first * row_bytes : (first + part.rows) * row_bytes]
                buffer[at * row_bytes : end * row_bytes] = rows
            at = end
            if whole or first + part.rows == ticket.rows:
                # Ticket and job hold each other: a body is to go when it has been copied, not when cycles are sought.
                job.ticket = None
                job.request.tensors = ()
        return at

    def _finished(self, stream: _Stream, error: BaseException | None) -> None:
        """A batch has ended: answer its requests. Whatever goes wrong in that, the stream is free afterwards."""
        parts, stream.parts = stream.parts, []
        if not parts:
            return  # given up
        self.answering = stream
        try:
            self._batcher.ended(parts)
            if error is None:
                self._hand_out(stream, parts)
            else:
                self._fail_all(parts, error)
        except Exception as wrong:
            self._report(wrong)
            self._fail_all(parts, wrong)
        finally:
            self.answering = None
            self._busy.remove(stream)
            self._free.append(stream)
            if self._batcher.waiting:
                self._dispatch_soon()

    def _hand_out(self, stream: _Stream, parts: list[Part[Job]]) -> None:
        """Learn from a batch, and give each of its requests its rows."""
        now, last = self._clock.now(), parts[-1].ticket
        self.profile.learn(stream.rows, now - stream.started)
        self._speedometer.saw(stream.rows, stream.ended, stream.ended - stream.started)
        self._admission.saw(stream.rows, last.item.expected_s, now - last.arrived)
        outputs = stream.slot.outputs
        views = [outputs[name].data.cast("B") for name in self._output_names]
        begun, answered = [], []
        at = 0
        for part in parts:
            if part.first == 0:
                begun.append(part.ticket.arrived)
            try:
                if self._answer(part, views, at):
                    answered.append(part.ticket.arrived)
            except Exception as wrong:  # in the reply of one caller: the others are to have theirs
                self._report(wrong)
                self._fail_all([part], wrong)
            at += part.rows
        self.statistics.count(stream, len(parts), begun, answered)

    def _answer(self, part: Part[Job], views: list[memoryview], at: int) -> bool:
        """Give a request its rows of a batch, or collect them until all are there; whether this answered it."""
        job = part.ticket.item
        job.missing -= part.rows
        reply = job.reply
        if reply is None:
            return False
        if part.rows == job.request.rows:
            job.reply = None
            if job.probe_until is not None:
                self._probed(job)
            end = at + part.rows
            if len(views) == 1:
                size = self._row_bytes_out[0]
                status = reply((views[0][at * size : end * size],))
            else:
                status = reply(
                    [view[at * size : end * size] for view, size in zip(views, self._row_bytes_out, strict=True)]
                )
            if status:
                return self._unanswered(part.ticket, status)
            self.counters.answered += 1
            return True
        if job.collected is None:
            sizes = [job.request.rows * size for size in self._row_bytes_out]
            job.collected = Lasting(np.empty(size, np.uint8).data for size in sizes)
        for whole, view, size in zip(job.collected, views, self._row_bytes_out, strict=True):
            first = part.first * size
            whole[first : first + part.rows * size] = view[at * size : (at + part.rows) * size]
        if job.missing:
            return False
        job.reply = None
        if job.probe_until is not None:
            self._probed(job)
        status = reply(job.collected)
        if status:
            return self._unanswered(part.ticket, status)
        self.counters.answered += 1
        return True

    def _unanswered(self, ticket: Ticket[Job], status: int) -> bool:
        """The samples were computed, and yet the request was answered with an error, or is not answered yet."""
        if status == LATER:
            self._writing[ticket.item.request] = ticket.arrived
            return False
        self.refuse(status, self._clock.now() - ticket.arrived)
        return False

    def _probed(self, job: Job) -> None:
        """A probe has ended. In time: the profile is wrong, the next is welcome. Late: it is believed for a while."""
        if job.probe_until is not None:
            now = self._clock.now()
            if now <= job.probe_until:
                self._probe_from = now
                self.profile.doubt()
            else:
                self._probe_from = now + _PROBE_EVERY_S

    def _fail_all(self, parts: list[Part[Job]], error: BaseException) -> None:
        """Tell those of a batch who have no answer yet what went wrong."""
        told = error if isinstance(error, Exception) else EngineError("the engine stopped", repr(error))
        for part in parts:
            ticket, job = part.ticket, part.ticket.item
            if job.reply is not None:
                self._count_failed(self._clock.now() - ticket.arrived)
                self._drop(ticket)
                self._reply_once(job, told)

    def _count_failed(self, took_s: float) -> None:
        self.counters.failed += 1
        self.statistics.failed("engine", took_s)

    def _reply_once(self, job: Job, result: Exception) -> None:
        """Tell a caller that there is no answer. What the reply raises harms nobody else."""
        reply, job.reply = job.reply, None
        if reply is not None:
            try:
                reply(result)
            except Exception as wrong:
                self._report(wrong)

    def _report(self, wrong: Exception) -> None:
        """Something that should not have happened."""
        self._loop.call_exception_handler({"message": "answering a batch failed", "exception": wrong})

    def _drop(self, ticket: Ticket[Job]) -> None:
        """What of it is not yet in a batch never will be."""
        self._batcher.cancel(ticket)
        job = ticket.item
        job.ticket = None
        job.request.tensors = ()


def _priority_of(wanted: Wanted) -> int:
    return min(wanted.priority, _LOWEST_PRIORITY) if wanted.priority else _USUAL_PRIORITY


class _Stream:
    """A slot of the engine, its buffers as bytes, and the batch that runs on it."""

    __slots__ = ("_cell", "_loop", "buffers", "ended", "parts", "rows", "slot", "started", "taken", "until")

    def __init__(self, cell: Cell, slot: Slot) -> None:
        self.slot = slot
        self.buffers = [slot.inputs[spec.name].reshape(-1).view(np.uint8).data for spec in cell.engine.signature.inputs]
        self.parts: list[Part[Job]] = []
        self.rows = 0
        self.taken = 0.0
        self.started = 0.0
        self.until = 0.0
        self.ended = 0.0
        self._cell = cell
        self._loop = cell._loop

    def done(self, error: BaseException | None) -> None:
        """Hand the result over to the loop's thread."""
        self.ended = self._cell._clock.now()
        self._loop.call_soon_threadsafe(self._cell._finished, self, error)
