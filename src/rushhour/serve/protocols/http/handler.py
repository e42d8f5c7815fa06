"""`RequestHandler`: answers a request, by inference or by the control paths."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import cast

import msgspec

from rushhour.errors import WireError
from rushhour.serve.access.origin import Client
from rushhour.serve.memory.decompression import inflate
from rushhour.serve.protocols.http.answers import CHALLENGE, ENCODINGS, OK, error_body, retry_field, status_of
from rushhour.serve.protocols.http.endpoint import HttpEndpoint
from rushhour.serve.protocols.http.message import KnownHead, Message
from rushhour.serve.protocols.http.pipeline import Pipeline
from rushhour.serve.protocols.http.repeats import KnownRequest, PreparedAnswer
from rushhour.serve.protocols.http.routes import MAX_BODY_BYTES, Answer, not_allowed
from rushhour.serve.scheduling.job import LATER, Job, OwnedViews, Shed, ShedError, owned
from rushhour.serve.scheduling.stage import Stage
from rushhour.serve.scheduling.tabulating import Tabulator
from rushhour.wire import (
    EMBEDDINGS,
    ROWS,
    WHOLE_BYTES,
    Body,
    Codec,
    EmbeddingRequest,
    InferRequest,
    Parts,
    PlacedRequest,
    RowsRequest,
    decode_embeddings,
    decode_rows,
)

_OPEN_PATHS = frozenset((b"/v2/health/live", b"/v2/health/ready"))
"""Health checks; they need no API key, and answer only yes or no."""
HELD_BYTES = 64 * 1024
"""Bodies from this size on count in the budget."""
_EMBEDDINGS = EMBEDDINGS.encode()
_ROWS = f"/{ROWS}".encode()
MAX_KNOWN = 8
"""Heads kept per connection: a proxy sends the requests of several clients over one."""


class RequestHandler(Pipeline):
    """Answers the requests of one connection.

    Args:
        endpoint: that the connection belongs to.
    """

    def __init__(self, endpoint: HttpEndpoint) -> None:
        super().__init__(endpoint)
        self._cell: Stage | None = None
        self._request: InferRequest | None = None
        self._job: Job | None = None
        self._waiting: asyncio.Future[None] | None = None
        self._repeat: KnownRequest | None = None
        self._repeats: list[KnownRequest] = []
        self._explanation = endpoint.explanation

    def _begin(self, message: Message) -> None:
        self._current = message
        try:
            self._route(message)
        except Exception as error:
            self._fail_unexpectedly(error)

    def _fail_unexpectedly(self, error: Exception) -> None:
        """Answer 500 to an internal error and log it; other requests are not affected."""
        self._report(error)
        if self._current is not None:
            self._count(500)
            self._send_or_abort(error)

    def _send_or_abort(self, error: Exception) -> None:
        try:
            self._send_error(error)
        except Exception:  # not even an error can be sent
            if self._transport is not None:
                self._transport.abort()

    def _report(self, error: Exception) -> None:
        asyncio.get_running_loop().call_exception_handler({"message": "a request failed", "exception": error})

    def _admits(self, path: bytes, message: Message) -> bool:
        return not self._endpoint.keys or path in _OPEN_PATHS or self._endpoint.keys.admit(message.authorization)

    def _challenge(self) -> None:
        self._count(401)
        error = WireError("this server needs an API key", "", "send 'Authorization: Bearer KEY'", status=401)
        self._send(401, error_body(error, self._path()), CHALLENGE)

    def _route(self, message: Message) -> None:
        path, _, _ = message.target.partition(b"?")
        if not self._admits(path, message):
            self._challenge()
            return
        cell = self._endpoint.stages.get(path)
        is_question = message.method in (b"GET", b"HEAD") and path.endswith(_ROWS)
        if cell is None or message.method == b"OPTIONS" or is_question:
            if message.body and message.encoding not in (b"", b"identity"):
                why = "this path does not accept compression"
                self._fail(WireError("the body is compressed", why, "send it uncompressed", status=415))
                return
            body = b"".join(memoryview(part)[: MAX_BODY_BYTES + 1] for part in message.body)
            answer = self._endpoint.control(message.method, path, body, message.accept, self._client(message))
            if isinstance(answer, tuple):
                self._send_answer(*answer)
            else:
                self._waiting = asyncio.ensure_future(self._send_later(answer))
        elif message.method != b"POST":
            self._count(405)
            self._send_answer(*not_allowed(message.method, ("POST", "OPTIONS")))
        else:
            self._infer(cell, message)

    def _client(self, message: Message) -> Client:
        if self._transport is None:
            return Client(message.client)
        peer, here = (self._transport.get_extra_info(name) for name in ("peername", "sockname"))
        return Client(message.client, peer[:2] if peer else None, here[:2] if here else None)

    async def _send_later(self, answer: Awaitable[Answer]) -> None:
        try:
            self._send_answer(*await answer)
        except Exception as error:
            self._fail_unexpectedly(error)

    def _infer(self, cell: Stage, message: Message) -> None:
        body = message.body[0] if len(message.body) == 1 else b"".join(message.body)
        message.body.clear()
        if message.encoding in (b"", b"identity"):
            self._submit(self._named(cell, message, body), message, body)
        else:
            self._waiting = asyncio.ensure_future(self._inflate(message, body))

    def _named(self, cell: Stage, message: Message, body: Body) -> Stage:
        """The cell of the model that a request names: its path does, but for embeddings."""
        return self._endpoint.embedder(body, cell) if message.target.startswith(_EMBEDDINGS) else cell

    async def _inflate(self, message: Message, body: Body) -> None:
        """Decompress on a thread: a small body may become a large one, and would block the event loop."""
        try:
            unpacked = await self._endpoint.budget.decompress(inflate, body, message.encoding, self._limits.body_bytes)
            if len(unpacked) > HELD_BYTES:
                message.grant = self._endpoint.budget.grant(len(unpacked))
                self._endpoint.budget.trim_soon()
            message.body, message.encoding = [unpacked], b""
            if self._transport is not None:
                self._route(message)  # again: a reload may have replaced the cell
        except WireError as error:
            self._fail(error, ENCODINGS if error.status == 415 else b"")
        except Exception as error:
            self._fail_unexpectedly(error)

    def _submit(self, cell: Stage, message: Message, body: Body) -> None:
        try:
            request: InferRequest
            if message.target.startswith(_EMBEDDINGS):
                if len(body) > WHOLE_BYTES:
                    read = partial(decode_embeddings, cell.codec)
                    self._waiting = asyncio.ensure_future(self._decode_on_thread(cell, message, body, read))
                    return
                request = decode_embeddings(cell.codec, body)
            elif self._path().endswith(_ROWS):
                if len(body) > WHOLE_BYTES:
                    read_rows = partial(decode_rows, cell.codec)
                    self._waiting = asyncio.ensure_future(self._decode_on_thread(cell, message, body, read_rows))
                    return
                rows = request = decode_rows(cell.codec, body)
                cast(Tabulator, cell.decoder).prepare_few(rows)
            elif message.is_picture and message.header_length is None:
                request = cell.codec.decode_picture(body)
            else:
                length = header_length(message.header_length)
                if cell.codec.is_large(body, length):
                    decode = partial(cell.codec.decode, header_length=length)
                    self._waiting = asyncio.ensure_future(self._decode_on_thread(cell, message, body, decode))
                    return
                request = cell.codec.decode(body, length)
            self._check_origin(message, request)
        except WireError as error:
            self._refuse_request(cell, error)
            return
        if message.known is not None and message.header_length:
            self._remember_whole(message.known, cell.codec, message, bytes(body[: int(message.header_length)]))
        if request.unread_bytes:
            self._fetch(cell, message, body, cast(PlacedRequest, request))
        else:
            self._enqueue(cell, request)

    def _check_origin(self, message: Message, request: InferRequest) -> None:
        """No web page may have an answer written into shared memory."""
        if request.wanted.places:
            self._endpoint.check_origin(Client(message.client))

    def _refuse_request(self, cell: Stage, error: WireError) -> None:
        cell.refuse(error.status, self._clock() - self._since)
        self._send_error(error)

    def _remember_whole(self, known: KnownHead, codec: Codec, message: Message, header: bytes) -> None:
        """Keep head and JSON header to recognise the next request, if only tensors follow."""
        layout = codec.known(header)
        if layout is not None and layout.ordered:
            repeat = KnownRequest(known, codec, message.target.partition(b"?")[0], header, layout)
            self._repeats = [repeat, *self._repeats[: MAX_KNOWN - 1]]
            if repeat.exact:
                self._repeat = repeat

    async def _decode_on_thread(
        self, cell: Stage, message: Message, body: Body, decode: Callable[[Body], InferRequest]
    ) -> None:
        """Read a large request on a thread."""
        try:
            request = await self._endpoint.budget.on_thread(decode, body)
            self._check_origin(message, request)
        except WireError as error:
            self._refuse_request(cell, error)
        except Exception as error:
            self._fail_unexpectedly(error)
        else:
            self._continue(cell, message, body, request)

    def _fetch(self, cell: Stage, message: Message, body: Body, request: PlacedRequest) -> None:
        """Read tensors from shared memory, if the request is admitted."""
        shed = cell.shed_early(request)
        if shed is not None:
            self._send_shed(shed)
        elif request.large:
            self._waiting = asyncio.ensure_future(self._fetch_on_thread(cell, message, body, request))
        else:
            try:
                fetched = request.fetch()
            except WireError as error:
                self._refuse_request(cell, error)
                return
            self._enqueue(cell, fetched)

    async def _fetch_on_thread(self, cell: Stage, message: Message, body: Body, request: PlacedRequest) -> None:
        try:
            message.grant = self._endpoint.budget.grant(request.unread_bytes)
            fetched = await self._endpoint.budget.on_thread(request.fetch)
        except WireError as error:
            self._refuse_request(cell, error)
        except Exception as error:
            self._fail_unexpectedly(error)
        else:
            self._continue(cell, message, body, fetched)

    def _continue(self, cell: Stage, message: Message, body: Body, request: InferRequest) -> None:
        """A request has been read on a thread."""
        if self._transport is None:
            return
        try:
            now = self._endpoint.stages.get(message.target.partition(b"?")[0])
            if now is None or self._named(now, message, body).codec is not cell.codec:
                message.body = [body]
                self._route(message)  # again: a reload has replaced the cell
            elif request.unread_bytes:
                self._fetch(cell, message, body, cast(PlacedRequest, request))
            else:
                self._enqueue(cell, request)
        except Exception as error:
            self._fail_unexpectedly(error)

    def _enqueue(self, cell: Stage, request: InferRequest) -> None:
        self._cell, self._request = cell, request
        submitted = cell.submit(request, self._answered)
        if isinstance(submitted, Shed):
            self._send_shed(submitted)
        else:
            self._job = submitted

    def _send_shed(self, shed: Shed) -> None:
        self._send_error(ShedError(shed.why, shed.retry_after_s))

    def _answered(self, result: Sequence[memoryview] | Exception) -> int | None:
        cell, request, current = self._cell, self._request, self._current
        self._job = self._request = None
        assert cell is not None
        assert request is not None
        try:
            if isinstance(result, Exception):
                self._send_error(result)
            else:
                times, variant = b"", ""
                explanation = self._explanation
                if explanation is not None:
                    times, variant = explanation.field(), explanation.variant
                if isinstance(current, PreparedAnswer):
                    head = current.ready if current.ready_for is variant else current.head(variant)
                    if head is not None and not (self._endpoint.draining or request.wanted.shapes):
                        if self._transport is not None:
                            self._transport.write(b"".join((OK, self._endpoint.date, times, head, *result)))
                            self._next(close=False)
                        return None
                    if current.id:
                        request.wanted = msgspec.structs.replace(request.wanted, id=current.id.decode())
                return self._reply(cell, request, result, variant, times)
        except Exception as error:
            return self._answer_failed(error)
        return None

    def _reply(
        self, cell: Stage, request: InferRequest, result: Sequence[memoryview], variant: str, times: bytes
    ) -> int | None:
        """Write the answer, or an error; returns the error's status, which the cell counts."""
        if isinstance(request, EmbeddingRequest | RowsRequest):
            large = request.is_large
        else:
            large = cell.codec.is_large_answer(request.wanted, request.rows)
        if large:
            writing = self._write_on_thread(cell, request, owned(result), variant, times)
            self._waiting = asyncio.ensure_future(writing)
            return LATER
        try:
            length, parts = _encoded(cell.codec, request, result, variant)
        except Exception as error:  # raised further it would reach the other requests of the batch
            return self._write_failed(error)
        self._send_encoded(length, parts, times, lasts=isinstance(result, OwnedViews))
        return None

    async def _write_on_thread(
        self, cell: Stage, request: InferRequest, result: Sequence[memoryview], variant: str, times: bytes
    ) -> None:
        """Write a large answer on a thread."""
        status: int | None = None
        try:
            try:
                length, parts = await self._endpoint.budget.on_thread(_encoded, cell.codec, request, result, variant)
            except Exception as error:
                status = self._write_failed(error)
            else:
                self._send_encoded(length, parts, times, lasts=True)
        except Exception as error:
            status = self._answer_failed(error)
        finally:
            cell.written(request, status)

    def _write_failed(self, error: Exception) -> int:
        """The answer could not be written: send an error; returns its status, which the cell counts."""
        if not isinstance(error, WireError):
            self._report(error)
        self._send_error(error)
        return status_of(error)

    def _answer_failed(self, error: Exception) -> int:
        """Neither answer nor error was sent: send an error, or close the connection."""
        self._report(error)
        if self._current is not None:
            self._send_or_abort(error)
        return 500

    def _count(self, status: int) -> None:
        current = self._current
        if isinstance(current, Message) and self._transport is not None:
            self._endpoint.refused(current.target.partition(b"?")[0], status, self._clock() - self._since)

    def _fail(self, error: Exception, extra: bytes = b"") -> None:
        """Answer with an error, and count it."""
        self._count(status_of(error))
        self._send_error(error, extra)

    def _send_error(self, error: Exception, extra: bytes = b"") -> None:
        self._send(status_of(error), error_body(error, self._path()), extra + retry_field(error))

    def _path(self) -> bytes:
        """The path of the request that is being answered; empty where its head was recognised by its bytes."""
        return self._current.target.partition(b"?")[0] if isinstance(self._current, Message) else b""


def _encoded(
    codec: Codec, request: InferRequest, result: Sequence[memoryview], variant: str
) -> tuple[int | None, Parts]:
    """As `Codec.encode`, in the form that the request came in."""
    if isinstance(request, EmbeddingRequest | RowsRequest):
        return None, request.encode(result)
    return codec.encode(request.wanted, request.rows, result, variant)


def header_length(value: bytes | None) -> int | None:
    """The value of `Inference-Header-Content-Length`. Raises a `WireError` if it is not a number."""
    if value is None:
        return None
    if not (value.isdigit() and len(value) <= 12):
        raise WireError(
            f"Inference-Header-Content-Length is {value[:40].decode('latin-1')!r}",
            "it is the length of the JSON header in bytes",
            "send a whole number",
        )
    return int(value)
