"""The search for hyper-parameters: it finds, ends what is hopeless, survives a kill, and seals the best."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import ARTICLE, Notes, pictures, table
from test_train_loop import MLP
from torch import nn

from rushhour.bundle import Bundle, Source
from rushhour.data.augment import Augmentation
from rushhour.errors import ModelError, StorageError
from rushhour.progress import Silent
from rushhour.records.curves import read_curves
from rushhour.train import TrainSettings
from rushhour.train.search import SearchResult, search

BASE = TrainSettings(epochs=2, batch=64, lr=3e-3, bf16=False)


def with_dropout(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 2))


def searched(folder: Path, trials: int, settings: TrainSettings = BASE, **options: Any) -> tuple[Bundle, SearchResult]:
    options = {"dataset": table(400), "source": MLP, "pruner": "median", "progress": Silent(), **options}
    return search(settings=settings, trials=trials, out=folder / "best", work=folder / "work", **options)


@pytest.mark.slow
def test_the_best_of_all_trials_is_sealed(tmp_path: Path) -> None:
    bundle, found = searched(tmp_path, 4)
    assert [tried.number for tried in found.trials] == [0, 1, 2, 3]
    assert found.trials[0].chosen == {"lr": 3e-3, "batch": 64, "weight_decay": 0.0}, "the settings as they are"
    assert all(3e-4 <= tried.chosen["lr"] <= 3e-2 for tried in found.trials)
    assert len({tried.chosen["lr"] for tried in found.trials}) == 4
    assert found.best == max(found.trials, key=lambda tried: tried.value or 0)
    (step,) = bundle.manifest.lineage
    assert step.settings["lr"] == found.best.chosen["lr"]
    assert Bundle.open(tmp_path / "best").manifest == bundle.manifest
    assert not list(tmp_path.glob("work/trials/*/*.safetensors")), "weights are only in the bundle"
    assert read_curves(tmp_path / "work")[-1].value == found.best.value
    notes = Notes()
    again, same = searched(tmp_path, 4, progress=notes)
    assert (again.manifest, same) == (bundle.manifest, found)
    assert notes.steps == 0, "nothing was trained again"
    _, more = searched(tmp_path, 5)
    assert more.trials[:4] == found.trials
    assert len(more.trials) == 5


class Killed(Notes):
    """Dies at a step, counted over all trials."""

    def advance(self, by: float = 1.0, note: str = "") -> None:
        self.steps += by
        if self.steps >= 17:  # 5 steps an epoch: somewhere in the second trial
            signal.raise_signal(signal.SIGKILL)


def killed_search(folder: Path) -> None:
    searched(folder, 3, progress=Killed(), checkpoint_every_s=0.0)


@pytest.mark.slow
def test_a_killed_search_goes_on_in_the_middle_of_its_trial(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; sys.path.insert(0, 'tests/train'); import test_search as t; "
        "t.killed_search(pathlib.Path(sys.argv[1]))"
    )
    died = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, cwd=Path(__file__).parents[2]
    )
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    notes = Notes()
    bundle, found = searched(tmp_path, 3, progress=notes)
    assert notes.notes[0].startswith("resumed after step ")
    undisturbed, expected = searched(tmp_path / "other", 3)
    assert [tried.chosen for tried in found.trials] == [tried.chosen for tried in expected.trials]
    assert [tried.value for tried in found.trials] == [tried.value for tried in expected.trials]
    assert bundle.manifest.hash == undisturbed.manifest.hash


@pytest.mark.slow
@pytest.mark.parametrize("pruner", ["median", pytest.param("hyperband", marks=pytest.mark.slow)])
def test_hopeless_trials_are_ended_early(pruner: str, tmp_path: Path) -> None:
    settings = TrainSettings(epochs=6, batch=32, lr=3e-3, optimizer="sgd", bf16=False)
    _, found = searched(tmp_path, 14, settings, pruner=pruner)
    pruned = [tried for tried in found.trials if tried.fate == "pruned"]
    assert pruned
    assert all(tried.epochs < 6 for tried in pruned)
    assert all(tried.epochs == 6 for tried in found.trials if tried.fate == "complete")
    assert found.best.fate == "complete"
    assert not list(tmp_path.glob("work/trials/*/*.safetensors"))


@pytest.mark.slow
def test_dropout_and_augmentation_are_searched_where_they_are(tmp_path: Path) -> None:
    source = Source("test_search:with_dropout")
    _, found = searched(tmp_path / "a", 3, source=source, trusted=("test_search:with_dropout",))
    assert len({tried.chosen["dropout"] for tried in found.trials}) > 1
    settings = TrainSettings(epochs=1, batch=160, augment=Augmentation.parse("flip,rotate"))
    _, found = searched(tmp_path / "b", 2, settings, dataset=pictures(), source=ARTICLE)
    assert found.trials[0].chosen["augment"] == 1.0
    assert "dropout" not in found.trials[0].chosen


def test_trials_that_diverge_are_said_and_the_rest_goes_on(tmp_path: Path) -> None:
    settings = TrainSettings(epochs=1, batch=64, lr=1e30, optimizer="sgd", momentum=0.0, bf16=False)
    with pytest.raises(ModelError, match="none of 2 trials was completed"):
        searched(tmp_path, 2, settings)


def broken() -> nn.Module:
    raise ValueError("no such layer")


def test_what_cannot_be_searched_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="in 0 trials"):
        searched(tmp_path, 0)
    with pytest.raises(ModelError, match="no such layer"):
        searched(tmp_path, 1, source=Source("test_search:broken"), trusted=("test_search:broken",))
    with pytest.raises(ModelError, match="cannot take samples"):
        searched(tmp_path, 1, source=Source(MLP.factory, {**MLP.arguments, "inputs": 7}))
    torch.manual_seed(0)  # the failures above have left nothing behind that would hold a lock
    searched(tmp_path, 1)


def test_two_searches_do_not_share_a_folder(tmp_path: Path) -> None:
    class Second(Notes):
        def start(self, what: str, total: float | None = None) -> None:
            with pytest.raises(StorageError, match="another process works in"):
                searched(tmp_path, 1)

    searched(tmp_path, 1, progress=Second())
