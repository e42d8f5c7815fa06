"""The kinds of tasks that come with Rushhour."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rushhour.task.boxes import Detection
from rushhour.task.kind import Head, LossName, Maker
from rushhour.task.maps import Segmentation
from rushhour.task.tags import Tagging

_EVEN: Final = 0.5
"""A label is given where its chance is at least this."""


class Classification:
    """One right class: targets are labels `(n,)`, answers are probabilities `(n, classes)`."""

    metric, agreement, output = "accuracy", "agreement", "probabilities"
    head: Head = "softmax"
    loss: LossName | Callable[[Any, Any], Any] = "cross-entropy"
    is_share = True

    def __init__(self, outputs: int, classes: tuple[str, ...] = ()) -> None:
        self._outputs = outputs

    def why_wrong(self, targets: NDArray[Any]) -> str:
        """See `Kind`."""
        if targets.ndim == 1 and targets.dtype.kind in "iub" and targets.min() >= 0 and targets.max() < self._outputs:
            return ""
        return (
            f"there are {self._outputs} classes, so a label is one number in 0..{self._outputs - 1}, but the labels "
            f"have shape {targets.shape} and run from {targets.min()} to {targets.max()}"
        )

    def statistics(self, outputs: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.float64]:
        """Whether each is right, `(n, 1)`."""
        right: NDArray[np.float64] = (outputs.argmax(axis=1) == targets).astype(np.float64)[:, None]
        return right

    def reduce(self, statistics: NDArray[np.float64]) -> float:
        """The share of samples that are right."""
        return float(statistics.mean())

    def as_targets(self, outputs: NDArray[Any]) -> NDArray[Any]:
        """The likeliest classes."""
        labels: NDArray[np.intp] = outputs.argmax(axis=1)
        return labels


class Multilabel:
    """Each label by itself holds or not: targets are 0 and 1, `(n, labels)`; answers are chances `(n, labels)`.

    Of one label the metric is accuracy: this is the binary classifier that ends in one sigmoid. Of several it is F1,
    counted over all labels together: where labels are rare, a model that gives none is nearly always right.
    """

    output = "probabilities"
    head: Head = "sigmoid"
    loss: LossName | Callable[[Any, Any], Any] = "binary cross-entropy"

    def __init__(self, outputs: int, classes: tuple[str, ...] = ()) -> None:
        self.is_share = outputs == 1
        self.metric = "accuracy" if outputs == 1 else "f1"
        self.agreement = "agreement" if outputs == 1 else "f1"
        self._outputs = outputs

    def why_wrong(self, targets: NDArray[Any]) -> str:
        """See `Kind`."""
        fits = targets.size == len(targets) * self._outputs
        if fits and bool(((targets == 0) | (targets == 1)).all()):
            return ""
        return f"a sample has {self._outputs} numbers that are 0 or 1, but the targets have shape {targets.shape}" + (
            f" and run from {targets.min()} to {targets.max()}" if fits else ""
        )

    def statistics(self, outputs: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.float64]:
        """Of one label whether it is right, `(n, 1)`; else labels found, wrongly given and missed, `(n, 3)`."""
        given = (np.asarray(outputs) >= _EVEN).reshape(len(outputs), -1)
        true = (np.asarray(targets) >= _EVEN).reshape(len(given), -1)
        if self._outputs == 1:
            right: NDArray[np.float64] = (given == true).astype(np.float64)
            return right
        counted = ((given & true).sum(axis=1), (given & ~true).sum(axis=1), (~given & true).sum(axis=1))
        return np.stack(counted, axis=1).astype(np.float64)

    def reduce(self, statistics: NDArray[np.float64]) -> float:
        """Accuracy of one label; else F1 of all labels together: 1 where there was nothing to find."""
        if self._outputs == 1:
            return float(statistics.mean())
        found, wrong, missed = statistics.sum(axis=0).tolist()
        total = 2 * found + wrong + missed
        return 2 * found / total if total else 1.0

    def as_targets(self, outputs: NDArray[Any]) -> NDArray[Any]:
        """The labels that are given."""
        given: NDArray[np.float32] = (np.asarray(outputs) >= _EVEN).astype(np.float32)
        return given


class Ranking:
    """What is wanted comes first: targets are 0 and 1, `(n,)`; answers are scores from 0 to 1, `(n, 1)`.

    The metric is AUC: how often a wanted sample has a higher score than an unwanted one (ties count half).
    """

    metric, agreement, output = "auc", "auc", "score"
    head: Head = "sigmoid"
    loss: LossName | Callable[[Any, Any], Any] = "binary cross-entropy"
    is_share = False

    def __init__(self, outputs: int, classes: tuple[str, ...] = ()) -> None:
        self._outputs = outputs

    def why_wrong(self, targets: NDArray[Any]) -> str:
        """See `Kind`."""
        values = np.unique(targets)
        if targets.size == len(targets) and set(values.tolist()) == {0, 1}:
            return ""
        return (
            f"a target is 1 for what is wanted and 0 for what is not, and there are some of both, but these have shape "
            f"{targets.shape} and the values {', '.join(f'{value:g}' for value in values[:4].tolist())}"
        )

    def statistics(self, outputs: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.float64]:
        """The score, and whether it was wanted: `(n, 2)`."""
        columns = (np.asarray(each, np.float64).reshape(-1) for each in (outputs, targets))
        return np.stack(tuple(columns), axis=1)

    def reduce(self, statistics: NDArray[np.float64]) -> float:
        """AUC, by ranks (Mann and Whitney 1947); a half where there is none of one sort."""
        scores, wanted = statistics[:, 0], statistics[:, 1] >= _EVEN
        positive, n = int(wanted.sum()), len(scores)
        if positive in (0, n):
            return 0.5
        _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
        ranks = (np.cumsum(count) - (count - 1) / 2)[place]
        return float((ranks[wanted].sum() - positive * (positive + 1) / 2) / (positive * (n - positive)))

    def as_targets(self, outputs: NDArray[Any]) -> NDArray[Any]:
        """The upper half is wanted."""
        scores = np.asarray(outputs).reshape(-1)
        wanted: NDArray[np.float32] = (scores > np.median(scores)).astype(np.float32)
        return wanted


class Regression:
    """Values: targets and answers are numbers, `(n, outputs)`. The metric is R², the coefficient of determination."""

    metric, agreement, output = "r2", "r2", "values"
    head: Head = "none"
    loss: LossName | Callable[[Any, Any], Any] = "squared error"
    is_share = False

    def __init__(self, outputs: int, classes: tuple[str, ...] = ()) -> None:
        self._outputs = outputs

    def why_wrong(self, targets: NDArray[Any]) -> str:
        """See `Kind`."""
        finite = bool(np.isfinite(targets).all())
        if targets.size == len(targets) * self._outputs and finite:
            return ""
        return f"a sample has {self._outputs} finite values, but the targets have shape {targets.shape}" + (
            "" if finite else " and hold NaN or infinity"
        )

    def statistics(self, outputs: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.float64]:
        """Squared errors, and squared distances from the mean of all of these: `(n, 2)`."""
        values = np.asarray(targets, dtype=np.float64).reshape(len(targets), -1)
        errors = ((np.asarray(outputs, dtype=np.float64).reshape(values.shape) - values) ** 2).sum(axis=1)
        return np.stack((errors, ((values - values.mean(axis=0)) ** 2).sum(axis=1)), axis=1)

    def reduce(self, statistics: NDArray[np.float64]) -> float:
        """R²; 0 where the targets do not vary."""
        errors, total = statistics.sum(axis=0).tolist()
        return 1.0 - errors / total if total > 0 else 0.0

    def as_targets(self, outputs: NDArray[Any]) -> NDArray[Any]:
        """The values."""
        return outputs


class Embedding(Regression):
    """A direction in space: targets and answers are vectors, `(n, outputs)`. The metric is the mean cosine."""

    metric, agreement, output = "cosine", "cosine", "embedding"

    def statistics(self, outputs: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.float64]:
        """The cosine of each answer and its target, `(n, 1)`; 0 where one of them has no direction."""
        left, right = np.asarray(outputs, dtype=np.float64), np.asarray(targets, dtype=np.float64)
        lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        cosines: NDArray[np.float64] = (left * right).sum(axis=1) / np.where(lengths > 0, lengths, 1.0)
        return cosines[:, None]

    def reduce(self, statistics: NDArray[np.float64]) -> float:
        """The mean."""
        return float(statistics.mean())


BUILT_IN: Final[dict[str, Maker]] = {
    "classification": Classification,
    "multilabel": Multilabel,
    "ranking": Ranking,
    "regression": Regression,
    "embedding": Embedding,
    "segmentation": Segmentation,
    "detection": Detection,
    "tagging": Tagging,
}
