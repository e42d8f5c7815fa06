"""A pipeline of stages: the order of its forward and backward passes, and what neighbouring stages send each other.

The order is 1F1B (Narayanan et al., PipeDream, SOSP 2019), flushed each step, so that weights are never stale. With one
stage this is gradient accumulation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from rushhour.train.parallel.collectives import Group

_HEADER = 16
"""Numbers in a header: dtype, number of dimensions, and their sizes."""
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)


def one_forward_one_backward(
    stage: int, stages: int, count: int, forward: Callable[[int], None], backward: Callable[[int], None]
) -> None:
    """Run the passes of `count` microbatches through one stage, each called with the number of its microbatch."""
    ahead = min(count, stages - 1 - stage)
    for index in range(ahead):
        forward(index)
    for index in range(count):
        if index + ahead < count:
            forward(index + ahead)
        backward(index)


class Neighbours:
    """The workers at the same place in the stage before and in the next one.

    Args:
        world: all workers; None where there is one, and so nothing to send.
        rank: of this worker.
        inner: workers in a stage.
    """

    def __init__(self, world: Group | None, rank: int, inner: int) -> None:
        self._world, self._rank, self._inner = world, rank, inner
        self._shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}

    def send(self, what: str, tensor: Tensor, to: int) -> dist.Work:
        """Send a tensor to the next stage (`to` is 1) or to the one before (-1); a header precedes the first.

        Args:
            what: `activation` or `gradient`.
        """
        tensor = tensor.contiguous()
        target = self._rank + to * self._inner
        key = f"to {what}"
        if self._shapes.get(key) != (tuple(tensor.shape[1:]), tensor.dtype):
            assert key not in self._shapes, "the shape of activations must not change from step to step"
            self._shapes[key] = tuple(tensor.shape[1:]), tensor.dtype
            header = torch.zeros(_HEADER, dtype=torch.int64)
            header[: tensor.dim() + 1] = torch.tensor(
                [_DTYPES.index(tensor.dtype), tensor.dim() - 1, *tensor.shape[1:]]
            )
            dist.send(header, group=self._world, group_dst=target)
        work = dist.isend(tensor, group=self._world, group_dst=target)
        assert work is not None
        return work

    def receive(self, what: str, rows: int, source: int) -> Tensor:
        """Receive a tensor of `rows` rows from the next stage (`source` is 1) or from the one before (-1)."""
        origin = self._rank + source * self._inner
        key = f"from {what}"
        if key not in self._shapes:
            header = torch.zeros(_HEADER, dtype=torch.int64)
            dist.recv(header, group=self._world, group_src=origin)
            number, dims, *sizes = header.tolist()
            self._shapes[key] = tuple(sizes[:dims]), _DTYPES[number]
        shape, dtype = self._shapes[key]
        tensor = torch.empty((rows, *shape), dtype=dtype)
        dist.recv(tensor, group=self._world, group_src=origin)
        return tensor
