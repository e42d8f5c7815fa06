"""A row of named values becomes a sample, and a sample a row: as a bundle's `Table` says."""

from __future__ import annotations

import datetime
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rushhour.bundle import Column, Table
from rushhour.errors import WireError

Value = str | int | float | bool | None
"""Of a cell."""
Row = Mapping[str, Value]

_DAY_S: Final = 86_400.0
_EPOCH: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_LARGEST: Final = float(np.finfo(np.float32).max)
_SHOWN = 60


class RowReader:
    """Makes samples of rows.

    Attributes:
        unknown: column -> categories until now that were none of the training part's.
        imputed: column -> values until now that were missing.
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        self._codes: dict[str, dict[Value, int]] = {
            column.name: {category: code for code, category in enumerate(column.categories, 1)}
            for column in table.columns
            if column.kind == "category"
        }
        self._names = frozenset(column.name for column in table.columns)

    def read(self, rows: Sequence[Row], first: int = 1) -> tuple[NDArray[np.float32], dict[str, int], dict[str, int]]:
        """Samples of rows.

        Args:
            rows: column -> value, each.
            first: the number of the first of them in its request, for errors.

        Returns:
            The samples, float32 of shape `(rows, columns)`; and how many categories were unknown and how many values
            missing, by column, without those that have none.

        Raises:
            WireError: if a row lacks a column that was always there in training, has one that is not known, or a value
                of another kind.
        """
        self._check_names(rows, first)
        samples = np.empty((len(rows), len(self.table.columns)), np.float32)
        unknown: dict[str, int] = {}
        imputed: dict[str, int] = {}
        for position, column in enumerate(self.table.columns):
            name = column.name
            values = [row.get(name) for row in rows]
            missing = values.count(None)
            if missing:
                if not column.optional:
                    raise _missing(column, rows[at := values.index(None)], first + at)
                imputed[name] = missing
            if column.kind == "category":
                codes = self._codes[name]
                found = [codes.get(value) if type(value) is str else _code(codes, value) for value in values]
                strange = found.count(None) - missing
                if strange:
                    unknown[name] = strange
                samples[:, position] = [code or 0 for code in found] if strange or missing else found
            else:
                samples[:, position] = _numbers(column, values, first)
        return samples, unknown, imputed

    def _check_names(self, rows: Sequence[Row], first: int) -> None:
        for number, row in enumerate(rows, first):
            if not row.keys() <= self._names:
                more = row.keys() - self._names - self.table.ignored
                if more:
                    raise _unknown(min(more), [column.name for column in self.table.columns], number)

    def row_of(self, sample: NDArray[Any]) -> dict[str, Value]:
        """A row that gives this sample: an unknown or missing category is None where that is allowed, else an empty
        text."""
        row: dict[str, Value] = {}
        for column, number in zip(self.table.columns, sample.tolist(), strict=True):
            if column.kind == "category":
                known = 0 < number <= len(column.categories)
                row[column.name] = column.categories[int(number) - 1] if known else None if column.optional else ""
            elif column.kind == "date":
                row[column.name] = (_EPOCH + datetime.timedelta(days=number)).isoformat()
            else:
                row[column.name] = int(number) if number.is_integer() else number
        return row


def text_of_value(value: Value) -> str:
    """A category as text: 3, 3.0 and "3" are the same one, and so are true and "true"."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def days_of(text: str) -> float:
    """A date or a time as days since 1970; in UTC where it names no zone.

    Raises:
        ValueError: if it is not in the form of ISO 8601.
    """
    moment = datetime.datetime.fromisoformat(text)
    return ((moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)) - _EPOCH).total_seconds() / _DAY_S


def _code(codes: Mapping[Value, int], value: Value) -> int | None:
    return None if value is None else codes.get(text_of_value(value))


def _numbers(column: Column, values: Sequence[Value], first: int) -> list[float]:
    found = []
    for number, value in enumerate(values, first):
        kind = type(value)
        if kind is float or kind is int:
            if column.kind == "date" or not -_LARGEST <= value <= _LARGEST:  # type: ignore[operator]
                raise _of_other_kind(column, value, number)
            found.append(value)
        elif value is None:
            found.append(column.fill)
        elif column.kind == "date" and isinstance(value, str):
            try:
                found.append(days_of(value))
            except (ValueError, OverflowError) as error:
                raise _of_other_kind(column, value, number) from error
        else:
            raise _of_other_kind(column, value, number)
    return found  # type: ignore[return-value]


def _of_other_kind(column: Column, value: Value, number: int) -> WireError:
    shown = repr(value)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
    if column.kind == "date":
        return WireError(
            f"{column.name!r} of row {number} is {shown}", "it is a date", "send text such as 2026-11-30T12:00:00"
        )
    why = (
        "it is a number" if not isinstance(value, int | float) or isinstance(value, bool) else "float32 cannot hold it"
    )
    return WireError(f"{column.name!r} of row {number} is {shown}", why, "send a number, for example 3.5")


def _missing(column: Column, row: Row, number: int) -> WireError:
    near = [name for name in row if name.lower() == column.name.lower()]
    return WireError(
        f"row {number} has no value for {column.name!r}",
        f"it is a {column.kind}, and no row of the training data lacked it",
        f"send it{f', as {column.name!r} and not {near[0]!r}' if near and near[0] != column.name else ''}",
    )


def _unknown(name: str, names: Sequence[str], number: int) -> WireError:
    near = difflib.get_close_matches(name[:_SHOWN], names, 1, 0.5)
    near = near or [each for each in names if each.lower() == name.lower()]
    shown = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}..."
    return WireError(
        f"row {number} has an unknown column {shown!r}",
        f"the nearest is {near[0]!r}" if near else f"the columns are {', '.join(names[:20])}",
        f"rename it to {near[0]!r}, or leave it out" if near else "leave it out",
    )
