"""A data set: arrays in three parts, a task, and how samples are scaled."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rushhour.bundle import Preprocessing, Signature
from rushhour.data.conversion import to_array
from rushhour.data.inputs import as_taken, ordered
from rushhour.data.marks import MARKS, marks_of
from rushhour.data.targets import of_task
from rushhour.errors import DataError
from rushhour.records import identity
from rushhour.task import Task

_PIXELS: Final = 2**21
"""Of a batch of pictures whose places are answered, at most."""
_FEWEST: Final = 8
_STEPS: Final = 12
"""In an epoch over pictures whose places are answered, at least."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Samples and their targets.

    Attributes:
        inputs: shape `(n, *shape)` as the wire carries them: images are uint8 `(n, height, width, channels)`. Of a
            model with several inputs, a structured array of shape `(n,)` with a field for each, named as they are, in
            the order in which the network takes them.
        targets: labels, int64 of shape `(n,)`; or values, float32 of shape `(n, outputs)`; or, where there are none,
            float32 of shape `(n, 0)`.
        groups: of shape `(n,)`: whose samples belong together, such as those of one person; intervals are wider then.
            None where every sample is by itself.
    """

    inputs: NDArray[Any]
    targets: NDArray[Any]
    groups: NDArray[Any] | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def labelled(self) -> bool:
        """Whether there are targets."""
        return self.targets.shape[1:] != (0,)

    def head(self, n: int) -> Split:
        """The first `n` samples."""
        return Split(self.inputs[:n], self.targets[:n], None if self.groups is None else self.groups[:n])

    def take(self, rows: NDArray[np.intp]) -> Split:
        """These samples, in this order."""
        groups = None if self.groups is None else self.groups[rows]
        return Split(self.inputs[rows], self.targets[rows], groups)

    def sample(self, n: int, *, seed: int = 0) -> Split:
        """`n` samples at random, or all in a random order where there are fewer."""
        return self.take(np.random.default_rng(seed).permutation(len(self))[:n])


class Files(NamedTuple):
    """How many files of a folder were read.

    Attributes:
        total: all files below the folder.
        read: files that are samples now.
        left_out: reason -> how many were left out.
    """

    total: int
    read: int
    left_out: dict[str, int]

    def __str__(self) -> str:
        why = ", ".join(f"{reason} {count:,}" for reason, count in self.left_out.items())
        return f"left out {self.total - self.read:,} of {self.total:,} files: {why}"


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Data with its task.

    Attributes:
        name: short, for reports and bundle names: `fashion-mnist`.
        train: to fit on.
        validation: to decide on: which candidate is inside the accuracy budget.
        test: used once, for the figures of the result.
        fingerprint: SHA-256 over all content, so that results name exactly the data that they were made with.
        notes: how the data was read, for the user, in a line each.
        files: how many files were read, where it is a folder.
    """

    name: str
    task: Task
    train: Split
    validation: Split
    test: Split
    preprocessing: Preprocessing
    fingerprint: str
    notes: tuple[str, ...] = ()
    files: Files | None = None

    def __post_init__(self) -> None:
        for part in ("train", "validation", "test"):
            given: Split = getattr(self, part)
            targets = of_task(self.name, self.task, to_array(f"targets of {self.name}", given.targets))
            split = Split(_readable(self.name, given.inputs), targets, given.groups)
            object.__setattr__(self, part, split)  # frozen for all others
            if len(split) == 0:
                raise DataError(
                    f"the {part} part of {self.name} is empty",
                    "training, validation and test each need samples",
                    "give more data, or another split",
                )
            if len(split.inputs) != len(split.targets):
                raise DataError(
                    f"the {part} part of {self.name} has {len(split.inputs)} samples but {len(split.targets)} targets",
                    "each sample needs exactly one target",
                    "correct the data",
                )
            if split.inputs.shape[1:] != self.train.inputs.shape[1:]:
                raise DataError(
                    f"samples of {self.name} differ in shape",
                    f"{part} has {split.inputs.shape[1:]}, train has {self.train.inputs.shape[1:]}",
                    "give all samples one shape",
                )
            if split.inputs.dtype != self.train.inputs.dtype:
                raise DataError(
                    f"samples of {self.name} differ in their inputs",
                    f"{part} has {split.inputs.dtype}, train has {self.train.inputs.dtype}",
                    "give all samples the same inputs" if split.inputs.dtype.names else "give all samples one type",
                )
            columns = [split.inputs[name] for name in split.inputs.dtype.names or ()] or [split.inputs]
            if not all(np.isfinite(column).all() for column in columns if column.dtype.kind == "f"):
                raise DataError(
                    f"the {part} part of {self.name} holds NaN or infinity",
                    "a model cannot learn from it",
                    "remove or fill those samples",
                )

    @cached_property
    def marks(self) -> str:
        """The smallest hashes of training samples, by which a bundle recognises its training data. See `lineage`."""
        keys = np.unique(marks_of(self.train.inputs))[:MARKS]
        return "".join(f"{key:016x}" for key in keys.tolist())

    @property
    def content_key(self) -> str:
        """Hash of samples, targets and task, in their parts."""
        parts = {part: len(getattr(self, part)) for part in ("train", "validation", "test")}
        return identity.key(fingerprint=self.fingerprint, parts=parts, task=self.task, scaled=self.preprocessing)

    def with_classes(self, task: Task) -> Dataset:
        """The same data for the task of a model: labels become numbers of its classes, values are scaled as it does.

        Args:
            task: of the model. Labels stay as they are unless the model knows all of its classes by name, or says with
                one number which of two classes it is: that of its label, or else the second.
        """
        if task.is_binary and self.task.kind == "classification" and self.task.outputs == 2:
            names = self.task.classes
            positive = names.index(task.classes[0]) if task.classes and task.classes[0] in names else 1
            return self._relabelled(task, lambda labels: (labels == positive).astype(np.float32)[:, None])
        if task.kind == self.task.kind == "regression" and task.outputs == self.task.outputs:
            return dataclasses.replace(self, task=task)
        if task.kind != "classification" or self.task.kind != "classification" or task == self.task:
            return self
        if not set(self.task.classes) <= set(task.classes):
            return self
        numbers = np.array([task.classes.index(name) for name in self.task.classes], np.int64)
        return self._relabelled(task, lambda labels: numbers[labels])

    def with_inputs(self, names: Sequence[str]) -> Dataset:
        """The same data, with the fields of its samples in this order."""
        return self._changed(lambda samples: ordered(samples, names))

    def fitted_to(self, signature: Signature, model: str) -> Dataset:
        """The same data, with samples of several inputs as a model takes them: their order, and types of numbers.

        Args:
            signature: of the model.
            model: its name, for messages.

        Raises:
            DataError: if an input is missing or unknown, or does not fit.
        """
        return self._changed(lambda samples: as_taken(samples, signature, model=model, data=self.name))

    def _changed(self, of_samples: Callable[[NDArray[Any]], NDArray[Any]]) -> Dataset:
        """The same data with other samples; itself where none has changed."""
        parts = (self.train, self.validation, self.test)
        changed = [dataclasses.replace(part, inputs=of_samples(part.inputs)) for part in parts]
        if all(new.inputs is old.inputs for new, old in zip(changed, parts, strict=True)):
            return self
        train, validation, test = changed
        return dataclasses.replace(self, train=train, validation=validation, test=test)

    def _relabelled(self, task: Task, of_labels: Callable[[NDArray[Any]], NDArray[Any]]) -> Dataset:
        """The same data with other targets, where it has any."""

        def changed(part: Split) -> Split:
            return dataclasses.replace(part, targets=of_labels(part.targets)) if part.labelled else part

        train, validation, test = map(changed, (self.train, self.validation, self.test))
        return dataclasses.replace(self, task=task, train=train, validation=validation, test=test)

    def fitting_batch(self, wanted: int) -> int:
        """A size of batches that fits the data, at most `wanted`.

        What a network computes for places in a picture is as large as the picture, so the memory of a step is bounded;
        and every place teaches, so that batches may be small where there are few pictures. Else it is `wanted`.
        """
        if self.task.places is None:
            return wanted
        pixels = math.prod(self.sample_shape[: 1 if self.task.places == "tokens" else 2])
        return min(wanted, max(_FEWEST, _PIXELS // pixels), max(_FEWEST, len(self.train) // _STEPS))

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one sample on the wire; empty where it has several inputs."""
        return tuple(self.train.inputs.shape[1:])

    @property
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each of several inputs on the wire, by name; empty where a sample is one array."""
        kind = self.train.inputs.dtype
        return {name: kind[name].shape for name in kind.names or ()}


def _readable(name: str, inputs: NDArray[Any]) -> NDArray[Any]:
    """Samples as a numeric array in this machine's byte order, which torch reads."""
    array = to_array(f"samples of {name}", inputs)
    columns = [array.dtype[field].base for field in array.dtype.names or ()] or [array.dtype]
    if not all(column.kind in "biuf" for column in columns):
        raise DataError(f"samples of {name} are {array.dtype}", "a model takes numbers", "convert them")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
