"""A small U-Net: a class for each pixel."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from rushhour.errors import ModelError

_LARGE = 192
"""From this longer side on, the network computes at half the resolution, and its logits are enlarged."""


def unet(input_size: int, channels: int, classes: int, width: int = 12, depth: int = 3) -> nn.Module:
    """A U-Net (Ronneberger et al. 2015) with few channels: its way down halves the picture, its way up doubles it.

    Takes float32 `(n, channels, height, width)` of any sides, gives logits `(n, classes, height, width)`.

    Args:
        input_size: the longer side of a picture; decides only whether the stem makes it smaller first.
        channels: of a picture.
        classes: of a pixel.
        width: channels at full resolution; doubled at each step down.
        depth: steps down.

    Raises:
        ModelError: if a size is below one.
    """
    if min(input_size, channels, classes, width, depth) < 1:
        raise ModelError(
            "cannot build the U-Net",
            f"every size is at least 1, but got input_size={input_size}, channels={channels}, classes={classes}, "
            f"width={width}, depth={depth}",
            "use larger values",
        )
    return UNet(channels, classes, width, depth, stride=2 if input_size >= _LARGE else 1)


class UNet(nn.Module):
    """See `unet`."""

    def __init__(self, channels: int, classes: int, width: int, depth: int, stride: int) -> None:
        super().__init__()
        widths = [width * 2**step for step in range(depth + 1)]
        self.stem = convolution(channels, width, stride)
        self.down = nn.ModuleList(
            nn.Sequential(convolution(before, after, 2), convolution(after, after))
            for before, after in pairwise(widths)
        )
        self.up = nn.ModuleList(
            convolution(below + beside, beside) for below, beside in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """See `unet`."""
        sides = x.shape[2:]
        levels = [self.stem(x)]
        for down in self.down:
            levels.append(down(levels[-1]))
        out: Tensor = levels.pop()
        for up in self.up:
            beside = levels.pop()
            out = up(torch.cat([functional.interpolate(out, size=beside.shape[2:]), beside], dim=1))
        out = self.head(out)
        if out.shape[2:] == sides:
            return out
        enlarged: Tensor = functional.interpolate(out, size=sides, mode="bilinear", align_corners=False)
        return enlarged


def convolution(before: int, after: int, stride: int = 1) -> nn.Sequential:
    """A 3 x 3 convolution with normalisation and ReLU."""
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()
    )
