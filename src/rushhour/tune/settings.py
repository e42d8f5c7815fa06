"""How a search goes about it."""

from __future__ import annotations

import math

import msgspec

from rushhour.clock import Clock


class TuneSettings(msgspec.Struct, frozen=True):
    """How the search goes about it.

    Attributes:
        seed: of all arrival schedules; equal seeds ask equal questions.
        keep: a candidate predicted below this share of the best prediction is not raced.
        race: candidates that are raced, at most.
        resolution: highest passing over lowest failing rate at the end of a search, at most 1 + this.
        time_s: how long each size of a batch is timed, the engine alone.
        window_s: length of one load window on the way; longer where the SLO needs more requests.
        proof_s: length of a window that something is claimed from. A queue is slow in long waves; a short window
            near its capacity proves little.
        budget_s: seconds that all of it may take, about: what decides least is left out, and said so. None: as long as
            it takes. A search that goes on has all of it again.
    """

    seed: int = 0
    keep: float = 0.7
    race: int = 4
    resolution: float = 0.05
    time_s: float = 0.05
    window_s: float = 3.0
    proof_s: float = 20.0
    budget_s: float | None = None


class Budget:
    """The time that a search has, from now on.

    Args:
        seconds: all of it; None for as long as it takes.
        clock: what it is read on.
    """

    FOR_PROOF, FOR_RUNGS, FOR_WAY = 0.4, 0.1, 0.15
    """Shares of it: kept for the winner's capacity and its proof; kept for the ladder's other steps; for the estimate
    of one capacity, at most."""

    def __init__(self, seconds: float | None, clock: Clock) -> None:
        self._clock = clock
        self._began = clock.now()
        self.seconds = math.inf if seconds is None else seconds

    @property
    def left(self) -> float:
        """The share of it that is left; below 0 once it is spent."""
        return 1.0 if self.seconds == math.inf else 1 - (self._clock.now() - self._began) / self.seconds
