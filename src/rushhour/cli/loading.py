"""`rushhour load` and `rushhour compare` at work: from options to windows, shown while they last and kept if they end
early."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from rushhour.bundle import Bundle, meant
from rushhour.cli.terminal import LoadView
from rushhour.errors import LoadError
from rushhour.goal import SLO
from rushhour.load import (
    Arrivals,
    ClosedResult,
    Comparison,
    Endpoint,
    Generator,
    Payload,
    Ratio,
    Search,
    Shape,
    Target,
    Window,
    body_payloads,
    closed_loop,
    compare,
    discover,
    endpoint,
    folder_payloads,
    measure,
    payloads,
    read_bodies,
    search_capacity,
    summarize,
    why_longer,
)
from rushhour.load.payload import Encoding
from rushhour.measurement import Measurement, Outcome
from rushhour.plan import SO_FAR
from rushhour.records.compression import COMPRESSION
from rushhour.records.curves import CURVES
from rushhour.system.interruption import INTERRUPTION

STOPPED = "stopped by"
_RETRIES = 3
"""Of a window that the machine disturbed."""
"""Short windows find the way, long ones prove: a queue near its capacity is slow in long waves."""
_METRICS = {"p50_ms": "p50", "p99_ms": "p99", "answered_rps": "answered/s"}


@dataclasses.dataclass(frozen=True)
class Sending:
    """What is sent, and how its answers are taken.

    Attributes:
        model: the model's name; None for the only one.
        rows: samples in one request.
        shapes: of inputs, where the server's metadata leaves them open.
        encoding: of tensors over HTTP.
        payloads: a folder of files, or a bundle, whose samples are sent; None for random values.
        body: a file that is sent as it is, to what need not be a server of models; so with method, path and headers.
        check: whether answers are compared.
    """

    arrivals: Arrivals
    seed: int
    model: str | None = None
    rows: int = 1
    shapes: Mapping[str, Shape] = dataclasses.field(default_factory=dict)
    encoding: Encoding = "binary"
    payloads: Path | None = None
    body: Path | None = None
    method: str | None = None
    path: str | None = None
    headers: tuple[str, ...] = ()
    check: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether any HTTP endpoint is meant, not a server of models."""
        return bool(self.body or self.method or self.path or self.headers)

    def aim(self, url: str) -> tuple[Endpoint, list[Payload]]:
        """The server at `url`, and what to send it."""
        if self.is_plain:
            at = endpoint(url)
            is_model = self.model is not None or bool(self.shapes)
            if at.protocol == "grpc" or is_model or (self.body and self.payloads):
                raise LoadError(
                    f"cannot load {url} so",
                    "--body, --method, --path and --header are for plain HTTP, without --model and --shape, and --body "
                    "excludes --payloads",
                    "leave one of them out",
                )
            source = self.body or self.payloads
            bodies = read_bodies(source) if source is not None else []
            method = self.method or ("POST" if bodies else "GET")
            return at, body_payloads(at, bodies, method=method, path=self.path or "", headers=self.headers)
        bundle = None if self.payloads is None else _bundle_of(self.payloads)
        target = discover(url, self.model).shaped(self.shapes)
        if self.payloads is None or bundle is not None:
            samples = None if bundle is None else bundle.samples()
            return target, payloads(target, samples, rows=self.rows, seed=self.seed, encoding=self.encoding)
        return target, folder_payloads(target, self.payloads, encoding=self.encoding)


def _bundle_of(path: Path) -> Bundle | None:
    """The bundle whose samples are to be sent: that at `path`, or of the run there; None for a folder of payloads.

    Raises:
        BundleError: if it is damaged.
        LoadError: if the folder tells how a bundle was made: its files are no payloads.
    """
    run = path.parent if path.name in ("plan.json", SO_FAR) else path
    for folder in (path, run / "bundles" / "reference"):
        if (folder / "bundle.json").is_file():
            return Bundle.open(folder)
    if any((path / kept).is_file() for kept in (COMPRESSION, CURVES)):
        raise LoadError(f"{path} holds no payload", "it tells how a bundle was made", meant(path) or "name a bundle")
    return None


@dataclasses.dataclass
class Loaded:
    """What came out, as far as it came.

    Attributes:
        result: for machines.
        headline: in one sentence.
        stopped: why it ended early; empty where it did not.
        error: what ended it, if that was an error.
    """

    result: dict[str, Any]
    headline: str
    windows: list[Measurement]
    stopped: str = ""
    error: LoadError | None = None

    @property
    def holds(self) -> bool:
        """Whether it is an unqualified yes."""
        return not self.stopped and self.result.get("outcome") in (None, Outcome.PASS)


class _Stopped(Exception):
    pass


class _Stop:
    """Ctrl-C: the first lets the window under way end early and be kept, the second does what Ctrl-C always does."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._hit = False

    @contextmanager
    def around_window(self) -> Iterator[None]:
        before = signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield
        except LoadError:
            if self._hit:  # before anything was measured
                raise KeyboardInterrupt from None
            raise
        finally:
            signal.signal(signal.SIGINT, before)

    def check(self) -> None:
        """To be called once the window is kept."""
        if self._hit:
            raise _Stopped

    @property
    def hit(self) -> bool:
        return self._hit

    def _on_signal(self, _: int, __: FrameType | None) -> None:
        if self._hit:
            raise KeyboardInterrupt
        self._hit = True
        self._generator.stop()


def load(
    url: str,
    slo: SLO,
    sending: Sending,
    *,
    rates: Sequence[float],
    window_s: float,
    n: int | None = None,
) -> Loaded:
    """Windows at `rates`, or without any the search for the capacity.

    Args:
        url: of the server.
        slo: what is asked.
        sending: what is sent.
        rates: requests per second.
        window_s: how long a window at a given rate is.
        n: exactly so many requests in it instead.
    """
    target, requests = sending.aim(url)
    windows = list[Measurement]()
    found: Search | None = None
    stopped, error = "", None
    with LoadView(slo) as view, Generator() as generator:
        if n is None:
            _say_lengths(view, slo, rates, window_s)
        stop = _Stop(generator)

        def take(*what: Any, **how: Any) -> Measurement:
            with stop.around_window():
                window = measure(
                    *what, **how, arrivals=sending.arrivals, check=sending.check, progress=view, on_tick=view.tick
                )
            if stop.hit:
                window = msgspec.structs.replace(window, reason=f"stopped early: {window.reason}")
            windows.append(window)
            view.add(window)
            stop.check()
            return window

        try:
            if rates:
                for number, rate in enumerate(rates):
                    take(
                        *(generator, target, requests, slo),
                        rate_rps=rate,
                        seed=sending.seed + number,
                        window_s=window_s,
                        n=n,
                        retries=_RETRIES,
                    )
            else:
                found = search_capacity(generator, target, requests, slo, seed=sending.seed, progress=view, take=take)
        except (_Stopped, KeyboardInterrupt):
            stopped = f"{STOPPED} {INTERRUPTION.name}"
        except LoadError as caught:
            if not windows:
                raise
            stopped, error = str(caught), caught
    if stopped and not windows:
        raise KeyboardInterrupt
    return _loaded(url, target, slo, sending, windows, found, stopped, error, is_search=not rates)


def _say_lengths(view: LoadView, slo: SLO, rates: Sequence[float], window_s: float) -> None:
    """What will take longer than was asked for is said before it begins."""
    for why in dict.fromkeys(why_longer(slo, rate, window_s) for rate in rates):
        if why:
            view.say(why)


def _loaded(
    url: str,
    target: Endpoint,
    slo: SLO,
    sending: Sending,
    windows: list[Measurement],
    found: Search | None,
    stopped: str,
    error: LoadError | None,
    *,
    is_search: bool,
) -> Loaded:
    outcome = Outcome.VOID if not windows else windows[-1].outcome
    if found is not None and found.capacity_rps:
        outcome = Outcome.PASS if found.proven else Outcome.INCONCLUSIVE
    elif not is_search:
        outcome = next((window.outcome for window in windows if window.outcome is not Outcome.PASS), outcome)
    result: dict[str, Any] = {
        "outcome": outcome,
        "slo": str(slo),
        "url": url,
        "model": target.model if isinstance(target, Target) else None,
        "arrivals": arrivals_name(sending.arrivals),
        "seed": sending.seed,
        "partial": bool(stopped),
        "runs": windows,
    }
    if stopped:
        result["stopped"] = stopped
    if is_search:
        passed = [window.rate_rps for window in windows if window.outcome is Outcome.PASS]
        result |= {
            "capacity_rps": found.capacity_rps if found is not None else None,
            "lowest_failing_rps": found.lowest_failing_rps if found is not None else None,
            "proven": found is not None and found.proven,
            "estimate": found.estimate if found is not None else None,
        }
        if found is None:
            best = f", the best rate that passed so far is {max(passed):,.6g}/s" if passed else ""
            headline = f"the search did not end{best}: nothing is confirmed"
        else:
            failing = f"; {found.lowest_failing_rps:,.6g} fails" if found.lowest_failing_rps else ""
            because = f" ({found.reason})" if found.reason else ""
            is_exact = found.proven or found.estimate is None
            rate = f"{found.capacity_rps:,.6g} requests/s" if is_exact else str(found.estimate)
            headline = f"{rate} keep {slo}{failing}{because}"
    elif len(windows) == 1:
        fields = msgspec.to_builtins(windows[0])
        result |= {name: value for name, value in fields.items() if name not in ("slo", "latencies", "kind")}
        headline = f"{outcome.value.replace('_', ' ')}: {windows[0].reason}"
    else:
        passed = [window.rate_rps for window in windows if window.outcome is Outcome.PASS]
        headline = f"{len(passed)} of {len(windows)} rates keep {slo}"
    return Loaded(result, f"{headline} (partial: {stopped})" if stopped else headline, windows, stopped, error)


def load_closed(url: str, sending: Sending, *, concurrency: int, duration_s: float) -> tuple[ClosedResult, bool]:
    """What `concurrency` users get that wait for their answers; and whether Ctrl-C ended it early."""
    target, requests = sending.aim(url)
    with LoadView(None) as view, Generator() as generator:
        stop = _Stop(generator)
        view.start(f"{concurrency} users in a closed loop", duration_s)
        with stop.around_window():
            result = closed_loop(
                generator,
                target,
                requests,
                concurrency=concurrency,
                duration_s=duration_s,
                check=sending.check,
                on_tick=view.tick,
            )
    return result, stop.hit


def contest(
    urls: Sequence[str], slo: SLO, sending: Sending, *, rates: Sequence[float], window_s: float, blocks: int
) -> tuple[Comparison, str]:
    """The servers compared; and why that ended early, empty where it did not."""
    aimed = {url: sending.aim(url) for url in urls}
    windows = list[Window]()
    with LoadView(slo) as view, Generator() as generator:
        _say_lengths(view, slo, rates, window_s)
        stop = _Stop(generator)

        def ask(url: str, rate: float, seed: int) -> Measurement:
            with stop.around_window():
                window = measure(
                    generator,
                    *aimed[url],
                    slo,
                    rate_rps=rate,
                    seed=seed,
                    window_s=window_s,
                    sequential=False,  # both of a pair have the same length
                    arrivals=sending.arrivals,
                    check=sending.check,
                    progress=_Named(view, url),
                    on_tick=view.tick,
                )
            stop.check()
            return window

        def keep(window: Window) -> None:
            windows.append(window)
            view.add(window.measurement)

        stopped = ""
        try:
            found = compare(ask, urls, slo, rates=rates, blocks=blocks, seed=sending.seed, on_window=keep)
        except (_Stopped, KeyboardInterrupt):
            stopped = f"{STOPPED} {INTERRUPTION.name}"
        except LoadError as error:
            if not windows:
                raise
            stopped = str(error)
    if stopped and not windows:
        raise KeyboardInterrupt
    if stopped:
        found = summarize(slo, tuple(urls), tuple(rates), windows)
    return found, stopped


class _Named:
    """Progress that says whose it is."""

    def __init__(self, view: LoadView, name: str) -> None:
        self._view, self._name = view, name

    def start(self, what: str, total: float | None = None) -> None:
        self._view.start(f"{self._name}, {what}", total)

    def advance(self, by: float = 1.0, note: str = "") -> None:
        self._view.advance(by, note)

    def done(self, note: str = "", *, good: bool = True) -> None:
        self._view.done(note, good=good)

    def limit(self, seconds: float) -> None:
        self._view.limit(seconds)


def arrivals_name(arrivals: Arrivals) -> str:
    """As a user writes it."""
    return getattr(arrivals, "__name__", str(arrivals))


def print_windows(console: Console, slo: SLO, windows: Sequence[Measurement]) -> None:
    """The table of windows, and what kinds of errors there were. In 80 columns no number loses a digit."""
    table = Table(title=f"Open-loop load, {slo}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("rate/s", "n", "late", "p50 ms", "p99 ms", "95% interval", "generator", "verdict"):
        # rich narrows the columns that may wrap before it cuts any other.
        may_wrap = name in ("95% interval", "verdict")
        table.add_column(name, justify="left" if name == "verdict" else "right", no_wrap=not may_wrap)
    for run in windows:
        interval = "" if run.p99_interval_ms is None else "{:.1f} to {:.1f}".format(*run.p99_interval_ms)
        table.add_row(
            f"{run.rate_rps:,.6g}",
            f"{run.n:,}",
            f"{run.late:,}",
            "" if run.p50_ms is None else f"{run.p50_ms:.1f}",
            "" if run.p99_ms is None else f"{run.p99_ms:.1f}",
            interval,
            f"{run.generator_cpu:.0%}",
            run.outcome.words,
        )
    console.print(table)
    last = windows[-1] if windows else None
    if last is not None and last.speed and last.slow_speed:  # of one rate: batches of other sizes differ otherwise
        slow = last.slow_speed / last.speed
        console.print(f"the last window: {slow:.2f} of its usual speed at this host's slow moments", highlight=False)
    kinds: dict[str, int] = {}
    for run in windows:
        for kind, count in run.error_kinds.items():
            kinds[kind] = kinds.get(kind, 0) + count
    if kinds:
        said = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
        console.print(f"errors: {said}", highlight=False, markup=False)


def print_closed(console: Console, result: ClosedResult) -> None:
    """What the users of a closed loop got."""
    p99 = "fewer than 299 answers: no p99"
    if result.p99_ms is not None and result.p99_interval_ms is not None:
        low, high = result.p99_interval_ms
        p99 = f"p99 {result.p99_ms:.1f} ms ({low:.1f} to {high:.1f}, n = {result.n:,})"
    p50 = "" if result.p50_ms is None else f"p50 {result.p50_ms:.1f} ms, "
    console.print(
        f"{result.concurrency} users in a closed loop: {result.throughput_rps:,.0f} answers/s, {p50}{p99}; "
        f"{result.errors:,} errors, {result.shed:,} shed, generator {result.generator_cpu:.0%} of a core"
        + (f"; the first error: {result.first_error}" if result.first_error else ""),
        highlight=False,
        markup=False,
    )
    console.print("These users wait while the server stands still: what a crowd would feel, only --rate says.")


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Each server against the first."""
    first = comparison.servers[0]
    table = Table(title=f"Against {first}, {comparison.slo}", title_justify="left")
    for name in ("server", "rate/s", "figure", "ratio", "95% interval", "blocks", ""):
        table.add_column(name, justify="left" if name in ("server", "figure", "") else "right")
    for ratio in comparison.ratios:
        table.add_row(
            ratio.server,
            f"{ratio.rate_rps:,.6g}",
            _METRICS[ratio.metric],
            "" if ratio.ratio is None else f"{ratio.ratio:.3f}",
            "" if ratio.interval is None else "{:.3f} to {:.3f}".format(*ratio.interval),
            f"{ratio.pairs} of {ratio.of_blocks}",
            _in_words(ratio),
        )
    console.print(table)


def _in_words(ratio: Ratio) -> str:
    if ratio.interval is None or ratio.ratio is None:
        return "too few undisturbed blocks"
    if not ratio.differs:
        return "no difference shown"
    words = ("more", "fewer") if ratio.metric == "answered_rps" else ("slower", "faster")
    return words[0] if ratio.ratio > 1 else words[1]
