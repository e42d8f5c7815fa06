"""Tables in files and in objects of other libraries, as Arrow tables by part.

Files are read by pyarrow (Apache Arrow). Nothing is unpickled, and no code of a data set is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rushhour.data.splits import PART_OF
from rushhour.errors import DataError, InstallError

if TYPE_CHECKING:
    import pyarrow

WHOLE: Final = "whole"
"""The name of a table that is not divided into parts."""
SUFFIXES: Final = (".csv", ".tsv", ".parquet", ".arrow")
LINES: Final = (".jsonl", ".ndjson")
"""Of files of texts, with one JSON object a line."""
_HUGGING_FACE: Final = ("dataset_dict.json", "dataset_info.json", "state.json")
_MISSING: Final = ["", "NA", "N/A", "n/a", "#N/A", "NaN", "nan", "NULL", "null", "None", "?"]
_DELIMITERS: Final = (",", ";", "\t", "|")
_HEAD_BYTES: Final = 2**16
_DECIMAL_COMMA: Final = r"[+-]?(?:\d{1,3}(?:\.\d{3})+|\d+)(?:,\d+)?"
_DECIMAL_POINT: Final = r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"


def is_table_file(path: Path) -> bool:
    """Whether a file is a table by its name."""
    return path.suffix.lower() in SUFFIXES


def is_table_folder(path: Path) -> bool:
    """Whether a folder holds tables by part (`train.csv`, `test.parquet`), or a data set that Hugging Face's
    `save_to_disk` wrote; a folder of pictures with a table beside them is none."""
    if any((path / name).is_file() for name in _HUGGING_FACE):
        return True
    names = [each for each in path.iterdir() if is_table_file(each) and _part_of(each) is not None]
    folders = {each.name.lower() for each in path.iterdir() if each.is_dir()}
    return bool(names) and not folders & PART_OF.keys()


def read_tables(path: Path) -> dict[str, pyarrow.Table]:
    """The tables in a file or a folder: part -> table, or `WHOLE` alone.

    Raises:
        DataError: if it cannot be read.
        InstallError: if pyarrow is not installed.
    """
    if path.is_file():
        return {WHOLE: _read(path)}
    if not path.is_dir():
        raise DataError(f"there is no data at {path}", "the file does not exist", "check the path")
    parts = {each.name: each for each in sorted(path.iterdir()) if each.is_dir() and each.name.lower() in PART_OF}
    found: dict[str, list[Path]] = {PART_OF[name.lower()]: _files(folder) for name, folder in parts.items()}
    for file in _files(path):
        found.setdefault(_part_of(file) or WHOLE, []).append(file)
    if WHOLE in found and len(found) > 1:
        raise DataError(
            f"cannot tell the part of {found[WHOLE][0].name} in {path}",
            f"other files are of {', '.join(sorted(found.keys() - {WHOLE}))}",
            "name it train, validation or test, or move it away",
        )
    if not any(found.values()):
        raise DataError(f"{path} holds no table", f"tables are {', '.join(SUFFIXES)} files", "check the path")
    return {part: joined([_read(file) for file in files], str(path)) for part, files in found.items() if files}


def _files(folder: Path) -> list[Path]:
    return sorted(each for each in folder.iterdir() if each.is_file() and is_table_file(each))


def _part_of(file: Path) -> str | None:
    """The part that a file's name says: `train.csv`, `test-00000-of-00002.parquet`."""
    return PART_OF.get(file.stem.lower().partition("-")[0])


def is_table_object(data: Any) -> bool:
    """Whether an object is a table of pandas, polars, Arrow or Hugging Face, or a dictionary of such by part."""
    if isinstance(data, Mapping) and data:
        return all(is_table_object(each) for each in data.values())
    return not isinstance(data, type) and any(
        (each.__module__.partition(".")[0], each.__name__)
        in (("pandas", "DataFrame"), ("polars", "DataFrame"), ("pyarrow", "Table"), ("datasets", "Dataset"))
        for each in type(data).__mro__
    )


def tables_of(data: Any) -> dict[str, pyarrow.Table]:
    """The tables in such objects: part -> table, or `WHOLE` alone.

    Raises:
        DataError: if one cannot be read.
        InstallError: if pyarrow is not installed.
    """
    if not isinstance(data, Mapping):
        return {WHOLE: _converted(data)}
    unknown = [name for name in data if str(name).lower() not in PART_OF]
    if unknown:
        raise DataError(f"cannot read the part {unknown[0]!r}", f"parts are {', '.join(PART_OF)}", "rename it")
    return {PART_OF[str(name).lower()]: _converted(each) for name, each in data.items()}


def _converted(data: Any) -> pyarrow.Table:
    import_arrow()
    import pyarrow

    kind = type(data).__module__.partition(".")[0]
    try:
        if isinstance(data, pyarrow.Table):
            return data
        if kind == "datasets":
            return data.with_format("arrow")[:]
        if kind == "polars":
            return data.to_arrow()
        return pyarrow.Table.from_pandas(data, preserve_index=False)
    except Exception as error:  # objects of other libraries may fail in any way
        raise DataError(
            f"cannot read the {type(data).__name__}",
            f"{type(error).__name__}: {error}",
            "give each column values of one kind",
        ) from error


def import_arrow() -> None:
    """Raise unless pyarrow is installed.

    Raises:
        InstallError: if it is not.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise InstallError(
            "cannot read tables",
            f"the package pyarrow is not installed: {error}",
            "run `pip install 'rushhour[tabular]'`",
        ) from error


def _read(file: Path) -> pyarrow.Table:
    import_arrow()
    import pyarrow
    from pyarrow import ipc, parquet

    try:
        if file.suffix.lower() == ".parquet":
            return parquet.read_table(file)
        if file.suffix.lower() == ".arrow":
            with pyarrow.memory_map(str(file)) as source:
                try:
                    return ipc.open_stream(source).read_all()
                except pyarrow.ArrowInvalid:
                    return ipc.open_file(source).read_all()
        return _read_text(file)
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise _not_utf8(file) from error
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if "UTF8" in str(error) or "utf-8" in str(error):
            raise _not_utf8(file) from error
        raise DataError(
            f"cannot read {file}", " ".join(str(error).split())[:300], "check that it is a whole file of that kind"
        ) from error


def _not_utf8(file: Path) -> DataError:
    fix = f"convert it: iconv -f WINDOWS-1252 -t UTF-8 {file.name}, or its own encoding"
    return DataError(f"cannot read {file}", "it is no text in UTF-8", fix)


def _read_text(file: Path) -> pyarrow.Table:
    import pyarrow
    from pyarrow import csv, types

    with file.open("rb") as opened:
        head = opened.read(_HEAD_BYTES)
    if not head.strip():
        raise DataError(f"cannot read {file}", "it is empty", "give a table with a line of column names")
    if b"\0" in head:
        raise DataError(f"cannot read {file}", "it is no text in UTF-8: it holds zero bytes", "save it as CSV in UTF-8")
    line = head.lstrip(b"\xef\xbb\xbf").splitlines()[0].decode("utf-8", "replace")
    delimiter = "\t" if file.suffix.lower() == ".tsv" else max(_DELIMITERS, key=line.count)
    forms = {
        "parse_options": csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        "convert_options": csv.ConvertOptions(
            null_values=_MISSING, strings_can_be_null=True, quoted_strings_can_be_null=True
        ),
    }
    try:
        table = csv.read_csv(file, **forms)
    except pyarrow.ArrowInvalid:  # one thread knows the number of the row at fault
        table = csv.read_csv(file, read_options=csv.ReadOptions(use_threads=False), **forms)
    _check_quotes(file, table)
    for place, field in enumerate(table.schema):
        if types.is_binary(field.type):
            raise _not_utf8(file)
        numbers = _localised(table.column(place), comma_splits=delimiter == ",")
        if numbers is not None:
            table = table.set_column(place, field.name, numbers)
    return table.rename_columns([name.strip() for name in table.column_names])


def _check_quotes(file: Path, table: pyarrow.Table) -> None:
    """Raise where a quote is opened and never closed: all rows after it are then one value of the last row.

    Raises:
        DataError: if so.
    """
    last = table.column(table.num_columns - 1)[-1].as_py() if table.num_rows else None
    if not isinstance(last, str) or "\n" not in last:
        return
    with file.open("rb") as opened:
        quotes = sum(block.count(b'"') for block in iter(lambda: opened.read(_HEAD_BYTES), b""))
    if quotes % 2:
        raise DataError(
            f"cannot read {file}",
            f"a quote is opened in its row {table.num_rows} and not closed",
            'close it, or write a quote within a value as ""',
        )


def _localised(column: pyarrow.ChunkedArray, *, comma_splits: bool) -> pyarrow.ChunkedArray | None:
    """A column of text whose values are all numbers as people write them: `1.234,5` or `1,234.5`; None of any other.

    Where only groups of three digits follow a comma, it is the sign of thousands in files whose columns are separated
    by commas, and the decimal sign in others: whoever writes `;` between columns needs the comma for that.
    """
    import pyarrow
    from pyarrow import compute, types

    if not (types.is_string(column.type) or types.is_large_string(column.type)) or column.null_count == len(column):
        return None

    def hold(pattern: str) -> pyarrow.BooleanScalar:
        return compute.match_substring_regex(column, f"^\\s*(?:{pattern})\\s*$")

    is_decimal = compute.all(hold(_DECIMAL_COMMA)).as_py()
    is_thousands = compute.all(hold(_DECIMAL_POINT)).as_py()
    if is_decimal and (not is_thousands or not comma_splits):
        plain = compute.replace_substring(compute.replace_substring(column, ".", ""), ",", ".")
    elif is_thousands:
        plain = compute.replace_substring(column, ",", "")
    else:
        return None
    return compute.utf8_trim_whitespace(plain).cast(pyarrow.float64())


def joined(tables: list[pyarrow.Table], where: str) -> pyarrow.Table:
    """Tables one below the other.

    Raises:
        DataError: if they differ in their columns.
    """
    import pyarrow

    try:
        return pyarrow.concat_tables(tables, promote_options="permissive") if len(tables) > 1 else tables[0]
    except pyarrow.ArrowException as error:
        raise DataError(f"the files of {where} differ in their columns", str(error), "make them alike") from error
