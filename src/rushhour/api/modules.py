"""`load_module`: a bundle becomes a torch module again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rushhour.api.values import StrPath, read_path, read_texts
from rushhour.bundle import Bundle
from rushhour.system.extras import require

if TYPE_CHECKING:
    from torch import nn


def load_module(bundle: StrPath | Bundle, *, trust: str | Sequence[str] = ()) -> nn.Module:
    """The torch module of a bundle with its weights, in evaluation mode; its answers are compared with recorded ones.

        module = rushhour.load_module("runs/photos")
        module(torch.from_numpy(pictures))   # (n, height, width, channels) as requests carry them -> probabilities
        module.network                       # without preprocessing and softmax: (n, channels, height, width) -> logits

    Args:
        bundle: that was trained, pruned, distilled, or imported so that it can be trained; not a quantised one.
        trust: its factory (`module:factory`), where it was trained on another machine; importing it runs its code.

    Returns:
        The samples of a request in, the answers of the task out, in batches of any size. `parameters()` can be trained.

    Raises:
        BundleError: if the bundle is missing or damaged.
        ModelError: if it has no torch module, its factory is not trusted, or it does not answer as recorded.
    """
    require("train")
    from rushhour.models import load_deployed

    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(read_path(os.fspath(bundle)))
    return load_deployed(opened, read_texts(trust))
