"""Servers that a load must survive: answers without end or form, and URLs that mean something else."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

import rushhour
from peers import Pieces, Refused, grpc_peer, http_peer, serving_model, whole
from rushhour.api.traffic import read_rates, read_traffic
from rushhour.api.values import read_seconds
from rushhour.errors import GoalError, LoadError
from rushhour.load import (
    Generator,
    OpenJob,
    Samples,
    Status,
    Target,
    Tick,
    discover,
    endpoint,
    folder_payloads,
    payloads,
    poisson,
    read_shapes,
)
from rushhour.load.generator import connection as connections
from rushhour.load.generator.answers import AnswerCheck
from rushhour.load.generator.connection import Connection, KnownHead
from rushhour.load.generator.timestamps import Timestamps
from rushhour.load.target.interface import DeclaredInput, Interface
from rushhour.load.target.queries import error_message
from rushhour.wire import decode_answer

METADATA = {
    "name": "m",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 1]}],
}

TARGET = Target("http://h:1", "h", 1, "", "m", Interface((DeclaredInput("x", "UINT8", (-1, -1, -1, 3)),), ("y",)))


def answer_of(value: float = 1.0, note: str = "") -> bytes:
    output = {"name": "y", "datatype": "FP32", "shape": [1, 1], "data": [value]}
    return json.dumps({"model_name": "m", "id": note, "outputs": [output]}).encode()


@pytest.fixture(scope="module")
def generator() -> Iterator[Generator]:
    with Generator() as running:
        yield running


def job_of(target: Target, n: int = 40) -> OpenJob:
    schedule = poisson(200, n=n, seed=3).tobytes()
    return OpenJob(
        host=target.host,
        port=target.port,
        requests=tuple(payloads(target)),
        limit_s=0.05,
        timeout_s=5.0,
        outputs=target.outputs,
        schedule=schedule,
    )


# -- questions about a server


def test_an_answer_that_drips_is_given_up_in_time() -> None:
    drops: Pieces = [b"HTTP/1.1 200 OK\r\nContent-Length: 40\r\n\r\n", *[0.1, b" "] * 40]
    with http_peer(lambda path, body: (drops, True)) as url, pytest.raises(LoadError, match=r"within 0\.5 s"):
        discover(url, timeout_s=0.5)


def test_a_header_that_drips_is_given_up_in_time() -> None:
    drops: Pieces = [b"HTTP/1.1 200 OK\r\n", *[0.1, b"X: y\r\n"] * 40, b"Content-Length: 2\r\n\r\n[]"]
    with http_peer(lambda path, body: (drops, True)) as url, pytest.raises(LoadError, match=r"within 0\.5 s"):
        discover(url, timeout_s=0.5)


def test_metadata_without_end_are_refused() -> None:
    flood: Pieces = [b"HTTP/1.1 200 OK\r\n\r\n", *[b" " * 2**20] * 20]
    with http_peer(lambda path, body: (flood, True)) as url, pytest.raises(LoadError, match="more than 16777216 bytes"):
        discover(url)


def test_metadata_that_break_off_are_no_metadata() -> None:
    part: Pieces = [b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + json.dumps(METADATA).encode()]
    with http_peer(lambda path, body: (part, True)) as url, pytest.raises(LoadError, match="IncompleteRead"):
        discover(url, "m")


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.parametrize("model", ["m", None])
def test_a_server_that_redirects_is_told_where(status: int, model: str | None) -> None:
    moved = whole(b"", status, "Location: https://elsewhere/\r\n")
    with (
        http_peer(lambda path, body: moved) as url,
        pytest.raises(LoadError, match="redirects to 'https://elsewhere/'"),
    ):
        discover(url, model)


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("model", ["m", None])
def test_a_server_that_wants_a_key_is_told_how(status: int, model: str | None) -> None:
    denied = whole(b'{"error":"who are you?"}', status)
    with http_peer(lambda path, body: denied) as url, pytest.raises(LoadError, match=rf"{status} \(who .*--header"):
        discover(url, model)


@pytest.mark.parametrize("body", [b'{"error":"\xff"}', b'[{"name":"\xff"}]', b'{"name":"\xff"}'])
@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.parametrize("model", ["m", None])
def test_what_is_not_utf_8_is_one_line(body: bytes, status: int, model: str | None) -> None:
    assert error_message(body) == ""
    with http_peer(lambda path, sent: whole(body, status)) as url, pytest.raises(LoadError):
        discover(url, model)


@pytest.mark.parametrize("path", ["/v2", "/v2/", "/v2/models/m", "/v2/models/m/infer", "/a/v2"])
@pytest.mark.parametrize("model", ["m", None])
def test_a_url_that_goes_too_far_is_told_so(path: str, model: str | None) -> None:
    peer = http_peer(serving_model(METADATA, lambda _: whole(answer_of())))
    with peer as url, pytest.raises(LoadError, match="leave /v2 and what follows it out"):
        discover(url + path, model)


def test_a_key_over_grpc_is_told_where_it_goes() -> None:
    def refuse(request: Any) -> Any:
        raise Refused(grpc.StatusCode.UNAUTHENTICATED, "who are you?")

    peer = grpc_peer(RepositoryIndex=refuse, ModelMetadata=refuse)
    with peer as url, pytest.raises(LoadError, match=r"who are you\?.*over HTTP, where --header"):
        discover(url, "m")


# -- answers under load


@pytest.mark.parametrize(("status", "remedy"), [(401, "Authorization"), (403, "Authorization"), (302, "redirects")])
def test_what_fails_for_all_ends_the_load_at_once(status: int, remedy: str, generator: Generator) -> None:
    with http_peer(serving_model(METADATA, lambda _: whole(b"", status))) as url:
        job = job_of(discover(url))
        with pytest.raises(LoadError, match=remedy):
            generator.run(job)


def counted(generator: Generator, other: bytes, status: int) -> Samples:
    """What becomes of a load in which every second answer after the first few is another."""
    answered = 0

    def infer(_: bytes) -> tuple[Pieces, bool]:
        nonlocal answered
        answered += 1
        return whole(other, status) if answered > 8 and answered % 2 else whole(answer_of())

    with http_peer(serving_model(METADATA, infer)) as url:
        return generator.run(job_of(discover(url)))


@pytest.mark.parametrize("body", [b'{"error":"\xff"}', b'{"outputs":[{"name":"\xff"}]}', b"\xff", b'{"a":' * 2000])
@pytest.mark.parametrize(("status", "kind"), [(500, "status 500"), (200, "not an answer")])
def test_answers_in_no_form_are_counted(body: bytes, status: int, kind: str, generator: Generator) -> None:
    found = counted(generator, body, status)
    assert found.count(Status.OK) + found.error_kinds[kind] == 40, found.first_error
    assert found.error_kinds.keys() == {kind}


@pytest.mark.parametrize("status", [429, 500])
def test_the_live_latencies_are_those_of_answers(status: int, generator: Generator) -> None:
    ticks: list[Tick] = []
    with http_peer(serving_model(METADATA, lambda _: whole(b"", status))) as url:
        generator.run(job_of(discover(url)), ticks.append)
    assert ticks[-1].ended == 40
    assert {(tick.p50_ms, tick.p99_ms) for tick in ticks} == {(None, None)}


def test_what_a_server_repeats_is_cut(generator: Generator) -> None:
    body = json.dumps({"outputs": [{"name": "y" * 100_000, "datatype": "FP32", "shape": [1]}]}).encode()
    with http_peer(serving_model(METADATA, lambda _: whole(body))) as url:
        job = job_of(discover(url))
        with pytest.raises(LoadError, match="not an answer") as failed:
            generator.run(job)
    assert len(str(failed.value)) < 1000


def test_an_error_with_status_200_is_none_of_many_lengths() -> None:
    """Numbers written as text make answers of many lengths: those are no longer decoded, but looked at."""
    job = OpenJob(host="", port=0, requests=(b"",), limit_s=1, timeout_s=1, outputs=("y",), schedule=bytes(8))
    check = AnswerCheck(job, decode_answer)
    for length in range(200):
        assert check.fault_of(answer_of(note="x" * length), None) == ""
    assert check.fault_of(json.dumps({"error": "x" * 500}).encode(), None)
    assert check.fault_of(b"<html>" + b"x" * 600, None)
    assert check.fault_of(b"", None)
    assert check.fault_of(answer_of(note="x" * 300), None) == ""


class Recorded:
    """The owner of a connection and of its records."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.answers: list[bytes] = []
        self.ended: list[str] = []

    def malformed(self, index: int, what: str, why: str, at: float) -> None:
        self.faults.append(what)

    def answered(self, index: int, body: bytes, header_length: int | None, at: float) -> None:
        self.answers.append(body)

    def fault_of(self, body: bytes, header_length: int | None) -> str:
        return ""

    def free(self, connection: Connection) -> None:
        pass

    def answer_read(self, *, small: bool) -> None:
        pass

    def closed(self, connection: Connection, why: str) -> None:
        self.ended.append(why)


START = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
PIECE = b"1000\r\n" + bytes(4096) + b"\r\n"


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (START, PIECE),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", bytes(4096)),
        (b"HTTP/1.1 200 OK\r\n\r\n", bytes(4096)),
        (b"HTTP/1.1 200 OK\r\nX: ", b"y" * 4096),
        (b"HTTP/1.1 200 OK\r\n", b"X: " + b"y" * 4000 + b"\r\n"),
        (b"", b"HTTP/1.1 103 Early Hints\r\nX: " + b"y" * 4000 + b"\r\n\r\n"),
        (START + PIECE + b"0\r\n", b"X: " + b"y" * 4000 + b"\r\n"),
    ],
    ids=["chunks", "a length", "until the end", "a field", "fields", "interim answers", "trailers"],
)
def test_an_answer_without_end_does_not_fill_the_memory(
    start: bytes, more: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_HELD_BYTES", 100_000)
    monkeypatch.setattr(connections, "_OVERHEAD_BYTES", 100_000)
    recorded, known = Recorded(), KnownHead()
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        connection = Connection(near, recorded, recorded, known, Timestamps())  # type: ignore[arg-type]
        connection.index = 0
        far.sendall(start)
        for _ in range(100):
            far.sendall(more)
            connection.read()
            if connection.index < 0:
                break
    assert recorded.faults == ["the server's answer does not end"]
    assert recorded.ended == [""]
    assert known.held == 0


def test_what_was_held_is_given_back_with_each_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_HELD_BYTES", 10_000)
    monkeypatch.setattr(connections, "_OVERHEAD_BYTES", 10_000)
    recorded, known = Recorded(), KnownHead()
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        connection = Connection(near, recorded, recorded, known, Timestamps())  # type: ignore[arg-type]
        for _ in range(20):
            connection.index = 0
            for part in (START, PIECE, b"0\r\n\r\n"):
                far.sendall(part)
                connection.read()
    assert [len(answer) for answer in recorded.answers] == [4096] * 20
    assert known.held == 0


# -- URLs


@pytest.mark.parametrize(
    ("url", "protocol", "clean"),
    [
        ("GRPC://h:1", "grpc", "grpc://h:1"),
        ("gRPC://[::1]:1", "grpc", "grpc://[::1]:1"),
        ("HTTP://h:1/a/", "http", "http://h:1/a"),
    ],
)
def test_a_scheme_in_capitals_is_the_same(url: str, protocol: str, clean: str) -> None:
    at = endpoint(url)
    assert (at.protocol, at.url) == (protocol, clean)


@pytest.mark.parametrize("user", ["me", "me:secret", ":secret", "", "a@b"])
def test_a_user_is_not_dropped_in_silence_nor_shown(user: str) -> None:
    with pytest.raises(LoadError, match="user or a password") as refused:
        endpoint(f"http://{user}@h:1")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("path", ["ä", "a b", "a\x7fb"])
def test_a_path_that_cannot_be_sent_is_refused(path: str) -> None:
    with pytest.raises(LoadError, match="percent-encoded"):
        endpoint(f"http://h:1/{path}")


def test_a_name_beyond_ascii_is_sent_as_dns_has_it() -> None:
    assert endpoint("http://bücher.example:1").host == "xn--bcher-kva.example"
    assert endpoint("http://書.example:1").authority == "xn--rov.example:1"


# -- arguments and files that are none


def test_an_empty_list_of_rates_is_no_search() -> None:
    with pytest.raises(GoalError, match="the list is empty"):
        rushhour.load("http://127.0.0.1:1", rate=[])


@pytest.mark.parametrize("number", [np.int64(5), np.float32(5), np.uint8(5)])
def test_numbers_of_numpy_are_numbers(number: Any) -> None:
    traffic = read_traffic(
        arrivals="poisson", seed=number, shapes=(), json_tensors=False, payloads=None, body=None, headers=()
    )
    assert read_rates(number, traffic) == [5.0]
    assert read_seconds(number) == 5.0


@pytest.mark.parametrize("rate", [[None], [[5]], ["x"], np.nan])
def test_what_is_no_rate_is_one_line(rate: Any) -> None:
    with pytest.raises(GoalError, match="requests per second"):
        rushhour.load("http://127.0.0.1:1", rate=rate)


@pytest.mark.parametrize("seed", [-1, 2**60])
def test_a_seed_that_is_none_is_one_line(seed: int) -> None:
    with pytest.raises(GoalError, match="seed"):
        rushhour.load("http://127.0.0.1:1", rate=5, seed=seed)


def test_one_header_is_not_a_list_of_letters() -> None:
    traffic = read_traffic(
        arrivals="poisson", seed=1, shapes=(), json_tensors=False, payloads=None, body=None, headers="X-Y: z"
    )
    assert traffic.headers == ("X-Y: z",)


def test_one_url_is_nothing_to_compare() -> None:
    peer = http_peer(serving_model(METADATA, lambda _: whole(answer_of())))
    with peer as url, pytest.raises(LoadError, match="two or more different servers"):
        rushhour.compare(url, rate=5)


def test_a_size_of_any_length_is_one_line() -> None:
    with pytest.raises(LoadError, match="NAME:SIZE,SIZE"):
        read_shapes(["x:" + "9" * 5000])


def damaged(folder: Path, name: str) -> bytes:
    """A file of this name that begins well."""
    file = folder / name
    if name.endswith(".npz"):
        np.savez_compressed(file, x=np.arange(4000, dtype=np.float32))
    else:
        Image.fromarray(np.arange(3000).astype(np.uint8).reshape(20, 50, 3)).save(file)
    return file.read_bytes()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["x.npz", "x.png", "x.jpg"])
@pytest.mark.parametrize("how", ["cut", "zeros", "ones", "bytes"])
def test_a_damaged_file_is_one_line(name: str, how: str, tmp_path: Path) -> None:
    content = damaged(tmp_path, name)
    for at in range(4, len(content) - 8, max(1, len(content) // 60)):
        if how == "cut":
            changed = content[:at]
        else:
            changed = (
                content[:at]
                + {"zeros": bytes(8), "ones": b"\xff" * 8, "bytes": b"IDATx<\0\x7f"}[how]
                + content[at + 8 :]
            )
        (tmp_path / name).write_bytes(changed)
        with contextlib.suppress(LoadError):
            folder_payloads(TARGET, tmp_path)


def test_an_array_that_says_it_is_huge_is_one_line(tmp_path: Path) -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999, 9), }"
    header += b" " * (117 - len(header)) + b"\n"
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(64))
    with pytest.raises(LoadError, match=r"cannot send .*x\.npy"):
        folder_payloads(TARGET, tmp_path)
