"""A torch module in memory becomes a bundle that trains from its weights, without a name to build it by."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import rushhour
from rushhour.bundle import Bundle
from rushhour.compress import Distil, Prune, Recipe, Store, apply
from rushhour.data.arrays import from_arrays
from rushhour.errors import BundleError, ModelError
from rushhour.models import load_deployed
from rushhour.progress import Silent
from rushhour.testing.bundles import tiny_bundle


class Small(nn.Module):
    """Convolution, normalisation, dropout; gives a dictionary."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(16 * 16, classes)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.body(x)
        return {"features": features, "logits": self.head(self.drop(features.flatten(1)))}


def small() -> Small:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Small().train()
        with torch.no_grad():
            network(torch.randn(64, 3, 8, 8) * 2 + 1)  # for the statistics of its normalisation
    return network


def pictures(samples: int = 200) -> tuple[Any, Any]:
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, samples)
    x = random.random((samples, 3, 8, 8)).astype(np.float32)
    x[np.arange(samples), labels] += 1
    return x, labels


def test_a_module_becomes_a_bundle(tmp_path: Path) -> None:
    network, (x, y) = small(), pictures()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    found = rushhour.import_model(network, out=tmp_path / "out", data=(x, y))
    understood = found.understood
    assert (understood.format, understood.file, understood.why_untrainable) == ("torch", "the Small", "")
    assert understood.layers == {"Conv2d": 1, "BatchNorm2d": 1, "Linear": 1}
    assert understood.from_original is not None
    assert understood.from_original < 1e-5
    assert any("features, logits the answer is logits" in note for note in understood.notes)
    assert any("1 dropout" in note for note in understood.notes)
    assert "Small" in dict(found.lines)["model"]
    assert network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    (spec,) = found.bundle.manifest.signature.inputs
    assert (spec.name, spec.dtype, spec.shape) == ("input", "float32", (8, 8, 3))
    with torch.no_grad():
        answers = load_deployed(found.bundle)(torch.from_numpy(np.ascontiguousarray(x.transpose(0, 2, 3, 1))))
        expected = network.eval()(torch.from_numpy(x))["logits"].softmax(1)
    torch.testing.assert_close(answers, expected, rtol=1e-4, atol=1e-5)


def test_a_module_without_data_needs_an_example(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"give data, or example=x"):
        rushhour.import_model(small(), out=tmp_path / "out")
    with pytest.raises(ModelError, match=r"cannot take samples of shape \(5,\)"):
        rushhour.import_model(small(), out=tmp_path / "out", example=np.zeros((1, 5), np.float32))
    assert not (tmp_path / "out").exists()
    example = torch.zeros(1, 3, 8, 8)
    found = rushhour.import_model(small(), out=tmp_path / "out", example=example, classes="a,b,c", name="mine")
    assert found.bundle.manifest.name == "mine"
    assert found.bundle.manifest.task.classes == ("a", "b", "c")


@pytest.mark.slow
def test_training_and_a_recipe_begin_with_its_weights(tmp_path: Path) -> None:
    network, (x, y) = small(), pictures()
    trained = rushhour.train(network, (x, y), out=tmp_path / "trained", epochs=1, lr=1e-9, tensorboard=False)
    assert [step.what for step in trained.bundle.manifest.lineage] == ["import", "train"]
    assert trained.bundle.weights is not None
    convolution, kept = network.body[0].weight, load_file(trained.bundle.weights).values()
    assert any(each.shape == convolution.shape and torch.allclose(each, convolution, atol=1e-5) for each in kept)
    data = from_arrays({"x": x, "y": y}, name="arrays", seed=0)
    recipe = Recipe((Prune(ratio=0.5, round_to=1, epochs=0), Distil(1)))
    *_, last = apply(recipe, trained.bundle, data, Store(tmp_path / "store"), progress=Silent())
    assert last.manifest.parameters < 0.7 * trained.bundle.manifest.parameters


class Locked(nn.Module):
    """Cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock, self.dense = threading.Lock(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            return self.dense(x)


class Indexed(nn.Module):
    """Takes whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.dense = nn.Embedding(2, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(self.table(x).mean(1))


class Halved(nn.Module):
    """Splits its features, which torch exports as a sequence of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.normal, self.dense = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.normal(self.wide(x)).chunk(2, 1)
        return self.dense(left * right.sigmoid())


class Mixing(nn.Module):
    """Subtracts the mean of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x - x.mean(0))


@pytest.mark.slow
def test_modules_of_all_kinds(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    half = nn.Linear(4, 2).to(torch.bfloat16).train()
    found = rushhour.import_model(half, out=tmp_path / "half", example=rows)
    assert not found.understood.why_untrainable
    assert half.weight.dtype == torch.bfloat16
    found = rushhour.import_model(Halved(), out=tmp_path / "halved", example=rows)
    assert found.understood.layers == {"Linear": 2, "BatchNorm1d": 1}
    tokens = np.random.default_rng(0).integers(0, 2, (6, 5)).astype(np.float32)
    found = rushhour.import_model(Indexed(), out=tmp_path / "indexed", example=tokens)
    assert "its samples are whole numbers, taken as indices" in found.understood.notes
    assert found.bundle.manifest.signature.inputs[0].dtype == "int64"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.trace(nn.Linear(4, 2), torch.ones(2, 4))
    with pytest.raises(ModelError, match=r"TorchScript"):
        rushhour.import_model(script, out=tmp_path / "no", example=rows)
    with pytest.raises(ModelError, match="depends on the others of its batch"):
        rushhour.import_model(Mixing(), out=tmp_path / "no", example=rows)
    assert not (tmp_path / "no").exists()


def test_a_module_that_cannot_be_copied_is_left_in_its_mode(tmp_path: Path) -> None:
    locked = Locked().train()
    found = rushhour.import_model(locked, out=tmp_path / "out", example=np.ones((2, 4), np.float32))
    assert found.understood.from_original is not None
    assert all(module.training for module in locked.modules())


def test_a_bundle_becomes_a_torch_module_again(tmp_path: Path) -> None:
    network = small()
    found = rushhour.import_model(network, out=tmp_path / "out", example=np.ones((2, 3, 8, 8), np.float32), classes=3)
    module = rushhour.load_module(found)
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(module(x), network.eval()(x)["logits"].softmax(1), rtol=1e-4, atol=1e-5)
    assert sum(parameter.numel() for parameter in module.parameters()) > 0
    (tmp_path / "none").mkdir()
    with pytest.raises(BundleError):
        rushhour.load_module(tmp_path / "none")


def test_the_readme_of_a_bundle_opens_it_without_rushhour(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle")
    text = (bundle.path / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    shown = "import sys\nprint(answers[0].shape, {'rushhour', 'torch'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code + shown], cwd=bundle.path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip() == "(1, 3) set()", done.stderr
    assert "class 0, class 1, class 2" in text
    assert bundle.copy_to(tmp_path / "copy", "another").path.joinpath("README.md").read_text().startswith("# another")
    Bundle.open(bundle.path)  # the README is no part of what is checked
