"""Recurrent and convolutional networks on series, signals and volumes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rushhour.testing.gallery.dataset import CLASSES


class _Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU], **more: Any) -> None:
        super().__init__()
        self.cells = kind(8, 12, batch_first=True, **more)
        self.out = nn.Linear(12 * (2 if more.get("bidirectional") else 1), CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.cells(x)[0][:, -1])
        return out


def lstm() -> nn.Module:
    """An LSTM."""
    return _Recurrent(nn.LSTM)


def gru() -> nn.Module:
    """A bidirectional GRU of two layers."""
    return _Recurrent(nn.GRU, bidirectional=True, num_layers=2)


class _Times(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv1d(8, 16, 3, padding=1), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.conv(x.permute(0, 2, 1)).relu().amax(2))
        return out


def over_time() -> nn.Module:
    """A convolution along a series."""
    return _Times()


def one_dimensional() -> nn.Module:
    """One-dimensional convolutions, on signals."""
    return nn.Sequential(
        nn.Conv1d(3, 16, 3, padding=1), nn.BatchNorm1d(16), nn.ReLU(), nn.MaxPool1d(2),
        nn.Conv1d(16, 16, 3, dilation=2), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, CLASSES),
    )  # fmt: skip


def three_dimensional() -> nn.Module:
    """Three-dimensional convolutions, on volumes."""
    return nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(8, 16, 2), nn.ReLU(),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(16, CLASSES),
    )  # fmt: skip
