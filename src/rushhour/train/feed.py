"""The data feed: which samples a step gets, prepared while the step before computes.

The order of an epoch follows from (seed, epoch), and the samples of a step from its number. It does not depend on the
number of workers, so that a training can be resumed with any.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rushhour.bundle import columns_of
from rushhour.data.augment import Augmentation, Augmenter
from rushhour.data.dataset import Split
from rushhour.models import Inputs
from rushhour.task import Places

_AHEAD = 2
"""Batches that each thread prepares ahead."""


class Batch(NamedTuple):
    """The samples of one step.

    Attributes:
        step: optimizer steps before this one, over all epochs.
        rows: which samples of the training part the whole step has.
        own: those of them that this worker has.
        inputs: of this worker, a tensor `(n, *shape)` for each input: as on the wire; a single one is float32 if
            augmented.
        targets: of this worker.
    """

    step: int
    rows: NDArray[np.int64]
    own: NDArray[np.int64]
    inputs: Inputs
    targets: Tensor


class Feed:
    """The training part in the order of its epochs. Use it in a `with` block, which ends its threads.

    Args:
        split: the training part; its arrays may be mapped from a file, which the threads then read ahead.
        seed: of order and augmentation.
        batch: samples in a step, over all workers; limited to the samples of the part.
        augment: of pictures.
        places: what targets say about places in a picture: they are moved with it. None where they say nothing.
        threads: that prepare batches.
        part: which of how many equal parts of each batch this worker gets; the sizes differ by one where it does not
            divide.
        rows: the samples of the part that are used; None for all.
    """

    def __init__(
        self,
        split: Split,
        *,
        seed: int,
        batch: int,
        augment: Augmentation | None = None,
        places: Places | None = None,
        threads: int = 1,
        part: tuple[int, int] = (0, 1),
        rows: NDArray[np.int64] | None = None,
    ) -> None:
        self._split = split
        self._rows = rows
        self._samples = len(split) if rows is None else len(rows)
        self._seed = seed
        self.batch = min(batch, self._samples)
        self.steps = self._samples // self.batch
        self._augment = augment
        self._places = places
        self._part = part
        self._ahead = _AHEAD * threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="feed")

    def __enter__(self) -> Feed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from step `first` of it on."""
        order = np.random.default_rng((self._seed, epoch)).permutation(self._samples)
        if self._rows is not None:
            order = self._rows[order]
        augmenter = (
            Augmenter(self._augment, len(self._split), seed=self._seed, epoch=epoch, places=self._places)
            if self._augment is not None
            else None
        )

        def prepared(step: int) -> Batch:
            rows = order[step * self.batch : (step + 1) * self.batch]
            index, parts = self._part
            own = np.array_split(rows, parts)[index]
            columns, targets = columns_of(self._split.inputs[own]), torch.from_numpy(self._split.targets[own])
            inputs = tuple(map(torch.from_numpy, columns)) if augmenter is None else augmenter.batch(columns, own)
            if augmenter is not None and self._places is not None:
                targets = augmenter.moved(targets, own, columns[0].shape[1:3])
            return Batch(epoch * self.steps + step, rows, own, inputs, targets)

        waiting: deque[Future[Batch]] = deque()
        upcoming = iter(range(first, self.steps))
        try:
            while True:
                while len(waiting) < self._ahead and (step := next(upcoming, None)) is not None:
                    waiting.append(self._pool.submit(prepared, step))
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
