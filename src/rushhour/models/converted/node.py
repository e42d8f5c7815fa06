"""One operator of an ONNX graph, with the values that go into it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor

from rushhour.models.converted.builder import Builder, Size, Unsupported, Value

T = TypeVar("T")

DTYPES: Final[Mapping[int, torch.dtype]] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float32,
    TensorProto.BFLOAT16: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.BOOL: torch.bool,
    TensorProto.UINT8: torch.uint8,
    TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16,
    TensorProto.UINT16: torch.int32,
    TensorProto.INT32: torch.int32,
    TensorProto.UINT32: torch.int64,
    TensorProto.INT64: torch.int64,
    TensorProto.UINT64: torch.int64,
}
"""Types of ONNX -> torch. Half precision is trained in float32; torch computes little with wide unsigned integers."""


@dataclasses.dataclass(frozen=True)
class Node:
    """An operator.

    Attributes:
        op: its type.
        label: its name in the graph, or that of its first output.
        opset: the version of the standard operators.
        inputs: None where one is left out.
        outputs: names; empty where one is not used.
        attributes: name -> number, text, list or tensor.
        sole: for each input, whether nothing else uses it.
    """

    op: str
    label: str
    opset: int
    inputs: tuple[Value | None, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    sole: tuple[bool, ...]

    @classmethod
    def of(cls, proto: onnx.NodeProto, opset: int, value_of: Callable[[str], Value], uses: Mapping[str, int]) -> Node:
        """From the graph.

        Args:
            proto: the operator.
            opset: of the model.
            value_of: the value of a name.
            uses: name -> how often it is used.
        """
        return cls(
            proto.op_type,
            proto.name or next(iter(proto.output), ""),
            opset,
            tuple(value_of(name) if name else None for name in proto.input),
            tuple(proto.output),
            {attribute.name: _attribute(attribute) for attribute in proto.attribute},
            tuple(uses.get(name, 0) == 1 for name in proto.input),
        )

    def input(self, index: int) -> Value:
        """An input that must be there.

        Raises:
            Unsupported: if it is not.
        """
        value = self.optional(index)
        if value is None:
            raise Unsupported(f"its input {index} is missing")
        return value

    def optional(self, index: int) -> Value | None:
        """An input, or None."""
        return self.inputs[index] if index < len(self.inputs) else None

    def attribute(self, name: str, default: T) -> T:
        """An attribute, or what counts without it."""
        found: T = self.attributes.get(name, default)
        return found

    def ints(self, b: Builder, name: str, index: int) -> list[int | Size] | None:
        """Whole numbers from an attribute (older opsets) or an input; None where there are none."""
        if name in self.attributes:
            return list(self.attributes[name])
        value = self.optional(index)
        return None if value is None else b.ints(value)

    def fixed_ints(self, b: Builder, name: str, index: int) -> list[int] | None:
        """The same, where they must not depend on the batch."""
        found = self.ints(b, name, index)
        return None if found is None else [whole(each) for each in found]


def whole(size: int | Size) -> int:
    """A size that must not depend on the batch.

    Raises:
        Unsupported: if it does.
    """
    if isinstance(size, Size):
        raise Unsupported("an axis, a bound or a width depends on the batch")
    return size


def axis_of(axis: int, rank: int) -> int:
    """An axis counted from the front.

    Raises:
        Unsupported: if there is none.
    """
    if not -rank <= axis < max(rank, 1):
        raise Unsupported(f"its input has no axis {axis}")
    return axis % rank if rank else 0


def scalar(value: Value | None) -> Any:
    """The number in a constant of one element; None where it is none."""
    if value is None or value.constant is None or value.constant.numel() != 1:
        return None
    return value.constant.item()


def tensor_of(proto: TensorProto) -> Tensor:
    """A tensor of the file, in a type of `DTYPES`.

    Raises:
        Unsupported: if its type has none.
    """
    dtype = DTYPES.get(proto.data_type)
    if dtype is None:
        raise Unsupported(f"a tensor of {TensorProto.DataType.Name(proto.data_type)}")
    array = numpy_helper.to_array(proto)
    if proto.data_type in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
        array = array.astype(np.float32)
    elif proto.data_type in (TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64):
        array = array.astype(np.int64)
    return torch.from_numpy(np.array(array)).to(dtype)


def _attribute(attribute: onnx.AttributeProto) -> Any:
    if attribute.type == onnx.AttributeProto.TENSOR:
        return tensor_of(attribute.t)
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if attribute.type == onnx.AttributeProto.STRINGS:
        return [each.decode("utf-8", "replace") for each in value]
    return list(value) if attribute.type in (onnx.AttributeProto.INTS, onnx.AttributeProto.FLOATS) else value
