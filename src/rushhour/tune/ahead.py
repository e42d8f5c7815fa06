"""Networks that are made elsewhere, before the search for smaller ones asks for them."""

from __future__ import annotations

from collections.abc import Sequence

from rushhour.compress import Builder, Recipe, Work
from rushhour.progress import Progress
from rushhour.tune.contestant import Contestant
from rushhour.tune.decisions import Decisions
from rushhour.tune.shapes import Shape


class Ahead:
    """Has a builder make what the search needs next.

    Args:
        builder: None to make everything here.
        work: what recipes are applied to.
        progress: receives what is built.
        decisions: the seconds count there.
    """

    def __init__(self, builder: Builder | None, work: Work, progress: Progress, decisions: Decisions) -> None:
        self._builder = builder
        self._work = work
        self._progress = progress
        self._decisions = decisions

    def shapes(self, shapes: Sequence[Shape]) -> None:
        """Make these shapes with inherited weights."""
        self._build([shape.recipe() for shape in shapes])

    def rung(self, contestants: Sequence[Contestant], length: float, lr: float | None) -> list[Contestant]:
        """Train these for one more rung of so many epochs. Returns them; none where everything is made here."""
        if self._builder is None or not self._builder.width:
            return []
        self._build([one.shape.recipe((*one.rungs, length), lr) for one in contestants])
        return list(contestants)

    def _build(self, recipes: list[Recipe]) -> None:
        if self._builder is None or not self._builder.width or not recipes:
            return
        began = self._decisions.clock.now()
        self._builder.build(recipes, self._work, self._progress)
        self._decisions.spend(self._decisions.clock.now() - began)
