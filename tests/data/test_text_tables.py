"""Texts with labels: tables become tokens of the bundle's own tokenizer, and what cannot be used is named."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_texts import WORDS, ids, text_bundle, tokenizers

from rushhour.bundle import Source
from rushhour.compress.judge import outputs_of
from rushhour.data import Columns, Dataset, load
from rushhour.data.text_tables import load_text_table
from rushhour.engines import EngineConfig, Runner
from rushhour.errors import DataError
from rushhour.models import build
from rushhour.plan import EngineName
from rushhour.testing.bundles import tiny_text_answers

assert tokenizers


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    chance = np.random.default_rng(0)
    texts = [" ".join(chance.choice(WORDS, chance.integers(1, 12))) for _ in range(60)]
    return [{"text": text, "label": "abc"[len(text) % 3], "writer": str(at % 7)} for at, text in enumerate(texts)]


def lines(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def everything(data: Dataset) -> list[tuple[bytes, int]]:
    parts = (data.train, data.validation, data.test)
    return [(row.tobytes(), int(label)) for part in parts for row, label in zip(part.inputs, part.targets, strict=True)]


def test_lines_and_tables_give_the_same_tokens_of_the_bundles_tokenizer(
    tmp_path: Path, rows: list[dict[str, str]]
) -> None:
    bundle = text_bundle(tmp_path / "bundle")
    data = load(str(lines(tmp_path / "a.jsonl", rows)), bundle=bundle, columns=Columns(leave_out="writer"))
    assert data.task == bundle.manifest.task
    text = rows[0]["text"]
    found = next(
        row for row in data.train.inputs if row["tokens"][: len(text.split())].tolist() == ids(text)[0].tolist()
    )
    assert found["mask"].sum() >= len(text.split())
    pytest.importorskip("pyarrow", reason="extra tabular")
    table = tmp_path / "a.csv"
    table.write_text(
        "text,label,writer\n" + "".join(f'"{row["text"]}",{row["label"]},{row["writer"]}\n' for row in rows)
    )
    same = load(str(table), bundle=bundle, columns=Columns(leave_out="writer"))
    assert everything(same) == everything(data)


def test_a_group_is_in_one_part(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    bundle = text_bundle(tmp_path / "bundle")
    data = load_text_table(lines(tmp_path / "a.jsonl", rows), columns=Columns(group="writer"), bundle=bundle)
    seen = [set(part.groups.tolist()) for part in (data.train, data.validation, data.test) if part.groups is not None]
    assert len(seen) == 3
    assert sum(map(len, seen)) == 7


def test_a_group_that_is_missing_or_in_two_parts_is_refused(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    bundle = text_bundle(tmp_path / "bundle")
    missing: list[dict[str, object]] = [{**row} for row in rows]
    missing[3]["writer"] = None
    with pytest.raises(DataError, match=r"1 rows of a.jsonl have no group: row 4 has no 'writer'"):
        load_text_table(lines(tmp_path / "a.jsonl", missing), columns=Columns(group="writer"), bundle=bundle)
    pytest.importorskip("pyarrow", reason="extra tabular")
    for part, own in (("train", rows[:40]), ("test", rows[40:])):
        text = "".join(f'"{row["text"]}",{row["label"]},{row["writer"]}\n' for row in own)
        (tmp_path / "parts").mkdir(exist_ok=True)
        (tmp_path / "parts" / f"{part}.csv").write_text(f"text,label,writer\n{text}")
    with pytest.raises(DataError, match="7 groups of parts are in train and in test"):
        load_text_table(tmp_path / "parts", columns=Columns(group="writer"), bundle=bundle)


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_texts_are_judged_in_order_and_with_little_padding(
    tmp_path: Path, rows: list[dict[str, str]], engine: EngineName, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = [{**rows[0], "text": " ".join(WORDS * 3)}, *rows]
    bundle = text_bundle(tmp_path / "bundle")
    given = lines(tmp_path / "a.jsonl", long)
    part = load_text_table(given, columns=Columns(leave_out="writer"), bundle=bundle).train
    lengths: list[int] = []
    submit = Runner.submit

    def counted(runner: Runner, inputs: Mapping[str, NDArray[Any]]) -> Any:
        lengths.append(inputs["tokens"].shape[1])
        return submit(runner, inputs)

    monkeypatch.setattr(Runner, "submit", counted)
    found = outputs_of(bundle, EngineConfig(engine, "f32", max_batch=4), part)
    own = [row["tokens"][: int(row["mask"].sum())] for row in part.inputs]
    wanted = np.concatenate([tiny_text_answers(tokens[None])["scores"] for tokens in own])
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.median(lengths) <= 16 < part.inputs["tokens"].shape[1]


def test_later_texts_are_held_out(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    bundle, given = text_bundle(tmp_path / "bundle"), Columns(time="at", leave_out="writer")
    dated = [{**row, "at": f"2020-{1 + at // 10:02d}-01T00:00:00Z"} for at, row in enumerate(rows)]
    dated.reverse()
    data = load_text_table(lines(tmp_path / "a.jsonl", dated), columns=given, bundle=bundle)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [40, 10, 10], "equal times stay together"
    assert any("tested on the rest" in note and "2020-06" in note for note in data.notes)
    for value, said in (
        ("yesterday", "row 1 of a.jsonl has no time in 'at'"),
        ("2020-01-01", "cannot be split in time"),
    ):
        same = [{**row, "at": value} for row in rows]
        with pytest.raises(DataError, match=said):
            load_text_table(lines(tmp_path / "a.jsonl", same), columns=given, bundle=bundle)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text": ""}, "1 rows of a.jsonl have no text"),
        ({"text": " \t\u00a0"}, "1 rows of a.jsonl have no text"),
        ({"label": None}, "row 1 is the first, and a target is never guessed"),
        ({"text": 3}, "columns of text are none"),
        ({"text": "half \ud800"}, "row 1 of a.jsonl has a text that cannot be written in UTF-8"),
        ({"label": ["a", "b"]}, "row 1 of a.jsonl has a list in 'label'"),
    ],
)
def test_what_cannot_be_used_is_named(
    tmp_path: Path, rows: list[dict[str, str]], change: dict[str, object], said: str
) -> None:
    bad = [{name: row[name] for name in ("text", "label")} for row in rows]
    bad[0] |= change  # type: ignore[arg-type]
    with pytest.raises(DataError, match=said):
        load_text_table(lines(tmp_path / "a.jsonl", bad), bundle=text_bundle(tmp_path / "bundle"))


def test_columns_that_cannot_be_meant_are_named(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    bundle = text_bundle(tmp_path / "bundle")
    file = lines(tmp_path / "a.jsonl", [*rows, {"text": "the cat", "label": "a"}])
    with pytest.raises(DataError, match=r"1 rows of a.jsonl have no group: row 61"):
        load_text_table(file, columns=Columns(group="writer"), bundle=bundle)
    with pytest.raises(DataError, match=r"1 rows of b.jsonl have no value in 'label': row 1"):
        load_text_table(lines(tmp_path / "b.jsonl", [{"text": "a cat"}, *rows]), bundle=bundle)
    with pytest.raises(DataError, match=r"this one has none"):
        load(str(file))
    pytest.importorskip("pyarrow", reason="extra tabular")
    (tmp_path / "a.csv").write_text("text,text,label\n" + "the cat,the dog,a\n" * 20)
    with pytest.raises(DataError, match=r"a.csv has two columns 'text'"):
        load_text_table(tmp_path / "a.csv", bundle=bundle)


def test_files_that_are_no_lines_of_objects(tmp_path: Path) -> None:
    for content, said in (("{", "line 1 of .* is no JSON"), ("[1]", "line 1 of .* is no object"), ("\n", "is empty")):
        (tmp_path / "a.jsonl").write_text(content)
        with pytest.raises(DataError, match=said):
            load_text_table(tmp_path / "a.jsonl")


def test_a_classifier_adds_meaning_and_words_without_padding() -> None:
    sizes = {"vocabulary": 20, "hidden": 8, "layers": 1, "heads": 2, "intermediate": 16, "positions": 12}
    network = build(Source("rushhour.models:text_classifier", {"outputs": 3, **sizes})).eval()
    tokens = torch.tensor([[3, 5, 5, 0], [7, 2, 9, 4]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    words = network.words.weight
    expected = network.meaning(network.encoder(tokens, mask, 0 * tokens)) + torch.stack(
        [words[3] + 2 * words[5], words[[7, 2, 9, 4]].sum(dim=0)]
    )
    torch.testing.assert_close(network(tokens, mask, 0 * tokens), expected)
