"""A small convolutional network for signals: heartbeats, engine noise, motion sensors."""

from __future__ import annotations

from torch import Tensor, nn

from rushhour.errors import ModelError

_KERNELS = (9, 5, 3)
"""Of the three convolutions, as of Wang et al., whose first has 8: an odd size keeps the length."""
_LONG = 256
"""Above this length the first convolution takes every second step, and again above twice of it."""


def signal(length: int, channels: int, outputs: int, width: int = 64) -> nn.Sequential:
    """A fully convolutional network with a mean over time (Wang, Yan and Oates, 2017).

    Takes float32 `(n, length)` or `(n, length, channels)`, gives logits or values `(n, outputs)`.

    Args:
        length: steps of a signal; decides only how far the first layer thins it out.
        channels: measured at each step.
        outputs: length of the answer.
        width: channels of the first and the last convolution; the one between has twice as many.

    Raises:
        ModelError: if a size is below one.
    """
    if min(length, channels, outputs, width) < 1:
        raise ModelError(
            "cannot build the signal network",
            f"every size is at least 1, but got length={length}, channels={channels}, outputs={outputs}, width={width}",
            "use larger values",
        )
    layers: list[nn.Module] = [ByChannel()]
    before, stride = channels, stride_of(length)
    for kernel, after in zip(_KERNELS, (width, 2 * width, width), strict=True):
        layers += [
            nn.Conv1d(before, after, kernel, stride=stride, padding=kernel // 2, bias=False),
            nn.BatchNorm1d(after),
            nn.ReLU(),
        ]
        before, stride = after, 1
    return nn.Sequential(*layers, _Mean(), nn.Linear(before, outputs))


def stride_of(length: int) -> int:
    """Steps that the first convolution moves at a time, in signals of this length."""
    return 1 if length <= _LONG else 2 if length <= 2 * _LONG else 4


class ByChannel(nn.Module):
    """The wire's `(n, length)` or `(n, length, channels)` as `(n, channels, length)`."""

    def forward(self, x: Tensor) -> Tensor:
        """Without a copy."""
        return x.unsqueeze(1) if x.dim() == 2 else x.transpose(1, 2)


class _Mean(nn.Module):
    """The mean over time, `(n, c, length)` to `(n, c)`: one node in ONNX."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=2)
