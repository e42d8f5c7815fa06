"""Engines: the conformance kit on each, and what each refuses."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from rushhour.bundle import Bundle, Manifest, Signature, TensorSpec
from rushhour.engines import Engine, EngineConfig, Runner, open_engine
from rushhour.engines.stream import Stream, warm_up
from rushhour.errors import EngineError, ModelError
from rushhour.machine import cores, describe
from rushhour.task import Task
from rushhour.testing.bundles import tiny_answers, tiny_bundle
from rushhour.testing.engines import EngineConformance
from rushhour.testing.fakes import FakeEngine, at_once, fake_answers, on_a_timer

STREAMS = min(2, cores())
BF16 = bool({"avx512_bf16", "amx_bf16"} & set(describe().features))
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
