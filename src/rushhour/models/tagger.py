"""A small network that gives a class to each token of a sequence: names in texts, phases of signals."""

from __future__ import annotations

from torch import Tensor, nn

from rushhour.errors import ModelError
from rushhour.models.signal import ByChannel


def tagger(
    classes: int, channels: int = 0, vocabulary: int = 30_522, width: int = 96, depth: int = 4, dropout: float = 0.1
) -> nn.Sequential:
    """Convolutions of kernel 3 whose dilation doubles from layer to layer (Strubell et al., 2017).

    Takes ids `(n, length)`, whole numbers of any type; or float32 `(n, length, channels)`. Gives logits
    `(n, length, classes)`. Each token sees `2 ** depth - 1` tokens on both sides.

    Args:
        classes: length of the answer for a token.
        channels: numbers of each token; 0 for ids.
        vocabulary: rows of the embedding table; larger ids share them.
        width: of an embedding and of each layer.
        depth: layers.
        dropout: after each layer, in training.

    Raises:
        ModelError: if a size is below one.
    """
    if min(classes, vocabulary, width, depth) < 1 or channels < 0 or not 0 <= dropout < 1:
        raise ModelError(
            "cannot build the tagger",
            f"every size is at least 1 and dropout below 1, but got classes={classes}, channels={channels}, "
            f"vocabulary={vocabulary}, width={width}, depth={depth}, dropout={dropout}",
            "use other values",
        )
    layers: list[nn.Module] = (
        [ByChannel(), nn.Conv1d(channels, width, 1)] if channels else [_Embedded(vocabulary, width)]
    )
    for layer in range(depth):
        dilation = 2**layer
        layers += [nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Conv1d(width, classes, 1), _ByToken())


class _Embedded(nn.Module):
    """Ids `(n, length)` to `(n, width, length)`."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self._vocabulary = vocabulary
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=0.1)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.embedding(ids.long() % self._vocabulary)
        return found.transpose(1, 2)


class _ByToken(nn.Module):
    """`(n, classes, length)` to `(n, length, classes)`."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)
