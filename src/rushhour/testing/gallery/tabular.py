"""Dense networks: on rows, and on pictures as rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rushhour.testing.gallery.dataset import CLASSES


class _Viewed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.out = nn.Linear(3 * 12 * 12, 24), nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(torch.tanh(self.dense(x.view(x.size(0), -1))))
        return out


def viewed() -> nn.Module:
    """Dense layers on pictures as rows."""
    return _Viewed()


def normed_rows() -> nn.Module:
    """A perceptron with batch normalisation and dropout."""
    return nn.Sequential(nn.Linear(10, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, CLASSES))


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(10, 3), nn.ModuleList(nn.Linear(10, CLASSES) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        out: Tensor = (torch.stack([expert(x) for expert in self.experts], -1) * weights[:, None]).sum(-1)
        return out


def experts() -> nn.Module:
    """A mixture of experts."""
    return _Experts()


class _Value(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x).squeeze(-1)
        return out


def one_value() -> nn.Module:
    """A value for each sample, `(n,)`."""
    return _Value()


class _Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.out = nn.Linear(3, 32), nn.Linear(3, 32), nn.Linear(32, CLASSES)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        out: Tensor = self.out(torch.relu(self.left(left) + self.right(right)))
        return out


def pair() -> nn.Module:
    """Two inputs."""
    return _Pair()
