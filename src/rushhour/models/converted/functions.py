"""The functions without weights that a converted network may call, with ONNX's meaning.

Each takes tensors first, then plain settings; shapes and axes are always settings. So each can be computed for
constants, and for tensors on the meta device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from rushhour.models.converted.windows import (
    average_pool,
    average_pool_unevenly,
    convolve,
    interpolate,
    max_pool,
    mix,
    pad,
    pool_all,
)

# Element by element.


def cast(x: Tensor, dtype: str) -> Tensor:
    """To another type; float to integer cuts off the fraction."""
    return x.to(getattr(torch, dtype))


def divide(x: Any, y: Any) -> Any:
    """Quotient; of integers cut off towards 0."""
    one = x if isinstance(x, Tensor) else y
    return torch.div(x, y) if one.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def power(x: Tensor, exponent: Any) -> Tensor:
    """In the type of the base."""
    return torch.pow(x, exponent).to(x.dtype)


def modulo(x: Tensor, y: Tensor, as_in_c: bool) -> Tensor:
    """Remainder, with the sign of the divisor, or of the dividend as in C."""
    return torch.fmod(x, y) if as_in_c else torch.remainder(x, y)


def maximum(several: list[Tensor]) -> Tensor:
    """The largest of each."""
    return functools.reduce(torch.maximum, several)


def minimum(several: list[Tensor]) -> Tensor:
    """The smallest of each."""
    return functools.reduce(torch.minimum, several)


def total(several: list[Tensor]) -> Tensor:
    """The sum of several."""
    return functools.reduce(torch.add, several)


def average(several: list[Tensor]) -> Tensor:
    """The mean of several."""
    return functools.reduce(torch.add, several) / len(several)


def clip(x: Tensor, low: Any, high: Any) -> Tensor:
    """Between bounds; None for no bound."""
    return x if low is None and high is None else torch.clamp(x, low, high)


def celu(x: Tensor, alpha: float) -> Tensor:
    """CELU."""
    return functional.celu(x, alpha)


def elu(x: Tensor, alpha: float) -> Tensor:
    """ELU."""
    return functional.elu(x, alpha)


def gelu(x: Tensor, approximate: str) -> Tensor:
    """GELU, exact (`none`) or by `tanh`."""
    return functional.gelu(x, approximate=approximate)


def hard_sigmoid(x: Tensor, alpha: float, beta: float) -> Tensor:
    """`alpha x + beta`, between 0 and 1."""
    if math.isclose(alpha, 1 / 6, rel_tol=1e-5) and beta == 0.5:
        return functional.hardsigmoid(x)
    return (alpha * x + beta).clamp(0.0, 1.0)


def leaky_relu(x: Tensor, slope: float) -> Tensor:
    """Leaky ReLU."""
    return functional.leaky_relu(x, slope)


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """PReLU with a slope that broadcasts."""
    return torch.where(x < 0, slope * x, x)


def selu(x: Tensor, alpha: float, gamma: float) -> Tensor:
    """SELU."""
    return gamma * functional.elu(x, alpha)


def shrink(x: Tensor, bias: float, threshold: float) -> Tensor:
    """Soft or hard shrinkage."""
    nothing = torch.zeros_like(x)
    return torch.where(x < -threshold, x + bias, torch.where(x > threshold, x - bias, nothing))


def thresholded_relu(x: Tensor, alpha: float) -> Tensor:
    """0 up to the threshold, x above it."""
    return torch.where(x > alpha, x, torch.zeros_like(x))


def infinite(x: Tensor, negative: bool, positive: bool) -> Tensor:
    """Which are infinite."""
    return torch.isinf(x) & ((x < 0) & negative | (x > 0) & positive)


# Reductions. Axes are never empty.


def reduce_mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Mean."""
    return x.mean(axes, keep)


def reduce_sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Sum, in the type of the elements."""
    return x.sum(axes, keep, dtype=x.dtype)


def reduce_max(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Largest."""
    return x.amax(axes, keep)


def reduce_min(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Smallest."""
    return x.amin(axes, keep)


def reduce_prod(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Product."""
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keep, dtype=x.dtype)
    return x


def reduce_norm(x: Tensor, axes: list[int], keep: bool, order: int) -> Tensor:
    """L1 or L2 norm."""
    return x.abs().sum(axes, keep) if order == 1 else x.square().sum(axes, keep).sqrt()


def reduce_sum_square(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Sum of squares."""
    return x.square().sum(axes, keep)


def reduce_log_sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Logarithm of the sum."""
    return x.sum(axes, keep).log()


def reduce_log_sum_exp(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Logarithm of the sum of exponentials."""
    return torch.logsumexp(x, axes, keep)


def arg_extreme(x: Tensor, axis: int, keep: bool, largest: bool, last: bool) -> Tensor:
    """Where the largest or smallest is; the first or the last of equal ones."""
    found = torch.argmax if largest else torch.argmin
    if not last:
        return found(x, axis, keep)
    return x.shape[axis] - 1 - found(x.flip(axis), axis, keep)


def softmax(x: Tensor, axis: int) -> Tensor:
    """Softmax along one axis."""
    return functional.softmax(x, axis)


def log_softmax(x: Tensor, axis: int) -> Tensor:
    """Logarithm of the softmax along one axis."""
    return functional.log_softmax(x, axis)


def softmax_from(x: Tensor, axis: int, logarithm: bool) -> Tensor:
    """Softmax over all axes from one on, as before opset 13."""
    flat = x.flatten(axis)
    return (functional.log_softmax(flat, axis) if logarithm else functional.softmax(flat, axis)).reshape(x.shape)


def hard_max(x: Tensor, axis: int) -> Tensor:
    """1 where the largest is, else 0."""
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, True), 1)


def cumulative_sum(x: Tensor, axis: int, exclusive: bool, backward: bool) -> Tensor:
    """Running sum."""
    turned = x.flip(axis) if backward else x
    summed = turned.cumsum(axis, dtype=x.dtype)
    if exclusive:
        summed = summed - turned
    return summed.flip(axis) if backward else summed


def top_k(x: Tensor, k: int, axis: int, largest: bool, ordered: bool) -> tuple[Tensor, Tensor]:
    """The k largest or smallest, and where they are."""
    values, places = torch.topk(x, k, axis, largest, ordered)
    return values, places


# Shapes.


def reshape(x: Tensor, shape: list[int]) -> Tensor:
    """To a shape; -1 takes the rest."""
    return x.reshape(shape)


def flatten(x: Tensor, first: int, last: int) -> Tensor:
    """Axes `first` to `last` as one."""
    return torch.flatten(x, first, last)


def permute(x: Tensor, axes: list[int]) -> Tensor:
    """Axes in another order."""
    return x.permute(axes)


def squeeze(x: Tensor, axes: list[int]) -> Tensor:
    """Without these axes of 1."""
    return x.squeeze(axes)


def unsqueeze(x: Tensor, axes: list[int]) -> Tensor:
    """With new axes of 1; these count in the result."""
    for axis in sorted(axes):
        x = x.unsqueeze(axis)
    return x


def expand(x: Tensor, shape: list[int]) -> Tensor:
    """Broadcast to a shape."""
    return x.expand(shape)


def tile(x: Tensor, repeats: list[int]) -> Tensor:
    """Repeated along each axis."""
    return x.repeat(repeats)


def concat(several: list[Tensor], axis: int) -> Tensor:
    """Joined along an axis."""
    return torch.cat(several, axis)


def split(x: Tensor, sizes: list[int], axis: int) -> tuple[Tensor, ...]:
    """Cut into parts along an axis."""
    return tuple(torch.split(x, sizes, axis))


def cut(x: Tensor, axis: int, start: int, end: int, step: int) -> Tensor:
    """A slice along one axis; bounds are inside the tensor, and a step below 0 reads backwards."""
    if step > 0:
        index = [slice(None)] * axis + [slice(start, end, step)]
        return x[tuple(index)]
    return x.index_select(axis, torch.arange(start, end, step, device=x.device))


def full_batch(x: Tensor, axis: int, start: int, step: int) -> Tensor:
    """A slice to the end of an axis of any size."""
    index = [slice(None)] * axis + [slice(start, None, step)]
    return x[tuple(index)]


def pick(x: Tensor, axis: int, index: int) -> Tensor:
    """One of an axis, which is gone then."""
    return x.select(axis, index)


def wrap(indices: Tensor, size: int) -> Tensor:
    """Negative indices count from the end."""
    return torch.where(indices < 0, indices + size, indices)


def take(x: Tensor, indices: Tensor, axis: int) -> Tensor:
    """Those of an axis that the indices name."""
    chosen = x.index_select(axis, indices.reshape(-1).long())
    return chosen.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


def take_elements(x: Tensor, indices: Tensor, axis: int) -> Tensor:
    """One element for each index, along an axis."""
    return torch.gather(x, axis, indices.long())


def take_nd(x: Tensor, indices: Tensor, batch_axes: int) -> Tensor:
    """Slices that the last axis of the indices names; the first axes of both belong together."""
    depth = indices.shape[-1]
    ahead = []
    for axis in range(batch_axes):
        shape = [1] * (indices.dim() - 1)
        shape[axis] = x.shape[axis]
        ahead.append(torch.arange(x.shape[axis], device=x.device).reshape(shape))
    parts = [indices[..., place].long() for place in range(depth)]
    return x[(*ahead, *parts)]


def put_nd(x: Tensor, indices: Tensor, updates: Tensor, how: str) -> Tensor:
    """A copy with slices, named by the last axis of the indices, replaced, or combined with others."""
    places = tuple(indices[..., place].long() for place in range(indices.shape[-1]))
    if how == "none":
        return x.index_put(places, updates)
    if how == "add":
        return x.index_put(places, updates, accumulate=True)
    raise ValueError(f"reduction {how}")


def put_elements(x: Tensor, indices: Tensor, updates: Tensor, axis: int, how: str) -> Tensor:
    """A copy with one element for each index replaced, or combined with another."""
    indices = indices.long()
    if how == "none":
        return x.scatter(axis, indices, updates)
    names = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
    return x.scatter_reduce(axis, indices, updates, names[how], include_self=True)


def one_hot(indices: Tensor, depth: int, values: Tensor, axis: int) -> Tensor:
    """The second value where the class is, else the first."""
    classes = torch.arange(depth, device=indices.device)
    wide = wrap(indices, depth).unsqueeze(axis)
    shape = [1] * wide.dim()
    shape[axis] = depth
    return torch.where(wide == classes.reshape(shape), values[1], values[0])


def triangle(x: Tensor, diagonal: int, upper: bool) -> Tensor:
    """What is above or below a diagonal; else 0."""
    return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)


def full(shape: list[int], value: Any, dtype: str) -> Tensor:
    """One value everywhere."""
    return torch.full(shape, value, dtype=getattr(torch, dtype))


def count_up(start: Any, end: Any, step: Any, dtype: str) -> Tensor:
    """From `start` to before `end`."""
    return torch.arange(start, end, step, dtype=getattr(torch, dtype))


def batch_size(x: Tensor, times: int, plus: int) -> int:
    """The number of samples, times a factor, and something added."""
    return x.shape[0] * times + plus


def depth_to_space(x: Tensor, block: int, mode: str) -> Tensor:
    """Channels into pixels."""
    if mode == "CRD":
        return functional.pixel_shuffle(x, block)
    _, channels, height, width = x.shape
    wide = x.reshape(-1, block, block, channels // block**2, height, width).permute(0, 3, 4, 1, 5, 2)
    return wide.reshape(-1, channels // block**2, height * block, width * block)


def space_to_depth(x: Tensor, block: int) -> Tensor:
    """Pixels into channels."""
    _, channels, height, width = x.shape
    wide = x.reshape(-1, channels, height // block, block, width // block, block).permute(0, 3, 5, 1, 2, 4)
    return wide.reshape(-1, channels * block**2, height // block, width // block)


# Products and normalisation.


def einsum(several: list[Tensor], equation: str) -> Tensor:
    """Einstein's sum."""
    return torch.einsum(equation, *several)


def batch_normalize(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, epsilon: float) -> Tensor:
    """Batch normalisation by computed statistics, in training too."""
    return functional.batch_norm(x, mean.detach(), variance.detach(), scale, bias, False, 0.0, epsilon)


def normalize(x: Tensor, axis: int, order: int) -> Tensor:
    """Divided by its norm along an axis; 0 stays 0."""
    norm = x.norm(order, axis, True)
    return torch.where(norm == 0, torch.zeros_like(x), x / torch.where(norm == 0, torch.ones_like(norm), norm))


def local_response(x: Tensor, size: int, alpha: float, beta: float, bias: float) -> Tensor:
    """Local response normalisation."""
    return functional.local_response_norm(x, size, alpha, beta, bias)


_OF_TORCH: Final[Sequence[tuple[str, Callable[..., Any]]]] = (
    *((name, getattr(torch, name)) for name in (
        "abs", "acos", "acosh", "add", "asin", "asinh", "atan", "atanh", "bitwise_and", "bitwise_not", "bitwise_or",
        "bitwise_xor", "ceil", "cos", "cosh", "eq", "erf", "exp", "floor", "ge", "gt", "isnan", "le", "log",
        "logical_and", "logical_not", "logical_or", "logical_xor", "lt", "matmul", "mul", "neg", "reciprocal", "relu",
        "round", "sigmoid", "sign", "sin", "sinh", "sqrt", "sub", "tan", "tanh", "where",
    )),
    *((name, getattr(functional, name)) for name in ("hardswish", "mish", "silu", "softplus", "softsign")),
)  # fmt: skip
_OWN: Final[Sequence[Callable[..., Any]]] = (
    arg_extreme, average, average_pool, average_pool_unevenly, batch_normalize, batch_size, cast, celu, clip, concat,
    convolve, count_up,
    cumulative_sum, cut, depth_to_space, divide, einsum, elu, expand, flatten, full, full_batch, gelu, hard_max,
    hard_sigmoid, infinite, interpolate, leaky_relu, local_response, log_softmax, max_pool, maximum, minimum, mix,
    modulo, normalize, one_hot, pad, permute, pick, pool_all, power, prelu, put_elements, put_nd, reduce_log_sum,
    reduce_log_sum_exp, reduce_max, reduce_mean, reduce_min, reduce_norm, reduce_prod, reduce_sum, reduce_sum_square,
    reshape, selu, shrink, softmax, softmax_from, space_to_depth, split, squeeze, take, take_elements, take_nd,
    thresholded_relu, tile, top_k, total, triangle, unsqueeze, wrap,
)  # fmt: skip

FUNCTIONS: Final[dict[str, Callable[..., Any]]] = {**dict(_OF_TORCH), **{each.__name__: each for each in _OWN}}
"""Name -> function. A program names no others."""
