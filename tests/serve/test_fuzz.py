"""Whatever the bytes: the fuzzer's corpus replayed, and what holds for any requests in any pieces."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import itertools
import json
import sys
import tracemalloc
import zlib
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rushhour.bundle import Signature, TensorSpec
from rushhour.errors import WireError
from rushhour.serve import Limits
from rushhour.serve.protocols.http import connection, pipeline
from rushhour.serve.protocols.http.connection import HttpConnection
from rushhour.serve.protocols.http.upload import Upload
from rushhour.testing.fakes import SIGNATURE, fake_answers
from rushhour.wire import Codec, decode_answer, encode_json_request, encode_request

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "fuzz"))

from targets import CORPUS, KEY, LIMITS, TARGETS, Answer, Stack, _answers, _Transport

PATH = b"/v2/models/tiny/infer"
GET = b"GET /v2 HTTP/1.1\r\nhost: x\r\n\r\n"
GARBAGE = b"garbage\r\n\r\n"


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with contextlib.closing(Stack()) as made:
        yield made


@pytest.fixture(scope="module")
def full() -> Iterator[Stack]:
    with contextlib.closing(Stack(full=True)) as made:
        yield made


def images_of(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, 4, 4, 1), dtype=np.uint8)


def request(images: np.ndarray, form: str = "binary", fields: bytes = b"", path: bytes = PATH) -> bytes:
    """One inference request, in one of the forms that clients use."""
    if form == "JSON":
        body = encode_json_request(SIGNATURE, {"image": images})
    elif form == "raw":
        body, fields = images.tobytes(), fields + b"inference-header-content-length: 0\r\n"
    else:
        length, body = encode_request(SIGNATURE, {"image": images})
        fields += b"inference-header-content-length: %d\r\n" % length
    if form == "gzip":
        body, fields = gzip.compress(body), fields + b"content-encoding: gzip\r\n"
    elif form == "deflate":
        body, fields = zlib.compress(body), fields + b"content-encoding: deflate\r\n"
    if form == "chunked":
        fields += b"transfer-encoding: chunked\r\n"
        body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:7], body[7:])) + b"0\r\n\r\n"
    else:
        fields += b"content-length: %d\r\n" % len(body)
    return b"POST %b HTTP/1.1\r\nhost: x\r\n%b\r\n%b" % (path, fields, body)


def tensor(answer: Answer) -> np.ndarray:
    head = answer.head.decode()
    length = int(head.partition("inference-header-content-length: ")[2].partition("\r\n")[0] or len(answer.body))
    return decode_answer(answer.body, length)["probabilities"]


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_breaks_no_promise(target: str) -> None:
    corpus = sorted((CORPUS / target).iterdir())
    assert len(corpus) > 20
    for file in corpus:
        try:
            TARGETS[target](file.read_bytes())
        except AssertionError as error:
            raise AssertionError(f"{file.name}: {error}") from error


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    asked=st.lists(
        st.tuples(
            st.integers(1, 40), st.sampled_from(["binary", "JSON", "raw", "gzip", "deflate", "chunked"]), st.booleans()
        ),
        min_size=1,
        max_size=6,
    ),
    cuts=st.lists(st.integers(0, 8000), max_size=8),
    broken=st.booleans(),
    hasty=st.booleans(),
)
def test_requests_in_any_pieces_are_answered_once_in_order_and_rightly(
    stack: Stack, asked: list[tuple[int, str, bool]], cuts: list[int], broken: bool, hasty: bool
) -> None:
    sent, expected = b"", []
    for seed, (rows, form, beside) in enumerate(asked):
        images = images_of(rows, seed)
        sent += request(images, form) + (GET if beside else b"")
        expected += [images, None] if beside else [images]
    sent += GARBAGE if broken else b""
    edges = [0, *sorted(min(cut, len(sent)) for cut in cuts), len(sent)]
    reads = [sent[start:stop] for start, stop in pairwise(edges) if stop > start]
    answers, closed = stack.converse(reads, hasty=hasty)
    assert [answer.status for answer in answers] == [200] * len(expected) + [400] * broken
    assert [answer.last for answer in answers] == [False] * len(expected) + [True] * broken
    assert closed or not broken
    for answer, images in zip(answers, expected, strict=False):
        if images is not None:
            np.testing.assert_array_equal(tensor(answer), fake_answers(images))


@pytest.mark.parametrize("form", ["JSON", "binary", "chunked"])
@pytest.mark.parametrize("ending", [b"", b"\n", b"\n]}", b"POST"])
@pytest.mark.parametrize("beyond", [1, 4, 30, 59])
def test_a_large_body_is_not_counted_to_the_head_that_begins_in_the_same_read(
    stack: Stack, form: str, ending: bytes, beyond: int
) -> None:
    """The line of the next head was counted from the last line end, which lies before the body: 431 for a short one."""
    first = request(images_of(23, 0), form)
    if form == "JSON" and ending.strip() != b"POST":
        body = first.partition(b"\r\n\r\n")[2]
        body = body.removesuffix(b"]}") + ending if ending.endswith(b"]}") else body + ending
        first = b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (PATH, len(body), body)
    sent = first + request(images_of(1, 1))
    cut = len(first) + beyond
    answers, _ = stack.converse([sent[:cut], sent[cut:]], hasty=False)
    assert [answer.status for answer in answers] == [200, 200]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(["image", "UINT8"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
TENSOR = st.fixed_dictionaries(
    {"name": JSON | st.just("image"), "datatype": JSON | st.just("UINT8"), "shape": JSON | st.just([1, 2, 2, 1])},
    optional={
        "data": JSON | st.just([1, 2, 3, 4]),
        "parameters": JSON
        | st.dictionaries(
            st.sampled_from(["binary_data_size", "shared_memory_region", "shared_memory_byte_size"]), JSON, max_size=3
        ),
    },
)
WANTED = st.fixed_dictionaries(
    {"name": JSON | st.just("p")},
    optional={
        "parameters": JSON | st.dictionaries(st.sampled_from(["binary_data", "classification"]), JSON, max_size=2)
    },
)
REQUEST = st.fixed_dictionaries(
    {"inputs": JSON | st.lists(TENSOR, max_size=2)},
    optional={
        "outputs": JSON | st.lists(WANTED, max_size=2),
        "id": JSON,
        "parameters": JSON
        | st.dictionaries(st.sampled_from(["timeout", "priority", "binary_data_output"]), JSON, max_size=3),
    },
)
ONE = Signature(inputs=(TensorSpec("image", "uint8", (2, 2, 1)),), outputs=(TensorSpec("p", "float32", (3,)),))


@given(REQUEST, st.binary(max_size=8))
def test_any_header_gives_a_request_or_a_wire_error(header: dict[str, object], blob: bytes) -> None:
    encoded = json.dumps(header).encode()
    codec = Codec("m", ONE, labels=("a", "b", "c"))
    try:
        asked = codec.decode(encoded + blob, len(encoded))
    except WireError as error:
        refused = error
    else:
        assert [len(part) for part in asked.tensors] == [4 * asked.rows]
        codec.encode(asked.wanted, asked.rows, [memoryview(bytes(12 * asked.rows))])
        return
    assert 400 <= refused.status <= 501
    assert len(str(refused)) < 1000


@pytest.mark.parametrize(
    "data",
    [
        '["' + "a" * 20_000 + '"' + ',""' * 20_000 + "]",
        "[" + "{}," * 20_000 + "1]",
        "[" * 500 + "]" * 500,
        "[" + "[]," * 20_000 + "[]]",
    ],
)
def test_what_a_body_costs_is_in_proportion_to_it(data: str) -> None:
    """numpy would give each of 20,000 texts as much room as the longest: 1.6 GB for 80 KB."""
    body = b'{"inputs":[{"name":"image","shape":[1,2,2,1],"datatype":"UINT8","data":%b}]}' % data.encode()
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            Codec("m", ONE).decode(body, None)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 * len(body)


@pytest.mark.parametrize("field", ["name", "datatype"])
def test_text_that_is_not_utf8_and_text_without_end_are_refused_in_a_few_words(field: str) -> None:
    whole = b'{"inputs":[{"name":"image","shape":[1,2,2,1],"datatype":"UINT8","data":[1,2,3,4]}]}'
    before = {"name": b'"image"', "datatype": b'"UINT8"'}[field]
    for text in (b'"\xed\xa0\x80"', b'"' + b"x" * 100_000 + b'"'):
        with pytest.raises(WireError) as caught:
            Codec("m", ONE).decode(whole.replace(before, text), None)
        assert len(str(caught.value)) < 400


def test_a_number_too_large_for_its_type_is_refused_and_not_made_infinite() -> None:
    half = Signature(inputs=(TensorSpec("x", "float16", (1,)),), outputs=ONE.outputs)
    for value in (1e300, 70_000):
        body = json.dumps({"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP16", "data": [value]}]}).encode()
        with pytest.raises(WireError, match="cannot be read"):
            Codec("m", half).decode(body, None)


def test_many_kinds_of_answers_do_not_keep_new_ones_from_being_remembered() -> None:
    codec = Codec("m", ONE)
    for timeout in range(1, 400):
        length, body = encode_request(ONE, {"image": np.zeros((1, 2, 2, 1), np.uint8)})
        header = body[:length].replace(
            b'"parameters":{"binary_data_output"', b'"parameters":{"timeout":%d,"binary_data_output"' % timeout
        )
        asked = codec.decode(header + body[length:], len(header))
        codec.encode(asked.wanted, 1, [memoryview(bytes(12))])
    assert (asked.wanted.outputs, 1, (), "") in codec._answer_headers
    assert len(codec._answer_headers) <= 256


# What the fuzzer, or reading for it, has found; each of these hung or broke the server once.


def test_garbage_behind_a_packed_request_does_not_stop_the_engine(stack: Stack) -> None:
    answers, closed = stack.converse([request(images_of(1, 0), "gzip") + GARBAGE])
    assert [answer.status for answer in answers] == [200, 400]
    assert closed
    assert [answer.status for answer in stack.converse([request(images_of(1, 1))]).answers] == [200]


def test_thousands_of_requests_behind_one_inference_are_answered(stack: Stack) -> None:
    answers, _ = stack.converse([request(images_of(1, 0)) + GET * 3000, GET])
    assert [answer.status for answer in answers] == [200] * 3002


def test_head_is_answered_without_a_body(stack: Stack) -> None:
    sent = GET.replace(b"GET", b"HEAD") + GET
    answers, _ = stack.converse([sent], methods=[b"HEAD", b"GET"])
    assert [answer.status for answer in answers] == [200, 200]


def test_head_in_pieces_is_refused_without_a_body() -> None:
    sent = [b"HEAD /v2 HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nab", b"c" + GET]
    with contextlib.closing(Stack(keys=(KEY,))) as keyed:
        answers, _ = keyed.converse(sent, methods=[b"HEAD", b"GET"])
    assert [answer.status for answer in answers] == [401, 401]


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        (b"content-length: 3\r\n", 400),
        (b"transfer-encoding: chunked\r\n", 400),
        (b"transfer-encoding: gzip, chunked\r\n", 501),
        (b"inference-header-content-length: 1\r\n", 400),
        (b"authorization: Bearer a\r\nauthorization: Bearer b\r\n", 400),
        (b"content-encoding: gzip\r\ncontent-encoding: deflate\r\n", 400),
        (b" folded: x\r\n", 400),
        (b"x : y\r\n", 400),
        (b"x: a\rb\r\n", 400),
        (b"x: a\0b\r\n", 400),
    ],
)
def test_what_two_servers_may_read_in_two_ways_is_not_read_at_all(stack: Stack, fields: bytes, status: int) -> None:
    answers, closed = stack.converse([request(images_of(1, 0), fields=fields) + GET])
    assert [answer.status for answer in answers] == [status]
    assert closed


def test_a_transfer_encoding_beside_chunks_is_not_implemented(stack: Stack) -> None:
    sent = b"POST /v2 HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n"
    assert [answer.status for answer in stack.converse([sent]).answers] == [501]


def test_trailers_change_nothing(stack: Stack) -> None:
    images = images_of(1, 3)
    sent = request(images, "chunked").removesuffix(b"\r\n") + b"inference-header-content-length: 3\r\n\r\n"
    (answer,) = stack.converse([sent]).answers
    np.testing.assert_array_equal(tensor(answer), fake_answers(images))


def test_the_server_says_continue_once_the_header_is_whole(stack: Stack) -> None:
    whole = request(images_of(1, 3), fields=b"expect: 100-continue\r\n" * 3)
    head, _, body = whole.partition(b"\r\n\r\n")
    assert [answer.status for answer in stack.converse([head + b"\r\n\r\n", body]).answers] == [200]


# Turning away a large request before its body is there.


def test_a_large_request_that_will_be_shed_is_answered_before_its_body_is_there(full: Stack) -> None:
    head, _, body = request(images_of(200, 0)).partition(b"\r\n\r\n")
    (answer,) = full.converse([head + b"\r\n\r\n" + body[:300]]).answers
    assert answer.status == 429
    assert b"retry-after: " in answer.head
    assert not answer.last


@pytest.mark.parametrize("first", [1, 220, 420])
def test_a_large_request_with_a_known_head_is_read_past_the_parser(
    stack: Stack, full: Stack, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []

    class Counted(Upload):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            begun.append(len(given[2]))

    monkeypatch.setattr(connection, "Upload", Counted)
    asked = [images_of(30, seed) for seed in range(4)]
    sent = [request(images) for images in asked]
    reads = [part for whole in sent for part in (whole[:first], whole[first:500], whole[500:])]
    answers = stack.converse(reads).answers
    assert len(answers) == 4
    for answer, images in zip(answers, asked, strict=True):
        np.testing.assert_array_equal(tensor(answer), fake_answers(images))
    assert len(begun) == (0 if first == 1 else 3), "the first is not known yet, and a head in pieces is parsed"
    answers, closed = full.converse([*reads, GET])
    assert [answer.status for answer in answers] == [429, 429, 429, 429, 200]
    assert not closed


@pytest.mark.parametrize("form", ["binary", "JSON", "chunked", "gzip"])
def test_after_an_early_no_the_connection_goes_on(full: Stack, form: str) -> None:
    sent = request(images_of(30, 0), form) + GET + request(images_of(1, 0)) + GET
    answers, closed = full.converse([sent[at : at + 100] for at in range(0, len(sent), 100)])
    assert [answer.status for answer in answers] == [429, 200, 429, 200]
    assert not closed


def test_a_body_that_is_dropped_keeps_the_bounds_of_any_other(full: Stack) -> None:
    head = b"POST %b HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" % PATH
    chunk = b"200\r\n" + b"x" * 512 + b"\r\n"
    answers, closed = full.converse([head, *[chunk] * (LIMITS.body_bytes // 512 + 1), GET])
    assert [answer.status for answer in answers] == [429]
    assert closed, "too large: where the next request begins is not waited for"


def test_a_request_that_says_it_is_the_last_is_read_before_it_is_refused(full: Stack) -> None:
    sent = request(images_of(100, 0), fields=b"connection: close\r\n")
    answers, closed = full.converse([sent[:500], sent[500:]])
    assert [(answer.status, answer.last) for answer in answers] == [(429, True)]
    assert closed


# Heads in pieces, and bodies of who has no key: what a connection may hold.


class _Counting:
    """The parser of a connection, and how much it is handed."""

    def __init__(self, parser: Any) -> None:
        self._parser = parser
        self.fed: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parser, name)

    def feed_data(self, data: bytes) -> None:
        self.fed.append(len(data))
        self._parser.feed_data(data)


def read_in_pieces(stack: Stack, limits: Limits, pieces: Iterable[bytes]) -> tuple[list[Answer], int, list[int]]:
    """The answers, the bytes that were read until the server had enough, and the sizes that its parser was fed."""

    async def scenario() -> tuple[list[Answer], int, list[int]]:
        connection = HttpConnection(stack._server)
        connection._limits = limits
        connection._parser = parser = _Counting(connection._parser)
        transport = _Transport(connection)
        connection.connection_made(transport)
        read = 0
        for piece in pieces:
            transport.deliver(piece)
            read += len(piece)
            if transport.ended:
                break
        answers = _answers(bytes(transport.sent), ())
        transport.close()
        await asyncio.sleep(0)
        return answers, read, parser.fed

    return stack._loop.run_until_complete(scenario())


@pytest.mark.parametrize("form", ["JSON", "binary"])
def test_a_large_answer_is_written_in_turns_with_the_others(
    stack: Stack, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client on this machine reads as fast as the server writes: all of it went out in one turn, 64 ms for 50 MB."""
    most, turn = 500, itertools.count()
    monkeypatch.setattr(pipeline, "_TURN_BYTES", most)
    monkeypatch.setattr(pipeline, "MAX_PIPELINED_BYTES", 1000)
    monkeypatch.setattr("rushhour.wire.answers.AT_ONCE", 100)
    monkeypatch.setattr("rushhour.wire.values.AT_ONCE", 100)
    monkeypatch.setattr("rushhour.wire.answers.BYTES_AT_ONCE", 100)
    written: dict[int, int] = {}
    images = images_of(200, 0)
    header = {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [200, 4, 4, 1]}]}
    header["inputs"][0]["parameters"] = {"binary_data_size": images.nbytes}  # type: ignore[index]
    if form == "binary":
        header["parameters"] = {"binary_data_output": True}  # type: ignore[assignment]
    encoded = json.dumps(header).encode()
    size = b"inference-header-content-length: %d\r\ncontent-length: %d\r\n"
    sent = b"POST %b HTTP/1.1\r\nhost: x\r\n" % PATH + size % (len(encoded), len(encoded) + images.nbytes) + b"\r\n"

    class Watched(_Transport):
        def write(self, data: Any) -> None:
            written[now[0]] = written.get(now[0], 0) + len(data)
            super().write(data)

    now = [0]

    async def count() -> None:
        while True:
            now[0] = next(turn)
            await asyncio.sleep(0)

    async def scenario() -> list[Answer]:
        counting = asyncio.ensure_future(count())
        connection = HttpConnection(stack._server)
        transport = Watched(connection)
        connection.connection_made(transport)
        transport.deliver(sent + encoded + images.tobytes() + GET)
        while not connection.idle:
            await asyncio.sleep(0)
        counting.cancel()
        transport.close()
        await asyncio.sleep(0)
        return _answers(bytes(transport.sent), ())

    answers = stack._loop.run_until_complete(scenario())
    assert [answer.status for answer in answers] == [200, 200]
    np.testing.assert_allclose(tensor(answers[0]), fake_answers(images), rtol=1e-6)
    assert len(written) > 3
    assert max(list(written.values())[:-1]) <= most


ENDLESS = {
    "a value": b"GET /v2 HTTP/1.1\r\nhost: x\r\nx: ",
    "a name": b"GET /v2 HTTP/1.1\r\nhost: x\r\n",
    "a target": b"GET /v2?",
    "the first value of many requests": GET * 20 + b"GET /v2 HTTP/1.1\r\nx: ",
    "a value behind short ones": b"GET /v2 HTTP/1.1\r\nhost: x\r\n" + b"x: y\r\n" * 50 + b"y: ",
}


@pytest.mark.parametrize("piece", [1, 100, 5000])
@pytest.mark.parametrize("begins", ENDLESS)
def test_a_head_is_bounded_also_while_a_line_of_it_is_not_whole(stack: Stack, begins: str, piece: int) -> None:
    limits = Limits(header_bytes=16 * 1024)
    endless = itertools.chain([ENDLESS[begins]], itertools.repeat(b"y" * piece, 4_000_000 // piece))
    answers, read, _ = read_in_pieces(stack, limits, endless)
    assert answers[-1].status in ((414, 431) if "target" in begins else (431,))
    assert answers[-1].last
    assert read <= limits.header_bytes + len(ENDLESS[begins]) + piece + 512


@pytest.mark.parametrize("begins", ["a value", "a name", "a target"])
def test_a_line_in_many_pieces_is_not_copied_with_each(stack: Stack, begins: str) -> None:
    limits, line = Limits(header_bytes=2**20), b"y" * 500_000
    ends = {"a value": b"\r\n\r\n", "a name": b": z\r\n\r\n", "a target": b" HTTP/1.1\r\nhost: x\r\n\r\n"}[begins]
    whole = line + ends
    pieces = [ENDLESS[begins], *(whole[at : at + 100] for at in range(0, len(whole), 100))]
    answers, _, fed = read_in_pieces(stack, limits, pieces)
    assert [answer.status for answer in answers] == [200]
    assert sum(fed) == len(ENDLESS[begins]) + len(whole)
    assert len(fed) < 50, "it waits for its end outside the parser, which copies all it has with each piece"


def test_extensions_of_chunks_and_trailers_are_bounded(stack: Stack) -> None:
    limits = Limits(header_bytes=1024)
    head = b"POST /v2/repository/index HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    for begins in (b"2;x=", b"2\r\n{}\r\n0\r\nx: ", b"2\r\n{}\r\n0\r\n"):
        endless = itertools.chain([head, begins], itertools.repeat(b"y" * 1000, 10_000))
        answers, read, _ = read_in_pieces(stack, limits, endless)
        assert [answer.status for answer in answers] == [431]
        assert read < 100_000
    chunks = itertools.chain([head], itertools.repeat(b"1;xyz=" + b"y" * 900 + b"\r\n \r\n", 100), [b"0\r\n\r\n"])
    answers, _, _ = read_in_pieces(stack, limits, chunks)
    assert answers[0].status == 400, "many short ones are read: the body of spaces is no JSON"


HEALTH = b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.mark.parametrize("fields", [b"", b"connection: close\r\n", b"upgrade: h2c\r\nconnection: upgrade, close\r\n"])
@pytest.mark.parametrize("before", [b"", HEALTH * 3, HEALTH * 60])
@pytest.mark.parametrize("form", ["binary", "chunked"])
def test_a_body_without_a_key_is_not_kept(fields: bytes, before: bytes, form: str) -> None:
    sent = before + request(images_of(150, 0), form, fields)
    kept: list[int] = []

    class Watched(HttpConnection):
        def on_body(self, body: bytes) -> None:
            super().on_body(body)
            kept.append(sum(map(len, self._message.body)))

    with contextlib.closing(Stack(keys=(KEY,))) as keyed, pytest.MonkeyPatch.context() as patch:
        patch.setattr("targets.HttpConnection", Watched)
        patch.setattr("targets.SMALL", ())
        cut = len(before) + 250  # in the body, behind the head
        reads = [sent[:cut], *(sent[at : at + 200] for at in range(cut, len(sent), 200))]
        answers, closed = keyed.converse([*reads, HEALTH])
        early, _ = keyed.converse([reads[0]])
    alive = [200] * (len(before) // len(HEALTH))
    assert [answer.status for answer in answers] == [*alive, 401, *([] if fields else [200])]
    assert closed == bool(fields)
    waits = len(alive) > 32  # with those before it, until it is whole
    assert [answer.status for answer in early] == [*alive, *([] if waits else [401])]
    assert len(kept) > 5
    assert max(kept) < 200, "no more than came with the head"
