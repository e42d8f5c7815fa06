"""The protocol's names of data types."""

from __future__ import annotations

from typing import Any

import numpy as np

from rushhour.bundle import TensorSpec

_DATATYPES = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
}
DTYPES = {datatype: dtype for dtype, datatype in _DATATYPES.items()}


def datatype_of(spec: TensorSpec) -> str:
    """The protocol's name of a tensor's type: `UINT8`, `FP32`, ..."""
    return _DATATYPES[spec.dtype]


def dtype_of(datatype: str) -> np.dtype[Any]:
    """The type behind the protocol's name of it. Raises a `KeyError` for one that is not known."""
    return np.dtype(DTYPES[datatype])
