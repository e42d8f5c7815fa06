"""What earlier runs on this machine measured, in a file of this user: priors for the next run.

A prior replaces no measurement. It stands in until the run has measured for itself, and weighs less than one
measurement of its own. The file is `~/.local/state/rushhour/tuning-MACHINE.json`, or below `XDG_STATE_HOME`: one for
each machine with its versions. If it is missing, damaged or cannot be written, the run is as the first on the machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final

import msgspec

from rushhour.capacity import Overhead
from rushhour.errors import StorageError
from rushhour.measurement import Priors
from rushhour.records import identity
from rushhour.records.journal import Journal
from rushhour.system.machine import describe
from rushhour.system.storage import home, write_whole
from rushhour.tune.residuals import Layout, Residuals

_MEMORY: Final = 5
"""Runs that a mean reaches back, about."""
_MOST: Final = 500
"""Values in a file, and"""
_MACHINES: Final = 16
"""files, at most; the oldest are forgotten."""

_Count = Annotated[int, msgspec.Meta(ge=1, le=10**9)]


class _Known(msgspec.Struct, frozen=True, array_like=True):
    """The mean of a value over earlier runs, and how many they were."""

    mean: Annotated[float, msgspec.Meta(ge=-1e9, le=1e9)]
    runs: _Count


class _File(msgspec.Struct, frozen=True):
    values: dict[str, _Known] = {}


@dataclasses.dataclass
class Experience:
    """What a run knows from earlier ones, and what it measures for later ones.

    Attributes:
        priors: from earlier runs.
        learnt: of this one, by the names that `Priors` has.
    """

    priors: Priors = dataclasses.field(default_factory=Priors)
    learnt: dict[str, float] = dataclasses.field(default_factory=dict)


def experience_of(journal: Journal, *, cold: bool) -> Experience:
    """That of a run: read at its start and written into its journal, from which a resumed run has it.

    Args:
        journal: of the run.
        cold: whether earlier runs are ignored.

    Raises:
        StorageError: if the journal cannot be written.
    """

    def take(cold: bool) -> Priors:
        known = {} if cold else _read(_path()).values
        return Priors({name: value.mean for name, value in known.items()})

    return Experience(journal.measure("priors", "earlier runs", "ignored" if cold else "", Priors, take, cold=cold))


@dataclasses.dataclass(frozen=True)
class Earlier:
    """Priors of predictions.

    Attributes:
        requests: layout of the cores -> CPU seconds of a request beside the engine.
        slowdown: the factor by which batches take longer beside serving.
        residuals: engine and layout -> mean log of measured over predicted capacity.
    """

    requests: dict[Layout, float]
    slowdown: float
    residuals: dict[tuple[str, Layout], float]

    @classmethod
    def of(cls, priors: Priors) -> Earlier:
        """From the values by name; names that mean nothing here are ignored."""
        requests: dict[Layout, float] = {}
        residuals: dict[tuple[str, Layout], float] = {}
        for name, value in priors.values.items():
            match name.split("/"):
                case ["request", layout] if value >= 0:
                    requests[_numbers(layout)] = value
                case ["residual", engine, layout]:
                    residuals[engine, _numbers(layout)] = value
                case _:
                    continue
        return cls(requests, max(1.0, priors.values.get("slowdown", 1.0)), residuals)

    def overhead(self, layout: Layout) -> Overhead:
        """Of serving in this layout; none where earlier runs did not measure it."""
        known = self.requests.get(layout)
        return Overhead() if known is None else Overhead(known, slowdown=self.slowdown)


def learnt_words(
    overheads: Mapping[tuple[int, int, int], Overhead], slowdown: float | None, residuals: Residuals
) -> dict[str, float]:
    """What a run learnt, by the names that `Priors` has."""
    return {
        **{f"request/{_text(layout)}": overhead.request_s for layout, overhead in overheads.items()},
        **({} if slowdown is None else {"slowdown": slowdown}),
        **{f"residual/{engine}/{_text(layout)}": log for (engine, layout), log in residuals.means().items()},
    }


def _text(layout: Layout) -> str:
    return "x".join(map(str, layout))


def _numbers(text: str) -> Layout:
    return tuple(int(part) for part in text.split("x") if part.isdecimal())


def remember(measured: Mapping[str, float]) -> None:
    """Add what a run measured to the file. Where that is not possible, nothing happens.

    Args:
        measured: by the names that `Priors` has.
    """
    if not measured:
        return
    path = _path()
    values = dict(_read(path).values)
    for name, value in measured.items():
        before = values.pop(name, _Known(value, 1))  # the last that changed are at the end
        runs = min(before.runs + 1, _MEMORY)
        values[name] = _Known(before.mean + (value - before.mean) / runs, runs)
    kept = dict(list(values.items())[-_MOST:])
    with contextlib.suppress(StorageError, OSError):
        write_whole(path, msgspec.json.encode(_File(kept)) + b"\n")
        files = sorted(path.parent.glob("tuning-*.json"), key=lambda file: file.stat().st_mtime)
        for old in files[:-_MACHINES]:
            old.unlink()


def _path() -> Path:
    own = Path(os.environ.get("XDG_STATE_HOME", ""))
    folder = own if own.is_absolute() else home() / ".local" / "state"  # the standard ignores relative paths
    return folder / "rushhour" / f"tuning-{identity.key(machine=describe())[:16]}.json"


def _read(path: Path) -> _File:
    """The file; empty where there is none, it is damaged, or larger than any that is written here."""
    with contextlib.suppress(OSError, msgspec.DecodeError, RecursionError):
        if path.stat().st_size <= 200 * _MOST:
            return msgspec.json.decode(path.read_bytes(), type=_File)
    return _File()
