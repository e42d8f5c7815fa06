"""The folder of a bundle: written atomically, opened with every byte checked; only a bundle is ever replaced."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Final, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from rushhour.bundle.manifest import (
    ANSWERS,
    FILES,
    MANIFEST,
    MODEL,
    README,
    SAMPLES,
    SCHEMA,
    TOKENIZER,
    WEIGHTS,
    FileName,
    FileRecord,
    Manifest,
    Text,
    encode_manifest,
    hash_as_written,
    hash_of,
    least_schema,
    schema_of,
)
from rushhour.bundle.readme import readme_of
from rushhour.bundle.samples import joined
from rushhour.bundle.signature import Signature, Sizes, own_sizes
from rushhour.bundle.tiling import Tiling, map_axes, sides_of, tiled_axes
from rushhour.errors import BundleError, StorageError
from rushhour.measurement import Accuracy
from rushhour.plan import Precision
from rushhour.records import identity
from rushhour.records.answers import TOLERANCES, graph_answers
from rushhour.system.storage import building, check_own, explained, write_whole

_BESIDE: Final = ("-training", "-steps")
"""Name suffixes of the folders beside a bundle that record how it was made."""
_NAMED: Final = 2
_NOISE_SIZE = 32
_LARGEST_TOKENIZER = 64 * 2**20
_ANSWERED = 16
"""Largest number of samples whose outputs are recorded."""


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
        file = path / MANIFEST
        with explained(f"read {file}"):
            is_there = file.is_file()
        if not is_there:
            raise BundleError(
                f"there is no bundle at {path}",
                f"it has no {MANIFEST}",
                suggest_bundle(path) or "name a folder made by `rushhour train`, `compress` or `demo`",
            )
        with explained(f"read {file}"):
            content = file.read_bytes()
        try:
            schema = schema_of(content)
            if schema > SCHEMA:
                raise BundleError(
                    f"the bundle {path} has schema {schema}",
                    f"this Rushhour reads schemas up to {SCHEMA}",
                    "upgrade Rushhour, or make the bundle again",
                )
            manifest = msgspec.json.decode(content, type=Manifest)
            as_written = msgspec.json.decode(content)
        except (msgspec.DecodeError, RecursionError) as error:
            raise _damaged(path, f"{MANIFEST} cannot be read: {error}") from error
        if hash_as_written(as_written) != manifest.hash:
            raise _damaged(path, f"{MANIFEST} does not match its own hash")
        if MODEL not in manifest.files:
            raise _damaged(path, f"{MANIFEST} lists no {MODEL}")
        if manifest.tiles is not None:
            manifest.tiles.check(manifest.signature)
        for name, record in manifest.files.items():
            with explained(f"read {path / name}"):
                if not (path / name).is_file():
                    raise _damaged(path, f"{name} is missing")
            if _record(path / name) != record:
                raise _damaged(path, f"{name} does not match its hash")
        if isinstance(manifest.text, Text):
            if TOKENIZER not in manifest.files:
                raise _damaged(path, f"{MANIFEST} lists no {TOKENIZER}")
            _check_tokenizer(path, manifest.files[TOKENIZER].bytes)
        return cls(path, manifest)

    @classmethod
    def create(
        cls,
        path: Path,
        manifest: Manifest,
        model: Callable[[Path], dict[Precision, float] | None],
        weights: Callable[[Path], None] | None = None,
        samples: Mapping[str, NDArray[Any]] | None = None,
        tokenizer: bytes | None = None,
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
            tokenizer: the content of `tokenizer.json`, where the manifest says how texts become samples.

        Raises:
            BundleError: if the tokenizer is larger than 64 MiB.
            StorageError: if there is anything else at `path`, or it cannot be written.
        """
        from safetensors.numpy import save

        with building(path, FILES, is_bundle) as folder:
            if tokenizer is not None:
                _check_tokenizer(path, len(tokenizer))
                (folder / TOKENIZER).write_bytes(tokenizer)
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
                schema=least_schema(manifest),
                tolerance=msgspec.UNSET if answers is None else allowed,
            )
            sealed = msgspec.structs.replace(unsealed, hash=hash_of(unsealed))
            (folder / MANIFEST).write_bytes(encode_manifest(sealed))
            (folder / README).write_text(readme_of(sealed), encoding="utf-8")
        return cls(path, sealed)

    def with_metrics(self, metrics: Mapping[str, Accuracy]) -> Bundle:
        """The same bundle with these metrics added to its manifest, on disk too. Its hash changes.

        Raises:
            StorageError: if it cannot be written.
        """
        return self._with(metrics={**self.manifest.metrics, **metrics})

    def with_tiles(self, tiles: Tiling | None) -> Bundle:
        """The same bundle that cuts larger pictures or recordings so, on disk too; with None it cuts none.

        Its hash changes. What is made of it (by `compress`, `tune`) cuts them alike.

        Raises:
            BundleError: if its answers cannot be merged so, or the tiles need an overlap.
            StorageError: if it cannot be written.
        """
        if tiles is not None:
            tiles.check(self.manifest.signature)
            if not tiles.overlap and not tiles.is_fixed and (tiles.merge == "boxes" or self._sees_neighbours()):
                raise BundleError(
                    f"tiles without overlap cannot be merged by {tiles.merge!r}",
                    "each answer depends on what is around it, which at the border of a tile is missing",
                    "give an overlap of twice as many pixels or steps as the network looks aside",
                )
        preprocessing = msgspec.structs.replace(self.manifest.preprocessing, tiles=tiles or msgspec.UNSET)
        changed = msgspec.structs.replace(self.manifest, preprocessing=preprocessing)
        return self._with(preprocessing=preprocessing, schema=least_schema(changed))

    def _sees_neighbours(self) -> bool:
        """Whether a place of its first map depends on the input at other places: one is changed, and all compared."""
        (spec,) = self.manifest.signature.inputs
        sides, axes = sides_of(self.manifest.signature), tiled_axes(spec)
        found = map_axes(self.manifest.signature.outputs[0].shape, sides)
        assert found is not None  # checked before
        first, stride = found
        place = tuple(side // stride // 2 for side in sides)
        samples = np.repeat(self.samples()[spec.name][:1], 2, axis=0)
        window = [slice(None)] * len(spec.shape)
        for axis, at in zip(axes, place, strict=True):
            window[axis] = slice(at * stride, (at + 1) * stride)
        values = samples[1][tuple(window)]
        samples[1][tuple(window)] = 255 - values if spec.dtype == "uint8" else values + (1 + abs(values))
        before, after = next(iter(graph_answers(self.model, {spec.name: samples}).values()))
        differs = np.moveaxis(np.not_equal(before, after), range(first, first + len(sides)), range(len(sides)))
        differs[place] = False
        return bool(differs.any())

    def _with(self, **changes: Any) -> Bundle:
        """The same bundle with another manifest, on disk too."""
        unsealed = msgspec.structs.replace(self.manifest, **changes, hash="")
        sealed = msgspec.structs.replace(unsealed, hash=hash_of(unsealed))
        write_whole(self.path / MANIFEST, encode_manifest(sealed))
        return Bundle(self.path, sealed)

    def copy_to(self, path: Path, name: str | None = None) -> Bundle:
        """A copy of the whole bundle in the folder `path`; only an older bundle there is replaced.

        Args:
            path: the folder.
            name: of the copy; the same by default.

        Raises:
            StorageError: if there is anything else, or it cannot be written.
        """
        with building(path, FILES, is_bundle) as folder:
            for file in self.manifest.files:
                shutil.copyfile(self.path / file, folder / file)
            unsealed = msgspec.structs.replace(self.manifest, name=name or self.manifest.name, hash="")
            manifest = msgspec.structs.replace(unsealed, hash=hash_of(unsealed))
            (folder / MANIFEST).write_bytes(encode_manifest(manifest))
            (folder / README).write_text(readme_of(manifest), encoding="utf-8")
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
    def tokenizer(self) -> Path:
        """The tokenizer's file, where the manifest has `text`."""
        return self.path / TOKENIZER

    def read_tokenizer(self) -> bytes | None:
        """The content of `tokenizer.json`; None where there is none."""
        if TOKENIZER not in self.manifest.files:
            return None
        with explained(f"read {self.tokenizer}"):
            return self.tokenizer.read_bytes()

    @property
    def model_bytes(self) -> int:
        """Size on disk of the ONNX file, which is what is served."""
        with explained(f"read {self.model}"):
            return self.model.stat().st_size

    def samples(self) -> dict[str, NDArray[Any]]:
        """A few real inputs: name -> array of shape `(k, *shape)`; seeded noise where the bundle has none.

        In an open dimension all are padded to the size of the longest.
        """
        if SAMPLES not in self.manifest.files:
            return _noise(self.manifest.signature)
        from safetensors.numpy import load_file

        with explained(f"read {self.path / SAMPLES}"):
            return dict(load_file(self.path / SAMPLES))

    def sample_rows(self) -> NDArray[Any]:
        """`samples()` as a data set has them: of several inputs a structured array, its fields in their order."""
        found = self.samples()
        return joined({spec.name: found[spec.name] for spec in self.manifest.signature.inputs})

    def sizes(self) -> list[Sizes]:
        """The sizes of the open dimensions of each of `samples()`, without padding."""
        return own_sizes(self.manifest.signature, self.samples())

    def answers(self) -> dict[str, NDArray[Any]] | None:
        """The recorded outputs for the first of `samples()`: name -> `(n, *shape)`; None if not recorded."""
        if ANSWERS not in self.manifest.files:
            return None
        from safetensors.numpy import load_file

        with explained(f"read {self.path / ANSWERS}"):
            return dict(load_file(self.path / ANSWERS))


def is_bundle(path: Path) -> bool:
    """Whether there is a bundle at `path`, even a damaged one or one of a newer schema."""
    try:
        content = msgspec.json.decode((path / MANIFEST).read_bytes(), type=dict[str, Any])
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
    check_own(path, FILES, is_bundle)


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


def suggest_bundle(path: Path) -> str:
    """Advice on which bundle to name in place of a folder that belongs to some: a run, a training, the steps of a
    compression; empty where there is none."""
    folder = path.parent if path.is_file() else path
    beside = [folder.with_name(folder.name.removesuffix(end)) for end in _BESIDE if folder.name.endswith(end)]
    below = [file.parent for pattern in ("bundles/*/", "*/") for file in sorted(folder.glob(pattern + MANIFEST))]
    found = [each for each in (*beside, *below) if (each / MANIFEST).is_file()]
    more = f" or another of the {len(found)} that belong to it" if len(found) > _NAMED else ""
    return f"name a bundle, such as {' or '.join(map(str, found[:_NAMED]))}{more}" if found else ""


def _noise(signature: Signature) -> dict[str, NDArray[Any]]:
    """8 seeded random samples; where they are padded, each of another size."""
    random = np.random.default_rng(0)
    sizes = tuple(min(each.largest, max(each.smallest, _NOISE_SIZE)) for each in signature.dimensions)
    found = {}
    for spec in signature.inputs:
        values = random.random((8, *signature.shape(spec, sizes))) * (255 if spec.dtype == "uint8" else 1)
        if spec.name in signature.open_axes and spec.dtype.startswith(("int", "uint")) and spec.dtype != "uint8":
            paddings = [each.padding.get(spec.name) for each in signature.dimensions]
            values[:] = 0 if 1 in paddings else 1  # in any vocabulary, counted by any mask, and not the padding
        found[spec.name] = values.astype(spec.dtype)
    if signature.padded is not None:
        dimension, size = signature.dimensions[signature.padded], sizes[signature.padded]
        for row, length in enumerate(np.linspace(dimension.smallest, size, 8).round().astype(int).tolist()):
            for name, value in dimension.padding.items():
                np.moveaxis(found[name], 1 + dimension.axes[name], 1)[row, length:] = value
    return found


def _answered(model: Path, samples: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]] | None:
    try:
        return graph_answers(model, {name: array[:_ANSWERED] for name, array in samples.items()})
    except Exception:  # its exceptions have no common base class; engines decide later whether the graph can be served
        return None


def _check_tokenizer(path: Path, size: int) -> None:
    if size > _LARGEST_TOKENIZER:
        raise BundleError(
            f"the tokenizer of {path} has {size / 2**20:.0f} MiB",
            f"one of up to {_LARGEST_TOKENIZER // 2**20} MiB is read",
            "use another tokenizer",
        )


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
