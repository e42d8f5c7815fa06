"""Plans that take turns at real steps."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import pytest

from rushhour.testing.networks import ANY, table_for
from rushhour.train.parallel import ParallelPlan, launch
from rushhour.train.parallel.autotune import fastest
from rushhour.train.parallel.planner import ranked_plans


def _plans() -> list[ParallelPlan]:
    return ranked_plans(table_for("mlp"), workers=2, batch=8, constants=ANY)


Tried = tuple[ParallelPlan, list[str], dict[str, int]]
"""The plan taken, all of them in order of prediction, and how many steps each was given."""

CASES = {"measured": (60.0, 1e12), "no time": (0.0, 1e12), "no memory": (60.0, 1.0)}
"""Name -> seconds to try in, and bytes."""


def _tried(slow_s: dict[str, float], budget_s: float, memory_bytes: float) -> Tried:
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


def _all_tried(slow_s: dict[str, float]) -> dict[str, Tried]:
    return {case: _tried(slow_s, *limits) for case, limits in CASES.items()}


@functools.cache
def outcomes() -> list[dict[str, Tried]]:
    """What each worker came to in each case. One launch, because starting is slow."""
    first, second = (plan.mode for plan in _plans()[:2])
    return launch(_all_tried, 2, ({first: 0.15, second: 0.01},))


@pytest.mark.slow
def test_what_the_steps_say_counts_for_more_than_the_prediction() -> None:
    first, second = (plan.mode for plan in _plans()[:2])
    found = [one["measured"] for one in outcomes()]
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


@pytest.mark.slow
@pytest.mark.parametrize("case", ["no time", "no memory"])
def test_without_time_or_memory_the_prediction_decides(case: str) -> None:
    for chosen, order, counts in (one[case] for one in outcomes()):
        assert chosen.mode == order[0]
        assert counts == {}
        assert all(one.measured_s is None for one in chosen.alternatives)
