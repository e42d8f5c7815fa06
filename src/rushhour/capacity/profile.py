"""The service profile: seconds of a batch by its size, and how the seconds of single batches vary."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rushhour.measurement import ServiceTimes


class ServiceProfile:
    """Seconds that one stream takes for a batch of n: the sizes that were timed, linear in between.

    Args:
        times: the sizes that were timed; beyond the largest, each sample costs as much as in a batch of that size.

    Attributes:
        largest: the largest batch that was timed.
    """

    def __init__(self, times: ServiceTimes) -> None:
        sizes = np.asarray(times.batch_sizes, dtype=np.float64)
        seconds = np.maximum.accumulate(np.asarray(times.seconds, dtype=np.float64))
        self.largest = int(sizes[-1])
        self._table: list[float] = [0.0, *np.interp(np.arange(1, self.largest + 1), sizes, seconds).tolist()]
        known = [(size, row) for size, row in zip(times.batch_sizes, times.quantiles, strict=False) if row]
        self._varied_sizes = np.array([size for size, _ in known], dtype=np.float64)
        self._varied = np.array([row for _, row in known], dtype=np.float64)

    def seconds(self, n: int) -> float:
        """The median of the seconds for a batch of `n` samples (1 or more)."""
        if n <= self.largest:
            return self._table[n]
        return self._table[-1] * n / self.largest

    def throughput(self, streams: int, max_batch: int, batch_s: float = 0.0) -> float:
        """An upper bound of samples per second, of `streams` streams with batches of up to `max_batch`.

        Args:
            streams: batches at the same time.
            max_batch: samples in one.
            batch_s: seconds that each batch takes longer.
        """
        if not len(self._varied):
            return streams * max(n / (self.seconds(n) + batch_s) for n in range(1, max_batch + 1))
        means = self.table(max_batch)[1:].mean(axis=1) + batch_s
        return streams * float((np.arange(1, max_batch + 1) / means).max())

    def table(self, max_batch: int) -> NDArray[np.float64]:
        """Seconds of batches of 0 to `max_batch` samples at equally likely quantiles, shape `(max_batch + 1, m)`.

        Sizes between those with measured quantiles are interpolated. `m` is 1 where none were measured.
        """
        sizes = np.arange(max_batch + 1)
        medians = np.array([0.0, *(self.seconds(int(n)) for n in sizes[1:])])[:, None]
        if not len(self._varied):
            return medians
        columns = [np.interp(sizes, self._varied_sizes, column) for column in self._varied.T]
        varied: NDArray[np.float64] = medians * np.stack(columns, axis=1)
        return varied
