"""How a graph scales its input itself: layers such as Keras' Rescaling and Normalization at its beginning."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from rushhour.models.graph_answers import GraphAnswers

_ARITHMETIC: Final = ("Add", "Sub", "Mul", "Div")
_UNCHANGING: Final = ("Identity", "Cast")
_FLOAT: Final = onnx.TensorProto.FLOAT
_TOLERANCE: Final = 1e-4


def own_scaling(model: onnx.ModelProto, name: str) -> str:
    """What a graph of one input does first to each value alone, in words: `x * 0.00392157 - 1`.

    With it the network takes pixels as they are, and nothing has to scale them before.

    Args:
        model: checked.
        name: of it, for messages.

    Returns:
        Empty where it scales nothing, or not by constants alone.
    """
    held = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in held]
    if len(inputs) != 1 or inputs[0].type.tensor_type.elem_type != _FLOAT:
        return ""
    scaled = _last_scaled(model.graph, inputs[0].name)
    if scaled is None:
        return ""
    shape = [1, *(dimension.dim_value for dimension in inputs[0].type.tensor_type.shape.dim[1:])]
    run = GraphAnswers(model, name, [scaled])

    def at(x: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(run({inputs[0].name: x.astype(np.float32)})[0], np.float64)

    offset = at(np.zeros(shape))
    factor = at(np.ones(shape)) - offset
    x = np.random.default_rng(0).random(shape)
    linear = factor.shape == x.shape and np.allclose(at(x), factor * x + offset, rtol=_TOLERANCE, atol=_TOLERANCE)
    factors, offsets = _each_channel(factor), _each_channel(offset)
    if not linear or factors is None or offsets is None:
        return ""
    return _words(factors, offsets)


def _last_scaled(graph: onnx.GraphProto, name: str) -> str | None:
    """The last tensor that is the input after arithmetic with constants; None where there is none."""
    used = Counter(each for node in graph.node for each in node.input)
    dependent, at, found = {name}, name, None
    for node in graph.node:
        others = [each for each in node.input if each and each != at]
        if not dependent & set(node.input):
            continue
        is_next = at in node.input and used[at] - _measured(graph, at) == 1 and not dependent & set(others)
        dependent |= set(node.output)
        if is_next and node.op_type in (*_ARITHMETIC, *_UNCHANGING):
            found = node.output[0] if node.op_type in _ARITHMETIC else found
            at = node.output[0]
    return found


def _measured(graph: onnx.GraphProto, name: str) -> int:
    """How many operators ask for the shape of a tensor only."""
    return sum(node.op_type == "Shape" and name in node.input for node in graph.node)


def _each_channel(values: NDArray[Any]) -> NDArray[Any] | None:
    """One value, or one for each channel, first or last; None where they differ inside a channel."""
    if np.ptp(values) <= _TOLERANCE * np.abs(values).max():
        return values.reshape(-1)[:1]
    for axis in (-1, 1):
        wide: NDArray[Any] = np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis])
        if len(wide) > 1 and (np.ptp(wide, 0) <= _TOLERANCE * np.abs(wide).max()).all():
            return np.asarray(wide[0])
    return None


def _words(factors: NDArray[Any], offsets: NDArray[Any]) -> str:
    text = f"x * {_listed(factors)}"
    return text if not offsets.any() else f"{text} + {_listed(offsets)}"


def _listed(values: NDArray[Any]) -> str:
    shown = [f"{value:.6g}" for value in values]
    return shown[0] if len(shown) == 1 else f"[{', '.join(shown)}]"
