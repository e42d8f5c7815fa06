"""The inputs of a result: as a key over all of them, and their differences in words.

A key is made of named inputs: everything that a computation is given goes into `key`, and it is given nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Final, Protocol, runtime_checkable

import msgspec

WORDS: Final = {
    "fingerprint": "the data",
    "graph": "what the network computes",
    "weights": "the weights that the network begins with",
    "factory": "the model",
    "arguments": "the model's arguments",
    "preprocessing": "how samples are scaled",
    "task": "what the model is for",
    "steps": "settings of steps",
}
"""Inputs whose values mean nothing to a user, such as hashes, and what to call them."""


@runtime_checkable
class Identified(Protocol):
    """Something large that has a key of its own."""

    @property
    def content_key(self) -> str:
        """Equal for equal content only."""
        ...


def key(**inputs: Any) -> str:
    """SHA-256 of named inputs, independent of their order.

    Args:
        inputs: JSON values, structs, and `Identified` objects: bundles, data sets.
    """
    named = {name: value.content_key if isinstance(value, Identified) else value for name, value in inputs.items()}
    return hashlib.sha256(msgspec.json.encode(named, order="sorted")).hexdigest()


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Each input that differs, in words: `lr 0.002 before, 0.001 now`; `the code of nets`."""
    found = []
    before, now = _plain(before), _plain(now)
    for name in dict.fromkeys((*now, *before)):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if name == "code":
            found.append(f"the code of {', '.join(_modules(str(old or ''), str(new or '')))}")
        elif name in WORDS:
            found.append(WORDS[name])
        else:
            found.append(f"{name} {_value(old)} before, {_value(new)} now")
    return found


def _plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts as JSON has them: tuples as lists."""
    return msgspec.json.decode(msgspec.json.encode(dict(facts)), type=dict[str, Any])


def _modules(before: str, now: str) -> list[str]:
    """The modules that differ between two lists `module=hash module=hash`."""
    old, new = ({each.partition("=")[0]: each for each in text.split()} for text in (before, now))
    return [name for name in dict.fromkeys((*new, *old)) if old.get(name) != new.get(name)] or ["the model"]


def _value(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
