"""Answers as bytes: the parts that are always the same, and errors."""

from __future__ import annotations

import math

import msgspec

from rushhour.errors import RushhourError, WireError
from rushhour.serve.scheduling.job import ShedError
from rushhour.wire import openai_error

_OF_OPENAI = b"/v1/"
CHALLENGE = b"www-authenticate: Bearer\r\n"
REASONS = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    411: "Length Required",
    413: "Content Too Large",
    414: "URI Too Long",
    415: "Unsupported Media Type",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}
OK = b"HTTP/1.1 200 OK\r\n"
BINARY = (
    b"content-type: application/octet-stream\r\ninference-header-content-length: %d\r\n%scontent-length: %d\r\n\r\n"
)
"""Follows the status and the date of an answer with tensors."""
CLOSE, KEEP_ALIVE = b"connection: close\r\n", b"connection: keep-alive\r\n"
ENCODINGS = b"accept-encoding: gzip, deflate\r\n"


def retry_field(error: Exception) -> bytes:
    """`Retry-After` for requests that are shed; empty for other errors."""
    if status_of(error) != 429:
        return b""
    after_s = error.retry_after_s if isinstance(error, ShedError) else 0.0
    return b"retry-after: %d\r\n" % max(1, math.ceil(after_s))


def without_body(answer: bytes) -> bytes:
    """The answer to HEAD: a client would read a body as the next answer."""
    head, end, _ = answer.partition(b"\r\n\r\n")
    return head + end


def status_of(error: Exception) -> int:
    """The HTTP status of an error."""
    return error.status if isinstance(error, WireError) else 500


def error_body(error: Exception, path: bytes = b"") -> bytes:
    """The body of an answer with an error, in the form that clients of this path read."""
    if path.startswith(_OF_OPENAI):
        return openai_error(error, status_of(error))
    text = str(error) if isinstance(error, RushhourError) else f"internal error: {type(error).__name__}"
    return msgspec.json.encode({"error": text})
