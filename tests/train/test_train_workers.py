"""Training on several real processes: equal to one, resumed on another number, and through the death of any of them."""

from __future__ import annotations

import functools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train import ARTICLE as PICTURES
from test_train import RESIDUAL, Notes, pictures, table
from test_train_loop import MLP, learned, same
from torch import nn

from rushhour.bundle import Source
from rushhour.errors import ModelError, PlanError
from rushhour.records.curves import Epoch, read_curves
from rushhour.testing.mortal import KILLS, Mortal
from rushhour.testing.networks import ANY
from rushhour.train import ParallelSettings, Relaxed, Tracking, TrainSettings
from rushhour.train.parallel import GradientCompression, Mode
from rushhour.train.parallel.workers import ProgressWriter, forwarded

ROOT = Path(__file__).parents[2]
SETTINGS = TrainSettings(epochs=3, batch=33, ema=0.9, clip=1.0, bf16=False)  # 9 steps an epoch; 33 does not divide

LONG = (pytest.mark.slow, pytest.mark.long)


def divided(mode: Mode = "auto", **how: Any) -> ParallelSettings:
    """With constants made up, because measuring takes seconds."""
    return ParallelSettings(mode, constants=ANY, **how)


def with_dropout() -> nn.Module:
    return nn.Sequential(Mortal(), nn.Linear(5, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2), Mortal())


DROPOUT = Source("test_train_workers:with_dropout")


class Uneven(nn.Module):
    """What several workers could do otherwise than one: a layer without use, one used now and then, and statistics."""

    centre: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(5, 16), nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
        self.spare, self.last = nn.Linear(16, 16), nn.Linear(16, 2)
        self.register_buffer("centre", torch.zeros(16))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.frozen = nn.BatchNorm1d(16).eval().requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x).view(-1, 4, 4)).flatten(1)
        out: torch.Tensor = self.last(self.frozen(x - self.centre).relu())
        if self.training:
            self.centre = 0.9 * self.centre + 0.1 * x.detach().mean(0)
            self.steps += 1
        return out


def uneven() -> nn.Module:
    return Uneven()


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.allclose(one[name], other[name], rtol=1e-5, atol=1e-6) for name in one)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return learned(tmp_path_factory.mktemp("alone"), table(), MLP, SETTINGS)


@pytest.mark.slow
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
    left = sorted(str(file.relative_to(tmp_path / "work")) for file in (tmp_path / "work").rglob("*"))
    assert [name.removeprefix("train-")[16:] for name in left] == ["", ".safetensors", "/workers.json"]


class Ends(Notes):
    """Remembers how each piece of work ended, and the limit of the run."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[tuple[str, bool]] = []
        self.limits: list[float] = []

    def done(self, note: str = "", *, good: bool = True) -> None:
        self.ends.append((note, good))

    def limit(self, seconds: float) -> None:
        self.limits.append(seconds)


def test_all_that_a_worker_says_is_heard(tmp_path: Path) -> None:
    """A bad end once got the tick of a good one, because only its note was sent on."""
    heard, told = Ends(), tmp_path / "told"
    with told.open("w") as stream, forwarded(told, heard):
        worker = ProgressWriter(stream)
        worker.limit(60.0)
        worker.start("train", 5)
        worker.advance(2, "loss 0.3")
        worker.done("diverged", good=False)
        worker.done("r2 0.9")
        stream.flush()
    assert (heard.total, heard.notes, heard.limits) == (5, ["loss 0.3"], [60.0])
    assert heard.ends == [("diverged", False), ("r2 0.9", True)]


def shortened(folder: Path, workers: int, until: int, mode: Mode) -> None:
    """Train on so many workers, and die with all of them after a checkpoint at step `until` or later."""
    code = (
        "import sys, pathlib; sys.path.insert(0, 'tests/train'); import test_train_workers as t; "
        "t.learned(pathlib.Path(sys.argv[1]), t.table(), t.MLP, t.SETTINGS, workers=int(sys.argv[2]), "
        "progress=t.Stop(int(sys.argv[3])), checkpoint_every_s=0.0, parallel=t.divided(sys.argv[4]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(workers), str(until), mode], capture_output=True, cwd=ROOT
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


@pytest.mark.long
@pytest.mark.slow
def test_four_workers_then_two_then_one(alone: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Each time another plan, too: a checkpoint holds the whole network."""
    shortened(tmp_path, 4, 5, "hybrid")
    shortened(tmp_path, 2, 14, "pipeline")
    notes = Notes()
    final = learned(tmp_path, table(), MLP, SETTINGS, progress=notes)
    resumed = int(notes.notes[0].removeprefix("resumed after step "))
    assert 14 <= resumed < 27
    assert notes.steps == 27
    assert close(final, alone)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["model", pytest.param("pipeline", marks=LONG)])
def test_plans_compute_in_bfloat16_too(mode: Mode, tmp_path: Path) -> None:
    settings = TrainSettings(epochs=2, batch=33, bf16=True)
    one = learned(tmp_path / "1", table(), MLP, settings)
    two = learned(tmp_path / "2", table(), MLP, settings, workers=2, parallel=divided(mode))
    assert all(torch.allclose(one[name], two[name], atol=0.02) for name in one)


NORMS = Source("rushhour.models:residual", {"input_size": 16, "channels": 1, "classes": 4, "width": 4, "blocks": 1})


@pytest.mark.slow
@pytest.mark.parametrize("mode", [pytest.param("sharded", marks=LONG), "pipeline"])
def test_batch_normalisation_sees_the_whole_batch(mode: Mode, tmp_path: Path) -> None:
    settings = TrainSettings(epochs=2, batch=60, ema=0.9, patience=1, lr=1e-3, bf16=False)
    one = learned(tmp_path / "1", pictures(), NORMS, settings)
    two = learned(tmp_path / "2", pictures(), NORMS, settings, workers=2, parallel=divided(mode))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        np.testing.assert_allclose(two[name], tensor, rtol=1e-3, atol=1e-4, err_msg=name)


def losses(folder: Path) -> list[tuple[float, ...]]:
    return [(epoch.step, epoch.loss, epoch.validation_loss, epoch.value) for epoch in read_curves(folder)]


def dropped_out(folder: Path, parallel: ParallelSettings, progress: Notes) -> dict[str, torch.Tensor]:
    return learned(
        folder, table(), DROPOUT, TrainSettings(epochs=2, batch=40, ema=0.9, clip=1.0, bf16=False), workers=2,
        progress=progress, parallel=parallel, trusted=(DROPOUT.factory,), checkpoint_every_s=0.0,
        tracking=Tracking(folder, tensorboard=False),
    )  # fmt: skip


SHARED = {
    "data": divided("data"),
    "model": divided("model"),
    "pipeline": divided("pipeline"),
    "diloco": divided(relaxed=Relaxed(every=3, outer_lr=0.7, outer_momentum=0.9)),
}


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[dict[str, torch.Tensor], list[tuple[float, ...]]]]:
    @functools.cache
    def made(sharing: str) -> tuple[dict[str, torch.Tensor], list[tuple[float, ...]]]:
        folder = tmp_path_factory.mktemp(sharing)
        return dropped_out(folder, SHARED[sharing], Notes()), losses(folder)

    return made


@pytest.mark.parametrize(
    ("sharing", "rank", "at"),
    [
        pytest.param("data", 0, 4, marks=LONG),
        pytest.param("model", 1, 5, marks=LONG),
        pytest.param("pipeline", 0, 12, marks=LONG),
        pytest.param("diloco", 1, 10, marks=LONG),
    ],
)
def test_the_death_of_any_worker_changes_nothing(
    sharing: str,
    rank: int,
    at: int,
    undisturbed: Callable[[str], tuple[dict[str, torch.Tensor], list[tuple[float, ...]]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SIGKILL to one process in a step: all go on from the last checkpoint, with the same losses to the last bit."""
    weights, curve = undisturbed(sharing)
    killed = tmp_path / "killed"
    monkeypatch.setenv(KILLS, f"{rank} {at} {killed}")
    notes = Notes()
    got = dropped_out(tmp_path, SHARED[sharing], notes)
    assert killed.exists()
    assert any(note.startswith("resumed after step ") for note in notes.notes)
    assert same(got, weights)
    assert losses(tmp_path) == curve


@pytest.mark.slow
@pytest.mark.parametrize("sharing", [pytest.param("model", marks=LONG), "pipeline"])
def test_every_plan_trains_alike(
    sharing: str, undisturbed: Callable[[str], tuple[dict[str, torch.Tensor], list[tuple[float, ...]]]]
) -> None:
    """Dropout, clipping, averages and validation included."""
    weights, curve = undisturbed(sharing)
    expected, of_replicas = undisturbed("data")
    assert close(weights, expected)
    np.testing.assert_allclose(curve, of_replicas, rtol=1e-5)


def test_more_workers_than_samples_in_a_step_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="a step has 4 samples"):
        learned(tmp_path, table(), MLP, TrainSettings(batch=4), workers=5)


@pytest.mark.long
@pytest.mark.slow
def test_a_network_that_cannot_be_seen_through_is_replicated(alone: dict[str, torch.Tensor], tmp_path: Path) -> None:
    source, notes = Source("test_train_workers:secretive"), Notes()
    kept = {"trusted": (source.factory,), "progress": notes}
    got = learned(tmp_path, table(), source, SETTINGS, workers=2, parallel=divided(), **kept)
    assert any("only replicas are possible" in line for line in notes.said)
    one = learned(tmp_path / "one", table(), source, SETTINGS, trusted=(source.factory,))
    assert close(got, one)
    with pytest.raises(ModelError, match="cannot trace the network"):
        learned(tmp_path / "cut", table(), source, SETTINGS, workers=2, parallel=divided("pipeline"), **kept)


class Secretive(nn.Module):
    """Looks at numbers, which the meta device does not have, but where it is exported."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if not torch.compiler.is_exporting() and x.sum().item() > 1e9 else x


def secretive() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), Secretive(), nn.Linear(8, 2))


@pytest.mark.slow
@pytest.mark.parametrize("compression", ["fp16", "powersgd"])
def test_compressed_gradients_train_nearly_the_same(
    compression: GradientCompression, alone: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    got = learned(tmp_path, table(), MLP, SETTINGS, workers=2, parallel=divided("data", compression=compression))
    far = {name: float((got[name] - alone[name]).abs().max()) for name in alone}
    assert 0 < max(far.values()) < 0.05


@pytest.mark.slow
def test_gradients_of_pictures_are_compressed_as_they_lie_in_memory(tmp_path: Path) -> None:
    """Convolutions keep their weights channels last, which a matrix of PowerSGD must heed."""
    settings = TrainSettings(epochs=5, batch=32, lr=5e-3)  # PowerSGD begins at the tenth step
    parallel, notes = divided("data", compression="powersgd"), Notes()
    learned(tmp_path, pictures(), PICTURES, settings, workers=2, parallel=parallel, progress=notes)
    assert float(notes.result.removeprefix("accuracy ")) > 0.9


class Tied(nn.Module):
    """Two convolutions with one weight, which lies channels-last in memory where that is faster."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.third = nn.Conv2d(16, 16, 3, padding=1)
        self.third.weight = self.second.weight
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.third(self.second(self.first(x).relu()).relu()).relu()
        out: torch.Tensor = self.head(features.amax((2, 3)))
        return out


def tied() -> nn.Module:
    return nn.Sequential(Mortal(), Tied())


@pytest.mark.long
@pytest.mark.slow
def test_a_weight_that_two_layers_share_is_in_the_checkpoint_of_two_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed, notes, source = tmp_path / "killed", Notes(), Source("test_train_workers:tied")
    monkeypatch.setenv(KILLS, f"1 4 {killed}")
    learned(
        tmp_path, pictures(), source, TrainSettings(epochs=2, batch=80, bf16=False), workers=2, progress=notes,
        parallel=divided("data"), trusted=(source.factory,), checkpoint_every_s=0.0,
    )  # fmt: skip
    assert killed.exists()
    assert any(note.startswith("resumed after step ") for note in notes.notes)


@pytest.mark.long
@pytest.mark.slow
def test_batch_normalisation_of_own_rows_alone_learns_too_and_says_so(tmp_path: Path) -> None:
    settings = TrainSettings(epochs=5, batch=32, lr=5e-3, bf16=False)
    whole, local = (divided("data", batch_norm=seen) for seen in ("whole", "local"))
    notes = Notes()
    one = learned(tmp_path / "local", pictures(), RESIDUAL, settings, workers=2, parallel=local, progress=notes)
    other = learned(tmp_path / "whole", pictures(), RESIDUAL, settings, workers=2, parallel=whole)
    assert float(notes.result.removeprefix("accuracy ")) > 0.9
    assert not close(one, other)
    assert not local.exact


def test_workers_that_meet_rarely_have_plans_of_replicas_only() -> None:
    with pytest.raises(PlanError, match="cannot be relaxed"):
        divided("model", relaxed=Relaxed(every=2))


def test_no_plan_fits_in_memory(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no plan fits in memory: the smallest needs"):
        learned(tmp_path, table(), MLP, SETTINGS, workers=2, parallel=divided(memory_bytes=100))


def in_torchrun(folder: str) -> None:
    """One of the workers of `dropped_out`; the first leaves the weights as a bundle does."""
    weights = dropped_out(Path(folder), SHARED["pipeline"], Notes())
    save_file(weights, Path(folder) / "weights.safetensors")


@pytest.mark.long
@pytest.mark.slow
def test_torchrun_on_two_machines(
    undisturbed: Callable[[str], tuple[dict[str, torch.Tensor], list[tuple[float, ...]]]],
    tmp_path: Path,
) -> None:
    """Two of torch's agents that know only where to meet, with a worker each and a shared disk; one is killed."""
    code = tmp_path / "run.py"
    code.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests' / 'train')!r}); import test_train_workers as t; "
        "t.in_torchrun(sys.argv[1])"
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", KILLS: f"1 12 {tmp_path / 'killed'}"}
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts",
             "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "x", "--local-addr",
             "127.0.0.1", str(code), str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment,
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        for agent in agents:
            said, _ = agent.communicate(timeout=200)
            assert agent.returncode == 0, said
    finally:
        for agent in agents:
            agent.terminate()  # it ends its worker, too
            agent.communicate()
    assert (tmp_path / "killed").exists()
    weights, curve = undisturbed("pipeline")
    assert same(load_file(tmp_path / "weights.safetensors"), weights)
    assert losses(tmp_path) == curve


@pytest.mark.slow
@pytest.mark.parametrize("batch", [32, 33])
def test_what_takes_no_part_and_statistics_of_its_own_are_as_with_one_worker(batch: int, tmp_path: Path) -> None:
    settings = TrainSettings(epochs=2, batch=batch, bf16=False, optimizer="adamw", weight_decay=0.1, ema=0.99)
    source = Source("test_train_workers:uneven")
    notes, trusted = Notes(), (source.factory,)
    one = learned(tmp_path / "one", table(), source, settings, trusted=trusted)
    two = learned(
        tmp_path / "two", table(), source, settings,
        trusted=trusted, workers=2, parallel=divided("data"), progress=notes,
    )  # fmt: skip
    assert close(one, two), {name: float((one[name] - two[name]).abs().max()) for name in one}
    torch.manual_seed(0)
    fresh = uneven().state_dict()
    assert torch.equal(one["spare.weight"], fresh["spare.weight"]), "what takes no part does not decay"
    assert torch.equal(two["frozen.running_mean"], fresh["frozen.running_mean"])
    assert any("training changes centre, steps" in line and "the mean over 2 workers" in line for line in notes.said)
