"""The benchmarks' own harness: what it concludes, what it renders, and that it leaves no process behind."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import render  # noqa: E402
from bench.blocks import _engine_s  # noqa: E402
from bench.contestants import OURS, Batches, Setup, batches_between, peer_of, start_peer  # noqa: E402
from bench.environments import CannotInstall  # noqa: E402
from bench.keeper import descendants  # noqa: E402
from bench.models import bundle_of  # noqa: E402
from bench.overload import recovery_s  # noqa: E402
from bench.record import Check, Record, judged, mean_ratio, meets, verdict  # noqa: E402
from bench.servers import DidNotStart, free_port, running  # noqa: E402
from train_options import OPTIONS, Trained, judge  # noqa: E402

from rushhour.goal import SLO  # noqa: E402
from rushhour.load import Target, search_capacity  # noqa: E402
from rushhour.testing import queues  # noqa: E402
from rushhour.testing.fakes import SIGNATURE  # noqa: E402
from serve import SCENARIOS, TITLES, capacity_check, installed  # noqa: E402

CORES = frozenset(os.sched_getaffinity(0))


def test_ratio_has_an_interval_from_three_rounds_on() -> None:
    assert mean_ratio([2.0, 8.0]) == (pytest.approx(4.0), None)
    value, interval = mean_ratio([2.0, 4.0, 8.0])
    assert value == pytest.approx(4.0)
    assert interval is not None
    assert 2.0 <= interval[0] < 4.0 < interval[1] <= 8.0
    assert mean_ratio([2.0, 4.0, 8.0]) == (value, interval)


def test_check_holds_only_with_its_whole_interval() -> None:
    assert judged("a", "", ">= 2", [2.1, 2.2, 2.3]).holds
    split = judged("b", "", ">= 2", [1.8, 2.3, 2.4])
    assert not split.holds
    assert split.why == "the interval reaches over the target"
    missed = judged("c", "", "<= 1.05", [1.2, 1.2, 1.2], why="others were busy")
    assert missed.why == "the value misses the target; others were busy"


def test_what_could_not_be_measured_stays_with_its_reason() -> None:
    check = judged("d", "", ">= 2", [], why="it cannot be installed: no such package")
    assert (check.holds, check.value, check.why) == (False, None, "it cannot be installed: no such package")
    assert judged("e", "", ">= 2", []).why


@pytest.mark.parametrize(
    ("value", "target", "met"),
    [
        (2.0, ">= 2", True),
        (1.9, ">= 2", False),
        (20.0, "< 20", False),
        (1.0, "<= 1.05", True),
        (math.inf, "<= 2", False),
    ],
)
def test_targets(value: float, target: str, met: bool) -> None:
    assert meets(value, target) is met


def test_engine_cost_is_interpolated_between_sizes() -> None:
    costs = {1: 1.0, 3: 2.0}
    assert _engine_s(Batches({1.0: 2, 2.0: 1, 3.0: 1}), costs) == pytest.approx(2 * 1.0 + 1.5 + 2.0)


def test_batches_of_a_window() -> None:
    assert batches_between("triton", Batches({4.0: 1}), Batches({4.0: 3, 8.0: 2})) == {4.0: 2, 8.0: 2}
    assert batches_between(OURS, Batches({15.5: 9}), Batches({15.9: 99})) == {15.9: 99}


def test_every_peer_of_a_scenario_can_be_started(tmp_path: Path) -> None:
    setup = Setup("noop", bundle_of("noop", tmp_path), "f32", CORES, 1, 4)
    for scenario in SCENARIOS:
        for peer in scenario.targets:
            folder, way = peer_of(peer)
            start = start_peer(peer, Path(sys.executable), setup, 1, tmp_path)
            assert peer in TITLES
            assert Path(start.command[1]).is_file()
            assert (start.env["BENCH_WAY"], start.env["BENCH_PORT"]) == (way, "1")
            said = (Path(start.command[1]).parent / "README.md").read_text()
            assert not way or f"`{folder}.{way}`" in said


def test_peer_is_installed_once_for_all_its_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def python_of(peer: Path, _: Path) -> Path:
        tried.append(peer.name)
        if peer.name == "triton":
            raise CannotInstall("no such wheel")
        return peer / "python"

    monkeypatch.setattr("serve.python_of", python_of)
    pythons, missing = installed({"triton", "triton.examples", "rayserve", "rayserve.direct"})
    assert tried == ["rayserve", "triton"]
    assert {peer: python.parent.name for peer, python in pythons.items()} == {
        "rayserve": "rayserve",
        "rayserve.direct": "rayserve",
    }
    assert missing == dict.fromkeys(("triton", "triton.examples"), "it cannot be installed: no such wheel")


def test_capacity_holds_only_if_it_is_proven() -> None:
    slo = SLO(percentile=99, limit_s=0.1)
    server, target = queues.Batching(0.004, 0.0005, 16), Target("http://virtual", "virtual", 1, "", "noop", SIGNATURE)
    found = search_capacity(queues.VirtualGenerator(server), target, [b"x"], slo, seed=0)
    check = capacity_check("", found, 1333.0)
    assert found.proven
    assert check.holds
    guess = capacity_check("", msgspec.structs.replace(found, confirmed=None, lowest_failing_rps=None), 1333.0)
    assert not guess.holds
    assert guess.why is not None
    assert guess.why.startswith("estimated, not proven")


def test_recovery_is_when_misses_become_rare() -> None:
    due = np.arange(1000) / 100
    assert recovery_s(due, due < 1.5) == pytest.approx(1.5, abs=0.1)
    assert recovery_s(due, np.zeros(1000, bool)) == 0.0
    assert recovery_s(due, np.ones(1000, bool)) == math.inf


def test_server_is_counted_and_gone_with_all_it_started(tmp_path: Path) -> None:
    # A daemon: a child in a session of its own, whose parent has ended.
    daemon = (
        "import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n    time.sleep(60)\n  os._exit(0)\n"
    )
    program = f"{daemon}while True: pass"
    command = [sys.executable, "-c", program]
    with running(command, os.environ, 1, CORES, tmp_path / "log", lambda: True) as server:
        patience = time.monotonic() + 60  # the machine may be busy with something else
        while (len(server.pids) != 2 or server.cpu_s() <= 0.1) and time.monotonic() < patience:
            time.sleep(0.05)
        pids = server.pids
        assert len(pids) == 2
        assert server.cpu_s() > 0.1
        assert server.rss_bytes() > 0
        assert server.strays(CORES) == []
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.slow
def test_server_whose_main_thread_has_ended_is_gone_too(tmp_path: Path) -> None:
    # It looks like a zombie, lives on in its other thread, and has a child.
    program = (
        "import ctypes, os, signal, threading, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if os.fork() == 0:\n  time.sleep(60)\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\nctypes.CDLL(None).syscall(60, 0)"
    )
    started = time.monotonic()
    command = [sys.executable, "-c", program]
    with running(command, os.environ, 1, CORES, tmp_path / "log", lambda: time.monotonic() > started + 0.6) as server:
        while len(server.pids) != 2 and time.monotonic() < started + 60:  # the machine may be busy with something else
            time.sleep(0.05)
        pids = server.pids
        assert len(pids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no model there')"]
    with (
        pytest.raises(DidNotStart, match="no model there"),
        running(command, os.environ, 1, CORES, tmp_path / "log", lambda: False),
    ):
        pass


def test_server_whose_keeper_is_slow_has_not_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = tmp_path / "keeper.py"  # as on a busy machine: it takes a while until the server is there
    real = str(BENCHMARKS / "bench" / "keeper.py")
    keeper.write_text(f"import runpy, time\ntime.sleep(0.5)\nrunpy.run_path({real!r}, {{}}, '__main__')")
    monkeypatch.setattr("bench.servers._KEEPER", keeper)
    started = tmp_path / "started"
    command = [sys.executable, "-c", f"import pathlib, time\npathlib.Path({str(started)!r}).touch()\ntime.sleep(60)"]
    with running(command, os.environ, 1, CORES, tmp_path / "log", started.exists) as server:
        assert server.pids


def test_killed_benchmark_leaves_no_server(tmp_path: Path) -> None:
    program = (
        "import os, sys, time\nfrom pathlib import Path\nfrom bench.servers import running\n"
        "with running([sys.executable, '-c', 'import time; time.sleep(60)'], os.environ, 1, {0}, "
        "Path(sys.argv[1]), lambda: True) as server:\n"
        "    print(server._keeper.pid, flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "log")],
        env={**os.environ, "PYTHONPATH": str(BENCHMARKS)},
        stdout=subprocess.PIPE,
    ) as bench:
        assert bench.stdout is not None
        keeper = int(bench.stdout.readline())
        deadline = time.monotonic() + 10
        while not descendants(keeper) and time.monotonic() < deadline:
            time.sleep(0.02)  # the keeper starts the server in its own time
        assert descendants(keeper)
        bench.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{keeper}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{keeper}").exists()


def test_ports_are_free() -> None:
    assert free_port() != 0


RECORD = Record(
    machine={"cpu": "A | B", "cores": 2, "memory_gb": 23.5, "features": ["avx2"], "system": "Linux", "python": "3.11"},
    versions={"openvino": "1"},
    date="2026-01-01 00:00 UTC",
    commit="abc",
    seeds={"load": 0},
    checks=(
        judged("1.a", "ours against theirs", ">= 2", [2.1, 2.2, 2.3]),
        verdict("1.b", "p99", "<= 100", 1234.5, None, 1, unit="ms"),
        Check("1.c", "Ray", "x", ">= 15", None, None, 0, False, "it cannot be installed"),
    ),
    data={
        "tables": [
            {"title": "rates", "columns": ["server", "rps"], "rows": [["ours", 74812.3], ["Ray", None]], "note": ""}
        ]
    },
)


def test_page_shows_every_check_and_table(tmp_path: Path) -> None:
    RECORD.save(tmp_path / "serve.json")
    page = render.render([("serve", Record.load(tmp_path / "serve.json"))])
    assert "| 1.a | ours against theirs | >= 2 x | 2.2 [2.1, 2.3] | 3 | yes |" in page
    assert "| 1.b | p99 | <= 100 ms | 1,230 | 1 | **no** |" in page
    assert "| 1.c | Ray | >= 15 x | – | 0 | **no** |" in page
    assert "- 1.c: it cannot be installed" in page
    assert "| ours | 74,800 |\n| Ray | – |" in page
    assert "### Rates" in page


@pytest.mark.slow
def test_the_load_benchmark_simulates_and_searches_in_virtual_time(tmp_path: Path) -> None:
    """What of it measures no time, from end to end: a record with its checks, which renders."""
    out = tmp_path / "load.json"
    command = [sys.executable, str(BENCHMARKS / "load.py"), "--only", "3,v", "--runs", "8", "--lengths", "5"]
    subprocess.run([*command, "--searches", "2", "--workers", "1", "--out", str(out)], check=True, capture_output=True)
    found = Record.load(out)
    ids = [check.id for check in found.checks]
    assert {"3.false.sequential.M/D/1", "3.true.fixed.M/D/1 in bursts", "4.virtual.spread"} <= set(ids)
    assert sum(id.startswith("3.refuted.") for id in ids) == sum(id.startswith("3.false.") for id in ids) == 12
    assert all(check.value is not None for check in found.checks)
    assert "How long a window has to be" in render.render([("load", found)])


def test_what_inexact_training_costs_is_judged_by_pairs() -> None:
    found = [
        Trained(option, seed, 0.8 + 0.02 * seed - (0.03 if option == "fp16" else 0.0), 4000 * 10**6, 100)
        for option in OPTIONS
        for seed in range(3)
    ]
    checks, tables = judge(found)
    assert [check.id for check in checks] == ["fp16", "bf16", "powersgd", "local-sgd", "diloco"]
    assert checks[0].value == pytest.approx(3.0)
    assert checks[0].interval == (pytest.approx(3.0), pytest.approx(3.0))  # seeds differ by more, but in pairs
    assert [check.holds for check in checks] == [False, True, True, True, True]
    assert tables[0].rows[0] == ("exact", pytest.approx(82.0), None, None, 40.0)


def test_page_is_what_the_results_say() -> None:
    assert subprocess.run([sys.executable, str(BENCHMARKS / "render.py"), "--check"]).returncode == 0


@pytest.mark.long
@pytest.mark.slow
def test_the_benchmark_of_compression_judges_and_times_shapes(tmp_path: Path) -> None:
    out = tmp_path / "compress.json"
    command = [sys.executable, str(BENCHMARKS / "compress.py"), "--only", "shapes", "--side", "16"]
    command += ["--blocks", "2", "--seconds", "0.01", "--batch", "2", "--calibration", "4"]
    subprocess.run([*command, "--work", str(tmp_path / "work"), "--out", str(out)], check=True, capture_output=True)
    found = Record.load(out)
    ids = {check.id for check in found.checks}
    assert {"1.16.openvino.int8", "1.16.onnxruntime.all", "1.16.size"} <= ids
    assert all(check.why for check in found.checks if not check.holds)
    assert "dense layer of rank 32" in render.render([("compress", found)])


@pytest.mark.timeout(900)
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("part", ["fashion", "distil"])
def test_the_benchmark_of_compression_trains_and_judges(part: str, tmp_path: Path) -> None:
    out = tmp_path / "compress.json"
    command = [sys.executable, str(BENCHMARKS / "compress.py"), "--only", part]
    command += ["--samples", "256", "--share", "0.1", "--seeds", "2"]
    done = subprocess.run(
        [*command, "--work", str(tmp_path / "work"), "--out", str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = Record.load(out)
    wanted = {
        "distil": {"2.gain.tenth", "2.gain.all"},
        "fashion": {f"1.fashion.{of}" for of in ("parameters", "size", "drop", "throughput")},
    }
    assert {check.id for check in found.checks} == wanted[part]
    assert all(check.value is not None for check in found.checks)
    assert all(check.why for check in found.checks if not check.holds)
    assert render.render([("compress", found)])
