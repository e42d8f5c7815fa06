"""Load: verdicts on tables and simulated queues, the client on servers that misbehave, the search replayed."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from conftest import Server
from rushhour.bundle import Bundle
from rushhour.capacity import ServiceProfile, simulate
from rushhour.errors import LoadError
from rushhour.goal import SLO
from rushhour.load import (
    ClosedJob,
    ClosedLoop,
    Generator,
    Interface,
    InterimAnalysis,
    OpenJob,
    Samples,
    Search,
    Status,
    Target,
    discover,
    find_capacity,
    interim_sizes,
    judge,
    measure,
    needed_n,
    null_throughput,
    payloads,
    percentile_ranks,
    poisson,
    ramp_concurrency,
    search_capacity,
    variance_inflation,
    window_n,
)
from rushhour.load.generator.job import pack, unpack
from rushhour.load.generator.samples import joined
from rushhour.load.significance import passes
from rushhour.measurement import Measurement, Outcome, ServiceTimes
from rushhour.testing.fakes import SIGNATURE
from rushhour.testing.host_speed import TwoState
from rushhour.testing.queues import (
    Arrivals,
    Batching,
    BurstyArrivals,
    Deterministic,
    Exponential,
    OnVaryingHost,
    Queue,
    VirtualGenerator,
    poisson_arrivals,
    samples_of,
    true_percentile,
    verdicts,
)
from rushhour.wire import Codec
from servers import behaving

P99 = SLO.parse("p99<50ms")
GENEROUS = SLO.parse("p99<2s")


# -- arrivals


def test_a_schedule_is_made_by_its_seed_alone() -> None:
    schedule = poisson(100, n=20_000, seed=7)
    assert np.array_equal(schedule, poisson(100, n=20_000, seed=7))
    assert not np.array_equal(schedule, poisson(100, n=20_000, seed=8))
    assert np.array_equal(schedule[:500], poisson(100, n=500, seed=7))
    gaps = np.diff(schedule)
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(0.01, rel=0.05)
    assert gaps.std() == pytest.approx(0.01, rel=0.05)


def test_a_schedule_by_duration_fills_it() -> None:
    schedule = poisson(200, duration_s=5, seed=1)
    assert schedule[-1] <= 5
    assert len(schedule) == pytest.approx(1000, rel=0.15)


@pytest.mark.parametrize(
    "arguments", [{"rate_rps": 0, "n": 5}, {"rate_rps": 5, "n": 0}, {"rate_rps": 5, "duration_s": -1}]
)
def test_a_schedule_of_nothing_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(LoadError, match=r"above zero|at least one"):
        poisson(seed=0, **arguments)


# -- the verdict's tables (shared with MLPerf)


@pytest.mark.parametrize(
    ("misses", "n"), [(0, 299), (1, 473), (2, 628), (3, 773), (5, 1049), (10, 1693), (20, 2902), (50, 6323)]
)
def test_fewest_requests_for_a_proof_at_p99(misses: int, n: int) -> None:
    assert needed_n(P99, misses) == n
    assert passes(n, misses, 0.01)
    assert not passes(n - 1, misses, 0.01)
    assert not passes(n, misses + 1, 0.01)


@pytest.mark.parametrize(("slo", "n"), [("p50<1ms", 5), ("p95<1ms", 59), ("p99.9<1ms", 2995)])
def test_fewest_requests_at_other_percentiles(slo: str, n: int) -> None:
    assert needed_n(SLO.parse(slo)) == n


@pytest.mark.parametrize(("n", "ranks"), [(1000, (983, 997)), (2000, (1971, 1989)), (5000, (4936, 4964))])
def test_ranks_that_bound_the_p99(n: int, ranks: tuple[int, int]) -> None:
    assert percentile_ranks(n, 99) == ranks
    low, high = percentile_ranks(n, 99, inflation=4)
    assert low < ranks[0]
    assert high > ranks[1]


def test_ranks_stay_within_the_sample() -> None:
    assert percentile_ranks(299, 99)[1] == 299
    assert percentile_ranks(10, 50, inflation=100) == (1, 10)


def test_independent_misses_are_hardly_inflated_and_bursts_are() -> None:
    random = np.random.default_rng(0)
    independent = [variance_inflation(random.random(2000) < 0.01) for _ in range(200)]
    assert 1.0 <= np.mean(independent) < 1.3
    burst = np.zeros(2000, dtype=bool)
    burst[500:520] = True  # all in one of 20 blocks of 100: 100 * var / (q (1 - q)), with q = .01 and var = .2^2 / 20
    assert variance_inflation(burst) == pytest.approx(100 * 0.2**2 / 20 / (0.01 * 0.99))
    assert variance_inflation(np.zeros(2000, dtype=bool)) == 1.0
    assert variance_inflation(np.ones(7, dtype=bool)) == 1.0


# -- the verdict


def samples(latencies: NDArray[np.float64], *, rate: float = 500.0, warmup: int = 0, **facts: Any) -> Samples:
    """A run as it would be with these latencies, infinite ones being lost."""
    scheduled = poisson(rate, n=len(latencies), seed=1)
    lost = ~np.isfinite(latencies)
    return Samples(
        scheduled=scheduled,
        taken=scheduled + 1e-5,
        sent=scheduled + 2e-5,
        done=np.where(lost, np.nan, scheduled + latencies),
        status=np.where(lost, Status.LOST, Status.OK).astype(np.uint8),
        warmup=warmup,
        **facts,
    )


def verdict(run: Samples, slo: SLO = P99, rate: float = 500.0) -> Measurement:
    return judge(run, slo, rate_rps=rate, seed=1)


def quick(n: int = 2000, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).uniform(0.005, 0.02, n)


def test_quick_answers_pass_with_their_figures() -> None:
    measurement = verdict(samples(quick(2200), warmup=200))
    assert measurement.outcome is Outcome.PASS, measurement.reason
    assert (measurement.n, measurement.late, measurement.errors, measurement.shed) == (2000, 0, 0, 0)
    assert measurement.p50_ms == pytest.approx(12.5, rel=0.05)
    assert measurement.p99_ms is not None
    assert measurement.p99_interval_ms is not None
    low, high = measurement.p99_interval_ms
    assert low <= measurement.p99_ms <= high <= 20
    assert measurement.goodput_rps == pytest.approx(500, rel=0.1)
    assert measurement.duration_s == pytest.approx(4, rel=0.1)


def test_the_warm_up_is_not_judged() -> None:
    latencies = np.concatenate([np.full(200, 0.4), quick()])
    assert verdict(samples(latencies)).outcome is not Outcome.PASS
    assert verdict(samples(latencies, warmup=200)).outcome is Outcome.PASS


@pytest.mark.parametrize("slo", ["p10<50ms", "p30<50ms", "p50<50ms", "p99.9<50ms"])
def test_any_percentile_can_be_judged(slo: str) -> None:
    """Below p50 the tail near its end would have been more than all requests."""
    assert verdict(samples(quick(4000)), SLO.parse(slo)).outcome is Outcome.PASS


def test_too_many_misses_fail_and_too_few_to_tell_are_inconclusive() -> None:
    latencies = quick()
    latencies[::60] = 0.08
    measurement = verdict(samples(latencies))
    assert measurement.outcome is Outcome.FAIL
    assert measurement.late == 34
    latencies = quick()
    latencies[::110] = 0.08
    measurement = verdict(samples(latencies))
    assert measurement.outcome is Outcome.INCONCLUSIVE
    assert "19 of 2,000 late" in measurement.reason


def test_what_is_alike_in_all_blocks_comes_in_no_waves() -> None:
    """Rounding made a correlation of what has no variance: 40 late of 2000 then proved nothing."""
    latencies = quick()
    latencies[::50] = 0.08
    assert verdict(samples(latencies)).outcome is Outcome.FAIL


def test_an_undecided_window_says_how_much_longer_it_would_take() -> None:
    """Slow ones in waves: too few for a proof either way, and a longer window of the same kind would give one."""
    random = np.random.default_rng(3)
    waves = np.repeat([0.6, 1.3, 0.7, 1.4, 0.6, 0.7, 1.3, 0.6], 500)
    latencies = random.exponential(0.009, 4000) * waves
    measurement = verdict(samples(latencies))
    assert measurement.outcome is Outcome.INCONCLUSIVE, measurement.reason
    assert measurement.needs_s is not None
    assert "effective sample size" in measurement.reason
    assert "more at this rate would decide" in measurement.reason
    assert sum(measurement.blocks) == measurement.late
    assert len(measurement.blocks) == 20


def test_below_299_requests_there_is_no_p99() -> None:
    measurement = verdict(samples(quick(298)))
    assert measurement.outcome is Outcome.INCONCLUSIVE
    assert measurement.p99_ms is None
    assert measurement.p99_interval_ms is None
    assert "insufficient samples" in measurement.reason


def test_other_percentiles_are_judged_by_their_own_numbers() -> None:
    latencies = quick(400)
    latencies[::40] = 0.08  # 2.5% late
    assert verdict(samples(latencies), SLO.parse("p95<50ms")).outcome is Outcome.PASS
    assert verdict(samples(latencies), SLO.parse("p99<50ms")).outcome is Outcome.FAIL
    assert "insufficient" in verdict(samples(latencies), SLO.parse("p99.9<50ms")).reason


def test_lost_and_shed_requests_are_late_and_infinitely_so() -> None:
    latencies = quick()
    latencies[::50] = np.inf
    run = samples(latencies, first_error="no answer within 5 s")
    measurement = verdict(run)
    assert measurement.outcome is not Outcome.PASS
    assert measurement.errors == measurement.late == 40
    assert "no answer within 5 s" in measurement.reason
    assert measurement.p99_ms is None
    shed = dataclasses.replace(run, status=np.where(run.status == Status.LOST, Status.SHED, run.status))
    assert verdict(shed).shed == 40


def test_an_interval_that_reaches_into_the_unanswered_ends_at_the_time_out() -> None:
    latencies = quick(1000)
    latencies[::125] = np.inf  # 8 of 1000; rank 997 is among them, rank 990 is not
    measurement = verdict(samples(latencies, timeout_s=5.0))
    assert measurement.p99_ms is not None
    assert measurement.p99_interval_ms is not None
    assert measurement.p99_interval_ms[1] == 5000


def test_a_server_that_falls_behind_is_unstable() -> None:
    behind = np.linspace(0.001, 0.4, 2000)
    measurement = verdict(samples(behind))
    assert measurement.outcome is Outcome.UNSTABLE
    assert measurement.p99_ms is None
    assert "fell behind" in measurement.reason


def test_a_queue_that_still_grows_is_seen_before_the_limit_is() -> None:
    growing = np.linspace(0.001, 0.045, 2000)
    measurement = verdict(samples(growing))
    assert measurement.late == 0
    assert measurement.outcome is Outcome.UNSTABLE
    assert "in flight" in measurement.reason


def test_halves_that_differ_are_not_a_steady_state() -> None:
    latencies = quick(4000)
    latencies[2000::80] = 0.06
    measurement = verdict(samples(latencies))
    assert measurement.outcome is Outcome.INCONCLUSIVE
    assert "first half" in measurement.reason


DOUBTS: list[tuple[dict[str, Any], Outcome]] = [
    ({"canary_p99_s": 0.0051}, Outcome.VOID),
    ({"steal": 0.06}, Outcome.VOID),
    ({"generator_cpu": 0.71}, Outcome.GENERATOR_LIMITED),
    ({"starved": 1, "connections": 2048}, Outcome.GENERATOR_LIMITED),
    ({"canary_p99_s": 0.0051, "generator_cpu": 0.71}, Outcome.GENERATOR_LIMITED),
]


@pytest.mark.parametrize(("facts", "outcome"), DOUBTS)
def test_a_doubt_takes_a_pass_away_and_leaves_instability(facts: dict[str, Any], outcome: Outcome) -> None:
    assert verdict(samples(quick(), **facts)).outcome is outcome
    assert verdict(samples(np.linspace(0.001, 0.4, 2000), **facts)).outcome is Outcome.UNSTABLE


def test_a_generator_that_is_late_takes_a_pass_away() -> None:
    run = samples(quick())
    late = dataclasses.replace(run, sent=run.sent + 0.0026, taken=run.taken + 0.0026)
    assert verdict(late).outcome is Outcome.GENERATOR_LIMITED


def test_a_fail_that_the_disturbance_explains_is_void() -> None:
    latencies = quick()
    latencies[::50] = 0.06
    assert verdict(samples(latencies)).outcome is Outcome.FAIL
    assert verdict(samples(latencies, canary_p99_s=0.02)).outcome is Outcome.VOID
    latencies[::50] = 0.09
    assert verdict(samples(latencies, canary_p99_s=0.02)).outcome is Outcome.FAIL


@settings(deadline=None)
@given(
    misses=st.integers(0, 60),
    canary=st.floats(0, 0.1),
    cpu=st.floats(0, 1.0),
    starved=st.integers(0, 2),
    delay=st.floats(0, 0.01),
)
def test_no_disturbance_ever_makes_a_pass(misses: int, canary: float, cpu: float, starved: int, delay: float) -> None:
    latencies = quick(1000)
    latencies[np.linspace(0, 999, misses).astype(int)] = 0.055
    calm = samples(latencies)
    disturbed = dataclasses.replace(
        calm, canary_p99_s=canary, generator_cpu=cpu, starved=starved, sent=calm.sent + delay, taken=calm.taken + delay
    )
    if verdict(disturbed).outcome is Outcome.PASS:
        assert verdict(calm).outcome is Outcome.PASS


# -- the verdict on queues whose latencies are known


QUEUES = [
    pytest.param(Deterministic(0.002), poisson_arrivals, 454.0, id="M/D/1"),
    pytest.param(Exponential(4, 0.008), poisson_arrivals, 430.0, id="M/M/4", marks=pytest.mark.slow),
    pytest.param(Batching(0.001, 0.0005, 32), poisson_arrivals, 1810.0, id="batches of 32", marks=pytest.mark.slow),
    pytest.param(Deterministic(0.002), BurstyArrivals(), 400.0, id="bursts"),
]


def share_of_passes(
    queue: Queue, arrivals: Arrivals, slo: SLO, rate: float, runs: int, sizes: tuple[float, ...] = (7.5, 15, 30, 60)
) -> float:
    looks = [round(rate * seconds) for seconds in sizes]
    found = verdicts(queue, arrivals, slo, rate, looks, runs=runs, seed=11)
    return sum(outcome is Outcome.PASS for outcome, _ in found) / runs


@pytest.mark.parametrize(("queue", "arrivals", "rate"), QUEUES)
def test_a_queue_at_its_limit_hardly_ever_passes_and_one_inside_it_mostly_does(
    queue: Queue, arrivals: Arrivals, rate: float
) -> None:
    """Loose bounds for few runs; `benchmarks/load.py` has the tight ones. Luck: 5% of 300 are over 9% once in 1,000."""
    slo = SLO(percentile=99, limit_s=true_percentile(queue, arrivals, rate, n=2_000_000))
    assert share_of_passes(queue, arrivals, slo, rate, 150) <= 0.09
    assert share_of_passes(queue, arrivals, slo, 1.1 * rate, 50) <= 0.04
    assert share_of_passes(queue, arrivals, slo, 0.9 * rate, 50) >= 0.8


def test_one_look_at_a_fixed_n_is_as_careful() -> None:
    queue, rate = Deterministic(0.002), 454.0
    slo = SLO(percentile=99, limit_s=true_percentile(queue, poisson_arrivals, rate, n=2_000_000))
    assert share_of_passes(queue, poisson_arrivals, slo, rate, 300, (20,)) <= 0.09
    assert share_of_passes(queue, poisson_arrivals, slo, 0.9 * rate, 50, (40,)) >= 0.8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("queue", "rate"),
    [
        pytest.param(Deterministic(0.002, within_s=0.05), 486.5, id="all that is late is turned away"),
        pytest.param(Exponential(4, 0.008, within_s=0.045), 424.0, id="most of it", marks=pytest.mark.slow),
    ],
)
def test_a_server_that_turns_away_can_be_proven_inside_its_limit(queue: Queue, rate: float) -> None:
    """It was not: one request turned away in a minute was an infinite latency, and no tail with it a proof."""
    slo = SLO(percentile=99, limit_s=true_percentile(queue, poisson_arrivals, rate, n=4_000_000))
    assert share_of_passes(queue, poisson_arrivals, slo, rate, 150) <= 0.09
    assert share_of_passes(queue, poisson_arrivals, slo, 1.1 * rate, 50) <= 0.04
    assert share_of_passes(queue, poisson_arrivals, slo, 0.9 * rate, 50) >= 0.8


def test_a_host_of_two_speeds_is_not_believed_in_its_fast_seconds() -> None:
    """It was: a seventh of the windows passed at the limit, most of them in their first seconds."""
    queue, rate = OnVaryingHost(Deterministic(0.002), TwoState()), 310.0
    slo = SLO(percentile=99, limit_s=true_percentile(queue, poisson_arrivals, rate, n=4_000_000))
    assert share_of_passes(queue, poisson_arrivals, slo, rate, 100) <= 0.09
    assert share_of_passes(queue, poisson_arrivals, slo, 0.8 * rate, 50) >= 0.8


def test_a_host_that_becomes_slower_is_no_server_that_falls_behind() -> None:
    """It was: a tenth of the windows of these two streams was unstable, 30% below their capacity."""
    queue, rate = OnVaryingHost(Batching(0.005, 0.001, 16, 2), TwoState()), 0.8 * 940.0
    slo = SLO(percentile=99, limit_s=0.0516)
    found = verdicts(queue, poisson_arrivals, slo, rate, [round(rate * s) for s in (7.5, 15)], runs=60, seed=11)
    assert not any(outcome.refutes for outcome, _ in found)


def test_a_window_that_grows_does_not_pass_in_its_first_seconds() -> None:
    early = verdict_at(quick(4000), InterimAnalysis(0.25))
    assert (early.outcome, early.decided) == (Outcome.INCONCLUSIVE, False)
    assert verdict_at(quick(4000), InterimAnalysis()).outcome is Outcome.PASS


def test_a_step_in_the_queue_is_no_slope() -> None:
    """The same two levels of latency, far inside the limit: a host that became slower, and a queue that grows."""
    step, slope = np.full(4000, 0.002), np.linspace(0.002, 0.03, 4000)
    step[1800:] = 0.03
    assert verdict(samples(step)).outcome is Outcome.PASS
    assert verdict(samples(slope)).outcome is Outcome.UNSTABLE


def test_what_is_turned_away_is_what_would_take_too_long() -> None:
    random = np.random.default_rng(6)
    arrivals = poisson_arrivals(480.0, 20_000, 4, random)
    within = Deterministic(0.002, within_s=0.02).latencies(arrivals, random)
    turned_away = np.isinf(within)
    assert 0 < turned_away.mean() < 0.1
    assert within[~turned_away].max() <= 0.02
    alone = within[:, :1][~turned_away[:, :1]]
    again = Deterministic(0.002).latencies(arrivals[:, :1][~turned_away[:, :1]][:, None], random)[:, 0]
    assert np.allclose(alone, again)  # to those that stay it is as if the others had not come


def test_errors_in_between_leave_no_tail_to_prove_anything() -> None:
    """The same window, the same count of misses: turned away they may be counted by their own waves, failed not."""
    random = np.random.default_rng(2)
    arrivals = poisson_arrivals(440.0, 26_400, 40, random)
    latencies = Deterministic(0.002, within_s=0.05).latencies(arrivals, random)
    away = [samples_of(due, run) for due, run in zip(arrivals.T, latencies.T, strict=True) if np.isinf(run).any()]
    assert len(away) >= 10
    failed = [
        dataclasses.replace(one, status=np.where(one.status == Status.OK, one.status, Status.ERROR).astype(np.uint8))
        for one in away
    ]
    passed = [sum(judge(one, P99, rate_rps=440, seed=1).outcome is Outcome.PASS for one in of) for of in (away, failed)]
    assert passed[0] > len(away) / 3
    assert passed[1] < passed[0] / 2


def test_misses_alone_would_pass_a_queue_at_its_limit() -> None:
    """Why more than the count of misses is asked: the bad waves are often not there to be counted."""
    queue, rate = Deterministic(0.002), 454.0
    limit = true_percentile(queue, poisson_arrivals, rate, n=2_000_000)
    random = np.random.default_rng(5)
    late = limit < queue.latencies(poisson_arrivals(rate, 5400, 100, random), random)[900:].T
    plain = [passes(len(run) / (w := variance_inflation(run)), run.sum() / w, 0.01) for run in late]
    assert np.mean(plain) > 0.4


def test_simulated_queues_are_what_they_are_said_to_be() -> None:
    random = np.random.default_rng(3)
    arrivals = poisson_arrivals(100.0, 20_000, 40, random)
    # Means by Pollaczek and Khinchine at 60% load, and by Erlang's C for two servers at the same.
    alone = Deterministic(0.006).latencies(arrivals, random)[500:].mean()
    assert alone == pytest.approx(0.006 + 0.6 * 0.006 / (2 * 0.4), rel=0.02)
    pair = Exponential(2, 0.012).latencies(arrivals, random)[500:].mean()
    assert pair == pytest.approx(0.012 / (1 - 0.36), rel=0.03)
    single = Batching(0.0, 0.006, 1).latencies(arrivals, random)
    assert np.allclose(single, Deterministic(0.006).latencies(arrivals, random))
    profile = ServiceProfile(ServiceTimes((1, 8), (0.011, 0.018), (90.0, 444.0)))
    theirs = simulate(profile, streams=1, max_batch=8, rate_rps=300, n=5000, seed=4)
    due = np.cumsum(np.random.default_rng(4).exponential(1 / 300, 5000))[:, None]
    assert np.allclose(Batching(0.01, 0.001, 8).latencies(due, random)[:, 0], theirs)


def test_bursts_come_at_their_rate_and_in_bursts() -> None:
    arrivals = BurstyArrivals()(400.0, 40_000, 20, np.random.default_rng(1))
    assert 40_000 / arrivals[-1].mean() == pytest.approx(400, rel=0.02)
    counts = np.histogram(arrivals[:, 0], bins=np.arange(0, 90, 0.2))[0]
    assert counts.var() / counts.mean() > 1.5


@pytest.mark.parametrize(("share", "before"), [((1.0,), (0.0,)), ((0.125, 0.25, 0.5, 1.0), (0.0, 0.125, 0.25, 0.5))])
def test_looks_spend_five_percent_together(share: tuple[float, ...], before: tuple[float, ...]) -> None:
    spent = [InterimAnalysis(*each).significance for each in zip(share, before, strict=True)]
    assert InterimAnalysis(error=0.01).significance == pytest.approx(0.01)
    assert sum(spent) == pytest.approx(0.05)
    assert spent == sorted(spent)


def test_a_window_that_grows_is_decided_early_where_it_can_be() -> None:
    inside = verdict_at(quick(8000), InterimAnalysis(0.25))
    assert (inside.outcome, inside.decided) == (Outcome.PASS, True)
    latencies = quick(4000)
    latencies[::110] = 0.08
    close = verdict_at(latencies, InterimAnalysis(0.25))
    assert (close.outcome, close.decided) == (Outcome.INCONCLUSIVE, False)
    assert verdict_at(latencies, InterimAnalysis()).decided
    latencies[::20] = 0.08
    hopeless = verdict_at(latencies, InterimAnalysis(0.25))
    assert (hopeless.outcome, hopeless.decided) == (Outcome.FAIL, True)
    few = verdict_at(quick(200), InterimAnalysis(0.01))
    assert (few.decided, few.p99_ms) == (False, None)


def verdict_at(latencies: NDArray[np.float64], interim: InterimAnalysis) -> Measurement:
    return judge(samples(latencies), P99, rate_rps=500, seed=1, interim=interim)


def test_several_runs_are_one_window() -> None:
    runs = [samples(quick(700, seed), warmup=100, canary_p99_s=0.001 * seed, generator_cpu=0.1) for seed in (1, 2, 3)]
    measurement = judge(runs, P99, rate_rps=500, seed=1)
    assert (measurement.n, measurement.looks, measurement.outcome) == (1800, 3, Outcome.PASS)
    assert measurement.duration_s == pytest.approx(1800 / 500, rel=0.1)
    whole = joined(runs)
    assert (np.diff(whole.scheduled) >= 0).all()
    assert whole.canary_p99_s == 0.003
    assert np.allclose(np.sort(whole.latencies()), np.sort(np.concatenate([run.latencies()[100:] for run in runs])))
    behind = dataclasses.replace(runs[2], done=runs[2].scheduled + np.linspace(0.001, 0.4, 700))
    assert judge([*runs[:2], behind], P99, rate_rps=500, seed=1).outcome is Outcome.UNSTABLE


# -- the search, on servers that exist only as numbers


class Simulated:
    """A probe of a simulated server; counts what it is asked."""

    def __init__(self, capacity_rps: float, outcomes: dict[int, Outcome] | None = None) -> None:
        self.capacity_rps = capacity_rps
        self.asked: list[tuple[float, int]] = []
        self.outcomes = outcomes or {}

    def __call__(self, rate_rps: float, seed: int) -> Measurement:
        self.asked.append((rate_rps, seed))
        outcome = Outcome.PASS if rate_rps <= self.capacity_rps else Outcome.FAIL
        outcome = self.outcomes.get(len(self.asked), outcome)
        late = 0 if outcome is Outcome.PASS else 100
        return Measurement(
            P99, rate_rps, seed, 1.0, 1000, late, 0, 0, 1.0, 2.0, (1.0, 3.0), 1.0, 0.1, 0.1, outcome, "so it is", ""
        )


@pytest.mark.parametrize("start", [10.0, 400.0, 777.0, 5000.0])
def test_a_search_ends_at_the_capacity(start: float) -> None:
    probe = Simulated(777.0)
    search = find_capacity(probe, start_rps=start, slo=P99, resolution=1.03)
    assert 777 / 1.03 <= search.capacity_rps <= 777
    assert search.lowest_failing_rps is not None
    assert search.capacity_rps < search.lowest_failing_rps <= search.capacity_rps * 1.03
    assert search.confirmed is search.runs[-1]
    assert search.confirmed.rate_rps == search.capacity_rps
    assert search.confirmed.seed not in [run.seed for run in search.runs[:-1]]
    assert (search.retries, search.reason) == (0, "")


@pytest.mark.parametrize("paused", range(1, 12))
def test_one_pause_of_the_machine_on_the_way_does_not_bound_a_search(paused: int) -> None:
    probe = Simulated(777.0, {paused: Outcome.FAIL})
    search = find_capacity(probe, start_rps=400.0, slo=P99, resolution=1.03, confirm=Simulated(777.0))
    assert 777 / 1.03 <= search.capacity_rps <= 777


def test_a_search_replays_from_what_is_on_file() -> None:
    file: dict[tuple[float, int], Measurement] = {}
    server = Simulated(321.0, {3: Outcome.VOID, 8: Outcome.FAIL})

    def remembered(rate: float, seed: int) -> Measurement:
        if (rate, seed) not in file:
            file[rate, seed] = server(rate, seed)
        return file[rate, seed]

    first = find_capacity(remembered, start_rps=40, slo=P99, seed=5)
    asked = len(server.asked)
    assert find_capacity(remembered, start_rps=40, slo=P99, seed=5) == first
    assert len(server.asked) == asked
    assert find_capacity(Simulated(321.0), start_rps=40, slo=P99, seed=6).runs[0].seed != first.runs[0].seed


def test_a_disturbed_window_is_asked_again_three_times_at_most() -> None:
    search = find_capacity(Simulated(100.0, {1: Outcome.VOID, 2: Outcome.VOID}), start_rps=50, slo=P99)
    assert search.retries == 2
    assert 100 / 1.05 <= search.capacity_rps <= 100
    assert len({run.seed for run in search.runs}) == len(search.runs)
    always = find_capacity(Simulated(100.0, dict.fromkeys(range(1000), Outcome.VOID)), start_rps=50, slo=P99)
    assert always.capacity_rps == 0
    assert always.lowest_failing_rps is None
    assert always.confirmed is None
    assert always.retries == 3 * len({run.rate_rps for run in always.runs})


def test_a_generator_at_its_end_bounds_the_search_and_is_named() -> None:
    class Limited(Simulated):
        def __call__(self, rate_rps: float, seed: int) -> Measurement:
            self.outcomes = {len(self.asked) + 1: Outcome.GENERATOR_LIMITED} if rate_rps > 1000 else {}
            return super().__call__(rate_rps, seed)

    search = find_capacity(Limited(1e9), start_rps=100, slo=P99)
    assert 1000 / 1.05 <= search.capacity_rps <= 1000
    assert search.lowest_failing_rps is None
    assert "so it is" in search.reason


@pytest.mark.parametrize("outcome", [Outcome.GENERATOR_LIMITED, Outcome.VOID])
def test_a_small_budget_does_not_end_where_the_generator_falls_behind(outcome: Outcome) -> None:
    """A fast model with a tight limit: three quarters of what it answers in closed loops are far too many there."""

    class Limited(Simulated):
        def __call__(self, rate_rps: float, seed: int) -> Measurement:
            window = super().__call__(rate_rps, seed)
            beyond = {"outcome": outcome, "late": 700} if rate_rps > 6000 else {}
            return msgspec.structs.replace(window, duration_s=3.0, **beyond)

    search = find_capacity(Limited(6000), start_rps=18_750, slo=P99, prove=False, budget_s=13.5)
    assert 4000 < search.capacity_rps <= 6000
    assert len(search.runs) <= 6


def test_a_budget_of_two_windows_is_enough_for_a_server_that_is_much_slower_than_the_start() -> None:
    """Two windows at the start took all of the time, and the answer was that the server holds at no rate."""

    class Short(Simulated):
        def __call__(self, rate_rps: float, seed: int) -> Measurement:
            return msgspec.structs.replace(super().__call__(rate_rps, seed), duration_s=1.5)

    search = find_capacity(Short(200), start_rps=898.4, slo=P99, prove=False, budget_s=3.0)
    assert 100 < search.capacity_rps <= 200
    assert len(search.runs) <= 6


def test_a_server_that_never_holds_has_no_capacity() -> None:
    search = find_capacity(Simulated(0.0), start_rps=100, slo=P99)
    assert search.capacity_rps == 0
    assert search.confirmed is None
    assert "so it is" in search.reason
    assert len(search.runs) <= 10


def test_an_unlucky_confirmation_steps_down() -> None:
    probe, confirm = Simulated(100.0), Simulated(90.0)
    search = find_capacity(probe, start_rps=100, slo=P99, confirm=confirm)
    assert 80 <= search.capacity_rps <= 90
    assert search.lowest_failing_rps == confirm.asked[-2][0]
    assert len(search.runs) == len(probe.asked) + len(confirm.asked)


def test_a_window_is_long_enough_to_tell() -> None:
    assert window_n(P99, 1000, 3) == 3000
    assert window_n(P99, 400, 3) == needed_n(P99, 10)
    assert window_n(P99, 1, 3) == needed_n(P99, 1)
    assert window_n(P99, 1, 3, 0.005) == needed_n(P99, 1, 0.005) > needed_n(P99, 1), "of several for one claim"
    assert window_n(SLO.parse("p99<1s"), 100, 3) == 2000  # 20 times the limit


class VirtualServer:
    """A whole search in virtual time."""

    def __init__(self, server: Batching) -> None:
        self.generator = VirtualGenerator(server)

    def search(self, seed: int) -> Search:
        target = Target("http://virtual", "virtual", 1, "", "m", Interface.of(SIGNATURE))
        return search_capacity(self.generator, target, [b"x"], P99, seed=seed)


def test_searches_in_virtual_time_agree_and_are_quick() -> None:
    server = Batching(0.001, 0.0005, 32)  # 50 ms are its 99th percentile at 1810 requests/s
    found = []
    for seed in range(5):
        virtual = VirtualServer(server)
        search = virtual.search(seed)
        assert virtual.generator.seconds < 90
        assert search.lowest_failing_rps is None or search.lowest_failing_rps > search.capacity_rps
        assert search.requests == sum(run.n for run in search.runs)
        assert [rung.concurrency for rung in search.rungs[:3]] == [1, 2, 4]
        assert all(rung.consistent for rung in search.rungs), search.rungs
        found.append(search.capacity_rps)
    assert max(found) <= 1.03 * 1810
    assert min(found) >= 0.85 * 1810
    assert np.abs(np.array(found) / np.median(found) - 1).max() <= 0.08


def test_a_search_with_time_left_goes_up_again() -> None:
    """It stopped at the first proof, which is tried 5% below the best rate of the way."""

    class Short(Simulated):
        def __call__(self, rate_rps: float, seed: int) -> Measurement:
            window = super().__call__(rate_rps, seed)
            return msgspec.structs.replace(window, outcome=Outcome.INCONCLUSIVE)  # too short for a proof

    def search(budget_s: float) -> Search:
        proof = Simulated(1000.0)
        return find_capacity(Short(1000.0), start_rps=500, slo=P99, confirm=proof, budget_s=budget_s)

    first, again, hurried = search(math.inf), search(1e6), search(1)
    assert hurried.capacity_rps == first.capacity_rps < again.capacity_rps <= 1000
    assert 1000 / again.capacity_rps <= 1.04
    assert again.confirmed is not None
    assert again.confirmed.rate_rps == again.capacity_rps
    assert len(again.runs) <= len(first.runs) + 3


def test_a_search_in_a_hurry_takes_larger_steps() -> None:
    confirm = Simulated(700.0)
    patient = find_capacity(Simulated(1000.0), start_rps=500, slo=P99, confirm=confirm)
    hurried = find_capacity(Simulated(1000.0), start_rps=500, slo=P99, confirm=Simulated(700.0), budget_s=1)
    assert patient.capacity_rps <= 700
    assert hurried.capacity_rps <= 700
    assert len(hurried.runs) < len(patient.runs)


def test_little_s_law_is_checked_where_the_generator_waits() -> None:
    assert ClosedLoop(8, 1000, 0.008).consistent
    assert not ClosedLoop(8, 1000, 0.007).consistent


def test_looks_double_up_to_the_whole_window() -> None:
    assert interim_sizes(P99, 500, 20_000) == (2500, 5000, 10_000, 20_000)
    assert interim_sizes(P99, 500, 4_000) == (4_000,)
    assert interim_sizes(SLO.parse("p99<1s"), 500, 40_000) == (10_000, 20_000, 40_000)


# -- the client, against real servers


@pytest.fixture(scope="module")
def generator() -> Iterator[Generator]:
    with Generator() as running:
        yield running


def job(target: Target, *, rate: float = 400.0, n: int = 300, **changes: Any) -> OpenJob:
    settings: dict[str, Any] = {
        "host": target.host,
        "port": target.port,
        "requests": tuple(payloads(target)),
        "limit_s": 0.05,
        "timeout_s": 5.0,
        "outputs": target.outputs,
        "schedule": poisson(rate, n=n, seed=3).tobytes(),
    }
    return OpenJob(**(settings | changes))


@pytest.mark.parametrize(
    "behaviour", [{}, {"in_pieces": True}, {"dated": True}, {"keep_alive": False}, {"service_s": 0.001}]
)
def test_every_request_is_answered_and_timed(generator: Generator, behaviour: dict[str, Any]) -> None:
    with behaving(**behaviour) as url:
        run = generator.run(job(discover(url)))
    assert len(run) == 300
    assert run.count(Status.OK) == 300, run.first_error
    assert np.array_equal(run.scheduled, poisson(400, n=300, seed=3))
    assert (run.taken >= run.scheduled).all()
    assert (run.sent >= run.taken).all()
    assert (run.done >= run.sent).all()
    assert run.generator_cpu > 0
    assert run.connections >= 1


@pytest.mark.parametrize("behaviour", [{"hang_up": True}, {"keep_alive": False}])
def test_an_answer_and_the_end_of_its_connection_while_others_wait(
    generator: Generator, behaviour: dict[str, Any]
) -> None:
    """A waiting request got a new connection under the number of the one that had just ended, which was read again: the
    generator crashed."""
    with behaving(service_s=0.002, **behaviour) as url:
        run = generator.run(job(discover(url), rate=2000, n=1000, max_connections=8))
    assert len(run) == 1000
    assert run.count(Status.OK) > 500


def test_measure_reports_progress_and_a_verdict(generator: Generator) -> None:
    said: list[str] = []

    class Notes:
        def start(self, what: str, total: float | None = None) -> None:
            said.append(f"start {what}")

        def advance(self, by: float = 1.0, note: str = "") -> None:
            assert by >= 0
            said.append(note)

        def done(self, note: str = "", *, good: bool = True) -> None:
            said.append(f"done {note}")

    with behaving() as url:
        target = discover(url)
        measurement = measure(
            generator, target, payloads(target), GENEROUS, rate_rps=800, seed=1, n=400, warmup_s=0.2, progress=Notes()
        )
    assert (measurement.n, measurement.late, measurement.errors) == (400, 0, 0)
    assert measurement.outcome in (Outcome.PASS, Outcome.VOID), measurement.reason
    assert measurement.rate_rps == 800
    assert said[0] == "start 800 requests/s"
    assert any("in flight" in line for line in said)
    assert said[-1] == f"done {measurement.outcome}: {measurement.reason}"


def test_the_queue_behind_a_stall_is_seen_by_the_open_loop_only(generator: Generator) -> None:
    """A server that stands still for 400 ms keeps all those waiting who come meanwhile, whether it lets us ask or not.

    At 300 requests a second 120 come; a client that asks only after the last answer notices one.
    """
    with behaving(stall_at=150, stall_s=0.4, service_s=0.0005) as url:
        target = discover(url)
        crowd = generator.run(job(target, rate=300, n=450))
    with behaving(stall_at=50, stall_s=0.4, service_s=0.0005) as url:
        target = discover(url)
        alone = generator.run(
            ClosedJob(
                host=target.host,
                port=target.port,
                requests=tuple(payloads(target)),
                limit_s=0.05,
                timeout_s=5,
                concurrency=1,
                duration_s=1.5,
            )
        )
    assert np.count_nonzero(crowd.latencies() > 0.2) >= 40
    assert np.count_nonzero(alone.latencies() > 0.35) == 1
    assert len(alone) > 100
    assert np.quantile(crowd.latencies(), 0.99) > 0.3
    assert judge(crowd, P99, rate_rps=300, seed=3).outcome is not Outcome.PASS


def test_shed_and_failed_requests_are_told_apart(generator: Generator) -> None:
    with behaving(shed_every=10, fail_every=7) as url:
        run = generator.run(job(discover(url)))
    assert run.count(Status.SHED) == 30
    assert run.count(Status.ERROR) == len([i for i in range(1, 301) if i % 7 == 0 and i % 10])
    assert run.first_error == "status 500 (out of luck)"
    assert np.isinf(run.latencies()[run.status != Status.OK]).all()


def test_a_server_that_goes_away_leaves_what_was_measured(generator: Generator) -> None:
    with behaving(close_from=200) as url:
        run = generator.run(job(discover(url)))
    assert 150 <= run.count(Status.OK) < 200
    assert run.count(Status.OK) + run.count(Status.LOST) == 300
    assert np.isnan(run.done[run.status == Status.LOST]).all()
    assert "clos" in run.first_error or "connect" in run.first_error
    measurement = judge(run, P99, rate_rps=400, seed=3)
    assert measurement.outcome is Outcome.UNSTABLE
    assert measurement.errors == run.count(Status.LOST)


def test_requests_that_are_never_answered_are_lost_after_the_time_out(generator: Generator) -> None:
    with behaving(hang_from=250) as url:
        run = generator.run(job(discover(url), timeout_s=0.3))
    assert run.count(Status.LOST) >= 40
    assert run.count(Status.OK) + run.count(Status.LOST) == 300
    assert run.first_error == "no answer within 0.3 s"


def test_the_bound_on_connections_is_never_silent(generator: Generator) -> None:
    with behaving(service_s=0.01) as url:
        run = generator.run(job(discover(url), rate=400, n=320, max_connections=2, timeout_s=60.0))
    assert run.connections == 2
    assert run.starved > 100
    assert run.count(Status.OK) == 320
    assert judge(run, SLO.parse("p99<10s"), rate_rps=400, seed=3).outcome is Outcome.GENERATOR_LIMITED


def test_what_a_starved_generator_never_sent_is_not_held_against_the_server(generator: Generator) -> None:
    with behaving(service_s=0.01) as url:
        run = generator.run(job(discover(url), rate=800, n=1600, max_connections=2, timeout_s=1.0))
    assert run.count(Status.LOST) > 300
    assert judge(run, P99, rate_rps=800, seed=3).outcome is Outcome.GENERATOR_LIMITED


def test_a_slow_server_does_not_hide_behind_the_bound_on_connections(generator: Generator) -> None:
    with behaving(service_s=0.1) as url:
        run = generator.run(job(discover(url), rate=200, n=400, max_connections=8, timeout_s=1.0))
    assert run.starved > 100
    assert judge(run, P99, rate_rps=200, seed=3).outcome in (Outcome.FAIL, Outcome.UNSTABLE)


def test_wrong_answers_are_errors(generator: Generator) -> None:
    with behaving() as url:
        target = discover(url)
        expected = tuple(b"something else" if i % 2 else _answer(target) for i in range(32))
        run = generator.run(job(target, expected=expected))
    assert run.count(Status.OK) == 150
    assert run.first_error == "an answer is not the one expected"


def _answer(target: Target) -> bytes:
    import http.client

    head, body = payloads(target)[0].split(b"\r\n\r\n", 1)
    fields = [line.split(": ", 1) for line in head.decode().split("\r\n")[1:]]
    connection = http.client.HTTPConnection(target.host, target.port)
    try:
        connection.request("POST", target.infer_path, body, dict(fields))
        return connection.getresponse().read()
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ({"garbage_from": 1}, "not an answer.*check the URL"),
        ({"wrong_output": True}, "no output 'y'"),
        ({"reject": True}, r"status 400: shape \[1, 4, 4, 1\] is not what I take"),
    ],
)
def test_a_server_that_makes_no_sense_is_one_line(
    generator: Generator, behaviour: dict[str, Any], message: str
) -> None:
    with behaving(**behaviour) as url, pytest.raises(LoadError, match=message) as caught:
        generator.run(job(discover(url)))
    assert "\n" not in str(caught.value)
    assert caught.value.why
    assert caught.value.fix


def test_garbage_in_the_middle_is_counted_not_fatal(generator: Generator) -> None:
    with behaving(garbage_from=250) as url:
        run = generator.run(job(discover(url)))
    assert run.count(Status.OK) == 249
    assert run.count(Status.ERROR) == 51
    assert "not an answer" in run.first_error


def test_no_server_is_said_before_anything_is_sent(generator: Generator) -> None:
    with behaving() as url:
        target = discover(url)
    with pytest.raises(LoadError, match=r"cannot connect to 127\.0\.0\.1"):
        generator.run(job(target))


def test_the_null_server_says_what_the_generator_can_do(generator: Generator, tiny: Bundle) -> None:
    requests = payloads(_target(tiny))
    found = null_throughput(generator, requests)
    assert found > 200
    assert null_throughput(generator, requests) == found
    asked = judge(samples(quick()), P99, rate_rps=500, seed=1, null_rps=999)
    assert asked.outcome is Outcome.GENERATOR_LIMITED
    assert "sends 999 requests/s to a null server" in asked.reason
    assert judge(samples(quick()), P99, rate_rps=500, seed=1, null_rps=1001).outcome is Outcome.PASS


def test_the_closed_loop_finds_the_throughput(generator: Generator) -> None:
    with behaving(service_s=0.005) as url:
        target = discover(url)
        rungs = ramp_concurrency(generator, target, payloads(target), step_s=0.4)
    assert 50 < max(rung.throughput_rps for rung in rungs) <= 230
    with behaving(fail_every=1) as url, pytest.raises(LoadError, match="answers no request: status 500"):
        ramp_concurrency(generator, discover(url), payloads(target), step_s=0.2)


def test_against_our_own_server(generator: Generator, server: Server, tiny: Bundle) -> None:
    target = discover(server.url)
    assert target.interface == Interface.of(tiny.manifest.signature)
    measurement = measure(
        generator, target, payloads(target, tiny.samples()), GENEROUS, rate_rps=500, seed=1, n=400, warmup_s=0.2
    )
    assert (measurement.n, measurement.late, measurement.errors) == (400, 0, 0), measurement.reason
    assert 4 <= len(measurement.speeds) <= 14, "one in 100 ms of a window of about 0.8 s"
    assert measurement.speed is not None
    assert measurement.slow_speed is not None
    assert 0 < measurement.slow_speed <= measurement.speed
    assert target.speeds(0.0, time.monotonic() - 3600) == ()


def test_a_server_that_tells_no_speed_is_not_asked_for_it(generator: Generator) -> None:
    with behaving() as url:
        target = discover(url)
        measurement = measure(generator, target, payloads(target), GENEROUS, rate_rps=500, seed=1, n=100, warmup_s=0.2)
        assert (target.tells_speed, measurement.speeds, measurement.speed) == (False, (), None)
        # One that says so and then does not costs the figures, not the measurement.
        assert dataclasses.replace(target, tells_speed=True).speeds(0.0, math.inf) == ()
    assert dataclasses.replace(target, tells_speed=True).speeds(0.0, math.inf) == ()


def test_samples_survive_the_way_between_processes() -> None:
    run = samples(quick(17), warmup=3, first_error="ä", starved=2)
    back = unpack(pack(run))
    for field in dataclasses.fields(Samples):
        assert np.array_equal(getattr(back, field.name), getattr(run, field.name)), field.name


# -- the generator's process


def test_a_killed_generator_is_one_line() -> None:
    with behaving(service_s=0.001) as url, Generator() as doomed:
        target = discover(url)
        threading.Timer(0.7, os.kill, (doomed.pid, signal.SIGKILL)).start()
        with pytest.raises(LoadError, match=r"the load generator process has ended: .*SIGKILL"):
            doomed.run(job(target, rate=100, n=1000))
        with pytest.raises(LoadError, match="the load generator process has ended"):
            doomed.run(job(target))


def test_a_generator_stays_on_its_cores() -> None:
    core = max(os.sched_getaffinity(0))
    with behaving() as url, Generator({core}) as pinned:
        assert pinned.run(job(discover(url))).count(Status.OK) == 300
        assert os.sched_getaffinity(pinned.pid) == {core}


def test_a_generator_outside_its_block_is_refused() -> None:
    with pytest.raises(LoadError, match="was not started"):
        _ = Generator().pid


ORPHAN = """
import os, sys, time
from rushhour.load import Generator, OpenJob, poisson
generator = Generator().__enter__()
print(generator.pid, flush=True)
if sys.argv[1] == "idle":
    time.sleep(60)
schedule = poisson(50, n=3000, seed=0).tobytes()
generator.run(OpenJob(host="127.0.0.1", port=int(sys.argv[1]), requests=(b"GET /v2/models/tiny HTTP/1.1\\r\\n\\r\\n",),
                      limit_s=1, timeout_s=5, schedule=schedule), lambda tick: print("ticking", flush=True))
"""


@pytest.mark.parametrize("doing", ["idle", "running"])
def test_a_generator_does_not_outlive_its_parent(doing: str) -> None:
    with behaving() as url:
        port = url.rsplit(":", 1)[1] if doing == "running" else "idle"
        parent = subprocess.Popen([sys.executable, "-c", ORPHAN, port], stdout=subprocess.PIPE)
        assert parent.stdout is not None
        try:
            pid = int(parent.stdout.readline())
            if doing == "running":
                assert parent.stdout.readline() == b"ticking\n"
        finally:
            parent.kill()
            parent.wait()
            parent.stdout.close()
        deadline = time.monotonic() + 20
        while _alive(pid):
            assert time.monotonic() < deadline, "the generator is still there"
            time.sleep(0.02)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # an orphan's last trace waits for whoever adopted it


# -- whom to load, and with what


def test_discover_finds_the_one_model() -> None:
    with behaving() as url:
        target = discover(url + "/")
    assert target.model == "tiny"
    assert target.infer_path == "/v2/models/tiny/infer"
    assert [each.name for each in target.interface.inputs] == ["x"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000", "cannot use the URL .*http://host:port"),
        ("", "cannot use the URL"),
        ("http://", "cannot use the URL"),
        ("http://host:port", "cannot use the URL"),
        ("http://[::1", "cannot use the URL"),
        ("http://host?x=1", "cannot use the URL"),
        ("https://localhost:8000", "https is not supported"),
        ("http://127.0.0.1:1", "cannot reach http://127.0.0.1:1"),
        ("http://no-such-host.invalid:8000", "cannot reach"),
    ],
)
def test_a_url_that_leads_nowhere_is_one_line(url: str, message: str) -> None:
    with pytest.raises(LoadError, match=message) as caught:
        discover(url, timeout_s=2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("behaviour", "model", "message"),
    [
        ({}, "other", "no model 'other' at .*the server has tiny; name one of these"),
        ({"models": []}, None, "lists no model that is ready"),
        ({"models": ["a", "b"]}, None, "has 2 models: they are a, b; name one"),
        ({"not_http": True}, None, "does not speak HTTP"),
    ],
)
def test_a_model_that_cannot_be_found_is_one_line(behaviour: dict[str, Any], model: str | None, message: str) -> None:
    with behaving(**behaviour) as url, pytest.raises(LoadError, match=message):
        discover(url, model)


def _target(tiny: Bundle) -> Target:
    return Target("http://h:1", "h", 1, "/at", "a model", Interface.of(tiny.manifest.signature))


def test_payloads_are_whole_distinct_requests(tiny: Bundle) -> None:
    target = _target(tiny)
    made = payloads(target, tiny.samples(), rows=3, seed=1)
    assert made == payloads(target, tiny.samples(), rows=3, seed=1)
    assert made != payloads(target, tiny.samples(), rows=3, seed=2)
    assert len(made) == 32
    assert len(set(payloads(target))) == 32
    many = {"image": np.arange(200 * 16, dtype=np.uint32).astype(np.uint8).reshape(200, 4, 4, 1)}
    many["image"][:, 0, 0, 0] = np.arange(200)
    assert len(set(payloads(target, many, distinct=200))) == 200
    codec = Codec("a model", tiny.manifest.signature)
    for request in made:
        head, body = request.split(b"\r\n\r\n", 1)
        fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
        assert head.startswith(b"POST /at/v2/models/a%20model/infer HTTP/1.1\r\n")
        assert int(fields["Content-Length"]) == len(body)
        assert codec.decode(body, int(fields["Inference-Header-Content-Length"])).rows == 3


def test_payloads_that_do_not_fit_are_refused(tiny: Bundle) -> None:
    target = _target(tiny)
    name = target.interface.inputs[0].name
    right = tiny.samples()[name]
    with pytest.raises(LoadError, match=f"lack the input '{name}'"):
        payloads(target, {})
    with pytest.raises(LoadError, match="takes uint8 of shape"):
        payloads(target, {name: right.astype(np.float32)})
    with pytest.raises(LoadError, match="takes uint8 of shape"):
        payloads(target, {name: right[:, :2]})
    with pytest.raises(LoadError, match="at least one"):
        payloads(target, {name: right[:0]})
    with pytest.raises(LoadError, match="0 samples"):
        payloads(target, {name: right}, rows=0)
