"""Texts with labels: a table with a column of text and a column to predict becomes tokens and targets."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rushhour.bundle import Bundle
from rushhour.data.arrays import FEWEST, from_splits, in_time, leaks
from rushhour.data.columns import USUAL_TARGETS, Columns
from rushhour.data.dataset import Dataset, Split
from rushhour.data.splits import PARTS, Part, divide, divide_groups, keys_of
from rushhour.data.table_files import LINES, WHOLE, read_tables
from rushhour.data.targets import Kind, strata
from rushhour.data.text import bundle_tokens, tokens
from rushhour.errors import DataError
from rushhour.system.storage import explained

if TYPE_CHECKING:
    import pyarrow

_USUAL_TEXTS = ("text", "sentence", "review", "content", "document")
Table = Mapping[str, Sequence[Any]]
"""A table by its columns."""


def load_text_table(
    path: Path,
    *,
    seed: int = 0,
    columns: Columns | None = None,
    kind: Kind | None = None,
    bundle: Bundle | None = None,
) -> Dataset:
    """The texts and labels in a `.jsonl` file, a table, or a folder of tables by part.

    Args:
        path: the file or folder.
        seed: of the split, about 80 / 10 / 10, by the text: equal texts are in one part.
        columns: what the user says of the columns: target, group where texts belong together, and time.
        kind: what targets are; see `rushhour.data.arrays.from_splits`.
        bundle: that the data is for: its tokenizer, its task. Without one the tokens are MiniLM's.

    Raises:
        DataError: if it cannot be read, or has no column of text, or none to predict.
        InstallError: if pyarrow is needed, and not installed.
        ModelError: if MiniLM is needed, and not installed.
        TaskError: if there is only one class, or the model does not know a label.
    """
    parts = {WHOLE: _lines(path)} if path.suffix.lower() in LINES else _columns_of(read_tables(path), path.name)
    given = columns or Columns()
    first = next(iter(parts.values()))
    given.check(list(first), path.name)
    target = _target(list(first), given, path.name)
    column = _text_column(first, {target, given.group, given.time, *given.leave_out}, path.name)
    texts = {part: _texts(table[column], column, path.name) for part, table in parts.items()}
    everything = [text for each in texts.values() for text in each]
    samples = tokens(everything) if bundle is None else bundle_tokens(bundle, everything)
    splits: dict[str, Split] = {}
    at = 0
    for part, table in parts.items():
        rows = np.arange(at, at + len(texts[part]))
        groups = _groups(table[given.group], given.group, path.name) if given.group else None
        splits[part] = Split(samples[rows], _labels(table[target], target, path.name), groups)
        at += len(rows)
    if given.time and WHOLE in splits:
        in_order, note = in_time(splits[WHOLE], _times(parts[WHOLE][given.time], given.time, path.name), name=path.name)
        divided, notes = dict(zip(PARTS, in_order, strict=True)), [note]
    else:
        divided, notes = _divided(splits, texts, seed, kind, path.name)
    task = None if bundle is None else bundle.manifest.task
    data = from_splits(path.stem, divided["train"], divided["validation"], divided["test"], task=task, kind=kind)
    note = f"texts are in the column {column!r}, of up to {samples.dtype[0].shape[0]} tokens; to predict: {target}"
    object.__setattr__(data, "notes", (note, *notes, *data.notes))
    return data


def _divided(
    splits: dict[str, Split], texts: Mapping[str, Sequence[str]], seed: int, kind: Kind | None, source: str
) -> tuple[dict[Part, Split], list[str]]:
    """The three parts: those given, and what is missing held out of train."""
    name = WHOLE if WHOLE in splits else "train"
    if name not in splits or (name == "train" and len(splits) < 2):
        raise DataError(f"{source} has the part {', '.join(splits)}", "train and another are needed", "add one")
    missing: tuple[Part, ...] = tuple(part for part in PARTS[1:] if part not in splits)
    notes = [] if name == WHOLE else leaks({part: splits[part] for part in PARTS if part in splits}, source)
    whole = splits[name]
    if missing:
        if len(whole) < FEWEST:
            raise DataError(f"{source} has {len(whole)} texts", f"a split needs at least {FEWEST}", "give more")
        if whole.groups is not None:
            rows = divide_groups(whole.groups, seed=seed, held_out=missing)
        else:
            keys = keys_of((text.encode() for text in texts[name]), seed=seed)
            rows = divide(keys, strata(whole.targets, kind), held_out=missing)
        splits = splits | {part: whole.take(chosen) for part, chosen in rows.items()}
    return {part: splits[part] for part in PARTS}, notes


def _columns_of(tables: Mapping[str, pyarrow.Table], source: str) -> dict[str, Table]:
    for table in tables.values():
        names = table.column_names
        if twice := [name for name in names if names.count(name) > 1]:
            raise DataError(f"{source} has two columns {twice[0]!r}", "only one can be meant", "rename or remove one")
    return {part: {str(name): table[name].to_pylist() for name in table.column_names} for part, table in tables.items()}


def _lines(file: Path) -> Table:
    """The objects of a file, one a line, as columns."""
    if not file.is_file():
        raise DataError(f"there is no data at {file}", "the file does not exist", "check the path")
    rows = []
    with explained(f"read {file}"):
        content = file.read_bytes()
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"line {number} of {file} is no JSON", str(error), "write one object a line") from error
        if not isinstance(row, dict):
            raise DataError(f"line {number} of {file} is no object", f"it is a {type(row).__name__}", "write one")
        rows.append(row)
    if not rows:
        raise DataError(f"{file} is empty", "it has no line", "write one object a line")
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _target(names: list[str], given: Columns, source: str) -> str:
    usual = [name for name in names if name.lower() in USUAL_TARGETS]
    found = given.target or (tuple(usual) if len(usual) == 1 else ())
    if len(found) != 1:
        raise DataError(
            f"it is not clear which column of {source} is to be predicted",
            f"its columns are {', '.join(names[:30])}",
            "name one with --target COLUMN",
        )
    return found[0]


def _text_column(table: Table, others: set[str], source: str) -> str:
    """The one column of text; by its usual name where there are several."""
    found = [
        name
        for name, values in table.items()
        if name not in others and any(values) and all(isinstance(each, str) for each in values if each is not None)
    ]
    usual = [name for name in found if name.lower() in _USUAL_TEXTS]
    if len(found) != 1 and len(usual) != 1:
        raise DataError(
            f"it is not clear which column of {source} holds the texts",
            f"columns of text are {', '.join(found) or 'none'}",
            "call one of them text, or leave out the others with --leave-out",
        )
    return usual[0] if len(usual) == 1 else found[0]


def _texts(values: Sequence[Any], column: str, source: str) -> list[str]:
    missing = [row for row, each in enumerate(values, 1) if each is None or not each.strip()]
    if missing:
        raise DataError(
            f"{len(missing):,} rows of {source} have no text in {column!r}",
            f"row {missing[0]} is the first",
            "remove those rows",
        )
    for row, text in enumerate(values, 1):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"row {row} of {source} has a text that cannot be written in UTF-8",
                f"{error.object[error.start]!r} in {column!r} is half of a character",
                "correct it",
            ) from error
    return list(values)


def _groups(values: Sequence[Any], column: str, source: str) -> NDArray[Any]:
    missing = [row for row, each in enumerate(values, 1) if each is None or not str(each).strip()]
    if missing:
        raise DataError(
            f"{len(missing):,} rows of {source} have no group",
            f"row {missing[0]} has no {column!r}",
            "fill it in, or remove them",
        )
    return np.array([str(each) for each in values])


def _times(values: Sequence[Any], column: str, source: str) -> NDArray[Any]:
    """Numbers, or dates in UTC."""
    found: list[float] = []
    dated = False
    for row, value in enumerate(values, 1):
        try:
            time = datetime.datetime.fromisoformat(value) if isinstance(value, str) else value
            if isinstance(time, datetime.date):
                dated = True
                midnight = datetime.datetime.min.time()
                whole = time if isinstance(time, datetime.datetime) else datetime.datetime.combine(time, midnight)
                time = (whole if whole.tzinfo else whole.replace(tzinfo=datetime.UTC)).timestamp()
            found.append(float(time))
        except (TypeError, ValueError, OverflowError):
            raise DataError(
                f"row {row} of {source} has no time in {column!r}",
                f"it holds {value!r:.60}",
                "give numbers or ISO dates",
            ) from None
    times = np.array(found)
    return times.astype("datetime64[s]") if dated else times


def _labels(values: Sequence[Any], column: str, source: str) -> NDArray[Any]:
    missing = [row for row, each in enumerate(values, 1) if each is None]
    if missing:
        raise DataError(
            f"{len(missing):,} rows of {source} have no value in {column!r}",
            f"row {missing[0]} is the first, and a target is never guessed",
            "remove those rows, or fill them in",
        )
    for row, each in enumerate(values, 1):
        if not isinstance(each, str | bool | int | float | Decimal | datetime.date):
            raise DataError(
                f"row {row} of {source} has a {type(each).__name__} in {column!r}",
                "a label is a text or a number",
                "give one label for each text",
            )
    if any(isinstance(each, str | datetime.date) or (type(each) is int and abs(each) >= 2**63) for each in values):
        return np.array([str(each) for each in values])
    return np.array([float(each) if isinstance(each, Decimal) else each for each in values])
