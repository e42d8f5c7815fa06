"""A graph read without onnx is what onnx reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rushhour.errors import BundleError
from rushhour.records.graph import read_graph
from rushhour.testing.bundles import tiny_bundle


def same(path: Path) -> None:
    graph, read = onnx.load(path).graph, read_graph(path)
    assert [(node.op_type, tuple(node.input), tuple(node.output)) for node in graph.node] == list(read.nodes)
    eight = {
        tensor.name: tensor for tensor in graph.initializer if tensor.data_type in (TensorProto.INT8, TensorProto.UINT8)
    }
    assert set(eight) == set(read.constants)
    for name, tensor in eight.items():
        expected = numpy_helper.to_array(tensor).reshape(-1)
        assert read.constants[name].dtype == expected.dtype
        np.testing.assert_array_equal(read.constants[name], expected)


@pytest.mark.parametrize("precision", ["f32", "int8"])
def test_the_graph_of_a_bundle(tmp_path: Path, precision: str) -> None:
    same(tiny_bundle(tmp_path / "tiny", precision=precision).model)  # type: ignore[arg-type]


def test_both_ways_in_which_numbers_are_stored(tmp_path: Path) -> None:
    values = np.array([-128, -1, 0, 1, 127], np.int8)
    tensors = [
        helper.make_tensor("typed", TensorProto.INT8, [5], values.tolist()),
        helper.make_tensor("raw", TensorProto.INT8, [5], values.tobytes(), raw=True),
        helper.make_tensor("unsigned", TensorProto.UINT8, [2], [0, 255]),
        helper.make_tensor("wide", TensorProto.INT32, [2], [300, -300]),
        helper.make_tensor("none", TensorProto.INT8, [0], []),
    ]
    node = helper.make_node("Concat", ["typed", "raw"], ["y"], axis=0, name="joined")
    y = helper.make_tensor_value_info("y", TensorProto.INT8, [10])
    onnx.save(helper.make_model(helper.make_graph([node], "g", [], [y], tensors)), tmp_path / "g.onnx")
    same(tmp_path / "g.onnx")


@pytest.mark.parametrize(
    "content", [b"\x3a\x7f", b"\x3a\x02\x0a\x05", b"\xff" * 20, b"\x3b\x01", b"\x38\x01\x3a\x02\x08\x01"]
)
def test_what_is_no_onnx_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "g.onnx").write_bytes(content)
    with pytest.raises(BundleError, match="it is no ONNX file"):
        read_graph(tmp_path / "g.onnx")


def test_a_file_that_a_kill_cut_short_is_refused(tmp_path: Path) -> None:
    whole = tiny_bundle(tmp_path / "tiny").model.read_bytes()
    (tmp_path / "g.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BundleError):
        read_graph(tmp_path / "g.onnx")
