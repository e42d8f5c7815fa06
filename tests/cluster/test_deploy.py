"""`rushhour deploy`, as far as it needs no Ray: what is packed, claimed, asked for and decided; errors in one line."""

from __future__ import annotations

import asyncio
import importlib.util
import io
import os
import socket
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer
from typing import Any

import grpc
import msgspec
import pytest
from plans import MODEL, run_of

import rushhour
from rushhour.cli import main
from rushhour.cluster import Deployment
from rushhour.cluster.ray_client import why_of
from rushhour.cluster.ray_serve import Order, digest, pack, plan_of, read_ports, read_replicas
from rushhour.cluster.ray_serve.claims import Claims
from rushhour.cluster.ray_serve.packing import unpack
from rushhour.cluster.ray_serve.replica import Rates, accepts
from rushhour.cluster.ray_serve.scaling import ANSWERED, OFFERED, SHED, WAIT, needed
from rushhour.errors import BundleError, GoalError, InstallError, PlanError, ServeError
from rushhour.plan import PLAN, Plan
from rushhour.serve import open_target
from rushhour.system.extras import EXTRAS

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="extra cluster")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return run_of(tmp_path / "run")


def packed(run: Path) -> bytes:
    how: dict[str, Any] = {"name": MODEL, "image": None, "port": 1, "grpc_port": None, "replicas": 1, "memory_mib": 0}
    return pack(Deployment.of(open_target(run), **how))


def test_the_reason_of_an_actors_failure_is_not_the_trace_around_it() -> None:
    trace = RuntimeError("\x1b[36mray::HAProxyManager.ready()\x1b[39m (pid=1)\n  File ...\nRuntimeError: no room")
    trace.cause = RuntimeError("no room")  # type: ignore[attr-defined]
    assert why_of(trace) == "no room"
    assert why_of(ConnectionError("\n nobody answers \n or so")) == "nobody answers"
    assert why_of(TimeoutError()) == "TimeoutError"


def test_a_server_that_accepts_no_connection_is_not_reachable() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        url = "http://{}:{}".format(*listening.getsockname())
        assert not asyncio.run(accepts(url))
        listening.listen()
        assert asyncio.run(accepts(url))


# -- what reaches the nodes


def test_a_run_is_unpacked_as_it_was(run: Path, tmp_path: Path) -> None:
    package = packed(run)
    assert package == packed(run)
    (tmp_path / "runs").mkdir()
    folder = unpack(package, digest(package), tmp_path / "runs")
    assert digest((folder / PLAN).read_bytes()) == plan_of(package)
    there, here = open_target(folder), open_target(run)
    assert there.bundle.manifest.hash == here.bundle.manifest.hash
    assert there.name == here.name
    assert unpack(b"", digest(package), tmp_path / "runs") == folder  # it is there already


def test_a_package_with_a_changed_byte_is_refused(run: Path, tmp_path: Path) -> None:
    package = bytearray(packed(run))
    sha256 = digest(bytes(package))
    package[len(package) // 2] ^= 1
    with pytest.raises(BundleError, match="damaged"):
        unpack(bytes(package), sha256, tmp_path)
    assert list(tmp_path.glob(f"{sha256}*")) == []


@pytest.mark.parametrize("name", ["../plan.json", "/etc/plan.json", "bundles/../../plan.json"])
def test_a_package_writes_nothing_outside_its_folder(name: str, tmp_path: Path) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(name, "{}")
    with pytest.raises(BundleError, match="inside its folder"):
        unpack(content.getvalue(), digest(content.getvalue()), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_order_is_the_same_after_the_way_to_a_replica() -> None:
    order = Order("parts", "1" * 64, "2" * 64, "0", "parts", 2, 1, 1, 1, 0.05, None, (2, 8), ports=(9000, 9009))
    assert msgspec.json.decode(msgspec.json.encode(order), type=Order) == order
    assert order.is_scaled


# -- cores and ports of one machine

HOLD = (
    "import sys, pathlib; from rushhour.cluster.ray_serve.claims import Claims\n"
    "claims = Claims(pathlib.Path(sys.argv[1])); print(claims.cores(1, [0, 1]), flush=True); sys.stdin.read()\n"
)


def test_no_two_processes_get_the_same_core_and_a_killed_one_gives_it_back(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    assert holder.stdout.readline() == "[0]\n"
    claims = Claims(tmp_path)
    assert claims.cores(2, [0, 1]) == []  # all or none
    assert claims.cores(1, [0, 1]) == [1]
    holder.kill()
    holder.wait()
    holder.stdin.close()
    holder.stdout.close()
    assert claims.cores(1, [0, 1]) == [0]
    claims.close()


def test_ports_of_a_range_are_those_that_nobody_has(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        if taken > 65_000:
            pytest.skip("a range needs ports above it")
        one, two = Claims(tmp_path), Claims(tmp_path)
        found = one.ports(2, (taken, taken + 20), "127.0.0.1") + two.ports(2, (taken, taken + 20), "127.0.0.1")
        assert taken not in found
        assert len(set(found)) == 4
        with pytest.raises(ServeError, match="fewer than 2 of the ports"):
            one.ports(2, (taken, taken), "127.0.0.1")
        one.close()
        two.close()


def test_runs_that_no_process_serves_are_removed(tmp_path: Path) -> None:
    one, two = Claims(tmp_path), Claims(tmp_path)
    (one.runs("a" * 64) / ("a" * 64)).mkdir()
    (two.runs("b" * 64) / ("b" * 64)).mkdir()
    assert (tmp_path / "runs" / ("a" * 64)).is_dir()  # the first holds it
    one.close()
    two.runs("b" * 64)
    assert not (tmp_path / "runs" / ("a" * 64)).exists()
    assert (tmp_path / "runs" / ("b" * 64)).is_dir()
    two.close()


# -- how many replicas


@pytest.mark.parametrize(
    ("reports", "running", "target", "capacity", "wanted"),
    [
        ({OFFERED: [800.0]}, 1, 1, 1000.0, 1),
        ({OFFERED: [900.0]}, 1, 1, 1000.0, 2),  # a replica is not loaded to its capacity
        ({OFFERED: [900.0, 900.0, 900.0]}, 3, 3, 1000.0, 4),
        ({OFFERED: [500.0], SHED: [20.0]}, 1, 1, 1000.0, 2),  # it carries less here than its Plan says
        ({OFFERED: [500.0], SHED: [20.0]}, 1, 2, 1000.0, 2),  # another one starts already
        ({OFFERED: [500.0], WAIT: [0.03]}, 1, 1, None, 2),  # nothing is known but that requests wait
        ({OFFERED: [300.0, 290.0]}, 2, 2, 1000.0, 1),
        ({OFFERED: [400.0, 400.0]}, 2, 2, 1000.0, 2),  # one would be loaded to 80%
        ({OFFERED: [0.0, 0.0, 0.0]}, 3, 3, 1000.0, 2),  # one at a time
        ({}, 2, 2, None, 2),
    ],
)
def test_replicas_follow_goodput_and_waits(
    reports: dict[str, list[float]], running: int, target: int, capacity: float | None, wanted: int
) -> None:
    assert needed(reports, running, target, capacity, 0.05) == wanted


def metrics(answered: int, in_time: int, shed: int, waited_s: float, queue: int) -> str:
    return "\n".join(
        [
            "# TYPE rushhour_requests_total counter",
            f'rushhour_requests_total{{model="m",version="1",outcome="success"}} {answered}',
            f'rushhour_requests_total{{model="m",version="1",outcome="shed"}} {shed}',
            "# TYPE rushhour_shed_total counter",
            f'rushhour_shed_total{{model="m",reason="deadline"}} {shed}',
            "# TYPE rushhour_request_seconds histogram",
            f'rushhour_request_seconds_bucket{{model="m",le="0.05"}} {in_time}',
            f'rushhour_request_seconds_bucket{{model="m",le="0.1"}} {answered}',
            f'rushhour_request_seconds_bucket{{model="m",le="+Inf"}} {answered}',
            "# TYPE rushhour_queue_seconds histogram",
            f'rushhour_queue_seconds_bucket{{model="m",le="+Inf"}} {answered}',
            f'rushhour_queue_seconds_count{{model="m"}} {answered}',
            f'rushhour_queue_seconds_sum{{model="m"}} {waited_s}',
            "# TYPE rushhour_queue_samples gauge",
            f'rushhour_queue_samples{{model="m"}} {queue}',
            "",
        ]
    )


def test_a_replica_reports_what_its_server_did_since_the_last_time() -> None:
    rates = Rates(0.05)
    assert rates.since_last(metrics(1000, 900, 5, 2.0, 0), 10.0)[OFFERED] == 0
    found = rates.since_last(metrics(1200, 1080, 25, 3.0, 0), 12.0)
    assert found == pytest.approx({ANSWERED: 90, OFFERED: 110, SHED: 10, WAIT: 0.005})
    later = rates.since_last(metrics(1300, 1180, 25, 3.1, 40), 13.0)
    assert later[WAIT] == pytest.approx(0.4)  # what waits now will take longer


# -- what is asked for


def test_replicas_and_ports_are_read() -> None:
    assert read_replicas("2..8") == (2, 8)
    assert read_replicas(3) == (3, 3)
    assert read_ports("9000-9009", each=2) == (9000, 9009)
    for text in ("0", "3..2", "1..", "two", "1..2000", "-1", "1.5"):
        with pytest.raises(GoalError, match="replicas"):
            read_replicas(text)
    for text in ("9000", "9009-9000", "80-90", "9000-70000", "9000-9000"):
        with pytest.raises(GoalError, match="ports"):
            read_ports(text, each=2)


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["rushhour", "deploy", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "give either RUN to deploy, or one of --status, --undo and --delete"),
        (("RUN",), "say where: --ray"),
        (("RUN", "--status", "parts"), "give either RUN"),
        (("--status", "parts", "--replicas", "2"), "--replicas has no effect with --status"),
        (("RUN", "--ray", "--replicas", "3..2"), "cannot use replicas='3..2'"),
        (("RUN", "--ray", "--ports", "9000-9000"), "cannot use ports"),
        (("RUN", "--ray", "--route", "photos"), "cannot use route"),
        (("RUN", "--ray", "--name", "No_Label"), "DNS label"),
        (("RUN", "--ray", "--host", "0.0.0.0"), "give --expose"),
        (("RUN", "--ray", "--host", "127.0.0.1:8000"), "a port is --ports"),
        pytest.param(
            ("RUN", "--ray", "127.0.0.1:1"), "no Ray answers at 127.0.0.1:1: Connection refused", marks=needs_ray
        ),
        pytest.param(("RUN", "--ray", "somewhere"), "it is HOST:PORT", marks=needs_ray),
        (("nowhere", "--ray"), "there is nothing to serve at nowhere"),
    ],
)
def test_what_cannot_be_deployed_is_refused_in_one_line(
    words: tuple[str, ...],
    expected: str,
    run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = said(capsys, monkeypatch, *(str(run) if word == "RUN" else word for word in words))
    assert expected in line


@needs_ray
def test_what_is_no_ray_is_not_waited_for(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray itself waits for half a minute."""
    with ThreadingTCPServer(("127.0.0.1", 0), BaseRequestHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        line = said(capsys, monkeypatch, str(run), "--ray", f"127.0.0.1:{other.server_address[1]}")
        other.shutdown()
    assert "what listens there is no Ray" in line


@needs_ray
def test_a_ray_that_asks_for_a_token(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(request: bytes, context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")

    handlers = {"GetClusterId": grpc.unary_unary_rpc_method_handler(refuse)}
    guarded = grpc.server(ThreadPoolExecutor(1))
    guarded.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("ray.rpc.NodeInfoGcsService", handlers),))
    port = guarded.add_insecure_port("127.0.0.1:0")
    guarded.start()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    line = said(capsys, monkeypatch, str(run), "--ray", f"127.0.0.1:{port}")
    guarded.stop(None)
    assert "it asks for a token; set RAY_AUTH_MODE=token" in line


@needs_ray
def test_no_ray_on_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    line = said(capsys, monkeypatch, "--status", "parts")
    assert "no Ray runs on this machine" in line


def test_a_plan_that_meets_no_goal_is_refused(run: Path) -> None:
    msgspec.structs.replace(Plan.load(run / PLAN), feasible=False).save(run / PLAN)
    with pytest.raises(PlanError, match="nearest miss"):
        rushhour.deploy(run)


def test_without_ray_the_extra_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXTRAS, "cluster", ("no_such_ray",))
    with pytest.raises(InstallError, match=r"rushhour\[cluster\]"):
        rushhour.deploy(run)


def test_ray_is_imported_by_nothing_else() -> None:
    code = "import sys, rushhour.api, rushhour.cluster, rushhour.cluster.ray_serve; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
