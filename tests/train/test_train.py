"""Training: learns, refuses what cannot work, and survives being killed at any moment."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from rushhour.bundle import Bundle, Preprocessing, Source
from rushhour.data.dataset import Dataset, Split
from rushhour.errors import DataError, ModelError, StorageError, TaskError
from rushhour.models import load_deployed, mlp
from rushhour.progress import Silent
from rushhour.task import Task
from rushhour.train import TrainingJob, TrainSettings, train
from rushhour.train.checkpoint import Checkpoint

ARTICLE = Source("rushhour.models:article", {"input_size": 16, "channels": 1, "classes": 4, "width": 0.25, "dense": 32})
RESIDUAL = Source("rushhour.models:residual", {"input_size": 16, "channels": 1, "classes": 4, "width": 4, "blocks": 1})
SHORT = TrainSettings(epochs=2, batch=32, lr=5e-3)


def pictures(n: int = 400, classes: int = 4, seed: int = 0) -> Dataset:
    """Noise with one bright quadrant: which one is the label."""
    random = np.random.default_rng(seed)
    inputs = random.integers(0, 100, (n, 16, 16, 1), dtype=np.uint8)
    labels = np.arange(n) % 4
    for picture, label in zip(inputs, labels, strict=True):
        row, column = divmod(int(label), 2)
        picture[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] += 60
    parts = [Split(inputs[at], labels[at]) for at in (slice(0, -80), slice(-80, -40), slice(-40, None))]
    task = Task.classification(tuple(f"quadrant {index}" for index in range(classes)))
    return Dataset("quadrants", task, *parts, Preprocessing(1 / 255, (0.25,), (0.2,), "NHWC->NCHW"), f"sum-{seed}")


def table(n: int = 400) -> Dataset:
    random = np.random.default_rng(0)
    inputs = random.normal(size=(n, 5)).astype(np.float32)
    values = (inputs @ random.normal(size=(5, 2))).astype(np.float32)
    parts = [Split(inputs[at], values[at]) for at in (slice(0, -80), slice(-80, -40), slice(-40, None))]
    return Dataset("plane", Task("regression", outputs=2), *parts, Preprocessing(), "sum")


class Notes:
    """Keeps what training says; kills its own process at a step, or at the end where that never comes."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.total: float | None = None
        self.steps = 0.0
        self.notes: list[str] = []
        self.result = ""
        self.said: list[str] = []
        self._dies_at = dies_at

    def start(self, what: str, total: float | None = None) -> None:
        self.total = total if total is not None else self.total

    def limit(self, seconds: float) -> None: ...

    def advance(self, by: float = 1.0, note: str = "") -> None:
        self.steps += by
        self.notes.append(note)
        if self._dies_at is not None and self.steps >= self._dies_at:
            signal.raise_signal(signal.SIGKILL)

    def done(self, note: str = "", *, good: bool = True) -> None:
        self.said.append(note)
        self.result = self.result if note.endswith(" MB") else note  # that is the bundle
        if self._dies_at is not None:
            signal.raise_signal(signal.SIGKILL)


def trained(
    folder: Path, dataset: Dataset, source: Source = ARTICLE, settings: TrainSettings = SHORT, **options: object
) -> Bundle:
    call = {name: options.pop(name) for name in ("on_epoch", "name", "force") if name in options}
    progress = options.pop("progress", Silent())
    job = TrainingJob(source, settings, folder / "work", **options)  # type: ignore[arg-type]
    return train(dataset, job, out=folder / "bundle", progress=progress, **call)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Notes]:
    notes = Notes()
    return trained(tmp_path_factory.mktemp("undisturbed"), pictures(), progress=notes), notes


def test_it_learns_and_says_how_it_goes(undisturbed: tuple[Bundle, Notes]) -> None:
    bundle, notes = undisturbed
    dataset = pictures()
    with torch.inference_mode():
        answers = load_deployed(bundle)(torch.from_numpy(dataset.test.inputs)).numpy()
    assert dataset.task.evaluate(answers, dataset.test.targets)[0] > 0.9
    assert notes.total == notes.steps == 20
    assert notes.notes[0].startswith("epoch 1/2, loss ")
    assert "accuracy" in notes.notes[-1]
    assert "images/s" in notes.notes[-1]
    assert notes.result.startswith("accuracy ")
    assert notes.said[-1].endswith(" MB")


def test_the_bundle_says_what_it_was_made_of(undisturbed: tuple[Bundle, Notes]) -> None:
    manifest = Bundle.open(undisturbed[0].path).manifest
    (step,) = manifest.lineage
    assert manifest.name == "bundle"
    assert manifest.source == ARTICLE
    assert step.what == "train"
    expected = {"epochs": 2, "batch": 32, "lr": 5e-3, "seed": 0, "dataset": "quadrants", "fingerprint": "sum-0"}
    assert expected.items() <= step.settings.items()
    assert isinstance(step.settings["bf16"], bool)
    assert np.array_equal(undisturbed[0].samples()["image"], pictures().train.sample(16).inputs)
    assert not list(undisturbed[0].path.parent.glob("work/*")), "checkpoints go once the bundle is sealed"


def test_the_same_training_is_returned_and_another_replaces_it_by_force(
    undisturbed: tuple[Bundle, Notes], tmp_path: Path
) -> None:
    shutil.copytree(undisturbed[0].path, tmp_path / "bundle")
    notes = Notes()
    again = trained(tmp_path, pictures(), progress=notes)
    assert again.manifest == undisturbed[0].manifest
    assert notes.steps == 0, "nothing was trained"
    other = trained(tmp_path, pictures(), settings=TrainSettings(epochs=1, batch=160), force=True)
    assert other.manifest.hash != again.manifest.hash
    (tmp_path / "bundle" / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(StorageError, match="it is damaged"):
        trained(tmp_path, pictures(), settings=TrainSettings(epochs=1, batch=160))
    again = trained(tmp_path, pictures(), settings=TrainSettings(epochs=1, batch=160), force=True)
    assert again.manifest.hash == other.manifest.hash


# in the first epoch, right after it, in the last one, and when all is trained but nothing sealed
@pytest.mark.parametrize("dies_at", [3, *(pytest.param(step, marks=pytest.mark.slow) for step in (11, 17, 21))])
def test_killed_and_resumed_is_the_same_bit_for_bit(
    dies_at: int, undisturbed: tuple[Bundle, Notes], tmp_path: Path
) -> None:
    code = (
        "import sys, pathlib; sys.path.insert(0, 'tests/train'); import test_train as t; "
        f"t.trained(pathlib.Path(sys.argv[1]), t.pictures(), progress=t.Notes({dies_at}), checkpoint_every_s=0.0)"
    )
    died = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, cwd=Path(__file__).parents[2]
    )
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert not (tmp_path / "bundle").exists()
    (checkpoint,) = (tmp_path / "work").glob("*.safetensors")
    assert b"pickle" not in checkpoint.read_bytes()
    notes = Notes()
    resumed = trained(tmp_path, pictures(), progress=notes)
    assert notes.notes[0] == f"resumed after step {dies_at - 1}"
    assert notes.steps == 20
    assert resumed.manifest.hash == undisturbed[0].manifest.hash
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.slow
def test_batch_norm_and_half_precision_resume_too(tmp_path: Path) -> None:
    settings = TrainSettings(epochs=2, batch=64, bf16=True)

    class Stop(Notes):
        def advance(self, by: float = 1.0, note: str = "") -> None:
            super().advance(by, note)
            if self.steps == 7:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "a", pictures(), RESIDUAL, settings, progress=Stop(), checkpoint_every_s=0.0)
    resumed = trained(tmp_path / "a", pictures(), RESIDUAL, settings)
    assert resumed.manifest.hash == trained(tmp_path / "b", pictures(), RESIDUAL, settings).manifest.hash


def test_a_checkpoint_of_something_else_or_a_damaged_one_is_ignored(tmp_path: Path) -> None:
    notes = [Notes() for _ in range(3)]
    settings = TrainSettings(epochs=1, batch=160)
    network = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=5)
    strange = Checkpoint(tmp_path, "a" * 64)
    strange.save(3, network, optimizer, schedule)
    assert Checkpoint(tmp_path, "a" * 16 + "b" * 48).restore(network, optimizer, schedule) == 0
    assert strange.restore(mlp(3, 3), optimizer, schedule) == 0, "the code of the model has changed"
    for content in (b"", b"\x00" * 40, strange.path.read_bytes()[:-9]):
        strange.path.write_bytes(content)
        assert strange.restore(network, optimizer, schedule) == 0
    before = trained(tmp_path / "x", pictures(), settings=settings, progress=notes[0])
    assert before.manifest.hash == trained(tmp_path / "y", pictures(), settings=settings).manifest.hash


def test_regression_learns(tmp_path: Path) -> None:
    dataset = table()
    source = Source("rushhour.models:mlp", {"inputs": 5, "outputs": 2, "hidden": 32, "depth": 2})
    notes = Notes()
    settings = TrainSettings(epochs=8, batch=32, lr=1e-2, bf16=False)
    bundle = trained(tmp_path, dataset, source, settings, progress=notes)
    assert float(notes.result.removeprefix("r2 ")) > 0.9
    assert bundle.manifest.signature.inputs[0].name == "input"
    assert bundle.manifest.signature.outputs[0].name == "values"


def test_a_batch_larger_than_the_data_is_the_data(tmp_path: Path) -> None:
    notes = Notes()
    trained(tmp_path, pictures(100), settings=TrainSettings(epochs=3, batch=5000), progress=notes)
    assert notes.steps == 3


def test_the_last_good_checkpoint_outlives_a_loss_that_is_no_number(tmp_path: Path) -> None:
    settings = TrainSettings(epochs=50, batch=32, lr=1e30, bf16=False)
    source = Source("rushhour.models:mlp", {"inputs": 5, "outputs": 2, "hidden": 8, "depth": 1})
    notes = Notes()
    with pytest.raises(ModelError, match=r"diverged at step \d+ of 500.*lower the learning rate") as raised:
        trained(tmp_path, table(), source, settings, progress=notes, checkpoint_every_s=0.0)
    assert f"diverged at step {int(notes.steps) + 1} " in str(raised.value) or "weights" in str(raised.value)
    (checkpoint,) = (tmp_path / "work").glob("*.safetensors")
    assert str(checkpoint) in str(raised.value)
    state = load_file(checkpoint)
    assert all(bool(value.isfinite().all()) for name, value in state.items() if name.startswith("network."))
    assert not (tmp_path / "bundle").exists()


def test_what_does_not_fit_is_refused_before_training(tmp_path: Path) -> None:
    three = Source(ARTICLE.factory, {**ARTICLE.arguments, "classes": 3})
    with pytest.raises(TaskError, match="4 classes"):
        trained(tmp_path, pictures(), three)
    small = Source(ARTICLE.factory, {**ARTICLE.arguments, "input_size": 8})
    with pytest.raises(ModelError, match=r"cannot take samples of shape \(16, 16, 1\)"):
        trained(tmp_path, pictures(), small)
    few = Source(ARTICLE.factory, {**ARTICLE.arguments, "classes": 2})
    with pytest.raises(TaskError, match=r"label is one number in 0\.\.1"):
        trained(tmp_path, pictures(classes=2), few)
    with pytest.raises(ModelError, match="will not import"):
        trained(tmp_path, pictures(), Source("os:system", {"command": "true"}))
    with pytest.raises(ModelError, match="parameters"):
        trained(tmp_path, table(), Source("test_train:Empty"), trusted=("test_train:Empty",), progress=Silent())
    data = table()
    words = Split(data.train.inputs.astype("U4"), data.train.targets)
    with pytest.raises(DataError, match="a model takes numbers"):
        Dataset("strings", data.task, words, words, words, Preprocessing(), "sum")
    assert not (tmp_path / "bundle").exists()
    assert not list(tmp_path.rglob("*.safetensors"))


class Empty(nn.Module):
    """Nothing to learn."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :2]


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"batch": 0}, {"lr": 0.0}, {"lr": float("nan")}])
def test_settings_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ModelError, match="cannot train"):
        TrainSettings(**wrong)  # type: ignore[arg-type]


def test_training_leaves_the_caller_s_seed_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    trained(tmp_path, table(), Source("rushhour.models:mlp", {"inputs": 5, "outputs": 2, "hidden": 4, "depth": 1}))
    assert torch.equal(torch.rand(2), expected)
