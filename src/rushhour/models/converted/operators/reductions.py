"""Operators that reduce axes, or compute along one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from rushhour.models.converted.builder import Builder, Size, Unsupported, Value
from rushhour.models.converted.node import Node, axis_of, scalar
from rushhour.models.converted.operators.layout import axis_before, to_last
from rushhour.models.converted.operators.operator import Operator


def reduction(function: str, *more: Any) -> Operator:
    """A function that reduces axes: all of them where none is named."""

    def operator(b: Builder, node: Node) -> Value:
        x = node.input(0)
        axes = node.fixed_ints(b, "axes", 1)
        if not axes:
            if node.attribute("noop_with_empty_axes", 0):
                return x
            axes = list(range(x.rank))
        if not axes:
            return x
        chosen = sorted({axis_of(axis, x.rank) for axis in axes})
        keep = bool(node.attribute("keepdims", 1))
        if x.source is not None:
            before = sorted(axis_before(x, axis) for axis in chosen)
            if keep:
                return to_last(b, b.call(function, x.source, before, True, *more))
            if before == list(range(2, x.rank)):  # of each channel: what is left is in the same order
                return b.call(function, x.source, before, False, *more)
        return b.call(function, x, chosen, keep, *more)

    return operator


def arg_extreme(largest: bool) -> Operator:
    """ArgMax and ArgMin."""

    def operator(b: Builder, node: Node) -> Value:
        x = node.input(0)
        axis, keep = axis_of(node.attribute("axis", 0), x.rank), bool(node.attribute("keepdims", 1))
        return b.call("arg_extreme", x, axis, keep, largest, bool(node.attribute("select_last_index", 0)))

    return operator


def softmax(logarithm: bool) -> Operator:
    """Softmax and LogSoftmax; before opset 13 over all axes from one on."""

    def operator(b: Builder, node: Node) -> Value:
        x = node.input(0)
        axis = axis_of(node.attribute("axis", 1 if node.opset < 13 else -1), x.rank)
        if node.opset < 13 and any(size != 1 for size in x.shape[axis + 1 :]):
            return b.call("softmax_from", x, axis, logarithm)
        return b.call("log_softmax" if logarithm else "softmax", x, axis)

    return operator


def hard_max(b: Builder, node: Node) -> Value:
    """Hardmax from opset 13 on."""
    if node.opset < 13:
        raise Unsupported("before opset 13 it is over several axes")
    x = node.input(0)
    return b.call("hard_max", x, axis_of(node.attribute("axis", -1), x.rank))


def cumulative_sum(b: Builder, node: Node) -> Value:
    """CumSum."""
    x, axis = node.input(0), scalar(node.input(1))
    if axis is None:
        raise Unsupported("its axis is computed")
    ways = (bool(node.attribute(name, 0)) for name in ("exclusive", "reverse"))
    return b.call("cumulative_sum", x, axis_of(int(axis), x.rank), *ways)


def top_k(b: Builder, node: Node) -> Sequence[Value]:
    """TopK."""
    x = node.input(0)
    axis = axis_of(node.attribute("axis", -1), x.rank)
    (count,) = b.ints(node.input(1))
    if isinstance(count, Size):
        raise Unsupported("their number depends on the batch")
    ways = (bool(node.attribute(name, 1)) for name in ("largest", "sorted"))
    return b.call_several("top_k", x, count, axis, *ways)


OPERATORS: Final[dict[str, Operator]] = {
    "ReduceMean": reduction("reduce_mean"), "ReduceSum": reduction("reduce_sum"), "ReduceMax": reduction("reduce_max"),
    "ReduceMin": reduction("reduce_min"), "ReduceProd": reduction("reduce_prod"),
    "ReduceL1": reduction("reduce_norm", 1), "ReduceL2": reduction("reduce_norm", 2),
    "ReduceSumSquare": reduction("reduce_sum_square"),
    "ReduceLogSum": reduction("reduce_log_sum"), "ReduceLogSumExp": reduction("reduce_log_sum_exp"),
    "ArgMax": arg_extreme(True), "ArgMin": arg_extreme(False), "Softmax": softmax(False), "LogSoftmax": softmax(True),
    "Hardmax": hard_max, "CumSum": cumulative_sum, "TopK": top_k,
}  # fmt: skip
"""Operator -> its conversion."""
