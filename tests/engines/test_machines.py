"""Classes of machines: what is made on one and opened on another is right there, or refused in one line."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from rushhour.bundle import ANSWERS, Bundle, Preprocessing
from rushhour.compress import Quantize, Recipe, compress, quantize_for_all
from rushhour.data.dataset import Dataset, Split
from rushhour.engines import EngineConfig, full_range, open_engine
from rushhour.errors import EngineError
from rushhour.goal import SLO, AccuracyBudget, Goal
from rushhour.measurement import Accuracy
from rushhour.plan import EngineName, Evidence, Plan, Policy, Variant
from rushhour.progress import Silent
from rushhour.records import answers
from rushhour.serve import open_target
from rushhour.system.machine import Machine, describe
from rushhour.task import Task
from rushhour.testing.bundles import INPUT, OUTPUT, tiny_answers, tiny_bundle
from rushhour.testing.processor import restricted

SHAPE, CLASSES = (16, 16, 1), 8
OLD = Path(__file__).parents[1] / "files" / "bundle-of-schema-1"


@functools.cache
def smaller() -> dict[str, str]:
    """The environment of a child that sees AVX2 and nothing newer."""
    try:
        return restricted()
    except EngineError as error:
        pytest.skip(str(error))


def wide(path: Path) -> Bundle:
    """int8 with weights of all 8 bits, large enough to saturate."""
    return tiny_bundle(path, shape=SHAPE, classes=CLASSES, precision="int8", weight_bits=8)


def pretend(monkeypatch: pytest.MonkeyPatch, *features: str) -> None:
    other = msgspec.structs.replace(describe(), features=features)
    for module in ("engines.agreement", "compress.evaluation", "compress.quantize"):
        monkeypatch.setattr(sys.modules[f"rushhour.{module}"], "describe", lambda: other)


# The class


@pytest.mark.parametrize(
    ("features", "isa", "saturates", "bf16"),
    [
        (("avx2",), "avx2", True, False),
        (("avx2", "avx512f"), "avx2", True, False),
        (("avx2", "avx_vnni"), "vnni", False, False),
        (("avx2", "avx512f", "avx512_vnni", "avx512_bf16"), "vnni", False, True),
        (("avx2", "avx512f", "avx512_vnni", "amx_bf16", "amx_int8"), "amx", False, True),
        (("neon",), "other", False, False),
        ((), "other", False, False),
    ],
)
def test_the_class_of_a_machine(features: tuple[str, ...], isa: str, saturates: bool, bf16: bool) -> None:
    here = msgspec.structs.replace(describe(), features=features)
    assert (here.isa, here.saturates, here.has_bf16) == (isa, saturates, bf16)
    assert f"({isa})" in str(here)
    assert here.versions["numpy"] in here.report()


def test_from_a_processor_of_avx2_there_is_nothing_to_hide(monkeypatch: pytest.MonkeyPatch) -> None:
    only = msgspec.structs.replace(describe(), features=("avx2",))
    monkeypatch.setattr("rushhour.testing.processor.describe", lambda: only)
    assert restricted({"HOME": "/root"}) == {"HOME": "/root"}  # `make test-avx2` runs there, too


@pytest.mark.parametrize("limit", ["AVX2", "avx2", "SSE41"])
def test_a_machine_restricted_by_onednns_variable_counts_as_the_smaller_one(limit: str) -> None:
    code = "from rushhour.system.machine import describe; print(*describe().features)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "ONEDNN_MAX_CPU_ISA": limit}, capture_output=True, text=True
    )
    assert not {"avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8"} & set(done.stdout.split())


def test_the_machine_is_described_by_a_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rushhour", "machine", "--json", str(tmp_path / "m.json")],
        capture_output=True,
        text=True,
        env=smaller(),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "m.json").read_text())
    assert found["class"] == "avx2"
    assert "class avx2" in done.stdout
    assert "bf16" not in found["engines"]["openvino"]
    assert "slower kernels" in found["engines"]["onnxruntime"]
    assert found["affinity"] == len(os.sched_getaffinity(0))


def test_a_bug_is_reported_with_the_machine(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from rushhour import cli

    def broken(**options: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(cli.cli.commands["machine"], "callback", broken)
    monkeypatch.setattr(sys, "argv", ["rushhour", "machine"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert "ZeroDivisionError" in said
    match = re.search(r"its traceback is in (\S+?\.txt)", said.splitlines()[-1])
    assert match is not None
    kept = Path(match[1])
    assert all(each in kept.read_text() for each in (describe().cpu, describe().isa))
    kept.unlink()


# Recorded answers


def test_what_the_graph_answers_is_recorded(tmp_path: Path) -> None:
    for precision, weight_bits in (("f32", 7), ("int8", 7), ("int8", 8)):
        bundle = tiny_bundle(tmp_path / "b", precision=precision, weight_bits=weight_bits)  # type: ignore[arg-type]
        recorded = Bundle.open(tmp_path / "b").answers()
        assert recorded is not None
        np.testing.assert_allclose(recorded[OUTPUT], tiny_answers(bundle.samples()[INPUT]), atol=0.05)
        assert bundle.manifest.tolerance is not msgspec.UNSET


def test_distance_is_a_share_of_the_range_of_answers() -> None:
    wanted = np.linspace(0, 10, 40).reshape(10, 4)

    def off(given: np.ndarray[Any, Any], expected: np.ndarray[Any, Any] = wanted) -> float:
        return answers.deviation({"y": expected}, {"y": given})

    assert off(wanted) == 0
    assert off(wanted + 1) == pytest.approx(0.1)
    assert off(wanted * np.nan) == np.inf
    assert off(wanted[:5]) == np.inf
    signalling = np.full((10, 4), 0x7F800001, np.uint32).view(np.float32)  # numpy warns when it casts such a NaN
    assert off(signalling, wanted.astype(np.float32)) == np.inf
    unknown = wanted.copy()
    unknown[3] = np.nan  # where the graph itself has no answer, none can be wrong
    assert off(wanted, unknown) == 0
    assert off(np.full((3, 1), 5.001), np.full((3, 1), 5.0)) == pytest.approx(0.2)
    assert answers.deviation({"y": wanted, "z": wanted}, {"y": wanted, "z": wanted + 2}) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("engine", "precision"),
    [("openvino", "f32"), ("onnxruntime", "f32"), ("openvino", "int8"), ("onnxruntime", "int8")],
)
def test_an_engine_that_answers_otherwise_is_refused(
    engine: EngineName, precision: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = tiny_bundle(tmp_path / "right", precision=precision)
    open_engine(right, EngineConfig(engine, precision, max_batch=4)).close()

    def elsewhere(model: Path, samples: answers.Answers) -> dict[str, Any]:
        return {name: array[::-1] for name, array in answers.graph_answers(model, samples).items()}

    monkeypatch.setattr("rushhour.bundle.folder.graph_answers", elsewhere)
    other = tiny_bundle(tmp_path / "other", precision=precision)
    with pytest.raises(EngineError, match=f"does not answer as the bundle tiny should.*{describe().isa}.*is allowed"):
        open_engine(other, EngineConfig(engine, precision, max_batch=4))


def differing(path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A bundle whose recorded answers no engine gives."""
    with monkeypatch.context() as patch:
        patch.setattr(
            "rushhour.bundle.folder.graph_answers",
            lambda model, samples: {OUTPUT: answers.graph_answers(model, samples)[OUTPUT][::-1]},
        )
        return tiny_bundle(path)


@pytest.mark.slow
def test_every_verb_refuses_a_bundle_that_answers_otherwise_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = differing(tmp_path / "b", monkeypatch)
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (120, 4, 4, 1), dtype=np.uint8), random.integers(0, 3, 120)
    np.savez(tmp_path / "d.npz", x=images, y=labels)
    data = ["--data", tmp_path / "d.npz"]
    for command in (
        ["serve", bundle.path, "--http-port", "0", "--no-grpc"],
        ["tune", bundle.path, *data, "--out", tmp_path / "run"],
        ["compress", bundle.path, *data, "--recipe", "int8", "--out", tmp_path / "out"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "rushhour", *map(str, command)], capture_output=True, text=True, timeout=120
        )
        line = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 2, (command, done.stderr)
        assert line.startswith("rushhour: "), done.stderr
        assert "does not answer as the bundle tiny should" in line
        assert "Traceback" not in done.stderr


def test_a_bundle_from_before_answers_were_recorded_still_opens(tmp_path: Path) -> None:
    bundle = Bundle.open(OLD)
    assert bundle.manifest.schema == 1
    assert bundle.answers() is None
    for engine in ("openvino", "onnxruntime"):
        open_engine(bundle, EngineConfig(engine)).close()  # type: ignore[arg-type]
    copied = bundle.copy_to(tmp_path / "copy")
    metrics = {"test": Accuracy("accuracy", 0.5, (0.4, 0.6), 10, "test")}
    copied.with_metrics(metrics)
    assert Bundle.open(tmp_path / "copy").manifest.metrics == metrics


def test_answers_that_were_changed_on_disk_are_damage(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "b")
    content = bytearray((bundle.path / ANSWERS).read_bytes())
    content[-1] ^= 1
    (bundle.path / ANSWERS).write_bytes(content)
    with pytest.raises(Exception, match=r"answers\.safetensors does not match its hash"):
        Bundle.open(bundle.path)


# int8 without VNNI

_ASK = """
import json, sys
from pathlib import Path
from rushhour.records.answers import deviation
from rushhour.bundle import Bundle
from rushhour.engines import EngineConfig, Runner, agreement, open_engine
from rushhour.errors import EngineError
careless = sys.argv[3] == "careless"
if careless:
    agreement.describe = lambda: __import__("msgspec").structs.replace(machine, features=("avx512_vnni",))
    from rushhour.system.machine import describe
    machine = describe()
    import rushhour.engines
    rushhour.engines.check_answers = lambda bundle, engine: None
bundle = Bundle.open(Path(sys.argv[1]))
try:
    engine = open_engine(bundle, EngineConfig(sys.argv[2], "int8", max_batch=8))
except EngineError as error:
    print(json.dumps({"refused": str(error)}))
else:
    print(json.dumps({"off": deviation(bundle.answers(), Runner(engine).infer(bundle.samples()))}))
    engine.close()
"""


def ask(bundle: Bundle, engine: str, how: str = "careful") -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", _ASK, str(bundle.path), engine, how], env=smaller(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_weights_of_8_bits_saturate_without_vnni_and_weights_of_7_do_not(engine: str, tmp_path: Path) -> None:
    """The fault itself, and that the smaller processor is really in force: a VNNI machine would answer rightly."""
    assert ask(wide(tmp_path / "wide"), engine, "careless")["off"] > 0.05
    narrow = tiny_bundle(tmp_path / "narrow", shape=SHAPE, classes=CLASSES, precision="int8")
    assert ask(narrow, engine)["off"] < 0.005


def test_such_a_bundle_is_refused_by_openvino_and_right_on_onnxruntime(tmp_path: Path) -> None:
    bundle = wide(tmp_path / "wide")
    said = ask(bundle, "openvino")["refused"]
    assert "without VNNI" in said
    assert "--for any" in said
    assert ask(bundle, "onnxruntime")["off"] < 0.005


def test_what_uses_8_bits_is_seen_in_the_graph(tmp_path: Path) -> None:
    assert full_range(wide(tmp_path / "wide"))
    assert not full_range(tiny_bundle(tmp_path / "narrow", precision="int8"))
    assert not full_range(tiny_bundle(tmp_path / "f32"))


def test_only_weights_that_are_multiplied_count(tmp_path: Path) -> None:
    """A table that rows are taken from may use all 8 bits: a sentence encoder's was refused for it."""
    from onnx import TensorProto, helper

    def bundle(table: int, weights: int) -> Bundle:
        held = {
            "table": np.full((10, 4), table, np.int8),
            "weights": np.full((3, 4), weights, np.int8),
            "step": np.array(0.01, np.float32),
            "zero": np.array(0, np.int8),
        }
        nodes = [
            helper.make_node("DequantizeLinear", ["table", "step", "zero"], ["rows"]),
            helper.make_node("Gather", ["rows", "ids"], ["taken"]),
            helper.make_node("QuantizeLinear", ["taken", "step", "zero"], ["taken_int8"]),
            helper.make_node("DequantizeLinear", ["taken_int8", "step", "zero"], ["features"]),
            helper.make_node("DequantizeLinear", ["weights", "step", "zero"], ["floats"]),
            helper.make_node("Transpose", ["floats"], ["turned"], perm=[1, 0]),
            helper.make_node("MatMul", ["features", "turned"], ["y"]),
        ]
        graph = helper.make_graph(
            nodes,
            "encoder",
            [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch"])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
            [numpy_helper.from_array(value, name) for name, value in held.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        whole = tiny_bundle(tmp_path / "whole", precision="int8").manifest
        return Bundle.create(tmp_path / "b", whole, lambda file: onnx.save(model, file))

    assert not full_range(bundle(table=127, weights=60))
    assert full_range(bundle(table=60, weights=127))


def wide_run(path: Path) -> Bundle:
    """A run made on a larger machine: an int8 plan whose bundle saturates on a smaller one, the reference beside it."""
    bundle = wide(path / "bundles" / "int8")
    tiny_bundle(path / "bundles" / "reference", shape=SHAPE, classes=CLASSES)
    there = Machine("a large one", 64, ("avx2", "avx512f", "avx512_vnni"), 4096.0, "Linux", "3.11", {})
    evidence = Evidence(
        1000.0, None, 5.0, None, "accuracy", 0.9, (0.8, 0.95), 0.0, (0.0, 0.0), 0.9, (0.8, 0.95), 10.0, None,
        1, 1, 1, 1, there, "2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    variant = Variant("int8", "bundles/int8", bundle.manifest.hash, "openvino", "int8")
    policy = Policy(cells=8, streams=4, threads=2, max_batch=4)
    Plan(Goal(SLO(99, 0.05)), (variant,), policy, evidence=evidence).save(path / "plan.json")
    return bundle


def test_a_run_from_another_machine_is_served_in_the_best_safe_form(tmp_path: Path) -> None:
    import tritonclient.http as http

    bundle = wide_run(tmp_path / "run")
    command = [sys.executable, "-m", "rushhour", "serve", str(tmp_path / "run"), "--http-port", "0", "--no-grpc"]
    server = subprocess.Popen(
        [*command, "--cells", "1"], env=smaller(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        ready = server.stdout.readline()
        assert "by onnxruntime in int8" in ready, server.stderr.read() if server.stderr else ""
        client = http.InferenceServerClient(ready.split("http://")[1].split(":  ")[0].split(": ")[0])
        images = bundle.samples()[INPUT]
        image = http.InferInput(INPUT, list(images.shape), "UINT8")
        image.set_data_from_numpy(images)
        recorded = bundle.answers()
        assert recorded is not None
        found = client.infer("tiny", [image]).as_numpy(OUTPUT)
        assert answers.deviation(recorded, {OUTPUT: found}) < 0.005
        client.close()
    finally:
        server.send_signal(signal.SIGTERM)
        _, log = server.communicate(timeout=60)
    entries = [json.loads(line) for line in log.splitlines()]
    (said,) = (entry["event"] for entry in entries if "of the Plan's capacity" in entry["event"])
    assert "class avx2 instead of vnni" in said
    assert "of 64 cores" in said
    assert "no avx512f, avx512_vnni" in said
    assert "of 4096 GiB" in said
    (instead,) = [entry for entry in entries if entry["event"] == "not served as planned"]
    assert "without VNNI" in instead["why"]
    assert "onnxruntime in int8" in instead["instead"]


def test_a_plan_takes_no_more_threads_than_there_are_cores(tmp_path: Path) -> None:
    wide_run(tmp_path / "run")
    target = open_target(tmp_path / "run")
    for cores in (1, 2, 3, 8, 64):
        ways = list(target.variants(cores))
        assert all(way.config.streams * way.config.threads <= cores for way in ways)
        assert ways[0].config.engine == "openvino"
    assert [(way.bundle.path.name, way.config.engine, way.config.precision) for way in target.variants(8)] == [
        ("int8", "openvino", "int8"),
        ("int8", "onnxruntime", "int8"),
        ("reference", "openvino", "f32"),
        ("reference", "onnxruntime", "f32"),
    ]


def test_what_is_measured_is_never_another_way(tmp_path: Path) -> None:
    wide_run(tmp_path / "run")
    shutil.move(tmp_path / "run" / "plan.json", tmp_path / "run" / "candidate.json")
    plan, settings = tmp_path / "run" / "candidate.json", '{"http_port": 0, "cells": 1}'
    server = subprocess.Popen(
        [sys.executable, "-m", "rushhour.serve", str(plan), settings],
        env=smaller(),
        stdin=subprocess.PIPE,  # a server lives as long as it is open
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert server.stdout is not None
    said = server.stdout.readline()
    assert server.wait(60) == 2
    server.communicate()
    assert "without VNNI" in json.loads(said)["error"]


# Quantising for a class


def noise() -> Dataset:
    random = np.random.default_rng(0)
    inputs = random.integers(0, 256, (240, *SHAPE), dtype=np.uint8)
    labels = tiny_answers(inputs, classes=CLASSES).argmax(1)
    parts = [Split(inputs[at], labels[at]) for at in (slice(0, 80), slice(80, 160), slice(160, None))]
    return Dataset("noise", Task.classification(tuple("abcdefgh")), *parts, Preprocessing(1 / 255), "sum")


def largest_weight(bundle: Bundle) -> int:
    held = [numpy_helper.to_array(tensor) for tensor in onnx.load(bundle.model).graph.initializer]
    return max(int(np.abs(array.astype(int)).max()) for array in held if array.dtype == np.int8 and array.size > 1)


@pytest.mark.parametrize("target", ["any", "avx2", "vnni", "amx"])
def test_a_bundle_says_what_it_is_for(target: Any, tmp_path: Path) -> None:
    from rushhour.compress import quantize

    parent = tiny_bundle(tmp_path / "parent", shape=SHAPE, classes=CLASSES)
    made = quantize(parent, noise(), tmp_path / "int8", calibration=20, target=target, progress=Silent())
    settings = made.manifest.lineage[-1].settings
    assert settings["for"] == target
    assert settings["weight bits"] == (7 if target in ("any", "avx2") else 8)
    assert (largest_weight(made) <= 64) == (target in ("any", "avx2"))
    assert full_range(made) == (target in ("vnni", "amx"))


def test_one_artefact_for_all_unless_7_bits_cost_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = tiny_bundle(tmp_path / "parent", shape=SHAPE, classes=CLASSES)
    pretend(monkeypatch, "avx2", "avx512_vnni")
    monkeypatch.setattr(sys.modules["rushhour.compress.quantize"], "COSTLY", 0.5)
    made = quantize_for_all(parent, noise(), tmp_path / "int8", calibration=20, progress=Silent())
    assert list(made) == ["any"]
    monkeypatch.setattr(sys.modules["rushhour.compress.quantize"], "COSTLY", -1.0)
    made = quantize_for_all(parent, noise(), tmp_path / "int8", calibration=20, progress=Silent())
    assert {target: full_range(bundle) for target, bundle in made.items()} == {"any": False, "vnni": True}
    pretend(monkeypatch, "avx2")  # cannot tell what 8 bits would give
    assert list(quantize_for_all(parent, noise(), tmp_path / "int8", calibration=20, progress=Silent())) == ["any"]


@pytest.mark.parametrize(("drops", "answer"), [((0.005, 0.0), "any"), ((0.5, 0.0), "vnni"), ((0.001, 0.0), None)])
def test_compress_leaves_both_beside_each_other(
    drops: tuple[float, float], answer: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = tiny_bundle(tmp_path / "parent", shape=SHAPE, classes=CLASSES)
    pretend(monkeypatch, "avx2", "avx512_vnni")
    judged = Accuracy("accuracy", 0.9, (0.8, 1.0), 80, "validation")

    def accuracy(self: Any, bundle: Bundle, part: str) -> Accuracy:
        drop = 0.0 if bundle.manifest.precision == "f32" else drops[full_range(bundle)]
        return msgspec.structs.replace(judged, value=0.9 - drop, drop=drop, drop_interval=(drop, drop), split=part)

    monkeypatch.setattr(sys.modules["rushhour.compress.evaluation"].Evaluation, "accuracy", accuracy)
    found = compress(
        parent,
        noise(),
        [Recipe((Quantize(calibration=20),))],
        budget=AccuracyBudget(0.01),
        out=tmp_path / "out",
        steps=tmp_path / "steps",
        bench=faster,
        progress=Silent(),
    )
    assert found.verdict == "best"
    assert full_range(Bundle.open(tmp_path / "out")) == (answer == "vnni")
    beside = {"any": "out-vnni", "vnni": "out-any", None: None}[answer]
    assert {path.name for path in tmp_path.glob("out-*")} == ({beside} if beside else set())
    if beside:
        assert full_range(Bundle.open(tmp_path / beside)) == (answer == "any")
        assert beside in found.summary
        assert f"{(drops[0] - drops[1]) * 100:.2f} points" in found.summary


def faster(parent: Any, children: Any) -> dict[str, Any]:
    from rushhour.compress import Ratio, Speed

    twice = Ratio(2.0, 1.9, 2.1, 6)
    return dict.fromkeys(children, Speed(twice, twice, 1, 1, 200.0, 100.0, 1.0, 2.0))


def test_for_reaches_every_int8_step() -> None:
    recipe = Recipe.parse("prune:0.5,int8:100").for_machines("vnni")
    assert recipe.steps[-1] == Quantize(100, "vnni")
    assert Recipe.parse(str(recipe)) == recipe


# Files that other tools quantised

_IMPORT = """
import json, sys
from pathlib import Path
import numpy as np
from rushhour.records.answers import deviation
from rushhour.engines import EngineConfig, Runner, open_engine
from rushhour.errors import EngineError
from rushhour.models import from_onnx
from rushhour.task import Task
file, samples = Path(sys.argv[1]), np.load(sys.argv[2])
bundle = from_onnx(file, Task(kind="regression", outputs=8), Path(sys.argv[3]), samples=samples)
right, said = np.load(sys.argv[4]), {"precision": bundle.manifest.precision}
for engine in ("openvino", "onnxruntime"):
    try:
        opened = open_engine(bundle, EngineConfig(engine, bundle.manifest.precision, max_batch=8))
    except EngineError as error:
        said[engine] = str(error)
        continue
    said[engine] = deviation({"y": right}, Runner(opened).infer({"x": samples}))
    opened.close()
print(json.dumps(said))
"""


@pytest.mark.parametrize("form", ["QDQ", pytest.param("QOperator", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("activations", "weights"), [("QUInt8", "QInt8"), ("QInt8", "QInt8"), ("QUInt8", "QUInt8")])
def test_what_another_tool_quantised_is_right_or_refused(
    form: str, activations: str, weights: str, tmp_path: Path
) -> None:
    from onnx import TensorProto, helper
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    random = np.random.default_rng(0)
    samples = random.random((12, 256), dtype=np.float32)
    matrix = random.uniform(-1, 1, (256, 8)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "plain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 256])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])],
        [numpy_helper.from_array(matrix, "w")],
    )
    plain = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rows = iter(samples)

        def get_next(self) -> dict[str, Any] | None:
            row = next(self.rows, None)
            return None if row is None else {"x": row[None]}

    file = tmp_path / "theirs.onnx"
    quantize_static(
        plain,
        file,
        Reader(),
        quant_format=QuantFormat[form],
        activation_type=QuantType[activations],
        weight_type=QuantType[weights],
    )
    np.save(tmp_path / "x.npy", samples)
    np.save(tmp_path / "y.npy", samples @ matrix)
    arguments = [str(tmp_path / name) for name in ("theirs.onnx", "x.npy", "bundle", "y.npy")]
    done = subprocess.run([sys.executable, "-c", _IMPORT, *arguments], env=smaller(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["precision"] == "int8"
    for engine in ("openvino", "onnxruntime"):
        assert isinstance(said[engine], str) or said[engine] < 0.02, said
    assert "without VNNI" in said["openvino"]
