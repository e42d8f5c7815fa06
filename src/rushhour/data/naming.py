"""Which array in a `.npz` file is what, by its name: samples, targets, parts, and the inputs of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from rushhour.bundle import joined
from rushhour.data.splits import PART_OF
from rushhour.errors import DataError

Arrays = dict[str, NDArray[Any]]


def named_arrays(given: Mapping[str, NDArray[Any]], source: str, *, unlabelled: bool) -> tuple[Arrays, list[str], str]:
    """The arrays by the names that `rushhour.data.arrays.load_npz` has for them, those that are unused, and a note.

    Args:
        given: name -> array. Without any `x`, those that are not known by name are the inputs of a model: `user`, or by
            part `user_train`. They become `x`, or `x_train` ...: a structured array, or the array of a single input.
        source: for messages.
        unlabelled: whether data without targets is of use.

    Raises:
        DataError: if two arrays are the same, an input is missing in a part, or has another number of rows.
    """
    named: Arrays = {}
    unused = []
    for key, array in given.items():
        what, _, part = key.lower().partition("_")
        name = what if not part else f"{what}_{PART_OF.get(part, '')}"
        if what not in ("x", "y", "groups", "times") or name.endswith("_"):
            unused.append(key)
        elif name in named:
            raise DataError(
                f"{source} has two arrays for {name}: {', '.join(given)}", "only one can be meant", "rename one"
            )
        else:
            named[name] = array
    targets = {key.partition("_")[2]: array for key, array in named.items() if key.partition("_")[0] == "y"}
    has_samples = any(key.partition("_")[0] == "x" for key in named)
    if has_samples or not unused or not (targets or unlabelled):
        return named, unused, ""
    inputs, unused, names = _inputs(given, unused, targets, source)
    return named | inputs, unused, f"there is no x: a sample is {' and '.join(names)}"


def _inputs(
    given: Mapping[str, NDArray[Any]], names: Sequence[str], targets: Arrays, source: str
) -> tuple[Arrays, list[str], list[str]]:
    """The samples in arrays that are named as inputs, the names of those that are none, and the inputs.

    Args:
        targets: part -> its targets; the part is empty where they are to be split.
    """
    columns: dict[str, Arrays] = {}
    for key in names:
        name, _, part = key.rpartition("_")
        if name and part.lower() in PART_OF and "" not in targets:
            columns.setdefault(PART_OF[part.lower()], {})[name] = given[key]
        else:
            columns.setdefault("", {})[key] = given[key]
    used = {part: own for part, own in columns.items() if part} or columns
    every = list(dict.fromkeys(name for own in used.values() for name in own))
    found = {}
    for part, own in used.items():
        first, ending = targets.get(part, next(iter(own.values()))), f"_{part}" if part else ""
        rows = len(first) if first.ndim else 0
        for name in every:
            if name not in own or own[name].ndim == 0 or len(own[name]) != rows:
                held = "is missing" if name not in own else f"has the shape {own[name].shape}"
                raise DataError(
                    f"{name}{ending} of {source} {held}",
                    f"without x{ending} each array is an input by its name, with a row for each of {rows:,} samples",
                    f"correct it, or call the samples x{ending}",
                )
        found[f"x{ending}"] = joined({name: own[name] for name in every})
    return found, [] if "" in used else list(columns.get("", ())), every
