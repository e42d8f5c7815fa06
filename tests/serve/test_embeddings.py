"""OpenAI's endpoint for embeddings: its own client reads the answers, and they are those of the protocol."""

from __future__ import annotations

import base64
import http.client
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from test_texts import WORDS, ids, tokenizer

from conftest import Server, serving
from rushhour.bundle import Bundle, Text
from rushhour.serve import ServeSettings
from rushhour.task import Task
from rushhour.testing.bundles import tiny_text_answers, tiny_text_bundle

TEXTS = ["the cat sat on a mat", "the dog", "and a dog ran"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The encoder that answers with the scores of `tiny_text_bundle`: three dimensions."""
    folder = tmp_path_factory.mktemp("embeddings")
    plain = tiny_text_bundle(folder / "plain")
    graph = onnx.load(plain.model)
    del graph.graph.node[-2:], graph.graph.output[1]
    (dimension,) = plain.manifest.signature.dimensions
    del dimension.axes["tags"]
    signature = msgspec.structs.replace(plain.manifest.signature, outputs=plain.manifest.signature.outputs[:1])
    manifest = msgspec.structs.replace(
        plain.manifest,
        name="encoder",
        task=Task("embedding", outputs=3),
        signature=signature,
        text=Text({"tokens": "ids", "mask": "attention_mask"}),
        files={},
        hash="",
    )
    path = folder / "encoder"
    made = Bundle.create(
        path, manifest, lambda file: onnx.save(graph, file), samples=plain.samples(), tokenizer=tokenizer()
    )
    return made


@pytest.fixture(scope="module")
def server(bundle: Bundle) -> Iterator[Server]:
    with serving(bundle.path, ServeSettings(http_port=0, api_keys=("secret-of-the-test",))) as running:
        yield running


def post(server: Server, body: Any, key: str = "secret-of-the-test") -> tuple[int, Any]:
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", "/v1/embeddings", content, {"authorization": f"Bearer {key}"})
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


def expected(text: str) -> np.ndarray:
    return tiny_text_answers(ids(text))["scores"][0]


def test_answers_have_openais_form(server: Server) -> None:
    status, answer = post(server, {"model": "encoder", "input": TEXTS, "user": "somebody"})
    assert status == 200
    assert (answer["object"], answer["model"]) == ("list", "encoder")
    assert [(each["object"], each["index"]) for each in answer["data"]] == [("embedding", at) for at in range(3)]
    for text, each in zip(TEXTS, answer["data"], strict=True):
        np.testing.assert_allclose(each["embedding"], expected(text), atol=1e-4)
    words = sum(len(text.split()) for text in TEXTS)
    assert answer["usage"] == {"prompt_tokens": words, "total_tokens": words}
    status, answer = post(server, {"model": "encoder", "input": "the dog", "encoding_format": "base64"})
    found = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(found, expected("the dog"), atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "status", "param", "code"),
    [
        ({"model": "text-embedding-3-small"}, 404, "model", "model_not_found"),
        ({"input": ""}, 400, "input", None),
        ({"input": []}, 400, "input", None),
        ({"input": ["the dog", ""]}, 400, "input", None),
        ({"input": [1, 2, 3]}, 400, "input", None),
        ({"input": {"text": "the dog"}}, 400, "input", None),
        ({"input": ["a"] * 2049}, 400, "input", None),
        ({"input": "a" * 70_000}, 413, None, None),
        ({"input": "a" * 5_000_000}, 413, "input", None),
        ({"encoding_format": "int8"}, 400, "encoding_format", None),
        ({"dimensions": 2}, 400, "dimensions", None),
    ],
)
def test_errors_have_openais_form(
    server: Server, changes: dict[str, Any], status: int, param: str | None, code: str | None
) -> None:
    found, answer = post(server, {"model": "encoder", "input": "the dog"} | changes)
    assert found == status, answer
    error = answer["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert error["message"]


def test_what_is_no_json_and_a_wrong_key(server: Server) -> None:
    assert post(server, b"\xff{")[0] == 400
    assert post(server, b'{"model": "encoder"}')[1]["error"]["param"] == "input"
    status, answer = post(server, {"model": "encoder", "input": "the dog"}, key="wrong")
    assert (status, answer["error"]["code"]) == (401, "invalid_api_key")


def test_the_servers_description_has_it(server: Server) -> None:
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    connection.request("GET", "/openapi.json", headers={"authorization": "Bearer secret-of-the-test"})
    described = json.loads(connection.getresponse().read())
    connection.close()
    body = described["paths"]["/v1/embeddings"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["model"] == {"const": "encoder"}
    assert set(body["required"]) == {"model", "input"}
    assert "get" in described["paths"]["/v1/models"]


def test_many_long_requests_at_once(server: Server) -> None:
    chance = np.random.default_rng(0)
    texts = [" ".join(chance.choice(WORDS, chance.integers(1, 30))) for _ in range(400)]

    def call(first: int) -> None:
        some = texts[first : first + 100]
        status, answer = post(server, {"model": "encoder", "input": some})
        assert status == 200
        for text, each in zip(some, answer["data"], strict=True):
            np.testing.assert_allclose(each["embedding"], expected(text), atol=1e-4)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(call, range(0, 400, 100)))


def test_openais_own_client(server: Server) -> None:
    openai = pytest.importorskip("openai", reason="extra dev")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret-of-the-test", max_retries=0) as client:
        answer = client.embeddings.create(model="encoder", input=TEXTS)  # it asks for Base64
        for text, each in zip(TEXTS, answer.data, strict=True):
            np.testing.assert_allclose(each.embedding, expected(text), atol=1e-4)
        assert [model.id for model in client.models.list()] == ["encoder"]
        assert client.models.retrieve("encoder").object == "model"
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.models.retrieve("other")
        assert answer.usage.total_tokens == sum(len(text.split()) for text in TEXTS)
        numbers = client.embeddings.create(model="encoder", input="the dog", encoding_format="float")
        np.testing.assert_allclose(numbers.data[0].embedding, expected("the dog"), atol=1e-4)
        with pytest.raises(openai.NotFoundError, match="does not exist") as refused:
            client.embeddings.create(model="other", input="the dog")
        assert refused.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError, match="token numbers"):
            client.embeddings.create(model="encoder", input=[[1, 2]])
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.embeddings.create(model="encoder", input="the dog")


def test_a_model_that_embeds_no_text_says_so(tmp_path: Path) -> None:
    with serving(tiny_text_bundle(tmp_path / "plain").path) as running:
        status, answer = post(running, {"model": "tiny-text", "input": "the dog"})
        assert status == 404
        assert "does not embed texts" in answer["error"]["message"]
        connection = http.client.HTTPConnection(*running.address, timeout=60)
        connection.request("GET", "/v1/models")
        assert connection.getresponse().status == 404
        connection.close()
