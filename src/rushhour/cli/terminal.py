"""Progress in the terminal: drawn where that is possible, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TimeElapsedColumn,
)
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from rushhour.clock import Clock, WallClock
from rushhour.errors import one_line
from rushhour.goal import SLO
from rushhour.measurement import Measurement, Outcome
from rushhour.system.faults import note_activity

if TYPE_CHECKING:
    from rushhour.load import Tick

_RATES_OVER_S = 1.0
_LINE_EVERY_S = 5.0
_HISTORY = 8
_NO_WIDTH = 10_000
_COLOURS = {Outcome.PASS: "green", Outcome.FAIL: "red", Outcome.UNSTABLE: "red"}


def _draws(console: Console) -> bool:
    """Whether the console can be redrawn; if not, lines are written."""
    return console.is_terminal and not console.is_dumb_terminal


def result_console() -> Console:
    """The console for results: standard output.

    A file or pipe has no width; rich would assume 80 columns and cut numbers in tables.
    """
    return Console(width=None if sys.stdout is not None and sys.stdout.isatty() else _NO_WIDTH)


class _Display:
    """What is shown during a block; an exception that ends the block gets a note on what was being done."""

    _what = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.fail()
        if error is not None and self._what:
            note_activity(error, self._what)

    def fail(self) -> None:
        """Stop drawing."""
        raise NotImplementedError


class LoadView(_Display):
    """A load test in progress: redrawn at every tick on a terminal, else a line every few seconds.

    It runs in the parent of the generator, so drawing delays no request.

    Use as a context manager, or call `fail` at the end.

    Args:
        slo: the limit to hold latencies against; None where there is none.
        console: standard error by default, because standard output is for the result.
    """

    def __init__(self, slo: SLO | None, console: Console | None = None) -> None:
        self._slo = slo
        self._console = console or Console(stderr=True)
        self._live: Live | None = None
        self._what = ""
        self._total: float | None = None
        self._ticks: deque[Tick] = deque()
        self._lined_at = 0.0
        self._past: deque[Measurement] = deque(maxlen=_HISTORY)

    def start(self, what: str, total: float | None = None) -> None:
        """A window begins; `total` in seconds."""
        self._what, self._total, self._lined_at = what, total, 0.0
        self._ticks.clear()
        if not _draws(self._console):
            self._line(f"{what} ...")
            return
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(Text(what, style="bold"), refresh=True)

    def tick(self, tick: Tick) -> None:
        """The state of the window."""
        self._ticks.append(tick)
        while len(self._ticks) > 2 and tick.at_s - self._ticks[1].at_s >= _RATES_OVER_S:
            self._ticks.popleft()
        if self._live is not None:
            self._live.update(self._drawn(tick), refresh=True)
        elif not _draws(self._console) and tick.at_s - self._lined_at >= _LINE_EVERY_S:
            self._lined_at = tick.at_s
            self._line(f"  {tick.at_s:.0f} s: " + ", ".join(f"{name} {value}" for name, value in self._figures(tick)))

    def advance(self, by: float = 1.0, note: str = "") -> None:
        """Nothing: ticks have more details."""

    def done(self, note: str = "", *, good: bool = True) -> None:
        """The window is over."""
        if not _draws(self._console):
            self._line(f"  {note}")

    def limit(self, seconds: float) -> None:
        """Nothing: each window has its own duration."""

    def add(self, window: Measurement) -> None:
        """Add a finished window to those that are shown."""
        self._past.append(window)

    def fail(self) -> None:
        """Stop drawing."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def note(self, text: str) -> None:
        """Print a line."""
        self._line(one_line(text))

    def _line(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _figures(self, tick: Tick) -> list[tuple[str, str]]:
        first = self._ticks[0] if len(self._ticks) > 1 else None
        seconds = max(tick.at_s - (first.at_s if first else 0.0), 1e-9)
        sent = tick.sent - (first.sent if first else 0)
        answered = tick.ended - tick.shed - tick.errors
        if first:
            answered -= first.ended - first.shed - first.errors
        limit = f" of {self._slo.limit_ms:g}" if self._slo is not None else ""
        return [
            ("offered/s", f"{sent / seconds:,.0f}"),
            ("answered/s", f"{answered / seconds:,.0f}"),
            ("p50 ms", "-" if tick.p50_ms is None else f"{tick.p50_ms:.1f}"),
            ("p99 ms", "-" if tick.p99_ms is None else f"{tick.p99_ms:.1f}{limit}"),
            ("in flight", f"{tick.sent - tick.ended:,}"),
            ("shed", f"{tick.shed:,}"),
            ("errors", f"{tick.errors:,}"),
        ]

    def _drawn(self, tick: Tick) -> Group:
        head = Table.grid(padding=(0, 1))
        whole = f"/{self._total:.0f}" if self._total else ""
        bar = ProgressBar(total=self._total or 1.0, completed=tick.at_s, width=24) if self._total else Text("")
        head.add_row(Text(self._what, style="bold"), bar, Text(f"{tick.at_s:.0f}{whole} s", style="dim"))
        now = Table.grid(padding=(0, 3))
        figures = self._figures(tick)
        is_late = self._slo is not None and tick.p99_ms is not None and tick.p99_ms > self._slo.limit_ms
        alarming = {"p99 ms": is_late, "shed": tick.shed > 0, "errors": tick.errors > 0}
        now.add_row(*(Text(name, style="dim") for name, _ in figures))
        now.add_row(*(Text(value, style="bold red" if alarming.get(name) else "bold") for name, value in figures))
        past = Table.grid(padding=(0, 2))
        for window in self._past:
            p99 = "" if window.p99_ms is None else f"p99 {window.p99_ms:.1f} ms"
            verdict = Text(window.outcome.words, style=_COLOURS.get(window.outcome, "yellow"))
            past.add_row(Text(f"{window.rate_rps:,.6g}/s", justify="right"), p99, verdict)
        return Group(head, now, past)


class TerminalProgress(_Display):
    """Draws `rushhour.progress.Progress` on a terminal; writes one line per piece of work to anything else.

    Each line ends with its duration, and with the time left where the run has a limit.

    Use as a context manager, or call `fail` after an error.

    Args:
        console: standard error by default, because standard output is for the result.
        clock: source of the times.
    """

    def __init__(self, console: Console | None = None, clock: Clock | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._clock = clock or WallClock()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._what = ""
        self._began = 0.0
        self._note = ""
        self._ends: float | None = None
        self._is_line_open = False

    def start(self, what: str, total: float | None = None) -> None:
        """Begin a line."""
        self._close()
        self._what, self._note, self._began = what, "", self._clock.now()
        if not _draws(self._console):
            self._print(f"{escape(what)} ... ", end="")
            self._is_line_open = True
            return
        counted = [BarColumn(bar_width=16), MofNCompleteColumn()] if total is not None else []
        self._bar = Progress(
            SpinnerColumn(),
            _Cropped("description", "bold"),
            *counted,
            TimeElapsedColumn(),
            _TimeLeft(self._left),
            _Cropped("note", "dim"),
            console=self._console,
            transient=True,
            get_time=self._clock.now,
        )
        self._task = self._bar.add_task(what, total=total, note="")
        self._bar.start()

    def advance(self, by: float = 1.0, note: str = "") -> None:
        """Move the bar."""
        self._note = note or self._note
        if self._bar is not None:
            self._bar.update(self._task, advance=by, note=self._note)

    def done(self, note: str = "", *, good: bool = True) -> None:
        """End the line with its result: with a tick where it succeeded."""
        # Without a terminal the line is printed already, unless a note ended it.
        what = "" if self._is_line_open else f"{escape(self._what)}  "
        self._is_line_open = False
        self._close()
        left = self._left()
        times = f"{self._clock.now() - self._began:.1f} s" + ("" if left is None else f", {_minutes(left)} left")
        self._print(f"{'[green]✓[/]' if good else '[yellow]·[/]'} {what}[bold]{escape(note)}[/]  [dim]{times}[/]")

    def limit(self, seconds: float) -> None:
        """Show the time left of `seconds` from now on."""
        self._ends = self._clock.now() + seconds

    def note(self, text: str) -> None:
        """Print a line of its own."""
        if self._is_line_open:
            self._is_line_open = False
            self._print("")
        self._console.print(one_line(text), highlight=False, markup=False, soft_wrap=True)

    def fail(self) -> None:
        """Stop drawing after an error."""
        self._close()

    def _left(self) -> float | None:
        """Seconds until the limit of the run; None where it has none."""
        return None if self._ends is None else max(0.0, self._ends - self._clock.now())

    def _print(self, text: str, end: str = "\n") -> None:
        self._console.print(text, end=end, highlight=False, soft_wrap=not self._console.is_terminal)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._is_line_open:
            self._is_line_open = False
            self._print("")


class _Cropped(ProgressColumn):
    """A task's description or note on one line, shortened where the terminal is narrow."""

    def __init__(self, field: Literal["description", "note"], style: str) -> None:
        super().__init__(Column(no_wrap=False))  # of columns, rich narrows only those that may wrap
        self._field, self._style = field, style

    def render(self, task: Task) -> Text:
        """The text; rich crops it."""
        text = task.description if self._field == "description" else task.fields["note"]
        return Text(text, style=self._style, no_wrap=True, overflow="ellipsis")


class _TimeLeft(ProgressColumn):
    """The time left of this piece of work, estimated from its duration so far; and of the run, where it has a limit.

    rich's own column uses the last seconds only, which jumps where steps take unequal time.
    """

    def __init__(self, of_run: Callable[[], float | None]) -> None:
        super().__init__(Column(no_wrap=True))
        self._of_run = of_run

    def render(self, task: Task) -> Text:
        """`1:20 left, run 3:10`."""
        parts = []
        if task.total and task.completed and task.elapsed:
            left = task.elapsed * max(0.0, task.total - task.completed) / task.completed
            parts.append(f"{_minutes(left)} left")
        if (of_run := self._of_run()) is not None:
            parts.append(f"run {_minutes(of_run)}" if parts else f"{_minutes(of_run)} left of the run")
        return Text(", ".join(parts), style="cyan")


def _minutes(seconds: float) -> str:
    """`1:20`, or with hours `1:06:30`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
