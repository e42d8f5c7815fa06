"""The file of a Keras model, `.keras` or `.h5`, read without trust: what its description says."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

from rushhour.errors import ModelError
from rushhour.models.doors.keras.archive import DESCRIPTION, METADATA, WEIGHTS, is_archive, member, open_archive
from rushhour.models.doors.keras.description import LARGEST, layers_of, read_description
from rushhour.models.doors.keras.weights import MAGIC, check_weights

_CONFIG = "model_config"


@dataclasses.dataclass(frozen=True)
class Described:
    """What the file of a model says, before Keras is imported.

    Attributes:
        suffix: of the name that Keras wants it to have: `.keras` or `.h5`.
        version: of the Keras that wrote it; empty where it does not say.
        layers: their classes, in order.
    """

    suffix: str
    version: str
    layers: tuple[str, ...]


def is_model_file(file: Path) -> bool:
    """Whether a file is one of Keras', by its first bytes and its parts."""
    try:
        with file.open("rb") as opened:
            first = opened.read(len(MAGIC))
    except OSError:
        return False
    return first == MAGIC or (first[:2] == b"PK" and (file.suffix.lower() == ".keras" or is_archive(file)))


def describe(file: Path) -> Described:
    """What a model file says. Nothing of it is run, and nothing is written.

    Raises:
        ModelError: if it is damaged, names what is not Keras' own or runs code, refers to other files, or is
            compressed.
    """
    with file.open("rb") as opened:
        is_hdf5 = opened.read(len(MAGIC)) == MAGIC
    return _of_hdf5(file) if is_hdf5 else _of_archive(file)


def _of_archive(file: Path) -> Described:
    with open_archive(file) as archive:
        described = read_description(member(archive, DESCRIPTION, file), str(file))
        try:
            version = str(json.loads(member(archive, METADATA, file)).get("keras_version", ""))
        except (ValueError, AttributeError, RecursionError):
            version = ""
        if version.startswith("2."):
            raise ModelError(
                f"cannot load {file}",
                f"it was written by Keras {version}, whose .keras files Keras 3 does not read",
                "save it there as .h5, and import that",
            )
        check_weights(io.BytesIO(member(archive, WEIGHTS, file)), str(file))
    return Described(".keras", version, tuple(layers_of(described)))


def _of_hdf5(file: Path) -> Described:
    import h5py

    check_weights(file, str(file))
    try:
        with h5py.File(file, "r") as opened:
            text, version = _text(opened.attrs.get(_CONFIG)), _text(opened.attrs.get("keras_version"))
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"cannot read {file}", str(error), "check that it is a whole file") from error
    if text is None or len(text) > LARGEST:
        why = "it has weights, but no description of a model" if text is None else "its description is too long"
        raise ModelError(
            f"cannot load {file}", why, "save the whole model: model.save(...) in place of model.save_weights(...)"
        )
    described = read_description(text.encode(), str(file))
    return Described(".h5", (version or "")[:20], tuple(layers_of(described)))


def _text(value: Any) -> str | None:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if isinstance(value, str) else None
