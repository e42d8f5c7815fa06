"""The functions with windows that a converted network may call: padding, convolution, pooling, other sizes."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

_CONVOLUTIONS: Final = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_MAX_POOLS: Final = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
_AVERAGE_POOLS: Final = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}
_ADAPTIVE: Final = {
    1: (functional.adaptive_avg_pool1d, functional.adaptive_max_pool1d),
    2: (functional.adaptive_avg_pool2d, functional.adaptive_max_pool2d),
    3: (functional.adaptive_avg_pool3d, functional.adaptive_max_pool3d),
}


def pad(x: Tensor, widths: list[int], mode: str, value: Any) -> Tensor:
    """Wider, or narrower where a width is below 0.

    Args:
        x: any tensor.
        widths: at the beginning of every axis, then at the end of every axis.
        mode: `constant`, `reflect`, `edge` or `wrap`.
        value: of `constant`.
    """
    rank = x.dim()
    pairs = [(widths[axis], widths[axis + rank]) for axis in range(rank)]
    if mode == "constant":
        return functional.pad(x, [width for pair in reversed(pairs) for width in pair], "constant", value)
    for axis, (before, after) in enumerate(pairs):
        if before or after:
            x = x.index_select(axis, _mirrored(x.shape[axis], before, after, mode, x.device))
    return x


def _mirrored(size: int, before: int, after: int, mode: str, device: torch.device) -> Tensor:
    places = torch.arange(-before, size + after, device=device)
    if mode == "edge":
        return places.clamp(0, size - 1)
    if mode == "wrap":
        return torch.remainder(places, size)
    around = torch.remainder(places, max(1, 2 * (size - 1)))
    return torch.where(around >= size, 2 * (size - 1) - around, around)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Convolution with computed weights."""
    out: Tensor = _CONVOLUTIONS[x.dim() - 2](x, weight, bias, stride, padding, dilation, groups)
    return out


def max_pool(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], ceiling: bool
) -> Tensor:
    """Largest in windows."""
    out: Tensor = _MAX_POOLS[x.dim() - 2](x, kernel, stride, padding, dilation, ceiling)
    return out


def average_pool(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], ceiling: bool, counts_padding: bool
) -> Tensor:
    """Mean of windows."""
    out: Tensor = _AVERAGE_POOLS[x.dim() - 2](x, kernel, stride, padding, ceiling, counts_padding)
    return out


def average_pool_unevenly(x: Tensor, kernel: list[int], stride: list[int], widths: list[int]) -> Tensor:
    """Mean of windows over uneven padding, which does not count."""
    pool = _AVERAGE_POOLS[x.dim() - 2]
    summed: Tensor = pool(pad(x, widths, "constant", 0.0), kernel, stride)
    counted: Tensor = pool(pad(torch.ones_like(x[:1, :1]), [*widths], "constant", 0.0), kernel, stride)
    return summed / counted


def pool_all(x: Tensor, largest: bool) -> Tensor:
    """Mean or largest of each channel."""
    out: Tensor = _ADAPTIVE[x.dim() - 2][int(largest)](x, 1)
    return out


def interpolate(x: Tensor, size: list[int], mode: str, align_corners: bool | None) -> Tensor:
    """Another size of the axes behind the first two, by torch's own function."""
    return functional.interpolate(x, size, mode=mode, align_corners=align_corners)


def mix(x: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Each along an axis as a sum of the old ones; the matrix is `(new, old)`."""
    return torch.movedim(torch.movedim(x, axis, -1) @ matrix.T, -1, axis)
