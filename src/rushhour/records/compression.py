"""The record of a compression: each step of each recipe, judged as it would be served, and the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from rushhour.errors import DataError, GoalError
from rushhour.goal import AccuracyBudget
from rushhour.measurement import Accuracy, Interval, Rate
from rushhour.plan import EngineName, Precision
from rushhour.system.storage import explained, write_whole

COMPRESSION = "compression.json"
"""The file's name in a compression's folder."""

_Count = Annotated[int, msgspec.Meta(ge=0, le=10**15)]

Verdict = Literal["best", "no gain", "nearest miss"]
"""`best`: proven to be inside the budget, and faster, or smaller and no slower. `no gain`: no gain is proven inside the
budget, so the bundle is unchanged. `nearest miss`: nothing is proven to be inside the budget."""


class Factor(msgspec.Struct, frozen=True):
    """One artefact's figure over another's, measured in the same blocks: the geometric mean, and its 95% interval."""

    value: Annotated[float, msgspec.Meta(ge=0, le=1e9)]
    interval: Interval
    n: _Count


class Stage(msgspec.Struct, frozen=True):
    """One bundle, as it is compiled.

    Attributes:
        step: that made it, as in a recipe's text; empty for the original bundle.
        bundle: its folder in the store.
        hash: of its content.
        parameters: of the network.
        bytes: of the graph on disk.
        precision: that it is compiled in.
        accuracy: on the validation part, paired with the reference.
        throughput: samples per second over the reference's; None of the reference itself.
        over_parent: the same over the bundle before this step.
        latency: seconds for one sample alone, over the reference's.
        samples_per_s: of the engine alone, with all streams busy.
        slower: whether it is slower than the reference or its parent; then it is never the best.
        needs: the class of processor that its int8 needs to be exact on every engine; empty where any will do.
        kept: layers that its step left unchanged, each with the reason.
    """

    step: str
    bundle: str
    hash: str
    parameters: _Count
    bytes: _Count
    precision: Precision
    accuracy: Accuracy
    throughput: Factor | None = None
    over_parent: Factor | None = None
    latency: Factor | None = None
    samples_per_s: Rate | None = None
    slower: bool = False
    needs: Literal["", "vnni"] = ""
    kept: str = ""


class Confirmation(msgspec.Struct, frozen=True):
    """The result of one stage on the test part.

    Attributes:
        stage: recipe and step, as places in `attempts` and its `stages`.
        accuracy: on the test part, paired with the reference; None where it could not be judged.
        why: why the budget is not proven to hold; empty where it is.
    """

    stage: tuple[int, int]
    accuracy: Accuracy | None
    why: str = ""


class Attempt(msgspec.Struct, frozen=True):
    """One recipe.

    Attributes:
        stages: one for each step that was applied.
        why: the reason, where it could not be finished.
    """

    recipe: str
    stages: tuple[Stage, ...]
    why: str = ""


class Compression(msgspec.Struct, frozen=True):
    """The whole compression.

    Attributes:
        model: name of the original bundle.
        engine: that compiled everything.
        reference: the original bundle.
        attempts: in order.
        best: recipe and step of the answer, as places in `attempts` and its `stages`; None where it is the reference.
        verdict: see `Verdict`.
        summary: the verdict in a sentence; `said` in JSON.
        test: the answer on the test part, which no decision used, paired with the reference.
        reference_test: the reference on it.
        request: the arguments by name; `asked` in JSON. A compression with others replaces this one only with `force`.
        also: the place (as `best`) of the int8 bundle for other processors, where 7 bits of the weights cost too much;
            it is written beside the answer.
        confirmations: on the test part, in order: the smallest drop first, until one is outside the budget.
    """

    model: str
    engine: EngineName
    budget: AccuracyBudget
    reference: Stage
    attempts: tuple[Attempt, ...]
    best: tuple[int, int] | None
    verdict: Verdict
    summary: str = msgspec.field(name="said")
    test: Accuracy
    reference_test: Accuracy
    also: tuple[int, int] | None = None
    request: dict[str, Any] = msgspec.field(name="asked", default_factory=dict)
    confirmations: tuple[Confirmation, ...] = ()

    def __post_init__(self) -> None:
        for name, place in (("best", self.best), ("also", self.also)):
            if place is not None and not self._has(*place):
                raise ValueError(f"`{name}` is {list(place)}, which no attempt has")

    def _has(self, attempt: int, stage: int) -> bool:
        return 0 <= attempt < len(self.attempts) and 0 <= stage < len(self.attempts[attempt].stages)

    @property
    def answer(self) -> Stage:
        """The stage that is the answer."""
        if self.best is None:
            return self.reference
        return self.stage(self.best)

    def stage(self, place: tuple[int, int]) -> Stage:
        """The stage at a place in `attempts` and its `stages`."""
        attempt, stage = place
        return self.attempts[attempt].stages[stage]

    def save(self, folder: Path) -> None:
        """Write it to `folder`.

        Raises:
            StorageError: if it cannot be written.
        """
        write_whole(folder / COMPRESSION, msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")

    @classmethod
    def load(cls, folder: Path) -> Compression:
        """Read it from `folder`.

        Raises:
            DataError: if it is damaged.
            StorageError: if it cannot be read.
        """
        with explained(f"read {folder / COMPRESSION}"):
            content = (folder / COMPRESSION).read_bytes()
        try:
            return msgspec.json.decode(content, type=cls)
        except (msgspec.DecodeError, GoalError, RecursionError) as error:
            raise DataError(
                f"cannot read {folder / COMPRESSION}", str(error), "compress again; finished steps are kept"
            ) from error
