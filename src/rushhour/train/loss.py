"""What training makes small, by task."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from rushhour.task import Task

Loss = Callable[[Tensor, Tensor], Tensor]
"""Network outputs `(n, outputs)` in any precision and targets -> the mean loss, a float32 scalar."""


def loss_for(task: Task) -> Loss:
    """Cross-entropy on logits against int64 labels `(n,)`; mean squared error against values `(n, outputs)`."""
    return _cross_entropy if task.kind == "classification" else _squared_error


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float(), labels)


def _squared_error(outputs: Tensor, values: Tensor) -> Tensor:
    # a missing last dimension would broadcast (n,) against (n, 1) to (n, n) and train on nonsense
    return functional.mse_loss(outputs.float(), values.float().reshape(outputs.shape))
