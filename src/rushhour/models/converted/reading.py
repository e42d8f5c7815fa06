"""An ONNX file from anywhere, read without trust: what is wrong with it is one line, before anything is computed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Final

import onnx
import onnx.inliner
from google.protobuf.message import DecodeError, EncodeError
from onnx import AttributeProto, TensorProto
from onnx.external_data_helper import load_external_data_for_tensor

from rushhour.errors import ModelError

MOST_NODES: Final = 8_000
"""Operators of a graph with its functions inlined. A transformer of 24 layers from torch's older exporter has 2,000."""
_LARGEST_BYTES: Final = 1_900_000_000
"""Of the file with its weights: protobuf is limited to 2 GiB."""
_BITS: Final = {TensorProto.UINT4: 4, TensorProto.INT4: 4, TensorProto.FLOAT4E2M1: 4, TensorProto.BOOL: 8}
_TYPED: Final = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")
_COMPLEX: Final = (TensorProto.COMPLEX64, TensorProto.COMPLEX128)


def read_onnx(file: Path) -> onnx.ModelProto:
    """The model of an ONNX file with its weights, checked, and with its functions inlined.

    Every tensor has as much data as its shape needs; weights in other files are read only from the file's own folder
    and below.

    Args:
        file: weights inside or beside it.

    Raises:
        ModelError: if it cannot be read, is damaged, or is larger than `MOST_NODES`.
    """
    try:
        size = file.stat().st_size
        if size > _LARGEST_BYTES:
            raise _Refused(f"it is larger than {_LARGEST_BYTES / 1e9:.1f} GB")
        model = onnx.ModelProto()
        model.ParseFromString(file.read_bytes())
        return _checked(model, file.absolute().parent, size)
    except DecodeError as error:
        raise _unreadable(file, "it is no ONNX file, or was cut short") from error
    except _Refused as error:
        raise _unreadable(file, str(error), error.fix) from error
    except OSError as error:
        raise _unreadable(file, error.strerror or str(error), "check the path, and that it may be read") from error


def checked_onnx(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """A model in memory, checked as one of a file; the given one is not changed.

    Args:
        model: with all its weights.
        name: for messages.

    Raises:
        ModelError: as `read_onnx`, and if its weights are in files, whose folder it does not know.
    """
    try:
        try:
            size = model.ByteSize()
        except (EncodeError, ValueError):  # protobuf counts up to 2 GiB
            size = _LARGEST_BYTES + 1
        if size > _LARGEST_BYTES:
            raise _Refused(f"it is larger than {_LARGEST_BYTES / 1e9:.1f} GB")
        copied = onnx.ModelProto()
        copied.CopyFrom(model)
        return _checked(copied, None, size)
    except _Refused as error:
        raise _unreadable(name, str(error), error.fix) from error


def _checked(model: onnx.ModelProto, folder: Path | None, size: int) -> onnx.ModelProto:
    """The model with its weights, and with its functions inlined."""
    try:
        if not model.HasField("graph"):
            raise _Refused("it has no graph")
        _check_versions(model)
        _check_count(model)
        _load_tensors(model, folder, size)
        onnx.checker.check_model(model)
        return onnx.inliner.inline_local_functions(model)
    except (_Refused, OSError):
        raise
    except Exception as error:  # onnx's checker and inliner raise errors of their own kinds
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise _Refused((lines or [type(error).__name__])[0]) from error


class _Refused(Exception):
    """Why a file is refused, and what to do."""

    def __init__(self, why: str, fix: str = "check that it is a whole ONNX model") -> None:
        super().__init__(why)
        self.fix = fix


def _unreadable(model: Path | str, why: str, fix: str = "check that it is a whole ONNX model") -> ModelError:
    return ModelError(f"cannot read the model {model}", why, fix)


def _check_versions(model: onnx.ModelProto) -> None:
    """Raise if it is newer than the library that reads it."""
    opset = max((each.version for each in model.opset_import if not each.domain), default=0)
    known = onnx.defs.onnx_opset_version()
    if opset > known:
        raise _Refused(f"its opset is {opset}, and up to {known} is known", f"export it with an opset up to {known}")
    if model.ir_version > onnx.IR_VERSION:
        raise _Refused(
            f"its format (IR) is of version {model.ir_version}, and up to {onnx.IR_VERSION} is known",
            "update the package onnx, or export it with an older one",
        )


def _check_count(model: onnx.ModelProto) -> None:
    """Raise if there are too many nodes once functions are inlined; functions may call each other."""
    functions = {(function.domain, function.name): function for function in model.functions}
    counts: dict[tuple[str, str], int] = {}

    def count(nodes: Any, within: frozenset[tuple[str, str]]) -> int:
        total = 0
        for node in _nodes(nodes):
            called = (node.domain, node.op_type)
            if called in within:
                raise _Refused(f"its function {node.op_type} calls itself")
            if called in functions and called not in counts:
                counts[called] = count(functions[called].node, within | {called})
            total += counts.get(called, 0) + 1
            if total > MOST_NODES:
                raise _Refused(f"it has more than {MOST_NODES:,} operators")
        return total

    count(model.graph.node, frozenset())


def _nodes(nodes: Any) -> Iterator[onnx.NodeProto]:
    """Nodes with those of the graphs inside them."""
    pending = list(nodes)
    while pending:
        node = pending.pop()
        yield node
        for attribute in node.attribute:
            for graph in _graphs(attribute):
                pending += graph.node


def _graphs(attribute: AttributeProto) -> list[onnx.GraphProto]:
    return [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def _tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """All tensors with values, wherever they are."""
    pending: list[Any] = [model.graph]
    nodes = [node for function in model.functions for node in function.node]
    while pending or nodes:
        if pending:
            graph = pending.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes += graph.node
            continue
        for attribute in nodes.pop().attribute:
            yield from (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors)
            pending += _graphs(attribute)


def _load_tensors(model: onnx.ModelProto, folder: Path | None, size: int) -> None:
    """Read the weights that are in other files, and raise unless every tensor has the data that its shape needs."""
    names = Counter(tensor.name for tensor in model.graph.initializer)
    for name, times in names.items():
        if times > 1:
            raise _Refused(f"it has {times} weights of the name {name}")
    for tensor in _tensors(model):
        wanted = _bytes_of(tensor)
        size += wanted
        if size > 2 * _LARGEST_BYTES:
            raise _Refused(f"its weights take more than {_LARGEST_BYTES / 1e9:.1f} GB")
        if tensor.data_location == TensorProto.EXTERNAL:
            if folder is None:
                raise _Refused(f"its tensor {tensor.name} is in a file: load it with its weights, or name the file")
            _check_place(tensor, folder, wanted)
            load_external_data_for_tensor(tensor, str(folder))
            tensor.data_location = TensorProto.DEFAULT
            del tensor.external_data[:]
        _check_data(tensor, wanted)


def _bytes_of(tensor: TensorProto) -> int:
    """Of the data of a tensor, by its type and shape."""
    if tensor.data_type == TensorProto.STRING:
        return 0
    if any(size < 0 for size in tensor.dims):
        raise _Refused(f"its tensor {tensor.name} has the shape {tuple(tensor.dims)}")
    try:
        bits = _BITS.get(tensor.data_type) or 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except KeyError:
        raise _Refused(f"its tensor {tensor.name} is of an unknown type") from None
    wanted: int = math.ceil(math.prod(tensor.dims) * bits / 8)
    if wanted > _LARGEST_BYTES:
        raise _Refused(f"its tensor {tensor.name} of the shape {tuple(tensor.dims)} takes {wanted / 1e9:,.1f} GB")
    return wanted


def _check_place(tensor: TensorProto, folder: Path, wanted: int) -> None:
    """Raise unless a tensor's data is in a plain file in the folder or below, inside its bounds."""
    where = {entry.key: entry.value for entry in tensor.external_data}
    name = where.get("location", "")
    place = PurePosixPath(name)
    file = folder / place
    outside = not name or place.is_absolute() or ".." in place.parts or "\\" in name or "\0" in name
    if outside or not file.resolve().is_relative_to(folder.resolve()):
        raise _Refused(f"its tensor {tensor.name} is in {name!r}, outside of its folder")
    if not file.is_file():
        raise _Refused(f"its weights are in {name}, which is missing")
    try:
        offset, length = int(where.get("offset", 0)), int(where.get("length", wanted))
    except ValueError:
        raise _Refused(f"where its tensor {tensor.name} is in {name} cannot be read") from None
    if offset < 0 or length != wanted or offset + length > file.stat().st_size:
        raise _Refused(f"its tensor {tensor.name} of the shape {tuple(tensor.dims)} is not whole in {name}")
    if "length" not in where:
        tensor.external_data.add(key="length", value=str(wanted))


def _check_data(tensor: TensorProto, wanted: int) -> None:
    """Raise unless a tensor has the data that its shape needs, raw or as numbers."""
    count = math.prod(tensor.dims)
    typed = sum(len(getattr(tensor, field)) for field in _TYPED)
    if tensor.HasField("raw_data") and not typed:
        held, needed = len(tensor.raw_data), wanted
    else:
        packed = _BITS.get(tensor.data_type) == 4
        needed = math.ceil(count / 2) if packed else count * (1 + (tensor.data_type in _COMPLEX))
        held = typed
    if held != needed or tensor.HasField("segment"):
        raise _Refused(f"its tensor {tensor.name} has not the data that its shape {tuple(tensor.dims)} needs")
