"""Networks that training refuses, each for a reason of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from rushhour.testing.gallery.attention import Encoder
from rushhour.testing.gallery.dataset import CLASSES
from rushhour.testing.gallery.layers import conv, head


def mixing_encoder() -> nn.Module:
    """torch's transformer without `batch_first`: it takes the batch axis for time."""
    return Encoder(batch_first=False)


class _Across(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.out = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(torch.softmax(self.body(x), 0))
        return out


def softmax_over_batch() -> nn.Module:
    """Softmax over the wrong dimension."""
    return _Across()


def no_running_statistics() -> nn.Module:
    """Batch normalisation by the statistics of the batch, in serving too."""
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, track_running_stats=False), nn.ReLU(), head(16))


class _Late(nn.Module):
    """Mixes samples with a weight that begins at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.share = nn.Sequential(conv(3, 16), head(16)), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out + self.share * out.mean(0, keepdim=True)


def mixing_later() -> nn.Module:
    """Samples depend on each other, but not before the first step."""
    return _Late()


class _Squeezed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Sequential(conv(3, 16), nn.AdaptiveAvgPool2d(1)), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.body(x).squeeze())
        return out


def squeezed() -> nn.Module:
    """Squeezes all axes of size 1, the batch axis included."""
    return _Squeezed()


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.more = nn.Sequential(conv(3, 16), head(16)), nn.Linear(CLASSES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        if out.abs().mean() > 1e-9:
            out = self.more(out)
        return out


def branching() -> nn.Module:
    """Control flow that depends on the values."""
    return _Branching()


def all_frozen() -> nn.Module:
    """No trainable parameter."""
    return nn.Sequential(conv(3, 16), head(16)).requires_grad_(False)


class _Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Sequential(conv(3, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(functional.dropout(self.body(x), 0.5))
        return out


def noisy() -> nn.Module:
    """Dropout in serving too."""
    return _Noisy()


class _Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, 16), nn.Conv2d(16, CLASSES, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out if self.training else out.mean((2, 3))


def other_in_training() -> nn.Module:
    """One answer per pixel in training, one per picture in serving."""
    return _Pixels()
