"""The last word on plans: the few that could be fastest take turns at real steps.

A prediction ranks plans well and times them badly: what a layer costs beside others, in the cache and between two
messages, shows only when it runs. So the prediction draws up the list, and some seconds of the training itself decide.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch.distributed as dist

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
        prepare: what a plan's step is.
        budget_s: about so long it may take. Where that is not enough for some steps of two plans, the first is
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
        step()  # libraries get ready
    taken: dict[int, list[float]] = {index: [] for index in tried}
    order = random.Random(0)
    going = list(tried)
    for turn in range(1, _MOST + 1):
        for index in order.sample(going, len(going)):
            dist.barrier()
            at = time.perf_counter()
            steps[index]()
            dist.barrier()
            taken[index].append(time.perf_counter() - at)
        if turn < _FEWEST:
            continue
        middle = {index: statistics.median(times) for index, times in taken.items()}
        least = min(middle[index] for index in going)
        going = [index for index in going if middle[index] <= _HOPELESS * least]
        if len(going) == 1 or time.monotonic() - began > budget_s:
            going = [min(going, key=lambda index: middle[index])]
        # clocks differ: worker 0's is what counts
        box: list[Any] = [going]
        dist.broadcast_object_list(box, 0)
        going = box[0]
        for index in set(steps) - set(going):
            del steps[index]
        if len(going) == 1:
            break
    box = [{index: statistics.median(times) for index, times in taken.items()}]
    dist.broadcast_object_list(box, 0)
    middle = box[0]
    chosen = plans[min(going, key=lambda index: middle[index])]
    times = {plans[index].mode: middle[index] for index in tried}
    return msgspec.structs.replace(
        chosen,
        alternatives=tuple(msgspec.structs.replace(one, measured_s=times.get(one.mode)) for one in chosen.alternatives),
    )
