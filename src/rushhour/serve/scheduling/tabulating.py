"""Rows of named values become samples: few at once, many on threads, while the engine computes earlier requests."""

from __future__ import annotations

import time

import msgspec
import numpy as np

from rushhour.bundle import Bundle, Table
from rushhour.rows import RowReader
from rushhour.serve.observability.statistics import add_counts
from rushhour.serve.scheduling.preparation import Done, Preparation, Preparer
from rushhour.wire import PictureRequest, RowsRequest, row_of_json

_AT_ONCE = 256
"""Rows that a thread reads before it takes the next task."""
_FEW = 16
"""Rows that take less time to read than a thread to wake."""


class RowSettings(msgspec.Struct, frozen=True):
    """How rows are read: a part of `GET /config`.

    Attributes:
        threads: that read requests of many rows.
        columns: name -> kind.
    """

    threads: int
    columns: dict[str, str]


class Tabulator(Preparer):
    """Makes the input of one model of rows. Created and closed on any thread, used on the event loop's.

    Args:
        bundle: of the model, with a table.
        threads: that read.

    Attributes:
        unknown: column -> categories until now that the training data did not have.
        imputed: column -> values until now that were missing.
    """

    def __init__(self, bundle: Bundle, *, threads: int) -> None:
        table = bundle.manifest.table
        assert isinstance(table, Table)
        self.reader = RowReader(table)
        self.settings = RowSettings(threads, {column.name: column.kind for column in table.columns})
        self.unknown: dict[str, int] = {}
        self.imputed: dict[str, int] = {}
        super().__init__(threads, "rushhour-rows", _AT_ONCE)
        self.examples = [self.reader.row_of(sample) for sample in next(iter(bundle.samples().values()))]
        row = msgspec.json.encode(self.examples[0])
        self._bytes = len(row)
        for _ in range(2):
            began = time.perf_counter()
            self.reader.read([row_of_json(memoryview(row), 1)])
            self._seconds = time.perf_counter() - began

    def prepare_few(self, request: RowsRequest) -> None:
        """Give a request of few rows its samples at once; one of many stays as it is, to be submitted.

        Raises:
            WireError: if a row is not valid.
        """
        if request.rows > _FEW:
            return
        samples, unknown, imputed = self.samples(request, 0, request.rows)
        self.count(unknown, imputed)
        request.tensors = (samples.reshape(-1).view(np.uint8).data,)
        request.pictures = ()

    def samples(
        self, request: PictureRequest, first: int, rows: int
    ) -> tuple[np.ndarray, dict[str, int], dict[str, int]]:
        """As `RowReader.read`, of some rows of a request. May be called on any thread."""
        items = request.pictures[first : first + rows]
        read = [row_of_json(item, number) for number, item in enumerate(items, first + 1)]
        shared = request.shared if isinstance(request, RowsRequest) else None
        return self.reader.read([{**shared, **row} for row in read] if shared else read, first + 1)

    def count(self, unknown: dict[str, int], imputed: dict[str, int]) -> None:
        """Add to the counters; on the event loop."""
        add_counts(self.unknown, unknown)
        add_counts(self.imputed, imputed)

    def _preparation(self, request: PictureRequest, done: Done) -> Tabulating:
        return Tabulating(self, request, done)


class Tabulating(Preparation):
    """The rows of one request on the threads."""

    FAILED = "a row cannot be read"

    def __init__(self, tabulator: Tabulator, request: PictureRequest, done: Done) -> None:
        self._tabulator = tabulator
        self._request = request
        self._samples = np.empty((request.rows, len(tabulator.settings.columns)), np.float32)
        self._counts: list[tuple[dict[str, int], dict[str, int]]] = []
        super().__init__(tabulator, request, done)

    def _prepare(self, first: int, rows: int) -> None:
        samples, unknown, imputed = self._tabulator.samples(self._request, first, rows)
        self._samples[first : first + rows] = samples
        self._counts.append((unknown, imputed))

    def _prepared(self) -> tuple[memoryview, ...]:
        for unknown, imputed in self._counts:
            self._tabulator.count(unknown, imputed)
        return (self._samples.reshape(-1).view(np.uint8).data,)
