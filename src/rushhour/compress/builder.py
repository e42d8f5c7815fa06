"""Recipes that are built elsewhere, before a search asks for their bundles.

A bundle in the store depends on nothing but what is in its key (`compress.store`), so any machine that has the same key
may make it. A builder only fills the store: `apply` finds there what was made, and makes the rest itself. So a builder
that fails costs time, and never a result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from rushhour.bundle import Bundle
from rushhour.compress.recipe import Recipe
from rushhour.compress.store import Store, key_of
from rushhour.data.dataset import Dataset
from rushhour.models import trusted_factories
from rushhour.progress import Progress


@dataclasses.dataclass(frozen=True)
class Work:
    """What recipes are applied to: arguments of `apply`, and the same for all recipes of a search.

    Attributes:
        bundle: what they are applied to.
        dataset: to train and calibrate with.
        store: of the bundles.
        seed: of all that is random.
        max_drop: the accuracy budget of int8.
        trusted: factories that may be imported.
    """

    bundle: Bundle
    dataset: Dataset
    store: Store
    seed: int = 0
    max_drop: float | None = None
    trusted: tuple[str, ...] = ()


class Builder(Protocol):
    """Builds recipes elsewhere."""

    @property
    def width(self) -> int:
        """Recipes that it builds at the same time; 0 where it builds none any more."""
        ...

    def build(self, recipes: Sequence[Recipe], work: Work, progress: Progress) -> None:
        """Put the bundles of these recipes into the store, as many as can be made there.

        Nothing is computed elsewhere any more when this returns, so what follows may be timed on this machine.
        """
        ...

    def close(self) -> None:
        """Nothing more is to be built: its machines are free for others."""
        ...


def first_missing(recipe: Recipe, work: Work) -> tuple[list[Bundle], str | None]:
    """The bundles of the recipe's first steps, as many as are in the store, and the key of the next; None after all."""
    bundle, trusted = work.bundle, trusted_factories(work.bundle, work.trusted)
    dataset = work.dataset.fitted_to(bundle.manifest.signature, bundle.manifest.name)
    found: list[Bundle] = []
    for step in recipe.steps:
        before = found[-1] if found else bundle
        key = key_of(step, before, bundle, dataset, work.seed, work.max_drop, trusted)
        result = work.store.find(key)
        if result is None:
            return found, key
        found.append(result)
    return found, None
