"""Channels first: Keras and TensorFlow have channels last, and their exporters put a Transpose around each layer.

A value that is another with its channels moved to the end remembers the other. Operators that compute element by
element are applied to that one instead, and dense layers behind a Flatten get the columns of their weights in its
order. So Transposes between layers become unused, and pruning sees which channels belong together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rushhour.models.converted.builder import Builder, Value
from rushhour.models.converted.node import Node
from rushhour.models.converted.operators.operator import Operator


def turned(b: Builder, x: Value, axes: Sequence[int], *, alone: bool) -> Value:
    """A value with its axes in another order.

    Args:
        b: the program.
        x: the value.
        axes: their order.
        alone: whether nothing else uses `x`.
    """
    axes = list(axes)
    if x.source is not None:
        x, axes, alone = x.source, [_to_last(x.rank)[axis] for axis in axes], alone and x.source_alone
    if axes == list(range(x.rank)):
        x.layer = x.layer if alone else ""  # no constant may be put into the layer for one of its users
        return x
    made = b.call("permute", x, axes)
    if x.ref is not None and x.rank >= 3 and axes == _to_last(x.rank):
        made.source, made.source_alone = x, alone
    return made


def to_last(b: Builder, x: Value) -> Value:
    """A value with its channels at the end, which remembers it."""
    return turned(b, x, _to_last(x.rank), alone=True)


def flat(b: Builder, x: Value, source: Value) -> Value:
    """A value with all axes behind the batch as one, which remembers the channels-first value behind it."""
    made = b.call("flatten", x, 1, -1)
    made.flat = source
    return made


def axis_before(x: Value, axis: int) -> int:
    """Of a value with its channels at the end: the axis of its source that one of its axes is."""
    return _to_last(x.rank)[axis]


def elementwise(operator: Operator) -> Operator:
    """The operator, applied to the channels-first sources of its inputs where they have some."""

    def on_sources(b: Builder, node: Node) -> Value | Sequence[Value]:
        values = [value for value in node.inputs if value is not None]
        if len(values) == 1 and values[0].flat is not None:
            (result,) = _listed(operator(b, _with(node, {0: values[0].flat})))
            return flat(b, to_last(b, result), result)
        sources = _sources(node)
        if sources is None:
            return operator(b, node)
        return [to_last(b, result) for result in _listed(operator(b, _with(node, sources)))]

    return on_sources


def _sources(node: Node) -> dict[int, Value] | None:
    """What stands in place of each input; None where not all of them have a source or are constant."""
    ranks = {value.rank for value in node.inputs if value is not None and value.source is not None}
    if len(ranks) != 1:
        return None
    (rank,) = ranks
    found = {}
    for at, value in enumerate(node.inputs):
        if value is None:
            continue
        if value.source is not None:
            found[at] = value.source
        elif value.constant is not None and value.rank <= rank:
            wide = value.constant.reshape((1,) * (rank - value.rank) + tuple(value.constant.shape))
            back = [_to_last(rank).index(axis) for axis in range(rank)]
            name = f"{value.initializer}.first" if value.initializer else ""
            moved = wide.permute(back).contiguous() if value.constant.numel() > 1 else value.constant
            found[at] = Value(constant=moved, initializer=name)
        else:
            return None
    return found


def _with(node: Node, inputs: dict[int, Value]) -> Node:
    changed = tuple(inputs.get(at, value) for at, value in enumerate(node.inputs))
    sole = tuple(
        alone and (value is None or value.source is None or value.source_alone)
        for alone, value in zip(node.sole, node.inputs, strict=True)
    )
    return dataclasses.replace(node, inputs=changed, sole=sole)


def _listed(results: Value | Sequence[Value]) -> list[Value]:
    return [results] if isinstance(results, Value) else list(results)


def _to_last(rank: int) -> list[int]:
    return [0, *range(2, rank), 1]
