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

from rushhour.bundle import Decoding
from rushhour.data.arrays import FEWEST
from rushhour.data.dataset import Split
from rushhour.data.splits import PARTS, Part, divide
from rushhour.errors import DataError, StorageError
from rushhour.picture import Seen, decode
from rushhour.system.machine import cores
from rushhour.system.storage import building, explained

WORTH_CACHING = 64_000_000
"""Bytes of decoded pictures from which on they are kept on disk; fewer are decoded sooner than looked for."""

MAX_PIXELS = 64_000_000
"""A picture with more is not read."""

_INDEX = "index.json"
_FILES = (_INDEX, "decoded.npy", *(f"{part}-{what}.npy" for part in PARTS for what in ("inputs", "targets")))

_DECODED_AS = 2
"""To be raised when the same file becomes other pixels, so that no cache is believed that was written before."""
_AT_ONCE = 256
_TOLD_EVERY = 16
_WHITES = (255, 1023, 4095, 16_383, 65_535)
"""The largest values of 8, 10, 12, 14 and 16 bits."""
_UNIT, _DIMMEST = 1.001, 1 / 16
"""Floats up to the first lie in 0..1; where none is above the second, 8 bits would leave next to nothing of them."""
_STRETCH = 0.02
"""Difference of proportions from which on a picture counts as stretched."""

OnCorrupt = Callable[[DataError], None]
"""Hears of a picture that cannot be read and is left out."""

OnDecoded = Callable[[int, int], None]
"""Hears, now and then, how many pictures are decoded, and of how many."""


class Listing(NamedTuple):
    """Pictures to be read.

    Attributes:
        folder: below which they all are.
        files: part (`train`, `validation`, `test`, or `all` of them) -> the files of each class.
        classes: all of them, in the order of their labels.
        shape: of each once decoded: height, width, channels.
        seed: of what is held out of `all`, or of `train` where there is no `validation` or `test`.
        decoding: what is white in pictures of more than 8 bits, to begin with.
        fixed: whether it stays so, because a model was trained on it; brighter pictures then cannot be read.
    """

    folder: Path
    files: dict[str, dict[str, list[Path]]]
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    seed: int
    decoding: Decoding = Decoding()
    fixed: bool = False

    @property
    def every(self) -> list[Path]:
        """All files, in order."""
        return [file for by_class in self.files.values() for files in by_class.values() for file in files]

    @property
    def bytes(self) -> int:
        """Of all of them, once decoded."""
        return len(self.every) * math.prod(self.shape)


class Tally(msgspec.Struct, frozen=True):
    """What was done to the pictures on the way.

    Attributes:
        decoding: what was white in those of more than 8 bits.
        corrupt: place of what could not be read -> why.
        deep: pictures of 16 bits of grey.
        real: pictures in floats.
        resized: that had another size than the samples.
        stretched: that had other proportions.
        greyed: that had colours, where samples have none.
        framed: that had more frames than the one that was read.
    """

    decoding: Decoding
    corrupt: dict[int, str]
    deep: int = 0
    real: int = 0
    resized: int = 0
    stretched: int = 0
    greyed: int = 0
    framed: int = 0


class _Index(msgspec.Struct, frozen=True):
    """What lies in a cache, and of which files."""

    digest: str
    tally: Tally


def read(
    listing: Listing, cached: Path | None, on_corrupt: OnCorrupt | None, on_decoded: OnDecoded | None = None
) -> tuple[tuple[Split, Split, Split], Tally]:
    """Training, validation and test part: uint8 `(n, *shape)`, and int64 labels. And what was done to the pictures.

    Args:
        listing: what is to be read.
        cached: a folder for decoded pictures, used from `WORTH_CACHING` on; None: never.
        on_corrupt: hears of what is left out, in order; None: the first corrupt picture is an error.
        on_decoded: hears how it goes.

    Raises:
        DataError: if a picture cannot be read, no picture of a class can, or their values are no picture's.
    """
    if cached is not None and listing.bytes >= WORTH_CACHING:
        try:
            return _from_cache(listing, cached, on_corrupt, on_decoded)
        except StorageError:
            pass  # a full or read-only disk takes away only the cache
    pictures = np.empty((len(listing.every), *listing.shape), np.uint8)
    tally, keys = _decode(listing, pictures, on_decoded)
    _tell(listing, tally.corrupt, on_corrupt)
    train, validation, test = (Split(pictures[rows], labels) for rows, labels in _parts(listing, tally.corrupt, keys))
    return (train, validation, test), tally


def of_file(error: DataError, file: Path, *, others: int = 0) -> DataError:
    """The same error, naming the file, and how many others have one."""
    more = f" (and {others:,} more)" if others else ""
    return DataError(
        f"cannot read the picture {shown(file)}{more}",
        error.why,
        "mend it, take it out of the folder, or skip what is corrupt with --skip-corrupt",
    )


def shown(name: Path | str) -> str:
    """A path or name as it can be printed and written: file systems allow bytes that are no text."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def white_of(peak: int) -> int:
    """What is white where the largest value of grey in whole numbers is `peak`."""
    return next(white for white in _WHITES if peak <= white)


def real_white_of(peak: float, file: Path) -> float:
    """What is white where the largest value of grey in floats is `peak`, which `file` has.

    Raises:
        DataError: if that cannot be said.
    """
    if _DIMMEST < peak <= _UNIT:
        return 1.0
    if peak <= _WHITES[0] * _DIMMEST:
        raise DataError(
            f"cannot tell what is white in the pictures of {shown(file.parent)}",
            f"their floats go up to {peak:g}, as in {shown(file.name)}",
            "scale them to 0..1 or 0..255, or save them as PNG",
        )
    return float(white_of(math.ceil(peak)))


def _from_cache(
    listing: Listing, cached: Path, on_corrupt: OnCorrupt | None, on_decoded: OnDecoded | None
) -> tuple[tuple[Split, Split, Split], Tally]:
    folder = listing.folder.resolve()
    key = hashlib.sha256(os.fsencode(folder) + f" {listing.shape} {listing.seed}".encode()).hexdigest()[:16]
    place, digest = cached / f"{shown(folder.name)}-{key}", _digest(listing)
    with _alone(place):
        index = _index(place)
        if index is None or index.digest != digest:
            with building(place, _FILES, _is_cache) as half:
                index = _Index(digest, _cache(listing, half, on_decoded))
                (half / _INDEX).write_bytes(msgspec.json.encode(index))
        _tell(listing, index.tally.corrupt, on_corrupt)
        with explained(f"read {place}"):
            train, validation, test = (
                # copy-on-write: what torch shares must be writable, and the file stays as it is
                Split(np.load(place / f"{part}-inputs.npy", mmap_mode="c"), np.load(place / f"{part}-targets.npy"))
                for part in PARTS
            )
    return (train, validation, test), index.tally


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
    digest = hashlib.sha256(f"{_DECODED_AS} {listing.classes} {listing.decoding} {listing.fixed}\n".encode())
    with explained(f"read {listing.folder}"):
        for part, by_class in listing.files.items():
            for name, files in by_class.items():
                digest.update(f"{part} {name}\n".encode())
                for file in files:
                    about = file.stat()
                    digest.update(os.fsencode(file.relative_to(listing.folder)))
                    digest.update(f" {about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _cache(listing: Listing, half: Path, on_decoded: OnDecoded | None) -> Tally:
    """Write the parts' arrays into a folder; return what was done on the way."""
    decoded = half / "decoded.npy"
    pictures = _file(decoded, (len(listing.every), *listing.shape))
    tally, keys = _decode(listing, pictures, on_decoded)
    for part, (rows, labels) in zip(PARTS, _parts(listing, tally.corrupt, keys), strict=True):
        to = _file(half / f"{part}-inputs.npy", (len(rows), *listing.shape))
        for at in range(0, len(rows), _AT_ONCE):
            to[at : at + _AT_ONCE] = pictures[rows[at : at + _AT_ONCE]]
        to.flush()
        np.save(half / f"{part}-targets.npy", labels)
    decoded.unlink()
    return tally


def _file(path: Path, shape: tuple[int, ...]) -> np.memmap[Any, np.dtype[np.uint8]]:
    mapped = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    with path.open("r+b") as file:
        # what a full disk does not give shows here, and not as SIGBUS in the middle of a picture
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return mapped


class _One(NamedTuple):
    """A file that was read: what it held and its key; or why it could not be."""

    seen: Seen | None
    key: int = 0
    why: str = ""


def _decode(
    listing: Listing, into: NDArray[np.uint8], on_decoded: OnDecoded | None
) -> tuple[Tally, NDArray[np.uint64]]:
    """Read all files. Return what was done, and the key of each file's content."""
    files, decoding, seed = listing.every, listing.decoding, str(listing.seed).encode()

    def one(index: int) -> _One:
        file = files[index]
        try:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=8, key=seed))
                if not stream.tell():
                    return _One(None, why="it is empty")
                stream.seek(0)
                seen = decode(stream, into[index], max_pixels=MAX_PIXELS, decoding=decoding)
        except OSError as error:
            return _One(None, why=error.strerror or str(error))
        except DataError as error:
            return _One(None, why=error.why)
        if listing.fixed and (seen.deep > decoding.deep or seen.real > decoding.real * _UNIT):
            brightest, white = (seen.deep, decoding.deep) if seen.deep else (seen.real, decoding.real)
            return _One(None, why=f"its grey goes up to {brightest:g}, and white is {white:g} for this model")
        return _One(seen, int.from_bytes(digest.digest()))

    with ThreadPoolExecutor(cores()) as pool:
        read_: list[_One] = []
        for each in pool.map(one, range(len(files))):
            read_.append(each)
            if on_decoded is not None and (len(read_) % _TOLD_EVERY == 0 or len(read_) == len(files)):
                on_decoded(len(read_), len(files))
        found = [one_.seen for one_ in read_]
        if not listing.fixed and (exact := _exact(found, files)) != decoding:
            decoding = exact
            again = [index for index, seen in enumerate(found) if seen is not None and (seen.deep or seen.real)]
            for _ in pool.map(one, again):
                pass
    _check_colours(found, files)
    return _tally(listing, read_, decoding), np.array([one_.key for one_ in read_], np.uint64)


def _exact(found: Sequence[Seen | None], files: Sequence[Path]) -> Decoding:
    """What is white, now that all values are known."""
    deep = max((seen.deep for seen in found if seen is not None), default=0)
    at, real = max(
        ((at, seen.real) for at, seen in enumerate(found) if seen is not None), key=_second, default=(0, 0.0)
    )
    return Decoding(
        deep=white_of(deep) if deep else Decoding().deep, real=real_white_of(real, files[at]) if real else 1.0
    )


def _second(pair: tuple[int, float]) -> float:
    return pair[1]


def _check_colours(found: Sequence[Seen | None], files: Sequence[Path]) -> None:
    """Raise if colours of 16 bits fill so few of them that the 8 which Pillow reads are nearly empty."""
    cut = [(seen.cut, file) for seen, file in zip(found, files, strict=True) if seen is not None and seen.cut >= 0]
    if not cut:
        return
    brightest, file = max(cut)
    if brightest <= 255 >> 2:
        raise DataError(
            f"the colours of {shown(file)} and {len(cut) - 1:,} others have 16 bits each, of which they fill too few",
            "pictures are read in 8 bits for each colour, and theirs would be nearly black",
            "scale them to all 16 bits, or save them in 8",
        )


def _tally(listing: Listing, read_: Sequence[_One], decoding: Decoding) -> Tally:
    height, width, channels = listing.shape
    found = [one.seen for one in read_ if one.seen is not None]
    ratio = width / height
    return Tally(
        decoding,
        {index: one.why for index, one in enumerate(read_) if one.seen is None},
        deep=sum(seen.deep > 0 for seen in found),
        real=sum(seen.real > 0 for seen in found),
        resized=sum((seen.height, seen.width) != (height, width) for seen in found),
        stretched=sum(abs(seen.width / seen.height / ratio - 1) > _STRETCH for seen in found),
        greyed=sum(seen.colour and channels == 1 for seen in found),
        framed=sum(seen.frames for seen in found),
    )


def _tell(listing: Listing, corrupt: dict[int, str], on_corrupt: OnCorrupt | None) -> None:
    for index in sorted(corrupt):
        error = of_file(
            DataError("", corrupt[index]), listing.every[index], others=0 if on_corrupt else len(corrupt) - 1
        )
        if on_corrupt is None:
            raise error
        on_corrupt(error)


def _parts(
    listing: Listing, corrupt: dict[int, str], keys: NDArray[np.uint64]
) -> Sequence[tuple[NDArray[np.intp], NDArray[np.int64]]]:
    """Which of all files are in training, validation and test part, and their labels."""
    found: dict[str, tuple[NDArray[np.intp], NDArray[np.int64]]] = {}
    at = 0
    for part, by_class in listing.files.items():
        rows: list[int] = []
        labels: list[int] = []
        for name, files in by_class.items():
            kept = [at + index for index in range(len(files)) if at + index not in corrupt]
            if not kept and part in ("all", "train"):
                raise DataError(
                    f"the class {name!r} in {shown(listing.folder)} is empty",
                    f"none of its {len(files)} pictures can be read",
                    "mend them, or remove the folder",
                )
            rows += kept
            labels += [listing.classes.index(name)] * len(kept)
            at += len(files)
        found[part] = np.array(rows, np.intp), np.array(labels, np.int64)
    whole = found.pop("all", None) or found.pop("train")
    missing: tuple[Part, ...] = tuple(part for part in ("validation", "test") if part not in found)
    if missing == ("validation", "test") and len(whole[0]) < FEWEST:
        raise DataError(
            f"{shown(listing.folder)} has {len(whole[0])} pictures", f"a split needs at least {FEWEST}", "add some"
        )
    divided = divide(keys[whole[0]], whole[1], held_out=missing)
    found |= {part: (whole[0][chosen], whole[1][chosen]) for part, chosen in divided.items()}
    return [found[part] for part in PARTS]
