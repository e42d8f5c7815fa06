"""The matrix of networks: each one of the gallery in training, a resume, two workers, export, pruning, int8, serving.

A cell of the matrix is `works`, or the message that refused it before any work. Anything else is a fault.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Collection
from contextlib import closing
from pathlib import Path
from typing import Literal, get_args

import msgspec
import numpy as np
import torch
from safetensors.torch import load_file

from rushhour.bundle import Bundle, columns_of
from rushhour.compress import Prune, Recipe, Store, apply, quantize
from rushhour.data.dataset import Dataset
from rushhour.errors import RushhourError
from rushhour.models import load_deployed, tensors_of
from rushhour.progress import Progress, Silent
from rushhour.serve import ServeSettings
from rushhour.testing.gallery import Specimen, data, specimen
from rushhour.testing.networks import ANY, distance
from rushhour.train import ParallelSettings, TrainingJob, TrainSettings, train

Cell = Literal["train", "resume", "2 workers", "export", "prune", "int8", "serve"]
"""Two epochs; the same, killed and resumed; on two workers; the graph compared with torch; 30% of the channels pruned;
quantised; one request to a real server."""
CELLS: tuple[Cell, ...] = get_args(Cell)
WORKS = "works"
FAULT = "FAULT"
"""The beginning of a cell that is neither."""

_SETTINGS = TrainSettings(epochs=2, batch=24, lr=0.02, optimizer="sgd", schedule="constant", bf16=False)
_DIES_AT = 4
_APART = 1e-3
"""Of weights after a training on two workers, relative: more than rounding."""
_START_S, _ANSWER_S = 60.0, 30.0


def cells(one: Specimen, folder: Path, only: Collection[Cell] = CELLS) -> dict[Cell, str]:
    """One row of the matrix.

    Args:
        one: the network.
        folder: for its bundles; empty.
        only: these cells; `train` is always among them.

    Returns:
        Cell -> `WORKS`, the message of a refusal, or `FAULT` and what happened.
    """
    dataset = data(one.data)
    trained: list[Bundle] = []
    outcomes: dict[Cell, str] = {"train": _tried(lambda: trained.append(_train(one, dataset, folder / "train")))}
    if not trained:
        return {cell: outcomes["train"] for cell in CELLS if cell in only or cell == "train"}
    (bundle,) = trained
    work: dict[Cell, Callable[[], str | None]] = {
        "resume": lambda: _resume(one, dataset, folder / "resume", bundle),
        "2 workers": lambda: _on_two(one, dataset, folder / "two", bundle),
        "export": lambda: _export(bundle, dataset),
        "prune": lambda: _prune(one, bundle, dataset, folder / "store"),
        "int8": lambda: _int8(bundle, dataset, folder / "int8"),
        "serve": lambda: _serve(bundle),
    }
    return outcomes | {cell: _tried(work[cell]) for cell in CELLS if cell in only and cell in work}


def is_fault(outcome: str) -> bool:
    """Whether a cell has neither a result nor a refusal."""
    return outcome.startswith(FAULT)


def _tried(work: Callable[[], str | None]) -> str:
    try:
        wrong = work()
    except RushhourError as error:
        return str(error)
    except Exception as error:  # this is the fault that the matrix looks for
        return f"{FAULT} {type(error).__name__}: {error} ({traceback.extract_tb(error.__traceback__)[-1]})"
    return WORKS if wrong is None else f"{FAULT} {wrong}"


class _Notes:
    """Progress that keeps its notes, and kills its own process at a step."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.notes: list[str] = []
        self._dies_at, self._steps = dies_at, 0.0

    def start(self, what: str, total: float | None = None) -> None:
        """As `Progress.start`."""

    def advance(self, by: float = 1.0, note: str = "") -> None:
        """As `Progress.advance`."""
        self._steps += by
        if self._dies_at is not None and self._steps >= self._dies_at:
            signal.raise_signal(signal.SIGKILL)

    def done(self, note: str = "", *, good: bool = True) -> None:
        """As `Progress.done`."""
        self.notes.append(note)

    def limit(self, seconds: float) -> None:
        """As `Progress.limit`."""

    def note(self, text: str) -> None:
        """Not kept."""


def _train(one: Specimen, dataset: Dataset, folder: Path, progress: Progress | None = None, workers: int = 1) -> Bundle:
    job = TrainingJob(
        one.source,
        _SETTINGS,
        folder / "work",
        trusted=(one.source.factory,),
        checkpoint_every_s=0.0,
        workers=workers,
        parallel=ParallelSettings(mode="data", constants=ANY),
    )
    return train(dataset, job, out=folder / "bundle", progress=progress or Silent())


def _resume(one: Specimen, dataset: Dataset, folder: Path, whole: Bundle) -> str | None:
    died = subprocess.run(
        [sys.executable, "-m", __name__, one.name, str(folder)], capture_output=True, text=True, check=False
    )
    if died.returncode != -signal.SIGKILL:
        return f"it ended before the kill: {died.stderr.strip().splitlines()[-1:]}"
    again = _train(one, dataset, folder)
    return None if again.manifest.hash == whole.manifest.hash else "after a resume its bundle differs"


def _on_two(one: Specimen, dataset: Dataset, folder: Path, alone: Bundle) -> str | None:
    progress = _Notes()
    two = _train(one, dataset, folder, progress, workers=2)
    assert alone.weights is not None
    assert two.weights is not None
    apart = distance(load_file(alone.weights), load_file(two.weights))
    is_noted = any("workers" in note or "worker draws" in note for note in progress.notes)
    if apart <= _APART or one.random or is_noted:
        return None
    return f"on two workers the weights differ by {apart:.1g}, without a note"


def _export(bundle: Bundle, dataset: Dataset) -> str | None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(bundle.model, options, providers=["CPUExecutionProvider"])
    names = [spec.name for spec in bundle.manifest.signature.inputs]
    deployed = load_deployed(bundle, () if bundle.manifest.source is None else (bundle.manifest.source.factory,))
    for size in (1, 5, len(dataset.test)):
        samples = dataset.test.inputs[:size]
        (answer,) = session.run(None, dict(zip(names, columns_of(samples), strict=True)))
        with torch.no_grad():
            expected = deployed(*tensors_of(samples)).numpy()
        if not np.allclose(answer, expected, atol=1e-3):
            return f"the graph's answers differ from torch's at batch {size}"
    return None


def _prune(one: Specimen, bundle: Bundle, dataset: Dataset, store: Path) -> str | None:
    recipe = Recipe((Prune(ratio=0.3, round_to=1, epochs=1),))
    *_, last = apply(recipe, bundle, dataset, Store(store), progress=Silent(), trusted=(one.source.factory,))
    return None if last.manifest.parameters < bundle.manifest.parameters else "nothing was pruned, without a message"


def _int8(bundle: Bundle, dataset: Dataset, out: Path) -> str | None:
    quantize(bundle, dataset, out, calibration=32, progress=Silent())
    return None


def _serve(bundle: Bundle) -> str | None:
    settings = msgspec.json.encode(ServeSettings(http_port=0, grpc_port=None)).decode()
    command = [sys.executable, "-m", "rushhour.serve", str(bundle.path), settings]
    popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    with popen as server, contextlib.ExitStack() as stack:
        try:
            assert server.stdout is not None
            started = json.loads(server.stdout.readline())
            if not started["url"]:
                return f"the server does not start: {started['error']}"
            host = started["url"].partition("://")[2]
            connection = stack.enter_context(closing(http.client.HTTPConnection(host, timeout=_ANSWER_S)))
            samples, model = bundle.samples(), bundle.manifest.name
            tensors = [
                {
                    "name": spec.name,
                    "shape": [1, *spec.shape],
                    "datatype": {"uint8": "UINT8", "float32": "FP32"}[spec.dtype],
                    "data": samples[spec.name][:1].ravel().tolist(),
                }
                for spec in bundle.manifest.signature.inputs
            ]
            connection.request("POST", f"/v2/models/{model}/infer", json.dumps({"inputs": tensors}))
            answer = connection.getresponse()
            body = json.loads(answer.read())
            if answer.status != 200:
                return f"the server answers {answer.status}: {body}"
            recorded = bundle.answers()
            assert recorded is not None
            (expected,) = recorded.values()
            if not np.allclose(body["outputs"][0]["data"], expected[0], atol=0.02):
                return "the server's answer differs from the one in the bundle"
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                server.kill()


def _die(name: str, folder: str) -> None:
    one = specimen(name)
    _train(one, data(one.data), Path(folder), _Notes(_DIES_AT))


if __name__ == "__main__":
    _die(*sys.argv[1:])
