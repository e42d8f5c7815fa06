"""A plan with a ladder: what is written comes back, and what could not be served is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rushhour.errors import PlanError
from rushhour.goal import SLO, AccuracyBudget, Goal
from rushhour.ladder import LadderPoint
from rushhour.plan import Plan, Policy, Variant

VARIANTS = tuple(Variant(name, f"bundles/{name}", "0" * 64, "openvino", "f32") for name in ("whole", "half", "small"))
PLAN = Plan(Goal(SLO.parse("p99<50ms"), AccuracyBudget(0.01)), VARIANTS, Policy(streams=2))


def point(variant: str, **changes: Any) -> LadderPoint:
    known = {
        "whole": LadderPoint("whole", 8, 100.0, 0.93, 0.0, (0.0, 0.0), measured="test part, 10,000 samples"),
        "half": LadderPoint("half", 16, 200.0, 0.92, 0.01, (0.007, 0.013), class_drops=(0.0, 0.02)),
        "small": LadderPoint("small", 16, 400.0, 0.90, 0.03, (0.026, 0.034)),
    }
    return msgspec.structs.replace(known.get(variant, known["small"]), variant=variant, **changes)


ALL = [point("whole"), point("half"), point("small")]


def test_a_ladder_comes_back(tmp_path: Path) -> None:
    plan = PLAN.with_ladder(ALL, window=5000)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.schema == 2


def test_a_plan_of_the_first_schema_is_read_as_it_was(tmp_path: Path) -> None:
    content = json.loads(msgspec.json.encode(PLAN))
    for name in ("ladder", "accuracy_window"):
        del content[name]
    content |= {"schema": 1, "operating_points": [{"rate_rps": 9.0, "p50_ms": 1.0, "p99_ms": None, "outcome": "fail"}]}
    (tmp_path / "plan.json").write_text(json.dumps(content))
    plan = Plan.load(tmp_path / "plan.json")
    assert (plan.schema, plan.ladder, plan.operating_points[0].variant) == (1, (), "")
    assert plan.variants == VARIANTS
    assert plan.with_ladder(ALL).schema == 2, "an older program must not serve it without its ladder"


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ([point("whole")], "it has 1 point"),
        ([point("whole"), point("other")], "'other', and the plan's variants are half, small, whole"),
        ([point("whole"), point("half"), point("half", rate_rps=300.0, accuracy=0.9)], "'half' twice"),
        ([point("half"), point("whole")], "no less accurate"),
        ([point("whole"), point("half", rate_rps=100.0)], "carries 100 requests/s, no more than whole"),
        ([point("whole", rate_rps=0.0), point("half")], "the rate of whole is 0"),
        ([point("whole"), point("half", accuracy_drop=0.02)], "outside its interval of 0.007 to 0.013"),
        ([point("half"), point("small")], "its most accurate variant half may drop by 1.30%, and 1.00% is allowed"),
        (
            [point("whole"), point("half", accuracy_drop_interval=(0.0, 0.05)), point("small")],
            "the drop of small is at most 0.034, less than that of half",
        ),
    ],
)
def test_a_ladder_that_cannot_be_served(tmp_path: Path, points: list[LadderPoint], words: str) -> None:
    with pytest.raises(PlanError, match=words) as refused:
        PLAN.with_ladder(points)
    assert "\n" not in str(refused.value)
    content = json.loads(msgspec.json.encode(PLAN)) | {"ladder": msgspec.to_builtins(points)}
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(PlanError, match=words):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    "change",
    [{"max_batch": 0}, {"max_batch": 10**6}, {"rate_rps": -1.0}, {"rate_rps": "fast"}, {"accuracy_drop_interval": [0]}],
)
def test_a_number_out_of_range_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    points = [msgspec.to_builtins(point("whole")), msgspec.to_builtins(point("half")) | change]
    content = json.loads(msgspec.json.encode(PLAN)) | {"ladder": points}
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.load(tmp_path / "plan.json")


def test_the_cost_of_an_answer_follows_its_class_and_is_the_upper_end_on_average() -> None:
    half = point("half")
    assert half.upper_drop == 0.013
    assert half.charges == pytest.approx((0.003, 0.023))
    assert sum(half.charges) / 2 == pytest.approx(half.upper_drop)
    assert point("small").charges == ()
