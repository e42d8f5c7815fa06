"""Service times of engines, each timed once, and the host's speed meanwhile.

A host that others use is faster in one minute than in the next, and load follows minutes after the engines were timed.
So the speed is read after each engine and beside each load test (`speedometer`): times and capacities are compared at
equal speed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec

from rushhour.bundle import Bundle
from rushhour.capacity import ServiceProfile
from rushhour.engines import EngineConfig, open_engine, time_service
from rushhour.goal import SLO
from rushhour.measurement import ServiceTimes
from rushhour.records.journal import Journal
from rushhour.tune.measuring import MeasurementSource
from rushhour.tune.space import LARGEST_BATCH, Candidate, torch_code
from rushhour.tune.speedometer import Speedometer

_MOST = 3.0
"""By which factor speeds may differ; beyond it a reading was disturbed."""


class EngineTimes:
    """How long engines take, from the journal or measured now.

    Args:
        journal: of the times and speeds.
        bundles: role -> bundle.
        slo: no batch is timed that is larger than one beyond its limit.
        time_s: how long each size of a batch is timed.
        trusted: as in `open_engine`.
        source: knows times and speeds; None to time the engines of this machine.

    Attributes:
        slo: the same.
    """

    def __init__(
        self,
        journal: Journal,
        bundles: Mapping[str, Bundle],
        slo: SLO,
        time_s: float,
        trusted: tuple[str, ...],
        source: MeasurementSource | None = None,
    ) -> None:
        self.slo = slo
        self._journal = journal
        self._bundles = bundles
        self._time_s = time_s
        self._trusted = trusted
        self._source = source
        self._speedometer = Speedometer(journal, bundles)
        self._last = 1.0
        self._speeds: dict[tuple[str, int], float] = {}
        """Of the host, while an engine was timed: by what was compiled, and its batch bound."""
        self._profiles: dict[str, ServiceProfile] = {}
        self._own: dict[str, ServiceProfile] = {}
        """Of candidates with their own batch bound, by name."""

    def close(self) -> None:
        """Close the engine that the host's speed is read from."""
        self._speedometer.close()

    def of(self, candidate: Candidate) -> ServiceTimes:
        """How long the engine alone takes for batches of each size, whatever the candidate's batch bound.

        They hold for all candidates that compile the bundle alike: for processes of one stream each, and for one
        process with as many streams.

        Raises:
            EngineError: if it cannot run the bundle. Engines raise other errors, too.
        """
        return self.timed(_whole(candidate))

    def timed(self, candidate: Candidate) -> ServiceTimes:
        """The same with the candidate's batch bound: an engine may compile that size alone.

        Raises:
            EngineError: as `of`.
        """
        config, limit_s, source = candidate.engine_config(), self.slo.limit_s, self._source
        times = self._journal.measure(
            "service",
            candidate.compiled,
            f"up to {config.max_batch} samples or {limit_s * 1e3:g} ms",
            ServiceTimes,
            self._time if source is None else lambda **_: source.service_times(candidate),
            bundle=self._bundles[candidate.bundle],
            config=config,
            code=torch_code(candidate, self._bundles[candidate.bundle], self._trusted),
            limit_s=limit_s,
            seconds=self._time_s,
        )
        key = candidate.compiled, config.max_batch
        if key not in self._speeds:
            before, after = self._last, self.speed_beside(candidate, f"timed up to {config.max_batch}")
            self._speeds[key] = math.sqrt(before * after) if source is None else after
        return times

    def _time(
        self, bundle: Bundle, config: EngineConfig, code: dict[str, str], limit_s: float, seconds: float
    ) -> ServiceTimes:
        engine = open_engine(bundle, config, trusted=self._trusted)
        try:
            return time_service(engine, bundle, limit_s, seconds)
        finally:
            engine.close()

    def speed_of(self, candidate: Candidate) -> float:
        """The host's speed while the engine of a candidate was timed, whatever its batch bound.

        Raises:
            EngineError: as `of`.
        """
        self.of(candidate)
        return self._speeds[candidate.compiled, _whole(candidate).engine_config().max_batch]

    def speed_beside(self, candidate: Candidate, when: str) -> float:
        """The host's speed now, just beside a measurement of a candidate; 1 as at the first reading.

        Args:
            candidate: that is timed or put under load.
            when: which measurement of it, before or after: a reading of the same name is not repeated.
        """
        source = self._source
        found = self._speedometer.read(str(candidate), when) if source is None else source.host_speed(candidate, when)
        self._last = max(1 / _MOST, min(_MOST, found))
        return self._last

    def refine(self, candidate: Candidate) -> None:
        """Time the engine with the candidate's own batch bound, as it is served.

        Raises:
            EngineError: as `of`.
        """
        if str(candidate) not in self._own:
            self._own[str(candidate)] = self._at_equal_speed(candidate)

    def is_refined(self, candidate: Candidate) -> bool:
        """Whether it was timed with its own batch bound."""
        return str(candidate) in self._own

    def beside_load(self, candidate: Candidate, speed: float) -> ServiceTimes:
        """The times as they were beside load, with the candidate's own batch bound where they are known.

        Args:
            candidate: that was put under load.
            speed: of the host then.
        """
        one = candidate if self.is_refined(candidate) else _whole(candidate)
        times, factor = self.timed(one), self._speeds[one.compiled, one.engine_config().max_batch] / speed
        return _scaled(times, factor)

    def profile(self, candidate: Candidate, *, as_served: bool = True) -> ServiceProfile:
        """The times at speed 1: with its own batch bound where they are known, unless `as_served` is false.

        Raises:
            EngineError: as `of`.
        """
        if as_served and (own := self._own.get(str(candidate))) is not None:
            return own
        if candidate.compiled not in self._profiles:
            self._profiles[candidate.compiled] = self._at_equal_speed(_whole(candidate))
        return self._profiles[candidate.compiled]

    def _at_equal_speed(self, candidate: Candidate) -> ServiceProfile:
        times = self.timed(candidate)
        speed = self._speeds[candidate.compiled, candidate.engine_config().max_batch]
        return ServiceProfile(_scaled(times, speed))


def _scaled(times: ServiceTimes, factor: float) -> ServiceTimes:
    """With batches that take so many times as long."""
    return msgspec.structs.replace(
        times,
        seconds=tuple(batch_s * factor for batch_s in times.seconds),
        throughput=tuple(rate / factor for rate in times.throughput),
    )


def _whole(candidate: Candidate) -> Candidate:
    """As it is timed for all batch bounds; torch runs one sample at a time."""
    return candidate if candidate.engine == "torch" else candidate.with_batch(LARGEST_BATCH)
