"""Models of Keras become graphs that answer as they do, and networks that can be trained."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rushhour
from rushhour.bundle import Bundle
from rushhour.errors import ModelError
from rushhour.models.converted import convert, verify
from rushhour.models.doors import Arrival, bring, verify_arrival
from rushhour.models.doors.keras import KerasDoor
from rushhour.models.doors.keras.loading import keras_module
from rushhour.models.graph_answers import GraphAnswers

if importlib.util.find_spec("keras") is None:
    pytest.skip("Keras is not installed", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in Keras itself
keras: Any = keras_module()
layers = keras.layers

OLD = Path(__file__).parents[2] / "files" / "keras-2"


def opened(model: Any, **known: Any) -> Arrival:
    brought = bring(model)
    assert brought is not None
    assert isinstance(brought.door, KerasDoor)
    return brought.open(**known)


def kinds(arrival: Arrival) -> list[str]:
    """The layers of the network, in order, after a comparison of all answers."""
    found = verify_arrival(arrival, "net")
    assert found is not None
    assert found < 1e-4
    converted = convert(arrival.graph, "net", logits=True)
    assert verify(arrival.graph, converted, "net") < 1e-4
    return [layer.kind for layer in converted.program.layers.values()]


def settled(model: Any) -> Any:
    """With statistics of batch normalisation that are not the first ones."""
    random = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.set_weights([random.uniform(0.5, 1.5, each.shape) for each in layer.get_weights()])
    return model


def convolutional() -> Any:
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((16, 16, 3))
    x = layers.Rescaling(1 / 255)(layers.RandomFlip()(x))
    x = layers.Conv2D(8, 3, strides=2, padding="same", use_bias=False)(x)
    x = y = layers.ReLU(6.0)(layers.BatchNormalization()(x))
    x = layers.DepthwiseConv2D(3, padding="same")(x)
    x = layers.Add()([layers.BatchNormalization()(x), y])
    x = layers.Dropout(0.2)(layers.GlobalAveragePooling2D()(x))
    return settled(keras.Model(inputs, layers.Dense(4, activation="softmax")(x)))


@pytest.fixture(scope="module")
def model() -> Any:
    return convolutional()


def test_a_model_keeps_its_normalisations_and_says_its_scaling(model: Any) -> None:
    arrival = opened(model)
    assert kinds(arrival) == ["Conv2d", "BatchNorm2d", "Conv2d", "BatchNorm2d", "Linear"]
    program = convert(arrival.graph, "net", logits=True).program
    assert [call.what for call in program.calls].count("permute") == 1  # one, in front
    assert arrival.preprocessing_from == "the model scales its samples itself: x * 0.00392157"
    assert [note.split(" are left out")[0] for note in arrival.notes] == [
        "1 layers of dropout or noise", "1 layers of augmentation",
    ]  # fmt: skip
    assert "call" not in vars(model.layers[4])  # the given model is as it was


def test_a_file_answers_as_the_model(model: Any, tmp_path: Path) -> None:
    x = np.random.default_rng(1).uniform(0, 255, (5, 16, 16, 3)).astype(np.float32)
    expected = model.predict(x, verbose=0)
    model.save(tmp_path / "net.keras")
    model.save(tmp_path / "net.h5")
    shutil.copy(tmp_path / "net.keras", tmp_path / "other.zip")
    shutil.copy(tmp_path / "net.h5", tmp_path / "other")
    for name in ("net.keras", "net.h5", "other.zip", "other"):
        arrival = opened(tmp_path / name)
        (answer,) = GraphAnswers(arrival.graph, "net")({"input": x})
        np.testing.assert_allclose(answer, expected, rtol=1e-4, atol=1e-5)
        assert arrival.origin == f"Keras {keras.__version__}, 11 layers"


def test_files_of_keras_2() -> None:
    saved = np.load(OLD / "depthwise.npz")
    arrival = opened(OLD / "depthwise.h5")
    (answer,) = GraphAnswers(arrival.graph, "net")({"input": saved["x"]})
    np.testing.assert_allclose(answer, saved["y"], rtol=1e-4, atol=1e-5)
    assert kinds(arrival).count("BatchNorm2d") == 4
    assert arrival.origin.startswith("Keras 2.15.0")


@pytest.mark.slow
def test_a_recurrence_of_keras_2() -> None:
    assert kinds(opened(OLD / "lstm.h5")) == ["Recurrent", "Linear"]


def recurrent(kind: str, **settings: Any) -> Any:
    x = inputs = keras.Input((6, 4))
    x = layers.Bidirectional(getattr(layers, kind)(5, return_sequences=True))(x)
    return keras.Model(inputs, layers.Dense(3)(getattr(layers, kind)(4, **settings)(x)))


def attention() -> Any:
    x = inputs = keras.Input((6, 8))
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 4)(x, x))
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))


def u_shaped() -> Any:
    x = inputs = keras.Input((8, 8, 3))
    first = layers.Conv2D(4, 3, padding="same", activation="swish")(x)
    x = layers.Conv2D(8, 3, padding="same", activation="relu")(layers.MaxPooling2D()(first))
    x = layers.Concatenate()([first, layers.Conv2DTranspose(4, 2, strides=2)(x)])
    x = layers.PReLU(shared_axes=[1, 2])(layers.SeparableConv2D(4, 3, strides=2, padding="same")(x))
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x * 2 + 1)))


def of_tokens() -> Any:
    inputs = keras.Input((7,), dtype="int32")
    x = layers.Conv1D(8, 3, padding="causal", activation="gelu")(layers.Embedding(20, 8)(inputs))
    return keras.Model(inputs, layers.Dense(3, activation="sigmoid")(layers.GlobalMaxPooling1D()(x)))


NETWORKS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "LSTM": (lambda: recurrent("LSTM", go_backwards=True), ["Recurrent"] * 3 + ["Linear"]),
    "GRU": (lambda: recurrent("GRU"), ["Recurrent"] * 3 + ["Linear"]),
    "SimpleRNN": (lambda: recurrent("SimpleRNN"), []),
    "attention": (attention, []),
    "U-Net": (u_shaped, ["Conv2d", "Conv2d", "ConvTranspose2d", "Conv2d", "Conv2d", "Linear"]),
    "tokens": (of_tokens, ["Embedding", "Conv1d", "Linear"]),
}


@pytest.mark.parametrize(
    "name", [each if each == "U-Net" else pytest.param(each, marks=pytest.mark.slow) for each in NETWORKS]
)
def test_networks_can_be_trained(name: str) -> None:
    made, expected = NETWORKS[name]
    keras.utils.set_random_seed(0)
    found = kinds(opened(made()))
    assert found == expected or not expected


@pytest.mark.slow
def test_several_inputs_keep_their_names() -> None:
    inputs = {"height": keras.Input((4,), name="height"), "age": keras.Input((3,), name="age")}
    model = keras.Model(inputs, [layers.Dense(2)(layers.Concatenate()([*inputs.values()])), inputs["age"] * 2])
    arrival = opened(model)
    assert {value.name for value in arrival.graph.graph.input} == {"height", "age"}
    assert [value.name for value in arrival.graph.graph.output] == ["output_0", "output_1"]
    assert verify_arrival(arrival, "net") == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
def test_what_a_model_does_not_say() -> None:
    anything = keras.Sequential([layers.Conv2D(4, 3), layers.GlobalAveragePooling2D(), layers.Dense(2)])
    with pytest.raises(ModelError, match=r"does not say what samples it takes; give data, or example=x"):
        opened(anything)
    assert kinds(opened(anything, example=np.zeros((2, 8, 8, 3), np.float32))) == ["Conv2d", "Linear"]
    of_any_size = keras.Sequential([keras.Input((None, None, 3)), layers.Conv2D(4, 3), layers.GlobalMaxPooling2D()])
    with pytest.raises(ModelError, match=r"of any size: \(\?, \?, 3\); give --size"):
        opened(of_any_size)
    arrival = opened(of_any_size, size=(8, 12))
    assert [each.dim_value for each in arrival.graph.graph.input[0].type.tensor_type.shape.dim][1:] == [8, 12, 3]


def test_a_class_of_the_user_is_taken_as_an_object_only(tmp_path: Path) -> None:
    class Mine(layers.Layer):  # type: ignore[misc, name-defined]
        def call(self, x: Any) -> Any:
            return x * 3.0

    model = keras.Sequential([keras.Input((4,)), Mine(), layers.Dense(2)])
    assert kinds(opened(model)) == ["Linear"]
    model.save(tmp_path / "mine.keras")
    with pytest.raises(ModelError, match=r"its layer .*Mine is none of Keras' own.*rushhour.import_model\(model"):
        opened(tmp_path / "mine.keras")


@pytest.mark.slow
def test_a_model_becomes_a_bundle_that_is_trained(model: Any, tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    pictures = random.integers(0, 256, (120, 16, 16, 3), dtype=np.uint8)
    labels = model.predict(pictures.astype(np.float32), verbose=0).argmax(1)
    labels[:8] = np.arange(8) % 4
    model.save(tmp_path / "My net.keras")
    found = rushhour.import_model(tmp_path / "My net.keras", data=(pictures, labels), out=tmp_path / "out")
    manifest = Bundle.open(tmp_path / "out").manifest
    assert (manifest.name, manifest.task.kind, found.understood.format) == ("my-net", "classification", "keras")
    (spec,) = manifest.signature.inputs
    assert (spec.dtype, spec.shape) == ("uint8", (16, 16, 3))
    assert manifest.preprocessing.scale == 1
    assert found.understood.preprocessing_from.startswith("the model scales its samples itself")
    assert not found.understood.why_untrainable
    finer = rushhour.train(found, (pictures, labels), out=tmp_path / "finer", epochs=1, tensorboard=False)
    assert [step.what for step in finer.bundle.manifest.lineage] == ["import", "train"]


@pytest.mark.long
@pytest.mark.slow
def test_another_backend_in_this_process(tmp_path: Path) -> None:
    """The graph is made in another process, and compared with the answers here."""
    code = """
import sys
import keras
import numpy as np
from rushhour.models.doors import bring
from rushhour.models.graph_answers import GraphAnswers
assert keras.backend.backend() == "openvino"
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation="softmax")])
model.save(sys.argv[1])
for each in (model, sys.argv[1]):
    arrival = bring(each).open()
    given = {"input": np.random.default_rng(0).random((5, 4), np.float32)}
    (expected,), (answer,) = arrival.answers(given), GraphAnswers(arrival.graph, "net")(given)
    np.testing.assert_allclose(answer, expected, atol=2e-2)  # that backend computes in bfloat16 where it can
print("equal")
"""
    given = {**os.environ, "KERAS_BACKEND": "openvino", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code, str(tmp_path / "net.keras")]
    done = subprocess.run(command, capture_output=True, text=True, env=given, timeout=170)
    assert done.stdout.strip() == "equal", done.stderr


@pytest.mark.slow
def test_importing_keras_leaves_the_environment_as_it_was() -> None:
    code = (
        "import os; os.environ['KERAS_BACKEND'] = 'jax'\n"
        "from rushhour.models.doors.keras.loading import keras_module\n"
        "print(keras_module().backend.backend(), os.environ['KERAS_BACKEND'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["torch", "jax"], done.stderr
