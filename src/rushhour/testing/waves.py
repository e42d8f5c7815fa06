"""The speed of a host that comes in waves of seconds: as it was recorded on one, or of two states.

The same waves stretch simulated queues (`rushhour.testing.queues`) and real engines (`rushhour.testing.disturbers`).
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import math
from functools import cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

STEP_S = 0.1
"""How long a speed lasts at least."""


class Waves(Protocol):
    """A host's speed over time; 1 is what durations are given at."""

    def speeds(self, steps: int, runs: int, random: np.random.Generator) -> NDArray[np.float64]:
        """The speed in each step of `STEP_S`, of the shape `(steps, runs)`; each run starts at any moment."""
        ...


class Steady:
    """A host without waves."""

    def speeds(self, steps: int, runs: int, random: np.random.Generator) -> NDArray[np.float64]:
        """As in `Waves`."""
        return np.ones((steps, runs))


@dataclasses.dataclass(frozen=True)
class TwoState:
    """Fast and slow in turn, each for an exponentially long time.

    Attributes:
        swing: faster and slower by so much.
        mean_s: how long either lasts on average.
    """

    swing: float = 0.3
    mean_s: float = 4.0

    def speeds(self, steps: int, runs: int, random: np.random.Generator) -> NDArray[np.float64]:
        """As in `Waves`."""
        turns = random.random((steps, runs)) < -math.expm1(-STEP_S / self.mean_s)
        turns[0] = random.random(runs) < 0.5
        return np.where(turns.cumsum(axis=0) % 2, 1 - self.swing, 1 + self.swing)


@dataclasses.dataclass(frozen=True)
class Recorded:
    """40 s of a host on which nothing else ran, over and over; `data/speeds.json` says which.

    Attributes:
        name: of the recording.
    """

    name: str = "one stream of two threads"

    def speeds(self, steps: int, runs: int, random: np.random.Generator) -> NDArray[np.float64]:
        """As in `Waves`."""
        curve = np.array(recordings()[self.name])
        rows = np.arange(steps)[:, None] + random.integers(0, len(curve), runs)
        speeds: NDArray[np.float64] = curve[rows % len(curve)]
        return speeds


@cache
def recordings() -> dict[str, list[float]]:
    """The speed in each step of every recording, by its name."""
    text = importlib.resources.files("rushhour.testing").joinpath("data", "speeds.json").read_text()
    found: dict[str, list[float]] = json.loads(text)["speeds"]
    return found
