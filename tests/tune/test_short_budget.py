"""A search with little time, on an injected clock: each step asks what is left, and the most promising comes first."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_tune import CAPACITY, Load, answering, searched

from rushhour.bundle import Bundle
from rushhour.clock import VirtualClock
from rushhour.engines import Engine, EngineConfig
from rushhour.goal import SLO
from rushhour.measurement import ClosedLoop, Measurement, ServiceTimes
from rushhour.plan import Plan, Precision
from rushhour.tune import TuneSettings
from rushhour.tune.settings import Budget
from rushhour.tune.space import Candidate

ROLES: dict[str, Precision] = {"reference": "f32", "int8": "int8", "other": "int8", "more": "f32"}


class Slow(Load):
    """Load on a slow host: engines, accuracies and servers take their time.

    Args:
        engine_s: to time an engine; accuracies of a part take twice as long.
        server_s: to start a server.
        missed: predicted capacities are too low by this factor for candidates with two threads, until one is loaded.
    """

    def __init__(self, engine_s: float = 4.0, server_s: float = 3.0) -> None:
        super().__init__()
        self._engine_s, self._server_s = engine_s, server_s
        self.loaded: list[str] = []
        self.engines: list[str] = []

    def timed(self, engine: Engine, bundle: Bundle, *_: float) -> ServiceTimes:
        if engine.config.max_batch > 1:  # not the speedometer
            self.clock.advance(self._engine_s)
            self.engines.append(f"{bundle.manifest.name}/{engine.config.engine}/s{engine.config.streams}")
        return super().timed(engine, bundle, 0.0, 0.0)

    def outputs(self, bundle: Bundle, config: EngineConfig, *rest: Any, **more: Any) -> Any:
        self.clock.advance(2 * self._engine_s)
        return answering({})(bundle, config, *rest, **more)

    @contextlib.contextmanager
    def served(self, candidate: Candidate, *rest: Any) -> Iterator[tuple[str, int]]:
        self.clock.advance(self._server_s)
        with super().served(candidate, *rest) as found:
            yield found

    def measure(self, _: object, candidate: str, __: object, slo: SLO, **asked: Any) -> Measurement:
        self.loaded.append(candidate)
        self.clock.advance(asked.get("window_s", 1.0))
        return super().measure(_, candidate, __, slo, **asked)

    def closed_window(self, _: object, candidate: str, __: object, **asked: Any) -> ClosedLoop:
        self.loaded.append(candidate)
        return super().closed_window(_, candidate, __, **asked)


def short(run: Path, load: Slow, monkeypatch: pytest.MonkeyPatch, budget_s: float) -> Plan:
    sizes = {"int8": 10, "other": 12, "more": 20, "reference": 40}
    monkeypatch.setattr(sys.modules["rushhour.tune.search"]._Search, "_size", lambda _, role: sizes[role])
    settings = TuneSettings(budget_s=budget_s)
    return searched(run, load, monkeypatch, roles=ROLES, settings=settings, outputs=load.outputs)


@pytest.mark.parametrize(("budget_s", "most"), [(40.0, 1.9), (120.0, 1.15), (900.0, 1.05)])
def test_a_search_ends_in_time_and_loads_first_what_is_predicted_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget_s: float, most: float
) -> None:
    """Engines, accuracies and the baseline took half of the time, and what was predicted best was not loaded."""
    load = Slow()
    plan = short(tmp_path, load, monkeypatch, budget_s)
    assert load.clock.now() <= most * budget_s
    assert load.loaded[0].startswith(("int8@", "other@")), "small models are timed first"
    assert "/openvino/" in load.loaded[0]
    assert plan.feasible
    assert plan.variants[0].engine == "openvino"
    assert plan.variants[0].precision == "int8"
    assert plan.evidence is not None
    assert plan.evidence.capacity_rps > 0.75 * CAPACITY["int8/openvino"]
    assert plan.evidence.baseline_capacity_rps > 0, "it is always measured"
    skipped = [trial for trial in plan.evidence.trials if trial.fate == "skipped"]
    assert any("no time" in trial.why for trial in skipped) == (budget_s < 900)
    assert all("no time" in trial.why or "time was up" in trial.why for trial in skipped)
    certificate = plan.evidence.certificate
    assert certificate is not None
    assert sum(cut.plans for cut in certificate.cuts) + 1 == certificate.plans
    if budget_s < 100:
        assert any("no time was left" in words for words in certificate.not_covered)


def test_each_step_before_the_load_takes_its_share_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget_s, load = 200.0, Slow(engine_s=6.0)
    seen: dict[str, float] = {}
    real = load.outputs

    def outputs(*given: Any, **more: Any) -> Any:
        seen.setdefault("timed", load.clock.now())
        return real(*given, **more)

    load.outputs = outputs  # type: ignore[method-assign]
    short(tmp_path, load, monkeypatch, budget_s)
    assert seen["timed"] <= Budget.FOR_TIMING * budget_s + 6.0
    assert len(load.engines) >= 5
    assert load.engines[0].endswith("openvino/s2"), "a batch for each core, on the engine that is fastest as a rule"
    assert any(name.startswith("tiny/") for name in load.engines[:2]), "the reference is the second"


class Late(Slow):
    """Load that shows late that the candidate that was timed as the best is not: two threads carry a third."""

    def measure(self, _: object, candidate: str, __: object, slo: SLO, **asked: Any) -> Measurement:
        rate = asked.pop("rate_rps")
        found = super().measure(_, candidate, __, slo, rate_rps=rate * self._less(candidate), **asked)
        return found if self._less(candidate) == 1 else _at(found, rate)

    def closed_window(self, _: object, candidate: str, __: object, **asked: Any) -> ClosedLoop:
        found = super().closed_window(_, candidate, __, **asked)
        rate = found.throughput_rps / self._less(candidate)
        return ClosedLoop(found.concurrency, rate, found.concurrency / rate)

    def timed(self, engine: Engine, bundle: Bundle, *_: float) -> ServiceTimes:
        found = super().timed(engine, bundle, *_)
        factor = 0.8 if engine.config.threads > 1 else 1.0
        seconds = tuple(batch_s * factor for batch_s in found.seconds)
        return ServiceTimes(found.batch_sizes, seconds, tuple(rate / factor for rate in found.throughput))

    def _less(self, candidate: str) -> float:
        return 3.0 if "t2b" in candidate and not candidate.endswith("b1") else 1.0


def _at(window: Measurement, rate_rps: float) -> Measurement:
    import msgspec

    return msgspec.structs.replace(window, rate_rps=rate_rps)


def test_what_is_predicted_far_better_is_loaded_even_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It shipped 2,665/s while 9,729/s were predicted of another: the time was up before its race."""
    load = Late(engine_s=1.0, server_s=20.0)
    plan = short(tmp_path, load, monkeypatch, 150.0)
    assert "t2b" in load.loaded[0]
    assert (plan.policy.threads, plan.variants[0].precision) == (1, "int8")
    assert plan.evidence is not None
    assert plan.evidence.capacity_rps > 0.7 * CAPACITY["int8/openvino"]


def test_an_allowance_is_a_share_of_the_whole_from_now_on() -> None:
    clock = VirtualClock()
    budget = Budget(100.0, clock)
    clock.advance(30.0)
    step = budget.allow(0.2)
    assert not step.is_spent
    clock.advance(19.0)
    assert not step.is_spent
    clock.advance(1.5)
    assert step.is_spent
    clock.advance(45.0)
    assert not budget.allow(0.2).is_spent
    clock.advance(5.0)
    assert budget.allow(0.2).is_spent, "nothing is left"
    assert budget.seconds_left < 0
    assert not Budget(None, clock).allow(0.01).is_spent
