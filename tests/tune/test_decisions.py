"""The decision journal: what a step costs, whoever ran it, and what a whole run says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from test_tune import Load, searched

from rushhour.clock import VirtualClock
from rushhour.load import Race
from rushhour.measurement import ClosedLoop
from rushhour.plan import Decision, Plan, Policy
from rushhour.records.journal import Journal
from rushhour.tune.decisions import Decisions
from rushhour.tune.space import Candidate
from rushhour.tune.state import CandidateState


def told(plan: Plan) -> tuple[Decision, ...]:
    assert plan.evidence is not None
    return plan.evidence.decisions


def test_a_decision_has_what_was_spent_since_the_one_before() -> None:
    decisions = Decisions()
    decisions.spend(1.5)
    decisions.load_test()
    decisions.spend(0.25)
    decisions.note("one", "this", "that", "so")
    decisions.load_test()
    assert decisions.load_tests == 2, "the one that no decision has yet counts"
    decisions.note("two", "", "", "")
    assert [(each.cost_s, each.load_tests) for each in decisions.made] == [(1.75, 1), (0, 1)]
    assert decisions.made[0] == Decision("one", "this", "that", "so", 1.75, 1)


def test_a_measurement_on_file_costs_what_it_took_and_once(tmp_path: Path) -> None:
    clock = VirtualClock()

    def take() -> ClosedLoop:
        clock.advance(3)
        return ClosedLoop(1, 10.0, 0.1)

    for _ in range(2):  # the second time it is answered from the file
        decisions = Decisions()
        journal = Journal(tmp_path / "measurements.jsonl", clock, decisions.spend)
        for _ in range(2):
            journal.measure("push", "one", "turn 0", ClosedLoop, take)
        decisions.note("race", "", "", "")
        assert decisions.made[0].cost_s == 3
    assert clock.now() == 3


def test_a_line_of_an_older_version_costs_nothing(tmp_path: Path) -> None:
    file = tmp_path / "measurements.jsonl"
    Journal(file).measure("push", "one", "turn 0", ClosedLoop, lambda: ClosedLoop(1, 10.0, 0.1))
    line = msgspec.json.decode(file.read_bytes())
    del line["took_s"]
    file.write_bytes(msgspec.json.encode(line) + b"\n")
    decisions = Decisions()
    again = Journal(file, spent=decisions.spend)
    again.measure("push", "one", "turn 0", ClosedLoop, lambda: pytest.fail("it is on file"))
    decisions.note("race", "", "", "")
    assert decisions.made[0].cost_s == 0


def test_what_was_made_counts_once_with_the_seconds_of_its_making(tmp_path: Path) -> None:
    clock = VirtualClock()

    def make(seconds: float) -> Iterator[str]:
        for name in ("first", "second"):
            clock.advance(seconds)
            yield name

    for seconds in (4.0, 0.0):  # the second time it is found on the disk
        decisions = Decisions(clock)
        for _ in range(2):
            assert decisions.made_in(tmp_path, lambda s=seconds: make(s), Path) == ["first", "second"]
        decisions.note("rung 1", "", "", "")
        assert decisions.made[0].cost_s == 8
    (tmp_path / "seconds.json").write_bytes(b"damaged")
    Decisions(clock).made_in(tmp_path, lambda: make(1), Path)
    assert msgspec.json.decode((tmp_path / "seconds.json").read_bytes()) == {"first": 1.0, "second": 1.0}


def test_candidates_that_differ_in_the_batch_bound_alone_are_told_apart() -> None:
    one, other = (
        CandidateState(Candidate("int8", "0" * 8, "openvino", "int8", Policy(streams=2, max_batch=bound)), rule=rule)
        for bound, rule in ((8, ""), (12, "forced test: one step from the leader"))
    )
    decisions = Decisions()
    decisions.raced(one, other, Race("slower", 0.9, (0.88, 0.92), 22, (1000.0, 900.0)))
    (said,) = decisions.made
    name = "int8 on OpenVINO, 2 streams, batches up to"
    assert said.seen == f"{name} 12 against {name} 8: 0.90x (0.88 to 0.92) in 22 pairs of windows"
    assert said.decided == f"{name} 8 leads"
    assert said.why == "significantly more answers in time (forced test: one step from the leader)"


@pytest.mark.slow
def test_a_run_says_each_step_with_its_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Load()
    plan = searched(tmp_path, load, monkeypatch)
    decisions = told(plan)
    assert list(dict.fromkeys(each.step for each in decisions)) == [
        "time",
        "accuracy",
        "probe",
        "predict",
        "race",
        "capacity",
        "confirm",
    ]
    assert all(each.seen and each.decided and each.why for each in decisions)
    assert sum(each.cost_s for each in decisions) == pytest.approx(load.clock.now()), "all windows, each once"
    races = [each for each in decisions if each.step == "race"]
    assert [each.load_tests for each in races] == [1] * len(races)
    assert sum(each.load_tests for each in decisions) > len(races) + 4
    (proof,) = [each for each in decisions if each.step == "confirm"]
    assert plan.evidence is not None
    assert proof.decided == f"{plan.evidence.capacity_rps:,.0f}/s proven"
