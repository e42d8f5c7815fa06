"""Tables as data: what each column is taken for, what is left out, and that nothing is guessed in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pyarrow")
import pyarrow
from pyarrow import ipc, parquet

from rushhour.api.inputs import load_data
from rushhour.data import Columns, Dataset, load
from rushhour.data.table_files import read_tables
from rushhour.errors import DataError
from rushhour.progress import Silent
from rushhour.testing.bundles import tiny_table_bundle

JOBS = ("clerk", "doctor", "writer")


def people(count: int = 400, seed: int = 0) -> dict[str, list[Any]]:
    """A careless table: gaps, a text, a constant, identifiers, dates."""
    random = np.random.default_rng(seed)
    age = random.integers(18, 80, count)
    job = random.integers(0, 3, count)
    return {
        "row": list(range(count)),
        "person_id": random.integers(1, 60, count).tolist(),
        "age": [None if at % 50 == 7 else int(each) for at, each in enumerate(age)],
        "height": random.normal(170, 10, count).round(4).tolist(),
        "job": [None if at % 80 == 9 else JOBS[each] for at, each in enumerate(job)],
        "member": [bool(each) for each in random.integers(0, 2, count)],
        "joined": [f"20{10 + at * 10 // count}-03-{1 + at % 28:02}" for at in range(count)],
        "note": [f"text {at}" for at in range(count)],
        "always": ["x"] * count,
        "liked": [int(each) for each in (age + 10 * job > 50)],
    }


def write_csv(path: Path, table: dict[str, list[Any]], delimiter: str = ",", encoding: str = "utf-8") -> Path:
    def shown(value: Any) -> str:
        return "" if value is None else str(value)

    lines = [delimiter.join(table), *(delimiter.join(map(shown, row)) for row in zip(*table.values(), strict=True))]
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return path


def columns_of(data: Dataset) -> dict[str, Any]:
    table: Any = data.preprocessing.table
    return {column.name: column for column in table.columns}


def test_columns_are_recognised(tmp_path: Path) -> None:
    data = load(str(write_csv(tmp_path / "people.csv", people())), columns=Columns(target="liked"))
    found = columns_of(data)
    kinds = {name: column.kind for name, column in found.items()}
    assert kinds == {
        "age": "number", "height": "number", "joined": "date",
        "person_id": "category", "job": "category", "member": "category",
    }  # fmt: skip
    assert found["member"].categories == ("false", "true")
    assert found["job"].categories == JOBS
    assert found["age"].optional
    assert found["job"].optional
    assert not found["height"].optional
    assert data.task.kind == "classification"
    notes = "\n".join(data.notes)
    for said in (
        "row (it numbers the rows)",
        "note (",
        "always (always the same)",
        "age 8 (median",
        "job 5 (unknown",
    ):
        assert said in notes, notes
    age = list(found).index("age")
    assert np.median(data.train.inputs[:, age]) == found["age"].fill
    assert data.preprocessing.std[3:] == (1.0, 1.0, 1.0)  # codes are not scaled
    assert data.preprocessing.std[0] > 5


@pytest.mark.parametrize("form", ["csv", "semicolons", "tsv", "bom", "parquet", "pandas", "folder", "arrow"])
def test_all_forms_of_a_table_are_the_same_data(tmp_path: Path, form: str) -> None:
    table = people()
    expected = load(str(write_csv(tmp_path / "people.csv", table)), columns=Columns(target="liked"))
    arrow = pyarrow.table(table)
    given: Any
    if form in ("csv", "semicolons", "tsv", "bom"):
        name, delimiter = ("a.tsv", "\t") if form == "tsv" else ("a.csv", ";" if form == "semicolons" else ",")
        given = write_csv(tmp_path / name, table, delimiter, "utf-8-sig" if form == "bom" else "utf-8")
    elif form == "parquet":
        given = tmp_path / "a.parquet"
        parquet.write_table(arrow, given)
    elif form == "pandas":
        pandas = pytest.importorskip("pandas")
        given = pandas.DataFrame(table)
        given["job"] = given["job"].astype("category")
        given["age"] = given["age"].astype("Int64")
    elif form == "folder":  # as Hugging Face's `save_to_disk` writes it
        given = tmp_path / "saved"
        given.mkdir()
        (given / "state.json").write_text("{}")
        with ipc.new_stream(given / "data-00000-of-00001.arrow", arrow.schema) as writer:
            writer.write_table(arrow)
    else:
        given = arrow
    found = load_data(given, Silent(), columns="liked")
    assert np.array_equal(found.train.inputs, expected.train.inputs)
    assert np.array_equal(found.test.targets, expected.test.targets)
    assert found.preprocessing == expected.preprocessing


def test_more_rows_move_no_row_to_another_part(tmp_path: Path) -> None:
    few, many = people(300), people(300)
    for name, more in people(200, seed=1).items():
        many[name] = [*many[name], *more]
    heights = []
    for table in (few, many):
        data = load(
            str(write_csv(tmp_path / "a.csv", table)), columns=Columns(target="liked", leave_out=("row", "note"))
        )
        place = list(columns_of(data)).index("height")
        heights.append({part: set(getattr(data, part).inputs[:, place].tolist()) for part in ("train", "test")})
    assert not heights[0]["test"] & (heights[1]["train"] - heights[0]["train"])
    assert heights[0]["test"] <= heights[1]["test"]


def test_groups_stay_together_and_time_goes_on(tmp_path: Path) -> None:
    file = str(write_csv(tmp_path / "a.csv", people()))
    data = load(file, columns=Columns(target="liked", group="person_id"))
    groups = [set(getattr(data, part).groups.tolist()) for part in ("train", "validation", "test")]
    assert len(set.union(*groups)) == sum(map(len, groups))
    assert "person_id" not in columns_of(data)
    data = load(file, columns=Columns(target="liked", time="joined", group="person_id", categories=("person_id",)))
    assert "person_id" in columns_of(data)
    assert data.test.groups is not None
    assert any("split in time" in note and "2018-" in note for note in data.notes)
    assert len(data.test) == pytest.approx(40, abs=15)


def test_parts_of_the_users_own(tmp_path: Path) -> None:
    for part, seed in (("train", 0), ("val", 1), ("test", 2)):
        write_csv(tmp_path / f"{part}.csv", people(100, seed))
    data = load(str(tmp_path), columns=Columns(target="liked", leave_out="note"))
    assert [len(each) for each in (data.train, data.validation, data.test)] == [100, 100, 100]
    (tmp_path / "val.csv").unlink()
    data = load(str(tmp_path), columns=Columns(target="liked"))
    assert len(data.test) == 100
    assert any("no validation part" in note for note in data.notes)
    with pytest.raises(DataError, match=r"groups of .* are in train and in test"):
        load(str(tmp_path), columns=Columns(target="liked", group="person_id"))
    write_csv(tmp_path / "more.csv", people(100))
    with pytest.raises(DataError, match=r"cannot tell the part of more.csv"):
        load(str(tmp_path), columns=Columns(target="liked"))


def test_a_table_for_a_bundle_has_its_columns_and_strange_categories_are_counted(tmp_path: Path) -> None:
    bundle = tiny_table_bundle(tmp_path / "bundle")
    table: dict[str, list[Any]] = {
        "age": [20 + at % 40 for at in range(60)],
        "joined": [f"2020-01-{1 + at % 28:02}" for at in range(60)],
        "job": ["doctor", "astronaut"] * 30,
        "zip": ["8010", "1010"] * 30,
    }

    def loaded(**changes: list[Any] | None) -> Dataset:
        columns = {name: values for name, values in (table | changes).items() if values is not None}
        return load(str(write_csv(tmp_path / "a.csv", columns)), bundle=bundle)

    data = loaded()
    assert any("categories that training does not have" in note and "job in " in note for note in data.notes)
    job = [column.name for column in bundle.manifest.table.columns].index("job")  # type: ignore[union-attr]
    assert {0.0} < set(np.unique(data.train.inputs[:, job]).tolist()), "0 is the code of what is unknown"
    with pytest.raises(DataError, match=r"a.csv has no column 'zip': the model was trained with it"):
        loaded(zip=None)
    with pytest.raises(DataError, match=r"the column 'age' of a.csv is a category: the model takes a number"):
        loaded(age=["old", "young"] * 30)


def test_equal_times_stay_in_one_part_and_all_equal_ones_cannot_be_split(tmp_path: Path) -> None:
    table = people(200)
    table["joined"] = [f"2020-{1 + at // 20:02}-01" for at in range(200)]
    data = load(str(write_csv(tmp_path / "a.csv", table)), columns=Columns(target="liked", time="joined"))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [160, 20, 20]
    table["joined"] = ["2020-01-01"] * 200
    with pytest.raises(DataError, match=r"a.csv cannot be split in time: too many samples have the same time"):
        load(str(write_csv(tmp_path / "a.csv", table)), columns=Columns(target="liked", time="joined"))


def test_several_targets_are_values_or_labels(tmp_path: Path) -> None:
    table = people()
    file = str(write_csv(tmp_path / "a.csv", table))
    data = load(file, columns=Columns(target=("height", "row")), kind="regression")
    assert (data.task.kind, data.task.outputs, data.preprocessing.table.targets) == (  # type: ignore[union-attr]
        "regression", 2, ("height", "row"),
    )  # fmt: skip
    data = load(file, columns=Columns(target=("member", "liked")))
    assert (data.task.kind, data.task.classes) == ("multilabel", ("member", "liked"))
    data = load(file, columns=Columns(target="job", leave_out="note")) if None not in table["job"] else data
    names = write_csv(tmp_path / "b.csv", {**table, "job": [each or "none" for each in table["job"]]})
    assert load(str(names), columns=Columns(target="job")).task.classes == ("clerk", "doctor", "none", "writer")


@pytest.mark.parametrize(
    ("change", "columns", "said"),
    [
        ({}, {}, "not clear which column of a.csv is to be predicted"),
        ({}, {"target": "likd"}, "no column 'likd'.*is it 'liked'"),
        ({}, {"target": "age"}, "8 of 400 rows of a.csv have no value in the target 'age': row 8 is the first"),
        ({"height": [1e39] * 400}, {"target": "liked", "leave_out": ("note",)}, ""),
        ({"height": ["inf"] + [1.0] * 399}, {"target": "liked"}, "'height' holds infinity: row 1"),
        ({}, {"target": "joined"}, "no number and no label"),
        ({}, {"target": "liked", "time": "job"}, "no time"),
        ({}, {"target": "liked", "group": "job"}, "5 rows of a.csv have no group: row 10"),
        ({}, {"target": "liked", "categories": ("liked",)}, "cannot be a target and something else"),
        ({}, {"target": "liked", "group": "liked"}, "cannot be a target and something else"),
        ({}, {"target": ("liked", "liked")}, "repeat a column"),
        ({}, {"target": "liked", "leave_out": tuple(name for name in people(1) if name != "liked")}, "no column that"),
    ],
)
def test_what_cannot_be_used_is_said(
    tmp_path: Path, change: dict[str, Any], columns: dict[str, Any], said: str
) -> None:
    file = write_csv(tmp_path / "a.csv", people() | change)
    if not said:  # a constant column is left out, whatever its value
        assert "height" not in columns_of(load(str(file), columns=Columns(**columns)))
        return
    with pytest.raises(DataError, match=said):
        load(str(file), columns=Columns(**columns))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"", "it is empty"),
        ("a.csv", b"a,b\n1,2,3\n", "cannot read"),
        ("a.csv", b"a,liked\n" + b"\xff\xfe1,2\n" * 20, "cannot read|no column"),
        ("a.csv", b"PK\x03\x04\0\0", "no text in UTF-8"),
        ("a.csv", b"a,a,liked\n" + b"1,2,0\n" * 20, "two columns 'a'"),
        ("a.csv", b"a,liked\n1,0\n2,1\n", "2 rows"),
        ("a.csv", b"a,liked\n", "a.csv has no rows"),
        ("a.csv", b"1,2,1,0\n" * 20, "two columns '1'.*its first line seems to be a row"),
        ("a.csv", b"a,liked\n" + b"1,0\n" * 9 + b"1,0,3\n", "Row #11"),
        ("a.csv", b"a,liked\n" + b"1,x\n" * 9 + b'1,"y\n' + b"1,x\n" * 9, "a quote is opened in its row 10"),
        ("a.parquet", b"PAR1 no", "cannot read"),
        ("a.arrow", b"\x80\x04pickle", "cannot read"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said) as raised:
        load(str(tmp_path / name), columns=Columns(target="liked"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("x;y\n1,5;a\n-2;b\n", [1.5, -2.0]),
        ("x;y\n1.234,5;a\n12;b\n", [1234.5, 12.0]),
        ("x;y\n1,234;a\n5,678;b\n", [1.234, 5.678]),
        ('x,y\n"1,234",a\n"12,345.5",b\n', [1234.0, 12345.5]),
        ('x,y\n"1,5",a\n"2,25",b\n', [1.5, 2.25]),
    ],
    ids=["decimal comma", "with thousands", "three decimals", "thousands", "quoted decimal comma"],
)
def test_numbers_as_people_write_them(tmp_path: Path, text: str, numbers: list[float]) -> None:
    (tmp_path / "t.csv").write_text(text)
    table = read_tables(tmp_path / "t.csv")["whole"]
    assert table.column("x").to_pylist() == numbers
    assert table.column("y").to_pylist() == ["a", "b"]


@pytest.mark.parametrize("text", ["x;y\n1;a\n2;b\n3;\u00f6\n", "Gr\u00f6\u00dfe;y\n1;2\n"])
def test_another_encoding_than_utf8_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.csv").write_bytes(text.encode("cp1252"))
    with pytest.raises(DataError, match="no text in UTF-8; convert it: iconv"):
        read_tables(tmp_path / "t.csv")


def test_a_typing_error_in_a_column_of_numbers_is_named(tmp_path: Path) -> None:
    table = people()
    table["height"] = ["n.a.", *table["height"][1:]]
    table["seen"] = [f"{1 + row % 28:02d}/{1 + row % 12:02d}/2026" for row in range(len(table["height"]))]
    notes = " ".join(load(str(write_csv(tmp_path / "a.csv", table)), columns=Columns(target="liked")).notes)
    assert "height holds numbers but for 1 values, such as 'n.a.' in row 1" in notes
    assert "seen holds dates such as '01/01/2026': dates are read as 2026-12-31" in notes


def test_keys_of_a_database_stay_apart(tmp_path: Path) -> None:
    rows = 60
    table = {"x": list(range(0, 2 * rows, 2)), "key": [2**60 + row % 2 for row in range(rows)]}
    table["kind"] = [2**60 + row % 3 for row in range(rows)]
    data = load(str(write_csv(tmp_path / "a.csv", table)), columns=Columns(target="kind"))
    assert data.task.classes == tuple(str(2**60 + kind) for kind in range(3))
    assert data.preprocessing.table is not None
    (key,) = [column for column in data.preprocessing.table.columns if column.name == "key"]
    assert key.categories == (str(2**60), str(2**60 + 1))


def test_columns_are_for_tables_alone(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no columns"):
        load("fashion-mnist", columns=Columns(target="liked"))
    with pytest.raises(DataError, match="cannot name columns of arrays"):
        load_data((np.zeros((20, 3)), np.zeros(20)), Silent(), columns="liked")
    with pytest.raises(DataError, match="cannot use"):
        Columns.read({"goal": "liked"})
