"""DeepFM: what pairs of columns say together, and a perceptron over the same embeddings, for recommendation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rushhour.models.fields import Fields, check_sizes


def deepfm(
    sizes: Sequence[int], outputs: int, dimension: int = 8, hidden: int = 64, depth: int = 2, dropout: float = 0.3
) -> nn.Module:
    """A factorisation machine and a deep network that share their embeddings (Guo et al., 2017).

    Takes float32 `(n, columns)`: numbers first, then codes of categories, 0 for an unknown one. Gives logits or values
    `(n, outputs)`. A number's embedding is a vector times the number, as in factorisation machines (Rendle, 2010).

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
    check_sizes("the network deepfm", outputs=outputs, dimension=dimension, hidden=hidden, depth=depth, dropout=dropout)
    return _DeepFM(sizes, outputs, dimension, hidden, depth, dropout)


class _DeepFM(nn.Module):
    def __init__(
        self, sizes: Sequence[int], outputs: int, dimension: int, hidden: int, depth: int, dropout: float
    ) -> None:
        super().__init__()
        self.fields = fields = Fields(sizes)
        self.embedding = nn.Embedding(fields.rows, dimension) if fields.categories else None
        self.single = nn.Embedding(fields.rows, outputs) if fields.categories else None
        self.factors = nn.Parameter(torch.randn(fields.numbers, dimension) * 0.1) if fields.numbers else None
        self.linear = nn.Linear(fields.numbers, outputs) if fields.numbers else None
        self.pairs = nn.Linear(dimension, outputs)
        if self.embedding is not None and self.single is not None:
            nn.init.normal_(self.embedding.weight, std=0.1)
            nn.init.zeros_(self.single.weight)
        layers: list[nn.Module] = []
        before = len(sizes) * dimension
        for _ in range(depth):
            dense = nn.Linear(before, hidden)
            nn.init.kaiming_normal_(dense.weight, nonlinearity="relu")
            nn.init.zeros_(dense.bias)
            layers += [dense, nn.ReLU(), nn.Dropout(dropout)]
            before = hidden
        self.deep = nn.Sequential(*layers, nn.Linear(before, outputs))

    def forward(self, samples: Tensor) -> Tensor:
        numbers, rows = self.fields(samples)
        vectors = []
        singles = []
        if self.linear is not None and self.factors is not None:
            vectors.append(numbers.unsqueeze(2) * self.factors)
            singles.append(self.linear(numbers))
        if self.embedding is not None and self.single is not None:
            vectors.append(self.embedding(rows))
            singles.append(self.single(rows).sum(dim=1))
        found = torch.cat(vectors, dim=1) if len(vectors) > 1 else vectors[0]
        total = found.sum(dim=1)
        # the sum over all pairs of columns, in linear time (Rendle, 2010); a weight for each dimension and output
        pairs = 0.5 * (total * total - (found * found).sum(dim=1))
        answer: Tensor = sum(singles) + self.pairs(pairs) + self.deep(found.flatten(1))
        return answer
