"""A cascade of variants: the smallest answers what it is sure of, and what it is not sure of goes on to the next.

The rule is a part of the Plan. `tune` chooses it from recorded outputs and the server applies it to batches, both with
the functions here: a sample goes on in the server where it went on in the prediction.

Source of the scores: Guo et al., On Calibration of Modern Neural Networks, ICML 2017 (temperature scaling).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Annotated, Any, Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from rushhour.errors import PlanError

Score = Literal["top", "margin", "entropy"]
"""How sure an answer is, from 0 to 1. `top`: the probability of the most likely class. `margin`: the same among the two
most likely ones, which is the logistic function of the margin of their logits. `entropy`: 1 minus the entropy of all
classes over its maximum."""
SCORES: Final[tuple[Score, ...]] = ("top", "margin", "entropy")

_HOTTEST: Final = math.log(100.0)
_STEPS: Final = 60
_GOLDEN: Final = (math.sqrt(5) - 1) / 2
_FITTED: Final = 20_000
"""Samples that a temperature is fitted to, at most: it is one number."""
_LEAST_PROBABILITY = 1e-30
"""Below it the logarithm of a float32 is not reliable; 0 has none."""


class CascadeStep(msgspec.Struct, frozen=True):
    """A variant that keeps the answers that it is sure of.

    Attributes:
        variant: its name in the plan.
        score: how sure an answer is.
        temperature: the logits are divided by it before the score; it calibrates the probabilities.
        threshold: answers with a score of at least this are kept; below it the sample goes on to the next variant.
        max_batch: samples in one batch of this variant, at most; None is the policy's.
    """

    variant: str
    score: Score
    temperature: Annotated[float, msgspec.Meta(gt=0, le=1e6)]
    threshold: Annotated[float, msgspec.Meta(ge=0, le=1)]
    max_batch: Annotated[int, msgspec.Meta(ge=1, le=4096)] | None = None


class CascadeRule(msgspec.Struct, frozen=True):
    """Which variants a cascade consists of, and when a sample goes on.

    Attributes:
        steps: all variants but the last, in the order in which they are asked.
        last: name of the variant that keeps all of its answers.
        output: of the model, from which the scores are computed: one number for each class.
        logits: whether that output holds logits; else they are probabilities.
        escalated: share of the samples that each step sent on, of those that it got, when the rule was chosen.
        stands: whether the answer of a variant stands where the next one has no time for a sample or fails. If not, the
            request is turned away or fails: what a load test measures then keeps the accuracy of the rule.
    """

    steps: Annotated[tuple[CascadeStep, ...], msgspec.Meta(min_length=1, max_length=2)]
    last: str
    output: str
    logits: bool = False
    escalated: tuple[Annotated[float, msgspec.Meta(ge=0, le=1)], ...] = ()
    stands: bool = True

    @property
    def variants(self) -> tuple[str, ...]:
        """The names of its variants, in the order in which they are asked."""
        return (*(step.variant for step in self.steps), self.last)

    def check(self, variants: Collection[str], *, has_ladder: bool) -> None:
        """Refuse a rule that could not be served.

        Args:
            variants: the names of the plan's variants.
            has_ladder: whether the plan has a ladder, too.

        Raises:
            PlanError: naming the first fault.
        """
        names = self.variants
        for name in names:
            if name not in variants:
                known = ", ".join(sorted(variants))
                raise refused(f"it names the variant {name!r}, and the plan's variants are {known}", "name one of them")
            if names.count(name) > 1:
                raise refused(f"it names the variant {name!r} twice", "name each once")
        if has_ladder:
            raise refused("the plan has a ladder, too", "keep one of the two")

    def goes_on(self, step: int, outputs: NDArray[Any]) -> NDArray[np.bool_]:
        """Which answers of a step are not kept. One that is not finite is not.

        Args:
            step: position in `steps`.
            outputs: of its variant, shape `(n, classes)`.

        Returns:
            shape `(n,)`.
        """
        at = self.steps[step]
        scores = confidence(outputs, at.score, at.temperature, logits=self.logits)
        unsure: NDArray[np.bool_] = ~(scores >= at.threshold)
        return unsure

    def merged(self, outputs: tuple[NDArray[Any], ...]) -> tuple[NDArray[Any], NDArray[np.intp]]:
        """What the cascade answers, from what each of its variants answers to all samples.

        Args:
            outputs: of each variant, in order, shape `(n, classes)` each.

        Returns:
            The answers, shape `(n, classes)`, and the position of the variant that gave each, shape `(n,)`.
        """
        answers = np.array(outputs[0])
        by = np.zeros(len(answers), dtype=np.intp)
        for step, after in enumerate(outputs[1:]):
            on = (by == step) & self.goes_on(step, outputs[step])
            answers[on] = after[on]
            by[on] = step + 1
        return answers, by


def refused(why: str, remedy: str) -> PlanError:
    """The error of a plan whose cascade cannot be served."""
    return PlanError("the plan's cascade cannot be served", why, remedy)


def confidence(
    outputs: NDArray[Any], score: Score, temperature: float = 1.0, *, logits: bool = False
) -> NDArray[np.float64]:
    """How sure each answer is, from 0 to 1; NaN where an output is not finite.

    Args:
        outputs: shape `(n, classes)` with two classes or more.
        score: which measure.
        temperature: the logits are divided by it.
        logits: whether the outputs are logits; else probabilities.

    Returns:
        shape `(n,)`.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = relative_logits(outputs, logits=logits) / temperature
        if score == "margin":
            second = np.partition(scaled, -2, axis=1)[:, -2]
            margin: NDArray[np.float64] = 1 / (1 + np.exp(second))
            return margin
        powers = np.exp(scaled)
        total = powers.sum(axis=1)
        found: NDArray[np.float64]
        if score == "top":
            found = 1 / total
            return found
        entropy = np.log(total) - (powers * np.where(powers > 0, scaled, 0.0)).sum(axis=1) / total
        found = 1 - entropy / np.log(outputs.shape[1])
        return np.clip(found, 0.0, 1.0)


def fit_temperature(outputs: NDArray[Any], labels: NDArray[Any], *, logits: bool = False) -> float:
    """The temperature under which the labels are most likely, from 0.01 to 100.

    The likelihood has one maximum, because it is concave in 1 / temperature: a golden-section search finds it.

    Args:
        outputs: shape `(n, classes)`.
        labels: shape `(n,)`.
        logits: whether the outputs are logits; else probabilities.
    """
    values = relative_logits(outputs[:_FITTED], logits=logits)
    of_label = values[np.arange(len(values)), labels[:_FITTED]]

    def loss(log_temperature: float) -> float:
        scale = math.exp(-log_temperature)
        return float((np.log(np.exp(scale * values).sum(axis=1)) - scale * of_label).mean())

    low, high = -_HOTTEST, _HOTTEST
    for _ in range(_STEPS):
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        low, high = (low, right) if loss(left) <= loss(right) else (left, high)
        if high - low < 1e-3:
            break
    return float(f"{math.exp((low + high) / 2):.4g}")


def relative_logits(outputs: NDArray[Any], *, logits: bool = False) -> NDArray[np.float64]:
    """The logits of each answer minus its largest one; NaN where that is not finite.

    Args:
        outputs: shape `(n, classes)`.
        logits: whether the outputs are logits; else probabilities.

    Returns:
        shape `(n, classes)`, at most 0.
    """
    values = np.asarray(outputs, dtype=np.float64)
    if not logits:
        values = np.log(np.maximum(values, _LEAST_PROBABILITY))
    top = values.max(axis=1, keepdims=True)
    relative: NDArray[np.float64] = values - np.where(np.isfinite(top), top, np.nan)
    return relative


def why_no_score(kind: str, shape: tuple[int, ...]) -> str:
    """Why answers of a task have no score by which a cascade could decide; empty where they have one.

    Args:
        kind: of the task.
        shape: of one answer.
    """
    if kind != "classification":
        return f"an answer of a {kind} does not say how sure it is: a cascade needs probabilities of classes"
    if len(shape) != 1 or shape[0] < 2:
        return f"one answer has shape {shape}, and a cascade needs one number for each of two classes or more"
    return ""
