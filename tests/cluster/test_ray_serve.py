"""Replicas on a real Ray: direct and through its proxies, killed, updated under load, undone, deleted."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from plans import MODEL, run_of
from rays import TOKEN, Client, Cluster, addresses, cluster, free_port, infer, of_session, until

from rushhour.bundle import Bundle
from rushhour.plan import PLAN, Plan, Policy
from rushhour.protocol import message

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(600)]

NAME = "parts"


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as name:  # a socket's path
        path = Path(name)  # has 107 characters at most
        (path / TOKEN).write_text("0" * 64)
        yield path


@pytest.fixture(scope="module")
def ray(folder: Path) -> Iterator[Cluster]:
    with cluster(folder, cpus=4) as running:
        yield running


def run_in(folder: Path, batch: int) -> Path:
    policy = Policy(streams=1, threads=1, max_batch=batch, deadline_ms=None)
    return run_of(folder, cores=1, policy=policy)


@pytest.fixture(scope="module")
def first(folder: Path) -> Path:
    return run_in(folder / "first", 8)


@pytest.fixture(scope="module")
def second(folder: Path) -> Path:
    return run_in(folder / "second", 4)


@pytest.fixture(scope="module")
def deployed(ray: Cluster, first: Path) -> dict[str, Any]:
    return ray.deploy(
        *(str(first), "--name", NAME, "--replicas", "2", "--drain-delay", "3s"),
        *("--proxy-port", str(free_port()), "--proxy-grpc-port", str(free_port())),
    )


@pytest.fixture(scope="module")
def image(first: Path) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = Bundle.open(first / "bundles" / "best").samples()["image"][0]
    return found


@pytest.fixture(scope="module")
def right(first: Path) -> np.ndarray[Any, Any]:
    answers = Bundle.open(first / "bundles" / "best").answers()
    assert answers is not None
    found: np.ndarray[Any, Any] = answers["probabilities"][0]
    return found


def ready(ray: Cluster) -> dict[str, Any]:
    """The deployment once two replicas are ready, and no others are there."""
    found: dict[str, Any] = {}

    def is_ready() -> bool:
        found.update(ray.deploy("--status", NAME))
        return found["state"] == "ready" and len(found["replicas"]) == 2

    until(is_ready)
    return found


def over_grpc(address: str, image: np.ndarray[Any, Any], *metadata: tuple[str, str]) -> np.ndarray[Any, Any]:
    request = message("inference.ModelInferRequest")(model_name=MODEL)
    request.inputs.add(name="image", datatype="UINT8", shape=[1, *image.shape])
    request.raw_input_contents.append(image.tobytes())
    with grpc.insecure_channel(address) as channel:
        send = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        answer = send(request.SerializeToString(), metadata=metadata, timeout=30)
    content = message("inference.ModelInferResponse").FromString(answer).raw_output_contents[0]
    return np.frombuffer(content, np.float32)


def test_each_replica_answers_directly_with_the_right_answer(
    deployed: dict[str, Any], first: Path, image: np.ndarray[Any, Any], right: np.ndarray[Any, Any]
) -> None:
    assert deployed["state"] == "ready"
    assert len({each["http"] for each in deployed["replicas"]}) == 2
    for each in deployed["replicas"]:
        np.testing.assert_allclose(infer(each["http"], MODEL, image), right, atol=1e-5)
        np.testing.assert_allclose(over_grpc(each["grpc"], image), right, atol=1e-5)
        assert each["plan"] == deployed["plan"]
    assert Plan.load(first / PLAN).model == MODEL


def test_rays_proxies_have_one_address_for_all(
    deployed: dict[str, Any], image: np.ndarray[Any, Any], right: np.ndarray[Any, Any]
) -> None:
    for _ in range(4):
        np.testing.assert_allclose(infer(deployed["proxy"], MODEL, image), right, atol=1e-5)
    found = over_grpc(deployed["proxy_grpc"], image, ("application", NAME))
    np.testing.assert_allclose(found, right, atol=1e-5)
    assert sorted(addresses(deployed["proxy"])) == sorted(each["http"] for each in deployed["replicas"])
    with pytest.raises(OSError, match="400"):
        infer(deployed["proxy"], MODEL, image[:2])
    with pytest.raises(grpc.RpcError) as refused:
        over_grpc(deployed["proxy_grpc"], image[:2], ("application", NAME))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.usefixtures("deployed")
@pytest.mark.parametrize("victim", ["server_pid", "pid"])
def test_a_killed_replica_is_replaced_and_the_other_loses_nothing(
    ray: Cluster, image: np.ndarray[Any, Any], victim: str
) -> None:
    before = ready(ray)
    killed, other = before["replicas"]
    client = Client(lambda: [other["http"]], MODEL, image)
    os.kill(killed[victim], signal.SIGKILL)
    until(lambda: not Path(f"/proc/{killed['server_pid']}").exists())  # no orphan
    after = ready(ray)
    client.stop()
    assert client.lost == []
    assert client.answered[other["http"]] > 10
    ids = [each["id"] for each in after["replicas"]]
    assert killed["id"] not in ids
    assert other["id"] in ids
    for each in after["replicas"]:
        infer(each["http"], MODEL, image)


@pytest.mark.usefixtures("deployed")
def test_an_update_and_its_undoing_lose_no_request(ray: Cluster, second: Path, image: np.ndarray[Any, Any]) -> None:
    before = ready(ray)
    proxy = before["proxy"]
    direct, proxied = Client(lambda: addresses(proxy), MODEL, image), Client(lambda: [proxy], MODEL, image)
    updated = ray.deploy(str(second), "--name", NAME, "--replicas", "2", "--drain-delay", "3s")
    undone = ray.deploy("--undo", NAME)
    for client in (direct, proxied):
        client.stop()
        assert client.lost == []
    assert updated["plan"] != before["plan"] == updated["previous"]
    assert {each["plan"] for each in updated["replicas"]} == {updated["plan"]}
    assert undone["plan"] == before["plan"]
    assert undone["previous"] == updated["plan"]
    assert len(direct.answered) >= 6  # two replicas three times


@pytest.mark.usefixtures("deployed")
def test_a_plan_that_does_not_start_leaves_the_one_before(
    ray: Cluster, second: Path, image: np.ndarray[Any, Any]
) -> None:
    before = ready(ray)
    with socket.socket() as taken:  # there is no port for the new replicas
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = ray.run(
            *(str(second), "--name", NAME, "--replicas", "2", "--no-grpc", "--ports", f"{port}-{port}"),
            *("--ray", ray.address, "--timeout", "60s"),
        )
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert "fewer than 1 of the ports" in line
    assert "what was deployed before still serves" in line
    after = ready(ray)
    assert after["plan"] == before["plan"]
    for each in after["replicas"]:
        infer(each["http"], MODEL, image)


@pytest.mark.usefixtures("deployed")
def test_what_the_cluster_has_no_room_for_is_refused_before_anything_starts(ray: Cluster, second: Path) -> None:
    before = ray.deploy("--status", NAME)
    for words, expected in (
        (("--name", "more", "--route", "/more", "--replicas", "9"), "too few CPUs for 9 replicas of 1 CPUs"),
        (("--name", "more", "--route", "/more", "--replicas", "3"), "too few free CPUs"),
        (("--name", "more"), f"the route / is that of the deployment {NAME}"),
    ):
        done = ray.run(str(second), "--ray", ray.address, *words)
        assert done.returncode == 2
        assert expected in done.stderr.splitlines()[-1]
    done = ray.run("--undo", "nobody", "--ray", ray.address)
    assert done.returncode == 2
    assert f"no deployment is called 'nobody': there are {NAME}" in done.stderr
    assert ray.deploy("--status", NAME)["replicas"] == before["replicas"]


@pytest.mark.usefixtures("deployed")
def test_a_deleted_deployment_leaves_no_process(ray: Cluster) -> None:
    before = ready(ray)
    done = ray.run("--delete", NAME, "--ray", ray.address)
    assert done.returncode == 0, done.stderr
    for each in before["replicas"]:
        for pid in (each["pid"], each["server_pid"]):
            until(lambda pid=pid: not Path(f"/proc/{pid}").exists())  # type: ignore[misc]
    assert ray.run("--status", NAME, "--ray", ray.address).returncode == 2


def test_a_ray_that_was_started_for_a_deployment_ends_with_it(first: Path, image: np.ndarray[Any, Any]) -> None:
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as name:
        alone = Cluster(Path(name), "")
        port = free_port()
        done = alone.run(str(first), "--ray", "--name", NAME, "--proxy-port", str(port), "--no-grpc")
        assert done.returncode == 0, done.stderr
        leaders = [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and f"RAY_TMPDIR={name}".encode() in _environment(entry)
        ]
        try:
            infer(f"http://127.0.0.1:{port}", MODEL, image)
            done = alone.run("--delete", NAME)
            assert done.returncode == 0, done.stderr
            until(lambda: not any(map(_runs, leaders)))  # one that has ended may wait to be reaped
        finally:
            for pid in {pid for leader in leaders for pid in (leader, *of_session(leader))}:
                if Path(f"/proc/{pid}").exists():
                    os.kill(pid, signal.SIGKILL)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _environment(process: Path) -> bytes:
    try:
        return (process / "environ").read_bytes()
    except OSError:
        return b""
