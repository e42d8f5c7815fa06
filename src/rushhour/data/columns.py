"""`Columns`: what a user says of a table's columns."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from rushhour.errors import DataError

USUAL_TARGETS = ("target", "label", "y", "class")
"""Names of the column to predict where the user names none."""


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which columns of a table are what. A text in place of several names is one of them.

    Attributes:
        target: to predict; several are values to regress together. By default a column with the name target, label, y
            or class.
        group: rows with equal values here belong together, such as those of one person: they are in one part, and
            intervals are of groups.
        time: a number or a date by which rows are split: the last tenth for testing, the tenth before it for
            validation.
        categories: columns of whole numbers that are names and not amounts.
        leave_out: columns that the model does not see.
    """

    target: tuple[str, ...] = ()
    group: str = ""
    time: str = ""
    categories: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("target", "categories", "leave_out"):
            given: str | Sequence[str] | None = getattr(self, name)
            names = (given,) if isinstance(given, str) else tuple(given or ())
            object.__setattr__(self, name, tuple(each for each in names if each))
        for name in ("group", "time"):
            object.__setattr__(self, name, getattr(self, name) or "")
        others = (self.group, self.time, *self.categories, *self.leave_out)
        twice = [name for name in self.target if name in others]
        if twice:
            raise DataError(
                f"the column {twice[0]!r} cannot be a target and something else",
                "what is predicted is no input, and says nothing about how rows belong together",
                "name it once",
            )
        if len(set(self.target)) < len(self.target):
            raise DataError(
                f"the targets {', '.join(self.target)} repeat a column", "each is predicted once", "name each once"
            )

    @classmethod
    def read(cls, given: Columns | Mapping[str, Any] | str | None) -> Columns:
        """As a user gives them: an object, a dictionary with its attributes, or the target's name alone.

        Raises:
            DataError: if it is something else.
        """
        if given is None or isinstance(given, str):
            return cls(target=(given,) if given else ())
        if isinstance(given, cls):
            return given
        fields = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(given, Mapping) or not set(given) <= set(fields):
            shown = sorted(set(given) - set(fields)) if isinstance(given, Mapping) else type(given).__name__
            raise DataError(f"cannot use {shown} as columns", f"they are {', '.join(fields)}", "name these")
        return cls(**given)

    @property
    def named(self) -> tuple[str, ...]:
        """All names that the user gave."""
        names = (*self.target, self.group, self.time, *self.categories, *self.leave_out)
        return tuple(name for name in names if name)

    def check(self, names: Sequence[str], where: str) -> None:
        """Raise unless a table has all of them.

        Raises:
            DataError: naming the first that is missing, and the nearest that is there.
        """
        for name in self.named:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1) or [
                    each for each in names if each.lower() == name.lower()
                ]
                raise DataError(
                    f"{where} has no column {name!r}",
                    f"its columns are {', '.join(names[:30])}",
                    f"is it {near[0]!r}?" if near else "name one of them",
                )
