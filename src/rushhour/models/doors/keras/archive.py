"""A `.keras` file, read without trust: a zip of a description and weights, and nothing else."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Final

from rushhour.errors import ModelError

DESCRIPTION: Final = "config.json"
METADATA: Final = "metadata.json"
WEIGHTS: Final = "model.weights.h5"
_MEMBERS: Final = frozenset({DESCRIPTION, METADATA, WEIGHTS})
_LARGEST: Final = {DESCRIPTION: 64_000_000, METADATA: 1_000_000, WEIGHTS: 1_900_000_000}
_END: Final = b"PK\x05\x06"
_END_BYTES: Final = 22
_LONGEST_COMMENT: Final = 65_535
_LONG_END: Final = b"PK\x06\x07"
"""Before the end of archives of over 4 GB or 65,535 parts."""
_LARGEST_LIST: Final = 1_000_000
"""Bytes of the list of contents, which is read as a whole."""


def is_archive(file: Path) -> bool:
    """Whether a file is a zip with the description of a Keras model."""
    try:
        if not _has_short_list(file):
            return False
        with zipfile.ZipFile(file) as archive:
            return {DESCRIPTION, METADATA} <= set(archive.namelist()[: 2 * len(_MEMBERS)])
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError):
        return False


def open_archive(file: Path) -> zipfile.ZipFile:
    """The archive, after a look at its list of contents: nothing is unpacked.

    Raises:
        ModelError: if it is damaged, or holds anything but the three parts of a model, uncompressed.
    """
    try:
        if not _has_short_list(file):
            raise ValueError("its end is missing, or it has too many parts")
        archive = zipfile.ZipFile(file)
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError) as error:
        raise ModelError(
            f"cannot read {file}", f"it is no archive: {error}", "check that it is a whole file"
        ) from error
    try:
        _check(archive, file)
    except BaseException:
        archive.close()
        raise
    return archive


def member(archive: zipfile.ZipFile, name: str, file: Path) -> bytes:
    """The content of one part.

    Raises:
        ModelError: if it is missing or damaged.
    """
    try:
        return archive.read(name)
    except KeyError:
        raise _refused(file, f"its part {name} is missing") from None
    except Exception as error:  # zlib, zipfile and the system have errors of their own
        raise _refused(file, f"its part {name} is damaged: {error}") from error


def _has_short_list(file: Path) -> bool:
    """Whether the list of contents may be read: Python makes an object of every entry."""
    with file.open("rb") as opened:
        size = opened.seek(0, 2)
        opened.seek(max(0, size - _END_BYTES - _LONGEST_COMMENT))
        tail = opened.read()
    at = tail.rfind(_END)
    if at < 0 or len(tail) < at + _END_BYTES or _LONG_END in tail[max(0, at - _END_BYTES) : at]:
        return False
    return int.from_bytes(tail[at + 12 : at + 16], "little") <= _LARGEST_LIST


def _check(archive: zipfile.ZipFile, file: Path) -> None:
    seen: set[str] = set()
    for entry in archive.infolist():
        name = entry.filename
        if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or ":" in name:
            raise _refused(file, f"its part {name!r} lies outside of it")
        if name.startswith("assets/") or name.endswith(".npz"):
            kind = "an array file, which may hold a pickle" if name.endswith(".npz") else "a vocabulary or other file"
            raise _refused(file, f"its part {name!r} is {kind}, and only layers of numbers are taken")
        if name not in _MEMBERS or name in seen:
            raise _refused(file, f"it has {'two parts' if name in seen else 'a part'} of the name {name!r}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise _refused(file, f"its part {name} is compressed, which Keras does not do")
        if entry.file_size > _LARGEST[name]:
            raise _refused(file, f"its part {name} has {entry.file_size:,} bytes, more than {_LARGEST[name]:,}")
        seen.add(name)


def _refused(file: Path, why: str) -> ModelError:
    return ModelError(f"will not load {file}", why, "save the model again with model.save(...) of Keras 3")
