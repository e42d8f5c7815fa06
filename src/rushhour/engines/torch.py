"""torch in eager mode: the baseline."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from rushhour.bundle import Bundle, Signature, Sizes
from rushhour.engines.engine import EngineConfig, Slot
from rushhour.engines.stream import INSTALL, Line, Stream, check_precision, warm_up
from rushhour.errors import EngineError
from rushhour.system.machine import describe


class TorchEngine:
    """A bundle's torch module, run as it is, a thread for each stream.

    The number of threads is a setting of the process: while an engine is open, other torch code in it runs with as
    many. Of several engines the last opened decides; when all are closed, the number is reset.

    Args:
        bundle: must carry its torch module (source and weights).
        config: how; f32 or bf16 (autocast).
        trusted: factories (`module:factory`) outside `rushhour.models` that may be imported.

    Raises:
        EngineError: if torch is not installed, or has no such precision here.
        ModelError: if the bundle carries no torch module, or it cannot be built.
    """

    def __init__(self, bundle: Bundle, config: EngineConfig, trusted: tuple[str, ...] = ()) -> None:
        torch = _torch()
        if config.precision == "int8":
            raise EngineError(
                "cannot run in int8 on torch", "it has no int8 kernels for a quantised ONNX graph", "ask for openvino"
            )
        check_precision(bundle, config)
        here = describe()
        if config.precision == "bf16" and "avx2" in here.features and not here.has_bf16:
            raise EngineError(
                "cannot run in bf16 on torch",
                "this processor has no bf16 instructions, and torch would emulate them, slower than f32",
                "ask for f32",
            )
        from rushhour.models.deployed import load_deployed

        module = load_deployed(bundle, trusted)
        self._signature = bundle.manifest.signature
        self._config = config
        self._slots: list[_Eager] = []
        _THREADS.enter(self)
        atexit.register(self.close)
        try:
            for index in range(config.streams):
                self._slots.append(_Eager(torch, module, self._signature, config, f"torch-{index}"))
            warm_up(bundle, self._slots, (1, config.max_batch))
        except BaseException:
            self.close()
            raise
        self._effective = {
            "engine": f"torch {torch.__version__}",
            "precision": config.precision,
            "streams": str(len(self._slots)),
            "threads": str(self._slots[0].threads),
            "max_batch": str(config.max_batch),
            "mode": "eager" if config.precision == "f32" else "eager, autocast",
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
        """The settings in effect, as torch reports them."""
        return self._effective

    @property
    def slots(self) -> Sequence[Slot]:
        """One per stream."""
        return self._slots

    def spare(self) -> Sequence[Slot]:
        """As `Engine.spare`: none, each stream has a thread of its own."""
        return ()

    def close(self) -> None:
        """Finish the running batches, call their `done`, end the threads. May be called again."""
        for slot in self._slots:
            slot.close()
        _THREADS.leave(self)
        atexit.unregister(self.close)


class _Threads:
    """The number of torch's threads in this process, which all engines share."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[TorchEngine] = []
        self._before = 0

    def enter(self, engine: TorchEngine) -> None:
        """An engine opens."""
        with self._lock:
            if not self._open:
                self._before = _torch().get_num_threads()
            self._open.append(engine)

    def leave(self, engine: TorchEngine) -> None:
        """An engine is closed; those that stay keep their threads. May be called again."""
        with self._lock:
            if engine in self._open:
                self._open.remove(engine)
                _torch().set_num_threads(self._open[-1].config.threads if self._open else self._before)


_THREADS = _Threads()


class _Eager(Stream):
    """Runs the module on the stream's thread. Its input is a view of the buffer; its answer is copied out."""

    threads = 0
    """As torch reports it on the stream's thread."""

    def __init__(self, torch: Any, module: Any, signature: Signature, config: EngineConfig, name: str) -> None:
        self._torch = torch
        self._module = module
        self._config = config
        super().__init__(signature, config.max_batch, Line(name, enter=self._enter))
        self._resized(())

    def _resized(self, sizes: Sizes) -> None:
        self._tensors = [self._torch.from_numpy(array) for array in self._inputs.values()]
        (self._answer,) = (self._torch.from_numpy(array) for array in self._answers.values())

    def _enter(self) -> None:
        self._torch.set_num_threads(self._config.threads)
        self.threads = self._torch.get_num_threads()

    def _finish(self, rows: int) -> None:
        with self._torch.inference_mode(), self._autocast():
            self._answer[:rows].copy_(self._module(*(tensor[:rows] for tensor in self._tensors)))

    def _autocast(self) -> AbstractContextManager[Any]:
        torch = self._torch
        autocast: AbstractContextManager[Any] = torch.autocast(
            "cpu", dtype=torch.bfloat16, enabled=self._config.precision == "bf16"
        )
        return autocast

    def close(self) -> None:
        super().close()
        self._module = None


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise EngineError("the engine torch is not installed", str(error), INSTALL.format("torch")) from error
    return torch
