"""`make bench-hostile`: how long one hostile client blocks a server for others, and how much memory it leaves behind.

For each hostile input a real server runs in a process of its own, and another process asks it for its health 100 times
a second on one connection. The pause is the longest time from when a question was due to its answer. Resident memory is
read before the input, which comes several times, and after it. Results go to `benchmarks/results/hostile.json`.

    python benchmarks/hostile.py --only "zeros"     the inputs whose name has that in it; results go to .bench/
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import msgspec
import numpy as np
from bench.record import Check, Table, record, verdict

from rushhour.protocol import message
from rushhour.serve import ServeSettings
from rushhour.testing.bundles import tiny_bundle

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "hostile.json"
_PATH = "/v2/models/tiny/infer"
_SHAPE, _CLASSES, _ROWS = (28, 28, 1), 1000, 4096
_MIB = 2**20
_HZ = 100
_TIMES = 3
_SETTLE_S, _BEFORE_S = 2.5, 0.5
_PAUSE_MS, _GROWTH = 50, 5
_TIMEOUT_S = 120
_Request = message("inference.ModelInferRequest")


# What is sent: each gives the statuses of its answers.


class Target:
    """A running server.

    Attributes:
        address: of HTTP.
        grpc: address of gRPC.
    """

    def __init__(self, pid: int, url: str, grpc_address: str) -> None:
        host, port = url.removeprefix("http://").split(":")
        self.pid, self.address, self.grpc = pid, (host, int(port)), grpc_address

    def resident_mib(self) -> float:
        """Of the server's process."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / _MIB

    def http(self, sent: bytes, answers: int = 1) -> list[str]:
        """Send bytes on one connection and read a number of answers, or until it is closed."""
        statuses: list[str] = []
        with socket.create_connection(self.address, timeout=_TIMEOUT_S) as connection, contextlib.ExitStack() as stack:
            writer = threading.Thread(target=_send, args=(connection, sent), daemon=True)
            writer.start()
            stack.callback(writer.join, 1)
            reader = stack.enter_context(connection.makefile("rb"))
            while len(statuses) < answers and (line := reader.readline()):
                statuses.append(line.split()[1].decode())
                size = 0
                while (field := reader.readline()) not in (b"\r\n", b""):
                    name, _, value = field.partition(b": ")
                    size = int(value) if name == b"content-length" else size
                while size > 0 and (part := reader.read(min(size, _MIB))):
                    size -= len(part)
        return statuses

    def call(self, sent: bytes, method: str = "ModelInfer", *, packed: bool = False, clients: int = 1) -> list[str]:
        """Make a gRPC call with these bytes, from several clients at once."""
        statuses: list[str] = []

        def one() -> None:
            options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
            with grpc.insecure_channel(self.grpc, options) as channel:
                ask = channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
                compression = grpc.Compression.Gzip if packed else grpc.Compression.NoCompression
                try:
                    ask(sent, timeout=_TIMEOUT_S, compression=compression)
                    statuses.append("OK")
                except grpc.RpcError as error:
                    statuses.append(error.code().name)

        threads = [threading.Thread(target=one) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return statuses


def _send(connection: socket.socket, sent: bytes) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(sent)


def _post(body: bytes, *fields: str) -> bytes:
    head = f"POST {_PATH} HTTP/1.1\r\nhost: x\r\n" + "".join(f"{field}\r\n" for field in fields)
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def _gzipped(body: bytes) -> bytes:
    return _post(gzip.compress(body, 6), "content-encoding: gzip")


def _chunked(body: bytes, size: int) -> bytes:
    chunks = b"".join(
        b"%x\r\n%b\r\n" % (len(part), part) for part in (body[at : at + size] for at in range(0, len(body), size))
    )
    return f"POST {_PATH} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n".encode() + chunks + b"0\r\n\r\n"


def _json(
    data: bytes, rows: int = 1, datatype: str = "UINT8", shape: tuple[int, ...] = _SHAPE, more: str = ""
) -> bytes:
    entry = json.dumps({"name": "image", "datatype": datatype, "shape": [rows, *shape]})[:-1].encode()
    return b'{"inputs":[' + entry + b',"data":' + data + b"}]" + more.encode() + b"}"


def _pictures(rows: int) -> bytes:
    values = np.random.default_rng(0).integers(0, 256, rows * 784)
    return ("[" + ",".join(map(str, values.tolist())) + "]").encode()


def _nested(rows: int) -> bytes:
    line = b"[[7]" + b",[7]" * 27 + b"]"
    picture = b"[" + b",".join([line] * 28) + b"]"
    return b"[" + b",".join([picture] * rows) + b"]"


def _binary(rows: int, outputs: str, times: int = 1) -> bytes:
    body = bytes(rows * 784)
    size = {"binary_data_size": len(body)}
    entry = {"name": "image", "datatype": "UINT8", "shape": [rows, *_SHAPE], "parameters": size}
    header = (json.dumps({"inputs": [entry]})[:-1] + outputs + "}").encode()
    return _post(header + body, f"inference-header-content-length: {len(header)}") * times


def _typed(field: str, content: bytes, datatype: str = "UINT8", shape: bytes = b"") -> bytes:
    """A message whose tensor has its contents in these bytes, in protobuf's packed form."""
    tensor = _Request().inputs.add(name="image", datatype=datatype, shape=() if shape else (1, *_SHAPE))
    number = tensor.DESCRIPTOR.fields_by_name["contents"].message_type.fields_by_name[field].number
    head = bytes(tensor.SerializeToString())
    entry = head + (_field(3, shape) if shape else b"") + _field(5, _field(number, content))
    return bytes(_Request(model_name="tiny").SerializeToString()) + _field(5, entry)


def _field(number: int, content: bytes) -> bytes:
    size, encoded = len(content), bytearray([number << 3 | 2])
    while size > 0x7F:
        encoded.append(size & 0x7F | 0x80)
        size >>= 7
    encoded.append(size)
    return bytes(encoded) + content


def _unpacked(field: int, entry: bytes, times: int) -> bytes:
    tensor = bytes(_Request().inputs.add(name="image", datatype="UINT8", shape=(1, *_SHAPE)).SerializeToString())
    contents = (bytes([field << 3]) + entry) * times
    return bytes(_Request(model_name="tiny").SerializeToString()) + _field(5, tensor + _field(5, contents))


Attack = Callable[[Target], list[str]]

_RAW = ',"parameters":{"binary_data_output":true}'
_CLASSIFIED = f',"outputs":[{{"name":"probabilities","parameters":{{"classification":{_CLASSES}}}}}]'


def _attacks() -> dict[str, Callable[[], Attack]]:
    """Name -> a factory of the attack, called just before it, because some are large."""

    def http(make: Callable[[], bytes], answers: int = 1) -> Callable[[], Attack]:
        def made() -> Attack:
            sent = make()
            return lambda target: target.http(sent, answers)

        return made

    def call(
        make: Callable[[], bytes], method: str = "ModelInfer", *, packed: bool = False, clients: int = 1
    ) -> Callable[[], Attack]:
        def made() -> Attack:
            sent = make()
            return lambda target: target.call(sent, method, packed=packed, clients=clients)

        return made

    def named(number: int) -> bytes:
        return bytes(_Request(model_name="tiny").SerializeToString()) + _field(number, b"x" * 60 * _MIB)

    def parameters() -> bytes:
        each = b"".join(_field(4, _field(1, b"%d" % at) + _field(2, b"\x08\x01")) for at in range(3000))
        return bytes(_Request(model_name="tiny").SerializeToString()) + each

    return {
        "HTTP: 20 Mi empty lists, gzip": http(lambda: _gzipped(_json(b"[" + b"[]," * (20 * _MIB) + b"[]]"))),
        "HTTP: 32 Mi zeros, gzip": http(lambda: _gzipped(_json(b"[" + b"0," * (32 * _MIB - 50) + b"0]"))),
        "HTTP: 20 Mi empty texts, gzip": http(lambda: _gzipped(_json(b"[" + b'"",' * (20 * _MIB) + b'""]'))),
        "HTTP: 10 Mi objects, gzip": http(lambda: _gzipped(_json(b"[" + b"{}," * (20 * _MIB) + b"{}]"))),
        "HTTP: 60 Mi spaces, gzip": http(lambda: _gzipped(_json(b"[" + b" " * (60 * _MIB) + b"0]"))),
        "HTTP: a number of 60 Mi digits, gzip": http(lambda: _gzipped(_json(b"[" + b"9" * (60 * _MIB) + b"]"))),
        "HTTP: 60 Mi opening brackets, gzip": http(lambda: _gzipped(_json(b"[" * (60 * _MIB)))),
        "HTTP: 10 Mi parameters, gzip": http(
            lambda: _gzipped(_json(b"[]", more=',"parameters":{' + '"a":1,' * (8 * _MIB) + '"a":1}'))
        ),
        "HTTP: an id of 60 MiB, gzip": http(
            lambda: _gzipped(_json(b"[]", more=',"id":"' + "x" * (60 * _MIB) + '"'))
        ),
        "HTTP: 2 Mi inputs, gzip": http(
            lambda: _gzipped(b'{"inputs":[' + b'{"name":"","datatype":"","shape":[]},' * _MIB + b"0]}")
        ),
        "HTTP: a picture of 60 MiB of Base64": http(
            lambda: _gzipped(_json(b'["' + b"AAAA" * (15 * _MIB) + b'"]', datatype="BYTES", shape=()))
        ),
        "HTTP: 4,096 pictures in JSON, valid": http(lambda: _post(_json(_pictures(_ROWS), _ROWS))),
        "HTTP: 4,096 pictures in nested JSON, gzip, valid": http(
            lambda: _gzipped(_json(_nested(_ROWS), _ROWS))
        ),
        "HTTP: 4,096 answers of 1,000 numbers in JSON": http(lambda: _binary(_ROWS, "")),
        "HTTP: 4,096 answers of 1,000 classes in words": http(lambda: _binary(_ROWS, _CLASSIFIED)),
        "HTTP: 60 MiB of zeros, gzip": http(lambda: _gzipped(bytes(60 * _MIB))),
        "HTTP: 4 MiB in chunks of 1 byte": http(lambda: _chunked(b"0" * (4 * _MIB), 1)),
        "HTTP: 60 MiB in chunks of 64 KiB": http(lambda: _chunked(b"0" * (60 * _MIB), 65536)),
        "HTTP: 20 pipelined bodies of 3 MiB": http(lambda: _binary(_ROWS, _RAW, times=20), 20),
        "gRPC: 60 Mi packed zeros, gzip": call(lambda: _typed("uint_contents", bytes(60 * _MIB)), packed=True),
        "gRPC: 1 MiB of zeros, 2 clients": call(lambda: _typed("uint_contents", bytes(_MIB)), clients=2),
        "gRPC: 30 Mi zeros, not packed, gzip": call(lambda: _unpacked(4, b"\0", 30 * _MIB), packed=True),
        "gRPC: 15 Mi floats, gzip": call(lambda: _typed("fp32_contents", bytes(60 * _MIB), "FP32"), packed=True),
        "gRPC: 30 Mi empty texts, gzip": call(
            lambda: _typed("bytes_contents", b"")[:0] + _unpacked(8, b"", 0) + _texts(20 * _MIB), packed=True
        ),
        "gRPC: a shape of 60 Mi sizes, gzip": call(
            lambda: _typed("uint_contents", bytes(10), shape=bytes(50 * _MIB)), packed=True
        ),
        "gRPC: an id of 60 MiB, gzip": call(lambda: named(3), packed=True),
        "gRPC: a name of 60 MiB, gzip": call(lambda: named(1), packed=True),
        "gRPC: 3,000 parameters": call(parameters),
        "gRPC: 60 MiB raw": call(lambda: named(7), packed=True),
        "gRPC: a control message of 60 MiB, gzip": call(
            lambda: b"".join(_field(1, _field(1, b"%d" % at)) for at in range(4 * _MIB)), "TraceSetting", packed=True
        ),
    }  # fmt: skip


def _texts(number: int) -> bytes:
    tensor = bytes(_Request().inputs.add(name="image", datatype="BYTES", shape=(1,)).SerializeToString())
    return bytes(_Request(model_name="tiny").SerializeToString()) + _field(5, tensor + _field(5, b"\x42\0" * number))


# The probe.


def probe(host: str, port: int) -> None:
    """Query health at 100 Hz; for each line on standard input print the longest pause since the last, in ms."""
    asked = b"GET /v2/health/ready HTTP/1.1\r\nhost: x\r\n\r\n"
    worst, lock = [0.0], threading.Lock()

    def answer() -> None:
        for _ in sys.stdin:
            with lock:
                print(worst[0], flush=True)
                worst[0] = 0.0
        os._exit(0)

    threading.Thread(target=answer, daemon=True).start()
    with socket.create_connection((host, port), timeout=_TIMEOUT_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        due = time.monotonic()
        while True:
            due = max(due + 1 / _HZ, time.monotonic() - 1 / _HZ)
            time.sleep(max(0.0, due - time.monotonic()))
            began = time.monotonic()  # that this process was not woken in time is not the server's pause
            connection.sendall(asked)
            said = connection.recv(4096)
            if not said.startswith(b"HTTP/1.1 200 "):
                raise SystemExit(f"the server is not well: {said!r}")
            with lock:
                worst[0] = max(worst[0], 1e3 * (time.monotonic() - began))


class Probe:
    """The other process."""

    def __init__(self, address: tuple[str, int]) -> None:
        command = [sys.executable, __file__, "--probe", address[0], str(address[1])]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        time.sleep(0.5)
        self.worst_ms()

    def worst_ms(self) -> float:
        """The longest pause since the last call."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def _served(folder: Path) -> Iterator[Target]:
    settings = msgspec.json.encode(ServeSettings(http_port=0, grpc_port=0)).decode()
    command = [sys.executable, "-m", "rushhour.serve", str(folder), settings]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        said = json.loads(server.stdout.readline())
        yield Target(server.pid, said["url"], said["grpc"])
    finally:
        server.kill()
        server.wait()


def _warm(target: Target) -> None:
    """A warm-up of what any client costs once: threads, code paths, and buffers of both protocols."""
    for _ in range(3):
        target.http(_post(_json(_pictures(400), 400)))
        target.http(_gzipped(_json(_pictures(400), 400)))
        target.http(_binary(400, _CLASSIFIED))
        target.call(_typed("uint_contents", bytes(784)))
        target.call(_typed("uint_contents", bytes(200_000)), packed=True)
    time.sleep(_SETTLE_S)


def _measure(folder: Path, name: str, make: Callable[[], Attack]) -> tuple[str | float, ...]:
    with _served(folder) as target:
        attack = make()
        _warm(target)
        prober = Probe(target.address)
        try:
            time.sleep(_BEFORE_S)
            quiet_ms, before = prober.worst_ms(), target.resident_mib()
            statuses, seconds, peak = set(), [], 0.0
            for _ in range(_TIMES):
                began = time.monotonic()
                statuses |= set(attack(target))
                seconds.append(time.monotonic() - began)
                peak = max(peak, target.resident_mib())
            time.sleep(0.1)
            worst_ms = prober.worst_ms()
            time.sleep(_SETTLE_S)
            after = target.resident_mib()
        finally:
            prober.close()
    said = ", ".join(sorted(statuses)) or "no answer"
    return name, said, max(seconds), quiet_ms, worst_ms, before, peak, after, 100 * (after / before - 1)


def main() -> int:
    """Send everything, write the record; 1 if a claim does not hold."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--probe", nargs=2)
    given = parser.parse_args()
    if given.probe:
        probe(given.probe[0], int(given.probe[1]))
    rows: list[tuple[str | float, ...]] = []
    checks: list[Check] = []
    with tempfile.TemporaryDirectory() as name:
        bundle = tiny_bundle(Path(name) / "tiny", shape=_SHAPE, classes=_CLASSES)
        for attack, make in _attacks().items():
            if given.only.lower() in attack.lower():
                rows.append(_measure(bundle.path, attack, make))
                print("  ".join(each if isinstance(each, str) else f"{each:.1f}" for each in rows[-1]), flush=True)
    for number, (what, _, _, _, worst_ms, _, _, _, growth) in enumerate(rows, 1):
        assert isinstance(worst_ms, float)
        assert isinstance(growth, float)
        checks += [
            verdict(f"3.{number}.pause", f"{what}: the longest pause", f"< {_PAUSE_MS}", worst_ms, None, 1, unit="ms"),
            verdict(f"3.{number}.memory", f"{what}: memory kept", f"<= {_GROWTH}", growth, None, 1, unit="%"),
        ]
    columns = (
        *("input", "answers", "longest, s", "pause before, ms", "pause, ms"),
        *("MiB before", "MiB after each, at most", "MiB after", "kept, %"),
    )
    note = f"Each input {_TIMES} times; health at {_HZ} Hz from another process; memory {_SETTLE_S:g} s after the last."
    tables = [msgspec.to_builtins(Table("hostile inputs", columns, tuple(rows), note))]
    done = record(checks, {"tables": tables}, {"pictures": 0}, {"grpcio": grpc.__version__})
    done.save(RESULT if not given.only else ROOT / ".bench" / "hostile.json")
    return int(not all(check.holds for check in checks))


if __name__ == "__main__":
    sys.exit(main())
