"""Ctrl-C, SIGTERM and SIGHUP for commands that work and end; servers have `rushhour.serve.processes.signals`.

Until a command begins, such a signal ends the process at once: nothing has been touched, and an exception in the middle
of an import is swallowed by one library and turned into another error by the next. From then on it is an exception, so
that what is half done is cleared away, and once that is said, any further signal ends the process at once.

Imported before anything slow; nothing slow may be imported here. Source: signal(7).
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
    """A signal asks for the end of the command."""


class Interruption:
    """The signals that end this process.

    Attributes:
        number: of the first signal that came; None before.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._began = self._ending = self._hears = False

    @property
    def code(self) -> int:
        """What the process ends with: 128 and the signal's number, 130 for Ctrl-C."""
        return 128 + (self.number or signal.SIGINT)

    @property
    def name(self) -> str:
        """For people."""
        return "Ctrl-C" if self.number in (None, signal.SIGINT) else signal.Signals(self.number or 0).name

    def take_over(self) -> None:
        """Hear the signals from now on. One that is ignored, as SIGHUP is under nohup, stays ignored."""
        numbers = [signal.SIGINT, signal.SIGHUP]
        if _TORCHRUN not in os.environ:  # which ends its workers itself, and a collective that waits hears nothing
            numbers.append(signal.SIGTERM)
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)
        sys.unraisablehook = self._lost
        self._hears = True

    def begin(self) -> None:
        """From now on a signal is an exception."""
        self._began = True

    def end(self) -> None:
        """From now on a signal ends the process at once, and a thread that goes on does not keep it for long."""
        self._ending = True
        if self._hears:
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

    def _lost(self, said: sys.UnraisableHookArgs) -> None:
        """An exception where none can be passed on, as in `__del__`: if it was to end the command, try again."""
        if isinstance(said.exc_value, Interrupted):
            threading.Thread(target=self._repeat, daemon=True).start()
        else:
            sys.__unraisablehook__(said)

    def _repeat(self) -> None:
        time.sleep(_AGAIN_S)
        os.kill(os.getpid(), self.number or signal.SIGINT)


INTERRUPTION = Interruption()
"""Of this process."""
