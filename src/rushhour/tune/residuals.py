"""Residuals: how far capacities that were measured in this run are from their predictions, by engine and layout."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from rushhour.plan import EngineName

_PRIOR = 1.0
"""Weight of what is known more generally, in measurements."""
_EARLIER = 0.5
"""Weight of earlier runs, in measurements."""
_MOST = math.log(2.0)

_SPREAD, _SPREAD_PRIOR = 0.15, 3.0
"""The standard deviation of a residual about its correction where nothing was measured yet, and its weight."""

Layout = tuple[int, ...]
"""Of the cores, and whether batches have more than one sample: what serving costs depends on both."""


class Residuals:
    """Learns log ratios of measured to predicted capacities, and corrects predictions by them.

    A residual of an engine in a layout is the mean of its own measurements, drawn to those of the layout, which are
    drawn to those of all, which are drawn to none (shrinkage). So one measurement corrects its like by half. What
    earlier runs measured counts as half a measurement.

    Args:
        earlier: mean log ratios of earlier runs, by engine and layout.
    """

    def __init__(self, earlier: Mapping[tuple[str, Layout], float] | None = None) -> None:
        self._earlier = dict(earlier or {})
        self._seen: dict[str, tuple[EngineName, Layout, float]] = {}

    def learn(self, name: str, engine: EngineName, layout: Layout, predicted: float, measured: float) -> None:
        """Add a measurement; one of the same name replaces it.

        Args:
            name: of the candidate.
            engine: its engine.
            layout: its layout of the cores.
            predicted: its capacity as simulated, without a correction.
            measured: its capacity.
        """
        if predicted > 0 and measured > 0:
            self._seen[name] = engine, layout, max(-_MOST, min(_MOST, math.log(measured / predicted)))

    @property
    def spread(self) -> float:
        """The standard deviation of log ratios about their corrections: how far off another prediction may be."""
        errors = [log - math.log(self.factor(engine, layout)) for engine, layout, log in self._seen.values()]
        squares = _SPREAD_PRIOR * _SPREAD**2 + sum(error * error for error in errors)
        return math.sqrt(squares / (_SPREAD_PRIOR + len(errors)))

    def factor(self, engine: EngineName, layout: Layout) -> float:
        """By which a prediction is multiplied; 1 where nothing was measured."""
        earlier = self._earlier.get((engine, layout), 0.0)
        found = _EARLIER * max(-_MOST, min(_MOST, earlier)) / (_EARLIER + _PRIOR)
        for logs in self._levels(engine, layout):
            found = (sum(logs) + _PRIOR * found) / (len(logs) + _PRIOR)
        return math.exp(found)

    def means(self) -> dict[tuple[str, Layout], float]:
        """The mean log ratio of the measurements of this run, by engine and layout."""
        seen: dict[tuple[str, Layout], list[float]] = {}
        for engine, layout, log in self._seen.values():
            seen.setdefault((engine, layout), []).append(log)
        return {where: sum(logs) / len(logs) for where, logs in seen.items()}

    def _levels(self, engine: EngineName, layout: Layout) -> Iterator[list[float]]:
        yield [log for _, _, log in self._seen.values()]
        yield [log for _, where, log in self._seen.values() if where == layout]
        yield [log for what, where, log in self._seen.values() if (what, where) == (engine, layout)]
