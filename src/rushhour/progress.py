"""How long work says where it is. The floors report; a face draws."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives what long work has to say. Calls come from one thread, in order."""

    def start(self, what: str, total: float | None = None) -> None:
        """A piece of work begins; `total` in its own unit (steps, requests, seconds), None where it is unknown."""
        ...

    def advance(self, by: float = 1.0, note: str = "") -> None:
        """`by` more is done; `note` is the current state in a few words: `loss 0.31, accuracy 0.902`."""
        ...

    def done(self, note: str = "", *, good: bool = True) -> None:
        """The piece of work is over; `note` is its result in a few words, `good` whether it is one to be glad of."""
        ...

    def limit(self, seconds: float) -> None:
        """The whole run, all its pieces of work, ends about `seconds` from now; a later limit replaces this one."""
        ...


class Silent:
    """Says nothing: for tests and for callers from Python."""

    def start(self, what: str, total: float | None = None) -> None:
        """Nothing."""

    def advance(self, by: float = 1.0, note: str = "") -> None:
        """Nothing."""

    def done(self, note: str = "", *, good: bool = True) -> None:
        """Nothing."""

    def limit(self, seconds: float) -> None:
        """Nothing."""
