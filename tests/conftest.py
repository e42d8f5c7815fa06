"""What several test files need: a served bundle in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import msgspec
import pytest

from rushhour.bundle import Bundle
from rushhour.serve import ServeSettings
from rushhour.testing.bundles import tiny_bundle

# Torch's threads would spin while they wait for each other, on cores that other tests need. Processes inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# What was trained here is noted there; a person's own notes are left alone.
_STATE = tempfile.TemporaryDirectory(prefix="rushhour-state-")
os.environ["XDG_STATE_HOME"] = _STATE.name


@pytest.fixture(autouse=True)
def first_run_on_this_machine() -> None:
    """No test begins with what a tuning run of an earlier one measured."""
    for file in Path(_STATE.name).glob("rushhour/tuning-*.json"):
        file.unlink()


# How long an example takes is the machine's affair. The examples are the same each time, so that a change is judged by
# what it changed; new ones are tried by `make test-random`, and what fails there becomes a test of its own.
hypothesis.settings.register_profile("rushhour", deadline=None, derandomize=True)
hypothesis.settings.register_profile("random", deadline=None, derandomize=False, max_examples=1000)
hypothesis.settings.load_profile("rushhour")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Three processes for all tests: two cores wait in a quarter of the time that two would take.

    Tests that are named run in this one, where a debugger reaches them.
    """
    return 3 if config.args_source is pytest.Config.ArgsSource.TESTPATHS else 0


class Server:
    """A running `python -m rushhour.serve`."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, grpc: str = "") -> None:
        self.process = process
        self.url = url
        self.grpc = grpc
        host, port = url.partition("://")[2].split(":")
        self.address = (host, int(port))


@contextlib.contextmanager
def serving(target: Path, settings: ServeSettings | None = None) -> Iterator[Server]:
    settings = settings or ServeSettings(http_port=0)
    process = subprocess.Popen(
        [sys.executable, "-m", "rushhour.serve", str(target), msgspec.json.encode(settings).decode()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        assert said["url"], said["error"]
        yield Server(process, said["url"], said["grpc"])
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="module")
def server(tiny: Bundle) -> Iterator[Server]:
    with serving(tiny.path) as running:
        yield running
