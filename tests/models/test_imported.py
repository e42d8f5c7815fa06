"""ONNX files from elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from rushhour.bundle import Bundle
from rushhour.compress import compress_weights, halve_weights, judge, outputs_of, quantize
from rushhour.data import Split, load
from rushhour.engines import EngineConfig
from rushhour.errors import DataError, ModelError, RushhourError, TaskError
from rushhour.models import from_onnx, import_onnx
from rushhour.progress import Silent
from rushhour.task import Task

TASK = Task(kind="regression", outputs=3)


def onnx_file(path: Path, nodes: list[onnx.NodeProto] | None = None, shape: tuple[int | str, ...] = ("n", 64)) -> Path:
    """`tanh(x @ a) @ b`, of 64 numbers 3."""
    random = np.random.default_rng(0)
    weights = {"a": random.normal(size=(64, 48)), "b": random.normal(size=(48, 3))}
    standard = [
        helper.make_node("MatMul", ["x", "a"], ["first"]),
        helper.make_node("Tanh", ["first"], ["second"]),
        helper.make_node("MatMul", ["second", "b"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes or standard,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [shape[0], 3])],
        [onnx.numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def samples_in(path: Path) -> Path:
    np.savez(path, x=np.random.default_rng(1).normal(size=(200, 64)).astype(np.float32))
    return path


def test_a_file_and_samples_without_labels_are_enough(tmp_path: Path) -> None:
    bundle = from_onnx(onnx_file(tmp_path / "My net.onnx"), TASK, tmp_path / "bundle")
    manifest = Bundle.open(bundle.path).manifest
    assert (manifest.name, manifest.parameters, manifest.source) == ("my-net", 64 * 48 + 48 * 3, None)
    assert (manifest.signature.inputs[0].shape, manifest.signature.outputs[0].name) == ((64,), "y")
    data = load(str(samples_in(tmp_path / "x.npz")), task=manifest.task)
    assert not data.train.labelled
    assert data.task == TASK
    before = outputs_of(bundle, EngineConfig("openvino", max_batch=8), data.test)
    for small, precision in (
        (quantize(bundle, data, tmp_path / "int8", calibration=50, max_drop=0.05, progress=Silent()), "int8"),
        (compress_weights(bundle, tmp_path / "w8", progress=Silent()), "f32"),
        (halve_weights(bundle, tmp_path / "f16", progress=Silent()), "f32"),
    ):
        after = outputs_of(small, EngineConfig("onnxruntime", precision, max_batch=8), data.test)
        fidelity = judge(data.task, "test", data.test.targets, after, before)
        assert (fidelity.metric, small.model_bytes < bundle.model_bytes) == ("r2", True)
        assert 0 <= fidelity.drop < 0.05


def test_weights_beside_the_file_come_into_the_bundle(tmp_path: Path) -> None:
    file = onnx_file(tmp_path / "in.onnx")
    onnx.save(onnx.load(file), tmp_path / "out.onnx", save_as_external_data=True, size_threshold=0)
    outside = from_onnx(tmp_path / "out.onnx", TASK, tmp_path / "outside")
    inside = from_onnx(file, TASK, tmp_path / "inside")
    ones = Split(np.ones((2, 64), np.float32), np.zeros((2, 0), np.float32))
    answers = [outputs_of(bundle, EngineConfig("onnxruntime"), ones) for bundle in (inside, outside)]
    np.testing.assert_array_equal(*answers)


def changed(file: Path, change: Callable[[onnx.ModelProto], object]) -> Path:
    model = onnx.load(onnx_file(file))
    change(model)
    file.write_bytes(model.SerializeToString())
    return file


def without_numbers(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(tensor.dims, np.nan, np.float32), tensor.name))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: setattr(model.opset_import[0], "version", 999), "its opset is 999, and up to .* is known"),
        (lambda model: setattr(model, "ir_version", 999), r"its format \(IR\) is of version 999"),
        (lambda model: model.graph.ClearField("output"), "it has no output"),
        (without_numbers, "all its answers are NaN or infinite"),
    ],
    ids=["opset", "format", "no output", "NaN"],
)
def test_what_cannot_be_imported_says_why(
    tmp_path: Path, change: Callable[[onnx.ModelProto], object], words: str
) -> None:
    with pytest.raises(ModelError, match=words):
        import_onnx(changed(tmp_path / "net.onnx", change), tmp_path / "bundle")


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (lambda at: at / "none.onnx", "cannot read the model"),
        (lambda at: (at / "text.onnx", (at / "text.onnx").write_text("hello"))[0], "cannot read the model"),
        (lambda at: onnx_file(at / "one.onnx", shape=(1, 64)), "first dimension of x is fixed to 1"),
        (lambda at: onnx_file(at / "open.onnx", shape=("n", "width")), "ONNX Runtime cannot run the model"),
        (
            lambda at: onnx_file(
                at / "mixed.onnx",
                [
                    helper.make_node("MatMul", ["x", "a"], ["first"]),
                    helper.make_node("ReduceMean", ["first"], ["mean"], keepdims=1),
                    helper.make_node("Sub", ["first", "mean"], ["second"]),
                    helper.make_node("MatMul", ["second", "b"], ["y"]),
                ],
            ),
            "answers depend on the batch",
        ),
    ],
    ids=["none", "no ONNX", "fixed batch", "a width that is called open", "mixed samples"],
)
def test_files_that_cannot_be_served_are_refused(tmp_path: Path, file: Callable[[Path], Path], words: str) -> None:
    with pytest.raises(ModelError, match=words) as raised:
        from_onnx(file(tmp_path), TASK, tmp_path / "bundle")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "bundle").exists()


def test_an_output_that_does_not_fit_the_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="2 classes"):
        from_onnx(onnx_file(tmp_path / "net.onnx"), Task.classification(("a", "b")), tmp_path / "bundle")


def test_data_without_labels_needs_a_model_to_say_its_task(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no labels.*name a trained bundle"):
        load(str(samples_in(tmp_path / "x.npz")))


def test_samples_of_several_inputs_in_a_file(tmp_path: Path) -> None:
    samples = np.zeros(40, [("ids", np.int64, (5,)), ("weight", np.float32, (1,))])
    samples["ids"] = np.arange(40)[:, None]
    np.savez(tmp_path / "several.npz", x_train=samples[:30], x_test=samples[30:])
    data = load(str(tmp_path / "several.npz"), task=TASK)
    assert len(data.train) + len(data.validation) == 30
    assert len(data.test) == 10
    assert data.test.inputs["ids"][:, 0].tolist() == list(range(30, 40))
    samples["weight"][7] = np.nan
    np.savez(tmp_path / "nan.npz", x=samples)
    with pytest.raises(RushhourError, match="NaN"):
        load(str(tmp_path / "nan.npz"), task=TASK)
