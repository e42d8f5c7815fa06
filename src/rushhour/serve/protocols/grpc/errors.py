"""Errors as gRPC statuses, and the end of calls that fail."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import grpc

from rushhour.errors import RushhourError, WireError
from rushhour.serve.observability.requests import FollowedRequest
from rushhour.serve.scheduling.job import ShedError

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.ALREADY_EXISTS,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
_MAX_DETAILS = 1000
"""Characters of an error's message."""

Context = Any
"""`grpc.aio.ServicerContext`; grpcio has no types."""


class TooLarge(WireError):
    """A message is too large after decompression."""

    def __init__(self, limit: int) -> None:
        why = f"the limit is {limit} bytes after decompression"
        super().__init__("the message is too large", why, "split it", status=413)


def stopping() -> WireError:
    """The error for requests that arrive while the server stops."""
    return WireError("the server is stopping", "", "use another server", status=503)


def status_of(error: Exception) -> int:
    """The HTTP status of an error."""
    return error.status if isinstance(error, WireError) else 500


def end(followed: FollowedRequest | None, status: int) -> None:
    """A call has ended with this HTTP status."""
    if followed is not None:
        followed.end(status)


async def refuse(context: Context, error: Exception) -> NoReturn:
    """Abort a call with an error."""
    code = _CODES.get(status_of(error), grpc.StatusCode.INTERNAL)
    if isinstance(error, TooLarge):
        code = grpc.StatusCode.RESOURCE_EXHAUSTED  # as grpcio does for uncompressed messages
    without_frames(error)  # abort's own error refers to this one, whose frames refer to the message
    # Not `grpc-retry-pushback-ms`: clients with a retry policy would then retry by themselves.
    metadata: tuple[tuple[str, str], ...] = ()
    if isinstance(error, ShedError):
        metadata = (("retry-after-ms", str(math.ceil(1e3 * error.retry_after_s))),)
    aborting = context.abort(code, error_text(error), metadata)
    del context
    await aborting
    raise AssertionError("abort does not return")


def error_text(error: Exception) -> str:
    """The message of an error, cut to a bounded length."""
    text = str(error) if isinstance(error, RushhourError) else f"internal error: {type(error).__name__}"
    return text[:_MAX_DETAILS]


def without_frames(error: BaseException) -> BaseException:
    """Drop the tracebacks of an error and of its causes: their frames would keep requests in memory."""
    each: BaseException | None = error
    while each is not None and each.__traceback__ is not None:
        each.__traceback__ = None
        each = each.__cause__ or each.__context__
    return error
