"""Open dimensions of an ONNX graph: which tensors share them, their bounds, and whether samples can be padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray

from rushhour.bundle import OpenDimension, Signature, Sizes, cut, padded_to
from rushhour.errors import ModelError
from rushhour.models.graph_answers import GraphAnswers, gap

LARGEST: Final = 512
"""Of an open dimension, where nothing else is said."""
_TOLERANCE: Final = 1e-4
_SHORT, _MORE = 5, 4
"""Positions of a sample that is padded, and of its padding."""


def open_dimensions(
    graph: onnx.ModelProto, shown: str, *, longest: int | None = None, size: tuple[int, int] | None = None
) -> tuple[OpenDimension, ...]:
    """The dimensions of a graph's samples that have a name, or nothing, in place of a number; without padding.

    Args:
        graph: any.
        shown: names it in messages.
        longest: the largest size of each; 512 by default.
        size: the largest height and width, of a network whose samples have two open dimensions.

    Raises:
        ModelError: if an output has one that no input has, or a tensor has the same one twice.
    """
    held = {tensor.name for tensor in graph.graph.initializer}
    inputs = [value for value in graph.graph.input if value.name not in held]
    axes: dict[str, dict[str, int]] = {}
    for is_input, values in ((True, inputs), (False, list(graph.graph.output))):
        for value in values:
            for axis, dimension in enumerate(value.type.tensor_type.shape.dim[1:]):
                if dimension.dim_value > 0:
                    continue
                name = dimension.dim_param or f"{value.name}_{axis}"
                if name not in axes and not is_input:
                    raise ModelError(
                        f"cannot serve {shown}",
                        f"the dimension {axis + 1} of its output {value.name} is not fixed, and is none of its inputs'",
                        "export it with that dimension fixed, or named as the input's that it equals",
                    )
                if value.name in axes.setdefault(name, {}):
                    raise ModelError(
                        f"cannot serve {shown}",
                        f"its tensor {value.name} has the dimension {name} twice",
                        "export it with separate names, or with one of them fixed",
                    )
                axes[name][value.name] = axis
    largest = [longest or LARGEST] * len(axes)
    if size is not None and len(axes) == len(size):
        largest = list(size)
    return tuple(
        OpenDimension(name[:64], most, tensors) for (name, tensors), most in zip(axes.items(), largest, strict=True)
    )


def fix_sizes(graph: onnx.ModelProto, dimensions: Sequence[OpenDimension], sizes: Sizes) -> None:
    """Give the open dimensions of a graph's inputs and outputs these sizes, in place."""
    for value in (*graph.graph.input, *graph.graph.output):
        for dimension, size in zip(dimensions, sizes, strict=True):
            if value.name in dimension.axes:
                value.type.tensor_type.shape.dim[1 + dimension.axes[value.name]].dim_value = size


def padded(graph: GraphAnswers, signature: Signature, limits: Mapping[str, int]) -> Signature:
    """A signature whose open dimension is padded with zeros, where that is found not to change the answers.

    Args:
        graph: of the signature.
        signature: without padding.
        limits: input of whole numbers -> one more than the largest that it may hold.
    """
    if len(signature.dimensions) != 1:
        return signature
    (dimension,) = signature.dimensions
    names = {spec.name for spec in signature.inputs} & dimension.axes.keys()
    short = min(max(dimension.smallest, _SHORT), dimension.largest)
    more = min(short + _MORE, dimension.largest)
    filled = msgspec.structs.replace(dimension, padding=dict.fromkeys(sorted(names), 0))
    found = msgspec.structs.replace(signature, open=(filled,))
    if short == more:
        return signature
    sample = drawn(signature, (short,), limits)
    try:
        alone, behind = (_named(signature, graph(each)) for each in (sample, padded_to(found, sample, (more,))))
    except ModelError:
        return signature
    behind = cut(signature, behind, (short,))
    same = all(gap(behind[name], alone[name]) <= _TOLERANCE for name in alone)
    return found if same else signature


def drawn(signature: Signature, sizes: Sizes, limits: Mapping[str, int]) -> dict[str, NDArray[Any]]:
    """One seeded random sample of these sizes, without a value that is padding or masked."""
    random = np.random.default_rng(0)
    found: dict[str, NDArray[Any]] = {}
    for spec in signature.inputs:
        shape = (1, *signature.shape(spec, sizes))
        if np.dtype(spec.dtype).kind == "f":
            found[spec.name] = (random.random(shape) + 0.5).astype(spec.dtype)
        else:
            found[spec.name] = random.integers(1, max(2, limits.get(spec.name, 2)), shape).astype(spec.dtype)
    return found


def _named(signature: Signature, answers: list[NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {spec.name: np.asarray(array) for spec, array in zip(signature.outputs, answers, strict=True)}
