"""Jobs for the generator's process, and the frames between the two processes: a kind, a length, the content."""

from __future__ import annotations

import socket
import struct
from typing import Literal

import msgspec
import numpy as np

from rushhour.errors import LoadError
from rushhour.load.generator.samples import Samples

Protocol = Literal["http", "grpc"]
"""Of the server under load."""
MAX_CONNECTIONS = 2048

_FRAME = struct.Struct("<cQ")


class Job(msgspec.Struct, frozen=True, tag_field="loop", kw_only=True):
    """What open and closed loop have in common.

    Attributes:
        host: name or address of the server.
        port: of the server.
        requests: whole HTTP/1.1 requests as bytes, or gRPC messages, sent in rotation.
        limit_s: of the SLO; sets the precision of the schedule, and what counts as late in the live figures.
        timeout_s: after this time from its schedule a request counts as lost.
        max_connections: open at once, at most; requests that wait for that reason are counted (`Samples.starved`).
        outputs: names of the outputs that an answer must have, in Open Inference Protocol; None where answers have
            another form, and are not decoded.
        expected: the right answer's body for each of `requests`; empty where it is not known beforehand.
        check: whether answers are compared: with the expected one, else with the first answer to the same request.
        tolerance: how far a number may differ in such a comparison, as a share of the largest in its output: a batch
            of another size sums in another order. Answers without `outputs` are compared byte for byte.
        protocol: of the server.
    """

    host: str
    port: int
    requests: tuple[bytes, ...]
    limit_s: float
    timeout_s: float
    max_connections: int = MAX_CONNECTIONS
    outputs: tuple[str, ...] | None = None
    expected: tuple[bytes, ...] = ()
    check: bool = False
    tolerance: float = 0.01
    protocol: Protocol = "http"


class OpenJob(Job, frozen=True, tag="open", kw_only=True):
    """Send at the scheduled times, whatever the server does.

    Attributes:
        schedule: seconds from the start, ascending, as the bytes of float64.
        warmup: number of requests at the start that are not measured.
    """

    schedule: bytes
    warmup: int = 0

    def __post_init__(self) -> None:
        n = len(self.schedule) // 8
        if not (self.requests and 0 <= self.warmup < n):
            raise LoadError(
                f"cannot send {n} requests with a warm-up of {self.warmup}",
                "at least one must be measured",
                "make a longer schedule",
            )


class ClosedJob(Job, frozen=True, tag="closed", kw_only=True):
    """Keep `concurrency` requests in flight for `duration_s`: each user sends the next when the last is answered.

    It measures throughput. Its latency is not that of independent users, who do not wait for each other's answers.
    """

    concurrency: int
    duration_s: float


class Tick(msgspec.Struct, frozen=True):
    """The state of a run.

    Attributes:
        at_s: seconds since its start.
        sent: requests sent so far; `ended` of them have ended, in whatever way.
        late: ended over the limit, shed or with an error.
        p50_ms: median latency of the latest few thousand that were answered; None before there are any.
        p99_ms: their 99th percentile.
    """

    at_s: float
    sent: int
    ended: int
    late: int
    shed: int
    errors: int
    p50_ms: float | None = None
    p99_ms: float | None = None


class Refusal(msgspec.Struct, frozen=True):
    """A `LoadError`, as the generator sends it to its parent."""

    what: str
    why: str
    fix: str


class Facts(msgspec.Struct, frozen=True):
    """The result of a run without its arrays."""

    warmup: int
    generator_cpu: float
    canary_p99_s: float
    steal: float
    connections: int
    starved: int
    timeout_s: float
    first_error: str
    error_kinds: dict[str, int]


Kind = Literal[b"j", b"t", b"r", b"e"]
"""Job, tick, result, error (`Refusal`)."""


def send(channel: socket.socket, kind: Kind, content: bytes) -> None:
    """Send one frame.

    Raises:
        OSError: if the other process is gone.
    """
    channel.sendall(_FRAME.pack(kind, len(content)))
    channel.sendall(content)


def receive(channel: socket.socket) -> tuple[bytes, bytes] | None:
    """The next frame's kind and content; None when the other process is gone."""
    head = _exactly(channel, _FRAME.size)
    if head is None:
        return None
    kind, length = _FRAME.unpack(head)
    content = _exactly(channel, length)
    return None if content is None else (kind, content)


def _exactly(channel: socket.socket, size: int) -> bytes | None:
    content = bytearray()
    while len(content) < size:
        try:
            part = channel.recv(min(size - len(content), 1 << 20))
        except ConnectionResetError:
            return None
        if not part:
            return None
        content += part
    return bytes(content)


def pack(samples: Samples) -> bytes:
    """A run's result as bytes: the number of samples, the arrays as they lie in memory, then the facts."""
    facts = Facts(
        warmup=samples.warmup,
        generator_cpu=samples.generator_cpu,
        canary_p99_s=samples.canary_p99_s,
        steal=samples.steal,
        connections=samples.connections,
        starved=samples.starved,
        timeout_s=samples.timeout_s,
        first_error=samples.first_error,
        error_kinds=dict(samples.error_kinds),
    )
    times = (samples.scheduled, samples.taken, samples.sent, samples.done)
    arrays = [each.tobytes() for each in (*times, samples.status)]
    return b"".join([len(samples).to_bytes(8, "little"), *arrays, msgspec.msgpack.encode(facts)])


def unpack(content: bytes) -> Samples:
    """The result that `pack` packed."""
    n = int.from_bytes(content[:8], "little")
    times = np.frombuffer(content, np.float64, 4 * n, 8).reshape(4, n)
    end = 8 + times.nbytes + n
    facts = msgspec.msgpack.decode(content[end:], type=Facts)
    return Samples(
        scheduled=times[0],
        taken=times[1],
        sent=times[2],
        done=times[3],
        status=np.frombuffer(content, np.uint8, n, 8 + times.nbytes),
        **msgspec.structs.asdict(facts),
    )
