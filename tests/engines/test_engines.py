"""Engines: the conformance kit on each, and what each refuses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from rushhour.bundle import Bundle, Manifest, Signature, TensorSpec
from rushhour.engines import Engine, EngineConfig, Runner, batch_cost, open_engine, time_service
from rushhour.engines.stream import Line, Stream, warm_up
from rushhour.errors import EngineError, ModelError
from rushhour.system.machine import cores, describe
from rushhour.task import Task
from rushhour.testing.bundles import tiny_answers, tiny_bundle
from rushhour.testing.engines import EngineConformance
from rushhour.testing.fakes import FakeEngine, at_once, fake_answers, on_a_timer

STREAMS = min(2, cores())
BF16 = describe().has_bf16
needs_bf16 = pytest.mark.skipif(not BF16, reason="this processor has no bf16")


class Opened(EngineConformance):
    @pytest.fixture
    def open_engine(self, bundle: Bundle) -> Callable[[EngineConfig], Engine]:
        return lambda config: open_engine(bundle, config)


class TestOpenVINO(Opened):
    config = EngineConfig("openvino", streams=STREAMS, max_batch=5)


class TestOpenVINOWithThreads(Opened):
    config = EngineConfig("openvino", threads=STREAMS, max_batch=5)


class TestOpenVINOOneByOne(Opened):
    config = EngineConfig("openvino", streams=STREAMS, max_batch=1)


@needs_bf16
class TestOpenVINOBf16(Opened):
    config = EngineConfig("openvino", "bf16", streams=STREAMS, max_batch=5)


class TestOpenVINOInt8(Opened):
    config = EngineConfig("openvino", "int8", streams=STREAMS, max_batch=5)


class TestOnnxRuntime(Opened):
    config = EngineConfig("onnxruntime", streams=2, max_batch=5)


class TestOnnxRuntimeWithThreads(Opened):
    config = EngineConfig("onnxruntime", streams=2, threads=2, max_batch=5)


class TestOnnxRuntimeInt8(Opened):
    config = EngineConfig("onnxruntime", "int8", streams=2, max_batch=5)


class TestFakeAtOnce(EngineConformance):
    config = EngineConfig("openvino", streams=2, max_batch=5)

    @pytest.fixture
    def open_engine(self) -> Callable[[EngineConfig], Engine]:
        return lambda config: FakeEngine(config, schedule=at_once)

    @pytest.fixture
    def reference(self) -> Callable[[NDArray[Any]], NDArray[Any]]:
        return fake_answers


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # a `done` that raises, on a timer
class TestFakeOnTimers(TestFakeAtOnce):
    @pytest.fixture
    def open_engine(self) -> Callable[[EngineConfig], Engine]:
        return lambda config: FakeEngine(config, service_s=lambda rows: rows * 1e-4, schedule=on_a_timer)


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return torch_bundle(tmp_path_factory.mktemp("torch") / "mlp")


class TestTorch(EngineConformance):
    config = EngineConfig("torch", streams=2, max_batch=5)

    @pytest.fixture
    def open_engine(self, mlp: Bundle) -> Callable[[EngineConfig], Engine]:
        return lambda config: open_engine(mlp, config)

    @pytest.fixture
    def reference(self, mlp: Bundle) -> Iterator[Callable[[NDArray[Any]], NDArray[Any]]]:
        engine = open_engine(mlp, EngineConfig("onnxruntime", max_batch=5))
        runner = Runner(engine)
        yield lambda samples: runner.infer({"image": samples})["probabilities"]
        engine.close()


class TestTorchWithThreads(TestTorch):
    config = EngineConfig("torch", threads=2, max_batch=5)


@needs_bf16
class TestTorchBf16(TestTorch):
    config = EngineConfig("torch", "bf16", streams=2, max_batch=5)


def torch_bundle(path: Path) -> Bundle:
    from rushhour.bundle import Preprocessing, Source
    from rushhour.models.deployed import export
    from rushhour.models.source import build

    source = Source("rushhour.models:mlp", {"inputs": 16, "outputs": 3})
    return export(
        build(source),
        name="mlp",
        task=Task.classification(("a", "b", "c")),
        sample_spec=TensorSpec("image", "uint8", (4, 4, 1)),
        preprocessing=Preprocessing(scale=1 / 255),
        source=source,
        lineage=(),
        samples=np.random.default_rng(0).integers(0, 256, (8, 4, 4, 1), dtype=np.uint8),
        path=path,
    )


# What is refused


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (EngineConfig("openvino", "int8"), "not quantised"),
        (EngineConfig("onnxruntime", "int8"), "not quantised"),
        (EngineConfig("onnxruntime", "bf16"), "compute in f32 or int8"),
        (EngineConfig("torch", "int8"), "no int8 kernels"),
        (EngineConfig("openvino", streams=1000), "did not take NUM_STREAMS = 1000"),
        (EngineConfig("openvino", threads=1000), "did not take INFERENCE_NUM_THREADS = 1000"),
    ],
)
def test_what_cannot_take_effect_is_an_error(tiny: Bundle, config: EngineConfig, words: str) -> None:
    with pytest.raises(EngineError, match=words) as caught:
        open_engine(tiny, config)
    assert caught.value.fix
    assert "\n" not in str(caught.value)


def test_a_quantised_graph_runs_in_int8_only(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "tiny", precision="int8")
    for config in (EngineConfig("openvino"), EngineConfig("openvino", "bf16"), EngineConfig("onnxruntime")):
        with pytest.raises(EngineError, match="quantised to int8"):
            open_engine(bundle, config)


def test_torch_needs_a_module(tiny: Bundle) -> None:
    with pytest.raises(ModelError, match="no torch module"):
        open_engine(tiny, EngineConfig("torch"))


@pytest.mark.skipif(BF16, reason="this processor has bf16")
@pytest.mark.parametrize("engine", ["openvino", "torch"])
def test_bf16_is_refused_where_there_is_none(tiny: Bundle, engine: Any) -> None:
    with pytest.raises(EngineError, match="f32"):
        open_engine(tiny, EngineConfig(engine, "bf16"))


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime", "torch"])
def test_a_missing_package_is_said_with_the_command(tiny: Bundle, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, engine, None)
    with pytest.raises(EngineError, match=f"pip install {engine}"):
        open_engine(tiny, EngineConfig(engine))


# Graphs that are wrong


def graph_bundle(path: Path, nodes: list[Any], constants: dict[str, NDArray[Any]], **changes: Any) -> Bundle:
    """A bundle that says input `x` int64 (2,) and output `y` float32 (1,), around a graph that may say otherwise."""
    named: dict[str, Any] = {"input": "x", "output": "y", "batch": "batch", "type": TensorProto.INT64} | changes
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(named["input"], named["type"], [named["batch"], 2])],
        [helper.make_tensor_value_info(named["output"], TensorProto.FLOAT, [named["batch"], 1])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    signature = Signature((TensorSpec("x", "int64", (2,)),), (TensorSpec("y", "float32", (1,)),))
    manifest = Manifest("graph", signature, Task(kind="regression"))
    samples = np.tile(np.array([2, 3], np.int64), (4, 1))
    return Bundle.create(path, manifest, model=lambda file: onnx.save(model, file), samples={"x": samples})


def fragile(path: Path) -> Bundle:
    """Its graph reads a shape for six numbers from the first sample: fails for any that is not 2x3, 6x1, ..."""
    nodes = [
        helper.make_node("Gather", ["x", "first"], ["shape"], axis=0),
        helper.make_node("Reshape", ["six", "shape"], ["shaped"]),
        helper.make_node("ReduceSum", ["shaped"], ["sum"], keepdims=0),
        helper.make_node("Cast", ["x"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["floats", "axis"], ["sums"], keepdims=1),
        helper.make_node("Add", ["sums", "sum"], ["y"]),
    ]
    constants = {"first": np.array(0), "six": np.arange(6, dtype=np.float32), "axis": np.array([1])}
    return graph_bundle(path, nodes, constants)


SUM = [
    helper.make_node("Cast", ["x"], ["floats"], to=TensorProto.FLOAT),
    helper.make_node("ReduceSum", ["floats", "axis"], ["y"], keepdims=1),
]


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_a_batch_that_fails_is_said_and_the_next_one_runs(tmp_path: Path, engine: Any) -> None:
    opened = open_engine(fragile(tmp_path / "a"), EngineConfig(engine, max_batch=2))
    slot = opened.slots[0]
    finished: SimpleQueue[BaseException | None] = SimpleQueue()
    for _ in range(3):
        slot.inputs["x"][:] = [[4, 5], [2, 3]]
        slot.start(2, finished.put)
        error = finished.get(timeout=30)
        assert isinstance(error, EngineError)
        assert "failed on a batch" in str(error)
        assert "\n" not in str(error)
        slot.inputs["x"][:] = [[3, 2], [4, 5]]
        slot.start(2, finished.put)
        assert finished.get(timeout=30) is None
        assert slot.outputs["y"].tolist() == [[20], [24]]
    with pytest.raises(EngineError, match="failed on a batch"):
        Runner(opened).infer({"x": np.array([[1, 1]])})
    opened.close()


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_a_graph_with_a_fixed_batch_inside_is_refused(tmp_path: Path, engine: Any) -> None:
    nodes = [
        helper.make_node("Reshape", ["x", "fixed"], ["pairs"]),
        helper.make_node("Cast", ["pairs"], ["floats"], to=TensorProto.FLOAT),
        SUM[1],
    ]
    bundle = graph_bundle(tmp_path / "a", nodes, {"axis": np.array([1]), "fixed": np.array([2, 2])})
    before = threading.active_count()
    with pytest.raises(EngineError):
        open_engine(bundle, EngineConfig(engine, max_batch=3))
    assert threading.active_count() == before


def test_openvino_frees_a_batch_that_is_fixed_at_the_input_only(tmp_path: Path) -> None:
    bundle = graph_bundle(tmp_path / "a", SUM, {"axis": np.array([1])}, batch=2)
    with pytest.raises(EngineError):
        open_engine(bundle, EngineConfig("onnxruntime", max_batch=3))
    engine = open_engine(bundle, EngineConfig("openvino", max_batch=3))
    assert Runner(engine).infer({"x": np.array([[1, 2], [3, 4], [5, 6]])})["y"].tolist() == [[3], [7], [11]]
    engine.close()


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("change", [{"type": TensorProto.INT32}, {"input": "z"}, {"output": "z"}])
def test_a_graph_unlike_its_signature_is_refused(tmp_path: Path, engine: Any, change: dict[str, Any]) -> None:
    names = {"x": change.get("input", "x"), "y": change.get("output", "y")}
    nodes = [
        helper.make_node("Cast", [names["x"]], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["floats", "axis"], [names["y"]], keepdims=1),
    ]
    bundle = graph_bundle(tmp_path / "a", nodes, {"axis": np.array([1])}, **change)
    with pytest.raises(EngineError, match="graph"):
        open_engine(bundle, EngineConfig(engine))


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("inner", ["linear_1", "a", "hidden", "val_7", "/body/Gemm_output_0"])
def test_a_step_that_changes_nothing_takes_no_tensor_away(tmp_path: Path, inner: str, engine: Any) -> None:
    """OpenVINO removes it, and the tensor has both names in any order: it was said to be missing."""
    nodes = [
        SUM[0],
        helper.make_node("ReduceSum", ["floats", "axis"], [inner], keepdims=1),
        helper.make_node("Squeeze", [inner, "axis"], ["squeezed"]),
        helper.make_node("Unsqueeze", ["squeezed", "axis"], ["y"]),
    ]
    opened = open_engine(graph_bundle(tmp_path / "a", nodes, {"axis": np.array([1])}), EngineConfig(engine))
    assert Runner(opened).infer({"x": np.array([[1, 2]])})["y"].tolist() == [[3]]
    opened.close()


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_what_is_no_graph_is_refused(tmp_path: Path, engine: Any) -> None:
    whole = tiny_bundle(tmp_path / "a")
    bundle = Bundle.create(tmp_path / "b", whole.manifest, model=lambda file: file.write_bytes(b"no graph") and None)
    with pytest.raises(EngineError, match="cannot run the bundle tiny"):
        open_engine(bundle, EngineConfig(engine))


# Resources


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_closing_ends_all_threads_of_python(tiny: Bundle, engine: Any) -> None:
    before = threading.active_count()
    for _ in range(3):
        open_engine(tiny, EngineConfig(engine, streams=STREAMS, max_batch=4)).close()
    assert threading.active_count() == before


def test_torch_gives_the_threads_back(tmp_path: Path) -> None:
    import torch

    before = torch.get_num_threads()
    engine = open_engine(torch_bundle(tmp_path / "mlp"), EngineConfig("torch", threads=before + 1))
    assert engine.effective["threads"] == str(before + 1)
    engine.close()
    assert torch.get_num_threads() == before


def test_the_threads_of_torch_are_those_of_the_engine_that_is_left(tmp_path: Path) -> None:
    """A reload closes the old engine while the new one computes, and the number of threads is the process's."""
    import torch

    def seen() -> list[str]:
        """By a thread that is new to torch: its number, and that of the libraries below."""
        with ThreadPoolExecutor(1) as pool:
            number = pool.submit(torch.get_num_threads).result()
            below = pool.submit(torch.__config__.parallel_info).result()
        return [str(number), *re.findall(r"(?:mkl|omp)_get_max_threads\(\) : (\d+)", below)]

    before, bundle = torch.get_num_threads(), torch_bundle(tmp_path / "mlp")
    usual = seen()
    first = open_engine(bundle, EngineConfig("torch", threads=before + 1))
    second = open_engine(bundle, EngineConfig("torch", threads=before + 2))
    first.close()
    assert set(seen()) == {str(before + 2)}
    third = open_engine(bundle, EngineConfig("torch", threads=before + 3))
    third.close()
    assert set(seen()) == {str(before + 2)}, "the one that is left decides, whichever was closed"
    second.close()
    second.close()
    assert torch.get_num_threads() == before
    assert seen() == usual


def test_an_engine_may_be_closed_from_its_own_thread(tiny: Bundle) -> None:
    for name in ("openvino", "onnxruntime"):
        engine = open_engine(tiny, EngineConfig(name))  # type: ignore[arg-type]
        closed = threading.Event()

        def close(error: BaseException | None, engine: Engine = engine, closed: threading.Event = closed) -> None:
            engine.close()
            closed.set()

        engine.slots[0].start(1, close)
        assert closed.wait(30)
        with pytest.raises(EngineError, match="closed"):
            engine.slots[0].start(1, close)


FORGETFUL = """
import socket, sys
from pathlib import Path
def refuse(*given, **named):
    sys.stderr.write(f"network: {given}\\n")
    raise OSError
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
import subprocess
subprocess.Popen = refuse
from rushhour.bundle import Bundle
from rushhour.engines import EngineConfig, Runner, open_engine
bundle = Bundle.open(Path(sys.argv[1]))
engine = open_engine(bundle, EngineConfig(sys.argv[2], max_batch=8))
Runner(engine).infer(bundle.samples())
engine.slots[0].start(8, lambda error: None)
assert "torch" not in sys.modules
assert sys.modules["openvino_telemetry"] is None
"""


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_an_engine_is_silent_and_a_forgotten_one_keeps_no_program_alive(
    tiny: Bundle, engine: str, tmp_path: Path
) -> None:
    """Nothing printed, nothing sent, no torch, nothing left in the user's home; a running batch at the exit is fine."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FORGETFUL, str(tiny.path), engine],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


INTERRUPTED = """
import os, signal, sys
from pathlib import Path
from rushhour.bundle import Bundle
from rushhour.compress.quantize import quiet_nncf
from rushhour.engines import EngineConfig, open_engine
bundle = Bundle.open(Path(sys.argv[1]))
if sys.argv[2] == "nncf":
    with quiet_nncf(bundle) as nncf:
        import openvino
        cores = [openvino.Core(), openvino.Core()]
        for core in cores:
            core.get_property("CPU", "FULL_DEVICE_NAME")
        del core
        for first in range(2):
            cores.pop(0)
else:
    engines = [open_engine(bundle, EngineConfig(sys.argv[2], max_batch=2)) for _ in range(2)]
    for first in range(2):  # a reload: the new one comes before the old one goes
        engines.pop(0).close()
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("stopped")
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["openvino", "onnxruntime", "nncf"])
def test_a_signal_after_engines_were_closed_in_any_order_is_not_a_crash(tiny: Bundle, what: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(tiny.path), what], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "stopped\n"), done.stderr


# Warming up, and the fakes


def test_warming_up_runs_both_ends_and_as_much_as_time_allows(tiny: Bundle) -> None:
    for seconds, ran in ((100.0, [1, 5, 2, 3, 4]), (0.0, [1, 5])):
        engine = FakeEngine(EngineConfig("openvino", max_batch=5))
        assert warm_up(tiny, engine.slots, range(1, 6), seconds) == len(ran)
        assert engine.batches == ran
    engine = FakeEngine()
    engine.fail_next(EngineError("broken"))
    with pytest.raises(EngineError, match="broken"):
        warm_up(tiny, engine.slots, (1,))


def test_openvino_runs_every_size_before_the_first_request(tiny: Bundle) -> None:
    engine = open_engine(tiny, EngineConfig("openvino", max_batch=7))
    assert engine.effective["batch sizes run before the first request"] == "7"
    engine.close()


def test_a_fake_engine_fails_on_demand_and_follows_a_schedule() -> None:
    later: list[tuple[float, Callable[[], None]]] = []
    engine = FakeEngine(
        EngineConfig("openvino", max_batch=4),
        service_s=lambda rows: rows / 10,
        schedule=lambda seconds, finish: later.append((seconds, finish)),
    )
    calls: list[BaseException | None] = []
    slot = engine.slots[0]
    slot.inputs["image"][:] = 1
    engine.fail_next(EngineError("first"))
    slot.start(3, calls.append)
    assert not calls
    assert later[0][0] == 0.3
    later.pop()[1]()
    assert str(calls.pop()) == "first"
    slot.start(2, calls.append)
    engine.close()
    assert calls == [None]
    later.pop()[1]()
    assert calls == [None]
    assert slot.outputs["probabilities"].tolist() == [[16, 17, 18]] * 2
    assert engine.batches == [3, 2]


def test_a_stream_without_hooks_needs_only_its_last_step() -> None:
    class Doubling(Stream):
        def _finish(self, rows: int) -> None:
            self._answers["y"][:rows] = self._inputs["x"][:rows] * 2

    signature = Signature((TensorSpec("x", "float32", ()),), (TensorSpec("y", "float32", ()),))
    stream = Doubling(signature, 2, Line("doubling"))
    stream.inputs["x"][:] = [1, 2]
    finished: SimpleQueue[BaseException | None] = SimpleQueue()
    stream.start(2, finished.put)
    assert finished.get(timeout=30) is None
    assert stream.outputs["y"].tolist() == [2, 4]
    stream.close()


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("max_batch", [1, 2, 6])
def test_every_size_runs_with_and_without_graphs_of_its_own(
    tiny: Bundle, small: bool, max_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rushhour.engines.openvino._SMALL_BYTES", tiny.model_bytes - (not small))
    engine = open_engine(tiny, EngineConfig("openvino", max_batch=max_batch))
    compiled = engine.effective["batch sizes compiled"]
    assert compiled == {1: "1", 2: "1, 2", 6: "1, 6 and dynamic"}[max_batch] if small or max_batch == 1 else "dynamic"
    runner = Runner(engine)
    for rows in range(1, max_batch + 1):
        images = np.random.default_rng(rows).integers(0, 256, (rows, 4, 4, 1), dtype=np.uint8)
        np.testing.assert_allclose(runner.infer({"image": images})["probabilities"], tiny_answers(images), atol=1e-5)
    engine.close()


def test_rows_that_fill_a_batch_up_are_nobodys_answers(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rushhour.engines.openvino._seconds", lambda slot, rows: 0.001)  # as fast either way
    engine = open_engine(tiny, EngineConfig("openvino", max_batch=5))
    assert engine.effective["batch sizes filled up"] == "2, 3, 4"
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 1), dtype=np.uint8)
    found = Runner(engine).infer({"image": images})["probabilities"]
    np.testing.assert_allclose(found, tiny_answers(images), atol=1e-5)
    engine.close()


def test_service_times_of_an_engine_that_answers_within_start(tmp_path: Path) -> None:
    """It recursed once: each batch's end starts the next."""
    bundle = tiny_bundle(tmp_path / "tiny")
    times = time_service(FakeEngine(EngineConfig("openvino", max_batch=10)), bundle, 1.0, 0.02)
    assert times.batch_sizes == (1, 2, 3, 4, 6, 8, 10)
    assert all(seconds > 0 for seconds in times.seconds)


def test_the_cpu_time_of_batches_is_theirs_alone(tmp_path: Path) -> None:
    def burn(seconds: float, finish: Callable[[], None]) -> None:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass
        finish()

    bundle = tiny_bundle(tmp_path / "tiny")
    config = EngineConfig("openvino", max_batch=10)
    cost = batch_cost(FakeEngine(config, service_s=lambda rows: 0.004 + 0.001 * rows, schedule=burn), bundle, 10)
    assert cost.batch_s == pytest.approx(0.004, rel=0.3)
    assert cost.sample_s == pytest.approx(0.001, rel=0.3)
    nothing = batch_cost(FakeEngine(config), bundle, 10)
    assert nothing.batch_s + 10 * nothing.sample_s < 0.001
    failing = FakeEngine(config)
    failing.fail_next(EngineError("it stumbled"))
    with pytest.raises(EngineError, match="stumbled"):
        batch_cost(failing, bundle, 10)


def test_service_times_show_a_failing_engine(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "tiny")
    engine = FakeEngine(EngineConfig("openvino", max_batch=4))
    engine.fail_next(EngineError("it stumbled"))
    with pytest.raises(EngineError, match="stumbled"):
        time_service(engine, bundle, 1.0, 0.05)
