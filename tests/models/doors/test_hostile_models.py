"""A hostile file through every door: one line, nothing of it is run, nothing is written."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from graphs import graph_of
from onnx import TensorProto, helper

import rushhour
from rushhour.errors import ModelError

node = helper.make_node
MEGABYTE = 2**20


class Payload:
    """Runs a command where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def typed(model: onnx.ModelProto) -> onnx.ModelProto:
    model.graph.output[0].type.CopyFrom(helper.make_tensor_type_proto(TensorProto.FLOAT, ["n", 4]))
    return model


def chain(length: int) -> onnx.ModelProto:
    names = ["x", *(f"t{index}" for index in range(length - 1)), "y"]
    return typed(graph_of([node("Neg", [given], [made]) for given, made in itertools.pairwise(names)]))


def cyclic() -> onnx.ModelProto:
    return typed(graph_of([node("Add", ["x", "b"], ["a"]), node("Neg", ["a"], ["b"]), node("Neg", ["b"], ["y"])]))


def outside() -> onnx.ModelProto:
    model = typed(graph_of([node("Add", ["x", "w"], ["y"])]))
    tensor = model.graph.initializer.add(name="w", data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../../../../../etc/passwd")
    return model


def archive(file: Path, content: dict[str, bytes]) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, data in content.items():
            opened.writestr(name, data)


def hostile_files(folder: Path, mark: Path) -> Iterator[tuple[str, str]]:
    """File -> what its refusal says."""
    pickled = pickle.dumps(Payload(mark))
    for name in ("model.joblib", "model.pkl", "no ending", "renamed.bin"):
        (folder / name).write_bytes(pickled)
        yield name, "it is a pickle"
    (folder / "pickle.onnx").write_bytes(pickled)
    yield "pickle.onnx", "no ONNX file"
    inside = {"net/archive_format": b"pt2", "net/data/sample_inputs/model.pt": pickled}
    archive(folder / "pickle.pt2", inside)
    yield "pickle.pt2", "can run code of the file"
    archive(folder / "old.pt2", {"serialized_exported_program.json": b"{}", "serialized_example_inputs.pt": pickled})
    yield "old.pt2", "can run code of the file"
    archive(folder / "bomb.pt2", {"net/archive_format": b"pt2", "net/data/weights/w": bytes(300 * MEGABYTE)})
    yield "bomb.pt2", "can run code of the file"
    archive(folder / "traversal.pt2", {f"../../{mark.name}": b"x", "net/archive_format": b"pt2"})
    yield "traversal.pt2", "can run code of the file"
    torch.save({"weights": Payload(mark)}, folder / "weights.pt")
    yield "weights.pt", "a pickle of torch.save"
    (folder / "cut.zip").write_bytes((folder / "pickle.pt2").read_bytes()[:-30])
    yield "cut.zip", "no model that can be read"
    for name, model, why in (
        ("cyclic.onnx", cyclic(), "sorted"),
        ("large.onnx", chain(10_000), "more than 8,000 operators"),
        ("outside.onnx", outside(), "outside of its folder"),
    ):
        onnx.save(model, folder / name)
        yield name, why


WATCHED = """
import json, pickle, sys
seen = []
def watch(event, details):
    if event in ("pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork"):
        seen.append(f"{event} {details}")
import rushhour
from rushhour.models.doors import DOORS
sys.addaudithook(watch)
answers = {}
for file in json.loads(sys.argv[1]):
    try:
        rushhour.import_model(file, out=sys.argv[2])
        answers[file] = "taken"
    except rushhour.RushhourError as error:
        answers[file] = str(error)
during = list(seen)
pickle.loads(pickle.dumps(len))  # the hook sees what it has to
print(json.dumps([answers, during, seen[len(during):]]))
"""


def test_hostile_files_are_refused_and_nothing_of_them_runs(tmp_path: Path) -> None:
    folder, mark, out = tmp_path / "files", tmp_path / "mark", tmp_path / "out"
    folder.mkdir()
    wanted = dict(hostile_files(folder, mark))
    before = sorted(tmp_path.rglob("*"))
    files = json.dumps([str(folder / name) for name in wanted])
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, files, str(out)], capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == 0, done.stderr
    answers, during, after = json.loads(done.stdout.splitlines()[-1])
    assert not during
    assert len(after) == 1
    for name, why in wanted.items():
        answer = answers[str(folder / name)]
        assert why in answer, (name, answer)
        assert "\n" not in answer
    assert not mark.exists()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("model", "why"), [(cyclic, "sorted"), (lambda: chain(10_000), "8,000"), (outside, "in a file")]
)
def test_hostile_objects_are_refused(model: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=why):
        rushhour.import_model(model(), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
