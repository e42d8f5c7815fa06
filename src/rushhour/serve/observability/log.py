"""Structured logs on standard error: what happens to the server, and on request each request.

A record is an event with fields: `event(INFO, "ready", url=...)`. One line each: JSON for machines, or text for people.
What other libraries log at level warning or above is a record of the same form, with the event `library`.

Logging never blocks on the reader of the log: lines are put into a bounded queue, and a thread writes them. While the
queue is full, further lines are dropped and counted (`dropped`), and a record reports them as soon as the log is read
again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

LogFormat = Literal["json", "text"]
LogLevel = Literal["debug", "info", "warning", "error", "critical"]

_LOGGER = logging.getLogger("rushhour.serve")
_QUEUE_BYTES = 2**19
_ATOMIC_BYTES = 4096
"""PIPE_BUF of Linux: writes up to it stay whole where several processes write into one pipe. Source: pipe(7)."""
_FLUSH_S = 1.0
"""At the end, the time that the reader of the log has to read what is queued."""


def event(level: int, what: str, /, **fields: Any) -> None:
    """Log that something happened.

    Args:
        level: of `logging`.
        what: the event's name.
        fields: of this one event.
    """
    if _LOGGER.isEnabledFor(level):
        _LOGGER.log(level, "%s", what, extra={"fields": fields})


def failure(what: str, error: BaseException, /, **fields: Any) -> None:
    """Log an error that should not have happened, with its traceback."""
    _LOGGER.error("%s", what, extra={"fields": {**fields, "error": repr(error)}}, exc_info=error)


def default_format() -> LogFormat:
    """Text on a terminal, else JSON."""
    return "text" if sys.stderr is not None and sys.stderr.isatty() else "json"


@contextmanager
def to_stderr(form: LogFormat, level: LogLevel) -> Iterator[None]:
    """Within this context the server's log goes to standard error, and with it what other libraries log.

    If the program has logging handlers of its own, other libraries keep those.
    """
    global _handler
    handler = _Handler(_Json() if form == "json" else _Text())
    root = logging.getLogger()
    before, propagates, outer = _LOGGER.level, _LOGGER.propagate, _handler
    with contextlib.ExitStack() as undone:
        undone.callback(handler.close)
        if not root.handlers:
            undone.callback(root.removeHandler, handler)
            root.addHandler(handler)
            undone.enter_context(_hooks())
        _LOGGER.addHandler(handler)
        _LOGGER.propagate = False
        _handler = handler
        set_level(level)
        try:
            yield
        finally:
            _handler = outer
            _LOGGER.removeHandler(handler)
            _LOGGER.propagate = propagates
            _LOGGER.setLevel(before)


def set_level(level: LogLevel) -> None:
    """Log records of this level and above, from now on."""
    _LOGGER.setLevel(level.upper())


def level() -> int:
    """The level of `logging` from which records are logged."""
    return _LOGGER.getEffectiveLevel()


def dropped() -> int:
    """Lines that were dropped since the log began, because it was not read or could not be written."""
    return 0 if _handler is None else _handler.dropped


def flush(within_s: float) -> None:
    """Wait until all lines are written, but no longer than this: before the process is ended by `os._exit`."""
    if _handler is not None:
        _handler.drain(within_s)


@contextmanager
def _hooks() -> Iterator[None]:
    """Log the exceptions and warnings that Python would print: printing blocks on the reader."""
    unraisable, threads = sys.unraisablehook, threading.excepthook

    def ignored(arguments: sys.UnraisableHookArgs) -> None:
        if arguments.exc_value is not None:
            failure("exception ignored", arguments.exc_value, where=repr(arguments.object))

    def ended(arguments: threading.ExceptHookArgs) -> None:
        if arguments.exc_value is not None:
            name = arguments.thread.name if arguments.thread is not None else ""
            failure("thread ended", arguments.exc_value, thread=name)

    sys.unraisablehook, threading.excepthook = ignored, ended
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        sys.unraisablehook, threading.excepthook = unraisable, threads


class _Handler(logging.Handler):
    """Queues formatted lines for a thread that writes them to standard error."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self.dropped = 0
        self._reported = 0
        self._write = _writer()
        self._lines: deque[bytes] = deque()
        self._size = 0
        self._closed = False
        # Reentrant: a signal's handler may log while this thread is inside.
        self._changed = threading.Condition(threading.RLock())
        self._waits = False
        self._busy = False
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Put its line into the queue, or drop it."""
        try:
            line = (self.format(record) + "\n").encode(errors="backslashreplace")
        except Exception:
            line = b""  # what cannot be formatted is dropped, too: `handleError` would print
        with self._changed:
            if not line or self._size + len(line) > _QUEUE_BYTES or self._closed:
                self.dropped += 1
                return
            self._size += len(line)
            self._lines.append(line)
            if self._waits:
                self._waits = False
                self._changed.notify_all()

    def drain(self, within_s: float) -> bool:
        """Wait until all lines are written; returns whether they are."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._lines and not self._busy, within_s)

    def close(self) -> None:
        """Write what is queued, as far as it is read in time."""
        with self._changed:
            if self._closed:
                return  # `logging` closes its handlers again at the end of the program
            self._closed = True
            self._changed.notify_all()
        self._thread.join(_FLUSH_S)
        super().close()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                while not self._lines and not self._closed and self.dropped == self._reported:
                    self._waits = True
                    self._changed.wait()
                if not self._lines and self.dropped == self._reported:
                    return
                lines, self._busy = list(self._lines), True
                self._lines.clear()
                self._size = 0
                lost = self.dropped - self._reported
                self._reported = self.dropped
            if lost:
                lines.append(self._dropped_record(lost))
            for chunk in _chunks(lines):
                if not self._write(chunk):
                    with self._changed:
                        self.dropped += chunk.count(b"\n")
                        self._reported = self.dropped  # there is no reader to report it to

    def _dropped_record(self, lost: int) -> bytes:
        why = "the log was not read as fast as it was written"
        record = _LOGGER.makeRecord(
            *(_LOGGER.name, logging.WARNING, "", 0, "%s", ("log lines dropped",), None),
            extra={"fields": {"lines": lost, "why": why}},
        )
        return (self.format(record) + "\n").encode()


_handler: _Handler | None = None


def _chunks(lines: list[bytes]) -> Iterator[bytes]:
    """Whole lines, several at a time where they are short: other processes may write into the same pipe."""
    chunk: list[bytes] = []
    size = 0
    for line in lines:
        if chunk and size + len(line) > _ATOMIC_BYTES:
            yield b"".join(chunk)
            chunk, size = [], 0
        chunk.append(line)
        size += len(line)
    if chunk:
        yield b"".join(chunk)


def _writer() -> Callable[[bytes], bool]:
    """A function that writes to standard error, and returns whether it could."""
    stream = sys.stderr
    try:
        # Not through the stream's buffer: a thread that waits for the reader would hold its lock, and block the exit.
        descriptor = stream.fileno()
    except (AttributeError, OSError, ValueError):

        def into_stream(data: bytes) -> bool:
            try:
                stream.write(data.decode())
                stream.flush()
            except (AttributeError, OSError, ValueError):
                return False
            return True

        return into_stream

    def write(data: bytes) -> bool:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(descriptor, rest) :]
            except BlockingIOError:  # the pipe was made non-blocking by its creator
                wait = select.poll()
                wait.register(descriptor, select.POLLOUT)
                wait.poll()
            except OSError:
                return False
        return True

    return write


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] | None = getattr(record, "fields", None)
    return {"logger": record.name, "message": record.getMessage()} if fields is None else fields


def _event(record: logging.LogRecord) -> str:
    return record.getMessage() if hasattr(record, "fields") else "library"


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname.lower(),
            "event": _event(record),
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
        line = " ".join((moment, record.levelname, _event(record), *fields))
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line
