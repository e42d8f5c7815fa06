"""Service times: how long an engine takes for a batch while all its streams are busy, without a server; in seconds."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue

import msgspec
import numpy as np

from rushhour.bundle import Bundle, Sizes, cut
from rushhour.engines.engine import Done, Engine, Slot
from rushhour.errors import EngineError
from rushhour.measurement import BatchCost, PositionCost, ServiceTimes

_AT_LEAST = 3
_COMPARED_ROWS = 4
"""Samples of a batch, at most, in which samples of different sizes are compared."""
_FACTORS = (0.5, 2.0)
"""Sizes that are compared with the usual ones."""
_RUN_S = 3.0
_POINTS = 16
"""Quantiles of the durations of a size's batches. A batch that a pause of the host delayed for long is one of the worst
16th, wherever it is."""
_COST_BATCHES, _COST_S = 8, 0.05
"""So many batches are measured for the CPU time of a size, fewer where they take longer than that."""
_AFTERMATH_S = 2e-3
"""After a batch: OpenVINO's threads spin for 1 ms before they sleep (oneTBB 2021.13, which has no setting for it)."""


def time_service(engine: Engine, bundle: Bundle, limit_s: float, seconds_per_size: float = 0.1) -> ServiceTimes:
    """Time batches of 1, 2, 3, 4, 6, 8, 12 ... on all streams at once, up to the engine's batch bound.

    Of a model with open dimensions, samples of the usual sizes; and how the time grows with their positions.

    Args:
        engine: compiled.
        bundle: for its samples.
        limit_s: once a batch takes longer than this, no larger one is timed.
        seconds_per_size: how long each size is run, at least three batches on each stream.

    Raises:
        EngineError: if a batch fails.
    """
    fill(engine, bundle)
    sizes: list[int] = []
    seconds: list[float] = []
    throughput: list[float] = []
    quantiles: list[tuple[float, ...]] = []
    for size in _sizes(engine.config.max_batch):
        keep_busy(engine.slots, size, 0.0)
        times, wall = keep_busy(engine.slots, size, seconds_per_size)
        sizes.append(size)
        seconds.append(statistics.median(times))
        throughput.append(len(times) * size / wall)
        quantiles.append(relative_quantiles(times))
        if seconds[-1] > limit_s:
            break
    found = ServiceTimes(tuple(sizes), tuple(seconds), tuple(throughput), tuple(quantiles))
    if not engine.signature.dimensions:
        return found
    cost = _position_cost(engine, bundle, found, limit_s, seconds_per_size)
    return msgspec.structs.replace(found, positions=cost)


def relative_quantiles(seconds: Sequence[float]) -> tuple[float, ...]:
    """Of these durations, as factors of their median, at 16 equally likely points; empty for fewer than 16."""
    if len(seconds) < _POINTS:
        return ()
    points = (np.arange(_POINTS) + 0.5) / _POINTS
    return tuple(round(float(value), 4) for value in np.quantile(seconds, points) / statistics.median(seconds))


def batch_cost(engine: Engine, bundle: Bundle, largest: int) -> BatchCost:
    """Measure the CPU time of single batches, of one sample and of `largest`, with a pause after each.

    It is that of this process: other work in it at the same time is included.

    Args:
        engine: compiled.
        bundle: for its samples.
        largest: at most the engine's `max_batch`.

    Raises:
        EngineError: if a batch fails.
    """
    fill(engine, bundle)
    slot, measuring_s = engine.slots[0], _cpu_s(_nothing, 1)
    one_s = _cpu_s(slot.start, 1) - measuring_s
    largest_s = _cpu_s(slot.start, largest) - measuring_s
    sample_s = max(0.0, (largest_s - one_s) / (largest - 1)) if largest > 1 else 0.0
    return BatchCost(max(0.0, one_s - sample_s), sample_s)


def _cpu_s(start: Callable[[int, Done], None], rows: int) -> float:
    """The median CPU seconds of a batch of `rows`."""
    spent: list[float] = []
    end = time.perf_counter() + _COST_S
    while not spent or (len(spent) < _COST_BATCHES and time.perf_counter() < end):
        finished: SimpleQueue[BaseException | None] = SimpleQueue()
        began = time.process_time()
        start(rows, finished.put)
        error = finished.get()
        time.sleep(_AFTERMATH_S)
        spent.append(time.process_time() - began)
        if error is not None:
            raise EngineError(f"a batch of {rows} failed", str(error)) from error
    return statistics.median(spent)


def _nothing(rows: int, done: Done) -> None:
    """A batch without work, to measure the cost of measuring."""
    done(None)


def _sizes(largest: int) -> list[int]:
    """The powers of two and those half as large again, and `largest` itself.

    Doubling a batch may cost more tail latency than it gains, and times between powers of two are not linear.
    """
    powers = [2**power for power in range(largest.bit_length())]
    return sorted({size for power in powers for size in (power, power + power // 2) if size < largest} | {largest})


def fill(engine: Engine, bundle: Bundle, sizes: Sizes | None = None) -> None:
    """Fill the input buffers of all slots with the bundle's samples, repeated.

    Args:
        engine: compiled.
        bundle: for its samples.
        sizes: of the open dimensions; by default the usual ones.

    Raises:
        EngineError: if the sizes are out of bounds.
    """
    samples, signature = bundle.samples(), bundle.manifest.signature
    if signature.dimensions:
        sizes = sizes or usual_sizes(bundle)
        samples = cut(signature, samples, sizes)
    for slot in engine.slots:
        if sizes:
            slot.resize(sizes)
        for name, buffer in slot.inputs.items():
            buffer[:] = np.resize(samples[name], buffer.shape)


def run_sizes(engine: Engine, bundle: Bundle, batches: Mapping[Sizes, int], seconds: float = _RUN_S) -> int:
    """Run samples of several sizes on all streams, one alone and in a batch: first runs of a shape are slow, so they
    must not be a client's. Returns how many sizes were run.

    Args:
        engine: compiled, of a model with open dimensions.
        bundle: for its samples.
        batches: sizes -> samples of the batch, in order.
        seconds: no further size is begun after these.

    Raises:
        EngineError: if a batch fails.
    """
    end, count = time.perf_counter() + seconds, 0
    for sizes, most in batches.items():
        if time.perf_counter() > end:
            break
        fill(engine, bundle, sizes)
        for rows in sorted({1, most}):
            finished: SimpleQueue[BaseException | None] = SimpleQueue()
            for slot in engine.slots:
                slot.start(rows, finished.put)
            errors = [finished.get() for _ in engine.slots]
            for error in errors:
                if error is not None:
                    raise EngineError(f"a batch of {rows} failed", str(error)) from error
        count += 1
    fill(engine, bundle)
    return count


def usual_sizes(bundle: Bundle) -> Sizes:
    """The sizes of the median of a bundle's samples by their positions; empty without open dimensions."""
    sizes = sorted(bundle.sizes(), key=math.prod)
    return sizes[len(sizes) // 2]


def _position_cost(engine: Engine, bundle: Bundle, times: ServiceTimes, limit_s: float, seconds: float) -> PositionCost:
    """How the time of a sample grows with its positions: from batches of smaller and of larger ones.

    Args:
        engine: compiled.
        bundle: for its samples.
        times: of batches of the usual sizes.
        limit_s: larger samples are not timed where they are expected to take longer.
        seconds: that each size is run.
    """
    usual = usual_sizes(bundle)
    rows = max((size for size in times.batch_sizes if size <= _COMPARED_ROWS), default=1)
    usual_s = times.seconds[times.batch_sizes.index(rows)]
    points = [(math.prod(usual), usual_s)]
    for factor in _FACTORS:
        sizes = tuple(
            min(each.largest, max(each.smallest, round(size * factor)))
            for each, size in zip(bundle.manifest.signature.dimensions, usual, strict=True)
        )
        positions = math.prod(sizes)
        if positions in [known for known, _ in points] or usual_s * positions / math.prod(usual) > limit_s:
            continue
        fill(engine, bundle, sizes)
        keep_busy(engine.slots, rows, 0.0)
        points.append((positions, statistics.median(keep_busy(engine.slots, rows, seconds)[0])))
    fill(engine, bundle)
    sample_s = _slope(list(zip(times.batch_sizes, times.seconds, strict=True)))
    grown_s = _slope(points) * math.prod(usual) / rows
    share = 1.0 if sample_s <= 0 or len(points) == 1 else min(1.0, max(0.0, grown_s / sample_s))
    return PositionCost(usual=math.prod(usual), share=share)


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the least-squares line; 0 for a single point."""
    x, y = np.array(points, dtype=np.float64).T
    spread = float(((x - x.mean()) ** 2).sum())
    return float(((x - x.mean()) * (y - y.mean())).sum()) / spread if spread else 0.0


def keep_busy(slots: Sequence[Slot], rows: int, seconds: float) -> tuple[list[float], float]:
    """Run the batches in the buffers on all `slots` at once, again and again, at least three times on each.

    Args:
        slots: of one engine, with their buffers filled.
        rows: of each batch.
        seconds: how long; no batch is started after that.

    Returns:
        The seconds of every batch, and of the whole.

    Raises:
        EngineError: if a batch fails.
    """
    begin = time.perf_counter()
    loops = [_Loop(slot, rows, begin + seconds) for slot in slots]
    for loop in loops:
        loop.start()
    for loop in loops:
        loop.over.wait()
        if loop.error is not None:
            raise EngineError(f"a batch of {rows} failed", str(loop.error)) from loop.error
    return [time for loop in loops for time in loop.times], time.perf_counter() - begin


class _Loop:
    """One slot, restarted from its own callback until the time is over."""

    def __init__(self, slot: Slot, rows: int, until: float) -> None:
        self.times: list[float] = []
        self.error: BaseException | None = None
        self.over = threading.Event()
        self._slot = slot
        self._rows = rows
        self._until = until
        self._started = 0.0
        self._starting: int | None = None
        self._again = False

    def start(self) -> None:
        """Start a batch, and another for each that ends within `start`: a loop instead of recursion."""
        self._again = True
        while self._again:
            self._again = False
            self._starting = threading.get_ident()
            self._started = time.perf_counter()
            self._slot.start(self._rows, self._done)
            if self._starting == threading.get_ident():
                self._starting = None

    def _done(self, error: BaseException | None) -> None:
        now = time.perf_counter()
        self.times.append(now - self._started)
        self.error = error
        if error is not None or (now >= self._until and len(self.times) >= _AT_LEAST):
            self.over.set()
            return
        if self._starting == threading.get_ident():
            self._again = True
            return
        try:
            self.start()
        except EngineError as failure:
            self.error = failure
            self.over.set()
