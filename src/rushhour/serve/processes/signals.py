"""SIGTERM, SIGINT and SIGHUP are handled from the first line of the program to its last.

The handlers are Python's own and not the event loop's, so that they work before there is a loop. Without a handler the
first process of a container would never end: the kernel drops signals to process 1 that have none.

Imported before anything slow; nothing slow may be imported here. Source: signal(7), pid_namespaces(7).
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_EXIT_S = 5
"""From the end of serving to the end of the process."""


def _nothing() -> None:
    pass


class Signals:
    """What this process does at a signal.

    Before the server is ready, SIGTERM and SIGINT end the process at once. After that the first of them stops the
    server; the next ends the process at once, with exit code 128 + its number. SIGHUP reads keys and certificates
    again.

    Attributes:
        before_exit: called in the signal's handler before the process is ended at once.
    """

    def __init__(self) -> None:
        self.before_exit: Callable[[], None] = _nothing
        self._stop: Callable[[], object] | None = None
        self._reload: Callable[[], object] | None = None
        self._number: int | None = None
        self._hung_up = self._ignore_further = False
        self._permanent = False
        self._nowhere: int | None = None

    def install(self) -> None:
        """Install the handlers for the rest of the program: call it on its first line."""
        self._permanent = True
        for number in _NUMBERS:
            signal.signal(number, self._handle)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Within this context the handlers are installed. Must be entered on the main thread."""
        before: dict[int, Any] = {number: signal.signal(number, self._handle) for number in _NUMBERS}
        try:
            yield
        finally:
            self._stop = self._reload = self._number = None
            self._hung_up = False
            self.before_exit = _nothing
            if self._permanent:
                self.limit_lifetime(_EXIT_S)
            else:
                faulthandler.cancel_dump_traceback_later()
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def on_stop(self, stop: Callable[[], object], *, ignore_further: bool = False) -> None:
        """Call `stop` at the first signal to stop, in the signal's handler: between any two bytecodes.

        Args:
            stop: requests the end.
            ignore_further: ignore further signals: the parent process sends one in addition to the system's, and kills
                this process if it has to end at once.
        """
        self._stop, self._ignore_further = stop, ignore_further

    def on_reload(self, reload: Callable[[], object]) -> None:
        """Call `reload` at SIGHUP, in the signal's handler; at once if SIGHUP was received before."""
        self._reload = reload
        if self._hung_up:
            self._hung_up = False
            reload()

    @property
    def stopping(self) -> bool:
        """Whether a signal to stop was received."""
        return self._number is not None

    @property
    def interrupted(self) -> bool:
        """Whether the signal that stops was SIGINT."""
        return self._number == signal.SIGINT

    def limit_lifetime(self, seconds: float) -> None:
        """End this process after so long at the latest, on a thread that runs no Python."""
        if self._nowhere is None:  # standard error may be a full pipe
            self._nowhere = os.open(os.devnull, os.O_WRONLY)
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._nowhere)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            if self._reload is None:
                self._hung_up = True
            else:
                self._reload()
        elif self._stop is None:
            self._end(0 if number == signal.SIGTERM else 128 + number)
        elif self._number is None:
            self._number = number
            self._stop()
        elif not self._ignore_further:
            self._end(128 + number)

    def _end(self, code: int) -> None:
        try:
            self.before_exit()
        finally:
            os._exit(code)


SIGNALS = Signals()
"""Of this process."""
