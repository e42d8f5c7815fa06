"""A sketch of the training samples in 2 kB, which a bundle keeps: their smallest hashes (Cohen 1997).

For samples with a hash below the largest of these it is known exactly whether they were trained on. They are a random
subset, so their share is an estimate for all samples.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

MARKS = 128
_HEX = 16
_HASHED = 4096
"""Bytes in the middle of a sample that are hashed."""


def marks_of(samples: NDArray[Any]) -> NDArray[np.uint64]:
    """A hash of each sample, shape `(n,)`."""
    if not samples.size:
        return np.zeros(len(samples), np.uint64)
    found = np.empty(len(samples), np.uint64)
    for row in range(len(samples)):
        content = np.ascontiguousarray(samples[row]).tobytes()
        middle = max(0, len(content) - _HASHED) // 2
        digest = hashlib.blake2b(content[middle : middle + _HASHED], digest_size=8).digest()
        found[row] = int.from_bytes(digest)
    return found


def share_known(marks: str, samples: NDArray[Any]) -> float:
    """The estimated share of `samples` that are in the training part of the `Dataset` with these marks."""
    known = np.array([int(marks[at : at + _HEX], 16) for at in range(0, len(marks), _HEX)], np.uint64)
    hashes = marks_of(samples)
    if len(known) >= MARKS:
        hashes = hashes[hashes <= known.max()]
    return float(np.isin(hashes, known).mean()) if len(hashes) else 0.0
