"""Rows of named values over the wire: the server makes samples of them, and answers in words."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Server, serving
from rushhour.api import load
from rushhour.bundle import Bundle, Signature, TensorSpec
from rushhour.errors import LoadError, WireError
from rushhour.rows import RowReader
from rushhour.testing.bundles import TABLE, tiny_table_bundle
from rushhour.wire import Codec, decode_rows

ROW = {"age": 31, "joined": "2020-01-01", "job": "writer", "zip": 8010}
SAMPLE = [31.0, 18_262.0, 2.0, 3.0]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_table_bundle(tmp_path_factory.mktemp("rows") / "tiny-table")


@pytest.fixture(scope="module")
def server(bundle: Bundle) -> Iterator[Server]:
    with serving(bundle.path) as running:
        yield running


def ask(server: Server, body: Any, path: str = "rows", method: str = "POST") -> tuple[int, Any]:
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, f"/v2/models/tiny-table/{path}", content if method == "POST" else None)
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


def values(answer: Any) -> list[list[float]]:
    assert all(list(each["values"]) == list(TABLE.targets) for each in answer["answers"])
    return [list(each["values"].values()) for each in answer["answers"]]


def test_rows_become_samples_as_the_table_says(server: Server) -> None:
    rows: list[dict[str, Any]] = [
        ROW,
        {"joined": "2020-01-01T12:00:00Z", "zip": "1010"},  # what was missing in training may be missing
        {"age": None, "joined": "2020-01-01T13:00:00+01:00", "job": None, "zip": 1020.0, "note": "ignored"},
        {"age": 31, "joined": "2020-01-01", "job": "astronaut", "zip": True},
    ]
    status, answer = ask(server, {"rows": rows, "id": "seven"})
    assert (status, answer["id"], answer["model_name"]) == (200, "seven", "tiny-table")
    assert values(answer) == [SAMPLE, [40, 18_262.5, 0, 1], [40, 18_262.5, 0, 2], [31, 18_262, 0, 0]]


def test_many_rows_are_read_on_threads_and_give_the_same(server: Server) -> None:
    rows = [{"age": number, "job": "doctor"} for number in range(1000)]
    status, answer = ask(server, {"shared": {"joined": "2020-01-01", "zip": "8010", "job": "writer"}, "rows": rows})
    assert status == 200
    assert values(answer) == [[number, 18_262, 1, 3] for number in range(1000)]  # a row's own value counts


def test_a_row_as_a_bytes_tensor_and_plain_numbers_as_ever(server: Server) -> None:
    entry = {"name": "row", "datatype": "BYTES", "shape": [2], "data": [json.dumps(ROW)] * 2}
    status, answer = ask(server, {"inputs": [entry]}, "infer")
    assert (status, answer["outputs"][0]["data"]) == (200, SAMPLE * 2)
    plain = {"name": "input", "datatype": "FP32", "shape": [1, 4], "data": SAMPLE}
    assert ask(server, {"inputs": [plain]}, "infer")[1]["outputs"][0]["data"] == SAMPLE


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"rows": [ROW, {**ROW, "ag": 3}]}, 400, "row 2 has an unknown column 'ag': the nearest is 'age'"),
        ({"rows": [{**ROW, "qqqqqq": 3}]}, 400, "unknown column 'qqqqqq'"),
        ({"rows": [{"age": 31, "joined": "2020-01-01"}]}, 400, "row 1 has no value for 'zip'"),
        ({"rows": [{**ROW, "zip": None}]}, 400, "no value for 'zip'"),
        ({"rows": [{"age": 1, "joined": "2020-01-01", "Zip": 1}]}, 400, "'Zip'"),
        ({"rows": [{**ROW, "age": "31"}]}, 400, "'age' of row 1 is '31': it is a number"),
        ({"rows": [{**ROW, "age": True}]}, 400, "'age' of row 1 is True"),
        ({"rows": [{**ROW, "age": 1e300}]}, 400, "float32 cannot hold it"),
        ({"rows": [{**ROW, "joined": 18_000}]}, 400, "it is a date"),
        ({"rows": [{**ROW, "joined": "yesterday"}]}, 400, "it is a date"),
        ({"rows": [{**ROW, "age": {"years": 31}}]}, 400, "row 1 cannot be read"),
        ({"rows": [[1, 2]]}, 400, "row 1 cannot be read"),
        ({"rows": [{**ROW, "note": "x" * 70_000}]}, 413, "row 1 is too long"),
        ({"rows": []}, 400, "0 rows"),
        ({"rows": [ROW], "row": 1}, 400, "unknown field"),
        ({"rows": [ROW], "parameters": {"timeout": -1}}, 400, "timeout"),
        ({"rows": [ROW] * 40 + [{**ROW, "age": "x"}]}, 400, "'age' of row 41"),
        (b"{", 400, "JSON cannot be read"),
        (b'{"rows": [' + b"{" * 100_000, 400, "JSON cannot be read"),
    ],
)
def test_a_wrong_row_is_refused_in_one_line(server: Server, body: Any, status: int, said: str) -> None:
    found, answer = ask(server, body)
    assert (found, said in answer["error"]) == (status, True), answer
    assert "\n" not in answer["error"]


def test_unknown_categories_and_missing_values_are_counted(bundle: Bundle) -> None:
    with serving(bundle.path) as server:
        strange = {"joined": "2020-01-01", "job": "astronaut", "zip": "9999"}
        assert ask(server, {"rows": [strange, ROW]})[0] == 200
        assert ask(server, {"rows": [strange] * 100})[0] == 200
        connection = http.client.HTTPConnection(*server.address, timeout=60)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
    counts = dict(re.findall(r'rushhour_(\w+)_total\{column="\w+",model="tiny-table"\} (\S+)', text))
    assert counts == {"unknown_categories": "101.0", "imputed_values": "101.0"}
    assert 'column="zip"' in text
    assert 'column="age"' in text


def test_the_server_says_what_a_row_has(server: Server) -> None:
    status, answer = ask(server, None, method="GET")
    assert status == 200
    assert [each["name"] for each in answer["columns"]] == ["age", "joined", "job", "zip"]
    assert answer["columns"][3] == {"name": "zip", "kind": "category", "optional": False, "categories": 3}
    status, again = ask(server, {"rows": answer["rows"]})
    assert values(again)[2] == [52.5, 17_000.5, 2, 2]  # its rows give its samples


def test_a_model_without_a_table_takes_no_rows(tiny: Bundle) -> None:
    with serving(tiny.path) as server:
        connection = http.client.HTTPConnection(*server.address, timeout=60)
        connection.request("POST", "/v2/models/tiny/rows", b'{"rows": [{}]}')
        answer = connection.getresponse()
        assert (answer.status, b"takes no rows" in answer.read()) == (404, True)
        connection.close()


def words(kind: str, names: tuple[str, ...], numbers: list[float]) -> Any:
    taken = TensorSpec("input", "float32", (1,)), TensorSpec("output", "float32", (len(numbers),))
    labels, targets = (names, ()) if kind in ("classification", "multilabel") else ((), names)
    codec = Codec("m", Signature(taken[:1], taken[1:]), rows=9, kind=kind, labels=labels, targets=targets)
    request = decode_rows(codec, b'{"rows": [{}]}')
    return json.loads(b"".join(request.encode([np.array(numbers, np.float32).data.cast("B")])))["answers"][0]


def test_answers_are_in_words() -> None:
    chosen = words("classification", ("no", "yes"), [0.25, 0.75])
    assert chosen == {"class": "yes", "probability": 0.75, "probabilities": {"yes": 0.75, "no": 0.25}}
    several = words("multilabel", ("wet", "cold"), [0.5, 0.25])
    assert several == {"labels": ["wet"], "probabilities": {"wet": 0.5, "cold": 0.25}}
    assert words("ranking", ("liked",), [0.125]) == {"score": 0.125}
    assert words("regression", ("wind_kt",), [61.3]) == {"values": {"wind_kt": 61.3}}
    assert words("mine:Own", (), [1.5, 2.5]) == {"values": [1.5, 2.5]}


def test_a_sample_becomes_a_row_that_gives_it_again(tmp_path: Path) -> None:
    reader = RowReader(TABLE)
    samples = np.array([[31, 18_262.25, 1, 3], [-0.5, 0, 0, 1]], np.float32)
    again, unknown, imputed = reader.read([reader.row_of(sample) for sample in samples])
    assert np.array_equal(again, samples)
    assert (unknown, imputed) == ({}, {"job": 1})
    with pytest.raises(WireError, match="row 7 has no value"):
        reader.read([{}], first=7)


@pytest.mark.slow
def test_load_sends_the_rows_that_the_server_has(server: Server) -> None:
    result = load(server.url, rate=50, duration="2s", named_rows=True, rows=3, check=True)
    assert [(window.errors, window.n > 0) for window in result.windows] == [(0, True)]
    with pytest.raises(LoadError, match="plain HTTP"):
        load(server.url, rate=50, duration="1s", named_rows=True, method="POST")
