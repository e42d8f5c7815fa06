"""Which samples train, validate and test: by what they hold, so that more data moves none of them to another part.

A sample's place is a hash of its content and the seed: the lowest tenth is for testing, the next for validation, the
rest for training. What was tested yesterday is then not trained on tomorrow, and the reverse, whatever was added,
renamed or taken away in between. The price: parts are a tenth on average, not exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rushhour.data.dataset import Split

SHARE = 0.1
"""Of all samples, in each part that is held out."""

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")
_NAMES: dict[Part, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
PART_OF: dict[str, Part] = {name: part for part, names in _NAMES.items() for name in names}
"""What people call the parts, in lower case."""
_ZONES: dict[Part, tuple[float, float]] = {"test": (0.0, SHARE), "validation": (SHARE, 2 * SHARE)}


def keys_of(contents: Iterable[bytes], *, seed: int) -> NDArray[np.uint64]:
    """A number for each content, spread evenly over all of 64 bits; equal contents have equal ones."""
    with_seed = str(seed).encode()
    digests = b"".join(hashlib.blake2b(each, digest_size=8, key=with_seed).digest() for each in contents)
    return np.frombuffer(digests, ">u8").astype(np.uint64)


def keys_of_rows(array: NDArray[Any], *, seed: int) -> NDArray[np.uint64]:
    """The key of each row of an array of any type; see `keys_of`."""
    if not array.size:
        return np.zeros(len(array), np.uint64)
    rows = np.ascontiguousarray(array).reshape(len(array), -1)
    return keys_of((row.tobytes() for row in rows), seed=seed)


def divide(
    keys: NDArray[np.uint64],
    labels: NDArray[Any] | None = None,
    *,
    held_out: tuple[Part, ...] = ("validation", "test"),
) -> dict[Part, NDArray[np.intp]]:
    """The rows of each part, in an order that is as random as the keys.

    Every class has a row in training, and no part is empty if there are rows enough: where that takes a row from its
    place, it may move once there are more. Equal contents share a part, unless most rows have an equal.

    Args:
        keys: of the rows, from `keys_of`.
        labels: of the rows, where they have any.
        held_out: the parts to be held out of training.
    """
    spread = _told_apart(keys)
    place = spread / 2.0**64
    part = np.zeros(len(keys), np.intp)
    for number, name in enumerate(held_out, 1):
        low, high = _ZONES[name]
        part[(low <= place) & (place < high)] = number
    classes = np.zeros(len(keys), np.intp)
    if labels is not None:
        classes = np.unique(labels, return_inverse=True)[1].reshape(-1)
    for label in np.flatnonzero(np.bincount(classes[part == 0], minlength=classes.max() + 1) == 0):
        members = np.flatnonzero(classes == label)
        part[members[spread[members].argmax()]] = 0
    for number in range(len(held_out), 0, -1):
        if (part == number).any():
            continue
        trained = np.bincount(classes[part == 0], minlength=classes.max() + 1)
        size = np.bincount(part, minlength=len(held_out) + 1)
        spare = np.flatnonzero(np.where(part == 0, trained[classes] > 1, size[part] > 1))
        if len(spare):
            part[spare[spread[spare].argmin()]] = number
    order = np.argsort(spread, kind="stable")
    return {name: order[part[order] == number] for number, name in enumerate(("train", *held_out))}


def stratified(whole: Split, shares: tuple[float, ...], *, seed: int) -> tuple[Split, ...]:
    """What is left of data that never grows, and parts held out of it, with their share of every whole-number label.

    Args:
        whole: two samples or more for each part.
        shares: of the parts, each above 0; a part has one sample at least.
        seed: of the choice.
    """
    random = np.random.default_rng(seed)
    order = random.permutation(len(whole.inputs))
    if np.issubdtype(whole.targets.dtype, np.integer) and whole.targets.ndim == 1:
        # Samples of a class, spread evenly over 0..1: whichever stretch is cut off has its share of every class, and
        # the end that is kept has at least one of each.
        _, label, count = np.unique(whole.targets[order], return_inverse=True, return_counts=True)
        by_class = np.argsort(label, kind="stable")
        rank = np.empty(len(order))
        rank[by_class] = np.concatenate([[*(np.arange(1, n) - random.random()) / n, 1.0] for n in count])
        order = order[np.argsort(rank, kind="stable")]
    parts, at = [], 0
    for share in shares:
        end = at + max(1, round(share * len(order)))
        parts.append(order[at:end])
        at = end
    return tuple(Split(whole.inputs[rows], whole.targets[rows]) for rows in (random.permutation(order[at:]), *parts))


def _told_apart(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The keys; where most rows have an equal, as in tables of a few columns, each copy gets a key of its own."""
    unique, which, count = np.unique(keys, return_inverse=True, return_counts=True)
    if 2 * len(unique) >= len(keys):
        return keys
    order = np.argsort(which, kind="stable")
    copy = np.empty(len(keys), np.uint64)
    copy[order] = np.arange(len(keys)) - np.repeat(np.cumsum(count) - count, count)
    # splitmix64 (Steele et al. 2014)
    mixed = keys + copy * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    told: NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(31))
    return told
