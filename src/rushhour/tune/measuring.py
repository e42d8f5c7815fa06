"""Where a search gets its measurements other than from this machine: a source that knows them, such as a record.

The search asks its questions in the same order and keeps the answers in the same journal. So any search can be replayed
on recorded measurements (`rushhour.testing.replay`), in no time and as often as wanted.
"""

from __future__ import annotations

import contextlib
from typing import Any, Protocol, runtime_checkable

from rushhour.goal import SLO
from rushhour.measurement import Accuracy, ClosedLoop, Measurement, ServiceTimes
from rushhour.tune.space import Candidate


class LoadedServer(Protocol):
    """A server under load. The same question has the same answer, however often and in whatever order it is asked."""

    def closed_window(self, question: str, *, concurrency: int, seconds: float, within_s: float) -> ClosedLoop:
        """A closed loop of `concurrency` users for `seconds`, which counts answers within `within_s`."""
        ...

    def open_window(self, question: str, slo: SLO, *, rate_rps: float, seed: int, **asked: Any) -> Measurement:
        """A window of open-loop load; `asked` are further arguments of `rushhour.load.measure`."""
        ...


@runtime_checkable
class MeasurementSource(Protocol):
    """Knows the measurements of a search."""

    def service_times(self, candidate: Candidate) -> ServiceTimes:
        """How long the engine alone takes.

        Raises:
            EngineError: if the engine cannot run the candidate.
        """
        ...

    def host_speed(self, candidate: Candidate, when: str) -> float:
        """The host's speed while the candidate's engine is timed, or beside a load test of it; 1 is any fixed speed.

        Args:
            candidate: that is measured.
            when: which of its measurements: `timed ...`, or the phase of a load test.
        """
        ...

    def accuracy(self, candidate: Candidate, part: str) -> Accuracy:
        """The accuracy on a part of the data, `validation` or `test`."""
        ...

    def serve(self, candidate: Candidate, phase: str) -> contextlib.AbstractContextManager[LoadedServer]:
        """The candidate's server, as a context.

        Args:
            candidate: that is served.
            phase: of the search: the same question in another phase may have another answer.
        """
        ...
