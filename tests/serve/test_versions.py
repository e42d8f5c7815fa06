"""A version is one bundle, told by its content: it follows the bundle through reloads, cells and restarts."""

from __future__ import annotations

import http.client
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from conftest import Server, serving
from rushhour.bundle import Bundle
from rushhour.goal import SLO, Goal
from rushhour.plan import Plan, Policy, Variant
from rushhour.serve import ServeSettings, open_target
from rushhour.serve.observability.statistics import Totals, newest_versions, sum_by_version
from rushhour.testing.bundles import tiny_answers, tiny_bundle

BOTH = ServeSettings(http_port=0, grpc_port=0)
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 1), dtype=np.uint8)
INFER = json.dumps(
    {"inputs": [{"name": "image", "shape": [2, 4, 4, 1], "datatype": "UINT8", "data": IMAGES.ravel().tolist()}]}
).encode()


def ask(server: Server, method: str, path: str, body: bytes = b"") -> tuple[int, Any]:
    """On a connection of its own, which lands on any cell."""
    connection = http.client.HTTPConnection(*server.address, timeout=30)
    try:
        connection.request(method, path, body, {"content-type": "application/json"} if body else {})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def load(server: Server) -> None:
    assert ask(server, "POST", "/v2/repository/models/tiny/load")[0] == 200


def answered_by(server: Server, version: str, seed: int) -> None:
    """The version that is served, wherever it is said, and by its answers."""
    assert ask(server, "GET", "/v2/models/tiny")[1]["versions"] == [version]
    assert ask(server, "POST", "/v2/repository/index", b"{}")[1][0]["version"] == version
    for path in ("/v2/models/tiny/infer", f"/v2/models/tiny/versions/{version}/infer"):
        status, answer = ask(server, "POST", path, INFER)
        assert (status, answer["model_version"]) == (200, version)
        got = np.array(answer["outputs"][0]["data"], np.float32).reshape(2, 3)
        np.testing.assert_allclose(got, tiny_answers(IMAGES, seed=seed), atol=1e-5)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_version_follows_its_bundle(tmp_path: Path) -> None:
    first, second = tiny_bundle(tmp_path / "a", seed=0), tiny_bundle(tmp_path / "b", seed=1)
    first.copy_to(tmp_path / "served")
    with serving(tmp_path / "served", BOTH) as server, triton.InferenceServerClient(server.grpc) as client:
        answered_by(server, "1", seed=0)
        for _ in range(3):
            load(server)
        answered_by(server, "1", seed=0)
        assert client.is_model_ready("tiny", "1")
        second.copy_to(tmp_path / "served")
        load(server)
        answered_by(server, "2", seed=1)
        assert not client.is_model_ready("tiny", "1")
        assert ask(server, "POST", "/v2/models/tiny/versions/1/infer", INFER)[0] == 404
        first.copy_to(tmp_path / "served")
        client.load_model("tiny")
        answered_by(server, "1", seed=0)
        client.unload_model("tiny")
        client.load_model("tiny")
        answered_by(server, "1", seed=0)
        tiny_bundle(tmp_path / "served", seed=2)
        load(server)
        answered_by(server, "3", seed=2)
        # What a version has done counts on, when its bundle comes back.
        (shown,) = ask(server, "GET", "/v2/models/tiny/stats")[1]["model_stats"]
        assert (shown["version"], shown["inference_stats"]["success"]["count"]) == ("3", 2)
        first.copy_to(tmp_path / "served")
        load(server)
        (entry,) = client.get_inference_statistics("tiny", "1").model_stats
        assert (entry.version, entry.inference_stats.success.count) == ("1", 8)


def test_statistics_are_of_the_version_that_is_asked_for(server: Server, tiny: Bundle) -> None:
    with serving(tiny.path, BOTH) as fresh, triton.InferenceServerClient(fresh.grpc) as client:
        for name, version in (("tiny", "9"), ("tiny", "01"), ("tiny", "one"), ("other", ""), ("other", "1")):
            with pytest.raises(InferenceServerException, match=r"no model|no version"):
                client.get_inference_statistics(name, version)
        with pytest.raises(InferenceServerException, match="a version but no model"):
            client.get_inference_statistics("", "9")
        assert [entry.version for entry in client.get_inference_statistics("", "").model_stats] == ["1"]
        for path in (
            "/v2/models/tiny/versions/9/stats",
            "/v2/models/tiny/versions//stats",
            "/v2/models//versions/1/stats",
            "/v2/models//versions/9/stats",
            "/v2/models//stats",
            "/v2/models//ready",
            "/v2/models/tiny/versions/",
        ):
            assert ask(fresh, "GET", path)[0] == 404, path
        assert ask(fresh, "POST", "/v2/models/tiny/versions//infer", INFER)[0] == 404


@pytest.mark.slow
def test_cells_and_restarted_ones_agree_on_versions(tmp_path: Path) -> None:
    first, second = tiny_bundle(tmp_path / "a", seed=0), tiny_bundle(tmp_path / "b", seed=1)
    first.copy_to(tmp_path / "served")
    with serving(tmp_path / "served", ServeSettings(http_port=0, cells=2)) as server:

        def cells() -> set[int]:
            children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
            return {int(pid) for pid in children.read_text().split()}

        def up() -> int:
            return int(ask(server, "GET", "/stats")[1]["cells"])

        for bundle, version, seed in ((first, "1", 0), (second, "2", 1), (first, "1", 0), (second, "2", 1)):
            bundle.copy_to(tmp_path / "served")
            load(server)
            load(server)
            for _ in range(6):  # connections land on either cell
                answered_by(server, version, seed)
        killed = min(cells())
        os.kill(killed, signal.SIGKILL)
        until(lambda: killed not in cells() and len(cells()) == 2 and up() == 2)
        for _ in range(10):
            answered_by(server, "2", seed=1)
        first.copy_to(tmp_path / "served")
        load(server)
        for _ in range(10):
            answered_by(server, "1", seed=0)


def test_the_versions_that_are_told_apart_are_those_that_are_counted_apart() -> None:
    versions: dict[str, int] = {}
    for number in range(1, 100):
        versions = newest_versions(versions | {f"bundle {number}": number})
    assert sorted(versions.values()) == list(range(68, 100))
    counted = sum_by_version([{str(number): Totals(answered=1)} for number in range(1, 100)])
    assert counted.pop("older").answered == 67
    assert sorted(map(int, counted)) == sorted(versions.values())


# The name that a model is served under.


def run_of(tmp_path: Path, winner: str, model: str = "") -> Path:
    """A run, as tuning leaves it: a reference called `mine`, its int8 child, and a plan for one of them."""
    for role, name in (("reference", "mine"), ("int8", "mine-int8")):
        tiny_bundle(tmp_path / "run" / "bundles" / role, name=name, seed=len(role))
    bundle = Bundle.open(tmp_path / "run" / "bundles" / winner)
    variant = Variant(winner, f"bundles/{winner}", bundle.manifest.hash, "openvino", "f32")
    Plan(Goal(SLO.parse("p99<50ms")), (variant,), Policy(), model=model).save(tmp_path / "run" / "plan.json")
    return tmp_path / "run"


@pytest.mark.parametrize("model", ["mine", ""], ids=["says it", "of an older version"])
@pytest.mark.parametrize("winner", ["reference", "int8"])
def test_the_name_does_not_change_with_the_winner(tmp_path: Path, winner: str, model: str) -> None:
    assert open_target(run_of(tmp_path, winner, model)).name == "mine"


def test_over_the_wire_a_plan_is_served_as_the_model_that_was_tuned(tmp_path: Path) -> None:
    with serving(run_of(tmp_path, "int8", "mine"), BOTH) as server:
        assert ask(server, "GET", "/v2/models/mine/ready")[0] == 200
        assert ask(server, "GET", "/v2/models/mine-int8/ready")[0] == 404
        with triton.InferenceServerClient(server.grpc) as client:
            assert client.is_model_ready("mine")
            assert [model.name for model in client.get_model_repository_index().models] == ["mine"]


def test_what_has_no_reference_keeps_its_own_name(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "alone-int8", name="alone-int8")
    assert open_target(bundle.path).name == "alone-int8"
    run = run_of(tmp_path, "int8")
    for file in (run / "bundles" / "reference").iterdir():
        file.unlink()
    assert open_target(run).name == "mine-int8"
