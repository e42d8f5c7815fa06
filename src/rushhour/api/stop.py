"""Ending a load early, from another thread or a signal handler, with what was measured until then."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rushhour.errors import LoadError
from rushhour.load import Generator
from rushhour.system.interruption import INTERRUPTION


class Stopped(LoadError):
    """A load ends early because its `Stop` was requested; an error for the caller if nothing was measured by then.

    Args:
        reason: of the `Stop`.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason, "nothing was measured until then", "let a window begin before the end is asked for")


def how_it_ended(error: LoadError | KeyboardInterrupt) -> tuple[str, LoadError | None]:
    """Why a load ended early after something was measured; and the error, which neither Ctrl-C nor a `Stop` is."""
    if isinstance(error, KeyboardInterrupt):
        return f"stopped by {INTERRUPTION.name}", None
    return (error.what, None) if isinstance(error, Stopped) else (str(error), error)


class Stop:
    """Ends a load early: the window in flight is cut short and kept, and no other begins.

    For other threads and for signal handlers.

    Args:
        reason: what a partial result says.
    """

    def __init__(self, reason: str = "stopped by the caller") -> None:
        self.reason = reason
        self._generator: Generator | None = None
        self._is_requested = False

    @property
    def is_requested(self) -> bool:
        """Whether the load is to end."""
        return self._is_requested

    def request(self) -> bool:
        """Ask for the end.

        Returns:
            Whether a window is in flight that ends early and is kept: false between windows, and the second time.
        """
        first, self._is_requested = not self._is_requested, True
        if first and self._generator is not None:
            self._generator.stop()
            return True
        return False

    @contextlib.contextmanager
    def window(self, generator: Generator) -> Iterator[None]:
        """Around each window; to be followed by `check` once the window is kept.

        Raises:
            Stopped: if the end was requested before anything was measured in it.
        """
        self.check()
        self._generator = generator
        try:
            yield
        except LoadError:
            if self._is_requested:
                raise Stopped(self.reason) from None
            raise
        finally:
            self._generator = None

    def check(self) -> None:
        """Raise if the load is to end.

        Raises:
            Stopped: if so.
        """
        if self._is_requested:
            raise Stopped(self.reason)
