"""`Signature`: the tensors that a model takes and gives, and which of their dimensions a request chooses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from rushhour.task import Places

_LARGEST_ROW = 2**31
_MOST_OPEN = 8
_Size = Annotated[int, msgspec.Meta(ge=1, le=2**31)]
_Axis = Annotated[int, msgspec.Meta(ge=0, le=63)]

Sizes = tuple[int, ...]
"""The sizes of a signature's open dimensions, in its order; empty where it has none."""

DType = Literal[
    "bool",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "int8",
    "int16",
    "int32",
    "int64",
    "float16",
    "float32",
    "float64",
]


class TensorSpec(msgspec.Struct, frozen=True, dict=True):
    """A named tensor of a model.

    Attributes:
        shape: of one sample, without the batch dimension; the largest, where a dimension is open.
        below: of an input of whole numbers that the model looks up (tokens, categories): they are from 0 on and below
            this. Unset where any are taken. An engine fails on others, with the whole batch.
        places: of an output about places in the picture: a `map`, `(height, width)` or `(height, width, channels)`; or
            `boxes`, `(boxes, 6)` of x1, y1, x2, y2 in pixels of the sample, score and class. The server gives both in
            pixels of the picture as it was sent. Or of an output about the `tokens` of a sequence: a label for each,
            `(length,)`.
    """

    name: str
    dtype: DType
    shape: tuple[_Size, ...]
    below: Annotated[int, msgspec.Meta(ge=1, le=2**62)] | msgspec.UnsetType = msgspec.UNSET
    places: Places | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        if self.row_bytes > _LARGEST_ROW:
            raise ValueError(f"`shape` {list(self.shape)} of {self.dtype} takes more than {_LARGEST_ROW // 2**30} GiB")

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one sample; of the largest, where a dimension is open."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class OpenDimension(msgspec.Struct, frozen=True):
    """A dimension whose size every request chooses: the tokens of a text, the height of a picture.

    Attributes:
        name: for people.
        largest: size.
        axes: tensor -> the axis of its samples that is this dimension: all have the same size in a request. An output
            that has it has as many values as the inputs.
        smallest: size.
        padding: input -> the value behind the end of a sample in a batch of longer ones, for each input that has the
            dimension; chosen so that the answers do not change (a mask's is 0). Empty where no value does that: then
            only samples of the same size share a batch.
    """

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    largest: _Size
    axes: dict[str, _Axis]
    smallest: _Size = 1
    padding: dict[str, int | float] = {}

    def __post_init__(self) -> None:
        if self.smallest > self.largest:
            raise ValueError(f"`smallest` {self.smallest} of the dimension {self.name!r} is above {self.largest}")


class Signature(msgspec.Struct, frozen=True, dict=True):
    """Inputs and outputs; every tensor has a batch dimension in front.

    Attributes:
        open: further dimensions that are not fixed; unset where there are none.
    """

    inputs: Annotated[tuple[TensorSpec, ...], msgspec.Meta(min_length=1)]
    outputs: Annotated[tuple[TensorSpec, ...], msgspec.Meta(min_length=1)]
    open: Annotated[tuple[OpenDimension, ...], msgspec.Meta(max_length=_MOST_OPEN)] | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        if self.open is not msgspec.UNSET:
            _check_open(self)

    @property
    def dimensions(self) -> tuple[OpenDimension, ...]:
        """The open dimensions; empty where there are none."""
        return () if isinstance(self.open, msgspec.UnsetType) else self.open

    @cached_property
    def open_axes(self) -> dict[str, tuple[tuple[int, int], ...]]:
        """Tensor -> its open axes: the axis of a sample, and the dimension's position in `Sizes`; only of tensors that
        have some."""
        found: dict[str, list[tuple[int, int]]] = {}
        for position, dimension in enumerate(self.dimensions):
            for name, axis in dimension.axes.items():
                found.setdefault(name, []).append((axis, position))
        return {name: tuple(axes) for name, axes in found.items()}

    @property
    def padded(self) -> int | None:
        """The position of the dimension in which shorter samples are padded; None where there is none."""
        return next((position for position, each in enumerate(self.dimensions) if each.padding), None)

    def shape(self, spec: TensorSpec, sizes: Sizes) -> tuple[int, ...]:
        """The shape of one sample of a tensor, at these sizes."""
        shape = list(spec.shape)
        for axis, position in self.open_axes.get(spec.name, ()) if sizes else ():
            shape[axis] = sizes[position]
        return tuple(shape)

    def row_bytes(self, spec: TensorSpec, sizes: Sizes) -> int:
        """Bytes of one sample of a tensor, at these sizes."""
        if not sizes:
            return spec.row_bytes
        return math.prod(self.shape(spec, sizes)) * np.dtype(spec.dtype).itemsize

    def takes(self, spec: TensorSpec, shape: Sequence[int]) -> bool:
        """Whether a sample of this shape is one of a tensor's."""
        if len(shape) != len(spec.shape):
            return False
        wanted = list(spec.shape)
        for axis, position in self.open_axes.get(spec.name, ()):
            dimension = self.dimensions[position]
            if dimension.smallest <= shape[axis] <= dimension.largest:
                wanted[axis] = shape[axis]
        return list(shape) == wanted

    def declared(self, spec: TensorSpec) -> list[int]:
        """The shape of one sample as the protocol declares it: -1 for an open dimension."""
        shape = list(spec.shape)
        for axis, _ in self.open_axes.get(spec.name, ()):
            shape[axis] = -1
        return shape

    def described(self, spec: TensorSpec) -> str:
        """The shape of a tensor for people, -1 for the number of samples: `[-1, 1 to 128]`."""
        shape = list(map(str, spec.shape))
        for axis, position in self.open_axes.get(spec.name, ()):
            shape[axis] = f"{self.dimensions[position].smallest} to {shape[axis]}"
        return f"[{', '.join(['-1', *shape])}]"

    def sizes_of(self, samples: Mapping[str, NDArray[Any]]) -> Sizes:
        """The sizes of the open dimensions of whole arrays.

        Args:
            samples: input -> array of shape `(n, *shape)`; outputs are ignored.
        """
        names = [spec.name for spec in self.inputs]
        return tuple(
            next(samples[name].shape[1 + dimension.axes[name]] for name in names if name in dimension.axes)
            for dimension in self.dimensions
        )

    @property
    def boxes(self) -> tuple[str, ...]:
        """The names of the outputs that are boxes."""
        return tuple(spec.name for spec in self.outputs if spec.places == "boxes")

    @property
    def picture(self) -> TensorSpec | None:
        """The only input, if it is a picture of a fixed size: uint8 `(height, width, channels)`, grey or in colour."""
        first = self.inputs[0]
        is_one = first.dtype == "uint8" and len(first.shape) == 3 and first.shape[2] in (1, 3)
        return first if is_one and len(self.inputs) == 1 and not self.dimensions else None


def _check_open(signature: Signature) -> None:
    """Raise a `ValueError` unless the open dimensions fit the tensors."""
    specs = {spec.name: spec for spec in (*signature.inputs, *signature.outputs)}
    inputs = {spec.name for spec in signature.inputs}
    seen: set[tuple[str, int]] = set()
    for dimension in signature.dimensions:
        for name, axis in dimension.axes.items():
            shape = specs[name].shape if name in specs else ()
            if axis >= len(shape) or shape[axis] != dimension.largest or (name, axis) in seen:
                raise ValueError(
                    f"the axis {axis} of {name!r} is not the dimension {dimension.name!r} of up to {dimension.largest}"
                )
            seen.add((name, axis))
        having = inputs & dimension.axes.keys()
        if not having:
            raise ValueError(f"no input has the dimension {dimension.name!r}")
        if dimension.padding and dimension.padding.keys() != having:
            raise ValueError(f"`padding` of {dimension.name!r} names other inputs than {', '.join(sorted(having))}")
    if sum(bool(dimension.padding) for dimension in signature.dimensions) > 1:
        raise ValueError("more than one open dimension is padded")


def own_sizes(signature: Signature, samples: Mapping[str, NDArray[Any]]) -> list[Sizes]:
    """The sizes of each sample without the padding behind it.

    Args:
        signature: of the model.
        samples: input -> array of shape `(n, *shape)`, all padded to one size.
    """
    whole = signature.sizes_of(samples)
    count = len(next(iter(samples.values())))
    found = [list(whole) for _ in range(count)]
    position = signature.padded
    if position is not None:
        dimension = signature.dimensions[position]
        ends = np.full(count, dimension.smallest)
        for name, value in dimension.padding.items():
            array = np.moveaxis(samples[name], 1 + dimension.axes[name], 1)
            used = (array != value).reshape(count, array.shape[1], -1).any(axis=2)
            ends = np.maximum(ends, np.where(used.any(axis=1), used.shape[1] - used[:, ::-1].argmax(axis=1), 0))
        for sizes, end in zip(found, ends.tolist(), strict=True):
            sizes[position] = min(end, whole[position])
    return [tuple(sizes) for sizes in found]


def cut(signature: Signature, samples: Mapping[str, NDArray[Any]], sizes: Sizes) -> dict[str, NDArray[Any]]:
    """Arrays `(n, *shape)` without what is behind these sizes; inputs and outputs by name."""
    return {
        name: array[(slice(None), *_places(signature, name, array.ndim - 1, sizes))] for name, array in samples.items()
    }


def padded_to(signature: Signature, samples: Mapping[str, NDArray[Any]], sizes: Sizes) -> dict[str, NDArray[Any]]:
    """Inputs `(n, *shape)` of smaller sizes with the padding behind them, at these sizes."""
    found = {}
    for name, array in samples.items():
        shape = list(array.shape)
        fill: int | float = 0
        for axis, position in signature.open_axes.get(name, ()):
            shape[1 + axis] = sizes[position]
            fill = signature.dimensions[position].padding.get(name, fill)
        whole = np.full(shape, fill, array.dtype)
        whole[tuple(slice(size) for size in array.shape)] = array
        found[name] = whole
    return found


def _places(signature: Signature, name: str, axes: int, sizes: Sizes) -> list[slice]:
    places = [slice(None)] * axes
    for axis, position in signature.open_axes.get(name, ()) if sizes else ():
        places[axis] = slice(sizes[position])
    return places
