"""The interface of a model: what its server declares, completed by the user where the server leaves something open."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from rushhour.bundle import DType, Signature, TensorSpec
from rushhour.errors import LoadError, WireError
from rushhour.wire import datatype_of, json_of

_DIGITS = re.compile("[0-9]{1,12}")
_DEFAULT_DATATYPE = "FP32"
"""Of an input whose datatype neither the server nor the user names."""
_NAMES = {dtype: datatype_of(TensorSpec("", dtype, ())) for dtype in get_args(DType)}
"""numpy's name of a type -> the protocol's."""
_VALUE_BYTES: dict[str, int] = {name: np.dtype(dtype).itemsize for dtype, name in _NAMES.items()} | {
    "BF16": 4,
    "BYTES": 64,
}
"""The datatypes that are known here, with the approximate size of one value in memory."""


class Shape(NamedTuple):
    """What a user states of an input; `datatype` may be empty."""

    sizes: tuple[int, ...]
    datatype: str = ""


class DeclaredInput(msgspec.Struct, frozen=True):
    """An input as the server declares it.

    Attributes:
        datatype: the protocol's name of its type; empty where the server names none.
        shape: of the whole tensor, -1 for an open size; None where the server names none. A model that takes several
            samples at once has an open size in front.
    """

    name: str
    datatype: str
    shape: tuple[int, ...] | None

    @property
    def takes_rows(self) -> bool:
        """Whether the first axis is the batch axis."""
        return self.shape is not None and self.shape[:1] == (-1,)

    def shaped(self, given: Shape) -> DeclaredInput:
        """With a user's shape: of one sample, or of the whole tensor if it has as many axes as the tensor."""
        whole = given.sizes
        if self.shape is None or (self.takes_rows and len(whole) != len(self.shape)):
            whole = (-1, *whole)
        return DeclaredInput(self.name, given.datatype or self.datatype or _DEFAULT_DATATYPE, whole)

    def whole(self, rows: int) -> tuple[int, ...] | None:
        """The shape of a request's tensor with `rows` samples; None where a size is open."""
        if self.shape is None:
            return None
        shape = (rows, *self.shape[1:]) if self.takes_rows else self.shape
        return None if -1 in shape else shape

    def fitted(self, array: NDArray[Any]) -> NDArray[Any] | None:
        """The array as the tensor of a request; a batch axis of size 1 is added or removed if that makes it fit. None
        where it does not fit."""
        for candidate in (array, array[None], array[0] if array.shape[:1] == (1,) else array):
            if self._fits(candidate.shape):
                return candidate
        return None

    def _fits(self, shape: tuple[int, ...]) -> bool:
        if self.shape is None:
            return len(shape) > 0
        return len(shape) == len(self.shape) and all(
            declared in (-1, size) for declared, size in zip(self.shape, shape, strict=True)
        )

    @property
    def is_known(self) -> bool:
        """Whether values of its datatype can be generated here."""
        return self.datatype in _VALUE_BYTES

    @property
    def value_bytes(self) -> int:
        """Approximate size of one value in memory."""
        return _VALUE_BYTES[self.datatype]

    def takes(self, dtype: np.dtype[Any]) -> bool:
        """Whether it accepts values of this type: bytes or text for BYTES, any float for BF16."""
        if self.datatype == "BYTES":
            return dtype.kind in "OSU"
        if self.datatype == "BF16":
            return dtype.kind == "f"
        return _NAMES.get(dtype.name) == self.datatype

    def typed(self, dtype: np.dtype[Any]) -> DeclaredInput:
        """With the datatype of these values, where the server names none."""
        if self.datatype:
            return self
        named = "BYTES" if dtype.kind in "OSU" else _NAMES.get(dtype.name, "")
        return DeclaredInput(self.name, named, self.shape)

    def __str__(self) -> str:
        named = next((dtype for dtype, name in _NAMES.items() if name == self.datatype), self.datatype or "any type")
        return f"{named} of shape {'any' if self.shape is None else list(self.shape)}"


class Interface(msgspec.Struct, frozen=True):
    """The inputs of a model, and the names of its outputs. Either may be empty: some servers declare nothing."""

    inputs: tuple[DeclaredInput, ...]
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, signature: Signature) -> Interface:
        """Of a bundle's model, as its server declares it."""
        declared = signature.declared
        inputs = (DeclaredInput(spec.name, datatype_of(spec), (-1, *declared(spec))) for spec in signature.inputs)
        return cls(tuple(inputs), tuple(spec.name for spec in signature.outputs))

    @classmethod
    def declared(cls, inputs: Sequence[tuple[str, str, Sequence[Any] | None]], outputs: Sequence[str]) -> Interface:
        """From names, datatypes and shapes; a size that is not a number above zero is open."""
        return cls(
            tuple(
                DeclaredInput(name, datatype.upper(), None if shape is None else tuple(map(_size, shape)))
                for name, datatype, shape in inputs
            ),
            tuple(outputs),
        )

    @classmethod
    def read(cls, metadata: bytes) -> Interface:
        """From the answer to GET v2/models/MODEL. A null counts as absent.

        Raises:
            WireError: if it is not valid metadata.
        """
        try:
            fields = msgspec.convert(json_of(metadata), type=_Metadata)
        except (msgspec.DecodeError, RecursionError) as error:
            what = "the model's metadata cannot be used"
            raise WireError(what, str(error), "check the URL and the server") from error
        inputs = [(each.name, each.datatype or "", each.shape) for each in fields.inputs or ()]
        return cls.declared(inputs, [each.name for each in fields.outputs or ()])

    def shaped(self, shapes: Mapping[str, Shape], model: str) -> Interface:
        """With a user's shapes of inputs. Where the server declares no input, the user's are the inputs.

        Raises:
            LoadError: if the model has other inputs.
        """
        known = {each.name: each for each in self.inputs} or {name: DeclaredInput(name, "", None) for name in shapes}
        for name in shapes:
            if name not in known:
                raise LoadError(
                    f"{model} has no input {name!r}", f"its inputs are {', '.join(known)}", "check the name in --shape"
                )
        inputs = (each.shaped(shapes[each.name]) if each.name in shapes else each for each in known.values())
        return Interface(tuple(inputs), self.outputs)


def read_shapes(texts: Sequence[str]) -> dict[str, Shape]:
    """Input name -> shape, from `NAME:3,224,224` or `NAME:FP32:3,224,224`. A name may hold colons.

    Raises:
        LoadError: if a text is not of that form, or a name occurs twice.
    """
    shapes: dict[str, Shape] = {}
    for text in texts:
        name, _, sizes = text.rpartition(":")
        before, _, last = name.rpartition(":")
        datatype = ""
        if before and last in _VALUE_BYTES:
            name, datatype = before, last
        numbers = sizes.split(",")
        if not name or name in shapes or not all(map(_DIGITS.fullmatch, numbers)):
            raise _bad_shape(text, "its input was named before" if name in shapes else "it is not NAME:SIZE,SIZE")
        given = Shape(tuple(map(int, numbers)), datatype)
        if not all(0 < size < 2**31 for size in given.sizes):
            raise _bad_shape(text, "a size is above zero")
        shapes[name] = given
    return shapes


def _bad_shape(text: str, why: str) -> LoadError:
    return LoadError(
        f"cannot use the shape {text!r}", why, "write for example --shape image:3,224,224 or image:FP32:3,224,224"
    )


class _Tensor(msgspec.Struct):
    name: str
    datatype: str | None = None
    shape: list[Any] | None = None


class _Metadata(msgspec.Struct):
    name: Any
    inputs: list[_Tensor] | None = None
    outputs: list[_Tensor] | None = None


def _size(size: object) -> int:
    """A declared size; -1 for an open one, which some servers write as 0, None or a word."""
    try:
        number = int(str(size))  # numbers as text are 64-bit ones that went through protobuf's JSON
    except ValueError:
        return -1
    return number if number > 0 else -1
