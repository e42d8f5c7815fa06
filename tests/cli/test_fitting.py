"""Data, network and settings that fit each other, from the command line: what is offered, found early, and said."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from rushhour.api.inputs import load_data
from rushhour.api.settings import fitted, settings_of
from rushhour.bundle import Bundle, Decoding, Source
from rushhour.cli import cli
from rushhour.cli.terminal import TerminalProgress
from rushhour.data import Dataset, Split, decoded, load
from rushhour.data.arrays import from_splits
from rushhour.errors import DataError, RushhourError, TaskError
from rushhour.models import build, source_for
from rushhour.progress import Silent
from rushhour.task import Task
from rushhour.train import TrainingJob, trained_weights

NETS = """
import math
import numpy as np
from torch import nn
from rushhour.bundle import Preprocessing
from rushhour.data import Dataset, Split
from rushhour.task import Task

def both(classes, input=(1, 2, 3)):
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input), classes))

def usual(num_classes: int = 1000):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))

def values(input: int, outputs: int):
    return nn.Linear(input, outputs)

def features(input: int, classes: int):
    return nn.Linear(input, classes)

def other(input: str = "rgb", classes: list[str] | None = None):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 7))

def data():
    x = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    part = Split(x, (x[:, 0] > 0).astype(np.int32))
    return Dataset("own", Task.classification(("a", "b")), part, part, part, Preprocessing(), "own")
"""


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("nets")
    (folder / "fitting_nets.py").write_text(NETS)
    sys.path.insert(0, str(folder))
    yield "fitting_nets"
    sys.path.remove(str(folder))
    sys.modules.pop("fitting_nets", None)


def photos(folder: Path, *names: str, n: int = 20, size: tuple[int, int] = (8, 10), first: int = 0) -> Path:
    """Pictures whose classes differ in brightness, so that they can be learned."""
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(first, first + n):
            random = np.random.default_rng(1000 * number + index)
            pixels = (100 * number + random.integers(0, 90, (*size, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def typed(*words: Any) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words])


def progress() -> TerminalProgress:
    return TerminalProgress()


@pytest.fixture(scope="module")
def trained(nets: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Path]:
    """A bundle of 16x12 pictures of dogs and cats, and the folder that it was trained on."""
    folder = tmp_path_factory.mktemp("trained")
    photos(folder / "pets", "cat", "dog", n=30)
    done = typed("train", f"{nets}:both", "--data", folder / "pets", "--size", "16x12", "--epochs", 1,
                 "--no-tensorboard", "--out", folder / "bundle")  # fmt: skip
    assert done.exit_code == 0, done.exception
    return Bundle.open(folder / "bundle"), folder / "pets"


# What the data decides is offered to the user's factory


def test_classes_and_input_are_offered_where_the_factory_takes_them(trained: tuple[Bundle, Path], nets: str) -> None:
    bundle, _ = trained
    assert bundle.manifest.source == Source(f"{nets}:both", {"classes": 2, "input": (3, 16, 12)})
    built = build(bundle.manifest.source, (f"{nets}:both",))
    assert tuple(built(torch.zeros(1, 3, 16, 12)).shape) == (1, 2)


@pytest.mark.parametrize(
    ("factory", "shape", "arguments"),
    [
        ("both", (5,), {"classes": 3, "input": (5,)}),
        ("usual", (8, 8, 3), {"num_classes": 3}),
        ("values", (5,), {"input": 5, "outputs": 3}),
        ("features", (5,), {"input": 5, "classes": 3}),
        ("features", (8, 8, 3), {"classes": 3}),
        ("other", (8, 8, 3), {}),
        ("absent", (8, 8, 3), {}),
    ],
)
def test_only_what_a_parameter_can_take_is_offered(
    nets: str, factory: str, shape: tuple[int, ...], arguments: dict[str, Any]
) -> None:
    task = Task.classification(("a", "b", "c"))
    assert source_for(f"{nets}:{factory}", shape, task) == Source(f"{nets}:{factory}", arguments)


@pytest.mark.parametrize("model", ["{}:other", "{}:features", "{}:absent", "{}:data"])
def test_a_network_that_does_not_fit_is_found_before_pictures_are_decoded(
    nets: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("pictures were decoded first")

    monkeypatch.setattr(decoded, "decode", never)
    photos(tmp_path / "d", "a", "b", n=6)
    for verb in ("train", "tune"):
        done = typed(verb, model.format(nets), "--data", tmp_path / "d", "--out", tmp_path / "run")
        assert isinstance(done.exception, RushhourError), done.exception
        assert not (tmp_path / "run").exists()


# Settings that fit the data

NOTHING: dict[str, Any] = {"epochs": None, "batch": None, "lr": None, "seed": 0}


@pytest.mark.parametrize("samples", [4, 20, 100, 400, 1000, 5000, 12_800, 55_000, 1_000_000])
def test_steps_decide_where_nobody_says_epochs(samples: int, capsys: pytest.CaptureFixture[str]) -> None:
    settings = settings_of(fitted(NOTHING, samples, progress()))
    said = capsys.readouterr().err
    steps = settings.epochs * max(1, samples // min(settings.batch, samples))
    assert steps >= 600 or settings.epochs == 100
    assert 8 <= settings.batch <= 128
    assert 0 < settings.lr <= 2e-3
    if samples >= 25_600:
        assert (settings.batch, settings.epochs, settings.lr, said) == (128, 3, 2e-3, "")
    else:
        assert said.count("\n") == 1
        for part in (f"{samples:,} training samples", f"{settings.epochs} epochs", f"{steps:,} steps", "--epochs"):
            assert part in said


def test_what_the_user_says_stays(capsys: pytest.CaptureFixture[str]) -> None:
    said = {"epochs": 2, "batch": 100, "lr": 0.1, "seed": 0}
    assert fitted(said, 400, progress()) == said
    assert capsys.readouterr().err == ""
    assert fitted(NOTHING | {"batch": 100}, 400, progress())["epochs"] == 100
    assert fitted(NOTHING | {"epochs": 7}, 400, progress())["epochs"] == 7
    line = capsys.readouterr().err.splitlines()[-1]
    assert "--batch" in line
    assert "--epochs" not in line
    assert fitted(NOTHING | {"accumulate": 20}, 100, progress())["batch"] >= 20
    assert fitted(NOTHING, 100, progress(), workers=12)["batch"] >= 12


def test_little_data_is_learned_without_any_setting(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    labels = np.arange(400) % 4
    rows = (random.normal(size=(400, 16)) + 6 * np.eye(16)[labels]).astype(np.float32)
    data = from_splits("rows", *(Split(rows[part::3], labels[part::3]) for part in range(3)))
    source = Source("rushhour.models:mlp", {"inputs": 16, "outputs": 4, "hidden": 32, "depth": 2})
    heard = Heard()
    job = TrainingJob(source, settings_of(fitted(NOTHING, len(data.train), progress())), tmp_path)
    trained_weights(data, job, progress=heard)
    assert float(heard.result.split()[-1]) > 0.8, heard.result


class Heard(Silent):
    result = ""

    def done(self, note: str = "", *, good: bool = True) -> None:
        self.result = note


def test_labels_of_32_bits_from_a_users_factory_are_trained_on(nets: str, tmp_path: Path) -> None:
    data = load(f"{nets}:data")
    source = source_for(f"{nets}:features", data.sample_shape, data.task)
    job = TrainingJob(source, settings_of({"epochs": 1, "batch": 8}), tmp_path, (f"{nets}:features",))
    weights = trained_weights(data, job, progress=Silent())
    assert tuple(weights["weight"].shape) == (2, 4)


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_labels_that_the_task_does_not_have_are_found_in_every_part(nets: str, part: str, tmp_path: Path) -> None:
    data = load(f"{nets}:data")
    strange = Split(data.train.inputs, np.where(np.arange(40) == 7, 5, data.train.targets))
    data = dataclasses.replace(data, **{part: strange})
    source = source_for(f"{nets}:features", data.sample_shape, data.task)
    job = TrainingJob(source, settings_of({"epochs": 1}), tmp_path, (f"{nets}:features",))
    with pytest.raises(TaskError, match=f"the {part} labels of own do not fit the task"):
        trained_weights(data, job, progress=Silent())


# Data is brought to a bundle


def test_pictures_of_other_sizes_are_brought_to_the_bundle(trained: tuple[Bundle, Path], tmp_path: Path) -> None:
    bundle, pets = trained
    photos(tmp_path / "d", "dog", "cat", n=10, size=(30, 40))
    photos(tmp_path / "d", "dog", "cat", n=10, size=(9, 7), first=10)
    for path in tmp_path.glob("d/*/1*.png"):
        Image.open(path).convert("L").save(path)
    data = load_data(str(tmp_path / "d"), progress(), str(bundle.path))
    assert data.sample_shape == (16, 12, 3)
    assert data.task == bundle.manifest.task
    assert "stretches 40 of them; bundle takes that" in " ".join(data.notes)
    assert load_data(str(pets), progress(), str(bundle.path)).fingerprint == (
        load(str(pets), size=(16, 12)).fingerprint
    ), "as in training"


def test_labels_are_the_bundles_whatever_classes_are_there(trained: tuple[Bundle, Path], tmp_path: Path) -> None:
    bundle, _ = trained
    photos(tmp_path / "one", "dog", n=20)
    data = load(str(tmp_path / "one"), bundle=bundle)
    assert set(data.train.targets) == {1}
    photos(tmp_path / "more", "cat", "elk", n=10)
    with pytest.raises(TaskError, match=r"does not know: elk; it knows cat, dog|does not know: elk: it knows cat, dog"):
        load(str(tmp_path / "more"), bundle=bundle)


@pytest.mark.parametrize("verb", ["compress", "tune"])
def test_compress_and_tune_take_a_size_and_leave_out_what_is_corrupt(
    trained: tuple[Bundle, Path], verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, _ = trained
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "d", "cat", "dog", n=10)
    how = ["--recipe", "int8"] if verb == "compress" else []
    done = typed(verb, bundle.path, "--data", "d", "--size", "9x9", "--out", "out", *how)
    assert isinstance(done.exception, DataError)
    assert "takes 16x12; leave out --size" in str(done.exception)
    (tmp_path / "d" / "cat" / "0.png").write_bytes(b"")
    (tmp_path / "d" / "cat" / "notes.txt").write_bytes(b"")
    done = typed(verb, bundle.path, "--data", "d", "--out", "out", *how)
    assert "0.png: it is empty" in str(done.exception)
    assert "--skip-corrupt" in str(done.exception)

    def stop(*_: Any, **__: Any) -> None:
        raise DataError("far enough")

    monkeypatch.setattr("rushhour.compress.compress", stop)
    monkeypatch.setattr("rushhour.tune.tune_run", stop)
    done = typed(verb, bundle.path, "--data", "d", "--size", "16x12", "--skip-corrupt", "--out", "out", *how)
    assert str(done.exception) == "far enough"
    assert "left out 2 of 21 files: .txt 1, unreadable 1" in done.stderr


def test_a_reference_network_that_needs_a_square_gets_one(tmp_path: Path) -> None:
    photos(tmp_path / "d", "a", "b", n=6, size=(12, 16))
    data = load_data(str(tmp_path / "d"), progress(), "article")
    assert data.sample_shape == (16, 16, 3)
    assert "stretches 12 of them; --size HxW" in " ".join(data.notes)
    assert load_data(str(tmp_path / "d"), progress(), "residual").sample_shape == (12, 16, 3)
    with pytest.raises(RushhourError, match="--size"):
        load_data(str(tmp_path / "d"), progress(), "article", size="12x16")


# What is known of the data that a bundle was trained on


def test_data_that_has_grown_is_said_and_nothing_trained_on_is_tested(
    trained: tuple[Bundle, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, pets = trained
    load_data(str(pets), progress(), str(bundle.path))
    assert "trained on" not in capsys.readouterr().err
    for name in ("cat", "dog"):
        (tmp_path / "grown" / name).mkdir(parents=True)
        for file in (pets / name).iterdir():
            (tmp_path / "grown" / name / file.name).write_bytes(file.read_bytes())
    photos(tmp_path / "grown", "cat", "dog", n=30, first=500)
    load_data(str(tmp_path / "grown"), progress(), str(bundle.path))
    said = capsys.readouterr().err
    assert "was trained on other data than grown is now" in said
    assert "on nothing of its validation and test parts" in said


def test_a_test_part_that_was_trained_on_is_said(
    trained: tuple[Bundle, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, pets = trained
    before = load(str(pets), bundle=bundle)
    seen = {each.tobytes() for each in before.train.inputs}
    for part, first in (("train", 700), ("val", 800)):
        photos(tmp_path / "d" / part, "cat", "dog", n=8, first=first)
    for name in ("cat", "dog"):
        (tmp_path / "d" / "test" / name).mkdir(parents=True)
        for file in (pets / name).iterdir():
            (tmp_path / "d" / "test" / name / file.name).write_bytes(file.read_bytes())
    data = load_data(str(tmp_path / "d"), progress(), str(bundle.path))
    share = np.mean([each.tobytes() in seen for each in data.test.inputs])
    said = capsys.readouterr().err
    assert f"was trained on about {share:.0%} of the test part of d" in said
    assert "validation" not in said.partition("was trained on")[2]


# What is fitted and carried along comes from shuffled training samples


def in_order() -> Dataset:
    """Parts of their own in the order of their classes, all samples different."""
    random = np.random.default_rng(0)
    parts = [Split(random.integers(0, 256, (90, 4, 4, 1), dtype=np.uint8), np.repeat([0, 1, 2], 30)) for _ in range(3)]
    return from_splits("ordered", *parts)


def test_accuracy_control_fits_on_shuffled_training_samples(monkeypatch: pytest.MonkeyPatch, tiny: Bundle) -> None:
    data = in_order()
    quantizing = importlib.import_module("rushhour.compress.quantize")  # the package has a function of that name
    monkeypatch.setattr(quantizing, "_JUDGED", 30)
    asked: list[Split] = []

    def answers(bundle: Bundle, split: Split) -> Any:
        asked.append(split)
        return np.zeros((len(split), 3))

    monkeypatch.setattr(quantizing, "_answers_of", answers)
    quantizing._Control(tiny, data, 0.01, 8, 0, False)
    trained_on = {each.tobytes() for each in data.train.inputs}
    (split,) = asked
    assert len(split) == 30
    assert {each.tobytes() for each in split.inputs} <= trained_on
    assert set(split.targets) == {0, 1, 2}
    assert (np.diff(split.targets) < 0).any(), "in no order"


def test_the_samples_of_a_bundle_are_shuffled_training_samples(trained: tuple[Bundle, Path]) -> None:
    bundle, pets = trained
    data = load(str(pets), bundle=bundle)
    label = {each.tobytes(): int(target) for each, target in zip(data.train.inputs, data.train.targets, strict=True)}
    (carried,) = bundle.samples().values()
    assert {label[each.tobytes()] for each in carried} == {0, 1}
    part = in_order().train
    assert set(part.sample(16).targets) == {0, 1, 2}
    assert len({each.tobytes() for each in part.sample(90).inputs}) == 90


def test_the_decoding_of_deep_pictures_is_the_bundles(tmp_path: Path, trained: tuple[Bundle, Path]) -> None:
    bundle, _ = trained
    for name in ("cat", "dog"):
        (tmp_path / "d" / name).mkdir(parents=True)
        for index in range(10):
            deep = np.full((4, 4), 1000 + 100 * index, np.uint16)
            Image.fromarray(deep).save(tmp_path / "d" / name / f"{index}.png")
    data = load(str(tmp_path / "d"), bundle=bundle)
    assert data.preprocessing.decoding == bundle.manifest.preprocessing.decoding == Decoding()
    assert data.train.inputs.max() <= round(1900 / 257) + 1
