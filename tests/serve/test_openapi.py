"""The server's description of itself is true: schemathesis asks it what the description says, and what it does not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis
import numpy as np
import pytest
import requests
import schemathesis
from hypothesis import Phase, given
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks

from conftest import Server, serving
from rushhour.bundle import Bundle
from rushhour.serve import Served, ServeSettings
from rushhour.serve.protocols.http import openapi
from rushhour.serve.protocols.http.routes import Routes
from rushhour.testing.bundles import tiny_answers
from rushhour.wire import decode_answer

MODEL = "/v2/models/{model}"
PATHS = {
    **dict.fromkeys(("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/stats"), ("get",)),
    **{
        f"{MODEL}{version}{what}": ("get",)
        for version in ("", "/versions/{version}")
        for what in ("", "/ready", "/config", "/stats", "/speed")
    },
    **{f"{MODEL}{version}/trace/setting": ("get", "post") for version in ("", "/versions/{version}")},
    **{f"{MODEL}{version}/infer": ("post",) for version in ("", "/versions/{version}")},
    **dict.fromkeys(("/v2/trace/setting", "/v2/logging"), ("get", "post")),
    **{f"/v2/repository/{what}": ("post",) for what in ("index", "models/{model}/load", "models/{model}/unload")},
    "/v2/systemsharedmemory/status": ("get",),
    "/v2/systemsharedmemory/unregister": ("post",),
    "/v2/systemsharedmemory/region/{region}/status": ("get",),
    "/v2/systemsharedmemory/region/{region}/register": ("post",),
    "/v2/systemsharedmemory/region/{region}/unregister": ("post",),
    **dict.fromkeys(("/config", "/stats", "/metrics", "/openapi.json"), ("get",)),
}
POSITIVE, NEGATIVE = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
OPERATIONS = [
    (path, method, mode)
    for path, methods in PATHS.items()
    for method in methods
    for mode in ((POSITIVE, NEGATIVE) if method == "post" and "unregister" not in path else (POSITIVE,))
]
CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
]


@pytest.fixture(scope="module")
def server(tiny: Bundle) -> Iterator[Server]:
    with serving(tiny.path, ServeSettings(http_port=0)) as running:
        yield running


@pytest.fixture(scope="module")
def schema(server: Server) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as opened:
        yield opened


def test_the_description_is_openapi_and_names_every_path(schema: Any) -> None:
    schema.validate()
    described = {path: tuple(sorted(set(item) - {"parameters"})) for path, item in schema.raw_schema["paths"].items()}
    assert described == PATHS


@pytest.mark.slow
@pytest.mark.parametrize(("path", "method", "mode"), OPERATIONS)
def test_the_server_does_as_it_says(
    schema: Any, session: requests.Session, path: str, method: str, mode: GenerationMode
) -> None:
    operation = schema[path][method]

    @hypothesis.settings(
        max_examples=3 if "repository/models" in path else 15,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @given(case=operation.as_strategy(mode))
    def ask(case: Any) -> None:
        answer = case.call(session=session)
        assert answer.status_code != 500
        case.validate_response(answer, checks=CHECKS)

    ask()
    if "unload" in path:
        assert session.post(f"{schema.get_base_url()}/v2/repository/models/tiny/load").status_code == 200


def test_the_example_is_answered(server: Server) -> None:
    described = requests.get(f"{server.url}/openapi.json", timeout=10).json()
    content = described["paths"]["/v2/models/{model}/infer"]["post"]["requestBody"]["content"]["application/json"]
    (example,) = content["examples"].values()
    answer = requests.post(f"{server.url}/v2/models/tiny/infer", json=example["value"], timeout=10)
    found = decode_answer(answer.content, None)["probabilities"]
    np.testing.assert_allclose(found, tiny_answers(np.zeros((1, 4, 4, 1), np.uint8)), atol=1e-5)


def test_the_description_follows_the_server(tiny: Bundle) -> None:
    key = "a-key-of-some-length"
    settings = ServeSettings(
        http_port=0, api_keys=(key,), admin_port=0, models=(Served(str(tiny.path), "other", unloaded=True),)
    )
    with serving(tiny.path, settings) as server:
        assert requests.get(f"{server.url}/openapi.json", timeout=10).status_code == 401
        headers = {"authorization": f"Bearer {key}"}
        described = requests.get(f"{server.url}/openapi.json", headers=headers, timeout=10).json()
        assert described["components"]["parameters"]["model"]["schema"] == {"type": "string", "enum": ["other"]}
        assert described["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
        assert described["paths"]["/v2/health/live"]["get"]["security"] == []
        admin = requests.get(f"{server.url}/config", headers=headers, timeout=10)
        assert admin.status_code == 404, "nothing is loaded"
    assert described["paths"].keys() == PATHS.keys()


def test_the_description_is_written_once_for_each_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing it takes a third of a millisecond, and one client may pipeline thousands of requests for it."""
    written: list[str] = []
    version = "1"

    class Indexed:
        def index(self) -> list[dict[str, str]]:
            return [{"name": "m", "version": version, "state": "READY", "reason": ""}]

    def described(control: Indexed, *, infers: bool) -> dict[str, str]:
        written.append(version)
        return {"version": version}

    monkeypatch.setattr(openapi, "description", described)
    routes = Routes(Indexed())  # type: ignore[arg-type]
    for version in ("1", "1", "2", "2", "1"):
        assert routes.answer(b"GET", b"/openapi.json", b"") == (200, b'{"version":"%b"}' % version.encode())
    assert written == ["1", "2", "1"]
