"""`tune --ladder`: which of the measured candidates the server moves between."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from test_front import state
from test_tune import Load, answering, searched

from rushhour.compress import judge
from rushhour.ladder import WINDOW, LadderPoint
from rushhour.measurement import Accuracy
from rushhour.plan import Plan
from rushhour.serve.scheduling.account import Account
from rushhour.task import Task
from rushhour.tune import TuneSettings
from rushhour.tune.ladder import Rung, chosen_rungs, in_layout, window_of


def rung(name: str, accuracy: float, upper: float, rps: float) -> Rung:
    drop = max(0.0, 0.93 - accuracy)
    judged = Accuracy("accuracy", accuracy, (0.0, 1.0), 1000, "test", drop, (drop, upper))
    return Rung(state(name, accuracy), rps, judged)


def names(rungs: Sequence[Rung]) -> list[str]:
    return [each.state.candidate.bundle for each in rungs]


def test_each_point_is_less_accurate_and_clearly_faster_than_the_one_before() -> None:
    found = chosen_rungs(
        [
            rung("small", 0.90, 0.04, 4000),
            rung("whole", 0.93, 0.0, 1000),
            rung("hardly", 0.925, 0.008, 1200),
            rung("half", 0.92, 0.012, 2000),
            rung("slower", 0.91, 0.03, 1900),
            rung("wild", 0.5, 0.5, 90_000),
        ],
        0.01,
    )
    assert names(found) == ["whole", "half", "small"], "half of all answers wrong is no way to spend one point"


def test_the_first_is_within_the_budget_and_without_a_second_there_is_none() -> None:
    assert names(chosen_rungs([rung("noisy", 0.93, 0.02, 900), rung("sure", 0.92, 0.01, 1000)], 0.01)) == ["sure"]
    assert chosen_rungs([rung("all", 0.90, 0.04, 1000)], 0.01) == []
    assert names(chosen_rungs([rung("whole", 0.93, 0.0, 1000), rung("some", 0.9, 0.04, 9000)], 0.0)) == ["whole"]


def test_of_many_points_those_stay_that_are_far_from_their_neighbours() -> None:
    rates = [1000, 1300, 4000, 5200, 16_000, 64_000]
    found = chosen_rungs([rung(str(n), 0.93 - 0.001 * n, 0.002 * n, rps) for n, rps in enumerate(rates)], 0.01)
    assert len(found) == 4
    assert (found[0].rps, found[-1].rps) == (1000, 64_000)


def test_the_account_of_a_fast_server_lasts_for_a_rush() -> None:
    def points(rps: float) -> list[LadderPoint]:
        return [
            LadderPoint("whole", 16, rps / 8, 0.93, 0.0, (0.0, 0.0)),
            LadderPoint("small", 16, rps, 0.90, 0.03, (0.02, 0.04)),
        ]

    assert window_of(points(1000.0), 1) == WINDOW, "a slow one keeps the usual window"
    rush = 10 * 8 * 13_530  # ten seconds of requests of eight samples
    assert not Account(0.03, WINDOW).allows(rush, 0.04), "all of a short window would be over the budget"
    assert Account(0.03, window_of(points(13_530.0), 8)).allows(rush, 0.04)


def test_what_is_not_in_the_winners_layout_is_put_into_it() -> None:
    winner = state("int8", 0.9, precision="int8", predicted=900.0)
    same = state("reference", 0.93, predicted=300.0)
    other = state("small", 0.8, predicted=5000.0, fate="over budget")
    other.candidate = other.candidate.with_layout(2, 1, 1)
    failed = state("broken", 0.9, fate="failed")
    found = {each.candidate.bundle: each for each in in_layout([winner, same, other, failed], winner)}
    assert found["int8"] is winner
    assert found["reference"] is same
    assert found["small"].candidate.layout == winner.candidate.layout
    assert found["small"].predicted is None, "it was predicted in another layout"
    assert set(found) == {"int8", "reference", "small"}


def of(plan: Plan) -> list[tuple[str, float]]:
    bundles = {variant.name: variant.bundle for variant in plan.variants}
    return [(bundles[point.variant], point.accuracy_drop) for point in plan.ladder]


@pytest.mark.parametrize(("wrong", "served"), [(2, "bundles/int8"), (15, "bundles/reference")])
def test_a_search_gives_its_plan_a_ladder_also_of_what_is_over_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: int, served: str
) -> None:
    outputs = answering({"tiny-int8": {"validation": wrong, "test": wrong}})
    settings = TuneSettings(ladder=True)
    plan = searched(tmp_path, Load(), monkeypatch, settings=settings, outputs=outputs, budget="10%")
    assert plan.variants[0].bundle == served, "what is served without its ladder keeps the budget by itself"
    assert of(plan) == [("bundles/reference", 0.0), ("bundles/int8", pytest.approx(wrong / 100))]
    assert plan.ladder[0].rate_rps < plan.ladder[1].rate_rps
    assert plan.ladder[1].measured == "test part, 100 samples"
    assert plan.evidence is not None
    assert plan.evidence.decisions[-1].step == "ladder"
    assert {point.variant for point in plan.operating_points} == {plan.variants[0].name}
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").ladder == plan.ladder
    again = Load()
    assert (
        searched(tmp_path, again, monkeypatch, settings=settings, outputs=outputs, budget="10%").ladder == plan.ladder
    )
    assert again.windows == 0


def test_without_the_option_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert searched(tmp_path, Load(), monkeypatch, outputs=answering({})).ladder == ()


def test_drops_by_class_add_up_to_the_drop() -> None:
    task = Task.classification(("a", "b", "c"))
    random = np.random.default_rng(0)
    targets = random.integers(0, 3, 3000)
    reference, changed = np.eye(3)[targets].astype(np.float32), np.eye(3)[targets].astype(np.float32)
    wrong = (targets == 1) & (random.random(3000) < 0.3)
    changed[wrong] = [0, 0, 1]
    found = judge(task, "test", targets, changed, reference)
    assert found.class_drops[:2] == (0.0, 0.0), "who is told a or b is told so rightly"
    assert found.class_drops[2] == pytest.approx(wrong.sum() / ((targets == 2).sum() + wrong.sum()), abs=1e-6)
    answered = np.bincount(changed.argmax(axis=1), minlength=3) / 3000
    assert (answered * found.class_drops).sum() == pytest.approx(found.drop, abs=1e-5)
    assert judge(task, "test", targets, reference, reference).class_drops == ()
    unlabelled = judge(task, "test", np.empty((3000, 0)), changed, reference)
    assert unlabelled.class_drops == found.class_drops, "the reference is always right here"
