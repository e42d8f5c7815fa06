"""One training on several workers: processes on this machine, or those that torchrun has started on many.

torch's elastic launcher watches over the processes of this machine: when one dies, however it dies, all are started
again and go on from the last checkpoint. The arrays of the data set reach them as files that they map, and what they
have to say comes back in files beside the checkpoint.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
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

from rushhour import machine
from rushhour.bundle import Preprocessing
from rushhour.data.dataset import Dataset, Split
from rushhour.errors import ModelError, RushhourError
from rushhour.models import Deployed
from rushhour.progress import Progress
from rushhour.storage import explained, write_whole
from rushhour.task import Task
from rushhour.train.checkpoint import Snapshot, put_back, snapshot
from rushhour.train.feed import Batch
from rushhour.train.loss import loss_for
from rushhour.train.stepper import averaged, culprits_of

_RESTARTS = 10
"""Deaths of a worker that are taken before the training is given up."""

_PATIENCE = datetime.timedelta(hours=6)
"""For the leading worker's validation; a death is seen at once, by its connection."""

_LOOK_EVERY_S = 0.1
_PARTS = ("train", "validation", "test")

Work = Callable[[Dataset, int, int, Progress], None]
"""What a worker does: data, its rank, the number of workers, and whom it tells how it goes. All must survive pickle."""


def started_workers() -> int | None:
    """How many workers torchrun has started, of which this process is one; None where it has not."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else None


def together(work: Work, dataset: Dataset, *, workers: int, folder: Path, progress: Progress) -> bool:
    """Run `work` on that many workers until each has ended well.

    Under torchrun this process is one of the workers, and `workers` is for it to say.

    Args:
        work: begins where the last checkpoint is, whenever it is called.
        dataset: handed to each.
        workers: on this machine.
        folder: of the training's files; on a disk that all workers share.
        progress: hears what the leading worker says.

    Returns:
        Whether this process is to go on with what the workers left: the one that started them, or rank 0.

    Raises:
        RushhourError: what one of the workers raised.
        ModelError: if workers died too often.
    """
    if (rank := os.environ.get("RANK")) is not None:
        _in_group(work, dataset, progress)
        return int(rank) == 0
    # imported only here: it is a second's work, and this room is imported wherever something is trained
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    told, failed, data = folder / "told.jsonl", folder / "failed.json", folder / "data"
    with explained(f"write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        told.write_bytes(b"")
        failed.unlink(missing_ok=True)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=workers,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=_RESTARTS,
        monitor_interval=_LOOK_EVERY_S,
        start_method="spawn",
        local_addr="127.0.0.1",
    )
    try:
        handed = _hand_over(dataset, data)
        with _telling(told, progress), _quiet():
            elastic_launch(config, _worker)(work, handed, told, failed, workers)
    except ChildFailedError as error:
        dead, failure = next(iter(error.failures.items()))
        raise ModelError(
            f"worker {dead} of {workers} died with exit code {failure.exitcode}, again and again",
            "something ends it each time: most often there is too little memory",
            "train on fewer workers, or with smaller batches",
        ) from error
    except SignalException as error:
        raise KeyboardInterrupt from error
    finally:
        shutil.rmtree(data, ignore_errors=True)
        told.unlink(missing_ok=True)
    if failed.exists():
        with explained(f"read {failed}"):
            said = msgspec.json.decode(failed.read_bytes(), type=_Failure)
            failed.unlink()
        raise said.as_error()
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


class _Failure(msgspec.Struct, frozen=True):
    """A RushhourError on its way out of a worker."""

    kind: str
    what: str
    why: str
    fix: str

    def as_error(self) -> RushhourError:
        kinds = {kind.__name__: kind for kind in _kinds(RushhourError)}
        return kinds.get(self.kind, RushhourError)(self.what, self.why, self.fix)


def _kinds(of: type[RushhourError]) -> list[type[RushhourError]]:
    return [of, *(deeper for kind in of.__subclasses__() for deeper in _kinds(kind))]


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


def _worker(work: Work, handed: _Handed, told: Path, failed: Path, workers: int) -> None:
    """The life of one worker. It ends well, and leaves word, where starting again would heal nothing."""
    torch.set_num_threads(max(1, machine.cores() // workers))
    with told.open("a", buffering=1) as stream:
        progress = _Telling(stream) if os.environ["RANK"] == "0" else _Telling(None)
        try:
            _in_group(work, handed.open(), progress)
        except RushhourError as error:
            said = _Failure(type(error).__name__, error.what, error.why, error.fix)
            write_whole(failed, msgspec.json.encode(said))
        except RuntimeError:
            # gloo's words when another worker is gone: gone for good, or dead?
            if not _appears(failed):
                raise


def _appears(file: Path) -> bool:
    waiting = threading.Event()
    for _ in range(20):
        if file.exists():
            return True
        waiting.wait(_LOOK_EVERY_S)
    return False


def _in_group(work: Work, dataset: Dataset, progress: Progress) -> None:
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        work(dataset, dist.get_rank(), dist.get_world_size(), progress)
        dist.barrier()
    finally:
        dist.destroy_process_group()


class _Telling:
    """Progress that goes to another process, a line at a time."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def _tell(self, *said: Any) -> None:
        if self._stream is not None:
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The launcher logs every death as an error, in many lines; what matters of it is raised, or healed."""
    logger = logging.getLogger("torch.distributed.elastic")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
