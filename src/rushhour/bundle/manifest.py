"""The manifest of a bundle, `bundle.json`: signature, task, preprocessing, lineage, metrics and hashes."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Final, Literal

import msgspec

from rushhour.bundle.signature import Signature
from rushhour.bundle.table import Table
from rushhour.bundle.tiling import Tiling
from rushhour.measurement import Accuracy, Number
from rushhour.plan import Precision
from rushhour.task import Task

SCHEMA = 3
_OLDER = 2
"""The schema of a bundle without open dimensions, tokenizer, tiles and table, which earlier versions can open too."""
MODEL: Final = "model.onnx"
WEIGHTS: Final = "weights.safetensors"
SAMPLES: Final = "samples.safetensors"
ANSWERS: Final = "answers.safetensors"
TOKENIZER: Final = "tokenizer.json"
MANIFEST: Final = "bundle.json"

_Size = Annotated[int, msgspec.Meta(ge=1, le=2**31)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=10**15)]

FileName = Literal["model.onnx", "weights.safetensors", "samples.safetensors", "answers.safetensors", "tokenizer.json"]
README: Final = "README.md"
FILES: Final = (MANIFEST, MODEL, WEIGHTS, SAMPLES, ANSWERS, TOKENIZER, README)
"""All that may be in a bundle. The README is written from the manifest, and is no part of its hash."""


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
        tiles: how a picture larger than a sample is cut, and how the answers become one; unset where every picture is
            brought to the size of a sample.
        table: before all of that, how a row of named values becomes numbers; unset where samples are no rows.
    """

    scale: Number = 1.0
    mean: tuple[Number, ...] = ()
    std: tuple[Annotated[float, msgspec.Meta(gt=0, le=1e30)], ...] = ()
    layout: Literal["NHWC->NCHW", "none"] = "none"
    decoding: Decoding | msgspec.UnsetType = msgspec.UNSET
    tiles: Tiling | msgspec.UnsetType = msgspec.UNSET
    table: Table | msgspec.UnsetType = msgspec.UNSET


class Text(msgspec.Struct, frozen=True):
    """How a text becomes a sample, by the `tokenizer.json` in the bundle. Longer texts are cut to the largest length.

    Attributes:
        inputs: input of the model -> what it holds of each token: its id, 1 for the mask, the number of its segment.
    """

    inputs: Annotated[dict[str, Literal["ids", "attention_mask", "type_ids"]], msgspec.Meta(min_length=1)]


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
        text: how a text becomes a sample; unset where the bundle has no tokenizer.
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
    text: Text | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        if isinstance(self.text, Text):
            dimensions, names = self.signature.dimensions, {spec.name for spec in self.signature.inputs}
            of_tokens = all(spec.dtype.startswith("int") and len(spec.shape) == 1 for spec in self.signature.inputs)
            if len(dimensions) != 1 or not of_tokens or not dimensions[0].axes.keys() >= names:
                raise ValueError("a bundle with `text` has inputs of whole numbers that share one open dimension")
            if self.text.inputs.keys() != names:
                raise ValueError(f"`text` names other inputs than {', '.join(sorted(names))}")
        if self.table is not None:
            taken = [(spec.dtype, spec.shape) for spec in self.signature.inputs]
            if taken != [("float32", (len(self.table.columns),))]:
                raise ValueError(f"a bundle with a `table` of {len(self.table.columns)} columns has another input")

    @property
    def tiles(self) -> Tiling | None:
        """How larger pictures are cut; None where they are not."""
        tiles = self.preprocessing.tiles
        return None if isinstance(tiles, msgspec.UnsetType) else tiles

    @property
    def table(self) -> Table | None:
        """How rows of named values become samples; None where samples are no rows."""
        table = self.preprocessing.table
        return None if isinstance(table, msgspec.UnsetType) else table


class _SchemaOnly(msgspec.Struct):
    schema: Annotated[int, msgspec.Meta(ge=1)]


def least_schema(manifest: Manifest) -> int:
    """The oldest schema whose readers understand a manifest."""
    newer = manifest.signature.dimensions or isinstance(manifest.text, Text) or manifest.tiles is not None
    newer = newer or manifest.table is not None
    return SCHEMA if newer else _OLDER


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
