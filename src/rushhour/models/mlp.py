"""A deep multilayer perceptron of equal layers: for tables, and as the plainest model to cut into parts."""

from __future__ import annotations

from torch import nn

from rushhour.errors import ModelError


def mlp(inputs: int, outputs: int, hidden: int = 256, depth: int = 8) -> nn.Sequential:
    """`depth` hidden layers of `hidden` units with ReLU.

    Takes float32 of any shape `(n, ...)`, gives logits or values `(n, outputs)`.

    Args:
        inputs: numbers in one sample, over all its dimensions.
        outputs: length of the answer.
        hidden: units of each hidden layer.
        depth: hidden layers, 1 or more.

    Raises:
        ModelError: if a size is below one.
    """
    if min(inputs, outputs, hidden, depth) < 1:
        raise ModelError(
            "cannot build the multilayer perceptron",
            f"every size is at least 1, but got inputs={inputs}, outputs={outputs}, hidden={hidden}, depth={depth}",
            "use larger values",
        )
    layers: list[nn.Module] = [nn.Flatten()]
    for index in range(depth):
        layers += [nn.Linear(inputs if index == 0 else hidden, hidden), nn.ReLU()]
    layers.append(nn.Linear(hidden, outputs))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            # torch's default shrinks the signal by about 2.4 a layer; eight layers of it do not learn (He et al. 2015)
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)
