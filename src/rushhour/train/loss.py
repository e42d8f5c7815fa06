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
from rushhour.train.spatial_loss import (
    cross_entropy_per_pixel,
    cross_entropy_per_token,
    focal_and_distance,
    imitated_boxes,
    imitated_map,
    imitated_tags,
)

Loss = Callable[[Tensor, Tensor], Tensor]
"""Network outputs in any precision and targets -> the loss in float32: a scalar, `(n,)` for `none`."""

Reduction = Literal["mean", "sum", "none"]


def loss_for(task: Task, reduction: Reduction = "mean") -> Loss:
    """Of the network's logits or values, before the task's head.

    Cross-entropy against int64 labels `(n,)`; the mean of binary cross-entropy over the outputs against 0 and 1; mean
    squared error against values `(n, outputs)`, in units of their standard deviation where the task has it; of places
    in a picture as `rushhour.train.spatial_loss` says; or the task's own.

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
        "cross-entropy per pixel": partial(_by_sample, cross_entropy_per_pixel),
        "cross-entropy per token": partial(_by_sample, cross_entropy_per_token),
        "focal and distance": partial(_by_sample, focal_and_distance),
    }
    by_name = losses[loss]
    return lambda outputs, targets: by_name(outputs, targets, reduction)


def imitation_for(task: Task, heat: float) -> Loss:
    """Of a student's numbers and its teacher's: a mean over samples.

    Args:
        task: decides what is compared: classes, chances, values, or what is said of each place of a picture.
        heat: the temperature that logits of both are divided by. Gradients shrink with its square, which is made up.
    """
    if task.head == "tags":
        return lambda student, teacher: imitated_tags(student, teacher, heat).mean()
    if task.head == "class map":
        return lambda student, teacher: imitated_map(student, teacher, heat).mean()
    if task.head == "boxes":
        return lambda student, teacher: imitated_boxes(student, teacher).mean()
    if task.head == "sigmoid":
        return lambda student, teacher: (
            functional.binary_cross_entropy_with_logits(student / heat, (teacher / heat).sigmoid()) * heat**2
        )
    if task.head != "softmax":
        return loss_for(task) if task.loss == "squared error" else functional.mse_loss

    def divergence(student: Tensor, teacher: Tensor) -> Tensor:
        ours, theirs = (functional.log_softmax(each / heat, dim=1) for each in (student, teacher))
        return functional.kl_div(ours, theirs, reduction="batchmean", log_target=True) * heat**2

    return divergence


def _by_sample(loss: Loss, outputs: Tensor, targets: Tensor, reduction: Reduction) -> Tensor:
    return _reduced(loss(outputs, targets), reduction)


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
