"""Shared memory of the workers on one machine, and sums in it.

Over the loopback interface a gradient passes through the kernel twice. In shared memory nothing is sent: each worker
sums its share of all buffers and writes the sum into all of them. Messages only synchronise the workers.
"""

from __future__ import annotations

import mmap
import os

import torch
import torch.distributed as dist
from torch import Tensor

from rushhour.train.parallel.collectives import Group, shares


def shared_buffers(nbytes: int, group: Group) -> list[Tensor] | None:
    """A buffer of each worker of the group, in the order of their ranks, in memory that all workers share; zeros.

    All workers of the group call this. The memory has no name, so it is freed when the workers are killed.

    Args:
        nbytes: of each buffer; the same on all workers.
        group: of the workers.

    Returns:
        Flat tensors of bytes; None on all workers if any worker cannot map the memory of the others: it runs on another
        machine, in another container or as another user, or its system has no such memory.
    """
    own = _anonymous(nbytes)
    try:
        every: list[tuple[str, int, int]] = [("", 0, 0)] * group.size()
        dist.all_gather_object(every, (_place(), os.getpid(), own), group=group)
        mapped = _mapped(every, nbytes)
        # no worker closes its file before all workers have mapped it
        all_mapped = torch.tensor(float(mapped is not None))
        dist.all_reduce(all_mapped, dist.ReduceOp.MIN, group=group)
    finally:
        if own >= 0:
            os.close(own)
    return mapped if all_mapped else None


def add_up(buffers: list[Tensor], rank: int) -> None:
    """Sum this worker's share of the buffers in place: afterwards that part of each buffer holds the sum of all.

    All buffers must be filled before any worker begins, and none may be read before all workers have finished.

    Args:
        buffers: flat and alike, in the order of the ranks.
        rank: of this worker.
    """
    parts = [buffer.split(list(shares(len(buffer), len(buffers))))[rank] for buffer in buffers]  # type: ignore[no-untyped-call]
    total = parts[rank]
    others = parts[:rank] + parts[rank + 1 :]
    for other in others:
        total += other
    for other in others:
        other.copy_(total)


def _anonymous(nbytes: int) -> int:
    """The descriptor of a file in memory; -1 where the system has none."""
    try:
        found = os.memfd_create("gradients")
    except (OSError, AttributeError):  # not Linux, or not allowed
        return -1
    try:
        os.posix_fallocate(found, 0, max(1, nbytes))
    except OSError:  # not enough memory
        os.close(found)
        return -1
    return found


def _place() -> str:
    """Where process ids mean the same: this boot of this machine, and this container."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _mapped(every: list[tuple[str, int, int]], nbytes: int) -> list[Tensor] | None:
    here = _place()
    if not here or any(place != here or number < 0 for place, _, number in every):
        return None
    found = []
    try:
        for _, process, number in every:
            file = os.open(f"/proc/{process}/fd/{number}", os.O_RDWR)
            try:
                memory = mmap.mmap(file, max(1, nbytes))
            finally:
                os.close(file)
            found.append(torch.frombuffer(memory, dtype=torch.uint8)[:nbytes])
    except OSError:  # a process of another user
        return None
    return found
