"""Shapes: how much smaller a network may become, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from rushhour.bundle import Bundle
from rushhour.compress import Distil, LowRank, Prune, Recipe, is_plain
from rushhour.compress.lowrank import dominant
from rushhour.models import load_deployed
from rushhour.tune.state import failure_reason

_PRUNED = ((0.5, 1.0), (0.7, 1.0), (0.25, 1.0))
_PRUNED_AND_SPLIT = ((0.5, 0.1), (0.7, 0.05), (0.25, 0.2), (0.5, 1.0), (0.0, 0.1))
"""Share of the channels that is removed, and of the parameters of dominating dense layers that stays."""


class Shape(msgspec.Struct, frozen=True):
    """A network with fewer channels, and its dominating dense layers split.

    Attributes:
        ratio: share of the channels that is removed; 0 for none.
        keep: share of the parameters of dominating dense layers that stays; 1 where they are not split.
    """

    ratio: float
    keep: float

    @property
    def role(self) -> str:
        """The name of its bundle in a run: `prune-0.5-lowrank-0.1`."""
        parts = [f"prune-{self.ratio:g}"] if self.ratio else []
        return "-".join([*parts, f"lowrank-{self.keep:g}"] if self.keep < 1 else parts)

    def recipe(self, rungs: Sequence[float] = (), lr: float | None = None) -> Recipe:
        """The recipe of its bundle.

        Args:
            rungs: epochs of each distillation, one after another, whole numbers or the share of one; none for the shape
                with inherited weights.
            lr: the peak of their learning rate; None for the usual one.
        """
        pruned = [Prune(ratio=self.ratio, epochs=0)] if self.ratio else []
        split = [LowRank(keep=self.keep)] if self.keep < 1 else []
        peak = Distil().lr if lr is None else lr
        taught = [Distil(1, share=rung, lr=peak) if rung < 1 else Distil(int(rung), lr=peak) for rung in rungs]
        return Recipe((*pruned, *split, *taught))

    def is_gentler_than(self, other: Shape) -> bool:
        """Whether `other` removes at least as much everywhere, and more somewhere."""
        return self != other and self.ratio <= other.ratio and self.keep >= other.keep


def shapes_of(reference: Bundle, trusted: tuple[str, ...]) -> tuple[Shape, ...]:
    """The shapes worth trying on this network, the most promising first.

    Args:
        reference: with a network that can be trained; see `why_untrainable`.
        trusted: factories that may be imported.
    """
    splits = dominant(load_deployed(reference, trusted).network)
    return tuple(Shape(ratio, keep) for ratio, keep in (_PRUNED_AND_SPLIT if splits else _PRUNED))


def why_untrainable(reference: Bundle, trusted: tuple[str, ...]) -> str:
    """Why the network of a bundle cannot be trained; empty where it can."""
    manifest = reference.manifest
    if manifest.precision != "f32" or not is_plain(reference):
        return "the bundle is of reduced precision already"
    if manifest.source is None or reference.weights is None:
        return "the bundle has only its graph, and no torch module that could be trained"
    if manifest.signature.dimensions:
        return f"its {manifest.signature.dimensions[0].name} is open, and training takes samples of one size"
    try:
        load_deployed(reference, trusted)
    except Exception as error:  # a user's factory may fail in any way
        return failure_reason(error)
    return ""
