"""Losses of tasks that answer for places, pixels or tokens, and of students that learn them from a teacher's numbers.

Each gives one number for each sample, so that parts of a batch add up however it is divided.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from rushhour.task import PADDING, STRIDE, VOID

_SIGMA = 0.54 / 6
"""Standard deviation of the scores around a centre, as a share of the box's side (Liu et al. 2020, "TTFNet")."""
_NARROWEST = 0.4
"""In places; the score of the next place is then 0.04."""
_NEAR = 0.2
"""Places whose score around a centre is at least this learn its box too."""
_SURE = 0.3
"""A teacher's score from which on a place counts as an object's."""


def cross_entropy_per_pixel(logits: Tensor, maps: Tensor) -> Tensor:
    """The mean over the pixels of each sample that are not `VOID`: `(n,)`; 0 where there are none.

    Args:
        logits: `(n, classes, height, width)`.
        maps: labels, `(n, height, width)`.
    """
    of_pixels = functional.cross_entropy(logits.float(), maps.long(), ignore_index=VOID, reduction="none")
    counted = (maps != VOID).flatten(1).sum(dim=1).clamp_min(1)
    return of_pixels.flatten(1).sum(dim=1) / counted


def cross_entropy_per_token(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over the tokens of each sample that are not `PADDING`: `(n,)`; 0 where there are none.

    Args:
        logits: `(n, length, classes)`.
        labels: `(n, length)`.
    """
    by_class = logits.float().transpose(1, 2)
    of_tokens = functional.cross_entropy(by_class, labels.long(), ignore_index=PADDING, reduction="none")
    return of_tokens.sum(dim=1) / (labels != PADDING).sum(dim=1).clamp_min(1)


def focal_and_distance(raw: Tensor, targets: Tensor) -> Tensor:
    """The focal loss of scores that fall off around each centre (Law and Deng 2018), and the distance of boxes: `(n,)`.

    Args:
        raw: `(n, classes + 4, height, width)` as `rushhour.task.Detection` says.
        targets: boxes `(n, boxes, 5)` in pixels, class -1 for none.
    """
    raw = raw.float()
    classes, (height, width) = raw.shape[1] - 4, raw.shape[2:]
    scores, wanted, weights = _places(targets.float(), classes, height, width)
    logits = raw[:, :classes]
    given = logits.sigmoid()
    at_centre = scores >= 1
    right = (1 - given) ** 2 * -functional.logsigmoid(logits) * at_centre
    wrong = (1 - scores) ** 4 * given**2 * -functional.logsigmoid(-logits) * ~at_centre
    count = (targets[..., 4] >= 0).sum(dim=1).clamp_min(1)
    distance = functional.smooth_l1_loss(raw[:, classes:], wanted, reduction="none", beta=0.1).sum(dim=1) * weights
    of_boxes = distance.flatten(1).sum(dim=1) / weights.flatten(1).sum(dim=1).clamp_min(1e-6)
    return (right + wrong).flatten(1).sum(dim=1) / count + of_boxes


def imitated_map(student: Tensor, teacher: Tensor, heat: float) -> Tensor:
    """The mean divergence of the teacher's classes from the student's over the pixels of each sample, `(n,)`.

    Args:
        student: logits, `(n, classes, height, width)`.
        teacher: the same.
        heat: temperature that both are divided by.
    """
    ours, theirs = (functional.log_softmax(each / heat, dim=1) for each in (student, teacher))
    of_pixels = functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=1)
    return of_pixels.flatten(1).mean(dim=1) * heat**2


def imitated_tags(student: Tensor, teacher: Tensor, heat: float) -> Tensor:
    """As `imitated_map`, over the tokens of each sample: logits `(n, length, classes)`."""
    return imitated_map(student.transpose(1, 2), teacher.transpose(1, 2), heat)


def imitated_boxes(student: Tensor, teacher: Tensor) -> Tensor:
    """How far scores and boxes are from the teacher's, `(n,)`: quality focal loss (Li et al. 2020), and distance.

    Args:
        student: `(n, classes + 4, height, width)`.
        teacher: the same.
    """
    classes = student.shape[1] - 4
    logits, wanted = student[:, :classes], teacher[:, :classes].sigmoid()
    off = (logits.sigmoid() - wanted) ** 2
    of_scores = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none") * off
    highest = wanted.amax(dim=1)
    weights = highest * (highest >= _SURE)
    distance = functional.smooth_l1_loss(student[:, classes:], teacher[:, classes:], reduction="none", beta=0.1)
    count = (highest >= _SURE).flatten(1).sum(dim=1).clamp_min(1)
    of_boxes = (distance.sum(dim=1) * weights).flatten(1).sum(dim=1) / weights.flatten(1).sum(dim=1).clamp_min(1e-6)
    return of_scores.flatten(1).sum(dim=1) / count + of_boxes


@torch.no_grad()
def _places(targets: Tensor, classes: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a place should give: scores `(n, classes, h, w)`, box `(n, 4, h, w)`, and the box's weight `(n, h, w)`."""
    boxes, labels = targets[..., :4] / STRIDE, targets[..., 4]
    middle, sides = (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]).clamp_min(1e-3)
    columns, rows = torch.arange(width, dtype=torch.float32), torch.arange(height, dtype=torch.float32)
    sigma = (sides * _SIGMA).clamp_min(_NARROWEST)
    across, down = (
        torch.exp(-((places - at.floor().clamp(0, len(places) - 1)[..., None]) ** 2) / (2 * spread[..., None] ** 2))
        for places, at, spread in zip((columns, rows), middle.unbind(-1), sigma.unbind(-1), strict=True)
    )
    around = down[..., :, None] * across[..., None, :]  # (n, boxes, h, w)
    around = around * (labels >= 0)[..., None, None]
    n, most = labels.shape
    scores = torch.zeros(n, classes, height, width)
    if not most:
        return scores, torch.zeros(n, 4, height, width), torch.zeros(n, height, width)
    index = labels.clamp_min(0).long()[..., None, None].expand(-1, -1, height, width)
    scores.scatter_reduce_(1, index, around, "amax")
    weights, owner = around.max(dim=1)
    flat = owner.flatten(1)[..., None].expand(-1, -1, 2)
    of_middle, of_sides = (torch.gather(each, 1, flat).transpose(1, 2).reshape(n, 2, height, width)
                           for each in (middle, sides))  # fmt: skip
    at = torch.stack([columns.expand(height, width), rows[:, None].expand(height, width)]) + 0.5
    return scores, torch.cat([of_middle - at, of_sides.log()], dim=1), weights * (weights >= _NEAR)
