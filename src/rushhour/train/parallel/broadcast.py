"""Decisions of worker 0 that all workers of the default group take over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from rushhour.errors import RushhourError

T = TypeVar("T")


def from_leader(value: T) -> T:
    """The value that worker 0 has; all workers call this, and the values of the others are ignored."""
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def run_on_leader(work: Callable[[], T]) -> T:
    """Run `work` on worker 0 alone; its result is returned on all workers, and its error raised on all.

    Raises:
        RushhourError: that `work` raised.
    """
    outcome: Any = None
    if dist.get_rank() == 0:
        try:
            outcome = work()
        except RushhourError as error:
            outcome = error
    outcome = from_leader(outcome)
    if isinstance(outcome, RushhourError):
        raise outcome
    result: T = outcome
    return result
