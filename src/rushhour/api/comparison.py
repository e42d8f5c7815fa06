"""The verb `compare`: servers under the same arrivals, and the ratios of their figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from rushhour.api.loading import note_longer
from rushhour.api.stop import Stop, how_it_ended
from rushhour.api.traffic import read_rates, read_traffic
from rushhour.api.values import StrPath, read_seconds, read_slo
from rushhour.errors import LoadError
from rushhour.goal import SLO
from rushhour.load import Arrivals, Comparison, Generator, Shape, Tick, Window, measure, summarize
from rushhour.load import compare as compare_servers
from rushhour.measurement import Measurement
from rushhour.progress import Progress, Silent

if TYPE_CHECKING:
    from rushhour.api.serving import Server


@dataclasses.dataclass(frozen=True)
class CompareResult:
    """A comparison, as far as it came.

    Attributes:
        comparison: ratios of every server's figures to the first one's, with 95% intervals, and all windows.
        arrivals: the arrival process, as a user writes it.
        seed: of the arrivals.
        stopped: why it ended early; empty where it did not.
        error: the error that ended it after the first window, if one did.
    """

    comparison: Comparison
    arrivals: str
    seed: int
    stopped: str = ""
    error: LoadError | None = None

    def __repr__(self) -> str:
        """Short, for a notebook."""
        ratios, windows = len(self.comparison.ratios), len(self.comparison.windows)
        return f"<CompareResult of {windows} windows: {ratios} ratios to the first server>"

    @property
    def is_complete(self) -> bool:
        """Whether it ended by itself and every ratio has an interval."""
        return not self.stopped and all(ratio.interval is not None for ratio in self.comparison.ratios)

    def as_dict(self) -> dict[str, Any]:
        """What `rushhour compare --json` writes."""
        facts = {"arrivals": self.arrivals, "seed": self.seed, "partial": bool(self.stopped)}
        return {**msgspec.to_builtins(self.comparison), **facts, "slo": str(self.comparison.slo)}


def compare(
    urls: Sequence[str | Server],
    *,
    rate: float | str | Sequence[float | str],
    slo: str | SLO = "p99<50ms",
    window: str | float = "5s",
    blocks: int = 6,
    arrivals: str | Arrivals = "poisson",
    seed: int | None = None,
    model: str | None = None,
    rows: int = 1,
    shapes: str | Sequence[str] | Mapping[str, Shape] = (),
    json_tensors: bool = False,
    named_rows: bool = False,
    payloads: StrPath | None = None,
    body: StrPath | None = None,
    method: str | None = None,
    path: str | None = None,
    headers: str | Sequence[str] = (),
    check: bool = False,
    progress: Progress | None = None,
    on_window: Callable[[Measurement], None] | None = None,
    on_tick: Callable[[Tick], None] | None = None,
    stop: Stop | None = None,
) -> CompareResult:
    """Which of several servers is faster at the same rate, and how sure is that?

    Windows of all servers are interleaved (A B, B A, ...) on the same arrivals. Each block gives ratios of p50, p99 and
    answers per second to the first server's, and all blocks together their 95% intervals.

        rushhour.compare(["http://127.0.0.1:8000", "http://127.0.0.1:9000"], rate=[200, 400]).comparison.ratios

    Args:
        urls: two or more servers, as of `rushhour.load`.
        rate: requests per second, one or several.
        slo: the latency limit that windows are judged by.
        window: duration of a window: `5s` or seconds; longer where the SLO needs more requests.
        blocks: windows of each server at each rate.
        arrivals: as of `rushhour.load`, as all down to `stop`.
        seed: as of `rushhour.load`.
        model: as of `rushhour.load`.
        rows: as of `rushhour.load`.
        shapes: as of `rushhour.load`.
        json_tensors: as of `rushhour.load`.
        named_rows: as of `rushhour.load`.
        payloads: as of `rushhour.load`.
        body: as of `rushhour.load`.
        method: as of `rushhour.load`.
        path: as of `rushhour.load`.
        headers: as of `rushhour.load`.
        check: as of `rushhour.load`.
        progress: as of `rushhour.load`.
        on_window: as of `rushhour.load`.
        on_tick: as of `rushhour.load`.
        stop: as of `rushhour.load`.

    Raises:
        LoadError: if there is nothing to compare, a server cannot be reached or loaded, or `stop` ends it before
            anything was measured; after the first window it is in the result instead.
        GoalError: if the SLO, a rate or the duration cannot be used.
    """
    limit = read_slo(slo)
    traffic = read_traffic(
        arrivals=arrivals,
        seed=seed,
        model=model,
        rows=rows,
        shapes=shapes,
        json_tensors=json_tensors,
        named_rows=named_rows,
        payloads=payloads,
        body=body,
        method=method,
        path=path,
        headers=headers,
        check=check,
    )
    rates, window_s = read_rates(rate, traffic), read_seconds(window)
    servers = [urls] if isinstance(urls, str) else [str(url) for url in urls]
    requests = {url: traffic.aim(url) for url in servers}
    windows = list[Window]()
    report, ending = progress or Silent(), stop or Stop()
    stopped, failure = "", None
    with Generator() as generator:
        note_longer(report, limit, rates, window_s)

        def ask(url: str, rate: float, seed: int) -> Measurement:
            with ending.window(generator):
                found = measure(
                    generator,
                    *requests[url],
                    limit,
                    rate_rps=rate,
                    seed=seed,
                    window_s=window_s,
                    sequential=False,  # both of a pair have the same length
                    arrivals=traffic.arrivals,
                    check=traffic.check,
                    progress=_Prefixed(report, url),
                    on_tick=on_tick,
                )
            ending.check()
            return found

        def keep(window: Window) -> None:
            windows.append(window)
            if on_window is not None:
                on_window(window.measurement)

        try:
            found = compare_servers(ask, servers, limit, rates=rates, blocks=blocks, seed=traffic.seed, on_window=keep)
        except (LoadError, KeyboardInterrupt) as error:
            if not windows:
                raise
            stopped, failure = how_it_ended(error)
    if stopped:
        found = summarize(limit, tuple(servers), tuple(rates), windows)
    return CompareResult(found, traffic.arrivals_name, traffic.seed, stopped, failure)


class _Prefixed:
    """Progress whose pieces of work begin with a name."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress, self._name = progress, name

    def start(self, what: str, total: float | None = None) -> None:
        self._progress.start(f"{self._name}, {what}", total)

    def advance(self, by: float = 1.0, note: str = "") -> None:
        self._progress.advance(by, note)

    def done(self, note: str = "", *, good: bool = True) -> None:
        self._progress.done(note, good=good)

    def limit(self, seconds: float) -> None:
        self._progress.limit(seconds)

    def note(self, text: str) -> None:
        self._progress.note(text)
