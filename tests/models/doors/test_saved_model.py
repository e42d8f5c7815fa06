"""A SavedModel: OpenVINO answers as TensorFlow does, and another Python makes the graph."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import rushhour
from rushhour.errors import InstallError, ModelError
from rushhour.models.converted import convert
from rushhour.models.doors import Opening, bring, verify_arrival
from rushhour.models.doors.saved_model import SavedModelDoor

FILES = Path(__file__).parents[2] / "files" / "keras-2"
SAVED = FILES / "exported"


def interpreter(folder: Path, graph: Path) -> Path:
    """A Python whose tf2onnx gives this graph."""
    made = folder / "python"
    made.write_text(
        f"#!{sys.executable}\n"
        "import shutil, sys\n"
        "assert sys.argv[1:4] == ['-m', 'tf2onnx.convert', '--saved-model'], sys.argv\n"
        f"shutil.copy({str(graph)!r}, sys.argv[sys.argv.index('--output') + 1])\n"
    )
    made.chmod(0o755)
    return made


def test_a_folder_becomes_a_graph_and_openvino_answers(tmp_path: Path) -> None:
    brought = bring(SAVED)
    assert brought is not None
    assert isinstance(brought.door, SavedModelDoor)
    arrival = brought.open(trusted=True, python=interpreter(tmp_path, FILES / "exported.onnx"))
    saved = np.load(FILES / "depthwise.npz")
    assert arrival.answers is not None
    (name,) = (value.name for value in arrival.graph.graph.input)
    np.testing.assert_allclose(arrival.answers({name: saved["x"]})[0], saved["y"], rtol=1e-4, atol=1e-5)
    found = verify_arrival(arrival, "net")
    assert found is not None
    assert found < 1e-5
    assert arrival.preprocessing_from == "the model scales its samples itself: x * 0.00784314 + -1"
    kinds = [layer.kind for layer in convert(arrival.graph, "net", logits=True).program.layers.values()]
    assert kinds == ["Conv2d"] * 4 + ["Linear"]


def test_a_graph_that_answers_otherwise_is_refused(tmp_path: Path) -> None:
    graph = onnx.load(FILES / "exported.onnx")
    weight = next(tensor for tensor in graph.graph.initializer if len(tensor.dims) == 4)
    values = onnx.numpy_helper.to_array(weight) * 1.1
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(graph, tmp_path / "other.onnx")
    with pytest.raises(ModelError, match="does not answer as the model does"):
        rushhour.import_model(
            SAVED, out=tmp_path / "out", tensorflow_python=interpreter(tmp_path, tmp_path / "other.onnx"),
            trust=str(SAVED),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_nothing_runs_without_trust(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\ntouch {ran}\n")
    python.chmod(0o755)
    with pytest.raises(ModelError, match=r"its operators can read and write files; if you trust it, use --trust"):
        SavedModelDoor().open(SAVED, Opening("net", str(SAVED), python=python))
    assert not ran.exists()


def test_what_is_missing_is_one_line(tmp_path: Path) -> None:
    door = SavedModelDoor()
    with pytest.raises(ModelError, match=r"without TensorFlow.*--tensorflow-python PYTHON --trust .*save it as .keras"):
        door.open(SAVED, Opening("net", str(SAVED)))
    with pytest.raises(InstallError, match=r"No module named 'tf2onnx'.*tf/bin/pip install tensorflow-cpu tf2onnx"):
        door.open(SAVED, Opening("net", str(SAVED), trusted=True, python=Path(sys.executable)))
    with pytest.raises(InstallError, match="cannot run"):
        door.open(SAVED, Opening("net", str(SAVED), trusted=True, python=tmp_path / "missing"))
    shutil.copytree(SAVED, tmp_path / "saved")
    (tmp_path / "saved" / "saved_model.pb").write_bytes(b"hello")
    with pytest.raises(ModelError, match="cannot read"):
        door.open(tmp_path / "saved", Opening("net", "saved", trusted=True, python=Path(sys.executable)))


@pytest.mark.slow
@pytest.mark.skipif("RUSHHOUR_TENSORFLOW_PYTHON" not in os.environ, reason="RUSHHOUR_TENSORFLOW_PYTHON names no Python")
def test_tensorflow_itself(tmp_path: Path) -> None:
    python = os.environ["RUSHHOUR_TENSORFLOW_PYTHON"]
    found = rushhour.import_model(SAVED, out=tmp_path / "out", tensorflow_python=python, trust=str(SAVED))
    assert not found.understood.why_untrainable
