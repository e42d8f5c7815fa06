"""The loss of a training, by task."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from rushhour.errors import TaskError
from rushhour.task import LossName, Scaling, Task

Loss = Callable[[Tensor, Tensor], Tensor]
"""Network outputs `(n, outputs)` in any precision and targets -> the loss in float32: a scalar, `(n,)` for `none`."""

Reduction = Literal["mean", "sum", "none"]


def loss_for(task: Task, reduction: Reduction = "mean") -> Loss:
    """Of the network's logits or values, before the task's head.

    Cross-entropy against int64 labels `(n,)`; the mean of binary cross-entropy over the outputs against 0 and 1; mean
    squared error against values `(n, outputs)`, in units of their standard deviation where the task has it; or the
    task's own.

    Args:
        task: decides which.
        reduction: over samples. Parts of a batch, on any workers, take `sum` and divide by the whole batch: their
            gradients then add up to those of the whole batch, however it is divided.
    """
    loss = task.loss
    if callable(loss):
        return lambda outputs, targets: _reduced(_checked(loss(outputs.float(), targets), task, outputs), reduction)
    scaling = task.scaling if isinstance(task.scaling, Scaling) else None
    losses: dict[LossName, Callable[[Tensor, Tensor, Reduction], Tensor]] = {
        "cross-entropy": _cross_entropy,
        "binary cross-entropy": _binary_cross_entropy,
        "squared error": partial(_squared_error, scaling),
    }
    by_name = losses[loss]
    return lambda outputs, targets: by_name(outputs, targets, reduction)


def _checked(losses: object, task: Task, outputs: Tensor) -> Tensor:
    """What a user's own loss gave, if it is a number for each sample."""
    if not isinstance(losses, Tensor) or losses.shape != outputs.shape[:1]:
        given = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise TaskError(
            f"the loss of {task.kind} gives {given}",
            f"it must give one number for each of {len(outputs)} samples",
            "reduce over all dimensions but the first",
        )
    return losses


def _cross_entropy(logits: Tensor, labels: Tensor, reduction: Reduction) -> Tensor:
    return functional.cross_entropy(logits.float(), labels, reduction=reduction)


def _binary_cross_entropy(logits: Tensor, labels: Tensor, reduction: Reduction) -> Tensor:
    wanted = labels.float().reshape(logits.shape)
    of_labels = functional.binary_cross_entropy_with_logits(logits.float(), wanted, reduction="none")
    return _reduced(of_labels.flatten(1).mean(dim=1), reduction)


def _squared_error(scaling: Scaling | None, outputs: Tensor, values: Tensor, reduction: Reduction) -> Tensor:
    # a missing last dimension would broadcast (n,) against (n, 1) to (n, n)
    of_values = functional.mse_loss(outputs.float(), values.float().reshape(outputs.shape), reduction="none")
    if scaling is not None:
        of_values = of_values / torch.tensor(scaling.std) ** 2
    return _reduced(of_values.flatten(1).mean(dim=1), reduction)


def _reduced(losses: Tensor, reduction: Reduction) -> Tensor:
    """Of the loss of each sample."""
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()
