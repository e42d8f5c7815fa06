"""Small ONNX graphs, and ONNX Runtime's answers to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Nodes = Sequence[onnx.NodeProto]
Shape = tuple[int | str, ...]


def graph_of(
    nodes: Nodes,
    constants: Mapping[str, NDArray[Any]] | None = None,
    *,
    shape: Shape = ("n", 4),
    inputs: Mapping[str, tuple[int, Shape]] | None = None,
    outputs: Sequence[str] = ("y",),
    opset: int = 18,
) -> onnx.ModelProto:
    """A model of these nodes; its input is `x`, of floats `(n, 4)` by default."""
    given = inputs or {"x": (TensorProto.FLOAT, shape)}
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info(name, kind, dims) for name, (kind, dims) in given.items()],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def answers(model: onnx.ModelProto, feed: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """ONNX Runtime's."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: list[NDArray[Any]] = session.run(None, dict(feed))
    return found
