"""Rungs of training where time is limited: what they cost, how long they may be, and those that a run has begun.

The time that is left depends on the clock, and a resumed run has its whole budget again. So each rung is written down
before it begins, and a resumed run repeats what was written: its bundles are in the store then.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from rushhour.bundle import Bundle
from rushhour.system.storage import write_whole

LENGTHS: Final = (0.25, 0.5, 1, 2, 4, 8)
"""Epochs of one rung where time is short; below one, that share of the samples, once."""
_FILE: Final = "rungs.json"
_HIGHER, _HIGHEST_LR = 1.5, 3e-3
"""The peak learning rate where time is short, over that of the reference's training, and at most (decision 41)."""


class _Begun(msgspec.Struct, frozen=True):
    """The file.

    Attributes:
        key: of all that the search of networks began from.
        rungs: role -> epochs of its rungs.
    """

    key: str
    rungs: dict[str, tuple[float, ...]] = {}


class RungRecord:
    """The rungs that a run has begun where time was short, in a file.

    Args:
        folder: of the file.
        key: of all that the search of networks begins from; rungs of another key are forgotten.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._path = folder / _FILE
        self._begun = _Begun(key)
        try:
            found = msgspec.json.decode(self._path.read_bytes(), type=_Begun)
        except (OSError, msgspec.DecodeError):
            return
        if found.key == key:
            self._begun = found

    def __bool__(self) -> bool:
        return bool(self._begun.rungs)

    def of(self, role: str) -> tuple[float, ...]:
        """Epochs of the rungs that were begun for a shape, in order."""
        return self._begun.rungs.get(role, ())

    def begin(self, role: str, rungs: tuple[float, ...]) -> None:
        """Write down the rungs of a shape, before the last of them begins.

        Raises:
            StorageError: if the disk does not take it.
        """
        self._begun = _Begun(self._begun.key, {**self._begun.rungs, role: rungs})
        write_whole(self._path, msgspec.json.encode(self._begun) + b"\n")


@dataclasses.dataclass
class Costs:
    """What training costs, in seconds; all of it is 0 where the time is not limited.

    Attributes:
        teacher_s: of the teacher's answers to the whole training part.
        beside_s: of export and judgement of a trained network, estimated.
        answered: the share of the training part that the teacher has answered.
        pace: seconds that a rung took over those that were expected, at most so far.
    """

    teacher_s: float = 0.0
    beside_s: float = 0.0
    answered: float = 0.0
    pace: float = 1.0

    def of(self, epochs_s: Sequence[float], length: float) -> float:
        """The seconds of a rung.

        Args:
            epochs_s: of an epoch without the teacher, of each network that is trained.
            length: epochs of the rung.
        """
        answers = max(0.0, min(1.0, length) - self.answered) * self.teacher_s
        return self.pace * (answers + sum(length * epoch_s + self.beside_s for epoch_s in epochs_s))

    def of_all_rungs(self, epochs_s: Sequence[float], rungs: Sequence[float]) -> float:
        """The seconds of all rungs, each with half of the networks before: the slowest, to be sure."""
        slowest, seconds = sorted(epochs_s, reverse=True), 0.0
        later = dataclasses.replace(self, answered=1.0)  # the teacher answers in the first rung
        for number, length in enumerate(rungs):
            costs = later if number else self
            seconds += costs.of(slowest[: math.ceil(len(slowest) / 2**number)], length)
        return seconds

    def took(self, seconds: float, expected: float, length: float) -> None:
        """A rung of so many epochs took `seconds` instead of those that were expected."""
        self.answered = max(self.answered, min(1.0, length))
        if expected:
            self.pace *= max(1.0, seconds / expected)


def words(rungs: tuple[float, ...]) -> str:
    """The epochs of some rungs together: `0.5 epochs`, `1 epoch`, `3 epochs`."""
    total = sum(rungs)
    return f"{total:g} epoch{'' if total == 1 else 's'}"


def short_lr(reference: Bundle) -> float | None:
    """The peak learning rate of a distillation with little time: above that of the reference's own training.

    None where that is not known, or was for SGD, whose rates mean something else.
    """
    trained = next((step for step in reference.manifest.lineage if step.what == "train"), None)
    lr = trained.settings.get("lr") if trained is not None else None
    adam = trained is not None and trained.settings.get("optimizer", "adam") != "sgd"
    return min(_HIGHEST_LR, _HIGHER * lr) if adam and isinstance(lr, float) else None
