"""A graph with fewer outputs: what only the others needed is removed."""

from __future__ import annotations

from collections.abc import Sequence

import onnx


def keep_outputs(model: onnx.ModelProto, names: Sequence[str]) -> None:
    """Remove all outputs but these from a graph, in place, with the nodes and weights that they needed.

    Args:
        model: without graphs inside its nodes that use outer tensors by name.
        names: of outputs that it has.
    """
    graph = model.graph
    kept = [value for value in graph.output if value.name in names]
    needed, nodes = set(names), []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(name for name in node.input if name)
            nodes.append(node)
    weights = [tensor for tensor in graph.initializer if tensor.name in needed]
    for field, values in ((graph.output, kept), (graph.node, nodes[::-1]), (graph.initializer, weights)):
        copies = [type(value).FromString(value.SerializeToString()) for value in values]
        del field[:]
        field.extend(copies)
