"""Many scenarios at once: all advance by one batch in each step, as columns of numpy arrays.

All see the same arrivals, scaled to their rates, and batches of one step take times of the same quantile (common random
numbers, Law and Kelton 1982): so two scenarios differ by what they are, not by luck, and the same inputs give the same
numbers.

A free stream takes all waiting requests, up to the batch bound. Where the streams are not busy, a batch may wait for
more. A request that could not be answered within the deadline when a batch begins is shed, and counts as late.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rushhour.capacity.scenario import Scenario
from rushhour.capacity.traffic import Traffic

_CLEANED_EVERY = 24
"""Steps after which finished columns are removed."""
_BUSY = 0.5
"""Utilisation of the streams above which no batch waits for more requests, as in `Batcher.dispatch_at`."""
_DRAWS = 65_536

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def late_shares(
    scenarios: Sequence[Scenario],
    rates_rps: Floats,
    limit_s: float,
    traffic: Traffic,
    *,
    seed: int = 0,
    enough: float = 1.0,
) -> Floats:
    """The share of late or shed requests of each scenario, shape `(scenarios,)`.

    Args:
        scenarios: any.
        rates_rps: of each, requests per second, shape `(scenarios,)`.
        limit_s: a request is late beyond this latency, in seconds.
        traffic: its arrivals are simulated, all of them.
        seed: of the quantiles that the times of batches are drawn at.
        enough: a scenario with more than this share of late requests is not simulated to its end; its share is then a
            lower bound.
    """
    n = len(traffic.units)
    late = np.zeros(len(scenarios), dtype=np.int64)
    columns = _Columns(scenarios, np.asarray(rates_rps, dtype=np.float64), traffic)
    draws = np.random.default_rng([seed, 7]).random(_DRAWS)
    step = 0
    while len(columns.which):
        columns.advance(float(draws[step % _DRAWS]), limit_s)
        step += 1
        if step % _CLEANED_EVERY == 0 or (columns.position >= n).all():
            over = (columns.position >= n) | (columns.late > enough * n)
            if over.any():
                late[columns.which[over]] = columns.late[over]
                columns.keep(~over)
    return late / n


class _Columns:
    """The state of each scenario that is still simulated."""

    def __init__(self, scenarios: Sequence[Scenario], rates: Floats, traffic: Traffic) -> None:
        self._traffic, self._n = traffic, len(traffic.units)
        self._padded = np.append(traffic.units, traffic.units[-1])
        streams = np.array([each.streams for each in scenarios])
        width = int(streams.max(initial=1))
        self.which: Ints = np.arange(len(scenarios))
        self.position: Ints = np.zeros(len(scenarios), dtype=np.int64)
        self.late: Ints = np.zeros(len(scenarios), dtype=np.int64)
        self._rates = rates
        self._bounds: Ints = np.array([each.max_batch for each in scenarios], dtype=np.int64)
        self._stretch = np.array(
            [each.overhead.stretch(rate, each.streams) for each, rate in zip(scenarios, rates.tolist(), strict=True)]
        )
        self._free = np.where(np.arange(width)[:, None] < streams, 0.0, np.inf)
        self._table, self._offset, self._quantiles = _tables(scenarios)
        self._batch_s = np.array([each.overhead.batch_s for each in scenarios], dtype=np.float64)
        self._deadline = np.array([each.deadline_s for each in scenarios], dtype=np.float64)
        self._wait = np.array(
            [_wait_s(each, rate) for each, rate in zip(scenarios, rates.tolist(), strict=True)], dtype=np.float64
        )
        self._wait_for: Ints = np.array([each.wait_for for each in scenarios], dtype=np.int64)
        self._ordered()

    def _ordered(self) -> None:
        """What follows from the columns that are left."""
        self._all = np.arange(len(self.which))
        self._waits = bool((self._wait > 0).any())
        self._sheds = bool(np.isfinite(self._deadline).any())

    def keep(self, kept: NDArray[np.bool_]) -> None:
        """Remove the other columns."""
        for name in (
            *("which", "position", "late", "_rates", "_bounds", "_stretch", "_offset", "_quantiles", "_batch_s"),
            *("_deadline", "_wait", "_wait_for"),
        ):
            setattr(self, name, getattr(self, name)[kept])
        self._free = self._free[:, kept]
        self._ordered()

    def advance(self, draw: float, limit_s: float) -> None:
        """One batch of every scenario; `draw` in [0, 1) is the quantile of its time."""
        stream = self._free.argmin(axis=0) if len(self._free) > 1 else 0
        free = self._free[stream, self._all]
        first = self._arrival(self.position)
        start = np.maximum(free, first)
        if self._waits:
            full = self._arrival(np.minimum(self.position + self._wait_for - 1, self._n))
            start = np.maximum(start, np.where(self._wait > 0, np.minimum(first + self._wait, full), 0.0))
        arrived = self._arrived(start, "right")
        if self._sheds:
            self._shed(start, arrived)
        end = np.minimum(np.minimum(arrived, self.position + self._bounds), self._n)
        end = np.minimum(np.maximum(end, self.position + 1), self._n)
        size = end - self.position
        finish = start + self._stretch * (self._seconds(size, draw) + self._batch_s)
        in_time_from = self._arrived(finish - limit_s, "left")
        self.late += np.clip(in_time_from - self.position, 0, size)
        self._free[stream, self._all] = finish
        self.position = end

    def _shed(self, start: Floats, arrived: Ints) -> None:
        """Leave out requests whose deadline a batch that begins at `start` would miss; the newest is kept."""
        waiting = np.minimum(np.maximum(arrived - self.position, 1), self._bounds)
        finish = start + self._stretch * (self._seconds(waiting, 0.5) + self._batch_s)
        fits_from = self._arrived(finish - self._deadline, "left")
        left_out = np.clip(np.minimum(fits_from, arrived - 1) - self.position, 0, None)
        self.late += left_out
        self.position = self.position + left_out

    def _seconds(self, size: Ints, draw: float) -> Floats:
        found: Floats = self._table[self._offset + size * self._quantiles + (draw * self._quantiles).astype(np.int64)]
        return found

    def _arrival(self, position: Ints) -> Floats:
        return self._traffic.times(self._padded[position], self._rates)

    def _arrived(self, seconds: Floats, side: str) -> Ints:
        """How many requests have arrived until then."""
        units = self._traffic.passed(seconds, self._rates)
        return np.searchsorted(self._traffic.units, units, side="right" if side == "right" else "left")


def _wait_s(scenario: Scenario, rate: float) -> float:
    """How long its batches wait at this rate: not at all where the streams are busy, or none would come meanwhile."""
    if scenario.wait_for <= 1 or scenario.wait_s < 1 / rate:
        return 0.0
    busy = rate * scenario.profile.seconds(scenario.wait_for) / (scenario.wait_for * scenario.streams)
    return 0.0 if busy > _BUSY else scenario.wait_s


def _tables(scenarios: Sequence[Scenario]) -> tuple[Floats, Ints, Ints]:
    """The times of all batches in one array; and of each scenario where its own begin, and its number of quantiles."""
    largest: dict[int, int] = {}
    for each in scenarios:
        largest[id(each.profile)] = max(each.max_batch, largest.get(id(each.profile), 1))
    parts: list[Floats] = []
    places: dict[int, tuple[int, int]] = {}
    at = 0
    for each in scenarios:
        key = id(each.profile)
        if key not in places:
            table = each.profile.table(largest[key])
            places[key] = (at, table.shape[1])
            parts.append(table.reshape(-1))
            at += table.size
    found = np.array([places[id(each.profile)] for each in scenarios], dtype=np.int64).reshape(-1, 2)
    return np.concatenate(parts) if parts else np.empty(0), found[:, 0].copy(), found[:, 1].copy()
