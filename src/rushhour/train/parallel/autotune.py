"""Chooses among plans by trial steps: the few that could be fastest take turns at real training steps.

A prediction ranks plans well but is wrong about their times: how layers share the caches, and how computing overlaps
with messages, shows only in a real step. So the prediction makes the list, and some seconds of training decide.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence

import msgspec
import torch.distributed as dist

from rushhour.train.parallel.broadcast import from_leader
from rushhour.train.parallel.plan import ParallelPlan

Step = Callable[[], object]

_WORTH = 2.5
"""Plans predicted to be slower than the fastest by this factor are not tried."""
_HOPELESS = 1.25
"""A plan whose median is slower than the best one's by this factor takes no further turns."""
_FEWEST, _MOST = 3, 30
"""Turns of each plan."""


def fastest(
    plans: Sequence[ParallelPlan], prepare: Callable[[ParallelPlan], Step], *, budget_s: float, memory_bytes: float
) -> ParallelPlan:
    """The plan whose steps take the least time here; all workers of the default group call this with equal arguments.

    Args:
        plans: the fastest by prediction first.
        prepare: gives a function that runs one step by a plan.
        budget_s: about the time that it may take. Where that is not enough for some steps of two plans, the first is
            returned as it is.
        memory_bytes: for all plans that are tried, on each worker, by prediction.

    Returns:
        One of the plans, with the measured times of all that were tried.
    """
    best = plans[0].predicted.step_s
    tried = [index for index, plan in enumerate(plans) if plan.predicted.step_s <= _WORTH * best]
    while len(tried) > 1 and (
        sum(plans[index].predicted.step_s for index in tried) * (1 + _FEWEST) > budget_s
        or sum(plans[index].predicted.memory_bytes for index in tried) > memory_bytes
    ):
        tried.pop()
    if len(tried) < 2:
        return plans[0]
    began = time.monotonic()
    steps = {index: prepare(plans[index]) for index in tried}
    for step in steps.values():
        step()  # warm-up
    taken: dict[int, list[float]] = {index: [] for index in tried}
    order = random.Random(0)
    left = list(tried)
    for turn in range(1, _MOST + 1):
        for index in order.sample(left, len(left)):
            dist.barrier()
            at = time.perf_counter()
            steps[index]()
            dist.barrier()
            taken[index].append(time.perf_counter() - at)
        if turn < _FEWEST:
            continue
        medians = {index: statistics.median(times) for index, times in taken.items()}
        least = min(medians[index] for index in left)
        left = [index for index in left if medians[index] <= _HOPELESS * least]
        if len(left) == 1 or time.monotonic() - began > budget_s:
            left = [min(left, key=lambda index: medians[index])]
        left = from_leader(left)  # each worker has times of its own
        for index in set(steps) - set(left):
            del steps[index]
        if len(left) == 1:
            break
    medians = from_leader({index: statistics.median(times) for index, times in taken.items()})
    chosen = plans[min(left, key=lambda index: medians[index])]
    times_s = {plans[index].mode: medians[index] for index in tried}
    return msgspec.structs.replace(
        chosen,
        alternatives=tuple(
            msgspec.structs.replace(one, measured_s=times_s.get(one.mode)) for one in chosen.alternatives
        ),
    )
