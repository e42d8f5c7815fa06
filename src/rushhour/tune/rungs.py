"""Rungs of training where time is short: how long the next one may be, and those that a run has begun.

The time that is left depends on the clock, and a resumed run has its whole budget again. So each rung is written down
before it begins, and a resumed run repeats what was written: its bundles are in the store then.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from rushhour.system.storage import write_whole

LENGTHS: Final = (0.25, 0.5, 1, 2, 4, 8)
"""Epochs of one rung where time is short; below one, that share of the samples, once."""
_FILE: Final = "rungs.json"


class _Begun(msgspec.Struct, frozen=True):
    """The file.

    Attributes:
        key: of all that the search of networks began from.
        rungs: role -> epochs of its rungs.
    """

    key: str
    rungs: dict[str, tuple[float, ...]] = {}


class RungRecord:
    """The rungs that a run has begun where time was short, in a file.

    Args:
        folder: of the file.
        key: of all that the search of networks begins from; rungs of another key are forgotten.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._path = folder / _FILE
        self._begun = _Begun(key)
        try:
            found = msgspec.json.decode(self._path.read_bytes(), type=_Begun)
        except (OSError, msgspec.DecodeError):
            return
        if found.key == key:
            self._begun = found

    def __bool__(self) -> bool:
        return bool(self._begun.rungs)

    def of(self, role: str) -> tuple[float, ...]:
        """Epochs of the rungs that were begun for a shape, in order."""
        return self._begun.rungs.get(role, ())

    def begin(self, role: str, rungs: tuple[float, ...]) -> None:
        """Write down the rungs of a shape, before the last of them begins.

        Raises:
            StorageError: if the disk does not take it.
        """
        self._begun = _Begun(self._begun.key, {**self._begun.rungs, role: rungs})
        write_whole(self._path, msgspec.json.encode(self._begun) + b"\n")


def words(rungs: tuple[float, ...]) -> str:
    """The epochs of some rungs together: `0.5 epochs`, `1 epoch`, `3 epochs`."""
    total = sum(rungs)
    return f"{total:g} epoch{'' if total == 1 else 's'}"
