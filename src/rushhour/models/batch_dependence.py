"""Whether a network's answer to a sample depends on the other samples of its batch: a served batch mixes clients.

A network that mixes samples (attention or recurrence over the first dimension, batch normalisation without running
statistics, a softmax over dimension 0) trains, exports and serves without an error, but with wrong answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Gap = Callable[[NDArray[Any], NDArray[Any]], float]
"""How far one answer is from another, as a share."""
Predict = Callable[[Sequence[NDArray[Any]]], NDArray[Any]]
"""An array `(n, *shape)` for each input -> answers `(n, outputs)`."""

_CHANGES = "its answers change from call to call in evaluation mode"


def batch_dependence(
    predict: Predict, columns: Sequence[NDArray[Any]], tolerance: float, gap_of: Gap | None = None
) -> str | None:
    """How the answers to single samples differ from those to the same samples in one batch; None where they do not.

    Args:
        predict: called with all samples, with the same again, and with each alone.
        columns: of some different samples, an array for each input.
        tolerance: of a difference, as a share of the largest finite answer. NaN is equal to NaN.
        gap_of: of answers whose numbers have no distance, such as labels, to one sample or more.

    Returns:
        What is wrong, as the second half of a sentence about the model.
    """
    batched, again = predict(columns), predict(columns)
    scale = max(float(np.abs(batched[np.isfinite(batched)]).max(initial=0)), float(np.finfo(np.float32).tiny))
    if gap_of is not None:
        scale = 1.0
    gap_of = gap_of or largest_gap
    if batched.shape != again.shape or gap_of(batched, again) > tolerance * scale:
        return _CHANGES
    for row in range(len(batched)):
        alone = predict([column[row : row + 1] for column in columns])
        if alone.shape != batched[:1].shape:
            return f"its answer to one sample alone has shape {alone.shape} and not {batched[:1].shape}"
        gap = gap_of(alone, batched[row : row + 1])
        if not gap <= tolerance * scale:
            if gap_of(predict(columns), batched) > tolerance * scale / 2:  # too slowly for two calls
                return _CHANGES
            others = len(batched) - 1
            return (
                f"its answer to a sample depends on the others of its batch: alone and with {others} others it differs "
                f"by {gap:.2g}, where answers go up to {scale:.2g}"
            )
    return None


def largest_gap(one: NDArray[Any], other: NDArray[Any]) -> float:
    """The largest difference; 0 where both are no number."""
    with np.errstate(invalid="ignore"):
        same = (one == other) | (np.isnan(one) & np.isnan(other))
        gaps = np.where(same, 0.0, np.abs(one.astype(np.float64) - other.astype(np.float64)))
    return float(gaps.max(initial=0))
