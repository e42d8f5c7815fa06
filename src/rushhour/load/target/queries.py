"""HTTP queries about a server, apart from the load: each on a connection of its own."""

from __future__ import annotations

import http.client
from typing import Any

import msgspec

from rushhour.errors import LoadError
from rushhour.load.target.endpoint import Endpoint, unusable_url


def query(
    at: Endpoint, method: str, path: str, body: bytes | None = None, *, timeout_s: float = 5.0
) -> tuple[int, bytes]:
    """The status and body of the server's answer.

    Args:
        at: the server.
        method: of the request.
        path: behind the prefix of the endpoint.
        body: JSON, or None.
        timeout_s: how long to wait for the answer.

    Raises:
        LoadError: if there is none.
    """
    connection = http.client.HTTPConnection(at.host, at.port, timeout=timeout_s)
    connection.response_class = _FinalResponse
    try:
        headers = {} if body is None else {"Content-Type": "application/json"}
        connection.request(method, at.prefix + path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
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


def error_message(body: bytes) -> str:
    """A server's error message in parentheses; empty where there is none."""
    try:
        fields = msgspec.json.decode(body, type=dict[str, Any])
    except msgspec.DecodeError:
        return ""
    error = fields.get("error") or fields.get("detail")  # the latter is FastAPI's
    return f"({str(error)[:200]})" if error else ""


class _FinalResponse(http.client.HTTPResponse):
    """Reads on after any status 1xx; http.client does so after 100 alone."""

    def _read_status(self) -> tuple[str, int, str]:
        version, status, reason = super()._read_status()  # type: ignore[misc]
        return version, http.client.CONTINUE if 101 < status < 200 else status, reason
