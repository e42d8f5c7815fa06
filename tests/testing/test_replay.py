"""Searches replayed on a record of measurements."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from rushhour.errors import EngineError
from rushhour.goal import SLO, AccuracyBudget, Goal
from rushhour.measurement import Measurement, Outcome
from rushhour.plan import Plan, Policy
from rushhour.records.journal import Journal
from rushhour.system.machine import cores
from rushhour.testing.measured import MeasuredSpace, invented_space, name_of
from rushhour.testing.replay import ReplayBench, replay
from rushhour.tune.space import Candidate

GOAL = Goal(SLO.parse("p99<50ms"), AccuracyBudget.parse("2%"))
SPACE = invented_space(cores(), GOAL)


def chosen(plan: Plan) -> str:
    variant, policy = plan.variants[0], plan.policy
    role = Path(variant.bundle).name
    layout = f"c{policy.cells}s{policy.streams}t{policy.threads}b{policy.max_batch}"
    return f"{role}/{variant.engine}/{variant.precision}/{layout}"


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    run = tmp_path_factory.mktemp("replay")
    return replay(SPACE, run, seed=0), run


def test_a_replayed_search_finds_a_plan_without_engines_servers_and_load(
    replayed: tuple[Plan, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("nothing is started for a replay")

    for module, name in (
        *(("search", "Generator"), ("bench", "served")),
        *(("engine_times", "open_engine"), ("speedometer", "open_engine")),
    ):
        monkeypatch.setattr(sys.modules[f"rushhour.tune.{module}"], name, never)
    monkeypatch.setattr(sys.modules["rushhour.tune.accuracy"], "outputs_of", never)
    again = replay(SPACE, tmp_path, seed=0)
    plan, _ = replayed
    assert plan.evidence is not None
    assert again.evidence is not None
    assert msgspec.structs.replace(again.evidence, at="") == msgspec.structs.replace(plan.evidence, at="")
    best = max(each.capacity_rps for each in SPACE.plans)
    assert SPACE.by_name[chosen(plan)].capacity_rps > 0.9 * best
    assert plan.feasible
    assert plan.evidence.capacity_rps == pytest.approx(SPACE.by_name[chosen(plan)].capacity_rps, rel=0.15)


def test_another_seed_draws_other_windows(replayed: tuple[Plan, Path], tmp_path: Path) -> None:
    _, run = replayed
    replay(SPACE, tmp_path, seed=1)
    throughputs = [
        [entry.reading.throughput_rps for entry in Journal(folder / "measurements.jsonl") if entry.phase == "push"
         and entry.reading.__class__.__name__ == "ClosedLoop"]
        for folder in (run, tmp_path)
    ]  # fmt: skip
    assert throughputs[0] != throughputs[1]


def test_a_killed_replay_goes_on_to_the_same_plan(replayed: tuple[Plan, Path], tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(_: Plan) -> None:
        raise Killed

    with pytest.raises(Killed):
        replay(SPACE, tmp_path, seed=0, so_far=kill)
    before = (tmp_path / "measurements.jsonl").read_bytes()
    plan, run = replayed
    again = replay(SPACE, tmp_path, seed=0)
    assert (again.variants, again.policy) == (plan.variants, plan.policy)
    assert (tmp_path / "measurements.jsonl").read_bytes().startswith(before)
    keys = [[(entry.phase, entry.subject, entry.detail, entry.key) for entry in Journal(folder / "measurements.jsonl")]
            for folder in (run, tmp_path)]  # fmt: skip
    assert keys[0] == keys[1]
    assert len(set(keys[1])) == len(keys[1])


def candidate(name: str) -> Candidate:
    plan = SPACE.by_name[name]
    cells, streams, threads = plan.layout
    policy = Policy(cells, streams, threads, max_batch=plan.max_batch)
    return Candidate(plan.bundle, "12345678", plan.engine, plan.precision, policy)


NAME = SPACE.plans[4].name


def windows(share: float, count: int = 40, **asked: float) -> list[Measurement]:
    bench = ReplayBench(SPACE)
    rate = share * SPACE.by_name[NAME].capacity_rps
    with bench.serve(candidate(NAME), "search") as server:
        return [
            server.open_window(f"number {number}", GOAL.slo, rate_rps=rate, seed=number, **(asked or {"n": 1500}))
            for number in range(count)
        ]


def test_late_requests_become_more_with_the_rate_as_they_did_when_it_was_measured() -> None:
    shares = [float(np.mean([each.late / each.n for each in windows(share)])) for share in (0.7, 0.9, 1.0, 1.1, 1.3)]
    assert shares == sorted(shares)
    assert shares[0] < 0.002
    assert shares[2] == pytest.approx(GOAL.slo.allowed_miss_rate, rel=0.5)
    assert shares[-1] > 0.3
    assert all(each.n == 1500 and len(each.blocks) == 20 for each in windows(1.0))


def test_proofs_pass_below_the_capacity_and_not_above() -> None:
    below = [each.outcome for each in windows(0.8, window_s=20.0, error=0.05)]
    above = [each.outcome for each in windows(1.1, window_s=20.0, error=0.05)]
    assert below.count(Outcome.PASS) > 36
    assert sum(outcome.refutes for outcome in above) > 36


def test_a_rate_far_above_all_recorded_ones_is_unstable() -> None:
    plan = SPACE.by_name[NAME]
    held = tuple(window for window in plan.windows if window.late <= 0.01 * window.n)
    plans = tuple(msgspec.structs.replace(each, windows=held) if each is plan else each for each in SPACE.plans)
    space = msgspec.structs.replace(SPACE, plans=plans)
    with ReplayBench(space).serve(candidate(NAME), "search") as server:
        window = server.open_window("?", GOAL.slo, rate_rps=2 * plan.capacity_rps, seed=0, n=1500)
    assert window.outcome is Outcome.UNSTABLE


def test_time_moves_on_by_what_a_window_would_have_taken() -> None:
    bench = ReplayBench(SPACE)
    with bench.serve(candidate(NAME), "search") as server:
        before = bench.clock.now()
        server.open_window("?", GOAL.slo, rate_rps=100.0, seed=0, n=2000, warmup_s=1.0)
        assert bench.clock.now() - before == pytest.approx(21.0)
        found = server.closed_window("?", concurrency=8, seconds=0.5, within_s=0.05)
        assert bench.clock.now() - before == pytest.approx(21.5)
    assert found.little == pytest.approx(1.0)


def test_what_was_not_measured_cannot_be_replayed() -> None:
    bench = ReplayBench(SPACE)
    missing = candidate(NAME).with_batch(7)
    with pytest.raises(EngineError, match="not in the measured space"), bench.serve(missing, "search"):
        pass
    other = msgspec.structs.replace(candidate(NAME), bundle="other")
    with pytest.raises(EngineError, match="not in the measured space"):
        bench.service_times(other)
    with pytest.raises(EngineError, match="not in the measured space"):
        bench.accuracy(other, "test")
    with pytest.raises(EngineError, match="of 99 cores"):
        ReplayBench(msgspec.structs.replace(SPACE, cores=99))


def test_service_times_are_those_of_the_batch_bounds_of_the_space() -> None:
    bench = ReplayBench(SPACE)
    assert bench.service_times(candidate(NAME).with_batch(64)).batch_sizes == (1, 4, 16)
    assert bench.service_times(candidate(NAME).with_batch(4)).batch_sizes == (1, 4), "as it would be served"


def test_a_space_is_kept_in_a_file(tmp_path: Path) -> None:
    SPACE.save(tmp_path / "space.json")
    again = MeasuredSpace.load(tmp_path / "space.json")
    assert again == SPACE
    assert len((tmp_path / "space.json").read_text().splitlines()) > len(SPACE.plans)
    assert name_of(candidate(NAME)) in again.by_name
