"""Networks of several inputs: trained, divided among workers, compressed, imported and refused as those of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from test_train_loop import learned
from torch import Tensor, nn

import rushhour
from rushhour.api.inputs import load_data
from rushhour.bundle import Bundle, OpenDimension, Source, joined
from rushhour.compress import Distil, Recipe, Store, apply, default_recipes, outputs_of
from rushhour.data import Dataset, Split
from rushhour.data.arrays import from_arrays
from rushhour.data.augment import Augmentation
from rushhour.engines import EngineConfig
from rushhour.errors import DataError, ModelError, RushhourError
from rushhour.models import forward_names, load_deployed
from rushhour.models.converted import convert, verify
from rushhour.models.deployed import exported_graph
from rushhour.plan import EngineName
from rushhour.progress import Silent
from rushhour.testing.networks import ANY
from rushhour.train import ParallelSettings, TrainSettings
from rushhour.train.feed import Feed
from rushhour.tune.shapes import shapes_of, why_untrainable

HERE = __name__
USER, ITEM = 6, 4
TOKENS = ("input_ids", "attention_mask")
TOWERS = Source(f"{HERE}:two_towers", {"user": (USER,), "item": ITEM, "classes": 2})
TRUSTED = (TOWERS.factory, f"{HERE}:swapped")
SETTINGS = TrainSettings(epochs=2, batch=40, lr=0.02, bf16=False)
ENGINES: tuple[EngineName, ...] = ("torch", "openvino", "onnxruntime")


class TwoTowers(nn.Module):
    def __init__(self, user: int, item: int, classes: int, width: int = 32) -> None:
        super().__init__()
        self.user = nn.Sequential(nn.Linear(user, width), nn.ReLU(), nn.Linear(width, 16))
        self.item = nn.Sequential(nn.Linear(item, width), nn.ReLU(), nn.Linear(width, 16))
        self.out = nn.Linear(16, classes)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        out: Tensor = self.out(self.user(user) * self.item(item))
        return out


def two_towers(user: tuple[int, ...], item: int, classes: int) -> nn.Module:
    return TwoTowers(user[0], item, classes)


class Swapped(TwoTowers):
    def forward(self, item: Tensor, user: Tensor) -> Tensor:
        return super().forward(user, item)


def swapped() -> nn.Module:
    return Swapped(USER, ITEM, 2)


class Reader(nn.Module):
    """As a text network: token ids, and a mask of those that count."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 16)
        self.layers = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        counted = attention_mask.to(torch.float32)[:, :, None]
        mean = (self.words(input_ids) * counted).sum(dim=1) / counted.sum(dim=1)
        out: Tensor = self.layers(mean)
        return out


def arrays(n: int = 800) -> dict[str, NDArray[Any]]:
    """Whether a user and an item, which stands first, point the same way."""
    random = np.random.default_rng(0)
    user, item = random.normal(size=(n, USER)), random.normal(size=(n, ITEM))
    return {"item": item, "user": user, "y": (user[:, :ITEM] * item).sum(1) > 0}


def tokens(n: int = 600) -> dict[str, NDArray[Any]]:
    """Whether most tokens of a text are above 14; those behind its end are noise."""
    random = np.random.default_rng(1)
    ids, length = random.integers(0, 30, (n, 9)), random.integers(3, 10, n)
    mask = (np.arange(9) < length[:, None]).astype(np.int64)
    return {"attention_mask": mask, "input_ids": ids, "y": ((ids > 14) * mask).sum(1) * 2 > length}


class Starred(nn.Module):
    """As `exported_graph` wants it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *samples: Tensor) -> Any:
        return self.network(*samples)


def towers_graph() -> onnx.ModelProto:
    torch.manual_seed(0)
    network, example = Starred(TwoTowers(USER, ITEM, 2)).eval(), (torch.randn(2, USER), torch.randn(2, ITEM))
    return exported_graph(network, example, "towers", ["user", "item"], ["y"], optimize=False)


def reader_graph(dimensions: tuple[OpenDimension, ...] = ()) -> onnx.ModelProto:
    example = tuple(torch.from_numpy(tokens(2)[name]) for name in TOKENS)
    network = Starred(Reader()).eval()
    return exported_graph(network, example, "reader", TOKENS, ["y"], optimize=False, dimensions=dimensions)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return from_arrays(arrays(), name="pairs", seed=0)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("pairs")
    np.savez(folder / "pairs.npz", **arrays())
    data, factory = folder / "pairs.npz", f"{HERE}:two_towers"
    return rushhour.train(factory, data, out=folder / "towers", epochs=15, batch=40, lr=0.01).bundle


def test_arrays_by_the_names_of_inputs_train_a_network(bundle: Bundle, dataset: Dataset) -> None:
    """They reach it by name, on every engine, and in Python."""
    manifest = bundle.manifest
    assert [(spec.name, spec.dtype, spec.shape) for spec in manifest.signature.inputs] == [
        ("user", "float32", (USER,)),
        ("item", "float32", (ITEM,)),
    ]
    fitted = dataset.fitted_to(manifest.signature, "towers")
    answers = [outputs_of(bundle, EngineConfig(name), fitted.test, TRUSTED) for name in ENGINES]
    assert (answers[0].argmax(1) == fitted.test.targets).mean() > 0.85
    for other in answers[1:]:
        np.testing.assert_allclose(other, answers[0], atol=1e-4)
    module = rushhour.load_module(bundle)
    with torch.no_grad():
        again = module(*(torch.from_numpy(fitted.test.inputs[name].copy()) for name in ("user", "item")))
    np.testing.assert_allclose(again.numpy(), answers[0], atol=1e-5)
    assert why_untrainable(bundle, TRUSTED) == ""
    assert shapes_of(bundle, TRUSTED)
    assert "prune" in str(default_recipes(bundle, trusted=TRUSTED)[-1])


def test_names_decide_and_a_step_may_be_divided(dataset: Dataset, tmp_path: Path) -> None:
    """The order of the arrays, and parts of a batch one after another, change nothing."""
    other = dataset.with_inputs(("user", "item"))
    assert dataset.train.inputs.dtype.names == ("item", "user")
    parts = TrainSettings(epochs=2, batch=40, lr=0.02, bf16=False, accumulate=3)
    trained = [
        learned(tmp_path / str(at), data, TOWERS, settings, trusted=TRUSTED)
        for at, (data, settings) in enumerate([(dataset, SETTINGS), (other, SETTINGS), (dataset, parts)])
    ]
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
    assert all(torch.allclose(trained[0][name], trained[2][name], rtol=1e-4, atol=1e-5) for name in trained[0])


def test_pictures_among_inputs_are_augmented_and_the_rest_is_left_alone() -> None:
    random = np.random.default_rng(0)
    left = random.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    samples = joined({"left": left, "sizes": random.normal(size=(12, 2)).astype(np.float32), "right": left})
    split = Split(samples, np.zeros(12, np.int64))
    with Feed(split, seed=0, batch=12, augment=Augmentation(flip=True, crop=0.2)) as feed:
        (batch,) = feed.epoch(0)
    first, sizes, second = (each.numpy() for each in batch.inputs)
    assert np.array_equal(sizes, samples["sizes"][batch.own])
    assert first.dtype == np.uint8
    assert np.array_equal(first, second)  # pictures of one sample move alike
    assert not np.array_equal(first, left[batch.own])


PARTS = {f"{name}_{part}": array for part in ("train", "val", "test") for name, array in arrays(60).items()}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a missing input": ({"user": arrays()["user"], "y": arrays()["y"]}, "a sample has one array"),
    "an unknown input": ({**arrays(), "users": arrays()["user"]}, "a sample has 3 inputs (item, user, users)"),
    "other names": ({"a": arrays()["user"], "b": arrays()["item"], "y": arrays()["y"]}, "user, item are missing"),
    "a wrong width": ({**arrays(), "user": arrays()["item"]}, "its input user takes samples of shape (6,), and these"),
    "too few rows": ({**arrays(), "item": arrays(70)["item"]}, "item of arrays has the shape (70, 4)"),
    "no numbers": ({**arrays(), "item": np.full((800, ITEM), "x")}, "a model takes numbers"),
    "pixels": ({**arrays(), "item": np.zeros((800, ITEM), np.uint8)}, "item takes float32 (pixels that are scaled"),
    "a part without it": ({name: a for name, a in PARTS.items() if name != "item_val"}, "item_validation of arrays is"),
    "one array": ({"x": arrays()["user"], "y": arrays()["y"]}, "a sample has one array"),
}


@pytest.mark.parametrize("what", WRONG)
def test_data_that_does_not_fit_is_refused_before_work(what: str, bundle: Bundle, tmp_path: Path) -> None:
    data, says = WRONG[what]
    for verb in (rushhour.compress, rushhour.tune):
        with pytest.raises(RushhourError) as caught:
            verb(bundle, data, out=tmp_path / "out", **({"slo": "p99<50ms"} if verb is rushhour.tune else {}))  # type: ignore[operator]
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_parts_and_dictionaries_are_read_alike() -> None:
    whole = from_arrays(PARTS, name="parts", seed=0)
    assert [len(part) for part in (whole.train, whole.validation, whole.test)] == [60, 60, 60]
    assert np.array_equal(whole.test.inputs["user"], PARTS["user_test"].astype(np.float32))
    x = {name: arrays()[name] for name in ("item", "user")}
    pair = load_data((x, arrays()["y"]), Silent())  # type: ignore[arg-type]
    assert np.array_equal(pair.test.inputs, load_data(arrays(), Silent()).test.inputs)
    with pytest.raises(DataError, match="x is 2 arrays: several inputs are told apart by their names; give a dict"):
        load_data((list(x.values()), arrays()["y"]), Silent())  # type: ignore[arg-type]
    single = from_arrays({"features": arrays()["user"], "y": arrays()["y"]}, name="one", seed=0)
    assert single.sample_shape == (USER,)
    assert single.notes[0] == "there is no x: a sample is features"


def test_a_reference_network_takes_one_input(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"the model mlp takes one input: a sample has 2: item, user; name a network"):
        rushhour.train("mlp", arrays(), out=tmp_path / "out")


@pytest.mark.slow
def test_a_graph_of_several_inputs_is_trained_further(tmp_path: Path) -> None:
    """The inputs keep their names and order."""
    onnx.save(towers_graph(), tmp_path / "towers.onnx")
    found = rushhour.import_model(tmp_path / "towers.onnx", data=arrays(), out=tmp_path / "imported")
    assert found.understood.why_untrainable == ""
    trained = rushhour.train(tmp_path / "imported", arrays(), out=tmp_path / "trained", epochs=6, lr=0.02).bundle
    assert [spec.name for spec in trained.manifest.signature.inputs] == ["user", "item"]
    data = from_arrays(arrays(), name="pairs", seed=0).fitted_to(trained.manifest.signature, "towers")
    before, after = (outputs_of(each, EngineConfig("onnxruntime"), data.test) for each in (found.bundle, trained))
    right = [(answers.argmax(1) == data.test.targets).mean() for answers in (before, after)]
    assert right[1] > max(0.8, right[0])


def test_a_graph_of_several_inputs_becomes_a_network_of_them() -> None:
    """Compared with ONNX Runtime's answers; a token stays a whole number."""
    graph = towers_graph()
    network = convert(graph, "towers")
    assert verify(graph, network, "towers") < 1e-4
    assert forward_names(network.network()) == ("x", "item")
    texts = reader_graph()
    read = convert(texts, "reader")
    assert read.limits == {"input_ids": 30}
    assert verify(texts, read, "reader") < 1e-4


@pytest.mark.slow
def test_a_module_in_memory_and_its_tokens(tmp_path: Path) -> None:
    """A text network takes whole numbers as they are; int8 and shapes follow as for any other."""
    x = {name: array for name, array in tokens().items() if name != "y"}
    y = tokens()["y"]
    found = rushhour.import_model(Reader(), data=(x, y), out=tmp_path / "reader")
    assert found.understood.why_untrainable == ""
    assert [(s.name, s.dtype) for s in found.bundle.manifest.signature.inputs] == [
        ("input_ids", "int64"),
        ("attention_mask", "int64"),
    ]
    trained = rushhour.train(found.bundle, (x, y), out=tmp_path / "trained", epochs=20, lr=0.02).bundle
    data = from_arrays({**x, "y": y}, name="texts", seed=0).fitted_to(trained.manifest.signature, "reader")
    assert (outputs_of(trained, EngineConfig("openvino"), data.test).argmax(1) == data.test.targets).mean() > 0.8
    onnx.save(reader_graph((OpenDimension("length", 64, dict.fromkeys(TOKENS, 0)),)), tmp_path / "open.onnx")
    fixed = rushhour.train(tmp_path / "open.onnx", (x, y), out=tmp_path / "fixed", epochs=1).bundle
    assert [spec.shape for spec in fixed.manifest.signature.inputs] == [(9,), (9,)]
    sample = rushhour.import_model(Reader(), example={n: a[:4] for n, a in x.items()}, classes=2, out=tmp_path / "few")
    assert sample.bundle.sample_rows().dtype.names == ("input_ids", "attention_mask")


@pytest.mark.slow
def test_a_recipe_of_all_steps(bundle: Bundle, dataset: Dataset, tmp_path: Path) -> None:
    recipe = Recipe.parse("prune:0.5:round_to=4:epochs=1,lowrank:0.5:layers=user.0+item.0,distil:3,int8")
    stages = list(apply(recipe, bundle, dataset, Store(tmp_path), progress=Silent(), trusted=TRUSTED))
    assert len(stages) == 4
    assert stages[-1].manifest.parameters < 0.6 * bundle.manifest.parameters
    data = dataset.fitted_to(bundle.manifest.signature, "towers")
    answers = outputs_of(stages[-1], EngineConfig("openvino", "int8"), data.test)
    assert (answers.argmax(1) == data.test.targets).mean() > 0.8
    assert load_deployed(stages[2], TRUSTED).network.user[0]
    student = Recipe((Distil(3, Source(f"{HERE}:swapped")),))
    with pytest.raises(ModelError, match="its forward takes item, user, and the bundle user, item"):
        list(apply(student, bundle, dataset, Store(tmp_path), progress=Silent(), trusted=TRUSTED))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["data", pytest.param("sharded", marks=pytest.mark.long)])
def test_two_workers_learn_what_one_does(mode: Any, dataset: Dataset, tmp_path: Path) -> None:
    one = learned(tmp_path / "1", dataset, TOWERS, SETTINGS, trusted=TRUSTED)
    shared = ParallelSettings(mode, constants=ANY)
    two = learned(tmp_path / "2", dataset, TOWERS, SETTINGS, workers=2, trusted=TRUSTED, parallel=shared)
    assert all(torch.allclose(one[name], two[name], rtol=1e-5, atol=1e-6) for name in one)
