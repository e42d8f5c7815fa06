"""Layers that exporters wrote as several operators: found at the last of these, whose values are all known by then.

The operators before it stay in the program only if something else uses them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Final

import onnx
import torch

from rushhour.models.converted.builder import Builder, Value
from rushhour.models.converted.node import Node, axis_of, scalar
from rushhour.models.converted.operators.dense import normalized

_LAST: Final = ("Div", "Mul", "Add")


@dataclasses.dataclass(frozen=True)
class Written:
    """The part of a graph that was converted already.

    Attributes:
        producer: name -> the operator that gave it, or None.
        value: name -> its value.
    """

    producer: Callable[[str], onnx.NodeProto | None]
    value: Callable[[str], Value]

    def behind(self, name: str, *ops: str) -> onnx.NodeProto | None:
        """The operator that gave a value, if it is one of these."""
        found = self.producer(name)
        return found if found is not None and found.op_type in ops else None

    def with_constant(self, name: str, op: str) -> tuple[str, Value] | None:
        """Of the sum or product of a value and a constant, which gave `name`, both."""
        node = self.behind(name, op)
        for at in (0, 1):
            if node is not None and len(node.input) == 2 and self.value(node.input[1 - at]).constant is not None:
                return node.input[at], self.value(node.input[1 - at])
        return None


def layer_norm(b: Builder, node: Node, proto: onnx.NodeProto, written: Written) -> Value | None:
    """The value of an operator that ends a LayerNorm over the last axis; None where it does not.

    As torch writes it: `d / sqrt(mean(d^2) + e)` with `d = x - mean(x)`, or times the reciprocal. As TensorFlow does:
    `x * i + (shift - mean(x) * i)` with `i = scale / sqrt(...)`. Scale and shift after torch's form are put into the
    layer as into any other.
    """
    if node.op not in _LAST or len(proto.input) != 2:
        return None
    if node.op == "Add":
        return _of_tensorflow(b, node, proto, written)
    for at in (0, 1) if node.op == "Mul" else (0,):
        centred, factor = proto.input[at], proto.input[1 - at]
        root = factor
        if node.op == "Mul":
            inverse = written.behind(factor, "Reciprocal")
            if inverse is None:
                continue
            root = inverse.input[0]
        found = _deviation(root, written)
        if found is not None and found[0] == centred:
            _, x, epsilon = found
            return _layer(b, node, written.value(x), epsilon, None, None)
    return None


def _layer(b: Builder, node: Node, x: Value, epsilon: float, scale: Value | None, shift: Value | None) -> Value:
    width = x.fixed(x.rank - 1)
    scale = scale or Value(constant=torch.ones(width))
    shift = shift or Value(constant=torch.zeros(width))
    return normalized(b, node, x, x.rank - 1, epsilon, scale, shift)


def _mean(name: str, written: Written) -> str | None:
    """Of what `name` is the mean over the last axis, which stays as 1."""
    node = written.behind(name, "ReduceMean")
    if node is None:
        return None
    attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
    axes = attributes.get("axes")
    if axes is None and len(node.input) > 1 and (given := written.value(node.input[1]).constant) is not None:
        axes = given.reshape(-1).tolist()
    value = written.value(node.input[0])
    is_last = axes is not None and [axis_of(int(axis), value.rank) for axis in axes] == [value.rank - 1]
    return node.input[0] if is_last and attributes.get("keepdims", 1) else None


def _deviation(name: str, written: Written) -> tuple[str, str, float] | None:
    """Of the root of a variance and a small number: the centred value, the value itself, and the small number."""
    root = written.behind(name, "Sqrt")
    summed = None if root is None else written.with_constant(root.input[0], "Add")
    if summed is None:
        return None
    squares, epsilon = _mean(summed[0], written), scalar(summed[1])
    square = None if squares is None else written.behind(squares, "Pow", "Mul")
    if square is None or not isinstance(epsilon, float):
        return None
    is_square = square.input[0] == square.input[1] if square.op_type == "Mul" else (
        scalar(written.value(square.input[1])) == 2
    )  # fmt: skip
    centred = written.behind(square.input[0], "Sub")
    if not is_square or centred is None or _mean(centred.input[1], written) != centred.input[0]:
        return None
    return square.input[0], centred.input[0], epsilon


def _of_tensorflow(b: Builder, node: Node, proto: onnx.NodeProto, written: Written) -> Value | None:
    for at in (0, 1):
        scaled, rest = written.behind(proto.input[at], "Mul"), written.behind(proto.input[1 - at], "Sub")
        if scaled is None or rest is None or (shift := written.value(rest.input[0])).constant is None:
            continue
        moved = written.behind(rest.input[1], "Mul")
        if moved is None:
            continue
        for factor in set(scaled.input) & set(moved.input):
            (x,) = [name for name in scaled.input if name != factor] or [""]
            (mean,) = [name for name in moved.input if name != factor] or [""]
            inverse = written.with_constant(factor, "Mul")
            root = None if inverse is None else written.behind(inverse[0], "Reciprocal")
            found = None if root is None else _deviation(root.input[0], written)
            if inverse is not None and found is not None and found[1] == x and _mean(mean, written) == x:
                width = written.value(x).fixed(written.value(x).rank - 1)
                rows = [None if each.constant is None or each.constant.numel() != width
                        else Value(constant=each.constant.reshape(width), initializer=each.initializer)
                        for each in (inverse[1], shift)]  # fmt: skip
                if None not in rows:
                    return _layer(b, node, written.value(x), found[2], *rows)
    return None
