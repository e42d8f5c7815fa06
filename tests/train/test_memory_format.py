"""Channels-last where it is safe and faster: what is chosen, that choosing changes nothing, and that no heap breaks."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from test_train import Notes, pictures, table
from test_train_loop import StopAt, learned, same
from torch import Tensor, nn
from torch.nn import functional

from rushhour.bundle import Source
from rushhour.models import Deployed
from rushhour.testing.zoo import KNOWN_BAD, checker, environment, outcomes, specimen
from rushhour.train import TrainSettings
from rushhour.train.checkpoint import Checkpoint
from rushhour.train.memory_format import MemoryFormat, choose, guard

DATA = pictures()
BATCH = DATA.train.inputs[:32]


def deployed(*layers: nn.Module) -> Deployed:
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(4))
    made = Deployed(network, DATA.task, DATA.preprocessing)
    made.answer_shape(BATCH, "test")
    return made


class ChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)


class Function(nn.Module):
    """A convolution that no layer shows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight, stride=2)


class Unused(nn.Module):
    """Called in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x) if self.training else x
        return out


FIRST = (1, 4, 3)


@pytest.mark.parametrize(
    ("layers", "onednn"),
    [
        ([nn.Conv2d(1, 8, 1, stride=2)], True),
        ([nn.Conv2d(*FIRST), nn.Conv2d(4, 8, 1, stride=2)], True),
        ([nn.Conv2d(*FIRST), nn.Conv2d(4, 8, 1, stride=(1, 3), bias=False)], True),
        ([nn.Conv2d(1, 15, 3), nn.Conv2d(15, 64, 1, stride=2)], True),
        ([nn.Conv2d(1, 32, 3), nn.ConvTranspose2d(32, 8, 1, stride=2, output_padding=1)], True),
        ([nn.Conv2d(*FIRST), Function()], True),
        ([nn.Conv2d(*FIRST), ChannelsLast(), nn.Conv2d(4, 8, 1, stride=2)], False),
        ([nn.Conv2d(*FIRST), ChannelsLast(), Function()], False),
        ([nn.Conv2d(*FIRST), Unused()], False),
    ],
)  # fmt: skip
def test_where_channels_last_corrupts_memory_it_is_not_chosen(layers: list[nn.Module], onednn: bool) -> None:
    form = choose(deployed(*layers), BATCH, bf16=False, steps=10_000)
    assert (form.channels_last, form.onednn) == (False, onednn)
    assert "oneDNN#6035" in form.why
    assert str(form).startswith("contiguous: " if onednn else "without oneDNN: ")


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(*FIRST), nn.Conv2d(4, 8, 3, stride=2)],
        [nn.Conv2d(*FIRST), nn.Conv2d(4, 8, 1)],
        [nn.Conv2d(*FIRST), nn.Conv2d(4, 8, 1, stride=2, groups=2)],
        [nn.Conv2d(1, 16, 3), nn.Conv2d(16, 4, 1, stride=2)],
        [nn.Conv2d(1, 4, 3), nn.ConvTranspose2d(4, 16, 1, stride=2)],
    ],
)  # fmt: skip
def test_safe_networks_stay_channels_last(layers: list[nn.Module]) -> None:
    assert guard(deployed(*layers), BATCH) is None
    assert choose(deployed(*layers), BATCH, bf16=False, steps=10) == MemoryFormat(channels_last=True)


def test_signals_are_guarded_too() -> None:
    class Turned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.transpose(1, 2)

    data = table()
    samples = np.zeros((8, 16, 4), dtype=np.float32)
    network = nn.Sequential(Turned(), nn.Conv1d(4, 8, 1, stride=2), nn.Flatten())
    form = choose(Deployed(network, data.task, data.preprocessing), samples, bf16=False, steps=10)
    assert (form.channels_last, form.onednn) == (False, False)
    straight = Deployed(nn.Sequential(nn.Conv1d(16, 8, 3), nn.Flatten()), data.task, data.preprocessing)
    assert choose(straight, samples, bf16=False, steps=10_000) == MemoryFormat(channels_last=False)


def test_contiguous_means_the_strides_of_one_channel_and_of_small_kernels_too() -> None:
    """`is_contiguous` is true of both, and torch takes them for channels-last."""
    network = nn.Sequential(nn.Conv2d(1, 8, 1, stride=2)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    made = Deployed(network, DATA.task, DATA.preprocessing)
    MemoryFormat(channels_last=False).apply(made)
    assert network[0].weight.stride() == (1, 1, 1, 1)
    assert made.preprocess(torch.from_numpy(BATCH)).stride() == (256, 256, 16, 1)
    MemoryFormat(channels_last=True).apply(made)
    assert made.preprocess(torch.from_numpy(BATCH)).stride() == (256, 1, 16, 1)


def test_trial_steps_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made = deployed(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.Dropout(0.5), nn.Conv2d(16, 16, 3))
    made.train()
    before, generator = copy.deepcopy(made.state_dict()), torch.get_rng_state()
    form = choose(made, BATCH, bf16=False, steps=10_000)
    assert "in trial steps" in form.why
    assert same(made.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(module.training for module in made.modules())
    assert all(parameter.grad is None for parameter in made.parameters())


@pytest.mark.parametrize(
    ("gain", "channels_last", "why"),
    [
        (1.4, True, "1.4x as fast as contiguous in trial steps"),
        (0.95, True, "0.9x as fast as contiguous in trial steps"),
        (0.5, False, "2.0x faster in trial steps"),
        (None, True, ""),
    ],
)
def test_the_faster_format_is_taken_if_it_is_clearly_faster(
    gain: float | None, channels_last: bool, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rushhour.train.memory_format._gain", lambda *_, **__: gain)
    made = deployed(nn.Conv2d(1, 16, 3))
    assert choose(made, BATCH, bf16=False, steps=10_000) == MemoryFormat(channels_last, why=why)
    assert choose(made, BATCH, bf16=False, steps=10) == MemoryFormat(True), "too few steps to try"
    kept = msgspec.to_builtins(MemoryFormat(not channels_last, why="kept"))
    assert choose(made, BATCH, bf16=False, steps=10_000, kept=kept).why == "kept"
    forced = choose(made, BATCH, bf16=False, steps=10_000, kept=kept, allowed=False)
    assert forced == MemoryFormat(False, why="asked for")


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


CONVOLUTIONAL = Source("test_memory_format:convolutional")


def test_a_resumed_training_keeps_what_it_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, trusted = TrainSettings(epochs=2, batch=32, bf16=False), (CONVOLUTIONAL.factory,)
    monkeypatch.setattr("rushhour.train.memory_format._LEAST_STEPS", 1)
    monkeypatch.setattr("rushhour.train.memory_format._gain", lambda *_, **__: 0.5)
    alone = learned(tmp_path / "alone", DATA, CONVOLUTIONAL, settings, trusted=trusted)
    with pytest.raises(KeyboardInterrupt):
        learned(
            tmp_path / "a", DATA, CONVOLUTIONAL, settings,
            trusted=trusted, progress=StopAt(7), checkpoint_every_s=0.0,
        )  # fmt: skip
    monkeypatch.setattr("rushhour.train.memory_format._gain", lambda *_, **__: 2.0)
    notes = Notes()
    resumed = learned(tmp_path / "a", DATA, CONVOLUTIONAL, settings, trusted=trusted, progress=notes)
    assert notes.said[1] == "contiguous: 2.0x faster in trial steps"
    assert same(resumed, alone)
    (file,) = (tmp_path / "a" / "work").glob("*.safetensors")
    noted = Checkpoint(file.parent, "")
    assert noted.notes() == {}, "of another training"


def test_no_channels_last_is_the_same_training(tmp_path: Path) -> None:
    trusted = (CONVOLUTIONAL.factory,)
    with pytest.raises(KeyboardInterrupt):
        learned(
            tmp_path, DATA, CONVOLUTIONAL, TrainSettings(epochs=1, batch=32),
            trusted=trusted, progress=StopAt(5), checkpoint_every_s=0.0,
        )  # fmt: skip
    notes = Notes()
    learned(
        tmp_path, DATA, CONVOLUTIONAL, TrainSettings(epochs=1, batch=32, channels_last=False),
        trusted=trusted, progress=notes,
    )  # fmt: skip
    assert notes.said[1] == "contiguous: asked for"
    assert notes.notes[0] == "resumed after step 4"


def bad() -> nn.Module:
    """Of the kind that corrupts memory, beside batch normalisation and a strided shortcut."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 1, stride=2, bias=False),
        nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.long)])
def test_training_what_corrupted_memory(workers: int, tmp_path: Path) -> None:
    """Died of a signal before, or hung, where there is AVX2 and no more."""
    code = (
        "import sys, pathlib; sys.path.insert(0, 'tests/train'); import test_memory_format as t; notes = t.Notes()\n"
        "if __name__ == '__main__':\n"
        "  t.learned(pathlib.Path(sys.argv[1]), t.DATA, t.Source('test_memory_format:bad'),"
        " t.TrainSettings(epochs=2, batch=30), trusted=('test_memory_format:bad',), progress=notes,"
        " workers=int(sys.argv[2]))\n"
        "  print(notes.said[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(workers)], cwd=Path(__file__).parents[2],
        env=environment("avx2"), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("contiguous: Conv2d '3' is 1x1, stride 2, 4 channels"), done.stdout
    assert "start again" not in done.stderr


@pytest.mark.slow
def test_a_slice_of_the_zoo() -> None:
    ended = list(outcomes(range(12), ("rushhour",), "avx2", known=True))
    assert [one.ended for one in ended] == ["well"] * 12


@pytest.mark.slow
def test_the_zoo_sees_what_is_wrong() -> None:
    """The known bad network, forced."""
    if checker() is None or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("the heap cannot be checked, or there is no AVX2")
    (one,) = outcomes([0], ("channels-last",), "avx2", known=True)
    assert one.corrupted, "if torch's oneDNN is mended, the guard may go"


def test_specimens_repeat() -> None:
    assert specimen(3) == specimen(3)
    assert any(specimen(seed).signals for seed in range(30))
    assert KNOWN_BAD.layers[0].kernel == 1
