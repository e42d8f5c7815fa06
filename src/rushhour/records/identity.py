"""What a result was made of: as a key that holds all of it, and in words where another result was made of other things.

A key is made of named inputs, never put together by hand from those that somebody thought of: whatever a computation is
given goes into `key`, and the computation is given nothing else.
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
"""Inputs whose values say nothing to a person."""


@runtime_checkable
class Identified(Protocol):
    """Something large that says itself what it is."""

    @property
    def content_key(self) -> str:
        """The same for the same content, and for no other."""
        ...


def key(**inputs: Any) -> str:
    """SHA-256 of named inputs, the same in whatever order.

    Args:
        inputs: anything that JSON can hold, structs, and what is `Identified`: bundles, data sets.
    """
    named = {name: value.content_key if isinstance(value, Identified) else value for name, value in inputs.items()}
    return hashlib.sha256(msgspec.json.encode(named, order="sorted")).hexdigest()


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In words, each input that differs: `lr 0.002 before, 0.001 now`; `the code of nets`; empty where none does."""
    said = []
    before, now = _plain(before), _plain(now)
    for name in dict.fromkeys((*now, *before)):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if name == "code":
            said.append(f"the code of {', '.join(_modules(str(old or ''), str(new or '')))}")
        elif name in WORDS:
            said.append(WORDS[name])
        else:
            said.append(f"{name} {_value(old)} before, {_value(new)} now")
    return said


def _plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """As they come back from a file: tuples as lists."""
    return msgspec.json.decode(msgspec.json.encode(dict(facts)), type=dict[str, Any])


def _modules(before: str, now: str) -> list[str]:
    """Of two lists `module=hash module=hash`, the modules that differ."""
    old, new = ({each.partition("=")[0]: each for each in text.split()} for text in (before, now))
    return [name for name in dict.fromkeys((*new, *old)) if old.get(name) != new.get(name)] or ["the model"]


def _value(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
