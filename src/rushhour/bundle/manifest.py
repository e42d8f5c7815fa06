"""The manifest of a bundle, `bundle.json`: signature, task, preprocessing, lineage, metrics and hashes."""

from __future__ import annotations

import hashlib
import math
from functools import cached_property
from typing import Annotated, Any, Final, Literal

import msgspec
import numpy as np

from rushhour.measurement import Accuracy, Number
from rushhour.plan import Precision
from rushhour.task import Task

SCHEMA = 2
MODEL: Final = "model.onnx"
WEIGHTS: Final = "weights.safetensors"
SAMPLES: Final = "samples.safetensors"
ANSWERS: Final = "answers.safetensors"
MANIFEST: Final = "bundle.json"

_LARGEST_ROW = 2**31
_Size = Annotated[int, msgspec.Meta(ge=1, le=2**31)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=10**15)]

FileName = Literal["model.onnx", "weights.safetensors", "samples.safetensors", "answers.safetensors"]
README: Final = "README.md"
FILES: Final = (MANIFEST, MODEL, WEIGHTS, SAMPLES, ANSWERS, README)
"""All that may be in a bundle. The README is written from the manifest, and is no part of its hash."""
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
        shape: of one sample, without the batch dimension.
    """

    name: str
    dtype: DType
    shape: tuple[_Size, ...]

    def __post_init__(self) -> None:
        if self.row_bytes > _LARGEST_ROW:
            raise ValueError(f"`shape` {list(self.shape)} of {self.dtype} takes more than {_LARGEST_ROW // 2**30} GiB")

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one sample."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Signature(msgspec.Struct, frozen=True):
    """Inputs and outputs; every tensor has a batch dimension in front."""

    inputs: Annotated[tuple[TensorSpec, ...], msgspec.Meta(min_length=1)]
    outputs: Annotated[tuple[TensorSpec, ...], msgspec.Meta(min_length=1)]

    @property
    def picture(self) -> TensorSpec | None:
        """The only input, if it is a picture: uint8 `(height, width, channels)`, grey or in colour."""
        first = self.inputs[0]
        is_one = first.dtype == "uint8" and len(first.shape) == 3 and first.shape[2] in (1, 3)
        return first if is_one and len(self.inputs) == 1 else None


class Decoding(msgspec.Struct, frozen=True):
    """How an encoded picture becomes a sample, in training and in serving: see `rushhour.picture`.

    Size and colours follow from the sample. A bundle with other values cannot be opened.

    Attributes:
        orientation: the EXIF orientation is applied.
        fit: a picture of other proportions is stretched.
        resampling: with antialiasing.
        reducing_gap: a JPEG may be decoded at a reduced size that is at least so many times the sample's.
        alpha: the background of transparent pixels.
        deep: the value that becomes 255 in 16-bit grey: 4095 for a 12-bit camera.
        real: the same for floats: 1, 255, or as `deep`.
    """

    orientation: Literal["exif"] = "exif"
    fit: Literal["stretch"] = "stretch"
    resampling: Literal["bilinear"] = "bilinear"
    reducing_gap: Literal[2] = 2
    alpha: Literal["white"] = "white"
    deep: Annotated[int, msgspec.Meta(ge=1, le=65_535)] = 65_535
    real: Annotated[float, msgspec.Meta(gt=0, le=65_535)] = 1.0


class Preprocessing(msgspec.Struct, frozen=True):
    """The first operations of the graph on a sample: `(x * scale - mean) / std` per channel, then `layout`.

    Attributes:
        scale: 1/255 for pixels.
        mean: one value per channel, or empty for none.
        std: one value per channel, or empty for none.
        layout: `NHWC->NCHW` for images, `none` otherwise.
        decoding: before that, where the training data was encoded pictures; unset where it was arrays.
    """

    scale: Number = 1.0
    mean: tuple[Number, ...] = ()
    std: tuple[Annotated[float, msgspec.Meta(gt=0, le=1e30)], ...] = ()
    layout: Literal["NHWC->NCHW", "none"] = "none"
    decoding: Decoding | msgspec.UnsetType = msgspec.UNSET


class Reshape(msgspec.Struct, frozen=True):
    """How a compressed network differs from what its factory builds: layers split, then made narrower.

    Attributes:
        ranks: dense layer -> the width between the two layers that replace it; in the order of the splits.
        shapes: tensor of the network's state -> its shape, where it differs. Never larger than the factory's.
    """

    ranks: dict[str, _Size] = {}
    shapes: dict[str, tuple[_Size, ...]] = {}


class Source(msgspec.Struct, frozen=True):
    """The torch module that the weights belong to: `module:factory` and its keyword arguments.

    Attributes:
        reshape: what compression changed afterwards; unset where nothing.
    """

    factory: str
    arguments: dict[str, int | float | str | bool | tuple[int, ...]] = {}
    reshape: Reshape | msgspec.UnsetType = msgspec.UNSET


class Step(msgspec.Struct, frozen=True):
    """One step of a bundle's lineage: what was done (`train`, `quantize`), and with what."""

    what: str
    settings: dict[str, int | float | str | bool] = {}


class FileRecord(msgspec.Struct, frozen=True):
    """A file's size and SHA-256."""

    bytes: _Count
    sha256: str


class Manifest(msgspec.Struct, frozen=True):
    """The content of `bundle.json`. It contains no times, so equal work gives an equal hash.

    Attributes:
        precision: `int8` where the graph is quantised, `f32` otherwise (an engine may still compute it in bf16).
        parameters: number of weights of the network.
        metrics: split -> accuracy of the compiled artefact.
        tolerance: precision -> the largest deviation from the recorded outputs (`rushhour.records.answers.deviation`).
            Unset where no outputs are recorded.
        hash: SHA-256 over this manifest (with an empty `hash`), and by its file records over all content.
    """

    name: str
    signature: Signature
    task: Task
    preprocessing: Preprocessing = Preprocessing()
    source: Source | None = None
    precision: Precision = "f32"
    parameters: _Count = 0
    lineage: tuple[Step, ...] = ()
    metrics: dict[str, Accuracy] = {}
    files: dict[FileName, FileRecord] = {}
    hash: str = ""
    schema: Annotated[int, msgspec.Meta(ge=1)] = SCHEMA
    tolerance: dict[Precision, Annotated[float, msgspec.Meta(ge=0, le=1e6)]] | msgspec.UnsetType = msgspec.UNSET


class _SchemaOnly(msgspec.Struct):
    schema: Annotated[int, msgspec.Meta(ge=1)]


def schema_of(content: bytes) -> int:
    """The schema of a `bundle.json`, whatever else it holds."""
    return msgspec.json.decode(content, type=_SchemaOnly).schema


def encode_manifest(manifest: Manifest) -> bytes:
    """The content of `bundle.json`."""
    return msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=2) + b"\n"


def hash_of(manifest: Manifest) -> str:
    """The hash that a manifest gets: over all of it but `hash`."""
    unsealed = msgspec.structs.replace(manifest, hash="")
    return hashlib.sha256(msgspec.json.encode(unsealed, order="deterministic")).hexdigest()


def hash_as_written(content: dict[str, Any]) -> str:
    """The hash of a manifest as it is on disk: one of an older version has fewer fields than `Manifest`."""
    return hashlib.sha256(msgspec.json.encode(content | {"hash": ""})).hexdigest()
