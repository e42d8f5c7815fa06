"""Convolutional networks, on pictures."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from rushhour.testing.gallery.dataset import CLASSES
from rushhour.testing.gallery.layers import Joined, conv, head


def residual() -> nn.Module:
    """Two residual blocks."""
    blocks = [Joined("add", nn.Identity(), nn.Sequential(conv(16, 16), conv(16, 16))) for _ in range(2)]
    return nn.Sequential(conv(3, 16), *blocks, head(16))


def inception() -> nn.Module:
    """Inception: parallel branches with kernels of different sizes."""
    pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(16, 8, 1))
    return nn.Sequential(conv(3, 16), Joined("cat", conv(16, 8, 1), conv(16, 8), conv(16, 8, 5), pooled), head(32))


def grouped() -> nn.Module:
    """Convolutions in 8 groups."""
    return nn.Sequential(conv(3, 16), conv(16, 32, groups=8), conv(32, 32, groups=4), head(32))


def depthwise() -> nn.Module:
    """Inverted residuals: MobileNet's."""
    block = nn.Sequential(conv(16, 48, 1), conv(48, 48, groups=48), nn.Conv2d(48, 16, 1), nn.BatchNorm2d(16))
    return nn.Sequential(conv(3, 16, stride=2), Joined("add", nn.Identity(), block), head(16))


def dense() -> nn.Module:
    """DenseNet: each layer takes the outputs of all layers before it."""
    layers = [Joined("cat", nn.Identity(), conv(16 + 8 * at, 8)) for at in range(3)]
    return nn.Sequential(conv(3, 16), *layers, head(40))


def transposed() -> nn.Module:
    """Downsampling, then a transposed convolution."""
    up = nn.Sequential(nn.ConvTranspose2d(32, 16, 2, stride=2), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(conv(3, 16), conv(16, 32, stride=2), up, head(16))


class _Unet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.down, self.low = conv(3, 16), nn.MaxPool2d(2), conv(16, 16)
        self.after, self.head = conv(32, 16), head(16)

    def forward(self, x: Tensor) -> Tensor:
        high = self.first(x)
        low = functional.interpolate(self.low(self.down(high)), scale_factor=2.0, mode="nearest")
        out: Tensor = self.head(self.after(torch.cat([high, low], 1)))
        return out


def unet() -> nn.Module:
    """U-Net: a skip connection around the lower resolution."""
    return _Unet()


def channel_shuffled() -> nn.Module:
    """ShuffleNet: channels are shuffled between grouped convolutions."""
    return nn.Sequential(conv(3, 16), conv(16, 16, groups=4), nn.ChannelShuffle(4), conv(16, 16, groups=4), head(16))


def pixel_shuffled() -> nn.Module:
    """Pixel shuffle and its inverse."""
    return nn.Sequential(conv(3, 16), nn.PixelUnshuffle(2), conv(64, 32), nn.PixelShuffle(2), conv(8, 16), head(16))


class _Excited(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(width, 4), nn.ReLU(), nn.Linear(4, width), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x * self.gate(x.mean((2, 3)))[:, :, None, None]
        return out


def squeeze_excited() -> nn.Module:
    """Squeeze-and-excitation: channels weighted by a global average."""
    return nn.Sequential(conv(3, 16), _Excited(16), conv(16, 16), head(16))


class _Tutorial(nn.Module):
    """As tutorials have it: convolutions, `view`, dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 16, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(16 * 3 * 3, 32), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.conv1(x)), 2)
        x = functional.max_pool2d(functional.relu(self.conv2(x)), 2)
        x = x.view(-1, 16 * 3 * 3)
        out: Tensor = self.fc2(functional.relu(self.fc1(x)))
        return out


def tutorial() -> nn.Module:
    """The network of the torch tutorial."""
    return _Tutorial()


def dilated() -> nn.Module:
    """Dilated and asymmetric kernels."""
    wide = nn.Conv2d(16, 16, 3, padding=2, dilation=2)
    return nn.Sequential(conv(3, 16), wide, nn.ReLU(), nn.Conv2d(16, 16, (1, 3)), nn.Conv2d(16, 16, (3, 1)), head(16))


class _Next(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depth, self.norm = nn.Conv2d(16, 16, 5, padding=2, groups=16), nn.LayerNorm(16)
        self.wide, self.narrow = nn.Linear(16, 48), nn.Linear(48, 16)
        self.scale = nn.Parameter(torch.full((16,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        y = self.scale * self.narrow(functional.gelu(self.wide(y)))
        out: Tensor = x + y.permute(0, 3, 1, 2)
        return out


def next_block() -> nn.Module:
    """ConvNeXt's block: channels last inside, a layer scale near zero."""
    return nn.Sequential(conv(3, 16), _Next(), head(16))


class _Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = conv(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.rand(x.shape[0], 1, 1, 1) > 0.2 if self.training else torch.ones(())
        keep = kept / 0.8 if self.training else kept
        out: Tensor = x + self.inner(x) * keep
        return out


def stochastic_depth() -> nn.Module:
    """Stochastic depth: blocks are skipped at random, per sample."""
    return nn.Sequential(conv(3, 16), _Dropped(), head(16))


class _Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = conv(3, 8), nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2)
        out: Tensor = self.out((x @ x.transpose(1, 2) / x.shape[2]).flatten(1))
        return out


def bilinear() -> nn.Module:
    """Bilinear pooling: products of features."""
    return _Bilinear()


def gated() -> nn.Module:
    """A gate: one branch multiplies the other."""
    gate = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Sigmoid())
    return nn.Sequential(Joined("multiply", nn.Conv2d(3, 16, 3, padding=1), gate), nn.PReLU(16), head(16))


def all_convolutional() -> nn.Module:
    """Answers of shape `(n, classes, 1, 1)`."""
    return nn.Sequential(conv(3, 16), nn.Conv2d(16, CLASSES, 1), nn.AdaptiveAvgPool2d(1))
