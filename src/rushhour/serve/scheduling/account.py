"""`Account`: the accuracy that answers have cost, and what may still be spent of it. Pure, no clock.

The promise: over any `window` answers in a row, the sum of their expected accuracy drops is at most `window` times the
budget. An answer is one sample. Its drop is not known, but that of its variant is: the upper end of an interval from
held-out data, for its class where that is known.
"""

from __future__ import annotations

from collections import deque

_ENTRIES = 200
"""The window is stored in about so many pieces."""


class Account:
    """What the newest answers have cost, in the order in which they were given.

    What is in flight is counted at its highest possible cost, and corrected when it is answered. So no order in which
    batches end breaks the promise.

    Args:
        budget: the mean drop that is allowed.
        window: answers that it is the mean of.

    Attributes:
        spent: the sum of the drops of all answers so far.
        answers: so far.
    """

    def __init__(self, budget: float, window: int) -> None:
        self.budget = budget
        self.window = window
        self.spent = 0.0
        self.answers = 0
        self._most = budget * window * (1 + 1e-9)
        self._piece = max(1, window // _ENTRIES)
        self._pieces: deque[list[float]] = deque()
        """Answers, their cost together, and the highest of one of them; the oldest first."""
        self._kept = 0
        self._cost = 0.0
        self._flying = 0
        self._flying_cost = 0.0
        self._flying_most = 0.0

    @property
    def mean(self) -> float:
        """The mean drop of the newest answers: of as many as the window, where there were so many."""
        return self._cost / max(1, min(self._kept, self.window))

    @property
    def share(self) -> float:
        """The share of the window's budget that is spent or in flight, from 0 to 1."""
        return (self._cost + self._flying_cost) / self._most if self._most else 1.0

    def allows(self, answers: int, drop: float, *later: tuple[int, float]) -> bool:
        """Whether so many answers may be given next, each at this cost at most, and others after them.

        Args:
            answers: beside those in flight, in any order with them.
            drop: of each.
            later: answers after all of these, and the cost of each; then others after them.
        """
        # Of more than a window, the first have left when the last come.
        answers = min(answers, self.window)
        cost, begin = answers * drop, self._flying + answers
        spells: list[tuple[int, int, float]] = []
        for more, its_drop in later:
            spells.append((begin, max(0, min(more, self.window - begin)), its_drop))
            begin += spells[-1][1]
        if self._cost + self._flying_cost + cost + sum(more * its_drop for _, more, its_drop in spells) <= self._most:
            return True
        # Old answers leave the window while these come. All are lines with bends: the sum is highest at a bend or where
        # a piece begins or ends to leave.
        coming, new_cost, most = begin, self._flying_cost + cost, max(drop, self._flying_most)
        filled = new_cost / most if most else 0.0
        kept, left, begins = self._kept, self._cost, 0.0

        def new(at: float) -> float:
            after = (min(more, max(0.0, at - begin)) * its_drop for begin, more, its_drop in spells)
            return min(new_cost, at * most) + sum(after)

        for rows, its_cost, its_most in self._pieces:
            kept -= int(rows)
            left -= its_cost
            ends = min(float(coming), max(0.0, self.window - kept))  # new answers after which the piece is outside
            bend = self.window - kept - (its_cost / its_most if its_most else 0.0)
            bends = (bend, filled, *(float(begin) for begin, _, _ in spells))
            for at in (begins, *(min(max(each, begins), ends) for each in bends), ends):
                inside = min(its_cost, max(0.0, self.window - kept - at) * its_most)
                if left + inside + new(at) > self._most:
                    return False
            if ends >= coming:
                return True
            begins = ends
        return left + new(coming) <= self._most

    def affords(self, *spells: tuple[int, float]) -> bool:
        """Whether all of these may be given one after another, after what is in flight.

        Args:
            spells: answers, and the cost of each at most.
        """
        return self.allows(0, 0.0, *spells)

    def begin(self, answers: int, drop: float) -> None:
        """So many are in flight from now on, each at this cost at most."""
        self._flying += answers
        self._flying_cost += answers * drop
        self._flying_most = max(self._flying_most, drop)

    def fail(self, answers: int, drop: float) -> None:
        """What was in flight as `begin` was told will not be answered."""
        self._flying -= answers
        self._flying_cost -= answers * drop
        if not self._flying:
            self._flying_cost = self._flying_most = 0.0  # without the rounding of sums

    def end(self, answers: int, drop: float, cost: float) -> None:
        """What was in flight as `begin` was told is answered.

        Args:
            answers: as told to `begin`.
            drop: likewise.
            cost: the sum of their drops, as it is known by now.
        """
        self.fail(answers, drop)
        self.answers += answers
        self.spent += cost
        pieces = self._pieces
        if pieces and pieces[-1][0] + answers <= self._piece:
            pieces[-1][0] += answers
            pieces[-1][1] += cost
            pieces[-1][2] = max(pieces[-1][2], drop)
        else:
            pieces.append([answers, cost, drop])
        self._kept += answers
        self._cost += cost
        while self._kept - pieces[0][0] >= self.window:
            rows, its_cost, _ = pieces.popleft()
            self._kept -= int(rows)
            self._cost -= its_cost
        if len(pieces) == 1:
            self._cost = pieces[0][1]
