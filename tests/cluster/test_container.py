"""The container without Docker: its install script, its command, its user, on exactly its requirements."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plans import MODEL, run_of
from wheelhouse import wheels_of

import rushhour
from rushhour.plan import Policy
from rushhour.testing.bundles import tiny_answers

ROOT = "/opt/rushhour"
USER = 10001


def dockerfile(context: Path) -> tuple[dict[str, str], list[str], list[str]]:
    """Of the last stage: its variables, the health check, and the command."""
    text = (context / "Dockerfile").read_text()
    variables = dict(re.findall(r"^ENV (\w+)=(.*)$", text, re.MULTILINE))
    (health,) = re.findall(r"^    CMD (.*)$", text, re.MULTILINE)
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)
    return variables, json.loads(health), json.loads(entry)


def built(context: Path, place: Path) -> None:
    """What `docker build` does with the context, below `place` instead of /opt/rushhour, and without a network."""
    house = wheels_of((context / "requirements.txt").read_text().split(), context.parent / "wheelhouse")
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(house),
    }
    subprocess.run(["sh", str(context / "install.sh"), str(place / "packages")], check=True, env=environment)
    shutil.copytree(context / "run", place / "run")


@contextlib.contextmanager
def started(python: Path, context: Path, place: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """The image's command, as a user that may write nothing: another one where the test runs as root."""
    variables, _, command = dockerfile(context)
    words = [word.replace(ROOT, str(place)) for word in command]
    environment = {name: value.replace(ROOT, str(place)) for name, value in variables.items()}
    who: dict[str, Any] = {"user": USER, "group": USER, "extra_groups": ()} if os.geteuid() == 0 else {}
    process = subprocess.Popen(
        [python, *words[1:], *options],
        cwd="/",
        env={"PATH": "/usr/bin:/bin", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **who,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def shared() -> Iterator[Path]:
    """A folder that every user may enter: pytest closes its own, also those of other runs."""
    with tempfile.TemporaryDirectory(prefix="rushhour-container-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def python(shared: Path) -> Path:
    """An interpreter without packages that every user may run, as the image has one: a copy of this one's."""
    place, library = shared / "python", Path(sysconfig.get_path("stdlib"))
    shutil.copytree(
        library,
        place / library.relative_to(sys.base_prefix),
        ignore=shutil.ignore_patterns("site-packages", "dist-packages", "test", "idlelib", "__pycache__", "config-*"),
        ignore_dangling_symlinks=True,
    )
    for library in Path(sys.base_prefix, "lib").glob("libpython*.so*"):
        shutil.copy(library, place / "lib")
    (place / "bin").mkdir()
    real = shutil.copy(os.path.realpath(sys.executable), place / "bin" / "python3")
    (place / "bin" / "python").write_text(f'#!/bin/sh\nLD_LIBRARY_PATH={place / "lib"} exec {real} "$@"\n')
    (place / "bin" / "python").chmod(0o755)
    return place / "bin" / "python"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def ask(port: int, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def until_ready(process: subprocess.Popen[str], port: int) -> None:
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if ask(port, "/v2/health/ready")[0] == 200:
                return
        time.sleep(0.02)
    process.kill()
    raise AssertionError(process.communicate())


def modules_of(process: subprocess.Popen[str]) -> str:
    """What the process has mapped: extension modules of packages name them."""
    return Path(f"/proc/{process.pid}/maps").read_text()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_container_serves_on_exactly_its_requirements(
    tmp_path: Path, shared: Path, python: Path, engine: str
) -> None:
    policy = Policy(streams=2, max_batch=8)  # without a deadline: a busy machine sheds nothing
    run, port = run_of(tmp_path / "runs" / "parts", policy=policy, engine=engine), free_port()
    context, place = tmp_path / "image", shared / engine
    rushhour.export(run, docker=context, port=port, memory=2**30)
    place.mkdir()
    built(context, place)
    shutil.rmtree(tmp_path / "runs")  # the container has all that it needs
    _, health, _ = dockerfile(context)
    with started(python, context, place, "--drain-delay=1s") as process:
        until_ready(process, port)
        images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 1), dtype=np.uint8)
        tensor = {"name": "image", "shape": [2, 4, 4, 1], "datatype": "UINT8", "data": images.ravel().tolist()}
        status, answer = ask(port, f"/v2/models/{MODEL}/infer", json.dumps({"inputs": [tensor]}).encode())
        assert status == 200
        got = np.array(json.loads(answer)["outputs"][0]["data"], np.float32).reshape(2, 3)
        np.testing.assert_allclose(got, tiny_answers(images, seed=0), atol=1e-2)
        assert subprocess.run([python, *health[1:]], timeout=30).returncode == 0
        mapped = modules_of(process)
        assert str(place / "packages" / engine) in mapped
        assert "torch" not in mapped
        assert "site-packages" not in mapped
        status, metrics = ask(port, "/metrics")
        assert status == 200
        assert b"rushhour_ready 1.0" in metrics
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 10
        while ask(port, "/v2/health/ready")[0] == 200:  # the delay: it still answers, and is not ready
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert ask(port, f"/v2/models/{MODEL}/infer", json.dumps({"inputs": [tensor]}).encode())[0] == 200
        assert process.wait(30) == 0
    written = [path for path in place.rglob("*") if path.stat().st_uid == USER]
    assert not written
