"""YAML from plain values, as much of it as manifests need: mappings, lists, text, numbers and truth values."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence

Value = str | int | float | bool | Sequence["Value"] | Mapping[str, "Value"]

_PLAIN = re.compile(r"[A-Za-z/][\w./-]*(?::[\w./-]+)*")
_BREAKS = re.compile("[\\x7f-\\x9f\\u2028\\u2029\\ufeff\\ufffe\\uffff]")
"""That YAML takes for the end of a line, or forbids."""
_WORDS = frozenset(("true", "false", "yes", "no", "on", "off", "null", "y", "n"))
"""That YAML 1.1 or 1.2 takes for something other than text."""


def document(value: Mapping[str, Value]) -> str:
    """One document, in block style, that reads back equal under YAML 1.1 and 1.2."""
    return "\n".join(_lines(value)) + "\n"


def _lines(value: Value) -> Iterator[str]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _joined(f"{_text(key)}:", inner)
    elif isinstance(value, Sequence) and not isinstance(value, str) and value:
        for inner in value:
            first, *rest = _lines(inner)
            yield f"- {first}"
            yield from (f"  {line}" for line in rest)
    else:
        yield _scalar(value)


def _joined(key: str, value: Value) -> Iterator[str]:
    """A key with its value: on its line, or indented below."""
    if isinstance(value, str | int | float) or not value:
        yield f"{key} {_scalar(value)}"
        return
    yield key
    yield from (f"  {line}" for line in _lines(value))


def _scalar(value: Value) -> str:
    return _text(value) if isinstance(value, str) else json.dumps(value)


def _text(text: str) -> str:
    """Quoted as JSON, which is YAML, where it could be read as anything but this text."""
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
        return text
    return _BREAKS.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(text, ensure_ascii=False))
