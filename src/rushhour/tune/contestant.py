"""A shape of the network in the search for smaller networks, and which gentler one it has to beat."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Final

from rushhour.measurement import Accuracy
from rushhour.tune.shapes import Shape
from rushhour.tune.state import CandidateState

FASTER: Final = 1.05
"""A shape that removes more has to be predicted faster than a gentler one by this factor."""


@dataclasses.dataclass
class Contestant:
    """A shape that can be served.

    Attributes:
        rungs: epochs of each that was trained so far.
        epoch_s: seconds of one epoch without the teacher, where the time is limited.
    """

    shape: Shape
    state: CandidateState
    rungs: tuple[float, ...] = ()
    epoch_s: float = 0.0

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self.state.fate is None

    @property
    def predicted(self) -> float:
        """Its capacity in requests per second, by simulation; 0 where none holds."""
        return self.state.predicted_rps

    @property
    def accuracy(self) -> Accuracy:
        """On the validation part, after the last rung; there is one."""
        assert self.state.accuracy is not None
        return self.state.accuracy


def fastest_gentler(one: Contestant, made: Iterable[Contestant], whole: float) -> tuple[str, float]:
    """The fastest that removes less than `one`, and its predicted capacity.

    Args:
        one: of the shapes.
        made: all shapes.
        whole: the predicted capacity of the whole network, which removes nothing.
    """
    gentler = [other for other in made if other.shape.is_gentler_than(one.shape)]
    rivals = [("the whole network", whole), *((other.shape.role, other.predicted) for other in gentler)]
    return max(rivals, key=lambda rival: rival[1])
