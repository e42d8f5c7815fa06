"""The loss of a training, by task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor
from torch.nn import functional

from rushhour.task import Task

Loss = Callable[[Tensor, Tensor], Tensor]
"""Network outputs `(n, outputs)` in any precision and targets -> the loss in float32: a scalar, `(n,)` for `none`."""

Reduction = Literal["mean", "sum", "none"]


def loss_for(task: Task, reduction: Reduction = "mean") -> Loss:
    """Cross-entropy on logits against int64 labels `(n,)`; mean squared error against values `(n, outputs)`.

    Args:
        task: decides which.
        reduction: over samples. Parts of a batch, on any workers, take `sum` and divide by the whole batch: their
            gradients then add up to those of the whole batch, however it is divided.
    """
    loss = _cross_entropy if task.kind == "classification" else _squared_error
    return lambda outputs, targets: loss(outputs, targets, reduction)


def _cross_entropy(logits: Tensor, labels: Tensor, reduction: Reduction) -> Tensor:
    return functional.cross_entropy(logits.float(), labels, reduction=reduction)


def _squared_error(outputs: Tensor, values: Tensor, reduction: Reduction) -> Tensor:
    # a missing last dimension would broadcast (n,) against (n, 1) to (n, n)
    of_values = functional.mse_loss(outputs.float(), values.float().reshape(outputs.shape), reduction="none")
    of_samples = of_values.flatten(1).mean(dim=1)
    if reduction == "none":
        return of_samples
    return of_samples.mean() if reduction == "mean" else of_samples.sum()
