"""Requests and answers of the servers compared: the Open Inference Protocol, or raw pixels."""

from __future__ import annotations

import dataclasses
import http.client
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rushhour.bundle import Signature
from rushhour.wire import HEADER_LENGTH, decode_answer, encode_request

_USERS = 8


@dataclasses.dataclass(frozen=True)
class Request:
    """A POST."""

    path: str
    headers: Mapping[str, str]
    body: bytes

    def http(self, port: int) -> bytes:
        """Head and body."""
        head = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        first = f"POST {self.path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        return f"{first}{head}Content-Length: {len(self.body)}\r\n\r\n".encode() + self.body


def protocol_request(path: str, signature: Signature, sample: NDArray[Any]) -> Request:
    """One sample in the Open Inference Protocol, binary both ways."""
    length, body = encode_request(signature, {signature.inputs[0].name: sample[None]})
    return Request(path, {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(length)}, body)


def bare_request(path: str, sample: NDArray[Any]) -> Request:
    """The bytes of one sample."""
    return Request(path, {"Content-Type": "application/octet-stream"}, sample.tobytes())


def ask(port: int, request: Request, timeout_s: float = 10.0) -> NDArray[np.float32]:
    """The server's answer to one request: the floats of one sample.

    Raises:
        OSError: if there is none, or its status is not 200.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("POST", request.path, request.body, dict(request.headers))
        response = connection.getresponse()
        body = response.read()
    except http.client.HTTPException as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
    finally:
        connection.close()
    if response.status != 200:
        raise OSError(f"status {response.status}: {body[:200]!r}")
    length = response.getheader(HEADER_LENGTH)
    if length is None:
        return np.frombuffer(body, np.float32)
    (answer,) = decode_answer(body, int(length)).values()
    return np.asarray(answer, np.float32).reshape(-1)


def answers(port: int, request: Request) -> bool:
    """Whether the server answers it."""
    try:
        ask(port, request)
    except OSError:
        return False
    return True


def check_answers(port: int, requests: list[Request], expected: NDArray[np.float32]) -> str:
    """Send all requests, several at a time so that they form batches; what is wrong with the answers, or nothing.

    Each answer must be nearest to its own expected one, and near: engines may round differently in another batch.

    Args:
        port: of the server.
        requests: one for each row of `expected`.
        expected: shape `(n, outputs)`.
    """
    try:
        with ThreadPoolExecutor(_USERS) as users:
            answers = list(users.map(lambda request: ask(port, request), requests))
    except OSError as error:
        return str(error)
    if {answer.shape for answer in answers} != {expected.shape[1:]}:
        return f"answers have the shape {answers[0].shape}, expected was {expected.shape[1:]}"
    apart = np.abs(np.stack(answers)[:, None] - expected[None]).max(axis=-1)
    own = apart.diagonal()
    if own.max() > 0.05 * max(1e-3, float(expected.max())):
        return f"an answer is {own.max():.2g} off"
    wrong = int((own > apart.min(axis=1)).sum())
    return f"{wrong} answers are nearer to those of other requests" if wrong else ""
