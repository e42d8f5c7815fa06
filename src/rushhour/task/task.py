"""`Task`: what a model is for, as a bundle says it."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from rushhour.errors import TaskError
from rushhour.measurement import Interval, Number
from rushhour.task.intervals import bootstrap, paired_proportions, wilson
from rushhour.task.kind import Head, Kind, LossName, Maker, Places, Spatial, own_maker
from rushhour.task.kinds import BUILT_IN

_OWN: Final = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", re.ASCII)
"""The name of a user's own kind: `module:Class`."""


class Scaling(msgspec.Struct, frozen=True):
    """Means and standard deviations by column: of a regression's targets, one number for each output.

    A network answers in units of `std` from `mean`, and the served graph gives values: so prices in thousands are
    learnt as well as shares.
    """

    mean: tuple[Number, ...]
    std: tuple[Annotated[float, msgspec.Meta(gt=0, le=1e30)], ...]

    @classmethod
    def of(cls, targets: NDArray[Any]) -> Scaling:
        """That of targets `(n, outputs)`, in the digits that float32 has; 1 for the std of what never varies.

        What varies less than float32 can tell counts as never: divided by so little, its rounding would fill the scale.
        """
        values = np.asarray(targets, np.float64)
        with np.errstate(invalid="ignore", over="ignore"):  # whoever takes the values refuses what is no number
            means, spreads = values.mean(axis=0), values.std(axis=0)
        spreads = np.where(spreads > 1e-7 * np.maximum(np.abs(means), 1e-7), spreads, 1.0)
        mean, std = (tuple(float(f"{value:.8g}") for value in column) for column in (means, spreads))
        return cls(mean, std)


class Task(msgspec.Struct, frozen=True):
    """What a model is for.

    Attributes:
        kind: `classification` (one label of `classes`; accuracy), `multilabel` (each of `classes` by itself; accuracy
            of one, F1 of several), `ranking` (a score; AUC), `regression` (`outputs` numbers; R²), `embedding` (a
            direction in space; cosine), `segmentation` (a class for each pixel; mean IoU), `detection` (boxes; AP50),
            `tagging` (a class for each token; accuracy or F1), or a user's own, `module:Class`: see `Kind`.
        classes: the labels' names, in the order of the output; else empty.
        outputs: the length of one answer: the number of classes, of regressed values, or of dimensions. Of answers
            about places, the number of classes.
        scaling: of a regression whose network answers in units of its own; unset where it gives values itself.
        temperature: of a classification that was calibrated: the served graph divides the logits by it before the
            softmax, so that probabilities agree with shares of right answers (Guo et al., 2017); unset where not.
    """

    kind: str
    classes: tuple[str, ...] = ()
    outputs: int = 1
    scaling: Scaling | msgspec.UnsetType = msgspec.UNSET
    temperature: Annotated[float, msgspec.Meta(gt=0, le=1e6)] | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        if self.kind not in BUILT_IN and not _OWN.fullmatch(self.kind):
            raise ValueError(f"`kind` {self.kind[:80]!r} is none of {', '.join(BUILT_IN)}, nor a module:Class")
        if isinstance(self.scaling, Scaling) and {len(self.scaling.mean), len(self.scaling.std)} != {self.outputs}:
            raise ValueError(f"`scaling` needs one mean and one std for each of {self.outputs} outputs")
        if self.temperature is not msgspec.UNSET and self.kind != "classification":
            raise ValueError(f"`temperature` is of a classification, not of {self.kind[:80]}")

    @classmethod
    def classification(cls, classes: tuple[str, ...]) -> Task:
        """A task with one right label among `classes`.

        Raises:
            TaskError: if there are fewer than two classes.
        """
        if len(classes) < 2:
            raise TaskError(
                f"cannot classify into {len(classes)} class{'' if len(classes) == 1 else 'es'}",
                "a classification needs at least two classes",
                "add data of another class",
            )
        return cls(kind="classification", classes=classes, outputs=len(classes))

    @classmethod
    def multilabel(cls, classes: tuple[str, ...]) -> Task:
        """A task in which each of `classes`, one or more, holds or not."""
        return cls(kind="multilabel", classes=classes, outputs=len(classes))

    @property
    def behaviour(self) -> Kind:
        """What its kind knows.

        Raises:
            TaskError: if the kind is a user's own, and was not registered.
        """
        maker = BUILT_IN.get(self.kind) or own_maker(self.kind)
        return _made(maker, self.outputs, self.classes)

    @property
    def metric(self) -> str:
        """The metric's name; higher is better."""
        return self.behaviour.metric

    @property
    def fidelity_metric(self) -> str:
        """The name of the metric of `fidelity`; higher is better."""
        return self.behaviour.agreement

    @property
    def output_name(self) -> str:
        """The name of the model's output on the wire."""
        return self.behaviour.output

    @property
    def head(self) -> Head:
        """What turns a network's numbers into answers."""
        return self.behaviour.head

    @property
    def loss(self) -> LossName | Callable[[Any, Any], Any]:
        """The loss, by name or as a function; see `Kind`."""
        return self.behaviour.loss

    @property
    def is_share(self) -> bool:
        """Whether the metric is the share of samples that are right."""
        return self.behaviour.is_share

    @property
    def spatial(self) -> Spatial | None:
        """What its kind knows, if answers are about places in the picture or the sequence."""
        kind = self.behaviour
        return kind if isinstance(kind, Spatial) else None

    @property
    def places(self) -> Places | None:
        """What its answers say about places in the sample; None where they are about the whole of it."""
        spatial = self.spatial
        return None if spatial is None else spatial.places

    def answer_shape(self, sample: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the answer to one sample, whose shape on the wire is `sample`."""
        spatial = self.spatial
        return (self.outputs,) if spatial is None else spatial.answer_shape(sample)

    def raw_shape(self, sample: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what a network gives for one sample, before the head."""
        spatial = self.spatial
        return (self.outputs,) if spatial is None else spatial.raw_shape(sample)

    @property
    def unscaled(self) -> Task:
        """The same task, for a network that gives values itself."""
        return msgspec.structs.replace(self, scaling=msgspec.UNSET)

    @property
    def uncalibrated(self) -> Task:
        """The same task, with probabilities as the network gives them."""
        return msgspec.structs.replace(self, temperature=msgspec.UNSET)

    @property
    def is_binary(self) -> bool:
        """Whether one number says which of two classes it is."""
        return self.kind == "multilabel" and self.outputs == 1

    def check_output(self, shape: tuple[int, ...], model: str, sample: tuple[int, ...] = ()) -> None:
        """Raise unless a model whose answer to one sample has `shape` fits this task.

        Args:
            shape: without the batch dimension.
            model: its name, for the message.
            sample: shape of the sample on the wire; needed where answers are about places in it.

        Raises:
            TaskError: if it does not fit.
        """
        spatial = self.spatial
        if spatial is not None:
            of_what = "a sequence" if spatial.places == "tokens" else "a picture"
            fits = len(sample) in (1, 2) if spatial.places == "tokens" else len(sample) == 3
            if fits and shape == spatial.answer_shape(sample):
                return
            raise TaskError(
                f"the output of {model} does not fit the task",
                f"{self.kind} of {self.outputs} classes in a sample of shape {sample} needs answers of shape "
                f"{spatial.answer_shape(sample) if fits else f'({of_what})'}, but they have {shape}",
                f"use a network for {self.kind}, such as {spatial.network}, or give the data it was made for",
            )
        if shape != (self.outputs,):
            wanted = f"{self.outputs} {'classes' if self.kind == 'classification' else 'values'}"
            raise TaskError(
                f"the output of {model} does not fit the task",
                f"the task has {wanted}, so one answer must have shape ({self.outputs},), but it has {shape}",
                f"change the model's last layer to {self.outputs} outputs, or give the data it was made for",
            )

    def why_wrong(self, targets: NDArray[Any]) -> str:
        """Why these targets do not fit; empty where they do."""
        return self.behaviour.why_wrong(targets)

    def evaluate(
        self, outputs: NDArray[Any], targets: NDArray[Any], groups: NDArray[Any] | None = None
    ) -> tuple[float, Interval]:
        """The metric and its 95% interval.

        Wilson's interval for shares of independent samples, else a bootstrap.

        Args:
            outputs: shape `(n, outputs)`.
            targets: as in `Kind`.
            groups: shape `(n,)`: whose samples are not independent; see `bootstrap`.
        """
        kind = self.behaviour
        found = kind.statistics(outputs, targets)
        value = kind.reduce(found)
        if kind.is_share and groups is None:
            return value, wilson(int(found.sum()), len(found))
        return value, bootstrap(lambda rows: kind.reduce(found[rows]), len(found), groups)

    def compare(
        self,
        reference: NDArray[Any],
        candidate: NDArray[Any],
        targets: NDArray[Any],
        groups: NDArray[Any] | None = None,
    ) -> tuple[float, Interval]:
        """The drop of `candidate` below `reference` on the same samples, and its paired 95% interval.

        In closed form for shares of independent samples, see `paired_proportions`, else a paired bootstrap.

        Args:
            reference: outputs of the reference model, shape `(n, outputs)`.
            candidate: outputs of the candidate, same shape and samples.
            targets: as in `Kind`.
            groups: as in `evaluate`.
        """
        kind = self.behaviour
        before, after = kind.statistics(reference, targets), kind.statistics(candidate, targets)
        if kind.is_share and groups is None:
            return paired_proportions(before[:, 0] > 0, after[:, 0] > 0)

        def drop(rows: NDArray[np.intp]) -> float:
            return kind.reduce(before[rows]) - kind.reduce(after[rows])

        return drop(np.arange(len(before))), bootstrap(drop, len(before), groups)

    def fidelity(self, reference: NDArray[Any], candidate: NDArray[Any]) -> tuple[float, Interval]:
        """The agreement of `candidate` with `reference`, and its 95% interval: 1 where nothing changed.

        For data without labels: the metric with the reference's answers as the targets.

        Args:
            reference: outputs of the reference model, shape `(n, outputs)`.
            candidate: outputs of the candidate, same shape and samples.
        """
        return self.evaluate(candidate, self.behaviour.as_targets(reference))

    def read(self, output: NDArray[Any]) -> Mapping[str, float]:
        """One answer by name: label -> probability, most likely first; or the values by position.

        Args:
            output: shape `(outputs,)`.
        """
        if self.classes:
            return {self.classes[index]: float(output[index]) for index in np.argsort(-output)}
        return {str(index): float(value) for index, value in enumerate(output)}


@functools.lru_cache(maxsize=64)
def _made(maker: Maker, outputs: int, classes: tuple[str, ...]) -> Kind:
    return maker(outputs, classes)
