"""Memory that the workers of one machine have in common, and sums in it.

Over the loopback a gradient goes through the kernel twice on its way to a neighbour. Here it stays where it is: each
worker adds up its share of everybody's buffers, and writes the sum into all of them. Messages only say when.
"""

from __future__ import annotations

import mmap
import os

import torch
import torch.distributed as dist
from torch import Tensor

from rushhour.train.parallel.collectives import Group, shares


def together(nbytes: int, group: Group) -> list[Tensor] | None:
    """A buffer of each worker of the group, in the order of their ranks, that all of them see; zeros.

    All workers must call it. The memory has no name, so nothing is left of it when workers are killed.

    Args:
        nbytes: of each buffer; the same on all workers.
        group: of the workers.

    Returns:
        Flat tensors of bytes; None on all workers where any of them cannot see all the others' memory: because it is
        on another machine or in another container, or because its system has no such memory.
    """
    own = _anonymous(nbytes)
    try:
        every: list[tuple[str, int, int]] = [("", 0, 0)] * group.size()
        dist.all_gather_object(every, (_place(), os.getpid(), own), group=group)
        seen = _mapped(every, nbytes)
        # nobody lets go of its own before all have it
        all_see = torch.tensor(float(seen is not None))
        dist.all_reduce(all_see, dist.ReduceOp.MIN, group=group)
    finally:
        if own >= 0:
            os.close(own)
    return seen if all_see else None


def add_up(buffers: list[Tensor], rank: int) -> None:
    """This worker's share of a sum in place: afterwards that part of each worker's buffer holds the sum of all.

    All buffers must have been filled before any worker begins, and none may be read before all have ended.

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
    """A file in memory; -1 where there is no such thing."""
    try:
        found = os.memfd_create("gradients")
    except (OSError, AttributeError):  # not Linux, or not allowed
        return -1
    try:
        os.posix_fallocate(found, 0, max(1, nbytes))
    except OSError:  # no memory left for it
        os.close(found)
        return -1
    return found


def _place() -> str:
    """Where numbers of processes mean the same: this machine since its start, and this container."""
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
    except OSError:  # another user's
        return None
    return found
