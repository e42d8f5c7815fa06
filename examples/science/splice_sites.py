"""Write splice sites: 60 letters of DNA, and whether an intron begins or ends in their middle, as arrays.

python examples/science/splice_sites.py splice.npz
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import lzma
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from packages import Package

NAMES = {"ei": "exon to intron", "ie": "intron to exon", "n": "neither"}


class RData:
    """A table of R's `save`, version 2 or 3, in the format "XDR" (R Internals, section 1.8). No code of it is run.

    Args:
        content: of the file.
    """

    def __init__(self, content: bytes) -> None:
        for opener in (gzip, bz2, lzma):
            try:
                content = opener.decompress(content)
                break
            except (OSError, EOFError, lzma.LZMAError):
                continue
        if not content.startswith((b"RDX2\nX\n", b"RDX3\nX\n")):
            raise SystemExit("this is no table of R's save()")
        self._content, self._at = content, 7
        self._symbols: list[str] = []
        version, _, _ = (self._integer() for _ in range(3))
        if version == 3:
            self._at += self._integer()  # the name of an encoding

    def tables(self) -> dict[str, dict[str, Any]]:
        """Name -> column -> a list of numbers or texts; factors as texts."""
        return dict(self._item())

    def _integer(self) -> int:
        (value,) = struct.unpack_from(">i", self._content, self._at)
        self._at += 4
        return value

    def _numbers(self, letter: str, size: int) -> list[Any]:
        count = self._integer()
        values = struct.unpack_from(f">{count}{letter}", self._content, self._at)
        self._at += size * count
        return list(values)

    def _item(self) -> Any:
        flags = self._integer()
        kind, has_attributes, has_tag = flags & 255, flags & 512, flags & 1024
        if kind in (254, 242, 253):
            return None
        if kind == 255:
            return self._symbols[(flags >> 8 or self._integer()) - 1]
        if kind == 1:
            self._symbols.append(self._item())
            return self._symbols[-1]
        if kind == 2:  # a list of pairs
            pairs = []
            while kind == 2:
                if has_attributes:
                    self._item()
                tag = self._item() if has_tag else None
                pairs.append((tag, self._item()))
                flags = self._integer()
                kind, has_attributes, has_tag = flags & 255, flags & 512, flags & 1024
            return pairs
        if kind == 9:
            length = self._integer()
            if length < 0:
                return None
            text = self._content[self._at : self._at + length].decode("latin-1")
            self._at += length
            return text
        if kind in (10, 13):
            value: Any = self._numbers("i", 4)
        elif kind == 14:
            value = self._numbers("d", 8)
        elif kind in (16, 19):
            value = [self._item() for _ in range(self._integer())]
        elif kind == 238:
            _, value, _ = self._item(), self._item(), self._item()
            return value
        else:
            raise SystemExit(f"the table holds a value of R's type {kind}, which is not read here")
        attributes = dict(self._item()) if has_attributes else {}
        if "levels" in attributes:
            return [None if place < 1 else attributes["levels"][place - 1] for place in value]
        return dict(zip(attributes["names"], value, strict=True)) if kind == 19 and "names" in attributes else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    (table,) = RData(Package("r-cran-mlbench").read("data/DNA.rda")).tables().values()
    labels = np.array([NAMES[label] for label in table.pop("Class")])
    # three indicators a letter; a letter without any is the fourth
    marks = np.array(list(table.values())).astype(np.float32).T.reshape(len(labels), -1, 3)
    letters = np.concatenate([marks, 1 - marks.sum(axis=2, keepdims=True)], axis=2)
    np.savez(out, x=letters, y=labels)
    print(f"{len(labels)} sequences of {letters.shape[1]} letters in {out}")


if __name__ == "__main__":
    main()
