"""A network of your own: `rushhour train splice_net:network --data splice.npz`.

Where a letter stands decides here, so there are no convolutions. Half of the letters of each sequence are hidden in
every step of training, because 2,566 sequences are few: without it a network knows them by heart.
"""

from __future__ import annotations

import math

from torch import nn

HIDDEN = 64


def network(input: tuple[int, ...], classes: int) -> nn.Module:
    """Takes float32 `(n, *input)`, gives logits `(n, classes)`."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(math.prod(input), HIDDEN),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(HIDDEN, classes),
    )
