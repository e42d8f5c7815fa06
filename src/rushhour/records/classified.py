"""`Classified`: what a classifier confuses, and how far its probabilities can be believed."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from rushhour.cascade import fit_temperature
from rushhour.measurement import Number

_Count = Annotated[int, msgspec.Meta(ge=0, le=10**15)]
_MOST_CLASSES: Final = 100
"""A matrix of more would fill the file, and no page shows it."""
_BINS: Final = 10


class Bin(msgspec.Struct, frozen=True):
    """The answers of about the same confidence, which is the probability of the class that is given.

    Attributes:
        confidence: their mean.
        right: the share of them that are right.
        samples: how many.
    """

    confidence: Number
    right: Number
    samples: _Count


class Classified(msgspec.Struct, frozen=True):
    """What a classifier answered to labelled samples.

    Attributes:
        classes: their names.
        confusion: how many samples of a class (row) were given which class (column); empty with more than 100 classes.
        bins: in tenths of the confidence, those that have any samples.
        calibration_error: the mean distance of a bin's confidence from its share of right answers, weighted by samples
            (expected calibration error: Naeini et al., 2015).
        temperature: the logits divided by this would be the most likely (Guo et al., 2017): above 1 where the
            classifier is too sure of itself. Found on the same samples; nothing is changed by it.
    """

    classes: tuple[str, ...]
    confusion: tuple[tuple[_Count, ...], ...]
    bins: tuple[Bin, ...]
    calibration_error: Number
    temperature: Number

    @classmethod
    def of(cls, probabilities: NDArray[Any], labels: NDArray[Any], classes: tuple[str, ...]) -> Classified:
        """That of answers `(n, classes)` to samples with labels `(n,)`, one or more."""
        given, sure = probabilities.argmax(axis=1), probabilities.max(axis=1).astype(np.float64)
        right = given == labels
        place = np.minimum((sure * _BINS).astype(np.int64), _BINS - 1)
        bins = tuple(
            Bin(float(sure[own].mean()), float(right[own].mean()), int(own.sum()))
            for own in (place == number for number in range(_BINS))
            if own.any()
        )
        error = sum(each.samples * abs(each.confidence - each.right) for each in bins) / len(labels)
        confusion: NDArray[np.int64] = np.zeros((0, 0), np.int64)
        if len(classes) <= _MOST_CLASSES:
            confusion = np.zeros((len(classes), len(classes)), np.int64)
            np.add.at(confusion, (labels, given), 1)
        rows = tuple(tuple(row) for row in confusion.tolist())
        return cls(classes, rows, bins, error, fit_temperature(probabilities, labels))

    def confusions(self) -> list[tuple[str, str, int, int]]:
        """True class, given class, how often, and of how many of the true class; the most frequent first."""
        found = [
            (self.classes[true], self.classes[given], count, sum(row))
            for true, row in enumerate(self.confusion)
            for given, count in enumerate(row)
            if true != given and count
        ]
        return sorted(found, key=lambda each: -each[2])


class Calibration(msgspec.Struct, frozen=True):
    """What dividing a classifier's logits by a temperature changes.

    Attributes:
        temperature: of the served graph, fitted to the whole validation part.
        before: what the network answers on the validation part.
        after: the same, each half of the part with the temperature that fits the other half.
    """

    temperature: Number
    before: Classified
    after: Classified
