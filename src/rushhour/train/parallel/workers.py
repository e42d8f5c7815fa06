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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import msgspec
import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from rushhour.bundle import Preprocessing
from rushhour.data.dataset import Dataset, Split
from rushhour.progress import Progress, Silent
from rushhour.system.storage import explained
from rushhour.task import Task
from rushhour.train.parallel.launch import Backend, launch, under_torchrun

_RESTARTS = 10
"""Deaths of a worker that are taken before the training is given up."""

_LOOK_EVERY_S = 0.1
_PARTS = ("train", "validation", "test")

Work = Callable[[Dataset, Progress], None]
"""What each worker does, with data and whom it tells how it goes. It must survive pickle."""


def together(work: Work, dataset: Dataset, *, workers: int, backend: Backend, folder: Path, progress: Progress) -> bool:
    """Run `work` on that many workers until each has ended well.

    Args:
        work: begins where the last checkpoint is, whenever it is called.
        dataset: handed to each.
        workers: on this machine; under torchrun, as many as it has started, of which this process is one.
        backend: of torch.distributed.
        folder: of the training's files; on a disk that all workers share.
        progress: hears what rank 0 says.

    Returns:
        Whether this process is to go on with what the workers left: the one that started them, or rank 0.

    Raises:
        RushhourError: what one of the workers raised.
        ModelError: if workers died too often.
    """
    if under_torchrun():
        leads = os.environ["RANK"] == "0"
        launch(work, workers, (dataset, progress if leads else Silent()), backend=backend)
        return leads
    told, data = folder / "told.jsonl", folder / "data"
    try:
        with explained(f"write {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            told.write_bytes(b"")
        handed = _hand_over(dataset, data)
        with _telling(told, progress):
            launch(_worker, workers, (work, handed, told), backend=backend, restarts=_RESTARTS)
    finally:
        shutil.rmtree(data, ignore_errors=True)
        told.unlink(missing_ok=True)
    return True


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
    with told.open("a", buffering=1, encoding="utf-8") as stream:
        work(handed.open(), _Telling(stream) if dist.get_rank() == 0 else Silent())


class _Telling:
    """Progress that goes to another process, a line at a time."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def _tell(self, name: str, *said: Any, **named: Any) -> None:
        self._stream.write(json.dumps([name, said, named]) + "\n")

    def start(self, what: str, total: float | None = None) -> None:
        self._tell("start", what, total)

    def advance(self, by: float = 1.0, note: str = "") -> None:
        self._tell("advance", by, note)

    def done(self, note: str = "", *, good: bool = True) -> None:
        self._tell("done", note, good=good)

    def limit(self, seconds: float) -> None:
        self._tell("limit", seconds)


@contextlib.contextmanager
def _telling(told: Path, progress: Progress) -> Iterator[None]:
    """Say to `progress` what appears in the file, on a thread of its own."""
    over = threading.Event()

    def tell() -> None:
        rest = ""
        with told.open(encoding="utf-8") as stream:
            while True:
                ending = over.is_set()
                *lines, rest = (rest + stream.read()).split("\n")
                for line in lines:
                    name, said, named = json.loads(line)
                    getattr(progress, name)(*said, **named)
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
