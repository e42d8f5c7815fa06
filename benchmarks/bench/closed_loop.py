"""Closed-loop load to compare servers: each user sends the next request when the last is answered.

wrk sends it, for us and for the peers alike; where it is not installed, Rushhour's own generator does.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from pathlib import Path

import msgspec

from bench.wire import Request

_SCRIPT = Path(__file__).with_name("post.lua")


@dataclasses.dataclass(frozen=True)
class Load:
    """How to load.

    Attributes:
        connections: one request each at a time.
        cores: of the generator.
    """

    connections: int
    cores: frozenset[int]


class Answered(msgspec.Struct, frozen=True):
    """The result.

    Attributes:
        requests: that were answered with status 200.
        seconds: how long it took.
        errors: answers with another status, and requests that got none.
        generator_cpu: CPU seconds of the generator per second: near 1 it, not the server, may be the limit.
    """

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float
    errors: int
    generator_cpu: float

    @property
    def rps(self) -> float:
        """Answers per second."""
        return self.requests / self.seconds


class _Result(msgspec.Struct):
    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float
    bad_status: int
    bad_socket: int


def generator() -> str:
    """The load generator and its version."""
    wrk = shutil.which("wrk")
    if wrk is None:
        return "rushhour.load (wrk is not installed)"
    said = subprocess.run([wrk, "-v"], capture_output=True, text=True).stdout.split()
    return " ".join(said[:2])


def run(port: int, request: Request, load: Load, seconds: float, work: Path) -> Answered:
    """Load the server at `port`."""
    if shutil.which("wrk") is None:
        return _with_ours(port, request, load, seconds)
    body = work / "body"
    body.write_bytes(request.body)
    env = {
        "PATH": os.environ["PATH"],
        "BENCH_BODY": str(body),
        "BENCH_HEADERS": "\n".join(f"{name}: {value}" for name, value in request.headers.items()),
    }
    wrk = subprocess.Popen(
        [
            "wrk",
            "-t1",
            f"-c{load.connections}",
            f"-d{max(1, round(seconds))}s",
            "--timeout=10s",
            f"-s{_SCRIPT}",
            f"http://127.0.0.1:{port}{request.path}",
        ],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: os.sched_setaffinity(0, load.cores),
    )
    assert wrk.stdout is not None
    try:
        said = wrk.stdout.read().decode()
        _, status, usage = os.wait4(wrk.pid, 0)
        wrk.returncode = os.waitstatus_to_exitcode(status)
    finally:
        if wrk.returncode is None:
            wrk.kill()
            wrk.wait()
        wrk.stdout.close()
    line = next((line for line in said.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise RuntimeError(f"wrk failed: {said.strip()[-300:]}")
    result = msgspec.json.decode(line.removeprefix("RESULT "), type=_Result)
    return Answered(
        requests=result.requests - result.bad_status,
        seconds=result.seconds,
        p50_ms=result.p50_ms,
        p99_ms=result.p99_ms,
        errors=result.bad_status + result.bad_socket,
        generator_cpu=round((usage.ru_utime + usage.ru_stime) / result.seconds, 3),
    )


def _with_ours(port: int, request: Request, load: Load, seconds: float) -> Answered:
    import numpy as np

    from rushhour.load import ClosedJob, Generator, Status

    job = ClosedJob(
        host="127.0.0.1",
        port=port,
        requests=(request.http(port),),
        limit_s=1.0,
        timeout_s=10.0,
        concurrency=load.connections,
        duration_s=seconds,
    )
    with Generator(cores=load.cores) as sender:
        samples = sender.run(job)
    answered = samples.status == Status.OK
    latencies = 1e3 * (samples.done - samples.sent)[answered]
    return Answered(
        requests=int(answered.sum()),
        seconds=float(np.nanmax(samples.done)) if answered.any() else seconds,
        p50_ms=float(np.quantile(latencies, 0.5)) if answered.any() else 0.0,
        p99_ms=float(np.quantile(latencies, 0.99)) if answered.any() else 0.0,
        errors=int((~answered).sum()),
        generator_cpu=round(samples.generator_cpu, 3),
    )
