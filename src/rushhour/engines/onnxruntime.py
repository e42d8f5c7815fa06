"""ONNX Runtime: a thread for each stream, on a session of its own or on one they share."""

from __future__ import annotations

import atexit
from collections.abc import Mapping, Sequence
from typing import Any

from rushhour.bundle import Bundle, Signature, Sizes, TensorSpec
from rushhour.engines.agreement import saturates_here
from rushhour.engines.engine import EngineConfig, Slot
from rushhour.engines.stream import INSTALL, BySizes, Line, Stream, check_precision, warm_up
from rushhour.errors import EngineError
from rushhour.system.telemetry import disable_telemetry

_SPINNING = "session.intra_op.allow_spinning"
_PRECISION = "session.x64quantprecision"
"""Without VNNI: weights become unsigned, and slower kernels run that do not saturate."""


class OnnxRuntimeEngine:
    """A bundle on ONNX Runtime's CPU provider.

    With one thread a stream, all streams share a session and so its weights; with more, each has its own session,
    because a session has one pool of threads and the streams would queue for it.

    Args:
        bundle: what to run.
        config: how; f32, or int8 of a quantised bundle.

    Raises:
        EngineError: if ONNX Runtime is not installed, has no such precision, or cannot run the graph.
    """

    def __init__(self, bundle: Bundle, config: EngineConfig) -> None:
        ort = _onnxruntime()
        if config.precision == "bf16":
            raise EngineError(
                "cannot run in bf16 on onnxruntime",
                "its CPU kernels compute in f32 or int8",
                "ask for f32, or for bf16 on openvino",
            )
        check_precision(bundle, config)
        self._signature = bundle.manifest.signature
        self._config = config
        shared = config.threads == 1
        try:
            careful = config.precision == "int8" and saturates_here(bundle)
            sessions = [_session(ort, bundle, config.threads, careful) for _ in range(1 if shared else config.streams)]
        except Exception as error:  # its exceptions have no common base class
            raise EngineError(
                f"ONNX Runtime cannot run the bundle {bundle.manifest.name}",
                f"{type(error).__name__}: {error}",
                "try the engine openvino",
            ) from error
        _check_tensors(sessions[0], self._signature, bundle)
        self._slots: list[_Run] = []
        self._spare: list[_Run] = []
        names = [f"onnxruntime-{index}" for index in range(config.streams)]
        self._shared = (sessions[0], Line(*names)) if shared else None
        atexit.register(self.close)
        try:
            for index, name in enumerate(names):
                session, line = self._shared or (sessions[index], Line(name))
                self._slots.append(_Run(session, line, self._signature, config.max_batch))
            warm_up(bundle, self._slots, (1, config.max_batch))
        except BaseException:
            self.close()
            raise
        options = sessions[0].get_session_options()
        self._effective = {
            "engine": f"onnxruntime {ort.__version__}",
            "precision": config.precision,
            "streams": str(len(self._slots)),
            "threads": str(options.intra_op_num_threads),
            "max_batch": str(config.max_batch),
            "sessions": str(len(sessions)),
            # a spinning pool would take cores from the event loop, which fills the next batch
            "spinning": "off" if options.get_session_config_entry(_SPINNING) == "0" else "on",
            "int8 products": "in 32 bits, for the weights use all 8" if careful else "as the processor adds them",
            "provider": ", ".join(sessions[0].get_providers()),
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
        """The settings in effect, as ONNX Runtime reports them."""
        return self._effective

    @property
    def slots(self) -> Sequence[Slot]:
        """One per stream."""
        return self._slots

    def spare(self) -> Sequence[Slot]:
        """As `Engine.spare`: what is started waits for one of the threads where all streams share a session."""
        if not self._spare and self._shared is not None:
            signature, most = self._signature, self._config.max_batch
            self._spare = [_Run(*self._shared, signature, most) for _ in self._slots]
        return self._spare

    def close(self) -> None:
        """Finish the running batches, call their `done`, end the threads. May be called again."""
        for slot in (*self._slots, *self._spare):
            slot.close()
        if self._shared is not None:
            self._shared[1].close()
            self._shared = None
        atexit.unregister(self.close)


class _Run(Stream):
    """Runs on a thread of the line, bound to the stream's own buffers: nothing is copied."""

    def __init__(self, session: Any, line: Line, signature: Signature, max_batch: int) -> None:
        super().__init__(signature, max_batch, line)
        self._session = session
        self._bindings: dict[int, Any] = {}
        self._sized: BySizes[dict[int, Any]] = BySizes(dict)

    def _resized(self, sizes: Sizes) -> None:
        self._bindings = self._sized[sizes]

    def _finish(self, rows: int) -> None:
        binding = self._bindings.get(rows)
        if binding is None:
            binding = self._bindings[rows] = self._bind(rows)
        self._session.run_with_iobinding(binding)

    def _bind(self, rows: int) -> Any:
        binding = self._session.io_binding()
        for bind, arrays in ((binding.bind_input, self._inputs), (binding.bind_output, self._answers)):
            for name, array in arrays.items():
                bind(name, "cpu", 0, array.dtype.type, (rows, *array.shape[1:]), array.ctypes.data)
        return binding

    def close(self) -> None:
        super().close()
        self._sized.clear()
        self._bindings, self._session = {}, None


def _onnxruntime() -> Any:
    disable_telemetry()
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(
            "the engine onnxruntime is not installed", str(error), INSTALL.format("onnxruntime")
        ) from error
    return onnxruntime


def _session(ort: Any, bundle: Bundle, threads: int, careful: bool) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry(_SPINNING, "0")
    options.add_session_config_entry(_PRECISION, "1" if careful else "0")
    options.log_severity_level = 4  # errors are raised: they need not be logged too
    return ort.InferenceSession(str(bundle.model), options, providers=["CPUExecutionProvider"])


def _check_tensors(session: Any, signature: Signature, bundle: Bundle) -> None:
    """Raise unless the graph's tensors are those of the bundle's signature."""
    for nodes, specs in ((session.get_inputs(), signature.inputs), (session.get_outputs(), signature.outputs)):
        found = {node.name: node for node in nodes}
        for spec in specs:
            node = found.get(spec.name)
            if node is None or not _fits(node, spec):
                raise EngineError(
                    f"the graph of {bundle.manifest.name} has no tensor {spec.name} of {spec.dtype}{spec.shape}",
                    f"it has {', '.join(f'{node.name} {node.type}{node.shape}' for node in nodes)}",
                    "make the bundle again",
                )


def _fits(node: Any, spec: TensorSpec) -> bool:
    dtype = {"float32": "float", "float64": "double"}.get(spec.dtype, spec.dtype)
    if len(node.shape) != len(spec.shape) + 1 or node.type != f"tensor({dtype})":
        return False
    # a dimension that is not known before the run has a name instead of a number
    return all(
        not isinstance(found, int) or found == wanted for found, wanted in zip(node.shape[1:], spec.shape, strict=True)
    )
