"""What a change of the goal would buy, and what it would take where nothing meets it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from test_prediction import Timed, window
from test_tune import Load, answering, searched

from rushhour.api.values import read_budget
from rushhour.errors import GoalError
from rushhour.goal import SLO, AccuracyBudget, Goal
from rushhour.measurement import Accuracy, Measurement, Outcome
from rushhour.plan import Plan, Policy, Relaxation, Trial
from rushhour.records.journal import Journal
from rushhour.report import wording
from rushhour.system.machine import cores
from rushhour.tune.answer import unmeasured
from rushhour.tune.relaxations import relaxations
from rushhour.tune.space import Candidate
from rushhour.tune.state import CandidateState


def predictor(tmp_path: Path, slo: SLO) -> Timed:
    """Of engines that take 350 µs for a sample of f32 on a core, 100 µs of int8."""
    return Timed(Journal(tmp_path / "journal.jsonl"), {}, slo, 0.05, ())


def state(bundle: str = "reference", drop: tuple[float, float] = (0.0, 0.0), **known: Any) -> CandidateState:
    candidate = Candidate(bundle, "0", "openvino", "int8" if bundle == "int8" else "f32", Policy(1, 2, 1, max_batch=4))
    accuracy = Accuracy("accuracy", 0.9 - drop[0], (0.8, 1.0), 1000, "validation", drop[0], (0.0, drop[1]))
    return CandidateState(candidate, accuracy=accuracy, **known)


def found(
    tmp_path: Path, winner: CandidateState, others: list[CandidateState], ended: tuple[Trial, ...] = (), **goal: Any
) -> dict[str, Relaxation]:
    slo = SLO.parse(goal.get("slo", "p99<50ms"))
    model = predictor(tmp_path, slo)
    for each in (winner, *others):
        each.predicted = model.capacities_under([each], slo)[0]
    changes = relaxations(
        *(winner, [winner, *others], ended, Goal(slo, AccuracyBudget(0.01)), model), feasible=goal.get("feasible", True)
    )
    return {f"{each.what} {each.to}": each for each in changes}


def test_a_limit_that_no_rate_holds_is_relaxed_to_the_smallest_that_one_does(tmp_path: Path) -> None:
    """A sample alone takes 0.66 ms, and 0.31 ms beside the engine."""
    winner = state(capacity=0.0, fate="won")
    changes = found(tmp_path, winner, [], slo="p99<0.5ms", feasible=False)
    (only,) = changes.values()
    assert (only.what, only.to, only.kind) == ("limit", "p99<1ms", "predicted")
    assert 0 < only.capacity_rps < 3000
    assert changes.keys() == {"limit p99<1ms"}, "twice the processes make no sample faster"


def test_a_window_shows_which_limit_would_have_held(tmp_path: Path) -> None:
    slow = [
        msgspec.structs.replace(window(rate, 0.5 * rate, ()), p99_ms=p99, outcome=Outcome.FAIL)
        for rate, p99 in ((800.0, 71.3), (500.0, 64.2), (300.0, None), (200.0, 1e6))
    ]
    winner = state(capacity=0.0, fate="won", windows=slow)
    changes = found(tmp_path, winner, [state("int8", (0.03, 0.04), fate="over budget")], feasible=False)
    (only,) = changes.values()
    assert (only.what, only.to, only.kind, only.capacity_rps) == ("limit", "p99<65ms", "measured", 500.0)
    assert wording.relaxation(only) == "p99<65ms: 500/s, measured", "predictions that were wrong are not repeated"


def test_a_feasible_plan_says_what_more_would_buy(tmp_path: Path) -> None:
    winner = state(capacity=4500.0, fate="won")
    over = [state("int8", (0.015, 0.0229), fate="over budget"), state("int8", (0.5, 0.6), fate="failed")]
    changes = found(tmp_path, winner, over)
    assert set(changes) == {"accuracy 2.3%", f"cores {2 * cores()} cores"}
    int8, more = changes.values()
    assert int8.capacity_rps > 2.5 * 4500, "scaled by what was measured over what was predicted"
    assert int8.candidate.startswith("int8@")
    assert more.capacity_rps == pytest.approx(9000, rel=0.1)
    assert wording.relaxation(int8).endswith("/s, predicted, by int8 on OpenVINO, 2 streams")
    assert wording.relaxation(int8).startswith("accuracy budget 2.3%: ")


def test_a_tight_limit_costs_capacity_and_a_modest_change_is_named(tmp_path: Path) -> None:
    changes = found(tmp_path, state(capacity=2000.0, fate="won"), [], slo="p99<2ms")
    (limit,) = (each for each in changes.values() if each.what == "limit")
    assert limit.to in ("p99<2.5ms", "p99<3ms")
    assert limit.capacity_rps >= 2200


def test_a_network_over_the_budget_before_the_search_counts_with_the_cost_of_serving(tmp_path: Path) -> None:
    shape = msgspec.structs.replace(
        unmeasured("prune-0.7", "over budget", "after 7 epochs of distillation"),
        accuracy_drop_interval=(0.01, 0.0212),
        predicted_rps=20_000.0,
    )
    late = msgspec.structs.replace(shape, fate="skipped")
    changes = found(tmp_path, state(capacity=4500.0, fate="won"), [], (shape, late))
    option = changes["accuracy 2.2%"]
    assert option.name == "prune-0.7"
    assert 4950 < option.capacity_rps <= 20_000


# In a search.


class Never(Load):
    """Load on servers that hold no rate; their p99 is 100 ms."""

    def measure(self, _: object, candidate: str, __: object, slo: SLO, **asked: Any) -> Measurement:
        window = super().measure(_, candidate, __, slo, **asked)
        return msgspec.structs.replace(
            window, outcome=Outcome.FAIL, late=500, p99_ms=100.0, p99_interval_ms=(90.0, 110.0)
        )


def changes_of(plan: Plan) -> list[str]:
    assert plan.evidence is not None
    return [wording.relaxation(each) for each in plan.evidence.relaxations]


def test_an_slo_that_no_plan_meets_ends_in_the_nearest_miss_and_what_it_would_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = searched(tmp_path, Never(), monkeypatch, outputs=answering({}))
    assert not plan.feasible
    (said,) = changes_of(plan)
    assert said.startswith("p99<100ms: ")
    assert said.endswith("/s, measured")


def test_an_artefact_over_the_budget_is_named_with_the_budget_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["rushhour.tune.relaxations"], "_WORTH", 1.5)
    wrong = answering({"tiny-int8": {"validation": 6}})
    plan = searched(tmp_path, Load(), monkeypatch, outputs=wrong, budget="5%")
    assert plan.feasible
    assert plan.variants[0].bundle == "bundles/reference"
    (said,) = (each for each in changes_of(plan) if each.startswith("accuracy budget"))
    assert "by int8 on OpenVINO" in said
    budget = AccuracyBudget.parse(said.removeprefix("accuracy budget ").partition(":")[0])
    again = searched(tmp_path / "again", Load(), monkeypatch, outputs=wrong, budget=str(budget))
    assert again.variants[0].bundle == "bundles/int8", "with that budget it is served"


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        ("0", "cannot use the duration '0': a duration is above 0"),
        ("-5m", "cannot use the duration '-5m'"),
        ("0s", "cannot use the duration '0s'"),
        ("1s", "cannot tune within 1 s: a single proof takes longer than that"),
        (1, "cannot tune within 1 s"),
    ],
)
def test_a_budget_that_cannot_be_is_refused_in_one_line(budget: str | float, says: str) -> None:
    with pytest.raises(GoalError, match=says) as refused:
        read_budget(budget)
    assert "\n" not in str(refused.value)
    assert read_budget("5m") == 300
