"""`make bench-soak`: a real server under all loads at once for SOAK_SECONDS (600): does it leak memory, does it fail?

Well-behaved clients (HTTP with binary, JSON and packed bodies, gRPC, requests of 1 to 100 samples) check every answer
against numpy. Beside them others send garbage, stop in the middle, vanish, and come and go. Every minute the model is
replaced by one with other weights: each answer must be wholly of the version that it names.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import random
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import msgspec
import numpy as np
from bench.record import Table, record, verdict
from numpy.typing import NDArray

from rushhour.bundle import Bundle
from rushhour.protocol import message
from rushhour.serve import ServeSettings
from rushhour.testing.bundles import tiny_answers, tiny_bundle
from rushhour.wire import HEADER_LENGTH, decode_answer, encode_json_request, encode_request

RESULT = Path(__file__).parent / "results" / "soak.json"
_WHOLE_S = 600
_SEED = 0
_PAUSE_S = 0.004
_PATH = "/v2/models/tiny/infer"
_OFF = 1e-4

_GARBAGE: dict[str, bytes] = {
    "garbage": b"garbage\r\n\r\n",
    "TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "huge header": b"GET /v2 HTTP/1.1\r\nx: " + b"y" * 100_000 + b"\r\n\r\n",
    "huge body": b"POST %s HTTP/1.1\r\ncontent-length: 99999999999\r\n\r\n" % _PATH.encode(),
    "two lengths": b"POST %s HTTP/1.1\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello" % _PATH.encode(),
    "length and chunks": b"POST /v2 HTTP/1.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "deep JSON": b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: 50000\r\n\r\n" % _PATH.encode() + b"[" * 50_000,
    "gzip bomb": (lambda bomb: b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n%s"
                  % (_PATH.encode(), len(bomb), bomb))(gzip.compress(bytes(100_000_000))),
    "pipeline": b"GET /v2 HTTP/1.1\r\nhost: x\r\n\r\n" * 2000 + b"garbage\r\n\r\n",
}  # fmt: skip


class Soak:
    """The clients, and what they observed."""

    def __init__(self, bundle: Bundle, host: str, port: int, grpc_address: str) -> None:
        self.signature = bundle.manifest.signature
        self.host, self.port, self.grpc = host, port, grpc_address
        self.random = np.random.default_rng(_SEED)
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.failed: list[str] = []
        self.versions: set[int] = set()
        self.over = asyncio.Event()

    def images(self, most: int) -> NDArray[np.uint8]:
        """A request's samples, 1 to `most`, never repeated."""
        return self.random.integers(0, 256, (int(self.random.integers(1, most + 1)), 4, 4, 1), dtype=np.uint8)

    def judge(self, kind: str, images: NDArray[np.uint8], version: str, answer: NDArray[np.float32]) -> None:
        """Compare an answer with the expected one of the version that it names."""
        self.seen[kind] += 1
        self.versions.add(int(version))
        right = tiny_answers(images, seed=(int(version) - 1) % 2)
        if answer.shape != right.shape or not np.allclose(answer, right, atol=_OFF):
            self.wrong.append(f"{kind}, version {version}")

    async def repeat(self, kind: str, once: Callable[[], Awaitable[None]]) -> None:
        """Repeat something until the end; failures are counted."""
        while not self.over.is_set():
            try:
                await asyncio.wait_for(once(), 30)
            except Exception as error:
                self.failed.append(f"{kind}: {type(error).__name__}: {error}")
                await asyncio.sleep(0.1)
            await asyncio.sleep(_PAUSE_S)

    async def over_http(self, kind: str, most: int) -> None:
        """Valid requests of one connection."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            for _ in range(500):
                if self.over.is_set():
                    return
                images = self.images(most)
                head = f"POST {_PATH} HTTP/1.1\r\nhost: x\r\n"
                if kind == "JSON":
                    body = encode_json_request(self.signature, {"image": images})
                else:
                    length, body = encode_request(self.signature, {"image": images})
                    head += f"{HEADER_LENGTH}: {length}\r\n"
                if kind == "gzip":
                    body = gzip.compress(body, 1)
                    head += "content-encoding: gzip\r\n"
                writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
                status, fields, answer = await _answer(reader)
                if status != 200:
                    raise OSError(f"{status}: {answer[:200]!r}")
                stated = fields.get(HEADER_LENGTH.lower())
                size = len(answer) if stated is None else int(stated)
                said = json.loads(answer[:size])
                values = decode_answer(answer, None if stated is None else size)["probabilities"]
                self.judge(kind, images, said["model_version"], values.reshape(len(images), -1))
                await asyncio.sleep(_PAUSE_S)
        finally:
            writer.close()

    async def over_grpc(self) -> None:
        """Valid requests of one channel."""
        async with grpc.aio.insecure_channel(self.grpc) as channel:
            call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            for _ in range(500):
                if self.over.is_set():
                    return
                images = self.images(8)
                request = message("inference.ModelInferRequest")(model_name="tiny")
                request.inputs.add(name="image", datatype="UINT8", shape=images.shape)
                request.raw_input_contents.append(images.tobytes())
                answer = message("inference.ModelInferResponse").FromString(await call(request.SerializeToString()))
                values = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(len(images), -1)
                self.judge("gRPC", images, answer.model_version, values)
                await asyncio.sleep(_PAUSE_S)

    async def hostile(self) -> None:
        """Invalid bytes get an error or a closed connection."""
        for name, sent in _GARBAGE.items():
            reader, writer = await asyncio.open_connection(self.host, self.port)
            try:
                with contextlib.suppress(ConnectionError):
                    writer.write(sent)
                    writer.write_eof()
                    said = await reader.read()
                    if not (said.startswith(b"HTTP/1.1 ") or not said):
                        raise OSError(f"{name}: {said[:100]!r}")
                self.seen["hostile"] += 1
            finally:
                writer.close()
            await asyncio.sleep(0.05)

    async def vanish(self) -> None:
        """Disconnect before the answer, or within a request."""
        length, body = encode_request(self.signature, {"image": self.images(8)})
        head = f"POST {_PATH} HTTP/1.1\r\nhost: x\r\n{HEADER_LENGTH}: {length}\r\ncontent-length: {len(body)}\r\n\r\n"
        whole = head.encode() + body
        _, writer = await asyncio.open_connection(self.host, self.port)
        sent = whole if random.random() < 0.5 else whole[: random.randrange(len(whole))]
        writer.get_extra_info("socket").setsockopt(1, 13, struct.pack("ii", 1, 0))  # SO_LINGER: close is a reset
        writer.write(sent)
        await asyncio.sleep(random.choice((0, 0, 0.2)))
        writer.close()
        self.seen["vanished"] += 1
        await asyncio.sleep(0.01)

    async def reload(self, bundles: list[Path], served: Path, every_s: float) -> None:
        """Replace the model repeatedly."""
        turn = 1
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.over.wait(), every_s)
                return
            Bundle.open(bundles[turn % 2]).copy_to(served)
            turn += 1
            reader, writer = await asyncio.open_connection(self.host, self.port)
            writer.write(
                b"POST /v2/repository/models/tiny/load HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n"
            )
            status, _, answer = await _answer(reader)
            writer.close()
            self.seen["reload"] += 1
            if status != 200:
                self.failed.append(f"reload: {status}: {answer!r}")


async def _answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
    return int(head[0].split()[1]), fields, await reader.readexactly(int(fields["content-length"]))


async def _soak(soak: Soak, pid: int, folder: Path, seconds: float) -> list[float]:
    """All clients at once; the server's resident MiB, each second."""
    minute = seconds / 10
    tasks = [
        *(soak.repeat("binary", lambda: soak.over_http("binary", 8)) for _ in range(4)),
        soak.repeat("large", lambda: soak.over_http("large", 100)),
        soak.repeat("JSON", lambda: soak.over_http("JSON", 8)),
        soak.repeat("gzip", lambda: soak.over_http("gzip", 8)),
        *(soak.repeat("gRPC", soak.over_grpc) for _ in range(2)),
        soak.repeat("hostile", soak.hostile),
        *(soak.repeat("vanish", soak.vanish) for _ in range(2)),
        soak.reload([folder / "0", folder / "1"], folder / "served", minute),
    ]
    running = [asyncio.ensure_future(task) for task in tasks]
    resident: list[float] = []
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        await asyncio.sleep(1)
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        resident.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
    soak.over.set()
    await asyncio.gather(*running)
    return resident


def main() -> int:
    """Run, write the record and print it; 1 if a claim does not hold."""
    seconds = float(os.environ.get("SOAK_SECONDS", str(_WHOLE_S)))
    random.seed(_SEED)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundles = [tiny_bundle(folder / str(seed), seed=seed) for seed in (0, 1)]
        bundles[0].copy_to(folder / "served")
        settings = msgspec.json.encode(ServeSettings(http_port=0, grpc_port=0)).decode()
        server = subprocess.Popen(
            [sys.executable, "-m", "rushhour.serve", str(folder / "served"), settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            assert server.stdout is not None
            said = json.loads(server.stdout.readline())
            host, port = said["url"].removeprefix("http://").split(":")

            async def run() -> tuple[Soak, list[float], float]:
                soak, began = Soak(bundles[0], host, int(port), said["grpc"]), time.monotonic()
                resident = await _soak(soak, server.pid, folder, seconds)
                return soak, resident, time.monotonic() - began

            soak, resident, elapsed = asyncio.run(run())
            server.terminate()
            code = server.wait(60)
        finally:
            server.kill()
            server.wait()
    minute = max(1, len(resident) // 10)
    begin, end = statistics.median(resident[minute : 2 * minute]), statistics.median(resident[-minute:])
    answers = sum(soak.seen[kind] for kind in ("binary", "large", "JSON", "gzip", "gRPC"))
    growth = 100 * (end / begin - 1)
    why = "; ".join(dict.fromkeys([*soak.wrong, *soak.failed]).keys())[:500]
    checks = [
        verdict("4.soak", "memory, median of the last minute against minute 2", "< 2", growth, None, 1, unit="%"),
        verdict("4.soak.time", "time under load", ">= 600", elapsed, None, 1, unit="s"),
        verdict("4.soak.wrong", "wrong answers", "<= 0", len(soak.wrong), None, answers, unit="answers", why=why),
        verdict(
            "4.soak.failed",
            "good requests that failed",
            "<= 0",
            len(soak.failed),
            None,
            answers,
            unit="requests",
            why=why,
        ),
        verdict("4.soak.end", "exit code after SIGTERM", "<= 0", abs(code), None, 1, unit=""),
    ]
    rows = (*soak.seen.most_common(), ("versions that answered", len(soak.versions)))
    note = f"Resident memory: {begin:.1f} MiB in minute 2, {end:.1f} MiB in the last, {max(resident):.1f} MiB at most."
    tables = [msgspec.to_builtins(Table("what the server went through", ("what", "count"), tuple(rows), note))]
    data = {"tables": tables, "resident_mib": [round(value, 2) for value in resident]}
    done = record(checks, data, {"soak": _SEED}, {"grpcio": grpc.__version__})
    done.save(RESULT if seconds >= _WHOLE_S else Path(".bench") / "soak.json")
    for check in checks:
        print(f"{check.id}: {check.value:.3g} {check.unit} (target {check.target}) {check.why or ''}")
    print(note)
    return int(not all(check.holds for check in checks))


if __name__ == "__main__":
    sys.exit(main())
