"""Exchanges of rows and features between workers, each with its gradient. Gradients are sums, never means.

All are built on all-to-all: it sends the fewest bytes on any backend (gloo's own reduce-scatter sends twice as many)
and takes unequal parts. The sums are computed here, in the order of the ranks, so that results repeat bit for bit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup


def shares(total: int, parts: int) -> tuple[int, ...]:
    """`total` things divided into `parts`, as evenly as possible; the first parts have one more."""
    each, more = divmod(total, parts)
    return tuple(each + (index < more) for index in range(parts))


def exchange(sent: list[Tensor], shapes: list[tuple[int, ...]], group: Group) -> list[Tensor]:
    """Send the i-th tensor to the i-th worker of the group, and get one of the i-th shape from each."""
    out_sizes = [math.prod(shape) for shape in shapes]
    packed = torch.cat([tensor.reshape(-1) for tensor in sent])
    received = packed.new_empty(sum(out_sizes))
    dist.all_to_all_single(received, packed, out_sizes, [tensor.numel() for tensor in sent], group=group)
    return [part.view(shape) for part, shape in zip(received.split(out_sizes), shapes, strict=True)]  # type: ignore[no-untyped-call]


def gather(part: Tensor, sizes: tuple[int, ...], group: Group) -> Tensor:
    """The parts of all workers, one after another along the first dimension.

    Args:
        part: `(sizes[own rank], ...)`.
        sizes: of each worker's first dimension.
    """
    shapes = [(size, *part.shape[1:]) for size in sizes]
    received = part.new_empty((sum(sizes), *part.shape[1:]))
    width = math.prod(part.shape[1:])
    # the same part goes to all workers: repeated, because all-to-all reads one buffer
    packed = part.reshape(-1).repeat(len(sizes))
    dist.all_to_all_single(
        received.view(-1), packed, [size * width for size in sizes], [part.numel()] * len(shapes), group=group
    )
    return received


def scatter_sum(whole: Tensor, sizes: tuple[int, ...], group: Group) -> Tensor:
    """The sum over all workers of this worker's rows: `(sum(sizes), ...)` on each becomes `(sizes[own rank], ...)`."""
    own = (sizes[dist.get_rank(group)], *whole.shape[1:])
    received = exchange(list(whole.split(list(sizes))), [own] * len(sizes), group)  # type: ignore[no-untyped-call]
    total = received[0].clone()
    for part in received[1:]:
        total += part
    return total


def to_features(x: Tensor, rows: tuple[int, ...], group: Group) -> Tensor:
    """Own rows with all features to all rows with own features: `(rows[own], ..., f)` to `(sum(rows), ..., f[own])`."""
    out: Tensor = _ToFeatures.apply(x, rows, group)  # type: ignore[no-untyped-call]
    return out


def to_rows(x: Tensor, features: int, rows: tuple[int, ...], group: Group) -> Tensor:
    """The inverse of `to_features`: `(sum(rows), ..., f[own])` to `(rows[own], ..., features)`."""
    out: Tensor = _ToRows.apply(x, features, rows, group)  # type: ignore[no-untyped-call]
    return out


def gather_rows(x: Tensor, rows: tuple[int, ...], group: Group) -> Tensor:
    """Own rows to all rows; the gradient is summed over the workers and returned as own rows."""
    out: Tensor = _GatherRows.apply(x, rows, group)  # type: ignore[no-untyped-call]
    return out


def sum_rows(x: Tensor, rows: tuple[int, ...], group: Group) -> Tensor:
    """All rows, each worker with its own summand, to own rows of the sum."""
    out: Tensor = _SumRows.apply(x, rows, group)  # type: ignore[no-untyped-call]
    return out


def _swap_to_features(x: Tensor, rows: tuple[int, ...], group: Group) -> Tensor:
    widths = shares(x.shape[-1], len(rows))
    own = widths[dist.get_rank(group)]
    middle = tuple(x.shape[1:-1])
    received = exchange(list(x.split(list(widths), -1)), [(count, *middle, own) for count in rows], group)  # type: ignore[no-untyped-call]
    return torch.cat(received)


def _swap_to_rows(x: Tensor, features: int, rows: tuple[int, ...], group: Group) -> Tensor:
    widths = shares(features, len(rows))
    own = rows[dist.get_rank(group)]
    middle = tuple(x.shape[1:-1])
    received = exchange(list(x.split(list(rows))), [(own, *middle, width) for width in widths], group)  # type: ignore[no-untyped-call]
    return torch.cat(received, -1)


class _ToFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: tuple[int, ...], group: Group) -> Tensor:
        ctx.how = x.shape[-1], rows, group
        return _swap_to_features(x, rows, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _swap_to_rows(grads[0], *ctx.how), None, None


class _ToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, features: int, rows: tuple[int, ...], group: Group) -> Tensor:
        ctx.how = rows, group
        return _swap_to_rows(x, features, rows, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _swap_to_features(grads[0], *ctx.how), None, None, None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: tuple[int, ...], group: Group) -> Tensor:
        ctx.how = rows, group
        return gather(x, rows, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return scatter_sum(grads[0], *ctx.how), None, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: tuple[int, ...], group: Group) -> Tensor:
        ctx.how = rows, group
        return scatter_sum(x, rows, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return gather(grads[0].contiguous(), *ctx.how), None, None
