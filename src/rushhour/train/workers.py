"""One training on several workers: processes on this machine, or those that torchrun has started on many.

The arrays of the data set reach the workers as files that they map; how it goes they tell in a file beside the
checkpoint. When one dies, all are started again (`launch`) and go on from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler

from rushhour.bundle import Preprocessing
from rushhour.data.dataset import Dataset, Split
from rushhour.models import Deployed
from rushhour.progress import Progress, Silent
from rushhour.storage import explained
from rushhour.task import Task
from rushhour.train.checkpoint import Snapshot, put_back, snapshot
from rushhour.train.feed import Batch
from rushhour.train.launch import launch, under_torchrun
from rushhour.train.loss import loss_for
from rushhour.train.stepper import averaged, culprits_of

_RESTARTS = 10
"""Deaths of a worker that are taken before the training is given up."""

_LOOK_EVERY_S = 0.1
_PARTS = ("train", "validation", "test")

Work = Callable[[Dataset, int, int, Progress], None]
"""What a worker does: data, its rank, the number of workers, and whom it tells how it goes. It must survive pickle."""


def together(work: Work, dataset: Dataset, *, workers: int, folder: Path, progress: Progress) -> bool:
    """Run `work` on that many workers until each has ended well.

    Args:
        work: begins where the last checkpoint is, whenever it is called.
        dataset: handed to each.
        workers: on this machine; under torchrun, as many as it has started, of which this process is one.
        folder: of the training's files; on a disk that all workers share.
        progress: hears what rank 0 says.

    Returns:
        Whether this process is to go on with what the workers left: the one that started them, or rank 0.

    Raises:
        RushhourError: what one of the workers raised.
        ModelError: if workers died too often.
    """
    if under_torchrun():
        launch(partial(_with, work, dataset, progress), workers)
        return os.environ["RANK"] == "0"
    told, data = folder / "told.jsonl", folder / "data"
    try:
        with explained(f"write {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            told.write_bytes(b"")
        handed = _hand_over(dataset, data)
        with _telling(told, progress):
            launch(_worker, workers, (work, handed, told), restarts=_RESTARTS)
    finally:
        shutil.rmtree(data, ignore_errors=True)
        told.unlink(missing_ok=True)
    return True


class Replicas:
    """A network on several workers, each with all of it and a part of every batch (torch's DistributedDataParallel).

    Dropout on each worker follows from (seed, step, rank): a step that is done again is the same. Batch normalisation
    takes its statistics from a worker's own part, and the leading worker's are kept.

    Args:
        deployed: with the network, equal on all workers.
        task: decides the loss.
        accumulate: parts that a worker's samples go through in.
        bf16: whether convolutions and products are computed in bfloat16.
        seed: of dropout.
    """

    def __init__(self, deployed: Deployed, task: Task, *, accumulate: int, bf16: bool, seed: int) -> None:
        self._deployed = deployed
        self._task = task
        self._loss = loss_for(task, "sum")
        self._accumulate = accumulate
        self._bf16 = bf16
        self._seed = seed
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._replica = DistributedDataParallel(_Logits(deployed))
        self.leads = self._rank == 0

    def parameters(self) -> Sequence[Tensor]:
        """All of the network's."""
        return list(self._deployed.network.parameters())

    def step(self, batch: Batch) -> float:
        """Forward and backward, in parts, with the gradients summed over the workers on the way; see `Stepper`."""
        self._deployed.train()
        self._deployed.zero_grad()
        torch.manual_seed(int(np.random.SeedSequence((self._seed, batch.step, self._rank)).generate_state(1)[0]))
        parts = min(self._accumulate, len(batch.rows) // self._world)  # the same number everywhere, and none empty
        total = torch.zeros((), dtype=torch.float64)
        for index, (inputs, targets) in enumerate(
            zip(batch.inputs.tensor_split(parts), batch.targets.tensor_split(parts), strict=True)
        ):
            last = index + 1 == parts
            with nullcontext() if last else self._replica.no_sync():
                with torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
                    outputs = self._replica(inputs)
                loss = self._loss(outputs, targets) / len(batch.rows)
                part = loss.detach().double()
                dist.all_reduce(part)
                total += part
                if not bool(total.isfinite()):
                    break
                # gradients are averaged over the workers, and a sum is wanted
                (loss * self._world).backward()  # type: ignore[no-untyped-call]
        return total.item()

    def clip(self, max_norm: float) -> None:
        """Shorten the gradient, which is the same on all workers."""
        nn.utils.clip_grad_norm_(self.parameters(), max_norm)

    def finite(self) -> bool:
        """Whether all weights, on all workers, are numbers."""
        mine = all(bool(parameter.isfinite().all()) for parameter in self.parameters())
        all_of_us = torch.tensor(float(mine))
        dist.all_reduce(all_of_us, dist.ReduceOp.MIN)
        return bool(all_of_us)

    def agree(self, value: float) -> float:
        """The value that rank 0 has."""
        said = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(said, 0)
        return said.item()

    def culprits(self, batch: Batch) -> list[int]:
        """Each worker looks among its own samples."""
        found: list[list[int]] = [[] for _ in range(self._world)]
        dist.all_gather_object(found, culprits_of(self._deployed, self._task, batch, bf16=self._bf16))
        return [row for rows in found for row in rows]

    def take(
        self,
        step: int,
        optimizer: torch.optim.Optimizer,
        schedule: LRScheduler,
        notes: Mapping[str, Any],
        more: Mapping[str, Tensor],
    ) -> Snapshot | None:
        """Copies of all that changes, on rank 0; the others have the same."""
        if not self.leads:
            return None
        return snapshot(step, self._deployed.network, optimizer, schedule, notes=notes, more=more)

    def put(self, found: Snapshot, optimizer: torch.optim.Optimizer, schedule: LRScheduler) -> None:
        """Put a snapshot back."""
        put_back(found, self._deployed.network, optimizer, schedule)

    def judged(self, optimizer: torch.optim.Optimizer) -> AbstractContextManager[Deployed | None]:
        """The network itself, on rank 0."""
        return averaged(self._deployed, optimizer) if self.leads else nullcontext()


class _Logits(nn.Module):
    """`Deployed.logits` as a forward pass, which is what the gradients' hooks are hung on."""

    def __init__(self, deployed: Deployed) -> None:
        super().__init__()
        self.deployed = deployed

    def forward(self, samples: Tensor) -> Tensor:
        return self.deployed.logits(samples)


class _Handed(msgspec.Struct, frozen=True):
    """A data set whose arrays lie in files: `PART-inputs.npy`, `PART-targets.npy`."""

    folder: Path
    name: str
    task: Task
    preprocessing: Preprocessing
    fingerprint: str

    def open(self) -> Dataset:
        return Dataset(
            self.name,
            self.task,
            self._part("train"),
            self._part("validation"),
            self._part("test"),
            self.preprocessing,
            self.fingerprint,
        )

    def _part(self, part: str) -> Split:
        # copy-on-write: what torch shares must be writable, and the file stays as it is
        return Split(*(np.load(self.folder / f"{part}-{what}.npy", mmap_mode="c") for what in ("inputs", "targets")))


def _hand_over(dataset: Dataset, folder: Path) -> _Handed:
    with explained(f"write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        for part in _PARTS:
            split: Split = getattr(dataset, part)
            if part == "test":
                split = split.head(1)  # no training looks at it
            for what in ("inputs", "targets"):
                _to_file(getattr(split, what), folder / f"{part}-{what}.npy")
    return _Handed(folder.resolve(), dataset.name, dataset.task, dataset.preprocessing, dataset.fingerprint)


def _to_file(array: NDArray[Any], file: Path) -> None:
    """An array that is mapped from a whole .npy file already is linked to; any other is written."""
    file.unlink(missing_ok=True)
    owner: Any = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    mapped = Path(getattr(owner, "filename", None) or "")
    if mapped.suffix == ".npy" and owner.shape == array.shape:
        file.symlink_to(mapped.resolve())
    else:
        np.save(file, array)


def _worker(work: Work, handed: _Handed, told: Path) -> None:
    with told.open("a", buffering=1) as stream:
        _with(work, handed.open(), _Telling(stream) if dist.get_rank() == 0 else Silent())


def _with(work: Work, dataset: Dataset, progress: Progress) -> None:
    work(dataset, dist.get_rank(), dist.get_world_size(), progress)


class _Telling:
    """Progress that goes to another process, a line at a time."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def _tell(self, *said: Any) -> None:
        self._stream.write(json.dumps(said) + "\n")

    def start(self, what: str, total: float | None = None) -> None:
        self._tell("start", what, total)

    def advance(self, by: float = 1.0, note: str = "") -> None:
        self._tell("advance", by, note)

    def done(self, note: str = "") -> None:
        self._tell("done", note)


@contextlib.contextmanager
def _telling(told: Path, progress: Progress) -> Iterator[None]:
    """Say to `progress` what appears in the file, on a thread of its own."""
    over = threading.Event()

    def tell() -> None:
        rest = ""
        with told.open() as stream:
            while True:
                ending = over.is_set()
                *lines, rest = (rest + stream.read()).split("\n")
                for line in lines:
                    name, *said = json.loads(line)
                    getattr(progress, name)(*said)
                if ending:
                    return
                over.wait(_LOOK_EVERY_S)

    teller = threading.Thread(target=tell, name="progress of the workers")
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()
