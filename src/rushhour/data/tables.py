"""Tables as data sets: columns of numbers, dates and categories become samples of float32.

What each column is, and what takes the place of missing values, is decided on the training part and kept in the
bundle (`rushhour.bundle.Table`), so that the server makes the same samples of the same rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rushhour.bundle import Bundle, Column, Preprocessing, Table
from rushhour.data.arrays import FEWEST, from_splits, in_time, leaks
from rushhour.data.cells import Cells, cells_of, is_identifier, keys_of_cells, strays
from rushhour.data.columns import USUAL_TARGETS, Columns
from rushhour.data.dataset import Dataset, Split
from rushhour.data.splits import PARTS, Part, divide, divide_groups
from rushhour.data.table_files import WHOLE, joined, read_tables
from rushhour.data.targets import Kind, strata
from rushhour.errors import DataError

if TYPE_CHECKING:
    import pyarrow

_MOST_NAMES = 50
"""So many different texts are categories in any case; more are if a value occurs twice on average."""
_SHOWN = 12
"""Columns that a note names, at most."""


def load_tables(
    path: Path, *, seed: int, columns: Columns | None = None, kind: Kind | None = None, bundle: Bundle | None = None
) -> Dataset:
    """The data set in a `.csv`, `.tsv`, `.parquet` or `.arrow` file, or in a folder of them by part.

    Args:
        path: the file or folder.
        seed: of the split.
        columns: what the user says of the columns.
        kind: what targets are; see `rushhour.data.arrays.from_splits`.
        bundle: that the data is for: its table says how rows become samples.

    Raises:
        DataError: if it cannot be read, or its columns cannot be used.
        InstallError: if pyarrow is not installed.
        TaskError: if there is only one class, or the model does not know a label.
    """
    tables = read_tables(path)
    return from_tables(tables, name=path.stem, source=path.name, seed=seed, columns=columns, kind=kind, bundle=bundle)


def from_tables(
    tables: Mapping[str, pyarrow.Table],
    *,
    name: str,
    source: str = "",
    seed: int = 0,
    columns: Columns | None = None,
    kind: Kind | None = None,
    bundle: Bundle | None = None,
) -> Dataset:
    """The data set in tables by part, or in one (`rushhour.data.table_files.WHOLE`) that is split; see `load_tables`.

    The split is by the group where there is one, in time where there is one, else by what a row holds.
    """
    source = source or name
    whole = joined(list(tables.values()), source)
    names = [str(each) for each in whole.column_names]
    twice = [each for each in dict.fromkeys(names) if names.count(each) > 1]
    if twice:
        is_row = all(name.replace(".", "").isdecimal() for name in names)
        fix = "its first line seems to be a row: write the columns' names above" if is_row else "rename or remove one"
        raise DataError(f"{source} has two columns {twice[0]!r}", "only one can be meant", fix)
    if not len(whole):
        raise DataError(f"{source} has no rows", "it has only names of columns", "check that it is the whole file")
    known = None if bundle is None else bundle.manifest.table
    given = _completed(columns or Columns(), names, known, source)
    targets = _targets(whole, given.target, source) if given.target else np.zeros((len(whole), 0), np.float32)
    apart = {*given.target, given.group, given.time, *given.leave_out} - set(given.categories)
    cells = {
        each: cells_of(each, whole[each], category=each in given.categories)
        for each in names
        if each not in apart and each.strip()
    }
    cells = {
        each: cells_of(each, whole[each], category=True) if is_identifier(each, found) else found
        for each, found in cells.items()
    }
    if not cells:
        raise DataError(f"{source} has no column that a model could use", "it has only targets", "add some")
    rows, notes = _rows_of_parts(tables, whole, targets, cells, given, seed, source, kind)
    if known is None:
        left_out = [each for each in names if not each.strip()]
        table, more = _recognised(cells, rows["train"], given, left_out, source)
        notes += more
    else:
        table = known
        cells = {
            column.name: cells_of(column.name, whole[column.name], category=column.kind == "category")
            for column in table.columns
            if column.name in names
        }
    samples, more = _samples(table, cells, len(whole), rows, source)
    notes += more
    groups = cells_of(given.group, whole[given.group], category=True).texts() if given.group else None
    everything = Split(samples, targets, groups)
    parts = {part: everything.take(rows[part]) for part in PARTS}
    if WHOLE not in tables:
        notes += leaks({part: parts[part] for part in PARTS if part in tables}, source)
    task = None if bundle is None else bundle.manifest.task
    classes = given.target if len(given.target) > 1 and np.isin(targets, (0, 1)).all() else None
    data = from_splits(name, parts["train"], parts["validation"], parts["test"], classes, task, kind=kind)
    if bundle is None or known is None:
        preprocessing = _scaled(data.preprocessing, table)
    else:
        preprocessing = bundle.manifest.preprocessing
    return dataclasses.replace(data, preprocessing=preprocessing, notes=(*notes, *data.notes))


def _completed(given: Columns, names: Sequence[str], known: Table | None, source: str) -> Columns:
    """What the user says, completed by what the bundle knows, or by the usual name of a target.

    Raises:
        DataError: if a column is missing, or no target is known.
    """
    given.check(names, source)
    if known is not None:
        target = given.target or tuple(name for name in known.targets if name in names)
        group = given.group or (known.group if known.group in names else "")
        time = given.time or (known.time if known.time in names else "")
        return dataclasses.replace(given, target=target, group=group, time=time)
    if given.target:
        return given
    usual = [name for name in names if name.lower() in USUAL_TARGETS]
    if len(usual) != 1:
        raise DataError(
            f"it is not clear which column of {source} is to be predicted",
            f"its columns are {', '.join(names[:30])}",
            "name it with --target COLUMN (columns={'target': ...} in Python)",
        )
    return dataclasses.replace(given, target=tuple(usual))


def _targets(whole: pyarrow.Table, names: tuple[str, ...], source: str) -> NDArray[Any]:
    """Labels or values, `(n,)` of one column, `(n, columns)` of several.

    Raises:
        DataError: if a row has none; naming it.
    """
    found = []
    for name in names:
        cells = cells_of(name, whole[name])
        if cells.kind in ("date", "other"):
            raise DataError(
                f"the target {name!r} of {source} is no number and no label", cells.why or "it is a date", "convert it"
            )
        if cells.missing.any():
            raise DataError(
                f"{int(cells.missing.sum()):,} of {len(whole):,} rows of {source} have no value in the target {name!r}",
                f"row {int(cells.missing.argmax()) + 1} is the first, and a target is never guessed",
                "remove those rows, or fill them in",
            )
        if cells.kind == "category":
            is_truth = cells.names and set(cells.names) <= {"false", "true"} and str(whole[name].type) == "bool"
            found.append(cells.texts() == "true" if is_truth else cells.texts())
        else:
            # whole numbers as they are: float64 would make one of large ones, such as keys of a database
            found.append(whole[name].to_numpy() if cells.whole else cells.values)
    if len(found) == 1:
        return found[0]
    if any(each.dtype.kind == "U" for each in found):
        raise DataError(
            f"the targets {', '.join(names)} of {source} are not all numbers",
            "several targets are values, or 0 and 1",
            "name one, or convert them",
        )
    return np.stack([each.astype(np.float64) for each in found], axis=1)


def _rows_of_parts(
    tables: Mapping[str, pyarrow.Table],
    whole: pyarrow.Table,
    targets: NDArray[Any],
    cells: dict[str, Cells],
    given: Columns,
    seed: int,
    source: str,
    kind: Kind | None,
) -> tuple[dict[Part, NDArray[np.intp]], list[str]]:
    """The rows of each part, and how they were divided, in words.

    Raises:
        DataError: if there are too few, or a group is in two parts.
    """
    notes: list[str] = []
    groups = cells_of(given.group, whole[given.group], category=True) if given.group else None
    if groups is not None and groups.missing.any():
        raise DataError(
            f"{int(groups.missing.sum()):,} rows of {source} have no group",
            f"row {int(groups.missing.argmax()) + 1} has no {given.group!r}",
            "fill it in, or remove them",
        )
    if WHOLE in tables:
        if len(whole) < FEWEST:
            raise DataError(f"{source} has {len(whole)} rows", f"a split needs at least {FEWEST}", "give more data")
        if given.time:
            return _in_time(whole, given.time, source)
        found = {"train": np.arange(len(whole))}
        missing: tuple[Part, ...] = ("validation", "test")
    else:
        ends = np.cumsum([0, *(len(table) for table in tables.values())])
        found = {part: np.arange(ends[at], ends[at + 1]) for at, part in enumerate(tables)}
        if "train" not in found or len(found) < 2:
            raise DataError(
                f"{source} has the parts {', '.join(found)}",
                "train is needed, and validation or test",
                "add the part, or give one table, which is then split",
            )
        missing = tuple(part for part in PARTS if part not in found)
        notes += [f"there is no {part} part: about a tenth of train is held out for it" for part in missing]
    if missing:
        own = found["train"]
        if groups is None:
            keys = keys_of_cells({name: _taken(each, own) for name, each in cells.items()}, seed=seed)
            divided = divide(keys, strata(targets[own], kind), held_out=missing)
        else:
            if len(np.unique(groups.values[own])) <= len(missing):
                raise DataError(
                    f"{source} has {len(np.unique(groups.values[own]))} groups",
                    f"a group is in one part only, and there are {len(missing) + 1} parts",
                    "give data of more groups",
                )
            divided = divide_groups(groups.texts()[own], seed=seed, held_out=missing)
        found |= {part: own[chosen] for part, chosen in divided.items()}
    return {part: found[part] for part in PARTS}, notes


def _taken(cells: Cells, rows: NDArray[np.intp]) -> Cells:
    return dataclasses.replace(cells, values=cells.values[rows])


def _in_time(whole: pyarrow.Table, name: str, source: str) -> tuple[dict[Part, NDArray[np.intp]], list[str]]:
    cells = cells_of(name, whole[name])
    if cells.kind not in ("number", "date"):
        raise DataError(
            f"the column {name!r} of {source} is no time", cells.why or "it holds text", "give numbers, or ISO dates"
        )
    times: NDArray[Any] = cells.values
    if cells.kind == "date":
        times = (cells.values * 86_400).astype("datetime64[s]")
    numbered = Split(np.arange(len(whole))[:, None], np.zeros((len(whole), 0), np.float32))
    parts, note = in_time(numbered, times, name=source)
    return {part: each.inputs[:, 0] for part, each in zip(PARTS, parts, strict=True)}, [note]


def _recognised(
    cells: Mapping[str, Cells], train: NDArray[np.intp], given: Columns, nameless: list[str], source: str
) -> tuple[Table, list[str]]:
    """What each column is, fitted to the training part, and in words.

    Raises:
        DataError: if none can be used.
    """
    numbers: list[Column] = []
    categories: list[Column] = []
    dropped: list[str] = [f"{len(nameless)} without a name"] if nameless else []
    left_out: list[str] = []
    by_name: list[str] = []
    odd: list[str] = []
    for name, column in cells.items():
        if name not in given.categories and (said := strays(column)):
            odd.append(f"{name} holds {said}")
        own = _taken(column, train)
        there = own.values[~own.missing]
        why = column.why or _useless(name, own, there, given)
        if why:
            dropped.append(f"{name} ({why})")
            left_out.append(name)
        elif column.kind == "category":
            present = tuple(column.names[int(place)] for place in np.unique(there))
            categories.append(Column(name, "category", present, optional=bool(own.missing.any())))
            if all(text.isdecimal() for text in present[:_MOST_NAMES]) and name not in given.categories:
                by_name.append(name)
        else:
            fill = float(f"{np.median(there):.8g}")
            numbers.append(
                Column(name, "date" if column.kind == "date" else "number", fill=fill, optional=bool(own.missing.any()))
            )
    if not numbers and not categories:
        raise DataError(
            f"{source} has no column that a model could use", "; ".join(dropped) or "it has only a target", "add some"
        )
    dates = [column.name for column in numbers if column.kind == "date"]
    kinds = [
        f"numbers: {_listed([column.name for column in numbers if column.kind == 'number'])}",
        f"dates, as days since 1970: {_listed(dates)}",
        f"categories: {_listed([column.name for column in categories])}",
        f"to predict: {_listed(given.target)}",
    ]
    notes = [f"columns of {source}: {'; '.join(each for each in kinds if not each.endswith(': '))}"]
    if by_name:
        notes.append(f"numbers that are names: {_listed(by_name)}; --leave-out what the model should not see")
    if odd:
        notes.append(f"columns taken as text: {_listed(odd)}")
    if dropped:
        notes.append(f"columns left out: {_listed(dropped)}")
    table = Table(
        (*numbers, *categories),
        targets=given.target,
        group=given.group,
        time=given.time,
        left_out=tuple(dict.fromkeys((*left_out, *given.leave_out))),
    )
    return table, notes


def _useless(name: str, own: Cells, there: NDArray[np.float64], given: Columns) -> str:
    """Why a column tells a model nothing; empty where it does."""
    if not len(there):
        return "empty in training"
    different = len(np.unique(there))
    if different == 1 and len(there) == len(own.values):
        return "always the same"
    if own.kind == "category" and name not in given.categories and different > max(_MOST_NAMES, len(there) / 2):
        return f"{different:,} different values in {len(there):,} rows"
    steps = np.sort(there)
    if own.whole and different == len(there) and len(there) > _MOST_NAMES and steps[-1] - steps[0] < 2 * len(there):
        return "it numbers the rows"
    return ""


def _samples(
    table: Table, cells: Mapping[str, Cells], count: int, rows: Mapping[Part, NDArray[np.intp]], source: str
) -> tuple[NDArray[np.float64], list[str]]:
    """Samples `(n, columns)`, and what was missing or unknown, in words.

    Raises:
        DataError: if a column is missing, or of another kind.
    """
    samples = np.empty((count, len(table.columns)), np.float64)
    missing: list[str] = []
    unknown: list[str] = []
    for position, column in enumerate(table.columns):
        name = column.name
        if name not in cells:
            raise DataError(
                f"{source} has no column {name!r}", "the model was trained with it", "add it, or rename one"
            )
        own = cells[name]
        if own.kind != column.kind:
            raise DataError(
                f"the column {name!r} of {source} is a {own.kind}", f"the model takes a {column.kind}", "convert it"
            )
        gaps = int(own.missing.sum())
        if column.kind == "category":
            code_of = {text: code for code, text in enumerate(column.categories, 1)}
            codes = np.array([*(code_of.get(text, 0) for text in own.names), 0], np.float64)
            samples[:, position] = codes[own.values.astype(np.intp)]
            held_out = np.concatenate([rows["validation"], rows["test"]])
            strange = int(((samples[held_out, position] == 0) & ~own.missing[held_out]).sum())
            if strange:
                unknown.append(f"{name} in {strange:,}")
            if gaps:
                missing.append(f"{name} {gaps:,} (unknown)")
        else:
            samples[:, position] = np.where(own.missing, column.fill, own.values)
            if gaps:
                missing.append(f"{name} {gaps:,} (median {column.fill:g})")
    notes = [f"missing values of {source}, and what takes their place: {_listed(missing)}"] if missing else []
    if unknown:
        held = len(rows["validation"]) + len(rows["test"])
        notes.append(f"categories that training does not have, of {held:,} rows held out: {_listed(unknown)}")
    return samples, notes


def _scaled(found: Preprocessing, table: Table) -> Preprocessing:
    """Numbers in units of their deviation; categories as they are."""
    kept = [column.kind == "category" for column in table.columns]
    mean = tuple(0.0 if keep else value for keep, value in zip(kept, found.mean, strict=True))
    std = tuple(1.0 if keep else value for keep, value in zip(kept, found.std, strict=True))
    return Preprocessing(1.0, mean, std, table=table)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
