"""A small, valid bundle in a few milliseconds, without torch: for the tests of everything that takes a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rushhour.bundle import Bundle, Manifest, Preprocessing, Signature, TensorSpec
from rushhour.task import Task

INPUT, OUTPUT = "image", "probabilities"
_SCALE = 1 / 255
_STEP = 1 / 127  # of quantised activations (pixels / 255)
_STEPS = {7: 1 / 63, 8: 1 / 127}  # of weights (within -1..1) by the bits they use


def tiny_bundle(
    path: Path,
    *,
    name: str = "tiny",
    shape: tuple[int, ...] = (4, 4, 1),
    classes: int = 3,
    seed: int = 0,
    precision: Literal["f32", "int8"] = "f32",
    weight_bits: Literal[7, 8] = 7,
) -> Bundle:
    """Write a bundle whose graph is `softmax(flatten(image / 255) @ weights)`, dynamic in the batch.

    Args:
        path: the bundle's folder; replaced if it is there.
        name: of the model.
        shape: of one sample, uint8.
        classes: length of one answer.
        seed: of the weights and of the 8 samples the bundle carries.
        precision: with `int8` the matrix product stands between QuantizeLinear and DequantizeLinear.
        weight_bits: that int8 weights use: with 8 a processor without VNNI saturates on them.
    """
    import onnx

    random = np.random.default_rng(seed)
    image = TensorSpec(name=INPUT, dtype="uint8", shape=shape)
    answer = TensorSpec(name=OUTPUT, dtype="float32", shape=(classes,))
    manifest = Manifest(
        name=name,
        signature=Signature(inputs=(image,), outputs=(answer,)),
        task=Task.classification(tuple(f"class {index}" for index in range(classes))),
        preprocessing=Preprocessing(scale=_SCALE),
        precision=precision,
        parameters=int(np.prod(shape)) * classes,
    )
    graph = _graph(_weights(shape, classes, seed), shape, weight_bits if precision == "int8" else None)
    return Bundle.create(
        path,
        manifest,
        model=lambda file: onnx.save(graph, file),
        samples={INPUT: random.integers(0, 256, (8, *shape), dtype=np.uint8)},
    )


def tiny_answers(images: NDArray[np.uint8], *, classes: int = 3, seed: int = 0) -> NDArray[np.float32]:
    """What the bundle of `tiny_bundle` answers, in numpy: shape `(n, classes)`.

    Args:
        images: shape `(n, *shape)`.
        classes: as for `tiny_bundle`.
        seed: as for `tiny_bundle`.
    """
    flat = images.reshape(len(images), -1).astype(np.float32) * np.float32(_SCALE)
    logits = flat @ _weights(images.shape[1:], classes, seed)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    answers: NDArray[np.float32] = powers / powers.sum(axis=1, keepdims=True)
    return answers


def _weights(shape: tuple[int, ...], classes: int, seed: int) -> NDArray[np.float32]:
    values = np.random.default_rng([seed, 1]).uniform(-1, 1, (int(np.prod(shape)), classes))
    return values.astype(np.float32)


def _graph(weights: NDArray[np.float32], shape: tuple[int, ...], bits: Literal[7, 8] | None) -> Any:
    from onnx import TensorProto, checker, helper, numpy_helper

    constants: dict[str, NDArray[Any]] = {"scale": np.array(_SCALE, np.float32)}
    nodes = [
        helper.make_node("Cast", [INPUT], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["pixels", "scale"], ["scaled"]),
        helper.make_node("Flatten", ["scaled"], ["flat"], axis=1),
    ]
    if bits is not None:
        constants |= {
            "step": np.array(_STEP, np.float32),
            "zero": np.array(0, np.int8),
            "weights_step": np.array(_STEPS[bits], np.float32),
            "weights_int8": np.rint(weights / _STEPS[bits]).astype(np.int8),
        }
        nodes += [
            helper.make_node("QuantizeLinear", ["flat", "step", "zero"], ["flat_int8"]),
            helper.make_node("DequantizeLinear", ["flat_int8", "step", "zero"], ["features"]),
            helper.make_node("DequantizeLinear", ["weights_int8", "weights_step", "zero"], ["weights"]),
        ]
    else:
        constants["weights"] = weights
        nodes.append(helper.make_node("Identity", ["flat"], ["features"]))
    nodes += [
        helper.make_node("MatMul", ["features", "weights"], ["logits"]),
        helper.make_node("Softmax", ["logits"], [OUTPUT], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(INPUT, TensorProto.UINT8, ["batch", *shape])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", weights.shape[1]])],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in constants.items()],
    )
    # Versions that engines of the last years read; onnx's own defaults are newer than some of them.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    checker.check_model(model)
    return model
