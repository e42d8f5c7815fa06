"""Segmentation: a class for each pixel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from rushhour.task.kind import Head, LossName, Places, why_labels_are_wrong

VOID: Final = 255
"""The label of pixels that count neither in training nor in the metric."""


class Segmentation:
    """A class for each pixel: targets and answers are class maps `(n, height, width)` in uint8.

    A network gives logits `(n, classes, height, width)`. The metric is the mean intersection over union of the classes
    (Everingham et al. 2015), counted over all pixels of all samples; pixels whose target is `VOID` do not count, and
    neither do classes that are nowhere.
    """

    metric, agreement, output = "mean_iou", "mean_iou", "map"
    head: Head = "class map"
    loss: LossName | Callable[[Any, Any], Any] = "cross-entropy per pixel"
    is_share = False
    places: Places = "map"
    dtype: Literal["uint8", "float32"] = "uint8"
    network = "unet"

    def __init__(self, outputs: int, classes: tuple[str, ...] = ()) -> None:
        self._outputs = outputs

    def raw_shape(self, sample: tuple[int, ...]) -> tuple[int, ...]:
        """Logits: `(classes, height, width)`."""
        return (self._outputs, *sample[:2])

    def answer_shape(self, sample: tuple[int, ...]) -> tuple[int, ...]:
        """A class map: `(height, width)`."""
        return sample[:2]

    def why_wrong(self, targets: NDArray[Any]) -> str:
        """See `Kind`."""
        if targets.ndim != 3 or targets.dtype.kind not in "iu":
            return (
                f"a class map is (height, width) of whole numbers, but the targets are {targets.dtype}{targets.shape}"
            )
        return why_labels_are_wrong(targets, self._outputs, VOID, "pixels")

    def statistics(self, outputs: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.float64]:
        """Of each class its pixels in both, in the answer and in the target: `(n, 3 * classes)`."""
        count = self._outputs
        found = np.zeros((len(targets), 3, count), np.float64)
        for row, (answer, target) in enumerate(zip(outputs, targets, strict=True)):
            known = target.reshape(-1) != VOID
            given, true = (each.reshape(-1)[known].astype(np.intp) for each in (answer, target))
            found[row, 0] = np.bincount(true[given == true], minlength=count)[:count]
            found[row, 1] = np.bincount(given, minlength=count)[:count]
            found[row, 2] = np.bincount(true, minlength=count)[:count]
        return found.reshape(len(targets), -1)

    def reduce(self, statistics: NDArray[np.float64]) -> float:
        """The mean IoU of the classes that are anywhere; 1 where there is nothing."""
        return float(np.mean(self.by_class(statistics)[1])) if statistics.any() else 1.0

    def by_class(self, statistics: NDArray[np.float64]) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """The classes that are anywhere, and the IoU of each."""
        both, given, true = statistics.sum(axis=0).reshape(3, -1)
        union = given + true - both
        present = np.flatnonzero(union)
        return present, both[present] / union[present]

    def as_targets(self, outputs: NDArray[Any]) -> NDArray[Any]:
        """The class maps."""
        return outputs
