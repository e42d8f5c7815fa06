"""Values that a user may give as text: read here, and passed through where they are objects already."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Final

from rushhour.errors import GoalError
from rushhour.goal import SLO, AccuracyBudget

StrPath = str | os.PathLike[str]

_NAME: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
_SECONDS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0}
_LONGEST_S: Final = 86_400
_LEAST_BUDGET_S: Final = 10.0
_LARGEST_SIDE: Final = 10_000


def read_slo(slo: str | SLO) -> SLO:
    """An SLO, as it is or from `p99<50ms`.

    Raises:
        GoalError: if the text is not of that form.
    """
    return slo if isinstance(slo, SLO) else SLO.parse(str(slo))


def read_accuracy_budget(budget: str | AccuracyBudget) -> AccuracyBudget:
    """An accuracy budget, as it is or from `1%`.

    Raises:
        GoalError: if the text is not of that form.
    """
    return budget if isinstance(budget, AccuracyBudget) else AccuracyBudget.parse(str(budget))


def read_seconds(duration: str | float) -> float:
    """Seconds, as a number or from `10s`, `2m` or `1h`.

    Raises:
        GoalError: if it is not a duration above 0 and up to a day.
    """
    seconds = float(duration) if isinstance(duration, int | float | Real) else 0.0
    if isinstance(duration, str):
        try:
            unit = _SECONDS.get(duration[-1:])
            seconds = float(duration) if unit is None else float(duration[:-1]) * unit
        except ValueError:
            seconds = 0.0
    if not 0 < seconds <= _LONGEST_S:
        raise GoalError(
            f"cannot use the duration {duration!r}",
            "a duration is above 0 and at most a day",
            "write for example 10s or 2m",
        )
    return seconds


def read_budget(budget: str | float) -> float:
    """The time of a tuning run in seconds, as a number or from `8m`.

    Raises:
        GoalError: if it is not a duration, or too short for any answer.
    """
    seconds = read_seconds(budget)
    if seconds < _LEAST_BUDGET_S:
        raise GoalError(
            f"cannot tune within {seconds:g} s",
            "a single proof takes longer than that",
            "give a minute or more, or no budget",
        )
    return seconds


def read_size(size: str | tuple[int, int] | None) -> tuple[int, int] | None:
    """Height and width in pixels, as they are or from `224x224`.

    Raises:
        GoalError: if the text is not of that form, or a side is not in 1 to 10,000.
    """
    if size is None:
        return None
    sides = size.lower().split("x") if isinstance(size, str) else [str(side) for side in size]
    if len(sides) != 2 or not all(side.isdecimal() and 1 <= int(side) <= _LARGEST_SIDE for side in sides):
        raise GoalError(
            f"cannot use the size {size!r}",
            f"a size is height x width in pixels, each from 1 to {_LARGEST_SIDE:,}",
            "write for example 224x224",
        )
    return int(sides[0]), int(sides[1])


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise unless an argument is one of the texts that it may be.

    Raises:
        GoalError: if it is not.
    """
    if value not in choices:
        raise GoalError(f"cannot use {name}={value!r}", f"it is {', '.join(choices)}", "name one of them")


def read_texts(texts: str | Sequence[str]) -> tuple[str, ...]:
    """Several texts; a single one may be given by itself."""
    return (texts,) if isinstance(texts, str) else tuple(texts)


def read_path(path: StrPath) -> Path:
    """A path; a leading `~` is the home folder.

    Raises:
        GoalError: if it is none.
    """
    if not isinstance(path, str | os.PathLike) or "\0" in str(path):
        raise GoalError(
            f"cannot use {path!r} as a path", "a path is text, or a pathlib.Path", "give the name of a file"
        )
    return Path(os.path.expanduser(path))


def check_name(name: str | None) -> str | None:
    """The name that a user chose for a model.

    Raises:
        GoalError: if it cannot be a part of a URL as it is.
    """
    if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise GoalError(
            f"cannot name a model {name!r}",
            "the name is a part of URLs: letters, digits, and . _ - between them, 64 at most",
            "write for example parts-2026",
        )
    return name
