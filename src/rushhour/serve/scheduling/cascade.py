"""`Cascade`: two stages as one. The first answers what it is sure of, and the rest goes on to the second.

A row that goes on keeps its absolute deadline and its priority. Where the second stage would be too late, is full or
fails, the first answer stands: it is kept until then, and sent at the deadline at the latest. Rows of one request may
go different ways; they are merged in order.

Whether rows go on is decided once per batch of the first stage, for all of its rows at once. Nothing is added per
request but one object: no timer, no future. One timer serves all requests that have gone on.

Everything here runs on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from rushhour.cascade import CascadeRule
from rushhour.clock import Clock
from rushhour.errors import WireError
from rushhour.serve.observability import log
from rushhour.serve.observability.explanation import Explanation, Kept
from rushhour.serve.observability.statistics import Batch, ModelState, Stages, Totals, add_counts
from rushhour.serve.scheduling.alarm import Alarm
from rushhour.serve.scheduling.cell import SHARE_OF_DEADLINE, Cell
from rushhour.serve.scheduling.job import LATER, Job, OwnedViews, Reply, Shed, ShedError
from rushhour.serve.scheduling.speed import Speeds, sum_speeds
from rushhour.serve.scheduling.stage import Stage
from rushhour.wire import InferRequest, Layout

_TIMELY_S = 5e-4
"""What is due within this time is answered now: the event loop's timers are no more precise."""
_RETRY_S = 0.1
_LEFT_OVER = 64
"""Entries of requests that have ended, beyond those of all others, before they are removed from the queue."""

Stood = Literal["shed", "late", "failed"]
"""Why a first answer stood: the second stage had no room or no time for it on arrival; it had none until the deadline;
its engine failed."""


class Cascade:
    """Two stages behind the face of one.

    Args:
        first: the cell that every request goes to. Its requests keep their tensors until they are answered.
        second: the stage that gets what the first is not sure of: a cell, or another cascade.
        rule: when that is.
        step: position of the first stage in the rule.
        clock: of both.
        explanation: what answers say about themselves; None where they do not.

    Attributes:
        first: the same. It counts what clients see: answers, errors, latencies from arrival to answer.
        escalated: rows that went on.
        stood: requests whose first answer stood for some of their rows, by reason.
    """

    def __init__(
        self,
        first: Cell,
        second: Stage,
        rule: CascadeRule,
        step: int,
        clock: Clock,
        explanation: Explanation | None = None,
    ) -> None:
        self.first = first
        self.second = second
        self.escalated = 0
        self.stood: dict[str, int] = dict.fromkeys(get_args(Stood), 0)
        self._rule = rule
        self._step = step
        self._clock = clock
        self._explanation = explanation
        self._loop = asyncio.get_running_loop()
        for variant in first.variants:
            variant.keeps = True
        signature = first.active.engine.signature
        specs = signature.outputs
        self._output = next(index for index, spec in enumerate(specs) if spec.name == rule.output)
        self._spec = specs[self._output]
        self._limit_s = math.inf if first.policy.deadline_ms is None else first.policy.deadline_ms / 1e3
        self._gone_on: dict[Job, _Passage] = {}
        self._due: list[tuple[float, int, _Passage]] = []
        self._order = 0
        self._alarm = Alarm(clock, self._end_due)
        self._failing = False
        self.codec = first.codec
        self.decoder = first.decoder
        self.policy = first.policy
        self.profile = first.profile

    # As a `Stage`.

    @property
    def idle(self) -> bool:
        """Whether nothing waits, nothing runs, and no answer is being written in either stage."""
        return self.first.idle and self.second.idle

    @property
    def waiting(self) -> int:
        """Samples in the queues."""
        return self.first.waiting + self.second.waiting

    @property
    def running(self) -> tuple[int, int]:
        """Batches in flight, and their samples."""
        (batches, rows), (more_batches, more_rows) = self.first.running, self.second.running
        return batches + more_batches, rows + more_rows

    @property
    def batches(self) -> int:
        """Batches of both stages that have begun until now."""
        return self.first.batches + self.second.batches

    @property
    def longest_batch_s(self) -> float:
        """Seconds that the largest batch takes, of the slower stage."""
        return max(self.first.longest_batch_s, self.second.longest_batch_s)

    @property
    def waits_for(self) -> tuple[int, float]:
        """As of the first stage."""
        return self.first.waits_for

    @property
    def progress(self) -> tuple[int, ...]:
        """Changes whenever a request or a batch begins or ends in either stage."""
        return *self.first.progress, *self.second.progress, len(self._gone_on)

    @property
    def answering(self) -> Batch | None:
        """The batch whose requests are being answered, for followed requests."""
        return self.second.answering or self.first.answering

    @property
    def speed(self) -> float | None:
        """The host's speed, by the batches of the first stage."""
        return self.first.speed

    def speeds(self) -> Speeds:
        """The expected and the measured times of the batches of the last minutes, of both stages."""
        return sum_speeds([self.first.speeds(), self.second.speeds()])

    def totals(self) -> Totals:
        """The counters up to now: requests as clients see them, batches of both stages. A copy.

        A request that went on has the times of all of its batches, as one that was split.
        """
        totals, second = Totals(), self.second.totals()
        totals.add(self.first.totals())
        totals.batches += second.batches
        totals.last_s = max(totals.last_s, second.last_s)
        add_counts(totals.of_variant, second.of_variant)
        totals.inference_s.add(second.inference_s)
        for rows, stages in second.of_size.items():
            totals.of_size.setdefault(rows, Stages()).add(stages)
        for own, more in zip(totals.stages.named(), second.stages.named(), strict=True):
            own[1].add(0, more[1].seconds)
        totals.escalated += self.escalated + second.escalated
        for counts in (self.stood, second.stood):
            add_counts(totals.stood, counts)
        return totals

    def describe(self, state: ModelState) -> None:
        """As of the first stage, with what waits and runs in the second."""
        self.first.describe(state)
        state.waiting = self.waiting
        state.batches, state.running = self.running

    def shown(self) -> Mapping[str, Any]:
        """The rule."""
        return {**self.first.shown(), "cascade": self._rule}

    def shed_early(self, layout: Layout | InferRequest | None) -> Shed | None:
        """As of the first stage: what has an answer of it is never shed later."""
        return self.first.shed_early(layout)

    def submit(self, request: InferRequest, reply: Reply) -> Job | Shed:
        """As `Cell.submit`; `reply` is called once, with the merged answer."""
        passage = _Passage(self, request, reply, self._clock.now())
        submitted = self.first.submit(request, passage)
        if not isinstance(submitted, Shed):
            passage.job = submitted
        return submitted

    def refuse(self, status: int, seconds: float) -> None:
        """As `Cell.refuse`."""
        self.first.refuse(status, seconds)

    def written(self, request: InferRequest, status: int | None) -> None:
        """As `Cell.written`."""
        self.first.written(request, status)

    def cancel(self, job: Job) -> None:
        """The client has disconnected: drop what waits in either stage, and the answer to what runs."""
        passage = self._gone_on.get(job)
        if passage is None:
            self.first.cancel(job)
            return
        self._over(passage)
        self.first.cancel(job)

    def abandon(self, error: Exception) -> None:
        """Answer all requests: with the first answer where there is one, else with `error`."""
        for passage in list(self._gone_on.values()):
            self._stand(passage, "failed", error)
        self.second.abandon(error)
        self.first.abandon(error)

    def distrust(self) -> None:
        """As `Stage.distrust`, of both."""
        self.first.distrust()
        self.second.distrust()

    def close(self) -> None:
        """As `Stage.close`, of both."""
        self.first.close()
        self.second.close()

    # From the first stage to the second.

    def sort_out(self, passage: _Passage, result: Sequence[memoryview]) -> Sequence[memoryview] | ShedError | None:
        """The first stage has answered a request: send on the rows that it is not sure of.

        Returns:
            None where some went on, else what to answer.
        """
        request = passage.request
        passage.rows = at = self._unsure(result, request.rows)
        if not at:
            return result
        passage.deadline = self._deadline(request, passage.arrived)
        submitted = self.second.submit(self._further(passage), partial(self._answered, passage))
        if isinstance(submitted, Shed):
            if not self._rule.stands:
                return ShedError(submitted.why, submitted.retry_after_s)
            self.stood["shed"] += 1
            return result
        self.escalated += len(at)
        passage.further = submitted
        passage.first_answer = OwnedViews(memoryview(bytearray(view)) for view in result)
        passage.kept = None if self._explanation is None else self._explanation.keep()
        request.tensors = ()
        assert passage.job is not None
        self._gone_on[passage.job] = passage
        if passage.deadline < math.inf:
            self._order += 1
            heapq.heappush(self._due, (passage.deadline, self._order, passage))
            self._alarm.set(passage.deadline)
        return None

    def _unsure(self, result: Sequence[memoryview], rows: int) -> list[int]:
        """Which rows of a request go on. All rows of its batch are judged with the first request of it."""
        stream = self.first.answering
        if stream is None or isinstance(result, OwnedViews):  # it was split: its rows come from several batches
            whole = np.frombuffer(result[self._output], self._spec.dtype)
            split: list[int] = np.flatnonzero(self._judged(whole, rows)).tolist()
            return split
        judged = stream.judged
        if judged is None:
            judged = stream.judged = self._judged(stream.slot.outputs[self._rule.output], stream.rows).tolist()
        if rows == 1:
            return [0] if judged[stream.at] else []
        return [row for row, goes_on in enumerate(judged[stream.at : stream.at + rows]) if goes_on]

    def _judged(self, outputs: NDArray[Any], rows: int) -> NDArray[np.bool_]:
        return self._rule.goes_on(self._step, outputs.reshape(rows, -1))

    def _deadline(self, request: InferRequest, arrived: float) -> float:
        """When a request must be answered, on the clock; infinite where it has no deadline."""
        own_s = request.wanted.timeout_s
        return arrived + SHARE_OF_DEADLINE * (self._limit_s if own_s is None else min(self._limit_s, own_s))

    def _further(self, passage: _Passage) -> InferRequest:
        """The rows of a request that go on, with what is left of its time."""
        request, at = passage.request, passage.rows
        tensors, wanted = request.tensors, request.wanted
        if len(at) < request.rows:
            tensors = tuple(_rows_of(tensor, request.rows)[at].reshape(-1).data for tensor in tensors)
        if passage.deadline < math.inf:
            left_s = max(0.0, passage.deadline - self._clock.now()) / SHARE_OF_DEADLINE
            wanted = msgspec.structs.replace(wanted, timeout_s=left_s)
        return InferRequest(len(at), tensors, wanted)

    # From the second stage, or instead of it.

    def _answered(self, passage: _Passage, result: Sequence[memoryview] | Exception) -> None:
        """The second stage has answered the rows of a request that went on, or failed to."""
        passage.further = None
        if isinstance(result, ShedError):
            self._stand(passage, "late", result)
        elif isinstance(result, Exception):
            self._report_failure(result)
            self._stand(passage, "failed", result)
        else:
            self._failing = False
            whole = passage.first_answer
            assert whole is not None
            is_mixed = len(passage.rows) < passage.request.rows
            if self._explanation is not None and passage.kept is not None:
                self._explain(self._explanation, passage.kept, is_mixed=is_mixed)
            if not is_mixed:
                self._finish(passage, result)
                return
            for mine, theirs in zip(whole, result, strict=True):
                _rows_of(mine, passage.request.rows)[passage.rows] = _rows_of(theirs, len(passage.rows))
            self._finish(passage, whole)

    def _explain(self, explanation: Explanation, first: Kept, *, is_mixed: bool) -> None:
        """The second stage has given rows of an answer: its times are counted from the arrival at the first."""
        if is_mixed:
            last = explanation.keep()
            explanation.resume(last._replace(variant=f"{first.variant}+{last.variant}"), self._clock.now())
        explanation.arrived, explanation.decoding_s = first.arrived, first.decoding_s

    def _stand(self, passage: _Passage, reason: Stood, error: Exception) -> None:
        """The first answer stands; by a rule under which none does, the answer is the error."""
        if not self._rule.stands:
            self._finish(passage, error)
            return
        self.stood[reason] += 1
        assert passage.first_answer is not None
        if self._explanation is not None and passage.kept is not None:
            self._explanation.resume(passage.kept, self._clock.now())
        self._finish(passage, passage.first_answer)

    def _finish(self, passage: _Passage, answer: Sequence[memoryview] | Exception) -> None:
        """Answer a request of which rows had gone on."""
        reply, status = passage.reply, 500
        self._over(passage)
        try:
            status = reply(answer) or (_status_of(answer) if isinstance(answer, Exception) else 0)
        finally:
            if status != LATER:
                self.first.written(passage.request, status or None)

    def _over(self, passage: _Passage) -> None:
        """It is answered, or its answer is not needed: drop what is left of it in the second stage."""
        assert passage.job is not None
        del self._gone_on[passage.job]
        if passage.further is not None:
            self.second.cancel(passage.further)
        # The entry in the queue of deadlines must not keep a connection and its answer in memory.
        passage.further = passage.first_answer = passage.job = passage.kept = None
        passage.reply = _nobody
        if len(self._due) > 2 * len(self._gone_on) + _LEFT_OVER:
            self._due = [entry for entry in self._due if entry[2].job is not None]
            heapq.heapify(self._due)

    def _report_failure(self, error: Exception) -> None:
        """Log that the second stage fails, once until it answers again."""
        if not self._failing:
            self._failing = True
            variant = self._rule.variants[self._step + 1]
            log.event(logging.ERROR, "the next variant of the cascade fails", variant=variant, why=str(error))

    def _end_due(self) -> None:
        """First answers stand whose deadline is reached."""
        until = self._clock.now() + _TIMELY_S
        while self._due and (self._due[0][0] <= until or self._due[0][2].job is None):
            _, _, passage = heapq.heappop(self._due)
            if passage.job is not None:
                try:
                    self._stand(passage, "late", ShedError("the next variant did not answer in time", _RETRY_S))
                except Exception as wrong:  # in the reply of one request: the others are answered all the same
                    self.report(wrong)
        if self._due:
            self._alarm.set(self._due[0][0])

    def report(self, wrong: Exception) -> None:
        """Report an internal error to the event loop."""
        self._loop.call_exception_handler({"message": "a cascade failed", "exception": wrong})


class _Passage:
    """A request on its way through a cascade, and the reply of its job in the first stage.

    Attributes:
        job: in the first stage; None when the request is answered.
        rows: those that went on.
        further: their job in the second stage, until it ends.
        first_answer: of all rows.
        kept: what that answer says about itself.
    """

    __slots__ = (
        *("arrived", "cascade", "deadline", "first_answer", "further"),
        *("job", "kept", "reply", "request", "rows"),
    )

    def __init__(self, cascade: Cascade, request: InferRequest, reply: Reply, arrived: float) -> None:
        self.cascade = cascade
        self.request = request
        self.reply = reply
        self.arrived = arrived
        self.deadline = math.inf
        self.job: Job | None = None
        self.rows: list[int] = []
        self.further: Job | None = None
        self.first_answer: OwnedViews | None = None
        self.kept: Kept | None = None

    def __call__(self, result: Sequence[memoryview] | Exception) -> int | None:
        """The answer of the first stage; returns as a `Reply`."""
        if isinstance(result, Exception):
            return self.reply(result)
        answer: Sequence[memoryview] | ShedError | None = result
        try:
            answer = self.cascade.sort_out(self, result)
        except Exception as wrong:  # the request has an answer all the same
            self.cascade.report(wrong)
        if answer is None:
            return LATER
        status = self.reply(answer)
        return status or (answer.status if isinstance(answer, ShedError) else None)


def _status_of(error: Exception) -> int:
    return error.status if isinstance(error, WireError) else 500


def _nobody(result: Sequence[memoryview] | Exception) -> int | None:
    """The reply of a request that is answered."""
    return None


def _rows_of(view: memoryview, rows: int) -> NDArray[np.uint8]:
    """A view of raw rows, shape `(rows, bytes)`."""
    return np.frombuffer(view, np.uint8).reshape(rows, -1)
