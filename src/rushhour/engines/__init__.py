"""Engines: what runs a compiled graph. OpenVINO, ONNX Runtime and torch behind one Protocol (`engine.py`)."""

from __future__ import annotations

from rushhour.bundle import Bundle
from rushhour.engines.engine import Done, Engine, EngineConfig, Runner, Slot
from rushhour.engines.service import fill, keep_busy, time_service

__all__ = [
    "Done",
    "Engine",
    "EngineConfig",
    "Runner",
    "Slot",
    "fill",
    "keep_busy",
    "open_engine",
    "time_service",
]


def open_engine(bundle: Bundle, config: EngineConfig, *, trusted: tuple[str, ...] = ()) -> Engine:
    """Compile `bundle` for `config`. Only the engine asked for is imported.

    Args:
        bundle: what to run.
        config: how to run it.
        trusted: for the torch engine, factories (`module:factory`) outside `rushhour.models` that may be imported:
            a bundle's own word is not enough to run code.

    Raises:
        EngineError: if the engine is not installed, or cannot do exactly what `config` says.
    """
    if config.engine == "openvino":
        from rushhour.engines.openvino import OpenVINOEngine

        return OpenVINOEngine(bundle, config)
    if config.engine == "onnxruntime":
        from rushhour.engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(bundle, config)
    from rushhour.engines.torch import TorchEngine

    return TorchEngine(bundle, config, trusted=trusted)
