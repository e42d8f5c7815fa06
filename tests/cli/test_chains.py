"""What each verb makes, given to every verb that takes a bundle or a run: taken, or refused in one line."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner, Result
from test_tune import Load, loaded_by
from torch import nn

from rushhour.api.traffic import Traffic
from rushhour.bundle import Bundle
from rushhour.cli import cli
from rushhour.compress import Ratio, Recipe, Speed, Store, apply
from rushhour.data import load
from rushhour.engines import open_engine
from rushhour.engines.openvino import computes_bf16
from rushhour.errors import RushhourError
from rushhour.load import Interface, Target, poisson
from rushhour.measurement import Measurement, pack_latencies
from rushhour.plan import SO_FAR, Plan
from rushhour.progress import Silent
from rushhour.serve import open_target
from rushhour.tune.racing import Racing

FACTORY = "test_chains:small"


def small() -> nn.Module:
    """A network of the user's own, with one layer that holds most of it."""
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 48), nn.ReLU(), nn.Linear(48, 4))


VERBS = ("train", "compress", "tune", "serve", "load", "report")

TAKEN: dict[str, str] = {
    "trained": "compress tune serve load report",
    "trained by two": "compress tune serve load report",
    "trained/training": "report",
    "trained by two/training": "report",
    "trained/checkpoints": "",
    "compressed": "compress tune serve load report",
    "compressed/steps": "report",
    "compressed/steps, interrupted": "",
    "pruned": "compress tune serve load",
    "low rank": "compress tune serve load",
    "distilled": "compress tune serve load",
    "int8": "tune serve load",
    "bf16": "compress tune serve load",
    "f16": "tune serve load",
    "w8": "tune serve load",
    "run": "serve load report",
    "run/plan": "serve load report",
    "run/reference": "compress tune serve load",
    "run/int8": "tune serve load",
    "run, interrupted": "serve load report",
    "run, nothing found yet": "load",
    "an empty folder": "",
    "no such path": "",
}
"""Output -> the verbs that take it. All others say in one line why not."""


def faster(parent: Any, children: Any) -> dict[str, Speed]:
    ratio = Ratio(2.0, 1.9, 2.1, 6)
    return dict.fromkeys(children, Speed(ratio, ratio, 1, 1, 2.0, 1.0, 1.0, 2.0))


class Reported(Load):
    """Load whose windows can be drawn."""

    def measure(self, *of: Any, **asked: Any) -> Measurement:
        latencies = pack_latencies(np.full(100, 0.005))
        return msgspec.structs.replace(super().measure(*of, **asked), latencies=latencies)


def invoke(*words: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words])


@pytest.fixture(scope="module")
def patched() -> Iterator[pytest.MonkeyPatch]:
    """Speed and load are numbers, so that a chain takes a moment; all else is real."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["rushhour.compress.compress"], "_bench", faster)
        patch.setattr(sys.modules["rushhour.compress.weights"], "_SMALL", 1)
        with loaded_by(Reported(), patch) as loaded:
            yield loaded


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, patched: pytest.MonkeyPatch) -> dict[str, Path]:
    """Every output, made by the verbs themselves."""
    at = tmp_path_factory.mktemp("chains")
    random = np.random.default_rng(0)
    labels = np.arange(400, dtype=np.int64) % 4
    inputs = random.integers(0, 120, (400, 6, 6, 1), dtype=np.uint8)
    for picture, label in zip(inputs, labels, strict=True):
        picture[3 * (label // 2) : 3 * (label // 2) + 3, 3 * (label % 2) : 3 * (label % 2) + 3] += 100
    np.savez(at / "d.npz", x=inputs, y=labels)
    done = invoke("train", FACTORY, "--data", at / "d.npz", "--epochs", "2", "--batch", "32", "--out", at / "trained")
    assert done.exit_code == 0, done.exception
    paths = {"trained": at / "trained", "trained/training": at / "trained-training"}
    # as two workers leave it, which only start slowly: beside the curves lies how they shared the work
    paths["trained by two"] = Path(shutil.copytree(at / "trained", at / "two"))
    paths["trained by two/training"] = Path(shutil.copytree(at / "trained-training", at / "two-training"))
    for name in ("workers.json", "plan.json"):  # older versions called it so
        (at / "two-training" / name).write_text(json.dumps({"workers": 2, "mode": "data"}))
    paths["trained/checkpoints"] = at / ".killed.checkpoints"
    (at / ".killed.checkpoints").mkdir()
    (at / ".killed.checkpoints" / "train-0123.safetensors").write_bytes(b"")
    recipe = "prune:0.3:epochs=1:round_to=4,lowrank:0.5,distil:1,int8:20"
    done = invoke("compress", at / "trained", "--data", at / "d.npz", "--recipe", recipe, "--max-accuracy-drop",
                  "100%", "--trust", FACTORY, "--out", at / "small")  # fmt: skip
    assert done.exit_code == 0, (done.output, done.exception)
    paths |= {"compressed": at / "small", "compressed/steps": at / "small-steps"}
    steps = json.loads((at / "small-steps" / "compression.json").read_text())["attempts"][0]["stages"]
    assert len(steps) == 4
    for name, step in zip(("pruned", "low rank", "distilled", "int8"), steps, strict=True):
        paths[name] = Path(step["bundle"])
    paths["compressed/steps, interrupted"] = Path(shutil.copytree(at / "small-steps", at / "killed-steps"))
    (at / "killed-steps" / "compression.json").unlink()
    trained, data = Bundle.open(at / "trained"), load(str(at / "d.npz"))
    for form in ("bf16", "f16", "w8"):
        (bundle,) = apply(Recipe.parse(form), trained, data, Store(at / "forms"), progress=Silent())
        paths[form] = bundle.path
    done = invoke("tune", at / "trained", "--data", at / "d.npz", "--max-accuracy-drop", "10%", "--out", at / "run")
    assert done.exit_code == 0, (done.output, done.exception)
    paths |= {"run": at / "run", "run/plan": at / "run" / "plan.json"}
    paths |= {f"run/{name}": at / "run" / "bundles" / name for name in ("reference", "int8")}
    paths["run, interrupted"] = Path(shutil.copytree(at / "run", at / "killed-run"))
    (at / "killed-run" / "plan.json").rename(at / "killed-run" / SO_FAR)
    paths["run, nothing found yet"] = Path(shutil.copytree(at / "run", at / "young-run"))
    (at / "young-run" / "plan.json").unlink()
    paths |= {"an empty folder": at / "nothing", "no such path": at / "nowhere"}
    (at / "nothing").mkdir()
    assert paths.keys() == TAKEN.keys()
    return {**paths, "data": at / "d.npz"}


def train(path: Path, data: Path, out: Path) -> None:
    _checked(invoke("train", path, "--data", data, "--epochs", "1", "--out", out))


def compress(path: Path, data: Path, out: Path) -> None:
    _checked(invoke("compress", path, "--data", data, "--recipe", "f16", "--max-accuracy-drop", "10%", "--out", out))


def tune(path: Path, data: Path, out: Path) -> None:
    _checked(invoke("tune", path, "--data", data, "--max-accuracy-drop", "10%", "--out", out))


def serve(path: Path, _: Path, __: Path) -> None:
    """As `rushhour serve` begins: what it will answer with, and whether that runs here."""
    target = open_target(path)
    way = next(iter(target.variants(1)))
    if way.config.precision == "bf16":
        pytest.skip("not every machine computes in bf16")
    open_engine(way.bundle, way.config).close()


def load_with(path: Path, _: Path, __: Path) -> None:
    """As `rushhour load --payloads PATH` begins."""
    traffic = Traffic(poisson, 0, payloads=path)
    signature = Bundle.open(path.parent / "trained").manifest.signature if (path.parent / "trained").exists() else None
    target = Target("http://virtual", "virtual", 1, "", "m", Interface.of(signature or _SIGNATURE["of"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["rushhour.api.traffic"], "discover", lambda *_: target)
        _, requests = traffic.aim("http://virtual")
    assert requests


def report(path: Path, _: Path, __: Path) -> None:
    _checked(invoke("report", path))


_SIGNATURE: dict[str, Any] = {}
_HOW: dict[str, Callable[[Path, Path, Path], None]] = {
    "train": train, "compress": compress, "tune": tune, "serve": serve, "load": load_with, "report": report,
}  # fmt: skip


def _checked(result: Result) -> None:
    """An honest "no" is an answer too."""
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in (0, 1), result.output


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("output", TAKEN)
def test_every_output_is_taken_or_refused_in_one_line(
    output: str, verb: str, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _SIGNATURE["of"] = Bundle.open(made["trained"]).manifest.signature
    alike = {"tune": ("trained", "int8"), "compress": ("trained", "pruned", "bf16")}
    if verb in TAKEN[output].split() and output not in alike.get(verb, TAKEN):
        pytest.skip("a bundle like one that is tried; test_tune has the others")
    if (output, verb) == ("bf16", "compress") and not computes_bf16():
        pytest.skip("not every machine computes in bf16")
    if verb == "tune":
        monkeypatch.setattr(sys.modules["rushhour.tune.run"], "quantize_for_all", lambda *_, **__: {})
        monkeypatch.setattr(Racing, "ranked", _best_of_layouts)
    said = fix = ""
    try:
        _HOW[verb](made[output], made["data"], tmp_path / "out")
    except RushhourError as error:
        said, fix = str(error), error.fix
    assert "\n" not in said
    assert fix or not said, "it says what to do"
    assert (verb in TAKEN[output].split()) == (not said), said or "it was taken"


def _best_of_layouts(self: Any, alive: list[Any]) -> list[Any]:
    """No race: who wins is not the question here."""
    winner = self._best_of_layouts(alive)
    self._leads(winner)
    return [winner]


@pytest.mark.slow
def test_who_names_a_run_for_a_bundle_is_told_which_to_name(made: dict[str, Path]) -> None:
    with pytest.raises(RushhourError, match=r"name a bundle, such as .*run/bundles/int8 or .*run/bundles/reference"):
        Bundle.open(made["run"])
    with pytest.raises(RushhourError, match=r"name a bundle, such as \S+/trained$"):
        open_target(made["trained/training"])
    with pytest.raises(RushhourError, match=r"name a bundle, such as .*small or .* of the \d+ that belong to it"):
        open_target(made["compressed/steps"])


@pytest.mark.slow
def test_the_folder_of_a_training_by_two_is_no_tuning_run(made: dict[str, Path]) -> None:
    """Its plan, by which the workers shared the network, was taken for one that says how to serve."""
    done = invoke("report", made["trained by two/training"])
    assert done.exit_code == 0, done.exception
    assert "report.html" in done.output
    assert isinstance(Plan.load(made["run/plan"]), Plan)
    assert msgspec.json.decode((made["trained by two/training"] / "workers.json").read_bytes())["workers"] == 2
