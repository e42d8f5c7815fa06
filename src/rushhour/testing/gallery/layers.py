"""Layers that several networks of the gallery share."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from rushhour.testing.gallery.dataset import CLASSES


def conv(inputs: int, outputs: int, size: int = 3, **more: Any) -> nn.Sequential:
    """Convolution, batch normalisation, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False, **more), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def head(width: int) -> nn.Sequential:
    """Global average pooling and a dense layer to the classes."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


class Joined(nn.Module):
    """Parallel branches: added, concatenated or multiplied."""

    def __init__(self, how: Literal["add", "cat", "multiply"], *branches: nn.Module) -> None:
        super().__init__()
        self.branches, self._how = nn.ModuleList(branches), how

    def forward(self, x: Tensor) -> Tensor:
        """The joined outputs of the branches."""
        outs = [branch(x) for branch in self.branches]
        if self._how == "cat":
            return torch.cat(outs, 1)
        out: Tensor = outs[0]
        for other in outs[1:]:
            out = out + other if self._how == "add" else out * other
        return out
