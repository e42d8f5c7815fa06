"""`Table`: how a row of named values becomes a sample, in training and in serving."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Literal

import msgspec

from rushhour.measurement import Number

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
_MOST_COLUMNS = 4096


class Column(msgspec.Struct, frozen=True):
    """One column of a table, and its number in a sample.

    Attributes:
        name: as files and requests have it.
        kind: a `number` is itself; a `date` is days since 1970 (UTC); a `category` is its place in `categories`,
            counted from 1, and 0 where it is none of them.
        categories: those of the training part, as text.
        fill: the number in place of a missing one: the training part's median. A missing category is 0.
        optional: a value was missing in training, so a request may leave it out too.
    """

    name: _Name
    kind: Literal["number", "category", "date"]
    categories: tuple[str, ...] = ()
    fill: Number = 0.0
    optional: bool = False

    def __post_init__(self) -> None:
        if len(set(self.categories)) < len(self.categories):
            raise ValueError(f"`categories` of the column {self.name!r} repeat")
        if self.categories and self.kind != "category":
            raise ValueError(f"the column {self.name!r} is a {self.kind} and has `categories`")

    @property
    def size(self) -> int:
        """Rows of an embedding table for it, that of unknown categories included; 0 of a number."""
        return len(self.categories) + 1 if self.kind == "category" else 0


class Table(msgspec.Struct, frozen=True, dict=True):
    """The columns of a model's samples: float32 of shape `(columns,)`.

    Attributes:
        columns: numbers and dates first, then categories.
        targets: columns that the model was trained to predict; they name its values.
        group: the column whose equal values belong together; empty where there is none.
        time: the column by which the data was split; empty where there is none.
        left_out: further columns of the training data, which a request may carry too; they are ignored.
    """

    columns: Annotated[tuple[Column, ...], msgspec.Meta(min_length=1, max_length=_MOST_COLUMNS)]
    targets: tuple[_Name, ...] = ()
    group: str = ""
    time: str = ""
    left_out: tuple[_Name, ...] = ()

    def __post_init__(self) -> None:
        names = [column.name for column in self.columns]
        if len(set(names)) < len(names):
            raise ValueError("the names of `columns` repeat")
        kinds = [column.kind == "category" for column in self.columns]
        if kinds != sorted(kinds):
            raise ValueError("`columns` have a category before a number")

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The `size` of each column."""
        return tuple(column.size for column in self.columns)

    @cached_property
    def ignored(self) -> frozenset[str]:
        """Names that a request may carry though the model does not use them."""
        return frozenset((*self.targets, self.group, self.time, *self.left_out)) - {each.name for each in self.columns}
