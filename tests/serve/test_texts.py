"""Texts in place of tokens: over both protocols they get the answers of their tokens, and hostile ones a clear no."""

from __future__ import annotations

import http.client
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema_rs
import msgspec
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from conftest import Server, serving
from rushhour.bundle import Bundle, Text
from rushhour.errors import BundleError, InstallError, WireError
from rushhour.serve import ServeSettings
from rushhour.serve.scheduling.tokenising import Tokeniser
from rushhour.testing.bundles import tiny_text_answers, tiny_text_bundle
from rushhour.wire import MAX_TEXT_BYTES, Codec, TextRequest, text_of

tokenizers = pytest.importorskip("tokenizers", reason="extra text")

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran")


def tokenizer() -> bytes:
    """Words by number, from 1; what is unknown is 49."""
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    made = tokenizers.Tokenizer(WordLevel({word: 1 + at for at, word in enumerate(WORDS)} | {"?": 49}, unk_token="?"))
    made.pre_tokenizer = Whitespace()
    return bytes(made.to_str().encode())


def ids(text: str) -> np.ndarray:
    return np.array([[1 + WORDS.index(word) if word in WORDS else 49 for word in text.split()][:32]])


def text_bundle(path: Path, content: bytes | None = None) -> Bundle:
    plain = tiny_text_bundle(path.with_name(f"{path.name}-plain"))
    manifest = msgspec.structs.replace(
        plain.manifest, text=Text({"tokens": "ids", "mask": "attention_mask"}), files={}, hash=""
    )
    return Bundle.create(
        path,
        manifest,
        lambda file: file.write_bytes(plain.model.read_bytes()) and None,
        samples=plain.samples(),
        tokenizer=content or tokenizer(),
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return text_bundle(tmp_path_factory.mktemp("texts") / "texts")


@pytest.fixture(scope="module")
def server(bundle: Bundle) -> Iterator[Server]:
    with serving(bundle.path, ServeSettings(http_port=0, grpc_port=0)) as running:
        yield running


def post(server: Server, texts: list[Any], **changes: Any) -> tuple[int, Any]:
    entry = {"name": "text", "datatype": "BYTES", "shape": [len(texts)], "data": texts} | changes
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    connection.request("POST", "/v2/models/tiny-text/infer", json.dumps({"inputs": [entry]}).encode())
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


def scores(answer: Any) -> np.ndarray:
    output = next(each for each in answer["outputs"] if each["name"] == "scores")
    return np.reshape(output["data"], output["shape"])


def test_texts_in_json_get_the_answers_of_their_tokens(server: Server) -> None:
    texts = ["the cat sat on a mat", "the dog", 'a "mat"\n\\ é']
    status, answer = post(server, texts)
    assert status == 200
    for text, found in zip(texts[:2], scores(answer), strict=False):
        np.testing.assert_allclose(found, tiny_text_answers(ids(text))["scores"][0], atol=1e-4)
    tags = next(each for each in answer["outputs"] if each["name"] == "tags")
    assert tags["shape"][0] == 3
    assert post(server, [["the dog"]], shape=[1, 1])[0] == 200


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_crowd_of_texts_gets_its_own_answers(server: Server, protocol: str) -> None:
    def call(seed: int) -> None:
        chance = np.random.default_rng(seed)
        kit: Any = triton if protocol == "http" else triton_grpc
        url = server.url.partition("://")[2] if protocol == "http" else server.grpc
        with kit.InferenceServerClient(url) as client:
            for _ in range(15):
                texts = [" ".join(chance.choice(WORDS, chance.integers(1, 30))) for _ in range(chance.integers(1, 4))]
                tensor = kit.InferInput("text", [len(texts), 1], "BYTES")
                tensor.set_data_from_numpy(np.array([[text.encode()] for text in texts], dtype=object))
                answer = client.infer("tiny-text", [tensor])
                longest = max(len(text.split()) for text in texts)
                assert answer.as_numpy("tags").shape == (len(texts), longest)
                for text, row, tags in zip(texts, answer.as_numpy("scores"), answer.as_numpy("tags"), strict=True):
                    wanted = tiny_text_answers(ids(text))
                    np.testing.assert_allclose(row, wanted["scores"][0], atol=1e-4)
                    np.testing.assert_allclose(tags[: len(text.split())], wanted["tags"][0], atol=1e-4)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(call, range(6)))


def test_a_long_text_is_cut_and_many_texts_are_one_request(server: Server) -> None:
    status, answer = post(server, ["the cat " * 100])
    assert status == 200
    np.testing.assert_allclose(scores(answer)[0], tiny_text_answers(ids("the cat " * 100))["scores"][0], atol=1e-4)
    texts = [f"the cat {WORDS[at % 9]}" for at in range(500)]  # more than a thread takes at once
    status, answer = post(server, texts)
    assert status == 200
    for text, found in zip(texts, scores(answer), strict=True):
        np.testing.assert_allclose(found, tiny_text_answers(ids(text))["scores"][0], atol=1e-4)


def test_large_json_is_read_in_pieces_with_the_same_texts(server: Server) -> None:
    filler = "mat " * 3000
    texts = [f'the "cat" \\ \u00e9 {filler}', "the dog", f"a dog {filler}", f"cat {filler}"]
    status, answer = post(server, texts)  # more than 32 KiB
    assert status == 200
    np.testing.assert_allclose(scores(answer)[1], tiny_text_answers(ids("the dog"))["scores"][0], atol=1e-4)


@pytest.mark.parametrize(
    ("texts", "changes", "status", "says"),
    [
        (["a" * (MAX_TEXT_BYTES + 1)], {}, 413, "too long"),
        (["\\u0000" * 70_000], {}, 413, "too long"),
        ([1], {}, 400, "not a list of text"),
        (["a", "b"], {"shape": [1]}, 400, "2 elements"),
        (["a"], {"shape": [1, 2]}, 400, "texts have"),
        ([], {}, 400, "samples"),
        (["a"], {"shape": [-1]}, 400, "samples"),
        (["a"], {"shape": [10**9]}, 413, "split"),
        (["a"], {"name": "other"}, 400, "or text (BYTES) alone"),
        (["a"], {"datatype": "INT64"}, 400, "unknown"),
    ],
)
def test_hostile_texts_are_refused(server: Server, texts: list[Any], changes: Any, status: int, says: str) -> None:
    found, answer = post(server, texts, **changes)
    assert found == status
    assert says in answer["error"]
    assert "\n" not in answer["error"]
    assert post(server, ["the cat"])[0] == 200


def test_bytes_that_are_no_text_are_refused_over_grpc(server: Server) -> None:
    with triton_grpc.InferenceServerClient(server.grpc) as client:
        tensor = triton_grpc.InferInput("text", [1], "BYTES")
        tensor.set_data_from_numpy(np.array([b"\xff\xfe"], dtype=object))
        with pytest.raises(InferenceServerException, match="not UTF-8"):
            client.infer("tiny-text", [tensor])


def test_half_of_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(WireError, match="not UTF-8"):
        text_of("\ud800", 1)


def test_a_text_without_words_is_answered(server: Server) -> None:
    assert [post(server, [text])[0] for text in ("", " \t\u00a0\n")] == [200, 200]


def test_tokens_are_still_taken_and_the_settings_are_shown(server: Server) -> None:
    tokens = ids("the cat sat")
    with triton.InferenceServerClient(server.url.partition("://")[2]) as client:
        sent = []
        for name, array in (("tokens", tokens), ("mask", np.ones_like(tokens))):
            tensor = triton.InferInput(name, list(array.shape), "INT64")
            tensor.set_data_from_numpy(array)
            sent.append(tensor)
        found = client.infer("tiny-text", sent).as_numpy("scores")
    np.testing.assert_allclose(found, tiny_text_answers(tokens)["scores"], atol=1e-4)
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    connection.request("GET", "/config")
    shown = json.loads(connection.getresponse().read())
    assert shown["texts"]["largest"] == 32
    assert shown["pictures"] is None
    connection.request("GET", "/openapi.json")
    inputs = json.loads(connection.getresponse().read())["components"]["schemas"]["InferRequest"]["properties"][
        "inputs"
    ]
    connection.close()
    tensors, texts = inputs["anyOf"]
    entry = {"name": "text", "datatype": "BYTES", "shape": [2], "data": ["a", "b"]}
    assert jsonschema_rs.is_valid(texts, [entry])
    assert not jsonschema_rs.is_valid(tensors, [entry])
    assert not jsonschema_rs.is_valid(texts, [entry | {"shape": [2, 2]}])


def test_a_model_without_a_tokenizer_takes_no_texts() -> None:
    from test_mixed_lengths import SIGNATURE

    body = json.dumps({"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a"]}]}).encode()
    with pytest.raises(WireError, match="unknown"):
        Codec("m", SIGNATURE).decode(body, None)
    assert isinstance(Codec("m", SIGNATURE, texts=4).decode(body, None), TextRequest)


def test_a_missing_library_is_said_in_one_line(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InstallError, match=r"rushhour\[text\]") as refused:
        Tokeniser(bundle, threads=1)
    assert "\n" not in str(refused.value)


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be read"):
        Tokeniser(text_bundle(tmp_path / "damaged", b"{}"), threads=1)


def test_the_tokenizer_is_a_part_of_the_bundle(bundle: Bundle, tmp_path: Path) -> None:
    copied = bundle.copy_to(tmp_path / "copied")
    assert Bundle.open(copied.path).read_tokenizer() == tokenizer()
    assert copied.manifest.schema == 3
    copied.tokenizer.write_bytes(b"{}")
    with pytest.raises(BundleError, match="does not match its hash"):
        Bundle.open(copied.path)
    copied.tokenizer.unlink()
    with pytest.raises(BundleError, match="missing"):
        Bundle.open(copied.path)


def test_a_manifest_whose_texts_fit_no_input_is_refused(bundle: Bundle) -> None:
    for text in ({"tokens": "ids"}, {"tokens": "ids", "mask": "attention_mask", "other": "ids"}):
        with pytest.raises(ValueError, match="names other inputs"):
            msgspec.structs.replace(bundle.manifest, text=Text(text))  # type: ignore[arg-type]
