"""What numbers of a model look like: probabilities over classes, or chances of labels by themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def are_probabilities(outputs: NDArray[Any], tolerance: float = 1e-3) -> bool:
    """Whether each of these outputs, `(n, classes)`, is a distribution over the classes, such as of a softmax.

    Args:
        outputs: of a classification, of a few samples.
        tolerance: of each number and of their sum; outputs of an int8 graph are coarse.
    """
    if outputs.ndim != 2 or outputs.shape[1] < 2 or not are_chances(outputs, tolerance):
        return False
    sums = outputs.astype(np.float64).sum(axis=1)
    return bool((np.abs(sums - 1) <= tolerance).all())


def are_chances(outputs: NDArray[Any], tolerance: float = 1e-3) -> bool:
    """Whether all of these outputs are between 0 and 1, such as of a sigmoid.

    Args:
        outputs: of a few samples.
        tolerance: of each number.
    """
    return bool(np.isfinite(outputs).all() and outputs.min() >= -tolerance and outputs.max() <= 1 + tolerance)
