"""Fashion-MNIST: 60,000 + 10,000 pictures of clothing, 28x28, MIT licence (Xiao, Rasul, Vollgraf 2017).

It is looked up in Rushhour's cache and in Debian's folder; else downloaded from its home and checked by its checksum,
or, on a Debian-like machine that cannot reach it, extracted from Debian's package without installing it.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import os
import shutil
import struct
import subprocess
import tempfile
import urllib.request
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rushhour.bundle import Preprocessing
from rushhour.data.dataset import Dataset, Split
from rushhour.errors import DataError, StorageError
from rushhour.system.storage import home, write_whole
from rushhour.task import Task

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_FILES = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
"""SHA-256 of the unpacked content: Debian packs the same bytes again."""
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_PACKAGE = "dataset-fashion-mnist"
_HOME = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion"
_MIRROR = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
_VALIDATION = 5_000
_SECONDS = 20
_LARGEST = 64_000_000
"""Bytes of a file, packed or not, that are read at most; the largest real one has 47 million."""

Run = Callable[[list[str], Path], None]
"""Runs a command in a folder; raises OSError or subprocess.SubprocessError if it fails."""


def fashion_mnist() -> Dataset:
    """55,000 / 5,000 / 10,000 pictures, uint8 `(n, 28, 28, 1)`, in ten classes; validation is the end of train.

    Raises:
        DataError: if it cannot be found or downloaded, or its files are damaged.
    """
    folder = find(cache())
    train_images = _read(folder / "train-images-idx3-ubyte.gz", 3)[..., np.newaxis]
    train_labels = _read(folder / "train-labels-idx1-ubyte.gz", 1).astype(np.int64)
    test = Split(
        _read(folder / "t10k-images-idx3-ubyte.gz", 3)[..., np.newaxis],
        _read(folder / "t10k-labels-idx1-ubyte.gz", 1).astype(np.int64),
    )
    return Dataset(
        name="fashion-mnist",
        task=Task.classification(CLASSES),
        train=Split(train_images[:-_VALIDATION], train_labels[:-_VALIDATION]),
        validation=Split(train_images[-_VALIDATION:], train_labels[-_VALIDATION:]),
        test=test,
        preprocessing=Preprocessing(scale=1 / 255, mean=(0.286,), std=(0.353,), layout="NHWC->NCHW"),
        # the checksums of the files identify their content: 55 MB of pixels need not be hashed again
        fingerprint=hashlib.sha256(f"{sorted(_FILES.values())} {_VALIDATION}".encode()).hexdigest(),
    )


def cache() -> Path:
    """The folder of downloads: `$RUSHHOUR_DATA`, else `rushhour` in the user's cache folder."""
    if own := os.environ.get("RUSHHOUR_DATA"):
        return Path(own).expanduser()
    if own := os.environ.get("XDG_CACHE_HOME"):
        return Path(own) / "rushhour"
    return home() / ".cache" / "rushhour"


def find(
    cached: Path, *, debian: Path = _DEBIAN, homes: tuple[str, ...] = (_HOME, _MIRROR), run: Run | None = None
) -> Path:
    """The folder with the four files, downloaded into `cached` if they are not found.

    Args:
        cached: the cache's folder.
        debian: where Debian's package installs them.
        homes: the URLs they are downloaded from, in order.
        run: runs Debian's tools; a seam for tests.

    Raises:
        DataError: with all that was tried.
    """
    own = cached / "fashion-mnist"
    for folder in (own, debian):
        if all((folder / name).is_file() for name in _FILES):
            return folder
    tried = [str(own), str(debian)]
    ways = {home: partial(_download, home, own) for home in homes}
    ways[f"apt-get download {_PACKAGE}"] = partial(_unpack, own, run or _run)
    for way, get in ways.items():
        try:
            get()
            return own
        except (OSError, http.client.HTTPException, subprocess.SubprocessError, StorageError) as error:
            tried.append(f"{way} ({' '.join(str(error).split()) or type(error).__name__})")
    raise DataError(
        "cannot find or download Fashion-MNIST",
        f"tried {'; '.join(tried)}",
        f"run `apt-get install {_PACKAGE}`, or put its four .gz files into {own} (RUSHHOUR_DATA names another folder)",
    )


def _download(home: str, folder: Path) -> None:
    for name, checksum in _FILES.items():
        with urllib.request.urlopen(f"{home}/{name}", timeout=_SECONDS) as response:
            _keep(folder / name, response.read(_LARGEST), checksum, f"{home}/{name}")


def _unpack(folder: Path, run: Run) -> None:
    """Extract the files from Debian's package: needs no root, unless the package lists are empty."""
    with tempfile.TemporaryDirectory() as temporary:
        at = Path(temporary)
        try:
            run(["apt-get", "download", "-qq", _PACKAGE], at)
        except (OSError, subprocess.SubprocessError):
            if os.geteuid() != 0:
                raise
            run(["apt-get", "update", "-qq"], at)
            run(["apt-get", "download", "-qq", _PACKAGE], at)
        packages = [str(file) for file in at.glob("*.deb")]
        if not packages:
            raise FileNotFoundError("apt-get left no package")
        run(["dpkg-deb", "-x", packages[0], "unpacked"], at)
        for name, checksum in _FILES.items():
            _keep(folder / name, (at / "unpacked" / _DEBIAN.relative_to("/") / name).read_bytes(), checksum, _PACKAGE)


def _run(command: list[str], folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(f"{command[0]} is not installed")
    # apt's unprivileged downloader may not write into our folder, and falls back with a warning: it is not shown
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300)


def _keep(file: Path, content: bytes, checksum: str, source: str) -> None:
    try:
        found = hashlib.sha256(gzip.GzipFile(fileobj=io.BytesIO(content)).read(_LARGEST)).hexdigest()
    except (OSError, EOFError, zlib.error) as error:
        raise OSError(f"{source} is not a gzip file: {error}") from error
    if found != checksum:
        raise OSError(f"{source} has another content than expected: its SHA-256 is {found}")
    write_whole(file, content)


def _read(file: Path, dimensions: int) -> NDArray[Any]:
    """An IDX file of unsigned bytes (yann.lecun.com/exdb/mnist): shape from its header."""
    try:
        with gzip.open(file) as stream:
            content = stream.read(_LARGEST)
        if hashlib.sha256(content).hexdigest() != _FILES[file.name]:
            raise ValueError("its content is not that of Fashion-MNIST: the SHA-256 differs")
        magic, *shape = struct.unpack_from(f">{1 + dimensions}I", content)
        if magic != 0x0800 + dimensions:
            raise ValueError(f"its magic number is {magic:#x}")
        # a copy: arrays that torch shares must be writable
        return np.frombuffer(content, np.uint8, offset=4 * (1 + dimensions)).reshape(shape).copy()
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise DataError(f"cannot read {file}", str(error), "delete it, and it is downloaded again") from error
