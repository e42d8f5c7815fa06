"""Workers that fail: an error of their own, a death by a signal, again and again, and what is said of it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_train import table
from test_train_loop import MLP, learned, with_extremes
from test_train_workers import SETTINGS, divided
from torch import nn

from rushhour.bundle import Source
from rushhour.errors import ModelError
from rushhour.train import Diverged, TrainSettings
from rushhour.train.parallel import launch, record_layers, record_step
from rushhour.train.parallel.position import Position, position_file, record_in


@pytest.mark.slow
def test_a_worker_s_error_is_said_as_one_worker_would(tmp_path: Path) -> None:
    dataset = with_extremes(table(200), [17, 60], 3e38)
    settings = TrainSettings(epochs=2, batch=40, bf16=False)
    said = []
    for workers in (1, 2):
        with pytest.raises(Diverged) as raised:
            learned(tmp_path / str(workers), dataset, MLP, settings, workers=workers)
        said.append(str(raised.value))
    assert said[0] == said[1]
    assert "of its 40 samples cause it" in said[0]


class Stumbles(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and dist.is_initialized():
            raise LookupError("no such thing")
        return x


def stumbles() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 2), Stumbles())


def test_workers_do_not_run_the_main_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script without `if __name__ == "__main__"` trained again in each worker, which Python then stopped."""
    (tmp_path / "script.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "__spec__", None)
    monkeypatch.setattr(main, "__file__", str(tmp_path / "script.py"), raising=False)
    assert launch(os.getcwd, 1) == [os.getcwd()]
    assert not (tmp_path / "ran").exists()
    assert main.__file__ == str(tmp_path / "script.py")


@pytest.mark.slow
def test_an_error_of_the_network_s_own_is_not_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = Source("test_worker_faults:stumbles")
    said = r"worker \d of 2 failed: LookupError: no such thing \(test_worker_faults.py, line \d+\)"
    with pytest.raises(ModelError, match=said):
        learned(tmp_path, table(), source, SETTINGS, workers=2, trusted=(source.factory,), parallel=divided("data"))
    assert "start again" not in caplog.text


def dies() -> nn.Module:
    """Only workers die of it: the process that starts them builds it too."""
    if multiprocessing.parent_process() is not None:
        os._exit(7)
    return nn.Linear(5, 2)


@pytest.mark.slow
def test_workers_that_die_again_and_again_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rushhour.train.parallel.workers._RESTARTS", 1)
    with pytest.raises(ModelError, match=r"a worker died 2 times: worker \d of 2 failed"):
        learned(
            tmp_path, table(), Source("test_worker_faults:dies"), SETTINGS, workers=2,
            trusted=("test_worker_faults:dies",),
        )  # fmt: skip


FATAL = "RUSHHOUR_TEST_FATAL"
"""SIGNAL PASSES FOLDER: worker 1 ends itself by the signal in the forward pass, from 0, that PASSES has for a start."""


class Fatal(nn.Module):
    """Answers with what it is given, and ends its worker by a signal."""

    def __init__(self) -> None:
        super().__init__()
        self._passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and FATAL in os.environ and dist.is_initialized() and dist.get_rank() == 1:
            number, passes, folder = os.environ[FATAL].split(" ", 2)
            starts = len(list(Path(folder).glob("died-*")))
            at = [int(one) for one in passes.split(",")]
            if starts < len(at) and self._passes == at[starts]:
                (Path(folder) / f"died-{starts}").touch()
                os.kill(os.getpid(), int(number))
            self._passes += 1
        return x


def fatal() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 16), Fatal(), nn.ReLU(inplace=True), nn.Linear(16, 2))


def fated(folder: Path, number: int, passes: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    monkeypatch.setenv(FATAL, f"{number} {passes} {folder}")
    source = Source("test_worker_faults:fatal")
    return learned(
        folder, table(), source, SETTINGS, workers=2, trusted=(source.factory,), parallel=divided("data")
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("number", [pytest.param(signal.SIGSEGV, marks=pytest.mark.slow), signal.SIGABRT])
def test_a_worker_that_dies_of_a_signal_at_the_same_step_is_not_started_a_third_time(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ModelError) as caught:
        fated(tmp_path, number, "3,3,3", monkeypatch)
    assert caught.value.what == f"worker 1 of 2 died of {number.name} twice at step 4, in Fatal '1', forward"
    assert "--no-channels-last" in caught.value.fix
    assert "--workers" in caught.value.fix
    assert caplog.text.count("start again") == 1
    assert f"worker 1 of 2 got {number.name} at step 4; all" in caplog.text


def stepping(folder: Path, number: int, steps: list[int]) -> int:
    """Worker 1 ends itself by the signal at the step that each start has; the starts before are returned."""
    starts = len(list(folder.glob("died-*")))
    if dist.get_rank() == 1:
        for step in range(1, 10):
            record_step(step)
            if starts < len(steps) and step == steps[starts]:
                (folder / f"died-{starts}").touch()
                os.kill(os.getpid(), number)
    dist.barrier()
    return starts


@pytest.mark.long
@pytest.mark.slow
def test_faults_at_other_steps_end_a_training_too(tmp_path: Path) -> None:
    """Corrupted memory shows at one step or another."""
    with pytest.raises(ModelError, match=r"worker 1 of 2 died of SIGSEGV at step 6, after others at 3, 5, 6: a native"):
        launch(stepping, 2, (tmp_path, int(signal.SIGSEGV), [3, 5, 6, 7]), restarts=5)


@pytest.mark.long
@pytest.mark.slow
def test_a_worker_that_is_killed_at_other_steps_is_started_again(tmp_path: Path) -> None:
    """As by the kernel when memory is short: that may pass."""
    assert launch(stepping, 2, (tmp_path, int(signal.SIGKILL), [3, 4, 5]), restarts=5) == [3, 3]


def test_the_layer_of_a_backward_pass_is_known(tmp_path: Path) -> None:
    with position_file(2) as file:
        position = Position(file, 1, layers=True)
        assert Position(file, 0).read() == position.read() == (None, "")
        record_in(position)
        try:
            seen = []
            network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 1))
            record_layers(network)
            record_step(7)
            out = network(torch.randn(2, 3))
            assert position.read() == (7, "Linear '2', forward")
            network[0].weight.register_hook(lambda _: seen.append(position.read()))
            out.sum().backward()
        finally:
            record_in(None)
        assert seen == [(7, "Linear '0', backward")]
        assert Position(file, 0).read() == (None, "")
