"""A bundle: one model on disk, in open formats only. ONNX + safetensors + JSON; never a pickle.

    NAME/
        bundle.json           signature, task, preprocessing, lineage, metrics, files with their SHA-256, content hash
        model.onnx            the whole graph, preprocessing included, dynamic batch
        weights.safetensors   the torch module's parameters, where there is one
        samples.safetensors   a few real inputs, for warm-up, load and checks
        answers.safetensors   the graph's outputs for them, which every engine that opens the bundle has to reproduce

Requests carry raw values (uint8 pixels); scaling, mean and layout are part of the graph, so a client cannot get them
wrong.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from rushhour.errors import BundleError, StorageError
from rushhour.measurement import Accuracy, Number
from rushhour.plan import Precision
from rushhour.records import identity
from rushhour.records.answers import TOLERANCES, graph_answers
from rushhour.system.storage import building, check_own, explained, write_whole
from rushhour.task import Task

SCHEMA = 2
MODEL: Final = "model.onnx"
WEIGHTS: Final = "weights.safetensors"
SAMPLES: Final = "samples.safetensors"
ANSWERS: Final = "answers.safetensors"
_MANIFEST = "bundle.json"
_BESIDE: Final = ("-training", "-steps")
"""Name suffixes of the folders beside a bundle that record how it was made."""
_NAMED: Final = 2
_ANSWERED = 16
"""Largest number of samples whose outputs are recorded."""

_LARGEST_ROW = 2**31
_Size = Annotated[int, msgspec.Meta(ge=1, le=2**31)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=10**15)]

FileName = Literal["model.onnx", "weights.safetensors", "samples.safetensors", "answers.safetensors"]
_FILES: Final = (_MANIFEST, MODEL, WEIGHTS, SAMPLES, ANSWERS)
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


class Bundle:
    """An opened bundle: its folder and its manifest. Open with `Bundle.open`, make with `Bundle.create`.

    It is a path too: that of its folder.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    def __fspath__(self) -> str:
        return str(self.path)

    @classmethod
    def open(cls, path: Path) -> Bundle:
        """Open the bundle in the folder `path`, and check every byte against its hashes.

        Raises:
            BundleError: if it is missing, damaged, or of a newer schema.
        """
        file = path / _MANIFEST
        with explained(f"read {file}"):
            is_there = file.is_file()
        if not is_there:
            raise BundleError(
                f"there is no bundle at {path}",
                f"it has no {_MANIFEST}",
                meant(path) or "name a folder made by `rushhour train`, `compress` or `demo`",
            )
        with explained(f"read {file}"):
            content = file.read_bytes()
        try:
            schema = msgspec.json.decode(content, type=_SchemaOnly).schema
            if schema > SCHEMA:
                raise BundleError(
                    f"the bundle {path} has schema {schema}",
                    f"this Rushhour reads schemas up to {SCHEMA}",
                    "upgrade Rushhour, or make the bundle again",
                )
            manifest = msgspec.json.decode(content, type=Manifest)
            as_written = msgspec.json.decode(content)
        except (msgspec.DecodeError, RecursionError) as error:
            raise _damaged(path, f"{_MANIFEST} cannot be read: {error}") from error
        if _hash_as_written(as_written) != manifest.hash:
            raise _damaged(path, f"{_MANIFEST} does not match its own hash")
        if MODEL not in manifest.files:
            raise _damaged(path, f"{_MANIFEST} lists no {MODEL}")
        for name, record in manifest.files.items():
            with explained(f"read {path / name}"):
                if not (path / name).is_file():
                    raise _damaged(path, f"{name} is missing")
            if _record(path / name) != record:
                raise _damaged(path, f"{name} does not match its hash")
        return cls(path, manifest)

    @classmethod
    def create(
        cls,
        path: Path,
        manifest: Manifest,
        model: Callable[[Path], dict[Precision, float] | None],
        weights: Callable[[Path], None] | None = None,
        samples: Mapping[str, NDArray[Any]] | None = None,
    ) -> Bundle:
        """Write a bundle to the folder `path` atomically; only an older bundle there is replaced.

        The graph's outputs for the samples are recorded, unless ONNX Runtime cannot run it.

        Args:
            path: the folder.
            manifest: its content; `files`, `tolerance` and `hash` are filled in here.
            model: writes the ONNX graph to the path it is given, in one file; may return tolerances of the recorded
                outputs by precision, in place of the defaults.
            weights: writes the safetensors file to the path it is given.
            samples: input name -> array of shape `(k, *shape)`.

        Raises:
            StorageError: if there is anything else at `path`, or it cannot be written.
        """
        from safetensors.numpy import save

        with building(path, _FILES, is_bundle) as folder:
            given = model(folder / MODEL)
            if weights is not None:
                weights(folder / WEIGHTS)
            arrays = _noise(manifest.signature)
            if samples is not None:
                arrays = {name: np.ascontiguousarray(array) for name, array in samples.items()}
                (folder / SAMPLES).write_bytes(save(arrays))  # save_file raises no OSError when the disk is full
            answers = _answered(folder / MODEL, arrays)
            if answers is not None:
                (folder / ANSWERS).write_bytes(save(answers))
            names: tuple[FileName, ...] = get_args(FileName)
            files = {name: _record(folder / name) for name in names if (folder / name).exists()}
            precisions: tuple[Precision, ...] = ("int8",) if manifest.precision == "int8" else ("f32", "bf16")
            tolerance = given or {}
            allowed = {precision: tolerance.get(precision, TOLERANCES[precision]) for precision in precisions}
            unsealed = msgspec.structs.replace(
                manifest,
                files=files,
                hash="",
                schema=SCHEMA,
                tolerance=msgspec.UNSET if answers is None else allowed,
            )
            sealed = msgspec.structs.replace(unsealed, hash=_hash(unsealed))
            (folder / _MANIFEST).write_bytes(_encode(sealed))
        return cls(path, sealed)

    def with_metrics(self, metrics: Mapping[str, Accuracy]) -> Bundle:
        """The same bundle with these metrics added to its manifest, on disk too. Its hash changes.

        Raises:
            StorageError: if it cannot be written.
        """
        merged = {**self.manifest.metrics, **metrics}
        unsealed = msgspec.structs.replace(self.manifest, metrics=merged, hash="")
        sealed = msgspec.structs.replace(unsealed, hash=_hash(unsealed))
        write_whole(self.path / _MANIFEST, _encode(sealed))
        return Bundle(self.path, sealed)

    def copy_to(self, path: Path, name: str | None = None) -> Bundle:
        """A copy of the whole bundle in the folder `path`; only an older bundle there is replaced.

        Args:
            path: the folder.
            name: of the copy; the same by default.

        Raises:
            StorageError: if there is anything else, or it cannot be written.
        """
        with building(path, _FILES, is_bundle) as folder:
            for file in self.manifest.files:
                shutil.copyfile(self.path / file, folder / file)
            unsealed = msgspec.structs.replace(self.manifest, name=name or self.manifest.name, hash="")
            manifest = msgspec.structs.replace(unsealed, hash=_hash(unsealed))
            (folder / _MANIFEST).write_bytes(_encode(manifest))
        return Bundle(path, manifest)

    @cached_property
    def content_key(self) -> str:
        """Hash of everything that decides its outputs: files, network and task, without measurements."""
        manifest = self.manifest
        return identity.key(
            files=manifest.files,
            signature=manifest.signature,
            task=manifest.task,
            source=manifest.source,
            precision=manifest.precision,
        )

    @property
    def model(self) -> Path:
        """The ONNX file."""
        return self.path / MODEL

    @property
    def weights(self) -> Path | None:
        """The safetensors file of the torch module, where there is one."""
        return self.path / WEIGHTS if WEIGHTS in self.manifest.files else None

    @property
    def model_bytes(self) -> int:
        """Size on disk of the ONNX file, which is what is served."""
        with explained(f"read {self.model}"):
            return self.model.stat().st_size

    def samples(self) -> dict[str, NDArray[Any]]:
        """A few real inputs: name -> array of shape `(k, *shape)`; seeded noise where the bundle has none."""
        if SAMPLES not in self.manifest.files:
            return _noise(self.manifest.signature)
        from safetensors.numpy import load_file

        with explained(f"read {self.path / SAMPLES}"):
            return dict(load_file(self.path / SAMPLES))

    def answers(self) -> dict[str, NDArray[Any]] | None:
        """The recorded outputs for the first of `samples()`: name -> `(n, *shape)`; None if not recorded."""
        if ANSWERS not in self.manifest.files:
            return None
        from safetensors.numpy import load_file

        with explained(f"read {self.path / ANSWERS}"):
            return dict(load_file(self.path / ANSWERS))


class _SchemaOnly(msgspec.Struct):
    schema: Annotated[int, msgspec.Meta(ge=1)]


def is_bundle(path: Path) -> bool:
    """Whether there is a bundle at `path`, even a damaged one or one of a newer schema."""
    try:
        content = msgspec.json.decode((path / _MANIFEST).read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError, RecursionError):
        return False
    return {"name", "signature", "task", "files", "hash"} <= content.keys()


def name_of(path: Path) -> str:
    """The model's name for a bundle at `path`: that of the folder, in characters of URLs and file names."""
    name = "".join(c if c.isascii() and (c.isalnum() or c in "._") else "-" for c in path.absolute().name)
    return name.strip("-._")[:64] or "model"


def check_folder(path: Path) -> None:
    """Raise unless `path` is free or a bundle.

    Raises:
        StorageError: if it holds anything that Rushhour did not write.
    """
    check_own(path, _FILES, is_bundle)


def check_place(path: Path, *, force: bool = False, why: str = "") -> None:
    """Raise unless a new bundle may be written to `path`: nothing is there, or with `force` a bundle.

    Args:
        path: the folder.
        force: whether a bundle there may be replaced.
        why: how the bundle there differs from the new one.

    Raises:
        StorageError: if there is a bundle, or anything that Rushhour did not write.
    """
    check_folder(path)
    if is_bundle(path) and not force:
        raise StorageError(
            f"there is a bundle at {path} already",
            f"it differs in {why}" if why else "it is another one",
            "name another place with --out, or set --force to replace it",
        )


def meant(path: Path) -> str:
    """Advice on which bundle to name in place of a folder that belongs to some: a run, a training, the steps of a
    compression; empty where there is none."""
    folder = path.parent if path.is_file() else path
    beside = [folder.with_name(folder.name.removesuffix(end)) for end in _BESIDE if folder.name.endswith(end)]
    below = [file.parent for pattern in ("bundles/*/", "*/") for file in sorted(folder.glob(pattern + _MANIFEST))]
    found = [each for each in (*beside, *below) if (each / _MANIFEST).is_file()]
    more = f" or another of the {len(found)} that belong to it" if len(found) > _NAMED else ""
    return f"name a bundle, such as {' or '.join(map(str, found[:_NAMED]))}{more}" if found else ""


def _encode(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=2) + b"\n"


def _hash(manifest: Manifest) -> str:
    unsealed = msgspec.structs.replace(manifest, hash="")
    return hashlib.sha256(msgspec.json.encode(unsealed, order="deterministic")).hexdigest()


def _hash_as_written(content: dict[str, Any]) -> str:
    """The hash of a manifest as it is on disk: one of an older version has fewer fields than `Manifest`."""
    return hashlib.sha256(msgspec.json.encode(content | {"hash": ""})).hexdigest()


def _noise(signature: Signature) -> dict[str, NDArray[Any]]:
    """8 seeded random samples."""
    random = np.random.default_rng(0)
    return {
        spec.name: (random.random((8, *spec.shape)) * (255 if spec.dtype == "uint8" else 1)).astype(spec.dtype)
        for spec in signature.inputs
    }


def _answered(model: Path, samples: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]] | None:
    try:
        return graph_answers(model, {name: array[:_ANSWERED] for name, array in samples.items()})
    except Exception:  # its exceptions have no common base class; engines decide later whether the graph can be served
        return None


def _record(file: Path) -> FileRecord:
    with explained(f"read {file}"), file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
        return FileRecord(bytes=stream.tell(), sha256=digest.hexdigest())


def _damaged(path: Path, why: str) -> BundleError:
    return BundleError(
        f"the bundle {path} is damaged",
        why,
        "restore it from its source, or delete the folder and make it again",
    )
