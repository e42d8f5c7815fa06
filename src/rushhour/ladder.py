"""The ladder of a Plan: variants from the most accurate to the fastest, and up to which load each is served."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Annotated, Final

import msgspec

from rushhour.errors import PlanError
from rushhour.measurement import Interval, Number, Rate

WINDOW: Final = 100_000
"""Answers over which the mean accuracy drop stays within the budget, unless a plan says otherwise."""
LARGEST_BATCH: Final = 4096
"""Bound on the batch size: an engine runs its largest batch once before it serves."""
_MOST_POINTS: Final = 16

Batch = Annotated[int, msgspec.Meta(ge=1, le=LARGEST_BATCH)]
Window = Annotated[int, msgspec.Meta(ge=100, le=10**9)]
_Drops = Annotated[tuple[Number, ...], msgspec.Meta(max_length=100_000)]


class LadderPoint(msgspec.Struct, frozen=True):
    """A variant, the load that it is served up to, and what it costs in accuracy.

    Attributes:
        variant: its name among the plan's variants.
        max_batch: samples in one batch, at most.
        rate_rps: requests per second that it carries within the SLO, of all worker processes of the plan.
        accuracy: of the compiled artefact.
        accuracy_drop: reference minus this one, on the same samples.
        accuracy_drop_interval: 95%. Its upper end is what each answer of this variant is counted with.
        class_drops: of a classification, the same drop among the samples that this variant answers with each class, in
            the order of the classes: by these the account follows the mix of classes that is seen. Empty where they are
            not known.
        measured: what the accuracy was measured on, in words: `test part, 10,000 samples`.
    """

    variant: str
    max_batch: Batch
    rate_rps: Rate
    accuracy: Number
    accuracy_drop: Number
    accuracy_drop_interval: Interval
    class_drops: _Drops = ()
    measured: str = ""

    @property
    def upper_drop(self) -> float:
        """The upper end of the drop's interval; not below 0."""
        return max(0.0, self.accuracy_drop_interval[1])

    @property
    def charges(self) -> tuple[float, ...]:
        """The expected drop of an answer with each class; empty where only the mean is known.

        A class differs from the mean by its measured drop; what the interval adds to the mean is added to each.
        """
        more = self.upper_drop - self.accuracy_drop
        return tuple(max(0.0, drop + more) for drop in self.class_drops)


def check_ladder(points: Sequence[LadderPoint], variants: Collection[str], max_drop: float) -> None:
    """Refuse a ladder that could not be served.

    Args:
        points: in order.
        variants: the names of the plan's variants.
        max_drop: the accuracy budget.

    Raises:
        PlanError: naming the first fault.
    """
    if not 2 <= len(points) <= _MOST_POINTS:
        raise _wrong(f"it has {len(points)} point{'' if len(points) == 1 else 's'}", f"give 2 to {_MOST_POINTS}")
    names = [point.variant for point in points]
    for name in names:
        if name not in variants:
            known = ", ".join(sorted(variants))
            raise _wrong(f"it names the variant {name!r}, and the plan's variants are {known}", "name one of them")
        if names.count(name) > 1:
            raise _wrong(f"it names the variant {name!r} twice", "name each once")
    for point in points:
        low, high = point.accuracy_drop_interval
        if not low <= point.accuracy_drop <= high:
            why = f"the accuracy drop of {point.variant} is {point.accuracy_drop:g}, outside its interval"
            raise _wrong(f"{why} of {low:g} to {high:g}", "give the interval of that drop")
        if not point.rate_rps > 0:
            raise _wrong(f"the rate of {point.variant} is {point.rate_rps:g} requests/s", "give the rate it carries")
    for one, other in pairwise(points):
        if not one.accuracy > other.accuracy:
            why = f"{other.variant} ({other.accuracy:g}) is no less accurate than {one.variant} ({one.accuracy:g})"
            raise _wrong(f"{why} before it", "order the points by descending accuracy, or omit one")
        if not one.rate_rps < other.rate_rps:
            why = f"{other.variant} carries {other.rate_rps:g} requests/s, no more than {one.variant} before it"
            raise _wrong(f"{why} ({one.rate_rps:g})", "order the points by ascending rate, or omit one")
        if one.upper_drop > other.upper_drop:
            why = f"the drop of {other.variant} is at most {other.upper_drop:g}, less than that of {one.variant}"
            raise _wrong(f"{why} before it ({one.upper_drop:g})", "measure both on the same samples, or omit one")
    most = points[0].upper_drop
    if most > max_drop:
        why = f"its most accurate variant {names[0]} may drop by {most:.2%}, and {max_drop:.2%} is allowed"
        raise _wrong(why, "put a more accurate variant first, or serve the plan with --fixed")


def in_words(points: Sequence[LadderPoint]) -> str:
    """`reference-openvino-f32 up to 400/s, int8-openvino-int8 up to 1,200/s`."""
    return ", ".join(f"{point.variant} up to {point.rate_rps:,.0f}/s" for point in points)


def _wrong(why: str, remedy: str) -> PlanError:
    return PlanError("the plan's ladder cannot be served", why, remedy)
