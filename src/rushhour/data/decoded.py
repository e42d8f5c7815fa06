"""Decodes pictures in files into arrays in three parts: in memory, or in a mapped cache on disk for many of them."""

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
from rushhour.picture import PictureInfo, decode
from rushhour.system.machine import cores
from rushhour.system.storage import building, explained

WORTH_CACHING = 64_000_000
"""Bytes of decoded pictures from which on they are cached on disk; fewer are decoded faster than looked up."""

MAX_PIXELS = 64_000_000
"""Pixels of the largest picture that is read."""

_INDEX = "index.json"
_FILES = (_INDEX, "decoded.npy", *(f"{part}-{what}.npy" for part in PARTS for what in ("inputs", "targets")))

_DECODED_AS = 3
"""To be increased when the decoder changes, so that caches that were written before are not used."""
_AT_ONCE = 256
_TOLD_EVERY = 16
_WHITES = (255, 1023, 4095, 16_383, 65_535)
"""The largest values of 8, 10, 12, 14 and 16 bits."""
_UNIT, _DIMMEST = 1.001, 1 / 16
"""Floats up to the first are in 0..1; where none is above the second, few of the 8 bits would be used."""
_STRETCH = 0.02
"""Difference of aspect ratios from which on a picture counts as stretched."""

OnCorrupt = Callable[[DataError], None]
"""Called with the error of each picture that cannot be read and is left out."""

OnDecoded = Callable[[int, int], None]
"""Called now and then with how many pictures are decoded, and of how many."""


class Listing(NamedTuple):
    """Pictures to be read.

    Attributes:
        folder: below which they all are.
        files: part (`train`, `validation`, `test`, or `all` of them) -> the files of each class.
        classes: all of them, in the order of their labels.
        shape: of each once decoded: height, width, channels.
        seed: of the samples that are held out of `all`, or of `train` where there is no `validation` or `test`.
        decoding: the value of white in pictures of more than 8 bits, as far as it is known.
        fixed: whether it is final, because a model was trained with it; brighter pictures then cannot be read.
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
        """Of all pictures, once decoded."""
        return len(self.every) * math.prod(self.shape)


class Tally(msgspec.Struct, frozen=True):
    """How the pictures were changed when they were decoded.

    Attributes:
        decoding: the value of white in those of more than 8 bits.
        corrupt: index of a file that could not be read -> why.
        deep: pictures of 16 bits of grey.
        real: pictures in floats.
        resized: pictures with another size than the samples.
        stretched: pictures with another aspect ratio.
        greyed: colour pictures, where samples are grey.
        framed: pictures with several frames, of which the first was read.
        repeated: part of the user's own -> its files with the content of one in `train`.
        contradicting: contents that are in several classes; two files with one of them.
    """

    decoding: Decoding
    corrupt: dict[int, str]
    deep: int = 0
    real: int = 0
    resized: int = 0
    stretched: int = 0
    greyed: int = 0
    framed: int = 0
    repeated: dict[str, int] = {}
    contradicting: int = 0
    contradiction: tuple[str, str] = ("", "")


class _Index(msgspec.Struct, frozen=True):
    """The content of a cache, and the files that it is of."""

    digest: str
    tally: Tally


def read(
    listing: Listing, cached: Path | None, on_corrupt: OnCorrupt | None, on_decoded: OnDecoded | None = None
) -> tuple[tuple[Split, Split, Split], Tally]:
    """Training, validation and test part: uint8 `(n, *shape)`, and int64 labels. And how the pictures were changed.

    Args:
        listing: the pictures.
        cached: a folder for decoded pictures, used from `WORTH_CACHING` on; None: never.
        on_corrupt: see `OnCorrupt`, in order; None: the first corrupt picture is an error.
        on_decoded: see `OnDecoded`.

    Raises:
        DataError: if a picture cannot be read, no picture of a class can, or the value of white is not known.
    """
    if cached is not None and listing.bytes >= WORTH_CACHING:
        try:
            return _from_cache(listing, cached, on_corrupt, on_decoded)
        except StorageError:
            pass  # a full or read-only disk: go on without the cache
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
        "repair it, remove it from the folder, or leave out corrupt pictures with --skip-corrupt",
    )


def shown(name: Path | str) -> str:
    """A path or name as text: file systems allow bytes that are not valid text."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def white_of(peak: int) -> int:
    """The value of white where the largest value of grey is `peak`, a whole number."""
    return next(white for white in _WHITES if peak <= white)


def real_white_of(peak: float, file: Path) -> float:
    """The value of white where the largest value of grey in floats is `peak`, in `file`.

    Raises:
        DataError: if it is not known.
    """
    if _DIMMEST < peak <= _UNIT:
        return 1.0
    if peak <= _WHITES[0] * _DIMMEST:
        raise DataError(
            f"the value of white is not known in the pictures of {shown(file.parent)}",
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
    """Lock the cache: all workers on one machine need it at the same time."""
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
    """A hash of the names, sizes and times of the files; hashing their content would take as long as decoding."""
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
    """Write the parts' arrays into a folder; return how the pictures were changed."""
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
        # a full disk raises here, and not as SIGBUS in the middle of a picture
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return mapped


class _One(NamedTuple):
    """A file that was read: its picture and its key; or why it could not be read."""

    seen: PictureInfo | None
    key: int = 0
    why: str = ""


def _decode(
    listing: Listing, into: NDArray[np.uint8], on_decoded: OnDecoded | None
) -> tuple[Tally, NDArray[np.uint64]]:
    """Decode all files. Return how they were changed, and the key of each file's content."""
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
            return _One(None, why=f"its grey values go up to {brightest:g}, and white is {white:g} for this model")
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


def _exact(found: Sequence[PictureInfo | None], files: Sequence[Path]) -> Decoding:
    """The value of white, now that all values are known."""
    deep = max((seen.deep for seen in found if seen is not None), default=0)
    at, real = max(
        ((at, seen.real) for at, seen in enumerate(found) if seen is not None), key=_second, default=(0, 0.0)
    )
    return Decoding(
        deep=white_of(deep) if deep else Decoding().deep, real=real_white_of(real, files[at]) if real else 1.0
    )


def _second(pair: tuple[int, float]) -> float:
    return pair[1]


def _check_colours(found: Sequence[PictureInfo | None], files: Sequence[Path]) -> None:
    """Raise if colours of 16 bits use so few of them that Pillow, which reads 8, reads nearly black pictures."""
    cut = [(seen.cut, file) for seen, file in zip(found, files, strict=True) if seen is not None and seen.cut >= 0]
    if not cut:
        return
    brightest, file = max(cut)
    if brightest <= 255 >> 2:
        raise DataError(
            f"the colours of {shown(file)} and {len(cut) - 1:,} others have 16 bits each, of which they use too few",
            "pictures are read with 8 bits for each colour, and these would be nearly black",
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
        **_equal(listing, read_),
    )


def _equal(listing: Listing, read_: Sequence[_One]) -> dict[str, Any]:
    """Files of equal content that should not be: in two parts, or in two classes."""
    seen: dict[int, dict[str, Path]] = {}
    parts: dict[str, list[int]] = {}
    ones = iter(read_)
    for part, by_class in listing.files.items():
        for name, files in by_class.items():
            for file in files:
                one = next(ones)
                if one.seen is not None:
                    seen.setdefault(one.key, {}).setdefault(name, file)
                    parts.setdefault(part, []).append(one.key)
    own = set(parts.pop("train", ()))
    repeated = {part: count for part, keys in parts.items() if (count := sum(key in own for key in keys))}
    doubtful = [tuple(by_class.values()) for by_class in seen.values() if len(by_class) > 1]
    first = [shown(file.relative_to(listing.folder)) for file in doubtful[0][:2]] if doubtful else ["", ""]
    return {"repeated": repeated, "contradicting": len(doubtful), "contradiction": tuple(first)}


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
    """The files of training, validation and test part, as indices, and their labels."""
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
                    "repair them, or remove the folder",
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
