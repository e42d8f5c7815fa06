"""The contract of an engine, as tests. Subclass `EngineConformance`, give one fixture, inherit the suite.

class TestMine(EngineConformance):
    config = EngineConfig(engine="openvino", precision="bf16", streams=2, max_batch=5)

    @pytest.fixture
    def open_engine(self, bundle):
        with closing_all() as opened: ...
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, ClassVar, Final

import numpy as np
import pytest
from numpy.typing import NDArray

from rushhour.bundle import Bundle
from rushhour.engines.engine import Engine, EngineConfig, Runner
from rushhour.errors import EngineError
from rushhour.plan import Precision
from rushhour.system.machine import cores
from rushhour.testing.bundles import tiny_answers, tiny_bundle

TOLERANCE: Final[dict[Precision, float]] = {"f32": 1e-4, "bf16": 2e-2, "int8": 5e-2}
"""Tolerated deviation of an answer, as a share of the range of all answers."""

_WAIT_S = 30.0


class EngineConformance:
    """What every engine must do. Override `bundle` and `reference` to run it on another model than the tiny one.

    Attributes:
        config: in all tests; two streams where the machine has two cores, and a max_batch that is no power of two.
    """

    config: ClassVar[EngineConfig] = EngineConfig(engine="openvino", streams=min(2, cores()), max_batch=5)

    @pytest.fixture
    def bundle(self, tmp_path: Path) -> Bundle:
        """The model: one input and one output."""
        return tiny_bundle(tmp_path / "tiny", precision="int8" if self.config.precision == "int8" else "f32")

    @pytest.fixture
    def reference(self) -> Callable[[NDArray[Any]], NDArray[Any]]:
        """Right answers `(n, *shape)` to samples `(n, *shape)`."""
        return tiny_answers

    @pytest.fixture
    def open_engine(self, bundle: Bundle) -> Callable[[EngineConfig], Engine]:
        """The fixture to override: opens the engine under test on `bundle`."""
        raise NotImplementedError("override the fixture open_engine")

    @pytest.fixture
    def engine(self, open_engine: Callable[[EngineConfig], Engine]) -> Iterator[Engine]:
        """An engine of `config`, closed at the end."""
        engine = open_engine(self.config)
        yield engine
        engine.close()

    def test_buffers_are_as_the_signature_says(self, engine: Engine) -> None:
        """Shapes, dtypes, contiguous; one slot for each stream."""
        assert len(engine.slots) == self.config.streams
        for slot in engine.slots:
            for spec in engine.signature.inputs:
                buffer = slot.inputs[spec.name]
                assert buffer.shape == (self.config.max_batch, *spec.shape)
                assert buffer.dtype == np.dtype(spec.dtype)
                assert buffer.flags.c_contiguous
                assert buffer.flags.writeable

    def test_answers_are_the_references_at_every_batch_size(
        self, engine: Engine, reference: Callable[[NDArray[Any]], NDArray[Any]]
    ) -> None:
        """On every slot, in an order that makes batches grow and shrink."""
        for slot in engine.slots:
            for rows in (1, self.config.max_batch, min(3, self.config.max_batch), 1):
                samples = self.samples(engine, rows, seed=rows)
                slot.inputs[engine.signature.inputs[0].name][:rows] = samples
                finished: SimpleQueue[BaseException | None] = SimpleQueue()
                slot.start(rows, finished.put)
                assert finished.get(timeout=_WAIT_S) is None
                spec = engine.signature.outputs[0]
                answer = slot.outputs[spec.name]
                assert answer.shape == (rows, *spec.shape)
                assert answer.dtype == np.dtype(spec.dtype)
                assert answer.flags.c_contiguous
                self.assert_close(answer, reference(samples))

    def test_a_row_does_not_depend_on_its_batch(self, engine: Engine) -> None:
        """Nor on its place in it: an answer must not depend on the other requests in the batch."""
        samples = self.samples(engine, self.config.max_batch, seed=1)
        in_one = self.infer(engine, samples)
        alone = np.concatenate([self.infer(engine, samples[row : row + 1]) for row in range(len(samples))])
        backwards = self.infer(engine, samples[::-1])[::-1]
        self.assert_close(in_one, alone)
        self.assert_close(in_one, backwards)

    def test_concurrent_callers_get_their_own_answers(
        self, engine: Engine, reference: Callable[[NDArray[Any]], NDArray[Any]]
    ) -> None:
        """Many threads, batches of many sizes, no two samples alike."""
        runner, name = Runner(engine), engine.signature.inputs[0].name

        def call(seed: int) -> None:
            samples = self.samples(engine, 1 + seed % self.config.max_batch, seed)
            answer = runner.submit({name: samples}).result(_WAIT_S)[engine.signature.outputs[0].name]
            self.assert_close(answer, reference(samples))

        with ThreadPoolExecutor(8) as pool:
            assert len(list(pool.map(call, range(200)))) == 200

    def test_a_batch_touches_no_other_buffers(self, engine: Engine) -> None:
        """Neither its own inputs, nor anything of another slot."""
        name = engine.signature.inputs[0].name
        filled = [self.samples(engine, self.config.max_batch, seed) for seed in range(len(engine.slots))]
        for slot, samples in zip(engine.slots, filled, strict=True):
            slot.inputs[name][:] = samples
        finished: SimpleQueue[BaseException | None] = SimpleQueue()
        engine.slots[0].start(self.config.max_batch, finished.put)
        assert finished.get(timeout=_WAIT_S) is None
        answer = engine.slots[0].outputs[engine.signature.outputs[0].name].copy()
        for slot in engine.slots[1:]:
            slot.start(1, finished.put)
            assert finished.get(timeout=_WAIT_S) is None
        np.testing.assert_array_equal(engine.slots[0].outputs[engine.signature.outputs[0].name], answer)
        for slot, samples in zip(engine.slots, filled, strict=True):
            np.testing.assert_array_equal(slot.inputs[name], samples)

    def test_rows_out_of_range_are_refused(self, engine: Engine) -> None:
        """With an error, without `done`, and without harm to the next batch."""
        called: SimpleQueue[BaseException | None] = SimpleQueue()
        for rows in (0, -1, self.config.max_batch + 1):
            with pytest.raises(EngineError):
                engine.slots[0].start(rows, called.put)
        assert called.empty()
        engine.slots[0].start(1, called.put)
        assert called.get(timeout=_WAIT_S) is None

    def test_an_error_in_done_does_not_stop_the_slot(self, engine: Engine) -> None:
        """The next batch runs."""
        reached = threading.Event()

        def broken(error: BaseException | None) -> None:
            reached.set()
            raise RuntimeError("the caller's own fault")

        slot = engine.slots[0]
        with contextlib.suppress(RuntimeError):  # an engine that answers on the caller's thread hands it to the caller
            slot.start(1, broken)
        assert reached.wait(_WAIT_S)
        finished: SimpleQueue[BaseException | None] = SimpleQueue()
        slot.start(1, finished.put)
        assert finished.get(timeout=_WAIT_S) is None

    def test_closing_while_busy_answers_every_batch_once(self, open_engine: Callable[[EngineConfig], Engine]) -> None:
        """`done` has been called when `close` returns."""
        for _ in range(10):
            engine = open_engine(self.config)
            calls: list[BaseException | None] = []
            for slot in engine.slots:
                slot.start(self.config.max_batch, calls.append)
            engine.close()
            assert len(calls) == len(engine.slots)

    def test_what_waits_in_the_engine_is_answered(
        self, open_engine: Callable[[EngineConfig], Engine], reference: Callable[[NDArray[Any]], NDArray[Any]]
    ) -> None:
        """More batches than streams, where the engine has spare slots: each has its own answers, also after `close`."""
        for closes in (False, True):
            engine = open_engine(self.config)
            slots = [*engine.slots, *engine.spare()]
            assert list(engine.spare()) == slots[len(engine.slots) :]
            filled = [self.samples(engine, self.config.max_batch, seed) for seed in range(len(slots))]
            finished: SimpleQueue[BaseException | None] = SimpleQueue()
            for slot, samples in zip(slots, filled, strict=True):
                slot.inputs[engine.signature.inputs[0].name][:] = samples
            for slot in slots:
                slot.start(self.config.max_batch, finished.put)
            if closes:
                engine.close()
                assert finished.qsize() == len(slots)
            assert [finished.get(timeout=_WAIT_S) for _ in slots] == [None] * len(slots)
            if not closes:
                for slot, samples in zip(slots, filled, strict=True):
                    self.assert_close(slot.outputs[engine.signature.outputs[0].name], reference(samples))
                engine.close()
            for slot in slots:
                with pytest.raises(EngineError):
                    slot.start(1, finished.put)

    def test_a_closed_engine_refuses(self, open_engine: Callable[[EngineConfig], Engine]) -> None:
        """And may be closed again."""
        engine = open_engine(self.config)
        slots = list(engine.slots)
        engine.close()
        engine.close()
        called: list[BaseException | None] = []
        for slot in slots:
            with pytest.raises(EngineError):
                slot.start(1, called.append)
        assert not called

    def test_closing_under_traffic_loses_nothing(self, open_engine: Callable[[EngineConfig], Engine]) -> None:
        """Every start is answered or refused, whichever moment `close` comes at."""
        engine = open_engine(self.config)
        started = answered = 0
        running = threading.Event()

        def drive() -> None:
            nonlocal started, answered
            finished: SimpleQueue[BaseException | None] = SimpleQueue()
            while True:
                try:
                    engine.slots[0].start(1, finished.put)
                except EngineError:
                    return
                started += 1
                finished.get(timeout=_WAIT_S)
                answered += 1
                running.set()

        with ThreadPoolExecutor(1) as pool:
            driver = pool.submit(drive)
            assert running.wait(_WAIT_S)
            engine.close()
            driver.result(_WAIT_S)
        assert started == answered > 0

    def test_effective_says_what_was_asked(self, engine: Engine) -> None:
        """Readable text, and the very values of the config."""
        assert engine.config == self.config
        assert all(isinstance(key, str) and isinstance(value, str) for key, value in engine.effective.items())
        for key in ("precision", "streams", "threads", "max_batch"):
            assert engine.effective[key] == str(getattr(self.config, key))

    def samples(self, engine: Engine, n: int, seed: int) -> NDArray[Any]:
        """`n` samples for the engine's first input, no two alike; shape `(n, *shape)`."""
        spec = engine.signature.inputs[0]
        random = np.random.default_rng(seed)
        scale = 255 if np.issubdtype(np.dtype(spec.dtype), np.integer) else 1
        return (random.random((n, *spec.shape)) * scale).astype(spec.dtype)

    def infer(self, engine: Engine, samples: NDArray[Any]) -> NDArray[Any]:
        """Answers of the engine's first output."""
        return Runner(engine).infer({engine.signature.inputs[0].name: samples})[engine.signature.outputs[0].name]

    def assert_close(self, answer: NDArray[Any], wanted: NDArray[Any]) -> None:
        """Raise unless `answer` is `wanted` within the tolerance of the precision."""
        allowed = TOLERANCE[self.config.precision] * max(1.0, float(np.abs(wanted).max()))
        np.testing.assert_allclose(answer, wanted, atol=allowed, rtol=0)
