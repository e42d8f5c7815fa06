"""Bounds of sizes: the ones chosen for known sizes pad least."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rushhour.capacity import best_bounds, padding_share, usual_bounds


@given(st.lists(st.integers(1, 12), min_size=1, max_size=30), st.integers(1, 4))
def test_the_bounds_are_the_best_of_all(sizes: list[int], most: int) -> None:
    found = best_bounds(sizes, 12, most)
    assert found == tuple(sorted(set(found)))
    assert len(found) <= most
    assert found[-1] == 12
    others = ((*some, 12) for count in range(most) for some in combinations(range(1, 12), count))
    assert padding_share(sizes, found) == pytest.approx(min(padding_share(sizes, each) for each in others))


def test_many_different_sizes_are_taken_by_their_quantiles() -> None:
    sizes = np.random.default_rng(0).lognormal(6, 1, 20_000).astype(int).clip(1, 30_000).tolist()
    found = best_bounds(sizes, 32_768, 8)
    assert len(found) <= 8
    equally_full = (*np.quantile(sizes, np.arange(1, 8) / 8).astype(int).tolist(), 32_768)
    assert padding_share(sizes, found) < padding_share(sizes, equally_full)


def test_sizes_beyond_the_largest_count_as_the_largest() -> None:
    assert best_bounds([5, 5, 900], 16, 2) == (5, 16)
    assert best_bounds([], 16, 4) == (16,)
    assert best_bounds([3], 16, 1) == (16,)
    assert padding_share([], (16,)) == 0
    assert padding_share([4, 12], (8, 16)) == pytest.approx(1 - 16 / 24)


def test_the_usual_bounds_are_powers_of_two_and_those_half_as_large_again() -> None:
    assert usual_bounds(1, 100) == (8, 12, 16, 24, 32, 48, 64, 96, 100)
    assert usual_bounds(1, 4) == (4,)
    assert usual_bounds(30, 64) == (32, 48, 64)
