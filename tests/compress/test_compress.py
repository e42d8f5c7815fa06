"""int8 without training, and judging by the compiled artefact."""

from __future__ import annotations

import dataclasses
import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from rushhour.bundle import Bundle, Preprocessing, Source, Step, TensorSpec
from rushhour.compress import compress_weights, halve_weights, judge, outputs_of, quantize
from rushhour.data.dataset import Dataset, Split
from rushhour.engines import EngineConfig
from rushhour.errors import DataError, EngineError, ModelError, RushhourError
from rushhour.models import build, export
from rushhour.progress import Silent
from rushhour.system.machine import describe
from rushhour.task import Task
from rushhour.testing import bundles as tiny_module
from rushhour.testing.bundles import tiny_bundle

SOURCE = Source("rushhour.models:article", {"input_size": 12, "channels": 1, "classes": 4, "width": 0.5, "dense": 64})
PICTURES = Preprocessing(1 / 255, (0.25,), (0.2,), "NHWC->NCHW")


def pictures(n: int = 240, size: int = 12) -> Dataset:
    random = np.random.default_rng(0)
    inputs = random.integers(0, 256, (n, size, size, 1), dtype=np.uint8)
    labels = random.integers(0, 4, n)
    parts = [Split(inputs[at], labels[at]) for at in (slice(0, -160), slice(-160, -80), slice(-80, None))]
    return Dataset("noise", Task.classification(("a", "b", "c", "d")), *parts, PICTURES, "sum")


def parent_at(path: Path) -> Bundle:
    """Untrained, with large weights so that its answers are far from uniform."""
    torch.manual_seed(0)
    network = build(SOURCE)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.8)
    data = pictures()
    return export(
        network,
        name="noise",
        task=data.task,
        sample_spec=TensorSpec("image", "uint8", data.sample_shape),
        preprocessing=PICTURES,
        source=SOURCE,
        lineage=(Step("train", {"epochs": 0}),),
        samples=data.validation.inputs[:4],
        path=path,
    )


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return parent_at(tmp_path_factory.mktemp("compress") / "parent")


@pytest.fixture(scope="module")
def small(parent: Bundle) -> Bundle:
    return quantize(parent, pictures(), parent.path.with_name("small"), calibration=50, progress=Silent())


def test_the_int8_bundle_is_smaller_and_says_how_it_came_to_be(parent: Bundle, small: Bundle) -> None:
    manifest = Bundle.open(small.path).manifest
    assert manifest.precision == "int8"
    assert manifest.name == "noise"
    assert manifest.source is None
    assert small.weights is None
    assert manifest.signature == parent.manifest.signature
    assert manifest.parameters == parent.manifest.parameters
    assert manifest.lineage[:-1] == parent.manifest.lineage
    assert manifest.lineage[-1].what == "quantize"
    assert manifest.lineage[-1].settings["calibration"] == 50
    assert np.array_equal(small.samples()["image"], parent.samples()["image"])
    assert small.model_bytes < parent.model_bytes / 2.5
    graph = onnx.load(small.model)
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in graph.graph.node}
    assert str(Path.home()).encode() + b"/" not in small.model.read_bytes()


def test_a_graph_with_large_tensors_is_calibrated_on_fewer_samples(
    parent: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 samples of MiniLM took 167 s of a tuning run's four minutes."""
    module = importlib.import_module("rushhour.compress.quantize")  # the package has a function of this name
    monkeypatch.setattr(module, "_LEAST_CALIBRATION", 4)
    monkeypatch.setattr(module, "_VALUES", 300_000)
    used = quantize(parent, pictures(), tmp_path / "few", calibration=50, progress=Silent()).manifest.lineage[-1]
    assert 4 < used.settings["calibration"] < 50
    monkeypatch.setattr(module, "_VALUES", 1)
    used = quantize(parent, pictures(), tmp_path / "least", calibration=50, progress=Silent()).manifest.lineage[-1]
    assert used.settings["calibration"] == 4


def test_int8_answers_stay_near_on_both_engines_at_any_batch(parent: Bundle, small: Bundle) -> None:
    split = pictures().test
    before = outputs_of(parent, EngineConfig("onnxruntime", max_batch=16), split)
    for engine in ("openvino", "onnxruntime"):
        for batch in (1, 7):
            after = outputs_of(small, EngineConfig(engine, "int8", max_batch=batch), split)
            assert after.shape == before.shape
            assert float(np.abs(after - before).mean()) < 0.05
            assert float((after.argmax(1) == before.argmax(1)).mean()) > 0.8


def test_quantising_again_gives_the_same_bundle(parent: Bundle, small: Bundle, tmp_path: Path) -> None:
    again = quantize(parent, pictures(), tmp_path / "again", calibration=50, progress=Silent())
    assert again.manifest.hash == small.manifest.hash


class _Never:
    """Progress that must not be made."""

    def start(self, what: str, total: float | None = None) -> None:
        raise AssertionError(what)

    advance = done = start


def test_the_same_work_is_returned_and_other_work_replaces_it(parent: Bundle, small: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "small"
    shutil.copytree(small.path, out)
    assert quantize(parent, pictures(), out, calibration=50, progress=_Never()).manifest == small.manifest
    judged = judge(pictures().task, "test", np.zeros(4, np.int64), np.eye(4), None)
    copied = Bundle.open(shutil.copytree(parent.path, tmp_path / "judged")).with_metrics({"test": judged})
    assert copied.manifest.hash != parent.manifest.hash
    kept = quantize(copied, pictures(), out, calibration=50, progress=_Never())
    assert kept.manifest == small.manifest, "a metric of the parent changes nothing in its child"
    (out / "model.onnx").write_bytes(b"damaged")
    assert quantize(parent, pictures(), out, calibration=50, progress=Silent()).manifest == small.manifest
    other = quantize(parent, pictures(), out, calibration=20, seed=1, progress=Silent())
    assert other.manifest.hash != small.manifest.hash
    assert Bundle.open(out).manifest == other.manifest


@pytest.mark.slow
def test_it_is_silent_and_reports_to_nobody(parent: Bundle, tmp_path: Path) -> None:
    code = (
        "import sys, os, pathlib; sys.path.insert(0, 'tests/compress'); import test_compress as t; "
        "small = t.quantize(t.Bundle.open(pathlib.Path(sys.argv[1])), t.pictures(), pathlib.Path(sys.argv[2]), "
        "calibration=20, progress=t.Silent()); "
        "assert 'NNCF_CI' not in os.environ; del sys.modules['pytest']; "
        "kind = type(sys.modules['nncf.telemetry'].telemetry).__name__; assert kind == 'MagicMock', kind"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(parent.path), str(tmp_path / "small")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_what_cannot_be_quantised_is_refused(parent: Bundle, small: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"takes samples of uint8\(12, 12, 1\), but these are uint8\(14, 14, 1\)"):
        quantize(parent, pictures(size=14), out, progress=Silent())
    as_floats = pictures()
    parts = ("train", "validation", "test")
    floats = {p: Split(getattr(as_floats, p).inputs.astype(np.float32), getattr(as_floats, p).targets) for p in parts}
    as_floats = dataclasses.replace(as_floats, **floats)
    with pytest.raises(DataError, match="float32"):
        quantize(parent, as_floats, out, progress=Silent())
    with pytest.raises(ModelError, match="quantised already"):
        quantize(small, pictures(), out, progress=Silent())
    with pytest.raises(ModelError, match="0 calibration samples"):
        quantize(parent, pictures(), out, calibration=0, progress=Silent())
    assert not out.exists()


def test_more_calibration_than_data_takes_all_data(parent: Bundle, tmp_path: Path) -> None:
    small = quantize(parent, pictures(), tmp_path / "small", calibration=10_000, progress=Silent())
    assert small.manifest.lineage[-1].settings["calibration"] == 80


def test_torch_does_not_run_an_int8_bundle(small: Bundle) -> None:
    with pytest.raises((EngineError, ModelError)) as raised:
        outputs_of(small, EngineConfig("torch", "f32"), pictures().test)
    assert isinstance(raised.value, RushhourError)


def test_outputs_come_in_order_from_every_engine(parent: Bundle) -> None:
    split = pictures().test
    expected = None
    session = onnxruntime.InferenceSession(parent.model, providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"image": split.inputs})
    for engine in ("openvino", "onnxruntime", "torch"):
        outputs = outputs_of(parent, EngineConfig(engine, streams=2, max_batch=9), split)
        assert np.allclose(outputs, expected, atol=1e-4), engine


def test_samples_that_do_not_fit_are_not_judged(parent: Bundle) -> None:
    with pytest.raises(DataError, match="does not fit"):
        outputs_of(parent, EngineConfig("onnxruntime"), pictures(size=14).test)


def test_a_judgement_is_paired_with_the_reference() -> None:
    task = pictures().task
    targets = np.arange(400) % 4
    reference = np.eye(4)[targets]
    worse = reference.copy()
    worse[:20] = np.roll(worse[:20], 1, axis=1)
    alone = judge(task, "test", targets, reference, None)
    assert (alone.value, alone.drop, alone.drop_interval, alone.n) == (1.0, 0.0, (0.0, 0.0), 400)
    accuracy = judge(task, "validation", targets, worse, reference)
    assert (accuracy.metric, accuracy.split, accuracy.value) == ("accuracy", "validation", 0.95)
    assert accuracy.drop == pytest.approx(0.05)
    assert accuracy.drop_interval[0] < 0.05 < accuracy.drop_interval[1]


# A budget


def unlabelled() -> Dataset:
    """Judged by agreement: with labels at random, int8 may be right as often as f32."""
    data = pictures(400)
    parts = {
        part: Split(getattr(data, part).inputs, np.zeros((len(getattr(data, part)), 0), np.float32))
        for part in ("train", "validation", "test")
    }
    return dataclasses.replace(data, **parts)


def quantizers(bundle: Bundle) -> int:
    return sum(node.op_type == "QuantizeLinear" for node in onnx.load(bundle.model).graph.node)


def drop_of(bundle: Bundle, parent: Bundle, split: Split) -> float:
    config = EngineConfig("openvino", max_batch=16)
    before = outputs_of(parent, config, split)
    after = outputs_of(bundle, EngineConfig("openvino", bundle.manifest.precision, max_batch=16), split)
    return judge(pictures().task, "validation", split.targets, after, before).drop


@pytest.mark.slow
def test_accuracy_control_comes_only_where_the_plain_result_misses_the_budget(parent: Bundle, tmp_path: Path) -> None:
    data = unlabelled()
    plain = quantize(parent, data, tmp_path / "plain", calibration=20, progress=Silent())
    missed = drop_of(plain, parent, data.validation)
    assert missed > 0, "or this test shows nothing"
    inside = quantize(parent, data, tmp_path / "inside", calibration=20, max_drop=1.0, progress=Silent())
    assert inside.manifest.lineage[-1].settings["control"] == "not needed"
    assert inside.manifest.files["model.onnx"] == plain.manifest.files["model.onnx"]
    tight = quantize(parent, data, tmp_path / "tight", calibration=20, max_drop=missed / 4, progress=Silent())
    said = tight.manifest.lineage[-1].settings["control"]
    assert str(said).endswith("quantizers given back")
    assert 0 < quantizers(tight) < quantizers(plain)
    assert drop_of(tight, parent, data.validation) < missed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inside", "plain", "tight"]
    again = quantize(parent, data, tmp_path / "tight", calibration=20, max_drop=missed / 4, progress=_Never())
    assert again.manifest == tight.manifest
    assert quantize(parent, data, tmp_path / "tight", calibration=20, progress=Silent()).manifest == plain.manifest


def test_a_budget_that_nothing_meets_leaves_the_nearest_miss(
    parent: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise ModelError("accuracy control fell over")

    monkeypatch.setattr(sys.modules["rushhour.compress.quantize"]._Control, "_controlled", fails)
    made = quantize(parent, unlabelled(), tmp_path / "out", calibration=20, max_drop=0.0, progress=Silent())
    assert made.manifest.lineage[-1].settings["control"] == "failed: accuracy control fell over"
    assert quantizers(made) > 0


# Weights alone


def test_int8_weights_run_wherever_the_parent_does(parent: Bundle, tmp_path: Path) -> None:
    small = compress_weights(parent, tmp_path / "w8", progress=Silent())
    assert (small.manifest.name, small.manifest.precision, small.manifest.source) == ("noise", "f32", None)
    assert small.weights is None
    assert small.model_bytes < parent.model_bytes / 2
    split = pictures().test
    before = outputs_of(parent, EngineConfig("onnxruntime", max_batch=16), split)
    configs = [EngineConfig("openvino", max_batch=16), EngineConfig("onnxruntime", max_batch=16)]
    if describe().has_bf16:
        configs.append(EngineConfig("openvino", "bf16", max_batch=16))
    for config in configs:
        assert float(np.abs(outputs_of(small, config, split) - before).mean()) < 0.03
    assert compress_weights(parent, tmp_path / "w8", progress=_Never()).manifest == small.manifest
    with pytest.raises(ModelError, match="quantised already"):
        quantize(small, pictures(), tmp_path / "twice", progress=Silent())
    with pytest.raises(ModelError, match="quantised already"):
        halve_weights(small, tmp_path / "twice", progress=Silent())


def test_f16_weights_answer_to_three_digits(parent: Bundle, tmp_path: Path) -> None:
    small = halve_weights(parent, tmp_path / "f16", progress=Silent())
    assert (small.manifest.name, small.manifest.precision) == ("noise", "f32")
    assert parent.model_bytes * 0.45 < small.model_bytes < parent.model_bytes * 0.6
    split = pictures().test
    before = outputs_of(parent, EngineConfig("onnxruntime", max_batch=16), split)
    for engine in ("openvino", "onnxruntime"):
        after = outputs_of(small, EngineConfig(engine, max_batch=16), split)
        np.testing.assert_allclose(after, before, atol=5e-3)
        assert not np.array_equal(after, before)
    assert halve_weights(parent, tmp_path / "f16", progress=_Never()).manifest == small.manifest
    with pytest.raises(ModelError, match="stored in f16 already"):
        quantize(small, pictures(), tmp_path / "twice", progress=Silent())


def test_what_f16_cannot_hold_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="no tensor of 1,024 or more weights"):
        halve_weights(tiny_bundle(tmp_path / "small"), tmp_path / "out", progress=Silent())
    weights = tiny_module._weights
    monkeypatch.setattr(tiny_module, "_weights", lambda *of: weights(*of) * np.float32(1e6))
    with pytest.raises(ModelError, match="that f16 can hold"):
        halve_weights(tiny_bundle(tmp_path / "huge", shape=(32, 32, 1)), tmp_path / "out", progress=Silent())
    assert not (tmp_path / "out").exists()


def test_a_graph_alone_is_enough(parent: Bundle, tmp_path: Path) -> None:
    manifest = msgspec.structs.replace(parent.manifest, source=None)
    alone = Bundle.create(tmp_path / "alone", manifest, lambda file: shutil.copyfile(parent.model, file) and None)
    assert alone.weights is None
    assert (
        quantize(alone, pictures(), tmp_path / "q", calibration=20, progress=Silent()).model_bytes < alone.model_bytes
    )
    assert compress_weights(alone, tmp_path / "w", progress=Silent()).model_bytes < alone.model_bytes
    assert halve_weights(alone, tmp_path / "h", progress=Silent()).model_bytes < alone.model_bytes


# What is no number


def test_answers_that_are_no_numbers_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tiny_module._weights
    monkeypatch.setattr(tiny_module, "_weights", lambda *of: weights(*of) * np.float32("nan"))
    broken = tiny_bundle(tmp_path / "broken")
    split = Split(np.zeros((3, 4, 4, 1), np.uint8), np.zeros(3, np.int64))
    with pytest.raises(ModelError, match="tiny on onnxruntime in f32 are no numbers: 3 of 3 samples") as raised:
        outputs_of(broken, EngineConfig("onnxruntime"), split)
    assert "\n" not in str(raised.value)


def test_data_that_is_no_number_is_said(tmp_path: Path) -> None:
    bundle = export(
        torch.nn.Linear(4, 2),
        name="line",
        task=Task(kind="regression", outputs=2),
        sample_spec=TensorSpec("input", "float32", (4,)),
        preprocessing=Preprocessing(),
        source=None,
        lineage=(),
        samples=np.ones((2, 4), np.float32),
        path=tmp_path / "line",
    )
    inputs = np.ones((5, 4), np.float32)
    inputs[3, 1] = np.inf
    with pytest.raises(DataError, match="holds NaN or infinity: sample 3 is the first"):
        outputs_of(bundle, EngineConfig("onnxruntime"), Split(inputs, np.zeros((5, 2), np.float32)))
