"""The speedometer: how fast the host is, by a few batches of one engine that is always the same.

A virtual machine shares its cores. What others do there changes its speed by half within minutes, and no counter shows
it (docs/decisions/0047).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from rushhour.bundle import Bundle
from rushhour.engines import Engine, EngineConfig, open_engine, time_service
from rushhour.measurement import ServiceTimes
from rushhour.records.journal import Journal
from rushhour.system.machine import cores
from rushhour.tune.space import Candidate, candidates
from rushhour.tune.state import failure_reason

_READ_S: Final = 0.1
"""How long its batches of one sample are timed."""
_LONGEST_S: Final = 60.0


class Speedometer:
    """Reads the host's speed relative to its first reading, which is in the journal as all are.

    Its engine is that of the reference, in a stream for each core. It stays open between readings, idle. Where no
    engine runs it, the speed is always 1.

    Args:
        journal: of the readings.
        bundles: role -> bundle.
    """

    def __init__(self, journal: Journal, bundles: Mapping[str, Bundle]) -> None:
        self._journal = journal
        self._bundles = bundles
        self._engine: Engine | None = None
        self._ways: list[Candidate] | None = None
        """Candidates whose engine may be the one; the first is tried next."""
        self._first_s: float | None = None

    def read(self, beside: str, when: str) -> float:
        """The speed now; 1 as at the first reading.

        Args:
            beside: what is measured at the same time.
            when: which of its measurements.

        Raises:
            StorageError: if the journal cannot be written.
        """
        if self._ways is None:
            self._ways = _ways(self._bundles["reference"]) if "reference" in self._bundles else []
        while self._ways:
            try:
                (now_s,) = self._read(self._ways[0], beside, when).seconds
            except Exception as error:  # an engine may fail in any way on a user's graph
                failure_reason(error)
                self.close()
                self._ways.pop(0)
                self._first_s = None
                continue
            self._first_s = self._first_s or now_s
            return self._first_s / now_s
        return 1.0

    def _read(self, candidate: Candidate, beside: str, when: str) -> ServiceTimes:
        def time(bundle: Bundle, config: EngineConfig) -> ServiceTimes:
            self._engine = self._engine or open_engine(bundle, config)
            return time_service(self._engine, bundle, _LONGEST_S, _READ_S)

        bundle, config = self._bundles[candidate.bundle], candidate.engine_config()
        return self._journal.measure("speed", beside, when, ServiceTimes, time, bundle=bundle, config=config)

    def close(self) -> None:
        """Close its engine."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def _ways(reference: Bundle) -> list[Candidate]:
    """Of each engine and precision that may run it, one sample at a time in a stream for each core."""
    every = candidates({"reference": reference}, cores())
    return [each.with_batch(1) for each in every if each.layout == (1, cores(), 1)]
