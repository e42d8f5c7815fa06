"""Imports whose samples differ in size: the dimension stays open, and padding is allowed where it changes nothing."""

from __future__ import annotations

import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from test_mixed_lengths import planned
from tritonclient.http import InferenceServerClient, InferInput

import rushhour
from conftest import serving
from rushhour.bundle import Bundle, OpenDimension, Preprocessing, Source, TensorSpec
from rushhour.engines import EngineConfig, Runner, open_engine
from rushhour.errors import ModelError
from rushhour.models import from_onnx
from rushhour.models.deployed import export
from rushhour.models.imported import signature_of
from rushhour.models.minilm import INPUTS, minilm
from rushhour.models.open_dimensions import open_dimensions
from rushhour.task import Task
from rushhour.testing.bundles import tiny_text_answers, tiny_text_bundle

ABC = Task.classification(("a", "b", "c"))


def sound(path: Path, *, pooling: str = "ReduceMean", out: tuple[str | int, ...] = ("n", 1)) -> Path:
    """A number for a sound of any length: the mean or the sum of its squares."""
    nodes = [
        helper.make_node("Mul", ["x", "x"], ["squares"]),
        helper.make_node(pooling, ["squares", "axes"], ["y"], keepdims=1),
    ]
    graph = helper.make_graph(
        nodes,
        "sound",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "time"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, out)],
        [onnx.numpy_helper.from_array(np.array([1]), "axes")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.mark.parametrize(("pooling", "is_padded"), [("ReduceMean", False), ("ReduceSum", True)])
def test_whether_zeros_behind_a_sample_change_its_answer_is_tried_out(
    pooling: str, is_padded: bool, tmp_path: Path
) -> None:
    bundle = from_onnx(sound(tmp_path / "sound.onnx", pooling=pooling), Task("regression", outputs=1), tmp_path / "b")
    (dimension,) = Bundle.open(bundle.path).manifest.signature.dimensions
    assert (dimension.name, dimension.smallest, dimension.largest, dimension.axes) == ("time", 1, 512, {"x": 0})
    assert bool(dimension.padding) is is_padded
    engine = open_engine(bundle, EngineConfig("openvino", max_batch=2))
    for length in (3, 512):
        samples = np.random.default_rng(length).random((2, length)).astype(np.float32)
        wanted = (samples**2).sum(1, keepdims=True) if is_padded else (samples**2).mean(1, keepdims=True)
        np.testing.assert_allclose(Runner(engine).infer({"x": samples})["y"], wanted, rtol=1e-4)
    engine.close()


def test_inputs_that_share_a_dimension_and_the_outputs_that_keep_it(tmp_path: Path) -> None:
    original = tiny_text_bundle(tmp_path / "original")
    bundle = from_onnx(original.model, ABC, tmp_path / "imported")
    (dimension,) = bundle.manifest.signature.dimensions
    assert dimension.axes == {"tokens": 0, "mask": 0, "tags": 0}
    assert dimension.padding == {"tokens": 0, "mask": 0}
    assert len(set(bundle.sizes())) == 8  # the noise that it carries is of several lengths
    engine = open_engine(bundle, EngineConfig("onnxruntime", max_batch=2))
    tokens = np.array([[3, 1, 4, 1, 5]])
    found = Runner(engine).infer({"tokens": tokens, "mask": np.ones_like(tokens)})
    engine.close()
    for name, wanted in tiny_text_answers(tokens).items():
        np.testing.assert_allclose(found[name], wanted, atol=1e-4)


def test_the_import_says_that_it_is_open_and_how_to_fix_it(tmp_path: Path) -> None:
    found = rushhour.import_model(sound(tmp_path / "sound.onnx", pooling="ReduceSum"), out=tmp_path / "out", length=64)
    assert found.bundle.manifest.signature.dimensions[0].largest == 64
    assert "its time is open" in found.understood.why_untrainable
    assert ("requests", "x float32[1 to 64] -> y float32[1]") in found.lines


def test_bounds_of_a_picture_are_its_largest_height_and_width() -> None:
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, "h", "w"])
    graph = helper.make_model(
        helper.make_graph([], "g", [image], [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])])
    )
    height, width = open_dimensions(graph, "g", size=(480, 640))
    assert (height.name, height.largest, height.axes) == ("h", 480, {"image": 1})
    assert (width.name, width.largest, width.axes) == ("w", 640, {"image": 2})
    spec = signature_of(graph, "g", (height, width)).inputs[0]
    assert spec.shape == (3, 480, 640)
    assert signature_of(graph, "g", (height, width)).declared(spec) == [3, -1, -1]


def test_pictures_of_any_size_are_answered_and_only_equal_sizes_share_a_batch(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["image", "weights"], ["maps"], pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["maps"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "pictures",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, "height", "width"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [onnx.numpy_helper.from_array(weights, "weights")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "p.onnx")
    found = rushhour.import_model(tmp_path / "p.onnx", out=tmp_path / "out", size="48x64")
    signature = found.bundle.manifest.signature
    assert [(each.name, each.largest) for each in signature.dimensions] == [("height", 48), ("width", 64)]
    assert signature.padded is None
    pictures = [
        np.random.default_rng(side).random((2, 3, side, 64 - side)).astype(np.float32) for side in (5, 48, 20, 5)
    ]
    both = []
    for name in ("openvino", "onnxruntime"):
        engine = open_engine(found.bundle, EngineConfig(name, max_batch=2))  # type: ignore[arg-type]
        both.append(np.concatenate([Runner(engine).infer({"image": each})["y"] for each in pictures]))
        engine.close()
    np.testing.assert_allclose(both[0], both[1], atol=1e-4)
    sent: dict[int, np.ndarray] = {}

    def call(number: int) -> None:
        with InferenceServerClient(server.url.partition("://")[2]) as client:
            tensor = InferInput("image", list(pictures[number].shape), "FP32")
            tensor.set_data_from_numpy(pictures[number])
            sent[number] = client.infer(found.bundle.manifest.name, [tensor]).as_numpy("y")

    with serving(planned(found.bundle, tmp_path / "run")) as server, ThreadPoolExecutor(4) as pool:
        list(pool.map(call, range(4)))
    np.testing.assert_allclose(np.concatenate([sent[number] for number in range(4)]), both[0], atol=1e-4)


@pytest.mark.parametrize(
    ("out", "says"),
    [(("n", "other"), "is none of its inputs'"), (("n", "time", "time"), "has the dimension time twice")],
)
def test_an_output_of_a_size_of_its_own_is_refused(out: tuple[str, ...], says: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=says) as refused:
        from_onnx(sound(tmp_path / "sound.onnx", out=out), Task("regression", outputs=1), tmp_path / "b")
    assert "\n" not in str(refused.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_texts_of_transformers_stay_open_and_bring_their_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="extra hf")
    import tokenizers
    import torch
    from test_hugging_face import bert
    from transformers import BertForSequenceClassification

    folder = bert(tmp_path / "bert")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 0, "a": 1, "b": 2, "?": 3}, unk_token="?"))
    (folder / "tokenizer.json").write_text(made.to_str())
    found = rushhour.import_model(folder, out=tmp_path / "out")
    manifest = Bundle.open(found.bundle.path).manifest
    (dimension,) = manifest.signature.dimensions
    assert (dimension.largest, dimension.padding) == (32, {"input_ids": 0})
    assert found.bundle.read_tokenizer() == made.to_str().encode()
    assert any("tokenizer.json" in note for note in found.understood.notes)
    assert len(set(found.bundle.sizes())) > 4
    assert "length is open" in found.understood.why_untrainable
    original = BertForSequenceClassification.from_pretrained(folder).eval()
    engine = open_engine(found.bundle, EngineConfig("openvino", max_batch=4))
    for length in (1, 2, 17, 32):
        tokens = np.random.default_rng(length).integers(1, 60, (3, length))
        with torch.no_grad():
            wanted = original(input_ids=torch.from_numpy(tokens)).logits.softmax(1).numpy()
        answers = next(iter(Runner(engine).infer({"input_ids": tokens}).values()))
        answers = np.exp(answers) / np.exp(answers).sum(1, keepdims=True) if answers.min() < 0 else answers
        np.testing.assert_allclose(answers, wanted, rtol=1e-3, atol=1e-4)
    engine.close()
    assert json.loads((folder / "config.json").read_text())["model_type"] == "bert"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """MiniLM with one layer, in torch too."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    sizes = {"vocabulary": 50, "hidden": 16, "layers": 1, "heads": 2, "intermediate": 32, "positions": 40}
    samples = np.zeros(8, [(name, np.int64, (20,)) for name in INPUTS])
    for row in range(8):
        samples["input_ids"][row, : 3 + 2 * row] = 1 + row
        samples["attention_mask"][row, : 3 + 2 * row] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return export(
            minilm(**sizes),
            name="small",
            task=Task("embedding", outputs=16),
            sample_spec=tuple(TensorSpec(name, "int64", (40,)) for name in INPUTS),
            preprocessing=Preprocessing(),
            source=Source("rushhour.models:minilm", sizes),
            lineage=(),
            samples=samples,
            path=tmp_path_factory.mktemp("small") / "small",
            dimensions=(OpenDimension("length", 40, dict.fromkeys(INPUTS, 0), padding=dict.fromkeys(INPUTS, 0)),),
        )


def sentence(rows: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    ids = np.random.default_rng([seed, length]).integers(1, 50, (rows, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def test_minilm_of_any_length_runs_on_all_engines_with_equal_answers(small: Bundle) -> None:
    answers = []
    for name in ("torch", "openvino", "onnxruntime"):
        engine = open_engine(small, EngineConfig(name, streams=2, max_batch=3))  # type: ignore[arg-type]
        runner = Runner(engine)
        shapes = ((1, 1), (3, 40), (2, 7), (7, 13), (1, 40))
        answers.append(np.concatenate([runner.infer(sentence(*shape))["embedding"] for shape in shapes]))
        engine.close()
    np.testing.assert_allclose(answers[1], answers[0], atol=1e-4)
    np.testing.assert_allclose(answers[2], answers[0], atol=1e-4)


def test_a_server_on_torch_gives_a_crowd_of_mixed_lengths_the_answers_of_each_alone(
    small: Bundle, tmp_path: Path
) -> None:
    engine = open_engine(small, EngineConfig("onnxruntime"))
    runner = Runner(engine)

    def call(seed: int) -> None:
        with InferenceServerClient(server.url.partition("://")[2]) as client:
            for turn in range(10):
                sample = sentence(1 + turn % 3, int(np.random.default_rng([seed, turn]).integers(1, 41)), seed)
                inputs = [InferInput(name, list(array.shape), "INT64") for name, array in sample.items()]
                for tensor, array in zip(inputs, sample.values(), strict=True):
                    tensor.set_data_from_numpy(array)
                found = client.infer("small", inputs).as_numpy("embedding")
                np.testing.assert_allclose(found, runner.infer(sample)["embedding"], atol=1e-4)

    with serving(planned(small, tmp_path / "run", "torch")) as server, ThreadPoolExecutor(6) as pool:
        list(pool.map(call, range(6)))
    engine.close()
