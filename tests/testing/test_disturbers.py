"""A host that is not quiet: neighbours that take their share, and waves that stretch every engine alike."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest

from rushhour.bundle import Bundle
from rushhour.clock import VirtualClock
from rushhour.engines import Engine, EngineConfig, open_engine
from rushhour.system.machine import cores
from rushhour.testing.bundles import tiny_bundle
from rushhour.testing.burner import bursts
from rushhour.testing.disturbers import Bursts, HostSpeed, SlowedEngine, compute, slowed_environment
from rushhour.testing.engines import EngineConformance
from rushhour.testing.fakes import FakeEngine
from rushhour.testing.host_speed import STEP_S, Recorded, TwoState, recordings


@pytest.mark.parametrize("share", [0.03, 0.08, 0.15])
def test_bursts_take_their_share_over_a_long_time(share: float) -> None:
    pauses, lengths = np.array(list(islice(bursts(0, share, 1), 20_000))).T
    assert lengths.sum() / (pauses.sum() + lengths.sum()) == pytest.approx(share, rel=0.05)
    assert lengths.max() == 1.0
    assert np.median(lengths) == pytest.approx(0.02, rel=0.05)


def test_each_core_has_bursts_of_its_own_and_each_seed_has() -> None:
    first, again, beside, other = (
        list(islice(bursts(core, 0.1, seed), 5)) for core, seed in [(0, 1), (0, 1), (1, 1), (0, 2)]
    )
    assert first == again
    assert first not in (beside, other)


def test_neighbours_burn_what_their_bursts_say_and_end_with_the_context() -> None:
    """By the CPU time of each, when its first bursts are over; how long that takes is the machine's affair."""
    with Bursts(0.5, seed=3) as neighbour:
        assert neighbour.how
        for pid, core in zip(neighbour.pids, sorted(os.sched_getaffinity(0)), strict=True):
            assert os.sched_getaffinity(pid) == {core}
            wanted = sum(length for _, length in islice(bursts(core, 0.5, 3), 4))
            while cpu_s(pid) < wanted:
                time.sleep(0.02)
    assert not any(Path(f"/proc/{pid}").exists() for pid in neighbour.pids)


def test_neighbours_end_with_a_parent_that_is_killed() -> None:
    program = (
        "import os, signal\nfrom rushhour.testing.disturbers import Bursts\n"
        "neighbour = Bursts(0.1).__enter__()\nprint(*neighbour.pids, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False).stdout
    pids = said.split()
    assert pids
    while any(Path(f"/proc/{pid}/stat").exists() and state(pid) != "Z" for pid in pids):
        time.sleep(0.05)


def state(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_no_share_is_nobody_and_a_whole_core_is_refused() -> None:
    with Bursts(0.0) as neighbour:
        assert neighbour.pids == ()
    with pytest.raises(ValueError, match="share=1"):
        Bursts(1)


def test_two_states_last_as_long_as_they_should_and_recordings_loop() -> None:
    speeds = TwoState().speeds(20_000, 10, np.random.default_rng(0))
    assert set(np.unique(speeds)) == {0.7, 1.3}
    assert (np.diff(speeds, axis=0) != 0).mean() / STEP_S == pytest.approx(1 / 4, rel=0.1)
    curve = recordings()["one stream of two threads"]
    looped = Recorded().speeds(2 * len(curve), 3, np.random.default_rng(0))
    assert np.array_equal(looped[: len(curve)], looped[len(curve) :])
    assert np.allclose(np.sort(looped[: len(curve)], axis=0), np.sort(curve)[:, None])


@pytest.mark.parametrize("threads", [1, 2])
def test_waves_stretch_a_batch_by_their_factor_on_every_thread(threads: int) -> None:
    """Time is this test's own: batches take 20 ms, and what computes only says for how long."""
    clock, now, computed = VirtualClock(), [0.0], list[float]()

    def finish_later(seconds: float, finish: Callable[[], None]) -> None:
        now[0] += seconds
        finish()

    config = EngineConfig(engine="openvino", threads=threads, max_batch=4)
    plain = FakeEngine(config, service_s=lambda rows: 0.02 if paused is None else paused, schedule=finish_later)
    speed = HostSpeed(TwoState(swing=0.5), 3, clock)
    engine = SlowedEngine(plain, speed, computed.append, timer=lambda: now[0])
    paused = None
    run(engine, clock, speed, fast=True)
    assert not computed  # at the fastest it is as it is
    run(engine, clock, speed, fast=False)
    assert speed.now() == pytest.approx(1 / 3)
    assert computed == pytest.approx([0.04] * threads)
    paused = 1.0
    run(engine, clock, speed, fast=False)
    assert computed[threads:] == pytest.approx([0.04] * threads)  # what it waits for a core is not stretched
    engine.close()
    assert plain.closed


def run(engine: Engine, clock: VirtualClock, speed: HostSpeed, *, fast: bool) -> None:
    while (speed.now() == 1) is not fast:
        clock.advance(STEP_S)
    finished: SimpleQueue[BaseException | None] = SimpleQueue()
    engine.slots[0].start(2, finished.put)
    assert finished.get(timeout=30) is None


def test_what_is_stretched_is_computed_for_so_long() -> None:
    """On the thread's own CPU clock, and at least: hashing may be slower than at its best, never faster."""
    began = time.thread_time()
    compute(0.05)
    assert time.thread_time() - began > 0.04


class TestSlowedEngine(EngineConformance):
    config = EngineConfig(engine="openvino", streams=min(2, cores()), max_batch=5)

    @pytest.fixture
    def open_engine(self, bundle: Bundle) -> Iterator[Callable[[EngineConfig], Engine]]:
        with contextlib.ExitStack() as opened:

            def open_one(config: EngineConfig) -> Engine:
                engine = SlowedEngine(open_engine(bundle, config), HostSpeed(TwoState(), 1))
                opened.callback(engine.close)
                return engine

            yield open_one


_CHILD = """
import json, subprocess, sys
from pathlib import Path
from rushhour.bundle import Bundle
from rushhour.clock import VirtualClock
from rushhour.engines import EngineConfig, open_engine
from rushhour.testing.disturbers import CURVES, HostSpeed
assert "torch" not in sys.modules
engine = open_engine(Bundle.open(Path(sys.argv[1])), EngineConfig(engine="openvino"))
clock = VirtualClock()
speed, speeds = HostSpeed(CURVES["recorded"], 7, clock), []
for _ in range(50):
    clock.advance(0.4)
    speeds.append(speed.now())
print(json.dumps([type(engine).__name__, speeds]), flush=True)
engine.close()
if len(sys.argv) == 3:
    subprocess.run([sys.executable, "-c", sys.argv[2], sys.argv[1]], check=True)
"""


def test_a_command_and_its_children_have_the_same_waves_and_the_neighbours(tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "tiny")
    disturbed = [sys.executable, "-m", "rushhour.testing.disturbers", "--waves", "recorded", "--seed", "7"]
    command = [*disturbed, "--bursts", "0.03", "--", sys.executable, "-c", _CHILD, str(tmp_path / "tiny"), _CHILD]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    first, second = map(json.loads, done.stdout.splitlines())
    assert first == second
    assert first[0] == "SlowedEngine"
    assert len(set(first[1])) > 10
    assert "bursts of 3% of each core" in done.stderr


def test_surroundings_keep_what_is_there() -> None:
    found = slowed_environment("two-state", 1, {"PYTHONPATH": "mine", "HOME": "here"})
    assert found["HOME"] == "here"
    assert found["PYTHONPATH"].endswith(os.pathsep + "mine")
