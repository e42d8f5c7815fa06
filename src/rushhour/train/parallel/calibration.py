"""The constants of the cost model, measured on this machine with all workers at once."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from rushhour.train.parallel.collectives import Group
from rushhour.train.parallel.cost import FLOAT, Constants, Link
from rushhour.train.parallel.launch import launch
from rushhour.train.parallel.settings import Backend
from rushhour.train.parallel.shared_memory import add_up, shared_buffers

_LEAST_S = 0.15
"""Each operation is repeated for at least this long."""
_MANY = 2_000_000
"""Numbers in a large message."""


@functools.cache
def calibrate(workers: int, backend: Backend = "gloo", *, shared_memory: bool = True) -> Constants:
    """The constants of this machine with so many workers at once; takes some seconds, and is kept for the process.

    Args:
        workers: how many.
        backend: that they talk over.
        shared_memory: whether gradients are added up in it; false for what machines apart would do.

    Raises:
        ModelError: if the workers cannot be started.
    """
    found: Constants = launch(calibrate_group, workers, (shared_memory,), backend=backend)[0]
    return found


def calibrate_group(shared_memory: bool = True) -> Constants:
    """The same, where all workers of the default group call it at once; each gets what `calibrate` returns."""
    workers = dist.get_world_size()
    found: list[Any] = [None] * workers
    dist.all_gather_object(found, _measured(workers, shared_memory=shared_memory))
    return slowest(found, workers)


def slowest(found: list[Constants], workers: int) -> Constants:
    """The constants of the slowest worker: the others wait for it."""

    def least(of: Callable[[Constants], float]) -> float:
        return min(of(one) for one in found)

    def link(of: Callable[[Constants], Link]) -> Link:
        return Link(max(of(one).latency_s for one in found), max(of(one).byte_s for one in found))

    return Constants(
        workers,
        least(lambda one: one.dense_flops),
        least(lambda one: one.convolution_flops),
        least(lambda one: one.bandwidth),
        max(one.operation_s for one in found),
        least(lambda one: one.solo),
        link(lambda one: one.reduce),
        link(lambda one: one.exchange),
        link(lambda one: one.send),
    )


def _measured(workers: int, *, shared_memory: bool) -> Constants:
    group: Group = dist.group.WORLD  # type: ignore[assignment]
    rank = dist.get_rank()
    a, b = torch.randn(256, 1024), torch.randn(1024, 1024)
    dense = 2 * 256 * 1024 * 1024 / _seconds(lambda: a @ b)
    convolution, picture = nn.Conv2d(32, 32, 3, padding=1), torch.randn(4, 32, 56, 56)
    with torch.no_grad():
        convolved = 2 * 4 * 32 * 32 * 9 * 56 * 56 / _seconds(lambda: convolution(picture))
    large = torch.randn(8_000_000)
    bandwidth = 2 * FLOAT * large.numel() / _seconds(lambda: large.mul_(1.0))
    small, tiny = nn.Linear(8, 8), torch.randn(1, 8)
    operation = _seconds(lambda: small(tiny).sum().backward()) / 4
    alone = 1.0
    if workers > 1:
        for turn in (0, 1):
            dist.barrier()
            if rank == turn:
                alone = 2 * 256 * 1024 * 1024 / _seconds(lambda: a @ b) / dense
        dist.barrier()
    if workers == 1:
        nothing = Link(0.0, 0.0)
        return Constants(1, dense, convolved, bandwidth, operation, 1.0, nothing, nothing, nothing)

    memory = shared_buffers(_MANY * FLOAT, group) if shared_memory else None

    def reduce(tensor: torch.Tensor) -> None:
        if memory is None:
            dist.all_reduce(tensor, group=group)
            return
        dist.barrier()
        add_up([buffer[: tensor.nbytes].view(tensor.dtype) for buffer in memory], rank)
        dist.barrier()

    def exchange(tensor: torch.Tensor) -> None:
        dist.all_to_all_single(torch.empty_like(tensor), tensor, group=group)

    def send(tensor: torch.Tensor) -> None:
        out = dist.isend(tensor, (rank + 1) % workers)
        dist.recv(torch.empty_like(tensor), (rank - 1) % workers)
        assert out is not None
        out.wait()

    n = workers
    return Constants(
        workers,
        dense,
        convolved,
        bandwidth,
        operation,
        max(1.0, alone),
        _link(reduce, 2 * (n - 1), 2 * (n - 1) / n, n),
        _link(exchange, n - 1, (n - 1) / n, n),
        _link(send, 1, 1.0, n),
    )


def _link(move: Callable[[torch.Tensor], None], messages: int, share: float, workers: int) -> Link:
    """Alpha and beta from a small and a large message; a fixed number of turns, for all must take part."""
    few, many = torch.zeros(workers), torch.zeros(_MANY // workers * workers)
    times = []
    for tensor, turns in ((few, 50), (many, 6)):
        move(tensor)
        taken = []
        for _ in range(turns):
            dist.barrier()
            began = time.perf_counter()
            move(tensor)
            taken.append(time.perf_counter() - began)
        times.append(sorted(taken)[len(taken) // 2])
    small, large = times
    return Link(small / messages, max(0.0, large - small) / (many.numel() * FLOAT * share))


def _seconds(run: Callable[[], object]) -> float:
    """Median seconds of a call."""
    run()
    taken: list[float] = []
    while sum(taken) < _LEAST_S or len(taken) < 5:
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return sorted(taken)[len(taken) // 2]
