"""A Keras model on torch becomes an ONNX graph, and answers as `model.predict` does."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rushhour.errors import ModelError
from rushhour.models.converted import checked_onnx
from rushhour.models.deployed import exported_graph
from rushhour.models.doors.door import Answers, Opening
from rushhour.models.doors.keras.whole_layers import whole_layers

Inputs = dict[str, tuple[str, tuple[int, ...]]]
"""Of each input, by the name that it gets: the type, and the shape of one sample."""


class _Inference(nn.Module):
    """A model as it answers: layers of Keras do not listen to `eval()`, but to `training`."""

    def __init__(self, keras: Any, model: Any) -> None:
        super().__init__()
        self._tree, self.model = keras.tree, model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """A tensor for each output, in Keras' order."""
        given = _structured(self._tree, self.model, list(inputs))
        with _FirstNames():
            return tuple(self._tree.flatten(self.model(given, training=False)))


class _FirstNames(TorchFunctionMode):
    """Arithmetic by torch's first names for it: the exporter does not promote whole numbers for their aliases."""

    _NAMES: ClassVar = {torch.multiply: torch.mul, torch.subtract: torch.sub, torch.divide: torch.div}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As the function, by its first name."""
        return self._NAMES.get(func, func)(*args, **(kwargs or {}))


def inputs_of(keras: Any, model: Any, opening: Opening) -> Inputs:
    """What a model takes; one that was not built yet is built.

    Raises:
        ModelError: if it does not say, and nothing else does.
    """
    if getattr(model, "inputs", None) is None:
        _build(keras, model, opening)
    inputs = getattr(model, "inputs", None)
    if inputs is None:  # a class of the user's own
        assert opening.example is not None
        return {"input": (opening.example.dtype.name, opening.example.shape[1:])}
    found: Inputs = {}
    for at, each in enumerate(inputs):
        name = "input" if len(inputs) == 1 else str(getattr(each, "name", "") or f"input_{at}").partition(":")[0]
        _, *shape = each.shape
        if len(shape) == 3 and opening.size is not None:
            sides = iter(opening.size)
            shape = [next(sides, size) if size is None else size for size in shape]
        if len(shape) in (1, 2) and shape[0] is None and opening.length is not None:
            shape[0] = opening.length
        if any(size is None for size in shape):
            sizes = ", ".join("?" if size is None else str(size) for size in shape)
            fix = "give --size HEIGHTxWIDTH" if len(shape) == 3 else "give --length, or save it with a fixed shape"
            raise ModelError(f"cannot import {opening.shown}", f"its input takes samples of any size: ({sizes})", fix)
        found[name] = (str(each.dtype), tuple(int(size) for size in shape))
    return found


def graph_of(keras: Any, model: Any, inputs: Inputs, opening: Opening) -> onnx.ModelProto:
    """The graph of a model on torch, checked, with a free batch and batch normalisations as they are.

    Raises:
        ModelError: if it cannot be exported.
    """
    example = tuple(torch.zeros((2, *shape), dtype=getattr(torch, dtype)) for dtype, shape in inputs.values())
    count = len(keras.tree.flatten(model.outputs)) if getattr(model, "inputs", None) is not None else 1
    names = ["output"] if count == 1 else [f"output_{at}" for at in range(count)]
    network = _Inference(keras, model).eval()
    with whole_layers(keras, model):
        graph = exported_graph(network, example, opening.name, list(inputs), names, optimize=False)
    return checked_onnx(graph, opening.shown)


def answers_of(keras: Any, model: Any, inputs: Inputs) -> Answers:
    """What the model itself answers, by `model.predict`."""

    def answers(columns: Mapping[str, NDArray[Any]]) -> tuple[NDArray[Any], ...]:
        given = [np.ascontiguousarray(columns[name]) for name in inputs]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Keras itself
            predicted = model.predict(_structured(keras.tree, model, given), batch_size=len(given[0]), verbose=0)
        return tuple(np.asarray(each) for each in keras.tree.flatten(predicted))

    return answers


def _structured(tree: Any, model: Any, given: list[Any]) -> Any:
    """Inputs as the model's call takes them: one, a list or a dictionary."""
    structure = getattr(model, "_inputs_struct", None)
    if structure is not None:
        return tree.pack_sequence_as(structure, given)
    return given if len(given) > 1 else given[0]


def _build(keras: Any, model: Any, opening: Opening) -> None:
    if opening.example is not None and opening.example.dtype.names:
        raise ModelError(
            f"cannot import {opening.shown}",
            f"it does not say that it takes {len(opening.example.dtype.names)} inputs",
            "build it of keras.Input(shape=..., name=...) for each: keras.Model(inputs=[...], outputs=...)",
        )
    if opening.example is None or len(opening.example) == 0:
        raise ModelError(
            f"cannot import {opening.shown}",
            "it does not say what samples it takes",
            "give data, or example=x, a few samples as it takes them; or begin it with keras.Input(shape=...)",
        )
    model(keras.ops.convert_to_tensor(opening.example[:2]), training=False)
