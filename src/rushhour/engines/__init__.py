"""Engines run compiled graphs: OpenVINO, ONNX Runtime and torch behind one Protocol (`engine.py`)."""

from __future__ import annotations

import importlib.util

from rushhour.bundle import Bundle
from rushhour.engines.agreement import check_answers, full_range, saturates_here
from rushhour.engines.engine import Done, Engine, EngineConfig, Runner, Slot
from rushhour.engines.service import batch_cost, fill, keep_busy, run_sizes, time_service, usual_sizes
from rushhour.plan import EngineName
from rushhour.system.machine import describe

__all__ = [
    "Done",
    "Engine",
    "EngineConfig",
    "Runner",
    "Slot",
    "abilities",
    "batch_cost",
    "fill",
    "full_range",
    "keep_busy",
    "open_engine",
    "run_sizes",
    "saturates_here",
    "time_service",
    "usual_sizes",
]


def open_engine(bundle: Bundle, config: EngineConfig, *, trusted: tuple[str, ...] = ()) -> Engine:
    """Compile `bundle` for `config`, and check its answers against the recorded ones. Only that engine is imported.

    Args:
        bundle: what to run.
        config: how to run it.
        trusted: for the torch engine, factories (`module:factory`) outside `rushhour.models` that may be imported:
            a bundle alone must not decide which code runs.

    Raises:
        EngineError: if the engine is not installed, cannot do exactly what `config` says, or gives other
            answers to the bundle's samples than recorded.
    """
    engine = _compiled(bundle, config, trusted)
    try:
        check_answers(bundle, engine)
    except BaseException:
        engine.close()
        raise
    return engine


def abilities() -> dict[EngineName, str]:
    """What each engine supports on this machine, in words; imports all that are installed, which takes seconds."""
    here = describe()
    int8 = "int8 of 7-bit weights (8 bits saturate here: {})" if here.saturates else "int8"
    found: dict[EngineName, str] = {}
    wide: dict[EngineName, str] = {"openvino": "refused", "onnxruntime": "slower kernels", "torch": ""}
    for name, careful in wide.items():
        if importlib.util.find_spec(name) is None:
            found[name] = "not installed"
            continue
        precisions = ["f32"]
        if name == "openvino":
            from rushhour.engines.openvino import computes_bf16

            precisions += ["bf16"] * computes_bf16()
        elif name == "torch":
            precisions += ["bf16"] * here.has_bf16
        if careful:
            precisions.append(int8.format(careful))
        found[name] = f"{here.versions.get(name, '')}: {', '.join(precisions)}"
    return found


def _compiled(bundle: Bundle, config: EngineConfig, trusted: tuple[str, ...]) -> Engine:
    if config.engine == "openvino":
        from rushhour.engines.openvino import OpenVINOEngine

        return OpenVINOEngine(bundle, config)
    if config.engine == "onnxruntime":
        from rushhour.engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(bundle, config)
    from rushhour.engines.torch import TorchEngine

    return TorchEngine(bundle, config, trusted=trusted)
