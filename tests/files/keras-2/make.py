"""The files of this folder: models as Keras 2.15 writes them. `python make.py FOLDER`, with tensorflow-cpu==2.15.1.

`exported.onnx` was made of `exported/` by tf2onnx 1.17 (onnx<1.17), opset 18.
"""

import sys
from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorflow.keras import Input, Model, layers

out = Path(sys.argv[1])
out.mkdir(parents=True, exist_ok=True)
tf.keras.utils.set_random_seed(1)


def settled(model):
    """With statistics of batch normalisation that are not the first ones."""
    random = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.set_weights([random.uniform(0.5, 1.5, each.shape).astype("float32") for each in layer.get_weights()])
    return model


def small():
    x = inputs = Input((16, 16, 3), name="picture")
    x = layers.Rescaling(1 / 127.5, offset=-1)(x)
    for filters, strides in ((8, 1), (16, 2)):
        x = layers.DepthwiseConv2D(3, strides, padding="same", use_bias=False)(x)
        x = layers.BatchNormalization()(x)
        x = layers.ReLU(6.0)(x)
        x = layers.Conv2D(filters, 1, use_bias=False)(x)
        x = layers.BatchNormalization()(x)
    x = layers.Dropout(0.2)(layers.GlobalAveragePooling2D()(x))
    return settled(Model(inputs, layers.Dense(4, activation="softmax")(x)))


model = small()
model.save(out / "depthwise.h5", include_optimizer=False)
model.export(out / "exported")
model.save(out / "of-keras-2.keras")
x = np.random.default_rng(2).uniform(0, 255, (4, 16, 16, 3)).astype("float32")
np.savez(out / "depthwise.npz", x=x, y=model.predict(x, verbose=0))
inputs = Input((4,))
code = layers.Lambda(lambda x: __import__("os").system("touch /tmp/executed") or x)
Model(inputs, code(inputs)).save(out / "lambda.h5")
Model(inputs, tf.math.sin(inputs)).save(out / "operation.h5")
inputs = Input((6, 4))
Model(inputs, layers.Dense(2)(layers.LSTM(8)(inputs))).save(out / "lstm.h5", include_optimizer=False)
