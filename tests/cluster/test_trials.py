"""Trials on a Ray cluster of two nodes on this machine: what they make, and what the loss of one costs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from test_recipe import ARTICLE, _bench, bundle_at, pictures
from test_train import Notes

import rushhour
from rushhour.bundle import Bundle
from rushhour.cluster.trials import RayBuilder, trial_builder
from rushhour.cluster.trials.building import _differs
from rushhour.cluster.trials.packing import Arrays, pack, unpack
from rushhour.compress import Maker, Recipe, Store, Work, compress, first_missing
from rushhour.data import Dataset, Split
from rushhour.errors import BundleError, DataError, GoalError
from rushhour.goal import AccuracyBudget
from rushhour.progress import Progress, Silent
from rushhour.records.compression import Compression
from rushhour.testing.bundles import tiny_bundle
from rushhour.testing.ray_nodes import ray_nodes

RECIPES = [Recipe.parse(text) for text in ("f16", "prune:0.25:epochs=0,distil:3", "prune:0.5:epochs=0,distil:3")]
SPEEDS = {"f16": 1.5, "pruned-distil": 3.0}

ray = pytest.importorskip("ray")

# Without Ray.


def test_a_packed_bundle_arrives_whole_or_not_at_all(tmp_path: Path) -> None:
    packed = pack(tiny_bundle(tmp_path / "tiny"))
    arrived = unpack(packed, tmp_path / "arrived")
    assert pack(arrived).sha256 == packed.sha256
    damaged = dict(packed.files) | {"model.onnx": packed.files["model.onnx"] + b"x"}
    with pytest.raises(BundleError, match="SHA-256 is another"):
        unpack(msgspec.structs.replace(packed, files=damaged), tmp_path / "damaged")
    with pytest.raises(BundleError, match="a bundle has no such file"):
        unpack(msgspec.structs.replace(packed, files={"../x": b""}), tmp_path / "damaged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["arrived", "tiny"]


def test_arrays_that_are_sent_are_the_same_data(tmp_path: Path) -> None:
    dataset = pictures()
    again = Arrays.of(dataset).written(tmp_path)
    assert again.content_key == dataset.content_key
    assert np.array_equal(again.train.inputs, dataset.train.inputs)
    assert again.train.inputs.flags.writeable


def test_a_node_that_would_make_other_bundles_says_why() -> None:
    here = Maker({"torch": "2.13.0"}, ("avx2",))
    assert _differs(here, here) == ""
    assert "torch 2.12.0, and this machine 2.13.0" in _differs(Maker({"torch": "2.12.0"}, ("avx2",)), here)
    assert "another class of machines" in _differs(Maker(here.versions, ("avx2", "avx512f")), here)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("nowhere", "it is HOST:PORT"),
        ("ray://h:1", "it is HOST:PORT"),
        ("127.0.0.1:1", "no Ray answers at 127.0.0.1:1"),
    ],
)
def test_an_address_without_a_ray_is_one_line(address: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(GoalError, match=says), trial_builder(address, pictures(), Silent()):
        pass


# With Ray.


class Watching(Notes):
    """Calls something when the first recipe has been built.

    Args:
        then: what; it gets the note, which names the node.
    """

    def __init__(self, then: Callable[[str], object]) -> None:
        super().__init__()
        self._then: Callable[[str], object] | None = then
        self._is_building = False
        self.lines: list[str] = []
        self.waves: list[float | None] = []

    def start(self, what: str, total: float | None = None) -> None:
        self._is_building = what.startswith("build ")
        if self._is_building:
            self.waves.append(total)

    def advance(self, by: float = 1.0, note: str = "") -> None:
        if self._is_building:
            self.lines.append(note)
            then, self._then = self._then, None
            if then is not None:
                then(note)

    def note(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle_at(tmp_path_factory.mktemp("trials") / "parent", ARTICLE, pictures())


def compressed(parent: Bundle, folder: Path, builder: RayBuilder | None, progress: Progress) -> Compression:
    return compress(
        parent, pictures(), RECIPES, budget=AccuracyBudget.parse("30%"), out=folder / "out", steps=folder / "steps",
        bench=_bench(SPEEDS), progress=progress, builder=builder,
    )  # fmt: skip


def figures(found: Compression) -> list[tuple[str, str, float, float]]:
    """Of every stage: recipe, step, accuracy and drop."""
    return [
        (attempt.recipe, stage.step, stage.accuracy.value, stage.accuracy.drop)
        for attempt in found.attempts
        for stage in attempt.stages
    ]


@pytest.mark.long
@pytest.mark.slow
def test_a_search_of_two_nodes_loses_one_and_finds_what_one_machine_does(parent: Bundle, tmp_path: Path) -> None:
    expected = compressed(parent, tmp_path / "here", None, Silent())
    with ray_nodes(2) as cluster:
        watching = Watching(cluster.kill_one_but)  # the other one is building
        with trial_builder(cluster.address, pictures(), watching) as builder:
            found = compressed(parent, tmp_path / "there", builder, watching)
            assert builder.width == 1
    assert watching.waves[0] == 2, "as many recipes as there are nodes"
    assert any("was lost" in line for line in watching.lines), watching.lines
    assert figures(found) == figures(expected)
    assert (found.verdict, found.best) == (expected.verdict, expected.best)
    here, there = ({path.name for path in (tmp_path / at / "steps").iterdir()} for at in ("here", "there"))
    assert {name for name in here if len(name) == 24} == {name for name in there if len(name) == 24}


_HEAD = """
import sys
sys.path[:0] = ["tests/cluster", "tests/compress", "tests/train"]
import os, signal
from pathlib import Path
import test_trials as t

address, folder, parent = sys.argv[1:]
watching = t.Watching(lambda _: os.kill(os.getpid(), signal.SIGKILL))
with t.trial_builder(address, t.pictures(), watching) as builder:
    t.compressed(t.Bundle.open(Path(parent)), Path(folder), builder, watching)
"""


@pytest.mark.long
@pytest.mark.slow
def test_workers_and_the_head_are_killed_and_nothing_finished_is_built_again(parent: Bundle, tmp_path: Path) -> None:
    with ray_nodes(1) as cluster:
        command = [sys.executable, "-c", _HEAD, cluster.address, str(tmp_path), str(parent.path)]
        head = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
        assert head.returncode == -signal.SIGKILL, head.stderr
        work = Work(parent, pictures(), Store(tmp_path / "steps"), max_drop=0.3)
        finished = [recipe for recipe in RECIPES if first_missing(recipe, work)[1] is None]
        assert finished == RECIPES[:1]
        watching = Watching(str)
        with trial_builder(cluster.address, pictures(), watching) as builder:
            os.kill(ray.get(builder._nodes[0].facts()).process, signal.SIGKILL)
            compressed(parent, tmp_path, builder, watching)
    assert watching.waves == [1, 1], "one recipe was finished before"
    assert any(line.startswith("the worker on node") and "is built again" in line for line in watching.lines)


@pytest.mark.long
@pytest.mark.slow
def test_data_is_read_on_the_nodes_by_its_name_or_sent(parent: Bundle, tmp_path: Path) -> None:
    dataset = pictures()
    arrays = {f"{axis}_{part}": values for part in ("train", "validation", "test")
              for axis, values in zip("xy", split_of(dataset, part), strict=True)}  # fmt: skip
    np.savez(tmp_path / "quarters.npz", **arrays)
    with ray_nodes(1) as cluster:
        how = {"recipe": "f16", "cluster": cluster.address, "max_accuracy_drop": "30%"}
        for number, data in enumerate((tmp_path / "quarters.npz", arrays)):
            notes = Watching(str)
            rushhour.compress(parent, data, out=tmp_path / f"out{number}", progress=notes, **how)
            assert [line.startswith("f16: ") for line in notes.lines if "on node" in line] == [True]

        def moved(_: Bundle | None) -> Dataset:
            raise DataError("cannot read quarters.npz", "there is no such file")

        with (
            pytest.raises(DataError, match=r"no node of the cluster at .* can use the data quarters: .*no such file"),
            trial_builder(cluster.address, dataset, Silent(), load=moved),
        ):
            pass


def split_of(dataset: Dataset, part: str) -> tuple[Any, Any]:
    split: Split = getattr(dataset, part)
    return split.inputs, split.targets
