"""The cost of request IDs: CPU of the server per answer with an ID for each request, and with equal requests."""

from __future__ import annotations

import dataclasses
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from bench.blocks import samples_of, served
from bench.closed_loop import Load
from bench.contestants import OURS, Setup, request_for
from bench.wire import Request
from rushhour.load import ClosedJob, Generator, Status
from rushhour.wire import HEADER_LENGTH

CASES: Final = {
    "equal": "all requests are equal",
    "head": "each has its own X-Request-Id",
    "json": "each has its own id in the JSON",
    "both": "each has both",
}
_DIFFERENT = 2000
_WARM_UP_S = 1.0


def costs_of(setup: Setup, load: Load, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Case -> CPU microseconds of the server per answer, one for each round; the cases take turns on one server.

    Raises:
        DidNotStart: if the server does not.
        OSError: if an answer is none.
    """
    base = request_for(OURS, setup, samples_of(setup)[0])
    costs: dict[str, list[float]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, served(OURS, None, setup, Path(folder)) as server:
        requests = {case: [each.http(server.port) for each in requests_of(base, case)] for case in CASES}
        with Generator(cores=load.cores) as generator:
            for number in range(-1, rounds):
                for case in CASES if number % 2 else reversed(CASES):
                    before = server.cpu_s()
                    answered = ask(generator, server.port, requests[case], load, seconds if number >= 0 else _WARM_UP_S)
                    if number >= 0:
                        costs[case].append(1e6 * (server.cpu_s() - before) / answered)
    return costs


def requests_of(base: Request, case: str) -> list[Request]:
    """2,000 requests with ids of their own, or the base request alone; `case` is one of `CASES`."""
    return [base] if case == "equal" else [_own(base, case) for _ in range(_DIFFERENT)]


def _own(base: Request, case: str) -> Request:
    headers, body = dict(base.headers), base.body
    if case in ("json", "both"):
        inner = b'"id":"%b",' % uuid.uuid4().hex.encode()
        body = body[:1] + inner + body[1:]
        headers[HEADER_LENGTH] = str(int(headers[HEADER_LENGTH]) + len(inner))
    if case in ("head", "both"):
        headers["X-Request-Id"] = str(uuid.uuid4())
    return dataclasses.replace(base, headers=headers, body=body)


def ask(generator: Generator, port: int, requests: Sequence[bytes], load: Load, seconds: float) -> int:
    """Run a closed loop against a server on this machine; the number of answers.

    Raises:
        OSError: if an answer is none.
    """
    samples = generator.run(
        ClosedJob(
            host="127.0.0.1",
            port=port,
            requests=tuple(requests),
            limit_s=1.0,
            timeout_s=10.0,
            concurrency=load.connections,
            duration_s=seconds,
        )
    )
    answered = int(np.count_nonzero(samples.status == Status.OK))
    if answered < len(samples.status):
        raise OSError(f"{len(samples.status) - answered} of {len(samples.status)} answers are none")
    return answered
