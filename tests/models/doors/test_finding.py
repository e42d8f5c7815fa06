"""A model is recognised by what it holds; a graph has to answer as its original does."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from graphs import answers as ort_answers
from graphs import graph_of
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import nn

import rushhour
from rushhour.api.importing import brought_of, imported_for
from rushhour.errors import ModelError
from rushhour.models.doors import DOORS, Arrival, Opening, bring, finding, verify_arrival
from rushhour.models.doors.onnx_graph import OnnxDoor
from rushhour.progress import Silent
from rushhour.task import Task
from rushhour.testing.bundles import tiny_bundle

node = helper.make_node


def model(*nodes: onnx.NodeProto, **constants: NDArray[Any]) -> onnx.ModelProto:
    made = graph_of(nodes or [node("Neg", ["x"], ["y"])], constants)
    made.graph.output[0].type.CopyFrom(helper.make_tensor_type_proto(TensorProto.FLOAT, ["n", 4]))
    return made


def test_a_file_is_recognised_by_what_it_holds(tmp_path: Path) -> None:
    for name in ("net.onnx", "net.bin", "NET.ONNX", "net"):
        onnx.save(model(), tmp_path / name)
        brought = bring(tmp_path / name)
        assert brought is not None
        assert isinstance(brought.door, OnnxDoor)
        assert brought.name == "net"
    for name, content in {"text": b"hello", "zip": b"PK\3\4", "empty": b"", "one": b"\x08"}.items():
        (tmp_path / name).write_bytes(content)
        assert bring(tmp_path / name) is None
    assert bring(tmp_path) is None
    assert bring(tmp_path / "missing") is None
    assert bring("mynet:build") is None
    assert bring("article") is None
    assert bring("no\0path") is None
    assert bring(print) is None
    assert bring(nn.Linear) is None  # a class is a factory


def test_what_no_door_takes_is_said_with_what_they_take(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"hello")
    with pytest.raises(ModelError, match=r"what it holds is no model.*give an ONNX file"):
        rushhour.import_model(tmp_path / "weights.bin", out=tmp_path / "out")
    with pytest.raises(ModelError, match="nothing of that name"):
        rushhour.import_model(tmp_path / "missing", out=tmp_path / "out")
    with pytest.raises(ModelError, match="no door takes a dict"):
        rushhour.import_model({}, out=tmp_path / "out")
    bundle = tiny_bundle(tmp_path / "bundle")
    with pytest.raises(ModelError, match="cannot import"):
        rushhour.import_model(bundle.path, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_door_says_what_it_takes() -> None:
    for door in DOORS:
        assert door.takes.startswith(("a ", "an "))
        assert isinstance(door.needs_example, bool)
        assert not door.recognises(object())


def test_code_of_a_file_runs_only_if_it_is_trusted(tmp_path: Path) -> None:
    opening = Opening("net", "net.pkl")
    with pytest.raises(ModelError, match=r"will not open net.pkl: it is a pickle; if .* use --trust net.pkl"):
        opening.require_trust("it is a pickle")
    Opening("net", "net.pkl", trusted=True).require_trust("it is a pickle")


def arrival(graph: onnx.ModelProto, change: float = 0.0, *, outputs: int = 1) -> Arrival:
    """A graph beside an original that answers as it does, or almost."""

    def answers(columns: Mapping[str, NDArray[Any]]) -> tuple[NDArray[Any], ...]:
        (answer,) = ort_answers(graph, columns)
        return (answer + change * np.abs(answer).max(),) * outputs

    return Arrival("fake", graph, "a fake", answers)


def test_a_graph_has_to_answer_as_its_original() -> None:
    real = {"x": np.ones((2, 4), np.float32)}
    assert verify_arrival(arrival(model()), "net", real) == 0
    off = verify_arrival(arrival(model(), 1e-4), "net")
    assert off is not None
    assert 5e-5 < off < 2e-4
    with pytest.raises(ModelError, match=r"at batch 1, inputs of normal distribution, they differ by 0.0"):
        verify_arrival(arrival(model(), 1e-2), "net")
    with pytest.raises(ModelError, match="1 outputs, and the original 2"):
        verify_arrival(arrival(model(), outputs=2), "net")
    assert verify_arrival(Arrival("onnx", model()), "net") is None


def test_an_original_that_answers_otherwise_in_company_is_found() -> None:
    """The graph is computed sample by sample, the original is not."""

    def mixing(columns: Mapping[str, NDArray[Any]]) -> tuple[NDArray[Any], ...]:
        return (-columns["x"] + columns["x"].mean(0) - columns["x"][:1],)

    with pytest.raises(ModelError, match="at batch 3"):
        verify_arrival(Arrival("fake", model(), "a fake", mixing), "net")


def test_a_graph_that_mixes_samples_is_refused(tmp_path: Path) -> None:
    mixing = model(
        node("ReduceMean", ["x", "axes"], ["m"], keepdims=1), node("Sub", ["x", "m"], ["y"]), axes=np.array([0])
    )
    with pytest.raises(ModelError, match="depends on the others of its batch"):
        verify_arrival(arrival(mixing), "net")
    with pytest.raises(ModelError, match="depends on the others of its batch"):
        rushhour.import_model(mixing, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_original_that_fails_is_one_line() -> None:
    def failing(columns: Mapping[str, NDArray[Any]]) -> tuple[NDArray[Any], ...]:
        raise ZeroDivisionError("no")

    with pytest.raises(ModelError, match="the original fails: ZeroDivisionError: no"):
        verify_arrival(Arrival("fake", model(), "a fake", failing), "net")


def test_an_onnx_object_becomes_a_bundle_and_stays_as_it_is(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    given = model(node("MatMul", ["x", "w"], ["y"]), w=weight)
    given.doc_string = "mine"
    before = given.SerializeToString()
    found = rushhour.import_model(given, out=tmp_path / "out", name="mine")
    assert given.SerializeToString() == before
    assert found.understood.format == "onnx"
    assert found.understood.file == "the ModelProto"
    assert not found.understood.why_untrainable
    assert found.bundle.manifest.name == "mine"
    tensor = given.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    tensor.ClearField("raw_data")
    with pytest.raises(ModelError, match="is in a file: load it with its weights"):
        rushhour.import_model(given, out=tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert torch.is_grad_enabled()


class Labelled:
    """A model that knows the names of its classes."""


class LabelledDoor:
    """Takes it."""

    takes, needs_example = "a labelled model", False

    def recognises(self, model: Any) -> bool:
        return isinstance(model, Labelled)

    def open(self, model: Any, opening: Opening) -> Arrival:
        weight = np.zeros((4, 4), np.float32)
        weight[:, 1] = 1
        graph = globals()["model"](node("MatMul", ["x", "w"], ["y"]), w=weight)
        task = Task.classification(("zebra", "bird", "cat", "dog"))
        return Arrival("labelled", graph, "labelled", task=task, task_from="its labels")


def test_labels_are_numbered_as_the_model_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "DOORS", (LabelledDoor(),))
    x = np.random.default_rng(0).random((60, 4)).astype(np.float32)
    y = np.where(x[:, 0] > 0.2, "bird", "cat")
    alone = rushhour.import_model(Labelled(), out=tmp_path / "alone").understood
    assert (alone.task.classes[0], alone.task_from) == ("zebra", "its labels")
    brought = brought_of(Labelled())
    assert brought is not None
    reading: dict[str, Any] = {"skip_corrupt": False, "size": None, "task": None}
    found, dataset = imported_for(brought, (x, y), tmp_path / "out", Silent(), **reading)
    assert found.bundle.manifest.task == dataset.task == alone.task
    assert set(dataset.train.targets.tolist()) == {1, 2}
    assert (dataset.train.targets == np.where(dataset.train.inputs[:, 0] > 0.2, 1, 2)).all()


def test_a_model_is_served_while_it_is_there(tmp_path: Path) -> None:
    weight = np.eye(4, dtype=np.float32)
    file = tmp_path / "net.onnx"
    onnx.save(model(node("MatMul", ["x", "w"], ["y"]), w=weight), file)
    for target in (file, onnx.load(file)):
        with rushhour.serve(target, http_port=0, grpc_port=None, model_name="mine") as server:
            assert server.model == "mine"
            assert server.is_running
            assert server._imported is not None
            folder = Path(server._imported.name)
            assert (folder / "bundle" / "bundle.json").is_file()
        assert not folder.exists()
    (tmp_path / "weights").write_bytes(b"hello")
    with pytest.raises(ModelError, match="no model that can be read"):
        rushhour.serve(tmp_path / "weights")


@pytest.mark.slow
def test_the_command_line_serves_a_model(tmp_path: Path) -> None:
    file = tmp_path / "net.onnx"
    onnx.save(model(node("MatMul", ["x", "w"], ["y"]), w=np.eye(4, dtype=np.float32)), file)
    command = [sys.executable, "-m", "rushhour", "serve", str(file), "--http-port=0", "--no-grpc", "--json", "up.json"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = next(each for each in process.stdout if "is served at" in each)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert line.startswith("net is served at http://127.0.0.1:")
    refused = subprocess.run([*command[:4], "no.onnx"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "nothing to serve at no.onnx" in refused.stderr
