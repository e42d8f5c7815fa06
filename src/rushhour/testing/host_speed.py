"""Curves of a host's speed that varies over seconds: recorded on a real host, or of two states.

The same curves slow down simulated queues (`rushhour.testing.queues`) and real engines (`rushhour.testing.disturbers`).
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
"""The shortest time for which a speed lasts."""


class SpeedCurve(Protocol):
    """A host's speed over time, as a factor: durations are given for speed 1."""

    def speeds(self, steps: int, runs: int, random: np.random.Generator) -> NDArray[np.float64]:
        """The speed in each step of `STEP_S`, shape `(steps, runs)`; each run starts at a random time."""
        ...


class Steady:
    """A host of constant speed."""

    def speeds(self, steps: int, runs: int, random: np.random.Generator) -> NDArray[np.float64]:
        """As in `SpeedCurve`."""
        return np.ones((steps, runs))


@dataclasses.dataclass(frozen=True)
class TwoState:
    """Fast and slow states in turn, each of exponentially distributed length.

    Attributes:
        swing: the speeds are 1 + swing and 1 - swing.
        mean_s: mean length of a state.
    """

    swing: float = 0.3
    mean_s: float = 4.0

    def speeds(self, steps: int, runs: int, random: np.random.Generator) -> NDArray[np.float64]:
        """As in `SpeedCurve`."""
        turns = random.random((steps, runs)) < -math.expm1(-STEP_S / self.mean_s)
        turns[0] = random.random(runs) < 0.5
        return np.where(turns.cumsum(axis=0) % 2, 1 - self.swing, 1 + self.swing)


@dataclasses.dataclass(frozen=True)
class Recorded:
    """40 s of an otherwise idle host, repeated; `data/speeds.json` names the host.

    Attributes:
        name: of the recording.
    """

    name: str = "one stream of two threads"

    def speeds(self, steps: int, runs: int, random: np.random.Generator) -> NDArray[np.float64]:
        """As in `SpeedCurve`."""
        curve = np.array(recordings()[self.name])
        rows = np.arange(steps)[:, None] + random.integers(0, len(curve), runs)
        speeds: NDArray[np.float64] = curve[rows % len(curve)]
        return speeds


@cache
def recordings() -> dict[str, list[float]]:
    """Name of a recording -> the speed in each step."""
    text = importlib.resources.files("rushhour.testing").joinpath("data", "speeds.json").read_text()
    found: dict[str, list[float]] = json.loads(text)["speeds"]
    return found
