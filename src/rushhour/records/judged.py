"""`Judged`: what a training's report draws of the answers to the validation part, beside the metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from rushhour.measurement import Number
from rushhour.records.classified import Classified
from rushhour.task import Detection, Task

_Count = Annotated[int, msgspec.Meta(ge=0, le=10**15)]
_POINTS: Final = 100
"""Of a curve, at most; between them it is a line."""
_MOST: Final = 100
"""Classes or values of which something is kept, at most."""
_GROUPS: Final = 10
_RANGE: Final = (5.0, 50.0, 95.0)
_EVEN: Final = 0.5


class Found(msgspec.Struct, frozen=True):
    """How many of what is given are right, and how many of what is wanted are given, from the highest score on.

    Attributes:
        name: of the class of a detection, or of what a ranking wants.
        precision: the share of right ones, where as many are given as `recall` says.
        recall: the share of wanted ones that are given, rising.
        area: below the curve, with the precision at a recall as the highest at that or a higher one: average precision.
        wanted: how many there are.
    """

    name: str
    precision: tuple[Number, ...]
    recall: tuple[Number, ...]
    area: Number
    wanted: _Count


class Residual(msgspec.Struct, frozen=True):
    """Targets minus answers, of a tenth of the samples whose answers are about as large.

    Attributes:
        answer: their mean answer.
        low: the 5% quantile of their residuals.
        middle: the median.
        high: the 95% quantile.
        samples: how many.
    """

    answer: Number
    low: Number
    middle: Number
    high: Number
    samples: _Count


class Residuals(msgspec.Struct, frozen=True):
    """Those of one value, by the size of the answer."""

    name: str
    groups: tuple[Residual, ...]


class Judged(msgspec.Struct, frozen=True):
    """What can be said of a task's answers; what does not apply is None or empty.

    Attributes:
        classified: of a classification of one label.
        found: precision and recall: of a ranking, or of each class of a detection that has boxes.
        residuals: of each value of a regression.
    """

    classified: Classified | None = None
    found: tuple[Found, ...] = ()
    residuals: tuple[Residuals, ...] = ()

    @classmethod
    def of(cls, task: Task, outputs: NDArray[Any], targets: NDArray[Any], names: Sequence[str] = ()) -> Self:
        """That of finite answers to labelled samples.

        Args:
            task: of the answers.
            outputs: of all samples.
            targets: as the task's kind has them.
            names: of the values or of what is wanted, where the data has any.
        """
        kind = task.behaviour
        if task.kind == "classification":
            return cls(classified=Classified.of(outputs, targets, task.classes))
        if task.kind == "ranking":
            wanted = targets.reshape(-1) >= _EVEN
            curve = _retrieved(outputs.reshape(-1).astype(np.float64), wanted)
            return cls(found=(_found(names[0] if names else "wanted", *curve, int(wanted.sum())),))
        if isinstance(kind, Detection):
            statistics, found = kind.statistics(outputs, targets), []
            for label, name in enumerate(task.classes[:_MOST]):
                precision, recall = kind.curve(statistics, label)
                if recall is not None:
                    found.append(_found(name, precision, recall, int(statistics[:, label].sum())))
            return cls(found=tuple(found))
        if task.kind == "regression":
            answers, values = (each.reshape(len(each), -1).astype(np.float64) for each in (outputs, targets))
            named = names if len(names) == task.outputs else [f"value {place}" for place in range(1, task.outputs + 1)]
            columns = zip(named, answers.T, values.T, strict=True)
            return cls(residuals=tuple(_residuals(*column) for column in list(columns)[:_MOST]))
        return cls()


def _retrieved(
    scores: NDArray[np.float64], wanted: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision and recall of samples taken from the highest score on; those of one score are taken together."""
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(wanted[order])
    last = np.append(np.diff(scores[order]) != 0, True)
    given = np.arange(1, len(hits) + 1)
    return (hits / given)[last], (hits / max(1, hits[-1]))[last]


def _found(name: str, precision: NDArray[np.float64], recall: NDArray[np.float64], wanted: int) -> Found:
    highest = np.maximum.accumulate(precision[::-1])[::-1]
    area = float((np.diff(recall, prepend=0.0) * highest).sum())
    shown = np.unique(np.linspace(0, max(0, len(recall) - 1), _POINTS).round().astype(np.intp))[: len(recall)]
    return Found(name, tuple(precision[shown].tolist()), tuple(recall[shown].tolist()), area, wanted)


def _residuals(name: str, answers: NDArray[np.float64], values: NDArray[np.float64]) -> Residuals:
    order = np.argsort(answers, kind="stable")
    groups = []
    for rows in np.array_split(order, _GROUPS):
        if len(rows):
            low, middle, high = np.percentile(values[rows] - answers[rows], _RANGE).tolist()
            groups.append(Residual(float(answers[rows].mean()), low, middle, high, len(rows)))
    return Residuals(name, tuple(groups))
