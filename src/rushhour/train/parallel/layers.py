"""Layers that are divided over several workers. Each computes what the plain layer computes, up to rounding."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from rushhour.train.parallel.collectives import Group, exchange, gather_rows, shares, sum_rows, to_features, to_rows


@dataclasses.dataclass
class ForwardContext:
    """The forward pass that is being computed; one object for each worker, read by its layers.

    Attributes:
        seed: of dropout.
        step: of the training, from 0.
        serial: number of the forward pass.
        rows: how many rows each worker of the tensor group has in this microbatch.
        own: the index of each own row in the global batch.
        all: the indices of the rows of the whole tensor group, in the order of the ranks.
    """

    seed: int = 0
    step: int = 0
    serial: int = 0
    rows: tuple[int, ...] = (0,)
    own: NDArray[np.uint64] = dataclasses.field(default_factory=lambda: np.zeros(0, np.uint64))
    all: NDArray[np.uint64] = dataclasses.field(default_factory=lambda: np.zeros(0, np.uint64))


def part_of(whole: Tensor, dim: int, group: Group) -> Tensor:
    """This worker's part of a tensor that is divided along a dimension, as a copy."""
    parts = torch.split(whole, list(shares(whole.shape[dim], group.size())), dim)
    return parts[dist.get_rank(group)].clone(memory_format=torch.contiguous_format)


class Column(nn.Module):
    """A dense layer cut along its outputs: own rows in, all rows of own features out."""

    def __init__(self, whole: nn.Linear, context: ForwardContext, group: Group) -> None:
        super().__init__()
        self._context, self._group = context, group
        self.weight = nn.Parameter(part_of(whole.weight.detach(), 0, group), whole.weight.requires_grad)
        self.bias = (
            None
            if whole.bias is None
            else nn.Parameter(part_of(whole.bias.detach(), 0, group), whole.bias.requires_grad)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Own rows in; all rows of own features out."""
        return functional.linear(gather_rows(x, self._context.rows, self._group), self.weight, self.bias)


class Row(nn.Module):
    """A dense layer cut along its inputs: all rows of own features in, own rows out."""

    def __init__(self, whole: nn.Linear, context: ForwardContext, group: Group) -> None:
        super().__init__()
        self._context, self._group = context, group
        self.weight = nn.Parameter(part_of(whole.weight.detach(), 1, group), whole.weight.requires_grad)
        self.bias = whole.bias

    def forward(self, x: Tensor) -> Tensor:
        """All rows of own features in; own rows out."""
        y = sum_rows(functional.linear(x, self.weight), self._context.rows, self._group)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class ToFeatures(nn.Module):
    """Own rows with all features become all rows with own features."""

    def __init__(self, context: ForwardContext, group: Group) -> None:
        super().__init__()
        self._context, self._group = context, group

    def forward(self, x: Tensor) -> Tensor:
        """Own rows in; all rows of own features out."""
        return to_features(x, self._context.rows, self._group)


class ToRows(nn.Module):
    """All rows with own features become own rows with all features."""

    def __init__(self, features: int, context: ForwardContext, group: Group) -> None:
        super().__init__()
        self._features, self._context, self._group = features, context, group

    def forward(self, x: Tensor) -> Tensor:
        """All rows of own features in; own rows out."""
        return to_rows(x, self._features, self._context.rows, self._group)


class Sharded(nn.Module):
    """A layer whose parameters are sharded, and gathered only while it computes, forward and backward.

    ZeRO stage 3 (Rajbhandari et al. 2020). Each parameter is divided as a flat vector: its size need not be a
    multiple of the number of workers, and an elementwise optimizer works on the parts as on the whole.

    Attributes:
        names: of the parameters.
        parts: this worker's part of each.
        took_part: which of them took part in the last backward pass on this worker.

    Args:
        module: is emptied: its parameters go to the meta device.
    """

    def __init__(self, module: nn.Module, group: Group) -> None:
        super().__init__()
        self.__dict__["module"] = module  # not registered: its parameters are empty
        self._group = group
        whole = {name: tensor for name, tensor in module.named_parameters() if tensor.requires_grad}
        self.names = list(whole)
        self._shapes = [tuple(tensor.shape) for tensor in whole.values()]
        self._sizes = [shares(tensor.numel(), group.size()) for tensor in whole.values()]
        self.took_part = [False] * len(self.names)
        self.parts = nn.ParameterList(
            nn.Parameter(part_of(tensor.detach().reshape(-1), 0, group)) for tensor in whole.values()
        )
        self._gathered: list[Tensor] | None = None
        for owner in module.modules():
            for name, tensor in list(owner._parameters.items()):
                if tensor is not None and tensor.requires_grad:
                    owner._parameters[name] = nn.Parameter(torch.empty_like(tensor, device="meta"))

    def train(self, mode: bool = True) -> Sharded:
        """As of any module."""
        self.__dict__["module"].train(mode)
        return super().train(mode)

    def forward(self, *inputs: Tensor) -> Tensor:
        """As the layer, with parameters that are gathered for this pass."""
        whole: tuple[Tensor, ...] = _Gather.apply(self, *self.parts)  # type: ignore[no-untyped-call]
        where = {tensor.untyped_storage().data_ptr(): index for index, tensor in enumerate(whole) if tensor.numel()}

        def pack(tensor: Tensor) -> Any:
            index = where.get(tensor.untyped_storage().data_ptr())
            if index is None:
                return tensor
            return index, tensor.size(), tensor.stride(), tensor.storage_offset()

        def unpack(kept: Any) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            index, size, stride, offset = kept
            if self._gathered is None:
                self._gathered = self._gather()
            whole: Tensor = self._gathered[index].as_strided(size, stride, offset)
            return whole

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            out: Tensor = functional_call(self.__dict__["module"], dict(zip(self.names, whole, strict=True)), inputs)
        return out

    def _gather(self) -> list[Tensor]:
        packed = torch.cat([part.detach() for part in self.parts])
        n = self._group.size()
        received = exchange(
            [packed] * n, [(sum(sizes[rank] for sizes in self._sizes),) for rank in range(n)], self._group
        )
        pieces = [torch.split(part, [sizes[rank] for sizes in self._sizes]) for rank, part in enumerate(received)]
        return [
            torch.cat([pieces[rank][index] for rank in range(n)]).view(shape)
            for index, shape in enumerate(self._shapes)
        ]

    def _scatter(self, grads: tuple[Tensor | None, ...]) -> list[Tensor]:
        """This worker's parts of the gradients, summed over the workers."""
        n, own = self._group.size(), dist.get_rank(self._group)
        flat = [
            (part.new_zeros(sum(sizes)) if grad is None else grad.reshape(-1)).split(list(sizes))
            for grad, sizes, part in zip(grads, self._sizes, self.parts, strict=True)
        ]
        mine = [sizes[own] for sizes in self._sizes]
        received = exchange(
            [torch.cat([one[rank] for one in flat]) for rank in range(n)], [(sum(mine),)] * n, self._group
        )
        total = received[0].clone()
        for part in received[1:]:
            total += part
        return list(torch.split(total, mine))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sharded: Sharded, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.sharded = sharded
        ctx.set_materialize_grads(False)
        return tuple(sharded._gather())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        sharded: Sharded = ctx.sharded
        sharded._gathered = None  # the layer's backward pass is over
        sharded.took_part = [before or grad is not None for before, grad in zip(sharded.took_part, grads, strict=True)]
        return None, *sharded._scatter(grads)


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over the rows of all workers of a stage; torch's own needs a GPU.

    Takes over the parameters and buffers of the layer that it replaces.
    """

    def __init__(self, plain: nn.modules.batchnorm._BatchNorm, group: Group) -> None:
        nn.Module.__init__(self)
        self._group = group
        for name in ("num_features", "eps", "momentum", "affine", "track_running_stats"):
            setattr(self, name, getattr(plain, name))
        self._parameters = plain._parameters
        self._buffers = plain._buffers
        self._non_persistent_buffers_set = plain._non_persistent_buffers_set
        self.training = plain.training

    def _check_input_dim(self, input: Tensor) -> None: ...

    def forward(self, x: Tensor) -> Tensor:
        """As torch's, over the rows of all workers."""
        if not self.training and self.running_mean is not None:
            return functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        out, mean, variance, count = _Normalise.apply(  # type: ignore[no-untyped-call]
            x, self.weight, self.bias, self.eps, self._group
        )
        if self.training and self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
            unbiased = variance * (count / (count - 1).clamp(min=1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)
        normal: Tensor = out
        return normal


class _Normalise(torch.autograd.Function):
    """The statistics are combined as by Chan et al. (1979): no cancellation, whatever the mean.

    The passes over the whole tensor are torch's own: its statistics, and its normalisation by given statistics. The
    gradients of the latter with respect to weight and bias are the two sums that all workers need.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Group) -> Any:
        # float64, for these few numbers: a variance from parts must be as exact as one over all rows
        count = torch.tensor([x.numel() // x.shape[1]], dtype=torch.float64)
        exact = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        mean, variance = torch.batch_norm_update_stats(exact, None, None, 0.0)
        parts = exchange(
            [torch.cat([count, mean.double(), variance.double()])] * group.size(),
            [(1 + 2 * x.shape[1],)] * group.size(),
            group,
        )
        table = torch.stack(parts)
        counts, means, variances = table[:, :1], table[:, 1 : 1 + x.shape[1]], table[:, 1 + x.shape[1] :]
        total = counts.sum()
        mean64 = (counts * means).sum(0) / total
        variance64 = (counts * (variances + (means - mean64) ** 2)).sum(0) / total
        mean, variance = mean64.to(exact.dtype), variance64.to(exact.dtype)
        out = functional.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.how = float(total), eps, group, bias is not None
        ctx.mark_non_differentiable(mean, variance, total)
        return out, mean, variance, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad = grads[0]
        x, weight, mean, variance = ctx.saved_tensors
        total, eps, group, has_bias = ctx.how
        shape = [1, -1] + [1] * (x.dim() - 2)
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, variance, None, None, False, eps, [True, True, True]
        )
        sums = torch.stack(
            exchange(
                [torch.cat([grad_bias.double(), grad_weight.double()])] * group.size(),
                [(2 * x.shape[1],)] * group.size(),
                group,
            )
        ).sum(0)
        all_bias, all_weight = (sums.to(mean.dtype) / total).split(x.shape[1])
        # dx = factor (dy - mean(dy) - (x - mean) scale mean(dy normal)); the first term is in grad_x already
        scale = torch.rsqrt(variance + eps)
        factor = scale if weight is None else scale * weight
        slope = -factor * scale * all_weight
        offset = -factor * all_bias - slope * mean
        grad_x.addcmul_(x, slope.to(grad_x.dtype).view(shape)).add_(offset.to(grad_x.dtype).view(shape))
        return (
            grad_x,
            None if weight is None else grad_weight.to(weight.dtype),
            grad_bias.to(mean.dtype) if has_bias else None,
            None,
            None,
        )


class Dropout(nn.Module):
    """Dropout whose mask depends on seed, step, layer, row and feature alone: the same under every plan.

    The bits come from a counter (in the manner of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011),
    hashed by the finaliser of MurmurHash3, so each worker computes only the part of the mask that it needs.

    Args:
        p: share of the features that become 0.
        layer: the number of this dropout layer in the network.
        cut: where features are divided, how many there are, and the first of this worker's; None where rows are.
    """

    def __init__(self, p: float, layer: int, context: ForwardContext, cut: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.p, self._layer, self._context, self._cut = p, layer, context, cut
        self._serial, self._uses = -1, 0
        self._keys: dict[tuple[int, ...], Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """As torch's, with the mask described above."""
        context = self._context
        if not self.training or self.p == 0 or x.numel() == 0:
            return x
        if self._serial != context.serial:
            self._serial, self._uses = context.serial, 0
        self._uses += 1
        rows = context.own if self._cut is None else context.all
        if x.shape[0] % len(rows):
            return functional.dropout(x, self.p)  # the first dimension is not of samples
        key = (context.seed, context.step, self._layer, self._uses)
        of_rows = torch.from_numpy(_bits(rows, *key))
        shape = (x.shape[0] // len(rows), *x.shape[1:]) if x.shape[0] != len(rows) else tuple(x.shape[1:])
        if shape not in self._keys:
            self._keys[shape] = torch.from_numpy(_bits(self._features(shape)))
        bits = of_rows[:, None] ^ self._keys[shape]
        bits.mul_(-2048144789).bitwise_xor_((bits >> 15).bitwise_and_(0x1FFFF))
        bits.mul_(-1028477387).bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF)).bitwise_and_(0x7FFFFFFF)
        keep = (bits >= min(round(self.p * 2**31), 2**31 - 1)).view(x.shape).to(x.dtype)
        return x * keep.mul_(1 / (1 - self.p) if self.p < 1 else 0.0)

    def _features(self, shape: tuple[int, ...]) -> NDArray[np.uint64]:
        if self._cut is None:
            return np.arange(math.prod(shape), dtype=np.uint64)
        width, first = self._cut
        before = np.arange(math.prod(shape[:-1]), dtype=np.uint64)[:, None] * np.uint64(width)
        numbers: Any = before + np.uint64(first) + np.arange(shape[-1], dtype=np.uint64)
        return np.asarray(numbers.reshape(-1), np.uint64)


def _bits(counters: NDArray[np.uint64], *key: int) -> NDArray[np.int32]:
    """31 good bits and a sign for each counter, by rounds of SplitMix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        state = np.uint64(0x9E3779B97F4A7C15)
        for word in key:
            state = _mix(state ^ np.uint64(word % 2**64))
        mixed = _mix(counters * np.uint64(0x9E3779B97F4A7C15) + state)
    bits: NDArray[np.int32] = (mixed >> np.uint64(32)).astype(np.uint32).view(np.int32)
    return bits


def _mix(z: Any) -> Any:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
