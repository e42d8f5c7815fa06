"""Gradients of replicated parameters, summed over workers in buckets while the backward pass still runs.

After Li et al., "PyTorch Distributed" (VLDB 2020). Torch's own DistributedDataParallel needs one whole module and one
forward pass for each backward pass; a stage of a pipeline has several, and only some of its parameters are replicated.
Its communication hooks (fp16, bf16, PowerSGD) are used as they are: `Bucket` has the interface that they expect.

Where all workers are on one machine, buckets lie in shared memory, and no gradient is sent (`shared_memory`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

from rushhour.train.parallel.collectives import Group
from rushhour.train.parallel.cost import BUCKET_BYTES
from rushhour.train.parallel.settings import GradientCompression
from rushhour.train.parallel.shared_memory import add_up, shared_buffers

_LINE = 64
"""Bytes of a cache line, at which buckets begin."""
_POWERSGD_FROM = 10
"""Steps before PowerSGD begins: the first gradients change too much for it."""


class Bucket:
    """Some gradients in one piece of memory, with the interface of `torch.distributed.GradBucket`.

    Args:
        index: which bucket.
        parameters: whose gradients.
        shared: this bucket's memory on each worker, where it is shared.
        rank: of this worker among them.
    """

    def __init__(
        self, index: int, parameters: list[nn.Parameter], shared: list[Tensor] | None = None, rank: int = 0
    ) -> None:
        self._index = index
        self._parameters = parameters
        self._rank = rank
        self.last = False
        first = parameters[0]
        self._shared = [] if shared is None else [memory.view(first.dtype) for memory in shared]
        if self._shared:
            self._buffer = self._shared[rank]
        else:
            self._buffer = torch.zeros(sum(one.numel() for one in parameters), dtype=first.dtype, device=first.device)
        self._views: dict[int, Tensor] = {}
        self._in_memory = []
        at = 0
        for one in parameters:
            # with the strides of the parameter: the fused optimizer walks both in the order of memory
            self._views[id(one)] = self._buffer.as_strided(one.size(), one.stride(), at)
            flat = self._buffer[at : at + one.numel()]
            outermost = one.dim() > 1 and one.stride(0) * one.shape[0] == one.numel()
            self._in_memory.append(flat.view(one.shape[0], -1) if outermost else flat)
            at += one.numel()
        self.waiting: set[int] = set()

    def index(self) -> int:
        """Which bucket."""
        return self._index

    def buffer(self) -> Tensor:
        """All gradients, flat."""
        return self._buffer

    def set_buffer(self, buffer: Tensor) -> None:
        """Replace all gradients."""
        self._buffer.copy_(buffer)

    def gradients(self) -> list[Tensor]:
        """Each gradient as a matrix or vector in the order of memory: PowerSGD cannot view channels-last tensors."""
        return self._in_memory

    def parameters(self) -> list[nn.Parameter]:
        """The parameters of the gradients."""
        return self._parameters

    def is_last(self) -> bool:
        """Whether it is the last bucket of the step."""
        return self.last

    def add_up(self) -> None:
        """Sum this worker's share of the buckets of all workers, in shared memory."""
        add_up(self._shared, self._rank)

    def clear(self) -> None:
        """Remove the gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def take(self, parameter: Tensor) -> None:
        """Move a gradient into the buffer.

        The first of a step is copied, which is half the memory traffic of adding it to zeros; autograd itself adds
        later ones of the same step.
        """
        view = self._views[id(parameter)]
        if parameter.grad is not view:
            assert parameter.grad is not None
            view.copy_(parameter.grad)
            parameter.grad = view

    def fill(self) -> None:
        """Set the gradients of parameters that took no part in the step to 0."""
        for parameter in self._parameters:
            view = self._views[id(parameter)]
            if parameter.grad is not view:
                parameter.grad = view.zero_()


class Reducer:
    """Sums the gradients of parameters over a group.

    Attributes:
        taken: parameters that took part in this step, on this worker; one may be named more than once.

    Args:
        parameters: replicated on all workers of the group, in the order of the forward pass.
        group: used for nothing else, so that sums and activations are not mixed up.
        compression: of the gradients that are sent.
        shared_memory: sum in shared memory where all workers of the group are on one machine.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        group: Group,
        compression: GradientCompression = "none",
        *,
        shared_memory: bool = True,
    ) -> None:
        self.parameters = parameters
        self._group = group
        groups: list[list[nn.Parameter]] = []
        current: list[nn.Parameter] = []
        size = 0
        for parameter in reversed(parameters):  # the order in which the backward pass gives them
            if current and (size + parameter.nbytes > BUCKET_BYTES or parameter.dtype != current[0].dtype):
                groups.append(current)
                current, size = [], 0
            current.append(parameter)
            size += parameter.nbytes
        if current:
            groups.append(current)
        alike = all(parameter.device.type == "cpu" for parameter in parameters)
        self._buckets = self._make_buckets(groups, shared=shared_memory and compression == "none" and alike)
        if self._buckets:
            self._buckets[-1].last = True
        self._where = {id(one): bucket for bucket in self._buckets for one in bucket.parameters()}
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._ready)  # type: ignore[no-untyped-call]
        self._hook = _hook(compression, group)
        self.taken: list[Tensor] = []
        self._armed = False
        self._next = 0
        self._pending: list[tuple[Bucket, Any]] = []

    def _make_buckets(self, groups: list[list[nn.Parameter]], *, shared: bool) -> list[Bucket]:
        """The buckets, in shared memory if `shared` and if the workers can share it."""
        sizes = [sum(one.nbytes for one in parameters) for parameters in groups]
        starts = list(itertools.accumulate((-(-size // _LINE) * _LINE for size in sizes), initial=0))
        memory = shared_buffers(starts[-1], self._group) if shared else None
        self._shares_memory = memory is not None
        if memory is None:
            return [Bucket(index, parameters) for index, parameters in enumerate(groups)]
        rank = dist.get_rank(self._group)
        return [
            Bucket(index, parameters, [whole[start : start + size] for whole in memory], rank)
            for index, (parameters, start, size) in enumerate(zip(groups, starts, sizes, strict=False))
        ]

    def clear(self) -> None:
        """Begin a step: remove the gradients."""
        self._armed, self._next = False, 0
        self.taken = []
        for bucket in self._buckets:
            bucket.clear()

    def settle(self) -> None:
        """The backward passes of the step are over: complete the gradients in shared memory."""
        if self._shares_memory:
            for bucket in self._buckets:
                bucket.fill()

    def arm(self) -> None:
        """The next backward pass is the last of the step: send each bucket as soon as it is complete."""
        self._armed = True
        for bucket in self._buckets:
            bucket.waiting = {id(one) for one in bucket.parameters()}

    def finish(self, *, all_ready: bool = False) -> None:
        """Wait until all gradients are sums over the group.

        Args:
            all_ready: whether all workers of the group are known to have called `settle`.
        """
        if self._shares_memory:
            if not all_ready:
                self.settle()
                dist.barrier(self._group)
            for bucket in self._buckets:
                bucket.add_up()
            dist.barrier(self._group)
            return
        while self._next < len(self._buckets):  # buckets with parameters that took no part
            self._send()
        for bucket, future in self._pending:
            result = future.wait()
            result = result[0] if isinstance(result, list | tuple) else result
            if self._hook is not None:
                bucket.buffer().copy_(result).mul_(self._group.size())  # torch's hooks return means
        self._pending = []
        self._armed = False

    def _ready(self, parameter: Tensor) -> None:
        self._where[id(parameter)].take(parameter)
        self.taken.append(parameter)
        if not self._armed or self._shares_memory:
            return
        self._where[id(parameter)].waiting.discard(id(parameter))
        # in the same order on all workers, whatever the order of the gradients
        while self._next < len(self._buckets) and not self._buckets[self._next].waiting:
            self._send()

    def _send(self) -> None:
        bucket = self._buckets[self._next]
        self._next += 1
        bucket.fill()
        if self._hook is not None:
            future = self._hook(bucket)
        else:
            work = dist.all_reduce(bucket.buffer(), group=self._group, async_op=True)
            assert work is not None
            future = work.get_future()
        self._pending.append((bucket, future))


def _hook(compression: GradientCompression, group: Group) -> Callable[[Any], Any] | None:
    if compression == "none":
        return None
    if compression == "powersgd":
        state = powerSGD_hook.PowerSGDState(group, matrix_approximation_rank=2, start_powerSGD_iter=_POWERSGD_FROM)
        return lambda bucket: powerSGD_hook.powerSGD_hook(state, bucket)
    hook = default_hooks.fp16_compress_hook if compression == "fp16" else default_hooks.bf16_compress_hook
    return lambda bucket: hook(group, bucket)
