"""Speed of artefacts side by side."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from rushhour.bundle import Bundle
from rushhour.compress.speed import Ratio, bench_artefacts, compare_speed, reason
from rushhour.engines import Engine, EngineConfig
from rushhour.errors import GoalError
from rushhour.testing.bundles import tiny_bundle
from rushhour.testing.fakes import FakeEngine, on_a_timer

PARENT, SLOW = EngineConfig("onnxruntime", max_batch=4), EngineConfig("openvino", max_batch=4)


def test_a_ratio_is_the_geometric_mean_with_students_interval() -> None:
    ratio = Ratio.of([2.0, 8.0], [1.0, 1.0])
    assert ratio.value == pytest.approx(4.0)
    # mean log 4, standard error log 2, and t(0.975, 1) = 12.706
    assert math.log(ratio.high / ratio.value) == pytest.approx(12.7062 * math.log(2), rel=1e-4)
    assert ratio.low * ratio.high == pytest.approx(16.0)
    assert ratio.n == 2


def test_what_disturbs_a_whole_block_cancels() -> None:
    ratio = Ratio.of([30.0, 3.0, 300.0], [20.0, 2.0, 200.0])
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1.5, 1.5, 1.5))


def test_artefacts_take_turns_forwards_and_backwards_each_at_its_best_batch(tiny: Bundle) -> None:
    opened: list[FakeEngine] = []
    order: list[str] = []

    def fake(bundle: Bundle, config: EngineConfig) -> Engine:
        def takes(rows: int) -> float:
            if len(opened) == 4:
                order.append(config.engine)
            # The parent gains by batches of 4 only; the child takes four times as long and its batches gain nothing.
            # Factors of four, because a busy machine adds milliseconds to each.
            if config.engine == "onnxruntime":
                return 0.005 * (1 if rows == 4 else rows)
            return 0.02 * rows**2

        opened.append(FakeEngine(config, service_s=takes, schedule=on_a_timer))
        return opened[-1]

    speed = bench_artefacts((tiny, PARENT), {"slow": (tiny, SLOW)}, blocks=2, seconds=0.01, opened=fake)["slow"]
    assert (speed.parent_batch, speed.batch) == (4, 1)
    assert speed.throughput.n == 2
    assert speed.throughput.low <= speed.throughput.value <= speed.throughput.high
    assert speed.throughput.value == pytest.approx(speed.samples_per_s / speed.parent_samples_per_s, rel=0.5)
    assert speed.throughput.value < 1 < speed.latency.value
    assert all(engine.closed for engine in opened)
    measured = opened[-2:]
    assert [engine.config.max_batch for engine in measured] == [4, 1]
    turns = [engine for at, engine in enumerate(order) if at == 0 or order[at - 1] != engine]
    assert turns == ["onnxruntime", "openvino", "onnxruntime"]
    assert {4, 1} == set(measured[0].batches), "throughput at the best batch, latency of one sample"


def test_real_engines_are_compared(tiny: Bundle) -> None:
    ratio = compare_speed((tiny, SLOW), (tiny, PARENT), blocks=2, seconds=0.01)
    assert ratio.n == 2
    assert 0 < ratio.low <= ratio.value <= ratio.high


def test_one_block_has_no_interval(tiny: Bundle) -> None:
    with pytest.raises(GoalError, match="in 1 blocks"):
        compare_speed((tiny, PARENT), (tiny, SLOW), blocks=1)


def test_the_reason_names_where_the_time_goes(tiny: Bundle, tmp_path: Path) -> None:
    int8 = tiny_bundle(tmp_path / "int8", precision="int8")
    said = reason((tiny, SLOW), (int8, EngineConfig("openvino", "int8", max_batch=4)))
    assert said.startswith("one batch of 4 spends ")
    assert "ms in FullyConnected" in said
    assert reason((tiny, PARENT), (tiny, PARENT)).startswith("by the layers of openvino")
