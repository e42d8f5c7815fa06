"""Networks with unusual outputs, on pictures."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from rushhour.testing.gallery.layers import conv, head


class Answers(NamedTuple):
    """The outputs of a network with an auxiliary head."""

    logits: Tensor
    aux: Tensor


class _Heads(nn.Module):
    def __init__(self, how: Literal["training", "tuple", "dict", "list"]) -> None:
        super().__init__()
        self.stem, self.rest, self._how = conv(3, 16), conv(16, 16), how
        self.aux, self.main = head(16), head(16)

    def forward(self, x: Tensor) -> Any:
        early = self.stem(x)
        main, aux = self.main(self.rest(early)), self.aux(early)
        if self._how == "training":
            return Answers(main, aux) if self.training else main
        if self._how == "dict":
            return OrderedDict(aux=aux, out=main)
        return (main, early) if self._how == "tuple" else [main, aux]


def double_headed() -> nn.Module:
    """An auxiliary head in training, as in GoogLeNet."""
    return _Heads("training")


def several_outputs() -> nn.Module:
    """A tuple: answers and features."""
    return _Heads("tuple")


def named_outputs() -> nn.Module:
    """A dictionary, as segmentation models give."""
    return _Heads("dict")


def listed_outputs() -> nn.Module:
    """A list of answers."""
    return _Heads("list")


def softmaxed() -> nn.Module:
    """Ends in a softmax."""
    return nn.Sequential(conv(3, 16), head(16), nn.Softmax(dim=1))


def log_softmaxed() -> nn.Module:
    """Ends in the logarithm of a softmax."""
    return nn.Sequential(conv(3, 16), head(16), nn.LogSoftmax(dim=1))


def sigmoided() -> nn.Module:
    """Ends in a sigmoid."""
    return nn.Sequential(conv(3, 16), head(16), nn.Sigmoid())
