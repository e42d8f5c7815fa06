"""What is read and written on threads, or in turns, is checked and counted like everything else."""

from __future__ import annotations

import asyncio
import gzip
import json
from typing import Any

import grpc
import numpy as np
import pytest
from test_loop import READY, Client, Regions, Served, binary, images_of, in_json, post, run, served, until
from tritonclient.grpc import service_pb2

from rushhour.bundle import Bundle, Signature, TensorSpec
from rushhour.errors import WireError
from rushhour.serve import Limits
from rushhour.serve.access.origin import ORIGIN_FIELDS
from rushhour.serve.protocols.http import reader
from rushhour.serve.protocols.http.message import IDENTIFYING_FIELDS
from rushhour.testing.fakes import fake_answers
from rushhour.wire import Codec, Place, Wanted, decode_answer

_MIB = 2**20


class Written(Regions):
    """Shared memory that takes what is written to it, or does not."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.error = error
        self.written = 0

    def write(self, place: Place, content: memoryview | bytes) -> None:
        if self.error is not None:
            raise self.error
        self.written += 1


OUTPUT: dict[str, Any] = {
    "name": "probabilities",
    "parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 10**5},
}


def into_memory(images: np.ndarray, *fields: str) -> bytes:
    entry = {"name": "image", "shape": list(images.shape), "datatype": "UINT8"}
    described = entry | {"parameters": {"binary_data_size": images.nbytes}}
    sent = binary(images, *fields, header=json.dumps({"inputs": [described], "outputs": [OUTPUT]}).encode())
    return sent.replace(b"host: x", b"host: localhost", 1)


def into_memory_over_grpc(images: np.ndarray) -> bytes:
    request = service_pb2.ModelInferRequest(model_name="tiny")
    request.inputs.add(name="image", datatype="UINT8", shape=images.shape)
    parameters = request.outputs.add(name="probabilities").parameters
    parameters["shared_memory_region"].string_param = "r"
    parameters["shared_memory_byte_size"].int64_param = 10**5
    request.raw_input_contents.append(images.tobytes())
    return bytes(request.SerializeToString())


def counted(server: Served) -> tuple[int, int, dict[str, int]]:
    """Answers, errors, and these by reason."""
    totals = server.cell.totals()
    assert totals.success.count == totals.answered
    return totals.success.count, totals.fail.count, totals.errors


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("face", ["http", "grpc"])
@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (WireError("there is no region 'r' any more", status=404), 404, "not_found"),
        (WireError("it does not fit"), 400, "invalid"),
        (RuntimeError("what should not have happened"), 500, "internal"),
        (None, 200, None),
    ],
)
def test_an_answer_is_counted_once_by_how_it_ended_also_where_it_is_written_aside(
    tiny: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    face: str,
    large: bool,
    error: Exception | None,
    status: int,
    reason: str | None,
) -> None:
    monkeypatch.setattr("rushhour.wire.answers.BYTES_AT_ONCE", 100)

    async def scenario() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        async with served(tiny, regions=Written(error)) as server:
            images = images_of(64 if large else 1)
            if face == "http":
                client = await Client.to(server.address)
                assert (await client.ask(into_memory(images))).status == status
                assert (await client.ask(READY)).status == 200, "the connection goes on"
            elif error is None:
                await server.call(into_memory_over_grpc(images))
            else:
                with pytest.raises(grpc.aio.AioRpcError):
                    await server.call(into_memory_over_grpc(images))
            await until(lambda: server.cell.idle)
            assert counted(server) == ((0, 1, {reason: 1}) if reason else (1, 0, {}))

    run(scenario)


def test_what_is_written_aside_in_parts_is_an_answer_counted_once(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rushhour.wire.answers.AT_ONCE", 8)
    monkeypatch.setattr("rushhour.wire.values.AT_ONCE", 8)

    async def scenario() -> None:
        async with served(tiny) as server:
            client = await Client.to(server.address)
            for number in range(3):
                answer = await client.ask(post(in_json(images_of(20, number))))
                assert answer.status == 200
                np.testing.assert_array_equal(answer.values, fake_answers(images_of(20, number)))
                assert answer.fields["date"].endswith("GMT")
            await until(lambda: server.cell.idle)
            assert counted(server) == (3, 0, {})
            assert server.cell.totals().request_s.counts

    run(scenario)


# A budget that is used up.


@pytest.mark.parametrize("form", ["a large body", "a large body whose head is known", "unpacked", "grpc"])
def test_who_finds_no_room_in_the_budget_is_told_when_to_come_back_and_counted_once(tiny: Bundle, form: str) -> None:
    limits = Limits(held_bytes=_MIB)
    large = binary(images_of(20_000))
    packed = post(gzip.compress(in_json(images_of(4000))), "content-encoding: gzip")

    async def scenario() -> None:
        async with served(tiny, limits) as server:
            client = await Client.to(server.address)
            before = 0
            if "known" in form:
                assert (await client.ask(large)).status == 400  # more samples than a request may have
                before = 1
            grant = server.desk.budget.grant(_MIB)
            if form == "grpc":
                request = service_pb2.ModelInferRequest(model_name="tiny", raw_input_contents=[bytes(40_000)])
                with pytest.raises(grpc.aio.AioRpcError, match="too many large requests") as caught:
                    await server.call(request.SerializeToString())
                assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            else:
                answer = await client.ask(packed if form == "unpacked" else large)
                assert answer.status == 429
                assert int(answer.fields["retry-after"]) >= 1
            totals = server.cell.totals()
            assert (totals.fail.count, totals.errors.pop("queue"), totals.shed_queue) == (before + 1, 1, 1)
            assert sum(totals.errors.values()) == before
            del grant

    run(scenario)


# Who may have answers written into memory.


@pytest.mark.parametrize("size", [1, 3000])
@pytest.mark.parametrize(
    ("fields", "status"),
    [
        (("host: localhost",), 200),
        (("host: localhost", "origin: http://evil.example"), 403),
        (("host: evil.example",), 403),
        (("host: localhost", "sec-fetch-site: cross-site"), 403),
    ],
)
def test_no_web_page_has_answers_written_into_memory_however_large_its_request_is(
    tiny: Bundle, size: int, fields: tuple[str, ...], status: int
) -> None:
    async def scenario() -> None:
        regions = Written()
        async with served(tiny, regions=regions) as server:
            client = await Client.to(server.address)
            sent = post(in_json(images_of(size), outputs=[OUTPUT]), *fields[1:])
            answer = await client.ask(sent.replace(b"host: x", fields[0].encode(), 1))
            assert answer.status == status
            assert regions.written == (status == 200)

    run(scenario)


def test_who_asks_is_part_of_what_is_remembered_of_a_head(tiny: Bundle) -> None:
    async def scenario() -> None:
        regions = Written()
        async with served(tiny, regions=regions) as server:
            client = await Client.to(server.address)
            own = into_memory(images_of(2))
            heads = {
                own: 200,
                own.replace(b"host: localhost", b"host: evil.example"): 403,
                own.replace(b"host: localhost", b"host: localhost\r\norigin: http://evil.example"): 403,
                own.replace(b"host: localhost", b"host: localhost\r\norigin: http://localhost"): 200,
                own.replace(b"host: localhost", b"host: localhost\r\nsec-fetch-site: cross-site"): 403,
                own.replace(b"host: localhost", b"host: localhost\r\nx-request-id: 1"): 200,
            }
            for number in range(4):
                for sent, status in heads.items():
                    sent = sent.replace(b"x-request-id: 1", b"x-request-id: %d" % 10**number)
                    assert (await client.ask(sent)).status == status
            assert regions.written == 4 * list(heads.values()).count(200)

    run(scenario)


def test_no_head_is_remembered_by_a_field_that_says_who_asks() -> None:
    for field in (*ORIGIN_FIELDS, b"authorization", b"content-encoding", b"content-length", b"expect"):
        for name in (field, field.title(), field.upper()):
            assert not IDENTIFYING_FIELDS.search(b"POST / HTTP/1.1\r\n" + name + b": x\r\n\r\n")


# Parsing in turns.


@pytest.mark.parametrize("offer", ["", "upgrade: h2c\r\nconnection: upgrade\r\n"])
@pytest.mark.parametrize("form", ["length", "chunked"])
def test_requests_that_are_parsed_in_turns_are_all_answered_whatever_they_offer(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch, offer: str, form: str
) -> None:
    monkeypatch.setattr(reader, "_SLICE", 50)
    monkeypatch.setattr(reader, "_MOST_EVENTS", 4)

    def request(number: int) -> bytes:
        body = in_json(images_of(1, number), id=str(number))
        framing = b"content-length: %d\r\n\r\n%b" % (len(body), body)
        if form == "chunked":
            chunks = [body[at : at + 7] for at in range(0, len(body), 7)]
            parts = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
            framing = b"transfer-encoding: chunked\r\n\r\n%b0\r\n\r\n" % parts
        return f"POST /v2/models/tiny/infer HTTP/1.1\r\nhost: x\r\n{offer}".encode() + framing

    async def scenario() -> None:
        async with served(tiny) as server:
            client = await Client.to(server.address)
            client.writer.write(b"".join(map(request, range(60))) + READY)
            for number in range(60):
                answer = await client.answer()
                assert (answer.status, answer.json["id"]) == (200, str(number))
                np.testing.assert_array_equal(answer.values, fake_answers(images_of(1, number)))
            assert (await client.answer()).status == 200
            await until(lambda: server.cell.idle)
            assert counted(server) == (60, 0, {})

    run(scenario)


@pytest.mark.parametrize("line", [b"GET /v2?", b"GET /v2 HTTP/1.1\r\nhost: x\r\nx: ", b"GET /v2 HTTP/1.1\r\n"])
def test_a_line_that_comes_behind_many_requests_is_bounded_too(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch, line: bytes
) -> None:
    monkeypatch.setattr(reader, "_SLICE", 100)
    monkeypatch.setattr(reader, "_MOST_EVENTS", 4)

    async def scenario() -> None:
        async with served(tiny, Limits(header_bytes=2000)) as server:
            client = await Client.to(server.address)
            client.writer.write(READY * 50 + line + b"y" * 10_000)
            for _ in range(50):
                assert (await client.answer()).status == 200
            assert (await client.answer()).status == (414 if b"?" in line else 431)
            assert await client.reader.read() == b""

    run(scenario)


# NaN and the infinities, in pieces.

FLOATS = Signature((TensorSpec("x", "float32", (3,)),), (TensorSpec("y", "float32", (3,)),))


def floats(data: str, rows: int) -> bytes:
    entry = json.dumps({"name": "x", "datatype": "FP32", "shape": [rows, 3]})[:-1]
    return f'{{"inputs":[{entry},"data":{data}}}]}}'.encode()


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_nan_and_infinities_are_read_in_pieces_as_they_are_at_once(
    monkeypatch: pytest.MonkeyPatch, pieces: bool, nested: bool
) -> None:
    if pieces:
        monkeypatch.setattr("rushhour.wire.codec.WHOLE_BYTES", 0)
        monkeypatch.setattr("rushhour.wire.pieces.PIECE_BYTES", 40)
        monkeypatch.setattr("rushhour.wire.json_pieces.WHOLE_BYTES", 1000)
    row = "NaN, Infinity ,-Infinity"
    data = ",".join(f"[{row}]" if nested else row for _ in range(20))
    request = Codec("m", FLOATS).decode(floats(f"[{data}]", 20), None)
    values = np.frombuffer(request.tensors[0], np.float32).reshape(20, 3)
    np.testing.assert_array_equal(values, np.array([[np.nan, np.inf, -np.inf]] * 20, np.float32))


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("word", ["1e999", "-1e400", "9" * 400, "nan", "Inf", "null", "true", '"NaN"'])
def test_what_is_no_number_of_the_type_is_refused_in_pieces_as_it_is_at_once(
    monkeypatch: pytest.MonkeyPatch, pieces: bool, word: str
) -> None:
    if pieces:
        monkeypatch.setattr("rushhour.wire.codec.WHOLE_BYTES", 0)
        monkeypatch.setattr("rushhour.wire.pieces.PIECE_BYTES", 500)
        monkeypatch.setattr("rushhour.wire.json_pieces.WHOLE_BYTES", 1000)
    for beside in ("NaN", "0"):
        with pytest.raises(WireError) as caught:
            Codec("m", FLOATS).decode(floats(f"[{beside},{word},0]", 1), None)
        assert caught.value.status == 400


@pytest.mark.parametrize("at_once", [1, 4, 8192])
def test_nan_and_infinities_are_written_in_parts_as_they_are_at_once(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr("rushhour.wire.answers.AT_ONCE", at_once)
    monkeypatch.setattr("rushhour.wire.values.AT_ONCE", at_once)
    values = np.array([[np.nan, 1, np.inf], [0, -np.inf, 2]] * 5, np.float32)
    codec, wanted = Codec("m", FLOATS), Wanted(id="", outputs=(0,), binary=(False,))
    length, parts = codec.encode(wanted, 10, [memoryview(values.tobytes())])
    body = b"".join(parts)
    assert length is None
    assert (body.count(b"NaN"), body.count(b"Infinity"), body.count(b"null")) == (5, 10, 0)
    np.testing.assert_array_equal(decode_answer(body, None)["y"], values)
