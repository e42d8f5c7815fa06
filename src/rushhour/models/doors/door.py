"""`Door`: recognises what people bring, by what it holds, and makes an ONNX graph of it that gives the same answers.

A door for another format is one class in one file, and one line in `rushhour.models.doors.finding`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import onnx
from numpy.typing import NDArray

from rushhour.bundle import OpenDimension, Preprocessing
from rushhour.errors import ModelError
from rushhour.task import Task

Answers = Callable[[Mapping[str, NDArray[Any]]], tuple[NDArray[Any], ...]]
"""What the original answers: an array `(n, *shape)` for each input of the graph, by name -> an array `(n, ...)` for
each of its outputs, in their order."""


@dataclasses.dataclass(frozen=True)
class Opening:
    """What a door may use besides the model itself: what the user said, and what the data says.

    Attributes:
        name: of the model.
        shown: names it in messages: its path, or what kind of object it is.
        trusted: whether the user allows its own code to run; always of an object, whose code runs already.
        example: a few samples as the network takes them, `(k, *shape)`, where the door needs them; of several inputs a
            structured array with a field for each.
        outputs: length of one answer, where that is known.
        size: height and width, for a network that takes pictures of any.
        length: tokens of every text, for a network that takes any number; None leaves it open where that is possible.
        python: an interpreter with packages that are not installed here: `--tensorflow-python`.
    """

    name: str
    shown: str
    trusted: bool = False
    example: NDArray[Any] | None = None
    outputs: int | None = None
    size: tuple[int, int] | None = None
    length: int | None = None
    python: Path | None = None

    def require_trust(self, why: str) -> None:
        """Raise unless the model's own code may run. Called before anything of it is read that could run.

        Args:
            why: it would run: `it is a pickle, and reading one runs code`.

        Raises:
            ModelError: naming the option that allows it.
        """
        if not self.trusted:
            raise ModelError(f"will not open {self.shown}", why, f"if you trust it, use --trust {self.shown}")


@dataclasses.dataclass(frozen=True, eq=False)
class Arrival:
    """A model as it came through a door.

    Attributes:
        format: a word for the lineage: `onnx`, `keras`.
        origin: what it was, for people: `Keras 3.15.1, 12 layers`; empty where the graph says it itself.
        graph: as of `read_onnx` or `checked_onnx`: checked, with its weights. Its first dimension is free.
        answers: of the original; None where the graph is the original. Called with batches of 1, 3 and 8.
        tolerance: of differences between the two, as a share of the largest answer; see `graph_answers.gap`.
        limits: input of whole numbers -> one more than the largest that it may hold.
        dimensions: the open ones besides the batch; None takes all that have no number in the graph.
        samples: a few of its first input, `(k, *shape)`, where the door can make them.
        tokenizer: a `tokenizer.json`, which makes its first input of texts.
        task: what it is for, where the model says it.
        task_from: how that is known.
        preprocessing: of samples on the wire, where the model says it.
        preprocessing_from: how that is known.
        notes: what was joined, folded, left out or changed, for people.
    """

    format: str
    graph: onnx.ModelProto
    origin: str = ""
    answers: Answers | None = None
    tolerance: float = 1e-3
    limits: Mapping[str, int] = dataclasses.field(default_factory=dict)
    dimensions: tuple[OpenDimension, ...] | None = None
    samples: NDArray[Any] | None = None
    tokenizer: bytes | None = None
    task: Task | None = None
    task_from: str = ""
    preprocessing: Preprocessing | None = None
    preprocessing_from: str = ""
    notes: tuple[str, ...] = ()


class Door(Protocol):
    """One kind of model. It has no state; packages of an extra are imported in `open` only, after `require`."""

    @property
    def takes(self) -> str:
        """What it takes, for people: `an ONNX file`."""

    @property
    def needs_example(self) -> bool:
        """Whether it has to see samples: the model does not say what it takes."""

    def recognises(self, model: Any) -> bool:
        """Whether a model is one of its kind. Reads little, runs nothing of it, imports no optional package.

        Args:
            model: the path of a file or folder that exists, or an object of any type.
        """

    def open(self, model: Any, opening: Opening) -> Arrival:
        """The model as an ONNX graph.

        Args:
            model: that it recognised.
            opening: what else is known.

        Raises:
            InstallError: if a package is missing, naming the extra that has it.
            ModelError: if it is damaged, not trusted, or cannot be exported; nothing was written then.
        """
