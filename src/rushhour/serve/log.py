"""Structured logs on standard error: what happens to the server, and on request each request.

A record is an event with fields: `event(INFO, "ready", url=...)`. One line each: JSON for machines, or text for people.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from rushhour.serve.orders import LogLevel

LogFormat = Literal["json", "text"]

_LOGGER = logging.getLogger("rushhour.serve")


def event(level: int, what: str, /, **fields: Any) -> None:
    """Log that something happened.

    Args:
        level: of `logging`.
        what: in a few words that are always the same.
        fields: what was particular about it.
    """
    if _LOGGER.isEnabledFor(level):
        _LOGGER.log(level, "%s", what, extra={"fields": fields})


def usual_format() -> LogFormat:
    """Text on a terminal, else JSON."""
    return "text" if sys.stderr.isatty() else "json"


@contextmanager
def to_stderr(form: LogFormat, level: LogLevel) -> Iterator[None]:
    """For as long as this lasts, the server's log goes to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Text())
    before, propagates = _LOGGER.level, _LOGGER.propagate
    _LOGGER.addHandler(handler)
    _LOGGER.propagate = False
    set_level(level)
    try:
        yield
    finally:
        _LOGGER.removeHandler(handler)
        _LOGGER.propagate = propagates
        _LOGGER.setLevel(before)


def set_level(level: LogLevel) -> None:
    """Log what is at least so serious, from now on."""
    _LOGGER.setLevel(level.upper())


def level() -> int:
    """From which level of `logging` on the server logs."""
    return _LOGGER.getEffectiveLevel()


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = getattr(record, "fields", {})
    return fields


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            "pid": os.getpid(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created).astimezone().isoformat(sep=" ", timespec="milliseconds")
        # As JSON, so that a client's line breaks and quotes stay inside their field.
        fields = [
            f"{name}={msgspec.json.encode(value, enc_hook=str).decode()}" for name, value in _fields(record).items()
        ]
        line = " ".join((moment, record.levelname, record.getMessage(), *fields))
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line
