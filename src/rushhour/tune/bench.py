"""The test bench: candidates under load, every window in the journal before the next one starts.

The phases, details and names of inputs in the journal are those of earlier versions, which called a search window a
`glance`: under other names a journal would not answer, and everything would be measured again.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from rushhour.bundle import Bundle
from rushhour.goal import SLO, Goal
from rushhour.load import (
    ClosedJob,
    Generator,
    OpenJob,
    Payload,
    Probe,
    Samples,
    Target,
    Tick,
    closed_window,
    discover,
    measure,
    null_throughput,
    payloads,
    search_window_n,
)
from rushhour.measurement import ClosedLoop, Measurement
from rushhour.records.journal import Journal
from rushhour.tune.measuring import LoadedServer, MeasurementSource
from rushhour.tune.server import cpu_seconds, served
from rushhour.tune.space import Candidate, torch_code
from rushhour.tune.state import Sent


class Bench:
    """Serves candidates and puts them under load. What is in the journal is not measured again.

    Args:
        journal: of all windows.
        load: the generator that sends load to servers of this machine, or a source that knows what is measured.
        goal: the SLO and the workload.
        run: the run's folder, with `bundles/` in it.
        trusted: as in `open_engine`.
    """

    def __init__(
        self,
        journal: Journal,
        load: Generator | MeasurementSource,
        goal: Goal,
        run: Path,
        trusted: tuple[str, ...],
    ) -> None:
        self._journal = journal
        self._load = load
        self._goal = goal
        self._run = run
        self._trusted = trusted

    @contextlib.contextmanager
    def serve(
        self, candidate: Candidate, bundle: Bundle, phase: str, sent: Sent | None = None
    ) -> Iterator[ServedCandidate]:
        """`candidate` on a server, as a context.

        The server starts with the first window that is not in the journal, and ends with the context.

        Args:
            candidate: that is served.
            bundle: of it.
            phase: of the search.
            sent: samples, each in a request; the bundle's own by default.
        """
        with contextlib.ExitStack() as stack:

            def start() -> LoadedServer:
                if isinstance(self._load, MeasurementSource):
                    return stack.enter_context(self._load.serve(candidate, phase))
                url, pid = stack.enter_context(served(candidate, bundle, self._goal, self._run, self._trusted))
                target = discover(url)
                rows, signature = self._goal.workload.rows, bundle.manifest.signature
                if sent is None:
                    requests = payloads(target, bundle.samples(), rows=rows, signature=signature)
                else:
                    count = len(next(iter(sent.samples.values())))
                    requests = payloads(target, sent.samples, rows=rows, signature=signature, distinct=count)
                return _Server(_Metered(self._load, pid), target, requests)

            yield ServedCandidate(
                self._journal, self._goal, candidate, bundle, phase, functools.cache(start), self._trusted, sent
            )


class ServedCandidate:
    """A candidate on a server, from `Bench.serve`. Its windows raise EngineError if the server does not start."""

    def __init__(
        self,
        journal: Journal,
        goal: Goal,
        candidate: Candidate,
        bundle: Bundle,
        phase: str,
        start: Callable[[], LoadedServer],
        trusted: tuple[str, ...],
        sent: Sent | None,
    ) -> None:
        self._journal = journal
        self._goal = goal
        self._candidate = candidate
        self._phase = phase
        self._start = start

        self._inputs: dict[str, Any] = {
            "bundle": bundle,
            "candidate": candidate,
            "code": torch_code(candidate, bundle, trusted),
            "slo": goal.slo,
            "workload": goal.workload,
            **({} if sent is None else {"sent": sent}),
        }

    def proof_windows(self, window_s: float, error: float) -> Probe:
        """Windows of `window_s`, longer where the SLO needs it, that end when they are decided.

        Args:
            window_s: length.
            error: how often a window may pass at a rate that does not hold.
        """
        return partial(
            self._measure,
            f"window {window_s:g} s at {error:.3g}",
            window_s=window_s,
            warmup_s=min(2.0, max(1.0, window_s / 5)),
            error=error,
        )

    def search_windows(self, window_s: float) -> Probe:
        """Short windows, which prove little. The server warms its engine up before it listens."""

        def probe(rate_rps: float, seed: int) -> Measurement:
            n = search_window_n(self._goal.slo, rate_rps, window_s)
            return self._measure(f"glance {window_s:g} s", rate_rps, seed, n=n, warmup_s=1.0, is_warm=True)

        return probe

    def closed_window(self, concurrency: int, seconds: float, turn: int, against: str = "") -> ClosedLoop:
        """A closed loop that counts answers within the limit.

        Args:
            concurrency: users.
            seconds: length.
            turn: number of the window among several equal ones.
            against: the candidate in the other window of a pair: for another one it is measured again.
        """

        detail = f"{self._goal.slo} rows {self._goal.workload.rows} users {concurrency} for {seconds:g} s, turn {turn}"
        detail += f" against {against}" if against else ""

        def take(*, concurrency: int, seconds: float, within_s: float, **_: Any) -> ClosedLoop:
            return self._start().closed_window(detail, concurrency=concurrency, seconds=seconds, within_s=within_s)

        return self._journal.measure(
            self._phase,
            str(self._candidate),
            detail,
            ClosedLoop,
            take,
            **self._inputs,
            concurrency=concurrency,
            seconds=seconds,
            within_s=self._goal.slo.limit_s,
        )

    def _measure(self, kind: str, rate_rps: float, seed: int, **asked: Any) -> Measurement:
        slo = self._goal.slo

        detail = f"{slo} rows {self._goal.workload.rows} rate {rate_rps:g} {kind} seed {seed}"

        def take(*, rate_rps: float, seed: int, asked: Mapping[str, Any], **_: Any) -> Measurement:
            return self._start().open_window(detail, slo, rate_rps=rate_rps, seed=seed, **asked)

        return self._journal.measure(
            self._phase,
            str(self._candidate),
            detail,
            Measurement,
            take,
            **self._inputs,
            rate_rps=rate_rps,
            seed=seed,
            asked=asked,
        )


class _Server:
    """A server of this machine, as a `LoadedServer`."""

    def __init__(self, metered: _Metered, target: Target, requests: list[Payload]) -> None:
        self._metered = metered
        self._target = target
        self._requests = requests

    def closed_window(self, question: str, **asked: Any) -> ClosedLoop:
        """As `LoadedServer.closed_window`."""
        return closed_window(self._metered.generator, self._target, self._requests, **asked)

    def open_window(self, question: str, slo: SLO, *, rate_rps: float, **asked: Any) -> Measurement:
        """As `LoadedServer.open_window`, with the CPU time of the server."""
        self._metered.clear()
        null_rps = null_throughput(self._metered.generator, self._requests)
        window = measure(
            self._metered, self._target, self._requests, slo, rate_rps=rate_rps, null_rps=null_rps, **asked
        )
        per_request_s = self._metered.server_s_per_request
        server_cpu = None if per_request_s is None else per_request_s * rate_rps
        return msgspec.structs.replace(window, server_cpu=server_cpu)


class _Metered:
    """A generator that measures the server's CPU time too.

    It counts whole runs, warm-up included, as the same requests are counted. The CPU time per request times the rate is
    the number of cores that the server keeps busy.

    Args:
        generator: sends the load.
        pid: of the server.

    Attributes:
        generator: the same, without the measurement.
    """

    def __init__(self, generator: Generator, pid: int) -> None:
        self.generator = generator
        self._pid = pid
        self.clear()

    def clear(self) -> None:
        """Start from zero."""
        self._spent_s: float | None = 0.0
        self._requests = 0

    def run(self, job: OpenJob | ClosedJob, on_progress: Callable[[Tick], None] | None = None) -> Samples:
        """As `Sender.run`."""
        before = cpu_seconds(self._pid)
        samples = self.generator.run(job, on_progress)
        after = cpu_seconds(self._pid)
        if self._spent_s is None or before is None or after is None:
            self._spent_s = None
        else:
            self._spent_s += after - before
        self._requests += len(samples)
        return samples

    @property
    def server_s_per_request(self) -> float | None:
        """CPU seconds of the server for each request sent; None where they are not known."""
        return self._spent_s / self._requests if self._spent_s is not None and self._requests else None
