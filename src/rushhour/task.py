"""Tasks: the form of a model's output, its metric (numpy, higher is better), and how an answer is read.

The loss is in `train/`; everything here runs without torch, on the outputs of any engine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from rushhour.errors import TaskError
from rushhour.measurement import Interval

Z: Final = 1.959963984540054
"""Two-sided 95% of the normal distribution."""


class Task(msgspec.Struct, frozen=True):
    """Classification (one label of `classes`), regression (`outputs` numbers) or embedding (a direction in space).

    Attributes:
        kind: classification is measured by accuracy, regression by R² (coefficient of determination), embedding by
            the cosine between an answer and its target.
        classes: the labels' names, in the order of the output; else empty.
        outputs: the length of one answer: the number of classes, of regressed values, or of dimensions.
    """

    kind: Literal["classification", "regression", "embedding"]
    classes: tuple[str, ...] = ()
    outputs: int = 1

    @classmethod
    def classification(cls, classes: tuple[str, ...]) -> Task:
        """A task with one right label among `classes`.

        Raises:
            TaskError: if there are fewer than two classes.
        """
        if len(classes) < 2:
            raise TaskError(
                f"cannot classify into {len(classes)} class{'' if len(classes) == 1 else 'es'}",
                "a classification needs at least two classes",
                "add data of another class",
            )
        return cls(kind="classification", classes=classes, outputs=len(classes))

    @property
    def metric(self) -> str:
        """The metric's name; higher is better."""
        return {"classification": "accuracy", "regression": "r2", "embedding": "cosine"}[self.kind]

    @property
    def fidelity_metric(self) -> str:
        """The name of the metric of `fidelity`; higher is better."""
        return "agreement" if self.kind == "classification" else self.metric

    @property
    def output_name(self) -> str:
        """The name of the model's output on the wire."""
        return {"classification": "probabilities", "regression": "values", "embedding": "embedding"}[self.kind]

    def check_output(self, shape: tuple[int, ...], model: str) -> None:
        """Raise unless a model whose answer to one sample has `shape` fits this task.

        Args:
            shape: without the batch dimension.
            model: its name, for the message.

        Raises:
            TaskError: if it does not fit.
        """
        if shape != (self.outputs,):
            wanted = f"{self.outputs} {'classes' if self.kind == 'classification' else 'values'}"
            raise TaskError(
                f"the output of {model} does not fit the task",
                f"the task has {wanted}, so one answer must have shape ({self.outputs},), but it has {shape}",
                f"change the model's last layer to {self.outputs} outputs, or give the data it was made for",
            )

    def evaluate(self, outputs: NDArray[Any], targets: NDArray[Any]) -> tuple[float, Interval]:
        """The metric and its 95% interval.

        Wilson's interval for accuracy (Wilson 1927), else a bootstrap over samples with a fixed seed.

        Args:
            outputs: shape `(n, outputs)`.
            targets: shape `(n,)` of labels, or `(n, outputs)` of values.
        """
        if self.kind == "embedding":
            cosines = _cosines(outputs, targets)
            return float(cosines.mean()), _bootstrap(lambda rows: cosines[rows].mean(), len(cosines))
        if self.kind == "classification":
            right = _right(outputs, targets)
            return float(right.mean()), wilson(int(right.sum()), len(right))
        errors, variances = _squares(outputs, targets)
        return _r2(errors, variances), _bootstrap(lambda rows: _r2(errors[rows], variances[rows]), len(errors))

    def compare(
        self, reference: NDArray[Any], candidate: NDArray[Any], targets: NDArray[Any]
    ) -> tuple[float, Interval]:
        """The drop of `candidate` below `reference` on the same samples, and its paired 95% interval.

        For accuracy the adjusted interval of Agresti and Min (Statistics in Medicine 2005), which keeps its coverage
        where few answers differ; else a paired bootstrap.

        Args:
            reference: outputs of the reference model, shape `(n, outputs)`.
            candidate: outputs of the candidate, same shape and samples.
            targets: as in `evaluate`.
        """
        if self.kind == "classification":
            before, after = _right(reference, targets), _right(candidate, targets)
            lost, won, n = int((before & ~after).sum()), int((~before & after).sum()), len(before)
            lost_, won_, n_ = lost + 0.5, won + 0.5, n + 2
            middle = (lost_ - won_) / n_
            half = Z * math.sqrt(max(0.0, lost_ + won_ - (lost_ - won_) ** 2 / n_)) / n_
            return (lost - won) / n, (middle - half, middle + half)
        if self.kind == "embedding":
            apart = _cosines(reference, targets) - _cosines(candidate, targets)
            return float(apart.mean()), _bootstrap(lambda rows: apart[rows].mean(), len(apart))
        errors_before, variances = _squares(reference, targets)
        errors_after, _ = _squares(candidate, targets)

        def drop(rows: NDArray[np.intp]) -> float:
            return _r2(errors_before[rows], variances[rows]) - _r2(errors_after[rows], variances[rows])

        return drop(np.arange(len(variances))), _bootstrap(drop, len(variances))

    def fidelity(self, reference: NDArray[Any], candidate: NDArray[Any]) -> tuple[float, Interval]:
        """The agreement of `candidate` with `reference`, and its 95% interval: 1 where nothing changed.

        For data without labels: the share of samples with the same class (Wilson's interval); or R² or the mean cosine,
        with the reference's answers as the targets.

        Args:
            reference: outputs of the reference model, shape `(n, outputs)`.
            candidate: outputs of the candidate, same shape and samples.
        """
        return self.evaluate(candidate, reference.argmax(axis=1) if self.kind == "classification" else reference)

    def read(self, output: NDArray[Any]) -> Mapping[str, float]:
        """One answer by name: label -> probability, most likely first; or the values by position.

        Args:
            output: shape `(outputs,)`.
        """
        if self.kind == "classification":
            return {self.classes[index]: float(output[index]) for index in np.argsort(-output)}
        return {str(index): float(value) for index, value in enumerate(output)}


def are_probabilities(outputs: NDArray[Any], tolerance: float = 1e-3) -> bool:
    """Whether each of these outputs, `(n, classes)`, is a distribution over the classes, such as of a softmax.

    Args:
        outputs: of a classification, of a few samples.
        tolerance: of each number and of their sum; outputs of an int8 graph are coarse.
    """
    if outputs.ndim != 2 or outputs.shape[1] < 2 or not np.isfinite(outputs).all():
        return False
    sums = outputs.astype(np.float64).sum(axis=1)
    return bool(
        outputs.min() >= -tolerance and outputs.max() <= 1 + tolerance and (np.abs(sums - 1) <= tolerance).all()
    )


def wilson(successes: int, n: int) -> Interval:
    """Wilson's 95% score interval of a proportion."""
    if n == 0:
        return 0.0, 1.0
    share, z2 = successes / n, Z * Z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def _right(outputs: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.bool_]:
    right: NDArray[np.bool_] = outputs.argmax(axis=1) == targets
    return right


def _cosines(outputs: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.float64]:
    """The cosine between each answer and its target, shape `(n,)`; 0 where one of them has no direction."""
    left, right = np.asarray(outputs, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    cosines: NDArray[np.float64] = (left * right).sum(axis=1) / np.where(lengths > 0, lengths, 1.0)
    return cosines


def _squares(outputs: NDArray[Any], targets: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Squared errors, and squared distances from the mean, per sample; shape `(n,)` each."""
    values = np.asarray(targets, dtype=np.float64).reshape(len(targets), -1)
    errors = ((np.asarray(outputs, dtype=np.float64).reshape(values.shape) - values) ** 2).sum(axis=1)
    return errors, ((values - values.mean(axis=0)) ** 2).sum(axis=1)


def _r2(errors: NDArray[np.float64], variances: NDArray[np.float64]) -> float:
    total = float(variances.sum())
    return 1.0 - float(errors.sum()) / total if total > 0 else 0.0


def _bootstrap(statistic: Any, n: int, rounds: int = 1000) -> Interval:
    random = np.random.default_rng(0)
    values = [statistic(random.integers(0, n, n)) for _ in range(rounds)]
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
