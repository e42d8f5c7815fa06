"""Which part a sample belongs to: decided by its content, so that more data moves no sample to another part.

A hash of the sample's content and the seed decides: the lowest tenth is for testing, the next for validation, the rest
for training. So no test sample becomes a training sample later, or the reverse, when samples are added, renamed or
removed. The cost: a part is a tenth on average, not exactly.
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
"""Usual names of the parts, in lower case -> part."""
_ZONES: dict[Part, tuple[float, float]] = {"test": (0.0, SHARE), "validation": (SHARE, 2 * SHARE)}


def keys_of(contents: Iterable[bytes], *, seed: int) -> NDArray[np.uint64]:
    """A uniformly distributed 64-bit number for each content; equal contents have equal numbers."""
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
    """The rows of each part, in a random order given by the keys.

    Every class has a row in training, and no part is empty if there are enough rows: a row that is moved for that may
    move back when there are more. Equal contents are in the same part, unless most rows are duplicates.

    Args:
        keys: of the rows, from `keys_of`.
        labels: of the rows, where they have any.
        held_out: the parts to be held out of training.
    """
    spread = _without_duplicates(keys)
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


def divide_groups(
    groups: NDArray[Any], *, seed: int, held_out: tuple[Part, ...] = ("validation", "test")
) -> dict[Part, NDArray[np.intp]]:
    """The rows of each part, so that all of a group are in one: a tenth of the groups on average for each held out.

    Args:
        groups: of the rows, whole numbers or text of shape `(n,)`.
        seed: of the choice.
        held_out: as of `divide`.
    """
    names, member = np.unique(groups, return_inverse=True)
    keys = keys_of((str(name).encode() for name in names.tolist()), seed=seed)
    random = np.random.default_rng(seed)
    parts = divide(keys, held_out=held_out)
    return {part: random.permutation(np.flatnonzero(np.isin(member, chosen))) for part, chosen in parts.items()}


def stratified(whole: Split, shares: tuple[float, ...], *, seed: int) -> tuple[Split, ...]:
    """The training part and parts held out of data that never grows, each with its share of every whole-number label.

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


def _without_duplicates(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The keys; where most rows are duplicates, as in tables of a few columns, each copy gets a key of its own."""
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
    unique_keys: NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(31))
    return unique_keys
