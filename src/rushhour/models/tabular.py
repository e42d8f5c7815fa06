"""A multilayer perceptron for tables: categories by entity embeddings, numbers as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rushhour.models.fields import Fields, check_sizes


def tabular(
    sizes: Sequence[int], outputs: int, dimension: int = 16, hidden: int = 128, depth: int = 3, dropout: float = 0.1
) -> nn.Sequential:
    """Entity embeddings (Guo and Berkhahn, 2016) beside the numbers, then dense layers with ReLU.

    Takes float32 `(n, columns)`: numbers first, then codes of categories, 0 for an unknown one. Gives logits or values
    `(n, outputs)`.

    Args:
        sizes: of each column, its categories and one for unknown ones; 0 for a number.
        outputs: length of the answer.
        dimension: of an embedding.
        hidden: units of each hidden layer.
        depth: hidden layers, 1 or more.
        dropout: after each hidden layer, in training.

    Raises:
        ModelError: if a size is below one.
    """
    check_sizes(
        "the tabular network", outputs=outputs, dimension=dimension, hidden=hidden, depth=depth, dropout=dropout
    )
    entities = _Entities(sizes, dimension)
    layers: list[nn.Module] = [entities]
    before = entities.width
    for _ in range(depth):
        dense = nn.Linear(before, hidden)
        nn.init.kaiming_normal_(dense.weight, nonlinearity="relu")
        nn.init.zeros_(dense.bias)
        layers += [dense, nn.ReLU(), nn.Dropout(dropout)]
        before = hidden
    return nn.Sequential(*layers, nn.Linear(before, outputs))


class _Entities(nn.Module):
    """Samples `(n, columns)` to numbers and embeddings side by side, `(n, width)`."""

    def __init__(self, sizes: Sequence[int], dimension: int) -> None:
        super().__init__()
        self.fields = Fields(sizes)
        self.width = self.fields.numbers + self.fields.categories * dimension
        self.embedding = nn.Embedding(self.fields.rows, dimension) if self.fields.categories else None
        if self.embedding is not None:
            nn.init.normal_(self.embedding.weight, std=0.1)

    def forward(self, samples: Tensor) -> Tensor:
        numbers, rows = self.fields(samples)
        if self.embedding is None:
            plain: Tensor = numbers
            return plain
        found: Tensor = self.embedding(rows).flatten(1)
        return torch.cat([numbers, found], dim=1) if self.fields.numbers else found
