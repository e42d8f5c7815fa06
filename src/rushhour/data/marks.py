"""By what a bundle remembers which samples it was trained on, in 2 kB: the smallest hashes of them (Cohen 1997).

Whether a sample with a hash below the largest of these was trained on is known exactly, and which samples have such a
hash is chance: so their share is an estimate for all.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

MARKS = 128
_HEX = 16
_LOOKED_AT = 4096
"""Bytes in the middle of a sample that its hash is of."""


def marks_of(samples: NDArray[Any]) -> NDArray[np.uint64]:
    """A hash of each sample, shape `(n,)`."""
    if not samples.size:
        return np.zeros(len(samples), np.uint64)
    found = np.empty(len(samples), np.uint64)
    for row in range(len(samples)):
        content = np.ascontiguousarray(samples[row]).tobytes()
        middle = max(0, len(content) - _LOOKED_AT) // 2
        digest = hashlib.blake2b(content[middle : middle + _LOOKED_AT], digest_size=8).digest()
        found[row] = int.from_bytes(digest)
    return found


def share_known(marks: str, samples: NDArray[Any]) -> float:
    """About which share of `samples` is among those that a `Dataset` with these marks is trained on."""
    known = np.array([int(marks[at : at + _HEX], 16) for at in range(0, len(marks), _HEX)], np.uint64)
    hashes = marks_of(samples)
    if len(known) >= MARKS:
        hashes = hashes[hashes <= known.max()]
    return float(np.isin(hashes, known).mean()) if len(hashes) else 0.0
