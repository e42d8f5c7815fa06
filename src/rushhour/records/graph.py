"""The nodes and the 8-bit constants of an ONNX file, read without the package onnx: a server need not have it.

Sources: onnx/onnx.proto (field numbers); protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rushhour.errors import BundleError
from rushhour.system.storage import explained

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
"""Wire types."""
_GRAPH: Final = 7
"""Of a ModelProto."""
_NODE, _INITIALIZER = 1, 5
"""Of a GraphProto."""
_INPUT, _OUTPUT, _OPERATOR = 1, 2, 4
"""Of a NodeProto."""
_DATA_TYPE, _INT32_DATA, _NAME, _RAW_DATA = 2, 5, 8, 9
"""Of a TensorProto."""
_DTYPES: Final = {2: np.dtype(np.uint8), 3: np.dtype(np.int8)}
"""Of a TensorProto's data type."""


class Node(NamedTuple):
    """An operator, and the names of its tensors."""

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Graph(NamedTuple):
    """What is read of a graph.

    Attributes:
        nodes: in the order of the file, which is one in which they can run.
        constants: initializers of 8 bits by their names: int8 or uint8, shape `(n,)`.
    """

    nodes: tuple[Node, ...]
    constants: dict[str, NDArray[Any]]


def read_graph(path: Path) -> Graph:
    """Read an ONNX file. Nodes inside of other nodes (of `If`, `Loop`) are left out.

    Raises:
        StorageError: if it cannot be read.
        BundleError: if it is no ONNX file.
    """
    with explained(f"read {path}"):
        content = memoryview(path.read_bytes())
    nodes: list[Node] = []
    constants: dict[str, NDArray[Any]] = {}
    try:
        for graph in _all(content, _GRAPH):
            for number, value in _fields(graph):
                if number == _NODE:
                    nodes.append(_node(_message(value)))
                elif number == _INITIALIZER:
                    constants |= _constant(_message(value))
    except (ValueError, IndexError) as error:
        raise BundleError(f"cannot read {path}", "it is no ONNX file", "restore it from its source") from error
    return Graph(tuple(nodes), constants)


def _node(message: memoryview) -> Node:
    (operator,) = _all(message, _OPERATOR)
    inputs, outputs = (tuple(_text(name) for name in _all(message, number)) for number in (_INPUT, _OUTPUT))
    return Node(_text(operator), inputs, outputs)


def _constant(message: memoryview) -> dict[str, NDArray[Any]]:
    """A tensor by its name; empty where it is not of 8 bits."""
    fields = list(_fields(message))
    dtype = next(
        (_DTYPES.get(value) for number, value in fields if number == _DATA_TYPE and isinstance(value, int)), None
    )
    name = next((_text(_message(value)) for number, value in fields if number == _NAME), "")
    if dtype is None:
        return {}
    raw = b"".join(_message(value) for number, value in fields if number == _RAW_DATA)
    if raw:
        return {name: np.frombuffer(raw, dtype)}
    values: list[int] = []
    for number, value in fields:
        if number == _INT32_DATA:
            values += [value] if isinstance(value, int) else _varints(value)
    return {name: np.array(values, np.uint64).astype(dtype)}  # negative ones are of 64 bits, and lose the upper


def _all(message: memoryview, wanted: int) -> Iterator[memoryview]:
    """The fields of one number that are bytes."""
    return (_message(value) for number, value in _fields(message) if number == wanted)


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number in place of bytes")
    return value


def _text(value: memoryview) -> str:
    return str(value, "utf-8")


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Numbers and values of a message's fields."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if kind == _BYTES:
            size, at = _varint(message, at)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"a field of the wire type {kind}")
        if at + size > len(message):
            raise ValueError("a field ends beyond its message")
        yield key >> 3, message[at : at + size]
        at += size


def _varints(packed: memoryview) -> list[int]:
    found, at = [], 0
    while at < len(packed):
        value, at = _varint(packed, at)
        found.append(value)
    return found


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """The number that begins at `at`, and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")
