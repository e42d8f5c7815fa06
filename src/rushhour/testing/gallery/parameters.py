"""Networks with unusual parameters, normalisations and buffers, on pictures."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from rushhour.testing.gallery.dataset import CLASSES
from rushhour.testing.gallery.layers import conv, head


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), head(16)
        self.third = nn.Conv2d(16, 16, 3, padding=1)
        self.third.weight = self.second.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.third(self.second(self.first(x).relu()).relu()).relu())
        return out


def tied() -> nn.Module:
    """Two layers share their weights."""
    return _Tied()


def repeated() -> nn.Module:
    """One module, used three times."""
    block = conv(16, 16)
    return nn.Sequential(conv(3, 16), block, block, block, head(16))


def frozen() -> nn.Module:
    """A frozen backbone in evaluation mode, and a head that is trained."""
    backbone = nn.Sequential(conv(3, 16), conv(16, 16)).eval().requires_grad_(False)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean += 0.5
    return nn.Sequential(backbone, head(16))


def frozen_middle() -> nn.Module:
    """One frozen layer in the middle."""
    network = nn.Sequential(conv(3, 16), conv(16, 16), conv(16, 16), head(16))
    network[1].requires_grad_(False)
    return network


def lazy() -> nn.Module:
    """Lazy layers: their sizes come from the first batch."""
    return nn.Sequential(
        nn.LazyConv2d(16, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(24), nn.ReLU(),
        nn.LazyLinear(CLASSES),
    )  # fmt: skip


def weight_normed() -> nn.Module:
    """Weight normalisation: direction and length are separate parameters."""
    norm = nn.utils.parametrizations.weight_norm
    return nn.Sequential(norm(nn.Conv2d(3, 16, 3)), nn.ReLU(), norm(nn.Conv2d(16, 16, 3)), nn.ReLU(), head(16))


def spectral_normed() -> nn.Module:
    """Spectral normalisation: its buffers estimate the largest singular value step by step."""
    norm = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(norm(nn.Conv2d(3, 16, 3)), nn.ReLU(), norm(nn.Conv2d(16, 16, 3)), nn.ReLU(), head(16))


def instance_normed() -> nn.Module:
    """Instance normalisation with running statistics."""
    norm = nn.InstanceNorm2d(16, affine=True, track_running_stats=True)
    return nn.Sequential(nn.Conv2d(3, 16, 3), norm, nn.ReLU(), head(16))


def group_normed() -> nn.Module:
    """Group normalisation."""
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.SiLU(), head(16))


class _Centred(nn.Module):
    """Keeps the mean of its inputs in a buffer, which it replaces at each step."""

    centre: Tensor
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(16))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.centre = 0.9 * self.centre + 0.1 * x.detach().mean((0, 2, 3))
            self.seen = self.seen + 1
        return x - self.centre[:, None, None]


def buffered() -> nn.Module:
    """Buffers that training updates."""
    return nn.Sequential(nn.Conv2d(3, 16, 3), _Centred(), nn.ReLU(), head(16))


class _Strided(nn.Module):
    """Buffers that are not contiguous."""

    across: Tensor
    wide: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("across", torch.arange(32.0).view(2, 16).t() / 32)
        self.register_buffer("wide", torch.ones(1, 16).expand(2, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.across @ self.wide + x


def non_contiguous() -> nn.Module:
    """Buffers that are views."""
    return nn.Sequential(conv(3, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), _Strided(), nn.Linear(16, CLASSES))


class _Hyper(nn.Module):
    """The weights of a convolution come from a dense layer."""

    code: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("code", torch.linspace(-1, 1, 8))
        self.maker, self.head = nn.Linear(8, 16 * 3 * 3 * 3), head(16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(functional.conv2d(x, self.maker(self.code).view(16, 3, 3, 3) / 5).relu())
        return out


def hypernet() -> nn.Module:
    """A hypernetwork: one network makes the weights of another."""
    return _Hyper()


class _Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Parameter(torch.randn(3, 12, 16) / 6), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(torch.einsum("nchw,chk->nk", x, self.mix).relu())
        return out


def einsum() -> nn.Module:
    """An einsum over several dimensions."""
    return _Einsum()


class _Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.spare = nn.Sequential(conv(3, 16), head(16)), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out


def idle() -> nn.Module:
    """A layer that is not used."""
    return _Idle()
