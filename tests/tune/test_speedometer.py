"""The host's speed, by a few batches of one engine: in the journal, and never the end of a search."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rushhour.bundle import Bundle
from rushhour.engines import Engine, EngineConfig
from rushhour.errors import EngineError
from rushhour.goal import SLO
from rushhour.measurement import ServiceTimes
from rushhour.plan import Policy
from rushhour.records.journal import Journal
from rushhour.testing.bundles import tiny_bundle
from rushhour.tune.engine_times import EngineTimes
from rushhour.tune.space import Candidate
from rushhour.tune.speedometer import Speedometer


class Host:
    """A host on which a batch takes so many seconds; some engines do not run."""

    def __init__(self, *fails: str) -> None:
        self.batch_s = 0.002
        self.read = 0
        self.opened: list[str] = []
        self.closed = 0
        self._fails = fails

    def open_engine(self, bundle: Bundle, config: EngineConfig, **_: object) -> Engine:
        self.opened.append(f"{config.engine}/{config.precision}")
        if config.engine in self._fails:
            raise EngineError("it does not run", "so it is")
        return self  # type: ignore[return-value]

    def close(self) -> None:
        self.closed += 1

    def time_service(self, engine: Engine, bundle: Bundle, *_: float) -> ServiceTimes:
        self.read += 1
        return ServiceTimes((1,), (self.batch_s,), (2 / self.batch_s,))

    def put_in(self, monkeypatch: pytest.MonkeyPatch) -> Host:
        for name in ("engine_times", "speedometer"):
            module = sys.modules[f"rushhour.tune.{name}"]
            monkeypatch.setattr(module, "open_engine", self.open_engine)
            monkeypatch.setattr(module, "time_service", self.time_service)
        return self


def test_speeds_are_relative_to_the_first_reading_and_are_on_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, bundles = Host().put_in(monkeypatch), {"reference": tiny_bundle(tmp_path / "tiny")}
    meter = Speedometer(Journal(tmp_path / "journal.jsonl"), bundles)
    assert meter.read("one", "before") == 1.0
    host.batch_s = 0.004
    assert meter.read("one", "after") == pytest.approx(0.5)
    host.batch_s = 0.001
    assert meter.read("two", "before") == pytest.approx(2.0)
    assert len(host.opened) == 1, "its engine stays open"
    meter.close()
    assert host.closed == 1
    resumed = Speedometer(Journal(tmp_path / "journal.jsonl"), bundles)
    found = [resumed.read(*name) for name in (("one", "before"), ("one", "after"), ("two", "before"))]
    assert found == pytest.approx([1.0, 0.5, 2.0])
    assert host.read == 3, "what is on file is not read again"


def test_another_engine_is_read_where_one_does_not_run_and_none_where_none_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles = {"reference": tiny_bundle(tmp_path / "tiny")}
    host = Host("openvino").put_in(monkeypatch)
    meter = Speedometer(Journal(tmp_path / "journal.jsonl"), bundles)
    assert meter.read("one", "before") == 1.0
    host.batch_s = 0.004
    assert meter.read("one", "after") == pytest.approx(0.5)
    assert host.opened[-1] == "onnxruntime/f32"
    Host("openvino", "onnxruntime").put_in(monkeypatch)
    assert Speedometer(Journal(tmp_path / "other.jsonl"), bundles).read("one", "before") == 1.0
    assert Speedometer(Journal(tmp_path / "third.jsonl"), {}).read("one", "before") == 1.0


def test_a_profile_is_that_of_the_host_at_speed_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host, bundles = Host().put_in(monkeypatch), {"reference": tiny_bundle(tmp_path / "tiny")}
    times = EngineTimes(Journal(tmp_path / "journal.jsonl"), bundles, SLO.parse("p99<50ms"), 0.05, ())
    first, second = (
        Candidate("reference", "0", engine, "f32", Policy(streams=2)) for engine in ("openvino", "onnxruntime")
    )
    assert times.profile(first).seconds(1) == pytest.approx(0.002)
    host.batch_s = 0.008
    assert times.of(second).seconds == (0.008,)
    between = times.speed_of(second)
    assert 0.25 < between < 1, "read before and after"
    assert times.profile(second).seconds(1) == pytest.approx(0.008 * between)
    assert times.speed_beside(first, "search") == pytest.approx(1 / 3), "at most three times as slow"
    times.close()
