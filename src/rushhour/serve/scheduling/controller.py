"""`Controller`: which variant of a ladder answers, decided every 100 ms. Pure: no I/O, no clock, replayable.

It prefers accuracy. It descends to a faster variant when more arrives than the present one carries, or will by the
trend, or when the queue grows although the rate is said to be carried. It climbs back only when the load of the last
seconds leaves room on the more accurate one. A variant that was left because of a load is not tried again at that load
for a minute, and for longer after each attempt that fails: a constant load causes two switches a minute at most.

Estimates of rates have the error of counts of independent arrivals: descending needs the lower end of what is
plausible, climbing the upper end.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

INTERVAL_S = 0.1
"""Between two decisions."""
_KEPT = 100
"""Intervals whose arrivals are kept."""
_FAST, _SLOW, _TREND = 3, 20, 8
"""Intervals of the fast rate; of the slow one, at least; and of the trend."""
_ENOUGH = 100
"""Arrivals that the slow rate rests on, where the kept intervals have so many."""
_AHEAD = 3.0
"""Intervals that the trend is continued for."""
_DOWN_ERRORS, _UP_ERRORS = 3.0, 2.0
"""Standard errors of a rate that is plausible, to descend and to climb."""
_FULL, _ROOM = 0.95, 0.8
"""Shares of a variant's rate: descend above, climb below."""
_DRAINED_S = 1.0
"""The waiting samples are to be answered within this time beside what arrives."""
_LONG_WAIT, _SHORT_WAIT = 0.5, 0.2
"""Predicted waits, as shares of the latency limit: descend above, climb below."""
_WAITS = 2
"""Decisions in a row with a long wait, or with shed requests, that show that the rate is not carried."""
_SHED, _BUSY = 0.01, 0.5
"""Share of shed requests that counts, at this share of the rate at least: a client may ask for the impossible."""
_SETTLE = 10
"""Decisions after a switch before a climb."""
_HOLD_S, _LONGEST_HOLD_S = 60.0, 960.0
"""Before a variant is tried again at the load that it was left at; doubled after each attempt that fails."""
_ATTEMPT_S = 10.0
"""A variant that is left again within this time was an attempt that failed."""
_LESS = 0.8
"""Share of the load that a variant was left at, below which it is another load."""
_SPELL_S = 60.0
"""Once the account was empty, accuracy is not spent again for so long, and only if it lasts for so long then."""
_FIRST_SPELL_S = 10.0
"""Before that, it has to last for so long: who spends the rest of it in moments has to go back further."""
_KEPT_BACK = 0.2
"""Share of a full account that is kept for a minute on the rung to fall back to, at most: of a rush whose end is not
known, more would cost more than it brings."""
_EMPTIED_S = 50.0
"""A rung is fallen back to if it lasts for so long, a little less than what was kept back for it."""
_SOON = 2.0
"""Intervals that are paid for before there is another decision: more may arrive in one than in the last ones."""
_REFILLED, _LEAST_S = 0.1, 1.0
"""Share of the account that is spent at most where it could not last so long even if it were full; and how long it has
to last then."""


@dataclasses.dataclass(frozen=True)
class Rung:
    """A variant, as the controller knows it.

    Attributes:
        rate: samples per second that it carries within the latency limit.
        drop: the expected accuracy drop of one answer, at most.
    """

    rate: float
    drop: float


@dataclasses.dataclass(frozen=True)
class Load:
    """What is seen at a decision.

    Attributes:
        now: in seconds of any clock.
        arrived: samples since the decision before, those that were shed among them.
        shed: of these, how many were shed.
        waiting: samples in the queue.
    """

    now: float
    arrived: float
    shed: float
    waiting: int


class Affords(Protocol):
    """Whether the account pays for spells one after another: answers, and the drop of each."""

    def __call__(self, *spells: tuple[int, float]) -> bool:
        """As of `Account.affords`."""
        ...


class Controller:
    """Chooses a rung of a ladder.

    Args:
        rungs: from the most accurate to the fastest.
        limit_s: of the latency.
        affords: whether the account pays for spells one after another: answers, and the drop of each.
        budget: the mean drop that is allowed, of so many answers in a row as `window`.
        spent: the share of the account that is spent.
        at: the rung to begin with.

    Attributes:
        at: the rung that answers.
        why: it was chosen, in words; empty before the first change.
    """

    def __init__(
        self,
        rungs: Sequence[Rung],
        limit_s: float,
        affords: Affords,
        spent: Callable[[], float],
        *,
        budget: float,
        window: int,
        at: int = 0,
    ) -> None:
        self.rungs = tuple(rungs)
        self.at = at
        self.why = ""
        self._limit_s = limit_s
        self._affords = affords
        self._budget = budget
        self._window = window
        self._spent = spent
        self._arrived: deque[float] = deque(maxlen=_KEPT)
        self._pressed = 0
        self._since_s = -math.inf
        self._settled = 0
        self._left_load = [0.0] * len(self.rungs)
        self._left_s = [-math.inf] * len(self.rungs)
        self._hold_s = [_HOLD_S] * len(self.rungs)
        self._emptied_s: float | None = None

    def decide(self, load: Load) -> int:
        """The rung that answers from now on.

        Args:
            load: of the last 100 ms.
        """
        self._arrived.append(load.arrived)
        self._settled += 1
        rung = self.rungs[self.at]
        wait_s = load.waiting / rung.rate
        low, mean = self._lowest_rate(), self._rate(_FAST)
        is_shedding = load.shed > _SHED * load.arrived and mean > _BUSY * rung.rate
        is_pressed = wait_s > _LONG_WAIT * self._limit_s or is_shedding
        self._pressed = self._pressed + 1 if is_pressed else 0
        if rung.drop > self.rungs[0].drop and not self._pays(self.at, _SOON * INTERVAL_S, mean):
            self.empty(load.now)
        elif low > _FULL * rung.rate:
            self._descend(load, max(low, mean), max(mean, rung.rate))
        elif self._pressed >= _WAITS:
            self._descend(load, mean, self._rate(_SLOW))
        elif self.at and self._settled >= _SETTLE and wait_s <= _SHORT_WAIT * self._limit_s and not is_pressed:
            self._climb(load)
        return self.at

    def empty(self, now: float) -> None:
        """The account allows no more answers of this rung: go back to the fastest one that it can pay for.

        Args:
            now: in seconds of the clock of `Load.now`.
        """
        self._emptied_s = now
        demand = self._rate(_FAST)
        less = [each for each in range(self.at) if self._pays(each, _EMPTIED_S, demand)]
        self._move(max(less, default=0), now, "the accuracy budget of the window is spent")

    def _pays(self, rung: int, seconds: float, demand: float) -> bool:
        """Whether the account pays for so long for a rung at this load, and then for the one to fall back to.

        That is the fastest before it of which a minute costs little. Who spends all has only the most accurate one left
        in the middle of the rush, which carries least.
        """
        present = self.rungs[rung]
        answers = math.ceil(min(demand, present.rate) * seconds)
        for back in reversed(self.rungs[1:rung]):
            later = min(math.ceil(min(demand, back.rate) * _SPELL_S), self._window)
            if back.drop < present.drop and later * back.drop <= _KEPT_BACK * self._budget * self._window:
                return self._affords((answers, present.drop), (later, back.drop))
        return self._affords((answers, present.drop))

    def _descend(self, load: Load, demand: float, left_at: float) -> None:
        """To the most accurate rung that carries the load, as far as the account allows.

        Args:
            demand: samples per second that have to be answered, beside those that wait.
            left_at: the load that is not carried, to be remembered.
        """
        last, needed = len(self.rungs) - 1, demand + load.waiting / _DRAINED_S
        faster = range(self.at + 1, last + 1)
        wanted = next((each for each in faster if self.rungs[each].rate >= needed), last)
        for to in range(wanted, self.at, -1):
            if self._lasts(to, needed, load.now):
                for each in range(to):  # those in between are not tried: they carry less by what is known
                    self._leave(each, load.now, left_at if each <= self.at else max(left_at, self.rungs[each].rate))
                self._move(to, load.now, f"{demand:,.0f} samples/s arrive and {load.waiting:,} wait")
                return

    def _lasts(self, rung: int, demand: float, now: float) -> bool:
        """Whether the account pays for this rung for long enough at this load.

        Once it was empty, not before a minute has passed; and if it would not last even if it were full, it has to be
        nearly full, and to pay for a second.
        """
        if self._emptied_s is not None and now - self._emptied_s < _SPELL_S:
            return False
        spell_s = _FIRST_SPELL_S if self._emptied_s is None else _SPELL_S
        return self._pays(rung, spell_s, demand) or (self._spent() <= _REFILLED and self._pays(rung, _LEAST_S, demand))

    def _climb(self, load: Load) -> None:
        """To the most accurate rung that has room for the load of the last seconds."""
        high = self._highest_rate()
        for to in range(self.at):
            if high > _ROOM * self.rungs[to].rate:
                continue
            is_other = high <= _LESS * self._left_load[to]
            if not is_other and load.now - self._left_s[to] < self._hold_s[to]:
                continue
            if is_other:
                self._hold_s[to] = _HOLD_S
            self._emptied_s = None
            self._move(to, load.now, f"at most {high:,.0f} samples/s arrive")
            return

    def _move(self, to: int, now: float, why: str) -> None:
        if to != self.at:
            self.at, self.why = to, why
            self._since_s, self._settled, self._pressed = now, 0, 0

    def _leave(self, rung: int, now: float, load: float) -> None:
        """It does not carry this load."""
        if rung == self.at and now - self._since_s < _ATTEMPT_S and load > _LESS * self._left_load[rung] > 0:
            self._hold_s[rung] = min(_LONGEST_HOLD_S, 2 * self._hold_s[rung])
        self._left_s[rung], self._left_load[rung] = now, load

    def _rate(self, intervals: int) -> float:
        """Samples per second that arrived in the last intervals."""
        newest = list(self._arrived)[-intervals:]
        return sum(newest) / (max(1, len(newest)) * INTERVAL_S)

    def _lowest_rate(self) -> float:
        """Samples per second that arrive now, or soon by the trend: the lowest plausible rate."""
        counts = list(self._arrived)
        seconds = min(len(counts), _FAST) * INTERVAL_S
        n = sum(counts[-_FAST:])
        low = (n - _DOWN_ERRORS * math.sqrt(n)) / seconds
        recent = counts[-_TREND:]
        if len(recent) < _TREND:
            return low
        middle = (_TREND - 1) / 2
        level, spread = sum(recent) / _TREND, sum((x - middle) ** 2 for x in range(_TREND))
        slope = sum((x - middle) * count for x, count in enumerate(recent)) / spread
        ahead = middle + _AHEAD
        error = _DOWN_ERRORS * math.sqrt(level * (1 / _TREND + ahead * ahead / spread))
        return max(low, (level + slope * ahead - error) / INTERVAL_S)

    def _highest_rate(self) -> float:
        """Samples per second of the last seconds: the highest plausible rate."""
        total, intervals = 0.0, 0
        for count in reversed(self._arrived):
            total, intervals = total + count, intervals + 1
            if intervals >= _SLOW and total >= _ENOUGH:
                break
        slow = (total + _UP_ERRORS * math.sqrt(total + 1)) / (max(intervals, _SLOW) * INTERVAL_S)
        return max(slow, self._rate(_FAST))
