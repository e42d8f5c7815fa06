"""The curves of a training for people: by epoch as JSON lines, TensorBoard, Weights & Biases.

FOLDER/curves.jsonl     one line for each epoch; `rushhour report FOLDER` draws it
FOLDER/training.json    what was trained on what and how, which epoch is kept, and where it was resumed
FOLDER/tensorboard/     `tensorboard --logdir FOLDER/tensorboard`
FOLDER/wandb/           Weights & Biases' own files; `wandb sync` sends what was written offline
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from rushhour.errors import ModelError
from rushhour.records.curves import Epoch, TrainingRecord, write_curves
from rushhour.system.storage import explained

_FILES = itertools.count()
"""Numbers the files of one process."""


class Tracking(msgspec.Struct, frozen=True):
    """Where and how a training is tracked.

    Attributes:
        folder: of the files.
        tensorboard: whether TensorBoard's are among them.
        wandb: the project in Weights & Biases; None: not used. Without an account's key, it stays offline.
    """

    folder: Path
    tensorboard: bool = True
    wandb: str | None = None


class Tracker:
    """Tracks one training, from its current step. Use it in a `with` block.

    Args:
        tracking: where and how; None: nowhere.
        name: of the training.
        identity: the same for the same training, so that a resumed one is the same run; letters and digits.
        settings: shown beside the curves.
        first: optimizer steps done before.

    Raises:
        ModelError: if Weights & Biases is asked for and not installed.
        StorageError: if the disk does not take the files.
    """

    def __init__(
        self, tracking: Tracking | None, name: str, *, identity: str, settings: dict[str, Any], first: int
    ) -> None:
        self._folder = tracking.folder if tracking is not None else None
        self._events: _Events | None = None
        self._run: Any = None
        if tracking is None:
            return
        with explained(f"make the folder {tracking.folder}"):
            tracking.folder.mkdir(parents=True, exist_ok=True)
        if tracking.wandb is not None:
            self._run = _wandb_run(tracking, name, identity, settings)
        if tracking.tensorboard:
            self._events = _Events(tracking.folder / "tensorboard", first)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._events is not None:
            self._events.close()
        if self._run is not None:
            self._run.finish(exit_code=0 if error is None else 1)

    def step(self, step: int, loss: float, lr: float) -> None:
        """An optimizer step is done; `step` counts from 1."""
        if self._events is not None:
            self._events.add(step, {"step/loss": loss, "step/lr": lr})

    def epoch(self, history: Sequence[Epoch], record: TrainingRecord) -> None:
        """An epoch is done: the last of `history`, which holds all; `record` is the training as it stands.

        Raises:
            StorageError: if the disk does not take it.
        """
        last = history[-1]
        figures = {
            "loss": last.loss,
            "validation/loss": last.validation_loss,
            f"validation/{last.metric}": last.value,
            "lr": last.lr,
            "samples_per_s": last.samples_per_s,
        }
        if self._folder is not None:
            write_curves(self._folder, history, record)
        if self._events is not None:
            self._events.add(last.step, {f"epoch/{name}": value for name, value in figures.items()})
            self._events.flush()
        if self._run is not None:
            self._run.log({**figures, "epoch": last.epoch}, step=last.step)


class _Events:
    """TensorBoard's file of events, written on the calling thread.

    torch's SummaryWriter writes on a thread of its own, and a full disk ends that thread with a traceback instead of an
    error.
    """

    def __init__(self, folder: Path, first: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        now = time.time()
        path = folder / f"events.out.tfevents.{now:.0f}.{socket.gethostname()}.{os.getpid()}.{next(_FILES)}"
        self._doing = f"write {path}"
        with explained(self._doing):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = path.open("wb")
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=now, file_version="brain.Event:2"))
        if first:
            # removes what a killed process wrote after its last checkpoint: these steps are repeated
            self._write(Event(wall_time=now, step=first + 1, session_log=SessionLog(status=SessionLog.START)))
        self.flush()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        summary = self._summary(
            value=[self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        )
        self._write(self._event(wall_time=time.time(), step=step, summary=summary))

    def flush(self) -> None:
        with explained(self._doing):
            self._file.flush()

    def close(self) -> None:
        with explained(self._doing):
            self._file.close()

    def _write(self, event: Any) -> None:
        with explained(self._doing):
            self._records.write(event.SerializeToString())


def _wandb_run(tracking: Tracking, name: str, identity: str, settings: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ModelError(
            "cannot track with Weights & Biases", "it is not installed", "pip install 'rushhour[wandb]'"
        ) from error
    online = "WANDB_API_KEY" in os.environ and "WANDB_MODE" not in os.environ
    try:
        return wandb.init(
            project=tracking.wandb,
            name=name,
            id=identity,
            dir=str(tracking.folder),
            config=settings,
            resume="allow" if online else None,
            mode=None if online or "WANDB_MODE" in os.environ else "offline",
            settings=wandb.Settings(silent=True),
        )
    except (wandb.errors.Error, OSError) as error:
        raise ModelError(
            "cannot track with Weights & Biases", str(error), "check WANDB_API_KEY, or set WANDB_MODE=offline"
        ) from error
