"""The table at the end of a run, and numbers in words."""

from __future__ import annotations

import msgspec
import pytest
from runs import make_plan, printed

from rushhour.errors import PlanError
from rushhour.goal import SLO
from rushhour.plan import Policy
from rushhour.report import SummaryTable, wording


def test_the_summary_fits_80_columns_without_colour() -> None:
    text = printed(make_plan())
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "\x1b" not in text
    for said in (
        "9,120/s",
        "388/s",
        "24×",
        "90.52%",
        "0.42 points",
        "2.79 million",
        "2.90 MB",
        "3.9× less",
        "openvino",
    ):
        assert said in text


def test_the_summary_of_a_nearest_miss_says_so() -> None:
    text = printed(make_plan(feasible=False, baseline_capacity_rps=0.0, baseline_p99_ms=None))
    assert "NEAREST MISS" in text
    assert "nearest miss" in text
    assert "no rate within the SLO" in " ".join(text.split())


def test_the_summary_keeps_brackets_of_a_name() -> None:
    odd = msgspec.structs.replace(make_plan().goal, slo=SLO.parse("p95<800us"))
    assert "p95<800us" in printed(make_plan(goal=odd))
    with pytest.raises(PlanError, match="has no evidence"):
        SummaryTable(make_plan(evidence=None))


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.0, "0"), (9.996, "10.0"), (41.23, "41.2"), (1234.5, "1,230"), (-0.004, "−0.00400"), (0.0123, "0.0123")],
)
def test_numbers_have_three_digits(value: float, said: str) -> None:
    assert wording.number(value) == said


def test_words_for_numbers() -> None:
    assert wording.rate(9120.4) == "9,120/s"
    assert wording.rate(12.345) == "12.3/s"
    assert wording.rate(None) == "not measured"
    assert wording.drop(-0.0012, "accuracy") == "−0.12 points"
    assert wording.drop(-0.00001, "accuracy") == "0.00 points"
    assert wording.factor(10.0, 0.0) == ""
    assert wording.factor(2.56, 1.0) == "2.6×"
    assert wording.factor(9120.0, 388.0) == "24×"
    assert wording.size(512) == "512 B"
    assert wording.amount(999) == "999"
    assert wording.milliseconds(None) == "insufficient samples"
    assert wording.policy(Policy(streams=1, threads=2)) == "1 stream × 2 threads, one at a time"
