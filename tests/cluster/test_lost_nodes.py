"""A node that is lost costs one recipe: by a Ray of which each answer is written down."""

from __future__ import annotations

from typing import Any

import pytest

import rushhour.cluster.trials.building as building
from rushhour.cluster.trials.building import RayBuilder
from rushhour.cluster.trials.packing import Made
from rushhour.progress import Silent


class RayError(Exception):
    """What Ray raises where a worker is gone."""


class RayTaskError(RayError):
    """What it raises where the worker has raised something."""


class FakeRay:
    """Answers are ready at once; it takes the lost node for alive, as Ray does until heartbeats are missed."""

    class exceptions:
        RayError, RayTaskError = RayError, RayTaskError

    def put(self, what: object) -> object:
        return what

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": name, "Alive": True} for name in ("a", "b")]

    def wait(self, refs: list[Any], **_: object) -> tuple[list[Any], list[Any]]:
        return refs[:1], refs[1:]

    def get(self, ref: Any) -> Any:
        if isinstance(ref[1], Exception):
            raise ref[1]
        return ref[1]


class FakeNode:
    """A node whose worker is lost at its first recipe, and whose next worker never starts, or does."""

    def __init__(self, name: str, dies: bool, comes_back: bool) -> None:
        self.id = self.name = name
        self.losses = 0
        self.asked: list[str] = []
        self._dies, self._comes_back = dies, comes_back

    def build(self, order: Any, *_: object) -> Any:
        self.asked.append(str(order.recipe))
        if self._dies:
            return len(self.asked), RayError("Socket closed")
        MADE.add(str(order.recipe))
        return (self.name, len(self.asked)), Made((), 0.0)

    def lost(self) -> Any:
        self.losses += 1
        self._dies = not self._comes_back
        return "take", "" if self._comes_back else RayError("the actor died")

    def end(self, *, clean: bool) -> None:
        return None


MADE: set[str] = set()


class FakeWork:
    """What recipes are applied to; nothing of it is looked at here."""

    class dataset:
        content_key = "data"

    class bundle:
        path = "reference"

        class manifest:
            hash = "0"

    seed, max_drop, trusted = 0, 0.1, ()


@pytest.mark.parametrize("comes_back", [False, True])
def test_a_node_gets_another_recipe_only_when_its_next_worker_has_answered(
    comes_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next recipe went to the same node, which Ray did not know to be dead yet, and was lost, too."""
    MADE.clear()
    monkeypatch.setattr(building, "first_missing", lambda recipe, _: ((), None if str(recipe) in MADE else "key"))
    monkeypatch.setattr(building, "trusted_factories", lambda *_: ())
    monkeypatch.setattr(building, "pack", lambda bundle: bundle)
    monkeypatch.setattr(building, "_SETTLE_S", 0.0)
    lost, other = FakeNode("b", True, comes_back), FakeNode("a", False, True)
    recipes: Any = ["one", "two", "three", "four"]
    builder = RayBuilder(FakeRay(), [lost, other], FakeWork.dataset)  # type: ignore[list-item, arg-type]
    builder.build(recipes, FakeWork, Silent())  # type: ignore[arg-type]
    assert set(recipes) == MADE
    assert other.asked
    assert lost.asked == ["one"] if not comes_back else lost.asked[0] == "one"
    assert lost.losses == 1
