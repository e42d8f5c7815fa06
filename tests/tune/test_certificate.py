"""The certificate's bound: it holds as often as it says, on synthetic spaces whose best plan is known."""

from __future__ import annotations

import numpy as np
import pytest

from rushhour.tune.certificate import Option, Ratio, Regret, regret_of


def searched(seed: int, sigma: float, *, measured: int = 4) -> tuple[Regret, float]:
    """One search in a space of 27 candidates in three layouts, with eleven other batch bounds each.

    The three with the best predictions and the best of each other layout are raced, the winner's capacity and those of
    some others are measured, all within 2%.

    Returns:
        What the certificate says, and the true regret.
    """
    random = np.random.default_rng(seed)
    n, layouts = 27, np.arange(27) % 3
    predicted = 1000 * np.exp(random.uniform(-1, 0, n))
    part = sigma / np.sqrt(2)
    errors = random.normal(0, 0.3) + random.normal(0, part, 3)[layouts] + random.normal(0, part, n)
    true = predicted * np.exp(errors)
    others = random.uniform(0.5, 1.02, (n, 11))
    bounds = (others * np.exp(random.normal(0, max(0.02, sigma / 4), (n, 11)))).max(axis=1).clip(1)

    def seen(at: int) -> float:
        return float(true[at] * np.exp(random.normal(0, 0.02)))

    raced = sorted(
        {*np.argsort(-predicted)[:3].tolist()} | {int(np.argmax(predicted * (layouts == k))) for k in (0, 1, 2)}
    )
    throughput = {at: seen(at) for at in raced}
    winner = max(throughput, key=lambda at: throughput[at])
    loaded = {winner, *random.choice(n, measured - 1).tolist()} if measured > 1 else {winner}
    options = [
        Option(
            f"{at}",
            int(layouts[at]),
            float(predicted[at]),
            tuple((others[at] * predicted[at]).tolist()),
            seen(at) if at in loaded else None,
            0.02,
        )
        for at in range(n)
    ]
    ratios = (
        [Ratio(f"{at}", f"{winner}", throughput[at] / throughput[winner], 0.03) for at in raced if at != winner]
        if measured > 1
        else []
    )
    best = (true * bounds).max()
    return regret_of(options, ratios, f"{winner}", draws=1000), float(best / true[winner] - 1)


@pytest.mark.parametrize("sigma", [0.03, 0.1, 0.25])
def test_the_bound_holds_as_often_as_it_says(sigma: float) -> None:
    found = [searched(seed, sigma, measured=8) for seed in range(100)]
    held = sum(true <= said.bound for said, true in found)
    assert held >= 90, "of 100 bounds at 95%, 89 or fewer hold once in a hundred such tests"
    expected, true = np.mean([said.expected for said, _ in found]), np.mean([true for _, true in found])
    assert 0.5 * expected < true < 1.5 * expected
    assert all(said.residuals >= 4 for said, _ in found)
    assert np.median([said.sigma for said, _ in found]) == pytest.approx(sigma, rel=0.5)


def test_small_residuals_give_a_narrow_bound_and_large_ones_a_wide_one() -> None:
    narrow, middle, wide = (np.median([searched(seed, sigma, measured=8)[0].bound for seed in range(20)])
                            for sigma in (0.03, 0.1, 0.25))  # fmt: skip
    assert narrow < 0.07
    assert 1.3 * narrow < middle < 0.15
    assert 1.5 * middle < wide


def test_with_few_measurements_the_errors_are_those_of_earlier_runs() -> None:
    found, _ = searched(0, 0.03, measured=1)
    assert (found.sigma, found.residuals) == (0.2, 0)


def option(name: str, predicted: float, capacity: float | None = None, *others: float, layout: int = 0) -> Option:
    return Option(name, layout, predicted, others, capacity, 0.01)


def test_the_only_plan_has_no_regret() -> None:
    found = regret_of([option("one", 100.0, 90.0)], [], "one")
    assert (found.expected, found.bound) == (0.0, 0.0)


def test_another_batch_bound_can_be_better_and_most_often_is_not() -> None:
    found = regret_of([option("one", 100.0, 90.0, 99.0, 70.0)], [], "one")
    assert 0 < found.expected < 0.05 < found.bound < 0.15


def test_what_is_predicted_far_below_adds_nothing() -> None:
    assert regret_of([option("one", 1000.0, 900.0), option("two", 100.0)], [], "one").bound == 0


def test_a_race_decides_what_a_prediction_leaves_open() -> None:
    options = [option("one", 1000.0, 1000.0), option("two", 1000.0, layout=1)]
    open_ = regret_of(options, [], "one")
    beaten = regret_of(options, [Ratio("two", "one", 0.8, 0.02)], "one")
    assert open_.bound > 0.3
    assert beaten.bound == 0
    chained = regret_of(
        [*options, option("three", 1000.0, layout=2)],
        [Ratio("one", "two", 1.25, 0.02), Ratio("three", "two", 0.9, 0.02)],
        "one",
    )
    assert chained.bound == 0, "what is beaten by the beaten"


def test_an_error_that_all_share_is_no_regret() -> None:
    """Predictions that are too high by a third everywhere left a bound of a third."""
    options = [option(f"{at}", 1000.0 - at, 750.0 - at, layout=at % 3) for at in range(8)]
    assert regret_of(options, [], "0").bound < 0.05


def test_equal_arguments_give_equal_numbers() -> None:
    assert searched(3, 0.1) == searched(3, 0.1)


@pytest.mark.parametrize("options", [[], [option("two", 10.0, 10.0)], [option("one", 10.0)]])
def test_a_winner_that_is_not_there_or_not_measured_is_refused(options: list[Option]) -> None:
    with pytest.raises(ValueError, match="one must be among the options and measured"):
        regret_of(options, [], "one")
