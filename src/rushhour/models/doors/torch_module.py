"""A `torch.nn.Module` in memory: exported with its weights, which need no name by which it could be built again."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rushhour.bundle import described, joined
from rushhour.errors import ModelError
from rushhour.models.converted import checked_onnx
from rushhour.models.deployed import Inputs, exported_graph, main_output, named_outputs, tensors_of
from rushhour.models.doors.door import Arrival, Opening
from rushhour.models.failure import why_failed
from rushhour.models.source import forward_names, plain_network

_INPUT, _OUTPUT = "input", "output"
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class TorchModuleDoor:
    """Objects of `torch.nn.Module`. The given object is not changed."""

    takes = "a torch.nn.Module"
    needs_example = True

    def recognises(self, model: Any) -> bool:
        """By its type."""
        return isinstance(model, nn.Module)

    def open(self, model: Any, opening: Opening) -> Arrival:
        """Its graph as torch exports it, with batch normalisations as they are."""
        if opening.example is None or len(opening.example) == 0:
            raise ModelError(
                f"cannot import {opening.shown} alone",
                "a torch module does not say what samples it takes",
                "give data, or example=x, a few samples as it takes them, (k, *shape)",
            )
        with _prepared(model, opening.shown) as network:
            names = _names(network, opening.example)
            example = _taken(network, names, opening)
            notes = _notes(model, network, example, opening)
            main = _Main(network, opening.outputs).eval()
            graph = exported_graph(main, example, opening.name, names, [_OUTPUT], optimize=False)

        def answers(columns: Mapping[str, NDArray[Any]]) -> tuple[NDArray[Any], ...]:
            with _prepared(model, opening.shown) as original, torch.no_grad():
                given = (torch.from_numpy(np.ascontiguousarray(columns[name])) for name in names)
                return (main_output(original(*given), opening.outputs).numpy(),)

        origin = f"torch {torch.__version__.partition('+')[0]}, {type(model).__qualname__}"
        return Arrival("torch", checked_onnx(graph, opening.shown), origin, answers, notes=notes)


class _Main(nn.Module):
    """The main output of a network."""

    def __init__(self, network: nn.Module, outputs: int | None) -> None:
        super().__init__()
        self.network, self.outputs = network, outputs

    def forward(self, *samples: Tensor) -> Tensor:
        return main_output(self.network(*samples), self.outputs)


@contextlib.contextmanager
def _prepared(model: nn.Module, shown: str) -> Iterator[nn.Module]:
    """A copy in evaluation mode, in float32, on the CPU; the model itself where it cannot be copied, then restored."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise ModelError(
            f"cannot import {shown}",
            "it is TorchScript, in whole or in part, which cannot be exported with a free number of samples",
            "give the Python module that it was made from",
        )
    try:
        copied = plain_network(copy.deepcopy(model))
    except Exception:  # a user's module may hold what cannot be copied
        copied = None
    if copied is not None:
        yield copied.to("cpu", torch.float32).eval()
        return
    tensors = [each for each in (*model.parameters(), *model.buffers()) if not is_lazy(each)]
    if any(each.device.type != "cpu" or (each.is_floating_point() and each.dtype != torch.float32) for each in tensors):
        raise ModelError(
            f"cannot import {shown}", "it cannot be copied, and is not float32 on the CPU", "call .cpu().float()"
        )
    modes = {module: module.training for module in model.modules()}
    try:
        yield model.eval()
    finally:
        for module, mode in modes.items():
            module.training = mode


def _names(network: nn.Module, example: NDArray[Any]) -> list[str]:
    """The inputs by name, in the network's order: that of its arguments, where these have the names of the samples'."""
    given = example.dtype.names or (_INPUT,)
    taken = forward_names(network)[: len(given)]
    return list(taken if set(taken) == set(given) else given)


def _taken(network: nn.Module, names: list[str], opening: Opening) -> Inputs:
    """Two samples or more that the network takes: as they are, or whole numbers of a single input as indices.

    Raises:
        ModelError: if it takes neither.
    """
    assert opening.example is not None
    given = opening.example[np.arange(max(2, len(opening.example))) % len(opening.example)]
    example = tensors_of(given if given.dtype.names is None else joined({name: given[name] for name in names}))
    candidates = [example]
    if len(names) == 1 and example[0].is_floating_point() and bool((example[0] == example[0].round()).all()):
        candidates.append((example[0].long(),))
    first: Exception | None = None
    for candidate in candidates:
        try:
            with torch.no_grad():
                network(*candidate)
        except Exception as error:  # a user's module may fail in any way
            first = first or error
        else:
            return candidate
    assert first is not None
    raise ModelError(
        f"{opening.shown} cannot take samples of {described(given)}",
        why_failed(first),
        "give data or an example that it was made for",
    ) from first


def _notes(model: nn.Module, network: nn.Module, example: Inputs, opening: Opening) -> tuple[str, ...]:
    """What a graph does not keep of a module."""
    notes = []
    with torch.no_grad():
        main, names = named_outputs(network(*example), opening.outputs)
    if len(names) > 1:
        notes.append(f"of its outputs {', '.join(names)} the answer is {main}; the others are left out")
    dropouts = sum(isinstance(module, _DROPOUTS) for module in model.modules())
    if dropouts:
        notes.append(f"{dropouts} dropout layers are left out: a graph has none")
    if opening.example is not None and opening.example.dtype.kind == "f" and example[0].dtype == torch.int64:
        notes.append("its samples are whole numbers, taken as indices")
    return tuple(notes)
