"""`Cell`: one model on one event loop. Requests are queued, computed by the engine in batches, and answered.

Everything here runs on the event loop's thread, except `Stream.done`, which the engine calls.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from rushhour.clock import Clock
from rushhour.engines import Slot
from rushhour.errors import EngineError
from rushhour.plan import Policy
from rushhour.serve.observability.explanation import Explanation
from rushhour.serve.observability.statistics import Counters, ModelState, Statistics, Totals, reason_of
from rushhour.serve.scheduling.admission import Probes, free_at
from rushhour.serve.scheduling.alarm import Alarm
from rushhour.serve.scheduling.batcher import Batcher, Part, Ticket
from rushhour.serve.scheduling.buckets import batcher_of
from rushhour.serve.scheduling.decoding import Decoder
from rushhour.serve.scheduling.job import LATER, Job, Reply, Shed, ShedError, priority_of
from rushhour.serve.scheduling.lanes import Lanes
from rushhour.serve.scheduling.pictures import Pictures
from rushhour.serve.scheduling.speed import HostSpeed, Speeds
from rushhour.serve.scheduling.stream import Stream, stream_of
from rushhour.serve.scheduling.tabulating import Tabulator
from rushhour.serve.scheduling.tokenising import Tokeniser
from rushhour.serve.scheduling.variant import Variant
from rushhour.wire import Codec, InferRequest, Layout, PictureRequest, Wanted

if TYPE_CHECKING:
    from rushhour.serve.scheduling.ladder import Ladder

SHARE_OF_DEADLINE = 0.9
"""Fraction of the time limit for queue and engine; the rest is for what the cell cannot see: sockets and the client."""
_TICK_S = 1e-3
"""The resolution of the event loop's timers: no batch waits for less."""


class Cell:
    """Engines behind a batcher on the running event loop. One of them, the active one, computes the next batch.

    All engines together run no more batches at once than one has streams: a change of the variant takes no more cores.

    Args:
        variants: at least one, of one signature and with equally many streams; the first is active.
        codec: of the model, for its name and signature.
        policy: of the plan: the bound of the queue, and the deadline.
        clock: for arrivals and deadlines.
        decoder: of encoded pictures, or of texts; None where the codec takes none.
        explanation: what answers say about themselves; None where they do not.
        lanes: its batches and those of other cells of the model, or of other models; None where there are no others.
        spare: slots of the one variant's engine for batches that wait in it, where nothing else computes on its cores.

    Attributes:
        active: the variant that computes the next batch.
        batcher: the queue.
        clock, lanes: the same.
        ladder: chooses it; None where it stays.
    """

    def __init__(
        self,
        variants: Sequence[Variant],
        codec: Codec,
        policy: Policy,
        clock: Clock,
        decoder: Decoder | Tabulator | Tokeniser | None = None,
        explanation: Explanation | None = None,
        lanes: Lanes | None = None,
        spare: Sequence[Slot] = (),
    ) -> None:
        self.variants = tuple(variants)
        self.active = active = self.variants[0]
        self.ladder: Ladder | None = None
        self.codec = codec
        self._explanation = explanation
        self.decoder = decoder
        self.counters = Counters()
        self.statistics = Statistics(clock)
        self.profile = active.profile
        self.policy = policy
        self._loop = asyncio.get_running_loop()
        self.clock = clock
        self._host_speed = HostSpeed()
        self._deadline_s = math.inf if policy.deadline_ms is None else policy.deadline_ms / 1e3
        self._admission = active.admission
        self._streams = len(active.engine.slots)
        signature = active.engine.signature
        self.batcher: Batcher[Job] = batcher_of(signature, policy, active.profile.times)(
            active.max_batch,
            policy.queue_bound,
            active.profile,
            clock,
            cost=active.cost,
            streams=self._streams,
            grace=1 / SHARE_OF_DEADLINE - 1,
        )
        stream = stream_of(self.batcher)
        self._most = self._streams + len(spare)
        self._ahead: deque[Stream] = deque()
        for each in self.variants:
            slots = each.engine.slots
            assert len(slots) == self._streams
            each.free = [stream(slot, signature, self._loop, clock, self._finished, each) for slot in (*spare, *slots)]
        self._free = active.free
        self._busy: list[Stream] = []
        self.lanes = lanes or Lanes()
        self.lanes.join(self)
        self._dispatching = False
        self._switched = -math.inf
        self._longest_s = math.inf
        self._alarm = Alarm(clock, self.dispatch_soon)
        self._pictures = None if decoder is None else Pictures(self, decoder)
        self._probes = Probes()
        self._writing: dict[InferRequest, float] = {}  # when requests arrived whose answers are being written
        self.answering: Stream | None = None  # the batch whose requests are being answered

    @property
    def idle(self) -> bool:
        """Whether nothing waits, nothing runs, and no answer is being written."""
        return not (self.batcher.waiting or self._busy or self._writing)

    @property
    def waiting(self) -> int:
        """Samples in the queue."""
        return self.batcher.waiting

    @property
    def running(self) -> tuple[int, int]:
        """Batches in flight, and their samples."""
        return len(self._busy), sum(stream.rows for stream in self._busy)

    @property
    def batches(self) -> int:
        """Batches that have begun until now."""
        return self.counters.batches

    @property
    def longest_batch_s(self) -> float:
        """Seconds that the largest batch takes, by the slowest variant."""
        return max(each.profile.seconds(each.max_batch) for each in self.variants)

    @property
    def waits_for(self) -> tuple[int, float]:
        """Samples that a batch waits for under light load, and seconds, at most, where the plan has a deadline."""
        return self.batcher.target_batch, self.batcher.max_wait_s(SHARE_OF_DEADLINE * self._deadline_s)

    @property
    def progress(self) -> tuple[int, ...]:
        """Changes whenever a request or a batch begins or ends; if it does not change for long, the engine is stuck."""
        counters = self.counters
        return counters.batches, counters.answered, counters.failed, counters.invalid, self.running[0], self.waiting

    @property
    def speed(self) -> float | None:
        """The host's speed over the last ten seconds of work, relative to the profile; None before the first batch."""
        return self._host_speed.recent()

    def speeds(self) -> Speeds:
        """The expected and the measured times of the batches of the last minutes."""
        return self._host_speed.speeds(self.clock.now())

    def totals(self) -> Totals:
        """The counters up to now. Not a copy."""
        totals = self.counters.into(self.statistics.totals())
        if isinstance(self.decoder, Tabulator):
            totals.unknown, totals.imputed = dict(self.decoder.unknown), dict(self.decoder.imputed)
        totals.of_variant = {each.name: each.samples for each in self.variants if each.name}
        if self.ladder is not None:
            self.ladder.count(totals)
        return totals

    def describe(self, state: ModelState) -> None:
        """As `Stage.describe`."""
        state.waiting, state.speed = self.waiting, self.speed
        state.batches, state.running = self.running
        state.variant, state.base_s = self.active.name, self.profile.seconds(0)
        state.sample_s = self.profile.seconds(1) - state.base_s
        if self.ladder is not None:
            self.ladder.describe(state)

    def shown(self) -> Mapping[str, Any]:
        """As `Stage.shown`."""
        return {"variant": self.active.name, "ladder": None if self.ladder is None else self.ladder.shown()}

    def use(self, variant: Variant) -> None:
        """Make it the active one: it computes all batches from the next on. What waits keeps its place in the queue."""
        self.active, self.profile = variant, variant.profile
        self._admission, self._free = variant.admission, variant.free
        self.batcher.switch(variant.bound(self._longest_s), variant.profile, variant.cost)
        self._switched = self.clock.now()

    def bound_batches(self, seconds: float) -> None:
        """No batch takes longer from now on, unless a single sample does: other models wait for its end."""
        self._longest_s, variant = seconds, self.active
        if (bound := variant.bound(seconds)) != self.batcher.max_batch:
            self.batcher.switch(bound, variant.profile, variant.cost)

    def submit(self, request: InferRequest, reply: Reply) -> Job | Shed:
        """Queue a request, or shed it. `reply` is called later, never from within this call."""
        if request.pictures:
            assert self._pictures is not None
            return self._pictures.submit(cast(PictureRequest, request), reply)
        priority = priority_of(request.wanted)
        found = self.deadline_of(request.rows, request.wanted, priority)
        if isinstance(found, Shed):
            return found
        job = Job(request, reply)
        deadline, job.expected_s, is_probe = found
        if is_probe:
            job.probe_until, deadline = deadline, math.inf
        job.ticket = self.batcher.offer(job, request.rows, deadline=deadline, priority=priority)
        if job.ticket is None:
            return self.no_room()
        self.dispatch_soon()
        return job

    def shed_early(self, layout: Layout | InferRequest | None) -> Shed | None:
        """Shed a request before its tensors are read, if `submit` would shed it now.

        Args:
            layout: of its header; None where that is not known, and a single sample is assumed.
        """
        if layout is not None:
            priority = priority_of(layout.wanted)
            if isinstance(found := self.deadline_of(layout.rows, layout.wanted, priority), Shed):
                return found
        return self.no_room() if self.batcher.full(1 if layout is None else layout.rows) else None

    def deadline_of(
        self, rows: int, wanted: Wanted, priority: int, decoding_s: float = 0.0
    ) -> tuple[float, float, bool] | Shed:
        """The deadline on the cell's clock, the expected latency, and whether it is a probe; or that it is shed.

        The expected latency is 0 where it is too short to be informative. While nothing else is in flight, one request
        is admitted as a probe, whatever the profile predicts. The profile may be wrong by now, or from the start (an
        engine that was timed while another computed), and only a batch can correct it: without probes all requests
        would be shed for ever.

        Args:
            decoding_s: until the samples are decoded; the engine goes on with others meanwhile.
        """
        within = self._deadline_s if wanted.timeout_s is None else min(self._deadline_s, wanted.timeout_s)
        if within == math.inf:
            return math.inf, 0.0, False
        now = self.clock.now()
        deadline = now + SHARE_OF_DEADLINE * within
        waiting = self.batcher.waiting_before(priority, rows)
        busy_until, streams, slow = self.lanes.busy_until(self), self._streams, self.lanes.slow
        work = self.batcher.work(rows, wanted.sizes) if wanted.sizes else rows
        finish = self._admission.finish(now, work, waiting, busy_until, streams, slow, self.batcher.batch(rows))
        if decoding_s:
            finish = max(finish, self._admission.finish(now + decoding_s, work, 0, busy_until, streams, slow))
        finish, expected_s = self._admission.cautious(now, finish, within)
        if finish <= deadline:
            return deadline, expected_s, False
        if self.idle and self._probes.are_due(now):
            return deadline, 0.0, True
        self._count_late(0.0)
        why = f"the answer would take {finish - now:.3f} s, and {within:g} s are allowed"
        return Shed("deadline", why, slow * self._admission.backlog_s(waiting, streams))

    def no_room(self) -> Shed:
        """The queue is full: count it, and shed a request."""
        self.counters.shed_queue += 1
        self.statistics.failed("queue", 0.0)
        return Shed("queue", "the queue is full: requests arrive faster than they are answered", self._retry_after_s())

    def too_late(self, waited_s: float, why: str) -> ShedError:
        """A request in the cell would be late: count it; the error to answer it with."""
        self._count_late(waited_s)
        return ShedError(why, self._retry_after_s())

    def _count_late(self, waited_s: float) -> None:
        self.counters.shed_deadline += 1
        self.statistics.failed("deadline", waited_s)

    def _retry_after_s(self) -> float:
        return self.lanes.slow * self._admission.backlog_s(self.batcher.waiting, self._streams)

    def refuse(self, status: int, seconds: float) -> None:
        """Count a request that was answered with an error outside the cell, `seconds` after its arrival."""
        self.counters.refuse(status)
        self.statistics.failed(reason_of(status), seconds)

    def written(self, request: InferRequest, status: int | None) -> None:
        """The answer to a request whose reply returned `LATER` is written, or an error of this status instead."""
        seconds = self.clock.now() - self._writing.pop(request)
        if status:
            self.refuse(status, seconds)
        else:
            self.counters.answered += 1
            self.statistics.answered(seconds)

    def cancel(self, job: Job) -> None:
        """The client has disconnected: drop what waits, and the answer to what runs."""
        self.counters.cancelled += 1
        self._writing.pop(job.request, None)
        if job.ticket is not None:
            self._drop(job.ticket)
        elif self._pictures is not None:
            self._pictures.stop(job)
        job.reply = None

    def distrust(self) -> None:
        """As `Stage.distrust`."""
        for variant in self.variants:
            variant.profile.distrust()

    def close(self) -> None:
        """As `Stage.close`."""
        if self.ladder is not None:
            self.ladder.close()
        if self.decoder is not None:
            self.decoder.close()
        self.lanes.close()

    def abandon(self, error: Exception) -> None:
        """Answer all requests in the cell with `error`: the engine does not finish its batches.

        Streams whose batch has not ended stay busy. The answers of a batch that ends later are dropped.
        """
        for stream in self._busy:
            parts, stream.parts = stream.parts, []
            if parts:
                self.batcher.ended(parts)
            self._fail_all(parts, error)
        for ticket in self.batcher.drain():
            self._fail_all([Part(ticket, ticket.taken, 0)], error)
        if self._pictures is not None:
            for job in self._pictures.stop_all():
                self._count_failed(0.0)
                self.reply_once(job, error)

    def dispatch_soon(self) -> None:
        """At the end of this turn of the event loop: the other requests that it reads join the batch."""
        if not self._dispatching and self._has_place:
            self._dispatching = True
            self._loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._dispatching = False
        cores = self.lanes.cores
        if cores is not None:
            cores.dispatch()
            return
        while self.is_due() and self.begin():
            pass

    @property
    def _has_place(self) -> bool:
        """Whether a stream is free, or the next batch is complete and may wait for one in the engine: it begins there
        as soon as another ends, without a turn of the event loop."""
        running = len(self.lanes.running)
        return running < self._streams or (running < self._most and self.batcher.has_full_batch())

    def is_due(self) -> bool:
        """Whether there is a place for the next batch and it should begin now; if it should wait, it is woken later."""
        if not (self._free and self._has_place):
            return False
        dispatch_at = self.batcher.dispatch_at()
        if dispatch_at > -math.inf and dispatch_at - self.clock.now() >= _TICK_S:
            self._alarm.set(dispatch_at)
            return False
        return True

    def begin(self) -> bool:
        """Begin the next batch; False if nothing waits."""
        waits, begins = len(self._busy) >= self._streams, self.clock.now()
        if waits:
            begins = max(begins, free_at([stream.until for stream in self._busy], self._streams)[0])
        parts = self.batcher.take(begins) if self.ladder is None else self.ladder.take()
        if self.batcher.late:
            self._shed_late()
        if not parts:
            return False
        stream = self._free.pop()
        self._busy.append(stream)
        if waits:
            self._ahead.append(stream)
        stream.parts = parts
        stream.until = stream.taken = self.clock.now()
        self.lanes.began(stream)
        try:
            stream.rows = rows = stream.fill(parts)
            self.counters.batches += 1
            self.counters.rows += rows
            stream.started = self.clock.now()
            stream.until = max(begins, stream.started) + self.profile.seconds(stream.work)
            stream.slot.start(rows, stream.done)
        except Exception as error:
            self._finished(stream, error)
        return True

    def _shed_late(self) -> None:
        """Answer requests whose deadline passed before they joined a batch: computing them would be wasted."""
        now = self.clock.now()
        while self.batcher.late:
            ticket = self.batcher.late.pop()
            job, waited_s = ticket.item, now - ticket.arrived
            self._drop(ticket)
            why = f"the request waited {waited_s:.3f} s in the queue, longer than its time limit"
            self.reply_once(job, self.too_late(waited_s, why))

    def _finished(self, stream: Stream, error: BaseException | None) -> None:
        """A batch has ended: answer its requests. The stream is free afterwards, whatever fails."""
        parts, stream.parts = stream.parts, []
        if self._ahead:
            self._move_up(stream)
        if not parts:
            return  # abandoned
        self.answering = stream
        try:
            self.batcher.ended(parts)
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
            stream.of.free.append(stream)
            self.lanes.ended(stream)
            if self.ladder is not None:
                self.ladder.ended(stream, parts, error)

    def _move_up(self, ended: Stream) -> None:
        """A batch has ended: the first of those that wait in the engine has begun, unless it was one of them.

        What it has waited there counts as waiting in the queue.
        """
        if ended in self._ahead:
            self._ahead.remove(ended)
            return
        first = self._ahead.popleft()
        waited_s = max(0.0, ended.ended - first.started)
        first.taken += waited_s
        first.started += waited_s
        first.until = first.started + self.profile.seconds(first.work)

    def _hand_out(self, stream: Stream, parts: list[Part[Job]]) -> None:
        """Update the profile from a batch, and give each of its requests its rows."""
        now, variant = self.clock.now(), stream.of
        variant.ended(stream, parts, now, self._switched)
        self._host_speed.record(variant.expected_s(stream.work), stream.ended, stream.ended - stream.started)
        if self._explanation is not None:
            self._explanation.begin(stream, self.codec.version, now)
        begun, answered, at = [], [], 0
        for part, rows in zip(parts, stream.answers(parts), strict=True):
            if part.first == 0:
                begun.append(part.ticket.arrived)
            stream.at = at
            try:
                if self._answer(part, rows):
                    answered.append(part.ticket.arrived)
            except Exception as wrong:  # in the reply of one request: the others are answered all the same
                self._report(wrong)
                self._fail_all([part], wrong)
            at += part.rows
        self.statistics.count(stream, len(parts), begun, answered)

    def _answer(self, part: Part[Job], rows: Sequence[memoryview]) -> bool:
        """Give a request its rows of a batch, or collect them until it has all; returns whether this answered it."""
        job = part.ticket.item
        job.missing -= part.rows
        reply = job.reply
        if reply is None:
            return False
        if part.rows != job.request.rows:
            rows = job.collect(part, rows)
            if job.missing:
                return False
        job.reply = None
        if job.probe_until is not None:
            self.probed(job)
        if (explanation := self._explanation) is not None:
            explanation.arrived, explanation.decoding_s = part.ticket.arrived, job.decoding_s
        status = reply(rows)
        if not status:
            self.counters.answered += 1
        elif status == LATER:  # the answer is still being written
            self._writing[job.request] = part.ticket.arrived
        else:
            self.refuse(status, self.clock.now() - part.ticket.arrived)
        return not status

    def probed(self, job: Job) -> None:
        """A request has been answered: if it was a probe, learn from it."""
        if job.probe_until is not None:
            self._probes.ended(job.probe_until, self.clock.now(), self.profile)

    def _fail_all(self, parts: list[Part[Job]], error: BaseException) -> None:
        """Answer the requests of a batch that have no answer yet with an error."""
        answer = error if isinstance(error, Exception) else EngineError("the engine stopped", repr(error))
        for part in parts:
            ticket, job = part.ticket, part.ticket.item
            if job.reply is not None:
                self._count_failed(self.clock.now() - ticket.arrived)
                self._drop(ticket)
                self.reply_once(job, answer)

    def _count_failed(self, took_s: float) -> None:
        self.counters.failed += 1
        self.statistics.failed("engine", took_s)

    def reply_once(self, job: Job, result: Exception) -> None:
        """Answer a request with an error. What the reply raises affects no other request."""
        reply, job.reply = job.reply, None
        if reply is not None:
            try:
                reply(result)
            except Exception as wrong:
                self._report(wrong)

    def _report(self, wrong: Exception) -> None:
        """Report an internal error to the event loop."""
        self._loop.call_exception_handler({"message": "answering a batch failed", "exception": wrong})

    def _drop(self, ticket: Ticket[Job]) -> None:
        """Remove the rest of a request from the queue."""
        self.batcher.cancel(ticket)
        job = ticket.item
        job.ticket = None
        job.request.tensors = ()
