"""HTTP queries about a server, apart from the load: each on a connection of its own."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
from collections.abc import Iterator
from typing import Any

import msgspec

from rushhour.errors import LoadError
from rushhour.load.target.endpoint import Endpoint, unusable_url

_MOST_BYTES = 2**24
"""Of an answer: metadata have a few KB."""


def query(
    at: Endpoint, method: str, path: str, body: bytes | None = None, *, timeout_s: float = 5.0
) -> tuple[int, bytes]:
    """The status and body of the server's answer.

    Args:
        at: the server.
        method: of the request.
        path: behind the prefix of the endpoint.
        body: JSON, or None.
        timeout_s: how long the connection and the whole answer may take, each.

    Raises:
        LoadError: if there is none, or it only names another URL.
    """
    connection = http.client.HTTPConnection(at.host, at.port, timeout=timeout_s)
    connection.response_class = _FinalResponse
    try:
        headers = {} if body is None else {"Content-Type": "application/json"}
        with _within(connection, timeout_s):
            connection.request(method, at.prefix + path, body, headers)
            answer = connection.getresponse()
            content = answer.read(_MOST_BYTES + 1)
            if answer.length and len(content) <= _MOST_BYTES:
                raise http.client.IncompleteRead(content, answer.length)
    except TimeoutError as error:
        raise LoadError(f"{at.url} does not answer", f"no answer within {timeout_s:g} s", "check the server") from error
    except http.client.InvalidURL as error:
        raise unusable_url(at.url, str(error)) from error
    except (http.client.HTTPException, ConnectionResetError) as error:
        raise LoadError(
            f"{at.url} does not speak HTTP",
            f"{type(error).__name__}: {str(error)[:100]}",
            "check the port: a gRPC port does not answer HTTP",
        ) from error
    except (OSError, UnicodeError) as error:
        raise LoadError(
            f"cannot reach {at.url}",
            getattr(error, "strerror", None) or str(error),
            "check the URL, and that the server is running",
        ) from error
    finally:
        connection.close()
    if len(content) > _MOST_BYTES:
        raise LoadError(
            f"cannot use the answer of {at.url} to {method} {path}",
            f"it has more than {_MOST_BYTES} bytes",
            "check the URL and the server",
        )
    if 300 <= answer.status < 400:
        where = answer.getheader("location", "another URL")
        raise LoadError(f"{at.url} redirects to {where[:200]!r}", f"its status is {answer.status}", "give that server")
    return answer.status, content


@contextlib.contextmanager
def _within(connection: http.client.HTTPConnection, seconds: float) -> Iterator[None]:
    """Connect, and cut the connection off when the time is over: the time-out of a socket begins again with each byte.

    Raises:
        TimeoutError: if it was cut off.
    """
    connection.connect()
    wire, over = connection.sock, threading.Event()

    def cut() -> None:
        over.set()
        with contextlib.suppress(OSError):
            wire.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (OSError, http.client.HTTPException):
        if not over.is_set():
            raise
    finally:
        timer.cancel()
    if over.is_set():
        raise TimeoutError


def error_message(body: bytes) -> str:
    """A server's error message in parentheses; empty where there is none."""
    try:
        fields = msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.DecodeError, ValueError, RecursionError):
        return ""
    error = fields.get("error") or fields.get("detail")  # the latter is FastAPI's
    return f"({str(error)[:200]})" if error else ""


class _FinalResponse(http.client.HTTPResponse):
    """Reads on after any status 1xx; http.client does so after 100 alone."""

    def _read_status(self) -> tuple[str, int, str]:
        version, status, reason = super()._read_status()  # type: ignore[misc]
        return version, http.client.CONTINUE if 101 < status < 200 else status, reason
