"""HTTP as RFC 9110 and 9112 have it, section by section, over raw sockets: docs/http.md says what is done."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import socket
import zlib
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from typing import NamedTuple

import numpy as np
import pytest

from conftest import Server, serving
from rushhour.bundle import Bundle
from rushhour.serve import Limits, ServeSettings
from rushhour.testing.bundles import tiny_answers
from rushhour.wire import decode_answer, encode_json_request, encode_request

INFER = b"/v2/models/tiny/infer"
KEY = "a-key-of-some-length"
LIMITS = Limits(header_bytes=4096, body_bytes=2**20)


class Answer(NamedTuple):
    """One answer, interim ones too."""

    status: int
    fields: dict[str, str]
    body: bytes


def answers_in(said: bytes, heads: tuple[int, ...]) -> list[Answer]:
    """What the server said, every byte of it; `heads` are the final answers that go to HEAD."""
    found: list[Answer] = []
    final = 0
    while said:
        head, end, said = said.partition(b"\r\n\r\n")
        assert end, head
        status_line, *lines = head.decode("latin-1").split("\r\n")
        matched = re.fullmatch(r"HTTP/1\.1 (\d{3}) [A-Za-z ]+", status_line)
        assert matched, status_line
        fields = {name: value for name, _, value in (line.partition(": ") for line in lines)}
        assert len(fields) == len(lines), "no field twice"
        status = int(matched[1])
        size = 0 if status < 200 or final in heads else int(fields["content-length"])
        assert len(said) >= size
        found.append(Answer(status, fields, said[:size]))
        said = said[size:]
        final += status >= 200
    return found


def hear(server: Server, sent: bytes, *, piece: int | None = None, heads: tuple[int, ...] = ()) -> list[Answer]:
    """All that the server answers to these bytes, sent at once or in pieces."""
    with socket.create_connection(server.address, timeout=10) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        said = b""
        with contextlib.suppress(ConnectionError):
            for at in range(0, len(sent), piece or len(sent)):
                connection.sendall(sent[at : at + (piece or len(sent))])
            connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while chunk := connection.recv(65536):
                said += chunk
    return answers_in(said, heads)


@pytest.fixture(scope="module")
def server(tiny: Bundle) -> Iterator[Server]:
    with serving(tiny.path, ServeSettings(http_port=0, limits=LIMITS)) as running:
        yield running


@pytest.fixture(scope="module")
def keyed(tiny: Bundle) -> Iterator[Server]:
    with serving(tiny.path, ServeSettings(http_port=0, limits=LIMITS, api_keys=(KEY,))) as running:
        yield running


def get(target: bytes = b"/v2", fields: bytes = b"", *, host: bytes = b"host: x\r\n", version: bytes = b"1.1") -> bytes:
    return b"GET %s HTTP/%s\r\n%s%s\r\n" % (target, version, host, fields)


def post(
    body: bytes, fields: bytes = b"", *, target: bytes = b"/v2/repository/index", version: bytes = b"1.1"
) -> bytes:
    head = b"POST %s HTTP/%s\r\nhost: x\r\n%scontent-length: %d\r\n\r\n"
    return head % (target, version, fields, len(body)) + body


def chunked(body: bytes, fields: bytes = b"transfer-encoding: chunked\r\n", *, version: bytes = b"1.1") -> bytes:
    return b"POST /v2/repository/index HTTP/%s\r\nhost: x\r\n%s\r\n" % (version, fields) + body


CHUNKS = b'3\r\n{"r\r\n0A\r\neady":true\r\n1;a=b;c="d"\r\n}\r\n0\r\n\r\n'
NEXT = get(b"/v2/health/live")
"""Sent behind each case: whether it is answered shows that the connection goes on, and where its requests begin."""

LOGGING = b"POST /v2/logging HTTP/1.1\r\nhost: localhost\r\n"

GOOD = {
    "2.2 an empty line before the request": b"\r\n" + get(),
    "2.3 HTTP/1.0": get(version=b"1.0", fields=b"connection: keep-alive\r\n"),
    "3 several spaces between the parts": b"GET   /v2  HTTP/1.1\r\nhost: x\r\n\r\n",
    "3.2 an empty host": get(host=b"host:\r\n"),
    "3.2 a host with a port": get(host=b"Host: example.com:8000\r\n"),
    "3.2 a host of IPv6": get(host=b"host: [::1]:80\r\n"),
    "3.2 no host in HTTP/1.0": get(host=b"", version=b"1.0", fields=b"connection: keep-alive\r\n"),
    "3.2.1 a query": get(b"/v2?x=y&z"),
    "3.2.1 an encoded path": get(b"/v2/models/%74iny"),
    "3.2.2 the absolute form": get(b"http://example.com:8000/v2"),
    "3.2.2 the absolute form, https and a query": get(b"HTTPS://example.com/v2?x"),
    "3.2.4 the asterisk form": b"OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n",
    "5 spaces and tabs around a value": post(b"{}", b"x: \t y \t \r\n"),
    "5 spaces and tabs around a host": get(host=b"host: \t x \t\r\n"),
    "5 spaces and tabs around a length": LOGGING + b"content-length: \t2 \r\n\r\n{}",
    "5 spaces and tabs around a coding": post(b"{}", b"content-encoding: \t identity \t\r\n"),
    "5 spaces and tabs around an option": get(fields=b"connection: \t keep-alive \t\r\n", version=b"1.0"),
    "5 no space before a value": get(host=b"host:x\r\n"),
    "5.1 names in any case": chunked(CHUNKS, b"TRANSFER-encoding: chunked\r\n"),
    "5.1 empty values": post(b"{}", b"x-empty:\r\ny: \r\n"),
    "5.5 bytes beyond ASCII": get(fields=b"x: caf\xc3\xa9 \xff\r\n"),
    "6 a body where none is of use": b"GET /v2 HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\nGET /",
    "6 no body": b"POST /v2/repository/index HTTP/1.1\r\nhost: x\r\n\r\n",
    "6.2 a length with zeros in front": LOGGING + b"content-length: 002\r\n\r\n{}",
    "7.1 chunks": chunked(CHUNKS),
    "7.1 chunks in capitals": chunked(CHUNKS, b"transfer-encoding: CHUNKED\r\n"),
    "7.1 spaces around the coding": chunked(CHUNKS, b"transfer-encoding: \t chunked  \r\n"),
    "7.1 a chunk's size with zeros in front": chunked(b"00002\r\n{}\r\n000\r\n\r\n"),
    "7.1.2 trailers": chunked(CHUNKS.removesuffix(b"\r\n") + b"x: y\r\ncontent-encoding: gzip\r\nhost: z\r\n\r\n"),
    "9.3 kept alive, said needlessly": get(fields=b"connection: keep-alive\r\n"),
    "9110 7.8 an offer of h2c": get(fields=b"connection: upgrade, http2-settings\r\nupgrade: h2c\r\n"),
    "9110 7.8 an offer of h2c, with a body": post(b"{}", b"upgrade: h2c\r\nconnection: Upgrade\r\n"),
    "9110 7.8 an offer of h2c, with chunks": chunked(
        CHUNKS, b"connection: upgrade\r\nupgrade: h2c\r\ntransfer-encoding: chunked\r\n"
    ),
    "9110 7.8 an offer of websocket": get(fields=b"connection: upgrade\r\nupgrade: websocket\r\n"),
    "9110 7.8 an offer of TLS, with a body": post(b"{}", b"upgrade: TLS/1.0, HTTP/1.1\r\nconnection: upgrade\r\n"),
    "9110 7.8 an offer with an empty body": post(b"", b"upgrade: h2c\r\nconnection: upgrade\r\n"),
    "9110 7.8 an offer in HTTP/1.0": post(
        b"{}", b"upgrade: h2c\r\nconnection: upgrade, keep-alive\r\n", version=b"1.0"
    ),
    "9110 7.8 an offer that the connection does not name": post(b"{}", b"upgrade: h2c\r\n"),
    "9110 9.3.7 OPTIONS": b"OPTIONS /v2 HTTP/1.1\r\nhost: x\r\n\r\n",
    "9110 10.1.1 another expectation": post(b"{}", b"expect: the-best\r\n"),
    "9110 12 what is not negotiated": get(fields=b"accept: text/html\r\naccept-encoding: br\r\nrange: bytes=0-1\r\n"),
}  # fmt: skip


@pytest.mark.parametrize("piece", [None, 1, 7])
@pytest.mark.parametrize("case", GOOD)
def test_what_is_right_is_answered_and_the_connection_goes_on(server: Server, case: str, piece: int | None) -> None:
    answers = hear(server, GOOD[case] + NEXT, piece=piece)
    assert [answer.status for answer in answers] == [200, 200]
    assert json.loads(answers[1].body) == {"live": True}


BAD = {
    "2.2 bare line feeds": (b"GET /v2 HTTP/1.1\nhost: x\n\n", 400),
    "2.2 one bare line feed": (b"GET /v2 HTTP/1.1\r\nhost: x\n\r\n", 400),
    "2.2 a bare carriage return": (get(fields=b"x: a\rb\r\n"), 400),
    "2.2 space before the first field": (b"GET /v2 HTTP/1.1\r\n host: x\r\n\r\n", 400),
    "2.2 no line end": (b"garbage", 400),
    "2.3 no version": (b"GET /v2\r\n\r\n", (400, 505)),
    "2.3 HTTP/2.0": (get(version=b"2.0"), 505),
    "2.3 HTTP/1.2": (get(version=b"1.2"), 505),
    "2.3 HTTP/3": (get(version=b"3"), (400, 505)),
    "2.3 a version in small letters": (b"GET /v2 http/1.1\r\nhost: x\r\n\r\n", 400),
    "2.3 HTTP/2's preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),

    "3 a tab": (b"GET\t/v2 HTTP/1.1\r\nhost: x\r\n\r\n", 400),
    "3 space behind the version": (b"GET /v2 HTTP/1.1 \r\nhost: x\r\n\r\n", 400),
    "3 no target": (b"GET HTTP/1.1\r\nhost: x\r\n\r\n", 400),
    "3.1 an unknown method": (b"BREW /v2 HTTP/1.1\r\nhost: x\r\n\r\n", (501, 400)),
    "3.1 a method in small letters": (b"get /v2 HTTP/1.1\r\nhost: x\r\n\r\n", (501, 400)),
    "3.2 no host": (get(host=b""), 400),
    "3.2 no host, but a target with one": (get(b"http://x/v2", host=b""), 400),
    "3.2 two hosts": (get(host=b"host: x\r\nhost: y\r\n"), 400),
    "3.2 the same host twice": (get(host=b"host: x\r\nx: y\r\nHost: x\r\n"), 400),
    "3.2 two hosts in HTTP/1.0": (get(host=b"host: x\r\nhost: y\r\n", version=b"1.0"), 400),
    "3.2 a host with a path": (get(host=b"host: x/y\r\n"), 400),
    "3.2 a host with a space": (get(host=b"host: x y\r\n"), 400),
    "3.2 a host with a user": (get(host=b"host: me@x\r\n"), 400),
    "3.2 a list of hosts": (get(host=b"host: x, y\r\n"), 400),
    "3.2 a target without a slash": (get(b"v2"), 400),
    "3.2.2 another scheme": (get(b"ftp://x/v2"), 400),
    "3.2.2 no authority": (get(b"http:///v2"), 400),
    "3.2.2 an authority with a user": (get(b"http://me:secret@x/v2"), 400),
    "3.2.3 the authority form": (b"CONNECT x:443 HTTP/1.1\r\nhost: x:443\r\n\r\n", 501),
    "3.2.3 the authority form with a body": (b"CONNECT x:1 HTTP/1.1\r\nhost: x:1\r\ncontent-length: 2\r\n\r\n{}", 501),
    "3.2.3 the authority form for another method": (get(b"x:443"), 400),
    "3.2.4 the asterisk for another method": (get(b"*"), 400),
    "5.1 space before the colon": (get(fields=b"x : y\r\n"), 400),
    "5.1 a tab before the colon": (get(fields=b"x\t: y\r\n"), 400),
    "5.1 no name": (get(fields=b": y\r\n"), 400),
    "5.1 a name that is no token": (get(fields=b"x(y): z\r\n"), 400),
    "5.1 no colon": (get(fields=b"x\r\n"), 400),
    "5.2 a folded field": (get(fields=b"x: y\r\n z\r\n"), 400),
    "5.2 a field folded by a tab": (get(fields=b"x: y\r\n\tz\r\n"), 400),
    "5.2 a folded length": (b"POST /v2 HTTP/1.1\r\nhost: x\r\ncontent-length:\r\n 2\r\n\r\n{}", 400),
    "5.5 NUL": (get(fields=b"x: a\0b\r\n"), 400),
    "6.1 a length and chunks": (chunked(CHUNKS, b"content-length: 2\r\ntransfer-encoding: chunked\r\n"), 400),
    "6.1 chunks and a length": (chunked(CHUNKS, b"transfer-encoding: chunked\r\ncontent-length: 2\r\n"), 400),
    "6.1 chunks in HTTP/1.0": (chunked(CHUNKS, version=b"1.0"), 400),
    "6.1 chunks twice": (chunked(CHUNKS, b"transfer-encoding: chunked\r\n" * 2), 400),
    "6.1 chunks in chunks": (chunked(CHUNKS, b"transfer-encoding: chunked, chunked\r\n"), 400),
    "6.1 chunks that something is made of": (chunked(CHUNKS, b"transfer-encoding: chunked, gzip\r\n"), 400),
    "6.1 another coding in chunks": (chunked(CHUNKS, b"transfer-encoding: gzip, chunked\r\n"), 501),
    "6.1 another coding": (chunked(CHUNKS, b"transfer-encoding: gzip\r\n"), 400),
    "6.1 identity": (chunked(CHUNKS, b"transfer-encoding: identity\r\n"), 400),
    "6.1 an unknown coding": (chunked(CHUNKS, b"transfer-encoding: xchunked\r\n"), 501),
    "6.1 a coding in quotes": (chunked(CHUNKS, b'transfer-encoding: "chunked"\r\n'), (400, 501)),
    "6.1 space before the colon": (chunked(CHUNKS, b"transfer-encoding : chunked\r\n"), 400),
    "6.1 a vertical tab before the coding": (chunked(CHUNKS, b"transfer-encoding: \x0bchunked\r\n"), (400, 501)),
    "6.3 two lengths": (post(b"{}", b"content-length: 3\r\n"), 400),
    "6.3 the same length twice": (post(b"{}", b"content-length: 2\r\n"), 400),
    **{
        f"6.2 the length {length!r}": (
            b"POST /v2 HTTP/1.1\r\nhost: x\r\ncontent-length: %s\r\n\r\n{}" % length.encode(),
            400,
        )
        for length in ("+2", "-2", "2,2", "2, 3", "0x2", "2 2", "", "2a", "1e1", "18446744073709551618", "\u00b2")
    },
    "6.2 a body beyond the limit": (b"POST /v2 HTTP/1.1\r\nhost: x\r\ncontent-length: 1048577\r\n\r\n", 413),
    **{
        f"7.1 the chunk {chunk!r}": (chunked(chunk), 400)
        for chunk in (
            *(b"0x2\r\n{}\r\n0\r\n\r\n", b"+2\r\n{}\r\n0\r\n\r\n", b"-2\r\n{}\r\n0\r\n\r\n", b"\r\n{}\r\n0\r\n\r\n"),
            *(b"2\n{}\r\n0\r\n\r\n", b"2\r\n{}0\r\n\r\n", b"2\r\n{}\n0\r\n\r\n", b"2\r\n{}x\r\n0\r\n\r\n"),
            *(b"2;a\nb\r\n{}\r\n0\r\n\r\n", b"10000000000000002\r\n{}\r\n0\r\n\r\n", b"zz\r\n{}\r\n0\r\n\r\n"),
            *(b"2\r\n{}\r\n0\r\nx\r\n\r\n", b"2\r\n{}\r\n0\r\n y: z\r\n\r\n", b"2 2\r\n{}\r\n0\r\n\r\n"),
        )
    },
    "7.1.1 an extension without end": (chunked(b"2;" + b"x" * 400_000), 431),
    "7.1.2 a trailer without end": (chunked(b"2\r\n{}\r\n0\r\nx: " + b"y" * 400_000), 431),
    "7.1.2 a length among the trailers": (chunked(b"2\r\n{}\r\n0\r\ncontent-length: 2\r\n\r\n"), 400),
    "9110 4.1 a target too long": (get(b"/v2?" + b"x" * 5000), 414),
    "9110 5.4 a field too long": (get(fields=b"x: " + b"y" * 5000 + b"\r\n"), 431),
    "9110 5.4 a name too long": (get(fields=b"x" * 5000 + b": y\r\n"), 431),
    "9110 5.4 too many fields": (get(fields=b"x: y\r\n" * 3000), 431),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100), 400),
}  # fmt: skip


@pytest.mark.parametrize("piece", [None, 1, 7])
@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_refused_once_and_the_connection_ends(server: Server, case: str, piece: int | None) -> None:
    sent, expected = BAD[case]
    if len(sent) > 10_000 and piece is not None:
        piece *= 1000
    elif len(sent) > 1000 and piece is not None:
        piece *= 100
    answers = hear(server, sent if "without end" in case or "line end" in case else sent + NEXT, piece=piece)
    assert len(answers) == 1
    assert answers[0].status in (expected if isinstance(expected, tuple) else (expected, 431 if expected == 414 else 0))
    assert answers[0].fields["connection"] == "close"
    assert json.loads(answers[0].body)["error"]


@pytest.mark.parametrize(
    ("fields", "version", "said"),
    [
        (b"connection: close\r\n", b"1.1", "close"),
        (b"connection: x, CLOSE\r\n", b"1.1", "close"),
        (b"connection: keep-alive, close\r\n", b"1.1", "close"),
        (b"connection: upgrade, close\r\nupgrade: h2c\r\n", b"1.1", "close"),
        (b"", b"1.0", "close"),
        (b"connection: close\r\n", b"1.0", "close"),
        (b"", b"1.1", None),
        (b"connection: keep-alive\r\n", b"1.0", "keep-alive"),
    ],
)
@pytest.mark.parametrize("body", [b"", b"{}"])
def test_persistence(server: Server, fields: bytes, version: bytes, said: str | None, body: bytes) -> None:
    sent = post(body, fields, version=version) if body else get(fields=fields, version=version)
    answers = hear(server, sent + NEXT)
    assert [answer.status for answer in answers] == ([200] if said == "close" else [200, 200])
    assert answers[0].fields.get("connection") == said
    without_end = hear_until_closed(server, sent) if said == "close" else answers[:1]
    assert [answer.status for answer in without_end] == [200], "it is the server that closes"


def hear_until_closed(server: Server, sent: bytes) -> list[Answer]:
    with socket.create_connection(server.address, timeout=10) as connection:
        connection.sendall(sent)
        said = b""
        while chunk := connection.recv(65536):
            said += chunk
    return answers_in(said, ())


def test_pipelined_requests_are_answered_in_their_order(server: Server, tiny: Bundle) -> None:
    images = [np.full((1, 4, 4, 1), value, np.uint8) for value in range(3)]
    offers = b"upgrade: h2c\r\nconnection: upgrade\r\n"
    bodies = [encode_json_request(tiny.manifest.signature, {"image": image}) for image in images]
    sent = b"".join(post(body, offers if number == 1 else b"", target=INFER) for number, body in enumerate(bodies))
    for piece in (None, 11):
        answers = hear(server, sent + NEXT, piece=piece)
        assert [answer.status for answer in answers] == [200] * 4
        for answer, image in zip(answers, images, strict=False):
            np.testing.assert_allclose(
                decode_answer(answer.body, None)["probabilities"], tiny_answers(image), atol=1e-5
            )


@pytest.mark.parametrize("form", ["JSON", "binary", "chunked", "gzip", "expect", "large"])
@pytest.mark.parametrize("offer", [b"h2c", b"websocket", b"TLS/1.2"])
def test_an_inference_that_offers_another_protocol_is_answered_in_this_one(
    server: Server, tiny: Bundle, form: str, offer: bytes
) -> None:
    rows = 3000 if form == "large" else 2
    image = np.random.default_rng(0).integers(0, 256, (rows, 4, 4, 1), dtype=np.uint8)
    fields = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: %s\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n" % offer
    length = None
    if form in ("binary", "large"):
        length, body = encode_request(tiny.manifest.signature, {"image": image})
        fields += b"inference-header-content-length: %d\r\n" % length
    else:
        body = encode_json_request(tiny.manifest.signature, {"image": image})
    if form == "gzip":
        body, fields = gzip.compress(body), fields + b"content-encoding: gzip\r\n"
    if form == "expect":
        fields += b"expect: 100-continue\r\n"
    sent = post(body, fields, target=INFER)
    if form == "chunked":
        head = b"POST %s HTTP/1.1\r\nhost: x\r\n%stransfer-encoding: chunked\r\n\r\n" % (INFER, fields)
        sent = head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    for piece in (None, 5000 if form == "large" else 13):
        answers = [answer for answer in hear(server, sent + sent + NEXT, piece=piece) if answer.status != 100]
        assert [answer.status for answer in answers] == [200] * 3
        for answer in answers[:2]:
            said = answer.fields.get("inference-header-content-length")
            found = decode_answer(answer.body, None if said is None else int(said))["probabilities"]
            np.testing.assert_allclose(found, tiny_answers(image), atol=1e-5)


def test_an_inference_in_the_absolute_form(server: Server, tiny: Bundle) -> None:
    image = np.ones((1, 4, 4, 1), np.uint8)
    body = encode_json_request(tiny.manifest.signature, {"image": image})
    for target in (b"http://example.com" + INFER, b"http://example.com:80" + INFER + b"?x"):
        (answer,) = hear(server, post(body, target=target))
        np.testing.assert_allclose(decode_answer(answer.body, None)["probabilities"], tiny_answers(image), atol=1e-5)


# RFC 9110: methods.

READ = [
    "/v2",
    "/v2/health/live",
    "/v2/health/ready",
    "/v2/models/tiny",
    "/v2/models/tiny/ready",
    "/v2/models/tiny/config",
]


@pytest.mark.parametrize("path", READ)
def test_head_is_get_without_a_body(server: Server, path: str) -> None:
    target = path.encode()
    head = get(target).replace(b"GET", b"HEAD")
    without, whole, _ = hear(server, head + get(target) + NEXT, heads=(0,))
    assert without.status == whole.status == 200
    assert without.fields | {"date": ""} == whole.fields | {"date": ""}
    assert int(without.fields["content-length"]) == len(whole.body) > 0


@pytest.mark.parametrize("path", ["/nothing", "/v2/models/tiny/infer", "/v2/repository/index", "/v2/models/other"])
def test_an_error_to_head_has_no_body(server: Server, path: str) -> None:
    answers = hear(server, get(path.encode()).replace(b"GET", b"HEAD") + NEXT, heads=(0,))
    assert [answer.status for answer in answers][1:] == [200]
    assert answers[0].status in (404, 405)


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "TRACE", "POST", "PROPFIND", "M-SEARCH"])
@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v2", "GET, HEAD, OPTIONS"),
        ("/v2/models/tiny/infer", "POST, OPTIONS"),
        ("/v2/logging", "GET, POST, HEAD, OPTIONS"),
        ("/v2/repository/index", "POST, OPTIONS"),
    ],
)
def test_a_method_that_a_path_does_not_take(server: Server, method: str, path: str, allowed: str) -> None:
    if method == "POST" and "POST" in allowed:
        return
    sent = f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{{}}".encode()
    refused, after = hear(server, sent + NEXT)
    assert (refused.status, refused.fields["allow"], after.status) == (405, allowed, 200)
    (asked,) = hear(server, f"OPTIONS {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
    assert (asked.status, asked.fields["allow"], asked.body) == (200, allowed, b"")


@pytest.mark.parametrize(
    "target",
    [b"/v2/models/ti%6ey/infer", b"/v2/models/%74%69%6E%79/%69nfer", b"/v%32/models/tiny/versions/%31/infer?x=%2F"],
)
def test_an_inference_whose_path_is_percent_encoded(server: Server, tiny: Bundle, target: bytes) -> None:
    image = np.ones((1, 4, 4, 1), np.uint8)
    body = encode_json_request(tiny.manifest.signature, {"image": image})
    answers = hear(server, post(body, target=target) * 2 + NEXT)
    assert [answer.status for answer in answers] == [200, 200, 200]
    for answer in answers[:2]:
        np.testing.assert_allclose(decode_answer(answer.body, None)["probabilities"], tiny_answers(image), atol=1e-5)


@pytest.mark.parametrize(
    "target", [b"/v2%2Fmodels/tiny/infer", b"/v2/models/ti%256ey/infer", b"/v2/models/tiny%/infer"]
)
def test_what_is_encoded_for_a_reason_stays_encoded(server: Server, target: bytes) -> None:
    answer, after = hear(server, post(b"{}", target=target) + NEXT)
    assert (answer.status, after.status) == (404, 200)


def test_who_speaks_http_2_is_told_so(server: Server) -> None:
    (answer,) = hear(server, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    assert b"HTTP/2" in answer.body


def test_options_of_the_server_as_a_whole(server: Server) -> None:
    (asked,) = hear(server, b"OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n")
    assert (asked.status, asked.fields["allow"], asked.body) == (200, "GET, HEAD, POST, OPTIONS", b"")


# RFC 9110: fields.


def test_every_answer_has_its_date_type_and_length(server: Server, tiny: Bundle) -> None:
    length, body = encode_request(tiny.manifest.signature, {"image": np.ones((1, 4, 4, 1), np.uint8)})
    binary = post(body, b"inference-header-content-length: %d\r\n" % length, target=INFER)
    answers = []
    with socket.create_connection(server.address, timeout=10) as connection:
        for sent in (binary, binary, binary, get(), get(b"/nothing"), b"garbage\r\n\r\n"):  # known, and known again
            connection.sendall(sent)
            answers += answers_in(connection.recv(65536), ())
    assert [answer.status for answer in answers] == [200, 200, 200, 200, 404, 400]
    for answer in answers:
        assert parsedate_to_datetime(answer.fields["date"]).tzinfo is not None
        assert answer.fields["date"].endswith(" GMT")
        assert {"content-type", "content-length"} <= answer.fields.keys()


@pytest.mark.parametrize("coding", ["gzip", "x-gzip", "GZIP", "deflate", "identity"])
def test_content_codings(server: Server, tiny: Bundle, coding: str) -> None:
    image = np.ones((2, 4, 4, 1), np.uint8)
    body = encode_json_request(tiny.manifest.signature, {"image": image})
    packed = {"deflate": zlib.compress, "identity": bytes}.get(coding, gzip.compress)(body)
    answer, _ = hear(server, post(packed, b"content-encoding: %s\r\n" % coding.encode(), target=INFER) + NEXT)
    np.testing.assert_allclose(decode_answer(answer.body, None)["probabilities"], tiny_answers(image), atol=1e-5)


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, gzip", "compress"])
def test_a_coding_that_is_not_read_says_which_are(server: Server, coding: str) -> None:
    refused, after = hear(server, post(b"{}", b"content-encoding: %s\r\n" % coding.encode(), target=INFER) + NEXT)
    assert (refused.status, refused.fields["accept-encoding"], after.status) == (415, "gzip, deflate", 200)
    refused, after = hear(server, post(b"{}", b"content-encoding: %s\r\n" % coding.encode()) + NEXT)
    assert (refused.status, after.status) == (415, 200)


@pytest.mark.parametrize("behind", [b"x", gzip.compress(b"{}")], ids=["garbage", "more of it"])
def test_nothing_behind_a_packed_body_is_lost_in_silence(server: Server, behind: bytes) -> None:
    packed = gzip.compress(b"{}") + behind
    refused, _ = hear(server, post(packed, b"content-encoding: gzip\r\n", target=INFER) + NEXT)
    assert refused.status == 400
    assert b"follows its end" in refused.body


def expecting(body: bytes, fields: bytes = b"", version: bytes = b"1.1") -> tuple[bytes, bytes]:
    whole = post(body, b"Expect: 100-Continue\r\n" + fields, version=version)
    head, _, _ = whole.partition(b"\r\n\r\n")
    return head + b"\r\n\r\n", body


def test_the_server_says_to_continue_before_the_body_and_only_then(server: Server) -> None:
    head, body = expecting(b"{}")
    with socket.create_connection(server.address, timeout=10) as connection:
        for _ in range(2):
            connection.sendall(head)
            assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
            connection.sendall(body)
            assert [answer.status for answer in answers_in(connection.recv(65536), ())] == [200]
    assert [answer.status for answer in hear(server, head + body + NEXT)] == [200, 200], "the body is there already"
    assert [answer.status for answer in hear(server, b"".join(expecting(b"")) + NEXT)] == [200, 200], "there is none"


def test_http_1_0_is_never_told_to_continue(server: Server) -> None:
    head, body = expecting(b"{}", version=b"1.0")
    answers = hear(server, head + body, piece=len(head))
    assert [answer.status for answer in answers] == [200]


@pytest.mark.parametrize("fields", [b"", b"connection: close\r\n", b"upgrade: h2c\r\nconnection: upgrade\r\n"])
def test_who_has_no_key_is_told_so_instead_of_to_continue(keyed: Server, fields: bytes) -> None:
    head, _ = expecting(b"{}", fields)
    with socket.create_connection(keyed.address, timeout=10) as connection:
        connection.sendall(head)
        (answer,) = answers_in(connection.recv(65536), ())
    assert (answer.status, answer.fields["www-authenticate"]) == (401, "Bearer")


def test_a_body_too_large_is_refused_before_it_is_sent(server: Server) -> None:
    with socket.create_connection(server.address, timeout=10) as connection:
        connection.sendall(b"POST /v2 HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 1048577\r\n\r\n")
        (answer,) = answers_in(connection.recv(65536), ())
    assert (answer.status, answer.fields["connection"]) == (413, "close")
