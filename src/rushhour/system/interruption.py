"""Ctrl-C, SIGTERM and SIGHUP in commands that end by themselves; servers have `rushhour.serve.processes.signals`.

Until a command begins, a signal ends the process at once: nothing has been changed yet, and libraries swallow or
convert an exception in the middle of an import. After that a signal is an exception, so that temporary files are
removed; once the message is printed, any further signal ends the process at once.

Imported before anything slow, so nothing slow may be imported here. Source: signal(7).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType

_AGAIN_S = 0.02
_LONGEST_END_S = 10.0
_TORCHRUN = "TORCHELASTIC_RUN_ID"


class Interrupted(KeyboardInterrupt):
    """A signal has asked the command to end."""


class Interruption:
    """The signals that end this process.

    Attributes:
        number: of the first signal; None before.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._began = self._ending = self._is_installed = False

    @property
    def code(self) -> int:
        """The exit code: 128 plus the signal's number, 130 for Ctrl-C."""
        return 128 + (self.number or signal.SIGINT)

    @property
    def name(self) -> str:
        """The signal's name: `Ctrl-C`, `SIGTERM`."""
        return "Ctrl-C" if self.number in (None, signal.SIGINT) else signal.Signals(self.number or 0).name

    def install(self) -> None:
        """Install the handlers. A signal that is ignored, as SIGHUP is under nohup, stays ignored."""
        numbers = [signal.SIGINT, signal.SIGHUP]
        if _TORCHRUN not in os.environ:  # which ends its workers itself; a worker in a collective runs no handler
            numbers.append(signal.SIGTERM)
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)
        sys.unraisablehook = self._lost
        self._is_installed = True

    def begin(self) -> None:
        """From now on a signal raises `Interrupted`."""
        self._began = True

    def end(self) -> None:
        """From now on a signal ends the process at once, and threads that still run delay its end by 10 s at most."""
        self._ending = True
        if self._is_installed:
            last = threading.Timer(_LONGEST_END_S, os._exit, (self.code,))
            last.daemon = True
            last.start()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        if self._ending:
            os._exit(self.code)
        if self._began:
            raise Interrupted
        line = f"rushhour: stopped by {self.name} before it began; run it again\n"
        try:
            os.write(2, line.encode())
        finally:
            os._exit(self.code)

    def _lost(self, raised: sys.UnraisableHookArgs) -> None:
        """Called for an exception that cannot propagate, as in `__del__`: an `Interrupted` is raised again."""
        if isinstance(raised.exc_value, Interrupted):
            threading.Thread(target=self._repeat, daemon=True).start()
        else:
            sys.__unraisablehook__(raised)

    def _repeat(self) -> None:
        time.sleep(_AGAIN_S)
        os.kill(os.getpid(), self.number or signal.SIGINT)


INTERRUPTION = Interruption()
"""Of this process."""
