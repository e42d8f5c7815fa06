"""Pictures in files become arrays in three parts: in memory, or, where they are many, mapped from a cache on disk."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from rushhour.data.arrays import held_out, split
from rushhour.data.dataset import Split
from rushhour.errors import DataError, StorageError
from rushhour.machine import cores
from rushhour.picture import decode
from rushhour.storage import building, explained

WORTH_CACHING = 64_000_000
"""Bytes of decoded pictures from which on they are kept on disk; fewer are decoded sooner than looked for."""

MAX_PIXELS = 64_000_000
"""A picture with more is not read."""

PARTS = ("train", "validation", "test")
_INDEX = "index.json"
_FILES = (_INDEX, "decoded.npy", *(f"{part}-{what}.npy" for part in PARTS for what in ("inputs", "targets")))

_DECODED_AS = 1
"""To be raised when the same file becomes other pixels, so that no cache is believed that was written before."""
_AT_ONCE = 256

OnCorrupt = Callable[[DataError], None]
"""Hears of a picture that cannot be read and is left out."""


class Listing(NamedTuple):
    """Pictures to be read.

    Attributes:
        folder: below which they all are.
        files: part (`train`, `validation`, `test`, or `all` of them) -> the files of each class.
        shape: of each once decoded: height, width, channels.
        seed: of what is held out of `all`, or of `train` where there is no `validation`.
    """

    folder: Path
    files: dict[str, dict[str, list[Path]]]
    shape: tuple[int, int, int]
    seed: int

    @property
    def every(self) -> list[Path]:
        """All files, in order."""
        return [file for by_class in self.files.values() for files in by_class.values() for file in files]

    @property
    def bytes(self) -> int:
        """Of all of them, once decoded."""
        return len(self.every) * math.prod(self.shape)


class _Index(msgspec.Struct, frozen=True):
    """What lies in a cache: of which files, and the places of those that could not be read, with the reason."""

    digest: str
    corrupt: dict[int, str]


def read(listing: Listing, cached: Path | None, on_corrupt: OnCorrupt | None) -> tuple[Split, Split, Split]:
    """Training, validation and test part: uint8 `(n, *shape)`, and int64 labels.

    Args:
        listing: what is to be read.
        cached: a folder for decoded pictures, used from `WORTH_CACHING` on; None: never.
        on_corrupt: hears of what is left out, in order; None: the first corrupt picture is an error.

    Raises:
        DataError: if a picture cannot be read, or no picture of a class can.
    """
    if cached is not None and listing.bytes >= WORTH_CACHING:
        try:
            return _from_cache(listing, cached, on_corrupt)
        except StorageError:
            pass  # a full or read-only disk takes away only the cache
    pictures = np.empty((len(listing.every), *listing.shape), np.uint8)
    corrupt = _decode(listing, pictures)
    _tell(listing, corrupt, on_corrupt)
    train, validation, test = (Split(pictures[rows], labels) for rows, labels in _parts(listing, corrupt))
    return train, validation, test


def of_file(error: DataError, file: Path) -> DataError:
    """The same error, naming the file."""
    return DataError(
        f"cannot read the picture {file}", error.why, "mend it, take it out of the folder, or skip what is corrupt"
    )


def _from_cache(listing: Listing, cached: Path, on_corrupt: OnCorrupt | None) -> tuple[Split, Split, Split]:
    folder = listing.folder.resolve()
    key = hashlib.sha256(f"{folder} {listing.shape} {listing.seed}".encode()).hexdigest()[:16]
    place, digest = cached / f"{folder.name}-{key}", _digest(listing)
    with _alone(place):
        index = _index(place)
        if index is None or index.digest != digest:
            with building(place, _FILES, _is_cache) as half:
                index = _Index(digest, _cache(listing, half))
                (half / _INDEX).write_bytes(msgspec.json.encode(index))
        _tell(listing, index.corrupt, on_corrupt)
        with explained(f"read {place}"):
            train, validation, test = (
                # copy-on-write: what torch shares must be writable, and the file stays as it is
                Split(np.load(place / f"{part}-inputs.npy", mmap_mode="c"), np.load(place / f"{part}-targets.npy"))
                for part in PARTS
            )
    return train, validation, test


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    """No other process works on this cache meanwhile: workers on one machine all ask for it at once."""
    with explained(f"write {place}"):
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.with_name(f".{place.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _is_cache(place: Path) -> bool:
    with contextlib.suppress(OSError, msgspec.DecodeError):
        return "digest" in msgspec.json.decode((place / _INDEX).read_bytes(), type=dict[str, Any])
    return False


def _index(place: Path) -> _Index | None:
    try:
        return msgspec.json.decode((place / _INDEX).read_bytes(), type=_Index)
    except (OSError, msgspec.DecodeError):
        return None


def _digest(listing: Listing) -> str:
    """Of which files there are, how large and from when; not of their content, which would take as long as decoding."""
    digest = hashlib.sha256(f"{_DECODED_AS}".encode())
    with explained(f"read {listing.folder}"):
        for file in listing.every:
            about = file.stat()
            digest.update(f"{file.relative_to(listing.folder)} {about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _cache(listing: Listing, half: Path) -> dict[int, str]:
    """Write the parts' arrays into a folder; return what could not be read."""
    decoded = half / "decoded.npy"
    pictures = _file(decoded, (len(listing.every), *listing.shape))
    corrupt = _decode(listing, pictures)
    for part, (rows, labels) in zip(PARTS, _parts(listing, corrupt), strict=True):
        to = _file(half / f"{part}-inputs.npy", (len(rows), *listing.shape))
        for at in range(0, len(rows), _AT_ONCE):
            to[at : at + _AT_ONCE] = pictures[rows[at : at + _AT_ONCE]]
        to.flush()
        np.save(half / f"{part}-targets.npy", labels)
    decoded.unlink()
    return corrupt


def _file(path: Path, shape: tuple[int, ...]) -> np.memmap[Any, np.dtype[np.uint8]]:
    mapped = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    with path.open("r+b") as file:
        # what a full disk does not give shows here, and not as SIGBUS in the middle of a picture
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return mapped


def _decode(listing: Listing, into: NDArray[np.uint8]) -> dict[int, str]:
    """Read all files; return the places of those that cannot be read, with the reason."""
    files = listing.every

    def one(index: int) -> str | None:
        try:
            decode(files[index], into[index], max_pixels=MAX_PIXELS)
        except DataError as error:
            return error.why
        return None

    with ThreadPoolExecutor(cores()) as pool:
        return {index: why for index, why in enumerate(pool.map(one, range(len(files)))) if why is not None}


def _tell(listing: Listing, corrupt: dict[int, str], on_corrupt: OnCorrupt | None) -> None:
    for index in sorted(corrupt):
        error = of_file(DataError("", corrupt[index]), listing.every[index])
        if on_corrupt is None:
            raise error
        on_corrupt(error)


def _parts(listing: Listing, corrupt: dict[int, str]) -> Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Which of all files are in training, validation and test part, and their labels."""
    found: dict[str, Split] = {}
    at = 0
    for part, by_class in listing.files.items():
        rows, labels = [], []
        for label, (name, files) in enumerate(by_class.items()):
            kept = [at + index for index in range(len(files)) if at + index not in corrupt]
            if not kept:
                raise DataError(
                    f"the class {name!r} in {listing.folder} is empty",
                    f"none of its {len(files)} pictures can be read",
                    "mend them, or remove the folder",
                )
            rows += kept
            labels += [label] * len(kept)
            at += len(files)
        found[part] = Split(np.array(rows, np.int64), np.array(labels, np.int64))
    if "all" in found:
        parts = split(found["all"].inputs, found["all"].targets, seed=listing.seed, name=listing.folder.name)
    elif "validation" in found:
        parts = (found["train"], found["validation"], found["test"])
    else:
        kept_, validation = held_out(found["train"], (0.1,), seed=listing.seed)
        parts = (kept_, validation, found["test"])
    return [(part.inputs, part.targets) for part in parts]
