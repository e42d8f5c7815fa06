"""Workers of one machine add up what lies in memory that all of them see, and send nothing."""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn

from rushhour.testing.meters import sent_bytes
from rushhour.train.parallel import launch
from rushhour.train.parallel import shared_memory as shared
from rushhour.train.parallel.reducer import Reducer
from rushhour.train.parallel.shared_memory import add_up, shared_buffers

SIZES = (1, 7, 100_003)


def added(size: int) -> list[float] | None:
    """Each worker's own buffer after a sum; `None` where memory is not shared."""
    group, rank = dist.group.WORLD, dist.get_rank()
    buffers = shared_buffers(size * 8, group)  # type: ignore[arg-type]
    if buffers is None:
        return None
    numbers = [buffer.view(torch.float64) for buffer in buffers]
    numbers[rank] += torch.arange(size, dtype=torch.float64) * 10**rank
    dist.barrier()
    add_up(numbers, rank)
    dist.barrier()
    return numbers[rank].tolist()


def all_added() -> list[list[float] | None]:
    return [added(size) for size in SIZES]


PLACES = ("container", "system", "user")


class Seen(NamedTuple):
    """What a worker saw: its sums, what it sent and got where memory is shared, and in each place where it is not."""

    sums: list[list[float] | None]
    together: tuple[int, list[float]]
    elsewhere: dict[str, tuple[bool, int, list[float]]]


def seen() -> Seen:
    return Seen(all_added(), summed(), {what: elsewhere(what) for what in PLACES})


@functools.cache
def two() -> list[Seen]:
    """Of each of two workers. One launch, because starting is slow."""
    return launch(seen, 2)


@pytest.mark.parametrize(("workers", "factor"), [(2, 11.0), pytest.param(3, 111.0, marks=pytest.mark.slow)])
def test_all_workers_see_the_same_sum(workers: int, factor: float) -> None:
    for found in [one.sums for one in two()] if workers == 2 else launch(all_added, workers):
        for size, got in zip(SIZES, found, strict=True):
            assert got == [index * factor for index in range(size)]


def elsewhere(what: str) -> tuple[bool, int, list[float]]:
    """Worker 1 is in another container, has no such memory, or is another user's."""
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            if what == "container":
                patch.setattr(shared, "_place", lambda: "another one")
            elif what == "system":
                patch.setattr(shared, "_anonymous", lambda nbytes: -1)
            else:
                patch.setattr(shared, "os", Forbidding())
        group = dist.group.WORLD
        assert group is not None
        visible = shared_buffers(800, group) is not None
        before = sent_bytes()
        parameter = nn.Parameter(torch.zeros(100_000))
        reducer = Reducer([parameter], group)
        reducer.clear()
        reducer.arm()
        (parameter * (1.0 + dist.get_rank())).sum().backward()  # type: ignore[no-untyped-call]
        reducer.finish()
        assert parameter.grad is not None
        return visible, sent_bytes() - before, parameter.grad.unique().tolist()


class Forbidding:
    """An `os` that lets nobody look into another process."""

    O_RDWR = os.O_RDWR

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)

    def open(self, path: str, flags: int) -> int:
        raise PermissionError(13, "Permission denied", path)


@pytest.mark.slow
@pytest.mark.parametrize("what", PLACES)
def test_where_one_worker_is_out_of_sight_all_of_them_send(what: str) -> None:
    for visible, sent, gradient in (one.elsewhere[what] for one in two()):
        assert not visible
        assert sent > 100_000
        assert gradient == [3.0]


def test_nothing_is_sent_but_when() -> None:
    """A megabyte of gradients; messages that say when are some hundred bytes."""
    for sent, gradient in (one.together for one in two()):
        assert sent < 10_000
        assert gradient == [3.0]


def summed() -> tuple[int, list[float]]:
    group = dist.group.WORLD
    assert group is not None
    parameter, idle = nn.Parameter(torch.zeros(250_000)), nn.Parameter(torch.zeros(3))
    reducer = Reducer([parameter, idle], group)
    for _ in range(3):  # what an earlier step left must not count
        before = sent_bytes()
        reducer.clear()
        reducer.arm()
        (parameter * (1.0 + dist.get_rank())).sum().backward()  # type: ignore[no-untyped-call]
        reducer.finish()
    assert idle.grad is not None
    assert not idle.grad.any()
    assert parameter.grad is not None
    return sent_bytes() - before, parameter.grad.unique().tolist()
