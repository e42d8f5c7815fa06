"""Several models behind one port: each by its name, loaded and unloaded by clients, in one process and in two."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from click.testing import CliRunner
from tritonclient.grpc.service_pb2 import ModelInferRequest
from tritonclient.utils import InferenceServerException

import rushhour
from conftest import Server, serving
from rushhour.cli import cli
from rushhour.errors import RushhourError
from rushhour.serve import Folder, Served, ServeSettings, hosted, open_target
from rushhour.serve.hosting import check_memory
from rushhour.serve.protocols.control import Control
from rushhour.serve.protocols.grpc.codec import model_of
from rushhour.serve.protocols.http.routes import Routes
from rushhour.serve.repository import Repository
from rushhour.serve.service import Service, Shared
from rushhour.testing.bundles import tiny_answers, tiny_bundle
from rushhour.testing.fakes import FakeEngine

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 1), dtype=np.uint8)
INFER = {"inputs": [{"name": "image", "shape": [2, 4, 4, 1], "datatype": "UINT8", "data": IMAGES.ravel().tolist()}]}
SEEDS = {"one": 0, "two": 1, "three": 2}


def ask(server: Server, method: str, path: str, body: object = None) -> tuple[int, Any]:
    """On a connection of its own, which lands on any cell."""
    connection = http.client.HTTPConnection(*server.address, timeout=30)
    try:
        sent = b"" if body is None else json.dumps(body).encode()
        connection.request(method, path, sent, {"content-type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        is_json = "json" in answer.headers.get("content-type", "")
        return answer.status, json.loads(content) if is_json else content.decode()
    finally:
        connection.close()


def answers(server: Server, name: str) -> None:
    """A model answers, and as itself."""
    status, content = ask(server, "POST", f"/v2/models/{name}/infer", INFER)
    assert status == 200, content
    assert content["model_name"] == name
    np.testing.assert_allclose(
        np.array(content["outputs"][0]["data"], np.float32).reshape(2, 3), tiny_answers(IMAGES, seed=SEEDS[name]), 1e-4
    )


def change(server: Server, what: str, name: str) -> tuple[int, Any]:
    return ask(server, "POST", f"/v2/repository/models/{name}/{what}", {})


def states(server: Server) -> dict[str, str]:
    return {entry["name"]: entry["state"] for entry in ask(server, "POST", "/v2/repository/index", {})[1]}


def folder_of(path: Path, *names: str) -> Path:
    """A repository; in it `README` and `.git`, which are no models."""
    for name in names:
        tiny_bundle(path / name, seed=SEEDS[name])
    (path / ".git").mkdir()
    (path / "README").write_text("mine")
    return path


@contextlib.contextmanager
def repository(path: Path, **settings: Any) -> Iterator[Server]:
    models = Folder(path, {"two": 3.0}).all()
    chosen = ServeSettings(http_port=0, grpc_port=0, models=models, repository=str(path), **settings)
    with serving(path / "one", chosen) as server:
        yield server


@pytest.mark.slow
def test_models_of_a_repository_are_served_loaded_and_unloaded_over_both_protocols(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "models", "one", "two")
    with repository(path) as server, triton.InferenceServerClient(server.grpc) as client:
        image = triton.InferInput("image", list(IMAGES.shape), "UINT8")
        image.set_data_from_numpy(IMAGES)
        for name in ("one", "two"):
            answers(server, name)
            answer = client.infer(name, [image]).as_numpy("probabilities")
            np.testing.assert_allclose(answer, tiny_answers(IMAGES, seed=SEEDS[name]), 1e-4)
        assert states(server) == {"one": "READY", "two": "READY"}
        for status, content in (
            ask(server, "POST", "/v2/models/three/infer", INFER),
            ask(server, "GET", "/v2/models/three"),
            change(server, "load", "three"),
            change(server, "unload", "three"),
        ):
            assert status == 404
            assert content["error"] == "there is no model 'three'; the models are one, two", content
        with pytest.raises(InferenceServerException, match="the models are one, two"):
            client.infer("three", [image])
        assert ask(server, "GET", "/openapi.json")[1]["components"]["parameters"]["model"]["schema"]["enum"] == [
            "one",
            "two",
        ]
        assert {name: each["weight"] for name, each in ask(server, "GET", "/config")[1]["models"].items()} == {
            "one": 1,
            "two": 3,
        }

        client.unload_model("one")
        assert states(server) == {"one": "UNAVAILABLE", "two": "READY"}
        assert ask(server, "GET", "/v2/health/ready")[0] == 200, "the node serves the others"
        assert client.is_server_ready()
        assert ask(server, "GET", "/v2/models/one/ready")[0] == 404
        assert not client.is_model_ready("one")
        assert client.is_model_ready("two")
        assert ask(server, "POST", "/v2/models/one/infer", INFER)[1]["error"].startswith("the model one is not loaded")
        answers(server, "two")
        client.load_model("one")
        answers(server, "one")

        tiny_bundle(path / "three", seed=SEEDS["three"])
        assert states(server) == {"one": "READY", "two": "READY", "three": "UNAVAILABLE"}
        assert change(server, "load", "three") == (200, {})
        answers(server, "three")
        assert [entry.name for entry in client.get_model_repository_index().models] == ["one", "two", "three"]

        (path / "broken").mkdir()
        (path / "broken" / "bundle.json").write_text("{}")
        status, content = change(server, "load", "broken")
        assert status == 400, content
        assert "broken" in content["error"]
        assert states(server)["broken"] == "UNAVAILABLE"

        counted = ask(server, "GET", "/metrics")[1]
        for line in (
            'rushhour_requests_total{model="one",outcome="success",version="1"} 3.0',
            'rushhour_requests_total{model="two",outcome="success",version="1"} 3.0',
            'rushhour_requests_total{model="three",outcome="success",version="1"} 1.0',
            'rushhour_model_ready{model="three"} 1.0',
            'rushhour_queue_samples{model="one"} 0.0',
        ):
            assert line in counted, counted
        stats = client.get_inference_statistics().model_stats
        assert {entry.name: entry.inference_count for entry in stats} == {"one": 6, "two": 6, "three": 2}
        for name in ("one", "two", "three"):
            client.unload_model(name)
        assert ask(server, "GET", "/v2/health/ready")[0] == 503, "nothing is left"


def cells_of(server: Server) -> list[int]:
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return [int(child) for child in children]


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_all_worker_processes_have_all_models_and_a_restarted_one_has_what_the_others_have(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "models", "one", "two")
    with repository(path, cells=2) as server:
        for _ in range(8):
            answers(server, "one")
            answers(server, "two")
        assert change(server, "unload", "one") == (200, {})
        tiny_bundle(path / "three", seed=SEEDS["three"])
        assert change(server, "load", "three") == (200, {})
        before = cells_of(server)
        os.kill(before[0], signal.SIGKILL)
        wait_until(lambda: len(cells_of(server)) == 2 and cells_of(server) != before)
        wait_until(lambda: 'rushhour_cells{state="up"} 2' in ask(server, "GET", "/metrics")[1])
        for _ in range(8):
            answers(server, "two")
            answers(server, "three")
            assert ask(server, "POST", "/v2/models/one/infer", INFER)[0] == 404
        shutil.rmtree(path / "three")
        status, content = change(server, "load", "three")
        assert status == 400, content
        answers(server, "three")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0


def test_what_cannot_be_served_together_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder_of(tmp_path / "models", "one", "two")
    paths = [path / "one", path / "two"]
    assert [model.name for model in hosted(paths, ["a", "b"], {"b": 2})] == ["a", "b"]
    (path / "no model").mkdir()
    for refused, said in (
        (lambda: hosted([path / "one", path / "one"]), "two models have the name tiny: .*--model-name"),
        (lambda: hosted(paths, ["a"]), "1 names for 2 models"),
        (lambda: hosted(paths, ["a", "b"], {"c": 2}), "--weight names 'c'.*the models are a, b"),
        (lambda: Folder(path).all(), "no model is no model: it has neither"),
        (lambda: Folder(path / "absent").all(), "there is no repository at"),
        (lambda: Folder(path / ".git").all(), "there is no model in"),
    ):
        with pytest.raises(RushhourError, match=said):
            refused()
    (path / "no model").rmdir()
    some = Folder(path).all(["two"])
    assert some == (Served(str(paths[0]), "one", unloaded=True), Served(str(paths[1]), "two"))
    with pytest.raises(RushhourError, match="--load-model names 'four'"):
        Folder(path).all(["four"])
    targets = {name: open_target(path / name) for name in ("one", "two")}
    check_memory(targets, 2)
    monkeypatch.setattr("rushhour.serve.hosting.describe", lambda: type("Machine", (), {"memory_gb": 1e-6}))
    with pytest.raises(RushhourError, match=r"2 models cannot be served together here: they need about"):
        check_memory(targets, 2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name what to serve"),
        (["{one}", "{one}"], "two models have the name tiny"),
        (["{one}", "--repository", "{folder}"], "--repository goes without models"),
        (["{one}", "--weight", "tiny=2"], "--weight is for several models"),
        (["{one}", "{two}", "--weight", "tiny=none"], "is not NAME=N"),
        (["--repository", "{folder}", "--load-model", "four"], "--load-model names 'four'"),
    ],
)
def test_commands_that_are_refused(tmp_path: Path, words: list[str], said: str) -> None:
    folder = folder_of(tmp_path / "models", "one", "two")
    places = {"one": str(folder / "one"), "two": str(folder / "two"), "folder": str(folder)}
    done = CliRunner().invoke(cli, ["serve", *(word.format(**places) for word in words)])
    shown = " ".join((done.output + str(done.exception)).split())
    assert done.exit_code != 0
    assert said in shown, shown


class Asked:
    """Answers of an endpoint in this process, without sockets."""

    def __init__(self, repository: Repository) -> None:
        self._control = Control(repository, lambda: False)
        self._routes = Routes(self._control)

    def get(self, path: str, method: str = "GET") -> tuple[int, Any]:
        answer = self._routes.answer(method.encode(), path.encode(), b"")
        assert isinstance(answer, tuple)
        return answer[0], json.loads(answer[1])


def test_each_request_goes_to_the_model_that_it_names(tmp_path: Path) -> None:
    async def scenario() -> None:
        tiny_bundle(tmp_path / "tiny")
        target, shared = open_target(tmp_path / "tiny"), Shared(models=2)
        services = [
            Service(target, name, lambda bundle, config: FakeEngine(config), shared=shared) for name in ("one", "two")
        ]
        repository = Repository(services, shared)
        asked = Asked(repository)
        assert asked.get("/v2/health/ready") == (503, {"ready": False})
        for service in services:
            await service.load()
        stages = {name: repository.stages[f"/v2/models/{name}/versions/1/infer".encode()] for name in ("one", "two")}
        assert all(stage.codec.model == name for name, stage in stages.items())
        assert b"/v2/models/three/infer" not in repository.stages
        assert asked.get("/v2/models/two")[1]["name"] == "two"
        assert asked.get("/v2/models/three") == (404, {"error": "there is no model 'three'; the models are one, two"})
        message = ModelInferRequest(id="7", model_name="two")
        late = ModelInferRequest(id="7").SerializeToString() + ModelInferRequest(model_name="two").SerializeToString()
        assert model_of(message.SerializeToString()) == model_of(late) == "two"
        repository.refuse(400, 0.0, infer=True, model="two")
        repository.refuse(404, 0.0, infer=True, model="three")
        assert [service.totals()["1"].invalid for service in services] == [0, 1]
        assert repository.errors == {"not_found": 1}
        await services[0].unload()
        assert b"/v2/models/one/infer" not in repository.stages
        assert repository.stages.get(b"/v2/models/two/infer") is stages["two"]
        assert asked.get("/v2/health/ready") == (200, {"ready": True})
        assert asked.get("/v2/models/one/infer", "POST")[1]["error"].startswith("the model one is not loaded")
        assert asked.get("/v2/repository/index", "POST")[1] == [
            {"name": "one", "version": "", "state": "UNAVAILABLE", "reason": "unloaded"},
            {"name": "two", "version": "1", "state": "READY", "reason": ""},
        ]
        await services[1].unload()

    asyncio.run(scenario())


def test_arguments_of_the_api_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "models", "one", "two")
    one, two = folder / "one", folder / "two"
    for arguments, said in (
        ({}, "cannot tell what to serve"),
        ({"target": one, "repository": folder}, "cannot tell what to serve"),
        ({"target": [one, two]}, "two models have the name tiny"),
        ({"target": one, "weights": {"tiny": 2}}, "weights are given for one model"),
        ({"target": one, "load_model": "tiny"}, "`load_model` has no effect"),
        ({"repository": folder, "model_name": "tiny"}, "`model_name` has no effect"),
        ({"repository": folder, "weights": {"four": 2}}, "--weight names 'four'"),
        ({"target": [one, two], "model_name": ["a", "b"], "settings": ServeSettings(model="c")}, "given in two ways"),
    ):
        with pytest.raises(RushhourError, match=said):
            rushhour.serve(**arguments)


@pytest.mark.slow
def test_several_models_by_the_api(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "models", "one", "two")
    paths = [folder / "one", folder / "two"]
    with rushhour.serve(paths, model_name=["a", "b"], weights={"b": 3}, http_port=0, grpc_port=None, cells=1) as server:
        assert server.models == ("a", "b")
        lines = server.way.splitlines()
        assert [line.partition(":")[0] for line in lines] == ["a", "b"]
        assert "weight 3, at least" in lines[1]
        assert rushhour.load(server, model="b", closed_loop=2, duration=0.5).result.errors == 0
