"""The capacity that windows tell together, where no single one is a proof."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from rushhour.goal import SLO
from rushhour.load import Estimate, estimate, find_capacity
from rushhour.measurement import Measurement, Outcome

P99 = SLO.parse("p99<50ms")


def window(rate: float, late: int, n: int = 4000, outcome: Outcome = Outcome.INCONCLUSIVE) -> Measurement:
    blocks = tuple(np.random.default_rng(late).multinomial(late, [1 / 20] * 20).tolist())
    return Measurement(
        P99, rate, 0, n / rate, n, late, 0, 0, 5.0, 40.0, None, rate, 0.1, 0.1, outcome, "", "", blocks=blocks
    )  # fmt: skip


def found(*windows: Measurement) -> Estimate:
    result = estimate(windows, P99)
    assert result is not None
    return result


def test_it_lies_where_the_share_of_late_requests_crosses_what_is_allowed() -> None:
    result = found(window(1000, 0), window(2000, 20), window(3000, 60))  # 0, 0.5% and 1.5%
    assert result.bounded
    assert np.log(result.rate_rps) == pytest.approx(np.log([2000, 3000]).mean(), abs=1e-6)
    low, high = result.interval_rps
    assert 2000 < low < result.rate_rps < high < 3000
    assert result.requests == 12_000
    assert "estimated, not proven" in str(result)


def test_a_lucky_window_above_an_unlucky_one_does_not_carry_it_up() -> None:
    """More load makes no server faster: the two are pooled."""
    result = found(window(1000, 0), window(2000, 80), window(2500, 0), window(3000, 400))
    assert 2000 < result.rate_rps < 3000
    alone = found(window(1000, 0), window(2000, 80), window(3000, 400))
    assert alone.rate_rps < 2000


def test_what_was_not_asked_of_the_server_counts_for_nothing() -> None:
    held = [window(1000, 0), window(2000, 0)]
    disturbed = [window(1500, 3000, outcome=Outcome.VOID), window(900, 4000, outcome=Outcome.GENERATOR_LIMITED)]
    assert found(*held, *disturbed).rate_rps == pytest.approx(2000)
    assert not found(*held).bounded
    assert "at least" in str(found(*held))


def test_what_held_on_a_disturbed_machine_was_seen_to_hold() -> None:
    """A baseline of 66/s was taken for 0, though it had kept the limit in each window that the machine disturbed."""
    held = [window(1000, 3, outcome=Outcome.VOID), window(1200, 9, outcome=Outcome.GENERATOR_LIMITED)]
    assert found(*held).rate_rps == pytest.approx(1200)
    busy = msgspec.structs.replace(window(1500, 0, outcome=Outcome.GENERATOR_LIMITED), generator_cpu=0.8)
    assert found(*held, busy).rate_rps == pytest.approx(1200), "a generator at its own limit did not ask for that"


def test_on_the_way_a_disturbed_window_that_held_is_not_asked_again() -> None:
    asked: list[float] = []

    def probe(rate_rps: float, seed: int) -> Measurement:
        asked.append(rate_rps)
        late = 0 if rate_rps <= 66 else 2000
        return window(rate_rps, late, outcome=Outcome.FAIL if late else Outcome.VOID)

    search = find_capacity(probe, start_rps=50, slo=P99, resolution=1.1, prove=False)
    assert 60 <= search.capacity_rps <= 73
    assert not search.proven
    assert len(asked) == len(set(asked)) < 8


def test_a_way_that_takes_too_long_ends_with_what_it_knows() -> None:
    def probe(rate_rps: float, seed: int) -> Measurement:
        return window(rate_rps, 0 if rate_rps <= 66 else 400)

    quick = find_capacity(probe, start_rps=20, slo=P99, resolution=1.01, prove=False, budget_s=100)
    assert 20 <= quick.capacity_rps <= 66
    assert len(quick.runs) == 1, "4,000 requests at 20/s take 200 s"


def test_a_server_that_fell_behind_holds_nothing_there() -> None:
    result = found(window(1000, 0), window(2000, 10, outcome=Outcome.UNSTABLE))
    assert 1000 <= result.rate_rps < 1020


def test_where_it_held_at_no_rate_there_is_no_estimate() -> None:
    assert estimate([window(1000, 400), window(500, 100)], P99) is None
    assert estimate([], P99) is None


def test_where_something_held_it_is_never_nothing() -> None:
    """`demo` ended in 0/s: it had held at 4,664/s, and on a host twice as slow a minute later it failed below that."""
    result = found(window(4664, 3), window(4000, 2000, outcome=Outcome.FAIL), window(3600, 900, outcome=Outcome.FAIL))
    assert result.rate_rps == 4664
    assert result.interval_rps == (3600, 4664)
    result = found(window(4664, 3), window(4000, 2000, outcome=Outcome.FAIL), window(2500, 8))
    assert 2500 <= result.rate_rps < 4000


def test_bursts_widen_the_interval() -> None:
    even = msgspec.structs.replace(window(2000, 38), blocks=(2,) * 18 + (1,) * 2)
    steady = found(window(1000, 0), even, window(3000, 400))
    burst = msgspec.structs.replace(window(2000, 38), blocks=(38, *(0,) * 19))
    bursty = found(window(1000, 0), burst, window(3000, 400))
    assert bursty.rate_rps == pytest.approx(steady.rate_rps)
    assert bursty.interval_rps[1] - bursty.interval_rps[0] > steady.interval_rps[1] - steady.interval_rps[0]
    assert bursty.interval_rps[0] < 0.8 * steady.interval_rps[0], "it may have held by luck"


def test_a_wide_gap_between_two_rates_stays_wide() -> None:
    """None late at one rate and most at the next: "17,249/s (17,245 to 17,254)" was a straight line between them."""
    low, high = found(window(17_000, 0), window(20_000, 3_000, outcome=Outcome.FAIL)).interval_rps
    assert low < 17_300
    assert high > 18_500
    near = found(window(17_000, 0), window(17_500, 3_000, outcome=Outcome.FAIL)).interval_rps
    assert near[1] < 17_500


def test_a_search_without_a_proof_ends_in_an_estimate_and_not_in_zero() -> None:
    """On a host whose speed comes in waves it was 0/s, though windows had held at 2,605, 2,673 and 3,378/s."""

    def probe(rate_rps: float, seed: int) -> Measurement:
        return window(rate_rps, 0 if rate_rps < 2600 else 200)

    search = find_capacity(probe, start_rps=1000, slo=P99, budget_s=120)
    assert not search.proven
    assert search.confirmed is None
    assert 2400 < search.capacity_rps < 2700
    assert search.estimate is not None
    assert 0.999 * search.estimate.interval_rps[0] <= search.capacity_rps <= 1.001 * search.estimate.interval_rps[1]
    assert search.lowest_failing_rps is None
    assert "could be proven" in search.reason


def test_large_rates_are_written_out() -> None:
    said = str(Estimate(rate_rps=9466.0, interval_rps=(88.474, 10_580.4), bounded=True, requests=9))
    assert "9,466 requests/s (88.47 to 10,580;" in said
