"""The seam for tasks: what training, compression, tuning and serving need to know of one.

The kinds that come with Rushhour are in `kinds.py`. A user's own is a class that is named `module:Class`; it has what
`Kind` has, is created with the number of outputs and the names of the classes, and has a static method
`outputs_of(targets)`: how many numbers a network answers with. `rushhour.testing.kinds` checks it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from rushhour.errors import TaskError

Head = Literal["softmax", "sigmoid", "none", "class map", "boxes", "tags"]
"""What turns a network's numbers into answers."""
LossName = Literal[
    "cross-entropy",
    "binary cross-entropy",
    "squared error",
    "cross-entropy per pixel",
    "cross-entropy per token",
    "focal and distance",
]
Places = Literal["map", "boxes", "tokens"]
"""What an answer says about places: a label for each pixel of its picture, or boxes in it; or a label for each token of
its sequence."""


@runtime_checkable
class Kind(Protocol):
    """What a model is for.

    Every metric is a mean, or a function of means, over samples: `reduce(statistics(outputs, targets))`. So one paired
    bootstrap over samples, or over groups of them, gives an interval to every metric.

    Attributes:
        metric: its name; higher is better.
        agreement: the name of the same metric where another model's answers are the targets.
        output: the name of the answer on the wire.
        head: what follows the network. It is a part of the served graph, and no part of the loss.
        loss: by name, or a function of torch: `(outputs, targets)`, logits `(n, outputs)` and targets of n samples ->
            the loss of each, `(n,)`.
        is_share: whether the metric is the share of samples that are right: `statistics` has one column of 0 and 1.
    """

    metric: str
    agreement: str
    output: str
    head: Head
    loss: LossName | Callable[[Any, Any], Any]
    is_share: bool

    def why_wrong(self, targets: NDArray[Any]) -> str:
        """Why these cannot be targets of the task; empty where they can be.

        Args:
            targets: shape `(n, ...)`.
        """
        ...

    def statistics(self, outputs: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.float64]:
        """What the metric is computed from, by sample: shape `(n, k)`.

        Args:
            outputs: answers, shape `(n, outputs)`.
            targets: shape `(n, ...)`.
        """
        ...

    def reduce(self, statistics: NDArray[np.float64]) -> float:
        """The metric of these samples.

        Args:
            statistics: some rows of what `statistics` gave, with repetitions.
        """
        ...

    def as_targets(self, outputs: NDArray[Any]) -> NDArray[Any]:
        """Another model's answers `(n, outputs)` in place of targets, where there are no labels."""
        ...


@runtime_checkable
class Spatial(Kind, Protocol):
    """A kind whose answers are about places in the picture or the sequence: their size depends on its size.

    Attributes:
        places: what is said about them. Targets and answers are moved with the picture: by augmentation in training,
            and in serving to the size that a picture had before it was brought to the model's.
        dtype: of the answers.
        network: the reference network for it, by name.
    """

    places: Places
    network: str
    dtype: Literal["uint8", "float32"]

    def raw_shape(self, sample: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what a network gives for one sample, before the head.

        Args:
            sample: shape of a picture on the wire, `(height, width, channels)`; of a sequence `(length,)` or
                `(length, features)`.
        """
        ...

    def answer_shape(self, sample: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the answer to one sample; else as `raw_shape`."""
        ...


Maker = Callable[[int, tuple[str, ...]], Kind]
"""Makes a kind for so many outputs, with these names of classes."""
_OWN: dict[str, Maker] = {}


def register(name: str, maker: Maker) -> None:
    """Make a user's own kind known under this name, in this process.

    Args:
        name: `module:Class`.
        maker: of the kind, as a rule that class.
    """
    _OWN[name] = maker


def own_maker(name: str) -> Maker:
    """What makes a user's own kind.

    Raises:
        TaskError: if it was not registered.
    """
    if name not in _OWN:
        raise TaskError(
            f"the task {name!r} is not known",
            "it is a class of a user, and importing it would run its code",
            f"if you trust it, use --trust {name}",
        )
    return _OWN[name]


def load_kind(name: str) -> None:
    """Import a user's own kind, `module:Class`, and register it. This runs its code: only the user may name it.

    Raises:
        TaskError: if it cannot be imported, or is no kind.
    """
    module_name, _, attribute = name.partition(":")
    try:
        maker = getattr(importlib.import_module(module_name), attribute, None)
    except (Exception, SystemExit) as error:  # a module can fail to import in any way
        raise TaskError(
            f"cannot import the task {name!r}",
            f"{type(error).__name__}: {error}",
            "check the name, and that its folder is on PYTHONPATH",
        ) from error
    if not callable(maker):
        raise TaskError(f"there is no task {name!r}", f"{module_name} has no class {attribute}", "check its name")
    register(name, maker)


def outputs_of(name: str, targets: NDArray[Any]) -> int:
    """How many outputs a user's own kind asks for.

    Args:
        name: `module:Class`.
        targets: of all training samples.

    Raises:
        TaskError: if it is not registered, or does not say.
    """
    of_targets = getattr(own_maker(name), "outputs_of", None)
    found = of_targets(targets) if callable(of_targets) else None
    if not isinstance(found, int) or found < 1:
        raise TaskError(
            f"the task {name!r} does not say how many outputs a network has",
            "its static method outputs_of(targets) is missing, or gives no whole number above 0",
            "add `@staticmethod def outputs_of(targets): return ...`",
        )
    return found


def ensure_kind(name: str, trusted: tuple[str, ...]) -> None:
    """Register a user's own kind that a bundle names, if its user trusts it; nothing for the kinds of Rushhour.

    Raises:
        TaskError: as `load_kind`.
    """
    if ":" in name and name not in _OWN and name in trusted:
        load_kind(name)


def why_labels_are_wrong(labels: NDArray[Any], classes: int, left_out: int, places: str) -> str:
    """Why the labels of places cannot be learnt, as `Kind.why_wrong`; empty where they can.

    Args:
        labels: whole numbers of any shape.
        classes: their number.
        left_out: the label of places that do not count.
        places: what they are, for the message: `pixels`.
    """
    known = labels[labels != left_out]
    if not known.size:
        return f"all {places} have the label {left_out}, which does not count"
    if known.min() >= 0 and known.max() < classes:
        return ""
    return (
        f"there are {classes} classes, so a label is 0..{classes - 1}, or {left_out} for {places} that do not count, "
        f"but the labels run from {known.min()} to {known.max()}"
    )
