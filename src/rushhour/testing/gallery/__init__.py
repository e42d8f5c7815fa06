"""Small named networks of all kinds, as users bring them: each a factory, with the kind of data that it takes.

A factory is named as `rushhour.testing.gallery:residual`. Most can be trained; some cannot be trained or served, and
`Specimen.refused` has a word of the message that must say so. Each module has one kind of network.
"""

from __future__ import annotations

import msgspec

from rushhour.bundle import Source
from rushhour.testing.gallery.attention import encoder, mixer, patched, rotary
from rushhour.testing.gallery.convolutional import (
    all_convolutional,
    bilinear,
    channel_shuffled,
    dense,
    depthwise,
    dilated,
    gated,
    grouped,
    inception,
    next_block,
    pixel_shuffled,
    residual,
    squeeze_excited,
    stochastic_depth,
    transposed,
    tutorial,
    unet,
)
from rushhour.testing.gallery.dataset import CLASSES, Data, data
from rushhour.testing.gallery.outputs import (
    double_headed,
    listed_outputs,
    log_softmaxed,
    named_outputs,
    several_outputs,
    sigmoided,
    softmaxed,
)
from rushhour.testing.gallery.parameters import (
    buffered,
    einsum,
    frozen,
    frozen_middle,
    group_normed,
    hypernet,
    idle,
    instance_normed,
    lazy,
    non_contiguous,
    repeated,
    spectral_normed,
    tied,
    weight_normed,
)
from rushhour.testing.gallery.refused import (
    all_frozen,
    branching,
    mixing_encoder,
    mixing_later,
    no_running_statistics,
    noisy,
    other_in_training,
    softmax_over_batch,
    squeezed,
)
from rushhour.testing.gallery.sequences import gru, lstm, one_dimensional, over_time, three_dimensional
from rushhour.testing.gallery.tabular import experts, normed_rows, one_value, pair, viewed

__all__ = [
    "CLASSES",
    "GALLERY",
    "Data",
    "Specimen",
    "all_convolutional",
    "all_frozen",
    "bilinear",
    "branching",
    "buffered",
    "channel_shuffled",
    "data",
    "dense",
    "depthwise",
    "dilated",
    "double_headed",
    "einsum",
    "encoder",
    "experts",
    "frozen",
    "frozen_middle",
    "gated",
    "group_normed",
    "grouped",
    "gru",
    "hypernet",
    "idle",
    "inception",
    "instance_normed",
    "lazy",
    "listed_outputs",
    "log_softmaxed",
    "lstm",
    "mixer",
    "mixing_encoder",
    "mixing_later",
    "named_outputs",
    "next_block",
    "no_running_statistics",
    "noisy",
    "non_contiguous",
    "normed_rows",
    "one_dimensional",
    "one_value",
    "other_in_training",
    "over_time",
    "pair",
    "patched",
    "pixel_shuffled",
    "repeated",
    "residual",
    "rotary",
    "several_outputs",
    "sigmoided",
    "softmax_over_batch",
    "softmaxed",
    "specimen",
    "spectral_normed",
    "squeeze_excited",
    "squeezed",
    "stochastic_depth",
    "three_dimensional",
    "tied",
    "transposed",
    "tutorial",
    "unet",
    "viewed",
    "weight_normed",
]


class Specimen(msgspec.Struct, frozen=True):
    """One network.

    Attributes:
        name: of the factory.
        data: that it takes.
        refused: a word of the message by which training refuses it; empty where it trains.
        random: it draws random numbers in training; these differ on several workers.
    """

    name: str
    data: Data = "pictures"
    refused: str = ""
    random: bool = False

    @property
    def source(self) -> Source:
        """How it is built."""
        return Source(f"{__name__}:{self.name}")


GALLERY: tuple[Specimen, ...] = (
    *(
        Specimen(factory.__name__)
        for factory in (
            residual, inception, grouped, depthwise, dense, transposed, unet, channel_shuffled, pixel_shuffled,
            squeeze_excited, tutorial, viewed, tied, repeated, frozen, frozen_middle, lazy, weight_normed,
            spectral_normed, double_headed, several_outputs, named_outputs, listed_outputs, softmaxed, log_softmaxed,
            sigmoided, instance_normed, group_normed, buffered, non_contiguous, hypernet, einsum, dilated, patched,
            mixer, next_block, stochastic_depth, idle, bilinear, gated, all_convolutional,
        )
    ),
    *(Specimen(factory.__name__, "series") for factory in (lstm, gru, rotary, over_time)),
    Specimen("encoder", "series", random=True),
    Specimen("one_dimensional", "signals"),
    Specimen("three_dimensional", "volumes"),
    Specimen("normed_rows", "rows", random=True),
    Specimen("experts", "rows"),
    Specimen("one_value", "values"),
    Specimen("pair", "pairs"),
    Specimen("mixing_encoder", "series", refused="batch_first"),
    Specimen("softmax_over_batch", refused="depends on the others"),
    Specimen("no_running_statistics", refused="running statistics"),
    Specimen("mixing_later", refused="depends on the others"),
    Specimen("squeezed", refused="one sample alone"),
    Specimen("branching", refused="depends on the values"),
    Specimen("all_frozen", refused="frozen"),
    Specimen("noisy", refused="call to call"),
    Specimen("other_in_training", refused="another output in training"),
)  # fmt: skip
"""All of them."""


def specimen(name: str) -> Specimen:
    """The network of that name."""
    return next(one for one in GALLERY if one.name == name)
