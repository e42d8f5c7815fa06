"""The heads of tasks that answer for places: class maps, classes of tokens, and boxes after non-maximum suppression.

They are a part of the served graph, made of operators that ONNX Runtime and OpenVINO both have, and their answers have
a fixed size, so that samples form batches.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from rushhour.task import MOST, STRIDE

LEAST_SCORE: Final = 0.05
"""Boxes with a lower score are no answer: their rows are 0."""
SAME: Final = 0.6
"""Boxes of one class that overlap by more are of the same object."""
_LARGEST: Final = 8.0
"""The logarithm of a box's side, in strides, at most."""


class ClassMap(nn.Module):
    """The likeliest class of each pixel: logits `(n, classes, height, width)` to uint8 `(n, height, width)`."""

    def forward(self, logits: Tensor) -> Tensor:
        """See the class."""
        return logits.argmax(dim=1).to(torch.uint8)


class Tags(nn.Module):
    """The likeliest class of each token: logits `(n, length, classes)` to uint8 `(n, length)`."""

    def forward(self, logits: Tensor) -> Tensor:
        """See the class."""
        return logits.argmax(dim=2).to(torch.uint8)


class Boxes(nn.Module):
    """The boxes with the highest scores, without those that show an object a second time.

    A place is taken if its score is the highest of its 3 x 3 neighbours, found by a max-pool (Zhou et al. 2019). Of the
    100 best, a box that overlaps a better one of its class by more than 0.6 is dropped (Bolya et al. 2019, "Fast NMS"):
    compared with the usual suppression, boxes that were dropped drop others too.

    Args:
        classes: how many.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, raw: Tensor) -> Tensor:
        """`(n, classes + 4, height, width)` as `Detection` has it, to `(n, boxes, 6)`: see there."""
        _, _, height, width = raw.shape
        heat = raw[:, : self.classes].sigmoid()
        peaks = heat * (functional.max_pool2d(heat, 3, stride=1, padding=1) == heat).to(heat.dtype)
        scores, places = peaks.flatten(1).topk(min(MOST, self.classes * height * width), dim=1)
        cells = height * width
        label = torch.div(places, cells, rounding_mode="floor")
        cell = places - label * cells
        box = torch.gather(
            decoded(raw[:, self.classes :]).flatten(2).transpose(1, 2), 1, cell.unsqueeze(2).expand(-1, -1, 4)
        )
        kept = self._kept(box, label) & (scores >= LEAST_SCORE)
        answer = torch.cat([box, scores.unsqueeze(2), label.unsqueeze(2).to(box.dtype)], dim=2)
        return answer * kept.unsqueeze(2).to(box.dtype)

    def _kept(self, box: Tensor, label: Tensor) -> Tensor:
        """Which boxes are not suppressed, `(n, boxes)`."""
        low = torch.maximum(box[:, :, None, :2], box[:, None, :, :2])
        high = torch.minimum(box[:, :, None, 2:], box[:, None, :, 2:])
        both = (high - low).clamp_min(0).prod(dim=3)
        area = (box[..., 2:] - box[..., :2]).prod(dim=2)
        share = both / (area[:, :, None] + area[:, None, :] - both).clamp_min(1e-9)
        count = box.shape[1]
        better = torch.ones(count, count, dtype=torch.bool).triu(1)  # [i, j]: i comes before j
        alike = (label[:, :, None] == label[:, None, :]) & better
        return ~((share > SAME) & alike).any(dim=1)


def decoded(numbers: Tensor) -> Tensor:
    """The box of each place in pixels of the sample, cut at its border: `(n, 4, height, width)` to x1, y1, x2, y2."""
    height, width = numbers.shape[2:]
    x = torch.arange(width, dtype=numbers.dtype, device=numbers.device) + 0.5
    y = torch.arange(height, dtype=numbers.dtype, device=numbers.device) + 0.5
    middle = torch.stack([x.expand(height, width), y[:, None].expand(height, width)]) + numbers[:, :2]
    half = numbers[:, 2:].clamp(-_LARGEST, _LARGEST).exp() / 2
    sides = torch.tensor([width, height], dtype=numbers.dtype)[:, None, None]
    low, high = (torch.minimum(each.clamp_min(0), sides) for each in (middle - half, middle + half))
    return torch.cat([low, high], dim=1) * STRIDE
