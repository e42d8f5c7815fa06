"""Runs a training on several workers: processes on this machine, or those that torchrun started on several.

The workers map the arrays of the data set from files, and rank 0 writes its progress to a file beside the checkpoint.
If a worker dies, all are started again (`launch`) and resume from the last checkpoint.
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
from rushhour.task import Task, ensure_kind
from rushhour.train.parallel.launch import launch, under_torchrun
from rushhour.train.parallel.settings import Backend

_RESTARTS = 10
"""Deaths of workers after which all are started again, before the training is given up."""

_POLL_S = 0.1
_PARTS = ("train", "validation", "test")

Work = Callable[[Dataset, Progress], None]
"""What each worker does with the data set, and where it reports its progress. It must be picklable."""


def run_on_workers(
    work: Work, dataset: Dataset, *, workers: int, backend: Backend, folder: Path, progress: Progress
) -> bool:
    """Run `work` on so many workers until each has ended well.

    Args:
        work: resumes from the last checkpoint, whenever it is called.
        dataset: given to each.
        workers: on this machine; under torchrun, as many as it has started, of which this process is one.
        backend: of torch.distributed.
        folder: of the training's files; on a disk that all workers share.
        progress: receives what rank 0 reports.

    Returns:
        Whether this process continues with what the workers left: it started them, or is rank 0 of torchrun.

    Raises:
        RushhourError: that one of the workers raised.
        ModelError: if workers died too often.
    """
    if under_torchrun():
        leads = os.environ["RANK"] == "0"
        launch(work, workers, (dataset, progress if leads else Silent()), backend=backend)
        return leads
    reports, data = folder / "told.jsonl", folder / "data"
    try:
        with explained(f"write {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            reports.write_bytes(b"")
        files = _write_dataset(dataset, data)
        with forwarded(reports, progress):
            launch(_worker, workers, (work, files, reports), backend=backend, restarts=_RESTARTS)
    finally:
        shutil.rmtree(data, ignore_errors=True)
        reports.unlink(missing_ok=True)
    return True


class _DatasetFiles(msgspec.Struct, frozen=True):
    """A data set whose arrays lie in files: `PART-inputs.npy`, `PART-targets.npy`."""

    folder: Path
    name: str
    task: Task
    preprocessing: Preprocessing
    fingerprint: str

    def open(self) -> Dataset:
        ensure_kind(self.task.kind, (self.task.kind,))  # its user has run that code in the parent process
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


def _write_dataset(dataset: Dataset, folder: Path) -> _DatasetFiles:
    with explained(f"write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        for part in _PARTS:
            split: Split = getattr(dataset, part)
            if part == "test":
                split = split.head(1)  # training does not use it
            for what in ("inputs", "targets"):
                _write_array(getattr(split, what), folder / f"{part}-{what}.npy")
    return _DatasetFiles(folder.resolve(), dataset.name, dataset.task, dataset.preprocessing, dataset.fingerprint)


def _write_array(array: NDArray[Any], file: Path) -> None:
    """Write an array; one that is mapped from a whole .npy file already is linked instead."""
    file.unlink(missing_ok=True)
    owner: Any = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    mapped = Path(getattr(owner, "filename", None) or "")
    if mapped.suffix == ".npy" and owner.shape == array.shape:
        file.symlink_to(mapped.resolve())
    else:
        np.save(file, array)


def _worker(work: Work, files: _DatasetFiles, reports: Path) -> None:
    with reports.open("a", buffering=1, encoding="utf-8") as stream:
        work(files.open(), ProgressWriter(stream) if dist.get_rank() == 0 else Silent())


class ProgressWriter:
    """Progress that is written to a file, a call on each line, for `forwarded` in another process."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def _write(self, name: str, *arguments: Any, **named: Any) -> None:
        self._stream.write(json.dumps([name, arguments, named]) + "\n")

    def start(self, what: str, total: float | None = None) -> None:
        """As `Progress.start`."""
        self._write("start", what, total)

    def advance(self, by: float = 1.0, note: str = "") -> None:
        """As `Progress.advance`."""
        self._write("advance", by, note)

    def done(self, note: str = "", *, good: bool = True) -> None:
        """As `Progress.done`."""
        self._write("done", note, good=good)

    def limit(self, seconds: float) -> None:
        """As `Progress.limit`."""
        self._write("limit", seconds)

    def note(self, text: str) -> None:
        """As `Progress.note`."""
        self._write("note", text)


@contextlib.contextmanager
def forwarded(reports: Path, progress: Progress) -> Iterator[None]:
    """Call `progress` as the lines that `ProgressWriter` adds to the file say, on a thread of its own."""
    over = threading.Event()

    def forward() -> None:
        rest = ""
        with reports.open(encoding="utf-8") as stream:
            while True:
                ending = over.is_set()
                *lines, rest = (rest + stream.read()).split("\n")
                for line in lines:
                    name, arguments, named = json.loads(line)
                    getattr(progress, name)(*arguments, **named)
                if ending:
                    return
                over.wait(_POLL_S)

    thread = threading.Thread(target=forward, name="progress of the workers")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
