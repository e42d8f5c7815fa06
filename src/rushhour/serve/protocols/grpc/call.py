"""`InferCall`: one inference request on its way through a cell."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from rushhour.serve.memory.budget import Budget, Grant
from rushhour.serve.observability.explanation import Explanation
from rushhour.serve.observability.requests import CANCELLED, FollowedRequest
from rushhour.serve.protocols.grpc.codec import GrpcCodec, GrpcRequest, parameter_of, stream_answer, stream_error
from rushhour.serve.protocols.grpc.errors import end, error_text, status_of, without_frames
from rushhour.serve.scheduling.job import LATER, Job, Shed, ShedError, owned
from rushhour.serve.scheduling.stage import Stage


class InferCall:
    """An inference request on its way through a cell.

    Attributes:
        times: of its answer, as `Server-Timing` gives them; empty before it, and where answers do not give them.
    """

    __slots__ = (
        *("_answered", "_budget", "_cell", "_codec", "_explanation", "_followed", "_grant"),
        *("_job", "_request", "_writing", "times"),
    )

    def __init__(
        self,
        cell: Stage,
        codec: GrpcCodec,
        request: GrpcRequest,
        within_s: float | None,
        followed: FollowedRequest | None,
        budget: Budget,
        grant: Grant | None,
        explanation: Explanation | None = None,
    ) -> None:
        self.times = ""
        self._explanation = explanation
        self._answered: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._writing: asyncio.Task[None] | None = None
        self._budget = budget
        self._grant = grant
        self._cell = cell
        self._codec = codec
        self._request = request
        self._followed = followed
        infer_request = request.request
        if within_s is not None:  # the client's own deadline: it does not wait longer
            wanted = infer_request.wanted
            timeout = within_s if wanted.timeout_s is None else min(within_s, wanted.timeout_s)
            infer_request.wanted = msgspec.structs.replace(wanted, timeout_s=max(timeout, 1e-6))
        submitted = cell.submit(infer_request, self._reply)
        if isinstance(submitted, Shed):
            raise ShedError(submitted.why, submitted.retry_after_s)
        self._job: Job | None = submitted

    async def answer(self) -> bytes:
        """The answer as a message; cancelling this cancels the request."""
        try:
            return await self._answered
        except asyncio.CancelledError:
            self.cancel()
            raise

    async def stream_answer(self) -> bytes:
        """The answer as a message of a stream, or the error as one."""
        try:
            answer = await self.answer()  # the metadata of a stream ends it: each answer carries its times
            return stream_answer(answer + parameter_of("server_timing", self.times) if self.times else answer)
        except Exception as error:
            return stream_error(error_text(error), self._request.id)

    def cancel(self) -> None:
        """Drop the request and its answer."""
        self._answered.cancel()
        if self._job is not None:
            self._cell.cancel(self._job)
            self._job = None
        end(self._followed, CANCELLED)

    def _reply(self, result: Sequence[memoryview] | Exception) -> int | None:
        self._job = None
        if self._answered.done():
            return None
        if isinstance(result, Exception):
            self._fail(result)
            return None
        explanation, variant = self._explanation, ""
        if explanation is not None:
            self.times, variant = explanation.times().decode(), explanation.variant
        if self._codec.is_large_answer(self._request):
            self._writing = asyncio.ensure_future(self._write_on_thread(owned(result), variant))
            return LATER
        try:
            self._succeed(self._codec.encode(self._request, result, variant))
        except Exception as error:
            self._fail(error)
            return status_of(error)
        return None

    async def _write_on_thread(self, result: Sequence[memoryview], variant: str) -> None:
        status: int | None = None
        try:
            self._succeed(await self._budget.on_thread(self._codec.encode, self._request, result, variant))
        except Exception as error:
            status = status_of(error)
            self._fail(error)
        finally:
            self._cell.written(self._request.request, status)

    def _succeed(self, answer: bytes) -> None:
        self._grant = None
        if not self._answered.done():
            self._answered.set_result(answer)
            end(self._followed, 200)

    def _fail(self, error: Exception) -> None:
        self._grant = None
        if not self._answered.done():  # the error may come from a step after the answer
            # Its frames would keep the request's body or region in memory until a garbage collection.
            self._answered.set_exception(without_frames(error))
        end(self._followed, status_of(error))
