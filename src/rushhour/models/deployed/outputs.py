"""What a network gives: which of its outputs counts, and whether its numbers are logits, values or probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from rushhour.errors import ModelError
from rushhour.task import Scaling

_MAIN = ("logits", "out", "output", "outputs", "main", "prediction", "predictions", "y")
"""Names of the main output, where a network gives several."""

Meaning = Literal["logits", "probabilities", "chances"]
"""What a network's outputs are: `logits` (of a classification, or values of another task); `probabilities` that sum to
1, as after a softmax; or `chances` of each class by itself, as after a sigmoid."""


def as_logits(raw: Any, outputs: int | None, meaning: Meaning, scaling: Scaling | None = None) -> Tensor:
    """A network's raw output as logits or values `(n, outputs)`; softmax of them gives the probabilities.

    Where `outputs` is None, what it gives of each place of a picture, as it is.
    """
    out = main_output(raw, outputs)
    if scaling is not None:
        return out.float() * torch.tensor(scaling.std) + torch.tensor(scaling.mean)
    if meaning == "probabilities":
        return out.float().clamp_min(torch.finfo(torch.float32).tiny).log()
    if meaning == "chances":
        return torch.logit(out.float(), eps=1e-7)
    return out


def main_output(raw: Any, outputs: int | None) -> Tensor:
    """The main output `(n, outputs)` of all that a network gives; of any shape where `outputs` is not known.

    A network may give several tensors: some do in training only, for auxiliary losses. Of a tuple, list, dictionary or
    dataclass the main output is the one named `logits`, `out`, `output` ..., or else the first of fitting shape.
    Dimensions of 1 beside the outputs are removed, and added where `(n,)` is one value for each sample.

    Raises:
        ModelError: if there is no tensor in it.
    """
    main, tensors = _main(raw, outputs)
    out = tensors[main]
    if outputs is None or out.dim() == 2 or not _fits(out, outputs):
        return out
    return out.reshape(out.shape[0], outputs)


def named_outputs(raw: Any, outputs: int | None) -> tuple[str, tuple[str, ...]]:
    """The name, or else the index, of the main output, and those of all tensors that a network gives."""
    main, tensors = _main(raw, outputs)
    return main, tuple(tensors)


def _main(raw: Any, outputs: int | None) -> tuple[str, dict[str, Tensor]]:
    tensors = dict(_tensors(raw))
    if not tensors:
        raise ModelError(
            f"the network gives a {type(raw).__name__}",
            "it holds no tensor, and a network answers with one of logits or values",
            "return a tensor",
        )
    fitting = [name for name, tensor in tensors.items() if outputs is None or _fits(tensor, outputs)]
    named = [name for name in _MAIN if name in fitting]
    return next(iter(named or fitting or tensors)), tensors


def _tensors(raw: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(raw, Tensor):
        yield name, raw
        return
    parts: Any = ()
    if isinstance(raw, Mapping):
        parts = raw.items()
    elif hasattr(raw, "_asdict"):
        parts = raw._asdict().items()
    elif isinstance(raw, tuple | list):
        parts = enumerate(raw)
    elif hasattr(raw, "__dataclass_fields__"):
        parts = vars(raw).items()
    for key, part in parts:
        yield from _tensors(part, f"{name}.{key}" if name else str(key))


def _fits(tensor: Tensor, outputs: int) -> bool:
    return tensor.dim() > 0 and [size for size in tensor.shape[1:] if size != 1] == [outputs] * (outputs != 1)
