"""The Protocol of engines, which run compiled graphs.

An engine has a fixed number of streams, and for each a `Slot` with its own input buffers. The caller writes a batch
once, in place, and starts the slot; the slot calls back when the answers are ready. Nothing is concatenated, and no
thread waits for a future.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Annotated, Any, Protocol

import msgspec
from numpy.typing import NDArray

from rushhour.bundle import Signature, Sizes
from rushhour.plan import EngineName, Precision

Done = Callable[[BaseException | None], None]
"""Called once per started batch, on a thread of the engine: None if the answers are ready, else the error."""

_Positive = Annotated[int, msgspec.Meta(ge=1)]


class EngineConfig(msgspec.Struct, frozen=True):
    """How a bundle is run. An engine that cannot do exactly this raises; it never does something else.

    Attributes:
        engine: which one.
        precision: that it computes in; explicit, because engines choose bf16 by themselves where they can.
        streams: batches that run at the same time.
        threads: CPU threads of each stream.
        max_batch: samples in one batch, at most.
    """

    engine: EngineName
    precision: Precision = "f32"
    streams: _Positive = 1
    threads: _Positive = 1
    max_batch: _Positive = 1


class Slot(Protocol):
    """The buffers of a batch, which an engine runs on one of its streams. Used by one caller at a time."""

    @property
    def inputs(self) -> Mapping[str, NDArray[Any]]:
        """Input name -> C-contiguous array of shape `(max_batch, *shape)`, to be filled in place before `start`."""
        ...

    def resize(self, sizes: Sizes) -> None:
        """Set the sizes of the model's open dimensions for the next batches; before the first call they are any.

        `inputs` are other views of the same buffers then. Not while a batch runs, and not for a model without open
        dimensions.

        Raises:
            EngineError: if a size is out of its bounds.
        """
        ...

    def start(self, rows: int, done: Done) -> None:
        """Run the first `rows` samples of the buffers; return at once. `done` is called on an engine thread.

        The buffers must not be touched until then.

        Raises:
            EngineError: if the engine is closed, or `rows` is not in 1..max_batch. `done` is then not called.
        """
        ...

    @property
    def outputs(self) -> Mapping[str, NDArray[Any]]:
        """Output name -> C-contiguous array `(rows, *shape)` of the last batch; valid until the next `start`."""
        ...


class Engine(Protocol):
    """A bundle, compiled and ready. `slots` run independently of each other."""

    @property
    def signature(self) -> Signature:
        """The model's inputs and outputs."""
        ...

    @property
    def config(self) -> EngineConfig:
        """The configuration it was opened with."""
        ...

    @property
    def effective(self) -> Mapping[str, str]:
        """The settings in effect, as the engine itself reports them: precision, streams, threads, version."""
        ...

    @property
    def slots(self) -> Sequence[Slot]:
        """One per stream."""
        ...

    def spare(self) -> Sequence[Slot]:
        """Further slots, one per stream: with them, more batches can be started than there are streams.

        Those wait in the engine, and begin as soon as a stream is free, first come first served. Made by the first
        call; empty where the engine would run them at once.
        """
        ...

    def close(self) -> None:
        """Finish the running batches, call their `done`, then free all memory and threads. May be called again."""
        ...


class Runner:
    """Whole arrays through an engine, batch by batch over all its streams: for accuracy, checks and timing.

    Thread-safe; callers share the slots and wait for a free one.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._free: SimpleQueue[Slot] = SimpleQueue()
        for slot in engine.slots:
            self._free.put(slot)

    def submit(self, inputs: Mapping[str, NDArray[Any]]) -> Future[dict[str, NDArray[Any]]]:
        """Run one batch; waits only for a free slot, not for the answers.

        Args:
            inputs: name -> array of shape `(n, *shape)` with n in 1..max_batch; open dimensions have its sizes.

        Raises:
            EngineError: as `Slot.start`.
        """
        future: Future[dict[str, NDArray[Any]]] = Future()
        rows = len(next(iter(inputs.values())))
        sizes = self._engine.signature.sizes_of(inputs)
        slot = self._free.get()

        def done(error: BaseException | None) -> None:
            if error is None:
                answers = {name: array.copy() for name, array in slot.outputs.items()}
            self._free.put(slot)
            if error is None:
                future.set_result(answers)
            else:
                future.set_exception(error)

        try:
            if sizes:
                slot.resize(sizes)
            for name, buffer in slot.inputs.items():
                buffer[: min(rows, len(buffer))] = inputs[name][: len(buffer)]
            slot.start(rows, done)
        except BaseException:
            self._free.put(slot)
            raise
        return future

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Answers to any number of samples: name -> array of shape `(n, *shape)`, in order.

        Args:
            inputs: name -> array of shape `(n, *shape)`.
        """
        import numpy as np

        total, step = len(next(iter(inputs.values()))), self._engine.config.max_batch
        futures = [
            self.submit({name: array[at : at + step] for name, array in inputs.items()}) for at in range(0, total, step)
        ]
        parts = [future.result() for future in futures]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
