"""The article's script in Keras, and its service as it is usually written, in an environment with Keras."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bench.contest import Aim
from bench.environments import CannotInstall, python_of
from bench.servers import free_port, running
from bench.wire import answers, bare_request
from rushhour.load import endpoint

ROOT = Path(__file__).resolve().parents[2]
_PEER = ROOT / "benchmarks" / "peers" / "keras"
_SCRIPT = ROOT / "examples" / "article" / "train.py"
_NEEDED = ("fastapi", "h5py", "httptools", "keras", "uvicorn", "uvloop")


def keras_python(bench: Path) -> Path:
    """A Python with Keras on torch and FastAPI: this one if it has both, else one of its own.

    Raises:
        CannotInstall: if it cannot be made.
    """
    if all(importlib.util.find_spec(name) is not None for name in _NEEDED):
        return Path(sys.executable)
    python = python_of(_PEER, bench, engine=False)
    site = next(python.parent.parent.glob("lib/python*/site-packages"))
    (site / "ours.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")  # torch, behind its own packages
    return python


def write_pictures(folder: Path, pictures: NDArray[np.uint8], labels: Sequence[int], classes: Sequence[str]) -> None:
    """A folder of PNG, one folder for each class; grey pictures `(n, h, w, 1)` become RGB, as the script takes them."""
    for index, (pixels, label) in enumerate(zip(pictures, labels, strict=True)):
        file = folder / classes[label].replace("/", "-") / f"{index:06}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB").save(file)


def run_script(python: Path, photos: Path, out: Path, *, side: int, epochs: int, batch: int = 64) -> str:
    """Train by `examples/article/train.py`; what it printed.

    Raises:
        CannotInstall: if it fails; the message is its last line.
    """
    command = [str(python), str(_SCRIPT), str(photos.resolve()), "--out", str(out.resolve())]
    command += ["--side", str(side), "--epochs", str(epochs), "--batch", str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, env=_env(out.resolve().parent))
    if done.returncode:
        raise CannotInstall((done.stderr.strip().splitlines() or ["the script failed"])[-1][:300])
    return done.stdout


def write_models(python: Path, folder: Path, side: int) -> None:
    """The models of `bench.keras_models`.

    Raises:
        CannotInstall: if that fails.
    """
    command = [str(python), str(Path(__file__).with_name("keras_models.py")), str(folder.resolve()), str(side)]
    done = subprocess.run(command, capture_output=True, text=True, env=_env(folder.resolve()))
    if done.returncode:
        raise CannotInstall((done.stderr.strip().splitlines() or ["no models"])[-1][:300])


@contextlib.contextmanager
def keras_service(python: Path, model: Path, samples: NDArray[Any]) -> Iterator[Aim]:
    """FastAPI around `model.predict`, as a context.

    Args:
        python: of `keras_python`.
        model: a `.keras` file.
        samples: uint8 pictures `(k, h, w, 3)`, which the requests carry.

    Raises:
        DidNotStart: if the server does not start.
    """
    port = free_port()
    requests = [bare_request("/infer", sample) for sample in samples]
    cores = frozenset(os.sched_getaffinity(0))
    with TemporaryDirectory() as folder:
        env = _env(Path(folder)) | {"BENCH_MODEL": str(model.resolve()), "BENCH_PORT": str(port)}
        command, log = [str(python), str(_PEER / "server.py")], Path(folder) / "log"
        with running(command, env, port, cores, log, partial(answers, port, requests[0])):
            yield Aim(endpoint(f"http://127.0.0.1:{port}"), [request.http(port) for request in requests])


def _env(home: Path) -> dict[str, str]:
    """Of a child: Keras on torch, and where the packages of this process are."""
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    return {**kept, "LANG": "C.UTF-8", "HOME": str(home), "KERAS_BACKEND": "torch"}
