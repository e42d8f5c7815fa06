"""An ONNX file becomes a bundle that can be trained, pruned, distilled and tuned; what cannot is served as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from graphs import graph_of
from numpy.typing import NDArray
from onnx import TensorProto, helper
from safetensors.torch import load_file
from test_converted_networks import exported

import rushhour
from rushhour.api.importing import ImportResult
from rushhour.bundle import Bundle, Preprocessing, Tiling
from rushhour.compress import Distil, Prune, Recipe, Store, apply
from rushhour.compress.quantize import quantize
from rushhour.data.dataset import Dataset, Split
from rushhour.errors import BundleError, DataError, GoalError, ModelError, TaskError
from rushhour.models import build, import_onnx, is_imported, load_deployed
from rushhour.models.converted import Program
from rushhour.models.importing import Given
from rushhour.progress import Silent
from rushhour.task import Task
from rushhour.testing.gallery import data, specimen
from rushhour.tune.shapes import shapes_of, why_untrainable

node = helper.make_node
CLASSES = 3


def typed(model: onnx.ModelProto, *shape: int) -> onnx.ModelProto:
    for output in model.graph.output:
        output.type.CopyFrom(helper.make_tensor_type_proto(TensorProto.FLOAT, ["n", *shape]))
    return model


def weights(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def pictures_model() -> onnx.ModelProto:
    """As tf2onnx writes it: channels last, a batch norm in parts, dense layers as products and sums."""
    nodes = [
        node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]), node("Conv", ["t", "k"], ["c"], pads=[1, 1, 1, 1]),
        node("Mul", ["c", "gamma"], ["m"]), node("Add", ["m", "beta"], ["b"]), node("Relu", ["b"], ["r"]),
        node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Transpose", ["p"], ["q"], perm=[0, 2, 3, 1]), node("Reshape", ["q", "flat"], ["f"]),
        node("MatMul", ["f", "w1"], ["d1"]), node("Add", ["d1", "b1"], ["e1"]), node("Relu", ["e1"], ["r1"]),
        node("MatMul", ["r1", "w2"], ["d2"]), node("Add", ["d2", "b2"], ["e2"]), node("Softmax", ["e2"], ["y"]),
    ]  # fmt: skip
    constants = {
        "k": weights(16, 3, 3, 3), "gamma": weights(1, 16, 1, 1), "beta": weights(1, 16, 1, 1),
        "flat": np.array([-1, 256]), "w1": weights(256, 32), "b1": weights(32), "w2": weights(32, CLASSES, seed=1),
        "b2": weights(CLASSES),
    }  # fmt: skip
    return typed(graph_of(nodes, constants, shape=("n", 8, 8, 3), opset=13), CLASSES)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("elsewhere") / "Cats and dogs.onnx"
    onnx.save(pictures_model(), path)
    return path


@pytest.fixture(scope="module")
def dataset(file: Path) -> Dataset:
    """Pictures, labelled by the model itself on pixels from -1 to 1."""
    import onnxruntime

    random = np.random.default_rng(3)
    pictures = (random.random((600, 1, 1, 3)) * 200 + random.random((600, 8, 8, 3)) * 55).astype(np.uint8)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (answers,) = session.run(None, {"x": pictures.astype(np.float32) / 127.5 - 1})
    labels = answers.argmax(1)
    parts = [Split(pictures[at], labels[at]) for at in (slice(0, 300), slice(300, 450), slice(450, 600))]
    own = Preprocessing(1 / 255, (0.5, 0.5, 0.5), (0.29, 0.29, 0.29), "NHWC->NCHW")
    return Dataset("own labels", Task.classification(("cat", "dog", "bird")), *parts, own, "own")


@pytest.fixture(scope="module")
def imported(file: Path, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> ImportResult:
    return rushhour.import_model(file, out=tmp_path_factory.mktemp("imported") / "bundle", data=dataset)


def test_a_file_becomes_a_bundle_with_its_network(imported: ImportResult, dataset: Dataset) -> None:
    manifest, found = Bundle.open(imported.bundle.path).manifest, imported.understood
    assert (manifest.name, manifest.task, found.layout, found.opset) == ("cats-and-dogs", dataset.task, "NHWC", 13)
    assert [step.what for step in manifest.lineage] == ["import"]
    (spec,) = manifest.signature.inputs
    assert (spec.name, spec.dtype, spec.shape) == ("x", "uint8", (8, 8, 3))
    assert found.layers == {"Linear": 2, "Conv2d": 1}
    assert not found.why_untrainable
    assert found.difference < 1e-5
    assert any("softmax" in note for note in found.notes)
    with torch.no_grad():
        answers = load_deployed(imported.bundle)(torch.from_numpy(dataset.test.inputs)).numpy()
    assert (answers.argmax(1) == dataset.test.targets).mean() == 1
    assert is_imported(imported.bundle)


@pytest.mark.slow
def test_an_import_may_cut_larger_pictures_and_what_is_made_of_it_cuts_them_alike(
    file: Path, dataset: Dataset, tmp_path: Path
) -> None:
    found = rushhour.import_model(file, out=tmp_path / "tiled", data=dataset, tiles="mean,overlap=2")
    assert Bundle.open(found.bundle.path).manifest.tiles == Tiling("mean", overlap=2)
    int8 = quantize(found.bundle, dataset, tmp_path / "int8", calibration=32, seed=0, progress=Silent())
    assert int8.manifest.tiles == Tiling("mean", overlap=2)
    for tiles in ("crop,overlap=2", "mean,overlap=8", Tiling("max", overlap=-1)):
        with pytest.raises(BundleError):
            rushhour.import_model(file, out=tmp_path / "none", data=dataset, tiles=tiles)
        assert not (tmp_path / "none").exists()


def test_channels_are_moved_first_before_pixels_are_scaled(imported: ImportResult) -> None:
    """As bytes: OpenVINO takes ten times as long to scale them before."""
    manifest = imported.bundle.manifest
    assert manifest.preprocessing.layout == "NHWC->NCHW"
    assert manifest.source is not None
    program = Program.from_text(str(manifest.source.arguments["program"]))
    assert "permute" not in [call.what for call in program.calls]


def test_pixels_are_scaled_as_the_labels_say(imported: ImportResult) -> None:
    found = imported.understood
    assert (found.preprocessing.scale, found.preprocessing.mean) == (2 / 255, (1.0, 1.0, 1.0))
    assert found.preprocessing_from.startswith("-1 to 1, by accuracy on 256 samples: -1 to 1 1.000")
    text = dict(imported.lines)
    assert text["preprocessing"].startswith("(x * 0.00784314 - [1, 1, 1]) / [1, 1, 1], NHWC->NCHW (-1 to 1")
    assert json.loads(json.dumps(imported.as_dict()))["why_untrainable"] == ""


def test_training_begins_with_the_weights_of_the_file(imported: ImportResult, dataset: Dataset, tmp_path: Path) -> None:
    def state(bundle: Bundle) -> dict[str, torch.Tensor]:
        assert bundle.weights is not None
        return load_file(bundle.weights)

    finer = rushhour.train(imported.bundle, dataset, out=tmp_path / "finer", epochs=1, lr=1e-9, tensorboard=False)
    before, after = state(imported.bundle), state(finer.bundle)
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=1e-5, atol=1e-5)
    manifest = finer.bundle.manifest
    assert [step.what for step in manifest.lineage] == ["import", "train"]
    assert manifest.signature == imported.bundle.manifest.signature
    assert manifest.preprocessing == imported.bundle.manifest.preprocessing
    assert manifest.name == "cats-and-dogs"
    again = rushhour.train(imported.bundle, dataset, out=tmp_path / "finer", epochs=1, lr=1e-9, tensorboard=False)
    assert again.bundle.manifest.hash == manifest.hash
    fresh = build(manifest.source) if manifest.source is not None else None
    assert fresh is not None
    for key, value in fresh.named_parameters():
        assert not torch.allclose(value, before[key], atol=1e-2)


def test_a_file_is_trained_itself(file: Path, dataset: Dataset, tmp_path: Path) -> None:
    finer = rushhour.train(file, dataset, out=tmp_path / "finer", epochs=1, tensorboard=False)
    assert [step.what for step in finer.bundle.manifest.lineage] == ["import", "train"]
    assert not list(tmp_path.glob(".finer.imported"))


def test_what_training_refuses(imported: ImportResult, dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(GoalError, match="leave out --search"):
        rushhour.train(imported.bundle, dataset, out=tmp_path / "out", search=2)
    onnx.save(typed(graph_of([node("Det", ["x"], ["y"])], shape=("n", 4, 4))), tmp_path / "det.onnx")
    x, y = weights(80, 4, 4), weights(80, 1)
    with pytest.raises((ModelError, TaskError)):
        rushhour.train(tmp_path / "det.onnx", (x, y), out=tmp_path / "out")


def test_a_recipe_and_the_tuner_take_it(imported: ImportResult, dataset: Dataset, tmp_path: Path) -> None:
    assert why_untrainable(imported.bundle, ()) == ""
    assert len(shapes_of(imported.bundle, ())) > 3
    recipe = Recipe((Prune(ratio=0.3, round_to=1, epochs=0), Distil(1)))
    *_, last = apply(recipe, imported.bundle, dataset, Store(tmp_path / "store"), progress=Silent())
    assert last.manifest.parameters < 0.8 * imported.bundle.manifest.parameters
    assert [step.what for step in last.manifest.lineage] == ["import", "prune", "distil"]
    assert "left as it is" not in last.manifest.lineage[1].settings


@pytest.mark.slow
@pytest.mark.long
def test_a_file_is_compressed_itself(file: Path, dataset: Dataset, tmp_path: Path) -> None:
    found = rushhour.compress(
        file, dataset, out=tmp_path / "small", recipe="lowrank:0.3,distil:2,int8", max_accuracy_drop="30%"
    )
    assert found.record.attempts[0].stages[-1].step == "int8"
    assert found.bundle.manifest.lineage[0].what == "import"


def test_the_command_line_shows_what_was_understood(file: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from rushhour.cli import cli

    arguments = ["import", str(file), "--out", str(tmp_path / "b"), "--json", str(tmp_path / "b.json")]
    done = CliRunner().invoke(cli, [*arguments, "--classes", "cat,dog,bird", "--scale", "0.5"])
    assert done.exit_code == 0, done.output
    for words in ("pictures in NHWC", "classification of 3 classes", "x * 0.5", "2 Linear"):
        assert words in " ".join(done.output.split())
    assert json.loads((tmp_path / "b.json").read_text())["layers"] == {"Linear": 2, "Conv2d": 1}
    assert Bundle.open(tmp_path / "b").manifest.task.classes == ("cat", "dog", "bird")
    (tmp_path / "no.onnx").write_text("no")
    refused = CliRunner().invoke(cli, ["import", str(tmp_path / "no.onnx"), "--out", str(tmp_path / "c")])
    assert isinstance(refused.exception, ModelError)
    assert not (tmp_path / "c").exists()


UNTRAINABLE: dict[str, tuple[onnx.ModelProto, Task, str]] = {
    "operator": (
        typed(graph_of([node("Mul", ["x", "x"], ["a"]), node("Hardmax", ["a"], ["y"])], opset=12), 4),
        Task("regression", outputs=4),
        "before opset 13",
    ),
    "outputs": (
        typed(graph_of([node("Neg", ["x"], ["y"]), node("Abs", ["x"], ["z"])], outputs=("y", "z")), 4),
        Task("regression", outputs=4),
        "2 outputs",
    ),
}


@pytest.mark.parametrize(("model", "task", "why"), UNTRAINABLE.values(), ids=UNTRAINABLE)
def test_what_cannot_be_trained_is_served_as_it_is(
    tmp_path: Path, model: onnx.ModelProto, task: Task, why: str
) -> None:
    onnx.save(model, tmp_path / "net.onnx")
    bundle, found = import_onnx(tmp_path / "net.onnx", tmp_path / "bundle", task=task)
    assert why in found.why_untrainable
    assert (bundle.manifest.source, bundle.weights, found.layers) == (None, None, {})
    assert bundle.manifest.signature.outputs[0].name == "y"
    assert "not possible" in dict(ImportResult(bundle, found).lines)["training"]


def test_the_task_is_read_off_the_graph(file: Path, tmp_path: Path) -> None:
    bundle, found = import_onnx(file, tmp_path / "classes")
    assert (found.task, found.task_from) == (Task.classification(("0", "1", "2")), "it ends in a softmax")
    assert bundle.manifest.signature.outputs[0].name == "probabilities"


def test_answers_that_are_no_vectors_are_of_a_known_task_or_refused(tmp_path: Path) -> None:
    """A detector or a network of class maps ended in an unexpected error."""
    nodes = [node("Reshape", ["x", "s"], ["y"])]
    onnx.save(typed(graph_of(nodes, {"s": np.array([0, 2, 2])}), 2, 2), tmp_path / "maps.onnx")
    with pytest.raises(
        TaskError, match=r"cannot tell what maps is for: an answer of its output y has the shape \(2, 2\)"
    ):
        import_onnx(tmp_path / "maps.onnx", tmp_path / "bundle")
    nodes = [node("ArgMax", ["x"], ["i"], axis=3, keepdims=0), node("Cast", ["i"], ["y"], to=TensorProto.UINT8)]
    model = graph_of(nodes, shape=("n", 4, 4, 3))
    model.graph.output[0].type.CopyFrom(helper.make_tensor_type_proto(TensorProto.UINT8, ["n", 4, 4]))
    onnx.save(model, tmp_path / "segments.onnx")
    task = Task("segmentation", ("a", "b", "c"), 3)
    bundle, found = import_onnx(tmp_path / "segments.onnx", tmp_path / "bundle", task=task)
    assert (found.task, found.task_from, bundle.manifest.task) == (task, "given", task)


def test_data_or_a_task_that_does_not_fit_is_refused(file: Path, tmp_path: Path) -> None:
    given = Given(np.zeros((20, 9, 9, 3), np.uint8), np.zeros(20, np.int64), Preprocessing())
    with pytest.raises(DataError, match="does not take these samples"):
        import_onnx(file, tmp_path / "bundle", task=Task.classification(("a", "b", "c")), given=given)
    with pytest.raises(TaskError, match="2 classes"):
        import_onnx(file, tmp_path / "other", task=Task.classification(("a", "b")))


def test_data_that_does_not_fit_is_refused_in_training(
    imported: ImportResult, dataset: Dataset, tmp_path: Path
) -> None:
    parts: Any = [Split(part.inputs[:, :7], part.targets) for part in (dataset.train, dataset.validation, dataset.test)]
    other = Dataset("other", dataset.task, *parts, dataset.preprocessing, "other")
    with pytest.raises(DataError, match="does not fit"):
        rushhour.train(imported.bundle, other, out=tmp_path / "out", epochs=1)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", ["residual", "depthwise", "unet", "patched", "next_block", "lstm", "squeeze_excited"])
def test_networks_of_torch_are_pruned_distilled_and_exported(name: str, tmp_path: Path) -> None:
    one = specimen(name)
    dataset = data(one.data)
    exported(one, tmp_path / "net.onnx")
    given = Given(dataset.train.inputs, dataset.train.targets, dataset.preprocessing)
    bundle, found = import_onnx(tmp_path / "net.onnx", tmp_path / "bundle", task=dataset.task, given=given)
    assert not found.why_untrainable
    recipe = Recipe((*(() if name == "lstm" else (Prune(ratio=0.3, round_to=1, epochs=0),)), Distil(1)))
    *_, last = apply(recipe, bundle, dataset, Store(tmp_path / "store"), progress=Silent())
    assert name == "lstm" or last.manifest.parameters < bundle.manifest.parameters
    load_deployed(last)
