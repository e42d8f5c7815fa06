"""Races of two servers that exist only as numbers, on hosts whose speed comes in waves and bursts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from rushhour.load import Race, race

_TICK_S = 0.01


class Host:
    """A host whose speed is a two-state process of +-30% with a mean of 4 s; bursts of a neighbour halve it.

    Args:
        share: of the time that is burst.
    """

    def __init__(self, seed: int, share: float) -> None:
        self._random = np.random.default_rng(seed)
        self._speed = self._spells(4.0, 4.0, 1.3, 0.7)
        if share:
            self._speed *= self._spells(0.1 * (1 - share) / share, 0.1, 1.0, 0.5)
        self._now = 10 * self._random.random()

    def _spells(self, first_s: float, second_s: float, first: float, second: float) -> np.ndarray:
        lasting = self._random.exponential(1.0, (4000, 2)) * (first_s, second_s)
        ticks = np.maximum(1, (lasting / _TICK_S).astype(int)).ravel()
        return np.repeat(np.tile((first, second), 4000), ticks)[:20_000]

    def server(self, capacity: float) -> Callable[[int], float]:
        """Its windows take 0.3 s, and 0.15 s before each of them."""

        def window(_: int) -> float:
            begin = int((self._now + 0.15) / _TICK_S)
            self._now += 0.45
            speed = self._speed[begin : begin + 30].mean()
            return float(capacity * speed * self._random.normal(1, 0.04))

        return window


def raced(ratio: float, seed: int, *, share: float = 0.0, rivals: int = 1) -> Race:
    host = Host(seed, share)
    return race(host.server(2000), host.server(2000 * ratio), rivals=rivals)


@pytest.mark.parametrize("share", [0.0, 0.03, 0.08])
@pytest.mark.parametrize(("ratio", "order"), [(1.1, "faster"), (1 / 1.1, "slower"), (1.0, "tie")])
def test_two_plans_are_ordered_rightly_where_the_speed_comes_in_waves(ratio: float, order: str, share: float) -> None:
    found = [raced(ratio, seed, share=share) for seed in range(100)]
    assert sum(one.order == order for one in found) >= (95 if share < 0.05 else 90)
    assert np.median([one.ratio for one in found]) == pytest.approx(ratio, rel=0.02)
    assert sum(one.interval[0] <= ratio <= one.interval[1] for one in found) >= 88, "looking often costs a little of 95"


def test_what_is_clear_takes_the_fewest_windows_and_what_is_close_more() -> None:
    far, near = ([raced(ratio, seed).pairs for seed in range(20)] for ratio in (1.5, 1.04))
    assert np.median(far) == 10 < np.median(near)


def test_of_many_equal_rivals_hardly_one_is_called_faster() -> None:
    wrong = sum(
        any(raced(1.0, 8 * seed + rival, rivals=8).order == "faster" for rival in range(8)) for seed in range(50)
    )
    assert wrong <= 4


def test_a_race_ends_when_the_time_is_up_but_never_before_it_could_tell() -> None:
    host = Host(0, 0.0)
    cut_off = race(host.server(2000), host.server(2020), is_over=lambda: True)
    assert (cut_off.order, cut_off.pairs) == ("tie", 10)
    assert race(host.server(2000), host.server(4000), is_over=lambda: True).order == "faster"


def test_the_same_server_twice_is_a_tie_to_the_digit() -> None:
    def server(turn: int) -> float:
        return 1000.0 + turn

    assert race(server, server).order == "tie"


def test_turns_alternate() -> None:
    asked: list[tuple[str, int]] = []

    def server(name: str, answers: float) -> Callable[[int], float]:
        def window(turn: int) -> float:
            asked.append((name, turn))
            return answers

        return window

    race(server("a", 1.0), server("b", 2.0))
    assert asked[:6] == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]


def test_a_server_that_answers_nothing_in_time_loses() -> None:
    assert race(lambda turn: 500.0, lambda turn: 0.0).order == "slower"
