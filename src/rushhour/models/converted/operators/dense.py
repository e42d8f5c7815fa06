"""Dense layers, embeddings, normalisations and recurrent layers; products of two tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from rushhour.models.converted.builder import Builder, Unsupported, Value
from rushhour.models.converted.node import Node, axis_of
from rushhour.models.converted.operators.operator import Operator

_GATES: Final = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
"""The order of torch's gates, in that of ONNX: iofc becomes ifco, zrh becomes rzh."""
_ACTIVATIONS: Final = {"LSTM": ["sigmoid", "tanh", "tanh"], "GRU": ["sigmoid", "tanh"]}


def matmul(b: Builder, node: Node) -> Value:
    """MatMul: a dense layer where the right side is a constant matrix."""
    left, right = node.input(0), node.input(1)
    if left.ref is not None and _is_matrix(right) and left.rank >= 2:
        return linear(b, node, left, _turned(right), None)
    return b.call("matmul", left, right)


def gemm(b: Builder, node: Node) -> Value:
    """Gemm: a dense layer where the right side is a constant matrix."""
    left, right, added = node.input(0), node.input(1), node.optional(2)
    alpha, beta = node.attribute("alpha", 1.0), node.attribute("beta", 1.0)
    if node.attribute("transA", 0):
        left = b.call("permute", left, [1, 0])
    is_turned = bool(node.attribute("transB", 0))
    if left.ref is not None and _is_matrix(right):
        weight = right if is_turned else _turned(right)
        assert weight.constant is not None
        bias = None if added is None or added.constant is None else _row(added, weight.constant.shape[0], beta)
        if added is None or bias is not None:
            weight = weight if alpha == 1.0 else Value(constant=weight.constant * alpha, no_weight=weight.no_weight)
            return linear(b, node, left, weight, bias)
    product = b.call("matmul", left, b.call("permute", right, [1, 0]) if is_turned else right)
    product = product if alpha == 1.0 else b.call("mul", product, alpha)
    if added is None:
        return product
    return b.call("add", product, added if beta == 1.0 else b.call("mul", added, beta))


def linear(b: Builder, node: Node, x: Value, weight: Value, bias: Value | None) -> Value:
    """A dense layer; its weight is `(outputs, inputs)`."""
    assert weight.constant is not None
    outputs, inputs = weight.constant.shape
    if x.flat is not None:
        channels, *sides = (x.flat.fixed(axis) for axis in range(1, x.flat.rank))
        columns = weight.constant.reshape(outputs, *sides, channels).movedim(-1, 1).flatten(1).contiguous()
        weight = Value(
            constant=columns,
            no_weight=weight.no_weight,
            initializer=f"{weight.initializer}.first" if weight.initializer else "",
        )
        x = b.call("flatten", x.flat, 1, -1)
    weights = {"weight": weight} | ({} if bias is None else {"bias": bias})
    settings = {"in_features": inputs, "out_features": outputs, "bias": bias is not None}
    return b.layer("Linear", settings, weights, [x], hint(weight, node))[0]


def hint(weight: Value, node: Node) -> str:
    """A name for a layer: that of its weight without its end, or that of the operator."""
    name = weight.initializer.removesuffix(".first").removesuffix(".T")
    base = name.removesuffix(".weight").removesuffix("/kernel").removesuffix("_W")
    return base if base != name and base else node.label.removeprefix("node_") or node.op


def _is_matrix(value: Value) -> bool:
    return value.constant is not None and value.constant.dim() == 2 and value.constant.is_floating_point()


def _turned(value: Value) -> Value:
    assert value.constant is not None
    return Value(
        constant=value.constant.T.contiguous(),
        no_weight=value.no_weight,
        initializer=f"{value.initializer}.T" if value.initializer else "",
    )


def _row(value: Value, width: int, factor: float) -> Value | None:
    """A constant that broadcasts over rows, as a bias; None where it does not."""
    constant = value.constant
    assert constant is not None
    if not (constant.numel() == 1 or constant.shape in ((width,), (1, width))):
        return None
    row = (constant.reshape(-1).expand(width) * factor).contiguous()
    return Value(constant=row, initializer=value.initializer if factor == 1.0 and constant.shape == (width,) else "")


def einsum(b: Builder, node: Node) -> Value:
    """Einsum."""
    return b.call("einsum", list(node.inputs), node.attribute("equation", ""))


def gather(b: Builder, node: Node) -> Value:
    """Gather: an embedding where computed indices choose rows of a weight."""
    data, indices = node.input(0), node.input(1)
    axis = axis_of(node.attribute("axis", 0), data.rank)
    index = indices.constant
    if index is None and indices.ref is not None and data.is_known and axis == 0:
        rows = data.fixed(0)
        if indices.input:
            b.limits[indices.input] = min(b.limits.get(indices.input, rows), rows)
        if _is_matrix(data) and data.initializer:
            assert data.constant is not None
            settings = {"num_embeddings": rows, "embedding_dim": data.constant.shape[1]}
            return b.layer("Embedding", settings, {"weight": data}, [indices], hint(data, node))[0]
    if index is not None:
        size = data.shape[axis]
        if isinstance(size, int):
            index = torch.where(index < 0, index + size, index)
        elif bool((index < 0).any()):
            raise Unsupported("it counts from the end of the batch")
        if index.dim() == 0:
            return b.call("pick", data, axis, int(index))
        return b.call("take", data, Value(constant=index), axis)
    return b.call("take", data, b.call("wrap", indices, data.shape[axis]), axis)


def gather_elements(b: Builder, node: Node) -> Value:
    """GatherElements."""
    data = node.input(0)
    axis = axis_of(node.attribute("axis", 0), data.rank)
    return b.call("take_elements", data, b.call("wrap", node.input(1), data.shape[axis]), axis)


def gather_nd(b: Builder, node: Node) -> Value:
    """GatherND."""
    return b.call("take_nd", node.input(0), node.input(1), node.attribute("batch_dims", 0))


def scatter_nd(b: Builder, node: Node) -> Value:
    """ScatterND."""
    how = node.attribute("reduction", "none")
    if how not in ("none", "add"):
        raise Unsupported(f"reduction {how}")
    return b.call("put_nd", node.input(0), node.input(1), node.input(2), how)


def scatter_elements(b: Builder, node: Node) -> Value:
    """ScatterElements."""
    data = node.input(0)
    axis = axis_of(node.attribute("axis", 0), data.rank)
    indices = b.call("wrap", node.input(1), data.shape[axis])
    return b.call("put_elements", data, indices, node.input(2), axis, node.attribute("reduction", "none"))


def batch_norm(b: Builder, node: Node) -> Value:
    """BatchNormalization."""
    if node.attribute("training_mode", 0):
        raise Unsupported("it was exported in training mode")
    x, rest = node.input(0), [node.input(index) for index in range(1, 5)]
    if any(value.constant is None for value in rest):
        rest[2:] = [dataclasses.replace(value, initializer="") for value in rest[2:]]  # statistics are not trained
        return b.call("batch_normalize", x, *rest, node.attribute("epsilon", 1e-5))
    names = ("weight", "bias", "running_mean", "running_var")
    tracked = Value(constant=torch.zeros((), dtype=torch.long))
    width = rest[0].fixed(0)
    # torch's momentum is the share of the new
    settings = {
        "num_features": width,
        "eps": node.attribute("epsilon", 1e-5),
        "momentum": 1 - node.attribute("momentum", 0.9),
    }
    kind = f"BatchNorm{max(1, x.rank - 2)}d"
    weights = dict(zip(names, rest, strict=True)) | {"num_batches_tracked": tracked}
    return b.layer(kind, settings, weights, [x], hint(rest[0], node))[0]


def instance_norm(b: Builder, node: Node) -> Value:
    """InstanceNormalization."""
    x, scale, bias = node.input(0), node.input(1), node.input(2)
    if scale.constant is None or bias.constant is None or not 3 <= x.rank <= 5:
        raise Unsupported("its scale is computed, or its input has not 3 to 5 axes")
    settings = {"num_features": scale.fixed(0), "eps": node.attribute("epsilon", 1e-5)}
    plain = not scale.initializer and not bias.initializer
    if plain and bool((scale.constant == 1).all()) and not bias.constant.any():  # as group normalisation is taken apart
        return b.layer(f"InstanceNorm{x.rank - 2}d", {**settings, "affine": False}, {}, [x], hint(scale, node))[0]
    weights = {"weight": scale, "bias": bias}
    return b.layer(f"InstanceNorm{x.rank - 2}d", {**settings, "affine": True}, weights, [x], hint(scale, node))[0]


def group_norm(b: Builder, node: Node) -> Value:
    """GroupNormalization; before opset 21 with one scale for each group."""
    x, scale, bias = node.input(0), node.input(1), node.input(2)
    if scale.constant is None or bias.constant is None:
        raise Unsupported("its scale is computed")
    groups, width = int(node.attribute("num_groups", 1)), x.fixed(1)
    weights = {"weight": scale, "bias": bias}
    if scale.fixed(0) != width:
        weights = {name: Value(constant=value.constant.repeat_interleave(width // groups))
                   for name, value in (("weight", scale), ("bias", bias)) if value.constant is not None}  # fmt: skip
    settings = {"num_groups": groups, "num_channels": width, "eps": node.attribute("epsilon", 1e-5)}
    return b.layer("GroupNorm", settings, weights, [x], hint(scale, node))[0]


def layer_norm(b: Builder, node: Node) -> Value:
    """LayerNormalization."""
    x, scale, bias = node.input(0), node.input(1), node.optional(2)
    if any(node.outputs[1:]):
        raise Unsupported("its mean is used too")
    axis = axis_of(node.attribute("axis", -1), x.rank)
    return normalized(b, node, x, axis, node.attribute("epsilon", 1e-5), scale, bias)


def normalized(
    b: Builder, node: Node, x: Value, axis: int, epsilon: float, scale: Value | None, bias: Value | None
) -> Value:
    """A LayerNorm over the axes from `axis` on."""
    shape = [x.fixed(at) for at in range(axis, x.rank)]
    weights: dict[str, Value] = {}
    for name, value in (("weight", scale), ("bias", bias)):
        if value is None:
            continue
        if value.constant is None:
            raise Unsupported("its scale is computed")
        whole = value if list(value.constant.shape) == shape else Value(constant=value.constant.expand(shape).clone())
        weights[name] = whole
    settings: dict[str, Any] = {"normalized_shape": shape, "eps": epsilon, "elementwise_affine": bool(weights)}
    if weights and "weight" not in weights:
        weights["weight"] = Value(constant=torch.ones(shape))
    settings["bias"] = "bias" in weights
    return b.layer("LayerNorm", settings, weights, [x], hint(scale or Value(), node))[0]


def lp_normalization(b: Builder, node: Node) -> Value:
    """LpNormalization."""
    x = node.input(0)
    return b.call("normalize", x, axis_of(node.attribute("axis", -1), x.rank), node.attribute("p", 2))


def local_response(b: Builder, node: Node) -> Value:
    """LRN, with windows of odd size, which are the same in torch."""
    size = int(node.attribute("size", 1))
    if size % 2 == 0:
        raise Unsupported(f"its windows have the even size {size}")
    numbers = (node.attribute(name, value) for name, value in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0)))
    return b.call("local_response", node.input(0), size, *numbers)


def recurrent(b: Builder, node: Node) -> Sequence[Value]:
    """LSTM, GRU and RNN."""
    _check_recurrent(node)
    x, own, carried, bias = node.input(0), node.input(1), node.input(2), node.optional(3)
    if own.constant is None or carried.constant is None or (bias is not None and bias.constant is None):
        raise Unsupported("its weights are computed")
    directions, hidden, inputs = own.fixed(0), carried.fixed(2), own.fixed(2)
    order = _GATES[node.op]
    weights: dict[str, Value] = {}
    for direction in range(directions):
        end = "_l0" + "_reverse" * direction
        parts: list[tuple[str, Tensor]] = [("weight_ih", own.constant), ("weight_hh", carried.constant)]
        if bias is not None and bias.constant is not None:
            first, second = bias.constant.chunk(2, 1)
            parts += [("bias_ih", first), ("bias_hh", second)]
        for name, whole in parts:
            gates = whole[direction].reshape(len(order), hidden, *whole.shape[2:])[list(order)]
            weights[f"cells.{name}{end}"] = Value(constant=gates.flatten(0, 1).contiguous())
    direction_name = node.attribute("direction", "forward")
    activations: list[str] = node.attribute("activations", ["Tanh"])
    settings = {
        "kind": node.op, "inputs": inputs, "hidden": hidden, "bidirectional": directions == 2,
        "bias": bias is not None, "backward": direction_name == "reverse",
        "activation": activations[0].lower() if node.op == "RNN" else "tanh",
    }  # fmt: skip
    steps = node.optional(4)
    if steps is not None and (not steps.is_known or {*b.ints(steps)} != {x.fixed(0)}):
        raise Unsupported("its samples have lengths of their own")
    states = [node.optional(5), node.optional(6) if node.op == "LSTM" else None]
    if node.op == "LSTM" and (states[0] is None) != (states[1] is None):
        raise Unsupported("it begins with one of two states")
    results = b.layer("Recurrent", settings, weights, [x, *states], node.label or node.op.lower())
    for value in results:
        value.layer = ""
    return results


def _check_recurrent(node: Node) -> None:
    """Raise unless torch has a layer that computes the same."""
    named: list[str] = node.attribute("activations", [])
    given = [each.lower() for each in named]
    directions = 2 if node.attribute("direction", "forward") == "bidirectional" else 1
    why = ""
    if node.op == "GRU" and not node.attribute("linear_before_reset", 0):
        why = "linear_before_reset=0, which torch's GRU does not have"
    elif (node.op in _ACTIVATIONS and given not in ([], _ACTIVATIONS[node.op] * directions)) or (
        node.op == "RNN" and (len(set(given)) > 1 or not set(given) <= {"tanh", "relu"})
    ):
        why = f"activations {', '.join(given)}"
    elif node.attribute("layout", 0) or node.attribute("input_forget", 0) or "clip" in node.attributes:
        why = "layout, input_forget or clip"
    elif node.optional(7) is not None:
        why = "peephole weights"
    if why:
        raise Unsupported(why)


OPERATORS: Final[dict[str, Operator]] = {
    "MatMul": matmul, "Gemm": gemm, "Einsum": einsum, "Gather": gather, "GatherElements": gather_elements,
    "GatherND": gather_nd, "ScatterND": scatter_nd, "ScatterElements": scatter_elements,
    "BatchNormalization": batch_norm, "InstanceNormalization": instance_norm, "GroupNormalization": group_norm,
    "LayerNormalization": layer_norm, "LpNormalization": lp_normalization, "LRN": local_response, "LSTM": recurrent,
    "GRU": recurrent, "RNN": recurrent,
}  # fmt: skip
"""Operator -> its conversion."""
