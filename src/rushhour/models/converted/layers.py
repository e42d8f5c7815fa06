"""The layers with weights that a converted network may have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from torch import Tensor, nn


class Recurrent(nn.Module):
    """torch's LSTM, GRU or RNN of one layer with the inputs and outputs of ONNX.

    Args:
        kind: which.
        inputs: features of a step.
        hidden: features of the state.
        bidirectional: whether a second one reads from the end.
        bias: whether it has biases.
        backward: whether the only one reads from the end.
        activation: of an RNN: `tanh` or `relu`.
    """

    def __init__(
        self,
        kind: str,
        inputs: int,
        hidden: int,
        bidirectional: bool,
        bias: bool,
        backward: bool = False,
        activation: str = "tanh",
    ) -> None:
        super().__init__()
        if kind == "LSTM":
            self.cells: nn.RNNBase = nn.LSTM(inputs, hidden, bias=bias, bidirectional=bidirectional)
        elif kind == "GRU":
            self.cells = nn.GRU(inputs, hidden, bias=bias, bidirectional=bidirectional)
        else:
            self.cells = nn.RNN(inputs, hidden, nonlinearity=activation, bias=bias, bidirectional=bidirectional)
        self.backward_only = backward

    def forward(self, x: Tensor, hidden: Tensor | None = None, cell: Tensor | None = None) -> tuple[Tensor, ...]:
        """All states of all steps, and the last ones.

        Args:
            x: `(steps, n, inputs)`.
            hidden: the state at the beginning, `(directions, n, hidden)`; zeros by default.
            cell: the same of an LSTM's cells.

        Returns:
            `(steps, directions, n, hidden)`; `(directions, n, hidden)`, of an LSTM twice.
        """
        if self.backward_only:
            x = x.flip(0)
        if isinstance(self.cells, nn.LSTM):
            out, (last, last_cell) = self.cells(x) if hidden is None else self.cells(x, (hidden, cell))
            ends: tuple[Tensor, ...] = (last, last_cell)
        else:
            out, last = self.cells(x, hidden)
            ends = (last,)
        directions = 2 if self.cells.bidirectional else 1
        out = out.unflatten(2, (directions, self.cells.hidden_size)).transpose(1, 2)
        return (out.flip(0) if self.backward_only else out, *ends)


LAYERS: Final[dict[str, Callable[..., nn.Module]]] = {
    **{
        f"{kind}{dimensions}d": getattr(nn, f"{kind}{dimensions}d")
        for kind in ("Conv", "ConvTranspose", "BatchNorm", "InstanceNorm")
        for dimensions in (1, 2, 3)
    },
    "Dropout": nn.Dropout,
    "Embedding": nn.Embedding,
    "GroupNorm": nn.GroupNorm,
    "LayerNorm": nn.LayerNorm,
    "Linear": nn.Linear,
    "PReLU": nn.PReLU,
    "Recurrent": Recurrent,
}
"""Kind -> its class. The settings of a layer are the arguments."""
