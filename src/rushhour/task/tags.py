"""Tagging: a class for each token of a sequence, such as the names in a text or the phases of a signal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from rushhour.task.kind import Head, LossName, Places, why_labels_are_wrong

PADDING: Final = -1
"""The label of tokens that count neither in training nor in the metric: behind the end of a sequence, or parts of words
after the first."""
OUTSIDE: Final = "O"
"""The class of tokens that are part of nothing that is looked for, as the IOB notation calls it (Ramshaw and Marcus
1995)."""


class Tagging:
    """A class for each token: targets are labels `(n, length)`, answers are labels `(n, length)` in uint8.

    A network gives logits `(n, length, classes)`. Tokens whose target is `PADDING` do not count. Where one class is
    called `O`, the metric is F1 of the tokens of all other classes together: most tokens are outside, and a model that
    finds nothing is nearly always right. Else it is accuracy, the share of tokens that are right.
    """

    output = "tags"
    head: Head = "tags"
    loss: LossName | Callable[[Any, Any], Any] = "cross-entropy per token"
    is_share = False
    places: Places = "tokens"
    dtype: Literal["uint8", "float32"] = "uint8"
    network = "tagger"

    def __init__(self, outputs: int, classes: tuple[str, ...] = ()) -> None:
        self._outputs = outputs
        self._outside = classes.index(OUTSIDE) if OUTSIDE in classes else None
        self.metric = "accuracy" if self._outside is None else "f1"
        self.agreement = "agreement" if self._outside is None else "f1"

    def raw_shape(self, sample: tuple[int, ...]) -> tuple[int, ...]:
        """Logits: `(length, classes)`."""
        return (sample[0], self._outputs)

    def answer_shape(self, sample: tuple[int, ...]) -> tuple[int, ...]:
        """Labels: `(length,)`."""
        return sample[:1]

    def why_wrong(self, targets: NDArray[Any]) -> str:
        """See `Kind`."""
        if targets.ndim != 2 or targets.dtype.kind not in "iu":
            return f"a sample has a whole number for each token, but the targets are {targets.dtype}{targets.shape}"
        return why_labels_are_wrong(targets, self._outputs, PADDING, "tokens")

    def statistics(self, outputs: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.float64]:
        """Of each sequence its right and all tokens, `(n, 2)`; or those found, wrongly given and missed, `(n, 3)`."""
        counted = targets != PADDING
        right = counted & (outputs == targets)
        if self._outside is None:
            return np.stack([right.sum(axis=1), counted.sum(axis=1)], axis=1).astype(np.float64)
        given, wanted = (counted & (each != self._outside) for each in (outputs, targets))
        columns = (right & wanted, given & ~right, wanted & ~right)
        return np.stack([each.sum(axis=1) for each in columns], axis=1).astype(np.float64)

    def reduce(self, statistics: NDArray[np.float64]) -> float:
        """Accuracy, or F1, over the tokens of all sequences; 1 where there is nothing to find."""
        sums = statistics.sum(axis=0).tolist()
        if self._outside is None:
            return sums[0] / sums[1] if sums[1] else 1.0
        found, wrong, missed = sums
        total = 2 * found + wrong + missed
        return 2 * found / total if total else 1.0

    def as_targets(self, outputs: NDArray[Any]) -> NDArray[Any]:
        """The labels. Answers do not say which tokens are padding, so all count."""
        return outputs.astype(np.int64)
