"""The ladder in virtual time: the account holds for every window, and the controller neither sleeps nor oscillates."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rushhour.serve.scheduling.account import Account
from rushhour.serve.scheduling.controller import Controller, Load, Rung
from rushhour.testing.rushes import Answers, Step, arrivals, random_rates, rush

STEPS = (
    Step(0.010, 0.004, rate=150.0, drop=0.0),
    Step(0.006, 0.002, rate=300.0, drop=0.008),
    Step(0.003, 0.001, rate=600.0, drop=0.03),
)
"""Of one stream and batches of 8: 190, 364 and 727 samples a second, if there were no limit."""
LIMIT_S = 0.1
BUDGET = 0.01
DROPS = tuple(step.drop for step in STEPS)


def rushed(
    rates: Sequence[tuple[float, float]], *, seed: int = 0, window: int = 20_000, fixed: int | None = None
) -> Answers:
    return rush(arrivals(rates, seed), STEPS, limit_s=LIMIT_S, budget=BUDGET, window=window, fixed=fixed)


def most_in(times: Sequence[float], seconds: float) -> int:
    """The most of these times in any interval of that length."""
    return max((sum(begin <= time < begin + seconds for time in times) for begin in times), default=0)


# The account.


def highest_mean(costs: Sequence[float], window: int) -> float:
    sums = np.concatenate([[0.0], np.cumsum(costs)])
    return float((sums[window:] - sums[:-window]).max()) / window if len(costs) >= window else 0.0


BATCH = st.tuples(
    st.integers(1, 40), st.sampled_from([0.0, 0.004, 0.01, 0.02, 0.5, 1.0]), st.floats(0, 1), st.integers(0, 3)
)


@given(st.lists(BATCH, max_size=300), st.sampled_from([0.0, 0.003, 0.01, 0.3]), st.sampled_from([10, 100, 1500]))
def test_no_order_of_batches_spends_more_than_the_budget_in_any_window(
    batches: list[tuple[int, float, float, int]], budget: float, window: int
) -> None:
    """Whoever asks before each batch, and gives accurate answers where that is refused, keeps the promise."""
    account = Account(budget, window)
    flying: list[tuple[int, float, float]] = []
    costs: list[float] = []

    def end(index: int) -> None:
        rows, most, share = flying.pop(index)
        if share > 0.95:
            account.fail(rows, most)
            return
        account.end(rows, most, rows * most * share)
        costs.extend([most * share] * rows)

    for rows, most, share, other in batches:
        charge = most if account.allows(rows, most) else 0.0
        account.begin(rows, charge)
        flying.append((rows, charge, share))
        while len(flying) > other:
            end(other % len(flying))  # streams end in any order
    while flying:
        end(0)
    assert highest_mean(costs, window) <= budget + 1e-9
    assert account.answers == len(costs)
    assert account.spent == pytest.approx(sum(costs))


def test_what_is_within_the_budget_on_average_is_always_allowed() -> None:
    account = Account(0.01, 1000)
    for _ in range(500):
        assert account.allows(8, 0.01)
        account.begin(8, 0.01)
        account.end(8, 0.01, 0.08)
    assert account.mean == pytest.approx(0.01, rel=0.02)
    assert not account.allows(8, 0.0101)
    assert account.allows(10**9, 0.0)


def test_accuracy_that_was_spent_comes_back_with_accurate_answers_only() -> None:
    account = Account(0.01, 1000)
    given_ = 0
    while account.allows(10, 0.1):
        account.begin(10, 0.1)
        account.end(10, 0.1, 1.0)
        given_ += 10
    assert given_ == 100, "a tenth of the answers may cost ten times the budget"
    for _ in range(89):
        account.begin(10, 0.0)
        account.end(10, 0.0, 0.0)
    assert not account.allows(10, 0.1)
    for _ in range(2):
        account.begin(10, 0.0)
        account.end(10, 0.0, 0.0)
    assert account.allows(10, 0.1)


@given(
    st.lists(BATCH, max_size=60),
    st.sampled_from([0.003, 0.01, 0.3]),
    st.sampled_from([10, 100, 1500]),
    st.tuples(st.integers(0, 400), st.sampled_from([0.01, 0.02, 0.5, 1.0])),
    st.tuples(st.integers(0, 2000), st.sampled_from([0.0, 0.004, 0.01])),
)
def test_what_is_paid_for_in_advance_can_be_given_to_the_end(
    batches: list[tuple[int, float, float, int]],
    budget: float,
    window: int,
    now: tuple[int, float],
    later: tuple[int, float],
) -> None:
    account = Account(budget, window)
    for rows, most, share, _ in batches:
        charge = most if account.allows(rows, most) else 0.0
        account.begin(rows, charge)
        account.end(rows, charge, rows * charge * share)
    if not account.affords(now, later):
        return
    given_ = min(now[0], window)
    for answers, drop in ((given_, now[1]), (min(later[0], window - given_), later[1])):
        for _ in range(answers):
            assert account.allows(1, drop)
            account.begin(1, drop)
            account.end(1, drop, drop)


def test_what_comes_later_is_paid_for_by_what_leaves_meanwhile() -> None:
    account = Account(0.01, 1000)
    for cost in (0.02,) * 40 + (0.0,) * 55:
        account.begin(10, cost)
        account.end(10, cost, 10 * cost)
    assert account.allows(100, 0.02)
    assert account.affords((100, 0.02), (850, 0.009)), "the first answers that cost anything are leaving by then"
    assert not account.affords((100, 0.02), (850, 0.0095)), "they are too many themselves"


def test_one_costly_answer_in_flight_does_not_make_all_that_come_later_as_early_as_costly() -> None:
    """A class of a variant costs more than the mean: with that in flight, the variant to fall back to was refused."""
    account = Account(0.01, 1000)
    for cost in (0.0,) * 10 + (0.01,) * 89:
        account.begin(10, cost)
        account.end(10, cost, 10 * cost)
    account.begin(1, 0.5)
    assert account.affords((900, 0.004))
    assert not account.allows(900, 0.004), "in any order with it"


def test_a_long_life_keeps_few_pieces() -> None:
    account = Account(0.01, 5000)
    for number in range(50_000):
        account.begin(1, 0.01)
        account.end(1, 0.01, 0.001 * (number % 3))
    assert len(account._pieces) <= 402
    assert account.mean == pytest.approx(0.001, rel=0.01)


# The controller.


def controller(spent: float = 0.0) -> Controller:
    rungs = [Rung(step.rate, step.drop) for step in STEPS]
    return Controller(rungs, LIMIT_S, lambda *_: True, lambda: spent, budget=1.0, window=1000)


def driven(one: Controller, loads: Sequence[float], begin: float = 0.0) -> list[int]:
    return [one.decide(Load(begin + 0.1 * n, load * 0.1, 0.0, 0)) for n, load in enumerate(loads)]


def test_a_jump_is_answered_within_half_a_second_by_a_variant_that_carries_it() -> None:
    one = controller()
    assert set(driven(one, [100.0] * 100)) == {0}
    assert driven(one, [500.0] * 5, 10.0)[-1] == 2


def test_a_ramp_is_followed_before_much_waits() -> None:
    rungs = [Rung(10 * step.rate, step.drop) for step in STEPS]
    one = Controller(rungs, LIMIT_S, lambda *_: True, lambda: 0.0, budget=1.0, window=1000)
    ramp = [1000.0 + 150.0 * n for n in range(40)]
    at = driven(one, [1000.0] * 50 + ramp)[50:]
    assert ramp[at.index(1)] < 1.2 * 10 * STEPS[0].rate
    assert ramp[at.index(2)] < 1.2 * 10 * STEPS[1].rate


def test_it_comes_back_within_seconds_when_the_load_has_gone() -> None:
    one = controller()
    driven(one, [100.0] * 50 + [500.0] * 100)
    at = driven(one, [60.0] * 60, 15.0)
    assert at[-1] == 0
    assert at.index(0) <= 40


def test_a_load_that_was_not_carried_is_not_tried_again_for_a_minute() -> None:
    """Its rate says that it carries the load, but its queue says otherwise: the host is slow."""
    one, at, changes = controller(), 0, []
    for n in range(6000):
        now = one.decide(Load(0.1 * n, 10.0, 0.0, 20 if at == 0 else 0))
        if now != at:
            changes.append(0.1 * n)
        at = now
    assert most_in(changes, 60.0) <= 2
    assert most_in(changes[4:], 120.0) <= 2, "and then less and less often"


def test_an_empty_account_means_the_accurate_variant_however_many_wait() -> None:
    left = [True]
    one = Controller(
        *(
            [Rung(150.0, 0.0), Rung(600.0, 0.03)],
            LIMIT_S,
            lambda *spells: left[0] or not any(drop for _, drop in spells),
            lambda: 1.0,
        ),
        budget=BUDGET,
        window=20_000,
    )
    assert driven(one, [500.0] * 10)[-1] == 1
    left[0] = False
    assert set(driven(one, [500.0] * 600, 1.0)) == {0}


def test_a_single_request_that_asks_for_the_impossible_moves_nothing() -> None:
    one = controller()
    for n in range(600):
        assert one.decide(Load(0.1 * n, 3.0, 1.0 if n % 2 else 0.0, 0)) == 0


# Rushes: the server's own cell, queue, admission, controller and account.


SLOW = [pytest.param(rate, marks=pytest.mark.slow) for rate in (60.0, 120.0, 150.0, 170.0, 290.0, 350.0, 580.0)]


@pytest.mark.parametrize("rate", [100.0, 140.0, 200.0, 450.0, 900.0, *SLOW])
def test_a_constant_load_causes_two_switches_a_minute_at_most(rate: float) -> None:
    found = rushed([(100.0, rate)], window=10_000)
    assert most_in([time for time, _ in found.switches], 60.0) <= 2
    assert found.highest_mean(DROPS, 10_000) <= BUDGET


def test_quiet_times_are_answered_by_the_most_accurate() -> None:
    found = rushed([(120.0, 70.0)])
    assert found.share(0) == 1.0
    assert found.shed == 0
    assert found.good == len(found.rung)


def test_a_day_is_carried_better_than_by_any_single_variant_within_the_budget() -> None:
    day = [(15.0, 60.0), (10.0, 130.0), (2.0, 520.0), (10.0, 520.0), (8.0, 60.0), (15.0, 60.0)]
    moved, accurate, middle = rushed(day), rushed(day, fixed=0), rushed(day, fixed=1)
    assert moved.highest_mean(DROPS, 20_000) <= BUDGET
    assert moved.share(0, 0.0, 15.0) >= 0.95
    assert moved.share(0, 50.0) >= 0.95
    assert moved.good > 1.5 * accurate.good
    assert moved.good > 1.1 * middle.good, "which keeps the budget too"
    assert len(moved.switches) <= 4


def test_a_rush_that_spends_the_account_ends_on_the_next_variant_and_not_on_the_most_accurate() -> None:
    """Which carries least: a twentieth of the account, kept back in time, carries twice as much to the end."""
    steps = (Step(0.010, 0.004, 150.0, 0.0), Step(0.006, 0.002, 300.0, 0.001), Step(0.001, 0.0001, 4000.0, 0.03))
    day = [(60.0, 60.0), (1.0, 3000.0), (40.0, 3000.0), (5.0, 60.0), (60.0, 60.0)]
    found = rush(arrivals(day, 0), steps, limit_s=LIMIT_S, budget=BUDGET, window=100_000)
    assert found.highest_mean([step.drop for step in steps], 100_000) <= BUDGET
    last = [rung for _, rung in found.switches]
    assert last[-3:] == [2, 1, 0]
    spent = next(time for time, rung in found.switches if rung == 1 and time > 62.0)
    assert spent < 85.0, "in the middle of the rush"
    assert found.share(1, spent + 0.5, 100.0) == 1.0
    assert len(found.switches) <= 5


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 40))])
def test_random_loads_stay_within_the_account_and_cause_no_oscillation(seed: int) -> None:
    rates = random_rates(seed, STEPS[0].rate)
    found = rushed(rates, seed=seed, window=2000)
    assert found.highest_mean(DROPS, 2000) <= BUDGET
    changes = sum(abs(one - other) > 0.2 * other for (_, one), (_, other) in pairwise(rates))
    minutes = sum(seconds for seconds, _ in rates) / 60
    assert len(found.switches) <= 2 * changes + 2 * minutes + 2
