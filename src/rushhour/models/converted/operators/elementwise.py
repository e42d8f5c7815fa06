"""Operators that compute element by element, and the constants that go into the layer before."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from rushhour.models.converted.builder import Builder, Unsupported, Value, dtype_name, elements
from rushhour.models.converted.node import DTYPES, Node, scalar
from rushhour.models.converted.operators.layout import elementwise as on_sources
from rushhour.models.converted.operators.operator import Operator

_CHANNELS_FIRST: Final = ("Conv", "BatchNorm")


def unary(function: str) -> Operator:
    """A function of one tensor."""
    return lambda b, node: b.call(function, node.input(0))


def logical(function: str) -> Operator:
    """A function of two tensors of truth values, or of bits."""
    return lambda b, node: b.call(function, node.input(0), node.input(1))


def binary(function: str) -> Callable[[Builder, Node], Value]:
    """A function of two tensors that broadcast."""

    def operator(b: Builder, node: Node) -> Value:
        left, right = node.input(0), node.input(1)
        return b.call(function, _number(left, right), _number(right, left))

    return operator


def variadic(function: str) -> Operator:
    """A function of any number of tensors that broadcast."""
    return lambda b, node: b.call(function, [value for value in node.inputs if value is not None])


def arithmetic(function: str) -> Operator:
    """Sum, difference, product or quotient: with a constant for each channel it goes into the layer before."""
    plain = binary(function)

    def operator(b: Builder, node: Node) -> Value:
        for at in (0, 1):
            value, constant = node.input(at), node.input(1 - at)
            if constant.constant is not None and node.sole[at] and (at == 0 or function != "divide"):
                folded = _folded(b, function, value, constant, is_left=at == 0)
                if folded is not None:
                    return folded
        return plain(b, node)

    return operator


def _number(value: Value, other: Value) -> Any:
    """A constant of one element as a number, where that cannot change shape or type."""
    number = scalar(value)
    if number is None or other.ref is None or value.rank > other.rank or value.dtype != other.dtype:
        return value
    return number if not isinstance(number, float) or math.isfinite(number) else value


def _folded(b: Builder, function: str, value: Value, constant: Value, *, is_left: bool) -> Value | None:
    """The value, once the layer that gave it computes this operation too; None where it cannot."""
    found = b.sole_layer(value)
    if found is None or constant.constant is None or not constant.constant.is_floating_point():
        return None
    name, layer = found
    if not layer.kind.startswith(("Conv", "Linear", "BatchNorm", "LayerNorm")) or f"{name}.weight" not in b.state:
        return None
    axis = 1 if layer.kind.startswith(_CHANNELS_FIRST) else value.rank - 1
    width = value.shape[axis]
    if not isinstance(width, int):
        return None
    row = _per_channel(constant.constant, value.rank, axis, width)
    if row is None:
        return None
    factor, offset = torch.ones(width), torch.zeros(width)
    if function == "mul":
        factor = row
    elif function == "divide":
        factor = 1 / row
    elif function == "add":
        offset = row
    elif is_left:
        offset = -row
    else:
        factor, offset = -factor, row
    if not (factor.isfinite().all() and offset.isfinite().all()):
        return None
    weight, bias = b.state[f"{name}.weight"], b.state.get(f"{name}.bias")
    if bias is None and bool(offset.any()):
        b.with_bias(name)
        bias = torch.zeros(width)
    b.state[f"{name}.weight"] = weight * _along(factor, weight, layer.kind, layer.settings)
    if bias is not None:
        b.state[f"{name}.bias"] = bias * factor + offset
    b.changed(name)
    return value


def _per_channel(constant: Tensor, rank: int, axis: int, width: int) -> Tensor | None:
    """A constant as one number for each channel; None where it is more."""
    if constant.numel() == 1 and constant.dim() <= rank:
        return constant.reshape(1).expand(width).float()
    shape = (1,) * (rank - constant.dim()) + tuple(constant.shape)
    wanted = tuple(width if at == axis else 1 for at in range(rank))
    return constant.reshape(width).float() if shape == wanted else None


def _along(factor: Tensor, weight: Tensor, kind: str, settings: dict[str, Any]) -> Tensor:
    """One number for each output channel, so that it broadcasts with the weights of a layer."""
    if not kind.startswith("ConvTranspose"):
        return factor.reshape(-1, *[1] * (weight.dim() - 1))
    groups = settings.get("groups", 1)  # of shape (inputs, outputs / groups, ...)
    spread = factor.reshape(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1)
    return spread.reshape(weight.shape[0], -1, *[1] * (weight.dim() - 2))


def power(b: Builder, node: Node) -> Value:
    """Pow."""
    base, exponent = node.input(0), node.input(1)
    number = scalar(exponent)
    return b.call("power", base, exponent if number is None or base.is_known else float(number))


def modulo(b: Builder, node: Node) -> Value:
    """Mod."""
    return b.call("modulo", node.input(0), node.input(1), bool(node.attribute("fmod", 0)))


def clip(b: Builder, node: Node) -> Value:
    """Clip: constant bounds as numbers."""
    bounds: list[Any] = []
    for index in (1, 2):
        value = node.optional(index)
        number = scalar(value)
        bounds.append(value if number is None else number)
    return b.call("clip", node.input(0), *bounds)


def cast(b: Builder, node: Node) -> Value:
    """Cast and CastLike."""
    value = node.input(0)
    if node.op == "CastLike":
        dtype = node.input(1).dtype
    else:
        found = DTYPES.get(node.attribute("to", 1))
        if found is None:
            raise Unsupported("it converts to a type that torch does not have")
        dtype = found
    return cast_to(b, value, dtype)


def cast_to(b: Builder, value: Value, dtype: torch.dtype) -> Value:
    """A value in another type; an input of the network stays one."""
    if value.dtype == dtype:
        return value
    made = b.call("cast", value, dtype_name(dtype))
    made.input = value.input if not dtype.is_floating_point else ""
    return made


def dropout(b: Builder, node: Node) -> list[Value]:
    """Dropout, which is on in training."""
    ratio = scalar(node.optional(1))
    ratio = float(node.attribute("ratio", 0.5)) if ratio is None else float(ratio)
    value = node.input(0)
    if value.is_known or not 0 < ratio < 1:
        return [value]
    return b.layer("Dropout", {"p": ratio}, {}, [value], f"dropout_{node.label}")


def prelu(b: Builder, node: Node) -> Value:
    """PRelu: a layer where there is one slope, or one for each channel."""
    value, slope = node.input(0), node.input(1)
    if slope.constant is not None and slope.constant.is_floating_point() and value.rank >= 2:
        width = value.shape[1]
        row = _per_channel(slope.constant, value.rank, 1, width) if isinstance(width, int) else None
        if row is not None:
            count = 1 if elements(slope) == 1 else len(row)
            weight = Value(constant=row[:count].clone(), initializer=slope.initializer)
            return b.layer("PReLU", {"num_parameters": count}, {"weight": weight}, [value], f"prelu_{node.label}")[0]
    return b.call("prelu", value, slope)


def with_attributes(function: str, **defaults: Any) -> Operator:
    """A function of one tensor and of attributes, which have these defaults."""

    def operator(b: Builder, node: Node) -> Value:
        return b.call(function, node.input(0), *(node.attribute(name, default) for name, default in defaults.items()))

    return operator


def is_infinite(b: Builder, node: Node) -> Value:
    """IsInf."""
    ends = (bool(node.attribute(name, 1)) for name in ("detect_negative", "detect_positive"))
    return b.call("infinite", node.input(0), *ends)


def where(b: Builder, node: Node) -> Value:
    """Where."""
    return b.call("where", node.input(0), node.input(1), node.input(2))


def identity(b: Builder, node: Node) -> Value:
    """Identity."""
    return node.input(0)


_TABLE: Final[dict[str, Operator]] = {
    **{op: unary(op.lower()) for op in (
        "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Ceil", "Cos", "Cosh", "Erf", "Exp", "Floor", "IsNaN",
        "Log", "Mish", "Neg", "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign",
        "Sqrt", "Tan", "Tanh", "HardSwish",
    )},
    "Not": unary("logical_not"), "BitwiseNot": unary("bitwise_not"),
    "Add": arithmetic("add"), "Sub": arithmetic("sub"), "Mul": arithmetic("mul"), "Div": arithmetic("divide"),
    "Equal": binary("eq"), "Less": binary("lt"), "LessOrEqual": binary("le"), "Greater": binary("gt"),
    "GreaterOrEqual": binary("ge"),
    "And": logical("logical_and"), "Or": logical("logical_or"), "Xor": logical("logical_xor"),
    "BitwiseAnd": logical("bitwise_and"), "BitwiseOr": logical("bitwise_or"), "BitwiseXor": logical("bitwise_xor"),
    "Max": variadic("maximum"), "Min": variadic("minimum"), "Sum": variadic("total"), "Mean": variadic("average"),
    "Pow": power, "Mod": modulo, "Clip": clip, "Cast": cast, "CastLike": cast, "Dropout": dropout, "PRelu": prelu,
    "IsInf": is_infinite, "Where": where, "Identity": identity,
    "Celu": with_attributes("celu", alpha=1.0), "Elu": with_attributes("elu", alpha=1.0),
    "Gelu": with_attributes("gelu", approximate="none"),
    "HardSigmoid": with_attributes("hard_sigmoid", alpha=0.2, beta=0.5),
    "LeakyRelu": with_attributes("leaky_relu", alpha=0.01),
    "Selu": with_attributes("selu", alpha=1.67326319217681884765625, gamma=1.05070102214813232421875),
    "Shrink": with_attributes("shrink", bias=0.0, lambd=0.5),
    "ThresholdedRelu": with_attributes("thresholded_relu", alpha=1.0),
}  # fmt: skip

_OTHER: Final = {"Identity", "CastLike"}
OPERATORS: Final[dict[str, Operator]] = {
    op: operator if op in _OTHER else on_sources(operator) for op, operator in _TABLE.items()
}
"""Operator -> its conversion, for channels in either order."""
