"""int8 without training, and judging by the compiled artefact."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from rushhour.bundle import Bundle, Preprocessing, Source, Step, TensorSpec
from rushhour.compress import judge, outputs_of, quantize
from rushhour.data.dataset import Dataset, Split
from rushhour.engines import EngineConfig
from rushhour.errors import DataError, EngineError, ModelError, RushhourError
from rushhour.models import build, export
from rushhour.progress import Silent
from rushhour.task import Task

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
    assert manifest.name == "noise-int8"
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


def test_it_is_silent_and_reports_to_nobody(parent: Bundle, tmp_path: Path) -> None:
    code = (
        "import sys, os, pathlib; sys.path.insert(0, 'tests'); import test_compress as t; "
        "small = t.quantize(t.Bundle.open(pathlib.Path(sys.argv[1])), t.pictures(), pathlib.Path(sys.argv[2]), "
        "calibration=20, progress=t.Silent()); "
        "assert 'NNCF_CI' not in os.environ; del sys.modules['pytest']; "
        "kind = type(sys.modules['nncf.telemetry'].telemetry).__name__; assert kind == 'MagicMock', kind"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(parent.path), str(tmp_path / "small")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_what_cannot_be_quantised_is_refused(parent: Bundle, small: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"takes samples of uint8\(12, 12, 1\), but these are uint8\(14, 14, 1\)"):
        quantize(parent, pictures(size=14), out, progress=Silent())
    as_floats = pictures()
    as_floats = dataclasses.replace(
        as_floats, train=Split(as_floats.train.inputs.astype(np.float32), as_floats.train.targets)
    )
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
