"""Layers that Keras computes in parts, as torch's own operations while a model is exported.

Keras writes a batch normalisation as a difference, a product and a sum, and an LSTM as a loop over the steps, which the
exporter unrolls. Neither could be trained further as the layer that it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

Call = Callable[..., Any]


@contextlib.contextmanager
def whole_layers(keras: Any, model: Any) -> Iterator[None]:
    """While this lasts, batch normalisations and recurrences of a model are computed by torch's operations.

    Args:
        keras: the module.
        model: built, on torch.
    """
    replacing = {
        keras.layers.BatchNormalization: _batch_norm,
        keras.layers.LSTM: _lstm,
        keras.layers.GRU: _gru,
        keras.layers.SimpleRNN: _simple,
    }
    replaced: list[Any] = []
    try:
        for layer in model._flatten_layers():
            kind = next((kind for kind in replacing if isinstance(layer, kind)), None)
            if kind is not None and "call" not in vars(layer) and _is_own(keras, layer, kind):
                layer.call = replacing[kind](keras, layer, layer.call)
                replaced.append(layer)
        yield
    finally:
        for layer in replaced:
            del layer.call  # that of its class shows again


def _is_own(keras: Any, layer: Any, kind: type) -> bool:
    """Whether a layer computes as Keras' class does with its usual settings: classes of users may not."""
    cell = getattr(layer, "cell", None)
    usual = {"activation": keras.activations.tanh, "recurrent_activation": keras.activations.sigmoid}
    return (
        getattr(type(layer), "call", None) is getattr(kind, "call", None)
        and layer.built
        and all(getattr(cell, name, function) is function for name, function in usual.items())
    )


def _batch_norm(keras: Any, layer: Any, own: Call) -> Call:
    def call(inputs: Any, training: Any = None, mask: Any = None) -> Any:
        if mask is not None or inputs.dtype != torch.float32 or training:
            return own(inputs, training=training, mask=mask)
        mean, variance, gamma, beta = (
            None if each is None else keras.ops.convert_to_tensor(each)
            for each in (layer.moving_mean, layer.moving_variance, layer.gamma, layer.beta)
        )
        first = torch.movedim(inputs, layer.axis, 1)
        normal = nn.functional.batch_norm(first, mean, variance, gamma, beta, eps=layer.epsilon)
        return torch.movedim(normal, 1, layer.axis)

    return call


def _lstm(keras: Any, layer: Any, own: Call) -> Call:
    kernel, recurrent, bias = _tensors(keras, layer.cell)
    made = nn.LSTM(len(kernel), layer.cell.units, batch_first=True)
    _set(made, kernel.T, recurrent.T, bias)
    return _recurrent(layer, made, own)


def _gru(keras: Any, layer: Any, own: Call) -> Call:
    if not layer.cell.reset_after:
        return own  # torch has only the other form
    kernel, recurrent, bias = _tensors(keras, layer.cell)
    made = nn.GRU(len(kernel), layer.cell.units, batch_first=True)
    first, second = (None, None) if bias is None else map(_reset_first, bias)
    _set(made, _reset_first(kernel.T), _reset_first(recurrent.T), first, second)
    return _recurrent(layer, made, own)


def _simple(keras: Any, layer: Any, own: Call) -> Call:
    kernel, recurrent, bias = _tensors(keras, layer.cell)
    made = nn.RNN(len(kernel), layer.cell.units, batch_first=True)
    _set(made, kernel.T, recurrent.T, bias)
    return _recurrent(layer, made, own)


def _recurrent(layer: Any, made: nn.RNNBase, own: Call) -> Call:
    """The call of a recurrence: torch's where it begins at zero, takes all steps and keeps no state."""

    def call(sequences: Any, initial_state: Any = None, mask: Any = None, training: Any = False) -> Any:
        if initial_state is not None or mask is not None or layer.stateful or sequences.dtype != torch.float32:
            return own(sequences, initial_state=initial_state, mask=mask, training=training)
        outputs, states = made(sequences.flip(1) if layer.go_backwards else sequences)
        first = outputs if layer.return_sequences else outputs[:, -1]
        if not layer.return_state:
            return first
        return (first, *(state[0] for state in (states if isinstance(states, tuple) else (states,))))

    return call


def _tensors(keras: Any, cell: Any) -> list[Any]:
    return [
        None if each is None else keras.ops.convert_to_tensor(each).detach()
        for each in (cell.kernel, cell.recurrent_kernel, cell.bias)
    ]


def _set(
    made: nn.RNNBase, kernel: Tensor, recurrent: Tensor, bias: Tensor | None, second: Tensor | None = None
) -> None:
    """Put weights into a layer of torch, which has two biases."""
    values = {"weight_ih_l0": kernel, "weight_hh_l0": recurrent, "bias_ih_l0": bias, "bias_hh_l0": second}
    for name, value in values.items():
        given = torch.zeros(len(kernel)) if value is None else value
        setattr(made, name, nn.Parameter(given.clone(memory_format=torch.contiguous_format), requires_grad=False))
    made.eval()


def _reset_first(values: Tensor) -> Tensor:
    """Gates in torch's order: Keras has the update before the reset."""
    update, reset, new = values.chunk(3)
    return torch.cat([reset, update, new])
