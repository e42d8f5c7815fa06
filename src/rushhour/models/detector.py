"""A small centre-point detector: a score and a box for each place of a picture."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from rushhour.errors import ModelError
from rushhour.models.unet import convolution

_RARE = 0.02
"""The score of every place before training: nearly all places are the centre of nothing (Lin et al. 2017)."""


def detector(channels: int, classes: int, width: int = 16) -> nn.Module:
    """A centre-point detector with stride 8 (Zhou et al. 2019, "Objects as points").

    Takes float32 `(n, channels, height, width)` of any sides, gives `(n, classes + 4, ceil(height / 8), ceil(width /
    8))` as `rushhour.task.Detection` says. Places see objects of up to about 100 pixels whole: the last two stages, at
    strides 16 and 32, are enlarged and added.

    Args:
        channels: of a picture.
        classes: of an object.
        width: channels of the first stage; doubled three times.

    Raises:
        ModelError: if a size is below one.
    """
    if min(channels, classes, width) < 1:
        raise ModelError(
            "cannot build the detector",
            f"every size is at least 1, but got channels={channels}, classes={classes}, width={width}",
            "use larger values",
        )
    return Detector(channels, classes, width)


class Detector(nn.Module):
    """See `detector`."""

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        wide = 4 * width
        self.stem = nn.Sequential(convolution(channels, width, 2), convolution(width, 2 * width, 2))
        self.fine = nn.Sequential(convolution(2 * width, wide, 2), convolution(wide, wide))
        self.middle = nn.Sequential(convolution(wide, wide, 2), convolution(wide, wide))
        self.coarse = nn.Sequential(convolution(wide, wide, 2), convolution(wide, wide))
        self.join = convolution(3 * wide, wide)
        self.scores = nn.Sequential(convolution(wide, wide), nn.Conv2d(wide, classes, 1))
        self.boxes = nn.Sequential(convolution(wide, wide), nn.Conv2d(wide, 4, 1))
        last = self.scores[1]
        assert isinstance(last, nn.Conv2d)
        assert last.bias is not None
        nn.init.constant_(last.bias, math.log(_RARE / (1 - _RARE)))

    def forward(self, x: Tensor) -> Tensor:
        """See `detector`."""
        fine = self.fine(self.stem(x))
        middle = self.middle(fine)
        coarse = self.coarse(middle)
        levels = [fine, *(functional.interpolate(one, size=fine.shape[2:]) for one in (middle, coarse))]
        joined = self.join(torch.cat(levels, dim=1))
        return torch.cat([self.scores(joined), self.boxes(joined)], dim=1)
