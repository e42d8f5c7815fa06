"""The model as every peer runs it, so that only the servers differ: the same graph, engine and options as ours.

Used in the peers' own environments, so it needs numpy and OpenVINO only. What to run is read from the environment:

    BENCH_MODEL       path of model.onnx, or `noop` for zeros at no cost
    BENCH_PRECISION   f32, bf16 or int8
    BENCH_MAX_BATCH   samples in one batch, at most
    BENCH_COUNTS      a folder: each process keeps a file there with how many batches of each size it has run
    BENCH_PORT        where the server listens, on 127.0.0.1
    BENCH_INSTANCES   copies of the model that may run at the same time, one core each
    BENCH_WAY         how the peer answers, where it has more than one way
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHAPE = (32, 32, 3)
CLASSES = 10
PORT = int(os.environ.get("BENCH_PORT", "0"))
MAX_BATCH = int(os.environ.get("BENCH_MAX_BATCH", "32"))
INSTANCES = int(os.environ.get("BENCH_INSTANCES", "1"))
WAY = os.environ.get("BENCH_WAY", "")


class Model:
    """One instance on one thread; use it from one thread at a time."""

    def __init__(self) -> None:
        file = os.environ["BENCH_MODEL"]
        folder = os.environ.get("BENCH_COUNTS")
        self._counts: NDArray[np.uint64] = np.zeros(MAX_BATCH + 1, np.uint64)
        if folder:
            self._counts = np.memmap(Path(folder) / str(os.getpid()), np.uint64, "w+", shape=(MAX_BATCH + 1,))
        self._request: Any = None
        self._zeros = np.zeros((MAX_BATCH, CLASSES), np.float32)
        if file != "noop":
            self.compiled = compile_model(file, os.environ["BENCH_PRECISION"], MAX_BATCH)
            self._request = self.compiled.create_infer_request()
            sample = [edge.get_length() for edge in list(self.compiled.input().get_partial_shape())[1:]]
            for rows in range(1, MAX_BATCH + 1):  # kernels are made at the first batch of each size
                self.infer(np.zeros((rows, *sample), np.uint8))
            self._counts[:] = 0

    def infer(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Answers `(n, classes)` to samples `(n, height, width, 3)`, in one block of memory."""
        self._counts[len(batch)] += 1
        if self._request is None:
            return self._zeros[: len(batch)]
        if not batch.flags.writeable:  # OpenVINO takes no view of a body's bytes
            batch = batch.copy()
        self._request.set_input_tensor(_openvino().Tensor(batch, shared_memory=True))
        self._request.start_async()
        self._request.wait()
        answers: NDArray[np.float32] = self._request.get_output_tensor().data.copy()
        return answers


def compile_model(file: str, precision: str, max_batch: int, streams: int = 1) -> Any:
    """The graph compiled with the options of `rushhour.engines.openvino`: one thread for each stream."""
    ov = _openvino()
    core = ov.Core()
    model = core.read_model(file)
    sample = list(model.input().get_partial_shape())[1:]
    model.reshape(ov.PartialShape([ov.Dimension(1, max_batch), *sample]))
    options = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": streams,
        "PERFORMANCE_HINT": "LATENCY" if streams == 1 else "THROUGHPUT",
        "PERFORMANCE_HINT_NUM_REQUESTS": streams,
        "ENABLE_CPU_PINNING": False,
        "ENABLE_CPU_RESERVATION": False,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }
    return core.compile_model(model, "CPU", options)


def _openvino() -> Any:
    # Without its telemetry, which reports every import unless it is kept out.
    if "openvino" not in sys.modules:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino
