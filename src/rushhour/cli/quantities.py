"""Options that are quantities with a unit: `10s`, `64MiB`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    _Float = click.ParamType[float]
else:
    _Float = click.ParamType  # older versions cannot be subscripted

_TIMES: Final = {"s": 1.0, "ms": 1e-3, "m": 60.0, "h": 3600.0}
_SIZES: Final = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "kB": 1e3, "MB": 1e6, "GB": 1e9}
_DAY_S: Final = 86_400


class Quantity(_Float):
    """A number with a unit; without one it is in the first unit.

    Args:
        name: of what it measures.
        units: each in terms of the first.
        least: the smallest allowed.
        most: the largest.
    """

    def __init__(self, name: str, units: dict[str, float], least: float, most: float) -> None:
        self.name = name
        self._units = units
        self._least = least
        self._most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The value in the first unit."""
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+) ?([A-Za-z]*)", str(value).strip())
        first, unit = next(iter(self._units)), found and found[2]
        if not found or (unit and unit not in self._units):
            self.fail(f"{value!r} is not a number with one of the units {', '.join(self._units)}", param, ctx)
        size = float(found[1]) * self._units[unit or first]
        if not self._least <= size <= self._most:
            self.fail(f"{value!r} is not between {self._least:g}{first} and {self._most:g}{first}", param, ctx)
        return size


PERIOD: Final = Quantity("time", _TIMES, 1e-3, _DAY_S)
"""A time above 0."""
DELAY: Final = Quantity("time", _TIMES, 0, _DAY_S)
"""A time, 0 allowed."""
SIZE: Final = Quantity("size", _SIZES, 1, 2**31 - 1)
"""Bytes."""


MEMORY: Final = Quantity("size", _SIZES, 64 * 2**20, 2**50)
"""Bytes of a machine or a container."""


def size_text(size: int) -> str:
    """Bytes for people: `1.25 MB`."""
    return f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
