"""Detection: boxes around what is in a picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from rushhour.task.kind import Head, LossName, Places

STRIDE: Final = 8
"""Pixels, in both directions, for each place that a network answers for."""
MOST: Final = 100
"""Boxes in an answer, at most, as COCO counts them."""
_CERTAIN: Final = 0.3
"""The score from which on another model's box stands in for a target."""
_SAME: Final = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
"""Overlaps from which on a box counts as found: those of COCO's mAP; the first is that of AP50."""


class Detection:
    """Boxes: targets are `(n, boxes, 5)`, answers `(n, boxes, 6)`, both float32 in pixels of the sample.

    A target is x1, y1, x2, y2 and class; a class of -1 is no box, so that all pictures have as many rows. An answer is
    x1, y1, x2, y2, score and class, from the highest score to the lowest; a score of 0 is no box.

    A network gives `(n, classes + 4, ceil(height / 8), ceil(width / 8))`: for each place the logits of the classes
    whose box is centred there; then its centre's distance from that of the place in units of `STRIDE`, x and y; and the
    logarithms of its width and height in the same units (Zhou et al. 2019, "Objects as points").

    The metric is AP50: the area under the precision-recall curve of all samples (Everingham et al. 2010, all points),
    where a box is right if it overlaps a box of its class by half or more; the mean over the classes that have boxes.
    """

    metric, agreement, output = "ap50", "ap50", "boxes"
    head: Head = "boxes"
    loss: LossName | Callable[[Any, Any], Any] = "focal and distance"
    is_share = False
    places: Places = "boxes"
    dtype: Literal["uint8", "float32"] = "float32"
    network = "detector"

    def __init__(self, outputs: int, classes: tuple[str, ...] = ()) -> None:
        self._outputs = outputs

    def raw_shape(self, sample: tuple[int, ...]) -> tuple[int, ...]:
        """Of each place the classes, and 4 numbers of its box."""
        return (self._outputs + 4, *(-(-side // STRIDE) for side in sample[:2]))

    def answer_shape(self, sample: tuple[int, ...]) -> tuple[int, ...]:
        """A fixed number of boxes: `(100, 6)`, fewer where the picture has fewer places."""
        _, height, width = self.raw_shape(sample)
        return (min(MOST, self._outputs * height * width), 6)

    def why_wrong(self, targets: NDArray[Any]) -> str:
        """See `Kind`."""
        if targets.ndim != 3 or targets.shape[2] != 5 or targets.dtype.kind not in "fiu":
            return (
                "the boxes of a picture are rows of x1, y1, x2, y2 and class, but the targets are "
                f"{targets.dtype}{targets.shape}"
            )
        boxes = targets[~(targets[..., 4] < 0)]  # a class of NaN is neither a class nor -1
        if not len(boxes):
            return "no picture has a box"
        if not np.isfinite(boxes).all():
            return "a box holds NaN or infinity"
        if not ((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])).all():
            return "a box has no area: it needs x1 < x2 and y1 < y2"
        classes = boxes[:, 4]
        if classes.max() < self._outputs and bool((classes == np.rint(classes)).all()):
            return ""
        return (
            f"there are {self._outputs} classes, so the class of a box is 0..{self._outputs - 1}, or -1 for no box, "
            f"but they go up to {classes.max():g}"
        )

    def statistics(self, outputs: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.float64]:
        """Of each sample how many boxes of each class there are; and of each answer score, class and overlap.

        The shape is `(n, classes + 3 * boxes)`. The overlap is a number whose bits say from which overlaps on the box
        is right. Each target belongs to one answer: the first, in the order of the scores, that has none that overlaps
        more.
        """
        n, most, count = len(targets), outputs.shape[1], self._outputs
        found = np.zeros((n, count + 3 * most), np.float64)
        for row in range(n):
            wanted = targets[row][targets[row][:, 4] >= 0]
            given = outputs[row][outputs[row][:, 4] > 0]
            given = given[np.argsort(-given[:, 4], kind="stable")]
            found[row, :count] = np.bincount(wanted[:, 4].astype(np.intp), minlength=count)[:count]
            columns = found[row, count:].reshape(3, most)
            columns[0, : len(given)], columns[1, : len(given)] = given[:, 4], given[:, 5]
            if len(given) and len(wanted):
                columns[2, : len(given)] = _matched(given, wanted)
        return found

    def reduce(self, statistics: NDArray[np.float64]) -> float:
        """AP50; 1 where there is nothing to find and nothing was found."""
        return self.average_precision(statistics, _SAME[0])

    def mean_average_precision(self, statistics: NDArray[np.float64]) -> float:
        """COCO's mAP: the mean of the average precisions at overlaps from 0.50 to 0.95."""
        return float(np.mean([self.average_precision(statistics, overlap) for overlap in _SAME]))

    def average_precision(self, statistics: NDArray[np.float64], overlap: float) -> float:
        """The average precision at one of the overlaps 0.50, 0.55 ... 0.95."""
        found = []
        for label in range(self._outputs):
            precision, recall = self.curve(statistics, label, overlap)
            if recall is not None:
                found.append(_area(precision, recall))
        if found:
            return float(np.mean(found))
        return 0.0 if (statistics[:, self._outputs :] > 0).any() else 1.0

    def curve(
        self, statistics: NDArray[np.float64], label: int, overlap: float = 0.5
    ) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Precision and recall of a class where more and more boxes are taken; no recall where it has no boxes."""
        total = statistics[:, label].sum()
        scores, classes, bits = statistics[:, self._outputs :].reshape(len(statistics), 3, -1).transpose(1, 0, 2)
        ours = (scores > 0) & (classes == label)
        if not total:
            return np.zeros(0), None
        order = np.argsort(-scores[ours], kind="stable")
        bit = 2 ** _SAME.index(overlap)
        right = (bits[ours][order].astype(np.int64) & bit) > 0
        hits = np.cumsum(right)
        # boxes of one score are taken together
        last = np.append(np.diff(scores[ours][order]) != 0, True) if len(order) else np.zeros(0, bool)
        return (hits / np.arange(1, len(hits) + 1))[last], (hits / total)[last]

    def as_targets(self, outputs: NDArray[Any]) -> NDArray[Any]:
        """The boxes whose score is high enough; the highest of all where none is."""
        limit = min(_CERTAIN, float(outputs[..., 4].max()))
        wanted = outputs[..., [0, 1, 2, 3, 5]].astype(np.float32)
        wanted[(outputs[..., 4] < limit) | (outputs[..., 4] <= 0), 4] = -1
        return wanted


def overlaps(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.float64]:
    """The intersection over union of each box of one with each of the other: `(n, m)`.

    Args:
        one: boxes x1, y1, x2, y2 and whatever follows, shape `(n, 4 or more)`.
        other: the same, `(m, 4 or more)`.
    """
    a, b = np.asarray(one, np.float64)[:, None, :4], np.asarray(other, np.float64)[None, :, :4]
    sides = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None)
    both = sides.prod(axis=2)
    areas = [np.clip(each[..., 2:] - each[..., :2], 0, None).prod(axis=2) for each in (a, b)]
    shares: NDArray[np.float64] = both / np.maximum(areas[0] + areas[1] - both, 1e-12)
    return shares


def _matched(given: NDArray[Any], wanted: NDArray[Any]) -> NDArray[np.float64]:
    """The bits of the answers to one sample, which are in the order of their scores."""
    shares = overlaps(given, wanted) * (given[:, None, 5] == wanted[None, :, 4])
    bits = np.zeros(len(given))
    for number, overlap in enumerate(_SAME):
        free = np.ones(len(wanted), bool)
        for answer in np.flatnonzero(shares.max(axis=1) >= overlap).tolist():
            best = int(np.where(free, shares[answer], -1.0).argmax())
            if free[best] and shares[answer, best] >= overlap:
                free[best] = False
                bits[answer] += 2**number
    return bits


def _area(precision: NDArray[np.float64], recall: NDArray[np.float64]) -> float:
    """Below the curve, where the precision at a recall is the highest at that or a higher one."""
    if not len(recall):
        return 0.0
    highest = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0.0) * highest).sum())
