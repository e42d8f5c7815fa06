"""Many short kernels at several time scales: a network for signals of which there are few samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rushhour.errors import ModelError
from rushhour.models.signal import ByChannel, stride_of

_SIZE = 9
_SHARP = 4.0
"""Steepness of the step that a share of time is counted with: trainable, and near the indicator of the source."""
_DROPOUT = 0.5


def kernels(length: int, channels: int, outputs: int, count: int = 480) -> nn.Module:
    """Convolutions of one layer at dilations 1, 2, 4, ..., and a dense layer over two features of each kernel.

    The features are the share of time that a kernel's answer is above its bias, and its maximum (Dempster, Petitjean
    and Webb, 2020: ROCKET). There the kernels stay random; here they begin so, with a mean of zero, and are trained
    too. It learns from hundreds of samples, where a deeper network needs thousands, and computes less.

    Takes float32 `(n, length)` or `(n, length, channels)`, gives logits or values `(n, outputs)`.

    Args:
        length: steps of a signal; decides the largest dilation, and how many steps the kernels move at a time.
        channels: measured at each step.
        outputs: length of the answer.
        count: of kernels, over all dilations.

    Raises:
        ModelError: if a size is below one, or a signal shorter than a kernel.
    """
    if min(channels, outputs, count) < 1 or length < _SIZE:
        raise ModelError(
            "cannot build the network of kernels",
            f"a signal has at least {_SIZE} steps and every other size is at least 1, but got length={length}, "
            f"channels={channels}, outputs={outputs}, count={count}",
            "use larger values, or mlp",
        )
    dilations = [1]
    while 2 * dilations[-1] * (_SIZE - 1) < length:
        dilations.append(2 * dilations[-1])
    return _Kernels(channels, outputs, max(1, count // len(dilations)), dilations, stride_of(length))


class _Kernels(nn.Module):
    def __init__(self, channels: int, outputs: int, each: int, dilations: list[int], stride: int) -> None:
        super().__init__()
        self.by_channel = ByChannel()
        self.scales = nn.ModuleList(_Scale(channels, each, dilation, stride) for dilation in dilations)
        features = 2 * each * len(dilations)
        self.standardise = nn.BatchNorm1d(features)
        self.dropout = nn.Dropout(_DROPOUT)
        self.out = nn.Linear(features, outputs)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.by_channel(x)
        features = torch.cat([scale(x) for scale in self.scales], dim=1)
        out: Tensor = self.out(self.dropout(self.standardise(features)))
        return out


class _Scale(nn.Module):
    """The kernels of one dilation: `(n, channels, length)` to `(n, 2 kernels)`."""

    def __init__(self, channels: int, count: int, dilation: int, stride: int) -> None:
        super().__init__()
        padding = dilation * (_SIZE // 2)
        self.kernels = nn.Conv1d(channels, count, _SIZE, stride=stride, dilation=dilation, padding=padding, bias=False)
        self.norm = nn.BatchNorm1d(count)
        with torch.no_grad():
            self.kernels.weight.normal_(std=1 / 3)
            self.kernels.weight -= self.kernels.weight.mean(dim=2, keepdim=True)
            self.norm.bias.normal_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.kernels(x))
        return torch.cat([torch.sigmoid(_SHARP * x).mean(dim=2), x.amax(dim=2)], dim=1)
