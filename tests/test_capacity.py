"""The capacity simulator: many scenarios in lock-step against one by one, known queues, and what a capacity may be."""

from __future__ import annotations

import dataclasses
import math
from itertools import product

import msgspec
import numpy as np
import pytest

from rushhour.capacity import (
    Overhead,
    Saturation,
    Scenario,
    ServiceProfile,
    Traffic,
    capacities,
    cascade_times,
    late_shares,
    predicted_capacity,
    simulate,
    steady_share,
)
from rushhour.engines.service import relative_quantiles
from rushhour.goal import SLO
from rushhour.measurement import ServiceTimes

P99 = SLO.parse("p99<50ms")


def profile(*seconds: float, factors: tuple[float, ...] = ()) -> ServiceProfile:
    """Of batches of 1, 2, 3 ..., all with the same variation."""
    sizes = tuple(range(1, len(seconds) + 1))
    quantiles = tuple(factors for _ in sizes) if factors else ()
    return ServiceProfile(
        ServiceTimes(sizes, seconds, tuple(n / s for n, s in zip(sizes, seconds, strict=True)), quantiles)
    )


NETWORK = profile(*(0.004 + 0.002 * n for n in range(1, 17)))
LARGE = profile(*(0.010 + 0.001 * n for n in range(1, 9)))


def test_many_scenarios_at_once_are_the_same_as_one_by_one() -> None:
    overhead, traffic = Overhead(request_s=0.0005, spare=0, slowdown=1.2), Traffic.poisson(1500, seed=3)
    cases = [
        (Scenario(of, streams, bound, overhead), load)
        for of, streams, bound, load in product((NETWORK, LARGE), (1, 2, 3), (1, 4, 8), (0.7, 0.95, 1.1))
    ]
    rates = np.array([load * scenario.highest_rps for scenario, load in cases])
    together = late_shares([scenario for scenario, _ in cases], rates, 0.05, traffic)
    for (scenario, _), rate, share in zip(cases, rates.tolist(), together.tolist(), strict=True):
        latencies = simulate(
            scenario.profile,
            streams=scenario.streams,
            max_batch=scenario.max_batch,
            rate_rps=rate,
            n=1500,
            seed=3,
            overhead=overhead,
        )
        assert share == pytest.approx(np.mean(latencies > 0.05), abs=1 / 1500)
    assert 0.1 < together.mean() < 0.9


def test_the_same_inputs_give_the_same_numbers_whatever_is_simulated_beside_them() -> None:
    varied = profile(0.004, 0.006, 0.007, 0.008, factors=(0.8, 0.9, 1.0, 1.1, 1.9))
    scenarios = [
        Scenario(of, streams, bound, Overhead(request_s))
        for of, streams, bound, request_s in product((varied, NETWORK), (1, 2), (1, 2, 4), (0.0, 1e-4))
    ]
    found = capacities(scenarios, P99, seed=5)
    assert (found == capacities(scenarios, P99, seed=5)).all()
    assert [capacities([each], P99, seed=5)[0] for each in scenarios[::5]] == found[::5].tolist()
    assert (capacities(scenarios[::-1], P99, seed=5) == found[::-1]).all()
    assert (capacities(scenarios, P99, seed=6) != found).any()


def test_an_exponential_server_has_its_known_tail() -> None:
    # M/M/1: P(latency > t) = exp(-(mu - lambda) t)
    points = (np.arange(500) + 0.5) / 500
    exponential = profile(0.01 * math.log(2), factors=tuple(-np.log(1 - points) / math.log(2)))
    assert exponential.throughput(1, 1) == pytest.approx(100, rel=0.01), "by the mean, not by the median"
    share = late_shares([Scenario(exponential, 1, 1)], np.array([60.0]), 0.05, Traffic.poisson(40_000, 1))
    assert share[0] == pytest.approx(math.exp(-40 * 0.05), rel=0.2)


def test_variation_costs_capacity() -> None:
    """Equal means, but some batches take four times as long."""
    steady = profile(0.010, 0.012)
    varied = profile(0.010, 0.012, factors=(*[0.8] * 15, 4.0))
    limit = SLO.parse("p90<60ms")
    one, other = (predicted_capacity(each, streams=1, max_batch=2, slo=limit) for each in (steady, varied))
    assert varied.throughput(1, 2) == pytest.approx(steady.throughput(1, 2))
    assert 0 < other < 0.9 * one


def test_no_capacity_is_above_the_rate_that_takes_all_cores() -> None:
    """Of 3,000 requests at 10,000 a second, few are late at 10% more than the server can answer: they end too soon."""
    sizes, seconds = (1, 2, 4, 8, 16, 24), (0.00035, 0.00044, 0.00056, 0.00096, 0.00184, 0.00269)
    fast = ServiceProfile(ServiceTimes(sizes, seconds, tuple(n / s for n, s in zip(sizes, seconds, strict=True))))
    overhead = Overhead(request_s=84e-6)
    most = 2 / (2 / fast.throughput(2, 24) + 84e-6)
    found = predicted_capacity(fast, streams=2, max_batch=24, slo=P99, overhead=overhead)
    assert 0.9 * most < found <= most * (1 + 1e-9)
    above = simulate(fast, streams=2, max_batch=24, rate_rps=1.06 * most, n=3000, seed=0, overhead=overhead)
    assert np.quantile(above, 0.99) < 0.05


def test_a_deadline_sheds_what_is_too_much_and_keeps_the_rest_in_time() -> None:
    scenario = Scenario(profile(0.005), 1, 1)
    rate, traffic = np.array([300.0]), Traffic.poisson(6000, 2)
    (without,) = late_shares([scenario], rate, 0.05, traffic)
    (shed,) = late_shares([dataclasses.replace(scenario, deadline_s=0.045)], rate, 0.05, traffic)
    assert without > 0.9
    assert shed == pytest.approx(1 / 3, abs=0.03)


def test_a_batch_waits_for_more_requests_only_where_the_streams_are_idle() -> None:
    of = profile(*[0.001 + 0.0001 * n for n in range(1, 9)])
    at_once, waiting = Scenario(of, 1, 8), Scenario(of, 1, 8, wait_s=0.010, wait_for=4)
    traffic = Traffic.poisson(2000, 4)

    def late(rate: float) -> list[float]:
        found: list[float] = late_shares([at_once, waiting], np.array([rate, rate]), 0.006, traffic).tolist()
        return found

    assert late(50.0) == [0.0, 0.0], "no other is expected in time"
    soon, later = late(400.0)
    assert soon < 0.01
    assert 0.1 < later < 0.8
    soon, later = late(2500.0)
    assert soon == later


def test_traffic_comes_at_the_rate_that_is_asked_for() -> None:
    recorded = Traffic.recorded([100.0, 101.0, 101.5, 104.0])
    times = recorded.times(recorded.units, np.array(2.0))
    assert np.diff(times) == pytest.approx(np.array([1.0, 0.5, 2.5]) * 3 / 4 / 2)
    bursty = Traffic.bursty(60_000, 1, intensity=5.0, share=0.1, burst_s=0.5)
    times = bursty.times(bursty.units, np.array(400.0))
    assert np.all(np.diff(times) >= 0)
    assert len(times) / times[-1] == pytest.approx(400, rel=0.25)
    assert bursty.passed(times, np.array(400.0)) == pytest.approx(bursty.units)
    counts = np.histogram(times, bins=np.arange(0, times[-1], 0.2))[0]
    assert counts.var() / counts.mean() > 5, "1 for independent users"
    calm = capacities([Scenario(NETWORK, 2, 16)], P99, Traffic.poisson(6000))
    burst = capacities([Scenario(NETWORK, 2, 16)], P99, Traffic.bursty(6000, intensity=5.0, share=0.1, burst_s=0.5))
    assert burst[0] < 0.6 * calm[0]


def test_a_host_that_is_slow_now_and_then_holds_less() -> None:
    assert steady_share([1.0] * 40, 0.01) == 1.0
    assert steady_share([0.5] * 3, 0.01, together=3) == 1.0, "too few to tell"
    slow_tenth = [1.0] * 90 + [0.5] * 10  # 0.1 (1 - 0.5 / share) = 0.01
    assert steady_share(slow_tenth, 0.01) == pytest.approx(0.5 / 0.9, abs=0.01)
    assert steady_share(slow_tenth, 0.1) == 1.0
    apart = ([1.0] * 9 + [0.5]) * 10
    assert steady_share(apart, 0.01, together=10) > 0.9, "a short one is averaged out"


def test_two_engines_show_what_requests_cost_and_by_how_much_batches_are_slower() -> None:
    request_s, slowdown = 80e-6, 1.3

    def seen(engine_s: float) -> Saturation:
        return Saturation(engine_s, slowdown * engine_s + request_s)

    found = Overhead.explaining([seen(100e-6), seen(600e-6)], spare=0)
    assert (found.request_s, found.slowdown) == (pytest.approx(request_s), pytest.approx(slowdown))
    alike = Overhead.explaining([seen(100e-6), seen(120e-6)], spare=0)
    assert (alike.request_s, alike.slowdown) == (pytest.approx(110e-6), 1.0)
    other = Overhead.explaining([seen(100e-6)], spare=0, slowdown=slowdown)
    assert (other.request_s, other.slowdown) == (pytest.approx(request_s), slowdown)
    free = Overhead.explaining([Saturation(100e-6, 90e-6)], spare=0, slowdown=slowdown)
    assert (free.request_s, free.slowdown) == (0.0, 1.0)
    slow = Scenario(profile(0.001), 1, 1, Overhead(0.0005, slowdown=1.5))
    assert slow.highest_rps == pytest.approx(1 / (1.5 * 0.001 + 0.0005))
    assert slow.overhead.stretch(500.0, 1) == pytest.approx(1.5 / 0.75)


def test_how_times_vary_is_kept_and_older_files_still_open() -> None:
    assert relative_quantiles([1.0] * 15) == ()
    row = relative_quantiles([0.001 * (1 + at / 100) for at in range(101)])
    assert len(row) == 16
    assert (row[0], row[-1]) == (pytest.approx(1.03125 / 1.5, abs=1e-3), pytest.approx(1.96875 / 1.5, abs=1e-3))
    times = ServiceTimes((1, 2, 4), (0.01, 0.012, 0.016), (100.0, 166.0, 250.0), (row, (), row))
    assert msgspec.json.decode(msgspec.json.encode(times), type=ServiceTimes) == times
    older = {"kind": "service_times", "batch_sizes": [1], "seconds": [0.01], "throughput": [100.0]}
    assert msgspec.convert(older, ServiceTimes).quantiles == ()
    with pytest.raises(ValueError, match="quantiles"):
        ServiceTimes((1, 2), (0.01, 0.012), (100.0, 166.0), (row,))
    table = ServiceProfile(times).table(4)
    assert table.shape == (5, 16)
    assert table[2] == pytest.approx(0.012 * np.array(row)), "between neighbours that were measured"


def test_the_times_of_a_cascade_lie_between_those_of_its_engines() -> None:
    small = ServiceTimes((1, 2, 4), (1e-3, 1.5e-3, 2.5e-3), (2000.0, 2667.0, 3200.0))
    large = ServiceTimes((1, 2, 4), (4e-3, 7e-3, 13e-3), (500.0, 571.0, 615.0))
    none, all_, some = (cascade_times(small, large, share) for share in (0.0, 1.0, 0.25))
    assert none.seconds == pytest.approx(small.seconds)
    assert all_.seconds == pytest.approx([a + b for a, b in zip(small.seconds, large.seconds, strict=True)])
    assert some.seconds[0] == pytest.approx(1e-3 + 0.25 * 4e-3)
    two = 1.5e-3 + 2 * 0.25 * 0.75 * 4e-3 + 0.25**2 * 7e-3
    assert some.seconds[1] == pytest.approx(two)
    assert some.throughput[0] == pytest.approx(2 / some.seconds[0]), "on as many streams as the small one was timed on"
