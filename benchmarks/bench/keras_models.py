"""Models of Keras for the matrix of doors: made in a Python with Keras, saved as users save them.

`python keras_models.py FOLDER [SIDE]` writes `article.keras`, `mobilenet.keras` and both as `.h5`; it needs only Keras.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

CLASSES = 10


def article(keras: Any, side: int) -> Any:
    """The article's network, with half of its channels."""
    layers = keras.layers
    conv = {"activation": "relu", "padding": "same"}
    return keras.Sequential(
        [
            keras.Input((side, side, 3)),
            *(layers.Conv2D(16, 3, **conv), layers.Conv2D(16, 3, **conv), layers.MaxPooling2D(), layers.Dropout(0.25)),
            *(layers.Conv2D(32, 3, **conv), layers.Conv2D(32, 3, **conv), layers.MaxPooling2D(), layers.Dropout(0.25)),
            *(layers.Flatten(), layers.Dense(128, activation="relu"), layers.Dropout(0.5)),
            layers.Dense(CLASSES, activation="softmax"),
        ]
    )


def mobilenet(keras: Any, side: int) -> Any:
    """Inverted residuals as in MobileNetV2 (Sandler et al. 2018), few of them."""
    layers = keras.layers
    x = inputs = keras.Input((side, side, 3))
    x = layers.Rescaling(1 / 127.5, offset=-1)(x)
    x = _normal(layers, layers.Conv2D(16, 3, strides=2, padding="same", use_bias=False)(x))
    for filters, strides in ((16, 1), (24, 2), (24, 1), (32, 2), (32, 1)):
        before = x
        x = _normal(layers, layers.Conv2D(4 * x.shape[-1], 1, use_bias=False)(x))
        x = _normal(layers, layers.DepthwiseConv2D(3, strides=strides, padding="same", use_bias=False)(x))
        x = layers.BatchNormalization()(layers.Conv2D(filters, 1, use_bias=False)(x))
        if strides == 1 and before.shape[-1] == filters:
            x = layers.Add()([before, x])
    x = _normal(layers, layers.Conv2D(128, 1, use_bias=False)(x))
    x = layers.Dense(CLASSES, activation="softmax")(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, x)


def _normal(layers: Any, x: Any) -> Any:
    return layers.ReLU(6.0)(layers.BatchNormalization()(x))


def main(folder: Path, side: int) -> None:
    """Write them, with seeded weights."""
    import keras

    keras.utils.set_random_seed(0)
    for made in (article, mobilenet):
        model = made(keras, side)
        for suffix in ("keras", "h5"):
            model.save(folder / f"{made.__name__}.{suffix}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 32)
