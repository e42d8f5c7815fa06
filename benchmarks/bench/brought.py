"""What people bring, one model of each kind: written as they write it, with data that fits it."""

from __future__ import annotations

import logging
import os
import subprocess
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from rushhour.data.arrays import from_arrays
from rushhour.data.dataset import Dataset

_SEED = 0
_LABELS = ("cat", "dog", "bird", "fish")


class Brought(msgspec.Struct, frozen=True):
    """A model as a user has it.

    Attributes:
        model: a path or an object.
        dataset: that it is for.
        settings: of `rushhour.import_model`: `trust`, `length`.
    """

    model: Any
    dataset: Dataset
    settings: dict[str, Any] = {}


class Kind(msgspec.Struct, frozen=True):
    """One row of the matrix.

    Attributes:
        origin: how it was written, in words.
        make: writes it into an empty folder.
        needs: modules that must be installed for that.
        extra: that has them.
        python: environment variable that names a Python with other packages, which writes it and reads it.
        ratio: of channels to be pruned; 0 where it has none, which is said.
    """

    origin: str
    make: Callable[[Path], Brought]
    needs: tuple[str, ...] = ()
    extra: str = ""
    python: str = ""
    ratio: float = 0.3


def _of_gallery(name: str, *, suffix: str) -> Callable[[Path], Brought]:
    """A network of `rushhour.testing.gallery` with weights that are not fresh, as a file or an object."""

    def make(folder: Path) -> Brought:
        import torch

        from rushhour.models import Preprocess, build
        from rushhour.testing.gallery import data, specimen

        one = specimen(name)
        dataset = data(one.data, 240)
        samples = Preprocess(dataset.preprocessing)(torch.from_numpy(np.array(dataset.train.inputs[:8]))).contiguous()
        torch.manual_seed(_SEED)
        network = build(one.source, (one.source.factory,)).train()
        with torch.no_grad():
            for _ in range(20):  # for the statistics of its normalisations
                network(samples)
            for parameter in network.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        network.eval()
        if not suffix:
            return Brought(network, dataset)
        file = folder / f"{name}{suffix}"
        free: Any = ({0: torch.export.Dim("batch")},)
        logging.getLogger("torch.onnx").setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            if suffix == ".pt2":
                torch.export.save(torch.export.export(network, (samples[:2],), dynamic_shapes=free), file)
                return Brought(file, dataset, {"trust": str(file)})
            torch.onnx.export(network, (samples[:2],), str(file), dynamo=True, dynamic_shapes=free, verbose=False)
        return Brought(file, dataset)

    return make


def _texts(folder: Path) -> Brought:
    import torch
    import transformers

    torch.manual_seed(_SEED)
    labels = dict(enumerate(_LABELS))
    config = transformers.BertConfig(
        vocab_size=200, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=64, id2label=labels, label2id={name: index for index, name in labels.items()},
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).eval().save_pretrained(folder / "bert")
    random = np.random.default_rng(_SEED)
    tokens = random.integers(5, 200, (240, 16))
    tokens[:, 12:] *= random.random((240, 1)) < 0.5  # padding
    classes = random.integers(0, len(_LABELS), 240)
    tokens[:, 1] = 5 + classes
    dataset = from_arrays({"x": tokens.astype(np.float32), "y": np.array(_LABELS)[classes]}, name="texts", seed=_SEED)
    return Brought(folder / "bert", dataset, {"length": 16})


def _pictures(folder: Path) -> Brought:
    import torch
    import transformers

    torch.manual_seed(_SEED)
    labels = dict(enumerate(_LABELS))
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=8,
        id2label=labels, label2id={name: index for index, name in labels.items()},
    )  # fmt: skip
    transformers.ViTForImageClassification(config).eval().save_pretrained(folder / "vit")
    processor = (
        '{"do_rescale": true, "rescale_factor": 0.00392156862745098, "do_normalize": true, '
        '"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "size": {"height": 32, "width": 32}}'
    )
    (folder / "vit" / "preprocessor_config.json").write_text(processor)
    return Brought(folder / "vit", pictures(32))


def pictures(side: int, count: int = 240) -> Dataset:
    """Noise with a bright bar for each of four classes: uint8 `(side, side, 3)`."""
    random = np.random.default_rng(_SEED)
    classes = np.arange(count) % len(_LABELS)
    x = random.integers(0, 128, (count, side, side, 3), dtype=np.uint8)
    step = side // len(_LABELS)
    for picture, label in zip(x, classes, strict=True):
        picture[label * step : (label + 1) * step] += 100
    return from_arrays({"x": x, "y": np.array(_LABELS)[classes]}, name="pictures", seed=_SEED)


def _rows() -> tuple[np.ndarray, np.ndarray, Dataset]:
    random = np.random.default_rng(_SEED)
    x = random.normal(size=(400, 10)).astype(np.float32)
    y = np.array(_LABELS)[(x[:, 0] > 0).astype(int) + 2 * (x[:, 1] > 0)]
    return x, y, from_arrays({"x": x, "y": y}, name="rows", seed=_SEED)


def _lightgbm(folder: Path) -> Brought:
    import joblib
    import lightgbm

    x, y, dataset = _rows()
    file = folder / "trees.joblib"
    joblib.dump(lightgbm.LGBMClassifier(n_estimators=50, verbose=-1, n_jobs=1).fit(x, y), file)
    return Brought(file, dataset, {"trust": str(file)})


def _pipeline(folder: Path) -> Brought:
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y, dataset = _rows()
    network = MLPClassifier((64, 64), max_iter=60, random_state=_SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Brought(make_pipeline(StandardScaler(), network).fit(x, y), dataset)


def _forest(folder: Path) -> Brought:
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y, dataset = _rows()
    return Brought(make_pipeline(StandardScaler(), RandomForestClassifier(50, random_state=_SEED)).fit(x, y), dataset)


def _keras_article(folder: Path) -> Brought:
    return _of_keras(_article(), folder / "article.keras")


def _keras_mobilenet(folder: Path) -> Brought:
    import keras

    shape = (_SIDE, _SIDE, 3)
    keras.utils.set_random_seed(_SEED)
    network = keras.applications.MobileNetV2(input_shape=shape, alpha=0.35, weights=None, classes=len(_LABELS))
    random = np.random.default_rng(_SEED)
    for weight in network.weights:  # fresh ones make all answers equal
        noise = random.random(weight.shape) if "variance" in weight.path else random.normal(size=weight.shape)
        weight.assign(weight + 0.2 * noise.astype("float32"))
    return _of_keras(network, folder / "mobilenet.keras")


def _keras_h5(folder: Path) -> Brought:
    return _of_keras(_article(), folder / "article.h5")


def _keras_2(folder: Path) -> Brought:
    """Written by Keras 2.15; it scales its pixels itself."""
    return Brought(_KERAS_2, pictures(16))


def _article() -> Any:
    """The article's network on small pictures, with weights that are not fresh."""
    import keras
    from keras.layers import Conv2D, Dense, Dropout, Flatten, MaxPooling2D

    keras.utils.set_random_seed(_SEED)
    same: dict[str, Any] = {"activation": "relu", "padding": "same"}
    network = keras.Sequential([keras.Input((_SIDE, _SIDE, 3))])
    for channels in (32, 64):
        for layer in (Conv2D(channels, 3, **same), Conv2D(channels, 3, **same), MaxPooling2D(2), Dropout(0.25)):
            network.add(layer)
    for layer in (Flatten(), Dense(128, activation="relu"), Dropout(0.5), Dense(len(_LABELS), activation="softmax")):
        network.add(layer)
    return network


def _of_keras(network: Any, file: Path) -> Brought:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network.save(file)
    return Brought(file, pictures(_SIDE), {"scale": 1 / 255})


_WRITE_SAVED_MODEL = """
import sys
import tensorflow as tf
network = tf.keras.Sequential([
    tf.keras.Input(({side}, {side}, 3)),
    tf.keras.layers.Conv2D(32, 3, activation="relu", padding="same"), tf.keras.layers.MaxPooling2D(2),
    tf.keras.layers.Conv2D(64, 3, activation="relu", padding="same"), tf.keras.layers.MaxPooling2D(2),
    tf.keras.layers.Flatten(), tf.keras.layers.Dense(128, activation="relu"),
    tf.keras.layers.Dense({classes}, activation="softmax"),
])
{write}
"""
_WAYS = {"raw": "tf.saved_model.save(network, sys.argv[1])", "exported": "network.export(sys.argv[1])"}


def _saved_model(way: str) -> Callable[[Path], Brought]:
    def make(folder: Path) -> Brought:
        python = os.environ[_TENSORFLOW]
        code = _WRITE_SAVED_MODEL.format(side=_SIDE, classes=len(_LABELS), write=_WAYS[way])
        model = folder / "saved_model"
        own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "KERAS_BACKEND")}
        subprocess.run([python, "-c", code, str(model)], check=True, capture_output=True, env=own)
        settings = {"scale": 1 / 255, "tensorflow_python": python, "trust": str(model)}
        return Brought(model, pictures(_SIDE), settings)

    return make


_SIDE = 32
_TENSORFLOW = "TENSORFLOW_PYTHON"
_KERAS_2 = Path(__file__).resolve().parents[2] / "tests" / "files" / "keras-2" / "depthwise.h5"
_TABULAR = ("sklearn", "joblib", "skl2onnx", "onnxmltools")

KINDS: Mapping[str, Kind] = {
    "keras-article": Kind("Keras 3, .keras, the article's network", _keras_article, ("keras",), "keras"),
    "keras-mobilenet": Kind("Keras 3, .keras, MobileNetV2", _keras_mobilenet, ("keras",), "keras"),
    "keras-h5": Kind("Keras 3, .h5, the article's network", _keras_h5, ("keras",), "keras"),
    "keras2-h5": Kind("Keras 2, .h5, depthwise convolutions", _keras_2, ("keras",), "keras"),
    "savedmodel-raw": Kind("SavedModel of tf.saved_model.save", _saved_model("raw"), python=_TENSORFLOW),
    "savedmodel-exported": Kind("SavedModel of model.export", _saved_model("exported"), python=_TENSORFLOW),
    "residual": Kind("ONNX of torch", _of_gallery("residual", suffix=".onnx")),
    "depthwise": Kind("ONNX of torch", _of_gallery("depthwise", suffix=".onnx")),
    "transformer": Kind("ONNX of torch", _of_gallery("patched", suffix=".onnx")),
    "lstm": Kind("ONNX of torch", _of_gallery("lstm", suffix=".onnx")),
    "unet": Kind("ONNX of torch", _of_gallery("unet", suffix=".onnx")),
    "module": Kind("torch.nn.Module in memory", _of_gallery("squeeze_excited", suffix="")),
    "program": Kind("torch.export, .pt2", _of_gallery("next_block", suffix=".pt2")),
    "bert": Kind("folder of transformers, BERT", _texts, ("transformers",), "hf"),
    "vit": Kind("folder of transformers, ViT", _pictures, ("transformers",), "hf"),
    "lightgbm": Kind("LightGBM, .joblib", _lightgbm, (*_TABULAR, "lightgbm"), "tabular"),
    "pipeline": Kind("scikit-learn pipeline, perceptron", _pipeline, _TABULAR, "tabular"),
    "forest": Kind("scikit-learn pipeline, forest", _forest, _TABULAR, "tabular"),
}
"""Row -> how it is made."""
