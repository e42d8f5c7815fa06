"""Training on several real processes: equal to one, resumed on another number, and through the death of any of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from rushhour.bundle import Source
from rushhour.curves import Epoch, read_curves
from rushhour.errors import ModelError
from rushhour.train import Tracking, TrainSettings
from rushhour.train.loop import Diverged
from test_train import Notes, table, trained
from test_train_loop import MLP, learned, same, with_extremes

ROOT = Path(__file__).parent.parent
SETTINGS = TrainSettings(epochs=3, batch=33, ema=0.9, clip=1.0, bf16=False)  # 9 steps an epoch; 33 does not divide


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2))


DROPOUT = Source("test_train_workers:with_dropout")


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.allclose(one[name], other[name], rtol=1e-5, atol=1e-6) for name in one)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return learned(tmp_path_factory.mktemp("alone"), table(), MLP, SETTINGS)


def test_two_workers_learn_what_one_does(alone: dict[str, torch.Tensor], tmp_path: Path) -> None:
    notes, heard = Notes(), list[Epoch]()
    tracking = Tracking(tmp_path / "t", tensorboard=False)
    together = learned(
        tmp_path, table(), MLP, SETTINGS, workers=2, progress=notes, on_epoch=heard.append, tracking=tracking
    )
    assert close(together, alone)
    assert notes.total == notes.steps == 27
    assert notes.notes[0].startswith("epoch 1/3, loss ")
    assert notes.result.startswith("r2 ")
    assert [epoch.step for epoch in heard] == [9, 18, 27]
    assert list(read_curves(tmp_path / "t")) == heard
    assert sorted(file.suffix for file in (tmp_path / "work").iterdir()) == [".safetensors"], "nothing else is left"


def shortened(folder: Path, workers: int, until: int) -> None:
    """Train on so many workers, and die with all of them after a checkpoint at step `until` or later."""
    code = (
        "import sys, pathlib; sys.path.insert(0, 'tests'); import test_train_workers as t; "
        "t.learned(pathlib.Path(sys.argv[1]), t.table(), t.MLP, t.SETTINGS, workers=int(sys.argv[2]), "
        "progress=t.Stop(int(sys.argv[3])), checkpoint_every_s=0.0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(workers), str(until)], capture_output=True, cwd=ROOT
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


class Stop(Notes):
    """Kills the process that started the workers, and the workers with it."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self._at = at

    def advance(self, by: float = 1.0, note: str = "") -> None:
        super().advance(by, note)
        if self.steps > self._at:
            for pid in children(os.getpid()):
                os.kill(pid, signal.SIGKILL)
            signal.raise_signal(signal.SIGKILL)


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    threads = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return sorted({int(child) for child in [*found, *(c for one in threads for c in one)]})


def test_four_workers_then_two_then_one(alone: dict[str, torch.Tensor], tmp_path: Path) -> None:
    shortened(tmp_path, 4, 5)
    (file,) = (tmp_path / "work").glob("*.safetensors")
    shortened(tmp_path, 2, 14)
    notes = Notes()
    final = learned(tmp_path, table(), MLP, SETTINGS, progress=notes)
    resumed = int(notes.notes[0].removeprefix("resumed after step "))
    assert 14 <= resumed < 27
    assert notes.steps == 27
    assert close(final, alone)
    assert all(b"pickle" not in path.read_bytes() for path in [file])


def losses(folder: Path) -> list[tuple[float, ...]]:
    return [(epoch.step, epoch.loss, epoch.validation_loss, epoch.value) for epoch in read_curves(folder)]


@pytest.mark.parametrize(("rank", "at"), [(0, 4), (1, 9), (1, 13)])
def test_the_death_of_any_worker_changes_nothing(rank: int, at: int, tmp_path: Path) -> None:
    """SIGKILL to one process after a step: all go on from the last checkpoint, with the same losses to the last bit."""
    settings = TrainSettings(epochs=2, batch=40, bf16=False)  # 8 steps an epoch

    def run(name: str, progress: Notes) -> dict[str, torch.Tensor]:
        return learned(
            tmp_path / name, table(), DROPOUT, settings, workers=2, progress=progress,
            trusted=(DROPOUT.factory,), checkpoint_every_s=0.0, tracking=Tracking(tmp_path / name, tensorboard=False),
        )  # fmt: skip

    expected = run("undisturbed", Notes())
    killer = KillsAWorker(rank, at)
    got = run("disturbed", killer)
    assert killer.killed is not None
    assert any(note.startswith("resumed after step ") for note in killer.notes), "the workers were started again"
    assert same(got, expected)
    assert losses(tmp_path / "disturbed") == losses(tmp_path / "undisturbed")


class KillsAWorker(Notes):
    """Kills one worker of this process, once, when it hears of a step."""

    def __init__(self, rank: int, at: int) -> None:
        super().__init__()
        self._rank, self._at = rank, at
        self.killed: int | None = None

    def advance(self, by: float = 1.0, note: str = "") -> None:
        super().advance(by, note)
        if self.killed is None and self.steps >= self._at:
            # they were started in the order of their ranks
            workers = [
                pid for pid in children(os.getpid()) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
            ]
            self.killed = workers[self._rank]
            os.kill(self.killed, signal.SIGKILL)


def test_a_worker_s_error_is_said_as_one_worker_would(tmp_path: Path) -> None:
    dataset = with_extremes(table(200), [17, 60], 3e38)
    settings = TrainSettings(epochs=2, batch=40, bf16=False)
    said = []
    for workers in (1, 2):
        with pytest.raises(Diverged) as raised:
            learned(tmp_path / str(workers), dataset, MLP, settings, workers=workers)
        said.append(str(raised.value))
    assert said[0] == said[1]
    assert "of its 40 samples only" in said[0]


def dies() -> nn.Module:
    """Only workers die of it: the process that starts them builds it too."""
    if multiprocessing.parent_process() is not None:
        os._exit(7)
    return nn.Linear(5, 2)


def test_workers_that_die_again_and_again_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rushhour.train.workers._RESTARTS", 1)
    with pytest.raises(ModelError, match=r"a worker died 2 times: worker \d of 2 failed"):
        learned(
            tmp_path, table(), Source("test_train_workers:dies"), SETTINGS, workers=2,
            trusted=("test_train_workers:dies",),
        )  # fmt: skip


def test_more_workers_than_samples_in_a_step_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="a step has 4 samples"):
        learned(tmp_path, table(), MLP, TrainSettings(batch=4), workers=5)


def in_torchrun(folder: str) -> None:
    from rushhour.progress import Silent

    trained(Path(folder), table(), MLP, SETTINGS, progress=Silent())


def test_torchrun_starts_the_workers_too(alone: dict[str, torch.Tensor], tmp_path: Path) -> None:
    code = tmp_path / "run.py"
    code.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import test_train_workers as t; "
        "t.in_torchrun(sys.argv[1])"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
         "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1", str(code), str(tmp_path / "x")],
        capture_output=True, text=True, cwd=ROOT, env=environment, timeout=150,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert close(load_file(tmp_path / "x" / "bundle" / "weights.safetensors"), alone)
