"""Training on two machines that share a cable and a disk, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_train import Notes
from test_train_workers import ROOT, divided, dropped_out, losses

from rushhour.errors import ModelError
from rushhour.testing.namespaces import CannotSeparate, torchrun, two_machines
from rushhour.train.parallel import launch
from rushhour.train.parallel.interface import VARIABLE, choose_interface, interface_to


def in_namespace(folder: str) -> None:
    """One of the two workers."""
    dropped_out(Path(folder), divided("data"), Notes())


@pytest.mark.slow
def test_torchrun_in_two_network_namespaces_trains_to_the_losses_of_one_machine(tmp_path: Path) -> None:
    """Each has its own addresses, a host name that resolves to nothing, and processes that the other cannot see.

    Gloo took the loopback address, and no worker could connect.
    """
    one, two, code = tmp_path / "one", tmp_path / "two", tmp_path / "run.py"
    dropped_out(one, divided("data"), Notes())
    code.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests' / 'train')!r}); import test_two_machines as t; "
        "t.in_namespace(sys.argv[1])"
    )
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE} | {"OMP_NUM_THREADS": "1"}
    try:
        with two_machines() as machines:
            agents = [
                subprocess.Popen(
                    machines.command(each, sys.executable, *torchrun(each, str(code), str(two))),
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment,
                )
                for each in range(2)
            ]  # fmt: skip
            try:
                for agent in agents:
                    said, _ = agent.communicate(timeout=200)
                    assert agent.returncode == 0, said
            finally:
                for agent in agents:
                    agent.kill()
                    agent.communicate()
    except CannotSeparate as error:
        pytest.skip(f"no network namespaces: {error}")
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)


def test_the_interface_is_that_of_the_way_to_the_other_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert interface_to("127.0.0.1", 29400) is None  # gloo's own choice is as good
    assert interface_to("no such host.invalid", 29400) is None
    monkeypatch.setenv(VARIABLE, "chosen")
    choose_interface("gloo", "127.0.0.1", 29400)
    assert os.environ[VARIABLE] == "chosen"


@pytest.mark.slow
def test_workers_that_cannot_connect_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """They said that Rushhour does not expect it."""
    monkeypatch.setenv(VARIABLE, "absent0")
    with pytest.raises(ModelError, match=f"cannot connect to the others over gloo.*set {VARIABLE} to the interface"):
        launch(os.getcwd, 2)
