"""What a person sees in the terminal while something works: a bar where it can be drawn, lines where it cannot."""

from __future__ import annotations

import time

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class TerminalProgress:
    """Draws `rushhour.progress.Progress` on a terminal; writes one line per piece of work to anything else.

    Args:
        console: where; standard error by default, so that standard output stays the result's.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._what = ""
        self._began = 0.0
        self._note = ""

    def start(self, what: str, total: float | None = None) -> None:
        """Begin a line."""
        self._close()
        self._what, self._note, self._began = what, "", time.monotonic()
        if not self._console.is_terminal:
            self._console.print(f"{what} ...", highlight=False, markup=False, soft_wrap=True)
            return
        counted = [BarColumn(bar_width=24), MofNCompleteColumn()] if total is not None else []
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            *counted,
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task(escape(what), total=total, note="")
        self._bar.start()

    def advance(self, by: float = 1.0, note: str = "") -> None:
        """Move the bar."""
        self._note = note or self._note
        if self._bar is not None:
            self._bar.update(self._task, advance=by, note=escape(self._note))

    def done(self, note: str = "") -> None:
        """End the line with its result."""
        self._close()
        took = time.monotonic() - self._began
        self._console.print(
            f"[green]✓[/] {escape(self._what)}  [bold]{escape(note)}[/]  [dim]{took:.1f} s[/]",
            highlight=False,
            soft_wrap=not self._console.is_terminal,
        )

    def fail(self) -> None:
        """End whatever is drawn, because an error ends the work."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
