"""The article's network: the reference model that everything else is compared with."""

from __future__ import annotations

from torch import nn

from rushhour.errors import ModelError


def article(
    input_size: int = 224, channels: int = 3, classes: int = 1000, width: float = 1.0, dense: int = 512
) -> nn.Sequential:
    """Four 3x3 convolutions, two poolings, two dense layers; 103,339,528 parameters at the defaults.

    Takes float32 `(n, channels, input_size, input_size)`, gives logits `(n, classes)`.

    Args:
        input_size: height and width of a picture, 4 or more; what the poolings cannot halve evenly they cut off.
        channels: of a picture.
        classes: length of the answer.
        width: scales the channels of the convolutions (32, 32, 64, 64).
        dense: units of the hidden dense layer, which holds nearly all parameters.

    Raises:
        ModelError: if a size is too small to build it.
    """
    narrow, wide, side = round(32 * width), round(64 * width), input_size // 4
    if min(narrow, side, channels, classes, dense) < 1:
        raise ModelError(
            "cannot build the article's network",
            f"it needs input_size >= 4, width >= 1/32 and at least one of each other, but got input_size={input_size}, "
            f"channels={channels}, classes={classes}, width={width:g}, dense={dense}",
            "use larger values",
        )
    return nn.Sequential(
        nn.Conv2d(channels, narrow, 3, padding="same"),
        nn.ReLU(),
        nn.Conv2d(narrow, narrow, 3, padding="same"),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Conv2d(narrow, wide, 3, padding="same"),
        nn.ReLU(),
        nn.Conv2d(wide, wide, 3, padding="same"),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(wide * side * side, dense),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(dense, classes),
    )
