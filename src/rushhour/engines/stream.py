"""What the engines share: a stream with its buffers, the threads of its batches, precision checks and warm-up."""

from __future__ import annotations

import abc
import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from queue import SimpleQueue
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from rushhour.bundle import Bundle, Signature, Sizes, TensorSpec
from rushhour.engines.engine import Done, EngineConfig, Slot
from rushhour.errors import EngineError

T = TypeVar("T")

_MOST_SIZES = 64
INSTALL: Final = "install it with `pip install {}`, or choose another engine"


class _Views(dict[int, dict[str, NDArray[Any]]]):
    """Rows -> the answers of a batch of so many, as views of the buffers; made when they are first needed."""

    def __init__(self, answers: Mapping[str, NDArray[Any]]) -> None:
        super().__init__()
        self._answers = answers

    def __missing__(self, rows: int) -> dict[str, NDArray[Any]]:
        found = self[rows] = {name: array[:rows] for name, array in self._answers.items()}
        return found


class BySizes(dict[Sizes, T]):
    """What an engine prepared for some sizes of open dimensions, a bounded number of them.

    Args:
        make: prepares it.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, sizes: Sizes) -> T:
        if len(self) >= _MOST_SIZES:
            self.clear()
        found = self[sizes] = self._make()
        return found


class Line:
    """Batches of one or several streams, computed or awaited by threads that call `done`, first come first served.

    A thread calls it, not a callback of the engine: OpenVINO's bindings do not call back when a batch fails, and its
    thread could not compute while it waits for Python's lock.

    Args:
        names: of the threads.
        enter: called once on each, before its first batch.
    """

    def __init__(self, *names: str, enter: Callable[[], None] = lambda: None) -> None:
        self._enter = enter
        self._closed = False
        self._closing = threading.Lock()  # a batch is either queued before the end of the threads, or refused
        self._started: SimpleQueue[tuple[Stream, int, Done] | None] = SimpleQueue()
        # daemons, so that an engine that is not closed does not keep the program running
        self._threads = [threading.Thread(target=self._serve, name=name, daemon=True) for name in names]
        for thread in self._threads:
            thread.start()

    def put(self, stream: Stream, rows: int, done: Done) -> None:
        """Launch a batch, and queue it.

        Raises:
            EngineError: if the line is closed, or the batch cannot be launched.
        """
        with self._closing:
            if self._closed:
                raise EngineError("cannot run a batch", "the engine is closed", "open it again")
            try:
                stream._launch(rows)
            except Exception as error:
                raise _explain(error) from error
            self._started.put((stream, rows, done))

    def close(self) -> None:
        """Finish the batches, call their `done`, end the threads. May be called again."""
        with self._closing:
            if not self._closed:
                self._closed = True
                for _ in self._threads:
                    self._started.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _serve(self) -> None:
        """A thread: one batch after another, until the end."""
        self._enter()
        while (batch := self._started.get()) is not None:
            stream, rows, done = batch
            failure: EngineError | None = None
            try:
                stream._finish(rows)
                stream._rows = rows
            except Exception as error:
                failure = _explain(error)
            # an error of the caller's `done` must not end the thread
            with contextlib.suppress(Exception):
                done(failure)
            del batch, stream, done, failure  # a waiting thread keeps no request in memory


class Stream(abc.ABC):
    """A `Slot` with buffers of its own.

    Args:
        signature: of the model; decides the buffers.
        max_batch: samples in one batch, at most.
        line: of its batches; closed with it.
    """

    def __init__(self, signature: Signature, max_batch: int, line: Line) -> None:
        self._max_batch = max_batch
        self._signature = signature
        self._buffers = {
            spec.name: np.zeros((max_batch, *spec.shape), spec.dtype)
            for spec in (*signature.inputs, *signature.outputs)
        }
        self._sizes: Sizes = tuple(dimension.largest for dimension in signature.dimensions)
        self._inputs, self._answers = self._at(self._sizes)
        self._views = _Views(self._answers)
        self._rows = 0
        self._line = line

    @property
    def inputs(self) -> Mapping[str, NDArray[Any]]:
        """As `Slot.inputs`."""
        return self._inputs

    @property
    def outputs(self) -> Mapping[str, NDArray[Any]]:
        """As `Slot.outputs`."""
        return self._views[self._rows]

    def resize(self, sizes: Sizes) -> None:
        """As `Slot.resize`.

        Raises:
            EngineError: if a size is out of its bounds.
        """
        if sizes == self._sizes:
            return
        dimensions = self._signature.dimensions
        if len(sizes) != len(dimensions) or not all(
            each.smallest <= size <= each.largest for each, size in zip(dimensions, sizes, strict=True)
        ):
            bounds = ", ".join(f"{each.name} of {each.smallest} to {each.largest}" for each in dimensions)
            raise EngineError(
                f"cannot run samples of the sizes {sizes}",
                f"the model has {bounds}" if bounds else "the model has no open dimension",
                "use others",
            )
        self._inputs, self._answers = self._at(sizes)
        self._views = _Views(self._answers)
        self._sizes = sizes
        self._resized(sizes)

    def _at(self, sizes: Sizes) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """The buffers of inputs and answers for samples of these sizes: the first bytes of the largest ones."""
        inputs, answers = (
            {spec.name: self._buffer(spec, sizes) for spec in specs}
            for specs in (self._signature.inputs, self._signature.outputs)
        )
        return inputs, answers

    def _buffer(self, spec: TensorSpec, sizes: Sizes) -> NDArray[Any]:
        shape = (self._max_batch, *self._signature.shape(spec, sizes))
        view: NDArray[Any] = self._buffers[spec.name].reshape(-1)[: math.prod(shape)].reshape(shape)
        return view

    def start(self, rows: int, done: Done) -> None:
        """As `Slot.start`.

        Raises:
            EngineError: if the engine is closed, or `rows` is not in 1..max_batch. `done` is then not called.
        """
        if not 0 < rows <= self._max_batch:
            raise EngineError(
                f"cannot run a batch of {rows} samples",
                f"this engine was compiled for 1 to {self._max_batch}",
                "split the batch, or raise max_batch",
            )
        self._line.put(self, rows, done)

    def close(self) -> None:
        """Finish the batches of its line, call their `done`, end its threads. May be called again."""
        self._line.close()

    def _resized(self, sizes: Sizes) -> None:  # noqa: B027 - most models have no open dimensions
        """The buffers `_inputs` and `_answers` are others from now on; called by `resize`."""

    def _launch(self, rows: int) -> None:  # noqa: B027 - most engines compute on the thread
        """Start to compute the first `rows` samples; called by the line, and must return at once."""

    @abc.abstractmethod
    def _finish(self, rows: int) -> None:
        """Return when the answers to the first `rows` samples are in `_answers`; called on a thread of the line."""


def check_precision(bundle: Bundle, config: EngineConfig) -> None:
    """Raise unless `bundle` can be run in the precision that `config` asks for.

    Raises:
        EngineError: for int8 of a graph that is not quantised, or anything else of one that is.
    """
    held, asked = bundle.manifest.precision, config.precision
    if (held == "int8") != (asked == "int8"):
        raise EngineError(
            f"cannot run the bundle {bundle.manifest.name} in {asked}",
            "its graph is quantised to int8" if held == "int8" else f"its graph is {held}, not quantised",
            "use int8, or the bundle that it was made from"
            if held == "int8"
            else "quantise it first with `rushhour compress`, or use f32",
        )


def warm_up(bundle: Bundle, slots: Sequence[Slot], sizes: Iterable[int], seconds: float = math.inf) -> int:
    """Run the bundle's samples in batches of `sizes` on all slots at once; returns how many sizes were run.

    First runs are slow, so they must not be a client's. It also shows whether the graph runs at all.

    Args:
        seconds: no further size is started after these; the smallest and the largest are always run, because a graph
            with a fixed batch size inside fails there.

    Raises:
        EngineError: if a batch fails.
    """
    samples = bundle.samples()
    longest = bundle.manifest.signature.sizes_of(samples)
    for slot in slots:
        if longest:
            slot.resize(longest)
        for name, buffer in slot.inputs.items():
            buffer[:] = np.resize(samples[name], buffer.shape)
    ordered = sorted(sizes)
    end = time.monotonic() + seconds
    for warm, rows in enumerate(dict.fromkeys((ordered[0], ordered[-1], *ordered))):
        if warm >= 2 and time.monotonic() > end:
            return warm
        finished: SimpleQueue[BaseException | None] = SimpleQueue()
        for slot in slots:
            slot.start(rows, finished.put)
        for error in [finished.get() for _ in slots]:
            if error is not None:
                raise error
    return len(ordered)


def _explain(error: Exception) -> EngineError:
    if isinstance(error, EngineError):
        return error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    explained = EngineError("the engine failed on a batch", f"{type(error).__name__}: {' '.join(lines)}")
    explained.__cause__ = error
    return explained
