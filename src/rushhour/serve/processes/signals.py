"""SIGTERM, SIGINT and SIGHUP, from the first line of the program to its last.

The handlers are Python's own and not the event loop's, so that they hold before there is a loop. Without a handler the
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
    """What this process does at a signal, by how far it has come.

    SIGTERM or SIGINT end it at once while there is nothing to be stopped. The first of them stops what serves; the next
    ends the process at once, with 128 + its number. SIGHUP renews what is read from files.

    Attributes:
        last_words: called before the process is ended at once, in the signal's handler.
    """

    def __init__(self) -> None:
        self.last_words: Callable[[], None] = _nothing
        self._stop: Callable[[], object] | None = None
        self._renew: Callable[[], object] | None = None
        self._asked: int | None = None
        self._hung_up = self._patient = False
        self._early = False
        self._nowhere: int | None = None

    def early(self) -> None:
        """Take over from the first line of a program on, for good."""
        self._early = True
        for number in _NUMBERS:
            signal.signal(number, self._handle)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Take over for as long as this lasts. Must be entered on the main thread."""
        before: dict[int, Any] = {number: signal.signal(number, self._handle) for number in _NUMBERS}
        try:
            yield
        finally:
            self._stop = self._renew = self._asked = None
            self._hung_up = False
            self.last_words = _nothing
            if self._early:
                self.bound(_EXIT_S)
            else:
                faulthandler.cancel_dump_traceback_later()
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def stops(self, stop: Callable[[], object], *, patient: bool = False) -> None:
        """From now on the first signal to stop calls this. It is called in the handler: between any two steps.

        Args:
            stop: asks for the end.
            patient: further signals are nothing: who started this process sends one of its own beside that which the
                system sends to all, and kills it if it is to end at once.
        """
        self._stop, self._patient = stop, patient

    def renews(self, renew: Callable[[], object]) -> None:
        """From now on SIGHUP calls this, in the handler; at once if one has come before."""
        self._renew = renew
        if self._hung_up:
            self._hung_up = False
            renew()

    @property
    def stopping(self) -> bool:
        """Whether a signal to stop has come."""
        return self._asked is not None

    @property
    def interrupted(self) -> bool:
        """Whether the signal that stops was SIGINT."""
        return self._asked == signal.SIGINT

    def bound(self, seconds: float) -> None:
        """Let this process live no longer than this, whatever happens in it: a thread without Python ends it."""
        if self._nowhere is None:  # standard error may be a pipe that nobody reads
            self._nowhere = os.open(os.devnull, os.O_WRONLY)
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._nowhere)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            if self._renew is None:
                self._hung_up = True
            else:
                self._renew()
        elif self._stop is None:
            self._end(0 if number == signal.SIGTERM else 128 + number)
        elif self._asked is None:
            self._asked = number
            self._stop()
        elif not self._patient:
            self._end(128 + number)

    def _end(self, code: int) -> None:
        try:
            self.last_words()
        finally:
            os._exit(code)


SIGNALS = Signals()
"""Of this process."""
