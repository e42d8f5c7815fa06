"""`rushhour plan`: machines for a rate, from the Plan's capacity."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import run_of

import rushhour
from rushhour.cli import main
from rushhour.cluster import Node, Sizing, read_node, size
from rushhour.errors import GoalError, LoadError, PlanError, RushhourError
from rushhour.measurement import ServiceTimes
from rushhour.plan import EngineName, Evidence, Plan
from rushhour.testing.bundles import tiny_bundle

TIMES = ServiceTimes((1, 2, 4, 8), (0.001, 0.0014, 0.0022, 0.0038), (2000.0, 2857.0, 3636.0, 4210.0))
RATE = 3000.0
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def plan_of(folder: Path, **changes: Any) -> Plan:
    """A Plan of 2 cores with 2 streams."""
    run_of(folder)
    plan = Plan.load(folder / "plan.json")
    known = {"capacity_rps": RATE, "capacity_interval_rps": (2700.0, 3600.0), "proven": True, "service_times": TIMES}
    assert plan.evidence is not None
    plan = msgspec.structs.replace(plan, evidence=msgspec.structs.replace(plan.evidence, **known | changes))
    plan.save(folder / "plan.json")
    return plan


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return plan_of(tmp_path_factory.mktemp("run") / "run")


def test_machines_like_the_plans_carry_what_was_measured(plan: Plan) -> None:
    found = size(plan, 100_000, Node(2, watts=90.0))
    assert (found.machine_rps, found.kind) == (RATE, "proven")
    assert (found.carrying, found.spare, found.machines) == (34, 1, 35)
    assert found.machines_interval == (math.ceil(100_000 / 3600) + 1, math.ceil(100_000 / 2700) + 1)
    assert (found.processes, found.cores, found.watts) == (35, 70, 35 * 90.0)
    assert size(plan, RATE, Node(2), failures=0).machines == 1
    assert size(plan, RATE + 1, Node(2), failures=0).machines == 2


def test_what_is_not_known_is_left_open(tmp_path: Path) -> None:
    guess = plan_of(tmp_path / "run", proven=False, capacity_interval_rps=None, service_times=None)
    found = size(guess, 10_000, Node(2))
    assert (found.kind, found.machines_interval, found.watts) == ("estimated", None, None)
    half = size(guess, 10_000, Node(1, speed=0.5))
    assert half.machine_rps == RATE / 4
    assert any("scaled by cores and speed" in note for note in half.notes)


def test_other_machines_are_predicted(plan: Plan) -> None:
    def carries(**node: Any) -> float:
        found = size(plan, 1e5, Node(**node))
        assert found.kind == "predicted"
        return found.machine_rps / RATE

    assert carries(cores=4) == pytest.approx(2, rel=0.03)
    assert carries(cores=16) == pytest.approx(8, rel=0.03)
    # One core does without the other's queue, and its only stream has the event loop to itself.
    assert 0.4 < carries(cores=1) <= 0.6
    assert 0.4 < carries(cores=2, speed=0.5) <= 0.5
    # Two processes on two cores share neither a queue nor an event loop; four there take turns, with smaller batches.
    assert 0.95 < carries(cores=2, processes=2) <= 1.15
    assert carries(cores=2, processes=4) == pytest.approx(0.9 * carries(cores=2, processes=2))


def test_a_batch_waits_for_the_event_loop_where_it_cannot_wait_in_the_engine(plan: Plan) -> None:
    def carry_two(engine: EngineName) -> float:
        assert plan.evidence is not None
        variant = msgspec.structs.replace(plan.variants[0], engine=engine)
        other = msgspec.structs.replace(plan, variants=(variant,))
        return size(other, 1e5, Node(2, processes=2)).machine_rps / RATE

    assert carry_two("openvino") == carry_two("onnxruntime") < carry_two("torch"), "it gains an event loop of its own"


@pytest.mark.slow
def test_two_processes_are_predicted_from_one_as_they_were_measured(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plans of which both were put under load, on a machine with two cores, before full batches waited in the engine.
    The error was 21% in the median."""
    monkeypatch.setattr("rushhour.cluster.sizing._goes_ahead", lambda _: False)
    space = json.loads((RESULTS / "tune_space.json").read_text())
    measured = {(one["bundle"], one["engine"], one["precision"], one["max_batch"], *one["layout"]): one["capacity_rps"]
                for one in space["plans"]}  # fmt: skip
    errors = []
    for (*what, max_batch, cells, streams, threads), capacity_rps in measured.items():
        other = (*what, max_batch, streams, cells, threads)
        if (cells, streams, threads) != (1, 2, 1) or other not in measured:
            continue
        times = msgspec.convert({**space["service"]["/".join(what) + "/c1s2t1"], "kind": "service_times"}, ServiceTimes)
        assert plan.evidence is not None
        one = msgspec.structs.replace(
            plan,
            policy=msgspec.structs.replace(plan.policy, streams=2, max_batch=max_batch),
            evidence=msgspec.structs.replace(plan.evidence, capacity_rps=capacity_rps, service_times=times),
        )
        errors.append(abs(size(one, capacity_rps, Node(2, processes=2)).machine_rps / measured[other] - 1))
    assert len(errors) == 30
    assert sorted(errors)[15] < 0.15


@given(rate=st.floats(1, 1e7), other=st.floats(1, 1e7), failures=st.integers(0, 9))
def test_more_requests_never_take_fewer_machines(plan: Plan, rate: float, other: float, failures: int) -> None:
    low, high = (size(plan, each, Node(2), failures=failures) for each in sorted((rate, other)))
    assert low.machines <= high.machines
    assert low.carrying * RATE >= low.rate_rps
    assert low.machines_interval is not None
    assert low.machines_interval[0] <= low.machines <= low.machines_interval[1]


def arrivals(*parts: tuple[float, float]) -> np.ndarray:
    """Poisson arrivals at `rate` for `seconds`, one part after another."""
    random, found, begin = np.random.default_rng(0), [], 0.0
    for rate, seconds in parts:
        found.append(begin + np.sort(random.uniform(0, seconds, int(rate * seconds))))
        begin += seconds
    return np.concatenate(found)


def test_a_trace_needs_machines_for_its_rush(plan: Plan) -> None:
    steady = size(plan, 30_000, Node(2), trace=arrivals((500, 100)))
    assert steady.carrying <= 14, "chance is no burst"
    rush = size(plan, 30_000, Node(2), trace=arrivals((100, 80), (2100, 20)))
    assert rush.peak_rps > 3.8 * 30_000
    assert 40 <= rush.carrying <= 46
    # Whoever comes in 0.2% of the time may be late at p99.
    spike = size(plan, 30_000, Node(2), trace=arrivals((500, 99.8), (2000, 0.2)))
    assert spike.carrying <= steady.carrying + 1


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("cores", "'cores' is none of its settings"),
        ("core=4", "'core=4' is none of its settings"),
        ("cores=4,cores=8", "'cores' is given twice"),
        ("cores=0", "must be above 0"),
        ("cores=2.5", "'2.5' is no whole number"),
        ("speed=fast", "'fast' is no number"),
        ("speed=nan", "must be above 0"),
        ("watts=-1", "must be above 0"),
    ],
)
def test_what_is_no_machine_is_refused(plan: Plan, text: str, why: str) -> None:
    assert plan.evidence is not None
    with pytest.raises(GoalError, match="cannot read the machine") as refused:
        read_node(text, plan.evidence.machine)
    assert why in str(refused.value)


def test_a_machine_is_read(plan: Plan) -> None:
    assert plan.evidence is not None
    assert read_node("", plan.evidence.machine) == Node(2)
    assert read_node(" cores=16, watts=250 ", plan.evidence.machine) == Node(16, watts=250.0)


def test_what_cannot_be_planned_is_said(tmp_path: Path) -> None:
    plan_of(tmp_path / "none", capacity_rps=0.0)
    tiny_bundle(tmp_path / "bundle")
    (tmp_path / "trace.csv").write_text("5\n")
    plan_of(tmp_path / "run")
    for target, how, error, why in (
        ("none", {"rate": 10}, PlanError, "its SLO held at no rate"),
        ("bundle", {"rate": 10}, PlanError, "never measured under load"),
        ("nothing", {"rate": 10}, PlanError, "nothing"),
        ("run", {"rate": 0}, GoalError, "not above 0"),
        ("run", {"rate": math.nan}, GoalError, "not above 0"),
        ("run", {"rate": 1e15}, GoalError, "more than 10,000,000 machines"),
        ("run", {"rate": 10, "failures": -1}, GoalError, "below 0"),
        ("run", {"rate": 10, "trace": tmp_path / "trace.csv"}, LoadError, "at least two"),
    ):
        with pytest.raises(RushhourError) as refused:
            rushhour.size(tmp_path / target, **how)
        assert isinstance(refused.value, error)
        assert why in str(refused.value)
        assert "\n" not in str(refused.value)


def test_the_command_says_it_in_words_and_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan_of(tmp_path / "run", alone_rps=3300.0)
    file = tmp_path / "sizing.json"
    words = ["plan", str(tmp_path / "run"), "--rate", "100000", "--machine", "watts=90", "--json", str(file)]
    monkeypatch.setattr("sys.argv", ["rushhour", *words])
    main()
    said = capsys.readouterr().out
    assert said.splitlines()[0] == "100,000/s within p99<50ms: 35 machines (29 to 39)"
    assert "34 carry it, 1 more may fail" in said
    assert "together 35 processes, 70 cores; power: 3,150 W" in said
    written = json.loads(file.read_text())
    assert written["machines"] == 35
    assert written["machines_interval"] == [29, 39]
    found = rushhour.size(tmp_path / "run", rate=100_000, machine="watts=90")
    assert written == json.loads(json.dumps(found.as_dict())) | {"made_by": "rushhour"}
    assert isinstance(rushhour.size(tmp_path / "run", rate=1), Sizing)
    assert isinstance(Plan.load(tmp_path / "run" / "plan.json").evidence, Evidence)
