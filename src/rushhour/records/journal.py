"""`measurements.jsonl`: every measurement is on disk before the next one starts, so that a killed run continues.

A measurement with the same inputs, machine and versions is read from the file, not repeated. Measurements of other
machines stay in the file, and are not used.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from rushhour.clock import Clock, WallClock
from rushhour.errors import GoalError, StorageError
from rushhour.measurement import Accuracy, ClosedLoop, Measurement, Priors, Reading, ServiceTimes
from rushhour.records import identity
from rushhour.system.machine import Machine, describe
from rushhour.system.storage import explained

JOURNAL = "measurements.jsonl"
"""The file's name in a run's folder."""

R = TypeVar("R", Measurement, ServiceTimes, Accuracy, ClosedLoop, Priors)


class Entry(msgspec.Struct, frozen=True):
    """One line: the question, the result, the time and the machine.

    Attributes:
        phase: its purpose: `service`, `accuracy`, `search`, `confirm`, ...
        subject: what was measured: a candidate, or a bundle on an engine.
        detail: further facts for users: rate and seed, the split; may be empty.
        key: over everything that decides the result (bundles, data, settings), as hex.
        took_s: seconds that the measurement took, with what had to be started for it; None in lines of older versions.
    """

    phase: str
    subject: str
    detail: str
    reading: Reading
    at: str
    machine: Machine
    key: str = ""
    took_s: float | None = None


class Journal:
    """Append-only file of measurements, one JSON object a line, each on disk before `measure` returns.

    A last line that a kill cut short is ignored, and removed with the next write; reading alone changes nothing.

    Args:
        path: the file; made with its folder at the first measurement.
        clock: the time of a measurement is read on it.
        spent: receives the seconds of each measurement that is asked for, once, whether it is made or in the file. So
            the sum is the same after a kill.

    Raises:
        StorageError: if the file cannot be read, or holds a damaged line that is not the last.
    """

    def __init__(
        self, path: Path, clock: Clock | None = None, spent: Callable[[float], None] = lambda seconds: None
    ) -> None:
        self.path = path
        self._clock = clock or WallClock()
        self._spent = spent
        self._counted: set[tuple[str, str, str, str]] = set()
        self._all: list[Entry] = []
        self._here: dict[tuple[str, str, str, str], Entry] = {}
        self._cut: int | None = None
        with explained(f"read {path}"):
            if not path.exists():
                return
            content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                entry = msgspec.json.decode(line, type=Entry)
            except (msgspec.DecodeError, GoalError, RecursionError) as error:
                raise StorageError(
                    f"cannot read line {number} of {path}",
                    str(error),
                    "remove that line, or move the file away to measure again",
                ) from error
            self._remember(entry)
        if whole != len(content):
            self._cut = whole

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def measure(self, phase: str, subject: str, detail: str, kind: type[R], take: Callable[..., R], **inputs: Any) -> R:
        """The measurement in the file, or the one that `take` makes now, which is written before this returns.

        Args:
            phase: as in `Entry`.
            subject: as in `Entry`.
            detail: as in `Entry`.
            kind: the type that `take` returns.
            take: makes the measurement; gets the inputs by name.
            inputs: everything that decides the result beside machine and versions; see `rushhour.records.identity.key`.

        Raises:
            StorageError: if the disk does not take the new line.
        """
        key = identity.key(**inputs)
        known = self._here.get((phase, subject, detail, key))
        if known is not None and isinstance(known.reading, kind):
            self._count(known)
            return known.reading
        began = self._clock.now()
        reading = take(**inputs)
        took_s = round(self._clock.now() - began, 3)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        entry = Entry(phase, subject, detail, reading, now, describe(), key, took_s)
        self._append(entry)
        self._count(entry)
        return reading

    def _count(self, entry: Entry) -> None:
        asked = entry.phase, entry.subject, entry.detail, entry.key
        if asked not in self._counted:
            self._counted.add(asked)
            self._spent(entry.took_s or 0.0)

    def _append(self, entry: Entry) -> None:
        with explained(f"write {self.path}"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: a buffer that could not be written is tried again at the close, behind the truncation.
            with self.path.open("ab", buffering=0) as file:
                if self._cut is not None:
                    file.truncate(self._cut)
                    file.seek(0, os.SEEK_END)
                    self._cut = None
                start = file.tell()
                line = memoryview(msgspec.json.encode(entry) + b"\n")
                try:
                    while line:
                        line = line[file.write(line) :]
                    os.fsync(file.fileno())
                except OSError:
                    os.truncate(self.path, start)
                    raise
        self._remember(entry)

    def _remember(self, entry: Entry) -> None:
        self._all.append(entry)
        if entry.machine == describe():
            self._here[entry.phase, entry.subject, entry.detail, entry.key] = entry
