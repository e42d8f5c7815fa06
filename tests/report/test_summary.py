"""The table at the end of a run, and numbers in words."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from runs import CERTIFICATE, make_plan, make_run, printed

from rushhour.errors import PlanError
from rushhour.goal import SLO
from rushhour.plan import Policy, Relaxation
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


def test_where_the_plan_has_no_p99_that_of_the_window_at_its_capacity_is_said(tmp_path: Path) -> None:
    """It was called "insufficient samples", though a window had passed at this rate."""
    plan = make_plan(baseline_p99_ms=None)
    (row,) = [line for line in printed(plan, make_run(tmp_path, plan), width=200).splitlines() if "p99 at" in line]
    assert "insufficient" not in row
    assert row.count("n = ") == 2


def test_the_summary_says_how_good_the_answer_is() -> None:
    said = f"{CERTIFICATE.statement}."
    assert said in printed(make_plan(certificate=CERTIFICATE))
    assert said not in printed(make_plan(certificate=CERTIFICATE, feasible=False))
    assert "load tests" not in printed(make_plan())


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


CHANGES = (
    Relaxation("limit", "p99<75ms", 2100.0, "measured", "x", "int8 on OpenVINO"),
    Relaxation("accuracy", "2.3%", 5012.0, "predicted", "y", "prune-0.7 in int8 on OpenVINO"),
    Relaxation("cores", "4 cores", 3900.0, "predicted", "x", "int8 on OpenVINO"),
)


def test_the_summary_says_why_this_plan_and_what_more_would_buy() -> None:
    text = " ".join(printed(make_plan(choice="of 3 points of the Pareto front, this one", relaxations=CHANGES)).split())
    assert "Why this plan: of 3 points of the Pareto front, this one." in text
    assert (
        "If you allowed: p99<75ms: 2,100/s, measured; accuracy budget 2.3%: 5,012/s, predicted, by prune-0.7 in" in text
    )
    assert "4 cores: 3,900/s, predicted." in text
    assert "If you allowed" not in printed(make_plan())


def test_the_summary_of_a_nearest_miss_says_what_it_would_take() -> None:
    text = " ".join(printed(make_plan(feasible=False, relaxations=CHANGES)).split())
    assert "This plan is closest to the goal. It would take one of: p99<75ms: 2,100/s, measured;" in text
    only = " ".join(printed(make_plan(feasible=False, relaxations=CHANGES[:1])).split())
    assert "It would take p99<75ms: 2,100/s, measured." in only
    assert "Loosen the goal, or use more cores." in printed(make_plan(feasible=False))


def test_durations_and_shares() -> None:
    assert [wording.duration(seconds) for seconds in (0.0, 0.424, 38.2, 59.7, 250, 3600)] == [
        "0 s", "0.42 s", "38 s", "1 min", "4 min 10 s", "60 min",
    ]  # fmt: skip
    assert [wording.share(value) for value in (0.0, 0.0042, 0.0321, 0.25)] == ["0%", "0.4%", "3.2%", "25%"]
