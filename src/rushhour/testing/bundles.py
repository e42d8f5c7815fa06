"""A small, valid bundle in a few milliseconds, without torch: for the tests of everything that takes a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from rushhour.bundle import Bundle, Column, Manifest, OpenDimension, Preprocessing, Signature, Table, TensorSpec
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


TEXT_INPUTS: Final = ("tokens", "mask")
TEXT_OUTPUTS: Final = ("scores", "tags")
_WORDS, _WIDTH = 50, 4


def tiny_text_bundle(path: Path, *, name: str = "tiny-text", longest: int = 32, seed: int = 0) -> Bundle:
    """Write a bundle of a model whose samples differ in length: int64 `tokens` and `mask`, of 1 to `longest` each.

    `scores` is the softmax of a projection of the mean of the tokens that the mask counts; `tags` is a number for each
    of them. Both depend on the mask: without it, padding would change the first.

    Args:
        path: the bundle's folder; replaced if it is there.
        name: of the model.
        longest: tokens of a sample.
        seed: of the weights and of the 8 samples that the bundle carries.
    """
    import onnx

    signature = Signature(
        inputs=(TensorSpec("tokens", "int64", (longest,), below=_WORDS), TensorSpec("mask", "int64", (longest,))),
        outputs=(TensorSpec("scores", "float32", (3,)), TensorSpec("tags", "float32", (longest,))),
        open=(
            OpenDimension(
                "length", longest, {"tokens": 0, "mask": 0, "tags": 0}, padding=dict.fromkeys(TEXT_INPUTS, 0)
            ),
        ),
    )
    manifest = Manifest(name=name, signature=signature, task=Task.classification(("a", "b", "c")))
    random = np.random.default_rng(seed)
    samples = {each: np.zeros((8, longest * 3 // 4), np.int64) for each in TEXT_INPUTS}
    for row, length in enumerate([*random.integers(1, longest * 3 // 4, 7).tolist(), longest * 3 // 4]):
        samples["tokens"][row, :length] = random.integers(1, _WORDS, length)
        samples["mask"][row, :length] = 1
    return Bundle.create(path, manifest, lambda file: onnx.save(_text_graph(seed), file), samples=samples)


def tiny_text_answers(tokens: NDArray[np.int64], *, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """What the bundle of `tiny_text_bundle` answers, in numpy: `scores` `(n, 3)`, `tags` `(n, length)`.

    Args:
        tokens: shape `(n, length)`, without padding.
        seed: as for `tiny_text_bundle`.
    """
    words, project, marks = _text_weights(seed)
    logits = words[tokens].mean(axis=1) @ project
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return {"scores": powers / powers.sum(axis=1, keepdims=True), "tags": marks[tokens]}


def _text_weights(seed: int) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    random = np.random.default_rng([seed, 2])
    shapes = ((_WORDS, _WIDTH), (_WIDTH, 3), (_WORDS,))
    words, project, marks = (random.uniform(-2, 2, shape).astype(np.float32) for shape in shapes)
    return words, project, marks


def _text_graph(seed: int) -> Any:
    from onnx import TensorProto, checker, helper, numpy_helper

    words, project, marks = _text_weights(seed)
    nodes = [
        helper.make_node("Cast", ["mask"], ["counted"], to=TensorProto.FLOAT),
        helper.make_node("Gather", ["words", "tokens"], ["embedded"], axis=0),
        helper.make_node("Unsqueeze", ["counted", "last"], ["weights"]),
        helper.make_node("Mul", ["embedded", "weights"], ["weighted"]),
        helper.make_node("ReduceSum", ["weighted", "second"], ["total"], keepdims=0),
        helper.make_node("ReduceSum", ["counted", "second"], ["count"], keepdims=1),
        helper.make_node("Div", ["total", "count"], ["mean"]),
        helper.make_node("MatMul", ["mean", "project"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["scores"], axis=1),
        helper.make_node("Gather", ["marks", "tokens"], ["marked"], axis=0),
        helper.make_node("Mul", ["marked", "counted"], ["tags"]),
    ]
    constants = {"words": words, "project": project, "marks": marks, "last": np.array([2]), "second": np.array([1])}
    graph = helper.make_graph(
        nodes,
        "tiny-text",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"]) for name in TEXT_INPUTS],
        [
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 3]),
            helper.make_tensor_value_info("tags", TensorProto.FLOAT, ["batch", "length"]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    checker.check_model(model)
    return model


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


TABLE: Final = Table(
    (
        Column("age", "number", fill=40.0, optional=True),
        Column("joined", "date", fill=18_000.0),
        Column("job", "category", ("doctor", "writer"), optional=True),
        Column("zip", "category", ("1010", "1020", "8010")),
    ),
    targets=("first", "second", "third", "fourth"),
    left_out=("note",),
)
"""Of `tiny_table_bundle`."""


def tiny_table_bundle(path: Path, *, name: str = "tiny-table") -> Bundle:
    """Write a bundle that takes rows of named values, and answers each sample with itself, plus zero.

    Args:
        path: the bundle's folder; replaced if it is there.
        name: of the model.
    """
    import onnx
    from onnx import TensorProto, helper

    width = len(TABLE.columns)
    graph = helper.make_graph(
        [helper.make_node("Add", ["input", "zero"], ["values"])],
        "table",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", width])],
        [helper.make_tensor_value_info("values", TensorProto.FLOAT, ["n", width])],
        [helper.make_tensor("zero", TensorProto.FLOAT, [width], [0.0] * width)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    manifest = Manifest(
        name=name,
        signature=Signature(
            inputs=(TensorSpec("input", "float32", (width,)),), outputs=(TensorSpec("values", "float32", (width,)),)
        ),
        task=Task("regression", outputs=width),
        preprocessing=Preprocessing(table=TABLE),
    )
    samples = np.array([[31, 18_262, 1, 3], [40, 18_000, 0, 1], [52.5, 17_000.5, 2, 2]], np.float32)
    return Bundle.create(path, manifest, model=lambda file: onnx.save(model, file), samples={"input": samples})
