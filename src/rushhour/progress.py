"""Progress: how long work reports where it stands. The lower floors report; the caller shows it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the reports of long work. All calls of one piece of work come from one thread, in order."""

    def start(self, what: str, total: float | None = None) -> None:
        """A piece of work begins; `total` in its own unit (steps, requests, seconds), None where it is unknown."""
        ...

    def advance(self, by: float = 1.0, note: str = "") -> None:
        """`by` more is done; `note` is the current state in a few words: `loss 0.31, accuracy 0.902`."""
        ...

    def done(self, note: str = "", *, good: bool = True) -> None:
        """The piece of work is over; `note` is its result in a few words, `good` whether it succeeded."""
        ...

    def limit(self, seconds: float) -> None:
        """The whole run, all its pieces of work, ends about `seconds` from now; a later limit replaces this one."""
        ...

    def note(self, text: str) -> None:
        """A line for the user that belongs to no piece of work: a file that was left out, a setting that was chosen."""
        ...


class Silent:
    """Progress that shows nothing: for tests, and the default in Python."""

    def start(self, what: str, total: float | None = None) -> None:
        """Nothing."""

    def advance(self, by: float = 1.0, note: str = "") -> None:
        """Nothing."""

    def done(self, note: str = "", *, good: bool = True) -> None:
        """Nothing."""

    def limit(self, seconds: float) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""
