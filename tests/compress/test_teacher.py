"""The teacher's answers: computed once, on a compiled engine, and the same as those of the torch module."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_recipe import ARTICLE, bundle_at, pictures

from rushhour.bundle import Bundle, Source
from rushhour.compress import Distil, Recipe, Store, apply
from rushhour.compress.teacher import kept_answers, sample_order
from rushhour.errors import EngineError
from rushhour.models import load_deployed
from rushhour.progress import Silent

STUDENT = Source("rushhour.models:mlp", {"inputs": 144, "outputs": 4})


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle_at(tmp_path_factory.mktemp("teacher") / "parent", ARTICLE, pictures())


def alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """The same chances, up to the rounding of an engine that divides a sum among its threads as they are free."""
    return bool(torch.allclose(one.softmax(1), other.softmax(1), atol=1e-4))


class Heard(Silent):
    """Remembers what was begun."""

    def __init__(self) -> None:
        self.begun: list[str] = []

    def start(self, what: str, total: float | None = None) -> None:
        self.begun.append(what)

    @property
    def answered(self) -> int:
        """How often a teacher has answered."""
        return sum(what.startswith("answers of the teacher") for what in self.begun)


def test_answers_are_those_of_the_torch_module_and_are_computed_once(parent: Bundle, tmp_path: Path) -> None:
    data, heard = pictures(), Heard()
    answers = kept_answers(parent, data, len(data.train), folder=tmp_path, progress=heard)
    assert answers is not None
    with torch.inference_mode():
        own = load_deployed(parent)(torch.from_numpy(data.train.inputs))
    # the engine computes in bf16 where the processor has it
    assert float((answers.softmax(1) - own).abs().max()) < 0.05
    again = kept_answers(parent, data, len(data.train), folder=tmp_path, progress=heard)
    assert again is not None
    assert torch.equal(answers, again)
    assert heard.answered == 1
    unlabelled = kept_answers(parent, pictures(labelled=False), 10, folder=tmp_path, progress=heard)
    assert unlabelled is not None
    assert heard.answered == 2, "of other data they are others"


def test_a_part_is_answered_first_and_the_rest_later(parent: Bundle, tmp_path: Path) -> None:
    data, heard = pictures(), Heard()
    part = kept_answers(parent, data, 100, folder=tmp_path, progress=heard)
    whole = kept_answers(parent, data, 320, folder=tmp_path, progress=heard)
    assert part is not None
    assert whole is not None
    known = ~part.isnan().any(1).numpy()
    assert known.sum() == 128, "whole batches"
    assert set(np.flatnonzero(known)) == set(sample_order(320)[:128])
    assert torch.equal(part[torch.from_numpy(known)], whole[torch.from_numpy(known)])
    assert not whole.isnan().any()
    fresh = kept_answers(parent, data, 320, folder=None, progress=Silent())
    assert fresh is not None
    assert alike(fresh, whole), "however many are answered at once"


@pytest.mark.parametrize("content", [b"", b"no array", b"\x93NUMPY\x01\x00v\x00{'descr'", None])
def test_a_damaged_file_is_replaced(parent: Bundle, tmp_path: Path, content: bytes | None) -> None:
    data = pictures()
    before = kept_answers(parent, data, 320, folder=tmp_path, progress=Silent())
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    if content is None:
        np.save(file, np.full((128, 4), np.nan, np.float32))
    else:
        file.write_bytes(content)
    heard = Heard()
    after = kept_answers(parent, data, 320, folder=tmp_path, progress=heard)
    assert before is not None
    assert after is not None
    assert alike(before, after)
    assert heard.answered == 1
    assert len(file.read_bytes()) == len(whole)
    again = kept_answers(parent, data, 320, folder=tmp_path, progress=heard)
    assert again is not None
    assert torch.equal(after, again)
    assert heard.answered == 1


def test_an_array_of_objects_is_not_unpickled(parent: Bundle, tmp_path: Path) -> None:
    kept_answers(parent, pictures(), 320, folder=tmp_path, progress=Silent())
    (file,) = tmp_path.iterdir()
    np.save(file, np.array([Exploding()], dtype=object), allow_pickle=True)
    assert kept_answers(parent, pictures(), 320, folder=tmp_path, progress=Silent()) is not None


class Exploding:
    """Fails the test where it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return pytest.fail, ("it was unpickled",)


@pytest.mark.slow
def test_all_rungs_and_students_learn_from_the_same_answers(parent: Bundle, tmp_path: Path) -> None:
    data, heard, store = pictures(), Heard(), Store(tmp_path)
    rungs = Recipe((Distil(1, batch=32, share=0.5), Distil(1, batch=32)))
    list(apply(rungs, parent, data, store, progress=heard))
    assert heard.answered == 2, "half of the samples, then all"
    list(apply(Recipe((Distil(1, student=STUDENT, batch=32),)), parent, data, store, progress=heard))
    assert heard.answered == 2
    assert len(list((tmp_path / ".answers").iterdir())) == 1


def test_where_no_engine_runs_the_graph_the_torch_module_teaches(
    parent: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise EngineError("no", "such operator", "none")

    monkeypatch.setattr(sys.modules["rushhour.compress.teacher"], "open_engine", refuse)
    data = pictures()
    assert kept_answers(parent, data, 320, folder=tmp_path / "answers", progress=Silent()) is None
    step = Distil(6, student=STUDENT, batch=32, lr=2e-3)
    (made,) = apply(Recipe((step,)), parent, data, Store(tmp_path), progress=Silent())
    samples = torch.from_numpy(data.test.inputs)
    with torch.inference_mode():
        agree = load_deployed(made)(samples).argmax(1) == load_deployed(parent)(samples).argmax(1)
    assert float(agree.float().mean()) > 0.8
