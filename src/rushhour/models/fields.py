"""The columns of a table in torch: numbers as they are, and places in embedding tables for categories."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rushhour.errors import ModelError

HIDDEN_SHARE = 0.02
"""Of the categories, in training: so many are taken as unknown at random, so that the row for unknown ones is trained
on rows of all kinds."""
HIDES = "hides_categories"
"""The attribute of a dropout layer that hides categories: distillation leaves it on."""


def check_sizes(what: str, *, outputs: int, dimension: int, hidden: int, depth: int, dropout: float) -> None:
    """Raise a `ModelError` if a network of these sizes cannot be built; `what` names it."""
    if min(outputs, dimension, hidden, depth) < 1 or not 0 <= dropout < 1:
        raise ModelError(
            f"cannot build {what}",
            f"every size is at least 1 and dropout below 1, but got outputs={outputs}, dimension={dimension}, "
            f"hidden={hidden}, depth={depth}, dropout={dropout}",
            "use other values",
        )


class Fields(nn.Module):
    """Splits samples `(n, columns)` into numbers and the rows of embedding tables that lie one below the other.

    A code that no table has is that of unknown categories, 0. A number that is NaN is 0, which is the mean of numbers
    in units of their deviation.

    Args:
        sizes: of each column, rows of its table, or 0 for a number; numbers first.

    Raises:
        ModelError: if there is no column, or a number behind a category.
    """

    sizes: Tensor
    offsets: Tensor

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        categories = [size for size in sizes if size]
        self.numbers = len(sizes) - len(categories)
        self.categories = len(categories)
        if not sizes or min(sizes) < 0 or any(sizes[: self.numbers]):
            raise ModelError(
                "cannot build a network for these columns",
                f"sizes are rows of an embedding table, or 0 for a number, numbers first, but got {tuple(sizes)[:20]}",
                "use other values",
            )
        self.rows = sum(categories)
        self.hiding = nn.Dropout(HIDDEN_SHARE)
        setattr(self.hiding, HIDES, True)
        begins = torch.tensor([0, *categories]).cumsum(0)[:-1]
        self.register_buffer("sizes", torch.tensor(categories, dtype=torch.float32), persistent=False)
        self.register_buffer("offsets", begins, persistent=False)

    def forward(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers `(n, numbers)`, and rows of the tables, int64 `(n, categories)`."""
        codes = samples[:, self.numbers :]
        known = (codes >= 0) & (codes < self.sizes)
        if self.training:
            known = known & (self.hiding(torch.ones_like(codes)) > 0)
        codes = torch.where(known, codes, torch.zeros_like(codes))
        numbers = samples[:, : self.numbers]
        # it also keeps int8 from giving numbers and codes one scale, in which numbers would have no digits left
        numbers = torch.where(torch.isnan(numbers), torch.zeros_like(numbers), numbers)
        return numbers, codes.to(torch.int64) + self.offsets
