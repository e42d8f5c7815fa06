"""A network of your own: `rushhour train storm_net:network --data storms ...`.

How a storm moved until now says most of where it goes, and a straight line says most of that. So a linear model
answers, which begins at zero, and two dense layers say what it leaves.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

HIDDEN = 128


def network(input: tuple[int, ...], outputs: int) -> nn.Module:
    """Takes float32 `(n, *input)`, gives values `(n, outputs)`."""
    return Forecast(math.prod(input), outputs)


class Forecast(nn.Module):
    """A linear model, and a network for what it leaves."""

    def __init__(self, columns: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(columns, outputs)
        nn.init.zeros_(self.linear.weight)
        self.rest = nn.Sequential(
            nn.Linear(columns, HIDDEN),
            nn.SiLU(),
            nn.Dropout(0.2),
            nn.Linear(HIDDEN, HIDDEN),
            nn.SiLU(),
            nn.Dropout(0.2),
            nn.Linear(HIDDEN, outputs),
        )

    def forward(self, samples: Tensor) -> Tensor:
        line: Tensor = self.linear(samples)
        return line + self.rest(samples)
