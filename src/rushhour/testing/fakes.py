"""A fake engine that computes sums, to test batchers, servers and tuners."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rushhour.bundle import Signature, Sizes, TensorSpec
from rushhour.engines.engine import Done, EngineConfig, Slot
from rushhour.errors import EngineError

Schedule = Callable[[float, Callable[[], None]], object]
"""Calls a function after a number of seconds: `at_once`, `on_a_timer`, or an event loop's `call_later`."""

SIGNATURE = Signature(
    inputs=(TensorSpec(name="image", dtype="uint8", shape=(4, 4, 1)),),
    outputs=(TensorSpec(name="probabilities", dtype="float32", shape=(3,)),),
)
"""That of `tiny_bundle`."""


def at_once(seconds: float, finish: Callable[[], None]) -> None:
    """Call it at once: the batch is done before `start` returns."""
    finish()


def on_a_timer(seconds: float, finish: Callable[[], None]) -> None:
    """Call it after real time, on another thread, like a real engine."""
    timer = threading.Timer(seconds, finish)
    timer.daemon = True
    timer.start()


def fake_answers(inputs: NDArray[Any], length: int = 3) -> NDArray[np.float32]:
    """The answers of a `FakeEngine`: the sum of each sample, then that plus 1, plus 2, ...

    Args:
        inputs: shape `(n, *shape)`.
        length: of one answer.

    Returns:
        shape `(n, length)`.
    """
    sums = inputs.reshape(len(inputs), -1).sum(axis=1, dtype=np.float64)
    answers: NDArray[np.float32] = (sums[:, None] + np.arange(length)).astype(np.float32)
    return answers


class FakeEngine:
    """Answers with sums of its inputs, after a given time.

    Args:
        config: its streams and max_batch are used; the rest is only reported.
        signature: of one input or more; answers come from the first.
        service_s: samples of a batch -> the seconds that it takes.
        schedule: waits for that time.
        answers: samples and the length of an answer -> the answers, shape `(n, length)`.
    """

    def __init__(
        self,
        config: EngineConfig | None = None,
        *,
        signature: Signature = SIGNATURE,
        service_s: Callable[[int], float] = lambda rows: 0.0,
        schedule: Schedule = at_once,
        answers: Callable[[NDArray[Any], int], NDArray[Any]] = fake_answers,
    ) -> None:
        self.answers = answers
        self._config = config or EngineConfig(engine="openvino", max_batch=16)
        self._signature = signature
        self._slots, self._spare = (
            [_FakeSlot(self, service_s, schedule) for _ in range(self._config.streams)] for _ in range(2)
        )
        self._queue: deque[Callable[[], object]] = deque()
        self._running = 0
        self._counting = threading.Lock()
        self._failures: list[EngineError] = []
        self.closed = False
        self.batches: list[int] = []
        """Rows of every batch started, in order."""

    @property
    def signature(self) -> Signature:
        """As `Engine.signature`."""
        return self._signature

    @property
    def config(self) -> EngineConfig:
        """As `Engine.config`."""
        return self._config

    @property
    def effective(self) -> Mapping[str, str]:
        """As `Engine.effective`: the config."""
        return {
            "engine": "fake",
            "precision": self._config.precision,
            "streams": str(self._config.streams),
            "threads": str(self._config.threads),
            "max_batch": str(self._config.max_batch),
        }

    @property
    def slots(self) -> Sequence[Slot]:
        """As `Engine.slots`: one per stream."""
        return self._slots

    def spare(self) -> Sequence[Slot]:
        """As `Engine.spare`."""
        return self._spare

    def run(self, batch: Callable[[], object]) -> None:
        """Begin a batch, or have it wait until another has ended."""
        with self._counting:
            if self._running == self._config.streams:
                self._queue.append(batch)
                return
            self._running += 1
        batch()

    def ended(self) -> None:
        """A batch has ended: the first that waits begins."""
        with self._counting:
            if not self._queue:
                self._running -= 1
                return
            batch = self._queue.popleft()
        batch()

    def fail_next(self, error: EngineError) -> None:
        """Make the next batch that ends fail with `error`. It may be called several times, for several batches."""
        self._failures.append(error)

    def take_failure(self) -> EngineError | None:
        """The error of the batch that ends now, if one was set."""
        return self._failures.pop(0) if self._failures else None

    def close(self) -> None:
        """End the running batches at once, with their `done`. It may be called again."""
        self.closed = True
        for slot in (*self._slots, *self._spare):
            slot.finish()


class _FakeSlot:
    def __init__(self, engine: FakeEngine, service_s: Callable[[int], float], schedule: Schedule) -> None:
        rows = engine.config.max_batch
        self._engine = engine
        self._service_s = service_s
        self._schedule = schedule
        self._inputs: dict[str, NDArray[Any]] = {
            spec.name: np.zeros((rows, *spec.shape), spec.dtype) for spec in engine.signature.inputs
        }
        self._sizes: Sizes = ()
        self._outputs: dict[str, NDArray[Any]] = {}
        self._running: list[tuple[int, Done]] = []
        # Held during `done`, so that `close` returns after it; acquired again by a `done` that starts the next batch.
        self._ending = threading.RLock()

    @property
    def inputs(self) -> Mapping[str, NDArray[Any]]:
        return self._inputs

    @property
    def outputs(self) -> Mapping[str, NDArray[Any]]:
        return self._outputs

    def resize(self, sizes: Sizes) -> None:
        rows, signature = self._engine.config.max_batch, self._engine.signature
        self._sizes = sizes
        shapes = {spec: (rows, *signature.shape(spec, sizes)) for spec in signature.inputs}
        self._inputs = {spec.name: np.zeros(shape, spec.dtype) for spec, shape in shapes.items()}

    def start(self, rows: int, done: Done) -> None:
        if not 0 < rows <= self._engine.config.max_batch:
            raise EngineError(f"cannot run a batch of {rows} samples", "it is out of range", "split it")
        if self._engine.closed:
            raise EngineError("cannot run a batch", "the engine is closed", "open it again")
        self._engine.batches.append(rows)
        batch = (rows, done)
        self._running.append(batch)
        self._engine.run(lambda: self._schedule(self._service_s(rows), lambda: self.finish(batch)))

    def finish(self, batch: tuple[int, Done] | None = None) -> None:
        """End the running batch once: when its time is over, or at `close`."""
        with self._ending:
            if not self._running or (batch is not None and batch is not self._running[0]):
                return
            rows, done = self._running.pop()
            first = next(iter(self._inputs.values()))[:rows]
            signature = self._engine.signature
            shapes = {spec: signature.shape(spec, self._sizes) for spec in signature.outputs}
            self._outputs = {
                spec.name: self._engine.answers(first, int(np.prod(shape))).astype(spec.dtype).reshape(rows, *shape)
                for spec, shape in shapes.items()
            }
            # As in any engine, an error in the caller's `done` is the caller's: its event loop may be closed by now.
            with contextlib.suppress(Exception):
                done(self._engine.take_failure())
        self._engine.ended()
