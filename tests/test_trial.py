"""Plans that take turns at real steps."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from rushhour.testing.networks import ANY, table_for
from rushhour.train import launch
from rushhour.train.plan import ParallelPlan, ranked_plans
from rushhour.train.trial import fastest


def _plans() -> list[ParallelPlan]:
    return ranked_plans(table_for("mlp"), workers=2, batch=8, constants=ANY)


def _tried(
    slow_s: dict[str, float], budget_s: float, memory_bytes: float
) -> tuple[ParallelPlan, list[str], dict[str, int]]:
    counts: dict[str, int] = {}

    def prepare(plan: ParallelPlan) -> Callable[[], None]:
        counts[plan.mode] = 0

        def step() -> None:
            counts[plan.mode] += 1
            time.sleep(slow_s.get(plan.mode, 0.2))

        return step

    plans = _plans()
    chosen = fastest(plans, prepare, budget_s=budget_s, memory_bytes=memory_bytes)
    return chosen, [plan.mode for plan in plans], counts


def test_what_the_steps_say_counts_for_more_than_the_prediction() -> None:
    first, second = (plan.mode for plan in _plans()[:2])
    found = launch(_tried, 2, ({first: 0.15, second: 0.01}, 60.0, 1e12))
    for chosen, _, counts in found:
        assert chosen.mode == second
        assert counts[second] >= counts[first] >= 4  # one step to get ready, three turns at least
        measured = {one.mode: one.measured_s for one in chosen.alternatives}
        assert measured == {one.mode: one.measured_s for one in found[0][0].alternatives}
        slow, fast = measured[first], measured[second]
        assert slow is not None
        assert fast is not None
        assert fast < slow
        text = chosen.explain()
        assert text.index(f"* {second} ") < text.index(f"  {first} ")
        assert "measured" in text


@pytest.mark.parametrize(("budget_s", "memory_bytes"), [(0.0, 1e12), (60.0, 1.0)])
def test_without_time_or_memory_the_prediction_decides(budget_s: float, memory_bytes: float) -> None:
    for chosen, order, counts in launch(_tried, 2, ({}, budget_s, memory_bytes)):
        assert chosen.mode == order[0]
        assert counts == {}
        assert all(one.measured_s is None for one in chosen.alternatives)
