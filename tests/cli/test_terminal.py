"""What a person sees while something works, on a terminal and in a log, on a clock that only the test moves."""

from __future__ import annotations

import contextlib
import io

import msgspec
import pytest
from rich.console import Console
from runs import SLO_50, WINNER, load

from rushhour.cli.compare import print_comparison
from rushhour.cli.load import print_windows
from rushhour.cli.terminal import TerminalProgress, result_console
from rushhour.clock import VirtualClock
from rushhour.load import Comparison, Ratio
from rushhour.measurement import Outcome


def plain(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def shown(console: Console) -> list[str]:
    """Each frame that was drawn, without colours."""
    frames = plain(console).replace("\r", "\n").split("\n")
    return [
        frame for line in frames if (frame := "".join(part.partition("m")[2] for part in ("m" + line).split("\x1b[")))
    ]


def test_in_a_log_each_decision_is_one_line_with_its_time() -> None:
    clock, console = VirtualClock(), Console(file=io.StringIO(), width=60)
    progress = TerminalProgress(console, clock)
    progress.start("Loading [fashion-mnist]")
    clock.advance(2.0)
    progress.done("70,000 samples")
    progress.limit(480.0)
    progress.start("Can int8 on OpenVINO, 2 streams carry 2,615/s?", 10.0)
    clock.advance(95.0)
    progress.done("inconclusive: 0 of 26,150 late", good=False)
    progress.start("Comparing")
    progress.start("Confirming")
    progress.fail()
    assert plain(console).splitlines() == [
        "Loading [fashion-mnist] ... ✓ 70,000 samples  2.0 s",
        "Can int8 on OpenVINO, 2 streams carry 2,615/s? ... · inconclusive: 0 of 26,150 late  95.0 s, 6:25 left",
        "Comparing ... ",
        "Confirming ... ",
    ]


def test_a_bar_says_how_long_it_takes_yet_and_how_long_the_run_may() -> None:
    clock = VirtualClock()
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    progress = TerminalProgress(console, clock)
    progress.start("Timing each engine alone", 12)
    clock.advance(20.0)
    progress.advance(3, note="int8 [on] OpenVINO, 2 streams: 3,000/s")
    progress.fail()
    assert "1:00 left" in shown(console)[-1]
    progress.limit(4000.0)
    progress.start("Confirming int8 on OpenVINO, 2 streams of 12 threads, on fresh seeds", 10)
    clock.advance(10.0)
    progress.advance(5, note="2,615/s: inconclusive")
    progress.fail()
    last = shown(console)[-1]
    assert "0:10 left, run 1:06:30" in last
    assert "5/10" in last
    assert len(last) <= 80
    clock.advance(5000.0)
    progress.done("2,615/s")
    assert shown(console)[-1].endswith("5010.0 s, 0:00 left")


@pytest.mark.parametrize("columns", ["20", "80"])
def test_what_is_piped_keeps_every_digit(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However wide the terminal is said to be that is not there."""
    windows = [load(WINNER, rate, seed) for seed, rate in enumerate((35_123.4, 9120.0))]
    widest = msgspec.structs.replace(
        windows[0], n=12_345_678, late=1_234_567, p50_ms=12_345.6, p99_ms=23_456.7, p99_interval_ms=(20_000.1, 30_000.2)
    )
    monkeypatch.setenv("COLUMNS", columns)
    ratio = Ratio("http://127.0.0.1:9000", "http://127.0.0.1:8000", 12_345.6, "p99_ms", 1.234, (1.111, 1.357), 6, 6)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        console = result_console()
        print_windows(console, SLO_50, [*windows, widest])
        print_comparison(console, Comparison(SLO_50, ("a", "b"), (12_345.6,), (ratio,), (), 0))
    text = out.getvalue()
    assert "…" not in text
    for number in ("35,123.4", "12,345,678", "1,234,567", "12345.6", "23456.7", "20000.1 to 30000.2", "1.111 to 1.357"):
        assert number in text
    assert max(map(len, text.splitlines())) < 200


def test_the_table_of_windows_keeps_every_digit_in_80_columns() -> None:
    """It once showed the rates of a search as `35,…`."""
    windows = [load(WINNER, rate, seed) for seed, rate in enumerate((35_123.4, 9120.0))]
    widest = msgspec.structs.replace(
        load(WINNER, 123_456.7, 3), n=1_234_567, late=123_456, p99_ms=2345.6, outcome=Outcome.GENERATOR_LIMITED
    )
    console = Console(file=io.StringIO(), width=80)
    print_windows(console, SLO_50, [*windows, widest])
    text = plain(console)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text
    for said in ("35,123.4", "9,120", "123,457", "1,234,567", "123,456", "2345.6", "unstable", "generator"):
        assert said in text
