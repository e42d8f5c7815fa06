"""A classifier of texts on MiniLM: what the sentence means, and which words it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rushhour.bundle import Bundle, Preprocessing, Source, Step
from rushhour.models.deployed import export
from rushhour.models.minilm import INPUTS, LENGTH, PRETRAINED, minilm, open_length, pretrained_encoder, token_specs
from rushhour.task import Task


def text_classifier(
    outputs: int,
    vocabulary: int = 30_522,
    hidden: int = 384,
    layers: int = 6,
    heads: int = 12,
    intermediate: int = 1_536,
    positions: int = 512,
) -> nn.Module:
    """The sum of two linear models: of a sentence's embedding, and of the tokens it holds, each as often as it occurs.

    The embedding alone places opposite opinions about one thing near each other; words alone do not know what they
    mean together (wide and deep: Cheng et al., 2016). Takes what `minilm` takes, gives logits `(n, outputs)`.

    Args:
        outputs: length of the answer.
        vocabulary: as of `minilm`, like the others.

    Raises:
        ModelError: as of `minilm`.
    """
    return _Classifier(minilm(vocabulary, hidden, layers, heads, intermediate, positions), vocabulary, hidden, outputs)


class _Classifier(nn.Module):
    def __init__(self, encoder: nn.Module, vocabulary: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.meaning = nn.Linear(hidden, outputs)
        self.words = nn.Embedding(vocabulary, outputs)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        counted = attention_mask.to(torch.float32)[:, :, None]
        words = (self.words(input_ids) * counted).sum(dim=1)
        out: Tensor = self.meaning(self.encoder(input_ids, attention_mask, token_type_ids)) + words
        return out


def text_classifier_bundle(
    path: Path,
    samples: NDArray[Any],
    task: Task,
    *,
    meaning: NDArray[Any],
    words: NDArray[Any],
    bias: NDArray[Any],
    name: str = "text-classifier",
    encoder: nn.Module | None = None,
    longest: int = LENGTH,
    lineage: tuple[Step, ...] = (),
) -> Bundle:
    """MiniLM with two linear models, as a bundle that takes texts.

    Args:
        path: the bundle's folder; an older one is replaced.
        samples: a few real inputs, as of `rushhour.data.text.tokens`.
        task: with `outputs` answers.
        meaning: weights of the embedding, `(outputs, 384)`.
        words: weights of the tokens, `(30522, outputs)`.
        bias: `(outputs,)`.
        name: of the bundle.
        encoder: the pretrained one, trained further; as it is published by default.
        longest: tokens of a text; longer ones are cut.
        lineage: how the weights were found.

    Raises:
        ModelError: if MiniLM is not installed, or the network cannot be exported.
        StorageError: if the disk does not take it.
    """
    network = text_classifier(task.outputs)
    assert isinstance(network, _Classifier)
    network.encoder = pretrained_encoder() if encoder is None else encoder
    with torch.no_grad():
        for parameter, values in (
            (network.meaning.weight, meaning),
            (network.meaning.bias, bias),
            (network.words.weight, words),
        ):
            parameter.copy_(torch.from_numpy(values))
    dimensions, text = open_length(longest)
    return export(
        network,
        name=name,
        task=task,
        sample_spec=token_specs(longest),
        preprocessing=Preprocessing(),
        source=Source("rushhour.models:text_classifier", {"outputs": task.outputs}),
        lineage=(PRETRAINED, *lineage),
        samples=samples[list(INPUTS)],
        path=path,
        dimensions=dimensions,
        text=text,
    )
