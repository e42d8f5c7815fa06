"""Attention and mixing: transformers on pictures and on series."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rushhour.testing.gallery.dataset import CLASSES


class _Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 3, stride=3)
        self.place = nn.Parameter(torch.zeros(1, 17, 16))
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.out = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = self.block(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place)
        out: Tensor = self.out(x[:, 0])
        return out


def patched() -> nn.Module:
    """A vision transformer."""
    return _Patches()


class _Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, 16, 3, stride=3), nn.LayerNorm(16)
        self.tokens, self.channels = nn.Linear(16, 16), nn.Linear(16, 16)
        self.out = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm(x).transpose(1, 2)).relu().transpose(1, 2)
        out: Tensor = self.out((x + self.channels(x).relu()).mean(1))
        return out


def mixer() -> nn.Module:
    """An MLP-Mixer: dense layers over positions and over channels."""
    return _Mixer()


class Encoder(nn.Module):
    """torch's transformer encoder, averaged over the second axis."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=batch_first)
        self.layers, self.out = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Series to logits."""
        out: Tensor = self.out(self.layers(x).mean(1))
        return out


def encoder() -> nn.Module:
    """torch's transformer."""
    return Encoder(batch_first=True)


class _Rotary(nn.Module):
    """Rotary attention, whose table is made at the first call, and kept."""

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.out = nn.Linear(8, 24), nn.Linear(8, CLASSES)
        self.table: tuple[Tensor, Tensor] | None = None

    def turned(self, x: Tensor) -> Tensor:
        """Pairs of features, rotated by an angle that grows along the series."""
        if self.table is None or len(self.table[0]) < x.shape[1]:
            angles = torch.outer(torch.arange(x.shape[1]).float(), 10.0 ** -torch.arange(4).float())
            self.table = angles.cos(), angles.sin()
        cos, sin = (part[: x.shape[1]] for part in self.table)
        left, right = x.chunk(2, -1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.parts(x).chunk(3, -1)
        scores = self.turned(query) @ self.turned(key).transpose(1, 2) / math.sqrt(8)
        out: Tensor = self.out((scores.softmax(-1) @ value).mean(1))
        return out


def rotary() -> nn.Module:
    """Rotary attention with a cached table."""
    return _Rotary()
