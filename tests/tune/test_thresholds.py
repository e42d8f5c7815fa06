"""Thresholds of a cascade: chosen with a guarantee, from recorded outputs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from rushhour.cascade import SCORES, CascadeRule, Score, fit_temperature
from rushhour.load.significance import upper_share
from rushhour.tune.thresholds import choose_threshold

BUDGET = 0.01


class World(NamedTuple):
    small: np.ndarray
    large: np.ndarray
    labels: np.ndarray

    def sample(self, n: int, seed: int) -> World:
        at = np.random.default_rng([seed, 9]).integers(0, len(self.labels), n)
        return World(self.small[at], self.large[at], self.labels[at])


def world(n: int, seed: int, *, small: float = 1.2, large: float = 2.2, classes: int = 6) -> World:
    """Two classifiers of simulated logits: each is surer and more often right where a sample is easy."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, n)
    easy = random.random(n) + 0.15

    def outputs(skill: float) -> np.ndarray:
        logits = random.normal(0, 1, (n, classes))
        logits[np.arange(n), labels] += 4 * skill * easy
        powers = np.exp(1.7 * logits)  # too sure of itself
        return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)

    return World(outputs(small), outputs(large), labels)


def true_drop(chosen: CascadeRule, of: World) -> float:
    answers, _ = chosen.merged((of.small, of.large))
    right = (of.large.argmax(axis=1) == of.labels).mean() - (answers.argmax(axis=1) == of.labels).mean()
    return float(right)


@pytest.mark.slow
def test_a_chosen_threshold_breaks_the_budget_no_more_often_than_its_confidence_says() -> None:
    everything = world(100_000, 0)
    draws = 60

    def breaks(error: float, scores: tuple[Score, ...]) -> int:
        broken = 0
        for seed in range(draws):
            part = everything.sample(1500, seed)
            found = choose_threshold(
                "small", part.small, part.large, part.large, part.labels, BUDGET, error=error, scores=scores
            )
            assert found is not None
            broken += true_drop(CascadeRule((found.step,), "large", "p"), everything) > BUDGET
        return broken

    # 8 of 60 would be seen in 1.5% of tests, if 5% of all thresholds broke the budget.
    assert breaks(0.05, SCORES) <= 7
    assert breaks(1.0, ("top",)) > 12, "without a confidence the luckiest threshold is chosen: this test sees it"


def test_fewer_samples_go_on_where_the_small_one_is_better_and_where_the_budget_is_larger() -> None:
    def escalated(skill: float, budget: float) -> float:
        part = world(6000, 3, small=skill)
        found = choose_threshold("small", part.small, part.large, part.large, part.labels, budget)
        assert found is not None
        assert found.drop <= found.highest_drop <= budget
        on = CascadeRule((found.step,), "large", "p").goes_on(0, part.small).mean()
        assert found.escalated == pytest.approx(on), "as the server will do it"
        return found.escalated

    assert escalated(1.6, 0.01) < escalated(1.2, 0.01) < escalated(0.6, 0.01)
    assert escalated(1.2, 0.02) < escalated(1.2, 0.01)


def test_a_small_variant_that_knows_nothing_sends_on_nearly_everything() -> None:
    part = world(4000, 5)
    random = np.random.default_rng(6).random(part.small.shape).astype(np.float32)
    found = choose_threshold(
        "small", random / random.sum(axis=1, keepdims=True), part.large, part.large, part.labels, BUDGET
    )
    assert found is not None
    assert found.escalated > 0.97


def test_no_threshold_is_accepted_where_the_large_one_misses_the_budget_or_samples_are_too_few() -> None:
    part, better = world(3000, 7), world(3000, 7, large=9.0)
    assert choose_threshold("small", part.small, part.large, better.large, part.labels, 0.001) is None
    few = part.sample(200, 0)
    assert choose_threshold("small", few.small, few.large, few.large, few.labels, BUDGET) is None


def test_without_labels_it_is_agreement_with_the_reference_that_counts() -> None:
    part = world(4000, 8)
    found = choose_threshold("small", part.small, part.large, part.large, None, BUDGET)
    assert found is not None
    answers, _ = CascadeRule((found.step,), "large", "p").merged((part.small, part.large))
    disagree = (answers.argmax(axis=1) != part.large.argmax(axis=1)).mean()
    assert found.drop == pytest.approx(disagree)
    assert disagree <= BUDGET


def test_the_temperature_is_found_again() -> None:
    random = np.random.default_rng(9)
    logits = random.normal(0, 2, (20_000, 5))
    powers = np.exp(logits)
    chances = powers / powers.sum(axis=1, keepdims=True)
    labels = (chances.cumsum(axis=1) < random.random((len(chances), 1))).sum(axis=1).clip(0, 4)
    for temperature in (0.5, 1.0, 3.0):
        assert fit_temperature(logits * temperature, labels, logits=True) == pytest.approx(temperature, rel=0.05)
    assert fit_temperature(chances, labels) == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize(
    ("k", "n", "error", "bound"), [(0, 299, 0.05, 0.00997), (2, 50, 0.025, 0.13714), (5, 5, 0.1, 1)]
)
def test_the_upper_bound_of_a_share_is_clopper_and_pearsons(k: int, n: int, error: float, bound: float) -> None:
    assert upper_share(k, n, error) == pytest.approx(bound, rel=1e-3)
