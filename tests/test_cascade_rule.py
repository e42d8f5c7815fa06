"""The rule of a cascade: scores, which rows go on, and what the variants answer together."""

from __future__ import annotations

import json
import math
from pathlib import Path

import hypothesis.strategies as st
import msgspec
import numpy as np
import pytest
from hypothesis import given

from rushhour.cascade import SCORES, CascadeRule, CascadeStep, Score, confidence, why_no_score
from rushhour.errors import PlanError
from rushhour.goal import SLO, Goal
from rushhour.plan import Plan, Policy, Variant


def rule(*steps: CascadeStep, last: str = "large") -> CascadeRule:
    return CascadeRule(steps or (CascadeStep("small", "top", 1.0, 0.8),), last, "probabilities")


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def test_each_score_by_hand() -> None:
    answers = np.array([[0.7, 0.2, 0.1]])
    entropy = -sum(p * math.log(p) for p in (0.7, 0.2, 0.1))
    assert confidence(answers, "top") == pytest.approx([0.7])
    assert confidence(answers, "margin") == pytest.approx([0.7 / 0.9])
    assert confidence(answers, "entropy") == pytest.approx([1 - entropy / math.log(3)])


def test_a_temperature_divides_logits() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (50, 7))
    for score in SCORES:
        expected = confidence(softmax(logits / 2.5), score)
        np.testing.assert_allclose(confidence(softmax(logits), score, 2.5), expected, atol=1e-9)
        np.testing.assert_allclose(confidence(logits, score, 2.5, logits=True), expected, atol=1e-9)


@given(
    st.lists(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4), min_size=1, max_size=5),
    st.sampled_from(SCORES),
    st.floats(0.01, 100),
)
def test_every_score_is_a_share(answers: list[list[float]], score: Score, temperature: float) -> None:
    scores = confidence(np.array(answers, np.float32), score, temperature)
    assert ((scores >= 0) & (scores <= 1)).all()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_goes_on_and_changes_no_other_row(score: Score, value: float) -> None:
    answers = np.array([[0.98, 0.01, 0.01], [value, 0.1, 0.1], [0.4, 0.3, 0.3]], np.float32)
    step = CascadeStep("small", score, 1.0, 0.7)
    expected = [False, True, True]
    assert rule(step).goes_on(0, answers).tolist() == expected
    assert CascadeRule((step,), "large", "logits", logits=True).goes_on(0, answers)[1]


def test_thresholds_at_the_ends_keep_or_send_on_everything() -> None:
    answers = softmax(np.random.default_rng(1).normal(0, 2, (100, 5)))
    assert not rule(CascadeStep("small", "top", 1.0, 0.0)).goes_on(0, answers).any()
    assert rule(CascadeStep("small", "top", 1.0, 1.0)).goes_on(0, answers).all()


def test_rows_are_judged_alike_in_any_batch() -> None:
    answers = softmax(np.random.default_rng(2).normal(0, 2, (257, 10))).astype(np.float32)
    judge = rule(CascadeStep("small", "entropy", 1.7, 0.5))
    whole = judge.goes_on(0, answers)
    assert 0 < whole.sum() < len(whole)
    parts = [judge.goes_on(0, answers[at : at + size]) for at, size in ((0, 1), (1, 31), (32, 225))]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_three_variants_are_merged_row_by_row() -> None:
    sure, unsure = [0.9, 0.1], [0.6, 0.4]
    small = np.array([sure, unsure, unsure])
    middle = np.array([[0.0, 1.0], [0.05, 0.95], [0.5, 0.5]])
    large = np.array([[0.3, 0.7]] * 3)
    both = rule(CascadeStep("small", "top", 1.0, 0.8), CascadeStep("middle", "top", 1.0, 0.8))
    answers, by = both.merged((small, middle, large))
    np.testing.assert_array_equal(answers, [sure, [0.05, 0.95], [0.3, 0.7]])
    assert by.tolist() == [0, 1, 2]
    assert both.variants == ("small", "middle", "large")


@pytest.mark.parametrize(
    ("kind", "shape", "why"),
    [
        ("classification", (3,), ""),
        ("regression", (3,), "does not say how sure it is"),
        ("embedding", (384,), "does not say how sure it is"),
        ("classification", (1,), "two classes or more"),
        ("classification", (4, 4), "two classes or more"),
    ],
)
def test_tasks_without_a_score_are_named(kind: str, shape: tuple[int, ...], why: str) -> None:
    assert (why in why_no_score(kind, shape)) if why else why_no_score(kind, shape) == ""


def plan_with(cascade: CascadeRule | None) -> Plan:
    variants = tuple(Variant(name, name, "0" * 64, "openvino", "f32") for name in ("small", "large"))
    return Plan(Goal(SLO(99, 0.05)), variants, Policy(), cascade=cascade)


def test_a_plan_keeps_its_rule(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    plan_with(rule()).save(file)
    assert Plan.load(file).cascade == rule()
    plan_with(None).save(file)
    assert Plan.load(file).cascade is None


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"threshold": 1.2}, "<= 1"),
        ({"threshold": -0.1}, ">= 0"),
        ({"temperature": 0.0}, "> 0"),
        ({"score": "vibes"}, "vibes"),
        ({"variant": "nobody"}, "nobody"),
        ({"variant": "large"}, "twice"),
    ],
)
def test_a_plan_with_a_wrong_rule_is_refused_in_one_line(tmp_path: Path, wrong: dict[str, object], words: str) -> None:
    file = tmp_path / "plan.json"
    shown = json.loads(msgspec.json.encode(plan_with(rule())))
    shown["cascade"]["steps"][0] |= wrong
    file.write_bytes(msgspec.json.encode(shown))
    with pytest.raises(PlanError) as refused:
        Plan.load(file)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
