"""The verb `load`: a server under open-loop load, and the verdict on its SLO."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Unpack, overload

import msgspec

from rushhour.api.stop import Stop, how_it_ended
from rushhour.api.traffic import Traffic, TrafficOptions, read_rates, read_traffic
from rushhour.api.values import StrPath, read_seconds, read_slo
from rushhour.errors import GoalError, LoadError
from rushhour.goal import SLO
from rushhour.load import (
    Arrivals,
    ClosedResult,
    Endpoint,
    Generator,
    Payload,
    Search,
    Shape,
    Target,
    Tick,
    Trace,
    is_cascade,
    measure,
    search_capacity,
    why_longer,
)
from rushhour.load import (
    closed_loop as run_closed_loop,
)
from rushhour.measurement import Measurement, Outcome
from rushhour.progress import Progress, Silent

if TYPE_CHECKING:
    from rushhour.api.serving import Server

_RETRIES: Final = 3
"""Of a window that the machine disturbed."""
_WINDOW_S: Final = 10.0


@dataclasses.dataclass(frozen=True)
class LoadResult:
    """What a load found, as far as it came.

    Attributes:
        url: of the server.
        model: the model's name; None of a plain HTTP endpoint.
        slo: what windows were judged by.
        arrivals: the arrival process, as a user writes it.
        seed: of the arrivals.
        windows: all that was measured, in order.
        searched: whether the capacity was searched, not given rates tried.
        search: the search's result; None where it did not end.
        stopped: why the load ended early; empty where it did not.
        error: the error that ended it after the first window, if one did.
    """

    url: str
    model: str | None
    slo: SLO
    arrivals: str
    seed: int
    windows: tuple[Measurement, ...]
    searched: bool
    search: Search | None = None
    stopped: str = ""
    error: LoadError | None = None

    def __repr__(self) -> str:
        """Short, for a notebook."""
        return f"<LoadResult {self.url}: {self.headline}>"

    @property
    def outcome(self) -> Outcome:
        """`pass` where the SLO holds at all rates, or up to a proven capacity; else what speaks against it."""
        if self.search is not None and self.search.capacity_rps:
            return Outcome.PASS if self.search.proven else Outcome.INCONCLUSIVE
        last = self.windows[-1].outcome if self.windows else Outcome.VOID
        if self.searched:
            return last
        return next((window.outcome for window in self.windows if window.outcome is not Outcome.PASS), last)

    @property
    def holds(self) -> bool:
        """Whether the SLO holds, proven and without any interruption."""
        return not self.stopped and self.outcome is Outcome.PASS

    @property
    def capacity_rps(self) -> float | None:
        """The highest rate that keeps the SLO, proven or estimated; None where it was not searched to the end."""
        return None if self.search is None else self.search.capacity_rps

    @property
    def proven(self) -> bool:
        """Whether `capacity_rps` is a confirmed pass, not an estimate."""
        return self.search is not None and self.search.proven

    @property
    def headline(self) -> str:
        """The result in one sentence."""
        return f"{self._headline()} (partial: {self.stopped})" if self.stopped else self._headline()

    def _headline(self) -> str:
        passed = [window.rate_rps for window in self.windows if window.outcome is Outcome.PASS]
        found = self.search
        if self.searched and found is None:
            best = f"; the highest rate that passed is {max(passed):,.6g}/s" if passed else ""
            return f"the search did not finish{best}; nothing is confirmed"
        if found is not None:
            failing = f"; {found.lowest_failing_rps:,.6g} fails" if found.lowest_failing_rps else ""
            because = f" ({found.reason})" if found.reason else ""
            is_exact = found.proven or found.estimate is None
            rate = f"{found.capacity_rps:,.6g} requests/s" if is_exact else str(found.estimate)
            return f"{rate} keep {self.slo}{failing}{because}"
        if len(self.windows) == 1:
            return f"{self.outcome.words}: {self.windows[0].reason}"
        return f"{len(passed)} of {len(self.windows)} rates keep {self.slo}"

    def as_dict(self) -> dict[str, Any]:
        """What `rushhour load --json` writes."""
        facts: dict[str, Any] = {
            "outcome": self.outcome,
            "slo": str(self.slo),
            "url": self.url,
            "model": self.model,
            "arrivals": self.arrivals,
            "seed": self.seed,
            "partial": bool(self.stopped),
            "runs": list(self.windows),
        }
        if self.stopped:
            facts["stopped"] = self.stopped
        if self.searched:
            found = self.search
            facts |= {
                "capacity_rps": self.capacity_rps,
                "lowest_failing_rps": None if found is None else found.lowest_failing_rps,
                "proven": self.proven,
                "estimate": None if found is None else found.estimate,
            }
        elif len(self.windows) == 1:
            fields = msgspec.to_builtins(self.windows[0])
            facts |= {name: value for name, value in fields.items() if name not in ("slo", "latencies", "kind")}
        return facts


@dataclasses.dataclass(frozen=True)
class ClosedLoopResult:
    """What users got that wait for their answers. There is no verdict: they send nothing while the server is slow.

    Attributes:
        url: of the server.
        result: throughput, latencies and errors.
        stopped: why the load ended early; empty where it did not.
    """

    url: str
    result: ClosedResult
    stopped: str = ""

    def as_dict(self) -> dict[str, Any]:
        """What `rushhour load --closed-loop N --json` writes."""
        return {"loop": "closed", "url": self.url, "partial": bool(self.stopped), "result": self.result}


class LoadOptions(TrafficOptions, total=False):
    """The arguments of `load` that do not decide what it returns."""

    progress: Progress | None
    on_window: Callable[[Measurement], None] | None
    on_tick: Callable[[Tick], None] | None
    stop: Stop | None


@overload
def load(
    url: str | Server,
    *,
    slo: str | SLO = ...,
    rate: float | str | Sequence[float | str] | None = ...,
    duration: str | float | None = ...,
    closed_loop: None = ...,
    **rest: Unpack[LoadOptions],
) -> LoadResult: ...


@overload
def load(
    url: str | Server,
    *,
    closed_loop: int,
    slo: str | SLO = ...,
    duration: str | float | None = ...,
    **rest: Unpack[LoadOptions],
) -> ClosedLoopResult: ...


@overload
def load(
    url: str | Server,
    *,
    slo: str | SLO = ...,
    rate: float | str | Sequence[float | str] | None = ...,
    duration: str | float | None = ...,
    closed_loop: int | None,
    **rest: Unpack[LoadOptions],
) -> LoadResult | ClosedLoopResult: ...


def load(
    url: str | Server,
    *,
    slo: str | SLO = "p99<50ms",
    rate: float | str | Sequence[float | str] | None = None,
    duration: str | float | None = None,
    closed_loop: int | None = None,
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
) -> LoadResult | ClosedLoopResult:
    """Does a server keep an SLO at a rate, or without one: up to which rate?

    The load is open loop: requests are sent when they arrive, whether or not earlier ones are answered, and latency
    runs from the scheduled arrival to the last byte of the answer. A `KeyboardInterrupt` after the first window ends
    the load with a partial result.

        rushhour.load("http://127.0.0.1:8000", slo="p99<50ms", rate=500, duration="10s").holds
        rushhour.load(server, slo="p99<50ms").capacity_rps
        rushhour.load("http://127.0.0.1:8080", path="/predict", body="cat.jpg", headers=["Accept: */*"], rate=50)

    Args:
        url: `http://HOST:PORT` or `grpc://HOST:PORT` of an Open Inference Protocol server, or of any HTTP endpoint
            where `body`, `path`, `method` or `headers` are given; or the result of `serve`.
        slo: the latency limit.
        rate: requests per second, one or several: a window and a verdict each; `recorded` is a trace's own. Without
            it, the capacity is searched.
        duration: of a window: `10s`, `2m` or seconds; longer where the verdict needs more requests. 10 s by default; a
            trace is replayed whole.
        closed_loop: this many users that wait for their answers, instead of open-loop load; there is no verdict.
        arrivals: `poisson`, `constant`, `bursty`, `bursty:intensity=5,share=0.1,burst_s=0.5`, a file of recorded times,
            or an arrival process of `rushhour.load`.
        seed: of the arrivals; a fresh one by default.
        model: the model's name; not needed where the server has only one.
        rows: samples in one request.
        shapes: of inputs whose sizes the server's metadata leaves open: `image:3,224,224` or `image:FP32:3,224,224`.
        json_tensors: send tensors as JSON numbers, not as raw bytes.
        named_rows: send real rows of a table, by their columns' names, that the server has (`GET .../rows`).
        payloads: a bundle or run whose samples are sent, or a folder of .npy, .npz, .json, .bin, .jpg, .png and .txt
            files; random values by default.
        body: a file that is sent as it is, to any HTTP endpoint.
        method: of requests to any HTTP endpoint: `POST`, `GET`, ...
        path: where they are sent.
        headers: sent with them: `Name: value`.
        check: compare each answer with the first one to the same request; another answer is an error.
        progress: gets the progress.
        on_window: called with each window once it is measured.
        on_tick: called about five times a second while a window lasts.
        stop: ends the load early, from another thread.

    Raises:
        LoadError: if the server cannot be reached or loaded, or `stop` ends the load before anything was measured;
            after the first window it is in the result instead.
        GoalError: if the SLO, a rate or the duration cannot be used.
    """
    limit = read_slo(slo)
    seconds = _WINDOW_S if duration is None else read_seconds(duration)
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
    rates = [] if rate is None else read_rates(rate, traffic)
    load_ = _Load(str(url), limit, traffic, progress or Silent(), on_window, on_tick, stop or Stop())
    if closed_loop is not None:
        if rates:
            raise GoalError("a closed loop has no rate", "its users send when they are answered", "leave out --rate")
        return load_.closed(closed_loop, seconds)
    if rates:
        n = len(traffic.arrivals.gaps) if isinstance(traffic.arrivals, Trace) and duration is None else None
        return load_.at(rates, seconds, n)
    if duration is not None:
        load_.progress.note(
            "without --rate, --duration has no effect: the search for the capacity takes a minute or two"
        )
    return load_.search()


def note_longer(progress: Progress, slo: SLO, rates: Sequence[float], window_s: float) -> None:
    """Note, before it begins, what takes longer than was asked for, and why."""
    for why in dict.fromkeys(why_longer(slo, rate, window_s) for rate in rates):
        if why:
            progress.note(why)


@dataclasses.dataclass
class _Load:
    """One call of `load`; its windows are kept if it ends early."""

    url: str
    slo: SLO
    traffic: Traffic
    progress: Progress
    on_window: Callable[[Measurement], None] | None
    on_tick: Callable[[Tick], None] | None
    stop: Stop

    def __post_init__(self) -> None:
        self._windows: list[Measurement] = []
        self._stopped = ""
        self._error: LoadError | None = None

    def at(self, rates: Sequence[float], window_s: float, n: int | None) -> LoadResult:
        """A window at each rate: of `window_s`, or of exactly `n` requests."""
        target, requests = self._aim()
        with Generator() as generator, self._kept():
            if n is None:
                note_longer(self.progress, self.slo, rates, window_s)
            for number, rate in enumerate(rates):
                self._take(
                    *(generator, target, requests, self.slo),
                    rate_rps=rate,
                    seed=self.traffic.seed + number,
                    window_s=window_s,
                    n=n,
                    retries=_RETRIES,
                )
        return self._result(target)

    def _aim(self) -> tuple[Endpoint, list[Payload]]:
        """As `Traffic.aim`, with a note where what is sent decides what is measured."""
        target, requests = self.traffic.aim(self.url)
        if self.traffic.is_random and isinstance(target, Target) and is_cascade(target):
            self.progress.note(
                f"{target.model} is a cascade: how many samples go on to its larger model depends on what is sent, and "
                "these are random values; for its capacity send real ones with --payloads"
            )
        return target, requests

    def search(self) -> LoadResult:
        """The capacity."""
        target, requests = self._aim()
        found = None
        with Generator() as generator, self._kept():
            seed = self.traffic.seed
            found = search_capacity(
                generator, target, requests, self.slo, seed=seed, progress=self.progress, take=self._take
            )
        return self._result(target, searched=True, search=found)

    def closed(self, concurrency: int, duration_s: float) -> ClosedLoopResult:
        """Users that wait for their answers."""
        target, requests = self._aim()
        with Generator() as generator:
            self.progress.start(f"{concurrency} users in a closed loop", duration_s)
            with self.stop.window(generator):
                result = run_closed_loop(
                    generator,
                    target,
                    requests,
                    concurrency=concurrency,
                    duration_s=duration_s,
                    check=self.traffic.check,
                    on_tick=self.on_tick,
                )
        return ClosedLoopResult(self.url, result, self.stop.reason if self.stop.is_requested else "")

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        """What is measured until an early end is kept; an end before that is raised on."""
        try:
            yield
        except (LoadError, KeyboardInterrupt) as error:
            if not self._windows:
                raise
            self._stopped, self._error = how_it_ended(error)

    def _take(
        self, generator: Generator, target: Endpoint, requests: Sequence[Payload], slo: SLO, **how: Any
    ) -> Measurement:
        with self.stop.window(generator):
            window = measure(
                *(generator, target, requests, slo),
                **how,
                arrivals=self.traffic.arrivals,
                check=self.traffic.check,
                progress=self.progress,
                on_tick=self.on_tick,
            )
        if self.stop.is_requested:
            window = msgspec.structs.replace(window, reason=f"stopped early: {window.reason}")
        self._windows.append(window)
        if self.on_window is not None:
            self.on_window(window)
        self.stop.check()
        return window

    def _result(self, target: Endpoint, *, searched: bool = False, search: Search | None = None) -> LoadResult:
        return LoadResult(
            url=self.url,
            model=target.model if isinstance(target, Target) else None,
            slo=self.slo,
            arrivals=self.traffic.arrivals_name,
            seed=self.traffic.seed,
            windows=tuple(self._windows),
            searched=searched,
            search=search,
            stopped=self._stopped,
            error=self._error,
        )
