"""The cells of a table's column, as numbers: amounts, days, or codes of names."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from rushhour.data.splits import keys_of
from rushhour.errors import DataError
from rushhour.rows import text_of_value

if TYPE_CHECKING:
    import pyarrow

_DAY_US = 86_400e6
_ISO_DATE = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d.*)?")
_LOOKED_AT = 100
_FEWEST_NAMES = 5
"""Of a column of text, before it is compared with numbers and dates."""
_NUMBER = re.compile(r"\s*[+-]?(\d+|\d{1,3}([.,]\d{3})+)?([.,]\d+)?([eE][+-]?\d+)?\s*")
_DATE = re.compile(r"\s*(\d{4}([./-])\d{1,2}\2\d{1,2}|\d{1,2}([./-])\d{1,2}\3\d{4})([T ].*)?")
_EXACT = 2.0**53
"""Up to here float64 keeps whole numbers apart; larger ones are names of something, such as keys of a database."""
_ID = re.compile(r"(?i:id|.*[_ .-]id)|.*[a-z]I[dD]")
"""Names of columns whose whole numbers are names: `id`, `user_id`, `userId`."""


@dataclasses.dataclass(frozen=True)
class Cells:
    """One column.

    Attributes:
        kind: `number`, `date`, `category`, or `other` where no model of a table can take it.
        values: float64 of shape `(n,)`: numbers, or days since 1970, NaN where missing; of categories the place in
            `names`, -1 where missing.
        names: of the categories.
        whole: whether its numbers are whole by type, as identifiers are.
        why: of `other`.
    """

    kind: Literal["number", "date", "category", "other"]
    values: NDArray[np.float64]
    names: tuple[str, ...] = ()
    whole: bool = False
    why: str = ""

    @property
    def missing(self) -> NDArray[np.bool_]:
        """Where there is no value."""
        found: NDArray[np.bool_] = self.values < 0 if self.kind == "category" else np.isnan(self.values)
        return found

    def texts(self) -> NDArray[Any]:
        """Categories as text."""
        return np.array([*self.names, ""])[self.values.astype(np.intp)]

    def keys(self, seed: int) -> NDArray[np.uint64]:
        """A number for each cell, that depends on its value alone."""
        if self.kind == "category":
            names = [*(name.encode() for name in self.names), b"\0missing"]
            return keys_of(names, seed=seed)[self.values.astype(np.intp)]
        return _mixed(np.where(np.isnan(self.values), np.nan, self.values + 0.0).view(np.uint64))


def cells_of(name: str, column: pyarrow.ChunkedArray, *, category: bool = False) -> Cells:
    """The cells of a column of Arrow.

    Args:
        name: of the column, for errors.
        column: of any type.
        category: take its values as names.

    Raises:
        DataError: if a number is infinite.
    """
    import pyarrow
    from pyarrow import types

    kind = column.type
    if types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind, category = column.type, True
    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    if is_text and not category and _are_dates(column):
        column = column.cast(pyarrow.timestamp("us"))
        kind, is_text = column.type, False
    is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)
    if is_text or types.is_boolean(kind) or (category and is_number):
        return _categories(column)
    if is_number:
        values = column.cast(pyarrow.float64(), safe=False).to_numpy()
        if np.isinf(values).any():
            raise DataError(
                f"the column {name!r} holds infinity",
                f"row {int(np.isinf(values).argmax()) + 1} is the first",
                "correct or remove those rows",
            )
        return Cells("number", values, whole=types.is_integer(kind))
    if types.is_date(kind) or types.is_timestamp(kind):
        moments = column.cast(pyarrow.timestamp("us", tz=getattr(kind, "tz", None)), safe=False).cast(pyarrow.int64())
        return Cells("date", moments.cast(pyarrow.float64(), safe=False).to_numpy() / _DAY_US)
    why = "it is empty" if types.is_null(kind) else f"it holds {kind}"
    return Cells("other", np.full(len(column), np.nan), why=why)


def is_identifier(name: str, cells: Cells) -> bool:
    """Whether whole numbers are names: the column's name says so, or they are too large for amounts."""
    if cells.kind != "number" or not cells.whole:
        return False
    return _ID.fullmatch(name) is not None or bool((np.abs(cells.values) >= _EXACT).any())


def strays(cells: Cells) -> str:
    """What keeps a column of text from being numbers or dates, as most of its values are; empty of any other.

    One typing error makes text of a column, and text of many different values is left out.
    """
    if cells.kind != "category" or len(cells.names) < _FEWEST_NAMES:
        return ""
    for what, pattern, fix in (
        ("numbers", _NUMBER, "leave empty what is missing"),
        ("dates", _DATE, "dates are read as 2026-12-31"),
    ):
        some = cells.names[:: 1 + len(cells.names) // _LOOKED_AT]
        if 2 * sum(pattern.fullmatch(name) is None for name in some) >= len(some):
            continue
        stray = np.array([pattern.fullmatch(name) is None for name in cells.names])
        if what == "numbers" and not stray.any():  # the user says that they are names
            return ""
        if not stray.any():
            return f"{what} such as {cells.names[0]!r}: {fix}"
        rows = stray[np.maximum(cells.values, 0).astype(np.intp)] & ~cells.missing
        first = int(rows.argmax())
        value = cells.names[int(cells.values[first])]
        return f"{what} but for {int(rows.sum()):,} values, such as {value[:30]!r} in row {first + 1}: {fix}"
    return ""


def keys_of_cells(columns: dict[str, Cells], *, seed: int) -> NDArray[np.uint64]:
    """The key of each row, as `rushhour.data.splits.keys_of`: it depends on what the row holds alone."""
    key = np.zeros(len(next(iter(columns.values())).values), np.uint64)
    for name in sorted(columns):
        (own,) = keys_of([name.encode()], seed=seed)
        key = _mixed(key ^ _mixed(columns[name].keys(seed) + own))
    return key


def _are_dates(column: pyarrow.ChunkedArray) -> bool:
    import pyarrow

    some = column.drop_null()[:_LOOKED_AT].to_pylist()
    if not some or not all(_ISO_DATE.fullmatch(text) for text in some):
        return False
    try:
        column.cast(pyarrow.timestamp("us"))
    except pyarrow.ArrowException:
        return False
    return True


def _categories(column: pyarrow.ChunkedArray) -> Cells:
    encoded = column.combine_chunks().dictionary_encode()
    values = encoded.dictionary.to_pylist()
    codes = encoded.indices.fill_null(-1).to_numpy().astype(np.intp)
    names = [text_of_value(value) for value in values]
    order = sorted(range(len(names)), key=lambda place: names[place])
    place_of = np.full(len(names) + 1, -1)
    kept: list[str] = []
    for place in order:
        if isinstance(values[place], float) and values[place] != values[place]:  # NaN: missing
            continue
        if not kept or kept[-1] != names[place]:
            kept.append(names[place])
        place_of[place] = len(kept) - 1
    return Cells("category", place_of[codes].astype(np.float64), tuple(kept))


def _mixed(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection that spreads near numbers: splitmix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        mixed = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        found: NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(31))
    return found
