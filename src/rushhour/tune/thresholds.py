"""The threshold of a cascade, from the recorded outputs of its variants on one part of the data.

A threshold decides how many samples go on to the larger variant, and so cost and accuracy. Chosen by its accuracy on
the data alone it would be too low: of many thresholds, the best looking one is lucky. So each is tested, and only those
are accepted whose drop is shown to be within the budget:

    temperature   the one under which the small variant's probabilities fit best (Guo et al., ICML 2017)
    thresholds    a fixed grid, from "all samples go on" downwards
    test          an upper bound of the drop: Clopper and Pearson's of the answers that became wrong, minus theirs of
                  those that became right
    order         one after another until the first that is not shown to be within the budget, so that all together err
                  no more than one (Learn then Test: Angelopoulos et al., Annals of Applied Statistics 2025; fixed
                  sequence testing: Maurer, Hothorn and Lehmacher 1995)

The lowest accepted threshold sends on the fewest samples. Several scores share the error (Bonferroni). The temperature
and the scores are chosen on the same samples; another part of the data confirms the rule.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rushhour.cascade import SCORES, CascadeStep, Score, confidence, fit_temperature
from rushhour.load.significance import ERROR, upper_share

_GRID: Final = 1 / (1 + np.exp(-np.arange(14.0, -6.05, -0.1)))
"""Thresholds, the highest first: steps of 0.1 in log odds."""


@dataclasses.dataclass(frozen=True)
class Threshold:
    """A step of a cascade, and what it costs on the samples that it was chosen on.

    Attributes:
        step: with score, temperature and threshold.
        escalated: share of the samples that go on.
        drop: of the accuracy, below the reference.
        highest_drop: its upper bound, at the confidence that was asked for.
        n: samples.
    """

    step: CascadeStep
    escalated: float
    drop: float
    highest_drop: float
    n: int


def choose_threshold(
    variant: str,
    small: NDArray[Any],
    large: NDArray[Any],
    reference: NDArray[Any],
    targets: NDArray[Any] | None,
    max_drop: float,
    *,
    error: float = ERROR,
    logits: bool = False,
    scores: tuple[Score, ...] = SCORES,
) -> Threshold | None:
    """The threshold that sends on the fewest samples, of those whose accuracy is shown to be within the budget.

    Args:
        variant: name of the small one.
        small: its outputs, shape `(n, classes)`.
        large: those of what answers the samples that go on; of another cascade, its answers.
        reference: those of the model from which the drop is measured.
        targets: labels, shape `(n,)`; None where there are none, and agreement with the reference counts.
        max_drop: the accuracy budget.
        error: how often a threshold that breaks the budget may be chosen.
        logits: whether the outputs are logits.
        scores: those that are tried.

    Returns:
        None where no threshold is shown to be within the budget, not even that of the large variant alone.
    """
    labels = reference.argmax(axis=1) if targets is None else targets
    by_reference, by_small, by_large = (outputs.argmax(axis=1) == labels for outputs in (reference, small, large))
    temperature = fit_temperature(small, labels, logits=logits)
    found = []
    for score in scores:
        sure = confidence(small, score, temperature, logits=logits)
        accepted = _lowest(sure, by_reference, by_small, by_large, max_drop, error / len(scores))
        if accepted is not None:
            threshold, escalated, drop, highest = accepted
            step = CascadeStep(variant, score, temperature, threshold)
            found.append(Threshold(step, escalated, drop, highest, len(labels)))
    return min(found, key=lambda each: each.escalated, default=None)


def _lowest(
    sure: NDArray[np.float64],
    by_reference: NDArray[np.bool_],
    by_small: NDArray[np.bool_],
    by_large: NDArray[np.bool_],
    max_drop: float,
    error: float,
) -> tuple[float, float, float, float] | None:
    """The lowest threshold that is accepted, the share that goes on, the drop and its upper bound.

    Args:
        sure: scores of the small variant, shape `(n,)`.
        by_reference, by_small, by_large: whether each answers a sample right.
    """
    n = len(sure)
    order = np.argsort(np.where(np.isnan(sure), -np.inf, sure), kind="stable")
    sorted_scores = np.where(np.isnan(sure), -np.inf, sure)[order]

    def counts(of_small: NDArray[np.bool_], of_large: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Of the samples, where the k least sure ones go on; for each k, shape `(n + 1,)`."""
        gone = np.concatenate([[0], np.cumsum(of_large[order])])
        kept = np.concatenate([[0], np.cumsum(of_small[order])])
        total: NDArray[np.int64] = gone + kept[-1] - kept
        return total

    lost = counts(by_reference & ~by_small, by_reference & ~by_large)
    won = counts(~by_reference & by_small, ~by_reference & by_large)
    accepted = None
    before = -1
    for threshold in (1.0, *_GRID.tolist(), 0.0):
        on = int(np.searchsorted(sorted_scores, threshold, side="left"))
        if on == before:  # the same samples: the higher threshold is the safer one
            continue
        before = on
        more, fewer = int(lost[on]), int(won[on])
        highest = upper_share(more, n, error / 2) - 1 + upper_share(n - fewer, n, error / 2)
        if highest > max_drop:
            break
        accepted = (float(threshold), on / n, (more - fewer) / n, highest)
    return accepted
