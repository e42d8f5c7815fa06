"""Engines on samples of different sizes: every engine gives the answers of whole samples, whatever the padding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import msgspec
import numpy as np
import pytest

from rushhour.bundle import Bundle, OpenDimension
from rushhour.engines import Engine, EngineConfig, Runner, open_engine, run_sizes, time_service, usual_sizes
from rushhour.errors import EngineError
from rushhour.plan import EngineName
from rushhour.system.machine import cores
from rushhour.testing.bundles import tiny_text_answers, tiny_text_bundle

STREAMS = min(2, cores())


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_text_bundle(tmp_path_factory.mktemp("text") / "text")


@pytest.fixture(params=["openvino", "onnxruntime"])
def engine(request: pytest.FixtureRequest, text: Bundle) -> Iterator[Engine]:
    name: EngineName = request.param
    opened = open_engine(text, EngineConfig(name, streams=STREAMS, max_batch=5))
    yield opened
    opened.close()


def words(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, rows, length]).integers(1, 50, (rows, length))


def test_answers_are_those_of_whole_samples_at_every_length_and_batch(engine: Engine) -> None:
    runner = Runner(engine)
    for rows, length in ((1, 1), (5, 32), (3, 7), (1, 32), (5, 1), (12, 9), (2, 31)):
        tokens = words(rows, length)
        found = runner.infer({"tokens": tokens, "mask": np.ones_like(tokens)})
        wanted = tiny_text_answers(tokens)
        assert found["scores"].shape == (rows, 3)
        assert found["tags"].shape == (rows, length)
        for name, array in wanted.items():
            np.testing.assert_allclose(found[name], array, atol=1e-4)


def test_padding_does_not_change_answers(engine: Engine) -> None:
    runner = Runner(engine)
    for length in (1, 4, 11):
        tokens = words(5, length)
        padded, mask = np.zeros((5, 24), np.int64), np.zeros((5, 24), np.int64)
        padded[:, :length], mask[:, :length] = tokens, 1
        found = runner.infer({"tokens": padded, "mask": mask})
        wanted = tiny_text_answers(tokens)
        np.testing.assert_allclose(found["scores"], wanted["scores"], atol=1e-4)
        np.testing.assert_allclose(found["tags"][:, :length], wanted["tags"], atol=1e-4)


def test_buffers_are_views_of_the_same_memory_at_every_size(engine: Engine) -> None:
    slot = engine.slots[0]
    slot.resize((32,))
    whole = slot.inputs["tokens"]
    assert whole.shape == (5, 32)
    slot.resize((7,))
    part = slot.inputs["tokens"]
    assert part.shape == (5, 7)
    assert part.flags.c_contiguous
    assert np.shares_memory(whole, part)
    assert part.ctypes.data == whole.ctypes.data


def test_sizes_out_of_bounds_are_refused_and_the_slot_goes_on(engine: Engine) -> None:
    slot = engine.slots[0]
    for sizes in ((0,), (33,), (10**9,), (-1,), (), (4, 4)):
        with pytest.raises(EngineError, match="length of 1 to 32"):
            slot.resize(sizes)
    finished: SimpleQueue[BaseException | None] = SimpleQueue()
    slot.resize((4,))
    slot.inputs["tokens"][:], slot.inputs["mask"][:] = 3, 1
    slot.start(2, finished.put)
    assert finished.get(timeout=30) is None
    assert slot.outputs["tags"].shape == (2, 4)


def test_many_sizes_do_not_fill_the_memory(engine: Engine) -> None:
    runner = Runner(engine)
    for length in [*range(1, 33), *range(1, 33), *range(32, 0, -1)]:
        tokens = words(2, length, seed=length)
        found = runner.infer({"tokens": tokens, "mask": np.ones_like(tokens)})
        np.testing.assert_allclose(found["scores"], tiny_text_answers(tokens)["scores"], atol=1e-4)


def test_every_bucket_is_run_before_the_first_request(engine: Engine, text: Bundle) -> None:
    assert run_sizes(engine, text, {(4,): 5, (32,): 1, (9,): 2}) == 3
    assert run_sizes(engine, text, {(4,): 5, (32,): 1}, seconds=-1.0) == 0
    assert engine.slots[0].inputs["tokens"].shape == (5, *usual_sizes(text))


def test_service_times_say_how_much_longer_samples_take(engine: Engine, text: Bundle) -> None:
    times = time_service(engine, text, 1.0, seconds_per_size=0.005)
    assert times.batch_sizes == (1, 2, 3, 4, 5)
    assert not isinstance(times.positions, msgspec.UnsetType)
    assert times.positions.usual == usual_sizes(text)[0]
    assert 0 <= times.positions.share <= 1
    assert times.positions.work(usual_sizes(text)) == pytest.approx(1)
    assert msgspec.json.decode(msgspec.json.encode(times), type=type(times)) == times


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_a_bundle_whose_padding_changes_its_answers_is_refused(name: EngineName, text: Bundle, tmp_path: Path) -> None:
    axes = {"tokens": 0, "mask": 0, "tags": 0}
    wrong = OpenDimension("length", 32, axes, padding={"tokens": 1, "mask": 1})  # as if the mask counted padding
    signature = msgspec.structs.replace(text.manifest.signature, open=(wrong,))
    tokens = np.full((4, 20), 1)
    for row in range(4):
        tokens[row, : 5 + row] = 7 + row
    bundle = Bundle.create(
        tmp_path / "wrong",
        msgspec.structs.replace(text.manifest, signature=signature, files={}, hash=""),
        lambda file: file.write_bytes(text.model.read_bytes()) and None,
        samples={"tokens": tokens, "mask": np.ones_like(tokens)},
    )
    with pytest.raises(EngineError, match="change with padding: padded from length 5 to 20") as refused:
        open_engine(bundle, EngineConfig(name, max_batch=2))
    assert "\n" not in str(refused.value)
