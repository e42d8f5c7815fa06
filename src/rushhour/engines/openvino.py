"""OpenVINO: compiled for any batch size, and for the most important ones; each stream has infer requests for all."""

from __future__ import annotations

import atexit
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from queue import SimpleQueue
from typing import Any

import numpy as np

from rushhour.bundle import Bundle, Signature, Sizes, TensorSpec
from rushhour.engines.agreement import check_range
from rushhour.engines.engine import EngineConfig, Slot
from rushhour.engines.stream import INSTALL, BySizes, Line, Stream, check_precision, warm_up
from rushhour.errors import EngineError
from rushhour.system.signal_stack import restored_signal_stack
from rushhour.system.telemetry import disable_telemetry

_HINT = {"f32": "f32", "bf16": "bf16", "int8": "f32"}
"""`INFERENCE_PRECISION_HINT`. Layers of an int8 graph that are not quantised run in f32, so that the measured accuracy
is the same on machines with and without bf16."""

HEAVY = {"Convolution", "Deconvolution", "FullyConnected", "MatMul"}
"""Kinds of layers that multiply matrices, which int8 and bf16 can make faster."""
_SMALL_BYTES = 4 * 2**20
"""Every compiled size has its own copy of the weights; copies of larger models would not fit in the caches."""
_WARM_UP_S = 3.0
_SLOW_S = 0.05
"""For batches that take this long, a tenth of a millisecond does not matter."""


class OpenVINOEngine:
    """A bundle on OpenVINO's CPU plugin.

    A graph that is compiled for one batch size takes 0.1 to 0.3 ms less per batch than one for any size, which matters
    for small networks (docs/decisions/0004). For these, 1 and `max_batch` are compiled separately; sizes between them
    run on a dynamic graph, or padded to `max_batch` where that is measured to be no slower. All sizes are run before
    the constructor returns, because first runs take milliseconds longer.

    Args:
        bundle: what to run.
        config: how; int8 needs a quantised bundle, whose other layers run in f32.

    Raises:
        EngineError: if OpenVINO is not installed, cannot run the graph at every batch size, or does not take an option.
    """

    def __init__(self, bundle: Bundle, config: EngineConfig) -> None:
        ov = _openvino()
        check_precision(bundle, config)
        check_range(bundle, config)
        self._signature = bundle.manifest.signature
        self._config = config
        sizes = [] if self._signature.dimensions else _static_sizes(config.max_batch, bundle.model_bytes)
        between = [rows for rows in range(1, config.max_batch + 1) if rows not in sizes]
        try:
            graphs = {size: _compile(ov, bundle, config, ov.Dimension(size)) for size in sizes}
            if between:
                graphs[0] = _compile(ov, bundle, config, ov.Dimension(1, config.max_batch))
        except RuntimeError as error:
            raise _refused(bundle, error) from error
        compiled = next(iter(graphs.values()))
        layers = _layers(compiled)
        _check_options(compiled, config)
        if config.precision == "int8" and not any("8" in precision for precision in layers):
            raise EngineError(
                f"cannot run the bundle {bundle.manifest.name} in int8",
                f"OpenVINO runs all its heavy layers in {', '.join(layers)} on this machine",
                "serve the f32 bundle instead",
            )
        routes = {rows: rows if rows in sizes else 0 for rows in range(1, config.max_batch + 1)}
        self._slots: list[_Requests] = []
        self._spare: list[_Requests] = []
        self._graphs, self._routes = graphs, routes
        atexit.register(self.close)
        try:
            for index in range(config.streams):
                self._slots.append(self._slot(f"openvino-{index}"))
            warm = warm_up(bundle, self._slots, sizes) if sizes else 0
            if sizes and between:
                _route_padded(self._slots[0], routes, sizes, between)
            if between:
                warm += warm_up(bundle, self._slots, between, _WARM_UP_S)
        except RuntimeError as error:
            self.close()
            raise _refused(bundle, error) from error
        except BaseException:
            self.close()
            raise
        self._effective = {
            "engine": f"openvino {ov.__version__.partition('-')[0]}",
            "precision": config.precision,
            "heavy layers": ", ".join(f"{count} in {precision}" for precision, count in sorted(layers.items())),
            "streams": str(compiled.get_property("NUM_STREAMS")),
            "threads": str(int(compiled.get_property("INFERENCE_NUM_THREADS")) // config.streams),
            "max_batch": str(config.max_batch),
            "batch sizes compiled": " and ".join(
                [", ".join(map(str, sorted(sizes)))] * bool(sizes) + ["dynamic"] * bool(between)
            ),
            "batch sizes filled up": ", ".join(str(rows) for rows, size in routes.items() if size > rows) or "none",
            "batch sizes run before the first request": str(warm),
            # several cells and the load generator share the machine: pinned threads would use the same cores
            "cpu pinning": "on" if compiled.get_property("ENABLE_CPU_PINNING") else "off",
        }

    @property
    def signature(self) -> Signature:
        """The model's inputs and outputs."""
        return self._signature

    @property
    def config(self) -> EngineConfig:
        """The configuration it was opened with."""
        return self._config

    @property
    def effective(self) -> Mapping[str, str]:
        """The settings in effect, as OpenVINO reports them."""
        return self._effective

    @property
    def slots(self) -> Sequence[Slot]:
        """One per stream."""
        return self._slots

    def spare(self) -> Sequence[Slot]:
        """As `Engine.spare`: OpenVINO queues what is started while all streams compute."""
        if not self._spare:
            self._spare = [self._slot(f"openvino-spare-{index}") for index in range(len(self._slots))]
        return self._spare

    def close(self) -> None:
        """Finish the running batches, call their `done`, end the threads. May be called again."""
        for slot in (*self._slots, *self._spare):
            slot.close()
        self._graphs = {}
        atexit.unregister(self.close)

    def _slot(self, name: str) -> _Requests:
        return _Requests(_openvino(), self._graphs, self._routes, self._signature, self._config.max_batch, Line(name))


class _Requests(Stream):
    """Infer requests that read from and write to the stream's own buffers: nothing is copied.

    Args:
        graphs: size -> compiled for it; 0 for the dynamic one.
        routes: rows of a batch -> the graph it runs on; a larger one also computes the old rows behind the batch in the
            buffer, whose answers are not read.
    """

    def __init__(
        self, ov: Any, graphs: dict[int, Any], routes: dict[int, int], signature: Signature, max_batch: int, line: Line
    ) -> None:
        super().__init__(signature, max_batch, line)
        self._ov = ov
        self._routes = routes
        self._requests = {size: graph.create_infer_request() for size, graph in graphs.items()}
        self._bound: dict[int, list[tuple[Any, Any]]] = {}
        self._sized: BySizes[dict[int, list[tuple[Any, Any]]]] = BySizes(dict)
        self._dynamic_rows = 0
        for size in self._requests:
            if size:
                self._bind(self._requests[size], size)

    def _resized(self, sizes: Sizes) -> None:
        self._bound, self._dynamic_rows = self._sized[sizes], 0

    def _launch(self, rows: int) -> None:
        size = self._routes[rows]
        request = self._running = self._requests[size]
        if not size and rows != self._dynamic_rows:
            self._bind(request, rows)
            self._dynamic_rows = rows
        request.start_async()

    def _finish(self, rows: int) -> None:
        self._running.wait()

    def _bind(self, request: Any, rows: int) -> None:
        """Point a request at the first `rows` rows of the buffers."""
        tensors = self._bound.get(rows)
        if tensors is None:
            arrays = {**self._inputs, **self._answers}
            tensors = [(name, self._ov.Tensor(array[:rows], shared_memory=True)) for name, array in arrays.items()]
            self._bound[rows] = tensors
        for name, tensor in tensors:
            request.set_tensor(name, tensor)

    def close(self) -> None:
        super().close()
        self._sized.clear()
        self._bound, self._requests, self._running = {}, {}, None


def _static_sizes(max_batch: int, model_bytes: int) -> list[int]:
    """The batch sizes to compile separately: batches are of `max_batch` at high load, and of 1 at low load."""
    if max_batch == 1:
        return [1]
    return [max_batch, 1] if model_bytes <= _SMALL_BYTES else []


def computes_bf16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this machine."""
    with restored_signal_stack():
        capabilities: list[str] = _openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "BF16" in capabilities


def layer_times(bundle: Bundle, config: EngineConfig, runs: int = 10) -> dict[str, float]:
    """Where the time of a batch goes: kind of layer and precision -> seconds, from OpenVINO's own counters.

    Args:
        bundle: what to run, on its samples.
        config: how; a batch of `max_batch` is run on one stream. Counting takes time itself: only the shares are exact.
        runs: whose mean is taken, after two warm-up runs.

    Raises:
        EngineError: as `OpenVINOEngine`.
    """
    ov = _openvino()
    check_precision(bundle, config)
    try:
        compiled = _compile(ov, bundle, config, ov.Dimension(config.max_batch), PERF_COUNT=True)
    except RuntimeError as error:
        raise _refused(bundle, error) from error
    request = compiled.create_infer_request()
    samples = bundle.samples()
    batch = {name: np.resize(array, (config.max_batch, *array.shape[1:])) for name, array in samples.items()}
    seconds: Counter[str] = Counter()
    for run in range(2 + runs):
        request.infer(batch)
        for node in request.get_profiling_info() if run >= 2 else ():
            precision = node.exec_type.rpartition("_")[2]
            seconds[f"{node.node_type} {precision}"] += node.real_time.total_seconds() / runs
    return {kind: spent for kind, spent in seconds.most_common() if spent > 0}


def _compile(ov: Any, bundle: Bundle, config: EngineConfig, batch: Any, **options: object) -> Any:
    core, signature = ov.Core(), bundle.manifest.signature
    model = core.read_model(bundle.model)
    model.reshape({spec.name: ov.PartialShape([batch, *_dimensions(ov, signature, spec)]) for spec in signature.inputs})
    with restored_signal_stack():
        compiled = core.compile_model(model, "CPU", {**_options(config), **options})
    _check_tensors(compiled, signature, bundle)
    return compiled


def _dimensions(ov: Any, signature: Signature, spec: TensorSpec) -> list[Any]:
    """The shape of a sample, with the bounds of what is open."""
    shape: list[Any] = list(spec.shape)
    for axis, position in signature.open_axes.get(spec.name, ()):
        dimension = signature.dimensions[position]
        shape[axis] = ov.Dimension(dimension.smallest, dimension.largest)
    return shape


def _route_padded(slot: _Requests, routes: dict[int, int], sizes: Sequence[int], between: Sequence[int]) -> None:
    """Route sizes that were not compiled to the next larger one where that takes no longer than the dynamic graph.

    The dynamic graph is timed at the compiled sizes, in turns: it prepares itself again when the size changes, and in
    service the size mostly does.
    """
    timed = sorted(sizes)
    if _seconds(slot, timed[-1]) > _SLOW_S:
        return
    static, dynamic = ([min(times) for times in zip(*rounds, strict=True)] for rounds in _timed(slot, routes, timed))
    for rows in between:
        if rows < timed[0]:
            continue  # no smaller size was timed
        size = timed[int(np.searchsorted(timed, rows))]
        if static[timed.index(size)] <= np.interp(rows, timed, dynamic):
            routes[rows] = size


def _timed(slot: _Requests, routes: dict[int, int], timed: list[int]) -> tuple[list[list[float]], list[list[float]]]:
    """Four rounds of times at every size of `timed`, on the graphs compiled for them and on the dynamic one."""
    rounds: tuple[list[list[float]], list[list[float]]] = [], []
    for size in timed:
        routes[size] = 0
    for _ in range(4):
        rounds[1].append([_seconds(slot, size) for size in timed])
    for size in timed:
        routes[size] = size
    for _ in range(4):
        rounds[0].append([_seconds(slot, size) for size in timed])
    return rounds


def _seconds(slot: _Requests, rows: int) -> float:
    finished: SimpleQueue[BaseException | None] = SimpleQueue()
    begin = time.perf_counter()
    slot.start(rows, finished.put)
    error = finished.get()
    if error is not None:
        raise error
    return time.perf_counter() - begin


def _openvino() -> Any:
    disable_telemetry()
    try:
        import openvino
    except ImportError as error:
        raise EngineError("the engine openvino is not installed", str(error), INSTALL.format("openvino")) from error
    return openvino


def _options(config: EngineConfig) -> dict[str, object]:
    """All options that decide speed or answers, set explicitly: OpenVINO's defaults depend on the machine."""
    return {
        "INFERENCE_PRECISION_HINT": _HINT[config.precision],
        "NUM_STREAMS": config.streams,
        "INFERENCE_NUM_THREADS": config.streams * config.threads,
        "PERFORMANCE_HINT": "LATENCY" if config.streams == 1 else "THROUGHPUT",
        "PERFORMANCE_HINT_NUM_REQUESTS": config.streams,
        "ENABLE_CPU_PINNING": False,
        "ENABLE_CPU_RESERVATION": False,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # else answers depend on the batch
        # on one thread 2026.4 fuses dense layers, with wrong answers in int8; without that it is as fast
        **({"SNIPPETS_MODE": "DISABLE"} if config.precision == "int8" else {}),
    }


def _check_options(compiled: Any, config: EngineConfig) -> None:
    """Raise unless the options are in effect: OpenVINO reduces what it cannot do without an error."""
    names = {"f32": "float32", "bf16": "bfloat16"}
    threads = config.streams * config.threads
    for name, wanted in (
        ("INFERENCE_PRECISION_HINT", names[_HINT[config.precision]]),
        ("NUM_STREAMS", str(config.streams)),
        ("INFERENCE_NUM_THREADS", str(threads)),
        ("ENABLE_CPU_PINNING", "False"),
    ):
        value = compiled.get_property(name)
        found = value.get_type_name() if hasattr(value, "get_type_name") else str(value)
        if found in ("f32", "bf16"):
            found = names[found]
        if found != wanted:
            raise EngineError(
                f"OpenVINO did not take {name} = {wanted}",
                f"it runs with {found} on this machine",
                f"ask for fewer streams and threads ({config.streams} x {config.threads} = {threads})"
                if "NUM" in name
                else "ask for another precision, such as f32",
            )


def _check_tensors(compiled: Any, signature: Signature, bundle: Bundle) -> None:
    """Raise unless the graph's tensors are those of the bundle's signature."""
    for ports, specs in ((compiled.inputs, signature.inputs), (compiled.outputs, signature.outputs)):
        found = {name: port for port in ports for name in port.names}  # a port may have several
        for spec in specs:
            port = found.get(spec.name)
            if port is None or not _fits(port, spec):
                raise EngineError(
                    f"the graph of {bundle.manifest.name} has no tensor {spec.name} of {spec.dtype}{spec.shape}",
                    f"it has {', '.join(str(port) for port in ports)}",
                    "make the bundle again",
                )


def _fits(port: Any, spec: TensorSpec) -> bool:
    shape = port.partial_shape
    if len(shape) != len(spec.shape) + 1 or np.dtype(port.element_type.to_dtype()) != np.dtype(spec.dtype):
        return False
    # a dimension may be known only in the run
    return all(shape[axis + 1].is_dynamic or shape[axis + 1] == length for axis, length in enumerate(spec.shape))


def _layers(compiled: Any) -> Counter[str]:
    """Precision -> how many heavy layers run in it."""
    found: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ops():
        facts = node.get_rt_info()
        if facts["layerType"].astype(str) in HEAVY:
            found[facts["runtimePrecision"].astype(str)] += 1
    return found


def _refused(bundle: Bundle, error: RuntimeError) -> EngineError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return EngineError(
        f"OpenVINO cannot run the bundle {bundle.manifest.name}",
        lines[-1] if lines else repr(error),
        "try the engine onnxruntime",
    )
